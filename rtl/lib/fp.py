"""What the float32 units share: field access, plain combinational functions, the pipelined unit's base, `FpMax`.

A binary32 value is 32 bits: fraction [0:23], exponent [23:31], sign [31]. Units live in fp_add.py, fp_mul.py,
fp_convert.py and fp_approx.py; all have the ports of `FpUnit`.
"""

from amaranth.hdl import Cat, Const, Module, Mux, Shape, ShapeLike, Signal, Value, unsigned
from amaranth.lib.wiring import Component, In, Out

NAN_BITS = 0x7FC0_0000
"""The only NaN that a unit gives."""

INF_BITS = 0x7F80_0000


class FpUnit(Component):
    """Base of the arithmetic units: ports, latency and pipeline registers.

    Function
        `y` is the unit's function of its inputs, `latency` enabled edges later.

    Ports
        en, In(1): the pipeline advances on this clock edge; with `en` = 0 everything holds.
        The inputs (`a`, `b` or `x`), In. y, Out.
        There is no valid: users carry it, and other side data, in a `Delay` of `latency` with the same `en`.

    Timing
        `latency` counts clock edges with `en` = 1; an edge that takes inputs is the first. One result an edge.
        Registers have no reset: what comes out before the first input has gone through is arbitrary.
    """

    latency: int
    en: Signal
    y: Signal

    def __init__(self, inputs: dict[str, ShapeLike], output: ShapeLike) -> None:
        super().__init__({"en": In(1), **{name: In(shape) for name, shape in inputs.items()}, "y": Out(output)})

    def elaborate(self, platform: object) -> Module:
        """The unit itself, by each subclass."""
        raise NotImplementedError

    def _register(self, m: Module, name: str, value: Value) -> Signal:
        """A pipeline register: `value` as it was one enabled edge ago."""
        register = Signal(value.shape(), name=name, reset_less=True)
        with m.If(self.en):
            m.d.sync += register.eq(value)
        return register


def named(m: Module, name: str, value: Value, shape: Shape | None = None) -> Signal:
    """`value` as a named wire, cut or extended to `shape` where one is given."""
    wire = Signal(value.shape() if shape is None else shape, name=name)
    m.d.comb += wire.eq(value)
    return wire


def fraction_of(x: Value) -> Value:
    """The 23 stored fraction bits."""
    return x[0:23]


def exponent_of(x: Value) -> Value:
    """The 8 stored exponent bits."""
    return x[23:31]


def is_nan(x: Value) -> Value:
    """1 for any NaN."""
    return x[0:31] > INF_BITS


def fp_neg(x: Value) -> Value:
    """-x: the sign bit flipped, of a NaN too."""
    return Cat(x[0:31], ~x[31])


def fp_abs(x: Value) -> Value:
    """|x|: the sign bit cleared, of a NaN too."""
    return Cat(x[0:31], Const(0, 1))


def fp_max(m: Module, a: Value, b: Value) -> Signal:
    """The larger of `a` and `b` in the order of sign and magnitude bits: -0 < +0; not for NaN. Combinational."""
    less = named(m, "magnitude_less", a[0:31] < b[0:31])
    larger = Signal(unsigned(32), name="fp_max")
    m.d.comb += larger.eq(Mux(Mux(a[31] ^ b[31], a[31], less ^ a[31]), b, a))
    return larger


def leading_zeros(m: Module, name: str, x: Value) -> Signal:
    """Zeros above the highest one of `x`, in 5 bits (6 for more than 32 bits); for x = 0 anything. Combinational.

    Halving search: is the upper half zero? then go on with the lower one. Five steps for 32 bits, six for 64.
    """
    width = len(x)
    span_log2 = (width - 1).bit_length()
    if span_log2 > 6:
        raise ValueError(f"leading_zeros takes at most 64 bits, not {width}")
    padding = (1 << span_log2) - width
    rest = Cat(Const((1 << padding) - 1, padding), x)
    digits = []
    for step in reversed(range(span_log2)):
        upper_zero = named(m, f"{name}_zero_{1 << step}", rest[1 << step :] == 0)
        rest = named(m, f"{name}_rest_{1 << step}", Mux(upper_zero, rest[: 1 << step], rest[1 << step :]))
        digits.append(upper_zero)
    return named(m, name, Cat(*reversed(digits)), unsigned(max(5, span_log2)))


def ones_below(position: Value, width: int) -> Value:
    """`width` bits, ones where the bit number is less than `position`: what a right shift by it drops."""
    ones = (1 << width) - 1
    return ~(Value.cast(ones) << position)[0:width]


class FpMax(FpUnit):
    """The larger of two float32 values, combinational.

    Function
        ``y = max(a, b)`` in the order of sign and magnitude bits; -0 < +0. NaN operands are not meant: one of
        the two operands comes out.

    Ports
        As `FpUnit`, inputs `a` and `b`, 32 bits each; `en` is not used.

    Timing
        `latency` 0.

    Numbers
        Exact: one of the operands, bit for bit.

    Cost
        One 32-bit comparison and a 32-bit multiplexer.

    Twins
        golden/fp.py `fmax`, tests/test_fp.py.
    """

    latency = 0
    a: Signal
    b: Signal

    def __init__(self) -> None:
        super().__init__({"a": unsigned(32), "b": unsigned(32)}, unsigned(32))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.d.comb += self.y.eq(fp_max(m, self.a, self.b))
        return m
