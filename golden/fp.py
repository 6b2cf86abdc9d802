"""Float32 arithmetic of the accelerator, bit exact: the reference for rtl/lib/fp*.py.

All functions work element by element and broadcast. Tensors are torch.float32 unless stated. Every NaN that comes out
is 0x7FC00000. docs/numerics.md states algorithm, rounding, special cases and bound of each.
"""

import torch
from torch import Tensor

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

_FRACTION_MASK = (1 << 23) - 1
_INF_BITS = 0x7F80_0000
_NAN_BITS = 0x7FC0_0000


def bits_of(x: Tensor) -> Tensor:
    """The 32 bits of float32 values, as non-negative int64."""
    return x.contiguous().view(torch.int32).to(torch.int64) & 0xFFFF_FFFF


def from_bits(bits: Tensor) -> Tensor:
    """float32 values of 32-bit patterns (any integer dtype; the low 32 bits count)."""
    wide = bits.to(torch.int64) & 0xFFFF_FFFF
    return torch.where(wide >= 1 << 31, wide - (1 << 32), wide).to(torch.int32).view(torch.float32)


def _canonical(x: Tensor) -> Tensor:
    return torch.where(torch.isnan(x), torch.full_like(x, float("nan")), x)


def fadd(a: Tensor, b: Tensor) -> Tensor:
    """a + b, IEEE binary32, round to nearest even, subnormals kept."""
    return _canonical(torch.add(a, b))


def fsub(a: Tensor, b: Tensor) -> Tensor:
    """a - b, IEEE binary32, round to nearest even, subnormals kept."""
    return _canonical(torch.sub(a, b))


def fmul(a: Tensor, b: Tensor) -> Tensor:
    """a * b, IEEE binary32, round to nearest even, subnormals kept."""
    return _canonical(torch.mul(a, b))


def fshift(x: Tensor, shift: Tensor) -> Tensor:
    """x * 2**shift for integers in [-128, 127], by the exponent alone: subnormal x and results count as zeros of x's sign."""
    bits = bits_of(x)
    exponent = bits >> 23 & 0xFF
    moved = exponent + shift.to(torch.int64)
    sign = bits & 1 << 31
    normal = sign | moved.clamp(0, 255) << 23 | bits & _FRACTION_MASK
    result = torch.where((exponent == 0) | (moved < 1), sign, torch.where(moved > 254, sign | _INF_BITS, normal))
    return _canonical(torch.where(exponent == 255, x, from_bits(result)))


def fmax(a: Tensor, b: Tensor) -> Tensor:
    """The larger of a and b in the order of sign and magnitude bits: -0 < +0; not for NaN."""
    a, b = torch.broadcast_tensors(a, b)
    a_bits, b_bits = bits_of(a), bits_of(b)
    return from_bits(torch.where(_order_key(a_bits) >= _order_key(b_bits), a_bits, b_bits))


def _order_key(bits: Tensor) -> Tensor:
    """An integer that orders as the float does: the bits, those of a negative number mirrored."""
    return torch.where(bits >> 31 == 1, (1 << 31) - 1 - bits, bits)


def i2f(x: Tensor) -> Tensor:
    """float32 of an integer of at most 63 signed bits, round to nearest even."""
    return x.to(torch.int64).to(torch.float32)


def f2i8(x: Tensor) -> Tensor:
    """int8 of a float32: round to nearest even, then saturate to [-127, 127]; NaN gives 0."""
    return torch.nan_to_num(torch.round(x), nan=0.0).clamp(-127.0, 127.0).to(torch.int8)


def h2f(bits: Tensor) -> Tensor:
    """float32 of binary16 bit patterns (int16, or any integer dtype with 16 bits in use): exact."""
    wide = bits.to(torch.int64) & 0xFFFF
    half = torch.where(wide >= 1 << 15, wide - (1 << 16), wide).to(torch.int16).view(torch.float16)
    return _canonical(half.to(torch.float32))


def _evaluate(table: QuadraticTable, index: Tensor, t: Tensor) -> Tensor:
    """The table's quadratic in integers, still with its DROPPED_BITS low bits."""
    c0, c1, c2 = (torch.tensor(c, dtype=torch.int64)[index] for c in (table.c0, table.c1, table.c2))
    q = c1 + table.sign * ((c2 * t) >> table.t_bits)
    return c0 + table.sign * ((q * t) >> table.t_bits)


def fexp(x: Tensor) -> Tensor:
    """e**x: y = x log2(e) in fixed point, 2**fraction(y) by table; results below 2**-126 become +0."""
    table = exp2_table()
    bits = bits_of(x)
    negative, exponent, fraction = bits >> 31 == 1, (bits >> 23) & 0xFF, bits & _FRACTION_MASK

    # 1. y = x log2(e), EXP_FRACTION_BITS fraction bits, magnitude rounded to nearest, halves away from zero
    significand = fraction | 1 << 23  # an x below 2**-126 is far below what y can hold
    product = significand * LOG2E  # units of 2**(exponent - 150 - LOG2E_FRACTION_BITS)
    shift = (150 + LOG2E_FRACTION_BITS - EXP_FRACTION_BITS - exponent).clamp(1, 62)
    magnitude = ((product >> (shift - 1)) + 1) >> 1
    y = torch.where(negative, -magnitude, magnitude)

    # 2. 2**y = 2**integer * 2**fraction
    integer, f = y >> EXP_FRACTION_BITS, y & ((1 << EXP_FRACTION_BITS) - 1)
    v = _evaluate(table, f >> table.t_bits, f & ((1 << table.t_bits) - 1)) >> DROPPED_BITS

    # 3. pack; |x| >= 128 (exponent >= 134) is out of range whatever y says
    result = ((integer + 127) << 23) + v
    far = exponent >= 134
    result = torch.where((integer < -126) | (far & negative), torch.zeros_like(result), result)
    result = torch.where(~negative & (far | (integer > 127)), torch.full_like(result, _INF_BITS), result)
    return from_bits(torch.where(torch.isnan(x), torch.full_like(result, _NAN_BITS), result))


def frecip(x: Tensor) -> Tensor:
    """1/x by table; subnormal x counts as zero, a result below 2**-126 becomes zero, the sign is kept."""
    table = recip_table()
    bits = bits_of(x)
    sign, exponent, fraction = bits & 1 << 31, (bits >> 23) & 0xFF, bits & _FRACTION_MASK
    v = _evaluate(table, fraction >> table.t_bits, fraction & ((1 << table.t_bits) - 1)) >> DROPPED_BITS
    result = ((253 - exponent) << 23) + v  # v reaches 2**23 for a power of two, and so carries into the exponent
    result = torch.where(result < 1 << 23, torch.zeros_like(result), result)
    result = torch.where(exponent == 0, torch.full_like(result, _INF_BITS), result)
    return from_bits(torch.where(torch.isnan(x), torch.full_like(result, _NAN_BITS), result | sign))


def frsqrt(x: Tensor) -> Tensor:
    """1/sqrt(x) by table; zero and subnormal x of either sign give +inf, other negative x NaN."""
    table = rsqrt_table()
    bits = bits_of(x)
    exponent, fraction = (bits >> 23) & 0xFF, bits & _FRACTION_MASK
    octave = 1 - (exponent & 1)  # the true exponent, exponent - 127, is odd: 1/sqrt(2m)
    index = octave << 7 | fraction >> table.t_bits
    v = _evaluate(table, index, fraction & ((1 << table.t_bits) - 1)) >> DROPPED_BITS
    result = ((190 - ((exponent + 1) >> 1)) << 23) + v
    result = torch.where(exponent == 255, torch.zeros_like(result), result)
    nan = torch.isnan(x) | (bits >> 31 == 1)
    result = torch.where(nan, torch.full_like(result, _NAN_BITS), result)
    return from_bits(torch.where(exponent == 0, torch.full_like(result, _INF_BITS), result))
