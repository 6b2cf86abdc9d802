"""Tables of four activations quantised to int8: docs/numerics.md sections 2c and 3c. Twin of rtl/table_quantiser.py.

T-MAC's rule (Wei et al., EuroSys 2025): a group of 32 activations has 8 tables; their scale is the largest of the 8 sums
of four magnitudes, by 127; entries are divided by it and rounded. The scale then takes the place of an int8 activation's,
and the sum of the activations is that of the 8 all-plus entries, so that what a lookup loses, the correction loses too.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from golden import act_formats, group_dequant, lut_tensor_core
from spec.act_formats import RECIPROCAL_BITS, ActFormat
from spec.config import K_GROUP

_SUM_BITS = 20
"""Of a sum of four magnitudes in fixed point."""

ENTRY_ERROR = 0.5 + 2.0**-8
"""An entry times the scale is this many scales or less from the sum of the fixed-point activations: rounding, reciprocal."""


@dataclass(frozen=True)
class Tables:
    """Of M tokens with G groups."""

    entries: Tensor
    """int8 (M, G, 8 tables, 8 entries), in [-127, 127]: numbered as `lut_tensor_core.tables`"""
    d: Tensor
    """int64 (M, G): bfloat16 bits of half of the scale; times the token's scale of `act_formats.to_format`"""

    @property
    def sum_acts(self) -> Tensor:
        """A: int64 (M, G), twice the sum of the 8 all-plus entries. All-plus is the negative of entry 0."""
        return -2 * self.entries[..., 0].sum(-1, dtype=torch.int64)


def table_scale(most: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(m, wide, p) of the largest sums of four magnitudes M, int64 below 2^20: the scale is m * 2^(5 + wide - p) >= M / 127.

    p: places by which M is shifted to the left of 20 bits. m: 8 bits, the least that will do; 0 where M = 0.
    """
    length = torch.frexp(most.double())[1].to(torch.int64)  # of M in bits
    p = _SUM_BITS - length.clamp(min=1)
    m = ((most << p) + 31 >> 5) + 126
    m = m // 127  # ceil(M 2^p / 4064): 130 to 259, 0 for M = 0
    wide = (m > 255).to(torch.int64)
    return m + wide >> wide, wide, p


def quantise(bits: Tensor, form: ActFormat) -> Tables:
    """Tables of activations' bit patterns: int64 (M, K)."""
    v, unit = act_formats.fixed_group(bits.unflatten(-1, (-1, K_GROUP)), form)  # (M, G, 32), (M, G)
    cells = v.abs().unflatten(-1, (-1, lut_tensor_core.TABLE_K))
    most = cells.sum(-1).amax(-1)  # M, (M, G)
    m, wide, p = table_scale(most)
    reciprocal = ((1 << RECIPROCAL_BITS) - 1) // m.clamp(min=1)
    table = lut_tensor_core.tables(v).to(torch.int64)  # (M, G, 8, 8)
    down, up, factor = (part[..., None, None] for part in (RECIPROCAL_BITS + 5 + wide, p, reciprocal))
    entries = ((table << up) * factor + (1 << down - 1)) >> down
    field = 138 + wide - p + unit
    return Tables(entries.to(torch.int8), torch.where(m > 0, (field << 7) + m - 128, 0))


def group_sums(entries: Tensor, codes: Tensor, bits: int) -> Tensor:
    """``S[m, n] = sum_b 2^b (P_b + A / 2)`` the engine's way: int8 (M, 8, 8), codes (N, 32) -> int32 (M, N)."""
    wide = entries.to(torch.int32)
    all_plus = -wide[..., 0].sum(-1, dtype=torch.int32).unsqueeze(-1)
    return lut_tensor_core.lookups(wide, codes, bits) + ((1 << bits) - 1) * all_plus


def factors(codes: Tensor, bits: int) -> Tensor:
    """What each entry counts for in S: codes (N, K) -> float32 (K / 32, 64, N)."""
    outputs = codes.shape[0]
    nibbles = lut_tensor_core.plane_nibbles(codes.reshape(-1, K_GROUP), bits)  # (bits, N G, 8)
    total = torch.zeros(*nibbles.shape[1:], 8)
    for plane, nibble in enumerate(nibbles.to(torch.int64).unbind()):
        sign = (1 - 2 * (nibble >> 3)).to(torch.float32)
        total.scatter_add_(-1, (nibble & 7).unsqueeze(-1), (sign * 2**plane).unsqueeze(-1))
    total[..., 0] -= (1 << bits) - 1  # all-plus is the negative of entry 0
    return total.reshape(outputs, -1, 64).permute(1, 2, 0).contiguous()


def accumulate(tables: Tables, weights: group_dequant.GroupWeights) -> Tensor:
    """acc (M, N) int64: section 3b with S and A of the tables."""

    def sums(groups: slice) -> Tensor:
        columns = slice(groups.start * K_GROUP, groups.stop * K_GROUP)
        e = tables.entries[:, groups].flatten(-2).transpose(0, 1).to(torch.float32)  # (G, M, 64)
        # below 2^20: binary32 holds it exactly
        return torch.bmm(e, factors(weights.codes[:, columns], weights.bits)).to(torch.int64)

    return group_dequant.accumulate_sums(sums, tables.sum_acts, tables.d, weights)


def matmul_float(bits: Tensor, form: ActFormat, token_scale: Tensor, weights: group_dequant.GroupWeights) -> Tensor:
    """What the tables stand for, in float64: activations of the format times the weights, (M, N)."""
    x = act_formats.value_of(bits, form) * token_scale.double().unsqueeze(-1)
    return x @ group_dequant.dense(weights).T


def bound(bits: Tensor, form: ActFormat, token_scale: Tensor, weights: group_dequant.GroupWeights) -> Tensor:
    """How far `accumulate`, scaled exactly, may be from `matmul_float`: (M, N) float64. Numerics 3c says why."""
    tables = quantise(bits, form)
    scale = 2 * group_dequant.act_value(tables.d) * token_scale.double().unsqueeze(-1)  # of the tables, (M, G)
    half_step = torch.zeros_like(scale)  # of the fixed point
    if form is ActFormat.FP16:
        unit = act_formats.fixed_group(bits.unflatten(-1, (-1, K_GROUP)), form)[1]
        half_step = torch.exp2((unit - 1).double()) * token_scale.double().unsqueeze(-1)
    s, z = (group_dequant.half_value(part) for part in (weights.scale, weights.minimum))  # (N, G)
    most = (1 << weights.bits) - 1
    spread, centre = most * s.abs() / 2, (z + most * s / 2).abs()
    per_group = 8 * ENTRY_ERROR * scale + K_GROUP * half_step
    truncated = group_dequant.bound(tables.d, token_scale * group_dequant.top_scale(tables.d), weights.exponent)
    return per_group @ (spread + centre).T + truncated
