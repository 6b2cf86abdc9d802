"""The accelerator: units joined in the order of the prompt-to-token table (README)."""

from amaranth.hdl import (
    Cat,
    ClockDomain,
    ClockSignal,
    Const,
    DomainRenamer,
    Module,
    Mux,
    ResetInserter,
    ResetSignal,
    Signal,
    Value,
    ValueLike,
)
from amaranth.lib import data
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import Component, In, Out, connect, flipped

from rtl.address_guard import AddressGuard
from rtl.attention import Attention
from rtl.bus.axi import Axi4LiteSignature, Axi4ReadSignature, Axi4Signature
from rtl.bus.csr_bank import CsrBank
from rtl.bus.read_mux import ReadMux
from rtl.bus.reader import BurstReader
from rtl.bus.writer import BurstWriter, WriteMux
from rtl.counters import Counters
from rtl.descriptor_fetch import DescriptorFetch
from rtl.epilogue import EPILOGUE_PARTS, Epilogue
from rtl.group_matmul import GroupMatmul
from rtl.group_stream import GroupStream
from rtl.kv_writer import KvWriter, LogitsWriter
from rtl.lib.fifo import StreamFifo
from rtl.lib.ports import dma_command
from rtl.loader import Loader
from rtl.norm import Norm
from rtl.sequencer import Sequencer
from rtl.tlmm import Tlmm
from rtl.vector_memory import VectorMemory
from rtl.weight_stream import WeightStream
from spec.config import LANES, AcceleratorConfig, GroupMatmulConfig
from spec.csr import MAGIC, OUT_TOKENS, REGISTERS, VERSION
from spec.descriptors import Unit
from spec.faults import DebugSpace, FaultCode
from spec.hashing import spec_hash
from spec.limits import field_limits

CSR_ADDR_BITS = 12
STREAM_QUEUE = 4
"""STREAM descriptors that may wait for the weight port: they must never hold back the operations behind them."""

WEIGHT_FIFO_BEATS = 256
DATA_FIFO_BEATS = 64


GATED = ("loader", "norm", "matmul", "epilogue", *EPILOGUE_PARTS, "writers", "attention")
"""Clocks that may stop while their units have nothing to do: units, parts of the epilogue, and ``writers``, which is all
between the epilogue and the write port."""

AWAKE_CYCLES = 4
"""Cycles that a unit stays awake after its last reason to be: registered inputs and memory reads settle in fewer."""


def matmul_unit(config: AcceleratorConfig) -> tuple[WeightStream | GroupStream, Tlmm | GroupMatmul]:
    """Parser of the weight stream, and the engine that it feeds."""
    matmul, size = config.matmul, config.bus.weight_bytes
    if isinstance(matmul, GroupMatmulConfig):
        return GroupStream(matmul, weight_bytes=size, aux_beats=config.aux_beats), GroupMatmul(matmul)
    return WeightStream(matmul, weight_bytes=size, aux_beats=config.aux_beats), Tlmm(matmul, weight_bytes=size)


class Lutra(Component):
    """A device: AXI4-Lite registers, an AXI4 read port for weights, an AXI4 port for all other data, an interrupt.

    Function
        Runs the programs of docs/isa.md.
    Ports
        ``s_axil``: registers (spec/csr.py). ``m_axi_w``: the weight stream, read only. ``m_axi_d``: descriptors,
        embedding and RoPE rows, KV cache, logits. ``irq``: 1 while done, paused or stopped by a fault.
    Clocks
        With ``gated``, each unit of GATED has a clock input ``clk_<unit>``: an edge of it must come with an edge of ``clk``
        whenever ``wake_<unit>`` was 1 before that edge, and may come otherwise. A board gates them (BUFGCE) or ties them
        to ``clk``; the simulator leaves idle units alone, which is most of its speed. Without, there is one clock.
    Twins
        golden/device.py; tests/test_top.py.
    """

    def __init__(self, config: AcceleratorConfig, *, gated: bool = False) -> None:
        self.config = config
        self._gated = gated
        bus = config.bus
        clocks = {f"clk_{name}": In(1) for name in GATED} | {f"wake_{name}": Out(1) for name in GATED}
        super().__init__(
            {
                "s_axil": In(Axi4LiteSignature(addr_bits=CSR_ADDR_BITS, data_bits=32)),
                "m_axi_w": Out(Axi4ReadSignature(addr_bits=bus.addr_bits, data_bits=bus.weight_bits)),
                "m_axi_d": Out(Axi4Signature(addr_bits=bus.addr_bits, data_bits=bus.data_bits)),
                "irq": Out(1),
            }
            | (clocks if gated else {})
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, bus = self.config, self.config.bus

        # Everything between registers and bus masters can be reset while both live on.
        reset = Signal()

        for name in GATED if self._gated else ():
            m.domains += ClockDomain(name)
            m.d.comb += [
                ClockSignal(name).eq(getattr(self, f"clk_{name}")),
                ResetSignal(name).eq(ResetSignal("sync")),
            ]

        def domain(name: str) -> str:
            return name if self._gated else "sync"

        def unit(name: str, component: Component, *, clock: str | None = None) -> Component:
            whole = ResetInserter(dict.fromkeys(("sync", *GATED), reset))(component)
            if (clock or name) in GATED:
                whole = DomainRenamer(domain(clock or name))(whole)
            m.submodules[name] = whole
            return component

        # Registers --------------------------------------------------------------------------------------------------
        m.submodules.csr = csr = CsrBank(REGISTERS, addr_bits=CSR_ADDR_BITS)
        connect(m, flipped(self.s_axil), csr.s_axil)
        limit = Cat(csr.memory_limit)
        start = csr.control_stb & csr.control[0]
        resume = csr.control_stb & csr.control[1]
        digest = spec_hash(config)

        # Sequencer: one descriptor after the other ------------------------------------------------------------------
        sequencer = unit("sequencer", Sequencer(tile_tokens=config.matmul.tokens, limits=field_limits(config)))
        fetch = unit("fetch", DescriptorFetch(addr_bits=bus.addr_bits, data_bits=bus.data_bits))
        connect(m, fetch.o_descriptor, sequencer.i_descriptor)
        counters = unit("counters", Counters(bus.weight_bytes))
        m.d.comb += [
            fetch.i_start.eq(sequencer.o_fetch),
            fetch.i_program.eq(Cat(csr.program)),
            sequencer.i_fetch_idle.eq(fetch.o_idle),
            sequencer.i_start.eq(start),
            sequencer.i_resume.eq(resume),
            sequencer.i_program.eq(Cat(csr.program)),
            sequencer.i_position.eq(csr.position),
            sequencer.i_token_count.eq(csr.token_count),
            sequencer.i_cache_slots.eq(csr.cache_slots),
            sequencer.i_repeat.eq(csr.repeat),
            sequencer.i_stop_token.eq(csr.stop_token),
            sequencer.i_break_at.eq(csr.break_at),
            sequencer.i_watchdog.eq(csr.watchdog),
            sequencer.i_cycle.eq(counters.o_cycles),
        ]

        # 1. embedding and RoPE rows ---------------------------------------------------------------------------------
        loader = unit(
            "loader",
            Loader(
                addr_bits=bus.addr_bits,
                data_bits=bus.data_bits,
                max_grouped=config.max_vector if config.grouped else 0,
            ),
        )
        connect(m, sequencer.o_embed, loader.i_embed)
        connect(m, sequencer.o_rope, loader.i_rope)
        token = Signal(32)
        with m.Switch(loader.o_token_index):
            for i, word in enumerate(csr.tokens):
                with m.Case(i):
                    m.d.comb += token.eq(word)
        m.d.comb += loader.i_token.eq(Mux(sequencer.o_feedback, sequencer.o_feedback_token, token))

        # 2. norm and quantise ---------------------------------------------------------------------------------------
        norm = unit(
            "norm",
            Norm(
                weight_bits=bus.weight_bits,
                tokens=config.matmul.tokens,
                max_vector=config.max_vector,
                grouped=config.grouped,
            ),
        )
        connect(m, sequencer.o_norm, norm.i_op)

        # 3. matmul engine, fed by the weight stream -----------------------------------------------------------------
        weights, matmul = matmul_unit(config)
        unit("weights", weights)
        unit("matmul", matmul)
        connect(m, sequencer.o_matmul, matmul.i_op)
        connect(m, norm.act, matmul.act)
        m.d.comb += [weights.i_clear.eq(reset), matmul.i_clear.eq(reset)]
        if config.grouped:
            connect(m, matmul.codes, weights.codes)
            connect(m, matmul.scales, weights.scales)
            connect(m, norm.group_scale, matmul.group_scale)
        else:
            connect(m, matmul.read, weights.read)

        # 4. epilogue, and the KV writer behind it -------------------------------------------------------------------
        epilogue = unit(
            "epilogue",
            Epilogue(
                weight_bits=bus.weight_bits,
                tokens=config.matmul.tokens,
                outputs=config.matmul.outputs,
                max_row_scales=config.max_row_scales,
                max_head_dim=config.attention.max_head_dim,
                max_channels=config.max_channels,
                sum_bits=config.matmul.acc_bits if config.grouped else 32,
                block_major=config.grouped,
                domain=domain,
            ),
        )
        connect(m, sequencer.o_epilogue, epilogue.i_op)
        connect(m, matmul.o_y, epilogue.i_y)
        connect(m, norm.scale, epilogue.scale)
        connect(m, loader.rope, epilogue.rope)
        kv_writer = unit("kv_writer", KvWriter(addr_bits=bus.addr_bits, data_bits=bus.data_bits), clock="writers")
        connect(m, sequencer.o_kv, kv_writer.i_op)
        connect(m, epilogue.o_kv, kv_writer.i_beat)
        m.d.comb += kv_writer.i_slots.eq(csr.cache_slots)

        # 5. attention -----------------------------------------------------------------------------------------------
        attention = unit(
            "attention",
            Attention(config.attention, addr_bits=bus.addr_bits, data_bits=bus.data_bits, tokens=config.matmul.tokens),
        )
        connect(m, sequencer.o_attend, attention.i_op)
        connect(m, epilogue.query, attention.query)
        m.d.comb += attention.i_slots.eq(csr.cache_slots)

        # 8. logits and argmax ---------------------------------------------------------------------------------------
        logits = unit("logits", LogitsWriter(addr_bits=bus.addr_bits, data_bits=bus.data_bits), clock="writers")
        connect(m, epilogue.o_logits, logits.i_beat)
        m.d.comb += [
            logits.i_address.eq(Cat(csr.logits)),
            epilogue.i_logits_enable.eq(csr.logits_enable[0]),
            sequencer.i_argmax.eq(epilogue.o_argmax),
        ]

        # Vector memory: the rows that 1, 4, 5 write and 2, 4, 5 read ------------------------------------------------
        vector = unit("vector", VectorMemory(rows=config.vector_rows, readers=4, writers=3))
        for port, reader in zip(vector.read, (norm.vector, epilogue.vector_read, attention.vector_read), strict=False):
            connect(m, reader, port)
        for port, writer in zip(vector.write, (loader.vector, epilogue.vector_write, attention.vector_write), strict=True):
            connect(m, writer, port)

        # Norm weights and row scales come beside the matrices, in the order of use.
        m.d.comb += [
            norm.i_aux.payload.eq(weights.o_aux.payload),
            epilogue.i_aux.payload.eq(weights.o_aux.payload),
            norm.i_aux.valid.eq(weights.o_aux.valid & norm.o_busy),
            epilogue.i_aux.valid.eq(weights.o_aux.valid & ~norm.o_busy),
            weights.o_aux.ready.eq(Mux(norm.o_busy, norm.i_aux.ready, epilogue.i_aux.ready)),
        ]

        # Weight port ------------------------------------------------------------------------------------------------
        m.submodules.weight_port = weight_port = BurstReader(
            data_bits=bus.weight_bits,
            addr_bits=bus.addr_bits,
            max_burst=bus.max_burst_beats,
            max_outstanding=bus.weight_outstanding,
            fifo_beats=WEIGHT_FIFO_BEATS,
            buffered=True,
        )
        connect(m, weight_port.m_axi, flipped(self.m_axi_w))
        command = dma_command(bus.addr_bits)
        streams = unit("streams", StreamFifo(command, depth=STREAM_QUEUE))
        classes = unit("stream_classes", StreamFifo(1, depth=2 * STREAM_QUEUE))
        weight_guard = unit("weight_guard", AddressGuard(addr_bits=bus.addr_bits, data_bits=bus.weight_bits))
        connect(m, streams.o_data, weight_guard.i_cmd)
        connect(m, weight_guard.o_cmd, weight_port.i_cmd)
        both = streams.i_data.ready & classes.i_data.ready
        m.d.comb += [
            streams.i_data.p.addr.eq(sequencer.o_stream.p.address),
            streams.i_data.p.beats.eq(sequencer.o_stream.p.beats),
            classes.i_data.payload.eq(sequencer.o_stream.p.head),
            streams.i_data.valid.eq(sequencer.o_stream.valid & both),
            classes.i_data.valid.eq(sequencer.o_stream.valid & both),
            sequencer.o_stream.ready.eq(both),
            weight_guard.i_limit.eq(limit),
            weights.i_beat.valid.eq(weight_port.o_data.valid),
            weights.i_beat.payload.eq(weight_port.o_data.p.data),
            weight_port.o_data.ready.eq(weights.i_beat.ready),
        ]
        weight_beat = weight_port.o_data.valid & weight_port.o_data.ready
        m.d.comb += classes.o_data.ready.eq(weight_beat & weight_port.o_data.p.last)

        # Data port --------------------------------------------------------------------------------------------------
        m.submodules.data_reader = data_reader = BurstReader(
            data_bits=bus.data_bits,
            addr_bits=bus.addr_bits,
            max_burst=bus.max_burst_beats,
            max_outstanding=bus.data_outstanding,
            fifo_beats=DATA_FIFO_BEATS,
        )
        read_mux = unit("read_mux", ReadMux(3, data_bits=bus.data_bits, addr_bits=bus.addr_bits))
        read_guard = unit("read_guard", AddressGuard(addr_bits=bus.addr_bits, data_bits=bus.data_bits))
        for i, client in enumerate((fetch.read, loader.read, attention.kv)):
            connect(m, client.cmd, read_mux.i_cmd[i])
            connect(m, read_mux.o_data[i], client.beat)
        connect(m, read_mux.o_cmd, read_guard.i_cmd)
        connect(m, read_guard.o_cmd, data_reader.i_cmd)
        connect(m, data_reader.o_data, read_mux.i_data)

        m.submodules.data_writer = data_writer = BurstWriter(
            data_bits=bus.data_bits,
            addr_bits=bus.addr_bits,
            max_burst=bus.max_burst_beats,
            max_outstanding=bus.data_outstanding,
        )
        write_mux = unit("write_mux", WriteMux(2, data_bits=bus.data_bits, addr_bits=bus.addr_bits), clock="writers")
        write_guard = unit(
            "write_guard", AddressGuard(addr_bits=bus.addr_bits, data_bits=bus.data_bits), clock="writers"
        )
        for i, client in enumerate((kv_writer.write, logits.write)):
            connect(m, client.cmd, write_mux.i_cmd[i])
            connect(m, client.beat, write_mux.i_data[i])
        connect(m, write_mux.o_cmd, write_guard.i_cmd)
        connect(m, write_guard.o_cmd, data_writer.i_cmd)
        connect(m, write_mux.o_data, data_writer.i_data)
        m.d.comb += [read_guard.i_limit.eq(limit), write_guard.i_limit.eq(limit)]
        for part in (data_reader.m_axi, data_writer.m_axi):
            for name, member in part.signature.members.items():
                ours, theirs = getattr(self.m_axi_d, name), getattr(part, name)
                m.d.comb += ours.eq(theirs) if member.flow is Out else theirs.eq(ours)

        # Who is busy ------------------------------------------------------------------------------------------------
        kv_writing = kv_writer.o_busy | logits.o_busy | ~data_writer.o_idle
        m.d.comb += [
            sequencer.i_busy[Unit.STREAM].eq(streams.o_data.valid),
            sequencer.i_busy[Unit.LOADER].eq(loader.o_busy),
            sequencer.i_busy[Unit.VECTOR].eq(norm.o_busy),
            sequencer.i_busy[Unit.MATMUL].eq(matmul.o_busy | epilogue.o_busy),
            sequencer.i_busy[Unit.KV_WRITE].eq(kv_writing),
            sequencer.i_busy[Unit.ATTENTION].eq(attention.o_busy),
        ]
        data_beat = data_reader.o_data.valid & data_reader.o_data.ready
        write_beat = data_writer.i_data.valid & data_writer.i_data.ready
        m.d.comb += sequencer.i_progress.eq(
            weight_beat | data_beat | write_beat | matmul.o_lookup | norm.vector.en | fetch.o_descriptor.ready
            | (attention.o_busy & ~attention.o_starved)
        )

        # Who needs a clock: a unit with an operation, or with something coming in
        if self._gated:
            tile_written = norm.act.en | norm.group_scale.en if config.grouped else norm.act.en
            awake = {
                "loader": loader.o_busy | loader.i_embed.valid | loader.i_rope.valid,
                "norm": norm.o_busy | norm.i_op.valid,
                "matmul": matmul.o_busy | matmul.i_op.valid | tile_written,
                "epilogue": epilogue.o_wake,
                **{part: epilogue.o_wake & epilogue.o_parts[part] for part in EPILOGUE_PARTS},
                "writers": (
                    kv_writing | kv_writer.i_op.valid | kv_writer.i_beat.valid | logits.i_beat.valid
                    | write_mux.o_cmd.valid | write_mux.o_data.valid
                ),
                "attention": attention.o_busy | attention.i_op.valid | attention.query.en | attention.query.scale_en,
            }
            for name, condition in awake.items():
                linger = Signal(AWAKE_CYCLES, name=f"linger_{name}")  # what came in also has to settle
                m.d.sync += linger.eq(Cat(condition, linger))
                m.d.comb += getattr(self, f"wake_{name}").eq(
                    condition | linger.any() | reset | ResetSignal("sync")
                )

        # Faults: a priority list ------------------------------------------------------------------------------------
        faults = [
            (weight_port.o_error, FaultCode.AXI_WEIGHT_READ, weight_port.o_error_addr),
            (data_reader.o_error, FaultCode.AXI_DATA_READ, data_reader.o_error_addr),
            (data_writer.o_error, FaultCode.AXI_DATA_WRITE, data_writer.o_error_addr),
            (weight_guard.o_fault, FaultCode.ADDRESS, weight_guard.o_address),
            (read_guard.o_fault, FaultCode.ADDRESS, read_guard.o_address),
            (write_guard.o_fault, FaultCode.ADDRESS, write_guard.o_address),
            (loader.o_bad_token, FaultCode.ADDRESS, Const(0, 1)),
            (weights.o_error, FaultCode.WEIGHT_STREAM, Const(0, 1)),
        ]
        for raised, code, address in reversed(faults):
            with m.If(raised):
                m.d.comb += [
                    sequencer.i_fault.eq(1), sequencer.i_fault_code.eq(code), sequencer.i_fault_address.eq(address),
                ]

        # Reset on command: units at once, bus masters when what is in flight has come back --------------------------
        resetting = Signal()
        asked = csr.control_stb & csr.control[2]
        quiet = weight_port.o_idle & data_reader.o_idle & data_writer.o_idle
        settle = Signal(2)
        with m.If(asked):
            m.d.sync += [resetting.eq(1), settle.eq(0)]
        with m.Elif(resetting):
            m.d.sync += settle.eq(Mux(settle == 3, 3, settle + 1))
            with m.If((settle == 3) & quiet):
                m.d.sync += resetting.eq(0)
        m.d.comb += reset.eq(resetting)
        for port in (weight_port, data_reader, data_writer):
            m.d.comb += port.i_clear.eq(resetting & (settle == 0))

        # Counters ---------------------------------------------------------------------------------------------------
        def count_bytes(beat: ValueLike, size: int) -> Value:
            return Value.cast(Mux(beat, size, 0))

        m.d.comb += [
            counters.i_clear.eq(start & ~sequencer.o_running),
            counters.cycles.eq(sequencer.o_running & ~sequencer.o_paused),
            counters.matmul_busy.eq(matmul.o_lookup),
            counters.matmul_starved.eq(matmul.o_starved),
            counters.matmul_stalled.eq(matmul.o_stalled),
            counters.vector_busy.eq(norm.o_busy),
            counters.attention_busy.eq(attention.o_busy),
            counters.attention_starved.eq(attention.o_starved),
            counters.weight_bytes.eq(count_bytes(weight_beat & ~classes.o_data.payload, bus.weight_bytes)),
            counters.head_bytes.eq(count_bytes(weight_beat & classes.o_data.payload, bus.weight_bytes)),
            counters.kv_read_bytes.eq(count_bytes(attention.kv.beat.valid & attention.kv.beat.ready, bus.data_bytes)),
            counters.kv_write_bytes.eq(
                count_bytes(kv_writer.write.beat.valid & kv_writer.write.beat.ready, bus.data_bytes)
            ),
            counters.activation_bytes.eq(
                count_bytes(fetch.read.beat.valid, bus.data_bytes)
                + count_bytes(loader.read.beat.valid & loader.read.beat.ready, bus.data_bytes)
                + count_bytes(logits.write.beat.valid & logits.write.beat.ready, bus.data_bytes)
            ),
        ]

        # Generated tokens and the debug window ----------------------------------------------------------------------
        record = data.StructLayout({"token": 32, "cycle": 64})
        m.submodules.generated = generated = Memory(shape=record, depth=OUT_TOKENS, init=[])
        write, read = generated.write_port(), generated.read_port(domain="comb")
        debug_index = csr.debug_addr[:24]
        debug_space = csr.debug_addr[28:]
        debug_vector = vector.read[3]
        debug_row = Signal(256)
        m.d.comb += [
            write.en.eq(sequencer.generated.en),
            write.addr.eq(sequencer.generated.index),
            write.data.token.eq(sequencer.generated.token),
            write.data.cycle.eq(sequencer.generated.cycle),
            read.addr.eq(debug_index >> 2),
            debug_vector.en.eq(~sequencer.o_running | sequencer.o_paused),
            debug_vector.addr.eq(debug_index >> (LANES.bit_length() - 1)),
            debug_row.eq(debug_vector.data),
        ]
        with m.If(debug_space == DebugSpace.GENERATED):
            m.d.comb += csr.debug_data.eq(Cat(read.data.token, read.data.cycle, Const(0, 32)).word_select(debug_index[:2], 32))
        with m.Else():
            m.d.comb += csr.debug_data.eq(debug_row.word_select(debug_index[:3], 32))

        # What the registers show ------------------------------------------------------------------------------------
        m.d.comb += [
            csr.magic.eq(MAGIC),
            csr.version.eq(VERSION),
            csr.spec_hash[0].eq(digest & 0xFFFFFFFF),
            csr.spec_hash[1].eq(digest >> 32),
            csr.status.eq(
                Cat(
                    sequencer.o_running & ~sequencer.o_paused | resetting,
                    sequencer.o_done,
                    sequencer.o_paused,
                    sequencer.o_fault,
                )
            ),
            csr.fault.eq(Cat(sequencer.o_report.code, sequencer.o_report.tag)),
            Cat(csr.fault_addr).eq(sequencer.o_report.address),
            csr.fault_descriptor.eq(sequencer.o_report.index),
            csr.argmax.eq(epilogue.o_argmax),
            csr.generated.eq(sequencer.o_generated),
            csr.descriptor_index.eq(sequencer.o_index),
            self.irq.eq(sequencer.o_done | sequencer.o_paused | sequencer.o_fault),
        ]
        for i, word in enumerate(counters.words):
            m.d.comb += csr.counters[i].eq(word)
        return m
