"""Packs weights the slow way, straight from the text of spec/layout.py: test input that owes nothing to the driver."""

import struct

import numpy as np
from numpy.typing import NDArray

from spec.config import TlmmConfig, ceil_div
from spec.layout import STREAM_MAGIC, SegmentKind, dense_byte

__all__ = ["aux_segment", "matrix_rows", "matrix_segment", "rows_segment", "segment"]


def segment(kind: int, payload: bytes, rows: int, weight_bytes: int, *, magic: int = STREAM_MAGIC) -> bytes:
    """Header beat and payload beats of a segment."""
    beats = ceil_div(len(payload), weight_bytes)
    header = struct.pack("<4I", magic, kind, beats, rows)
    return header.ljust(weight_bytes, b"\0") + payload.ljust(beats * weight_bytes, b"\0")


def aux_segment(payload: bytes, weight_bytes: int) -> bytes:
    """A segment of raw bytes."""
    return segment(SegmentKind.AUX, payload, 0, weight_bytes)


def matrix_rows(planes: NDArray[np.int8], cfg: TlmmConfig) -> list[list[int]]:
    """Group values of the rows of (P, N, K) trits: cell q*tables + t of row (p, kb, nb), planes from the highest."""
    count, n, k = planes.shape
    k_blocks, row_blocks = ceil_div(k, cfg.k_block), ceil_div(n, cfg.outputs)
    padded = np.zeros((count, row_blocks * cfg.outputs, k_blocks * cfg.k_block), dtype=int)
    padded[:, :n, :k] = planes
    trits = padded.tolist()
    rows = []
    for p in reversed(range(count)):
        for kb in range(k_blocks):
            for nb in range(row_blocks):
                row = []
                for q in range(cfg.outputs):
                    weights = trits[p][nb * cfg.outputs + q]
                    for t in range(cfg.tables):
                        first = kb * 3 * cfg.tables + 3 * t
                        row.append(weights[first] + 3 * weights[first + 1] + 9 * weights[first + 2])
                rows.append(row)
    return rows


def _digits(value: int) -> tuple[int, int, int]:
    """The one (t0, t1, t2), each -1, 0 or 1, with t0 + 3*t1 + 9*t2 = value."""
    for t0 in (-1, 0, 1):
        for t1 in (-1, 0, 1):
            for t2 in (-1, 0, 1):
                if t0 + 3 * t1 + 9 * t2 == value:
                    return t0, t1, t2
    raise ValueError(f"a group value must be in [-13, 13], not {value}")


_DIGITS = {value: _digits(value) for value in range(-13, 14)}


def rows_segment(rows: list[list[int]], weight_bytes: int) -> bytes:
    """TRITS segment of lookup rows given by their group values."""
    real, cells = len(rows), len(rows[0])
    rows = rows + [[0] * cells] * (-real % 5)
    payload = bytearray()
    for start in range(0, len(rows), 5):
        five = rows[start : start + 5]
        for third in range(3):
            for cell in range(cells):
                d, e = _DIGITS[five[3][cell]], _DIGITS[five[4][cell]]
                pair = (d[0] + 3 * d[1], e[0] + 3 * e[1], d[2] + 3 * e[2])[third]
                payload.append(dense_byte(five[third][cell], pair))
    return segment(SegmentKind.TRITS, bytes(payload), real, weight_bytes)


def matrix_segment(planes: NDArray[np.int8], cfg: TlmmConfig, weight_bytes: int) -> bytes:
    """TRITS segment of the trits (P, N, K) of a matrix."""
    return rows_segment(matrix_rows(planes, cfg), weight_bytes)
