"""MixPE: group sums by gated shifts and adds on signed nibbles. Twin of rtl/mixpe.py.

Zhang et al., "MixPE" (arXiv:2411.16158): an INT4 weight in two's complement, ``w = -8 b3 + 4 b2 + 2 b1 + b0``, times an
int8 activation is four gated copies of the activation, shifted and added. An unsigned code q is stored as w = q - 8;
``sum q x = sum w x + 8 sum x``. An 8-bit code is two nibbles, the high one with weight 16.
"""

import torch
from torch import Tensor

NIBBLE_BIAS = 8


def shift_add(x: Tensor, w: Tensor) -> Tensor:
    """x * w without a multiplier: int32 x, int32 w in [-8, 7], broadcast."""
    bit = [-(w >> place & 1) for place in range(4)]  # all ones where the bit is set: two's complement masks
    return (x & bit[0]) + ((x & bit[1]) << 1) + ((x & bit[2]) << 2) - ((x & bit[3]) << 3)


def group_sums(x: Tensor, codes: Tensor, bits: int) -> Tensor:
    """``S[m, n] = sum_i codes[n, i] x[m, i]`` the engine's way: int8 (M, 32), codes (N, 32) -> int32 (M, N)."""
    if bits not in (4, 8):
        raise ValueError(f"MixPE takes weights of 4 or 8 bits, not {bits}")
    wide, code = x.to(torch.int32), codes.to(torch.int32)
    total = torch.zeros(x.shape[0], codes.shape[0], dtype=torch.int32)
    for nibble in reversed(range(bits // 4)):  # the high one first
        w = (code >> 4 * nibble & 15) - NIBBLE_BIAS
        total = 16 * total + shift_add(wide[:, None, :], w[None]).sum(-1, dtype=torch.int32)
    bias = NIBBLE_BIAS if bits == 4 else NIBBLE_BIAS * 17
    return total + bias * wide.sum(-1, keepdim=True, dtype=torch.int32)
