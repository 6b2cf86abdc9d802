"""Offset and shift of each key channel, for caches with few bits: what they are, and how they are found.

Keys have outlier channels: a scale a token and head leaves the others one or two steps of int4. Behind RoPE a channel c of K
becomes ``(k_c + offset_c) * 2^shift_c`` before it is quantised, and of q ``q_c * 2^-shift_c``. The products keep their
values; the offsets add the same to all scores of a query, which softmax does not see. Both are static and come from the
keys of one calibration text. Shifts in place of scales: no multiplier, nothing to round.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from host_driver.errors import InvalidRequest
from host_driver.output_file import write_whole
from spec.config import ModelConfig

EXPONENT = 0.75
"""Power of a channel's spread that is divided out: at 1 all channels would be equally wide, and q's int8 would suffer."""


@dataclass(frozen=True, kw_only=True)
class KeyChannels:
    """Per layer, KV head and channel; arrays of shape (layers, kv_heads, head_dim)."""

    offset: NDArray[np.float16]
    """Taken from the mean: minus it."""
    shift: NDArray[np.int8]

    def k_words(self, layer: int) -> NDArray[np.uint32]:
        """(kv_dim,) words of spec/layout.py ("Channels.")."""
        offset = np.ascontiguousarray(self.offset[layer]).view(np.uint16).astype(np.uint32)
        return (offset | _field(self.shift[layer])).reshape(-1)

    def q_words(self, layer: int, group: int) -> NDArray[np.uint32]:
        """(q_dim,) words; `group` query heads share a KV head."""
        return np.repeat(_field(-self.shift[layer]), group, axis=0).reshape(-1)

    def save(self, file: Path) -> None:
        """As a safetensors file, whole or not at all."""
        write_whole(save({"offset": self.offset, "shift": self.shift}), file)


def _field(shift: NDArray[np.int8]) -> NDArray[np.uint32]:
    return shift.view(np.uint8).astype(np.uint32) << np.uint32(16)


def load_channels(file: Path, model: ModelConfig) -> KeyChannels:
    """What `KeyChannels.save` wrote. Raises InvalidRequest if it is something else, or of another model."""
    if not file.is_file():
        raise InvalidRequest(f"{file}: there is no such file; lutra calibrate makes one")
    try:
        found = load_file(file)
    except (SafetensorError, ValueError) as error:
        raise InvalidRequest(f"{file}: no safetensors file: {error}") from None
    shape = (model.layers, model.kv_heads, model.head_dim)
    wanted = {"offset": np.dtype(np.float16), "shift": np.dtype(np.int8)}
    for name, dtype in wanted.items():
        if name not in found or found[name].dtype != dtype:
            raise InvalidRequest(f"{file}: no key channels: tensor {name!r} of {dtype} is missing")
        if found[name].shape != shape:
            raise InvalidRequest(f"{file}: key channels of another model: {name!r} has shape {found[name].shape}, not {shape}")
    channels = KeyChannels(offset=found["offset"], shift=found["shift"])
    if not np.isfinite(channels.offset).all() or (channels.shift == -128).any():
        raise InvalidRequest(f"{file}: offsets must be finite, shifts in [-127, 127]")
    return channels


def channels_of(keys: NDArray[np.float32]) -> KeyChannels:
    """Of keys behind RoPE: (layers, kv_heads, tokens, head_dim)."""
    mean = keys.mean(axis=2)
    offset = np.clip(-mean, -65504, 65504).astype(np.float16)
    spread = np.abs(keys + offset.astype(np.float32)[:, :, None]).max(axis=2)
    with np.errstate(divide="ignore"):
        shift = -np.rint(EXPONENT * np.log2(spread))
    return KeyChannels(offset=offset, shift=np.clip(np.where(spread > 0, shift, 0), -127, 127).astype(np.int8))
