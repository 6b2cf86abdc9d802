"""Reads GGUF files: every count, length and offset is checked against the file before anything is made of it.

Layout, little-endian (ggml/docs/gguf.md, versions 2 and 3):
magic "GGUF", u32 version, u64 tensors, u64 keys; the keys: string name, u32 type, value; the tensors: string name,
u32 dimensions, u64 each (fastest first), u32 type, u64 offset from the start of the data; padding up to
``general.alignment``; the data. A string is u64 length and UTF-8; an array u32 element type, u64 length, the elements.

The `gguf` package's own reader is no part of this: it makes a numpy view of every string (seconds for a vocabulary),
believes every count, and raises whatever numpy raises. It is the outside anchor of the tests instead.
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from host_driver.errors import InvalidRequest

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

MAX_KEYS = 1 << 12
MAX_TENSORS = 1 << 16
MAX_ELEMENTS = 1 << 22
"""Of an array: an order of magnitude above the largest vocabularies."""
MAX_TEXT_BYTES = 1 << 20
"""Of a string; the longest in use are chat templates."""
MAX_HEADER_BYTES = 1 << 28
MAX_DIMENSIONS = 4
"""ggml's own limit."""

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""`struct` letter of each scalar value type."""
STRING, ARRAY = 8, 9

TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
"""ggml's tensor types, so that one we cannot read is called by its name."""

BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q8_0": (32, 34),
    "TQ1_0": (256, 54), "TQ2_0": (256, 66),
}  # fmt: skip
"""Types we read: values and bytes of a block."""

Value = bool | int | float | str | list[str] | NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """Where a tensor lies in its file."""

    file: Path
    name: str
    kind: str
    """Its ggml type, a key of `BLOCKS`."""
    shape: tuple[int, ...]
    """Slowest dimension first, as numpy has it: (outputs, inputs) of a matrix."""
    offset: int
    """From the start of the file."""
    size: int

    def blocks(self) -> NDArray[np.uint8]:
        """(blocks, bytes of a block), in memory order."""
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            data = stream.read(self.size)
        if len(data) != self.size:
            raise InvalidRequest(f"{self.file}: tensor {self.name!r} is cut short")
        return np.frombuffer(data, dtype=np.uint8).reshape(-1, BLOCKS[self.kind][1])


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """A checked header. Arrays of scalars are numpy arrays, arrays of strings lists."""

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, GgufTensor]


class _Cursor:
    """A place in the header from which values are taken. Raises InvalidRequest at the file's end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.offset = 0
        self._data = data
        self.end = min(len(data), MAX_HEADER_BYTES)

    def wrong(self, what: str) -> InvalidRequest:
        return InvalidRequest(f"{self.path}: {what}")

    def take(self, size: int, what: str) -> bytes:
        """So many bytes."""
        start = self.offset
        if size > self.end - start:
            raise self.wrong(
                f"{what} at byte {start} takes {size} bytes, {self.end - start} are left; the file is cut short or damaged"
            )
        self.offset = start + size
        return self._data[start : self.offset]

    def scalar(self, letter: str, what: str) -> Any:
        """A number or truth value by its `struct` letter."""
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}"), what))[0]

    def text(self, what: str) -> str:
        """A string."""
        length = self.scalar("Q", what)
        if length > MAX_TEXT_BYTES:
            raise self.wrong(f"{what} has {length} bytes, the limit is {MAX_TEXT_BYTES}")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong(f"{what} is not UTF-8") from None

    def value(self, kind: int, what: str) -> Value:
        """A value of the given type."""
        if kind in SCALARS:
            return self.scalar(SCALARS[kind], what)
        if kind == STRING:
            return self.text(what)
        if kind == ARRAY:
            return self.array(what)
        raise self.wrong(f"{what} has the unknown type {kind}")

    def array(self, what: str) -> Value:
        """An array of strings or of scalars."""
        kind, length = self.scalar("I", what), self.scalar("Q", what)
        if length > MAX_ELEMENTS:
            raise self.wrong(f"{what} has {length} elements, the limit is {MAX_ELEMENTS}")
        if kind == STRING:
            if 8 * length > self.end - self.offset:
                raise self.wrong(f"{what} has {length} strings, the file has no room for them; it is cut short or damaged")
            return [self.text(what) for _ in range(length)]
        if kind not in SCALARS:
            raise self.wrong(f"{what} is an array of type {kind}, only scalars and strings are read")
        dtype = np.dtype(f"<{SCALARS[kind]}")
        return np.frombuffer(self.take(length * dtype.itemsize, what), dtype=dtype)


def _short(name: str) -> str:
    """A name of the file as messages show it."""
    return repr(name if len(name) <= 64 else name[:61] + "...")


def _metadata(cursor: _Cursor, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for number in range(count):
        name = cursor.text(f"the name of key {number}")
        if name in metadata:
            raise cursor.wrong(f"key {_short(name)} is there twice")
        metadata[name] = cursor.value(cursor.scalar("I", f"key {_short(name)}"), f"key {_short(name)}")
    return metadata


def _tensor(cursor: _Cursor, number: int) -> GgufTensor:
    """An entry of the tensor list; `offset` still from the start of the data."""
    name = cursor.text(f"the name of tensor {number}")

    def wrong(what: str) -> InvalidRequest:
        return cursor.wrong(f"tensor {_short(name)}: {what}")

    what = f"tensor {_short(name)}"
    dimensions = cursor.scalar("I", what)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise wrong(f"it must have 1 to {MAX_DIMENSIONS} dimensions, not {dimensions}")
    shape = tuple(reversed([cursor.scalar("Q", what) for _ in range(dimensions)]))
    code, offset = cursor.scalar("I", what), cursor.scalar("Q", what)
    kind = TYPE_NAMES.get(code, "unknown")
    if kind not in BLOCKS:
        raise wrong(f"type {kind} ({code}) is not supported; supported: {', '.join(BLOCKS)}")
    values, size = BLOCKS[kind]
    if 0 in shape or shape[-1] % values:
        raise wrong(f"shape {list(shape)} cannot be of type {kind}, which comes in rows of blocks of {values}")
    return GgufTensor(
        file=cursor.path, name=name, kind=kind, shape=shape, offset=offset, size=prod(shape) // values * size
    )


def _place(cursor: _Cursor, tensors: list[GgufTensor], alignment: int, file_size: int) -> dict[str, GgufTensor]:
    """The tensors at their places in the file, which they must all be within and none may share."""
    start = -(-cursor.offset // alignment) * alignment
    placed: dict[str, GgufTensor] = {}
    for tensor in tensors:
        what = f"tensor {_short(tensor.name)}"
        if tensor.name in placed:
            raise cursor.wrong(f"{what} is there twice")
        if tensor.offset % alignment:
            raise cursor.wrong(f"{what}: offset {tensor.offset} is not a multiple of the alignment {alignment}")
        if start + tensor.offset + tensor.size > file_size:
            raise cursor.wrong(
                f"{what}: its {tensor.size} bytes end at byte {start + tensor.offset + tensor.size}, the file has {file_size}; "
                "it is cut short or damaged"
            )
        placed[tensor.name] = GgufTensor(
            file=tensor.file, name=tensor.name, kind=tensor.kind, shape=tensor.shape,
            offset=start + tensor.offset, size=tensor.size,
        )  # fmt: skip
    behind = 0
    for tensor in sorted(placed.values(), key=lambda tensor: tensor.offset):
        if tensor.offset < behind:
            raise cursor.wrong(f"tensor {_short(tensor.name)} overlaps the one in front of it")
        behind = tensor.offset + tensor.size
    return placed


def _read(cursor: _Cursor, file_size: int) -> GgufFile:
    magic = cursor.take(4, "the magic") if file_size >= 4 else b""
    if magic != MAGIC:
        raise cursor.wrong("not a GGUF file: it does not start with 'GGUF'")
    version = cursor.scalar("I", "the version")
    if version not in VERSIONS:
        raise cursor.wrong(f"GGUF version {version} is not supported, only {' and '.join(map(str, VERSIONS))}, little-endian")
    tensor_count, key_count = cursor.scalar("Q", "the number of tensors"), cursor.scalar("Q", "the number of keys")
    for count, limit, what in ((tensor_count, MAX_TENSORS, "tensors"), (key_count, MAX_KEYS, "keys")):
        if count > limit:
            raise cursor.wrong(f"it says that it has {count} {what}, the limit is {limit}")
    metadata = _metadata(cursor, key_count)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise cursor.wrong(f"general.alignment must be a power of two up to 2^20, not {str(alignment)[:32]}")
    tensors = [_tensor(cursor, number) for number in range(tensor_count)]
    return GgufFile(path=cursor.path, metadata=metadata, tensors=_place(cursor, tensors, alignment, file_size))


def read_gguf(file: Path) -> GgufFile:
    """The header of a file. Raises InvalidRequest, one line, if it is not what it says; no tensor is read."""
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            if size == 0:
                raise InvalidRequest(f"{file}: not a GGUF file: it is empty")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(_Cursor(file, data), size)
    except OSError as error:
        raise InvalidRequest(f"{file}: {error.strerror or error}") from None
