"""The epilogue: golden against float64, RTL against golden by bits, cycles, configurations."""

import random
import re
from pathlib import Path

import pytest
import torch

from cosim.bench_epilogue import BUILDS, MAX_BEATS, EpilogueBench, random_case, run_bench
from cosim.cycle_bench import geometric_stalls, run_in_python
from cosim.pysim import no_stalls
from golden import epilogue as golden
from golden.fp import bits_of
from golden.quant import pack_int4, unpack_int4
from rtl.epilogue import Epilogue
from spec.descriptors import Epilogue as Kind

INF, NAN = float("inf"), float("nan")


# 1. golden against its meaning


def test_dequant_is_within_three_roundings(generator: torch.Generator) -> None:
    acc = torch.randint(-(1 << 31), 1 << 31, (5, 64), generator=generator)
    weight, act = torch.rand(64, generator=generator), torch.rand(5, generator=generator)
    meant = golden.dequant_float(acc, weight, act)
    # float(acc), times weight, times scale: 2**-24 each
    assert ((golden.dequant(acc, weight, act) - meant).abs() <= meant.abs() * 3.01 * 2.0**-24).all()
    one = golden.dequant(acc, torch.tensor(0.37), act)
    assert torch.equal(one, golden.dequant(acc, torch.full((64,), 0.37), act))


def test_gate_silu_is_near_float64() -> None:
    y = torch.linspace(-80, 80, 4001)
    meant = golden.gate_silu_float(y)
    # exp 2**-22, its sum, recip 2**-23 and the product 2**-24 each of the result
    assert ((golden.gate_silu(y) - meant).abs() <= meant.abs() * 2.0**-21 + 1e-30).all()
    assert golden.gate_silu(torch.tensor([0.0, -0.0, INF])).tolist() == [0.0, 0.0, INF]
    assert torch.isnan(golden.gate_silu(torch.tensor(-INF)))


def test_gate_relu2_is_one_rounding(generator: torch.Generator) -> None:
    y = torch.randn(1000, generator=generator)
    meant = golden.gate_relu2_float(y)
    assert ((golden.gate_relu2(y) - meant).abs() <= meant * 2.0**-24).all()
    assert bits_of(golden.gate_relu2(torch.tensor([-0.0, -3.0, -INF]))).tolist() == [0, 0, 0]


def test_rope_is_within_two_roundings(generator: torch.Generator) -> None:
    y = torch.randn(3, 5, 24, generator=generator)
    angle = torch.rand(3, 12, generator=generator) * 6.28
    cos_sin = torch.stack((torch.cos(angle), torch.sin(angle)), dim=-1).flatten(-2)
    meant = golden.rope_float(y, cos_sin)
    length = y.double().unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, -1)
    # two products and their sum; none is larger than sqrt(2) times the pair's length
    assert ((golden.rope(y, cos_sin) - meant).abs() <= 2.0**-24 * 3 * length).all()
    turned = golden.rope(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[0.0, 1.0]]))
    assert turned.tolist() == [[[0.0, 1.0]]]  # a quarter turn takes the first of a pair to the second


def test_quantise_heads_has_a_scale_a_head(generator: torch.Generator) -> None:
    y = torch.randn(2, 3, 16, generator=generator) * torch.tensor([1.0, 10.0, 0.0])[:, None]
    q, scale = golden.quantise_heads(y)
    assert ((q * scale.double().unsqueeze(-1) - y).abs() <= scale.unsqueeze(-1) * 0.5001).all()
    assert scale[:, 2].tolist() == [0.0, 0.0]


def test_int4_heads_lie_within_seven_steps(generator: torch.Generator) -> None:
    """Half a step from the value meant, at any size; the largest is 7 and nothing is clamped, so nibbles hold all."""
    sizes = 2.0 ** torch.linspace(-99, 120, 400)
    y = torch.randn(400, 3, 24, generator=generator) * sizes[:, None, None]
    q, scale = golden.quantise_heads(y, int4=True)
    assert q.abs().amax(-1).eq(7).all()
    assert ((q * scale.double().unsqueeze(-1) - y).abs() <= scale.double().unsqueeze(-1) * 0.50001).all()
    assert torch.equal(unpack_int4(pack_int4(q)), q)


def test_int4_of_what_is_not_a_number() -> None:
    y = torch.tensor([[[0.0] * 8, [1e-38] * 8, [INF, 1.0] * 4, [NAN, 1.0] * 4, [3e38, -3e38] * 4]])
    q, scale = golden.quantise_heads(y, int4=True)
    assert q.tolist() == [[[0] * 8] * 5]  # the reciprocal of the last is below 2^-126: zero
    assert scale[0, :2].tolist() == [0.0, 0.0]


def test_nibbles_are_in_order() -> None:
    values = torch.tensor([1, -2, -8, 7, 0, -1], dtype=torch.int8)
    packed = pack_int4(values)
    assert packed.tolist() == [0xE1, 0x78, 0xF0]
    assert torch.equal(unpack_int4(packed), values)


@pytest.mark.parametrize(
    ("values", "row"),
    [
        ([1.0, 3.0, 2.0, 3.0], 1),
        ([-0.0, 0.0], 0),
        ([0.0, -0.0], 0),
        ([NAN, -INF, -INF], 1),
        ([NAN, NAN], 0),
        ([-2.0, -1.0, NAN], 1),
        ([-1e-45, -1.0], 0),
        ([5.0, INF, INF], 1),
    ],
)
def test_argmax(values: list[float], row: int) -> None:
    assert golden.argmax(torch.tensor(values)) == row


def test_argmax_is_the_first_largest(generator: torch.Generator) -> None:
    y = torch.randint(-9, 10, (200, 40), generator=generator).float()
    assert golden.argmax(y).tolist() == [row.index(max(row)) for row in y.tolist()]


# 3. RTL against golden, 4. cycles


@pytest.mark.parametrize("stalls", ["none", "both"])
@pytest.mark.parametrize("name", BUILDS)
def test_rtl_equals_golden(rng: random.Random, generator: torch.Generator, name: str, stalls: str) -> None:
    build = BUILDS[name]
    cases = [random_case(rng, generator, build, kind, scale="ordinary") for kind in Kind]
    pattern = geometric_stalls(rng, 0.5)
    bench = EpilogueBench(
        cases,
        in_stalls=no_stalls if stalls == "none" else pattern,
        out_stalls=no_stalls if stalls == "none" else pattern,
        check_cycles=stalls == "none",
    )
    run_in_python(build.unit(), bench, 5_000)


# 5. bad configurations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_bits": 384}, "weight_bits must be a power of two times 128, not 384"),
        ({"tokens": 64}, "tokens must be in [1, 63], not 64"),
        ({"outputs": 12}, "outputs must be a multiple of 8, not 12"),
        ({"max_head_dim": 20}, "max_head_dim must be a multiple of 8, not 20"),
    ],
)
def test_bad_configuration(change: dict[str, int], message: str) -> None:
    good = {"weight_bits": 256, "tokens": 3, "outputs": 16, "max_row_scales": 8 * MAX_BEATS, "max_head_dim": 24}
    with pytest.raises(ValueError, match=re.escape(message)):
        Epilogue(**(good | change)).elaborate(None)


# 6. Verilator


@pytest.mark.cosim
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in ("ternary", "both")] + ["grouped"])
def test_verilated_epilogue_equals_golden(name: str) -> None:
    run_bench(Path(__file__).parents[1] / "build" / "bench_epilogue", BUILDS[name])
