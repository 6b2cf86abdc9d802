"""ggml's blocks to `GroupMatrix`: the same weights, bit for bit, in the accelerator's one convention.

Block layouts (ggml-common.h), d and m FP16:
Q4_0: d, 16 bytes; weight = d (code - 8). Q4_1: d, m, 16 bytes; weight = d code + m. In both, byte i holds value i in its
low and value i + 16 in its high half. Q8_0: d, 32 int8; weight = d value. TQ2_0: 64 bytes, d; byte i of each half of 32
holds values i, i + 32, i + 64, i + 96, low bits first; weight = d (code - 1). TQ1_0: 48 + 4 bytes, d; a byte is a base-3
fraction: its first digit is the integer part of 3 byte / 256, and so on; byte i of 32, 16 and 4 holds digit n of value
i + 32 n, i + 16 n and i + 4 n; weight = d (digit - 1).
"""

import numpy as np
from numpy.typing import NDArray

from host_driver.weights import GroupMatrix, TernaryMatrix

UInt8 = NDArray[np.uint8]
Float16 = NDArray[np.float16]

TERNARY_GROUP = 128
"""Weights of a group that a block of 256 is split into; the scale is repeated."""

TQ1_PARTS = ((0, 32, 5), (32, 16, 5), (48, 4, 4))
"""(first byte, bytes, digits of a byte) of a TQ1_0 block."""


def _half(blocks: UInt8, start: int) -> Float16:
    """The FP16 numbers at a byte of every block. Raises ValueError on one that is not finite."""
    values = np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2")[:, 0].astype(np.float16)
    if not np.isfinite(values).all():
        raise ValueError("a block's scale or minimum is not a finite number")
    return values


def _minimum(scale: Float16, levels: int) -> Float16:
    """-levels * scale, a power of two: exact in FP16 unless it overflows."""
    with np.errstate(over="ignore"):
        minimum = scale * np.float16(-levels)
    if not np.isfinite(minimum).all():
        raise ValueError(f"a block's scale is beyond {65504 // levels}, so its smallest weight is no FP16 number")
    return minimum


def _matrix(codes: UInt8, scale: Float16, minimum: Float16, shape: tuple[int, int], *, bits: int, group: int) -> GroupMatrix:
    """Codes (blocks, values) and numbers (groups,) of all blocks, in the matrix's shape."""
    wanted = (shape[0], shape[1] // group)
    return GroupMatrix(
        codes=np.ascontiguousarray(codes).reshape(shape), scale=scale.reshape(wanted), minimum=minimum.reshape(wanted),
        bits=bits, group=group,
    )  # fmt: skip


def _nibbles(data: UInt8) -> UInt8:
    return np.concatenate([data & np.uint8(15), data >> np.uint8(4)], axis=1)


def q4_0(blocks: UInt8, shape: tuple[int, int]) -> GroupMatrix:
    """Blocks of 18 bytes."""
    scale = _half(blocks, 0)
    return _matrix(_nibbles(blocks[:, 2:]), scale, _minimum(scale, 8), shape, bits=4, group=32)


def q4_1(blocks: UInt8, shape: tuple[int, int]) -> GroupMatrix:
    """Blocks of 20 bytes."""
    return _matrix(_nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2), shape, bits=4, group=32)


def q8_0(blocks: UInt8, shape: tuple[int, int]) -> GroupMatrix:
    """Blocks of 34 bytes."""
    scale = _half(blocks, 0)
    return _matrix(blocks[:, 2:] ^ np.uint8(0x80), scale, _minimum(scale, 128), shape, bits=8, group=32)


def _ternary(codes: UInt8, scale: Float16, shape: tuple[int, int]) -> GroupMatrix | TernaryMatrix:
    """Codes 0..2 of blocks of 256: with one scale throughout (all-zero blocks may say 0) they are a ternary matrix."""
    if codes.size and int(codes.max()) > 2:
        raise ValueError("it holds codes 3, which stand for no ternary value")
    used = np.unique(scale[scale != 0])
    if len(used) == 1:
        values = (codes.view(np.int8) - np.int8(1)) * np.sign(scale).astype(np.int8)[:, None]
        return TernaryMatrix(values=values.reshape(shape), scale=abs(float(used[0])))
    per_block = codes.shape[1] // TERNARY_GROUP
    scale = np.repeat(scale, per_block)
    return _matrix(codes, scale, -scale, shape, bits=2, group=TERNARY_GROUP)


def ternary_groups(matrix: TernaryMatrix) -> GroupMatrix:
    """A ternary matrix beside group-quantised ones; its scale is an FP16 number, as a block's is."""
    outputs, inputs = matrix.shape
    scale = np.full((outputs, inputs // TERNARY_GROUP), matrix.scale, dtype=np.float16)
    codes = (matrix.values + np.int8(1)).view(np.uint8)
    return GroupMatrix(codes=codes, scale=scale, minimum=-scale, bits=2, group=TERNARY_GROUP)


def tq1_0(blocks: UInt8, shape: tuple[int, int]) -> GroupMatrix | TernaryMatrix:
    """Blocks of 54 bytes."""
    parts = []
    for start, size, digits in TQ1_PARTS:
        data = blocks[:, start : start + size]
        for digit in range(digits):
            fraction = data * np.uint8(3**digit)  # the digits in front overflow and are gone
            parts.append((fraction.astype(np.uint16) * np.uint16(3) >> np.uint16(8)).astype(np.uint8))
    return _ternary(np.concatenate(parts, axis=1), _half(blocks, 52), shape)


def tq2_0(blocks: UInt8, shape: tuple[int, int]) -> GroupMatrix | TernaryMatrix:
    """Blocks of 66 bytes."""
    halves = blocks[:, :64].reshape(-1, 2, 1, 32)
    codes = halves >> np.arange(0, 8, 2, dtype=np.uint8).reshape(1, 1, 4, 1) & np.uint8(3)
    return _ternary(codes.reshape(-1, 256), _half(blocks, 64), shape)


QUANTISED = {"Q4_0": q4_0, "Q4_1": q4_1, "Q8_0": q8_0, "TQ1_0": tq1_0, "TQ2_0": tq2_0}
"""By ggml type: (blocks, bytes) and the matrix's shape to the matrix."""


def floats(kind: str, blocks: UInt8, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """F32, F16 or BF16 as float32. Raises ValueError on a number that is not finite."""
    if kind == "BF16":
        values = (blocks.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        values = blocks.view({"F32": "<f4", "F16": "<f2"}[kind]).astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("it holds numbers that are not finite")
    return values.reshape(shape)
