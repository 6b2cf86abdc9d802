"""LUT Tensor Core: group sums by table lookups on bit planes. Twin of rtl/lut_tensor_core.py.

Mo et al., "LUT Tensor Core" (ISCA 2025), with the equations' numbers: an unsigned code q of B bits is read as
``q' = 2q - (2^B - 1)`` (1-3), whose bits all mean +-1; a table of 4 activations has 8 entries, the others being their
negatives (5); which entry, and whether to negate, is laid down in the packed bits (6). What the reinterpretation takes
away comes back through the sum of the activations: ``sum q x = (sum q' x + (2^B - 1) sum x) / 2``, an exact division.
"""

import torch
from torch import Tensor

from spec.config import K_GROUP

TABLE_K = 4
"""Activations of a table."""


def tables(x: Tensor) -> Tensor:
    """Entries of all tables: integers (..., 32) -> int32 (..., 8 tables, 8 entries); entry w2w1w0 is -x3 +- x2 +- x1 +- x0."""
    inputs = x.to(torch.int32).unflatten(-1, (K_GROUP // TABLE_K, TABLE_K))
    entry = torch.arange(8)
    signs = torch.stack([2 * (entry >> bit & 1) - 1 for bit in range(3)] + [torch.full((8,), -1)])  # (4, 8)
    return (inputs.unsqueeze(-1) * signs.to(torch.int32)).sum(-2, dtype=torch.int32)


def plane_nibbles(codes: Tensor, bits: int) -> Tensor:
    """Packed nibbles of the planes, lowest plane first: codes (N, 32) -> (bits, N, 8), sign in bit 3 (equation 6)."""
    planes = torch.stack([codes.to(torch.int32) >> plane & 1 for plane in range(bits)])
    cells = planes.unflatten(-1, (K_GROUP // TABLE_K, TABLE_K))
    index = cells[..., 0] + 2 * cells[..., 1] + 4 * cells[..., 2]
    negative = cells[..., 3]
    return torch.where(negative == 1, 7 - index, index) + 8 * negative


def codes_of_nibbles(nibbles: Tensor) -> Tensor:
    """Back from `plane_nibbles`: (bits, N, 8) -> codes (N, 32)."""
    negative = nibbles >> 3
    index = torch.where(negative == 1, 7 - (nibbles & 7), nibbles & 7)
    cells = torch.stack([index & 1, index >> 1 & 1, index >> 2, negative], dim=-1).flatten(-2)  # (bits, N, 32)
    return sum((plane << number for number, plane in enumerate(cells)), torch.zeros_like(cells[0]))


def lookups(table: Tensor, codes: Tensor, bits: int) -> Tensor:
    """``sum_b 2^b P_b``: entries int32 (M, 8, 8), codes (N, 32) -> int32 (M, N)."""
    total = torch.zeros(table.shape[0], codes.shape[0], dtype=torch.int32)
    for plane in reversed(plane_nibbles(codes, bits).unbind()):  # highest first
        chosen = torch.stack([table[:, t][:, plane[:, t] & 7] for t in range(table.shape[1])])  # (8, M, N)
        sign = 1 - 2 * (plane.T >> 3).unsqueeze(1)  # (8, 1, N)
        total = 2 * total + (chosen * sign).sum(0, dtype=torch.int32)
    return total


def group_sums(x: Tensor, codes: Tensor, bits: int) -> Tensor:
    """``S[m, n] = sum_i codes[n, i] x[m, i]`` the engine's way: int8 (M, 32), codes (N, 32) -> int32 (M, N)."""
    activations = x.sum(-1, dtype=torch.int32).unsqueeze(-1)
    return (lookups(tables(x), codes, bits) + ((1 << bits) - 1) * activations) >> 1
