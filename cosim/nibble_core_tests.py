"""What every 4-bit core must pass: golden against exact sums, RTL against exact sums, cycle by cycle; on Verilator.

A test module subclasses `NibbleCoreTests` and names golden's function, the core and its engine.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from cosim.core_case import Pass, check, extreme_passes, random_passes, schedule
from cosim.core_harness import CoreHarness, run_in_python
from rtl.group_core import NibbleCore
from spec.config import GroupEngine, GroupMatmulConfig

BITS = (4, 8)


@cache
def harness(core: type[NibbleCore], cfg: GroupMatmulConfig) -> CoreHarness:
    """One Verilator build a core."""
    return CoreHarness({"core": core(cfg)})


class NibbleCoreTests:
    """The judge of one 4-bit core."""

    engine: GroupEngine
    core: type[NibbleCore]
    group_sums: Callable[[Tensor, Tensor, int], Tensor]
    """Golden's; a static method."""

    @property
    def config(self) -> GroupMatmulConfig:
        return GroupMatmulConfig(engine=self.engine, lanes=32, dequant_lanes=8, tokens=3, max_k=96, ring_rows=19)

    def test_takes_these_widths(self) -> None:
        assert self.config.weight_bits == BITS

    # 1. golden against exact sums

    @pytest.mark.parametrize("bits", BITS)
    def test_golden_equals_exact_sums(self, numbers: np.random.Generator, bits: int) -> None:
        for one in [*extreme_passes(numbers, self.config, bits), *random_passes(numbers, self.config, 20, bits=bits)]:
            got = self.group_sums(torch.from_numpy(one.acts)[None], torch.from_numpy(one.codes), bits)
            assert got[0].tolist() == one.sums().tolist()

    def test_golden_refuses_other_widths(self) -> None:
        with pytest.raises(ValueError, match="takes weights of 4 or 8 bits, not 3"):
            self.group_sums(torch.zeros(1, 32, dtype=torch.int8), torch.zeros(1, 32, dtype=torch.uint8), 3)

    # 2. RTL in Amaranth's simulator

    @pytest.mark.parametrize("lanes", [32, 64])
    def test_random_passes(self, numbers: np.random.Generator, lanes: int) -> None:
        cfg = replace(self.config, lanes=lanes, dequant_lanes=lanes // 4)
        core = self.core(cfg)
        passes = random_passes(numbers, cfg, 10)
        rows, cycles = schedule(numbers, cfg, passes, apart=1, stall=0.1)
        check(run_in_python(core, rows), cfg, passes, cycles, core.latency)

    # 3. RTL on Verilator

    def run(self, numbers: np.random.Generator, passes: Sequence[Pass], *, stall: float = 0.0) -> None:
        """Back to back, or with gaps; every slice is compared."""
        cfg = self.config
        rows, cycles = schedule(numbers, cfg, passes, apart=1, stall=stall)
        check(harness(self.core, cfg).run(rows)["core"], cfg, passes, cycles, self.core(cfg).latency)

    @pytest.mark.cosim
    @pytest.mark.parametrize("bits", BITS)
    def test_verilated_extremes_at_full_rate(self, numbers: np.random.Generator, bits: int) -> None:
        self.run(numbers, extreme_passes(numbers, self.config, bits))

    @pytest.mark.cosim
    @pytest.mark.parametrize("stall", [0.0, 0.2, 0.6])
    def test_verilated_random_passes_of_both_widths(self, numbers: np.random.Generator, stall: float) -> None:
        self.run(numbers, random_passes(numbers, self.config, 300), stall=stall)
