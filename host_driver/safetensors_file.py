"""Reads safetensors files: the header is checked against the file before any number is touched.

A file is 8 bytes (little-endian length of the header), the header (JSON: name -> dtype, shape, data_offsets), the data.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from host_driver.errors import InvalidRequest

MAX_HEADER_BYTES = 100_000_000
"""The reference implementation's own limit."""

DTYPES: dict[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
}  # fmt: skip
"""numpy's name of each dtype we read; BF16 is read as its bit pattern."""


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where a tensor lies in its file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """From the start of the file."""
    size: int

    def read(self) -> NDArray[Any]:
        """The numbers; BF16 widened to float32, which is exact."""
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            data = stream.read(self.size)
        if len(data) != self.size:
            raise InvalidRequest(f"{self.file}: tensor {self.name!r} is cut short")
        values = np.frombuffer(data, dtype=DTYPES[self.dtype]).reshape(self.shape)
        if self.dtype == "BF16":
            return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return values


def _entry(file: Path, name: str, entry: object, *, data_start: int, data_size: int) -> TensorEntry:
    """A checked header entry."""

    def wrong(what: str) -> InvalidRequest:
        return InvalidRequest(f"{file}: tensor {name!r}: {what}")

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise wrong("its header entry has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise wrong(f"dtype {dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not lists or not all(type(number) is int and number >= 0 for number in [*shape, *offsets]):
        raise wrong("shape and data_offsets must be lists of whole numbers from 0 on, data_offsets of two")
    begin, end = offsets
    size = prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if end - begin != size:
        raise wrong(f"shape {shape} of {dtype} takes {size} bytes, data_offsets say {end - begin}")
    if end > data_size:
        raise wrong(f"its data ends at byte {end}, the file holds {data_size}; the file is cut short")
    return TensorEntry(
        file=file, name=name, dtype=dtype, shape=tuple(shape), offset=data_start + begin, size=size
    )


def read_header(file: Path) -> dict[str, TensorEntry]:
    """All tensors of a file, by name. Raises InvalidRequest if the file is not what its header says."""
    try:
        file_size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, file_size - 8):
                raise InvalidRequest(
                    f"{file}: no safetensors file, or cut short: {length} bytes of header in {file_size}"
                )
            text = stream.read(length)
    except OSError as error:
        raise InvalidRequest(f"{file}: {error.strerror or error}") from None
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{file}: its header is not JSON") from None
    if not isinstance(header, dict):
        raise InvalidRequest(f"{file}: its header is not a JSON object")
    header.pop("__metadata__", None)
    start = 8 + length
    return {
        name: _entry(file, name, entry, data_start=start, data_size=file_size - start) for name, entry in header.items()
    }


def read_directory(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of ``model.safetensors``, or of the shards that ``model.safetensors.index.json`` lists."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file() or not index.is_file():
        if not single.is_file():
            raise InvalidRequest(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there")
        return read_header(single)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InvalidRequest(f"{index}: it has no weight_map of file names")
    tensors: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise InvalidRequest(f"{index}: shard {shard!r} is not a file name in this folder")
        tensors |= read_header(folder / shard)
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise InvalidRequest(f"{index}: tensor {missing[0]!r} is listed but in no shard")
    return tensors


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises InvalidRequest if it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"{file}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{file}: not a JSON file") from None
    if not isinstance(content, dict):
        raise InvalidRequest(f"{file}: not a JSON object")
    return content
