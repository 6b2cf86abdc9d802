"""Float32 exp, reciprocal and 1/sqrt by table and quadratic interpolation."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib.memory import Memory

from rtl.lib.fp import INF_BITS, NAN_BITS, FpUnit, exponent_of, fraction_of, is_nan, named
from spec.approx import (
    DROPPED_BITS,
    EXP_FRACTION_BITS,
    LOG2E,
    LOG2E_FRACTION_BITS,
    QuadraticTable,
    exp2_table,
    recip_table,
    rsqrt_table,
)


class _TableUnit(FpUnit):
    """A unit around one `QuadraticTable`: the table's read and its two products."""

    x: Signal

    def __init__(self, table: QuadraticTable) -> None:
        self._table = table
        super().__init__({"x": unsigned(32)}, unsigned(32))

    def _read(self, m: Module, index: Value) -> tuple[Signal, Signal, Signal]:
        """c0, c1, c2 of segment `index`, registered."""
        table = self._table
        m.submodules.table = memory = Memory(shape=table.word_bits, depth=table.depth, init=table.words)
        port = memory.read_port(domain="comb")
        m.d.comb += port.addr.eq(index)
        # directly behind the memory, so that a synthesiser can use a block RAM's own register
        word = self._register(m, "word", port.data)
        c1_at, c2_at = table.c0_bits, table.c0_bits + table.c1_bits
        return named(m, "c0", word[:c1_at]), named(m, "c1", word[c1_at:c2_at]), named(m, "c2", word[c2_at:])

    def _inner(self, m: Module, c1: Value, c2: Value, t: Value) -> Signal:
        """q = c1 + sign * (c2 t)."""
        term = (c2 * t) >> self._table.t_bits
        q = c1 + term if self._table.sign > 0 else c1 - term
        return named(m, "q", q, unsigned(self._table.c1_bits))

    def _outer(self, m: Module, q: Value, t: Value) -> Signal:
        """The magnitude of q t that is added to c0, or taken off."""
        return named(m, "outer", (q * t) >> self._table.t_bits, unsigned(self._table.c1_bits))

    def _value(self, m: Module, c0: Value, outer: Value) -> Signal:
        """v = c0 + sign * outer."""
        v = c0 + outer if self._table.sign > 0 else c0 - outer
        return named(m, "v", v, unsigned(self._table.c0_bits))

    def _finish(self, m: Module, c: tuple[Signal, Signal, Signal], t: Value, special: Value, head: Value) -> Signal:
        """Three stages behind the table: q, q t, then the sum packed with `head`. Gives `y`.

        `head` is the result above fraction bit 21: sign, exponent and, where `special`, the top fraction bit;
        the other fraction bits of a special result are 0.
        """
        c0, c1, c2 = c

        # inner product
        q_inner = self._register(m, "q_inner", self._inner(m, c1, c2, t))
        t_inner = self._register(m, "t_inner", t)
        c0_inner = self._register(m, "c0_inner", c0)
        head_inner = self._register(m, "head_inner", head)
        special_inner = self._register(m, "special_inner", special)

        # outer product
        outer_outer = self._register(m, "outer_outer", self._outer(m, q_inner, t_inner))
        c0_outer = self._register(m, "c0_outer", c0_inner)
        head_outer = self._register(m, "head_outer", head_inner)
        special_outer = self._register(m, "special_outer", special_inner)

        # sum, pack; what v carries beyond the fraction stands in the head already
        v = self._value(m, c0_outer, outer_outer)
        fraction = v[DROPPED_BITS : DROPPED_BITS + 23]
        low = named(m, "low", Mux(special_outer, Cat(Const(0, 22), head_outer[0]), fraction), unsigned(23))
        return self._register(m, "y_packed", Cat(low, head_outer[1:10]))


def _head(m: Module, field: Value, nan: Value, inf: Value, zero: Value, sign: Value) -> Signal:
    """The top ten bits of a result with exponent field `field`, or of NaN, infinity, zero in this order."""
    plain = Mux(nan, NAN_BITS >> 22, Mux(inf, Cat(Const(INF_BITS >> 22, 9), sign), Cat(Const(0, 9), sign)))
    return named(m, "head", Mux(nan | inf | zero, plain, Cat(Const(0, 1), field[0:8], sign)), unsigned(10))


class FpExp(_TableUnit):
    """Float32 e**x.

    Function
        ``y = 2**i * 2**f`` with ``i + f = x * log2(e)``, i an integer and 0 <= f < 1.

    Ports
        As `FpUnit`, input `x`, 32 bits.

    Timing
        `latency` 6: times log2(e); shift to fixed point; table; inner product; outer product; sum and pack.

    Numbers
        The algorithm of docs/numerics.md. Relative error at most 2**-23 where the result is a normal float32;
        monotone. exp(+-0) = 1 exactly, results below 2**-126 are +0, above the largest float +inf, NaN 0x7FC00000.

    Cost
        Multipliers of 24 x 32 (by a constant), 15 x 18 and 22 x 18 bits, a 33-bit shifter, a table of 64 x 64 bits.

    Twins
        golden/fp.py `fexp`, tests/test_fp.py.
    """

    latency = 6

    def __init__(self) -> None:
        super().__init__(exp2_table())

    def elaborate(self, platform: object) -> Module:
        m = Module()
        x, t_bits = self.x, self._table.t_bits

        # 1. significand * log2(e), without the bits that no exponent in range brings above the rounding place
        exponent = exponent_of(x)
        negative = named(m, "negative", x[31])
        # exponent field 133, the largest in range, needs the smallest shift
        least_shift = 150 + LOG2E_FRACTION_BITS - EXP_FRACTION_BITS - 133
        product = named(m, "product", (Cat(fraction_of(x), Const(1, 1)) * LOG2E)[least_shift - 1 :])
        back = named(m, "back", 133 - exponent, signed(9))
        far = named(m, "far", back[8])  # |x| >= 128
        nan = named(m, "nan", is_nan(x))

        product_1 = self._register(m, "product_1", product)
        back_1 = self._register(m, "back_1", named(m, "back_limited", back[0:6] | back[6:8].any().replicate(6)))
        negative_1 = self._register(m, "negative_1", negative)
        zero_1 = self._register(m, "zero_1", far & negative)
        inf_1 = self._register(m, "inf_1", far & ~negative)
        nan_1 = self._register(m, "nan_1", nan)

        # 2. y = x log2(e) in fixed point, its magnitude rounded to nearest, halves away from zero
        shifted = named(m, "shifted", product_1 >> back_1)
        magnitude = named(m, "magnitude", (shifted + 1) >> 1, unsigned(len(product)))
        fixed = named(m, "fixed", Mux(negative_1, -magnitude, magnitude), signed(EXP_FRACTION_BITS + 9))
        integer = named(m, "integer", fixed >> EXP_FRACTION_BITS, signed(9))

        t_2 = self._register(m, "t_2", fixed[:t_bits])
        index_2 = self._register(m, "index_2", fixed[t_bits:EXP_FRACTION_BITS])
        exponent_2 = self._register(m, "exponent_2", named(m, "field", integer + 127, unsigned(8)))
        zero_2 = self._register(m, "zero_2", zero_1 | (integer < -126))
        inf_2 = self._register(m, "inf_2", inf_1 | (~zero_1 & (integer > 127)))
        nan_2 = self._register(m, "nan_2", nan_1)

        # 3. table
        c0, c1, c2 = self._read(m, index_2)
        t_3 = self._register(m, "t_3", t_2)
        special_3 = self._register(m, "special_3", nan_2 | inf_2 | zero_2)
        head_3 = self._register(m, "head_3", _head(m, exponent_2, nan_2, inf_2, zero_2, Const(0, 1)))

        # 4. to 6.; 2**f stays below 2 when rounded, so nothing carries into the exponent
        m.d.comb += self.y.eq(self._finish(m, (c0, c1, c2), t_3, special_3, head_3))
        return m


class FpRecip(_TableUnit):
    """Float32 1/x.

    Function
        ``y = 1 / x``.

    Ports
        As `FpUnit`, input `x`, 32 bits.

    Timing
        `latency` 4: table; inner product; outer product; sum and pack.

    Numbers
        The algorithm of docs/numerics.md. Relative error at most 2**-23; exact for powers of two; monotone in
        each sign. Zero and subnormal x give infinity, results below 2**-126 zero, all with the sign of x; NaN
        gives 0x7FC00000.

    Cost
        Multipliers of 14 x 16 and 21 x 16 bits, a table of 128 x 63 bits.

    Twins
        golden/fp.py `frecip`, tests/test_fp.py.
    """

    latency = 4

    def __init__(self) -> None:
        super().__init__(recip_table())

    def elaborate(self, platform: object) -> Module:
        m = Module()
        x, t_bits = self.x, self._table.t_bits
        exponent = exponent_of(x)

        # 1. table; the result's exponent field, and what it is where v carries
        c0, c1, c2 = self._read(m, x[t_bits:23])
        t_1 = self._register(m, "t_1", x[:t_bits])
        power = named(m, "power", fraction_of(x) == 0)
        field = named(m, "field", 253 - exponent + power, signed(9))
        nan, inf, zero = is_nan(x), exponent == 0, field <= 0
        special_1 = self._register(m, "special_1", named(m, "special", nan | inf | zero))
        head_1 = self._register(m, "head_1", _head(m, field, nan, inf, zero, x[31]))

        # 2. to 4.
        m.d.comb += self.y.eq(self._finish(m, (c0, c1, c2), t_1, special_1, head_1))
        return m


class FpRsqrt(_TableUnit):
    """Float32 1/sqrt(x).

    Function
        ``y = 1 / sqrt(x)``.

    Ports
        As `FpUnit`, input `x`, 32 bits.

    Timing
        `latency` 4: table; inner product; outer product; sum and pack.

    Numbers
        The algorithm of docs/numerics.md. Relative error at most 2**-23; exact for powers of four; monotone.
        Zero and subnormal x of either sign give +inf, other negative x and NaN 0x7FC00000, +inf gives +0.

    Cost
        Multipliers of 13 x 16 and 20 x 16 bits, a table of 256 x 61 bits.

    Twins
        golden/fp.py `frsqrt`, tests/test_fp.py.
    """

    latency = 4

    def __init__(self) -> None:
        super().__init__(rsqrt_table())

    def elaborate(self, platform: object) -> Module:
        m = Module()
        x, t_bits = self.x, self._table.t_bits
        exponent = exponent_of(x)

        # 1. table, the second half for an odd true exponent (exponent - 127)
        c0, c1, c2 = self._read(m, Cat(x[t_bits:23], ~exponent[0]))
        t_1 = self._register(m, "t_1", x[:t_bits])
        power = named(m, "power", (fraction_of(x) == 0) & exponent[0])
        field = named(m, "field", 190 - ((exponent + 1) >> 1) + power, signed(9))
        subnormal = named(m, "subnormal", exponent == 0)
        nan = named(m, "nan", (is_nan(x) | x[31]) & ~subnormal)
        inf = exponent == 255
        special_1 = self._register(m, "special_1", named(m, "special", nan | subnormal | inf))
        head_1 = self._register(m, "head_1", _head(m, field, nan, subnormal, inf, Const(0, 1)))

        # 2. to 4.
        m.d.comb += self.y.eq(self._finish(m, (c0, c1, c2), t_1, special_1, head_1))
        return m
