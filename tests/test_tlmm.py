"""Table-lookup engine: golden against float64 and against the lookups, RTL against golden, cycles, Verilator."""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from cosim.bench_tlmm import (
    MatmulCase,
    StreamedTlmm,
    TlmmBench,
    extreme_cases,
    op_payload,
    random_case,
    run_bench,
    streamed_engine,
)
from cosim.cycle_bench import geometric_stalls, run_in_python
from cosim.matmul_harness import MatmulHarness, Operation, build_engine
from cosim.pysim import no_stalls, periodic
from cosim.slow_pack import aux_segment, segment
from golden import layout, tlmm
from rtl.tlmm import tlmm_cycles
from rtl.tlmm_tables import fill_order, partial_sums, tree_stages
from spec.config import LANES, TlmmConfig, ceil_div
from spec.layout import DENSE_CODES, SegmentKind
from spec.presets import KV260, TEST

HALF = TlmmConfig(tables=4, outputs=24, full_table=False, tokens=5, max_k=70, acc_rows=21, ring_rows=19)
"""One partial sum a lane, three beats a row, a ring that is no multiple of anything."""

DEEP = TlmmConfig(tables=20, outputs=8, full_table=True, tokens=4, max_k=130, acc_rows=11, ring_rows=16)
"""Three pipeline stages, one beat a row, 5 banks."""

ENGINES = {
    "test": streamed_engine(TEST),
    "half": StreamedTlmm(HALF, weight_bytes=32, aux_beats=4),
    "deep": StreamedTlmm(DEEP, weight_bytes=32, aux_beats=4),
}


def engine(name: str) -> StreamedTlmm:
    """A fresh component: one can be elaborated once."""
    known = ENGINES[name]
    return StreamedTlmm(known.cfg, weight_bytes=known.weight_bytes, aux_beats=4)


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


def test_rtl_equals_golden_when_the_sink_rests_periodically(rng: random.Random) -> None:
    dut = engine("test")
    cases = [random_case(rng, dut.cfg, tokens=tokens, n=40, k=50) for tokens in (1, 3, 2)]
    run_in_python(dut, TlmmBench(dut, cases, out_stalls=lambda: periodic(3, 1)), 5_000)


class ClearedBench(TlmmBench):
    """Clears the engine ``after`` cycles into the first operation, whose weights are forgotten, then runs the rest."""

    def __init__(self, dut: StreamedTlmm, cases: Sequence[MatmulCase], after: int) -> None:
        super().__init__(dut, list(cases))
        self._left = after
        rest = TlmmBench(dut, list(cases[1:]))
        self._rest = rest

    def step(self, seen: dict[str, int]) -> bool:
        if self._left and self._phase == "run":
            self._left -= 1
            self.inputs["i_clear"] = int(not self._left)
        elif self.inputs["i_clear"]:
            self.inputs["i_clear"] = 0
            rest = self._rest
            self._sources, self._aux, self._beats_needed = rest._sources, rest._aux, rest._beats_needed
            self.inputs |= {name: rest.inputs[name] for name in ("i_beat_valid", "i_beat_payload")}
            self._pending.clear()
            self.received = {port: [] for port in self.received}
            self._beats, self._case, self._phase = 0, None, "begin"
            return False
        return super().step(seen)


@pytest.mark.parametrize("after", [1, 9, 30, 41, 60, 75, 93])
def test_clear_forgets_an_operation(rng: random.Random, after: int) -> None:
    dut = engine("test")
    sizes = {"tokens": 2, "n": 60, "k": 60, "planes": 2}
    cases = [random_case(rng, dut.cfg, **sizes), *(random_case(rng, dut.cfg, n=n, k=40) for n in (20, 33))]
    run_in_python(dut, ClearedBench(dut, cases, after), 5_000)


# 3. cycles


@pytest.mark.parametrize("name", ENGINES)
def test_cycles_are_the_formula(rng: random.Random, name: str) -> None:
    """Rows are prefetched. Short passes (table fill decides), long ones, several tokens, planes."""
    dut = engine(name)
    cfg = dut.cfg
    room = cfg.ring_rows - 5
    sizes = [(1, 1, 1, 1), (1, 3, 1, 1), (1, 1, room, 1), (1, 2, room // 2, 1), (2, 1, 2, 2), (2, 2, 1, cfg.tokens)]
    cases = []
    for planes, k_blocks, row_blocks, tokens in sizes:
        k, n = min(cfg.max_k, k_blocks * cfg.k_block), min(row_blocks, cfg.acc_rows // tokens) * cfg.outputs
        cases.append(random_case(rng, cfg, planes=planes, k=k, n=n, tokens=tokens))
    run_in_python(dut, TlmmBench(dut, cases, check_cycles=True), 5_000)


# 4. configurations that cannot work


def test_bad_configurations() -> None:
    with pytest.raises(ValueError, match="outputs must be a multiple of 8, not 12"):
        replace(HALF, outputs=12)
    with pytest.raises(ValueError, match="cells must be a multiple of 64 bytes a beat, at least 3 times: 96"):
        StreamedTlmm(HALF, weight_bytes=64, aux_beats=4)


# 5. Verilator


@cache
def library(name: str) -> Path:
    return build_engine(engine(name))


def run_cases(name: str, cases: Sequence[MatmulCase], rng: random.Random, stalls: Sequence[float]) -> None:
    """Run cases back to back; compare every beat."""
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
        weights, size, operations, stall_in=stalls[0], stall_out=stalls[1], stall_op=stalls[2], seed=rng.getrandbits(32)
    )
    for number, (case, result) in enumerate(zip(cases, results, strict=True)):
        got = list(zip(result.tokens.tolist(), result.sums.tolist(), strict=True))
        assert got == case.expected(cfg), (number, case.sizes(cfg), case.x.shape)
        sizes = case.sizes(cfg)
        assert result.lookups == sizes["planes"] * sizes["k_blocks"] * sizes["row_blocks"] * case.x.shape[0]


@pytest.mark.cosim
@pytest.mark.parametrize("stalls", [(0, 0, 0), (0.5, 0, 0.5), (0, 0.7, 0), (0.3, 0.3, 0.3)], ids=str)
@pytest.mark.parametrize("name", ENGINES)
def test_verilated_random_operations(rng: random.Random, name: str, stalls: Sequence[float]) -> None:
    cfg = ENGINES[name].cfg
    run_cases(name, [random_case(rng, cfg) for _ in range(30)], rng, stalls)


@pytest.mark.cosim
@pytest.mark.parametrize("stalls", [(0, 0, 0), (0.3, 0.5, 0.3)], ids=str)
@pytest.mark.parametrize("name", ENGINES)
def test_verilated_extremes(rng: random.Random, name: str, stalls: Sequence[float]) -> None:
    run_cases(name, list(extreme_cases(ENGINES[name].cfg).values()), rng, stalls)


@pytest.mark.cosim
@pytest.mark.parametrize("name", ENGINES)
def test_verilated_small_operations(rng: random.Random, name: str) -> None:
    """Fewer accumulators than pipeline stages, every alignment of blocks, tiles up to the last row."""
    cfg = ENGINES[name].cfg
    cases = [
        random_case(rng, cfg, tokens=tokens, n=n, k=k, planes=planes)
        for tokens in (1, 2, 3)
        for n in (1, cfg.outputs, cfg.outputs + 1, min(cfg.max_n(tokens), 3 * cfg.outputs))
        for k in (1, cfg.k_block, cfg.max_k)
        for planes in (1, 5)
    ]
    run_cases(name, cases, rng, (0, 0, 0))
    # weights so late that two sets of tables wait when rows C, D, E come in consecutive cycles
    run_cases(name, cases, rng, (0.9, 0, 0))
    largest = random_case(rng, cfg, tokens=cfg.tokens, n=cfg.max_n(cfg.tokens), k=cfg.max_k, planes=2)
    run_cases(name, [largest, random_case(rng, cfg, tokens=1, n=cfg.max_n(1), k=cfg.max_k)], rng, (0.2, 0, 0))


@pytest.mark.cosim
def test_verilated_kv260_takes_the_cycles_of_its_lookups(rng: random.Random) -> None:
    """1536 x 1536: within 3 % of a lookup row a cycle, and the results' 8 sums a cycle in the last K block."""
    cfg, size = KV260.tlmm, KV260.bus.weight_bytes
    n = k = 1536
    sizes = {"planes": 1, "k_blocks": ceil_div(k, cfg.k_block), "row_blocks": ceil_div(n, cfg.outputs)}
    rows = cfg.matmul_rows(k, n)
    generator = np.random.default_rng(rng.getrandbits(32))
    payload = generator.integers(0, DENSE_CODES, ceil_div(rows, 5) * 3 * cfg.cells, dtype=np.uint8).tobytes()
    planes = torch.from_numpy(layout.unpack_segment(payload, **sizes, tables=cfg.tables, outputs=cfg.outputs))
    weights = segment(SegmentKind.TRITS, payload, rows, size)
    harness = MatmulHarness(build_engine(streamed_engine(KV260)))
    for tokens in (1, cfg.acc_rows // sizes["row_blocks"]):
        x = generator.integers(-128, 128, (tokens, planes.shape[2] + -planes.shape[2] % LANES), dtype=np.int8)
        operation = Operation(payload=op_payload(**sizes, tokens=tokens), activations=x, beats=tokens * n // LANES, prefetch=2000)
        [result], _ = harness.run(weights, size, [operation])
        want = tlmm.matmul(torch.from_numpy(x[:, : planes.shape[2]]), planes)
        assert np.array_equal(result.sums.reshape(tokens, n), want.numpy())
        assert result.tokens.tolist() == [token for token in range(tokens) for _ in range(n // LANES)]
        lookups_and_results = tokens * (rows - sizes["row_blocks"] + n // LANES)
        if tokens == 1:  # the stream gives a row in 4.2 cycles
            assert result.cycles - result.starved <= 1.03 * lookups_and_results
        else:
            assert result.cycles == tlmm_cycles(cfg, **sizes, tokens=tokens) <= 1.03 * lookups_and_results


@pytest.mark.cosim
def test_verilated_engine_under_cocotb() -> None:
    run_bench(Path(__file__).parents[1] / "build" / "bench_tlmm")
