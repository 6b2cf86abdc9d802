"""RMSNorm and quantisation of activations: the NORM operation. Twin of golden/norm.py."""

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import stream
from amaranth.lib.wiring import Component, In, Out

from rtl.lib.aux_buffer import AuxBuffer
from rtl.lib.delay import Delay
from rtl.lib.fp_add import FpAdd
from rtl.lib.fp_convert import FpToInt8
from rtl.lib.fp_mul import FpMul
from rtl.lib.ops import op_layout
from rtl.lib.ports import ROW_ADDR_BITS, TOKEN_BITS, ActivationWrite, GroupScaleWrite, ScaleWrite, VectorRead
from rtl.lib.quant import AbsMax, QuantScale
from rtl.norm_groups import NormGroups
from rtl.norm_scalars import NormScalars
from spec.config import K_GROUP, LANES, SUM_WAYS
from spec.descriptors import Opcode

_ONE_BITS = 0x3F80_0000
_ROW_BITS = 32 * LANES
_GROUP_BEATS = K_GROUP // LANES

# Cycles from the read of a beat to its data, to t and the squares, to c (from the last beat of pass 1), to the
# sum of a beat's squares, to the partial sum, and in pass 2 to the int8.
_READ = 1
_T = _READ + FpMul.latency
_C = _T + AbsMax.latency + QuantScale.latency
_BEAT_SUM = _T + 3 * FpAdd.latency
_PARTIAL = _BEAT_SUM + FpAdd.latency
_Q = _T + FpMul.latency + FpToInt8.latency

_PASS_2 = _GROUP_BEATS + AbsMax.latency + NormGroups.latency
"""With groups: cycles of a token before pass 2 may read, as the first t of pass 2 needs the c of the first group."""

if FpAdd.latency != SUM_WAYS:
    raise ValueError(f"the adder is the ring of partial sums: its latency must be {SUM_WAYS}, not {FpAdd.latency}")


class Norm(Component):
    """Norm and quantise the vectors of a tile's tokens, reading each vector twice.

    Function
        Per token: ``t = x * gamma`` (or x), ``(c, s0) = quant_params(max |t|)``, ``q = int8(t * c)``,
        ``s = s0 * rsqrt(mean(x^2) + eps)`` (or s0). Tokens 0 .. T-1, or token T-1 alone as token 0 (`last_only`).
        With `grouped`, for each group G of 32: ``(c_G, d_G)`` by `GroupScale`, ``q = int8(t * c_G)``, and s0 is the
        power of two from which the exponents of the d_G count down.

    Streams
        i_op, in: `op_layout(NORM)`; taken while idle. i_aux, in, weight_bits: gamma as FP32, 8 a row,
        ``ceil(32 * beats / weight_bytes)`` beats an operation with `norm`, none without.

    Handshake
        vector: reads rows ``src + m * src_stride + beat``. act: one write a beat; scale: one a token, in any order
        with its `act`; neither can be held back. o_busy, Out(1): from the cycle after an operation is taken to its
        last write. `grouped`: group_scale: one write a group, in order, before its first `act`; `beats` is a multiple
        of 4.

    Timing
        With B = `beats` and G = B rounded up to a multiple of 4, a token takes ``max(2 B + 11, G + 42)`` cycles,
        and the operation ``1 + norm + (T - 1) * token + max(2 B + 17, G + 42)`` from taking it to idle, with gamma
        on offer (B = 64, T = 1, norm: 147). A late beat of gamma holds everything for as long as it is late.
        `grouped`: pass 2 follows pass 1 at once from B = 16 on: B + max(B, 13) in the place of 2 B + 8 (139).

    Numbers
        docs/numerics.md section 2 (2b with `grouped`), bit for bit.

    Cost
        8 lanes of two `FpMul` and one `FpToInt8`, 8 `FpAdd`, `QuantScale`, `NormScalars`; 32 * max_vector bits of
        gamma buffer. `grouped`: `GroupScale` for `QuantScale`, max_vector bits of factors.

    Twins
        golden/norm.py `norm_quantise`, `norm_quantise_groups`, tests/test_norm.py, cosim/bench_norm.py.
    """

    i_op: stream.Interface
    i_aux: stream.Interface
    o_busy: Signal

    def __init__(self, *, weight_bits: int, tokens: int, max_vector: int, grouped: bool = False) -> None:
        if not 0 < tokens < 1 << TOKEN_BITS:
            raise ValueError(f"tokens must be in [1, {(1 << TOKEN_BITS) - 1}], not {tokens}")
        unit = K_GROUP if grouped else LANES
        if max_vector % unit:
            raise ValueError(f"max_vector must be a multiple of {unit}, not {max_vector}")
        self._grouped = grouped
        self._weight_bits = weight_bits
        self._max_vector = max_vector
        super().__init__(
            {
                "i_op": In(stream.Signature(op_layout(Opcode.NORM))),
                "i_aux": In(stream.Signature(weight_bits)),
                "vector": Out(VectorRead),
                "act": Out(ActivationWrite),
                "scale": Out(ScaleWrite),
                "o_busy": Out(1),
            }
            | ({"group_scale": Out(GroupScaleWrite)} if grouped else {})
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        en = Signal()  # low only while a beat of pass 1 waits for its gamma

        def delayed(name: str, value: Value, cycles: int) -> Value:
            m.submodules[f"{name}_delay"] = line = Delay(value.shape(), cycles, reset=True)
            m.d.comb += [line.en.eq(en), line.i.eq(value)]
            return line.o

        # 1. which beat of which token is read in this cycle
        op = Signal(op_layout(Opcode.NORM))
        token, last_token = Signal(TOKEN_BITS), Signal(TOKEN_BITS)
        base, row, beat = Signal(ROW_ADDR_BITS), Signal(ROW_ADDR_BITS), Signal(ROW_ADDR_BITS)
        clock = Signal(ROW_ADDR_BITS + 1)  # cycles of this token
        gap = Signal(range(_Q + 1))  # cycles after its last beat
        square, slot, write = Signal(), Signal(), Signal()  # a beat of pass 1; its slot, used or not; a beat of pass 2
        scale_en, scale_pending = Signal(), Signal()
        accept, last_beat, first_group, last_group = Signal(), Signal(), Signal(), Signal()
        offer = self.i_op.payload
        start, following = Signal(ROW_ADDR_BITS), Signal(ROW_ADDR_BITS)
        m.d.comb += [
            accept.eq(self.i_op.valid & self.i_op.ready),
            start.eq(offer.src + Mux(offer.last_only, offer.tokens - 1, 0) * offer.src_stride),
            following.eq(base + op.src_stride),
            last_beat.eq(beat == op.beats - 1),
            first_group.eq(clock[2:] == 0),
            last_group.eq(clock[2:] == (op.beats - 1)[2:]),
            self.vector.addr.eq(row),
            self.vector.en.eq(en & (square | write)),
        ]
        with m.If(en):
            m.d.sync += clock.eq(clock + 1)
        with m.If(self.vector.en):
            m.d.sync += [beat.eq(Mux(last_beat, 0, beat + 1)), row.eq(Mux(last_beat, base, row + 1))]
        with m.If(scale_en):
            m.d.sync += scale_pending.eq(0)
        with m.FSM(name="phase"):
            with m.State("IDLE"):
                m.d.comb += self.i_op.ready.eq(1)
                with m.If(accept):
                    m.d.sync += [
                        op.eq(offer),
                        token.eq(0),
                        last_token.eq(Mux(offer.last_only, 0, offer.tokens - 1)),
                        base.eq(start),
                        row.eq(start),
                        clock.eq(0),
                    ]
                    m.next = "PASS_1"
            with m.State("PASS_1"):  # slots in fours: those after the last beat add zeros
                m.d.comb += [slot.eq(1), square.eq(clock < op.beats)]
                m.d.sync += scale_pending.eq(1)
                with m.If(en & last_group & (clock[0:2] == 3)):
                    m.next = "TURN"
                    if self._grouped:
                        with m.If(clock >= _PASS_2 - 1):
                            m.next = "PASS_2"
            with m.State("TURN"):  # c comes when the first t of pass 2 does
                turned = clock == _PASS_2 - 1 if self._grouped else clock == op.beats + (_C - _T - 2)
                with m.If(turned):
                    m.next = "PASS_2"
            with m.State("PASS_2"):
                m.d.comb += write.eq(1)
                m.d.sync += gap.eq(1)
                with m.If(last_beat):
                    m.next = "GAP"
            with m.State("GAP"):
                with m.If(gap != _Q):
                    m.d.sync += gap.eq(gap + 1)
                with m.If(~scale_pending | scale_en):
                    with m.If(token == last_token):
                        with m.If(gap == _Q):
                            m.next = "IDLE"
                    with m.Elif(gap >= _T - _READ):  # the second bank of multipliers is free again
                        m.d.sync += [token.eq(token + 1), base.eq(following), row.eq(following), clock.eq(0)]
                        m.next = "PASS_1"
        m.d.comb += self.o_busy.eq(~self.i_op.ready)

        # 2. gamma, row by row as x
        m.submodules.gamma = gamma = AuxBuffer(
            weight_bits=self._weight_bits, row_bits=_ROW_BITS, max_rows=self._max_vector // LANES
        )
        m.d.comb += [
            gamma.i_aux.payload.eq(self.i_aux.payload),
            gamma.i_aux.valid.eq(self.i_aux.valid),
            self.i_aux.ready.eq(gamma.i_aux.ready),
            gamma.i_start.eq(accept & offer.norm),
            gamma.i_rows.eq(op.beats),
            gamma.i_row.eq(beat),
            gamma.i_en.eq(en),
            en.eq(~(square & op.norm & ~gamma.o_loaded)),
        ]

        # 3. lanes: first bank x * gamma; second bank x * x in pass 1, t * c in pass 2
        m.submodules.scalars = scalars = NormScalars()
        m.submodules.absmax = absmax = AbsMax()
        c = Signal(32)  # factor of t in pass 2
        m.d.comb += [scalars.en.eq(en), absmax.en.eq(en)]
        quantises = delayed("quantises", write, _T)
        writes = delayed("writes", quantises, _Q - _T)
        squares: list[Value] = []
        for lane in range(LANES):
            m.submodules[f"gain_{lane}"] = gain = FpMul()
            m.submodules[f"second_{lane}"] = second = FpMul()
            m.submodules[f"int8_{lane}"] = int8 = FpToInt8()
            x = self.vector.data[lane]
            m.d.comb += [
                gain.en.eq(en),
                second.en.eq(en),
                int8.en.eq(en),
                gain.a.eq(x),
                gain.b.eq(Mux(op.norm, gamma.o_data.word_select(lane, 32), _ONE_BITS)),
                absmax.t[lane].eq(gain.y),
                second.a.eq(Mux(quantises, gain.y, x)),
                second.b.eq(Mux(quantises, c, x)),
                int8.x.eq(second.y),
                self.act.data.word_select(lane, 8).eq(int8.y),
            ]
            squares.append(second.y)

        # 4. sum of squares: the tree of a beat, then a ring of SUM_WAYS partial sums that is the adder's pipeline
        depth = 0
        while len(squares) > 1:
            depth += 1
            sums: list[Value] = []
            for n, (a, b) in enumerate(zip(squares[0::2], squares[1::2], strict=True)):
                m.submodules[f"tree_{depth}_{n}"] = add = FpAdd()
                m.d.comb += [add.en.eq(en), add.a.eq(a), add.b.eq(b)]
                sums.append(add.y)
            squares = sums
        m.submodules.ring = ring = FpAdd()
        in_vector = clock[0:2] if self._grouped else clock  # or in the group
        square_t = delayed("square", Cat(square, square & (in_vector == 0)), _T)
        in_sum = delayed("in_sum", Cat(square_t[0], delayed("first_group", first_group, _T)), _BEAT_SUM - _T)
        m.d.comb += [
            ring.en.eq(en),
            ring.a.eq(Mux(in_sum[1], 0, ring.y)),
            ring.b.eq(Mux(in_sum[0], squares[0], 0)),
            absmax.valid.eq(square_t[0]),
            absmax.first.eq(square_t[1]),
        ]

        # 5. factors and scale
        if self._grouped:
            m.submodules.groups = groups = NormGroups(groups=self._max_vector // K_GROUP)
            ends = delayed("ends", Cat(square & (clock[0:2] == 3), clock[2:]), _T + AbsMax.latency)
            m.d.comb += [
                groups.en.eq(en),
                groups.a.eq(absmax.a),
                groups.ends.eq(ends[0]),
                groups.group.eq(ends[1:]),
                groups.used.eq(delayed("used", beat[2:], _T)),
                c.eq(groups.c),
                scalars.s0.eq(groups.s0),
                self.group_scale.en.eq(groups.d_en),
                self.group_scale.token.eq(token),
                self.group_scale.group.eq(groups.d_group),
                self.group_scale.data.eq(groups.d),
            ]
        else:
            m.submodules.params = params = QuantScale()
            m.d.comb += [params.en.eq(en), params.a.eq(absmax.a), c.eq(params.c), scalars.s0.eq(params.s)]
        m.d.comb += [
            scalars.partial.eq(ring.y),
            scalars.fold.eq(delayed("fold", slot & last_group & (clock[0:2] == 1), _PARTIAL)),
            scalars.norm.eq(op.norm),
            scalars.inv_length.eq(op.inv_length),
            scalars.eps.eq(op.eps),
            scale_en.eq(scalars.scale_en),
            self.scale.en.eq(scale_en),
            self.scale.token.eq(token),
            self.scale.data.eq(scalars.scale),
        ]

        # 6. activations out
        out_row, out_token = Signal(ROW_ADDR_BITS), Signal(TOKEN_BITS)
        out_last = Signal()
        m.d.comb += [
            out_last.eq(out_row == op.beats - 1),
            self.act.en.eq(writes & en),
            self.act.token.eq(out_token),
            self.act.row.eq(out_row),
        ]
        with m.If(self.act.en):
            m.d.sync += [out_row.eq(Mux(out_last, 0, out_row + 1)), out_token.eq(out_token + out_last)]
        with m.If(accept):
            m.d.sync += out_token.eq(0)
        return m
