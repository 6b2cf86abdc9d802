"""Group-quantised matrices to bytes, exactly as `spec/layout.py` says ("Groups"): scale rows, bit planes or nibbles."""

import numpy as np
from numpy.typing import NDArray

from host_driver.weights import GroupMatrix
from spec.config import K_GROUP, GroupEngine, GroupMatmulConfig, ceil_div

__all__ = ["groups_payload_bytes", "matrix_exponent", "pack_groups"]

UInt8 = NDArray[np.uint8]
UInt16 = NDArray[np.uint16]
UInt32 = NDArray[np.uint32]

_FP16_EXPONENT_ONES = 31
"""Exponent field of infinities and NaNs."""

_CELL_TOPS = 0x11111111
"""Lowest bit of each of a word's eight nibbles."""

_WORDS_OF_NIBBLES = K_GROUP * 4 // 32
"""32-bit words of a group of nibbles."""


def groups_payload_bytes(n: int, k: int, bits: int, cfg: GroupMatmulConfig) -> int:
    """Bytes that `pack_groups` gives."""
    return ceil_div(n, cfg.lanes) * ceil_div(k, K_GROUP) * cfg.block_rows(bits) * cfg.row_bytes


def matrix_exponent(matrix: GroupMatrix) -> int:
    """E of docs/numerics.md section 3b: the largest FP16 exponent field of the scales and minima, at least 1."""
    return max(1, *(int(_exponents(part).max(initial=0)) for part in (matrix.scale, matrix.minimum)))


def pack_groups(matrix: GroupMatrix, cfg: GroupMatmulConfig) -> UInt8:
    """Payload of the GROUPS segment of a matrix; missing outputs of the last block have code, scale and minimum 0."""
    if matrix.bits not in cfg.weight_bits:
        raise ValueError(
            f"engine {cfg.engine} takes weights of {cfg.weight_bits} bits, not {matrix.bits}: "
            f"quantise to one of them, or take a preset with another engine"
        )
    n, k = matrix.shape
    highest = int(matrix.codes.max(initial=0))
    if highest >> matrix.bits:
        raise ValueError(f"codes of {matrix.bits} bits are below {1 << matrix.bits}, not {highest}")
    if _FP16_EXPONENT_ONES in (int(_exponents(part).max(initial=0)) for part in (matrix.scale, matrix.minimum)):
        raise ValueError("scales and minima must be finite FP16 numbers")

    blocks, groups = ceil_div(n, cfg.lanes), k // K_GROUP
    payload = np.zeros((blocks, groups, cfg.block_rows(matrix.bits), cfg.lanes), dtype="<u4")
    halves = payload[:, :, 0].view("<u2").reshape(blocks, groups, 2, cfg.lanes)
    for place, part in enumerate((matrix.scale, matrix.minimum)):
        each = np.repeat(part.astype("<f2").view("<u2"), matrix.group // K_GROUP, axis=1)
        halves[:, :, place] = _blocks(each, blocks, cfg.lanes)
    rows = payload[:, :, 1:]
    if cfg.engine is GroupEngine.LUT_TENSOR_CORE:
        _fill_planes(rows, matrix, cfg)
    else:
        _fill_nibbles(rows, matrix, cfg)
    return payload.reshape(-1).view(np.uint8)


def _exponents(values: NDArray[np.float16]) -> UInt16:
    return values.view(np.uint16) >> np.uint16(10) & np.uint16(_FP16_EXPONENT_ONES)


def _blocks(values: np.ndarray, blocks: int, lanes: int) -> np.ndarray:
    """(n, groups, ...) to (blocks, groups, lanes, ...), padded with zero outputs."""
    padding = [(0, blocks * lanes - values.shape[0])] + [(0, 0)] * (values.ndim - 1)
    if padding[0][1]:
        values = np.pad(values, padding)
    return values.reshape(blocks, lanes, *values.shape[1:]).swapaxes(1, 2)


def _fill_planes(rows: UInt32, matrix: GroupMatrix, cfg: GroupMatmulConfig) -> None:
    """Bit planes, highest first: (blocks, groups, bits, lanes), one 32-bit word an output."""
    blocks = rows.shape[0]
    for row in range(matrix.bits):
        bit = np.uint8(1 << (matrix.bits - 1 - row))
        words = np.packbits(matrix.codes & bit, axis=1, bitorder="little").view("<u4")
        negative = words >> np.uint32(3) & np.uint32(_CELL_TOPS)
        words ^= negative * np.uint32(7)  # equation 6: the lower three bits, complemented where the highest is 1
        rows[:, :, row] = _blocks(words, blocks, cfg.lanes)


def _fill_nibbles(rows: UInt32, matrix: GroupMatrix, cfg: GroupMatmulConfig) -> None:
    """Nibbles less 8, in two's complement; of 8-bit codes the high ones in even rows, the low ones in odd rows."""
    blocks, groups = rows.shape[:2]
    digits = matrix.bits // 4
    nibbles = rows.reshape(blocks, groups, cfg.slices, digits, cfg.dequant_lanes, _WORDS_OF_NIBBLES)
    for row in range(digits):
        shift = np.uint8(4 * (digits - 1 - row))
        code = matrix.codes >> shift & np.uint8(15) if digits > 1 else matrix.codes
        pairs = code[:, 0::2] | code[:, 1::2] << np.uint8(4)
        words = pairs.view("<u4").reshape(len(pairs), groups, _WORDS_OF_NIBBLES)
        here = _blocks(words, blocks, cfg.lanes) ^ np.uint32(8 * _CELL_TOPS)
        nibbles[:, :, :, row] = here.reshape(blocks, groups, cfg.slices, cfg.dequant_lanes, _WORDS_OF_NIBBLES)
