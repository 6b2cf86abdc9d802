"""The ceilings of a device, measured: bytes a second of a large copy, multiply-accumulates a second of a large product.

No data sheet is quoted: a figure over a measured ceiling says how good the code is on this machine, as it is today.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
"""Size of the copied tensor: several times the last cache of the device."""

PRODUCT_SIZE = {"cuda": 8192, "cpu": 1024}
"""Rows and columns of the multiplied matrices."""

REPEATS = {"cuda": 20, "cpu": 5}


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """What a device can do at best."""

    bytes_per_s: float
    """Bytes read and written by a copy."""
    macs_per_s: float
    """Multiply-accumulates of a square matrix product in the model's type."""

    def seconds(self, *, size: float, macs: float) -> float:
        """Shortest time of a step that moves ``size`` bytes and does ``macs`` multiply-accumulates."""
        return max(size / self.bytes_per_s, macs / self.macs_per_s)


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a piece of work: by events on a GPU, by the clock elsewhere."""
    work()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = perf_counter()
            work()
            times.append(perf_counter() - began)
    return median(times)


def copy_bytes_per_s(device: torch.device, size: int | None = None) -> float:
    """Bytes read plus bytes written a second by a copy of ``size`` bytes."""
    size = COPY_BYTES[device.type] if size is None else size
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), device, REPEATS[device.type])


def product_macs_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-accumulates a second of a square product; int8 sums in int32."""
    size = PRODUCT_SIZE[device.type]
    if dtype == torch.int8:
        a, b = (torch.randint(-127, 128, (size, size), dtype=dtype, device=device) for _ in range(2))
        seconds = seconds_of(lambda: torch.ops.aten._int_mm(a, b.T), device, REPEATS[device.type])
    else:
        x, w = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = seconds_of(lambda: torch.nn.functional.linear(x, w), device, REPEATS[device.type])
    return size**3 / seconds


def measure(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Both ceilings."""
    return Roofline(bytes_per_s=copy_bytes_per_s(device), macs_per_s=product_macs_per_s(device, dtype))
