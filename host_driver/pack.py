"""Weights to bytes, exactly as `spec/layout.py` says: dense superbeats, stream segments, embedding and RoPE tables."""

import numpy as np
from numpy.typing import NDArray

from spec.config import GROUP, TlmmConfig, ceil_div
from spec.layout import (
    BYTES_PER_CELL,
    DENSE_CODES,
    GROUP_MAX,
    PAIR_MAX,
    ROWS_PER_SUPERBEAT,
    STREAM_MAGIC,
    SegmentKind,
    dense_byte,
    embed_header_words,
    embed_row_bytes,
)

Int8 = NDArray[np.int8]
UInt8 = NDArray[np.uint8]

_PAIRS = 2 * PAIR_MAX + 1

_DENSE = np.array(
    [dense_byte(code // _PAIRS - GROUP_MAX, code % _PAIRS - PAIR_MAX) for code in range(DENSE_CODES)], dtype=np.uint8
)
"""Dense byte of (group + 13) * 9 + (pair + 4)."""

_HIGH_TRIT = np.array([(value + GROUP_MAX) // 9 - 1 for value in range(-GROUP_MAX, GROUP_MAX + 1)], dtype=np.int8)
"""Third trit of a group value, by group + 13; what remains is the pair of its first two."""


def ternary_planes(values: Int8, planes: int) -> Int8:
    """Balanced ternary digits (planes, n, k) of integers (n, k): value = sum over p of 3**p * plane[p]."""
    limit = (3**planes - 1) // 2
    rest = values.astype(np.int16)
    if rest.size and int(np.abs(rest).max()) > limit:
        raise ValueError(f"{planes} ternary planes hold [-{limit}, {limit}], not {int(np.abs(rest).max())}")
    digits = np.empty((planes, *values.shape), dtype=np.int8)
    for plane in range(planes):
        digit = (rest + 1) % 3 - 1
        digits[plane] = digit
        rest = (rest - digit) // 3
    return digits


def lookup_rows(plane: Int8, tlmm: TlmmConfig) -> Int8:
    """Group values (k_blocks * row_blocks, cells) of a ternary matrix (n, k), in the order of the engine's lookups."""
    n, k = plane.shape
    row_blocks, k_blocks = ceil_div(n, tlmm.outputs), ceil_div(k, tlmm.k_block)
    padded_n, padded_k = row_blocks * tlmm.outputs, k_blocks * tlmm.k_block
    if (padded_n, padded_k) != (n, k):
        plane = np.pad(plane, ((0, padded_n - n), (0, padded_k - k)))
    trits = plane.reshape(padded_n, padded_k // GROUP, GROUP)
    groups = trits[..., 2] * np.int8(3)
    groups += trits[..., 1]
    groups *= np.int8(3)
    groups += trits[..., 0]
    blocks = groups.reshape(row_blocks, tlmm.outputs, k_blocks, tlmm.tables)
    return blocks.transpose(2, 0, 1, 3).reshape(k_blocks * row_blocks, tlmm.cells)


def pack_rows(rows: Int8) -> UInt8:
    """Dense superbeats of lookup rows (rows, cells), padded with zero rows to a multiple of five."""
    count, cells = rows.shape
    superbeats = ceil_div(count, ROWS_PER_SUPERBEAT)
    rows = np.pad(rows, ((0, superbeats * ROWS_PER_SUPERBEAT - count), (0, 0)))
    five = rows.reshape(superbeats, ROWS_PER_SUPERBEAT, cells)
    d, e = five[:, 3], five[:, 4]
    d_high, e_high = _HIGH_TRIT[d + np.int8(GROUP_MAX)], _HIGH_TRIT[e + np.int8(GROUP_MAX)]
    nine = np.int8(9)
    pairs = np.stack((d - nine * d_high, e - nine * e_high, d_high + np.int8(3) * e_high), axis=1)
    codes = (five[:, :BYTES_PER_CELL] + np.int8(GROUP_MAX)).astype(np.uint8)
    codes *= np.uint8(_PAIRS)
    codes += (pairs + np.int8(PAIR_MAX)).astype(np.uint8)
    return _DENSE[codes].reshape(-1)


def pack_matrix(values: Int8, tlmm: TlmmConfig, planes: int = 1) -> UInt8:
    """Payload of the TRITS segment of an operation: matrix (n, k), highest plane first."""
    digits = ternary_planes(values, planes) if planes > 1 else values[None]
    rows = [lookup_rows(digits[plane], tlmm) for plane in reversed(range(planes))]
    return pack_rows(np.concatenate(rows) if planes > 1 else rows[0])


def trits_payload_bytes(n: int, k: int, tlmm: TlmmConfig, planes: int = 1) -> int:
    """Bytes that `pack_matrix` gives."""
    return ceil_div(tlmm.matmul_rows(k, n, planes), ROWS_PER_SUPERBEAT) * BYTES_PER_CELL * tlmm.cells


def segment(kind: SegmentKind, payload: UInt8, *, beat_bytes: int, rows: int = 0) -> UInt8:
    """Header beat and payload, padded with zeros to whole beats. `rows`: lookup rows of TRITS, padding excluded."""
    beats = ceil_div(len(payload), beat_bytes)
    data = np.zeros((beats + 1) * beat_bytes, dtype=np.uint8)
    data[:16] = np.array([STREAM_MAGIC, kind, beats, rows], dtype="<u4").view(np.uint8)
    data[beat_bytes : beat_bytes + len(payload)] = payload
    return data


def embedding_table(values: Int8, scale: NDArray[np.floating]) -> UInt8:
    """Rows of the embedding table: header and int8 values (vocab, hidden).

    ``scale``: FP32 (vocab,), or FP16 (vocab, hidden / 32) for group devices.
    """
    vocab, hidden = values.shape
    grouped = scale.ndim == 2
    table = np.zeros((vocab, embed_row_bytes(hidden, grouped=grouped)), dtype=np.uint8)
    header = np.ascontiguousarray(scale.reshape(vocab, -1), dtype="<f2" if grouped else "<f4").view(np.uint8)
    table[:, : header.shape[1]] = header
    body = 8 * embed_header_words(hidden, grouped=grouped)
    table[:, body : body + hidden] = values.view(np.uint8)
    return table.reshape(-1)


def rope_table(*, positions: int, head_dim: int, theta: float) -> NDArray[np.float32]:
    """(positions, head_dim): cos, sin of pair 0, then of pair 1, ..., each the binary32 next to its float64 value."""
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angle = np.arange(positions, dtype=np.float64)[:, None] * frequency
    return np.stack((np.cos(angle), np.sin(angle)), axis=-1).reshape(positions, head_dim).astype(np.float32)
