"""MixPE with floats: group sums of FP4 (E2M1) weights and FP16 activations. Twin of rtl/mixpe_fp.py.

Zhang et al., "MixPE" (arXiv:2411.16158): a 4-bit float times a float is an addition of exponents and one of mantissas,
``(-1)^s (M ? a + a / 2 : a) 2^(E - 1)``; E = 0 are 0 and 0.5. Here the activations of a group are first brought to a
common fixed point (numerics 2c), so that the exponent's addition is a shift by at most two places, and the sum of the
32 products is exact. The group's scale comes after it (numerics 3d).
"""

import torch
from torch import Tensor

from golden import act_formats, group_dequant
from spec.act_formats import ActFormat
from spec.config import K_GROUP

_SCALE_FIELD = 94
"""d_G is the unit of S, 2^(e_G - 33): a bfloat16 of significand 128 and this plus e_G as exponent field."""


def product(v: Tensor, code: Tensor) -> Tensor:
    """2 w v of E2M1 codes (0 to 15, sign highest), by shifts and one addition: int64, broadcast."""
    exponent, mantissa = code >> 1 & 3, code & 1
    whole = torch.where(exponent > 0, 2 * v, 0)  # the hidden bit
    total = whole + torch.where(mantissa == 1, v, 0)
    shifted = total << (exponent - 1).clamp(min=0)
    return torch.where(code >> 3 == 1, -shifted, shifted)


def value_of(code: Tensor) -> Tensor:
    """w, float64."""
    return product(torch.ones_like(code, dtype=torch.int64), code.to(torch.int64)).double() / 2


def group_sums(v: Tensor, codes: Tensor) -> Tensor:
    """``S[m, n] = sum_i 2 w[n, i] v[m, i]`` the engine's way: int64 (M, 32), codes (N, 32) -> int64 (M, N); |S| < 2^27."""
    return product(v[:, None, :], codes.to(torch.int64)[None]).sum(-1)


def act_scale(exponent: Tensor) -> Tensor:
    """d_G of the group's largest exponent field: bfloat16 bits, int64."""
    return (_SCALE_FIELD + exponent) << 7


def accumulate(bits: Tensor, weights: group_dequant.GroupWeights) -> tuple[Tensor, Tensor]:
    """(acc (M, N) int64, d (M, K / 32)) of FP16 patterns (M, K); section 3b on exact sums. The codes of the weights are
    E2M1, their minima 0."""
    v, unit = act_formats.fixed_group(bits.unflatten(-1, (-1, K_GROUP)), ActFormat.FP16)  # (M, G, 32), (M, G)
    x = v.transpose(0, 1).double()
    w = (2 * value_of(weights.codes)).unflatten(-1, (-1, K_GROUP)).permute(1, 2, 0)  # (G, 32, N)

    def sums(groups: slice) -> Tensor:
        return torch.bmm(x[groups], w[groups]).to(torch.int64)  # below 2^27: exact

    d = act_scale(unit + 32)
    return group_dequant.accumulate_sums(sums, torch.zeros_like(d), d, weights), d


def dense(weights: group_dequant.GroupWeights) -> Tensor:
    """The weights, float64 (N, K)."""
    return value_of(weights.codes) * group_dequant.half_value(weights.scale).repeat_interleave(K_GROUP, 1)


def matmul_float(bits: Tensor, token_scale: Tensor, weights: group_dequant.GroupWeights) -> Tensor:
    """What it stands for, in float64: (M, N)."""
    return act_formats.value_of(bits, ActFormat.FP16) @ dense(weights).T * token_scale.double().unsqueeze(-1)


def bound(bits: Tensor, token_scale: Tensor, weights: group_dequant.GroupWeights) -> Tensor:
    """How far `accumulate`, scaled exactly, may be from `matmul_float`: (M, N) float64."""
    unit = act_formats.fixed_group(bits.unflatten(-1, (-1, K_GROUP)), ActFormat.FP16)[1]
    half_step = torch.exp2((unit - 1).double()) * token_scale.double().unsqueeze(-1)  # (M, G)
    magnitudes = dense(weights).abs().unflatten(-1, (-1, K_GROUP)).sum(-1)  # (N, G)
    d = act_scale(unit + 32)
    return half_step @ magnitudes.T + group_dequant.bound(d, token_scale * group_dequant.top_scale(d), weights.exponent)
