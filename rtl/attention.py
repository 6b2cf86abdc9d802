"""Attention engine: online softmax over the KV cache, for prefill and decode."""

from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from rtl.attention_control import AttentionControl
from rtl.attention_items import AttentionSizes
from rtl.attention_scores import AttentionScores
from rtl.attention_softmax import AttentionSoftmax
from rtl.attention_values import AttentionValues
from rtl.kv_reader import KvReader
from rtl.lib.ops import op_layout
from rtl.lib.ports import QueryWrite, VectorRead, VectorWrite, read_client
from spec.config import AttentionConfig
from spec.descriptors import Opcode

__all__ = ["Attention"]


class Attention(wiring.Component):
    """Attend with the queries of up to ``tokens`` tokens to the KV cache of one layer.

    Function
        Per token t, query head h: ``out = sum_j softmax(q . K_j * scales + bias_j)_j V_j`` over the slots
        j = 0 .. position + t (docs/numerics.md, section 5). The rows (tokens x query heads) that share a KV head are
        resident: K and V of that head are read once, in blocks of 16 slots, ahead of use.
        ``export`` writes the state (o, m, l) instead of o / l, ``resume`` goes on from such a state: the slots of this
        operation are processed on top of it. Rows of a state are numbered token * heads + head.
    Streams
        ``i_op``: an ATTEND with position and tokens; taken when the engine is idle. ``kv``: read client.
    Ports
        ``query``: writes into the query buffer, rows of 8 int8: (token * heads + head) * head_beats + beat, and the
        scale of (token, head). ``vector_write``, ``vector_read``: the vector memory. ``i_slots``: slots of the cache, a
        multiple of 16. ``o_busy`` from the cycle after an operation was taken until everything is written.
        ``o_starved``: the engine has nothing to do until K and V arrive.
    Handshake
        The engine waits for blocks only, and never for its output. What the operation reads must be written before it
        is given. kv_heads * group * head_dim is at most max_q_dim, tokens * group at most max_rows, head_dim a multiple
        of ``lanes`` up to max_head_dim.
    Timing
        Three stages overlap (scores, softmax, values). Steady state, with P = max(head_dim / lanes, 4): a row and a
        block take 16 * P cycles, 17 * P when the row's maximum grew; then head_dim / 8 cycles a row.
        docs/engines/attention.md has the rest.
    Numbers
        docs/numerics.md, section 5.
    Cost
        ``lanes`` 8x8 multipliers, ``lanes`` + 4 FP32 multipliers, ``lanes`` + 3 FP32 adders, exp and reciprocal; o of
        every row on chip: 32 * max_rows * max_head_dim bits.
    Twins
        golden/attention.py, cosim/bench_attention.py, tests/test_attention.py.
    """

    i_op: stream.Interface
    query: wiring.PureInterface
    kv: wiring.PureInterface
    vector_write: wiring.PureInterface
    vector_read: wiring.PureInterface
    i_slots: Signal
    o_busy: Signal
    o_starved: Signal

    def __init__(self, config: AttentionConfig, *, tokens: int, data_bits: int, addr_bits: int) -> None:
        self._sizes = AttentionSizes(config=config, tokens=tokens)
        self._data_bits = data_bits
        self._addr_bits = addr_bits
        super().__init__(
            {
                "i_op": In(stream.Signature(op_layout(Opcode.ATTEND))),
                "query": In(QueryWrite),
                "kv": Out(read_client(addr_bits, data_bits)),
                "vector_write": Out(VectorWrite),
                "vector_read": Out(VectorRead),
                "i_slots": In(24),
                "o_busy": Out(1),
                "o_starved": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        sizes = self._sizes
        m.submodules.control = control = AttentionControl(sizes)
        m.submodules.reader = reader = KvReader(sizes, data_bits=self._data_bits, addr_bits=self._addr_bits)
        m.submodules.scores = scores = AttentionScores(sizes)
        m.submodules.softmax = softmax = AttentionSoftmax(sizes)
        m.submodules.values = values = AttentionValues(sizes)

        # 1. the operation; `start` is seen together with the latched fields
        op = Signal(op_layout(Opcode.ATTEND))
        start = Signal()
        m.d.comb += [
            self.o_busy.eq(start | control.o_busy),
            self.i_op.ready.eq(~self.o_busy),
            self.o_starved.eq(control.o_starved),
        ]
        m.d.sync += start.eq(self.i_op.valid & self.i_op.ready)
        with m.If(self.i_op.valid & self.i_op.ready):
            m.d.sync += op.eq(self.i_op.payload)
        chunks = Signal(sizes.chunk_count_bits)
        m.d.comb += [
            chunks.eq(op.head_beats >> sizes.chunk_beats_log2),
            control.i_start.eq(start),
            control.i_op.eq(op),
            reader.i_start.eq(start),
            reader.i_op.eq(op),
            reader.i_slots.eq(self.i_slots),
            scores.i_chunks.eq(chunks),
            scores.i_score_scale.eq(op.score_scale),
            scores.i_bias.eq(op.bias),
            values.i_chunks.eq(chunks),
            values.i_head_beats.eq(op.head_beats),
            values.i_export.eq(op.export),
        ]

        # 2. items: control -> scores -> softmax -> values -> control
        wiring.connect(m, control.o_item, scores.i_item)
        wiring.connect(m, scores.o_item, softmax.i_item)
        wiring.connect(m, softmax.o_item, values.i_item)
        m.d.comb += [
            control.i_loaded.eq(reader.o_loaded),
            control.i_retired.eq(values.o_retired),
            reader.i_release.eq(values.o_release),
        ]

        # 3. memories that a stage writes and the next one reads
        m.d.comb += [
            reader.k_addr.eq(scores.k_addr),
            scores.k_data.eq(reader.k_data),
            reader.scale_addr[0].eq(scores.scale_addr),
            scores.scale_data.eq(reader.scale_data[0][:32]),
            reader.bias_addr.eq(scores.bias_addr),
            scores.bias_data.eq(reader.bias_data),
            softmax.i_bank.eq(scores.o_bank),
            scores.score_addr.eq(softmax.score_addr),
            softmax.score_data.eq(scores.score_data),
            scores.max_addr.eq(softmax.max_addr),
            softmax.max_data.eq(scores.max_data),
            reader.scale_addr[1].eq(softmax.scale_addr),
            softmax.scale_data.eq(reader.scale_data[1][32:]),
            values.i_bank.eq(softmax.o_bank),
            values.i_same.eq(softmax.o_same),
            softmax.weight_addr.eq(values.weight_addr),
            Cat(values.p_data, values.w_data).eq(Cat(softmax.p_data, softmax.w_data)),
            softmax.e_addr.eq(values.e_addr),
            values.e_data.eq(softmax.e_data),
            softmax.m_addr.eq(values.m_addr),
            values.m_data.eq(softmax.m_data),
            reader.v_addr.eq(values.v_addr),
            values.v_data.eq(reader.v_data),
        ]

        # 4. ports
        wiring.connect(m, wiring.flipped(self.query), scores.query)
        wiring.connect(m, reader.kv, wiring.flipped(self.kv))
        wiring.connect(m, values.vector_write, wiring.flipped(self.vector_write))
        wiring.connect(m, control.vector_read, wiring.flipped(self.vector_read))
        state = control.o_state
        m.d.comb += [
            values.i_state.eq(state),
            values.i_state_data.eq(self.vector_read.data),
            softmax.state_en.eq(state.en & state.scalars),
            softmax.state_row.eq(state.row),
            softmax.state_m.eq(self.vector_read.data[0]),
        ]
        return m
