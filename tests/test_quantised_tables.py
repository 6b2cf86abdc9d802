"""Quantised tables: golden against floats, the table quantiser and the core on its tables against golden, bit for bit."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from cosim.core_case import Pass, check, extreme_passes, random_passes, schedule
from cosim.core_harness import CoreHarness, run_in_python
from cosim.pysim import run, sink, source, stall_matrix
from cosim.stream_harness import StreamHarness
from golden import act_formats, group_dequant, quantised_tables
from golden.group_dequant import GroupWeights
from rtl.quantised_table_core import QuantisedTableCore
from rtl.table_quantiser import TableQuantiser
from spec.act_formats import ActFormat
from spec.config import K_GROUP, LANES, GroupEngine, GroupMatmulConfig

BEATS = K_GROUP // LANES
FORMS = list(ActFormat)
SIGNS = GroupMatmulConfig(
    engine=GroupEngine.LUT_TENSOR_CORE, lanes=32, dequant_lanes=8, tokens=3, max_k=96, ring_rows=19, full_table=False
)
CORES = {"signs, 4 slices": SIGNS, "full, 2 slices": replace(SIGNS, dequant_lanes=16, full_table=True)}
BITS = SIGNS.weight_bits


# 0. what goes in


def finite(form: ActFormat) -> Tensor:
    """Every bit pattern that is a number."""
    bits = torch.arange(1 << form.bits)
    if form is ActFormat.FP16:
        return bits[bits >> 10 & 31 != 31]
    return bits[bits & 0x7F != 0x7F] if form is ActFormat.FP8 else bits[bits != 1 << 15]


def extremes(form: ActFormat) -> Tensor:
    """(groups, 32): the largest and the smallest magnitudes of each sign, subnormals, single activations, zeros of both signs."""
    sign = 1 << form.bits - 1
    largest = {ActFormat.INT16: 0x7FFF, ActFormat.FP8: 0x7E, ActFormat.FP16: 0x7BFF}[form]
    negative = {ActFormat.INT16: 0x8001}.get(form, largest | sign)
    minus_one = 0xFFFF if form is ActFormat.INT16 else sign | 1
    values = [0, 1, minus_one, largest, negative]
    if form is not ActFormat.INT16:
        fraction = 3 if form is ActFormat.FP8 else 10
        values += [sign, (1 << fraction) - 1, 1 << fraction, sign | (1 << fraction), largest - (1 << fraction)]
    groups = [[one] * K_GROUP for one in values]
    for one in values:
        for place in (0, 3, 13, K_GROUP - 1):
            groups += [[one if i == place else other for i in range(K_GROUP)] for other in (0, values[1], values[3])]
    groups += [[a if i % 2 else b for i in range(K_GROUP)] for a in values for b in values]
    return torch.tensor(groups)


def random_groups(form: ActFormat, count: int, generator: torch.Generator) -> Tensor:
    """Bit patterns of every size, and values as a network has them, in groups of very different size."""
    patterns = finite(form)
    anything = patterns[torch.randint(len(patterns), (count // 2, K_GROUP), generator=generator)]
    size = torch.exp2(torch.randint(-20, 8, (count - count // 2, 1), generator=generator).float())
    t = torch.randn(len(size), K_GROUP, generator=generator) * size
    t[torch.randint(2, t.shape, generator=generator) * (torch.arange(len(size)) % 3 == 0).unsqueeze(1) == 1] = 0.0
    bits, _ = act_formats.to_format(t.reshape(1, -1), form)  # one token, so that groups are small and large
    return torch.cat([anything, bits.reshape(-1, K_GROUP)])


def weights(source: torch.Generator, bits: int, outputs: int, groups: int) -> GroupWeights:
    """Random codes, scales and minima."""
    codes = torch.randint(1 << bits, (outputs, groups * K_GROUP), generator=source)
    scale, minimum = (torch.randn(outputs, groups, generator=source) * size for size in (0.1, 0.1 * 2**bits))
    halves = [part.to(torch.float16).view(torch.int16).to(torch.int64) & 0xFFFF for part in (scale, minimum)]
    return GroupWeights(codes.to(torch.uint8), halves[0], halves[1], bits, group_dequant.largest_exponent(*halves))


# 1. formats


@pytest.mark.parametrize(("form", "kind"), [(ActFormat.FP8, torch.float8_e4m3fn), (ActFormat.FP16, torch.float16)])
def test_every_pattern_means_what_torch_says(form: ActFormat, kind: torch.dtype) -> None:
    bits = finite(form)
    integer = torch.uint8 if form is ActFormat.FP8 else torch.int16
    assert torch.equal(act_formats.value_of(bits, form), bits.to(integer).view(kind).double())


@pytest.mark.parametrize("form", FORMS)
def test_formats_are_as_near_as_they_say(form: ActFormat, generator: torch.Generator) -> None:
    t = torch.randn(40, 64, generator=generator) * torch.exp2(torch.randint(-99, 100, (40, 1), generator=generator).float())
    t[3] = 0.0
    t[4] *= 2.0**-40
    bits, s = act_formats.to_format(t, form)
    error = (act_formats.value_of(bits, form) * s.double()[:, None] - t.double()).abs()
    step = s.double()[:, None].expand_as(error)
    if form is ActFormat.INT16:
        assert (error <= (0.5 + 2.0**-7) * step)[s > 0].all()
    else:
        fraction, smallest = (4, 2.0**-10) if form is ActFormat.FP8 else (11, 2.0**-25)
        assert (error <= torch.maximum(t.double().abs() * 2.0**-fraction, smallest * step))[s > 0].all()
        mantissa, _ = torch.frexp(s[s > 0])
        assert (mantissa == 0.5).all()  # a power of two
    amax = t.abs().amax(1)
    assert ((s == 0) == (amax < 2.0**-100)).all() and not bits[s == 0].any()


@pytest.mark.parametrize("form", FORMS)
def test_fixed_point_is_within_half_a_unit(form: ActFormat, generator: torch.Generator) -> None:
    bits = torch.cat([extremes(form), random_groups(form, 400, generator)])
    v, unit = act_formats.fixed_group(bits, form)
    assert int(v.abs().max()) < 1 << 18
    error = (v.double() * torch.exp2(unit.double())[:, None] - act_formats.value_of(bits, form)).abs()
    limit = torch.exp2((unit - 1).double())[:, None] if form is ActFormat.FP16 else torch.zeros(1, 1, dtype=torch.float64)
    assert (error <= limit).all()


# 2. golden: scale and entries against fractions, sums against the definition, the matmul against floats


def test_scale_is_the_least_that_does_not_clip() -> None:
    """Every largest sum of four magnitudes that there is."""
    most = torch.arange(1, 1 << 20)
    m, wide, p = quantised_tables.table_scale(most)
    assert int(m.min()) == 128 and int(m.max()) == 255
    place = 5 + wide  # scale = m 2^(place - p)
    assert (127 * (m << place) >= most << p).all()
    below = torch.where(m == 128, 255, 2 * m - 2)  # the next bfloat16 below, in halves of a unit
    assert (127 * (below << place - 1) < most << p).all()
    assert int(quantised_tables.table_scale(torch.tensor(0))[0]) == 0


@pytest.mark.parametrize("form", FORMS)
def test_entries_are_the_rounded_quotients(form: ActFormat, generator: torch.Generator) -> None:
    bits = torch.cat([extremes(form), random_groups(form, 60, generator)])
    tables = quantised_tables.quantise(bits.reshape(1, -1), form)
    parts = (tables.entries[0], tables.d[0], *act_formats.fixed_group(bits, form))
    for entries, d, v, unit in zip(*(part.tolist() for part in parts), strict=True):
        if not any(v):
            assert d == 0 and not any(any(table) for table in entries)
            continue
        scale = Fraction(128 + (d & 127)) * Fraction(2) ** ((d >> 7) - 133 - unit)  # twice d
        for t, table in enumerate(entries):
            x0, x1, x2, x3 = v[4 * t : 4 * t + 4]
            for index, entry in enumerate(table):
                exact = Fraction((x0 if index & 1 else -x0) + (x1 if index & 2 else -x1) + (x2 if index & 4 else -x2) - x3)
                assert abs(entry * scale - exact) <= Fraction(quantised_tables.ENTRY_ERROR) * scale
                assert abs(entry) <= 127


@pytest.mark.parametrize("bits", BITS)
def test_golden_sums_are_the_definition(bits: int, generator: torch.Generator) -> None:
    """S by planes and signs, and by one factor an entry; with exact tables twice the exact sum."""
    entries = torch.randint(-127, 128, (3, 8, 8), generator=generator, dtype=torch.int8)
    codes = torch.randint(1 << bits, (17, K_GROUP), generator=generator)
    want = [slow_sums(one.numpy(), codes.numpy(), bits).tolist() for one in entries]
    assert quantised_tables.group_sums(entries, codes, bits).tolist() == want
    fast = entries.flatten(1).float() @ quantised_tables.factors(codes, bits)[0]
    assert fast.tolist() == want
    x = torch.randint(-31, 32, (3, K_GROUP), generator=generator)
    exact = quantised_tables.lut_tensor_core.tables(x).to(torch.int8)
    assert torch.equal(quantised_tables.group_sums(exact, codes, bits).long(), 2 * x @ codes.T)


def slow_sums(entries: np.ndarray, codes: np.ndarray, bits: int) -> np.ndarray:
    """Straight from the text of numerics 3c: entries (8, 8), codes (N, 32) -> (N,)."""
    e, total = entries.astype(np.int64), np.zeros(len(codes), dtype=np.int64)
    for plane in range(bits):
        for t in range(8):
            w0, w1, w2, w3 = (codes[:, 4 * t + i].astype(np.int64) >> plane & 1 for i in range(4))
            index = w0 + 2 * w1 + 4 * w2
            total += np.where(w3, -e[t, 7 - index], e[t, index]) - e[t, 0] << plane
    return total


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("form", FORMS)
def test_matmul_is_within_its_bound(form: ActFormat, bits: int, generator: torch.Generator) -> None:
    groups = 5
    size = torch.exp2(torch.randint(-6, 6, (9, 1), generator=generator).float())
    t = torch.randn(9, groups * K_GROUP, generator=generator) * size
    t[:, :K_GROUP] *= 40
    t[2, K_GROUP:] = 0.0
    t[5] = 0.0
    acts, s = act_formats.to_format(t, form)
    matrix = weights(generator, bits, 12, groups)
    tables = quantised_tables.quantise(acts, form)
    scale = s.double() * group_dequant.top_scale(tables.d).double() * group_dequant.weight_scale(matrix.exponent).double()
    y = quantised_tables.accumulate(tables, matrix).double() * scale[:, None]
    meant = quantised_tables.matmul_float(acts, form, s, matrix)
    error, limit = (y - meant).abs(), quantised_tables.bound(acts, form, s, matrix)
    assert (error <= limit * (1 + 1e-12)).all()
    assert (limit[5] == 0).all()
    assert float((error / limit.clamp(min=1e-300)).max()) > 0.05  # the bound is not idle


# 3. the table quantiser


def beats_of(bits: Tensor, form: ActFormat) -> np.ndarray:
    """(groups, 32) to beats of 8, as bytes."""
    return bits.numpy().astype("<u1" if form is ActFormat.FP8 else "<u2").reshape(-1, LANES).view(np.uint8)


def expected(bits: Tensor, form: ActFormat) -> list[dict]:
    """What golden says of each beat; A only of a group's last."""
    tables = quantised_tables.quantise(bits.reshape(1, -1), form)
    beats = []
    parts = (tables.entries[0], tables.d[0], tables.sum_acts[0])
    for entries, d, sum_acts in zip(*(part.tolist() for part in parts), strict=True):
        for place in range(BEATS):
            last = place == BEATS - 1
            both = entries[2 * place] + entries[2 * place + 1]
            beats.append({"entries": both, "scale": d, "sum_acts": sum_acts if last else None, "last": int(last)})
    return beats


def without_partial_sums(beats: Sequence[dict]) -> list[dict]:
    return [beat if beat["last"] else {**beat, "sum_acts": None} for beat in beats]


def unpack(beats: np.ndarray) -> list[dict]:
    """Beats of `TableBeat` from their bytes."""
    words = beats[:, 16:20].copy().view("<u4")[:, 0].astype(np.int64)
    sums = (words >> 16 & 0x1FFF ^ 0x1000) - 0x1000
    return [
        {"entries": entries, "scale": int(word & 0xFFFF), "sum_acts": int(total), "last": int(word >> 29 & 1)}
        for entries, word, total in zip(beats[:, :16].view(np.int8).tolist(), words, sums, strict=True)
    ]


@pytest.mark.parametrize("stalls", ["none", "sink-waits-for-valid", "in-geometric", "both-geometric"])
@pytest.mark.parametrize("form", FORMS)
def test_table_quantiser(form: ActFormat, stalls: str, generator: torch.Generator) -> None:
    every = extremes(form)
    bits = torch.cat([random_groups(form, 8, generator), every[torch.randperm(len(every), generator=generator)[:6]]])
    lanes = bits.reshape(-1, LANES).tolist()
    i, o = stall_matrix(form)[stalls]
    got: list[dict] = []
    dut = TableQuantiser(form)
    run(dut, source(dut.i_x, lanes, i()), sink(dut.o_tables, got, count=len(lanes), stalls=o()), max_cycles=50 * len(lanes))
    assert without_partial_sums(got) == expected(bits, form)


@cache
def quantiser(form: ActFormat) -> StreamHarness:
    return StreamHarness(TableQuantiser(form), "i_x", "o_tables")


@pytest.mark.cosim
@pytest.mark.parametrize("form", FORMS)
def test_verilated_table_quantiser(form: ActFormat, generator: torch.Generator) -> None:
    """Extremes and 1,000 groups: at full rate, beat after beat with the stated latency, and with both sides stalling."""
    bits = torch.cat([extremes(form), random_groups(form, 1000, generator)])
    beats, want = beats_of(bits, form), expected(bits, form)
    full = quantiser(form).run(beats, len(beats))
    assert without_partial_sums(unpack(full.beats)) == want
    assert full.cycle.tolist() == list(range(TableQuantiser(form).latency, TableQuantiser(form).latency + len(beats)))
    for in_stall, out_stall in ((0.3, 0.0), (0.0, 0.5), (0.5, 0.5)):
        stalled = quantiser(form).run(beats, len(beats), in_stall=in_stall, out_stall=out_stall, seed=7)
        assert np.array_equal(stalled.beats, full.beats)


# 4. the core on ready tables


@dataclass(frozen=True, kw_only=True)
class TablePass(Pass):
    """`acts` are 64 entries."""

    @property
    def sum_acts(self) -> int:
        return -2 * int(self.acts[::8].sum(dtype=np.int64))

    def sums(self) -> np.ndarray:
        return slow_sums(self.acts.reshape(8, 8), self.codes, self.bits)


def with_tables(source: np.random.Generator, passes: Sequence[Pass]) -> list[TablePass]:
    """The passes with random tables, and some of extreme entries."""
    ends = [np.full(64, 127), np.full(64, -127), np.where(np.arange(64) % 2, 127, -127), np.where(np.arange(64) % 8, 127, -127)]
    tables = []
    for number in range(len(passes)):
        entries = ends[number % 8] if number % 8 < len(ends) else source.integers(-127, 128, 64)
        tables.append(entries.astype(np.int8))
    return [TablePass(codes=one.codes, acts=acts, bits=one.bits) for one, acts in zip(passes, tables, strict=True)]


@pytest.mark.parametrize("name", CORES)
def test_core_on_random_tables(name: str, numbers: np.random.Generator) -> None:
    cfg = CORES[name]
    core = QuantisedTableCore(cfg)
    passes = with_tables(numbers, random_passes(numbers, cfg, 12))
    rows, cycles = schedule(numbers, cfg, passes, apart=cfg.slices, stall=0.1)
    check(run_in_python(core, rows), cfg, passes, cycles, core.latency)


@cache
def cores() -> CoreHarness:
    return CoreHarness({f"core_{n}": QuantisedTableCore(cfg) for n, cfg in enumerate(CORES.values())})


@pytest.mark.cosim
@pytest.mark.parametrize("stall", [0.0, 0.4])
@pytest.mark.parametrize("name", CORES)
def test_verilated_core_on_tables(name: str, stall: float, numbers: np.random.Generator) -> None:
    cfg = CORES[name]
    passes = [one for bits in BITS for one in extreme_passes(numbers, cfg, bits)[::3]] + random_passes(numbers, cfg, 200)
    passes = with_tables(numbers, passes)
    rows, cycles = schedule(numbers, cfg, passes, apart=cfg.slices, stall=stall)
    check(cores().run(rows)[f"core_{list(CORES).index(name)}"], cfg, passes, cycles, QuantisedTableCore(cfg).latency)
