"""Schedules of rows for the group cores, and what must come out of them: test input for cosim/core_harness.py."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cosim.core_harness import Rows, Slices
from cosim.slow_group_pack import block_rows
from spec.config import K_GROUP, GroupEngine, GroupMatmulConfig

__all__ = ["Pass", "check", "extreme_passes", "random_passes", "schedule"]

ACT_MAX = 127


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One token of one block; `bits` of a code."""

    codes: NDArray[np.uint8]
    """(lanes, 32)"""
    acts: NDArray[np.int8]
    """(32,), or the bytes of what else the core takes"""
    bits: int

    @property
    def sum_acts(self) -> int:
        """A."""
        return int(self.acts.sum(dtype=np.int64))

    def sums(self) -> NDArray[np.int64]:
        """S of every output, exactly: (lanes,)."""
        return self.codes.astype(np.int64) @ self.acts.astype(np.int64)


def random_passes(source: np.random.Generator, cfg: GroupMatmulConfig, count: int, *, bits: int | None = None) -> list[Pass]:
    """Passes of all widths the engine takes, in random order, or of `bits`."""
    passes = []
    for _ in range(count):
        width = bits or int(source.choice(cfg.weight_bits))
        codes = source.integers(0, 1 << width, (cfg.lanes, K_GROUP), dtype=np.uint8)
        acts = source.integers(-ACT_MAX, ACT_MAX + 1, K_GROUP).astype(np.int8)
        passes.append(Pass(codes=codes, acts=acts, bits=width))
    return passes


def extreme_passes(source: np.random.Generator, cfg: GroupMatmulConfig, bits: int) -> list[Pass]:
    """Every extreme of the codes with every extreme of the activations.

    Codes: all 0, all highest, only the top bit, only the lowest, one hot (each output its own input), random.
    Activations: all of one value, of alternating sign, one hot, random, and the two that an entry's sign and parity meet.
    """
    full = (1 << bits) - 1
    hot = np.zeros((cfg.lanes, K_GROUP), dtype=np.uint8)
    hot[np.arange(cfg.lanes), np.arange(cfg.lanes) % K_GROUP] = full
    codes = [np.full_like(hot, value) for value in (0, full, 1 << (bits - 1), 1)]
    codes += [hot, source.integers(0, full + 1, hot.shape, dtype=np.uint8)]
    acts = [np.full(K_GROUP, value, dtype=np.int8) for value in (-ACT_MAX, -1, 0, 1, ACT_MAX)]
    acts.append(np.where(np.arange(K_GROUP) % 2, -ACT_MAX, ACT_MAX).astype(np.int8))
    for place, value in ((0, ACT_MAX), (3, -ACT_MAX), (13, 1), (K_GROUP - 1, -1)):
        acts.append(np.where(np.arange(K_GROUP) == place, value, 0).astype(np.int8))
    acts.append(source.integers(-ACT_MAX, ACT_MAX + 1, K_GROUP).astype(np.int8))
    return [Pass(codes=c, acts=a, bits=bits) for c in codes for a in acts]


def _starts(passes: Sequence[Pass], apart: int, gaps: Sequence[Sequence[int]]) -> list[list[int]]:
    """Cycle of each row of each pass; last rows are `apart` cycles apart or more."""
    cycles, cycle, last = [], 0, -apart
    for one, waits in zip(passes, gaps, strict=True):
        rows = []
        for row in range(one.bits):
            cycle += waits[row]
            if row == one.bits - 1:
                cycle = max(cycle, last + apart)
                last = cycle
            rows.append(cycle)
            cycle += 1
        cycles.append(rows)
    return cycles


def schedule(
    source: np.random.Generator, cfg: GroupMatmulConfig, passes: Sequence[Pass], *, apart: int, stall: float = 0.0
) -> tuple[Rows, list[list[int]]]:
    """The passes as soon after each other as the core allows (last rows `apart` cycles apart), with chances of a gap
    before each row. Other cycles hold noise. Also gives the cycle of each row of each pass."""
    gaps = [[int(source.geometric(1 - stall)) - 1 for _ in range(one.bits)] for one in passes]
    cycles = _starts(passes, apart, gaps)
    count = cycles[-1][-1] + 1 + apart + 16  # to see that nothing more comes
    control = Rows.record(count)
    for name, top in (("first", 2), ("last", 2), ("row", 8), ("bits", 16)):
        control[name] = source.integers(0, top, count)
    control["sum_acts"] = source.integers(-4096, 4096, count)
    codes = source.integers(0, 256, (count, cfg.row_bytes), dtype=np.uint8)
    acts = source.integers(-128, 128, (count, len(passes[0].acts))).astype(np.int8)
    for one, places in zip(passes, cycles, strict=True):
        for row, (cycle, data) in enumerate(zip(places, block_rows(one.codes, one.bits, cfg), strict=True)):
            control[cycle] = (1, row == 0, row == one.bits - 1, row, one.bits, one.sum_acts)
            codes[cycle] = np.frombuffer(data, dtype=np.uint8)
            acts[cycle] = one.acts
    return Rows(control=control, codes=codes, acts=acts), cycles


def check(
    got: Slices, cfg: GroupMatmulConfig, passes: Sequence[Pass], cycles: Sequence[Sequence[int]], latency: int
) -> None:
    """Every slice of every pass: its sums, its number, its cycle, and nothing else."""
    number, cycle, sums = [], [], []
    for one, places in zip(passes, cycles, strict=True):
        want = one.sums().reshape(cfg.slices, cfg.dequant_lanes)
        for part in range(cfg.slices):
            if cfg.engine is GroupEngine.LUT_TENSOR_CORE:
                completed = places[-1] + part
            else:
                completed = places[part if one.bits == 4 else 2 * part + 1]
            number.append(part)
            cycle.append(completed + latency)
            sums.append(want[part])
    assert got.number.tolist() == number
    assert got.cycle.tolist() == cycle
    wrong = np.argwhere(got.sums != np.array(sums))
    assert not len(wrong), [(place.tolist(), int(got.sums[tuple(place)]), int(sums[place[0]][place[1]])) for place in wrong[:5]]
