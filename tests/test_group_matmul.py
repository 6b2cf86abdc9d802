"""Group engines behind their weight stream: RTL against golden on Verilator, cycles, clear; the activation tile alone."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cosim.bench_group_matmul import GroupCase, extreme_cases, random_case, ring_blocks, run_cases
from cosim.group_harness import GroupHarness, build_group_engine
from cosim.pysim import run
from cosim.streamed_engine import StreamedEngine
from golden.group_dequant import act_parts
from rtl.group_feed import GroupFeed
from rtl.group_matmul import GroupMatmul
from spec.config import K_GROUP, LANES, GroupEngine, GroupMatmulConfig

TABLE = GroupMatmulConfig(
    engine=GroupEngine.LUT_TENSOR_CORE, lanes=32, dequant_lanes=8, tokens=3, max_k=160, ring_rows=20
)
"""Four slices of one beat: passes of 1, 2 and 3 bits wait for their slices."""

WIDE = replace(TABLE, dequant_lanes=32, tokens=5, max_k=96, ring_rows=16, full_table=True)
"""One slice of four beats: W1 gives results four times as fast as they leave."""

ENGINES = {
    "table": (TABLE, 32),
    "wide": (WIDE, 64),
    "mixpe": (replace(TABLE, engine=GroupEngine.MIXPE, tokens=4, max_k=128, ring_rows=17), 32),
    "multiplier": (replace(TABLE, engine=GroupEngine.MULTIPLIER, tokens=2, ring_rows=16), 128),
}
"""Configuration, bytes of a weight beat."""

cosim = pytest.mark.cosim
each_engine = pytest.mark.parametrize("name", ENGINES)


@cache
def library(name: str) -> Path:
    cfg, weight_bytes = ENGINES[name]
    return build_group_engine(StreamedEngine(cfg, weight_bytes=weight_bytes))


@pytest.fixture
def harness(name: str) -> GroupHarness:
    return GroupHarness(library(name), ENGINES[name][0])


Check = Callable[..., list[int]]


@pytest.fixture
def check(harness: GroupHarness, name: str, rng: random.Random) -> Check:
    """Runs cases on the engine, compares every beat; cycles of each."""
    cfg, weight_bytes = ENGINES[name]

    def run_and_compare(cases: Sequence[GroupCase], **how: Any) -> list[int]:
        return [result.cycles for result in run_cases(harness, cfg, weight_bytes, cases, rng, **how)]

    return run_and_compare


# 1. against golden

STALLS = {
    "none": {},
    "in": {"stall_in": 0.5, "stall_op": 0.5},
    "out": {"stall_out": 0.8},
    "all": {"stall_in": 0.3, "stall_out": 0.6, "stall_op": 0.3},
}


@cosim
@each_engine
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("stalls", STALLS)
def test_random_operations(rng: random.Random, check: Check, name: str, stalls: str, overlap: bool) -> None:
    cases = [random_case(rng, ENGINES[name][0]) for _ in range(30)]
    check(cases, overlap=overlap, **STALLS[stalls])


@cosim
@each_engine
@pytest.mark.parametrize("stalls", ["none", "all"])
def test_extremes(check: Check, name: str, stalls: str) -> None:
    check(list(extreme_cases(ENGINES[name][0]).values()), **STALLS[stalls])


def small_cases(rng: random.Random, cfg: GroupMatmulConfig) -> list[GroupCase]:
    """Every width, with the fewest and the most tokens, groups and row blocks."""
    return [
        random_case(rng, cfg, bits=bits, tokens=tokens, k=k, n=n)
        for bits in cfg.weight_bits
        for tokens in (1, 2, cfg.tokens)
        for k in (K_GROUP, 2 * K_GROUP, cfg.max_k)
        for n in (1, cfg.lanes, 5 * cfg.lanes)
    ]


@cosim
@each_engine
def test_small_operations(rng: random.Random, check: Check, name: str) -> None:
    """Fewer passes than pipeline stages, results faster than they leave; operations that follow each other at once."""
    cases = small_cases(rng, ENGINES[name][0])
    check(cases)
    check(cases, overlap=True)
    check(cases, overlap=True, stall_out=0.9)
    check(cases, stall_in=0.9)


@cosim
@each_engine
def test_tile_stays_for_the_next_operation(rng: random.Random, harness: GroupHarness, name: str) -> None:
    """Two matrices on the same activations, as gate and up have them."""
    cfg, weight_bytes = ENGINES[name]
    first = random_case(rng, cfg, k=64)
    second = random_case(rng, cfg, k=64, tokens=first.x.shape[0])
    second = replace(second, x=first.x, d=first.d)
    operations = [first.operation(cfg), replace(second.operation(cfg), activations=None, scales=None)]
    stream = first.segment(cfg, weight_bytes) + second.segment(cfg, weight_bytes)
    results, _ = harness.run(stream, weight_bytes, operations, overlap=True, stall_out=0.3)
    for case, result in zip((first, second), results, strict=True):
        assert np.array_equal(result.sums, case.expected(cfg)[0])


@cosim
@each_engine
def test_widths_change_between_operations_on_a_tile(rng: random.Random, harness: GroupHarness, name: str) -> None:
    """The next operation's passes may be shorter than the slices of the last pass take to leave."""
    cfg, weight_bytes = ENGINES[name]
    for before in cfg.weight_bits:
        for after in cfg.weight_bits:
            first, second = (random_case(rng, cfg, bits=bits, k=64, n=3 * cfg.lanes, tokens=2) for bits in (before, after))
            second = replace(second, x=first.x, d=first.d)
            operations = [first.operation(cfg), replace(second.operation(cfg), activations=None, scales=None)]
            stream = first.segment(cfg, weight_bytes) + second.segment(cfg, weight_bytes)
            results, _ = harness.run(stream, weight_bytes, operations, overlap=True)
            for case, result in zip((first, second), results, strict=True):
                assert np.array_equal(result.sums, case.expected(cfg)[0]), (before, after)


# 2. cycles


@cosim
@each_engine
def test_cycles_are_the_formula(rng: random.Random, check: Check, name: str) -> None:
    """Rows are there: a ring full of them, then a row as fast as it is used (tokens of a block read it again)."""
    cfg, weight_bytes = ENGINES[name]
    engine = GroupMatmul(cfg)
    for bits in cfg.weight_bits:
        row_beats = cfg.row_bytes // weight_bytes
        fed = -(-cfg.block_rows(bits) * row_beats // max(bits, cfg.slices))  # tokens whose passes take as long as a block
        for tokens in range(1, cfg.tokens + 1):
            for k_blocks, row_blocks in ((1, 1), (2, 1), (1, 6), (2, 5), (cfg.max_k_blocks, 2)):
                blocks = k_blocks * row_blocks
                if tokens < fed and blocks > ring_blocks(cfg, bits):
                    continue
                case = random_case(rng, cfg, bits=bits, tokens=tokens, k=K_GROUP * k_blocks, n=cfg.lanes * row_blocks)
                [cycles] = check([case], prefetched=True)
                want = engine.cycles(bits=bits, k_blocks=k_blocks, row_blocks=row_blocks, tokens=tokens)
                assert cycles == want, (bits, tokens, k_blocks, row_blocks)


@pytest.mark.parametrize("engine", GroupEngine)
def test_long_operations_take_the_cycles_of_their_passes(engine: GroupEngine) -> None:
    """By the formula that the test above proves: 1536 x 1536, within 3 % for two tokens and more; W1 : W2 : W4 = 1 : 2 : 4."""
    cfg = GroupMatmulConfig(engine=engine, lanes=128, dequant_lanes=32, tokens=16, max_k=1536, ring_rows=64)
    sizes = {"k_blocks": 48, "row_blocks": 12}
    for tokens in (2, 7, 16):
        for bits in cfg.weight_bits:
            ideal = cfg.matmul_cycles(1536, 1536, bits=bits, tokens=tokens)
            assert ideal < GroupMatmul(cfg).cycles(bits=bits, tokens=tokens, **sizes) <= 1.03 * ideal
    if engine is GroupEngine.LUT_TENSOR_CORE:
        fast = GroupMatmul(replace(cfg, dequant_lanes=128))
        one, two, four = (fast.cycles(bits=bits, tokens=16, **sizes) for bits in (1, 2, 4))
        assert 1.94 * one < two < 2 * one and 3.88 * one < four < 4 * one


@cosim
@each_engine
def test_one_token_takes_the_rows_of_the_stream(rng: random.Random, check: Check, name: str) -> None:
    """Nothing prefetched, a beat a cycle: as long as the stream, or as the slices where those are more."""
    cfg, weight_bytes = ENGINES[name]
    for bits in cfg.weight_bits:
        k_blocks, row_blocks = cfg.max_k_blocks, 20
        case = random_case(rng, cfg, bits=bits, tokens=1, k=K_GROUP * k_blocks, n=cfg.lanes * row_blocks)
        [cycles] = check([case])
        rows = max(cfg.block_rows(bits) * cfg.row_bytes // weight_bytes, cfg.slices)
        results = cfg.lanes // LANES
        assert cycles <= 1.03 * row_blocks * max(k_blocks * rows, results) + 30 + results


# 3. clear


@cosim
@each_engine
def test_clear_forgets_an_operation(rng: random.Random, harness: GroupHarness, check: Check, name: str) -> None:
    """In every cycle of an operation; the next one begins at once."""
    cfg, weight_bytes = ENGINES[name]
    bits = cfg.weight_bits[0]
    case = random_case(rng, cfg, bits=bits, tokens=2, k=64, n=2 * cfg.lanes)
    sizes = case.sizes(cfg)
    last = GroupMatmul(cfg).cycles(**sizes, tokens=2)
    following = random_case(rng, cfg, tokens=1, n=cfg.lanes, k=K_GROUP)
    same = replace(following.operation(cfg), activations=None, scales=None)
    for after in range(1, last + 4):
        stream, operation = case.segment(cfg, weight_bytes), case.operation(cfg)
        harness.run(stream, weight_bytes, [operation], clear_after=after)
        check([following])
        harness.run(stream, weight_bytes, [replace(operation, activations=None, scales=None)], clear_after=after)
        check([case], stall_out=0.2)
    stream = following.segment(cfg, weight_bytes)
    check([following])
    harness.run(stream, weight_bytes, [same], clear_after=5)
    results, _ = harness.run(stream, weight_bytes, [same])  # the tile outlives a clear
    assert np.array_equal(results[0].sums, following.expected(cfg)[0])


# 4. the activation tile alone


def test_feed_equals_golden(rng: random.Random) -> None:
    cfg = replace(TABLE, tokens=5)
    dut = GroupFeed(cfg)
    generator = torch.Generator().manual_seed(rng.getrandbits(48))
    shown: list[tuple[int, int, int, int]] = []
    wanted: list[tuple[int, int, int, int]] = []
    tiles = []
    for _ in range(3):  # each over the one before, of another size
        tokens, groups = rng.randint(1, 5), rng.randint(1, 5)
        x = torch.randint(-128, 128, (tokens, groups, K_GROUP), generator=generator)
        d = torch.randint(0, 255 << 7, (tokens, groups), generator=generator)
        d *= torch.rand(tokens, groups, generator=generator) > 0.2
        tiles.append((x, d))

    async def process(ctx: Any) -> None:
        for x, d in tiles:
            for token, rows in enumerate(x.tolist()):
                for group, values in enumerate(rows):
                    ahead = rng.random() < 0.5
                    for row in range(4 + ahead):
                        scale = row == 0
                        ctx.set(dut.scale.en, int(scale))
                        if scale:
                            ctx.set(dut.scale.token, token)
                            ctx.set(dut.scale.group, group)
                            ctx.set(dut.scale.data, int(d[token, group]))
                        if row >= ahead:
                            number = row - ahead
                            word = bytes(value & 255 for value in values[LANES * number :][:LANES])
                            ctx.set(dut.act.token, token)
                            ctx.set(dut.act.row, 4 * group + number)
                            ctx.set(dut.act.data, int.from_bytes(word, "little"))
                        ctx.set(dut.act.en, int(row >= ahead))
                        await ctx.tick()
            ctx.set(dut.act.en, 0)
            ctx.set(dut.scale.en, 0)
            significand, field, top = act_parts(d)
            for token, group in np.ndindex(*d.shape):
                ctx.set(dut.i_en, 1)
                ctx.set(dut.i_token, token)
                ctx.set(dut.i_group, group)
                await ctx.tick()
                ctx.set(dut.i_en, 0)
                for _ in range(rng.randint(0, 2)):
                    await ctx.tick()
                values = [ctx.get(port) for port in (dut.o_acts, dut.o_sum, dut.o_significand, dut.o_shift)]
                shown.append((values[0], values[1], values[2], values[3]))
                acts = bytes(value & 255 for value in x[token, group].tolist())
                shift = min(int(top[token] - field[token, group]), 63)
                total = int(x[token, group].sum())
                wanted.append((int.from_bytes(acts, "little"), total, int(significand[token, group]), shift))

    run(dut, process, max_cycles=1_000)
    assert shown == wanted


# 5. configurations that cannot work


def test_vectors_that_overflow_are_refused() -> None:
    with pytest.raises(ValueError, match="accumulators have at most 64 bits, max_k = 1048576 needs 65: lower max_k"):
        GroupMatmul(replace(TABLE, max_k=1 << 20)).elaborate(None)
