"""The baseline engine: group sums by multipliers, dequantised after the group as the others. Twin of rtl/multiplier.py."""

import torch
from torch import Tensor


def group_sums(x: Tensor, codes: Tensor, bits: int) -> Tensor:
    """``S[m, n] = sum_i codes[n, i] x[m, i]``: int8 (M, 32), codes (N, 32) of 4 or 8 bits -> int32 (M, N)."""
    if bits not in (4, 8):
        raise ValueError(f"the multiplier engine takes weights of 4 or 8 bits, not {bits}")
    return (x.to(torch.int32)[:, None, :] * codes.to(torch.int32)[None]).sum(-1, dtype=torch.int32)
