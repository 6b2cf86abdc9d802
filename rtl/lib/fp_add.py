"""Float32 addition and subtraction."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, unsigned

from rtl.lib.fp import INF_BITS, NAN_BITS, FpUnit, exponent_of, leading_zeros, named, ones_below

_SUM_BITS = 28
"""One bit for the carry, 24 for the significand, guard, round and sticky."""


class FpAdd(FpUnit):
    """Float32 a + b, or a - b.

    Function
        ``y = a + b``; with `sub` (static) ``y = a - b``.

    Ports
        As `FpUnit`, inputs `a` and `b`, 32 bits each.

    Timing
        `latency` 4: order by magnitude; align and add; normalise; round and pack.

    Numbers
        IEEE binary32, round to nearest even, subnormals in and out, infinities; any NaN comes out as 0x7FC00000.
        x - x is +0.

    Cost
        A 31-bit comparison, a 27-bit right and a 28-bit left shifter, a 28-bit adder, a 32-bit rounding adder.

    Twins
        golden/fp.py `fadd` and `fsub`, tests/test_fp.py.
    """

    latency = 4
    a: Signal
    b: Signal

    def __init__(self, *, sub: bool = False) -> None:
        self._sub = sub
        super().__init__({"a": unsigned(32), "b": unsigned(32)}, unsigned(32))

    def elaborate(self, platform: object) -> Module:
        m = Module()

        # 1. order: `big` has the larger magnitude, so a NaN or infinity among the two is `big`
        b = named(m, "b_signed", Cat(self.b[0:31], self.b[31] ^ int(self._sub)))
        swap = named(m, "swap", self.a[0:31] < b[0:31])
        big = named(m, "big", Mux(swap, b, self.a))
        small = named(m, "small", Mux(swap, self.a, b))
        big_normal = named(m, "big_normal", exponent_of(big) != 0)
        small_normal = named(m, "small_normal", exponent_of(small) != 0)
        # a subnormal's fraction has the weight of exponent 1
        big_exponent = named(m, "big_exponent", exponent_of(big) | ~big_normal)
        small_exponent = named(m, "small_exponent", exponent_of(small) | ~small_normal)
        distance = named(m, "distance", big_exponent - small_exponent, unsigned(8))
        subtract = named(m, "subtract", big[31] ^ small[31])
        inf = named(m, "inf", exponent_of(big) == 255)
        nan = named(m, "nan", (big[0:31] > INF_BITS) | (subtract & (exponent_of(small) == 255)))

        big_1 = self._register(m, "big_1", Cat(big[0:23], big_normal))
        small_1 = self._register(m, "small_1", Cat(small[0:23], small_normal))
        shift_1 = self._register(m, "shift_1", distance[0:5] | distance[5:8].any().replicate(5))
        subtract_1 = self._register(m, "subtract_1", subtract)
        exponent_1 = self._register(m, "exponent_1", big_exponent)
        sign_1 = self._register(m, "sign_1", big[31])
        inf_1 = self._register(m, "inf_1", inf)
        nan_1 = self._register(m, "nan_1", nan)

        # 2. align and add: the small significand with three bits more below, the last of them sticky
        low = named(m, "low", Cat(Const(0, 3), small_1))
        sticky = named(m, "sticky", (low & ones_below(shift_1, 27)).any())
        aligned = named(m, "aligned", (low >> shift_1) | sticky)
        # two's complement by the inverted operand and a carry in
        addend = named(m, "addend", Cat(aligned, Const(0, 1)) ^ subtract_1.replicate(_SUM_BITS))
        total = named(m, "total", Cat(Const(0, 3), big_1) + addend + subtract_1, unsigned(_SUM_BITS))

        total_2 = self._register(m, "total_2", total)
        exponent_2 = self._register(m, "exponent_2", exponent_1)
        sign_2 = self._register(m, "sign_2", sign_1)
        subtract_2 = self._register(m, "subtract_2", subtract_1)
        inf_2 = self._register(m, "inf_2", inf_1)
        nan_2 = self._register(m, "nan_2", nan_1)

        # 3. normalise, but by no more than the exponent allows: a mark at the last allowed place stops the search
        mark = named(m, "mark", Const(1 << (_SUM_BITS - 1), _SUM_BITS) >> exponent_2)
        zeros = leading_zeros(m, "zeros", total_2 | mark)
        exponent = named(m, "exponent", exponent_2 - zeros, unsigned(8))
        normal = named(m, "normal", total_2 << zeros, unsigned(_SUM_BITS))
        zero = named(m, "zero", total_2 == 0)

        normal_3 = self._register(m, "normal_3", normal)
        exponent_3 = self._register(m, "exponent_3", exponent)
        sign_3 = self._register(m, "sign_3", sign_2 & ~(zero & subtract_2))
        zero_3 = self._register(m, "zero_3", zero)
        inf_3 = self._register(m, "inf_3", inf_2)
        nan_3 = self._register(m, "nan_3", nan_2)

        # 4. round to nearest even; the leading one of the significand adds 1 to the exponent field
        up = named(m, "up", normal_3[3] & (normal_3[0:3].any() | normal_3[4]))
        packed = named(m, "packed", Cat(Const(0, 23), exponent_3) + normal_3[4:] + up, unsigned(32))
        overflow = named(m, "overflow", inf_3 | (packed[23:32] >= 255))
        magnitude = named(m, "magnitude", Mux(overflow, INF_BITS, Mux(zero_3, 0, packed[0:31])), unsigned(31))
        y = named(m, "y_3", Mux(nan_3, NAN_BITS, Cat(magnitude, sign_3)), unsigned(32))
        m.d.comb += self.y.eq(self._register(m, "y_4", y))
        return m
