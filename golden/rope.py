"""Rotary position embedding on interleaved pairs: docs/numerics.md section 4."""

import torch
from torch import Tensor

from golden.fp import fadd, fmul, fsub


def rope(y: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of every head: y (M, heads, hd), cos_sin (M, hd) = cos0, sin0, cos1, ... -> (M, heads, hd)."""
    y0, y1 = y[..., 0::2], y[..., 1::2]  # (M, heads, hd / 2)
    cos, sin = cos_sin[:, None, 0::2], cos_sin[:, None, 1::2]  # (M, 1, hd / 2)
    even = fsub(fmul(y0, cos), fmul(y1, sin))
    odd = fadd(fmul(y0, sin), fmul(y1, cos))
    return torch.stack((even, odd), dim=-1).flatten(-2)


def rope_float(y: Tensor, cos_sin: Tensor) -> Tensor:
    """The same in float64, as a complex product."""
    rotated = torch.view_as_complex(y.to(torch.float64).unflatten(-1, (-1, 2)).contiguous())
    turn = torch.view_as_complex(cos_sin.to(torch.float64).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(rotated * turn[:, None]).flatten(-2)
