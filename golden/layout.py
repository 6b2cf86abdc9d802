"""Reads the weight stream as `spec/layout.py` describes it: the packer's judge, written without its source.

Bytes -> segments (`read_stream`) -> group values of lookup rows (`unpack_rows`) -> trits of planes (`unpack_segment`).
Everything illegal is a ValueError that says where.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from golden.fp import h2f
from golden.group_dequant import GroupWeights
from golden.lut_tensor_core import codes_of_nibbles
from golden.mixpe import NIBBLE_BIAS
from spec.config import GROUP, K_GROUP, AcceleratorConfig, GroupEngine, GroupMatmulConfig, ceil_div
from spec.layout import (
    BYTES_PER_CELL,
    DENSE_CODES,
    GROUP_MAX,
    PAIR_MAX,
    ROWS_PER_SUPERBEAT,
    STREAM_MAGIC,
    SegmentKind,
    dense_values,
    group_trits,
)

HEADER_BYTES = 16
"""Bytes of a header beat that mean something."""

_GROUP_OF, _PAIR_OF = np.array([dense_values(byte) for byte in range(DENSE_CODES)], dtype=np.int8).T
_TRITS_OF = np.array([group_trits(value) for value in range(-GROUP_MAX, GROUP_MAX + 1)], dtype=np.int8)


@dataclass(frozen=True)
class Header:
    """First beat of a segment: ``beats`` of payload follow; ``rows`` real lookup rows (TRITS) or bits of a weight (GROUPS)."""

    kind: SegmentKind
    beats: int
    rows: int


def read_header(beat: bytes) -> Header:
    """Header of a segment, from its first beat."""
    if len(beat) < HEADER_BYTES:
        raise ValueError(f"a segment header has {HEADER_BYTES} bytes, the stream only {len(beat)} more")
    magic, kind, beats, rows = struct.unpack("<4I", beat[:HEADER_BYTES])
    if magic != STREAM_MAGIC:
        raise ValueError(f"a segment must begin with {STREAM_MAGIC:#010x}, not {magic:#010x}")
    return Header(SegmentKind(kind), beats, rows)


def read_stream(stream: bytes, weight_bytes: int) -> Iterator[tuple[Header, bytes]]:
    """(header, payload) of every segment of a stream of beats of ``weight_bytes``."""
    start = 0
    while start < len(stream):
        try:
            header = read_header(stream[start : start + weight_bytes])
        except ValueError as error:
            raise ValueError(f"byte {start} of the stream: {error}") from error
        body = start + weight_bytes
        start = body + header.beats * weight_bytes
        if start > len(stream):
            raise ValueError(f"the segment at byte {body - weight_bytes} ends at {start}, the stream at {len(stream)}")
        yield header, stream[body:start]


def unpack_rows(payload: bytes | NDArray[np.uint8], rows: int, cells: int) -> NDArray[np.int8]:
    """Group values in [-13, 13] of the lookup rows of a TRITS payload: (rows, cells)."""
    data = np.frombuffer(payload, dtype=np.uint8)
    superbeats = ceil_div(rows, ROWS_PER_SUPERBEAT)
    size = superbeats * BYTES_PER_CELL * cells
    if data.size != size:
        raise ValueError(f"{rows} rows of {cells} cells take {size} bytes, not {data.size}")
    if data.size and data.max() >= DENSE_CODES:
        place = int(np.argmax(data >= DENSE_CODES))
        raise ValueError(f"byte {place} of the payload must be below {DENSE_CODES}, not {data[place]}")
    data = data.reshape(superbeats, BYTES_PER_CELL, cells)
    values = np.empty((superbeats, ROWS_PER_SUPERBEAT, cells), dtype=np.int8)
    values[:, :3] = _GROUP_OF[data]  # rows A, B, C
    pairs = _PAIR_OF[data]
    a, b, c = pairs[:, 0], pairs[:, 1], pairs[:, 2]
    c0 = (c + PAIR_MAX) % 3 - 1  # balanced digits: c = c0 + 3*c1
    c1 = (c - c0) // 3
    values[:, 3] = a + 9 * c0  # row D
    values[:, 4] = b + 9 * c1  # row E
    return values.reshape(-1, cells)[:rows]


def unpack_segment(
    payload: bytes | NDArray[np.uint8], *, planes: int, k_blocks: int, row_blocks: int, tables: int, outputs: int
) -> NDArray[np.int8]:
    """Trits of a TRITS payload, padding included: (planes, row_blocks*outputs, k_blocks*3*tables), plane 0 first."""
    groups = unpack_rows(payload, planes * k_blocks * row_blocks, tables * outputs)
    trits = _TRITS_OF[groups + np.int8(GROUP_MAX)]
    # row p', kb, nb holds cell q*tables + t; planes lie in the order P-1 .. 0
    trits = trits.reshape(planes, k_blocks, row_blocks, outputs, tables * GROUP)[::-1]
    return np.ascontiguousarray(trits.transpose(0, 2, 3, 1, 4)).reshape(planes, row_blocks * outputs, -1)


def unpack_matrix(memory: NDArray[np.uint8], config: AcceleratorConfig, k_blocks: int, row_blocks: int, planes: int) -> Tensor:
    """Planes of the operation whose TRITS segment begins at ``memory[0]``: int8 (planes, n, k), padding included."""
    beat = config.bus.weight_bytes
    header = read_header(memory[:beat].tobytes())
    rows = planes * k_blocks * row_blocks
    if header.kind is not SegmentKind.TRITS or header.rows != rows:
        raise ValueError(f"an operation of {rows} lookup rows meets a {header.kind.name} segment of {header.rows}")
    trits = unpack_segment(
        memory[beat : beat + header.beats * beat],
        planes=planes,
        k_blocks=k_blocks,
        row_blocks=row_blocks,
        tables=config.tlmm.tables,
        outputs=config.tlmm.outputs,
    )
    return torch.from_numpy(trits)


def _nibbles(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Nibbles of bytes, the lower first: (..., n) -> (..., 2n)."""
    return np.stack((rows & np.uint8(15), rows >> np.uint8(4)), axis=-1).reshape(*rows.shape[:-1], -1)


def unpack_codes(rows: NDArray[np.uint8], bits: int, cfg: GroupMatmulConfig) -> NDArray[np.uint8]:
    """Codes of the code rows of blocks: (blocks, bits, 4 * lanes) bytes -> (blocks, lanes, 32)."""
    blocks, lanes = rows.shape[0], cfg.lanes
    if cfg.engine is GroupEngine.LUT_TENSOR_CORE:
        cells = _nibbles(rows).reshape(blocks, bits, lanes, -1)[:, ::-1]  # lowest plane first
        planes = torch.from_numpy(np.ascontiguousarray(cells.transpose(1, 0, 2, 3)).reshape(bits, blocks * lanes, -1))
        return codes_of_nibbles(planes.to(torch.int32)).numpy().astype(np.uint8).reshape(blocks, lanes, K_GROUP)
    codes = (_nibbles(rows) ^ np.uint8(NIBBLE_BIAS)).reshape(blocks, 4, bits // 4, lanes // 4, K_GROUP)
    value = codes[:, :, 0] if bits == 4 else codes[:, :, 0] << np.uint8(4) | codes[:, :, 1]
    return value.reshape(blocks, lanes, K_GROUP)


def unpack_groups(
    memory: NDArray[np.uint8], config: AcceleratorConfig, k_blocks: int, row_blocks: int, bits: int, exponent: int
) -> GroupWeights:
    """The matrix of the operation whose GROUPS segment begins at ``memory[0]``, padding included."""
    cfg = config.matmul
    assert isinstance(cfg, GroupMatmulConfig), "only group devices read GROUPS"
    beat = config.bus.weight_bytes
    header = read_header(memory[:beat].tobytes())
    blocks = k_blocks * row_blocks
    beats = blocks * cfg.block_rows(bits) * config.row_beats
    if header.kind is not SegmentKind.GROUPS or header.rows != bits or header.beats != beats:
        raise ValueError(
            f"an operation of {beats} beats of {bits}-bit weights meets a {header.kind.name} segment of "
            f"{header.beats} beats, {header.rows} bits"
        )
    if bits not in cfg.weight_bits:
        raise ValueError(f"engine {cfg.engine} takes weights of {cfg.weight_bits} bits, not {bits}")
    rows = memory[beat : beat + beats * beat].reshape(row_blocks, k_blocks, cfg.block_rows(bits), cfg.row_bytes)
    halves = np.ascontiguousarray(rows[:, :, 0]).view("<i2").reshape(row_blocks, k_blocks, 2, cfg.lanes)
    scale, minimum = (
        torch.from_numpy(halves[:, :, part].transpose(0, 2, 1).reshape(-1, k_blocks).astype(np.int64)) & 0xFFFF
        for part in range(2)
    )
    codes = unpack_codes(rows[:, :, 1:].reshape(blocks, bits, -1), bits, cfg)
    codes = codes.reshape(row_blocks, k_blocks, cfg.lanes, K_GROUP).transpose(0, 2, 1, 3)
    matrix = torch.from_numpy(np.ascontiguousarray(codes).reshape(row_blocks * cfg.lanes, -1))
    return GroupWeights(codes=matrix, scale=scale, minimum=minimum, bits=bits, exponent=exponent)


def unpack_channels(words: Tensor) -> tuple[Tensor, Tensor]:
    """Offset, float32, and shift in [-128, 127] of channel words (any shape, int32)."""
    shift = words >> 16 & 0xFF
    return h2f(words & 0xFFFF), torch.where(shift >= 128, shift - 256, shift)
