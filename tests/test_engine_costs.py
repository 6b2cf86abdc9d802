"""The components that only benchmarks/engines.py counts do what they stand for; its tables, on tiny designs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from amaranth.hdl import Module
from amaranth.lib import wiring
from numpy.typing import NDArray

from benchmarks import engines
from benchmarks.lut_ablation import TABLE_K, LutTile, Precompute, Step
from benchmarks.packed_multiplier import PackedMultiplier
from benchmarks.term_scale import TermScale
from benchmarks.ternary_select import TernarySelect
from cosim.core_case import check, extreme_passes, random_passes, schedule
from cosim.core_harness import run_in_python
from cosim.pysim import run
from cosim.synthesis import synthesise_gates
from golden.lut_tensor_core import plane_nibbles
from rtl.group_feed import MOST_SHIFT
from spec.config import K_GROUP, GroupEngine, GroupMatmulConfig
from spec.presets import TEST

ROWS, COLUMNS = 2, 5
GROUPS = K_GROUP // TABLE_K


# 1. LUT Tensor Core's ablation: four tiles, one function


class Alone(wiring.Component):
    """A tile that takes activations: with `Step.SHARED` its tables come from a `Precompute` beside it."""

    def __init__(self, tile: LutTile) -> None:
        self._tile = tile
        members = dict(tile.signature.members.items())
        if members.pop("i_tables", None):
            members["i_acts"] = wiring.In(8 * TABLE_K * tile.rows)
        super().__init__(members)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.tile = tile = self._tile
        for name, member in tile.signature.members.items():
            ours, theirs = getattr(self, name, None), getattr(tile, name)
            if name == "i_tables":
                m.submodules.precompute = precompute = Precompute(tile.step, tile.rows)
                m.d.comb += precompute.i_acts.eq(self.i_acts)
                ours = precompute.o_tables
            for a, b in zip(*(flat(port, len(member.dimensions)) for port in (ours, theirs)), strict=True):
                m.d.comb += b.eq(a) if member.flow is wiring.In else a.eq(b)
        return m


def flat(port: Any, dimensions: int) -> list[Any]:
    """Signals of an array of ports."""
    return [port] if dimensions == 0 else [one for part in port for one in flat(part, dimensions - 1)]


def groups(numbers: np.random.Generator, bits: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Codes (columns, 32) and activations (rows, 32): all ends of both, and random ones."""
    full = (1 << bits) - 1
    codes = [np.full((COLUMNS, K_GROUP), value) for value in (0, full, 1 << (bits - 1))]
    codes += [numbers.integers(0, full + 1, (COLUMNS, K_GROUP)) for _ in range(4)]
    acts = [np.full((ROWS, K_GROUP), value) for value in (127, -127, 0)]
    acts += [numbers.integers(-127, 128, (ROWS, K_GROUP)) for _ in range(4)]
    pairs = [(c, a) for c in codes for a in acts]
    return [pairs[n] for n in numbers.permutation(len(pairs))]


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize(("step", "corrected"), [*((step, False) for step in Step), (Step.SHARED, True)])
def test_every_step_of_the_ablation_gives_the_same_sums(
    numbers: np.random.Generator, step: Step, corrected: bool, bits: int
) -> None:
    """S, or with reinterpreted weights 2 S - (2^B - 1) A, whose scale and minimum are other ones."""
    dut = Alone(LutTile(step, rows=ROWS, columns=COLUMNS, bits=bits, corrected=corrected))
    cases = groups(numbers, bits)

    async def bench(ctx: Any) -> None:
        for codes, acts in cases:
            planes = codes >> np.arange(bits).reshape(-1, 1, 1) & 1  # (bits, columns, 32)
            raw = (planes.reshape(bits, COLUMNS, GROUPS, TABLE_K) << np.arange(TABLE_K)).sum(-1)
            stored = plane_nibbles(torch.from_numpy(codes), bits).numpy()
            nibbles = stored if step in (Step.COMPLEMENTED, Step.SHARED) else raw
            for group in range(GROUPS):
                for plane in range(bits):
                    while numbers.random() < 0.2:  # what stands there without valid does not matter
                        ctx.set(dut.i_valid, 0)
                        ctx.set(dut.i_index, int(numbers.integers(1 << 20)))
                        ctx.set(dut.i_load, 1)
                        await ctx.tick()
                    ctx.set(dut.i_valid, 1)
                    ctx.set(dut.i_load, plane == 0)
                    ctx.set(dut.i_start, plane == 0 and group == 0)
                    ctx.set(dut.i_plane, plane)
                    ctx.set(dut.i_index, sum(int(n) << 4 * c for c, n in enumerate(nibbles[plane, :, group])))
                    four = acts[:, TABLE_K * group :][:, :TABLE_K].flatten().tolist()
                    ctx.set(dut.i_acts, sum((x & 255) << 8 * n for n, x in enumerate(four)))
                    if corrected:
                        for port, total in zip(dut.i_sum_acts, acts.sum(1).tolist(), strict=True):
                            ctx.set(port, total)
                    await ctx.tick()
            ctx.set(dut.i_valid, 0)
            await ctx.tick()
            want = acts @ codes.T
            if step.signed and not corrected:
                want = 2 * want - ((1 << bits) - 1) * acts.sum(1, keepdims=True)
            assert [[ctx.get(port) for port in row] for row in dut.o_sums] == want.tolist()

    run(dut, bench, max_cycles=5_000)


@pytest.mark.synth
def test_steps_shrink_the_tile() -> None:
    """In gates, even a tiny one; the shared table's builder is what the tile loses, but for what optimises across them."""
    tile, builder = {}, {}
    for step in Step:
        tile[step] = synthesise_gates(LutTile(step, rows=1, columns=4, bits=2)).transistors
        builder[step] = synthesise_gates(Precompute(step, 1)).transistors
    assert tile[Step.CONVENTIONAL] > tile[Step.REINTERPRETED] > tile[Step.COMPLEMENTED] > tile[Step.SHARED]
    assert tile[Step.COMPLEMENTED] - tile[Step.SHARED] == pytest.approx(builder[Step.SHARED], rel=0.25)


# 2. the other designs


CFG = GroupMatmulConfig(engine=GroupEngine.MULTIPLIER, lanes=32, dequant_lanes=8, tokens=1, max_k=96, ring_rows=16)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_multiplier_equals_exact_sums(numbers: np.random.Generator, bits: int) -> None:
    passes = extreme_passes(numbers, CFG, bits) + random_passes(numbers, CFG, 10)
    core = PackedMultiplier(CFG)
    rows, cycles = schedule(numbers, CFG, passes, apart=1, stall=0.1)
    check(run_in_python(core, rows), CFG, passes, cycles, core.latency)


def test_ternary_select_equals_exact_sums(numbers: np.random.Generator) -> None:
    cfg = TEST.tlmm
    dut = TernarySelect(cfg)
    shape = (cfg.outputs, cfg.k_block)
    cases = [(np.full(shape, w), np.full(shape[1], x)) for w in (-1, 0, 1) for x in (-128, -1, 127)]
    cases += [(numbers.integers(-1, 2, shape), numbers.integers(-128, 128, shape[1])) for _ in range(20)]

    async def bench(ctx: Any) -> None:
        for weights, acts in cases:
            ctx.set(dut.i_valid, 1)
            ctx.set(dut.i_acts, sum((x & 255) << 8 * i for i, x in enumerate(acts.tolist())))
            ctx.set(dut.i_weights, sum((w & 1 | (w < 0) << 1) << 2 * i for i, w in enumerate(weights.flatten().tolist())))
            for _ in range(4):  # constant inputs: as many rows as there may be stages
                await ctx.tick()
            assert [ctx.get(port) for port in dut.o_sums] == (weights @ acts).tolist()

    run(dut, bench, max_cycles=500)


def test_term_scale_is_step_3(numbers: np.random.Generator) -> None:
    bits, lanes = 32, 3
    dut = TermScale(lanes=lanes, bits=bits)
    most = 1 << bits - 1
    cases: list[tuple[Sequence[int], int, int]] = [([-most, most - 1, -1], 255, shift) for shift in (0, 1, MOST_SHIFT)]
    for _ in range(100):
        values = numbers.integers(-most, most, lanes).tolist()
        cases.append((values, int(numbers.choice([0, *range(128, 256)])), int(numbers.integers(MOST_SHIFT + 1))))
    got = []

    async def bench(ctx: Any) -> None:
        for cycle in range(len(cases) + dut.latency):
            values, significand, shift = cases[min(cycle, len(cases) - 1)]
            ctx.set(dut.i_valid, cycle < len(cases))
            for port, value in zip(dut.i_values, values, strict=True):
                ctx.set(port, value)
            ctx.set(dut.i_significand, significand)
            ctx.set(dut.i_shift, shift)
            await ctx.tick()
            if ctx.get(dut.o_valid):
                got.append([ctx.get(port) for port in dut.o_terms])

    run(dut, bench, max_cycles=500)
    assert got == [[value * m >> shift for value in values] for values, m, shift in cases]


# 3. the tables


@pytest.mark.synth
def test_ablation_counts_a_shared_table_once_for_all_that_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the smallest tiles, of one and two columns; three are on the line through them, but for abc's whims."""
    monkeypatch.setattr(engines, "TILE_SIZES", (1, 2))
    monkeypatch.setattr(engines, "ABLATION", {name: engines.ABLATION[name] for name in (Step.CONVENTIONAL, Step.SHARED)})
    done: list[str] = []
    first, shared = engines.ablation_records(done.append, rows=1, columns=3, bits=1, share=4, counted=["cmos"])
    assert len(done) == 2 and (first["design"], shared["design"]) == (Step.CONVENTIONAL, Step.SHARED)
    tile = synthesise_gates(LutTile(Step.SHARED, rows=1, columns=3, bits=1)).transistors
    assert shared["area"] - shared["precompute"] / 4 == pytest.approx(tile, rel=0.05)
    assert first["density"] == 1 and shared["density"] == first["area"] / shared["area"] > 1.2


def test_tables_of_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By made-up costs, with a part that does not grow: what is added, what is divided by what, how far the progress bar goes."""
    made = {
        "DequantMultiplier": 300, "MultiplierCore": 240, "PackedMultiplier": 20, "MixPe": 120, "LutTensorCore": 60,
        "GroupDequant": 40, "TermScale": 20,
    }  # fmt: skip
    asked: list[tuple[str, str, bool]] = []

    def cost(make: engines.Make, technology: str, *, dsp: bool = False) -> engines.Cost:
        part = make()
        name = type(part).__name__
        asked.append((name, technology, dsp))
        slices = len(part.o_sums if hasattr(part, "o_sums") else part.o_terms)  # 8 for 32 lanes
        unit = made[name] // 20 * (10 if technology == "cmos" else 1)
        return engines.Cost(area=unit * (12 + slices), flipflop=7, dsp=slices * dsp)

    monkeypatch.setattr(engines, "cost", cost)
    engines.main(lanes=32, part="cores", json_file=tmp_path / "costs.json")
    figures = json.loads((tmp_path / "costs.json").read_text())
    assert len(asked) == 2 * engines.core_steps()  # two sizes each
    assert ("GroupDequant", "xcup", True) in asked and ("GroupDequant", "cmos", True) not in asked
    both = {(record["design"], record["technology"]): record["both"] for record in figures["cores"]}
    assert both["mixpe", "ecp5"] == {"area": 160, "flipflop": 14, "dsp": 0}
    assert both["multiplier, DSPs", "ecp5"] == {"area": 280, "flipflop": 14, "dsp": 16}
    rows = {(record["design"], record["bits"]): record for record in figures["precisions"]}
    for bits in (4, 8):
        assert rows[engines.BASELINE, bits]["ratio"]["cmos"] == {"core": 1, "both": 1}
        assert rows["mixpe", bits]["ratio"]["xcup"] == {"core": 120 / 300, "both": 160 / 320}
    table = rows["lut_tensor_core, 8 entries and a sign", 1]
    assert table["ratio"]["ecp5"] == {"core": 60 * 1 / (300 * 4), "both": 100 / 320}  # four slices to dequantise
    assert table["adds_per_mac"] == pytest.approx(8 / 32 + 12 * 8 / (32 * 32))
    assert rows["mixpe", 8]["adds_per_mac"] == 8 and rows[engines.BASELINE, 8]["products_per_mac"] == 4
