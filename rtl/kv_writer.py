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

UNIT_BYTES = LANES // 2
"""The same as int4: every row of the cache is a whole number of such units."""

UNIT_BITS = 8 * UNIT_BYTES

LOGITS_BYTES = 4 * LANES


class KvWriter(wiring.Component):
    """Append quantised heads to the KV cache: the values of a head in one write, its scale in another.

    Function
        For slot s = position + token of a KEY or VALUE operation, ``kv_address + head*kv_stride`` is where K rows, V rows
        and scales of the head's ``i_slots`` slots lie one behind the other, as spec/layout.py has it. Written are row s of
        K or V, and the FP32 scale at byte 0 (K) or 4 (V) of scale s. With ``k_int4``, ``v_int4`` a row has the low nibbles
        of its values, two a byte.
    Streams
        ``i_op``: a KEY or VALUE MATMUL, taken when idle. ``i_beat``: its ``beats * tokens`` KvBeats, head by head.
        ``write``: two commands a head, each followed by its beats.
    Handshake
        ``o_busy`` from the operation's transfer to that of its last write beat; the write DMA's own idle is the fence.
    Timing
        A head takes head_beats + 5 cycles when nothing stalls.
    Numbers
        None: values are in range. A row begins and ends at any multiple of 4 bytes: strobes leave alone what shares its
        first and last beat.
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
        beat_log2 = data_bytes.bit_length() - 1
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
        int4 = Signal()
        int8_bytes, row_bytes = Signal(12), Signal(12)  # of a head in either format, and in its own
        m.d.comb += [
            int4.eq(Mux(beat.p.value, op.v_int4, op.k_int4)),
            int8_bytes.eq(op.head_beats << (WORD_BYTES.bit_length() - 1)),
            row_bytes.eq(int8_bytes >> int4),
        ]

        # 2. addresses of a head: products, then sums
        slot = Signal(24)
        m.d.comb += slot.eq(op.position + beat.p.token)
        head_base, row_offset, region = Signal(self._addr_bits), Signal(self._addr_bits), Signal(self._addr_bits)
        k_plane, both_planes = Signal(self._addr_bits), Signal(self._addr_bits)
        data_address, scale_address = Signal(self._addr_bits), Signal(self._addr_bits)
        m.d.comb += k_plane.eq(region >> op.k_int4)
        m.d.sync += [
            head_base.eq(op.kv_address + beat.p.head * op.kv_stride),
            row_offset.eq(slot * int8_bytes),
            region.eq(self.i_slots * int8_bytes),
            both_planes.eq(k_plane + (region >> op.v_int4)),
        ]

        # 3. words of 8 values -> beats, in units of 4 bytes: 8 int4, or half of 8 int8
        units = data_bytes // UNIT_BYTES
        place = Signal(range(units))  # of the next word in its beat
        held, held_units = Signal(self._data_bits), Signal(units)
        nibbles = Cat(beat.p.data.word_select(n, 8)[:4] for n in range(LANES))
        row, row_units = [], []
        for unit in range(units):
            here = Mux(int4, place == unit, place[1:] == unit >> 1)
            value = Mux(int4, nibbles, beat.p.data.word_select(unit & 1, UNIT_BITS))
            row.append(Mux(here, value, held.word_select(unit, UNIT_BITS)))
            row_units.append(here | held_units[unit])
        full, complete = Signal(), Signal()
        m.d.comb += [
            full.eq((place[1:] == units // 2 - 1) & (~int4 | place[0])),
            complete.eq(full | beat.p.last),
        ]
        scale = Signal(32)

        with m.FSM(name="head"):
            with m.State("WAIT"):
                with m.If(self.o_busy & (left == 0)):
                    m.d.sync += self.o_busy.eq(0)
                with m.Elif(self.o_busy & beat.valid):
                    m.next = "SUM"
            with m.State("SUM"):
                m.d.sync += data_address.eq(head_base + (row_offset >> int4) + Mux(beat.p.value, k_plane, 0))
                m.next = "ROW"
            with m.State("ROW"):
                m.d.comb += [
                    command.valid.eq(1),
                    command.p.addr.eq(data_address & ~(data_bytes - 1)),
                    command.p.beats.eq((data_address[:beat_log2] + row_bytes + (data_bytes - 1)) >> beat_log2),
                ]
                m.d.sync += [
                    place.eq(data_address[UNIT_BYTES.bit_length() - 1 : beat_log2]),
                    scale_address.eq(
                        head_base + both_planes + (slot << (KV_SCALE_BYTES.bit_length() - 1)) + (beat.p.value << 2)
                    ),
                ]
                with m.If(command.ready):
                    m.next = "DATA"
            with m.State("DATA"):
                m.d.comb += [
                    out.valid.eq(beat.valid & complete),
                    out.p.data.eq(Cat(row)),
                    out.p.strb.eq(Cat(unit.replicate(UNIT_BYTES) for unit in row_units)),
                    beat.ready.eq(~complete | out.ready),
                ]
                with m.If(beat.valid & beat.ready):
                    m.d.sync += [
                        place.eq(place + Mux(int4, 1, 2)),
                        held.eq(Cat(row)),
                        held_units.eq(Mux(complete, 0, Cat(row_units))),
                        left.eq(left - 1),
                        scale.eq(beat.p.scale),
                    ]
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
                lane = scale_address[2:beat_log2]
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
