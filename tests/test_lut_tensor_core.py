"""LUT Tensor Core: golden against exact sums, RTL against exact sums, cycle by cycle; on Verilator."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from cosim.core_case import Pass, check, extreme_passes, random_passes, schedule
from cosim.core_harness import CoreHarness, run_in_python
from golden import lut_tensor_core
from rtl.lut_tensor_core import LutTensorCore
from spec.config import GroupEngine, GroupMatmulConfig

SIGNS = GroupMatmulConfig(
    engine=GroupEngine.LUT_TENSOR_CORE, lanes=32, dequant_lanes=8, tokens=3, max_k=96, ring_rows=19, full_table=False
)
VERILATED = {"signs, 4 slices": SIGNS, "full, 2 slices": replace(SIGNS, dequant_lanes=16, full_table=True)}
IN_PYTHON = {
    "signs, 1 slice": replace(SIGNS, dequant_lanes=32),
    "full, 1 slice": replace(SIGNS, dequant_lanes=32, full_table=True),
    "64 lanes, signs, 2 slices": replace(SIGNS, lanes=64, dequant_lanes=32),
    "64 lanes, full, 4 slices": replace(SIGNS, lanes=64, dequant_lanes=16, full_table=True),
}
BITS = SIGNS.weight_bits


# 1. golden: the tables, step by step, against exact sums


@pytest.mark.parametrize("bits", BITS)
def test_golden_equals_exact_sums(numbers: np.random.Generator, bits: int) -> None:
    for one in [*extreme_passes(numbers, SIGNS, bits), *random_passes(numbers, SIGNS, 20, bits=bits)]:
        got = lut_tensor_core.group_sums(torch.from_numpy(one.acts)[None], torch.from_numpy(one.codes), bits)
        assert got[0].tolist() == one.sums().tolist()


# 2. RTL in Amaranth's simulator


@pytest.mark.parametrize("name", IN_PYTHON)
def test_random_passes(numbers: np.random.Generator, name: str) -> None:
    cfg = IN_PYTHON[name]
    core = LutTensorCore(cfg)
    passes = random_passes(numbers, cfg, 12)
    rows, cycles = schedule(numbers, cfg, passes, apart=cfg.slices, stall=0.1)
    check(run_in_python(core, rows), cfg, passes, cycles, core.latency)


# 3. RTL on Verilator


@cache
def harness() -> CoreHarness:
    return CoreHarness({f"core_{n}": LutTensorCore(cfg) for n, cfg in enumerate(VERILATED.values())})


def run(numbers: np.random.Generator, name: str, passes: Sequence[Pass], *, stall: float = 0.0) -> None:
    """Back to back, or with gaps; every slice is compared."""
    cfg = VERILATED[name]
    rows, cycles = schedule(numbers, cfg, passes, apart=cfg.slices, stall=stall)
    got = harness().run(rows)[f"core_{list(VERILATED).index(name)}"]
    check(got, cfg, passes, cycles, LutTensorCore(cfg).latency)


@pytest.mark.cosim
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", VERILATED)
def test_verilated_extremes_at_full_rate(numbers: np.random.Generator, name: str, bits: int) -> None:
    run(numbers, name, extreme_passes(numbers, SIGNS, bits))


@pytest.mark.cosim
@pytest.mark.parametrize("stall", [0.0, 0.2, 0.6])
@pytest.mark.parametrize("name", VERILATED)
def test_verilated_random_passes_of_all_widths(numbers: np.random.Generator, name: str, stall: float) -> None:
    run(numbers, name, random_passes(numbers, SIGNS, 300), stall=stall)
