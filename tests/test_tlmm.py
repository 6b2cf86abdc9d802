"""Table-lookup engine: golden against float64 and against the lookups, RTL against golden, cycles, Verilator."""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import chain, pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from amaranth.sim import Simulator

from cosim.bench_tlmm import (
    MatmulCase,
    TlmmBench,
    extreme_cases,
    random_case,
    run_bench,
    streamed_engine,
)
from cosim.cycle_bench import CycleBench, geometric_stalls, run_in_python
from cosim.matmul_harness import MatmulHarness, Operation, build_engine
from cosim.pysim import no_stalls, periodic
from cosim.slow_pack import aux_segment, segment
from cosim.streamed_engine import StreamedEngine, matmul_op
from golden import layout, tlmm
from rtl.tlmm import steady_cycles, tlmm_cycles
from rtl.tlmm_feed import feed_cycles
from rtl.tlmm_order import PassOrder
from rtl.tlmm_tables import fill_order, partial_sums, tree_stages
from spec.config import LANES, AcceleratorConfig, TlmmConfig, ceil_div
from spec.layout import DENSE_CODES, SegmentKind
from spec.presets import KV260, SIM, TEST

HALF = TlmmConfig(tables=4, outputs=24, full_table=False, tokens=5, max_k=70, acc_rows=21, ring_rows=19)
"""One partial sum a lane, three beats a row, a ring that is no multiple of anything."""

DEEP = TlmmConfig(tables=20, outputs=8, full_table=True, tokens=4, max_k=130, acc_rows=11, ring_rows=16)
"""Three pipeline stages, one beat a row, 5 banks."""

ENGINES = {
    "test": streamed_engine(TEST),
    "half": StreamedEngine(HALF, weight_bytes=32, aux_beats=4),
    "deep": StreamedEngine(DEEP, weight_bytes=32, aux_beats=4),
}


def engine(name: str) -> StreamedEngine[TlmmConfig]:
    """A fresh component: one can be elaborated once."""
    known = ENGINES[name]
    return StreamedEngine(known.cfg, weight_bytes=known.weight_bytes, aux_beats=4)


# 1. golden


@pytest.mark.parametrize("planes", [1, 2, 5])
def test_golden_equals_float64(rng: random.Random, planes: int) -> None:
    """float64 is exact here: sums are below 1300 * 128 * 121 < 2^53."""
    generator = torch.Generator().manual_seed(rng.getrandbits(48))
    x = torch.randint(-128, 128, (3, 1300), dtype=torch.int8, generator=generator)
    trits = torch.randint(-1, 2, (planes, 70, 1300), dtype=torch.int8, generator=generator)
    assert torch.equal(tlmm.matmul(x, trits).double(), tlmm.tlmm_float(x, trits))


@pytest.mark.parametrize("planes", [1, 2, 3, 4, 5])
def test_golden_does_not_round_the_largest_sums(planes: int) -> None:
    """All of one sign, and one odd summand at the end that a rounded sum would lose."""
    x = torch.full((1, 4096), -128, dtype=torch.int8)
    x[0, -1] = 127
    trits = torch.ones((planes, 2, 4096), dtype=torch.int8)
    trits[:, 1] = -1
    weight = (3**planes - 1) // 2
    assert tlmm.combine(trits).tolist() == [[weight] * 4096, [-weight] * 4096]
    total = (4095 * -128 + 127) * weight
    assert tlmm.matmul(x, trits).tolist() == [[total, -total]]


@pytest.mark.parametrize("name", ENGINES)
def test_golden_equals_the_lookups(rng: random.Random, name: str) -> None:
    cfg = ENGINES[name].cfg
    cases = [random_case(rng, cfg, planes=planes) for planes in (1, 2, 5)] + list(extreme_cases(cfg).values())
    for case in cases:
        count, n, k = case.planes.shape
        pad = -k % cfg.k_block
        planes = torch.nn.functional.pad(case.planes, (0, pad))
        x = torch.nn.functional.pad(case.x, (0, pad), value=-77)  # stale activations meet zero weights
        assert torch.equal(tlmm.lookup_matmul(cfg, x, planes), tlmm.matmul(case.x, case.planes).long()), (count, n, k)


@pytest.mark.parametrize("full", [True, False])
def test_fill_order_covers_the_table_by_single_steps(full: bool) -> None:
    order = fill_order(full)
    assert len(order) == replace(TEST.tlmm, full_table=full).fill_cycles
    values = {a + 3 * b + 9 * c for a, b, c in order}
    assert values == set(range(-13 if full else 0, 14))
    for before, after in zip([(0, 0, 0), *order], order, strict=False):
        assert sum(abs(a - b) for a, b in zip(before, after, strict=True)) == 1


def test_tree_of_every_size() -> None:
    shape = {tables: (tree_stages(tables), partial_sums(tables)) for tables in (1, 4, 5, 8, 9, 16, 28, 32, 33)}
    assert shape == {
        1: (1, 1), 4: (1, 1), 5: (1, 2), 8: (1, 2), 9: (2, 1), 16: (2, 1), 28: (2, 2), 32: (2, 2), 33: (3, 1),
    }  # fmt: skip


# 2. RTL against golden, in Amaranth's simulator

STALLS = {
    "none": (0.0, 0.0),
    "in": (0.4, 0.0),
    "out": (0.0, 0.6),
    "both": (0.3, 0.5),
}


@pytest.mark.parametrize("stalls", STALLS)
@pytest.mark.parametrize("name", ENGINES)
def test_rtl_equals_golden(rng: random.Random, name: str, stalls: str) -> None:
    dut = engine(name)
    cases = [random_case(rng, dut.cfg) for _ in range(4)] + [extreme_cases(dut.cfg)["least sum"]]
    before, after = (geometric_stalls(rng, p) if p else no_stalls for p in STALLS[stalls])
    run_in_python(dut, TlmmBench(dut, cases, in_stalls=before, out_stalls=after), 20_000)


@pytest.mark.parametrize("stalls", STALLS)
@pytest.mark.parametrize("name", ENGINES)
def test_operations_overlap(rng: random.Random, name: str, stalls: str) -> None:
    """Offered, and their activations written, as soon as the engine allows; some use the activations before."""
    dut = engine(name)
    cfg = dut.cfg
    sizes = [{"n": rng.randint(1, 3 * cfg.outputs), "k": rng.randint(1, 3 * cfg.k_block), "tokens": m} for m in (1, 3, 1, 2)]
    cases = [case for size in sizes for case in [random_case(rng, cfg, **size)] * rng.randint(1, 2)]
    before, after = (geometric_stalls(rng, p) if p else no_stalls for p in STALLS[stalls])
    bench = TlmmBench(dut, cases, in_stalls=before, out_stalls=after, overlap=True)
    run_in_python(dut, bench, 20_000)
    assert bench.overlapped >= 3


@pytest.mark.parametrize("overlap", [False, True])
def test_rtl_equals_golden_when_the_sink_rests_periodically(rng: random.Random, overlap: bool) -> None:
    dut = engine("test")
    cases = [random_case(rng, dut.cfg, tokens=tokens, n=40, k=50) for tokens in (1, 3, 2)]
    run_in_python(dut, TlmmBench(dut, cases, out_stalls=lambda: periodic(3, 1), overlap=overlap), 5_000)


def test_a_full_result_store_holds_the_lookups(rng: random.Random) -> None:
    """The sink sleeps until there is no room for results, then takes all of several operations."""
    dut = engine("test")
    cases = [random_case(rng, dut.cfg, tokens=3, n=n, k=40, planes=1) for n in (80, 192, 256)]
    bench = TlmmBench(dut, cases, out_stalls=lambda: chain(repeat(True, 700), repeat(False)), overlap=True)
    run_in_python(dut, bench, 3_000)
    assert bench.cycle > 700 + sum(len(case.expected(dut.cfg)) for case in cases)


class ClearedBench(CycleBench):
    """Clears the engine after some cycles with the first bench, whose weights are forgotten; goes on with the second."""

    def __init__(self, first: TlmmBench, after: int, second: TlmmBench) -> None:
        super().__init__()
        self._left = after
        self._bench, self._second = first, second
        self.inputs = first.inputs

    def step(self, seen: dict[str, int]) -> bool:
        self.cycle += 1
        if seen["i_clear"]:
            self._bench = self._second
            self.inputs = self._bench.inputs
            return False
        done = self._bench.step(seen)
        self._left -= 1
        self.inputs["i_clear"] = int(self._left == 0)
        return done and self._left < 0


@pytest.mark.parametrize("after", [5, 57, 65, 89, 97, 116, 131, 149])
@pytest.mark.parametrize("overlap", [False, True])
def test_clear_forgets_an_operation(rng: random.Random, after: int, overlap: bool) -> None:
    """In the middle of activations, tables, lookups, results; with ``overlap`` also of operations that wait or drain."""
    dut = engine("test")
    small = {"tokens": 2, "n": 30, "k": 30, "planes": 1}
    dropped = [random_case(rng, dut.cfg, **small)] * 3 + [random_case(rng, dut.cfg, tokens=2, n=60, k=60, planes=2)]
    cases = [random_case(rng, dut.cfg, n=n, k=40) for n in (20, 33)]
    first, second = (TlmmBench(dut, list(some), overlap=overlap) for some in (dropped, cases))
    run_in_python(dut, ClearedBench(first, after, second), 5_000)


# 3. order and cycles


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 1, 1), (3, 1, 5), (3, 3, 1), (2, 2, 2), (1, 3, 2)], ids=str)
@pytest.mark.parametrize("group", [1, 2])
def test_order_of_the_passes(sizes: tuple[int, int, int], group: int) -> None:
    k_blocks, tokens, planes = sizes
    group = min(group, k_blocks)
    wanted = []
    for plane in range(planes):
        size = group if plane == planes - 1 else 1
        blocks = list(range(k_blocks))
        groups = [[block] for block in blocks[: k_blocks - size]] + [blocks[k_blocks - size :]]
        if size == 1:
            groups = [[block] for block in blocks]
        for members in groups:
            for token in range(tokens):
                for block in members:
                    wanted.append(
                        {
                            "token": token,
                            "first": plane == block == 0,
                            "triple": plane != 0 and block == 0,
                            "emit": plane == planes - 1 and block == k_blocks - 1,
                            "ends": block == members[-1],
                            "last_token": token == tokens - 1,
                            "last_block": members[-1] == k_blocks - 1,
                            "last": False,
                        }
                    )
    wanted[-1]["last"] = True
    dut, got = PassOrder(TEST.tlmm), []

    async def walk(ctx: Any) -> None:
        for _ in range(2):  # the second begins with the last step of the first
            ctx.set(dut.i_shape, {"tokens": tokens, "k_blocks": k_blocks, "planes": planes, "group": group})
            ctx.set(dut.i_start, 1)
            await ctx.tick()
            ctx.set(dut.i_start, 0)
            for number in range(len(wanted)):
                assert ctx.get(dut.o_active)
                ctx.set(dut.i_next, 0)
                for _ in range(number % 3):
                    await ctx.tick()
                got.append({name: ctx.get(getattr(dut, f"o_{name}")) for name in wanted[0]})
                ctx.set(dut.i_next, 1)
                if number < len(wanted) - 1:
                    await ctx.tick()
        await ctx.tick()
        assert not ctx.get(dut.o_active)

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(walk)
    simulator.run()
    assert got == wanted * 2


@pytest.mark.parametrize("name", ENGINES)
def test_cycles_are_the_formula(rng: random.Random, name: str) -> None:
    """Rows are prefetched. Short passes (table fill decides), long ones, several tokens, planes, grouped blocks or not."""
    dut = engine(name)
    cfg = dut.cfg
    room = cfg.ring_rows - 5
    sizes = [(1, 1, 1, 1), (1, 3, 1, 1), (1, 1, room, 1), (1, 2, room // 2, 1), (2, 1, 2, 2), (2, 2, 1, cfg.tokens)]
    sizes += [(1, 2, min(cfg.group_rows, room // 2), cfg.tokens), (1, 1, min(room, cfg.acc_rows // 2), 2)]
    cases = []
    for planes, k_blocks, row_blocks, tokens in sizes:
        k, n = min(cfg.max_k, k_blocks * cfg.k_block), min(row_blocks, cfg.acc_rows // tokens) * cfg.outputs
        cases.append(random_case(rng, cfg, planes=planes, k=k, n=n, tokens=tokens))
    run_in_python(dut, TlmmBench(dut, cases, check_cycles=True), 5_000)


LONG = TlmmConfig(tables=4, outputs=16, full_table=False, tokens=3, max_k=36, acc_rows=150, ring_rows=150)
"""A strip of more rows than wait for room when they are finished."""


def test_cycles_are_the_formula_when_results_hold_up_a_pass(rng: random.Random) -> None:
    dut = StreamedEngine(LONG, weight_bytes=16, aux_beats=4)
    cases = [random_case(rng, LONG, planes=1, k=36, n=n * 16, tokens=tokens) for n, tokens in ((50, 3), (43, 2))]
    run_in_python(dut, TlmmBench(dut, cases, check_cycles=True), 5_000)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("tile", [False, True])
def test_operations_in_a_row_take_the_cycles_of_their_lookups(rng: random.Random, name: str, tile: bool) -> None:
    """Equal operations end `steady_cycles` after each other."""
    dut = engine(name)
    cfg = dut.cfg
    tokens = cfg.tokens if tile else 1
    row_blocks = min(cfg.acc_rows // tokens, cfg.group_rows) if tile else 5
    case = random_case(rng, cfg, planes=1, k=3 * cfg.k_block, n=row_blocks * cfg.outputs, tokens=tokens)
    bench = TlmmBench(dut, [case] * 4, check_cycles=True, overlap=True)
    run_in_python(dut, bench, 10_000)
    assert bench.overlapped == 3


# 4. configurations that cannot work


def test_bad_configurations() -> None:
    with pytest.raises(ValueError, match="outputs must be a multiple of 8, not 12"):
        replace(HALF, outputs=12)
    with pytest.raises(ValueError, match="cells must be a multiple of 64 bytes a beat, at least 3 times: 96"):
        StreamedEngine(HALF, weight_bytes=64, aux_beats=4)


# 5. Verilator


@cache
def library(name: str) -> Path:
    return build_engine(engine(name))


def run_cases(name: str, cases: Sequence[MatmulCase], rng: random.Random, stalls: Sequence[float], overlap: bool) -> None:
    """Run cases, each when the one before has ended or as soon as it is taken; compare every beat."""
    known = ENGINES[name]
    cfg, size = known.cfg, known.weight_bytes
    weights, operations = b"", []
    for case in cases:
        weights += aux_segment(rng.randbytes(size * rng.randint(0, 2)), size) + case.segment(cfg, size)
        padded = np.full((case.x.shape[0], -(-case.x.shape[1] // LANES) * LANES), rng.randint(-128, 127), dtype=np.int8)
        padded[:, : case.x.shape[1]] = case.x
        beats = len(case.expected(cfg))
        operations.append(Operation(payload=case.op(cfg), activations=padded, beats=beats))
    results, _ = MatmulHarness(library(name)).run(
        weights, size, operations, stall_in=stalls[0], stall_out=stalls[1], stall_op=stalls[2], overlap=overlap,
        seed=rng.getrandbits(32),
    )  # fmt: skip
    for number, (case, result) in enumerate(zip(cases, results, strict=True)):
        got = list(zip(result.tokens.tolist(), result.sums.tolist(), strict=True))
        assert got == case.expected(cfg), (number, case.sizes(cfg), case.x.shape)
        assert overlap or result.lookups == case.lookups(cfg)
    assert sum(result.lookups for result in results) == sum(case.lookups(cfg) for case in cases)


@pytest.mark.cosim
@pytest.mark.parametrize("overlap", [False, True], ids=["alone", "overlap"])
@pytest.mark.parametrize("stalls", [(0, 0, 0), (0.5, 0, 0.5), (0, 0.7, 0), (0.3, 0.3, 0.3)], ids=str)
@pytest.mark.parametrize("name", ENGINES)
def test_verilated_random_operations(rng: random.Random, name: str, stalls: Sequence[float], overlap: bool) -> None:
    cfg = ENGINES[name].cfg
    run_cases(name, [random_case(rng, cfg) for _ in range(30)], rng, stalls, overlap)


@pytest.mark.cosim
@pytest.mark.parametrize("overlap", [False, True], ids=["alone", "overlap"])
@pytest.mark.parametrize("stalls", [(0, 0, 0), (0.3, 0.5, 0.3)], ids=str)
@pytest.mark.parametrize("name", ENGINES)
def test_verilated_extremes(rng: random.Random, name: str, stalls: Sequence[float], overlap: bool) -> None:
    run_cases(name, list(extreme_cases(ENGINES[name].cfg).values()), rng, stalls, overlap)


@pytest.mark.cosim
@pytest.mark.parametrize("overlap", [False, True], ids=["alone", "overlap"])
@pytest.mark.parametrize("name", ENGINES)
def test_verilated_small_operations(rng: random.Random, name: str, overlap: bool) -> None:
    """Fewer accumulators than pipeline stages, every alignment of blocks, tiles up to the last row."""
    cfg = ENGINES[name].cfg
    cases = [
        random_case(rng, cfg, tokens=tokens, n=n, k=k, planes=planes)
        for tokens in (1, 2, 3)
        for n in (1, cfg.outputs, cfg.outputs + 1, min(cfg.max_n(tokens), 3 * cfg.outputs))
        for k in (1, cfg.k_block, cfg.k_block + 1, cfg.max_k)
        for planes in (1, 5)
    ]
    if overlap:  # any after any, so short and long ones wait behind each other
        rng.shuffle(cases)
    run_cases(name, cases, rng, (0, 0, 0), overlap)
    # weights so late that two sets of tables wait when rows C, D, E come in consecutive cycles
    run_cases(name, cases, rng, (0.9, 0, 0), overlap)
    largest = random_case(rng, cfg, tokens=cfg.tokens, n=cfg.max_n(cfg.tokens), k=cfg.max_k, planes=2)
    widest = random_case(rng, cfg, tokens=cfg.tokens, n=min(cfg.max_n(cfg.tokens), cfg.group_rows * cfg.outputs), k=cfg.max_k)
    longest = random_case(rng, cfg, tokens=1, n=cfg.max_n(1), k=cfg.max_k)
    run_cases(name, [largest, longest, widest, largest], rng, (0.2, 0, 0), overlap)


@pytest.mark.cosim
@pytest.mark.parametrize("preset", [SIM, KV260], ids=lambda preset: preset.name)
def test_verilated_lookups_never_wait(rng: random.Random, preset: AcceleratorConfig) -> None:
    """1536 x 1536 for a token and a tile, 1024 x 1536 for a full tile: within 3 % of a lookup row a cycle.

    Of an operation alone that holds from the first filled tables to the last beat; of operations in a row, from the last
    beat of one to that of the next. Not counted are cycles in which the weight stream, which gives a row in 4 cycles, is
    late: all of a tile's rows are there.
    """
    cfg, size = preset.tlmm, preset.bus.weight_bytes
    harness = MatmulHarness(build_engine(streamed_engine(preset)))
    generator = np.random.default_rng(rng.getrandbits(32))
    k = 1536
    for n, tokens in ((1536, 1), (1536, 8), (1536, min(cfg.tokens, 10)), (1024, cfg.tokens)):
        sizes = {"planes": 1, "k_blocks": ceil_div(k, cfg.k_block), "row_blocks": ceil_div(n, cfg.outputs)}
        rows = cfg.matmul_rows(k, n)
        payload = generator.integers(0, DENSE_CODES, ceil_div(rows, 5) * 3 * cfg.cells, dtype=np.uint8).tobytes()
        planes = torch.from_numpy(layout.unpack_segment(payload, **sizes, tables=cfg.tables, outputs=cfg.outputs))
        weights = segment(SegmentKind.TRITS, payload, rows, size)
        x = generator.integers(-128, 128, (tokens, planes.shape[2] + -planes.shape[2] % LANES), dtype=np.int8)
        first = Operation(payload=matmul_op(**sizes, tokens=tokens), activations=x, beats=tokens * n // LANES, prefetch=1000)
        again = replace(first, activations=None, prefetch=0)
        results, _ = harness.run(weights * 4, size, [first, again, again, again], overlap=True)
        [alone], _ = harness.run(weights, size, [first])

        want = tlmm.matmul(torch.from_numpy(x[:, : planes.shape[2]]), planes)
        for result in (*results, alone):
            assert np.array_equal(result.sums.reshape(tokens, n), want.numpy())
            assert result.tokens.tolist() == [token for token in range(tokens) for _ in range(n // LANES)]

        lookups = tokens * rows
        one_off = feed_cycles(cfg) + cfg.fill_cycles + 1
        assert alone.cycles - alone.starved <= one_off + 1.03 * lookups
        for before, result in pairwise(results):
            assert result.ended - before.ended - result.starved <= 1.03 * lookups
        if tokens > 1:
            assert alone.cycles == tlmm_cycles(cfg, **sizes, tokens=tokens)
            assert [b.ended - a.ended for a, b in pairwise(results)] == [steady_cycles(cfg, **sizes, tokens=tokens)] * 3
            assert steady_cycles(cfg, **sizes, tokens=tokens) == lookups


@pytest.mark.cosim
def test_verilated_engine_under_cocotb() -> None:
    run_bench(Path(__file__).parents[1] / "build" / "bench_tlmm")
