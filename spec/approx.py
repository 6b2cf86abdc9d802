"""Tables and constants of the float32 approximations exp, reciprocal and 1/sqrt: the numbers both twins use.

Every number comes from integer arithmetic alone (`math.isqrt` and exact division), so it does not depend on a
platform's math library. docs/numerics.md gives the algorithms that read them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import isqrt

_GUARD_BITS = 64
"""Fraction bits kept below the table's last place while a coefficient is computed."""

DROPPED_BITS = 4
"""Low bits of an evaluated table that are dropped to give a float32 fraction; `c0` holds half a unit of the result."""

EXP_FRACTION_BITS = 24
"""Fraction bits of the fixed-point number y = x * log2(e)."""

LOG2E_FRACTION_BITS = 31
"""Fraction bits of `LOG2E`."""


@dataclass(frozen=True, kw_only=True)
class QuadraticTable:
    """A function on equal segments, each a quadratic in t, evaluated with two products in integers.

    With ``s`` = `sign`, ``k`` the segment and ``t`` in [0, 2**t_bits) the place within it::

        q = c1[k] + s * ((c2[k] * t) >> t_bits)
        v = c0[k] + s * ((q * t) >> t_bits)

    ``q`` and ``v`` are never negative. ``v >> DROPPED_BITS`` is the rounded result (nearest, half up), because ``c0``
    holds the half unit.
    """

    sign: int
    t_bits: int
    c0_bits: int
    c1_bits: int
    c2_bits: int
    c0: tuple[int, ...]
    c1: tuple[int, ...]
    c2: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.sign not in (1, -1):
            raise ValueError(f"sign must be 1 or -1, not {self.sign}")
        for name, bits in (("c0", self.c0_bits), ("c1", self.c1_bits), ("c2", self.c2_bits)):
            column: tuple[int, ...] = getattr(self, name)
            if min(column) < 0 or max(column) >> bits:
                raise ValueError(f"{name} must fit {bits} unsigned bits: {min(column)}..{max(column)}")

    @property
    def depth(self) -> int:
        """Number of segments."""
        return len(self.c0)

    @property
    def index_bits(self) -> int:
        """Address bits of the table."""
        return (self.depth - 1).bit_length()

    @property
    def word_bits(self) -> int:
        """Width of one memory word: c0, c1 and c2 side by side, c0 in the low bits."""
        return self.c0_bits + self.c1_bits + self.c2_bits

    @property
    def words(self) -> tuple[int, ...]:
        """The memory's content, one word a segment."""
        columns = zip(self.c0, self.c1, self.c2, strict=True)
        return tuple(c0 | (c1 | c2 << self.c1_bits) << self.c0_bits for c0, c1, c2 in columns)


def _round_shift(value: int, bits: int) -> int:
    """value / 2**bits to the nearest integer, halves up."""
    return (value + (1 << (bits - 1))) >> bits


def _fit(
    node: Callable[[int, int], int],
    *,
    depth: int,
    sign: int,
    scale_bits: int,
    offset: int,
    t_bits: int,
    widths: tuple[int, int, int],
) -> QuadraticTable:
    """The quadratic through both ends and the middle of each segment, so that neighbours meet.

    ``node(j, bits)`` is the function at the j-th half segment, times 2**bits. ``offset`` (in units of
    2**-scale_bits) is taken off c0.
    """
    bits = scale_bits + _GUARD_BITS
    c0, c1, c2 = [], [], []
    for k in range(depth):
        start, middle, end = (node(2 * k + j, bits) for j in range(3))
        second = 2 * (start - 2 * middle + end)
        first = end - start - second
        c0.append(_round_shift(start, _GUARD_BITS) - offset + (1 << (DROPPED_BITS - 1)))
        c1.append(_round_shift(sign * first, _GUARD_BITS))
        c2.append(_round_shift(second, _GUARD_BITS))
    return QuadraticTable(
        sign=sign,
        t_bits=t_bits,
        c0_bits=widths[0],
        c1_bits=widths[1],
        c2_bits=widths[2],
        c0=tuple(c0),
        c1=tuple(c1),
        c2=tuple(c2),
    )


def _exp2_node(j: int, bits: int) -> int:
    """2**(j/128) * 2**bits, rounded down: seven nested integer square roots."""
    value = 1 << (j + 128 * bits)
    for _ in range(7):
        value = isqrt(value)
    return value


def _recip_node(j: int, bits: int) -> int:
    """1 / (1 + j/256) * 2**bits, rounded down."""
    return (1 << (bits + 8)) // (256 + j)


def _rsqrt_node(octave: int, j: int, bits: int) -> int:
    """1 / sqrt(2**octave * (1 + j/256)) * 2**bits, rounded down."""
    return isqrt((1 << (2 * bits + 8)) // ((256 + j) << octave))


@cache
def exp2_table() -> QuadraticTable:
    """2**f - 1 for f in [0, 1): 64 segments, 18 bits of t, units of 2**-27."""
    return _fit(_exp2_node, depth=64, sign=1, scale_bits=27, offset=1 << 27, t_bits=18, widths=(27, 22, 15))


@cache
def recip_table() -> QuadraticTable:
    """1/m - 1/2 for m in [1, 2): 128 segments, 16 bits of t, units of 2**-28."""
    return _fit(_recip_node, depth=128, sign=-1, scale_bits=28, offset=1 << 27, t_bits=16, widths=(28, 21, 14))


@cache
def rsqrt_table() -> QuadraticTable:
    """1/sqrt(m) - 1/2 for m in [1, 2), then 1/sqrt(2m) - 1/2: 2 x 128 segments, 16 bits of t, units of 2**-28."""
    halves = [
        _fit(
            lambda j, bits, octave=octave: _rsqrt_node(octave, j, bits),
            depth=128,
            sign=-1,
            scale_bits=28,
            offset=1 << 27,
            t_bits=16,
            widths=(28, 20, 13),
        )
        for octave in (0, 1)
    ]
    return QuadraticTable(
        sign=-1,
        t_bits=16,
        c0_bits=28,
        c1_bits=20,
        c2_bits=13,
        c0=halves[0].c0 + halves[1].c0,
        c1=halves[0].c1 + halves[1].c1,
        c2=halves[0].c2 + halves[1].c2,
    )


def _log2e(bits: int) -> int:
    """log2(e) * 2**bits to the nearest integer: 1 / ln 2, with ln 2 = sum over i >= 1 of 1 / (i * 2**i)."""
    work = bits + _GUARD_BITS
    ln2 = sum((1 << work) // (i << i) for i in range(1, work + 1))
    return _round_shift((1 << (2 * work)) // ln2, _GUARD_BITS)


LOG2E = _log2e(LOG2E_FRACTION_BITS)
"""log2(e) in 32 bits, units of 2**-31."""
