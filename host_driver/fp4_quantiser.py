"""Float weights as FP4 (E2M1) in groups of 32 with an FP16 scale."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from host_driver.group_quantiser import CHUNK, RANGES, Method, ratio
from host_driver.weights import Float16, Float32, UInt8
from spec.config import K_GROUP

__all__ = ["LEVELS", "Fp4Matrix", "Fp4Quantiser"]

LEVELS = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=np.float32)
"""Magnitudes of the codes 0 to 7; bit 3 is the sign."""

_MIDDLES = (LEVELS[1:] + LEVELS[:-1]) / 2


@dataclass(frozen=True, kw_only=True)
class Fp4Matrix:
    """weight[n, k] = scale[n, k // 32] * E2M1(codes[n, k])."""

    codes: UInt8
    """(outputs, inputs): sign in bit 3, exponent in bits 2 and 1, mantissa in bit 0"""
    scale: Float16
    """(outputs, inputs / 32), finite"""

    def dense(self) -> Float32:
        """The weights, each product rounded once to binary32."""
        return _values(self.codes) * np.repeat(self.scale.astype(np.float32), K_GROUP, axis=1)


def _values(codes: UInt8) -> Float32:
    return np.where(codes & 8, -LEVELS[codes & 7], LEVELS[codes & 7])


@dataclass(frozen=True, kw_only=True)
class Fp4Quantiser:
    """RTN: the largest magnitude of a group becomes 6. MSE: ranges from narrow to whole, each scale then fitted by least
    squares to its codes; the least squared error wins, RTN's among them."""

    method: Method = Method.MSE

    def quantise(self, weights: Float32) -> Fp4Matrix:
        """A finite matrix (outputs, inputs). Raises ValueError if its rows are not whole groups, or beyond FP16."""
        outputs, inputs = weights.shape
        if inputs % K_GROUP:
            raise ValueError(f"rows of {inputs} weights are not whole groups of {K_GROUP}")
        groups = np.ascontiguousarray(weights, dtype=np.float32).reshape(-1, K_GROUP)
        codes, scale = np.empty(groups.shape, dtype=np.uint8), np.empty(len(groups), dtype=np.float16)
        step = max(1, CHUNK // K_GROUP)
        for start in range(0, len(groups), step):
            here = slice(start, start + step)
            scale[here] = self._scale(groups[here])
            codes[here] = _codes(groups[here], scale[here])
        return Fp4Matrix(codes=codes.reshape(outputs, inputs), scale=scale.reshape(outputs, inputs // K_GROUP))

    def _scale(self, groups: Float32) -> Float16:
        whole = np.abs(groups).max(axis=1) / LEVELS[-1]
        best = _half(whole)
        if self.method is Method.RTN:
            return best
        error = _error(groups, best)
        for share in RANGES:
            values = _values(_codes(groups, _half(whole * np.float32(share))))
            candidate = _half(ratio(np.einsum("ij,ij->i", values, groups), np.einsum("ij,ij->i", values, values)))
            other = _error(groups, candidate)
            best, error = np.where(other < error, candidate, best), np.minimum(other, error)
        return best


def _half(scale: Float32) -> Float16:
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError("a weight is beyond what an FP16 scale can hold")
    return half


def _codes(groups: Float32, scale: Float16) -> UInt8:
    """Nearest code of each weight, halves to the even code; 0 where the scale is 0."""
    wide = scale.astype(np.float32)[:, None]
    share = np.divide(np.abs(groups), wide, out=np.zeros_like(groups), where=wide != 0)
    codes = np.searchsorted(_MIDDLES, share)
    on_the_middle: NDArray[np.bool_] = _MIDDLES[np.minimum(codes, len(_MIDDLES) - 1)] == share
    codes += on_the_middle & (codes % 2 == 1)
    return (codes + 8 * (np.signbit(groups) & (codes > 0))).astype(np.uint8)


def _error(groups: Float32, scale: Float16) -> Float32:
    """Sum of squared errors of each group."""
    rest = _values(_codes(groups, scale)) * scale.astype(np.float32)[:, None] - groups
    return np.einsum("ij,ij->i", rest, rest)
