"""Float32 times a power of two."""

from amaranth.hdl import Cat, Module, Mux, Signal, signed, unsigned

from rtl.lib.fp import INF_BITS, NAN_BITS, FpUnit, exponent_of, is_nan, named


class FpShift(FpUnit):
    """Float32 times a power of two, by the exponent alone.

    Function
        ``y = a * 2**b``.

    Ports
        As `FpUnit`, inputs `a`, 32 bits, and `b`, signed(8).

    Timing
        `latency` 1.

    Numbers
        Exact in the normal range; a subnormal a, and a result below the normal range, become zeros of the sign of a, a
        result above it infinity; any NaN comes out as 0x7FC00000.

    Cost
        A 10-bit adder and a 32-bit multiplexer: no multiplier.

    Twins
        golden/fp.py `fshift`, tests/test_fp.py.
    """

    latency = 1
    a: Signal
    b: Signal

    def __init__(self) -> None:
        super().__init__({"a": unsigned(32), "b": signed(8)}, unsigned(32))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        a = self.a
        exponent = exponent_of(a)
        moved = named(m, "moved", exponent + self.b, signed(10))
        zero = named(m, "zero", (exponent == 0) | (moved < 1))
        special = named(m, "special", exponent == 255)
        inf = named(m, "inf", special | (moved > 254))
        magnitude = named(m, "magnitude", Mux(zero & ~special, 0, Mux(inf, INF_BITS, Cat(a[0:23], moved[0:8]))), unsigned(31))
        y = named(m, "y_0", Mux(is_nan(a), NAN_BITS, Cat(magnitude, a[31])), unsigned(32))
        m.d.comb += self.y.eq(self._register(m, "y_1", y))
        return m
