"""Float32 multiplication."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed, unsigned

from rtl.lib.fp import INF_BITS, NAN_BITS, FpUnit, exponent_of, is_nan, leading_zeros, named, ones_below


class FpMul(FpUnit):
    """Float32 a * b.

    Function
        ``y = a * b``.

    Ports
        As `FpUnit`, inputs `a` and `b`, 32 bits each.

    Timing
        `latency` 3: multiply; shift for subnormals; round and pack.

    Numbers
        IEEE binary32, round to nearest even, subnormals in and out, infinities; any NaN comes out as 0x7FC00000.

    Cost
        A 24 x 24 multiplier (4 DSP blocks of 18 x 18), a 48-bit left and a 48-bit right shifter.

    Twins
        golden/fp.py `fmul`, tests/test_fp.py.
    """

    latency = 3
    a: Signal
    b: Signal

    def __init__(self) -> None:
        super().__init__({"a": unsigned(32), "b": unsigned(32)}, unsigned(32))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        a, b = self.a, self.b

        # 1. multiply the significands; the product's bit 47 has the weight of exponent field `exponent` + 1
        a_normal = named(m, "a_normal", exponent_of(a) != 0)
        b_normal = named(m, "b_normal", exponent_of(b) != 0)
        a_significand = named(m, "a_significand", Cat(a[0:23], a_normal))
        b_significand = named(m, "b_significand", Cat(b[0:23], b_normal))
        product = named(m, "product", a_significand * b_significand)
        exponent = named(m, "exponent", (exponent_of(a) | ~a_normal) + (exponent_of(b) | ~b_normal) - 127, signed(10))
        # of two subnormals the product is below every float's half unit, so only one operand's zeros can count
        zeros = leading_zeros(m, "zeros", named(m, "shorter", Mux(a_normal, b_significand, a_significand)))
        zero = named(m, "zero", (a[0:31] == 0) | (b[0:31] == 0))
        inf = named(m, "inf", (exponent_of(a) == 255) | (exponent_of(b) == 255))
        nan = named(m, "nan", is_nan(a) | is_nan(b) | (inf & zero))

        product_1 = self._register(m, "product_1", product)
        exponent_1 = self._register(m, "exponent_1", exponent)
        zeros_1 = self._register(m, "zeros_1", zeros)
        zero_1 = self._register(m, "zero_1", zero)
        sign_1 = self._register(m, "sign_1", a[31] ^ b[31])
        inf_1 = self._register(m, "inf_1", inf)
        nan_1 = self._register(m, "nan_1", nan)

        # 2. shift left by the subnormal operand's zeros, as far as the exponent allows; right where it is negative
        below = named(m, "below", exponent_1[9])
        limited = named(m, "limited", exponent_1[0:9] < zeros_1)
        left = named(m, "left", Mux(limited, exponent_1[0:5], zeros_1), unsigned(5))
        minus = named(m, "minus", -exponent_1, unsigned(7))
        right = named(m, "right", minus[0:5] | minus[5:7].any().replicate(5))
        # two halves, so that no shift is wider than 64 bits
        low = named(m, "low", product_1[0:24] << left)
        high = named(m, "high", (product_1[24:48] << left)[0:24] | low[24:48])
        lost = named(m, "lost", (product_1[0:25] & ones_below(right, 25)).any())
        shifted = named(m, "shifted", Mux(below, product_1 >> right, Cat(low[0:24], high)), unsigned(48))
        sticky = named(m, "sticky", shifted[0:22].any() | (below & lost))

        value_2 = self._register(m, "value_2", Cat(sticky, shifted[22:48]))
        exponent_2 = self._register(
            m, "exponent_2", named(m, "field", Mux(below | zero_1, 0, exponent_1[0:9] - left), unsigned(9))
        )
        sign_2 = self._register(m, "sign_2", sign_1)
        inf_2 = self._register(m, "inf_2", inf_1)
        nan_2 = self._register(m, "nan_2", nan_1)

        # 3. the last place of normalisation, round to nearest even, pack; the leading one adds 1 to the exponent
        again = named(m, "again", ~value_2[26] & (exponent_2 != 0))
        normal = named(m, "normal", Mux(again, Cat(Const(0, 1), value_2[0:26]), value_2))
        up = named(m, "up", normal[2] & (normal[0:2].any() | normal[3]))
        packed = named(m, "packed", Cat(Const(0, 23), (exponent_2 - again)[0:9]) + normal[3:27] + up, unsigned(32))
        overflow = named(m, "overflow", inf_2 | (packed[23:32] >= 255))
        magnitude = named(m, "magnitude", Mux(overflow, INF_BITS, packed[0:31]), unsigned(31))
        y = named(m, "y_2", Mux(nan_2, NAN_BITS, Cat(magnitude, sign_2)), unsigned(32))
        m.d.comb += self.y.eq(self._register(m, "y_3", y))
        return m
