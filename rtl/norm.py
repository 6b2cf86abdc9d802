"""RMSNorm and quantisation of activations: the NORM operation. Twin of golden/norm.py."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import stream
from amaranth.lib.wiring import Component, In, Out

from rtl.lib.aux_buffer import AuxBuffer
from rtl.lib.delay import Delay
from rtl.lib.fp_add import FpAdd
from rtl.lib.fp_approx import FpRsqrt
from rtl.lib.fp_convert import FpToInt8
from rtl.lib.fp_mul import FpMul
from rtl.lib.ops import op_layout
from rtl.lib.ports import ROW_ADDR_BITS, TOKEN_BITS, ActivationWrite, ScaleWrite, VectorRead
from rtl.lib.quant import AbsMax, QuantScale
from spec.config import LANES, SUM_WAYS
from spec.descriptors import Opcode

_ONE_BITS = 0x3F80_0000
_ROW_BITS = 32 * LANES

_READ = 1
"""Cycles from an issued beat to its data."""
_T = _READ + FpMul.latency
"""To t = x * gamma, and to the squares."""
_C = _T + AbsMax.latency + QuantScale.latency
"""To the factor c, from the last beat of pass 1."""
_BEAT_SUM = _T + 3 * FpAdd.latency
_PARTIAL_SUM = _BEAT_SUM + FpAdd.latency
_Q = _T + FpMul.latency + FpToInt8.latency
"""To the int8 of pass 2."""

# 3. the scalar section's use of its adder and multiplier, in cycles after p1 shows in its turn
_PAIR = FpAdd.latency  # p0 + p1 is there; two cycles later p2 + p3
_SUM = _PAIR + 2 + FpAdd.latency  # S
_MEAN = _SUM + FpMul.latency
_VARIANCE = _MEAN + FpAdd.latency
_R = _VARIANCE + FpRsqrt.latency
_SCALE = _R + FpMul.latency

if FpAdd.latency != SUM_WAYS:
    raise ValueError(f"the ring of partial sums is the adder itself: its latency must be {SUM_WAYS}")


class Norm(Component):
    """Norm and quantise the vectors of a tile's tokens, reading each vector twice.

    Function
        Per token: ``t = x * gamma`` (or x), ``(c, s0) = quant_params(max |t|)``, ``q = int8(t * c)``,
        ``s = s0 * rsqrt(mean(x^2) + eps)`` (or s0). Tokens 0 .. T-1, or token T-1 alone as token 0 (`last_only`).

    Streams
        i_op, in: `op_layout(NORM)`; taken while idle. i_aux, in, weight_bits: gamma as FP32, 8 a row,
        ``ceil(32 * beats / weight_bytes)`` beats an operation with `norm`, none without.

    Handshake
        vector: reads rows ``src + m * src_stride + beat``. act: one write a beat, scale: one a token, after which
        it may be used; neither can be held back. o_busy: from the cycle after an operation is taken until
        the cycle after its last write.

    Timing
        With B = `beats`, G = B rounded up to 4, a token takes ``max(2 B + 11, G + 42)`` cycles, and the operation
        ``1 + norm + (T - 1) * token + max(2 B + 17, G + 42)`` from taking it to idle when gamma is there
        (B = 64, T = 1, norm: 147 cycles). A late gamma beat holds everything.

    Numbers
        docs/numerics.md section 2, bit for bit.

    Cost
        8 lanes of two `FpMul` and one `FpToInt8`, 7 `FpAdd` of the beat's tree and 2 more, 3 `FpMul`, `FpRecip`,
        `FpRsqrt`; ``32 * max_vector`` bits of gamma buffer.

    Twins
        golden/norm.py `norm_quantise`, tests/test_norm.py, cosim/bench_norm.py.
    """

    i_op: stream.Interface
    i_aux: stream.Interface
    o_busy: Signal

    def __init__(self, *, weight_bits: int, max_vector: int) -> None:
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
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        en = Signal()  # low only while a beat of pass 1 waits for its gamma

        def unit(name: str, component: Component) -> Component:
            m.submodules[name] = component
            m.d.comb += component.en.eq(en)
            return component

        def delayed(name: str, value: Signal, cycles: int) -> Signal:
            line = unit(f"{name}_delay", Delay(value.shape(), cycles, reset=True))
            m.d.comb += line.i.eq(value)
            return line.o

        # 1. control: which beat of which token is read in this cycle
        op = Signal(op_layout(Opcode.NORM))
        accept = Signal()
        token, last_token = Signal(TOKEN_BITS), Signal(TOKEN_BITS)
        base, row = Signal(ROW_ADDR_BITS), Signal(ROW_ADDR_BITS)
        beat = Signal(ROW_ADDR_BITS)
        clock = Signal(ROW_ADDR_BITS + 1)  # cycles of this token
        gap = Signal(4)
        real, slot_pass, write = Signal(), Signal(), Signal()  # beat of pass 1; its slot, real or not; beat of pass 2
        scale_now, pending = Signal(), Signal()
        first = Signal()
        last_beat = Signal()
        m.d.comb += [
            self.i_op.ready.eq(~self.o_busy),
            accept.eq(self.i_op.valid & self.i_op.ready),
            first.eq(slot_pass & (clock == 0)),
            last_beat.eq(beat == op.beats - 1),
        ]
        m.submodules.gamma = gamma = AuxBuffer(
            weight_bits=self._weight_bits, row_bits=_ROW_BITS, max_rows=self._max_vector // LANES
        )
        m.d.comb += [
            gamma.i_aux.payload.eq(self.i_aux.payload),
            gamma.i_aux.valid.eq(self.i_aux.valid),
            self.i_aux.ready.eq(gamma.i_aux.ready),
            gamma.i_start.eq(accept & self.i_op.payload.norm),
            gamma.i_rows.eq(op.beats),
            gamma.i_row.eq(beat),
            gamma.i_en.eq(en),
            en.eq(~(real & op.norm & ~gamma.o_loaded)),
            self.vector.addr.eq(row),
            self.vector.en.eq(en & (real | write)),
        ]
        source = self.i_op.payload
        with m.If(en):
            m.d.sync += clock.eq(clock + 1)
            with m.If(real | write):
                m.d.sync += [beat.eq(beat + 1), row.eq(row + 1)]
                with m.If(last_beat):
                    m.d.sync += [beat.eq(0), row.eq(base)]
        with m.FSM(name="pass"):
            with m.State("IDLE"):
                with m.If(accept):
                    m.d.sync += [
                        op.eq(source),
                        token.eq(0),
                        last_token.eq(Mux(source.last_only, 0, source.tokens - 1)),
                        clock.eq(0),
                        beat.eq(0),
                    ]
                    start = source.src + Mux(source.last_only, source.tokens - 1, 0) * source.src_stride
                    m.d.sync += [base.eq(start), row.eq(start)]
                    m.next = "SUM"
            with m.State("SUM"):  # slots in fours: those after the last beat add zeros
                m.d.comb += [slot_pass.eq(1), real.eq(clock < op.beats)]
                m.d.sync += pending.eq(1)
                with m.If(en & (clock[0:2] == 3) & (clock[2:] == (op.beats - 1)[2:])):
                    m.next = "TURN"
            with m.State("TURN"):  # until c follows the first t of pass 2
                with m.If(clock == op.beats + (_C - _T - 2)):
                    m.next = "SCALE"
            with m.State("SCALE"):
                m.d.comb += write.eq(1)
                with m.If(last_beat):
                    m.d.sync += gap.eq(1)
                    m.next = "GAP"
            with m.State("GAP"):  # the multipliers are free after 3 cycles, all is written after _Q
                with m.If(gap != _Q):
                    m.d.sync += gap.eq(gap + 1)
                with m.If(~pending | scale_now):
                    with m.If((token != last_token) & (gap >= _T - _READ)):
                        m.d.sync += [
                            token.eq(token + 1),
                            base.eq(base + op.src_stride),
                            row.eq(base + op.src_stride),
                            clock.eq(0),
                        ]
                        m.next = "SUM"
                    with m.Elif((token == last_token) & (gap == _Q)):
                        m.next = "IDLE"
            m.d.comb += self.o_busy.eq(~m.FSM_idle) if False else []
        return m
