"""Float matrices to `GroupMatrix`: round to nearest, or the scale and minimum with the least squared error.

Codes are always rounded against the scale and minimum as FP16 holds them. Symmetric forms have minimum =
-2^(bits-1) scale, so that zero is a code: ggml's Q4_0 rule (the value of largest magnitude, with its sign, gets the
lowest code), for 8 bits its Q8_0 rule (scale = max |w| / 127), for 1 bit -a and +a (minimum = -scale / 2).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from host_driver.weights import CODE_BITS, GROUP_SIZES, GroupMatrix

Float32 = NDArray[np.float32]

CHUNK = 1 << 16
"""Weights that are worked on at once: the search stays in the cache."""

RANGES = np.linspace(0.55, 1.0, 8, dtype=np.float32)
"""Tried widths of the quantised range, as shares of the distance between smallest and largest weight."""


class Method(StrEnum):
    """How scale and minimum are chosen."""

    RTN = "rtn"
    MSE = "mse"


@dataclass(frozen=True, kw_only=True)
class GroupQuantiser:
    """A format and the way into it. Raises ValueError on a format that there is not."""

    bits: int = 4
    group: int = 32
    method: Method = Method.MSE
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in CODE_BITS:
            raise ValueError(f"weights have {', '.join(map(str, CODE_BITS))} bits, not {self.bits}")
        if self.group not in GROUP_SIZES:
            raise ValueError(f"groups have {', '.join(map(str, GROUP_SIZES))} weights, not {self.group}")

    def quantise(self, weights: Float32) -> GroupMatrix:
        """A finite matrix (outputs, inputs). Raises ValueError if its rows are not whole groups, or beyond FP16."""
        outputs, inputs = weights.shape
        if inputs % self.group:
            raise ValueError(f"rows of {inputs} weights are not whole groups of {self.group}")
        groups = np.ascontiguousarray(weights, dtype=np.float32).reshape(-1, self.group)
        codes = np.empty(groups.shape, dtype=np.uint8)
        scale, minimum = (np.empty(len(groups), dtype=np.float16) for _ in range(2))
        step = max(1, CHUNK // self.group)
        for start in range(0, len(groups), step):
            here = slice(start, start + step)
            scale[here], minimum[here] = self._parameters(groups[here])
            codes[here] = self._codes(groups[here], scale[here], minimum[here])
        shape = (outputs, inputs // self.group)
        return GroupMatrix(
            codes=codes.reshape(outputs, inputs), scale=scale.reshape(shape), minimum=minimum.reshape(shape),
            bits=self.bits, group=self.group,
        )  # fmt: skip

    @property
    def _top(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    def _codes(self, groups: Float32, scale: NDArray[np.float16], minimum: NDArray[np.float16]) -> NDArray[np.uint8]:
        """Nearest code of each weight; 0 where the scale is 0."""
        wide = scale.astype(np.float32)[:, None]
        shifted = groups - minimum.astype(np.float32)[:, None]
        with np.errstate(over="ignore"):
            codes = np.divide(shifted, wide, out=np.zeros_like(groups), where=wide != 0)
        return np.clip(np.rint(codes, out=codes), 0, self._top, out=codes).astype(np.uint8)

    def _half(self, scale: Float32, minimum: Float32 | None = None) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        """FP16 scale and minimum; of a symmetric form the minimum follows."""
        with np.errstate(over="ignore"):
            half = scale.astype(np.float16)
            below = half * self._symmetric_minimum if minimum is None else minimum.astype(np.float16)
        if not (np.isfinite(half).all() and np.isfinite(below).all()):
            raise ValueError("a weight is beyond what an FP16 scale and minimum can hold")
        return half, below

    @property
    def _symmetric_minimum(self) -> np.float16:
        return np.float16(-0.5 if self.bits == 1 else -(1 << self.bits - 1))

    def _parameters(self, groups: Float32) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        """FP16 scale and minimum of each group."""
        best = self._nearest(groups)
        if self.method is Method.RTN:
            return best
        error = self._error(groups, *best)
        for candidate in self._candidates(groups):
            other = self._error(groups, *candidate)
            better = other < error
            error = np.where(better, other, error)
            best = (np.where(better, candidate[0], best[0]), np.where(better, candidate[1], best[1]))
        return best

    def _nearest(self, groups: Float32) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        """The plain rule: the range from the smallest to the largest weight."""
        if not self.symmetric:
            low, high = groups.min(axis=1), groups.max(axis=1)
            return self._half((high - low) / np.float32(self._top), low)
        if self.bits == 1:
            return self._half(2 * np.abs(groups).mean(axis=1))
        if self.bits == 8:
            return self._half(np.abs(groups).max(axis=1) / np.float32(127))
        largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)[:, 0]
        return self._half(largest / np.float32(-(1 << self.bits - 1)))

    def _candidates(self, groups: Float32) -> Iterator[tuple[NDArray[np.float16], NDArray[np.float16]]]:
        """Ranges from narrow to whole, each then fitted by least squares to the codes that it gave."""
        if self.symmetric:
            start = self._nearest(groups)[0].astype(np.float32)
            both = (1, -1) if self.bits > 1 else (1,)
            for share in RANGES:
                for sign in both:
                    half = self._half(start * np.float32(share * sign))
                    codes = self._codes(groups, *half).astype(np.float32) + np.float32(self._symmetric_minimum)
                    yield self._half(ratio((codes * groups).sum(axis=1), (codes * codes).sum(axis=1)))
            return
        low, high = groups.min(axis=1), groups.max(axis=1)
        middle, width = (low + high) / 2, high - low
        for share in RANGES:
            half = self._half(width * (share / self._top), middle - width * (share / 2))
            codes = self._codes(groups, *half).astype(np.float32)
            mean_code, mean = codes.mean(axis=1), groups.mean(axis=1)
            codes -= mean_code[:, None]
            slope = ratio((codes * groups).sum(axis=1), (codes * codes).sum(axis=1))
            yield self._half(slope, mean - slope * mean_code)

    def _error(self, groups: Float32, scale: NDArray[np.float16], minimum: NDArray[np.float16]) -> Float32:
        """Sum of squared errors of each group."""
        codes = self._codes(groups, scale, minimum).astype(np.float32)
        codes *= scale.astype(np.float32)[:, None]
        codes += minimum.astype(np.float32)[:, None]
        codes -= groups
        return np.einsum("ij,ij->i", codes, codes)


def ratio(above: Float32, below: Float32) -> Float32:
    """above / below, 0 where below is 0."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


TABLE = GroupQuantiser(bits=8, group=32, method=Method.RTN, symmetric=True)
"""Of embeddings and heads: ggml's Q8_0."""
