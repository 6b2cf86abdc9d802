"""Group dequantisation after the group's integer sum: docs/numerics.md sections 2b and 3b. Twin of rtl/group_dequant.py."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from spec.config import ALIGN_BITS, K_GROUP

_FP16_BIAS = 25
"""An FP16 number is significand * 2^(exponent - 25)."""

_ACT_BIAS = 134
"""A bfloat16 scale is significand * 2^(exponent field - 134)."""

_MOST_SHIFT = 63

_CHUNK = 1 << 16
"""Group sums held at once, so that they stay in the processor's cache: changes no bit."""


@dataclass(frozen=True)
class GroupWeights:
    """A group-quantised matrix: weight = scale * code + minimum.

    ``codes``: uint8 (N, K). ``scale``, ``minimum``: FP16 bits as int64 (N, K / 32). ``exponent``: E.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor
    bits: int
    exponent: int

    @cached_property
    def factors(self) -> Tensor:
        """Codes as the sums of all groups take them: float32 (K / 32, 32, N)."""
        return self.codes.unflatten(-1, (-1, K_GROUP)).permute(1, 2, 0).to(torch.float32).contiguous()

    @cached_property
    def aligned(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Of scales and of minima: (significand << ALIGN_BITS, right shift), int64 (K / 32, 1, N)."""
        scale, minimum = (half_parts(part.T.unsqueeze(1)) for part in (self.scale, self.minimum))
        first, second = (
            ((m << ALIGN_BITS).contiguous(), (self.exponent - e).contiguous()) for m, e in (scale, minimum)
        )
        return first, second


def half_parts(bits: Tensor) -> tuple[Tensor, Tensor]:
    """(signed significand, exponent of at least 1) of finite FP16 bit patterns, as int64."""
    wide = bits.to(torch.int64) & 0xFFFF
    field = wide >> 10 & 31
    significand = (wide & 0x3FF) + torch.where(field > 0, 1 << 10, 0)
    return torch.where(wide >= 1 << 15, -significand, significand), field.clamp(min=1)


def largest_exponent(*halves: Tensor) -> int:
    """E of these FP16 bit patterns."""
    return max(int(half_parts(part)[1].max()) for part in halves)


def act_parts(d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(m_G, e_G, X) of bfloat16 scales (M, G): significand, exponent field, and the largest field of each token (M, 1)."""
    field = d.to(torch.int64) >> 7 & 0xFF
    significand = torch.where(field > 0, 128 + (d & 0x7F), 0)
    return significand, field, field.amax(dim=-1, keepdim=True)


def group_sums(q: Tensor, factors: Tensor) -> Tensor:
    """``S[g, m, n]``, exact: int8 (M, K), codes as float32 (K / 32, 32, N) -> int64. All engines must agree with it."""
    x = q.unflatten(-1, (-1, K_GROUP)).transpose(0, 1).to(torch.float32)  # (G, M, 32)
    return torch.bmm(x, factors).to(torch.int64)  # below 2^20: binary32 holds it exactly


def accumulate(q: Tensor, d: Tensor, weights: GroupWeights) -> Tensor:
    """acc (M, N) int64 of int8 activations (M, K) with bfloat16 group scales d (M, K / 32): section 3b, steps 1 to 3."""

    def sums(groups: slice) -> Tensor:
        return group_sums(q[:, groups.start * K_GROUP : groups.stop * K_GROUP], weights.factors[groups])

    return accumulate_sums(sums, q.unflatten(-1, (-1, K_GROUP)).sum(-1, dtype=torch.int64), d, weights)


def accumulate_sums(
    sums: Callable[[slice], Tensor], sum_acts: Tensor, d: Tensor, weights: GroupWeights
) -> Tensor:
    """Steps 2 and 3: `sums` gives S of some groups, int64 (G, M, N), which is overwritten; `sum_acts` is A, int64 (M, K / 32)."""
    tokens, outputs = d.shape[0], weights.scale.shape[0]
    significand, field, top = act_parts(d)
    shift = (top - field).clamp(max=_MOST_SHIFT)  # (M, G)
    activations = sum_acts.T.unsqueeze(-1)  # (G, M, 1)
    (scale, scale_shift), (minimum, minimum_shift) = weights.aligned
    acc = torch.zeros(tokens, outputs, dtype=torch.int64)
    step = max(1, _CHUNK // (tokens * outputs))
    for first in range(0, d.shape[1], step):
        here = slice(first, min(first + step, d.shape[1]))
        value = sums(here).mul_(scale[here]).bitwise_right_shift_(scale_shift[here])
        value += (activations[here] * minimum[here]).bitwise_right_shift_(minimum_shift[here])  # V
        value.mul_(significand[:, here].T.unsqueeze(-1)).bitwise_right_shift_(shift[:, here].T.unsqueeze(-1))
        acc += value.sum(0)
    return acc


def weight_scale(exponent: int) -> Tensor:
    """w of numerics 3b: float32 2^(E - 25 - ALIGN_BITS)."""
    return torch.tensor(2.0 ** (exponent - _FP16_BIAS - ALIGN_BITS), dtype=torch.float32)


def half_value(bits: Tensor) -> Tensor:
    """What finite FP16 patterns mean, float64."""
    significand, field = half_parts(bits)
    return significand.double() * torch.exp2((field - _FP16_BIAS).double())


def act_value(d: Tensor) -> Tensor:
    """What bfloat16 scales mean, float64."""
    significand, field, _ = act_parts(d)
    return significand.double() * torch.exp2((field - _ACT_BIAS).double())


def top_scale(d: Tensor) -> Tensor:
    """p of section 2b, float32 (M,): what the lowest bit of a token's largest significand is worth."""
    top = act_parts(d)[2].squeeze(-1)
    return torch.where(top >= 8, torch.exp2((top - _ACT_BIAS).double()), 0.0).to(torch.float32)


def dense(weights: GroupWeights) -> Tensor:
    """The weights, float64 (N, K)."""
    scale, minimum = (half_value(part).repeat_interleave(K_GROUP, 1) for part in (weights.scale, weights.minimum))
    return weights.codes.double() * scale + minimum


def matmul_float(q: Tensor, d: Tensor, token_scale: Tensor, weights: GroupWeights) -> Tensor:
    """What the accumulator and its two scales stand for, in float64: (M, N)."""
    significand, field, top = act_parts(d)
    step = significand.double() * torch.exp2((field - top).double())  # in units of the token scale
    x = q.double() * step.repeat_interleave(K_GROUP, dim=-1)
    return (x @ dense(weights).T) * token_scale.double().unsqueeze(-1)


def bound(d: Tensor, token_scale: Tensor, exponent: int) -> Tensor:
    """How far `accumulate`, scaled exactly, may be from `matmul_float`: (M, 1) float64."""
    significand, field, top = act_parts(d)
    shift = (top - field).clamp(max=_MOST_SHIFT)
    lost = (2 * significand.double() * torch.exp2(-shift.double()) + 1).sum(-1, keepdim=True)
    return lost * weight_scale(exponent).double() * token_scale.double().unsqueeze(-1)
