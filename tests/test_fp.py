"""Float32 arithmetic: golden against SoftFloat and float64, RTL against golden, bit for bit."""

import random
from collections.abc import Callable, Iterable, Iterator
from functools import cache

import numpy as np
import pytest
import torch
from amaranth.sim import Simulator
from numpy.typing import NDArray

from cosim.fp_harness import FpHarness, SoftFloat
from golden import fp
from rtl.lib.delay import Delay
from rtl.lib.fp import FpMax
from rtl.lib.fp_add import FpAdd
from rtl.lib.fp_approx import FpExp, FpRecip, FpRsqrt
from rtl.lib.fp_convert import FpToInt8, HalfToFp, IntToFp
from rtl.lib.fp_mul import FpMul
from rtl.lib.fp_shift import FpShift
from spec import approx

Bits = NDArray[np.uint32]

RANDOM_COUNT = 1_000_000
PART_COUNT = 1 << 17
"""Elements worked on at a time where there are many: int64 temporaries of this size stay in the cache."""

NAN = 0x7FC0_0000
MIN_NORMAL = 2.0**-126

INT_WIDTHS = (2, 8, 13, 24, 25, 26, 32)
WIDE_WIDTHS = (33, 47, 58, 64)
"""Integers of more than 32 bits: the low 32 come from `a`, the others from `b`."""

SPECIAL_MAGNITUDES = (
    0x0000_0000, 0x0000_0001, 0x0000_0002, 0x0000_0003, 0x0040_0000, 0x007F_FFFE, 0x007F_FFFF,  # zero, subnormals
    0x0080_0000, 0x0080_0001, 0x00FF_FFFF, 0x0100_0000, 0x0100_0001, 0x017F_FFFF,  # the smallest normals
    0x0B80_0000, 0x0C00_0000, 0x2000_0000, 0x2080_0001, 0x3380_0000, 0x3300_0000, 0x33FF_FFFF,
    0x3EFF_FFFF, 0x3F00_0000, 0x3F00_0001, 0x3F7F_FFFF, 0x3F80_0000, 0x3F80_0001, 0x3FC0_0000, 0x3FFF_FFFF,
    0x4000_0000, 0x4020_0000, 0x4080_0000, 0x4120_0000, 0x42AE_AC4F, 0x42AE_AC50, 0x42B1_7217, 0x42B1_7218,
    0x42FC_FFFF, 0x42FD_0000, 0x42FE_0000, 0x42FE_FFFF, 0x42FF_0000, 0x42FF_0001, 0x4300_0000, 0x4B00_0000,
    0x4B7F_FFFF, 0x4B80_0000, 0x4EFF_FFFF, 0x4F00_0000, 0x5F80_0000, 0x7E80_0000, 0x7EFF_FFFF, 0x7F00_0000,
    0x7F00_0001, 0x7F7F_FFFE, 0x7F7F_FFFF, 0x7F80_0000, 0x7F80_0001, 0x7FBF_FFFF, 0x7FC0_0000, 0x7FFF_FFFF,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Parts of PART_COUNT are too small to share out: torch's threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def special_pairs() -> tuple[Bits, Bits]:
    """Every special value with every other, both signs."""
    values = np.array([sign << 31 | x for sign in (0, 1) for x in SPECIAL_MAGNITUDES], dtype=np.uint32)
    a, b = np.meshgrid(values, values)
    return a.ravel(), b.ravel()


def random_pairs(rng: random.Random, count: int = RANDOM_COUNT) -> tuple[Bits, Bits]:
    """Specials, then five kinds of equal number: any bits; close exponents; nearly opposite numbers; near the
    limits of the exponent (sums and products that become subnormal, or overflow); subnormal products near ties."""
    source = np.random.default_rng(rng.randrange(1 << 32))
    part = -(-count // 5)

    def bits(high: int = 1 << 32) -> Bits:
        return source.integers(0, high, part, dtype=np.uint32)

    def exponent(low: int, high: int) -> Bits:
        return source.integers(low, high, part).astype(np.uint32) << np.uint32(23)

    def fields(exponents: Bits) -> Bits:
        # fractions with few ones make ties
        sparse = source.integers(0, 2, part).astype(bool)
        fraction = np.where(sparse, bits(1 << 23) & bits(1 << 23) & bits(1 << 23) & bits(1 << 23), bits(1 << 23))
        return (bits() & np.uint32(1 << 31)) | exponents | fraction

    middle = exponent(30, 220)
    close = fields(middle), fields((middle + exponent(0, 60) - np.uint32(30 << 23)).astype(np.uint32))
    base = bits()
    opposite = base, (base ^ np.uint32(1 << 31)) + bits(1 << 9) - np.uint32(1 << 8)
    low = exponent(0, 160)
    balance = np.clip(127 - (low >> np.uint32(23)).astype(np.int64) + source.integers(-30, 30, part), 0, 255)
    limit = fields(low), fields(balance.astype(np.uint32) << np.uint32(23))
    kinds = [special_pairs(), (bits(), bits()), close, opposite, limit, near_ties(source, part)]
    a, b = (np.concatenate(column) for column in zip(*kinds, strict=True))
    return a.astype(np.uint32), b.astype(np.uint32)


def near_ties(source: np.random.Generator, count: int) -> tuple[Bits, Bits]:
    """Pairs whose product is shifted right by `shift` into the subnormals, with nothing in its low 24 bits but the
    bits shifted out: a tie but for those, if bit 23 + shift happens to be the only one between."""
    shift = source.integers(0, 5, count)
    b = source.integers(1 << 22, 1 << 23, count) * 2 + 1  # odd, 24 bits
    inverse = b.copy()
    for _ in range(4):  # Newton: 3, 6, 12, 24 bits of 1 / b modulo 2**24
        inverse = inverse * (2 - b * inverse % (1 << 24)) % (1 << 24)
    a = source.integers(0, 1 << shift) * inverse % (1 << 24) | 1 << 23
    b_exponent = source.integers(1, 120, count)
    a_bits, b_bits = (127 - shift - b_exponent) << 23 | a & 0x7F_FFFF, b_exponent << 23 | b & 0x7F_FFFF
    return a_bits.astype(np.uint32), b_bits.astype(np.uint32)


def floats(bits: Bits) -> torch.Tensor:
    return fp.from_bits(torch.from_numpy(bits.astype(np.int64)))


def bits_of(x: torch.Tensor) -> Bits:
    return fp.bits_of(x).numpy().astype(np.uint32)


def canonical(bits: Bits) -> Bits:
    return np.where(bits & 0x7FFF_FFFF > 0x7F80_0000, np.uint32(NAN), bits)


def signed_ints(bits: Bits, width: int) -> torch.Tensor:
    """The low `width` bits as signed integers."""
    shift = np.uint32(32 - width)
    return torch.from_numpy((bits << shift).view(np.int32) >> np.int32(shift))


def wide_ints(a: Bits, b: Bits, width: int) -> NDArray[np.int64]:
    """The low `width` bits of b * 2**32 + a as signed integers."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    shift = np.uint64(64 - width)
    return (both << shift).view(np.int64) >> np.int64(64 - width)


def assert_equal_bits(name: str, got: Bits, wanted: Bits, *inputs: Bits) -> None:
    wrong = np.flatnonzero(got != wanted)
    lines = [
        f"{name}({', '.join(f'{x[i]:08x}' for x in inputs)}) = {got[i]:08x}, not {wanted[i]:08x}" for i in wrong[:5]
    ]
    assert not len(wrong), f"{len(wrong)} of {len(got)} differ: " + "; ".join(lines)


Golden = Callable[[Bits, Bits], Bits]


def two_inputs(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Golden:
    return lambda a, b: bits_of(function(floats(a), floats(b)))


def one_input(function: Callable[[Bits], torch.Tensor]) -> Golden:
    def golden(a: Bits, _: Bits) -> Bits:
        parts = np.array_split(a, -(-len(a) // PART_COUNT))
        return np.concatenate([bits_of(function(part)) for part in parts])

    return golden


GOLDEN: dict[str, Golden] = {
    "add": two_inputs(fp.fadd),
    "sub": two_inputs(fp.fsub),
    "mul": two_inputs(fp.fmul),
    "max": two_inputs(fp.fmax),
    "shift": lambda a, b: bits_of(fp.fshift(floats(a), signed_ints(b, 8))),
    "f2i8": lambda a, _: fp.f2i8(floats(a)).numpy().view(np.uint8).astype(np.uint32),
    "h2f": one_input(lambda a: fp.h2f(torch.from_numpy(a.astype(np.int64)))),
    "exp": one_input(lambda a: fp.fexp(floats(a))),
    "recip": one_input(lambda a: fp.frecip(floats(a))),
    "rsqrt": one_input(lambda a: fp.frsqrt(floats(a))),
    **{f"i2f_{width}": one_input(lambda a, w=width: fp.i2f(signed_ints(a, w))) for width in INT_WIDTHS},
    **{
        f"i2f_{width}": lambda a, b, w=width: bits_of(fp.i2f(torch.from_numpy(wide_ints(a, b, w))))
        for width in WIDE_WIDTHS
    },
}


@cache
def softfloat() -> SoftFloat:
    return SoftFloat()


@cache
def harness() -> FpHarness:
    """All units in one build."""
    return FpHarness(
        {
            "add": FpAdd(),
            "sub": FpAdd(sub=True),
            "mul": FpMul(),
            "max": FpMax(),
            "shift": FpShift(),
            "f2i8": FpToInt8(),
            "h2f": HalfToFp(),
            "exp": FpExp(),
            "recip": FpRecip(),
            "rsqrt": FpRsqrt(),
            **{f"i2f_{width}": IntToFp(width) for width in INT_WIDTHS + WIDE_WIDTHS},
        }
    )


def rtl(name: str, a: Bits, b: Bits | None = None, *, stall: float = 0.0, seed: int = 1) -> Bits:
    y = harness().run(a, b, stall=stall, seed=seed)[name]
    return y & np.uint32(0xFF) if name == "f2i8" else y


# 1. golden against SoftFloat


@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
def test_golden_equals_softfloat(operation: str, rng: random.Random) -> None:
    a, b = random_pairs(rng)
    wanted = canonical(getattr(softfloat(), operation)(a, b))
    assert_equal_bits(operation, GOLDEN[operation](a, b), wanted, a, b)


def test_golden_int_to_float_equals_softfloat(rng: random.Random) -> None:
    x = np.concatenate([*random_pairs(rng, 100_000), np.uint32(1) << np.arange(32, dtype=np.uint32)])
    x = np.concatenate([x, x >> np.uint32(5), ~x >> np.uint32(9), -x, x + np.uint32(1)])
    assert_equal_bits("i2f", GOLDEN["i2f_32"](x, x), softfloat().from_int32(x), x)


def wide_pairs(rng: random.Random, count: int) -> tuple[Bits, Bits]:
    """(low, high) halves of 64-bit integers: any, of every length, near ties and near carries of a 24-bit significand."""
    source = np.random.default_rng(rng.randrange(1 << 32))
    any_bits = source.integers(0, 1 << 64, count, dtype=np.uint64)
    short = any_bits >> source.integers(0, 64, count, dtype=np.uint64)
    drop = source.integers(0, 41, count, dtype=np.uint64)
    top = source.integers(1 << 23, 1 << 24, count, dtype=np.uint64)
    top = np.where(source.integers(0, 4, count) == 0, np.uint64((1 << 24) - 1), top)
    half = (np.uint64(1) << drop) >> np.uint64(1)
    near = (top << drop) + half + source.integers(0, 3, count).astype(np.uint64) - np.uint64(1)
    edges = np.uint64(1) << np.arange(64, dtype=np.uint64)
    both = np.concatenate([any_bits, short, near, -short, -near, edges, -edges, edges - np.uint64(1), [np.uint64(0)]])
    return both.astype(np.uint32), (both >> np.uint64(32)).astype(np.uint32)


def test_golden_wide_int_to_float_equals_softfloat(rng: random.Random) -> None:
    low, high = wide_pairs(rng, 100_000)
    wanted = softfloat().from_int64(wide_ints(low, high, 64))
    assert_equal_bits("i2f_64", GOLDEN["i2f_64"](low, high), wanted, low, high)


def test_golden_half_to_float_equals_softfloat() -> None:
    x = np.arange(1 << 16, dtype=np.uint32)
    assert_equal_bits("h2f", GOLDEN["h2f"](x, x), canonical(softfloat().from_half(x)), x)


def test_golden_float_to_int8_equals_softfloat(rng: random.Random) -> None:
    a, b = random_pairs(rng, 200_000)
    # the quarters hold all ties; scaled fractions fill the range between
    quarters = (np.arange(-600, 600) / 4).astype(np.float32)
    between = (b & np.uint32(0x00FF_FFFF)).astype(np.float32) * np.float32(2.0**-16) - np.float32(128)
    x = np.concatenate([a, quarters.view(np.uint32), between.view(np.uint32)])
    nan = x & np.uint32(0x7FFF_FFFF) > 0x7F80_0000
    wide = np.where(np.abs(x.view(np.float32)) < 1000, softfloat().to_int32(x).view(np.int32), 0)
    wide = np.where(np.abs(x.view(np.float32)) >= 1000, np.where(x >> 31 == 1, -127, 127), wide)
    wanted = np.where(nan, 0, np.clip(wide, -127, 127)).astype(np.int8).view(np.uint8).astype(np.uint32)
    assert_equal_bits("f2i8", GOLDEN["f2i8"](x, x), wanted, x)


def test_golden_max_orders_zeros_and_infinities() -> None:
    a, b = special_pairs()
    keep = ~(np.isnan(a.view(np.float32)) | np.isnan(b.view(np.float32)))
    a, b = a[keep], b[keep]
    larger = bits_of(fp.fmax(floats(a), floats(b)))
    np.testing.assert_array_equal(larger.view(np.float32), np.maximum(a.view(np.float32), b.view(np.float32)))
    zeros = (a | b) & np.uint32(0x7FFF_FFFF) == 0
    np.testing.assert_array_equal(larger[zeros], (a & b)[zeros])  # -0 only of two -0


def test_golden_shift_is_a_product_but_for_subnormals(rng: random.Random) -> None:
    """A product with 2^shift where operand and result are normal, infinite or not a number; else zero."""
    a, b = random_pairs(rng, 200_000)
    power = np.exp2(signed_ints(b, 8).double().numpy())
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        exact = a.view(np.float32).astype(np.float64) * power
        rounded = exact.astype(np.float32).view(np.uint32)
    small = (np.abs(a.view(np.float32)) < MIN_NORMAL) | (np.abs(exact) < MIN_NORMAL)
    wanted = np.where(small, a & np.uint32(1 << 31), canonical(rounded))
    assert 0.05 < small.mean() < 0.9
    assert_equal_bits("shift", GOLDEN["shift"](a, b), wanted, a, b)


# 2. golden against float64


def check(
    function: Callable[[torch.Tensor], torch.Tensor],
    exact: Callable[[torch.Tensor], torch.Tensor],
    exponents: Iterable[int],
    *,
    bound: float,
    slope: int,
    step: int = 1,
    sign: int = 1,
) -> None:
    """Relative error of the normal results, and that they go one way (`slope`) with |x|, over positive floats."""
    edge = None
    for exponent in exponents:
        for start in range(0, 1 << 23, PART_COUNT * step):
            fractions = torch.arange(start, min(start + PART_COUNT * step, 1 << 23), step, dtype=torch.int32)
            x = fp.from_bits(fractions | exponent << 23) * sign
            y, wanted = function(x), exact(x.double())
            normal = (wanted >= MIN_NORMAL) & (wanted < 2.0**128)
            error = ((y.double() - wanted).abs() / wanted)[normal]
            assert not len(error) or error.max() <= bound, f"{x[normal][error.argmax()].item()!r}"
            finite = y[torch.isfinite(y)]
            assert bool((finite.diff() * slope >= 0).all())
            assert edge is None or not len(finite) or (finite[0] - edge) * slope >= 0
            edge = finite[-1] if len(finite) else edge


def test_reciprocal_of_every_significand() -> None:
    check(fp.frecip, torch.reciprocal, [127], bound=2**-23.7, slope=-1)


def test_rsqrt_of_every_significand_in_two_octaves() -> None:
    check(fp.frsqrt, torch.rsqrt, [127, 128], bound=2**-23.6, slope=-1)


@pytest.mark.parametrize(("function", "exact"), [(fp.frecip, torch.reciprocal), (fp.frsqrt, torch.rsqrt)])
def test_every_exponent_keeps_the_bound(
    function: Callable[[torch.Tensor], torch.Tensor], exact: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    check(function, exact, range(1, 255), bound=2**-23.6, slope=-1, step=4099)


@pytest.mark.parametrize("sign", [1, -1])
def test_exp_keeps_its_bound(sign: int) -> None:
    check(fp.fexp, torch.exp, range(96, 127), bound=2**-23.2, slope=sign, sign=sign, step=211)
    check(fp.fexp, torch.exp, range(127, 134), bound=2**-23.2, slope=sign, sign=sign, step=31)


def test_exp_of_every_table_place() -> None:
    """All 2**24 fractions, in the integers of the algorithm: monotone, near 2**f, below 2 when rounded."""
    table = approx.exp2_table()
    last = 0
    for start in range(0, 1 << 24, PART_COUNT):
        f = torch.arange(start, start + PART_COUNT)
        v = fp._evaluate(table, f >> table.t_bits, f & (1 << table.t_bits) - 1)
        assert v[0] >= last
        assert bool((v.diff() >= 0).all())
        last = v[-1]
        exact = torch.exp2(f.double() / 2**24) - 1
        assert (v.double() * 2**-27 - exact - 2**-24).abs().max() <= 2**-24.9  # c0 holds half a unit, 2**-24
    assert last >> approx.DROPPED_BITS < 1 << 23


SPECIAL_CASES = [
    ("exp", [(0.0, 1.0), (-0.0, 1.0), (1e-40, 1.0), (-1e-40, 1.0), (np.inf, np.inf), (-np.inf, 0.0), (np.nan, np.nan)]),
    ("exp", [(88.73, np.inf), (128.0, np.inf), (3e38, np.inf), (-87.4, 0.0), (-128.0, 0.0), (-3e38, 0.0)]),
    ("recip", [(0.0, np.inf), (-0.0, -np.inf), (1e-40, np.inf), (-1e-40, -np.inf), (np.inf, 0.0), (-np.inf, -0.0)]),
    ("recip", [(2.0**126, 2.0**-126), (2.0**127, 0.0), (-(2.0**127), -0.0), (3e38, 0.0), (np.nan, np.nan)]),
    ("recip", [(sign * 2.0**k, sign * 2.0**-k) for k in range(-126, 127) for sign in (1, -1)]),
    ("rsqrt", [(0.0, np.inf), (-0.0, np.inf), (1e-40, np.inf), (-1e-40, np.inf), (np.inf, 0.0), (np.nan, np.nan)]),
    ("rsqrt", [(-1.0, np.nan), (-np.inf, np.nan), *((4.0**k, 2.0**-k) for k in range(-63, 64))]),
    ("f2i8", [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (126.5, 126), (127.4, 127), (127.5, 127), (-200, -127)]),
]


@pytest.mark.parametrize(("name", "cases"), SPECIAL_CASES)
def test_special_cases_are_as_documented(name: str, cases: list[tuple[float, float]]) -> None:
    x, y = (np.array(column, dtype=np.float32) for column in zip(*cases, strict=True))
    wanted = y.astype(np.int8).view(np.uint8).astype(np.uint32) if name == "f2i8" else canonical(y.view(np.uint32))
    a = x.view(np.uint32)
    assert_equal_bits(name, GOLDEN[name](a, a), wanted, a)


def test_constants_are_the_functions_values() -> None:
    assert approx.LOG2E == 0xB8AA3B29  # from 1.71547652b82fe1777d0ffda0d23a8... x 2**0, hexadecimal
    for table, function in (
        (approx.exp2_table(), lambda k: 2 ** (k / 64) - 1),
        (approx.recip_table(), lambda k: 1 / (1 + k / 128) - 0.5),
        (approx.rsqrt_table(), lambda k: ((1 + k % 128 / 128) * (1 + k // 128)) ** -0.5 - 0.5),
    ):
        scale = 2 ** (27 if table.sign > 0 else 28)
        half = 1 << (approx.DROPPED_BITS - 1)
        assert all(abs(c0 - half - function(k) * scale) <= 0.5001 for k, c0 in enumerate(table.c0))
        assert table.word_bits <= 64  # one machine word in a simulator


# 3. RTL against golden


@pytest.mark.cosim
@pytest.mark.parametrize("name", list(GOLDEN))
def test_rtl_equals_golden(name: str, rng: random.Random) -> None:
    a, b = random_pairs(rng)
    assert_equal_bits(name, rtl(name, a, b), GOLDEN[name](a, b), a, b)


@pytest.mark.cosim
@pytest.mark.parametrize("name", ["exp", "recip", "rsqrt"])
def test_rtl_approximations_equal_golden_in_their_range(name: str, rng: random.Random) -> None:
    source = np.random.default_rng(rng.randrange(1 << 32))
    x = source.uniform(-90, 90, RANDOM_COUNT) if name == "exp" else source.lognormal(0, 10, RANDOM_COUNT)
    a = x.astype(np.float32).view(np.uint32)
    assert_equal_bits(name, rtl(name, a), GOLDEN[name](a, a), a)


@pytest.mark.cosim
@pytest.mark.parametrize("width", WIDE_WIDTHS)
def test_rtl_wide_int_to_float_rounds_once(width: int, rng: random.Random) -> None:
    low, high = wide_pairs(rng, 100_000)
    name = f"i2f_{width}"
    assert_equal_bits(name, rtl(name, low, high), GOLDEN[name](low, high), low, high)


@pytest.mark.cosim
def test_rtl_half_to_float_of_every_half() -> None:
    x = np.arange(1 << 16, dtype=np.uint32)
    assert_equal_bits("h2f", rtl("h2f", x), GOLDEN["h2f"](x, x), x)


@pytest.mark.cosim
@pytest.mark.parametrize("stall", [0.1, 0.5, 0.9])
def test_rtl_holds_while_en_is_low(stall: float, rng: random.Random) -> None:
    """The same results in the same order under random stalls with noise on the inputs; no output moves in one."""
    a, b = random_pairs(rng, 20_000)
    seed = rng.randrange(1 << 32)
    stalled, straight = harness().run(a, b, stall=stall, seed=seed), harness().run(a, b)
    for name in GOLDEN:
        assert_equal_bits(name, stalled[name], straight[name], a, b)


@pytest.mark.parametrize("cycles", [0, 1, 3])
def test_delay_is_as_long_as_asked(cycles: int, rng: random.Random) -> None:
    dut = Delay(8, cycles, reset=True)
    items = [rng.randrange(256) for _ in range(50)]
    seen: list[int] = []

    async def bench(ctx) -> None:
        for item in items:
            while cycles and rng.random() < 0.4:
                ctx.set(dut.en, 0)
                ctx.set(dut.i, rng.randrange(256))
                await ctx.tick()
            ctx.set(dut.en, 1)
            ctx.set(dut.i, item)
            seen.append(ctx.get(dut.o))
            if cycles:
                await ctx.tick()

    simulator = Simulator(dut)
    if cycles:
        simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    assert seen == [0] * cycles + items[: len(items) - cycles]


def test_bad_parameters_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"width must be in 2\.\.64, not 65"):
        IntToFp(65)
    with pytest.raises(ValueError, match=r"cycles must not be negative, not -1"):
        Delay(8, -1)
