"""What happens to the integer sums of a MATMUL: docs/numerics.md sections 3 and 4. Twin of rtl/epilogue.py."""

import torch
from torch import Tensor

from golden.fp import bits_of, fadd, fexp, fmax, fmul, frecip, fshift, fsub, i2f
from golden.quant import absmax, quant_params, quantise

_SIGN = 1 << 31


def dequant(acc: Tensor, weight_scale: Tensor | float, act_scale: Tensor) -> Tensor:
    """y = (float(acc) * w) * s: acc (M, N) integers, w one float32 or (N,), s (M,) -> (M, N)."""
    return fmul(fmul(i2f(acc), torch.as_tensor(weight_scale, dtype=torch.float32)), act_scale.unsqueeze(-1))


def dequant_float(acc: Tensor, weight_scale: Tensor | float, act_scale: Tensor) -> Tensor:
    """`dequant` in float64."""
    weight = torch.as_tensor(weight_scale, dtype=torch.float32).to(torch.float64)
    return acc.to(torch.float64) * weight * act_scale.to(torch.float64).unsqueeze(-1)


def residual(old: Tensor, y: Tensor) -> Tensor:
    """RESIDUAL: old + y."""
    return fadd(old, y)


def gate_silu(y: Tensor) -> Tensor:
    """GATE_SILU: y / (1 + exp(-y)). For y = -inf the product is 0 * inf = NaN."""
    return fmul(y, frecip(fadd(torch.ones_like(y), fexp(-y))))


def gate_silu_float(y: Tensor) -> Tensor:
    """`gate_silu` in float64."""
    wide = y.to(torch.float64)
    return wide * torch.sigmoid(wide)


def gate_relu2(y: Tensor) -> Tensor:
    """GATE_RELU2: max(y, 0)^2."""
    z = fmax(y, torch.zeros_like(y))
    return fmul(z, z)


def gate_relu2_float(y: Tensor) -> Tensor:
    """`gate_relu2` in float64."""
    return y.to(torch.float64).clamp(min=0.0) ** 2


def up(old: Tensor, y: Tensor) -> Tensor:
    """UP: old * y."""
    return fmul(old, y)


def rope(y: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of heads: y (M, heads, hd), cos_sin (M, hd) = cos0, sin0, .. -> (M, heads, hd)."""
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


def channels(y: Tensor, offset: Tensor, shift: Tensor) -> Tensor:
    """(y + offset) * 2**shift: y (M, heads, hd), offset (heads, hd) float32, shift (heads, hd) in [-128, 127]."""
    return fshift(fadd(y, offset), shift)


def query_channels(q: Tensor, shift: Tensor) -> Tensor:
    """What undoes `channels` of K in the products: q (M, heads, hd), shift (kv_heads, hd) of K."""
    group = q.shape[-2] // shift.shape[0]
    return channels(q, torch.zeros(1), -shift.repeat_interleave(group, 0))


def quantise_heads(y: Tensor, *, int4: bool = False) -> tuple[Tensor, Tensor]:
    """QUERY, KEY (after RoPE), VALUE: y (M, heads, hd) -> int8 (M, heads, hd), scale (M, heads).

    With ``int4`` the values lie in [-7, 7].
    """
    c, s = quant_params(absmax(y), int4=int4)
    return quantise(y, c.unsqueeze(-1)), s


def argmax(y: Tensor) -> Tensor:
    """LOGITS: number of the largest value along the last dimension, the lowest on a tie: (..., N) -> (...) int64.

    Values compare as floats (-0 = +0). A NaN never wins; when nothing else is there the result is 0.
    """
    bits = bits_of(y)
    magnitude = bits & (_SIGN - 1)
    order = torch.where(bits >= _SIGN, -magnitude, magnitude)
    order = torch.where(torch.isnan(y), torch.full_like(order, -_SIGN), order)
    row = torch.arange(y.shape[-1]).expand_as(order)
    best = order.amax(dim=-1, keepdim=True)
    return torch.where(order == best, row, torch.full_like(row, y.shape[-1])).amin(dim=-1)
