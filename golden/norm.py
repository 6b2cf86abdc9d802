"""RMSNorm and quantisation of activations (NORM): docs/numerics.md section 2. Twin of rtl/norm.py."""

import torch
from torch import Tensor

from golden.fp import bits_of, fadd, fmul, from_bits, frsqrt
from golden.quant import absmax, group_params, quant_params, quantise
from spec.config import K_GROUP, LANES, SUM_WAYS


def sum_of_squares(x: Tensor) -> Tensor:
    """sum x^2 over the last dimension in the order of the hardware: (M, n) -> (M,)."""
    beats = fmul(x, x).unflatten(-1, (-1, LANES))  # (M, n / 8, 8)
    level = beats
    while level.shape[-1] > 1:  # ((u0+u1)+(u2+u3)) + ((u4+u5)+(u6+u7))
        level = fadd(level[..., 0::2], level[..., 1::2])
    level = level.squeeze(-1)  # (M, n / 8)
    partial = [torch.zeros_like(x[..., 0]) for _ in range(SUM_WAYS)]
    for beat in range(level.shape[-1]):
        way = beat % SUM_WAYS
        partial[way] = fadd(partial[way], level[..., beat])
    while len(partial) > 1:  # (p0+p1) + (p2+p3)
        partial = [fadd(a, b) for a, b in zip(partial[0::2], partial[1::2], strict=True)]
    return partial[0]


def norm_quantise(
    x: Tensor, gamma: Tensor | None, inv_length: Tensor | float, eps: Tensor | float
) -> tuple[Tensor, Tensor]:
    """int8 activations and their scale of every token: x (M, n), gamma (n,) or None -> q (M, n), scale (M,).

    Without gamma x is quantised as it is; `inv_length` and `eps` are then not used.
    """
    # 1. pass 1: gain, largest magnitude, sum of squares
    t = x if gamma is None else fmul(x, gamma)  # (M, n)
    c, s = quant_params(absmax(t))  # (M,)
    # 2. pass 2: the common factor r cancels in the quantised values and goes into the scale
    q = quantise(t, c.unsqueeze(-1))  # (M, n)
    if gamma is None:
        return q, s
    mean = fmul(sum_of_squares(x), torch.as_tensor(inv_length, dtype=torch.float32))
    r = frsqrt(fadd(mean, torch.as_tensor(eps, dtype=torch.float32)))
    return q, fmul(s, r)


def norm_quantise_groups(
    x: Tensor, gamma: Tensor | None, inv_length: Tensor | float, eps: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with a scale for each 32 values (section 2b): q (M, n), bfloat16 bits d (M, n / 32), token scale (M,)."""
    # 1. pass 1: gain, largest magnitude of each group, sum of squares
    t = x if gamma is None else fmul(x, gamma)  # (M, n)
    groups = t.unflatten(-1, (-1, K_GROUP))  # (M, n / 32, 32)
    c, d = group_params(absmax(groups))
    # 2. pass 2: r goes into the token scale, beside the power of two from which the groups' exponents count down
    q = quantise(groups, c.unsqueeze(-1)).flatten(-2)
    field = bits_of(group_params(absmax(t))[1]) >> 23  # X
    p = from_bits(torch.where(field > 7, field - 7, torch.zeros_like(field)) << 23)
    half = bits_of(d) >> 16
    if gamma is None:
        return q, half, p
    mean = fmul(sum_of_squares(x), torch.as_tensor(inv_length, dtype=torch.float32))
    r = frsqrt(fadd(mean, torch.as_tensor(eps, dtype=torch.float32)))
    return q, half, fmul(p, r)


def norm_float(x: Tensor, gamma: Tensor | None, eps: float) -> Tensor:
    """What q * scale stands for, in float64: (M, n)."""
    wide = x.to(torch.float64)
    if gamma is None:
        return wide
    return wide * gamma.to(torch.float64) / torch.sqrt((wide * wide).mean(dim=-1, keepdim=True) + eps)
