"""Epilogue of a matmul: integer sums in, results to vector memory, query buffer, KV cache or logits.

Twin of golden/epilogue.py. The arithmetic is in rtl/epilogue_lanes.py, rtl/head_quant.py and rtl/argmax.py.
"""

from collections.abc import Callable

from amaranth.hdl import Cat, Const, DomainRenamer, Module, Mux, Signal, Value
from amaranth.lib import data, stream
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import Component, In, Out

from rtl.argmax import Argmax
from rtl.channel_scale import ChannelScale
from rtl.epilogue_lanes import PARTS, SCALE_AT, SCALED_AT, TOKEN_SCALE_AT, EpilogueLanes, RouteLayout
from rtl.epilogue_lanes import RESULT_AT as LANES_RESULT_AT
from rtl.head_quant import HeadQuant
from rtl.lib.aux_buffer import AuxBuffer
from rtl.lib.delay import Delay
from rtl.lib.fp_convert import HalfToFp
from rtl.lib.ops import op_layout
from rtl.lib.ports import (
    ROW_ADDR_BITS,
    TOKEN_BITS,
    KvBeat,
    LogitsBeat,
    QueryWrite,
    RopeWrite,
    ScaleWrite,
    VectorRead,
    VectorRow,
    VectorWrite,
    matmul_beat,
)
from rtl.lib.row_walk import RowWalk
from spec.config import LANES
from spec.descriptors import Epilogue as Kind
from spec.descriptors import Opcode

EPILOGUE_PARTS = (*PARTS, "channels", "heads")
"""Parts that have work in some operations only: those of the lanes, `ChannelScale`, and the quantiser of QUERY, KEY and
VALUE."""

RESULT_AT = LANES_RESULT_AT | {"channels": LANES_RESULT_AT["rope"] + ChannelScale.latency}
"""Edges from the sums to the result, by route."""

_HALF_BITS = 16
_MEMORY_READ = 1

if _MEMORY_READ + HalfToFp.latency != SCALE_AT:
    raise ValueError(f"row scales are read with the sums: {SCALE_AT} cycles, not {_MEMORY_READ + HalfToFp.latency}")


class Epilogue(Component):
    """What happens to the sums of a MATMUL: scales, one of nine epilogues, and where the result goes.

    Function
        ``y = (float(sum) * weight_scale) * activation_scale``, then `op.epilogue` as in spec/descriptors.py.

    Streams
        i_op, in: `op_layout(MATMUL)`, taken while idle. i_y, in: `matmul_beat(sum_bits)`, for each token
        ``row_blocks * outputs / 8`` beats of which the first `op.beats` count: one token after the other, or with
        `block_major` for each row block ``outputs / 8`` beats of each token. i_aux, in, weight_bits: with
        `row_scale`, FP16 scales of the rows, ``ceil(16 * beats / weight_bytes)`` beats an operation, taken from the
        start on while the engine works (never in builds with ``max_row_scales=0``); with `channels`, the words of the
        rows in the same way (never in builds with ``max_channels=0``). o_kv, out: `KvBeat`. o_logits,
        out: `LogitsBeat` of token 0, with `i_logits_enable`. All that goes out keeps the order of `i_y`.

    Handshake
        scale, rope: writes of the activation scales and RoPE rows kept here, at any time but while an operation uses
        them. vector_read, vector_write, query: never held back. o_busy, Out(1): from the cycle after an operation is
        taken until all was written or taken. o_argmax, Out(32): row of the largest logit since the last operation
        with first_row = 0, stable when not busy. i_logits_enable, In(1): read when an operation is taken. With
        `block_major` a head's beats lie within a row block.

    Timing
        One beat a cycle. With N beats of `i_y` of which the R-th is the last real one, A beats of row scales and
        nothing late, ``3 + A + max(N, R + latency)`` cycles from taking the operation to idle. latency: 8 (STORE),
        11 (UP, GATE_RELU2, LOGITS of one token), 12 (RESIDUAL), 25 (GATE_SILU), 30 + head_beats (QUERY, KEY),
        23 + head_beats (VALUE); 5 more with `channels`. A is 0 without row scales and channels.

    Numbers
        docs/numerics.md sections 1, 3 and 4, bit for bit.

    Cost
        `EpilogueLanes`, `HeadQuant`, `Argmax`, 32 * tokens * max_head_dim bits of RoPE rows; with row scales 8 `HalfToFp`
        and 16 * max_row_scales bits; with channels `ChannelScale`.

    Twins
        golden/epilogue.py, tests/test_epilogue.py, cosim/bench_epilogue.py.

    Parameters
    ----------
    domain
        Clock domain of a part that not every epilogue needs, by its name in `EPILOGUE_PARTS`. Its clock may stop while
        its bit of ``o_parts`` is 0, and all clocks may while ``o_wake`` is 0.
    """

    i_op: stream.Interface
    i_y: stream.Interface
    i_aux: stream.Interface
    o_kv: stream.Interface
    o_logits: stream.Interface
    i_logits_enable: Signal
    o_argmax: Signal
    o_busy: Signal
    o_wake: Signal
    o_parts: data.View

    def __init__(
        self,
        *,
        weight_bits: int,
        tokens: int,
        outputs: int,
        max_row_scales: int,
        max_head_dim: int,
        max_channels: int = 0,
        sum_bits: int = 32,
        block_major: bool = False,
        domain: Callable[[str], str] = lambda _part: "sync",
    ) -> None:
        if not 0 < tokens < 1 << TOKEN_BITS:
            raise ValueError(f"tokens must be in [1, {(1 << TOKEN_BITS) - 1}], not {tokens}")
        for name, value in (("outputs", outputs), ("max_head_dim", max_head_dim), ("max_channels", max_channels)):
            if value % LANES:
                raise ValueError(f"{name} must be a multiple of {LANES}, not {value}")
        self._weight_bits = weight_bits
        self._tokens = tokens
        self._block_beats = outputs // LANES
        self._max_row_scales = max_row_scales
        self._max_head_beats = max_head_dim // LANES
        self._max_channels = max_channels
        self._sum_bits = sum_bits
        self._block_major = block_major
        self._domain = domain
        super().__init__(
            {
                "i_op": In(stream.Signature(op_layout(Opcode.MATMUL))),
                "i_y": In(stream.Signature(matmul_beat(sum_bits))),
                "i_aux": In(stream.Signature(weight_bits)),
                "scale": In(ScaleWrite),
                "rope": In(RopeWrite),
                "vector_read": Out(VectorRead),
                "vector_write": Out(VectorWrite),
                "query": Out(QueryWrite),
                "o_kv": Out(stream.Signature(KvBeat)),
                "o_logits": Out(stream.Signature(LogitsBeat)),
                "i_logits_enable": In(1),
                "o_argmax": Out(32),
                "o_busy": Out(1),
                "o_wake": Out(1),
                "o_parts": Out(data.StructLayout(dict.fromkeys(EPILOGUE_PARTS, 1))),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        en = Signal()  # the pipeline from i_y to the result advances

        def delayed(name: str, value: Signal, cycles: int) -> Signal:
            m.submodules[f"{name}_delay"] = line = Delay(value.shape(), cycles, reset=True)
            m.d.comb += [line.en.eq(en), line.i.eq(value)]
            return line.o

        # 1. the operation, decoded once
        op = Signal(op_layout(Opcode.MATMUL))
        route = Signal(RouteLayout)
        to_channels, to_vector, to_heads, to_query, is_value, to_int4, is_logits, send_logits, reads_old = (
            Signal(name=name)
            for name in (
                "to_channels", "to_vector", "to_heads", "to_query", "is_value", "to_int4", "is_logits", "send_logits", "reads_old"
            )
        )
        result_at = Signal(data.StructLayout(dict.fromkeys(RESULT_AT, 1)))
        tokens, total_beats, first_row = Signal(TOKEN_BITS), Signal(ROW_ADDR_BITS), Signal(ROW_ADDR_BITS)
        accept, begin, active, finished = Signal(), Signal(), Signal(), Signal()
        in_done, out_done = Signal(), Signal()
        offer = self.i_op.payload
        kind = offer.epilogue
        m.d.comb += accept.eq(self.i_op.valid & self.i_op.ready)
        with m.If(accept):
            up, relu2 = kind == Kind.UP, kind == Kind.GATE_RELU2
            rope = (kind == Kind.QUERY) | (kind == Kind.KEY)
            heads = (kind == Kind.QUERY) | (kind == Kind.KEY) | (kind == Kind.VALUE)
            m.d.sync += [
                op.eq(offer),
                route.silu.eq(kind == Kind.GATE_SILU),
                route.relu2.eq(relu2),
                route.up.eq(up),
                route.residual.eq(kind == Kind.RESIDUAL),
                route.rope.eq(rope),
                result_at.plain.eq((kind == Kind.STORE) | (kind == Kind.VALUE) | (kind == Kind.LOGITS)),
                result_at.product.eq(up | relu2),
                result_at.residual.eq(kind == Kind.RESIDUAL),
                result_at.rope.eq(rope & ~offer.channels),
                result_at.channels.eq(rope & offer.channels),
                to_channels.eq(rope & offer.channels),
                result_at.silu.eq(kind == Kind.GATE_SILU),
                to_vector.eq(~heads & (kind != Kind.LOGITS)),
                to_heads.eq(heads),
                to_query.eq(kind == Kind.QUERY),
                is_value.eq(kind == Kind.VALUE),
                to_int4.eq(((kind == Kind.KEY) & offer.k_int4) | ((kind == Kind.VALUE) & offer.v_int4)),
                is_logits.eq(kind == Kind.LOGITS),
                send_logits.eq(self.i_logits_enable),
                reads_old.eq(up | (kind == Kind.RESIDUAL)),
                tokens.eq(Mux(offer.last_only, 1, offer.tokens)),
                total_beats.eq(offer.row_blocks * self._block_beats),
                first_row.eq(offer.dst + Mux(kind == Kind.QUERY, offer.first_head * offer.head_beats, 0)),
            ]

        m.submodules.argmax = argmax = Argmax()
        with m.FSM(name="phase"):
            with m.State("IDLE"):
                m.d.comb += self.i_op.ready.eq(1)
                with m.If(accept):
                    m.next = "BEGIN"
            with m.State("BEGIN"):
                m.d.comb += begin.eq(1)
                m.d.sync += [in_done.eq(0), out_done.eq(0)]
                m.next = "ACTIVE"
            with m.State("ACTIVE"):
                m.d.comb += active.eq(1)
                with m.If(finished):
                    m.next = "IDLE"
        m.d.comb += self.o_busy.eq(~self.i_op.ready)

        # 2. weight scales: of the matrix, or of the rows of a beat
        block_beats = self._block_beats if self._block_major else None
        m.submodules.walk_in = walk_in = RowWalk(block_beats=block_beats)  # all beats, padding too
        m.submodules.lanes = lanes = EpilogueLanes(sum_bits=self._sum_bits, domain=self._domain)
        loading = Signal()  # row scales or channel words are still to come
        aux_ready: Value = Const(0, 1)
        if self._max_row_scales:
            m.submodules.row_scales = row_scales = AuxBuffer(
                weight_bits=self._weight_bits, row_bits=_HALF_BITS * LANES, max_rows=self._max_row_scales // LANES
            )
            m.d.comb += [
                row_scales.i_aux.payload.eq(self.i_aux.payload),
                row_scales.i_aux.valid.eq(self.i_aux.valid),
                row_scales.i_start.eq(begin & op.row_scale),
                row_scales.i_rows.eq(op.beats),
                row_scales.i_row.eq(walk_in.o_beat),
                row_scales.i_en.eq(en),
            ]
            aux_ready = row_scales.i_aux.ready
            with m.If(op.row_scale & ~row_scales.o_done):
                m.d.comb += loading.eq(1)
            for lane in range(LANES):
                m.submodules[f"half_{lane}"] = half = HalfToFp()
                m.d.comb += [
                    half.en.eq(en),
                    half.x.eq(row_scales.o_data.word_select(lane, _HALF_BITS)),
                    lanes.weight_scale[lane].eq(Mux(op.row_scale, half.y, op.scale)),
                ]
        else:
            m.d.comb += [lanes.weight_scale[lane].eq(op.scale) for lane in range(LANES)]

        # 3. sums in; a bit a stage says where a real beat is
        real = Signal()
        stages = Signal(max(RESULT_AT.values()))
        flying = Cat(real, stages)
        m.d.comb += [
            self.i_y.ready.eq(active & en & ~in_done & ~loading),
            walk_in.i_start.eq(begin),
            walk_in.i_beats.eq(total_beats),
            walk_in.i_tokens.eq(tokens),
            walk_in.i_step.eq(self.i_y.valid & self.i_y.ready),
            real.eq(walk_in.i_step & (walk_in.o_beat < op.beats)),
        ]
        with m.If(walk_in.i_step & walk_in.o_last):
            m.d.sync += in_done.eq(1)
        with m.If(en):
            m.d.sync += stages.eq(flying)
        with m.If(accept):  # bits that went past the end of the last operation's route
            m.d.sync += stages.eq(0)

        # 4. lanes, and what joins the sums on their way
        m.submodules.token_scales = token_scales = Memory(shape=32, depth=self._tokens, init=[])
        scale_write, scale_read = token_scales.write_port(), token_scales.read_port(domain="comb")
        m.d.comb += [
            lanes.en.eq(en),
            lanes.route.eq(route),
            lanes.sums.eq(self.i_y.payload.sums),
            scale_write.addr.eq(self.scale.token),
            scale_write.data.eq(self.scale.data),
            scale_write.en.eq(self.scale.en),
            scale_read.addr.eq(delayed("token", walk_in.o_token, TOKEN_SCALE_AT)),
            lanes.token_scale.eq(scale_read.data),
        ]
        row_bits = (self._max_head_beats - 1).bit_length()
        m.submodules.rope_rows = rope_rows = Memory(shape=VectorRow, depth=self._tokens << row_bits, init=[])
        rope_write, rope_read = rope_rows.write_port(), rope_rows.read_port()
        # real beats, where old values and RoPE rows are read
        m.submodules.walk_read = walk_read = RowWalk(block_beats=block_beats)
        m.d.comb += [
            walk_read.i_start.eq(begin),
            walk_read.i_base.eq(op.dst),
            walk_read.i_stride.eq(op.dst_stride),
            walk_read.i_beats.eq(op.beats),
            walk_read.i_head_beats.eq(op.head_beats),
            walk_read.i_tokens.eq(tokens),
            walk_read.i_step.eq(flying[SCALED_AT - _MEMORY_READ] & en),
            self.vector_read.addr.eq(walk_read.o_addr),
            self.vector_read.en.eq(walk_read.i_step & reads_old),
            lanes.old.eq(self.vector_read.data),
            rope_write.addr.eq(Cat(self.rope.row[:row_bits], self.rope.token)),
            rope_write.data.eq(self.rope.data),
            rope_write.en.eq(self.rope.en),
            rope_read.addr.eq(Cat(walk_read.o_head_beat[:row_bits], walk_read.o_token)),
            rope_read.en.eq(en),
            lanes.rope.eq(rope_read.data),
        ]

        # 5. offsets and shifts of Q and K
        head_y = lanes.y
        if self._max_channels:
            channels = ChannelScale(weight_bits=self._weight_bits, max_channels=self._max_channels)
            m.submodules.channels = DomainRenamer(self._domain("channels"))(channels)
            read_at, beat_at = SCALED_AT - _MEMORY_READ, LANES_RESULT_AT["rope"] - channels.lead
            m.d.comb += [
                channels.i_aux.payload.eq(self.i_aux.payload),
                channels.i_aux.valid.eq(self.i_aux.valid),
                channels.i_start.eq(begin & to_channels),
                channels.i_rows.eq(op.beats),
                channels.en.eq(en),
                channels.beat.eq(delayed("channel_beat", walk_read.o_beat, beat_at - read_at)),
                channels.x.eq(lanes.y),
            ]
            head_y = Mux(to_channels, channels.y, lanes.y)
            aux_ready |= channels.i_aux.ready
            with m.If(to_channels & ~channels.o_done):
                m.d.comb += loading.eq(1)
        m.d.comb += self.i_aux.ready.eq(aux_ready)

        # 6. results out
        head_quant = HeadQuant(max_head_beats=self._max_head_beats)
        m.submodules.head_quant = DomainRenamer(self._domain("heads"))(head_quant)
        # results, of heads behind the quantiser
        m.submodules.walk_out = walk_out = RowWalk(block_beats=block_beats)
        result, result_taken, head_taken = Signal(), Signal(), Signal()
        logits_result = Signal()  # of token 0: no other is meant to have logits
        arrived = [result_at[route_name] & flying[cycles] for route_name, cycles in RESULT_AT.items()]
        m.d.comb += [
            result.eq(Cat(*arrived).any()),
            logits_result.eq(result & is_logits & (walk_out.o_token == 0)),
            en.eq(~((self.o_logits.valid & ~self.o_logits.ready) | (result & to_heads & ~head_quant.i_data.ready))),
            result_taken.eq(result & en),
            walk_out.i_start.eq(begin),
            walk_out.i_base.eq(first_row),
            walk_out.i_stride.eq(op.dst_stride),
            walk_out.i_beats.eq(op.beats),
            walk_out.i_head_beats.eq(op.head_beats),
            walk_out.i_tokens.eq(tokens),
            walk_out.i_step.eq(Mux(to_heads, head_taken, result_taken)),
            finished.eq(in_done & out_done & ~argmax.o_busy),
        ]
        with m.If(walk_out.i_step & walk_out.o_last):
            m.d.sync += out_done.eq(1)

        # The clock may stop while nothing comes in and nothing is under way. Heads wait in the quantiser for more than
        # a pipeline bit can tell, so their operations stay awake from the first sum on.
        begun = Signal()
        with m.If(begin):
            m.d.sync += begun.eq(0)
        with m.Elif(self.i_y.valid):
            m.d.sync += begun.eq(1)
        m.d.comb += [self.o_parts.heads.eq(to_heads), self.o_parts.channels.eq(to_channels)]
        for part, routes in PARTS.items():
            m.d.comb += self.o_parts[part].eq(Cat(route[name] for name in routes).any())
        m.d.comb += self.o_wake.eq(
            self.i_op.valid | self.scale.en | self.rope.en
            | (
                self.o_busy
                & (
                    ~active | self.i_y.valid | stages.any() | in_done | argmax.o_busy
                    | loading | (to_heads & begun)
                )
            )
        )

        # STORE, RESIDUAL, GATE, UP
        m.d.comb += [
            self.vector_write.addr.eq(walk_out.o_addr),
            self.vector_write.data.eq(lanes.y),
            self.vector_write.en.eq(result_taken & to_vector),
        ]

        # LOGITS
        logits_beat = self.o_logits.payload.beat
        m.d.comb += [
            self.o_logits.valid.eq(logits_result & send_logits),
            self.o_logits.payload.data.eq(lanes.y),
            logits_beat.eq((op.first_row >> 3) + walk_out.o_beat),
            argmax.en.eq(1),
            argmax.i_reset.eq(begin & is_logits & (op.first_row == 0)),
            argmax.i_valid.eq(logits_result & en),
            argmax.i_data.eq(lanes.y),
            argmax.i_beat.eq(logits_beat),
            argmax.i_lanes.eq(Mux(walk_out.o_last_in_token, op.valid, LANES)),
            self.o_argmax.eq(argmax.o_row),
        ]

        # QUERY, KEY, VALUE
        quantised = head_quant.o_data
        head = op.first_head + walk_out.o_head
        m.d.comb += [
            head_quant.i_head_beats.eq(op.head_beats),
            head_quant.i_int4.eq(to_int4),
            head_quant.i_data.valid.eq(result & to_heads),
            head_quant.i_data.payload.eq(head_y),
            quantised.ready.eq(to_query | self.o_kv.ready),
            head_taken.eq(quantised.valid & quantised.ready),
            self.query.en.eq(quantised.valid & to_query),
            self.query.row.eq(walk_out.o_addr),
            self.query.data.eq(quantised.payload.data),
            self.query.scale_en.eq(quantised.valid & to_query & quantised.payload.last),
            self.query.token.eq(walk_out.o_token),
            self.query.head.eq(head),
            self.query.scale.eq(quantised.payload.scale),
            self.o_kv.valid.eq(quantised.valid & ~to_query),
            self.o_kv.payload.data.eq(quantised.payload.data),
            self.o_kv.payload.value.eq(is_value),
            self.o_kv.payload.token.eq(walk_out.o_token),
            self.o_kv.payload.head.eq(head),
            self.o_kv.payload.last.eq(quantised.payload.last),
            self.o_kv.payload.scale.eq(quantised.payload.scale),
        ]
        return m
