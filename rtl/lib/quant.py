"""Absolute maximum of eight lanes, and the two factors of an absmax quantisation: of a vector, or of a group of 32."""

from collections.abc import Sequence

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data
from amaranth.lib.wiring import Component, In, Out

from rtl.lib.delay import Delay
from rtl.lib.fp import named
from rtl.lib.fp_approx import FpRecip
from rtl.lib.fp_mul import FpMul
from rtl.lib.ports import VectorRow
from spec.config import LANES

_MAX_127_BITS = 0x42FE_0000
"""127.0"""

_ONE_127TH_BITS = 0x3C01_0204
"""The float32 next to 1/127."""

_MAX_7_BITS = 0x40E0_0000
"""7.0"""

_ONE_7TH_BITS = 0x3E12_4925
"""The float32 next to 1/7."""

_SMALLEST_EXPONENT = 27
"""Exponent field of 2**-100, from where on a vector is not zero."""


def magnitude_max(m: Module, name: str, values: Sequence[Value]) -> Value:
    """Largest of some 31-bit magnitudes, combinational: a tree of comparisons."""
    level = list(values)
    depth = 0
    while len(level) > 1:
        depth += 1
        pairs = zip(level[0::2], level[1::2], strict=False)
        following = [
            named(m, f"{name}_{depth}_{n}", Mux(b > a, b, a), unsigned(31)) for n, (a, b) in enumerate(pairs)
        ]
        level = following + level[len(level) & ~1 :]
    return level[0]


class AbsMax(Component):
    """Running largest magnitude of a vector that comes in beats of 8 float32.

    Function
        ``a = max |t_i|`` over the beats from one with `first` on, exact (bits compare: a NaN is largest).

    Ports
        en, In(1). valid, first, In(1): the beat counts; it is the first of a vector. t, In(8 x 32).
        a, Out(32): the maximum so far.

    Timing
        `latency` 2 enabled edges from a beat to `a`, one beat an edge. `a` holds until the next valid beat.

    Cost
        Eight 31-bit comparisons with multiplexers, 95 registers.

    Twins
        golden/quant.py `absmax`, tests/test_norm.py, tests/test_epilogue.py.
    """

    latency = 2
    en: Signal
    valid: Signal
    first: Signal
    t: data.View
    a: Signal

    def __init__(self) -> None:
        super().__init__({"en": In(1), "valid": In(1), "first": In(1), "t": In(VectorRow), "a": Out(32)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        lanes = [self.t[lane][0:31] for lane in range(LANES)]
        low, high, best = (Signal(31, name=name, reset_less=True) for name in ("low", "high", "best"))
        valid, first = Signal(), Signal()

        # 1. four lanes each; 2. both, and what came before
        low_max = magnitude_max(m, "low_max", lanes[: LANES // 2])
        high_max = magnitude_max(m, "high_max", lanes[LANES // 2 :])
        beat_max = magnitude_max(m, "beat_max", [low, high])
        so_far = named(m, "so_far", Mux(first, Const(0, 31), best))
        with m.If(self.en):
            m.d.sync += [low.eq(low_max), high.eq(high_max), valid.eq(self.valid), first.eq(self.first)]
            with m.If(valid):
                m.d.sync += best.eq(magnitude_max(m, "total_max", [so_far, beat_max]))
        m.d.comb += self.a.eq(best)
        return m


class QuantScale(Component):
    """The factors of an absmax quantisation: c to multiply by, s that undoes it.

    Function
        ``c = 127 * recip(a)``, ``s = a * (1/127)``; with `int4` 7 in place of 127. Both 0 when a is below 2**-100.

    Ports
        en, In(1): the pipeline advances. a, In(32): float32, not negative. int4, In(1): constant while anything is inside.
        c, s, Out(32).

    Timing
        `latency` 7: reciprocal 4, multiply 3. One result an enabled edge.

    Numbers
        docs/numerics.md section 1.

    Cost
        `FpRecip`, two `FpMul` with an operand of two values, or of one where `int4` is constant.

    Twins
        golden/quant.py `quant_params`, tests/test_norm.py.
    """

    latency = FpRecip.latency + FpMul.latency
    en: Signal
    a: Signal
    int4: Signal
    c: Signal
    s: Signal

    def __init__(self) -> None:
        super().__init__({"en": In(1), "a": In(32), "int4": In(1), "c": Out(32), "s": Out(32)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.recip = recip = FpRecip()
        m.submodules.c_mul = c_mul = FpMul()
        m.submodules.s_mul = s_mul = FpMul()
        m.submodules.a_delay = a_delay = Delay(32, FpRecip.latency)
        m.submodules.live_delay = live_delay = Delay(1, self.latency)
        live = named(m, "live", live_delay.o.replicate(32))
        m.d.comb += [unit.en.eq(self.en) for unit in (recip, c_mul, s_mul, a_delay, live_delay)]
        m.d.comb += [
            recip.x.eq(self.a),
            a_delay.i.eq(self.a),
            live_delay.i.eq(self.a[23:31] >= _SMALLEST_EXPONENT),
            c_mul.a.eq(recip.y),
            c_mul.b.eq(Mux(self.int4, _MAX_7_BITS, _MAX_127_BITS)),
            s_mul.a.eq(a_delay.o),
            s_mul.b.eq(Mux(self.int4, _ONE_7TH_BITS, _ONE_127TH_BITS)),
            self.c.eq(c_mul.y & live),
            self.s.eq(s_mul.y & live),
        ]
        return m


class GroupScale(Component):
    """The factors of a group of 32: d, a bfloat16 rounded up so that nothing clips, and its reciprocal c.

    Function
        ``d = up8(a * (1/127))``, ``c = recip(d)``; both 0 when a is below 2**-100. up8 adds 0xFFFF to the bits and
        clears the low 16.

    Ports
        en, In(1): the pipeline advances. a, In(32): float32, not negative. d, Out(16). c, Out(32).

    Timing
        d 3 enabled edges after a (`d_latency`), c 7 (`latency`). One group an edge.

    Numbers
        docs/numerics.md section 2b, step 1.

    Cost
        `FpMul` with a constant operand, `FpRecip`.

    Twins
        golden/quant.py `group_params`, tests/test_norm.py.
    """

    d_latency = FpMul.latency
    latency = FpMul.latency + FpRecip.latency
    en: Signal
    a: Signal
    d: Signal
    c: Signal

    def __init__(self) -> None:
        super().__init__({"en": In(1), "a": In(32), "d": Out(16), "c": Out(32)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.mul = mul = FpMul()
        m.submodules.recip = recip = FpRecip()
        m.submodules.live_delay = live_delay = Delay(1, FpMul.latency)
        m.submodules.zero_delay = zero_delay = Delay(1, FpRecip.latency)
        m.d.comb += [unit.en.eq(self.en) for unit in (mul, recip, live_delay, zero_delay)]
        up = named(m, "up", mul.y[16:32] + mul.y[0:16].any(), unsigned(16))  # a NaN is 0x7FC00000: it stays
        m.d.comb += [
            mul.a.eq(self.a),
            mul.b.eq(_ONE_127TH_BITS),
            live_delay.i.eq(self.a[23:31] >= _SMALLEST_EXPONENT),
            self.d.eq(up & live_delay.o.replicate(16)),
            recip.x.eq(Cat(Const(0, 16), up)),
            zero_delay.i.eq(~live_delay.o),
            self.c.eq(recip.y & ~zero_delay.o.replicate(32)),
        ]
        return m
