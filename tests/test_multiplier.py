"""Multiplier engine: golden against exact sums, RTL against exact sums, cycle by cycle; on Verilator."""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from cosim.core_case import Pass, check, extreme_passes, random_passes, schedule
from cosim.core_harness import CoreHarness, run_in_python
from golden import multiplier
from rtl.multiplier import MultiplierCore
from spec.config import GroupEngine, GroupMatmulConfig

CONFIG = GroupMatmulConfig(engine=GroupEngine.MULTIPLIER, lanes=32, dequant_lanes=8, tokens=3, max_k=96, ring_rows=19)
WIDER = replace(CONFIG, lanes=64, dequant_lanes=16)


@pytest.fixture
def source(rng: random.Random) -> np.random.Generator:
    return np.random.default_rng(rng.getrandbits(64))


# 1. golden against exact sums


@pytest.mark.parametrize("bits", CONFIG.weight_bits)
def test_golden_equals_exact_sums(source: np.random.Generator, bits: int) -> None:
    for one in [*extreme_passes(source, CONFIG, bits), *random_passes(source, CONFIG, 20, bits=bits)]:
        got = multiplier.group_sums(torch.from_numpy(one.acts)[None], torch.from_numpy(one.codes), bits)
        assert got[0].tolist() == one.sums().tolist()


def test_golden_refuses_other_widths() -> None:
    with pytest.raises(ValueError, match="takes weights of 4 or 8 bits, not 3"):
        multiplier.group_sums(torch.zeros(1, 32, dtype=torch.int8), torch.zeros(1, 32, dtype=torch.uint8), 3)


# 2. RTL in Amaranth's simulator


@pytest.mark.parametrize("cfg", [CONFIG, WIDER], ids=["32 lanes", "64 lanes"])
def test_random_passes(source: np.random.Generator, cfg: GroupMatmulConfig) -> None:
    core = MultiplierCore(cfg)
    passes = random_passes(source, cfg, 10)
    rows, cycles = schedule(source, cfg, passes, apart=1, stall=0.1)
    check(run_in_python(core, rows), cfg, passes, cycles, core.latency)


# 3. RTL on Verilator


@cache
def harness() -> CoreHarness:
    return CoreHarness({"core": MultiplierCore(CONFIG)})


def run(source: np.random.Generator, passes: Sequence[Pass], *, stall: float = 0.0) -> None:
    """Back to back, or with gaps; every slice is compared."""
    rows, cycles = schedule(source, CONFIG, passes, apart=1, stall=stall)
    check(harness().run(rows)["core"], CONFIG, passes, cycles, MultiplierCore(CONFIG).latency)


@pytest.mark.cosim
@pytest.mark.parametrize("bits", CONFIG.weight_bits)
def test_verilated_extremes_at_full_rate(source: np.random.Generator, bits: int) -> None:
    run(source, extreme_passes(source, CONFIG, bits))


@pytest.mark.cosim
@pytest.mark.parametrize("stall", [0.0, 0.2, 0.6])
def test_verilated_random_passes_of_both_widths(source: np.random.Generator, stall: float) -> None:
    run(source, random_passes(source, CONFIG, 300), stall=stall)
