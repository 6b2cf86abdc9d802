"""What the integer kernels share: unpacking words and bytes, and the byte-wise dot product of two words.

On a GPU these are single instructions, given as PTX; Triton's interpreter has none, so there the same functions are written
out in shifts and multiplications. `INTERPRETED` chooses, and both forms are functions of the same integers.
"""

# A kernel looks like Python to a type checker, and is not.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Are kernels run by Triton's interpreter (TRITON_INTERPRET=1 when Triton was imported)?"""

LOW_BYTES = tl.constexpr(0x00FF00FF)
"""Bytes 0 and 2 of a word."""


@triton.jit
def dp4a(a, b, c):
    """c + sum of the products of the four signed bytes of a and b: int32 tensors of one shape."""
    if INTERPRETED:
        total = c
        for byte in tl.static_range(4):
            total += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
    else:
        total = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    return total


@triton.jit
def plane_of_words(words, PLANE: tl.constexpr, BITS: tl.constexpr):
    """Four codes of a plane in the bytes of a word, for codes of 1, 2, 4 or 8 bits."""
    if BITS == 8:
        codes = words
    else:
        MASK: tl.constexpr = ((1 << BITS) - 1) * 0x01010101
        codes = (words >> (PLANE * BITS)) & MASK
    return codes


@triton.jit
def trit_step(even, odd):
    """The next plane of trits from the bytes (0, 2) and (1, 3) of a word, and what is left of them."""
    even *= 3
    odd *= 3
    codes = ((even >> 8) & 0x00030003) | (odd & 0x03000300)
    return codes, even & LOW_BYTES, odd & LOW_BYTES


@triton.constexpr_function
def shift_and(shift: int, mask: int) -> str:
    """PTX of (four bytes >> shift) & mask."""
    return f"{{ .reg .b32 t; shr.u32 t, $1, {shift}; and.b32 $0, t, {mask * 0x01010101}; }}"


@triton.jit
def masked_shift(packed, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """(byte >> SHIFT) & MASK of every byte of an int8 tensor; on a GPU four bytes at a time."""
    if INTERPRETED:
        codes = ((packed.to(tl.int32) >> SHIFT) & MASK).to(tl.int8)
    else:
        codes = tl.inline_asm_elementwise(
            shift_and(SHIFT, MASK), "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
    return codes


@triton.jit
def half_pair(word):
    """FP16 in the low and in the high half of int32 words, as float32."""
    low = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high
