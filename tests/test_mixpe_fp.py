"""MixPE with floats: the element, golden against floats, RTL against exact sums on both simulators; the FP4 quantiser."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from cosim.core_case import Pass, check, extreme_passes, random_passes, schedule
from cosim.core_harness import CoreHarness, run_in_python
from cosim.pysim import run
from golden import act_formats, group_dequant, mixpe_fp
from golden.group_dequant import GroupWeights
from host_driver.fp4_quantiser import LEVELS, Fp4Matrix, Fp4Quantiser
from host_driver.group_quantiser import GroupQuantiser, Method
from rtl.fixed_group import FixedGroup
from rtl.mixpe_fp import MixPeFp
from spec.act_formats import FIXED_BITS, ActFormat
from spec.config import K_GROUP, LANES, GroupEngine, GroupMatmulConfig

CFG = GroupMatmulConfig(engine=GroupEngine.MIXPE, lanes=32, dequant_lanes=8, tokens=3, max_k=96, ring_rows=19)
MOST = 2047 << 7
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
"""As the standard lists them."""


def halves(values: torch.Tensor) -> torch.Tensor:
    """FP16 patterns."""
    return values.to(torch.float16).view(torch.int16).to(torch.int64) & 0xFFFF


def fp4_weights(generator: torch.Generator, outputs: int, groups: int) -> GroupWeights:
    codes = torch.randint(16, (outputs, groups * K_GROUP), generator=generator)
    scale = halves(torch.randn(outputs, groups, generator=generator) * 0.1)
    return GroupWeights(codes, scale, torch.zeros_like(scale), 4, group_dequant.largest_exponent(scale))


# 1. golden


def test_every_code_is_its_value() -> None:
    codes = torch.arange(16)
    assert mixpe_fp.value_of(codes).tolist() == E2M1 + [-value for value in E2M1]
    v = torch.tensor([0, 1, -1, 5, MOST, -MOST])
    want = [[int(2 * value * int(one)) for value in mixpe_fp.value_of(codes).tolist()] for one in v]
    assert mixpe_fp.product(v[:, None], codes[None]).tolist() == want


def test_sums_of_fixed_point_are_exact(generator: torch.Generator) -> None:
    """Where a group's exponents are at most 7 apart, nothing is lost: the sum equals that of fractions."""
    t = torch.randn(4, K_GROUP, generator=generator)
    t = torch.copysign(t.abs().clamp(0.05, 3.0), t)  # exponents -5 to 1
    codes = torch.randint(16, (6, K_GROUP), generator=generator)
    bits = halves(t)
    v, unit = act_formats.fixed_group(bits, ActFormat.FP16)
    got = mixpe_fp.group_sums(v, codes)
    for m in range(4):
        x = [Fraction(float(one)) for one in act_formats.value_of(bits[m], ActFormat.FP16)]
        for n in range(6):
            exact = sum(a * Fraction(float(w)) for a, w in zip(x, mixpe_fp.value_of(codes[n]), strict=True))
            assert int(got[m, n]) * Fraction(2) ** (int(unit[m]) - 1) == exact


def test_matmul_is_within_its_bound(generator: torch.Generator) -> None:
    groups = 5
    t = torch.randn(9, groups * K_GROUP, generator=generator) * torch.exp2(
        torch.randint(-9, 9, (9, groups * K_GROUP), generator=generator).float()
    )
    t[4] = 0.0
    acts, s = act_formats.to_format(t, ActFormat.FP16)
    matrix = fp4_weights(generator, 12, groups)
    acc, d = mixpe_fp.accumulate(acts, matrix)
    scale = s.double() * group_dequant.top_scale(d).double() * group_dequant.weight_scale(matrix.exponent).double()
    meant = mixpe_fp.matmul_float(acts, s, matrix)
    error, limit = (acc.double() * scale[:, None] - meant).abs(), mixpe_fp.bound(acts, s, matrix)
    assert (error <= limit * (1 + 1e-12)).all() and float((error / limit.clamp(min=1e-300)).max()) > 0.02
    assert float((error.square().sum() / meant.square().sum()).sqrt()) < 1e-4
    slow = torch.stack(
        [
            mixpe_fp.group_sums(act_formats.fixed_group(x, ActFormat.FP16)[0], w)
            for x, w in zip(acts.split(K_GROUP, 1), matrix.codes.split(K_GROUP, 1), strict=True)
        ]
    )
    zero = torch.zeros_like(d)
    assert torch.equal(acc, group_dequant.accumulate_sums(lambda here: slow[here].clone(), zero, d, matrix))


# 2. RTL


@dataclass(frozen=True, kw_only=True)
class FloatPass(Pass):
    """`codes`: E2M1 with the sign bit turned over, which the packer of nibbles (q - 8) stores as E2M1. `acts`: 76 bytes."""

    fixed: np.ndarray
    """(32,) of 19 bits"""

    @property
    def sum_acts(self) -> int:
        return 77  # not used

    def sums(self) -> np.ndarray:
        codes = self.codes.astype(np.int64) ^ 8
        twice = np.array([round(2 * value) for value in E2M1])[codes & 7] * np.where(codes & 8, -1, 1)
        return twice @ self.fixed


def float_passes(source: np.random.Generator, passes: Sequence[Pass]) -> list[FloatPass]:
    """The passes with random activations in fixed point, and some of extreme ones."""
    ends = [np.full(32, MOST), np.full(32, -MOST), np.where(np.arange(32) % 2, MOST, -MOST), np.zeros(32, dtype=np.int64)]
    found = []
    for number, one in enumerate(passes):
        fixed = ends[number % 8] if number % 8 < len(ends) else source.integers(-MOST, MOST + 1, 32)
        word = sum((int(v) & (1 << FIXED_BITS) - 1) << FIXED_BITS * i for i, v in enumerate(fixed))
        acts = np.frombuffer(word.to_bytes(FIXED_BITS * K_GROUP // 8, "little"), dtype=np.int8)
        found.append(FloatPass(codes=one.codes, acts=acts, bits=4, fixed=fixed))
    return found


def test_core_on_random_passes(numbers: np.random.Generator) -> None:
    core = MixPeFp(CFG)
    passes = float_passes(numbers, random_passes(numbers, CFG, 10, bits=4))
    rows, cycles = schedule(numbers, CFG, passes, apart=1, stall=0.1)
    check(run_in_python(core, rows), CFG, passes, cycles, core.latency)


@cache
def harness() -> CoreHarness:
    return CoreHarness({"core": MixPeFp(CFG)})


@pytest.mark.cosim
@pytest.mark.parametrize("stall", [0.0, 0.4])
def test_verilated_core(stall: float, numbers: np.random.Generator) -> None:
    passes = [*extreme_passes(numbers, CFG, 4), *random_passes(numbers, CFG, 300, bits=4)]
    floats = float_passes(numbers, passes)
    rows, cycles = schedule(numbers, CFG, floats, apart=1, stall=stall)
    check(harness().run(rows)["core"], CFG, floats, cycles, MixPeFp(CFG).latency)


def test_fixed_group_feeds_the_core(generator: torch.Generator) -> None:
    """FP16 beats with gaps: the group's integers and its exponent, every beat of it, as golden has them."""
    t = torch.randn(7, K_GROUP, generator=generator) * torch.exp2(torch.randint(-20, 8, (7, 1), generator=generator).float())
    bits = halves(t)
    v, unit = act_formats.fixed_group(bits, ActFormat.FP16)
    dut = FixedGroup(ActFormat.FP16)
    words = [sum(int(x) << 16 * lane for lane, x in enumerate(beat)) for beat in bits.reshape(-1, LANES)]
    got: list[list[int]] = []
    gaps = torch.randint(3, (len(words),), generator=generator).tolist()

    async def bench(ctx: Any) -> None:
        async def step() -> None:
            await ctx.tick()
            if ctx.get(dut.o_valid):
                got.append([*(ctx.get(port) for port in dut.o_fixed), ctx.get(dut.o_exponent)])

        ctx.set(dut.en, 1)
        for word, gap in zip(words, gaps, strict=True):
            ctx.set(dut.i_valid, 1)
            ctx.set(dut.i_data, word)
            await step()
            ctx.set(dut.i_valid, 0)
            for _ in range(gap):
                await step()
        for _ in range(12):
            await step()

    run(dut, bench, max_cycles=200)
    lanes = v.reshape(-1, LANES).tolist()
    exponents = (unit + 32).repeat_interleave(K_GROUP // LANES).tolist()
    assert got == [[*beat, exponent] for beat, exponent in zip(lanes, exponents, strict=True)]


# 3. the quantiser


def matrix_of(seed: int = 0) -> np.ndarray:
    """Heavy tails, groups of very different size."""
    source = np.random.default_rng(seed)
    return (source.standard_t(5, (24, 256)) * 2.0 ** source.integers(-6, 3, (24, 1))).astype(np.float32)


def squared_error(matrix: Fp4Matrix, values: np.ndarray) -> np.ndarray:
    return np.square(matrix.dense().astype(np.float64) - values).reshape(-1, K_GROUP).sum(axis=1)


def test_codes_are_the_nearest_and_the_search_is_no_worse() -> None:
    values = matrix_of()
    errors = {}
    for method in Method:
        matrix = Fp4Quantiser(method=method).quantise(values)
        assert matrix.dense().dtype == np.float32 and int(matrix.codes.max()) < 16
        scale = np.repeat(matrix.scale.astype(np.float64), K_GROUP, axis=1)
        levels = scale[..., None] * np.array(E2M1 + [-value for value in E2M1])
        nearest = np.abs(levels - values[..., None]).min(axis=-1)
        assert (np.abs(matrix.dense() - values) <= nearest + 1e-5 * np.abs(values)).all()
        errors[method] = squared_error(matrix, values)
    assert (errors[Method.MSE] <= errors[Method.RTN] * (1 + 1e-5)).all()
    assert errors[Method.MSE].sum() < 0.97 * errors[Method.RTN].sum()


def test_halves_go_to_the_even_code_and_levels_come_back() -> None:
    assert LEVELS.tolist() == E2M1
    middles = [(a + b) / 2 for a, b in pairwise(E2M1)]
    row = np.array([6.0, *middles, *(-value for value in middles), *E2M1, *(-value for value in E2M1), 0.0], dtype=np.float32)
    codes = Fp4Quantiser(method=Method.RTN).quantise(row[None])
    assert codes.scale.tolist() == [[1.0]]
    even = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert codes.dense()[0].tolist() == [6.0, *even, *(-value for value in even), *E2M1, *(-value for value in E2M1), 0.0]


def test_golden_takes_the_quantisers_matrix() -> None:
    matrix = Fp4Quantiser().quantise(matrix_of(3))
    scale = halves(torch.from_numpy(matrix.scale.astype(np.float32)))
    exponent = group_dequant.largest_exponent(scale)
    weights = GroupWeights(torch.from_numpy(matrix.codes), scale, torch.zeros_like(scale), 4, exponent)
    np.testing.assert_allclose(mixpe_fp.dense(weights).numpy(), matrix.dense(), rtol=1e-6)


def test_fp4_is_better_than_int4_on_heavy_tails_and_worse_on_even_spread() -> None:
    """What the format is for: levels that are closer where the weights are."""
    tails, even = matrix_of(4), np.random.default_rng(4).uniform(-1, 1, (24, 256)).astype(np.float32)
    for values, fp4_wins in ((tails, True), (even, False)):
        integer = GroupQuantiser(bits=4, group=32, symmetric=True).quantise(values)
        error = np.square(integer.dense().astype(np.float64) - values).sum()
        assert (squared_error(Fp4Quantiser().quantise(values), values).sum() < error) == fp4_wins


def test_limits_are_clear() -> None:
    with pytest.raises(ValueError, match=r"^rows of 33 weights are not whole groups of 32$"):
        Fp4Quantiser().quantise(np.zeros((1, 33), dtype=np.float32))
    with pytest.raises(ValueError, match=r"^a weight is beyond what an FP16 scale can hold$"):
        Fp4Quantiser().quantise(np.full((1, 32), 1e6, dtype=np.float32))
    assert not Fp4Quantiser().quantise(np.zeros((1, 32), dtype=np.float32)).dense().any()
