"""The norm unit: golden against float64, RTL against golden by bits, cycles, configurations."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cosim.bench_norm import BUILDS, NormBench, extreme_vectors, norm_unit, random_case, run_bench
from cosim.cycle_bench import geometric_stalls, run_in_python
from golden.fp import bits_of, from_bits
from golden.norm import norm_float, norm_quantise, norm_quantise_groups, sum_of_squares
from golden.quant import absmax, quant_params, quantise, quantise_float
from rtl.norm import Norm

# 1. golden against its meaning


@pytest.mark.parametrize("scale", [1e-28, 1e-3, 1.0, 1e4, 1e36])
def test_quantise_is_within_half_a_step(generator: torch.Generator, scale: float) -> None:
    t = torch.randn(50, 96, generator=generator) * scale
    c, s = quant_params(absmax(t))
    q = quantise(t, c.unsqueeze(-1))
    exact, step = quantise_float(t)
    # c is off by 2**-23 (recip) + 2**-24 (product), t * c by 2**-24 more: of 127 at most 3.1e-5
    assert ((q - exact).abs() <= 0.5 + 3.2e-5).all()
    # s: the constant next to 1/127 and one product, 2**-24 each
    assert ((s - step).abs() <= step * 2.0**-23).all()
    assert (q.abs().amax(-1) == 127).all()


def test_quantise_of_a_vector_below_the_threshold_is_zero() -> None:
    amax = torch.tensor([0.0, 1e-40, 2.0**-100 * (1 - 2.0**-24), 2.0**-100, 1.0])
    c, s = quant_params(amax)
    assert (c == 0).tolist() == [True, True, True, False, False]
    assert (s == 0).tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("length", [8, 24, 32, 168, 576])
def test_sum_of_squares_order(generator: torch.Generator, length: int) -> None:
    """The stated order, written out a second time with scalars."""
    x = torch.randn(2, length, generator=generator)
    for row, total in zip(x, sum_of_squares(x), strict=True):
        u = [value * value for value in row]
        partial = [torch.tensor(0.0)] * 4
        for b in range(length // 8):
            v = u[8 * b : 8 * b + 8]
            beat = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]))
            partial[b % 4] = partial[b % 4] + beat
        assert total == (partial[0] + partial[1]) + (partial[2] + partial[3])


@pytest.mark.parametrize("length", [8, 168, 576, 4096])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 100.0])
def test_norm_is_within_half_a_step_of_float64(generator: torch.Generator, length: int, scale: float) -> None:
    x = torch.randn(6, length, generator=generator) * scale
    gamma = 1 + 0.2 * torch.randn(length, generator=generator)
    q, s = norm_quantise(x, gamma, 1 / length, 1e-5)
    meant = norm_float(x, gamma, 1e-5)
    step = meant.abs().amax(-1, keepdim=True) / 127
    # rounding: half a step; t, c and t * c as above plus gamma's product: 4e-5 of a step. The factor common to the
    # vector: all summands are positive, so the sum is off by at most its depth (n / 32 + 6)
    # roundings, the root by half of that.
    common = (length / 32 + 16) * 2.0**-24
    assert ((q * s.double().unsqueeze(-1) - meant).abs() <= step * (0.5 + 4e-5 + 127 * common)).all()


def test_without_gamma_only_quantises(generator: torch.Generator) -> None:
    x = torch.randn(4, 40, generator=generator)
    q, s = norm_quantise(x, None, 0.0, 0.0)
    c, step = quant_params(absmax(x))
    assert torch.equal(q, quantise(x, c.unsqueeze(-1)))
    assert torch.equal(bits_of(s), bits_of(step))


def plain_group(t: list[float]) -> tuple[list[float], int, int]:
    """Section 2b, step 1, of one group in Python's integers: (values, exponent field of d, its 7 fraction bits)."""
    largest = max(abs(v) for v in t)
    bits = int(bits_of(torch.tensor(largest) * from_bits(torch.tensor(0x3C010204))))
    up = -(-bits // 0x10000)  # up8
    return t, up >> 7, up & 127


def test_group_scales_round_up_and_nothing_clips(generator: torch.Generator) -> None:
    x = torch.randn(4, 96, generator=generator) * torch.logspace(-20, 20, 4)[:, None]
    q, d, scale = norm_quantise_groups(x, None, 0.0, 0.0)
    top = []
    for token in range(4):
        fields = []
        for group in range(3):
            part = slice(32 * group, 32 * group + 32)
            t, field, fraction = plain_group(x[token, part].tolist())
            assert d[token, group] == field << 7 | fraction
            step = (128 + fraction) * 2.0 ** (field - 134)
            assert max(abs(v) for v in t) <= 127 * step * (1 + 2.0**-22)
            # recip 2**-23, the product 2**-24: of 127 at most 2.3e-5
            assert all(abs(v / step - n) <= 0.5 + 3e-5 for v, n in zip(t, q[token, part].tolist(), strict=True))
            fields.append(field)
        top.append(max(fields))
    assert scale.tolist() == [2.0 ** (field - 134) for field in top]


def test_groups_below_the_threshold_are_zero() -> None:
    x = torch.zeros(1, 96)
    x[0, 3], x[0, 40], x[0, 90] = 2.0**-100, 2.0**-100 * (1 - 2.0**-24), -0.0
    q, d, scale = norm_quantise_groups(x, None, 0.0, 0.0)
    assert (d[0] != 0).tolist() == [True, False, False]
    assert q.nonzero().tolist() == [[0, 3]]
    assert scale[0] == 2.0 ** ((int(d[0, 0]) >> 7) - 134)
    assert norm_quantise_groups(torch.zeros(1, 32), None, 0.0, 0.0)[2].tolist() == [0.0]


# 3. RTL against golden, 4. cycles


@pytest.mark.parametrize("name", BUILDS)
def test_rtl_equals_golden(rng: random.Random, generator: torch.Generator, name: str) -> None:
    grouped = BUILDS[name]
    cases = [random_case(rng, generator, kind="random", tokens=2, beats=n, grouped=grouped) for n in (1, 5, 20)]
    kinds = extreme_vectors(8, generator)
    cases += [random_case(rng, generator, kind=kind, tokens=1, beats=2, grouped=grouped) for kind in kinds]
    run_in_python(norm_unit(grouped), NormBench(cases, check_cycles=True), 10_000)


@pytest.mark.parametrize("name", BUILDS)
def test_late_gamma_only_delays(rng: random.Random, generator: torch.Generator, name: str) -> None:
    grouped = BUILDS[name]
    cases = [random_case(rng, generator, kind="random", norm=True, beats=beats, grouped=grouped) for beats in (1, 7, 20)]
    run_in_python(norm_unit(grouped), NormBench(cases, in_stalls=geometric_stalls(rng, 0.6)), 10_000)


# 5. bad configurations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_bits": 384}, "weight_bits must be a power of two times 256, not 384"),
        ({"tokens": 64}, "tokens must be in [1, 63], not 64"),
        ({"max_vector": 100}, "max_vector must be a multiple of 8, not 100"),
        ({"max_vector": 168, "grouped": True}, "max_vector must be a multiple of 32, not 168"),
    ],
)
def test_bad_configuration(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"weight_bits": 256, "tokens": 3, "max_vector": 168}
    with pytest.raises(ValueError, match=re.escape(message)):
        Norm(**(good | change)).elaborate(None)


# 6. Verilator


@pytest.mark.cosim
@pytest.mark.parametrize("name", [pytest.param("token", marks=pytest.mark.slow), "grouped"])
def test_verilated_norm_equals_golden(name: str) -> None:
    run_bench(Path(__file__).parents[1] / "build" / "bench_norm", name)
