"""A checkpoint's matrices as the engines hold them: activations in, ``y = W x`` out, in either kind of arithmetic."""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from golden import epilogue, group_dequant, norm, tlmm
from spec.config import HEAD_PLANES, K_GROUP

Activations = tuple[Tensor, ...]
"""What NORM leaves for the matrices: int8 values first, the token scale last."""


class Linear(Protocol):
    """A matrix (N, K)."""

    def norm(self, x: Tensor, gamma: Tensor | None, inv_length: Tensor, eps: Tensor) -> Activations:
        """Activations of x (M, K) as this kind of matrix takes them."""
        ...

    def __call__(self, activations: Activations) -> Tensor:
        """y (M, N), float32."""
        ...


def balanced_planes(values: Tensor, planes: int) -> Tensor:
    """Balanced ternary digits, lowest first: int8 (n, k) -> int8 (planes, n, k), values = sum 3^p plane_p."""
    rest = values.to(torch.int32)
    digits = []
    for _ in range(planes):
        digit = torch.remainder(rest + 1, 3) - 1
        digits.append(digit.to(torch.int8))
        rest = (rest - digit) // 3
    if rest.any():
        raise ValueError(f"{planes} balanced ternary digits reach {(3**planes - 1) // 2}, the matrix goes beyond")
    return torch.stack(digits)


class PlaneLinear:
    """Ternary planes with one scale (float32) or a scale a row; activations with a scale a token."""

    def __init__(self, planes: Tensor, scale: Tensor) -> None:
        self._planes = planes
        self._scale = scale

    def norm(self, x: Tensor, gamma: Tensor | None, inv_length: Tensor, eps: Tensor) -> Activations:
        """(q, scale)"""
        return norm.norm_quantise(x, gamma, inv_length, eps)

    def __call__(self, activations: Activations) -> Tensor:
        """Sections 3 of docs/numerics.md."""
        q, scale = activations
        return epilogue.dequant(tlmm.matmul(q, self._planes), self._scale, scale)


class GroupLinear:
    """Group-quantised weights; activations with a scale for each 32."""

    def __init__(self, weights: group_dequant.GroupWeights) -> None:
        self._weights = weights

    def norm(self, x: Tensor, gamma: Tensor | None, inv_length: Tensor, eps: Tensor) -> Activations:
        """(q, d, token scale)"""
        return norm.norm_quantise_groups(x, gamma, inv_length, eps)

    def __call__(self, activations: Activations) -> Tensor:
        """Section 3b of docs/numerics.md."""
        q, d, scale = activations
        acc = group_dequant.accumulate(q, d, self._weights)
        return epilogue.dequant(acc, group_dequant.weight_scale(self._weights.exponent), scale)


def half_bits(values: np.ndarray, repeat: int) -> Tensor:
    """FP16 bit patterns as int64, each so many times along the last dimension."""
    bits = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float16).view(np.int16).astype(np.int64)) & 0xFFFF
    return bits.repeat_interleave(repeat, dim=-1)


def linear(matrix: Any) -> Linear:
    """Of a ``TernaryMatrix``, ``RowMatrix`` or ``GroupMatrix`` of host_driver/weights.py."""
    if hasattr(matrix, "codes"):
        scale, minimum = (half_bits(part, matrix.group // K_GROUP) for part in (matrix.scale, matrix.minimum))
        exponent = group_dequant.largest_exponent(scale, minimum)
        codes = torch.tensor(matrix.codes)
        return GroupLinear(group_dequant.GroupWeights(codes, scale, minimum, matrix.bits, exponent))
    values = torch.tensor(matrix.values)
    scale = torch.from_numpy(np.asarray(matrix.scale, dtype=np.float32))
    return PlaneLinear(balanced_planes(values, HEAD_PLANES) if scale.dim() else values[None], scale)


def dense(matrix: Any) -> Tensor:
    """The weights in float64, of any of these or of a float array: (N, K)."""
    if isinstance(matrix, np.ndarray):
        return torch.from_numpy(matrix.astype(np.float64))
    if hasattr(matrix, "codes"):
        scale, minimum = (
            torch.from_numpy(np.repeat(part.astype(np.float64), matrix.group, axis=1))
            for part in (matrix.scale, matrix.minimum)
        )
        return torch.from_numpy(matrix.codes.astype(np.float64)) * scale + minimum
    scale = np.asarray(matrix.scale, dtype=np.float64).reshape(-1, 1)
    return torch.from_numpy(matrix.values.astype(np.float64) * scale)
