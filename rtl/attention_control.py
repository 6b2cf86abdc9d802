"""Order of work of the attention engine: which row meets which block, and when a row is finished."""

from amaranth.hdl import Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from rtl.attention_items import BLOCK_BUFFERS, AttentionSizes
from rtl.lib.ops import op_layout
from rtl.lib.ports import HEAD_BITS, ROW_ADDR_BITS, TOKEN_BITS, VectorRead
from spec.config import KEY_BLOCK
from spec.descriptors import Opcode

__all__ = ["AttentionControl"]


class AttentionControl(wiring.Component):
    """Give the items of an operation in order.

    Function
        For each KV head: for each block up to the last position: for each token, for each query head of the group:
        an item, if the row sees a slot of the block; then for each row a finishing item. A row (token t) sees the slots
        0 .. position + t: masks are made here from positions. With ``resume``, before each KV head, when the engine is
        empty, the state of its rows is read from the vector memory (``o_state`` tells what ``vector_read.data`` is).
    Streams
        ``o_item`` out. An item of a block is offered after ``i_loaded`` pulsed for that block.
    Handshake
        ``i_start`` pulses with ``i_op`` valid; ``i_op`` holds until ``o_busy`` falls. ``i_retired`` pulses when an item
        has left the engine. ``o_starved``: nothing is left to do until a block arrives.
    Timing
        An item a cycle; a row that sees nothing of a block costs a cycle.
    Twins
        tests/test_attention.py.
    """

    i_start: Signal
    i_op: data.View
    i_loaded: Signal
    i_retired: Signal
    o_item: stream.Interface
    o_state: data.View
    vector_read: wiring.PureInterface
    o_busy: Signal
    o_starved: Signal

    def __init__(self, sizes: AttentionSizes) -> None:
        self._sizes = sizes
        super().__init__(
            {
                "i_start": In(1),
                "i_op": In(op_layout(Opcode.ATTEND)),
                "i_loaded": In(1),
                "i_retired": In(1),
                "o_item": Out(stream.Signature(sizes.item())),
                "o_state": Out(sizes.state_write()),
                "vector_read": Out(VectorRead),
                "o_busy": Out(1),
                "o_starved": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        sizes, op, item = self._sizes, self.i_op, self.o_item

        # strides, fixed for the operation
        chunks = op.head_beats >> sizes.chunk_beats_log2
        state_rows = op.head_beats + 1  # rows of a state
        heads = Signal(HEAD_BITS)
        row_stride = Signal(9)  # vector rows from one head to the next, in what a finish writes
        token_stride = Signal(ROW_ADDR_BITS)
        group_stride = Signal(ROW_ADDR_BITS)
        token_chunks = Signal(item.p.query.shape())
        group_chunks = Signal(item.p.query.shape())
        state_token_stride = Signal(ROW_ADDR_BITS)
        state_group_stride = Signal(ROW_ADDR_BITS)

        # the KV head at work, and where its first row lies
        kv_head = Signal(8)
        head_base = Signal(HEAD_BITS)
        query_base = Signal(item.p.query.shape())
        out_base = Signal(ROW_ADDR_BITS)
        state_base = Signal(ROW_ADDR_BITS)

        # the row at work
        token = Signal(TOKEN_BITS)
        member = Signal(8)
        row = Signal(sizes.row_bits)
        head = Signal(HEAD_BITS)
        query_row = Signal(item.p.query.shape())
        query_token = Signal(item.p.query.shape())
        out_row = Signal(ROW_ADDR_BITS)
        out_token = Signal(ROW_ADDR_BITS)
        last_member = Signal()
        last_row = Signal()
        m.d.comb += [
            last_member.eq(member + 1 == op.group),
            last_row.eq(last_member & (token + 1 == op.tokens)),
        ]

        # the block at work; `left`: slots from its first to the last position, `seen`: those that the row sees
        left = Signal(25)
        seen_first = Signal(signed(26))  # what token 0 sees
        seen = Signal(signed(26))
        first_block = Signal()
        buffer = Signal(range(BLOCK_BUFFERS))
        loaded = Signal(range(BLOCK_BUFFERS + 1))  # blocks in their buffers that are not yet worked through
        in_flight = Signal(range(32))

        restart = Signal()  # go to the first row
        advance = Signal()  # go to the next row
        block_end = Signal()
        m.d.comb += block_end.eq(0)

        with m.If(advance):
            m.d.sync += row.eq(row + 1)
            with m.If(last_member):
                m.d.sync += [
                    token.eq(token + 1),
                    member.eq(0),
                    head.eq(head_base),
                    seen.eq(seen + 1),
                    query_row.eq(query_token + token_chunks),
                    query_token.eq(query_token + token_chunks),
                    out_row.eq(out_token + token_stride),
                    out_token.eq(out_token + token_stride),
                ]
            with m.Else():
                m.d.sync += [
                    member.eq(member + 1),
                    head.eq(head + 1),
                    query_row.eq(query_row + chunks),
                    out_row.eq(out_row + row_stride),
                ]
        with m.If(restart | (advance & last_row)):
            m.d.sync += [
                row.eq(0),
                token.eq(0),
                member.eq(0),
                head.eq(head_base),
                query_row.eq(query_base),
                query_token.eq(query_base),
                out_row.eq(out_base),
                out_token.eq(out_base),
                seen.eq(seen_first),
            ]

        m.d.comb += [
            item.p.row.eq(row),
            item.p.query.eq(query_row),
            item.p.token.eq(token),
            item.p.head.eq(head),
            item.p.count.eq(Mux(seen >= KEY_BLOCK, KEY_BLOCK, seen)),
            item.p.first.eq(first_block & ~op.resume),
            item.p.buffer.eq(buffer),
            item.p.release.eq(last_row & ~item.p.finish),
            item.p.out_row.eq(out_row),
        ]
        taken = Signal()
        m.d.comb += taken.eq(item.valid & item.ready)
        m.d.sync += [
            in_flight.eq(in_flight + taken - self.i_retired),
            loaded.eq(loaded + self.i_loaded - block_end),
        ]

        state_beat = Signal(8)
        state_row = Signal(ROW_ADDR_BITS)
        state_token = Signal(ROW_ADDR_BITS)
        state_read = self.vector_read
        m.d.comb += state_read.addr.eq(state_row)

        with m.FSM(init="IDLE") as fsm:
            m.d.comb += self.o_busy.eq(~fsm.ongoing("IDLE"))

            with m.State("IDLE"), m.If(self.i_start):
                m.d.sync += [heads.eq(op.kv_heads * op.group), row_stride.eq(op.head_beats + op.export)]
                m.next = "STRIDES"

            with m.State("STRIDES"):
                m.d.sync += [
                    token_stride.eq(Mux(op.export, heads * state_rows, op.dst_stride)),
                    group_stride.eq(op.group * row_stride),
                    token_chunks.eq(heads * chunks),
                    group_chunks.eq(op.group * chunks),
                    state_token_stride.eq(heads * state_rows),
                    state_group_stride.eq(op.group * state_rows),
                    kv_head.eq(0),
                    head_base.eq(0),
                    query_base.eq(0),
                    out_base.eq(Mux(op.export, op.state, op.dst)),
                    state_base.eq(op.state),
                    seen_first.eq(op.position + 1),
                ]
                m.next = "HEAD"

            with m.State("HEAD"):
                m.d.comb += restart.eq(1)
                m.d.sync += [
                    left.eq(op.position + op.tokens),
                    first_block.eq(1),
                    state_row.eq(state_base),
                    state_token.eq(state_base),
                    state_beat.eq(0),
                ]
                m.next = "BLOCKS"
                with m.If(op.resume):
                    m.next = "STATE_WAIT"

            with m.State("STATE_WAIT"), m.If(in_flight == 0):
                m.next = "STATE"

            with m.State("STATE"):
                m.d.comb += state_read.en.eq(1)
                m.d.sync += [state_beat.eq(state_beat + 1), state_row.eq(state_row + 1)]
                with m.If(state_beat == op.head_beats):
                    m.d.comb += advance.eq(1)
                    m.d.sync += state_beat.eq(0)
                    with m.If(last_member):
                        m.d.sync += [
                            state_row.eq(state_token + state_token_stride),
                            state_token.eq(state_token + state_token_stride),
                        ]
                    with m.If(last_row):
                        m.next = "BLOCKS"

            with m.State("BLOCKS"):
                visible = Signal()
                m.d.comb += [
                    visible.eq(seen > 0),
                    item.valid.eq((loaded != 0) & visible),
                    advance.eq((loaded != 0) & (~visible | item.ready)),
                    self.o_starved.eq((loaded == 0) & (in_flight == 0)),
                    block_end.eq(advance & last_row),
                ]
                with m.If(block_end):
                    m.d.sync += [
                        left.eq(left - KEY_BLOCK),
                        seen_first.eq(seen_first - KEY_BLOCK),
                        seen.eq(seen_first - KEY_BLOCK),
                        first_block.eq(0),
                        buffer.eq(buffer + 1),
                    ]
                    with m.If(left <= KEY_BLOCK):
                        m.next = "FINISH"

            with m.State("FINISH"):
                m.d.comb += [item.valid.eq(1), item.p.finish.eq(1), advance.eq(item.ready)]
                with m.If(advance & last_row):
                    m.d.sync += [
                        kv_head.eq(kv_head + 1),
                        head_base.eq(head_base + op.group),
                        query_base.eq(query_base + group_chunks),
                        out_base.eq(out_base + group_stride),
                        state_base.eq(state_base + state_group_stride),
                        seen_first.eq(op.position + 1),
                    ]
                    m.next = "HEAD"
                    with m.If(kv_head + 1 == op.kv_heads):
                        m.next = "DRAIN"

            with m.State("DRAIN"), m.If(in_flight == 0):
                m.next = "IDLE"

        # the row of an imported state is on vector_read.data one cycle after its address
        m.d.sync += [
            self.o_state.en.eq(state_read.en),
            self.o_state.row.eq(row),
            self.o_state.scalars.eq(state_beat == op.head_beats),
            self.o_state.chunk.eq(state_beat >> sizes.chunk_beats_log2),
            self.o_state.part.eq(state_beat[: sizes.chunk_beats_log2]),
        ]
        return m
