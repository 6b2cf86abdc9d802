"""Ternary table-lookup matmul: exact integer products of int8 activations and balanced-ternary planes.

`matmul` is what the golden device computes with; `lookup_matmul` goes the engine's way (tables, index codes, planes
from the highest down) and must give the same integers; `tlmm_float` is the meaning in float64.
"""

import torch
from torch import Tensor

from spec.config import GROUP, TlmmConfig
from spec.layout import GROUP_MAX, group_trits, index_code

CODES = 32
"""Index codes: 5 bits, of which 27 values occur."""

_EXACT_FLOAT32 = 1 << 24
"""Sums of integers are exact in binary32, in any order, as long as the absolute values add up to at most this."""

_WEIGHTS_AT_ONCE = 1 << 23
"""Weights that `matmul` expands at a time: bounds its memory."""


def combine(planes: Tensor) -> Tensor:
    """Integer weights of a stack of planes: sum over p of 3^p * plane_p, by Horner. int8 (P, N, K) -> int8 (N, K)."""
    weights = planes[-1].clone()
    for plane in reversed(planes[:-1]):
        weights = 3 * weights + plane  # within [-121, 121] for 5 planes
    return weights


def matmul(x: Tensor, planes: Tensor) -> Tensor:
    """y[m, n] = sum_k W[n, k] x[m, k], exactly. int8 x (M, K), int8 planes (P, N, K) of at most 5 -> int32 (M, N).

    Computed by float32 products over pieces of K so short that no partial sum can round, added as integers.
    """
    count, rows, length = planes.shape
    largest = (3**count - 1) // 2  # of |W|
    piece = _EXACT_FLOAT32 // (128 * largest)
    values = x.to(torch.float32)  # (M, K)
    sums = torch.zeros(x.shape[0], rows, dtype=torch.int32)
    strip = max(1, _WEIGHTS_AT_ONCE // length)
    for top in range(0, rows, strip):
        weights = combine(planes[:, top : top + strip]).to(torch.float32)  # (strip, K)
        for left in range(0, length, piece):
            product = values[:, left : left + piece] @ weights[:, left : left + piece].T
            sums[:, top : top + strip] += product.to(torch.int32)
    return sums


def tlmm_float(x: Tensor, planes: Tensor) -> Tensor:
    """The meaning: W x in float64, exact as long as sums stay below 2^53. (M, K), (P, N, K) -> (M, N)."""
    powers = 3.0 ** torch.arange(planes.shape[0], dtype=torch.float64)
    weights = torch.einsum("p,pnk->nk", powers, planes.to(torch.float64))
    return x.to(torch.float64) @ weights.T


def tlmm_tables(x: Tensor) -> Tensor:
    """Lookup tables of three activations each: int (..., 3) -> int64 (..., 32), entry `code` = sum_i trit_i * x_i.

    Entries that no code names are zero.
    """
    tables = torch.zeros(*x.shape[:-1], CODES, dtype=torch.int64)
    for value in range(-GROUP_MAX, GROUP_MAX + 1):
        trits = torch.tensor(group_trits(value))
        tables[..., index_code(value)] = (x.to(torch.int64) * trits).sum(-1)
    return tables


def tlmm_codes(cfg: TlmmConfig, planes: Tensor) -> Tensor:
    """Index codes of padded planes: (P, N, K) -> int64 (P, N, k_blocks, tables)."""
    count, rows, length = planes.shape
    groups = planes.to(torch.int64).reshape(count, rows, length // cfg.k_block, cfg.tables, GROUP)
    values = groups[..., 0] + 3 * groups[..., 1] + 9 * groups[..., 2]
    return torch.where(values < 0, 16 - values, values)


def tlmm_lookup(tables: Tensor, codes: Tensor) -> Tensor:
    """One pass: each output's codes look up the tables, and the entries add up. (T, 32), (N, T) -> int64 (N,)."""
    return tables.expand(codes.shape[0], -1, -1).gather(-1, codes[..., None]).sum((-1, -2))


def lookup_matmul(cfg: TlmmConfig, x: Tensor, planes: Tensor) -> Tensor:
    """The engine's way, for padded sizes: int8 x (M, K), planes (P, N, K), K a multiple of k_block -> int64 (M, N).

    Planes from the highest down, K blocks within a plane, tokens within a K block; a plane begins by tripling the sums.
    """
    tokens, length = x.shape
    tables = tlmm_tables(x.reshape(tokens, length // cfg.k_block, cfg.tables, GROUP))  # (M, KB, T, 32)
    codes = tlmm_codes(cfg, planes)  # (P, N, KB, T)
    acc = torch.zeros(tokens, planes.shape[1], dtype=torch.int64)
    for plane in reversed(range(planes.shape[0])):
        for block in range(length // cfg.k_block):
            for token in range(tokens):
                base = 3 * acc[token] if block == 0 else acc[token]
                acc[token] = base + tlmm_lookup(tables[token, block], codes[plane, :, block])
    return acc
