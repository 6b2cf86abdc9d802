"""Reads the KV cache, block by block, ahead of the attention engine."""

from amaranth.hdl import Cat, Module, Mux, ShapeLike, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from rtl.attention_items import BLOCK_BUFFERS, SLOT_BITS, AttentionSizes
from rtl.lib.ops import op_layout
from rtl.lib.ports import read_client
from spec.config import KEY_BLOCK
from spec.descriptors import Opcode
from spec.layout import KV_SCALE_BYTES

__all__ = ["BlockMemory", "KvReader"]

SCALE_BYTES = KEY_BLOCK * KV_SCALE_BYTES
BIAS_BYTES = KEY_BLOCK * 4


def _widened(nibble: Value) -> Value:
    """An int4 as the 8 bits of an int8."""
    return Cat(nibble, nibble[3].replicate(4))


class BlockMemory(wiring.Component):
    """The same bytes of several buffers, written in bus beats, read in words of another width.

    Function
        Word ``read_addr[i]`` (of ``read_bits``) is on ``read_data[i]`` in the next cycle. Writes are in beats of
        ``write_bits``; beat and word 0 start at the same byte.
    Timing
        One write and one read a port a cycle. A read in the cycle of a write to the same place gives the old data.
    Cost
        One memory as wide as the wider of both, and for narrow reads a selector behind it.
    Twins
        tests/test_attention.py.
    """

    write_en: Signal
    write_addr: Signal
    write_data: Signal

    def __init__(self, *, size_bytes: int, write_bits: int, read_bits: int, read_ports: int = 1) -> None:
        self._write_bits = write_bits
        self._read_bits = read_bits
        self._wide_bits = max(write_bits, read_bits)
        self._depth = 8 * size_bytes // self._wide_bits
        self._read_ports = read_ports
        read_words: ShapeLike = range(8 * size_bytes // read_bits)
        super().__init__(
            {
                "write_en": In(1),
                "write_addr": In(range(8 * size_bytes // write_bits)),
                "write_data": In(write_bits),
                "read_addr": In(read_words).array(read_ports),
                "read_data": Out(read_bits).array(read_ports),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        beats_log2 = (self._wide_bits // self._write_bits).bit_length() - 1  # beats in a memory row
        words_log2 = (self._wide_bits // self._read_bits).bit_length() - 1  # words in a memory row
        m.submodules.storage = storage = Memory(shape=self._wide_bits, depth=self._depth, init=[])
        write = storage.write_port(granularity=self._write_bits)
        m.d.comb += [
            write.addr.eq(self.write_addr >> beats_log2),
            write.data.eq(self.write_data.replicate(1 << beats_log2)),
            write.en.eq(self.write_en << self.write_addr[:beats_log2]),
        ]
        for port in range(self._read_ports):
            read = storage.read_port(domain="sync")
            word = Signal(words_log2, name=f"word_{port}")
            m.d.sync += word.eq(self.read_addr[port][:words_log2])
            m.d.comb += [
                read.addr.eq(self.read_addr[port] >> words_log2),
                self.read_data[port].eq(read.data.word_select(word, self._read_bits)),
            ]
        return m


class KvReader(wiring.Component):
    """Load the blocks of an operation into a ring of buffers, each byte once.

    Function
        For each KV head, for each block of 16 slots up to the last position: K, V, scales and, with ``bias``, the bias
        of the slots (spec/layout.py, `KvLayout`). Buffer = number of the block modulo 4, over operations too. With
        ``k_int4``, ``v_int4`` the buffers hold nibbles as memory does; they become int8 when they are read.
    Streams
        ``kv``: a read client. Commands of a block go out when its buffer is free, so its beats never wait.
    Handshake
        ``i_start`` pulses with ``i_op`` and ``i_slots`` valid, which hold until the operation has ended. ``o_loaded``
        pulses when a block is complete, ``i_release`` when its last reader is done.
        ``k``, ``v``: chunk (buffer, number in the block), ``lanes`` int8. ``scale``: slot (buffer, slot), FP32 of K and
        of V, two ports. ``bias``: FP32 of the slot. Data in the cycle after the address.
    Timing
        4 cycles from ``i_start`` to the first command, then commands back to back; a block is 16*(2*head_dim + 8) bytes
        (8*head_dim less for each of K and V that is int4, 64 more with bias), one beat a cycle.
    Cost
        4 buffers of 16 * (2 * max_head_dim + 12) bytes (the sizes rounded up to powers of two).
    Twins
        tests/test_attention.py.
    """

    i_start: Signal
    i_op: data.View
    i_slots: Signal
    i_release: Signal
    o_loaded: Signal
    kv: wiring.PureInterface
    k_addr: Signal
    k_data: Signal
    v_addr: Signal
    v_data: Signal
    bias_addr: Signal
    bias_data: Signal

    def __init__(self, sizes: AttentionSizes, *, data_bits: int, addr_bits: int) -> None:
        if data_bits not in (64, 128, 256, 512):
            raise ValueError(f"data_bits must be 64, 128, 256 or 512, not {data_bits}")
        self._sizes = sizes
        self._data_bits = data_bits
        self._addr_bits = addr_bits
        chunk_addr = ceil_log2(BLOCK_BUFFERS) + sizes.block_chunk_bits
        slot_addr = ceil_log2(BLOCK_BUFFERS) + SLOT_BITS
        super().__init__(
            {
                "i_start": In(1),
                "i_op": In(op_layout(Opcode.ATTEND)),
                "i_slots": In(24),
                "i_release": In(1),
                "o_loaded": Out(1),
                "kv": Out(read_client(addr_bits, data_bits)),
                "k_addr": In(chunk_addr),
                "k_data": Out(8 * sizes.lanes),
                "v_addr": In(chunk_addr),
                "v_data": Out(8 * sizes.lanes),
                "scale_addr": In(slot_addr).array(2),
                "scale_data": Out(8 * KV_SCALE_BYTES).array(2),
                "bias_addr": In(slot_addr),
                "bias_data": Out(32),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        sizes, op = self._sizes, self.i_op
        beat_log2 = (self._data_bits // 8).bit_length() - 1
        plane_bytes = sizes.lanes << sizes.block_chunk_bits

        # 1. storage
        def memory(name: str, size_bytes: int, read_bits: int, read_ports: int = 1) -> BlockMemory:
            block = BlockMemory(
                size_bytes=BLOCK_BUFFERS * size_bytes,
                write_bits=self._data_bits,
                read_bits=read_bits,
                read_ports=read_ports,
            )
            m.submodules[name] = block
            return block

        k = memory("k", plane_bytes, 8 * sizes.lanes)
        v = memory("v", plane_bytes, 8 * sizes.lanes)
        scales = memory("scales", SCALE_BYTES, 8 * KV_SCALE_BYTES, 2)
        bias = memory("bias", BIAS_BYTES, 32)
        for name, block, int4, addr, values in (
            ("k", k, op.k_int4, self.k_addr, self.k_data), ("v", v, op.v_int4, self.v_addr, self.v_data),
        ):  # fmt: skip
            chunk, buffer_of = addr[: sizes.block_chunk_bits], addr[sizes.block_chunk_bits :]
            half, upper = Signal(sizes.block_chunk_bits, name=f"{name}_half"), Signal(name=f"{name}_upper")
            nibbles = Signal(4 * sizes.lanes, name=f"{name}_nibbles")  # a word of memory holds two chunks of int4
            m.d.sync += upper.eq(chunk[0])
            m.d.comb += [
                half.eq(Mux(int4, chunk >> 1, chunk)),
                block.read_addr[0].eq(Cat(half, buffer_of)),
                nibbles.eq(block.read_data[0].word_select(upper, 4 * sizes.lanes)),
                values.eq(Mux(int4, Cat(_widened(nibbles.word_select(n, 4)) for n in range(sizes.lanes)), block.read_data[0])),
            ]
        m.d.comb += [
            bias.read_addr[0].eq(self.bias_addr),
            self.bias_data.eq(bias.read_data[0]),
        ]
        for port in range(2):
            m.d.comb += [
                scales.read_addr[port].eq(self.scale_addr[port]),
                self.scale_data[port].eq(scales.read_data[port]),
            ]

        # 2. commands
        free = Signal(range(BLOCK_BUFFERS + 1), init=BLOCK_BUFFERS)
        claim = Signal()
        plane = Signal(self._addr_bits)  # bytes of K of a head, as int8
        head_base = Signal(self._addr_bits)
        k_from = Signal(self._addr_bits)
        v_from = Signal(self._addr_bits)
        scales_from = Signal(self._addr_bits)
        bias_from = Signal(self._addr_bits)
        left = Signal(25)
        heads_left = Signal(8)
        cmd = self.kv.cmd
        block_bytes = op.head_beats << 7  # of int8
        k_bytes, v_bytes = Signal(range(1 << 15)), Signal(range(1 << 15))
        k_plane, v_plane = Signal(self._addr_bits), Signal(self._addr_bits)
        m.d.comb += [
            k_bytes.eq(block_bytes >> op.k_int4),
            v_bytes.eq(block_bytes >> op.v_int4),
            k_plane.eq(plane >> op.k_int4),
            v_plane.eq(plane >> op.v_int4),
        ]
        m.d.sync += free.eq(free - claim + self.i_release)

        def next_block() -> None:
            m.d.sync += left.eq(left - KEY_BLOCK)
            m.next = "K"
            with m.If(left <= KEY_BLOCK):
                m.next = "HEAD"
                with m.If(heads_left == 0):
                    m.next = "IDLE"

        with m.FSM(init="IDLE"):
            with m.State("IDLE"), m.If(self.i_start):
                m.d.sync += [
                    plane.eq((self.i_slots * op.head_beats) << 3),
                    head_base.eq(op.kv_address),
                    heads_left.eq(op.kv_heads),
                ]
                m.next = "HEAD"
            with m.State("HEAD"):
                m.d.sync += [
                    k_from.eq(head_base),
                    v_from.eq(head_base + k_plane),
                    scales_from.eq(head_base + k_plane + v_plane),
                    bias_from.eq(op.bias_address),
                    left.eq(op.position + op.tokens),
                    head_base.eq(head_base + op.kv_stride),
                    heads_left.eq(heads_left - 1),
                ]
                m.next = "K"
            with m.State("K"):
                m.d.comb += [cmd.valid.eq(free != 0), cmd.p.addr.eq(k_from), cmd.p.beats.eq(k_bytes >> beat_log2)]
                with m.If(cmd.valid & cmd.ready):
                    m.d.comb += claim.eq(1)
                    m.d.sync += k_from.eq(k_from + k_bytes)
                    m.next = "V"
            with m.State("V"):
                m.d.comb += [cmd.valid.eq(1), cmd.p.addr.eq(v_from), cmd.p.beats.eq(v_bytes >> beat_log2)]
                with m.If(cmd.ready):
                    m.d.sync += v_from.eq(v_from + v_bytes)
                    m.next = "SCALES"
            with m.State("SCALES"):
                m.d.comb += [cmd.valid.eq(1), cmd.p.addr.eq(scales_from), cmd.p.beats.eq(SCALE_BYTES >> beat_log2)]
                with m.If(cmd.ready):
                    m.d.sync += scales_from.eq(scales_from + SCALE_BYTES)
                    with m.If(op.bias):
                        m.next = "BIAS"
                    with m.Else():
                        next_block()
            with m.State("BIAS"):
                m.d.comb += [cmd.valid.eq(1), cmd.p.addr.eq(bias_from), cmd.p.beats.eq(BIAS_BYTES >> beat_log2)]
                with m.If(cmd.ready):
                    m.d.sync += bias_from.eq(bias_from + BIAS_BYTES)
                    next_block()

        # 3. beats come in the order of the commands: K, V, scales, bias
        beat = self.kv.beat
        region = Signal(2)
        index = Signal(range((plane_bytes >> beat_log2) + 1))
        buffer = Signal(range(BLOCK_BUFFERS))
        m.d.comb += beat.ready.eq(1)
        for number, (block, size_bytes) in enumerate(
            ((k, plane_bytes), (v, plane_bytes), (scales, SCALE_BYTES), (bias, BIAS_BYTES))
        ):
            beats_log2 = (size_bytes >> beat_log2).bit_length() - 1  # of a buffer
            m.d.comb += [
                block.write_en.eq(beat.valid & (region == number)),
                block.write_addr.eq(Cat(index[:beats_log2], buffer)),
                block.write_data.eq(beat.p.data),
            ]
        last_region = Mux(op.bias, 3, 2)
        with m.If(beat.valid):
            m.d.sync += index.eq(index + 1)
            with m.If(beat.p.last):
                m.d.sync += [index.eq(0), region.eq(region + 1)]
                with m.If(region == last_region):
                    m.d.sync += [region.eq(0), buffer.eq(buffer + 1)]
        m.d.sync += self.o_loaded.eq(beat.valid & beat.p.last & (region == last_region))
        return m
