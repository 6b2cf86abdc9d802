"""Formats of activations that are not int8, and the fixed point to which a group of 32 is brought (numerics 2c)."""

from enum import StrEnum

__all__ = ["FIXED_BITS", "HALF_FRACTION_BITS", "RECIPROCAL_BITS", "ActFormat"]

HALF_FRACTION_BITS = 7
"""Bits kept below the lowest significand bit of a group's largest FP16 exponent."""

FIXED_BITS = 19
"""A number in a group's fixed point: FP16 of 11 + 7 bits and E4M3 of 18 bits, each with a sign; int16 has 16."""

RECIPROCAL_BITS = 24
"""The reciprocal of a table scale's significand m is floor((2^24 - 1) / m)."""


class ActFormat(StrEnum):
    """What an activation is stored as. NaN and infinity are not meant; they are read as the number that their bits would be."""

    INT16 = "int16"
    """[-32767, 32767]"""
    FP8 = "fp8"
    """E4M3: 1 sign, 4 exponent and 3 fraction bits, bias 7, subnormals, largest 448"""
    FP16 = "fp16"
    """IEEE binary16"""

    @property
    def bits(self) -> int:
        """Bits of an activation."""
        return 8 if self is ActFormat.FP8 else 16
