"""Absolute-maximum quantisation to int8 and int4: docs/numerics.md sections 1 and 2b."""

import torch
from torch import Tensor

from golden.fp import bits_of, f2i8, fmul, frecip, from_bits

SMALLEST_EXPONENT = 27
"""Exponent field of 2**-100: a vector whose largest magnitude is below that counts as zero."""

_ONE_127TH_BITS = 0x3C01_0204
"""The float32 next to 1/127."""

_ONE_7TH_BITS = 0x3E12_4925
"""The float32 next to 1/7."""

_MAGNITUDE = 0x7FFF_FFFF


def absmax(t: Tensor, dim: int = -1) -> Tensor:
    """Largest magnitude along `dim`, exact. Compared as bit patterns, so a NaN is larger than everything."""
    return from_bits((bits_of(t) & _MAGNITUDE).amax(dim=dim))


def quant_params(amax: Tensor, *, int4: bool = False) -> tuple[Tensor, Tensor]:
    """(c, s) of vectors with these largest magnitudes: multiply by c to quantise, by s to come back.

    The largest magnitude becomes 127, with ``int4`` 7.
    """
    small = bits_of(amax) < SMALLEST_EXPONENT << 23
    zero = torch.zeros_like(amax)
    c = fmul(torch.full_like(amax, 7.0 if int4 else 127.0), frecip(amax))
    s = fmul(amax, from_bits(torch.full(amax.shape, _ONE_7TH_BITS if int4 else _ONE_127TH_BITS)))
    return torch.where(small, zero, c), torch.where(small, zero, s)


def group_params(amax: Tensor) -> tuple[Tensor, Tensor]:
    """(c, d) of groups with these largest magnitudes: d is a bfloat16, rounded up, as float32; c its reciprocal."""
    small = bits_of(amax) < SMALLEST_EXPONENT << 23
    s = fmul(amax, from_bits(torch.full(amax.shape, _ONE_127TH_BITS)))
    d = from_bits((bits_of(s) + 0xFFFF) & 0xFFFF_0000)
    zero = torch.zeros_like(amax)
    return torch.where(small, zero, frecip(d)), torch.where(small, zero, d)


def quantise(t: Tensor, c: Tensor) -> Tensor:
    """int8 of t * c, rounded to nearest even and clamped to [-127, 127]; c broadcasts."""
    return f2i8(fmul(t, c))


def pack_int4(q: Tensor) -> Tensor:
    """int8 in [-8, 7], (..., n) -> uint8 (..., n / 2): two's complement nibbles, the lower element in the low one."""
    nibbles = q.to(torch.uint8) & 15
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def unpack_int4(packed: Tensor) -> Tensor:
    """Inverse of `pack_int4`."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).to(torch.int8)
    return nibbles - ((nibbles & 8) << 1)


def quantise_float(t: Tensor) -> tuple[Tensor, Tensor]:
    """The meaning in float64, along the last dimension: (values before rounding, scale)."""
    wide = t.to(torch.float64)
    amax = wide.abs().amax(dim=-1, keepdim=True)
    live = amax >= 2.0**-100
    scale = torch.where(live, amax / 127, torch.zeros_like(amax))
    return torch.where(live, wide * 127 / amax.clamp(min=2.0**-100), torch.zeros_like(wide)), scale.squeeze(-1)
