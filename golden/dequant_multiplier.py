"""Dequantisation in the loop: every weight is scaled before it is multiplied. Twin of rtl/dequant_multiplier.py.

The baseline that LUT Tensor Core (Mo et al., ISCA 2025) and MixPE (Zhang et al., arXiv:2411.16158) compare with: codes become
weights of 16 bits, weights meet activations in a multiplier. Here a weight is a fixed-point number, in units of
``2^(E - 25 - align_bits)``: ``w = s q + z`` with ``s = m_s << align_bits >> (E - e_s)`` and z likewise from the minimum
(docs/numerics.md section 3b has m, e and E). An 8-bit code is two nibbles, the high one first and with weight 16.
"""

import torch
from torch import Tensor

from golden.group_dequant import half_parts

NIBBLE = 4


def aligned(halves: Tensor, exponent: int, align_bits: int) -> Tensor:
    """``m << align_bits >> (E - e)`` of FP16 bits, rounded down: the only rounding of this engine. int64."""
    significand, field = half_parts(halves)
    return (significand << align_bits) >> (exponent - field)


def weights(codes: Tensor, scale: Tensor, minimum: Tensor, exponent: int, *, bits: int, align_bits: int) -> Tensor:
    """Dequantised nibbles, those of the high nibbles first: codes (N, 32), FP16 bits (N,) -> int64 (bits / 4, N, 32).

    ``s q`` of a high nibble, ``s q + z`` of a low one. 16 + align_bits bits hold them.
    """
    if bits not in (4, 8):
        raise ValueError(f"the dequantising multiplier takes weights of 4 or 8 bits, not {bits}")
    s, z = (aligned(halves, exponent, align_bits).unsqueeze(-1) for halves in (scale, minimum))
    code = codes.to(torch.int64)
    nibbles = [code >> NIBBLE * place & 15 for place in reversed(range(bits // NIBBLE))]
    return torch.stack([s * nibble for nibble in nibbles[:-1]] + [s * nibbles[-1] + z])


def group_values(
    x: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor, exponent: int, *, bits: int, align_bits: int = 0
) -> Tensor:
    """``V[m, n] = sum_i w[n, i] x[m, i]`` of one group: int8 (M, 32), codes (N, 32), FP16 bits (N,) -> int64 (M, N)."""
    wide = x.to(torch.int64)[:, None, :]
    value = torch.zeros(x.shape[0], codes.shape[0], dtype=torch.int64)
    for nibble in weights(codes, scale, minimum, exponent, bits=bits, align_bits=align_bits):
        value = (value << NIBBLE) + (nibble[None] * wide).sum(-1)
    return value
