"""Conversions between float32 and integers, and from binary16."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed, unsigned

from rtl.lib.fp import NAN_BITS, FpUnit, exponent_of, is_nan, leading_zeros, named


class IntToFp(FpUnit):
    """Float32 of a signed integer.

    Function
        ``y = float32(x)``.

    Ports
        As `FpUnit`, input `x`, signed(width).

    Timing
        `latency` 2: magnitude and its leading zeros; shift, round and pack.

    Numbers
        Round to nearest even; exact for widths up to 25. 0 gives +0.

    Cost
        A negation, a left shifter and (above 24 bits) a rounding adder, all of `width` bits.

    Twins
        golden/fp.py `i2f`, tests/test_fp.py.
    """

    latency = 2
    x: Signal

    def __init__(self, width: int) -> None:
        if not 2 <= width <= 64:
            raise ValueError(f"width must be in 2..64, not {width}")
        self._width = width
        super().__init__({"x": signed(width)}, unsigned(32))

    @property
    def width(self) -> int:
        """Bits of the integer."""
        return self._width

    def elaborate(self, platform: object) -> Module:
        m = Module()
        width = self._width

        # 1. magnitude (at most 2**(width - 1)) and its leading zeros
        sign = named(m, "sign", self.x[width - 1])
        magnitude = named(m, "magnitude", Mux(sign, -self.x, self.x), unsigned(width))
        zeros = leading_zeros(m, "zeros", magnitude)
        magnitude_1 = self._register(m, "magnitude_1", magnitude)
        zeros_1 = self._register(m, "zeros_1", zeros)
        sign_1 = self._register(m, "sign_1", sign)

        # 2. shift the leading one to the top, round, pack; the leading one adds 1 to the exponent field
        normal = named(m, "normal", magnitude_1 << zeros_1, unsigned(width))
        exponent = named(m, "exponent", 125 + width - zeros_1, unsigned(8))
        top = normal[max(width - 24, 0) :]
        significand = Cat(Const(0, 24 - len(top)), top) if len(top) < 24 else top
        packed = named(m, "packed", Cat(Const(0, 23), exponent) + significand + _round_up(normal), unsigned(31))
        y = named(m, "y_1", Mux(normal[width - 1], Cat(packed, sign_1), 0), unsigned(32))
        m.d.comb += self.y.eq(self._register(m, "y_2", y))
        return m


def _round_up(normal: Value) -> Value:
    """1 where the top 24 bits of a normalised integer go up, to nearest even."""
    dropped = len(normal) - 24
    if dropped <= 0:
        return Const(0, 1)
    sticky = normal[0 : dropped - 1].any() if dropped > 1 else Const(0, 1)
    return normal[dropped - 1] & (sticky | normal[dropped])


class FpToInt8(FpUnit):
    """int8 of a float32, symmetric.

    Function
        ``y = clamp(round(x), -127, 127)``.

    Ports
        As `FpUnit`, input `x`, 32 bits; `y` is signed(8).

    Timing
        `latency` 2: shift to fixed point; round, saturate and negate.

    Numbers
        Round to nearest, halves to even; infinities saturate; NaN gives 0.

    Cost
        A shifter of seven places, an 8-bit rounding adder and an 8-bit negation.

    Twins
        golden/fp.py `f2i8`, tests/test_fp.py.
    """

    latency = 2
    x: Signal

    def __init__(self) -> None:
        super().__init__({"x": unsigned(32)}, signed(8))

    def elaborate(self, platform: object) -> Module:
        m = Module()

        # 1. exponent fields 126..133 are |x| in [0.5, 128); the point stands above bit 24 of the shifted value
        exponent = exponent_of(self.x)
        place = named(m, "place", exponent - 126, unsigned(3))
        fixed = named(m, "fixed", Cat(self.x[0:23], Const(1, 1)) << place, unsigned(31))
        in_range = named(m, "in_range", (exponent >= 126) & (exponent < 134))
        nan = named(m, "nan", is_nan(self.x))
        # 7 integer bits, guard, sticky
        fixed_1 = self._register(m, "fixed_1", Cat(fixed[0:23].any(), fixed[23:31]) & in_range.replicate(9))
        large_1 = self._register(m, "large_1", named(m, "large", (exponent >= 134) & ~nan))
        sign_1 = self._register(m, "sign_1", self.x[31])

        # 2. round, saturate, negate
        up = named(m, "up", fixed_1[1] & (fixed_1[0] | fixed_1[2]))
        rounded = named(m, "rounded", fixed_1[2:9] + up, unsigned(8))
        magnitude = named(m, "magnitude", Mux(large_1 | rounded[7], 127, rounded[0:7]), unsigned(7))
        y = named(m, "y_1", Mux(sign_1, -magnitude, magnitude), signed(8))
        m.d.comb += self.y.eq(self._register(m, "y_2", y))
        return m


def half_to_fp(m: Module, name: str, half: Value) -> Signal:
    """float32 of the binary16 `half`, exact; any NaN gives 0x7FC00000. Combinational."""
    fraction, exponent, sign = half[0:10], half[10:15], half[15]
    # a subnormal: the leading one goes to bit 10 and is dropped there
    zeros = leading_zeros(m, f"{name}_zeros", named(m, f"{name}_low", Cat(Const(0, 6), fraction)))
    shifted = named(m, f"{name}_shifted", fraction << zeros, unsigned(10))
    normal = named(m, f"{name}_normal", Cat(Const(0, 13), fraction, exponent + 112)[0:31], unsigned(31))
    # fraction 2**9 has the value 2**-15
    small = named(
        m, f"{name}_small", Cat(Const(0, 14), shifted[0:9], (112 - zeros)[0:8]) & fraction.any().replicate(31)
    )
    special = named(m, f"{name}_special", Mux(fraction.any(), NAN_BITS, Cat(Const(0, 23), Const(255, 8), sign)))
    finite = named(m, f"{name}_finite", Cat(Mux(exponent == 0, small, normal), sign))
    return named(m, name, Mux(exponent == 31, special, finite), unsigned(32))


class HalfToFp(FpUnit):
    """Float32 of a binary16.

    Function
        ``y = float32(x)``.

    Ports
        As `FpUnit`, input `x`, 16 bits.

    Timing
        `latency` 1. `half_to_fp` is the same without a register.

    Numbers
        Exact, subnormals and infinities included; any NaN comes out as 0x7FC00000.

    Cost
        A 10-bit left shifter.

    Twins
        golden/fp.py `h2f`, tests/test_fp.py.
    """

    latency = 1
    x: Signal

    def __init__(self) -> None:
        super().__init__({"x": unsigned(16)}, unsigned(32))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.d.comb += self.y.eq(self._register(m, "y_1", half_to_fp(m, "y_0", self.x)))
        return m
