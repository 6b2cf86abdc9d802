"""Weights as the Triton kernels read them: packed codes in 32-byte blocks, scales beside them.

A row of a matrix is a run of blocks of 32 bytes, that is eight 32-bit words, and a block holds P planes of 32 consecutive
weights: plane i, place r of block s is weight ``k = 32 (P s + i) + r``, and it lies in byte r of the block.

=======  =====  ==========================================================================
form     P      a byte holds, for i = 0 .. P-1
=======  =====  ==========================================================================
bits 1   8      bit i
bits 2   4      bits 2i, 2i+1
bits 4   2      bits 4i .. 4i+3
bits 8   1      the value itself, signed
trits    5      ``ceil(256/243 * sum_i 3^(4-i) digit_i)``: multiply by 3 and the carry is the next digit
=======  =====  ==========================================================================

A plane is one group of 32 activations, so one and the same shift and mask turns a word into four weights that meet four
consecutive activations: a byte-wise dot product of two words on the GEMV's side, a (outputs, 32) int8 tile for the tensor
cores on the GEMM's. Rows are padded to whole blocks with codes whose activations are zero.

Scale and minimum of a group are one word, FP16 each. Groups that lie in different planes of the same blocks lie in different
runs: ``scale[n, u, c]`` belongs to group ``g = c U + u`` of U runs, so that neighbours in a run belong to neighbouring blocks.

What is stored is a code; the weight's integer is ``code + offset`` (ternary: code 0..2, offset -1), and the offset's part of
a sum is ``offset * sum of activations``, which is known once a token.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

PLANE = 32
"""Weights of a plane, bytes of a block, and activations that share a scale where weights have groups."""

BLOCK_WORDS = PLANE // 4

TRIT_PLANES = 5

TRITS_KIND = 5
"""The `bits` argument by which kernels know the trits form."""


class Scaling(StrEnum):
    """What a matrix' scales are per; GROUP also has minima."""

    MATRIX = "matrix"
    ROW = "row"
    GROUP = "group"


def planes_of(bits: int) -> int:
    """Planes of a block: 8 / bits, or 5 for trits."""
    return TRIT_PLANES if bits == TRITS_KIND else 8 // bits


@dataclass(frozen=True, kw_only=True)
class PackedMatrix:
    """A matrix (outputs, inputs) in packed form on a device."""

    words: Tensor
    """int32 (outputs, blocks * 8)"""
    scale: Tensor
    """MATRIX: float32 (1,). ROW: float32 (outputs,). GROUP: int32 (outputs, runs, columns): scale low, minimum high."""
    scaling: Scaling
    bits: int
    """1, 2, 4, 8, or TRITS_KIND"""
    offset: int
    group: int
    """Weights of a scale; 0 where groups have none."""
    outputs: int
    inputs: int

    @property
    def padded(self) -> int:
        """Inputs of whole blocks: what an activation row must have, zeros at its end."""
        return self.words.shape[1] // BLOCK_WORDS * planes_of(self.bits) * PLANE

    @property
    def size(self) -> int:
        """Bytes that a product reads of it."""
        return 4 * (self.words.numel() + self.scale.numel())

    def codes(self) -> Tensor:
        """The stored codes, slowly: int32 (outputs, padded)."""
        raw = self.words.contiguous().view(torch.uint8).reshape(self.outputs, -1, 1, PLANE).to(torch.int32)
        if self.bits == TRITS_KIND:
            planes, rest = [], raw
            for _ in range(TRIT_PLANES):
                planes.append(rest * 3 >> 8)
                rest = rest * 3 & 0xFF
        elif self.bits == 8:
            planes = [torch.where(raw > 127, raw - 256, raw)]
        else:
            planes = [raw >> self.bits * plane & (1 << self.bits) - 1 for plane in range(planes_of(self.bits))]
        return torch.cat(planes, dim=2).reshape(self.outputs, -1)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (outputs, inputs) to words int32 (outputs, blocks * 8)."""
    planes = planes_of(bits)
    outputs, inputs = codes.shape
    blocks = -(-inputs // (planes * PLANE))
    padded = np.zeros((outputs, blocks * planes * PLANE), dtype=np.int64)
    padded[:, :inputs] = codes
    parts = padded.reshape(outputs, blocks, planes, PLANE)
    if bits == TRITS_KIND:
        value = np.zeros((outputs, blocks, PLANE), dtype=np.int64)
        for plane in range(TRIT_PLANES):
            value = 3 * value + parts[:, :, plane]
        packed = -(-256 * value // 243)
    else:
        packed = sum((parts[:, :, plane] & (1 << bits) - 1) << bits * plane for plane in range(planes))
    return np.ascontiguousarray(np.asarray(packed, dtype=np.uint8).reshape(outputs, -1)).view("<i4")


def group_runs(bits: int, group: int) -> int:
    """Runs of scales: planes of a block that belong to different groups."""
    return max(1, planes_of(bits) * PLANE // group)


def _half_pairs(scale: np.ndarray, minimum: np.ndarray, *, runs: int, columns: int) -> np.ndarray:
    """FP16 (outputs, groups) twice to int32 (outputs, runs, columns): scale in the low half, minimum in the high one."""
    low, high = (part.astype(np.float16).view(np.uint16).astype(np.uint32) for part in (scale, minimum))
    pairs = np.zeros((scale.shape[0], columns * runs), dtype=np.uint32)
    pairs[:, : scale.shape[1]] = low | high << 16
    return np.ascontiguousarray(pairs.reshape(-1, columns, runs).transpose(0, 2, 1)).view(np.int32)


def _stacked(matrices: tuple[Any, ...], name: str) -> np.ndarray:
    return np.concatenate([getattr(matrix, name) for matrix in matrices])


def pack(*matrices: Any, device: torch.device | str = "cpu", trits: bool = False) -> PackedMatrix:
    """Packs `TernaryMatrix`, `RowMatrix` or `GroupMatrix` (by their fields), several of a kind below each other.

    ``trits``: ternary weights five a byte instead of four. Raises ValueError on kinds that cannot stand below each other.
    """
    first = matrices[0]
    kinds = {"codes" if hasattr(matrix, "codes") else type(getattr(matrix, "scale", None)) is np.ndarray for matrix in matrices}
    if len(kinds) > 1:
        raise ValueError("matrices of different kinds cannot be packed below each other")
    inputs = first.shape[1]
    if hasattr(first, "codes"):  # group-quantised
        if len({(matrix.bits, matrix.group) for matrix in matrices}) > 1:
            raise ValueError("matrices of different groups or widths cannot be packed below each other")
        bits: int = 4 if first.bits == 3 else first.bits  # three bits lie in four
        offset = 128 if bits == 8 else 0  # bytes are signed to the tensor cores
        words = pack_codes(_stacked(matrices, "codes").astype(np.int64) - offset, bits)
        scaling, group = Scaling.GROUP, first.group
        runs = group_runs(bits, group)
        columns = -(-words.shape[1] // BLOCK_WORDS * planes_of(bits) * PLANE // (group * runs))
        scale = _half_pairs(_stacked(matrices, "scale"), _stacked(matrices, "minimum"), runs=runs, columns=columns)
    elif isinstance(first.scale, np.ndarray):  # a scale a row
        bits, offset, group, scaling = 8, 0, 0, Scaling.ROW
        words = pack_codes(_stacked(matrices, "values"), bits)
        scale = _stacked(matrices, "scale").astype(np.float32)
    else:  # ternary
        bits, offset, group = TRITS_KIND if trits else 2, -1, 0
        words = pack_codes(_stacked(matrices, "values").astype(np.int64) + 1, bits)
        scales = [np.full(matrix.shape[0], matrix.scale, dtype=np.float32) for matrix in matrices]
        single = len(matrices) == 1
        scaling = Scaling.MATRIX if single else Scaling.ROW
        scale = scales[0][:1] if single else np.concatenate(scales)
    return PackedMatrix(
        words=torch.from_numpy(words).to(device), scale=torch.from_numpy(scale).to(device), scaling=scaling, bits=bits,
        offset=offset, group=group, outputs=words.shape[0], inputs=inputs,
    )  # fmt: skip
