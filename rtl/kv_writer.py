"""Writers behind the epilogue: K and V to the cache (step 4), logits to memory (step 8)."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from rtl.lib.ops import op_layout
from rtl.lib.ports import KvBeat, LogitsBeat, write_client
from spec.config import LANES
from spec.descriptors import Opcode
from spec.layout import KV_SCALE_BYTES

WORD_BYTES = LANES
"""A KvBeat carries 8 int8."""

LOGITS_BYTES = 4 * LANES


class KvWriter(wiring.Component):
    """Append quantised heads to the KV cache: the int8 of a head in one write, its scale in another.

    Function
        For slot s = position + token of a KEY or VALUE operation, with hd = 8*head_beats and S = ``i_slots``:
        the int8 go to ``kv_address + head*kv_stride + s*hd`` (V: ``+ S*hd``), the FP32 scale to
        ``kv_address + head*kv_stride + 2*S*hd + 8*s`` (V: ``+ 4``), as spec/layout.py has it.
    Streams
        ``i_op``: a KEY or VALUE MATMUL, taken when idle. ``i_beat``: its ``beats * tokens`` KvBeats, head by head.
        ``write``: two commands a head, each followed by its beats.
    Handshake
        ``o_busy`` from the operation's transfer to that of its last write beat; the write DMA's own idle is the fence.
    Timing
        A head takes head_beats + 5 cycles when nothing stalls.
    Numbers
        None: bytes pass unchanged. hd must be a multiple of the bytes of a data beat.
    Twins
        golden/execute.py; tests/test_kv_writer.py.
    """

    i_op: stream.Interface
    i_beat: stream.Interface
    write: wiring.PureInterface
    i_slots: Signal
    o_busy: Signal

    def __init__(self, *, addr_bits: int, data_bits: int) -> None:
        self._addr_bits = addr_bits
        self._data_bits = data_bits
        super().__init__(
            {
                "i_op": In(stream.Signature(op_layout(Opcode.MATMUL))),
                "i_beat": In(stream.Signature(KvBeat)),
                "write": Out(write_client(addr_bits, data_bits)),
                "i_slots": In(24),
                "o_busy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        data_bytes = self._data_bits // 8
        words = data_bytes // WORD_BYTES
        command, out, beat = self.write.cmd, self.write.beat, self.i_beat

        # 1. the operation
        op = Signal(op_layout(Opcode.MATMUL))
        left = Signal(24)  # KvBeats still to come
        m.d.comb += self.i_op.ready.eq(~self.o_busy)
        with m.If(self.i_op.valid & self.i_op.ready):
            m.d.sync += [
                op.eq(self.i_op.payload), self.o_busy.eq(1),
                left.eq(self.i_op.p.beats * self.i_op.p.tokens),
            ]
        head_bytes = Signal(12)
        m.d.comb += head_bytes.eq(op.head_beats << (WORD_BYTES.bit_length() - 1))

        # 2. addresses of a head: products in one cycle, sums in the next
        slot = Signal(24)
        m.d.comb += slot.eq(op.position + beat.p.token)
        head_base, row_offset, region = Signal(self._addr_bits), Signal(self._addr_bits), Signal(self._addr_bits)
        data_address, scale_address = Signal(self._addr_bits), Signal(self._addr_bits)
        m.d.sync += [
            head_base.eq(op.kv_address + beat.p.head * op.kv_stride),
            row_offset.eq(slot * head_bytes),
            region.eq(self.i_slots * head_bytes),
        ]

        # 3. words of 8 bytes -> beats
        position = Signal(range(max(words, 2)))
        held = Signal(8 * (data_bytes - WORD_BYTES)) if words > 1 else None
        row = Cat(held, beat.p.data) if held is not None else beat.p.data
        full = Signal()
        m.d.comb += full.eq(position == words - 1)
        scale = Signal(32)

        with m.FSM(name="head"):
            with m.State("WAIT"):
                with m.If(self.o_busy & (left == 0)):
                    m.d.sync += self.o_busy.eq(0)
                with m.Elif(self.o_busy & beat.valid):
                    m.next = "SUM"
            with m.State("SUM"):
                m.d.sync += [
                    data_address.eq(head_base + row_offset + Mux(beat.p.value, region, 0)),
                    scale_address.eq(
                        head_base + (region << 1) + (slot << (KV_SCALE_BYTES.bit_length() - 1)) + (beat.p.value << 2)
                    ),
                ]
                m.next = "ROW"
            with m.State("ROW"):
                m.d.comb += [
                    command.valid.eq(1),
                    command.p.addr.eq(data_address),
                    command.p.beats.eq(head_bytes >> (data_bytes.bit_length() - 1)),
                ]
                with m.If(command.ready):
                    m.next = "DATA"
            with m.State("DATA"):
                m.d.comb += [
                    out.valid.eq(beat.valid & full),
                    out.p.data.eq(row),
                    out.p.strb.eq(-1),
                    beat.ready.eq(~full | out.ready),
                ]
                with m.If(beat.valid & beat.ready):
                    m.d.sync += [position.eq(Mux(full, 0, position + 1)), left.eq(left - 1), scale.eq(beat.p.scale)]
                    if held is not None:
                        m.d.sync += held.eq(row >> (8 * WORD_BYTES))
                    with m.If(beat.p.last):
                        m.next = "SCALE"
            with m.State("SCALE"):
                m.d.comb += [
                    command.valid.eq(1),
                    command.p.addr.eq(scale_address & ~(data_bytes - 1)),
                    command.p.beats.eq(1),
                ]
                with m.If(command.ready):
                    m.next = "SCALE_DATA"
            with m.State("SCALE_DATA"):
                lane = scale_address[2 : data_bytes.bit_length() - 1]
                m.d.comb += [
                    out.valid.eq(1),
                    out.p.data.eq(scale.replicate(data_bytes // 4)),
                    out.p.strb.eq(0xF << (lane << 2)),
                ]
                with m.If(out.ready):
                    m.next = "WAIT"
        return m


class LogitsWriter(wiring.Component):
    """Write logits to memory: 8 FP32 of beat b at ``i_address + 32*b``.

    Streams
        ``i_beat``: LogitsBeat. ``write``: one command of 32 bytes a beat; ports wider than that write a part of a beat.
    Handshake
        ``o_busy`` while a beat is inside.
    Timing
        max(1, 32 / beat bytes) + 1 cycles a beat.
    Twins
        golden/execute.py; tests/test_kv_writer.py.
    """

    i_beat: stream.Interface
    write: wiring.PureInterface
    i_address: Signal
    o_busy: Signal

    def __init__(self, *, addr_bits: int, data_bits: int) -> None:
        self._addr_bits = addr_bits
        self._data_bits = data_bits
        super().__init__(
            {
                "i_beat": In(stream.Signature(LogitsBeat)),
                "write": Out(write_client(addr_bits, data_bits)),
                "i_address": In(addr_bits),
                "o_busy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        data_bytes = self._data_bits // 8
        beats = max(1, LOGITS_BYTES // data_bytes)
        rows = max(1, data_bytes // LOGITS_BYTES)  # in a beat
        command, out = self.write.cmd, self.write.beat
        row = Signal(LOGITS_BYTES * 8)
        address = Signal(self._addr_bits)
        index = Signal(range(max(beats, 2)))
        with m.FSM(name="row"):
            with m.State("TAKE"):
                m.d.comb += self.i_beat.ready.eq(1)
                with m.If(self.i_beat.valid):
                    m.d.sync += [
                        row.eq(self.i_beat.p.data),
                        address.eq(self.i_address + (self.i_beat.p.beat << (LOGITS_BYTES.bit_length() - 1))),
                    ]
                    m.next = "COMMAND"
            with m.State("COMMAND"):
                m.d.comb += [
                    self.o_busy.eq(1), command.valid.eq(1), command.p.addr.eq(address), command.p.beats.eq(beats),
                ]
                if rows > 1:
                    m.d.comb += command.p.addr.eq(address & ~(data_bytes - 1))
                with m.If(command.ready):
                    m.next = "DATA"
            with m.State("DATA"):
                m.d.comb += [
                    self.o_busy.eq(1), out.valid.eq(1), out.p.data.eq(row[: self._data_bits]), out.p.strb.eq(-1),
                ]
                if rows > 1:
                    part = address[LOGITS_BYTES.bit_length() - 1 : data_bytes.bit_length() - 1]
                    strobes = Cat((part == n).replicate(LOGITS_BYTES) for n in range(rows))
                    m.d.comb += [out.p.data.eq(row.replicate(rows)), out.p.strb.eq(strobes)]
                with m.If(out.ready):
                    m.d.sync += [row.eq(row >> self._data_bits), index.eq(index + 1)]
                    with m.If(index == beats - 1):
                        m.d.sync += index.eq(0)
                        m.next = "TAKE"
        return m
