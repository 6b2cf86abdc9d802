"""Where every weight lies in memory: the contract between packer, golden unpacker and RTL decoder.

**Trits and groups.** Three trits (t0, t1, t2), each -1, 0 or 1, of three consecutive inputs k, k+1, k+2 of one output
form a *group* of value ``v = t0 + 3*t1 + 9*t2`` in [-13, 13] (27 values). Two trits (u0, u1) form a *pair* of value
``u = u0 + 3*u1`` in [-4, 4].

**Index form** (on chip, 5 bits a group, 1.667 bit a weight): sign and magnitude, ``code = (v < 0) << 4 | abs(v)``.
A full table is addressed by the code, a half table by its low 4 bits, the 5th bit being the sign.

**Dense form** (in memory, 5 trits a byte, 1.6 bit a weight): one byte holds a group and a pair, with
``g = v + 13`` (0..26) and ``p = u + 4`` (0..8):
``byte = 8*g + p`` for p < 8, ``byte = 216 + g`` for p = 8. Bytes 243..255 are illegal (a fault).

**Lookup row.** What the engine looks up in one cycle: ``cells = tables * outputs`` groups. Cell ``c = q*tables + t`` is
table t (inputs ``k = kb*3*tables + 3*t + (0,1,2)``) of output ``n = nb*outputs + q``. Matrices are padded with zero trits.

**Operation.** An n x k matrix of P planes (weight = sum over p of 3^p * plane_p) is the row sequence
``for p in P-1..0: for kb: for nb``. It is padded with zero rows to a multiple of 5.

**Superbeat.** Five rows A, B, C, D, E take ``3 * cells`` bytes: first the ``cells`` bytes (in cell order) that hold the
groups of row A, then those of B, then those of C. The pairs a, b, c of the three bytes of a cell hold the groups of
rows D and E: ``D: v = a + 9*c0``, ``E: v = b + 9*c1`` where ``c = c0 + 3*c1``. As ``cells`` is a multiple of the bytes
of a beat, one beat fills one bank of one row, and no byte is wasted.

**Groups.** A group-quantised n x k matrix (weight = scale * code + minimum, 32 weights of a row a group) of B-bit codes
is a sequence of *blocks* of ``lanes`` outputs by one group: ``for nb: for g``, padded with zero outputs. A block is one
scale row and B code rows of ``32 * lanes`` bits each.

- Scale row: FP16 scale of output j at bits 16j, FP16 minimum of output j at bits ``16 * (lanes + j)``; both finite.
- Table engine: one code row a bit plane, highest first. Cell (j, t), t = 0..7, has the bits ``4 * (8j + t)`` and on: those
  of inputs 4t .. 4t+3 (lowest input lowest), of which the lower three are complemented where the highest is 1 (LUT
  Tensor Core, equation 6).
- 4-bit engines: a nibble of (output j', input i) at bits ``4 * (32 j' + i)``, as two's complement of nibble - 8. Row r
  of a 4-bit block holds outputs ``r * lanes / 4`` and on; rows 2r and 2r+1 of an 8-bit block the high and the low
  nibbles of these outputs.

**Embedding.** A row is a header, then int8 values, each padded to 32 bytes. The header is one FP32 scale, or with group
engines one FP16 scale for each 32 values; such rows are padded to 64 bytes.

**KV cache.** A KV head of a layer is the K rows of all slots, then their V rows, then their scales (FP32 of K, FP32 of V).
A row is head_dim int8, or head_dim int4 in two's complement, two a byte with the lower element in the low nibble.

**Stream.** All that a step reads in order is one stream of segments. A segment is a header beat, then payload beats:
little-endian words of the header: 0 magic, 1 kind, 2 payload beats, 3 lookup rows (TRITS, padding excluded) or bits of a
weight (GROUPS; the payload is whole blocks). AUX
payload is raw: norm weights (FP32), row scales (FP16) or channels, padded with zeros to a whole beat.

**Channels.** A row of a Q or K matrix has a word: FP16 offset at bit 0, shift in two's complement at bits 16 to 23, zeros.
Behind RoPE the row's result becomes ``(y + offset) * 2^shift`` (docs/numerics.md section 4).
"""

from dataclasses import dataclass
from enum import IntEnum

STREAM_MAGIC = 0x5352544C
"""``LTRS``, first word of a segment header."""

ROWS_PER_SUPERBEAT = 5
BYTES_PER_CELL = 3
"""Bytes a cell contributes to a superbeat."""

GROUP_MAX = 13
PAIR_MAX = 4
DENSE_CODES = 243
PAIR_ESCAPE = 216
"""First byte value whose pair is +4."""

EMBED_ALIGN_BYTES = 32
"""Header and values of an embedding row are padded to multiples of this."""

KV_SCALE_BYTES = 8
"""Scales of one slot: FP32 of K, FP32 of V."""


CHANNEL_BYTES = 4
"""Word of a channel."""


class SegmentKind(IntEnum):
    """What a stream segment holds."""

    AUX = 1
    TRITS = 2
    GROUPS = 3


def dense_byte(group: int, pair: int) -> int:
    """Byte that holds a group value in [-13, 13] and a pair value in [-4, 4]."""
    g, p = group + GROUP_MAX, pair + PAIR_MAX
    return 8 * g + p if p < 8 else PAIR_ESCAPE + g


def dense_values(byte: int) -> tuple[int, int]:
    """(group value, pair value) of a legal dense byte."""
    if not 0 <= byte < DENSE_CODES:
        raise ValueError(f"a dense byte must be below {DENSE_CODES}, not {byte}")
    if byte < PAIR_ESCAPE:
        return (byte >> 3) - GROUP_MAX, (byte & 7) - PAIR_MAX
    return byte - PAIR_ESCAPE - GROUP_MAX, PAIR_MAX


def index_code(group: int) -> int:
    """5-bit index form of a group value: sign and magnitude."""
    return (16 if group < 0 else 0) | abs(group)


def group_trits(value: int) -> tuple[int, int, int]:
    """Balanced ternary digits (t0, t1, t2) of a group value."""
    digits = []
    for _ in range(3):
        digit = (value + 1) % 3 - 1
        digits.append(digit)
        value = (value - digit) // 3
    return digits[0], digits[1], digits[2]


def embed_header_words(hidden: int, *, grouped: bool = True) -> int:
    """64-bit words of the header of an embedding row."""
    size = 2 * -(-hidden // 32) if grouped else 4
    return -(-size // EMBED_ALIGN_BYTES) * EMBED_ALIGN_BYTES // 8


def embed_row_bytes(hidden: int, *, grouped: bool = False) -> int:
    """Stride of the embedding table: with group engines a multiple of 64 bytes, the beat of the widest data port."""
    size = 8 * embed_header_words(hidden, grouped=grouped) + -(-hidden // EMBED_ALIGN_BYTES) * EMBED_ALIGN_BYTES
    return -(-size // 64) * 64 if grouped else size


@dataclass(frozen=True, kw_only=True)
class KvLayout:
    """Places in the cache of one KV head of one layer, in bytes from its first K row on. ``slots`` is a multiple of 16."""

    slots: int
    head_dim: int
    k_bits: int = 8
    v_bits: int = 8

    @property
    def k_row_bytes(self) -> int:
        """K of a slot."""
        return self.head_dim * self.k_bits // 8

    @property
    def v_row_bytes(self) -> int:
        """V of a slot."""
        return self.head_dim * self.v_bits // 8

    @property
    def v_offset(self) -> int:
        """V of slot 0."""
        return self.slots * self.k_row_bytes

    @property
    def scale_offset(self) -> int:
        """Scales of slot 0."""
        return self.v_offset + self.slots * self.v_row_bytes

    @property
    def slot_bytes(self) -> int:
        """K, V and scales of a slot."""
        return self.k_row_bytes + self.v_row_bytes + KV_SCALE_BYTES

    @property
    def head_bytes(self) -> int:
        """All slots."""
        return self.slots * self.slot_bytes
