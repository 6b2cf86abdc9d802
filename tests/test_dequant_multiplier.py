"""Dequantisation in the loop: golden against Python's integers, fractions and the other engines' V, RTL against golden."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cosim.bench_group_matmul import halves
from cosim.core_case import Pass, extreme_passes, random_passes, schedule
from cosim.pysim import run
from golden import dequant_multiplier
from golden.group_dequant import half_parts, largest_exponent
from rtl.dequant_multiplier import DequantMultiplier
from spec.config import ALIGN_BITS, K_GROUP, GroupEngine, GroupMatmulConfig

CFG = GroupMatmulConfig(engine=GroupEngine.MULTIPLIER, lanes=32, dequant_lanes=8, tokens=1, max_k=96, ring_rows=16)
BITS = (4, 8)
WIDEST = (0x7BFF, 0xFBFF)
"""The largest FP16 of either sign."""

each_width = pytest.mark.parametrize("bits", BITS)
each_alignment = pytest.mark.parametrize("align_bits", [0, 3, ALIGN_BITS])


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """A pass and the scales of its block."""

    one: Pass
    scale: Tensor
    """FP16 bits, int64 (lanes,)"""
    minimum: Tensor

    @property
    def exponent(self) -> int:
        return largest_exponent(self.scale, self.minimum)

    @property
    def row(self) -> int:
        """The scale row."""
        return sum(value << 16 * place for place, value in enumerate(torch.cat([self.scale, self.minimum]).tolist()))

    def values(self, align_bits: int) -> Tensor:
        """Golden's V: (lanes,)."""
        return dequant_multiplier.group_values(
            torch.from_numpy(self.one.acts)[None], torch.from_numpy(self.one.codes),
            self.scale, self.minimum, self.exponent, bits=self.one.bits, align_bits=align_bits,
        )[0]  # fmt: skip

    def parts(self) -> list[tuple[int, int, int, int, int]]:
        """(S, m_s, E - e_s, m_z, E - e_z) of every output."""
        (m_s, e_s), (m_z, e_z) = half_parts(self.scale), half_parts(self.minimum)
        columns = [m_s, self.exponent - e_s, m_z, self.exponent - e_z]
        return list(zip(self.one.sums().tolist(), *(column.tolist() for column in columns), strict=True))

    @property
    def sum_acts(self) -> int:
        return int(self.one.acts.sum(dtype=np.int64))


def scaled(rng: random.Random, passes: Sequence[Pass], *, least: int = 0) -> list[Scaled]:
    """With scales of a random range of exponents, each not less than `least`, and some zeros."""
    generator = torch.Generator().manual_seed(rng.getrandbits(48))
    cases = []
    for one in passes:
        low, high = sorted((rng.randint(least, 30), rng.randint(least, 30)))
        scale, minimum = (halves((len(one.codes),), low, high, generator) for _ in range(2))
        if least == 0:
            scale[rng.randrange(len(scale))] = minimum[rng.randrange(len(minimum))] = 0
        cases.append(Scaled(one=one, scale=scale, minimum=minimum))
    return cases


def extremes(numbers: np.random.Generator, bits: int) -> list[Scaled]:
    """Extreme codes and activations with the largest scales of all pairs of signs, and with the smallest below one of them."""
    cases = []
    for number, one in enumerate(extreme_passes(numbers, CFG, bits)):
        scale, minimum = WIDEST[number & 1], WIDEST[number >> 1 & 1]
        small = torch.arange(CFG.lanes) % 5 == number % 5
        rows = [torch.where(small, half, widest) for half, widest in ((0x8001, scale), (0x0001, minimum))]
        cases.append(Scaled(one=one, scale=rows[0], minimum=rows[1]))
    return cases


# 1. golden


@each_width
@each_alignment
def test_golden_is_the_aligned_scales_times_the_sums(
    rng: random.Random, numbers: np.random.Generator, bits: int, align_bits: int
) -> None:
    """Weight by weight or once a group: after the alignment everything is exact. Python's >> rounds down."""
    for case in scaled(rng, random_passes(numbers, CFG, 20, bits=bits)) + extremes(numbers, bits):
        want = [
            (m_s << align_bits >> d_s) * total + (m_z << align_bits >> d_z) * case.sum_acts
            for total, m_s, d_s, m_z, d_z in case.parts()
        ]
        assert case.values(align_bits).tolist() == want


@each_width
@each_alignment
def test_golden_loses_less_than_a_unit_a_scale(
    rng: random.Random, numbers: np.random.Generator, bits: int, align_bits: int
) -> None:
    for case in scaled(rng, random_passes(numbers, CFG, 20, bits=bits)):
        for value, (total, m_s, d_s, m_z, d_z) in zip(case.values(align_bits).tolist(), case.parts(), strict=True):
            true = Fraction(m_s << align_bits, 1 << d_s) * total + Fraction(m_z << align_bits, 1 << d_z) * case.sum_acts
            assert abs(value - true) <= abs(total) + abs(case.sum_acts)


@each_width
def test_golden_is_the_v_of_the_other_engines_where_no_bit_is_dropped(
    rng: random.Random, numbers: np.random.Generator, bits: int
) -> None:
    """Scales within 2^8 of the largest, 8 bits of alignment: section 3b's V to the bit."""
    for case in scaled(rng, random_passes(numbers, CFG, 20, bits=bits), least=30 - ALIGN_BITS):
        want = [
            (total * m_s << ALIGN_BITS >> d_s) + (case.sum_acts * m_z << ALIGN_BITS >> d_z)
            for total, m_s, d_s, m_z, d_z in case.parts()
        ]
        assert case.values(ALIGN_BITS).tolist() == want


@each_alignment
def test_weights_fit_their_bits(align_bits: int) -> None:
    """At the ends of codes and scales, and no bit to spare."""
    ends = torch.tensor(WIDEST)
    codes = torch.full((2, K_GROUP), 255)
    for bits in BITS:
        found = dequant_multiplier.weights(codes, ends, ends, 30, bits=bits, align_bits=align_bits)
        assert int(found.abs().max()) == 16 * 2047 << align_bits
    assert 1 << 14 + align_bits < 16 * 2047 << align_bits < 1 << 15 + align_bits


def test_golden_refuses_other_widths() -> None:
    zeros = torch.zeros(1, K_GROUP, dtype=torch.int64)
    with pytest.raises(ValueError, match="takes weights of 4 or 8 bits, not 3"):
        dequant_multiplier.group_values(zeros, zeros, zeros[0, :1], zeros[0, :1], 1, bits=3)


# 2. RTL


def simulate(core: DequantMultiplier, cases: Sequence[Scaled], numbers: np.random.Generator, *, stall: float) -> None:
    """Passes back to back, or with gaps, noise in all cycles between: every slice is compared, and its cycle."""
    cfg = core.cfg
    rows, cycles = schedule(numbers, cfg, [case.one for case in cases], apart=1, stall=stall)
    scales = {cycle: case for case, places in zip(cases, cycles, strict=True) for cycle in places}
    found: list[tuple[int, int, list[int]]] = []

    async def bench(ctx: Any) -> None:
        for cycle, (record, codes, acts) in enumerate(zip(rows.control, rows.codes, rows.acts, strict=True)):
            if ctx.get(core.o_valid):
                found.append((cycle, ctx.get(core.o_slice), [ctx.get(port) for port in core.o_sums]))
            for name in record.dtype.names:
                ctx.set(getattr(core, f"i_{name}"), int(record[name]))
            ctx.set(core.i_codes, int.from_bytes(codes.tobytes(), "little"))
            ctx.set(core.i_acts, int.from_bytes(acts.tobytes(), "little"))
            case = scales.get(cycle)
            ctx.set(core.i_scales, case.row if case else int.from_bytes(numbers.bytes(cfg.row_bytes), "little"))
            ctx.set(core.i_exponent, case.exponent if case else int(numbers.integers(32)))
            await ctx.tick()

    run(core, bench, max_cycles=len(rows.control) + 10)
    want = []
    for case, places in zip(cases, cycles, strict=True):
        values = case.values(core.align_bits).reshape(cfg.slices, cfg.dequant_lanes).tolist()
        completed = places if case.one.bits == 4 else places[1::2]
        want += [(cycle + core.latency, number, values[number]) for number, cycle in enumerate(completed)]
    assert found == want


@each_alignment
@pytest.mark.parametrize("stall", [0.0, 0.3])
def test_random_passes(rng: random.Random, numbers: np.random.Generator, align_bits: int, stall: float) -> None:
    cases = scaled(rng, random_passes(numbers, CFG, 12))
    simulate(DequantMultiplier(CFG, align_bits=align_bits), cases, numbers, stall=stall)


@each_width
@each_alignment
def test_extremes_at_full_rate(numbers: np.random.Generator, bits: int, align_bits: int) -> None:
    cases = extremes(numbers, bits)
    chosen = [cases[n] for n in numbers.permutation(len(cases))[:20]] + [cases[0], cases[15]]
    simulate(DequantMultiplier(CFG, align_bits=align_bits), chosen, numbers, stall=0.0)


def test_more_lanes(rng: random.Random, numbers: np.random.Generator) -> None:
    cfg = GroupMatmulConfig(engine=GroupEngine.MIXPE, lanes=64, dequant_lanes=16, tokens=1, max_k=96, ring_rows=16)
    simulate(DequantMultiplier(cfg), scaled(rng, random_passes(numbers, cfg, 6)), numbers, stall=0.1)


# 3. configurations that cannot work


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="align_bits must be between 0 and 8, not 9"):
        DequantMultiplier(CFG, align_bits=9)
    table = GroupMatmulConfig(engine=GroupEngine.LUT_TENSOR_CORE, lanes=32, dequant_lanes=16, tokens=1, max_k=96, ring_rows=16)
    with pytest.raises(ValueError, match="nibbles need dequant_lanes = lanes / 4, not 16 of 32"):
        DequantMultiplier(table)
