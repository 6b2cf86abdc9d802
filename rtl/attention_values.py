"""Values stage of the attention engine: weighted sum of V, sum of weights, output."""

from typing import Any

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from rtl.attention_items import BANKS, SLOT_BITS, AttentionSizes, awake, delayed
from rtl.attention_lane import AT_ADD, AT_MULTIPLY, AT_SUM, AT_VALUE, ValueLane, lane_control
from rtl.attention_softmax import ONE
from rtl.lib.fp_approx import FpRecip
from rtl.lib.ports import ROW_ADDR_BITS, VectorRow, VectorWrite
from spec.config import LANES

__all__ = ["AttentionValues"]

_BANK_BITS = (BANKS - 1).bit_length()

MIN_PERIOD = AT_SUM - AT_ADD
"""Cycles from one slot to the next at least: a sum must be ready when the next slot adds to it."""

# An item must not read o of a row before the row's last item has written it (AT_SUM, readable from the cycle after).
_WAIT_RESCALE = AT_SUM + 1 - (AT_MULTIPLY - 1)
_WAIT_ADD = AT_SUM + 1 - (AT_ADD - 1)
_WAIT_FINISH = AT_SUM + 1
"""A finish reads l when it is issued."""


class AttentionValues(wiring.Component):
    """Accumulate weighted values, row by row; write out finished rows.

    Function
        Per item: ``o = o * e``, ``l = l * e`` if needed, then for each slot ``o += w_j * float(V_j)``, ``l += p_j``. A
        finishing item writes ``o * recip(l)``, or with ``i_export`` o and then (m, l, 0...), to its rows.
        The rescale is left out where it changes no bit: in the row's first block (o = l = +0), and where e = 1.0
        (unless the item has a single slot, which keeps the reads of o apart).
        l is one more lane, whose values are 1.
    Streams
        ``i_item`` in, always with its numbers readable (`AttentionSoftmax`).
    Timing
        (count + 1 with a rescale) * max(head_dim / lanes, 4) cycles an item, head_dim / 8 (+ 1 with export) a finish,
        without gaps but for: the same row twice in a row waits until 9 (6 without rescale) cycles after the start of
        its last slot, with one item between 5 after that item's; the first finish until 13.
        ``o_retired`` pulses 13 cycles after an item's last cycle, when everything of it is written; ``o_release`` too.
    Cost
        ``lanes`` + 1 `ValueLane`, one reciprocal.
    Twins
        golden/attention.py, tests/test_attention.py.
    """

    i_item: stream.Interface
    i_bank: Signal
    i_chunks: Signal
    i_head_beats: Signal
    i_export: Signal
    v_addr: Signal
    v_data: Signal
    weight_addr: Signal
    p_data: Signal
    w_data: Signal
    e_addr: Signal
    e_data: Signal
    m_addr: Signal
    m_data: Signal
    i_same: Signal
    i_state: data.View
    i_state_data: data.View
    vector_write: wiring.PureInterface
    o_retired: Signal
    o_release: Signal

    def __init__(self, sizes: AttentionSizes) -> None:
        self._sizes = sizes
        buffer_bits = sizes.item()["buffer"].width
        super().__init__(
            {
                "i_item": In(stream.Signature(sizes.item())),
                "i_bank": In(_BANK_BITS),
                "i_chunks": In(sizes.chunk_count_bits),
                "i_head_beats": In(8),
                "i_export": In(1),
                "v_addr": Out(buffer_bits + sizes.block_chunk_bits),
                "v_data": In(8 * sizes.lanes),
                "weight_addr": Out(SLOT_BITS + _BANK_BITS),
                "p_data": In(32),
                "w_data": In(32),
                "e_addr": Out(_BANK_BITS),
                "e_data": In(32),
                "m_addr": Out(_BANK_BITS),
                "m_data": In(32),
                "i_same": In(BANKS),
                "i_state": In(sizes.state_write()),
                "i_state_data": In(VectorRow),
                "vector_write": Out(VectorWrite),
                "o_retired": Out(1),
                "o_release": Out(1),
            }
        )

    def _operation(self) -> data.StructLayout:
        sizes = self._sizes
        return data.StructLayout(
            {
                "active": 1,  # a chunk of a slot or of a rescale
                "rescale": 1,
                "finish": 1,  # a row of 8 of the output
                "scalars": 1,  # with finish: the row (m, l, 0...)
                "from_row": 1,  # first slot, on top of the row's o
                "fresh": 1,  # first slot, on top of nothing
                "last": 1,  # last slot of the item
                "chunk": sizes.chunk_bits,
                "row": sizes.row_bits,
                "slot": SLOT_BITS,
                "bank": _BANK_BITS,
                "part": max(1, sizes.chunk_beats_log2),  # finish: which 8 lanes of the chunk
                "out_row": ROW_ADDR_BITS,
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        sizes, item = self._sizes, self.i_item

        # 1. issue
        op: Any = Signal(self._operation())
        issue = Signal()
        active = Signal()  # the item has begun
        rescaled = Signal()
        rescale = Signal()  # the item needs it
        slot = Signal(SLOT_BITS)
        phase = Signal(range(max(sizes.max_chunks, MIN_PERIOD) + 1))  # cycle of the slot; beat of the finish is `beat`
        beat = Signal(8)
        period = Mux(self.i_chunks < MIN_PERIOD, MIN_PERIOD, self.i_chunks)
        slot_end = Signal()
        item_end = Signal()
        single = item.p.count == 1
        m.d.comb += [
            rescale.eq(~item.p.finish & ~item.p.first & (single | ~self.i_same.bit_select(self.i_bank, 1))),
            slot_end.eq(phase + 1 == period),
            item_end.eq(
                issue
                & Mux(
                    item.p.finish,
                    beat + 1 == self.i_head_beats + self.i_export,
                    slot_end & ~op.rescale & (slot + 1 == item.p.count),
                )
            ),
            item.ready.eq(item_end),
        ]

        # cycles since the start of the last slot, and the rows of the last two items with slots
        since = Signal(range(_WAIT_FINISH + 1), init=_WAIT_FINISH)
        last_row = Signal(sizes.row_bits)
        last_row_2 = Signal(sizes.row_bits)
        clear_to_start = Signal()
        with m.If(item.p.finish):
            m.d.comb += clear_to_start.eq(since >= _WAIT_FINISH)
        with m.Elif(item.p.row == last_row):
            m.d.comb += clear_to_start.eq(since >= Mux(rescale, _WAIT_RESCALE, _WAIT_ADD))
        with m.Elif(item.p.row == last_row_2):
            m.d.comb += clear_to_start.eq(since >= _WAIT_RESCALE - MIN_PERIOD)
        with m.Else():
            m.d.comb += clear_to_start.eq(1)
        m.d.comb += issue.eq(item.valid & (active | item.p.first & ~item.p.finish | clear_to_start))

        with m.If(since != _WAIT_FINISH):
            m.d.sync += since.eq(since + 1)
        with m.If(issue):
            m.d.sync += active.eq(~item_end)
            with m.If(item.p.finish):
                m.d.sync += beat.eq(Mux(item_end, 0, beat + 1))
            with m.Else():
                m.d.sync += phase.eq(Mux(slot_end, 0, phase + 1))
                with m.If((phase == 0) & ~op.rescale):
                    m.d.sync += since.eq(1)
                with m.If(slot_end):
                    m.d.sync += [rescaled.eq(op.rescale), slot.eq(slot + ~op.rescale)]
                with m.If(item_end):
                    m.d.sync += [slot.eq(0), rescaled.eq(0), last_row.eq(item.p.row), last_row_2.eq(last_row)]

        in_head = phase < self.i_chunks
        parts_log2 = sizes.chunk_beats_log2
        m.d.comb += [
            op.active.eq(issue & ~item.p.finish & in_head),
            op.rescale.eq(rescale & ~rescaled & (slot == 0)),
            op.finish.eq(issue & item.p.finish),
            op.scalars.eq(beat == self.i_head_beats),
            op.from_row.eq((slot == 0) & ~rescaled & ~item.p.first),
            op.fresh.eq((slot == 0) & item.p.first),
            op.last.eq((slot + 1 == item.p.count) & ~op.rescale),
            op.chunk.eq(Mux(item.p.finish, beat >> parts_log2, phase)),
            op.row.eq(item.p.row),
            op.slot.eq(slot),
            op.bank.eq(self.i_bank),
            op.part.eq(beat[:parts_log2]),
            op.out_row.eq(item.p.out_row + beat),
        ]
        block_chunk = Signal(sizes.block_chunk_bits)
        with m.If(issue & (item_end | (in_head & ~op.rescale & ~item.p.finish))):
            m.d.sync += block_chunk.eq(Mux(item_end, 0, block_chunk + 1))
        m.d.comb += self.v_addr.eq(
            delayed(m, "value_place", Cat(block_chunk, item.p.buffer), AT_VALUE - 1)
        )

        # 2. the operation on its way
        layout = self._operation()
        at_scalar = delayed(m, "to_scalar", op, AT_MULTIPLY - 1, layout)
        at_multiply = delayed(m, "to_multiply", at_scalar, 1, layout)
        before_add = delayed(m, "to_before_add", at_multiply, AT_ADD - 1 - AT_MULTIPLY, layout)
        at_add = delayed(m, "to_add", before_add, 1, layout)
        at_sum = delayed(m, "to_sum", at_add, AT_SUM - AT_ADD, layout)

        enable = awake(m, issue, AT_SUM)

        # 3. l of every row; its reciprocal is ready when a finish multiplies
        m.submodules.row_l = row_l = Memory(shape=32, depth=sizes.config.max_rows, init=[])
        l_write = row_l.write_port()
        l_issue = row_l.read_port(domain="comb")
        l_out = row_l.read_port(domain="comb")
        m.submodules.recip = recip = FpRecip()
        assert recip.latency == AT_MULTIPLY - 1
        m.d.comb += [
            l_issue.addr.eq(item.p.row),
            recip.en.eq(enable),
            recip.x.eq(l_issue.data),
            l_out.addr.eq(at_add.row),
        ]

        # 4. scalars of the multiplication
        scalar = Signal(32)
        l_scalar = Signal(32)
        m.d.comb += [
            self.weight_addr.eq(Cat(at_scalar.slot, at_scalar.bank)),
            self.e_addr.eq(at_scalar.bank),
        ]
        m.d.sync += [
            scalar.eq(
                Mux(
                    at_scalar.finish,
                    Mux(self.i_export, ONE, recip.y),
                    Mux(at_scalar.rescale, self.e_data, self.w_data),
                )
            ),
            l_scalar.eq(Mux(at_scalar.rescale, self.e_data, self.p_data)),
        ]

        # 5. lanes
        def control_of(chunk_bits: int, chunks: bool) -> Any:
            control: Any = Signal(lane_control(chunk_bits, sizes.row_bits), name="control" if chunks else "l_control")

            def place(operation: Any) -> Cat:
                return Cat(operation.chunk if chunks else operation.chunk[0] & 0, operation.row)

            late_read = before_add.active & before_add.from_row & ~before_add.rescale
            in_chunks = at_sum.active if chunks else at_sum.active & (at_sum.chunk == 0)
            m.d.comb += [
                control.read_addr.eq(Mux(late_read, place(before_add), place(at_scalar))),
                control.use_row.eq(at_multiply.rescale | at_multiply.finish),
                control.from_row.eq(at_add.from_row & ~at_add.rescale),
                control.constant.eq(at_add.fresh | at_add.rescale),
                control.constant_sign.eq(at_add.rescale),
                control.forward.eq(self.i_chunks <= MIN_PERIOD),
                control.add_chunk.eq(place(at_add)[:chunk_bits]),
                control.sum_en.eq(in_chunks),
                control.sum_chunk.eq(place(at_sum)[:chunk_bits]),
                control.row_en.eq(in_chunks & at_sum.last),
                control.row_addr.eq(place(at_sum)),
            ]
            return control

        control = control_of(sizes.chunk_bits, True)
        state = self.i_state
        products = []
        for number in range(sizes.lanes):
            lane = ValueLane(
                chunk_bits=sizes.chunk_bits, row_bits=sizes.row_bits, max_rows=sizes.config.max_rows
            )
            m.submodules[f"lane_{number}"] = lane
            mine = state.part == number // LANES if parts_log2 else 1
            m.d.comb += [
                lane.i_en.eq(enable),
                lane.i_value.eq(self.v_data[8 * number :][:8]),
                lane.i_scalar.eq(scalar),
                lane.i_control.eq(control),
                lane.i_state_en.eq(state.en & ~state.scalars & mine),
                lane.i_state_addr.eq(Cat(state.chunk, state.row)),
                lane.i_state.eq(self.i_state_data[number % LANES]),
            ]
            products.append(lane.o_product)

        l_control = control_of(1, False)
        m.submodules.lane_l = lane_l = ValueLane(
            chunk_bits=1, row_bits=sizes.row_bits, max_rows=sizes.config.max_rows
        )
        l_state_en = state.en & state.scalars
        m.d.comb += [
            lane_l.i_en.eq(enable),
            lane_l.i_value.eq(1),
            lane_l.i_scalar.eq(l_scalar),
            lane_l.i_control.eq(l_control),
            lane_l.i_state_en.eq(l_state_en),
            lane_l.i_state_addr.eq(state.row << 1),
            lane_l.i_state.eq(self.i_state_data[1]),
            l_write.addr.eq(Mux(l_state_en, state.row, at_sum.row)),
            l_write.data.eq(Mux(l_state_en, self.i_state_data[1], lane_l.o_sum)),
            l_write.en.eq(l_state_en | l_control.row_en),
        ]

        # 6. output, through a register
        write = self.vector_write
        part_rows = Cat(*products)
        # the bank is free once the item is issued, so m waits for the write here
        m.submodules.row_m = row_m = Memory(shape=32, depth=sizes.config.max_rows, init=[])
        m_write = row_m.write_port()
        m_out = row_m.read_port(domain="comb")
        m.d.comb += [
            self.m_addr.eq(self.i_bank),
            m_write.addr.eq(item.p.row),
            m_write.data.eq(self.m_data),
            m_write.en.eq(op.finish & op.scalars),
            m_out.addr.eq(at_add.row),
        ]
        m.d.sync += [
            write.en.eq(at_add.finish),
            write.addr.eq(at_add.out_row),
            write.data.eq(
                Mux(
                    at_add.scalars,
                    Cat(m_out.data, l_out.data),
                    part_rows.word_select(at_add.part[:parts_log2], 32 * LANES),
                )
            ),
        ]
        m.d.comb += Cat(self.o_retired, self.o_release).eq(
            delayed(m, "retired", Cat(item_end, item_end & item.p.release), AT_SUM + 1, 2)
        )
        return m
