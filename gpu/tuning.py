"""Tilings of the kernels, and which is fastest for a shape: measured once a shape on a GPU, the largest without one."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

WARM_UP_MS, MEASURE_MS = 3, 15
"""Time spent on a candidate. Caches are emptied between runs, so that weights come from memory as they do in decoding."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to cut a product into programs."""

    rows: int
    """Outputs of a program."""
    columns: int
    """Blocks of 32 packed bytes of a row that are read at a time; of a GEMM, tokens of a program."""
    split: int
    """Parts of K, each with its own programs."""
    warps: int
    stages: int
    depth: int = 1
    """Blocks of 32 packed bytes that a GEMM without groups multiplies at a time."""


_best: dict[Hashable, Choice] = {}


def _milliseconds(run: Callable[[Choice], object], choice: Choice) -> float:
    """Median time of a launch; endless where the kernel does not fit the card."""
    import triton

    try:
        took: Any = triton.testing.do_bench(lambda: run(choice), warmup=WARM_UP_MS, rep=MEASURE_MS, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return float("inf")
    return float(took)


def tuned(
    key: Hashable, candidates: Callable[[], list[Choice]], run: Callable[[Choice], object], device: torch.device
) -> Choice:
    """The fastest candidate for a key. ``run`` launches the product with a candidate, on buffers of its own."""
    if key not in _best:
        options = candidates()
        if device.type != "cuda":  # Triton's interpreter: its time is the number of programs
            return max(options, key=lambda option: option.rows * option.columns / option.split)
        if torch.cuda.is_current_stream_capturing():
            return options[0]
        _best[key] = min(options, key=lambda option: _milliseconds(run, option))
    return _best[key]
