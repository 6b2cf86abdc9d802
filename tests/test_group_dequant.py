"""Group dequantisation alone: RTL against docs/numerics.md section 3b in Python's integers, and those against fractions."""

import random
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from cosim.bench_group_matmul import halves
from cosim.pysim import run
from golden.group_dequant import half_parts
from rtl.group_dequant import GroupDequant
from spec.config import GroupEngine, GroupMatmulConfig

CFG = GroupMatmulConfig(
    engine=GroupEngine.LUT_TENSOR_CORE, lanes=32, dequant_lanes=8, tokens=1, max_k=2048, ring_rows=16
)
MOST_SUM = 32 * 127 * 255
MOST_ACTS = 32 * 127
MOST_FLOAT_SUM = 32 * 12 * (2047 << 7)


def test_half_parts_are_the_value_of_every_finite_half() -> None:
    bits = torch.arange(1 << 16)
    bits = bits[bits >> 10 & 31 != 31]
    significand, field = half_parts(bits)
    values = bits.to(torch.int16).view(torch.float16).double()
    assert torch.equal(significand.double() * torch.exp2(field.double() - 25), values)


class Item:
    """A block's scale row, and what one slice of a pass brings: sums, A, m_G, shift, E."""

    def __init__(self, rng: random.Random, scale: Tensor, minimum: Tensor, **fixed: Any) -> None:
        self.scale, self.minimum = scale, minimum
        self.exponent = int(max(half_parts(scale)[1].max(), half_parts(minimum)[1].max()))
        self.part = fixed.get("part", rng.randrange(CFG.slices))
        self.sums = fixed.get("sums") or [rng.randint(-MOST_SUM, MOST_SUM) for _ in range(CFG.dequant_lanes)]
        self.acts = fixed.get("acts", rng.randint(-MOST_ACTS, MOST_ACTS))
        self.significand = fixed.get("significand", rng.choice([0, rng.randint(128, 255)]))
        self.shift = fixed.get("shift", rng.randint(0, 63))

    @property
    def row(self) -> int:
        """The scale row."""
        values = torch.cat([self.scale, self.minimum]).tolist()
        return sum(value << 16 * place for place, value in enumerate(values))

    def parts(self) -> list[tuple[int, int, int, int, int]]:
        """(S, m_s, e_s, m_z, e_z) of the slice's outputs."""
        here = slice(self.part * CFG.dequant_lanes, (self.part + 1) * CFG.dequant_lanes)
        columns = [part[here].tolist() for half in (self.scale, self.minimum) for part in half_parts(half)]
        return list(zip(self.sums, *columns, strict=True))

    def expected(self) -> list[int]:
        """What is added to the accumulators: Python's >> rounds down."""
        terms = []
        for total, m_s, e_s, m_z, e_z in self.parts():
            value = (total * m_s << 8 >> self.exponent - e_s) + (self.acts * m_z << 8 >> self.exponent - e_z)
            terms.append(value * self.significand >> self.shift)
        return terms

    def exact(self) -> list[Fraction]:
        """The same before any rounding."""
        step = Fraction(self.significand, 1 << self.shift)
        down, act = self.exponent, self.acts
        return [
            step * (Fraction(total * m_s << 8, 1 << down - e_s) + Fraction(act * m_z << 8, 1 << down - e_z))
            for total, m_s, e_s, m_z, e_z in self.parts()
        ]


def random_items(rng: random.Random, count: int) -> list[Item]:
    """Blocks of every range of exponents, and the ends of everything."""
    generator = torch.Generator().manual_seed(rng.getrandbits(48))
    items = []
    for _ in range(count):
        low, high = sorted((rng.randint(0, 30), rng.randint(0, 30)))
        items.append(Item(rng, *(halves((CFG.lanes,), low, high, generator) for _ in range(2))))
    for half, sums, acts, shift in product(
        (0x7BFF, 0xFBFF, 0x0001, 0x83FF, 0), (MOST_SUM, -MOST_SUM, 1, -1), (MOST_ACTS, -MOST_ACTS, -1), (0, 1, 48, 63)
    ):
        row = torch.full((CFG.lanes,), half)
        mixed = torch.where(torch.arange(CFG.lanes) % 3 == 0, 0x7BFF, row)
        items.append(Item(rng, row, mixed, sums=[sums] * CFG.dequant_lanes, acts=acts, shift=shift, significand=255))
    return items


def test_a_group_loses_less_than_a_unit_at_each_shift(rng: random.Random) -> None:
    for item in random_items(rng, 200):
        lost = 2 * Fraction(item.significand, 1 << item.shift) + 1  # of V two, then one
        for value, true in zip(item.expected(), item.exact(), strict=True):
            assert true - lost < value <= true


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(("idle", "sum_bits"), [(0.0, None), (0.5, None), (0.2, 28)])
def test_rtl_equals_the_numerics(rng: random.Random, idle: float, sum_bits: int | None, narrow: bool) -> None:
    dut = GroupDequant(CFG, tag=12, sum_bits=sum_bits, narrow=narrow)
    items = random_items(rng, 150)
    if sum_bits:  # of FP4 weights and FP16 activations
        for item in items:
            item.sums = [rng.choice((MOST_FLOAT_SUM, -MOST_FLOAT_SUM, rng.randint(-MOST_FLOAT_SUM, 1))) for _ in item.sums]
    rng.shuffle(items)
    got: list[tuple[int, list[int]]] = []
    cycles: list[tuple[int, int]] = []

    async def drive(ctx: Any) -> None:
        left = list(enumerate(items))
        row = None
        for cycle in range(3 * len(items) + 40):
            ctx.set(dut.i_row, row if row is not None else rng.getrandbits(16 * 2 * CFG.lanes))
            begins = bool(left) and rng.random() >= idle
            row = None
            ctx.set(dut.i_valid, int(begins))
            if begins:
                number, item = left.pop(0)
                row = item.row
                ctx.set(dut.i_slice, item.part)
                for port, total in zip(dut.i_sums, item.sums, strict=True):
                    ctx.set(port, total)
                scales = dut.i_scales
                ctx.set(scales.sum_acts, item.acts)
                ctx.set(scales.significand, item.significand)
                ctx.set(scales.shift, item.shift)
                ctx.set(scales.exponent, item.exponent)
                ctx.set(dut.i_tag, number)
                cycles.append((number, cycle))
            _clk, _rst, valid, tag, *values = await ctx.tick().sample(dut.o_valid, dut.o_tag, *dut.o_terms)
            if valid:
                got.append((tag, values))
                assert (tag, cycle - dut.latency) in cycles
        assert not left

    run(dut, drive, max_cycles=4 * len(items) + 100)
    assert got == [(number, item.expected()) for number, item in enumerate(items)]


def test_wider_sums_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^sums have at most 28 bits, not 29$"):
        GroupDequant(CFG, tag=12, sum_bits=29)
