"""Finds a model's key channels (host_driver/key_channels.py): runs a text on a device and reads the keys back."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from host_driver.device import Device
from host_driver.key_channels import KeyChannels, channels_of
from host_driver.session import tiles
from spec.layout import KV_SCALE_BYTES


def calibrate(device: Device, tokens: list[int], on_tile: Callable[[int], None] = lambda _done: None) -> KeyChannels:
    """Runs a text on a device whose cache has int8 keys, and reads them back. `on_tile`: called with the tokens done."""
    compiled = device.compiled
    if compiled.kv.k_bits != 8 or compiled.keys is not None:
        raise ValueError("calibration reads the keys as they are: from a cache of int8, without channels")
    for position, part, _ in tiles(tuple(tokens), compiled.tile):
        device.run_step(part, position, head=False)
        on_tile(position + len(part))
    layout, model, count = compiled.kv_layout, compiled.model, len(tokens)

    def keys(layer: int, head: int) -> NDArray[np.float32]:
        address = compiled.kv_address(layer, head)
        rows = device.transport.read_mem(address, count * layout.k_row_bytes)
        scales = device.transport.read_mem(address + layout.scale_offset, count * KV_SCALE_BYTES)
        scale = np.frombuffer(scales, dtype="<f4").astype(np.float32).reshape(count, -1)[:, :1]
        return np.frombuffer(rows, dtype=np.int8).astype(np.float32).reshape(count, -1) * scale

    return channels_of(
        np.array([[keys(layer, head) for head in range(model.kv_heads)] for layer in range(model.layers)])
    )
