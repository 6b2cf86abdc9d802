"""The scalar section of NORM: from a token's partial sums to its scale."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib.wiring import Component, In, Out

from rtl.lib.fp_add import FpAdd
from rtl.lib.fp_approx import FpRsqrt
from rtl.lib.fp_mul import FpMul

_ONE_BITS = 0x3F80_0000

# When each result is there, in cycles after `fold`.
_PAIR_01 = FpAdd.latency
_PAIR_23 = _PAIR_01 + 2
_SUM = _PAIR_23 + FpAdd.latency
_MEAN = _SUM + FpMul.latency
_VARIANCE = _MEAN + FpAdd.latency
_R = _VARIANCE + FpRsqrt.latency
_SCALE = _R + FpMul.latency


class NormScalars(Component):
    """One adder, one multiplier and 1/sqrt, used in turn.

    Function
        ``scale = s0 * rsqrt(((p0 + p1) + (p2 + p3)) * inv_length + eps)``, or s0 without `norm`.

    Ports
        en, In(1): the pipeline advances. partial, In(32): p0 .. p3, one a cycle in turn; fold, In(1): `partial` is
        p1, and all four are complete. s0, In(32): there `s0_at` enabled edges after `fold`. norm, inv_length, eps:
        static. scale_en, Out(1), scale, Out(32): one cycle a fold.

    Timing
        `latency` 24 from `fold` to `scale_en`. A new `fold` only after that.

    Numbers
        docs/numerics.md section 2, step 2.

    Cost
        One `FpAdd`, `FpMul`, `FpRsqrt`.

    Twins
        golden/norm.py, tests/test_norm.py.
    """

    latency = _SCALE
    s0_at = _R
    en: Signal
    partial: Signal
    fold: Signal
    s0: Signal
    norm: Signal
    inv_length: Signal
    eps: Signal
    scale_en: Signal
    scale: Signal

    def __init__(self) -> None:
        super().__init__(
            {
                "en": In(1),
                "partial": In(32),
                "fold": In(1),
                "s0": In(32),
                "norm": In(1),
                "inv_length": In(32),
                "eps": In(32),
                "scale_en": Out(1),
                "scale": Out(32),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.add = add = FpAdd()
        m.submodules.mul = mul = FpMul()
        m.submodules.rsqrt = rsqrt = FpRsqrt()
        m.d.comb += [unit.en.eq(self.en) for unit in (add, mul, rsqrt)]

        passed = Signal(_SCALE)  # one bit walks through
        step = Cat(self.fold, passed)
        previous = Signal(32, reset_less=True)  # the partial sum of the cycle before
        pair_01, later = Signal(32, reset_less=True), Signal(32, reset_less=True)
        with m.If(self.en):
            m.d.sync += [passed.eq(step), previous.eq(self.partial), pair_01.eq(add.y), later.eq(pair_01)]

        folds = Signal()  # p0 + p1, and two cycles later p2 + p3
        m.d.comb += [
            folds.eq(step[0] | step[2]),
            add.a.eq(Mux(folds, previous, Mux(step[_PAIR_23], later, mul.y))),
            add.b.eq(Mux(folds, self.partial, Mux(step[_PAIR_23], add.y, self.eps))),
            mul.a.eq(Mux(step[_R], self.s0, add.y)),
            mul.b.eq(Mux(step[_R], Mux(self.norm, rsqrt.y, _ONE_BITS), self.inv_length)),
            rsqrt.x.eq(add.y),
            self.scale_en.eq(step[_SCALE] & self.en),
            self.scale.eq(mul.y),
        ]
        return m
