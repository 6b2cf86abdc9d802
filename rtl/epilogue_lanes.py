"""The arithmetic of the epilogue: eight lanes from integer sums to the epilogue's result."""

from collections.abc import Callable
from typing import Any

from amaranth.hdl import Cat, DomainRenamer, Module, Mux, Signal, Value, signed
from amaranth.lib import data
from amaranth.lib.wiring import Component, In, Out

from rtl.lib.fp import fp_neg
from rtl.lib.fp_add import FpAdd
from rtl.lib.fp_approx import FpExp, FpRecip
from rtl.lib.fp_convert import IntToFp
from rtl.lib.fp_mul import FpMul
from rtl.lib.ports import VectorRow
from rtl.lib.ring_delay import RingDelay
from spec.config import LANES

_ONE_BITS = 0x3F80_0000

SCALE_AT = IntToFp.latency
"""Edges from the sums to the weight scale."""

TOKEN_SCALE_AT = SCALE_AT + FpMul.latency
"""To the activation scale."""

SCALED_AT = TOKEN_SCALE_AT + FpMul.latency
"""To y, the old value of RESIDUAL and UP, and the cosines and sines."""

RESULT_AT = {
    "plain": SCALED_AT,
    "product": SCALED_AT + FpMul.latency,
    "residual": SCALED_AT + FpAdd.latency,
    "rope": SCALED_AT + FpMul.latency + FpAdd.latency,
    "silu": SCALED_AT + FpExp.latency + FpAdd.latency + FpRecip.latency + FpMul.latency,
}
"""To the result, by route. `product` is UP and GATE_RELU2."""

RouteLayout = data.StructLayout({"silu": 1, "relu2": 1, "up": 1, "residual": 1, "rope": 1})
"""At most one bit is set; none: y as it is."""

PARTS = {
    "silu": ("silu",),
    "product": ("silu", "relu2", "up", "rope"),
    "cross": ("rope",),
    "sum": ("silu", "residual", "rope"),
}
"""Parts of a lane, and the routes that take them. The clock of a part may stop while another route is taken."""


class EpilogueLanes(Component):
    """Sums times scales, then one of five short routes through the same two multipliers and adder of each lane.

    Function
        ``y = (float(sums) * weight_scale) * token_scale``, then by `route`: silu ``y * recip(1 + exp(-y))``;
        relu2 ``max(y, 0)^2``; up ``old * y``; residual ``old + y``; rope: lanes (2i, 2i+1) rotated by
        (rope[2i], rope[2i+1]) = (cos, sin); none ``y``.

    Ports
        en, In(1): everything advances. sums, In(8 x signed(sum_bits)). weight_scale, In(8 x 32), `SCALE_AT` edges later;
        token_scale, In(32), `TOKEN_SCALE_AT` edges later; old, rope, In(8 x 32), `SCALED_AT` edges later. route,
        static: constant while anything is inside. y, Out(8 x 32), `RESULT_AT[...]` edges later.

    Timing
        One beat an enabled edge; latency 8 (none), 11 (up, relu2), 12 (residual), 15 (rope), 25 (silu).

    Numbers
        docs/numerics.md sections 3 and 4. The two products of RoPE's odd lanes are added in the other order, which
        IEEE addition cannot tell; its subtraction is an addition of the negated product.

    Cost
        A lane: `IntToFp`, 4 `FpMul`, `FpAdd`, `FpExp`, `FpRecip`; for all, 16 rows of memory that carry y past exp.

    Twins
        golden/epilogue.py, tests/test_epilogue.py.

    Parameters
    ----------
    domain
        Clock domain of a part that not every route takes, by its name in `PARTS`.
    """

    en: Signal
    route: data.View
    sums: data.View
    weight_scale: data.View
    token_scale: Signal
    old: data.View
    rope: data.View
    y: data.View

    def __init__(self, *, sum_bits: int, domain: Callable[[str], str] = lambda _part: "sync") -> None:
        self._sum_bits = sum_bits
        self._domain = domain
        super().__init__(
            {
                "en": In(1),
                "route": In(RouteLayout),
                "sums": In(data.ArrayLayout(signed(sum_bits), LANES)),
                "weight_scale": In(VectorRow),
                "token_scale": In(32),
                "old": In(VectorRow),
                "rope": In(VectorRow),
                "y": Out(VectorRow),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()

        def unit(name: str, component: Any, part: str | None = None) -> Any:
            m.submodules[name] = DomainRenamer(self._domain(part))(component) if part else component
            m.d.comb += component.en.eq(self.en)
            return component

        # 1. y
        scaled: list[Value] = []
        for lane in range(LANES):
            convert = unit(f"convert_{lane}", IntToFp(self._sum_bits))
            by_weight = unit(f"by_weight_{lane}", FpMul())
            by_token = unit(f"by_token_{lane}", FpMul())
            m.d.comb += [
                convert.x.eq(self.sums[lane]),
                by_weight.a.eq(convert.y),
                by_weight.b.eq(self.weight_scale[lane]),
                by_token.a.eq(by_weight.y),
                by_token.b.eq(self.token_scale),
            ]
            scaled.append(by_token.y)

        # 2. y beside exp, 1 + and recip, of which the adder is shared
        route = self.route
        sigmoid_latency = FpExp.latency + FpAdd.latency + FpRecip.latency
        past = unit("past", RingDelay(VectorRow, sigmoid_latency), "silu")
        m.d.comb += past.i.eq(Cat(*scaled))

        # 3. multiplier, second multiplier (the neighbour's product of RoPE), adder
        for lane in range(LANES):
            exp = unit(f"exp_{lane}", FpExp(), "silu")
            recip = unit(f"recip_{lane}", FpRecip(), "silu")
            mul = unit(f"mul_{lane}", FpMul(), "product")
            cross = unit(f"cross_{lane}", FpMul(), "cross")
            add = unit(f"add_{lane}", FpAdd(), "sum")
            y, old = scaled[lane], self.old[lane]
            above_zero = Signal(32, name=f"above_zero_{lane}")
            crossed = Cat(cross.y[0:31], cross.y[31] ^ (lane % 2 == 0))
            factor = Mux(route.silu, recip.y, Mux(route.up, old, Mux(route.relu2, above_zero, self.rope[lane & ~1])))
            plain = ~(route.silu | route.up | route.relu2 | route.residual | route.rope)
            m.d.comb += [
                above_zero.eq(y & ~y[31].replicate(32)),
                exp.x.eq(fp_neg(y)),
                recip.x.eq(add.y),
                mul.a.eq(Mux(route.silu, past.o[lane], Mux(route.relu2, above_zero, y))),
                mul.b.eq(factor),
                cross.a.eq(scaled[lane ^ 1]),
                cross.b.eq(self.rope[lane | 1]),
                add.a.eq(Mux(route.silu, _ONE_BITS, Mux(route.rope, mul.y, old))),
                add.b.eq(Mux(route.silu, exp.y, Mux(route.rope, crossed, y))),
                self.y[lane].eq(Mux(plain, y, Mux(route.residual | route.rope, add.y, mul.y))),
            ]
        return m
