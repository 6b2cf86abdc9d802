"""The whole matmul engine on INT16, FP8 and FP16 activations: weight stream, tables, lookups, scales, against golden."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cosim.bench_group_matmul import GroupCase, extreme_cases, random_case, run_cases
from cosim.group_harness import GroupHarness, GroupOperation, build_group_engine
from cosim.streamed_engine import StreamedEngine
from golden import act_formats, quantised_tables
from rtl.group_feed import GroupFeed
from rtl.group_matmul import GroupMatmul
from rtl.quantised_table_core import QuantisedTableCore
from rtl.table_feed import TableFeed
from spec.act_formats import ActFormat
from spec.config import K_GROUP, GroupEngine, GroupMatmulConfig

SIGNS = GroupMatmulConfig(engine=GroupEngine.LUT_TENSOR_CORE, lanes=32, dequant_lanes=8, tokens=3, max_k=160, ring_rows=20)
CONFIGS = {
    ActFormat.INT16: SIGNS,
    ActFormat.FP8: replace(SIGNS, dequant_lanes=32, tokens=5, max_k=96, ring_rows=16, full_table=True),
    ActFormat.FP16: SIGNS,
}
WEIGHT_BYTES = 32

each_form = pytest.mark.parametrize("form", list(ActFormat))


@dataclass(kw_only=True)
class TableCase(GroupCase):
    """`x` are bit patterns, int64 (M, K); `d` is not used."""

    form: ActFormat

    def operation(self, cfg: GroupMatmulConfig, *, prefetch: int = 0) -> GroupOperation:
        acts = self.x.numpy().astype("<u1" if self.form is ActFormat.FP8 else "<u2").view(np.int8)
        return replace(super().operation(cfg, prefetch=prefetch), activations=acts)

    def sums(self) -> Tensor:
        return quantised_tables.accumulate(quantised_tables.quantise(self.x, self.form), self.weights)


def of_form(case: GroupCase, form: ActFormat, generator: torch.Generator) -> TableCase:
    """The case with activations of groups of very different size, some of them zero, or of any bit pattern."""
    shape = case.x.shape
    if torch.rand(1, generator=generator) < 0.3:
        x = torch.randint(1 << form.bits, shape, generator=generator)
        if form is ActFormat.INT16:
            x[x == 1 << 15] = 0
    else:
        groups = (shape[0], shape[1] // K_GROUP, 1)
        size = torch.exp2(torch.randint(-12, 6, groups, generator=generator).float())
        size *= torch.rand(groups, generator=generator) > 0.1
        t = torch.randn(shape, generator=generator) * size.expand(-1, -1, K_GROUP).flatten(1)
        x, _ = act_formats.to_format(t, form)
    return TableCase(x=x, d=case.d, weights=case.weights, tile=case.tile, form=form)


def cases(rng: random.Random, form: ActFormat, plain: Sequence[GroupCase]) -> list[TableCase]:
    generator = torch.Generator().manual_seed(rng.getrandbits(48))
    return [of_form(case, form, generator) for case in plain]


@cache
def library(form: ActFormat) -> Path:
    return build_group_engine(StreamedEngine(CONFIGS[form], weight_bytes=WEIGHT_BYTES, form=form))


@pytest.fixture
def harness(form: ActFormat) -> GroupHarness:
    return GroupHarness(library(form), CONFIGS[form])


@pytest.mark.cosim
@each_form
@pytest.mark.parametrize("overlap", [False, True])
def test_random_operations(rng: random.Random, harness: GroupHarness, form: ActFormat, overlap: bool) -> None:
    """W1 to W8, back to back and with every stream stalling."""
    cfg = CONFIGS[form]
    plain = [random_case(rng, cfg) for _ in range(30)]
    run_cases(harness, cfg, WEIGHT_BYTES, cases(rng, form, plain), rng, overlap=overlap)
    operations = cases(rng, form, plain)
    run_cases(harness, cfg, WEIGHT_BYTES, operations, rng, overlap=overlap, stall_in=0.3, stall_out=0.6, stall_op=0.3)


@pytest.mark.cosim
@each_form
def test_extreme_weights(rng: random.Random, harness: GroupHarness, form: ActFormat) -> None:
    run_cases(harness, CONFIGS[form], WEIGHT_BYTES, cases(rng, form, list(extreme_cases(CONFIGS[form]).values())), rng)


@pytest.mark.cosim
@each_form
def test_cycles_are_those_of_int8_activations(rng: random.Random, harness: GroupHarness, form: ActFormat) -> None:
    """Tables are made as the tile is written: a pass takes as long, and an operation waits for the last tables only."""
    cfg = CONFIGS[form]
    engine = GroupMatmul(cfg, core=QuantisedTableCore(cfg), feed=TableFeed(cfg, form))
    for bits in cfg.weight_bits:
        plain = random_case(rng, cfg, bits=bits, tokens=cfg.tokens, k=2 * K_GROUP, n=cfg.lanes)
        [result] = run_cases(harness, cfg, WEIGHT_BYTES, cases(rng, form, [plain]), rng, prefetched=True)
        assert result.cycles == engine.cycles(bits=bits, k_blocks=2, row_blocks=1, tokens=cfg.tokens)


@pytest.mark.cosim
@each_form
def test_tile_stays_for_the_next_operation(rng: random.Random, harness: GroupHarness, form: ActFormat) -> None:
    cfg = CONFIGS[form]
    first, second = cases(rng, form, [random_case(rng, cfg, k=64, tokens=2) for _ in range(2)])
    second = replace(second, x=first.x)
    operations = [first.operation(cfg), replace(second.operation(cfg), activations=None, scales=None)]
    stream = first.segment(cfg, WEIGHT_BYTES) + second.segment(cfg, WEIGHT_BYTES)
    results, _ = harness.run(stream, WEIGHT_BYTES, operations, overlap=True, stall_out=0.3)
    for case, result in zip((first, second), results, strict=True):
        assert np.array_equal(result.sums, case.expected(cfg)[0])


def test_core_and_feed_must_fit() -> None:
    with pytest.raises(ValueError, match=r"^the core takes 512 bits of a group, the feed holds 256$"):
        GroupMatmul(SIGNS, core=QuantisedTableCore(SIGNS), feed=GroupFeed(SIGNS))
