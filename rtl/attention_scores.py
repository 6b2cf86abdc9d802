"""Scores stage of the attention engine: query buffer, integer dot products, scaling."""

from amaranth.hdl import Cat, Module, Mux, Signal, signed, unsigned
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from rtl.attention_items import BANKS, SLOT_BITS, AttentionSizes, ItemQueue, awake, delayed
from rtl.lib.fp import fp_max
from rtl.lib.fp_add import FpAdd
from rtl.lib.fp_convert import IntToFp
from rtl.lib.fp_mul import FpMul
from rtl.lib.ports import QueryWrite
from spec.config import KEY_BLOCK

__all__ = ["AttentionScores"]

_MINUS_ZERO = 0x8000_0000
"""x + -0 = x for every x, bit for bit."""


class AttentionScores(wiring.Component):
    """Scores of the slots that a row sees, and their maximum, for one item after the other.

    Function
        ``s_j = (float(q . K_j) * sk_j) * (sq * score_scale) [+ bias_j]`` for j = 0 .. count-1 of the item's block.
    Streams
        ``i_item`` in, ``o_item`` out: the same items, when their scores can be read: ``score_data`` of ``score_addr`` =
        (slot, bank) and ``max_data`` of bank ``max_addr``, in the same cycle; ``o_bank`` is the bank of the item at
        ``o_item``. A finishing item has no scores.
    Timing
        count * head_dim / lanes cycles an item, without gaps; the last score is readable `latency` + 1 cycles after the
        cycle that reads its last chunk of K. A new item starts when fewer than 4 wait behind the stage.
    Numbers
        The dot product is exact. Without bias -0 is added, which changes no bit.
    Cost
        ``lanes`` 8x8 multipliers, an adder tree, 3 FP32 multipliers, 1 FP32 adder; the query buffer.
    Twins
        golden/attention.py, tests/test_attention.py.
    """

    i_item: stream.Interface
    o_item: stream.Interface
    query: wiring.PureInterface
    i_chunks: Signal
    i_score_scale: Signal
    i_bias: Signal
    k_addr: Signal
    k_data: Signal
    scale_addr: Signal
    scale_data: Signal
    bias_addr: Signal
    bias_data: Signal
    score_addr: Signal
    score_data: Signal
    max_addr: Signal
    max_data: Signal
    o_bank: Signal

    def __init__(self, sizes: AttentionSizes) -> None:
        self._sizes = sizes
        buffer_bits = sizes.item()["buffer"].width
        bank_bits = (BANKS - 1).bit_length()
        super().__init__(
            {
                "i_item": In(stream.Signature(sizes.item())),
                "o_item": Out(stream.Signature(sizes.item())),
                "query": In(QueryWrite),
                "i_chunks": In(sizes.chunk_count_bits),
                "i_score_scale": In(32),
                "i_bias": In(1),
                "k_addr": Out(buffer_bits + sizes.block_chunk_bits),
                "k_data": In(8 * sizes.lanes),
                "scale_addr": Out(buffer_bits + SLOT_BITS),
                "scale_data": In(32),
                "bias_addr": Out(buffer_bits + SLOT_BITS),
                "bias_data": In(32),
                "score_addr": In(SLOT_BITS + bank_bits),
                "score_data": Out(32),
                "max_addr": In(bank_bits),
                "max_data": Out(32),
                "o_bank": Out(bank_bits),
            }
        )

    @property
    def latency(self) -> int:
        """Cycles from the read of a slot's last chunk to its score: memory, dot product (3), float, 2 products, sum."""
        return 1 + 3 + IntToFp.latency + 2 * FpMul.latency + FpAdd.latency

    @property
    def _dot_bits(self) -> int:
        """Width of a dot product: |sum| <= max_head_dim * 2**14, and the sign."""
        return (self._sizes.config.max_head_dim << 14).bit_length() + 1

    def elaborate(self, platform: object) -> Module:
        m = Module()
        sizes, item = self._sizes, self.i_item

        # 1. issue: a chunk of K and of q a cycle
        m.submodules.queue = queue = ItemQueue(sizes)
        wiring.connect(m, queue.o_item, wiring.flipped(self.o_item))
        active = Signal()
        issue = Signal()
        chunk = Signal(range(sizes.max_chunks + 1))
        slot = Signal(SLOT_BITS)
        block_chunk = Signal(sizes.block_chunk_bits)
        last_chunk = Signal()
        item_end = Signal()
        m.d.comb += [
            issue.eq(item.valid & (active | queue.i_item.ready)),
            last_chunk.eq(chunk + 1 == self.i_chunks),
            item_end.eq(issue & (item.p.finish | (last_chunk & (slot + 1 == item.p.count)))),
            item.ready.eq(item_end),
            queue.i_item.valid.eq(item_end),
            queue.i_item.payload.eq(item.payload),
            self.o_bank.eq(queue.o_pop_bank),
        ]
        with m.If(issue):
            m.d.sync += [
                active.eq(~item_end),
                chunk.eq(Mux(last_chunk | item_end, 0, chunk + 1)),
                slot.eq(Mux(item_end, 0, slot + last_chunk)),
                block_chunk.eq(Mux(item_end, 0, block_chunk + 1)),
            ]
        m.d.comb += self.k_addr.eq(Cat(block_chunk, item.p.buffer))

        # 2. query buffer: written in rows of 8, read in chunks; one memory for each row of a chunk
        parts_log2 = sizes.chunk_beats_log2
        query = self.query
        query_parts = []
        for part in range(1 << parts_log2):
            memory = Memory(shape=64, depth=sizes.query_chunks, init=[])
            m.submodules[f"query_{part}"] = memory
            write = memory.write_port()
            read = memory.read_port(domain="sync")
            m.d.comb += [
                write.addr.eq(query.row >> parts_log2),
                write.data.eq(query.data),
                write.en.eq(query.en & (query.row[:parts_log2] == part)),
                read.addr.eq(item.p.query + chunk),
            ]
            query_parts.append(read.data)
        q_data = Cat(*query_parts)

        def scale_place(head: Signal, token: Signal) -> Cat:
            return Cat(head[: sizes.head_bits], token[: sizes.token_bits])

        m.submodules.query_scales = query_scales = Memory(
            shape=32, depth=1 << (sizes.head_bits + sizes.token_bits), init=[]
        )
        scale_write = query_scales.write_port()
        scale_read = query_scales.read_port(domain="sync")
        m.d.comb += [
            scale_write.addr.eq(scale_place(query.head, query.token)),
            scale_write.data.eq(query.scale),
            scale_write.en.eq(query.scale_en),
        ]

        enable = awake(m, issue, self.latency)

        # 3. dot product: products in pairs (cycle 2), tree (3), sum over the chunks of the head (4)
        pairs = []
        for lane in range(0, sizes.lanes, 2):
            pair = Signal(signed(17), name=f"pair_{lane}", reset_less=True)
            products = [
                q_data[8 * n :][:8].as_signed() * self.k_data[8 * n :][:8].as_signed() for n in (lane, lane + 1)
            ]
            with m.If(enable):
                m.d.sync += pair.eq(products[0] + products[1])
            pairs.append(pair)
        while len(pairs) > 1:
            pairs = [a + b for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
        tree = Signal(pairs[0].shape(), reset_less=True)
        dot = Signal(signed(self._dot_bits), reset_less=True)
        first_chunk = delayed(m, "first_chunk", chunk == 0, 3)
        with m.If(enable):
            m.d.sync += [tree.eq(pairs[0]), dot.eq(Mux(first_chunk, 0, dot) + tree)]

        # 4. float, scales, bias
        m.submodules.to_float = to_float = IntToFp(self._dot_bits)
        m.submodules.times_k = times_k = FpMul()
        m.submodules.times_q = times_q = FpMul()
        m.submodules.query_scale = query_scale = FpMul()
        m.submodules.plus_bias = plus_bias = FpAdd()
        for unit in (to_float, times_k, times_q, query_scale, plus_bias):
            m.d.comb += unit.en.eq(enable)
        at_times_k = 4 + to_float.latency
        at_times_q = at_times_k + FpMul.latency
        at_bias = at_times_q + FpMul.latency
        at_score = at_bias + FpAdd.latency
        # addresses arrive one cycle before the data are needed
        place = delayed(m, "place", Cat(slot, item.p.buffer), at_times_k - 1)
        q_place = delayed(m, "q_place", scale_place(item.p.head, item.p.token), at_times_q - FpMul.latency - 1)
        m.d.comb += [
            to_float.x.eq(dot),
            self.scale_addr.eq(place),
            times_k.a.eq(to_float.y),
            times_k.b.eq(self.scale_data),
            scale_read.addr.eq(q_place),
            query_scale.a.eq(scale_read.data),
            query_scale.b.eq(self.i_score_scale),
            times_q.a.eq(times_k.y),
            times_q.b.eq(query_scale.y),
            self.bias_addr.eq(delayed(m, "bias_place", place, at_bias - at_times_k)),
            plus_bias.a.eq(times_q.y),
            plus_bias.b.eq(Mux(self.i_bias, self.bias_data, _MINUS_ZERO)),
        ]

        # 5. store, with the maximum so far; the last one stands
        marks = delayed(
            m,
            "marks",
            Cat(issue & ~item.p.finish & last_chunk, slot == 0, item_end),
            at_score,
            unsigned(3),
        )
        is_score, is_first, is_end = marks
        score_slot = Signal(SLOT_BITS)
        largest = Signal(32)
        m.submodules.scores = scores = Memory(shape=32, depth=KEY_BLOCK * BANKS, init=[])
        m.submodules.maxima = maxima = Memory(shape=32, depth=BANKS, init=[])
        score_write = scores.write_port()
        score_read = scores.read_port(domain="comb")
        max_write = maxima.write_port()
        max_read = maxima.read_port(domain="comb")
        new_largest = Mux(is_first, plus_bias.y, fp_max(m, largest, plus_bias.y))
        m.d.comb += [
            score_write.addr.eq(Cat(score_slot, queue.o_done_bank)),
            score_write.data.eq(plus_bias.y),
            score_write.en.eq(is_score),
            max_write.addr.eq(queue.o_done_bank),
            max_write.data.eq(new_largest),
            max_write.en.eq(is_score),
            queue.i_done.eq(is_end),
            score_read.addr.eq(self.score_addr),
            self.score_data.eq(score_read.data),
            max_read.addr.eq(self.max_addr),
            self.max_data.eq(max_read.data),
        ]
        with m.If(is_score):
            m.d.sync += [score_slot.eq(Mux(is_end, 0, score_slot + 1)), largest.eq(new_largest)]
        return m


