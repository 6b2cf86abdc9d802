"""Descriptors: what one program step tells one unit. Declared once; compiler packs, RTL and golden decode these objects.

A program is an array of 64-byte descriptors (16 little-endian words), ended by END. They issue in order. A descriptor
waits until every unit of its `wait` mask is idle and its own unit can take it; that is all the dependency tracking there
is, so a program may overlap whatever its masks allow.

Runtime values come from registers, so one program serves every position: T = `token_count`, P = `position`.
"""

from dataclasses import dataclass
from enum import IntEnum

WORDS = 16
DESCRIPTOR_BYTES = 4 * WORDS


class Opcode(IntEnum):
    """Operation of a descriptor."""

    END = 0
    STREAM = 1
    ROPE = 2
    EMBED = 3
    NORM = 4
    MATMUL = 5
    ATTEND = 6


class Unit(IntEnum):
    """Bit of the `wait` mask."""

    STREAM = 0
    """Idle when all commands were given to the DMA (not when all data was consumed)."""
    LOADER = 1
    """Embedding rows and RoPE rows."""
    VECTOR = 2
    MATMUL = 3
    """Engine and epilogue, up to the last vector-memory, query-buffer or argmax write."""
    KV_WRITE = 4
    """Idle when memory acknowledged every K, V and logits write."""
    ATTENTION = 5


UNIT_OF = {
    Opcode.STREAM: Unit.STREAM,
    Opcode.ROPE: Unit.LOADER,
    Opcode.EMBED: Unit.LOADER,
    Opcode.NORM: Unit.VECTOR,
    Opcode.MATMUL: Unit.MATMUL,
    Opcode.ATTEND: Unit.ATTENTION,
}


class Epilogue(IntEnum):
    """What happens to y = (float(sum) * weight_scale) * activation_scale of a MATMUL."""

    STORE = 0
    """vector[dst] = y"""
    RESIDUAL = 1
    """vector[dst] = vector[dst] + y"""
    GATE_SILU = 2
    """vector[dst] = y * recip(1 + exp(-y))"""
    GATE_RELU2 = 3
    """vector[dst] = max(y, 0)^2"""
    UP = 4
    """vector[dst] = vector[dst] * y"""
    QUERY = 5
    """RoPE, `channels`, quantise per head, into the query buffer"""
    KEY = 6
    """RoPE, `channels`, quantise per head, append to the K cache"""
    VALUE = 7
    """quantise per head, append to the V cache"""
    LOGITS = 8
    """argmax; to memory when `logits_enable`"""


@dataclass(frozen=True)
class OpField:
    """Bits of a descriptor. `minimum` and `maximum` are the legal range of the unsigned value."""

    name: str
    word: int
    lsb: int
    width: int
    doc: str
    minimum: int = 0
    maximum: int | None = None

    @property
    def limit(self) -> int:
        """Largest legal value."""
        return (1 << self.width) - 1 if self.maximum is None else self.maximum


COMMON = (
    OpField("opcode", 0, 0, 4, "Opcode", maximum=max(Opcode)),
    OpField("wait", 0, 4, 6, "mask of units that must be idle first"),
    OpField("tag", 15, 0, 24, "layer << 8 | step number of the prompt-to-token table, for faults and traces"),
)


def _address(name: str, word: int, doc: str) -> OpField:
    """A 40-bit byte address: low 32 bits in `word`, high 8 bits in the next."""
    return OpField(name, word, 0, 40, doc)


FIELDS: dict[Opcode, tuple[OpField, ...]] = {
    Opcode.END: (),
    Opcode.STREAM: (
        OpField("head", 0, 16, 1, "1: count these bytes as LM head"),
        _address("address", 1, "first segment header"),
        OpField("beats", 3, 0, 24, "beats of the weight port", minimum=1),
    ),
    Opcode.ROPE: (
        _address("address", 1, "table of positions x head_dim FP32: cos0, sin0, cos1, sin1, ... (pairs 2i, 2i+1)"),
        OpField("row_beats", 3, 0, 16, "head_dim / 8", minimum=1),
    ),
    Opcode.EMBED: (
        _address("address", 1, "embedding table"),
        OpField("row_bytes", 3, 0, 24, "stride of a token id"),
        OpField("row_beats", 4, 0, 16, "hidden / 8", minimum=1),
        OpField("dst", 5, 0, 16, "first row of the vector memory"),
        OpField("dst_stride", 5, 16, 16, "rows between tokens"),
        OpField("vocab", 6, 0, 32, "ids from here on are a fault"),
        OpField("grouped", 0, 16, 1, "1: an FP16 scale for each 32 values (group engines only); 0: an FP32 scale a row"),
        OpField("header_words", 7, 0, 8, "64-bit words of a row before the first value", minimum=4),
    ),
    Opcode.NORM: (
        OpField("norm", 0, 16, 1, "1: RMSNorm with gamma from the stream; 0: quantise only"),
        OpField("last_only", 0, 17, 1, "1: token T-1 alone, as token 0 of the activation tile"),
        OpField("beats", 3, 0, 16, "length / 8", minimum=1),
        OpField("src", 4, 0, 16, "first row of the vector memory"),
        OpField("src_stride", 4, 16, 16, "rows between tokens"),
        OpField("inv_length", 5, 0, 32, "FP32 1 / length"),
        OpField("eps", 6, 0, 32, "FP32 epsilon"),
    ),
    Opcode.MATMUL: (
        OpField("epilogue", 0, 16, 4, "Epilogue", maximum=max(Epilogue)),
        OpField("last_only", 0, 20, 1, "1: activation tile of one token (that of a NORM with last_only)"),
        OpField("row_scale", 0, 21, 1, "1: FP16 scale a row from the stream; 0: `scale` (always 0 for group engines)"),
        OpField("planes", 0, 22, 4, "ternary planes (1 to 5), or bits of a group-quantised weight", minimum=1, maximum=8),
        OpField("k_int4", 0, 26, 1, "KEY, VALUE: K of the cache is int4; 0: int8"),
        OpField("v_int4", 0, 27, 1, "KEY, VALUE: V of the cache is int4; 0: int8"),
        OpField("channels", 0, 28, 1, "QUERY, KEY: 1: behind RoPE, an offset and a shift a row from the stream; 0: none"),
        OpField("k_blocks", 3, 0, 16, "ceil(K / k_block)", minimum=1),
        OpField("row_blocks", 3, 16, 16, "ceil(N / outputs)", minimum=1),
        OpField("beats", 4, 0, 16, "N / 8, rounded up", minimum=1),
        OpField("valid", 4, 16, 4, "rows of the last beat that are real (1 to 8), for argmax", minimum=1, maximum=8),
        OpField("dst", 5, 0, 16, "first vector-memory row (STORE, RESIDUAL, GATE, UP), or first row of the query buffer (QUERY)"),
        OpField("dst_stride", 5, 16, 16, "rows between tokens"),
        OpField("scale", 6, 0, 32, "FP32 weight scale of the matrix; group engines: 2^(exponent - 25 - ALIGN_BITS)"),
        OpField("first_row", 7, 0, 32, "LOGITS: row number of this operation's first row; 0 resets argmax"),
        _address("kv_address", 8, "KEY, VALUE: KV head 0 of this layer"),
        OpField("kv_stride", 10, 0, 32, "bytes from one KV head to the next"),
        OpField("first_head", 11, 0, 8, "head number of the first row (QUERY, KEY, VALUE)"),
        OpField("head_beats", 11, 8, 8, "head_dim / 8 (QUERY, KEY, VALUE)"),
        OpField("exponent", 11, 16, 5, "group engines: largest FP16 exponent field of the scales and minima", maximum=30),
    ),
    Opcode.ATTEND: (
        OpField("resume", 0, 16, 1, "1: go on from the state (m, l, o) in vector memory `state`; 0: from nothing"),
        OpField("export", 0, 17, 1, "1: write the state to `state` instead of o / l to `dst`"),
        OpField("bias", 0, 18, 1, "1: add an FP32 bias per slot, read from `bias_address`, to the scores"),
        OpField("k_int4", 0, 19, 1, "1: K of the cache is int4; 0: int8"),
        OpField("v_int4", 0, 20, 1, "1: V of the cache is int4; 0: int8"),
        OpField("kv_heads", 3, 0, 8, "KV heads", minimum=1),
        OpField("group", 3, 8, 8, "query heads that share a KV head", minimum=1),
        OpField("head_beats", 3, 16, 8, "head_dim / 8", minimum=1),
        OpField("dst", 4, 0, 16, "first vector-memory row of the output"),
        OpField("dst_stride", 4, 16, 16, "rows between tokens"),
        OpField("score_scale", 5, 0, 32, "FP32 1 / sqrt(head_dim)"),
        OpField("state", 6, 0, 16, "first vector-memory row of the state: per row head_beats rows of o, then (m, l, 0...)"),
        _address("kv_address", 8, "KV head 0 of this layer"),
        OpField("kv_stride", 10, 0, 32, "bytes from one KV head to the next"),
        _address("bias_address", 11, "FP32 per slot, for all heads"),
    ),
}


def fields_of(opcode: Opcode) -> tuple[OpField, ...]:
    """All fields of a descriptor of that opcode."""
    return COMMON + FIELDS[opcode]


def pack(opcode: Opcode, **values: int) -> bytes:
    """One descriptor. Raises ValueError on an unknown field, or a value outside its legal range."""
    known = {field.name: field for field in fields_of(opcode)}
    word = 0
    for name, value in {**{name: field.minimum for name, field in known.items()}, **values, "opcode": int(opcode)}.items():
        if name not in known:
            raise ValueError(f"{opcode.name} has no field {name!r}")
        field = known[name]
        if not field.minimum <= value <= field.limit:
            raise ValueError(f"{opcode.name}.{name} must be in [{field.minimum}, {field.limit}], not {value}")
        word |= value << (32 * field.word + field.lsb)
    return word.to_bytes(DESCRIPTOR_BYTES, "little")


def unpack(data: bytes) -> tuple[Opcode, dict[str, int]]:
    """Opcode and field values of one descriptor. Raises ValueError on what the device calls ILLEGAL_DESCRIPTOR."""
    word = int.from_bytes(data[:DESCRIPTOR_BYTES], "little")
    code = word & 0xF
    if code > max(Opcode):
        raise ValueError(f"unknown opcode {code}")
    opcode = Opcode(code)
    values = {}
    for field in fields_of(opcode):
        value = word >> (32 * field.word + field.lsb) & ((1 << field.width) - 1)
        if not field.minimum <= value <= field.limit:
            raise ValueError(f"{opcode.name}.{field.name} must be in [{field.minimum}, {field.limit}], not {value}")
        values[field.name] = value
    return opcode, values
