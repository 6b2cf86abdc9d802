"""Activations as INT16, FP8 (E4M3) or FP16, and the fixed point of a group of 32: docs/numerics.md section 2c.

Twin of rtl/fixed_group.py. An activation is its bit pattern, as int64.
"""

import torch
from torch import Tensor

from golden.fp import bits_of, fmul, frecip, from_bits
from golden.quant import SMALLEST_EXPONENT, absmax
from spec.act_formats import HALF_FRACTION_BITS, ActFormat

_MOST_INT16 = 32767.0

_ONE_32767TH_BITS = 0x3800_0100
"""The float32 next to 1/32767."""

_TOP_EXPONENT = {ActFormat.FP8: 7, ActFormat.FP16: 14}
"""A token is scaled by a power of two so that its largest magnitude lies in [2^this, 2^(this + 1))."""

_MINIFLOAT = {ActFormat.FP8: (3, 15), ActFormat.FP16: (10, 31)}
"""Fraction bits, ones of the exponent field."""

_HALF_UNIT = -25 - HALF_FRACTION_BITS


def to_format(t: Tensor, form: ActFormat) -> tuple[Tensor, Tensor]:
    """Bit patterns and the scale s of each token: float32 (M, K) -> int64 (M, K), float32 (M,); t is about s * pattern's value.

    INT16: absmax, symmetric, nearest even; error at most (1/2 + 2^-7) s. FP8 and FP16: s is a power of two, so that
    t / s is exact and is rounded once, to nearest even. Tokens below 2^-100 are zeros with s = 0.
    """
    amax = absmax(t)
    field = bits_of(amax) >> 23
    live = field >= SMALLEST_EXPONENT
    zero = torch.zeros_like(amax)
    if form is ActFormat.INT16:
        c = fmul(torch.full_like(amax, _MOST_INT16), frecip(amax))
        s = fmul(amax, from_bits(torch.full(amax.shape, _ONE_32767TH_BITS)))
    else:
        top = _TOP_EXPONENT[form]
        c = from_bits(torch.where(live, 254 + top - field, 0) << 23)
        s = from_bits(torch.where(live, field - top, 0) << 23)
    scaled = fmul(t, torch.where(live, c, zero).unsqueeze(-1))
    if form is ActFormat.INT16:
        bits = torch.round(scaled).clamp(-_MOST_INT16, _MOST_INT16).to(torch.int64) & 0xFFFF
    elif form is ActFormat.FP8:
        bits = scaled.to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int64)
    else:
        bits = scaled.to(torch.float16).view(torch.int16).to(torch.int64) & 0xFFFF
    return bits, torch.where(live, s, zero)


def minifloat_parts(bits: Tensor, form: ActFormat) -> tuple[Tensor, Tensor]:
    """(signed significand, exponent field of at least 1) of FP8 or FP16 patterns, hidden bit included."""
    fraction_bits, ones = _MINIFLOAT[form]
    field = bits >> fraction_bits & ones
    significand = (bits & (1 << fraction_bits) - 1) + torch.where(field > 0, 1 << fraction_bits, 0)
    return torch.where(bits >> form.bits - 1 & 1 == 1, -significand, significand), field.clamp(min=1)


def fixed_group(bits: Tensor, form: ActFormat) -> tuple[Tensor, Tensor]:
    """(v, u) of groups of 32 patterns: int64 (..., 32) -> v (..., 32), |v| < 2^18, and u (...): the values are v * 2^u.

    Exact for INT16 (u = 0) and FP8 (u = -9). FP16: u = e_G - 32, with e_G the group's largest exponent field (at least
    1); nearest, halves up, so that |error| <= 2^(u - 1).
    """
    if form is ActFormat.INT16:
        v = torch.where(bits >= 1 << 15, bits - (1 << 16), bits)
        return v, torch.zeros_like(v[..., 0])
    significand, field = minifloat_parts(bits, form)
    if form is ActFormat.FP8:
        v = significand << field - 1
        return v, torch.full_like(v[..., 0], -9)
    top = field.amax(-1, keepdim=True)  # e_G
    v = ((significand << HALF_FRACTION_BITS + 1 >> top - field) + 1) >> 1
    return v, top.squeeze(-1) + _HALF_UNIT


def value_of(bits: Tensor, form: ActFormat) -> Tensor:
    """What the patterns mean, float64."""
    if form is ActFormat.INT16:
        return torch.where(bits >= 1 << 15, bits - (1 << 16), bits).double()
    significand, field = minifloat_parts(bits, form)
    return significand.double() * torch.exp2((field - (10 if form is ActFormat.FP8 else 25)).double())
