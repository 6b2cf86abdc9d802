"""The scalar section of NORM: from a token's largest magnitude and partial sums to its factor and scale."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib.wiring import Component, In, Out

from rtl.lib.fp_add import FpAdd
from rtl.lib.fp_approx import FpRsqrt
from rtl.lib.fp_mul import FpMul
from rtl.lib.quant import QuantScale

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
    """One adder, one multiplier and the approximations, used in turn.

    Function
        ``(c, s0) = quant_params(a)``; ``scale = s0 * rsqrt(((p0 + p1) + (p2 + p3)) * inv_length + eps)``, or s0
        without `norm`.

    Ports
        en, In(1): the pipeline advances. a, In(32): c follows it by `QuantScale.latency`, and it must hold until
        `scale_en`. partial, In(32): p0 .. p3, one a cycle in turn; fold, In(1): `partial` is p1, and all four are
        complete. norm, inv_length, eps: static. c, Out(32). scale_en, Out(1), scale, Out(32): one cycle a fold.

    Timing
        `latency` 24 from `fold` to `scale_en`. A new `fold` only after that.

    Numbers
        docs/numerics.md section 2, step 2.

    Cost
        `QuantScale`, one `FpAdd`, `FpMul`, `FpRsqrt`.

    Twins
        golden/norm.py, tests/test_norm.py.
    """

    latency = _SCALE
    en: Signal
    a: Signal
    partial: Signal
    fold: Signal
    norm: Signal
    inv_length: Signal
    eps: Signal
    c: Signal
    scale_en: Signal
    scale: Signal

    def __init__(self) -> None:
        super().__init__(
            {
                "en": In(1),
                "a": In(32),
                "partial": In(32),
                "fold": In(1),
                "norm": In(1),
                "inv_length": In(32),
                "eps": In(32),
                "c": Out(32),
                "scale_en": Out(1),
                "scale": Out(32),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.params = params = QuantScale()
        m.submodules.add = add = FpAdd()
        m.submodules.mul = mul = FpMul()
        m.submodules.rsqrt = rsqrt = FpRsqrt()
        m.d.comb += [unit.en.eq(self.en) for unit in (params, add, mul, rsqrt)]

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
            mul.a.eq(Mux(step[_R], params.s, add.y)),
            mul.b.eq(Mux(step[_R], Mux(self.norm, rsqrt.y, _ONE_BITS), self.inv_length)),
            rsqrt.x.eq(add.y),
            params.a.eq(self.a),
            self.c.eq(params.c),
            self.scale_en.eq(step[_SCALE] & self.en),
            self.scale.eq(mul.y),
        ]
        return m
