"""Attention: golden against float64, RTL against golden bit for bit, cycles against the stated formula."""

import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from cosim.attention_case import ADDR_BITS, BUILDS, AttentionBuild, AttentionCase, random_case, steady_cycles
from cosim.attention_harness import AttentionHarness
from cosim.bench_attention import AttentionBench, run_bench
from cosim.cycle_bench import run_in_python
from golden.attention import attend, attend_float, attend_state
from golden.fp import bits_of, fadd, fexp, fmul, frecip, fsub, i2f
from rtl.attention import Attention
from spec.config import AttentionConfig

# 1. golden against its meaning


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("scale", [0.2, 1.0, 30.0])
def test_golden_stays_within_its_bound(seed: int, scale: float) -> None:
    case = AttentionCase(head_dim=40, group=3, kv_heads=2, tokens=5, position=1 + 70 * seed, slots=368, seed=seed)
    case.slot_bias = torch.nan_to_num(case.slot_bias)
    k_scale, v_scale = torch.nan_to_num(case.k_scale), torch.nan_to_num(case.v_scale)
    args = [case.q, case.q_scale * scale, case.k, k_scale, case.v, v_scale]
    for bias in (None, case.slot_bias):
        meaning, bound = attend_float(*args, case.positions, case.score_scale, bias)
        out = attend(*args, case.positions, case.score_scale, bias)
        assert (bound < 1e-2).all()
        assert ((out.double() - meaning).abs() <= bound).all()


def test_golden_row_by_row_is_the_stated_sequence() -> None:
    """One row, written out slot by slot with scalars, as docs/numerics.md has it."""
    case = AttentionCase(head_dim=8, group=2, kv_heads=2, tokens=3, position=37, slots=48, seed=4)
    out = attend(
        case.q, case.q_scale, case.k, case.k_scale, case.v, case.v_scale, case.positions, case.score_scale
    )
    for t, h in ((0, 0), (1, 3), (2, 2)):
        g = h // case.group
        cq = fmul(case.q_scale[t, h], case.score_scale)
        m, total, o = torch.tensor(-torch.inf), torch.tensor(0.0), torch.zeros(case.head_dim)
        end = case.position + t + 1
        for start in range(0, end, 16):
            s = []
            for j in range(start, min(start + 16, end)):
                dot = sum(int(a) * int(b) for a, b in zip(case.q[t, h], case.k[g, j], strict=True))
                s.append(fmul(fmul(i2f(torch.tensor(dot)), case.k_scale[g, j]), cq))
            larger = torch.stack([m, *s]).max()
            e = fexp(fsub(m, larger))
            total, o, m = fmul(total, e), fmul(o, e), larger
            for j, score in enumerate(s, start):
                p = fexp(fsub(score, m))
                total = fadd(total, p)
                o = fadd(o, fmul(fmul(p, case.v_scale[g, j]), i2f(case.v[g, j])))
        assert bits_of(out[t, h]).tolist() == bits_of(fmul(o, frecip(total))).tolist()


def test_golden_state_can_be_cut_at_a_block() -> None:
    """Slots 0..31 then 32.., by way of a state, are the same bits as all at once."""
    case = AttentionCase(head_dim=8, group=1, kv_heads=2, tokens=2, position=50, slots=64, seed=9)
    whole = attend(case.q, case.q_scale, case.k, case.k_scale, case.v, case.v_scale, case.positions, case.score_scale)
    head = attend_state(
        case.q, case.q_scale, case.k, case.k_scale, case.v, case.v_scale, torch.tensor([31, 31]), case.score_scale
    )
    tail = (x[:, 32:] for x in (case.k, case.k_scale, case.v, case.v_scale))
    parts = attend(case.q, case.q_scale, *tail, case.positions - 32, case.score_scale, state=head)
    assert torch.equal(bits_of(whole), bits_of(parts))


# 2. RTL against golden


def test_rtl_equals_golden() -> None:
    """Few cycles, as Amaranth's simulator is slow on so many floating-point units; the rest runs in Verilator."""
    build = BUILDS["test"]
    case = AttentionCase(head_dim=8, group=2, kv_heads=1, tokens=2, position=15, slots=32, seed=5, bias=True)
    int4 = AttentionCase(
        head_dim=24, group=1, kv_heads=1, tokens=1, position=0, slots=16, seed=6, k_int4=True, v_int4=True
    )
    run_in_python(build.engine(ADDR_BITS), AttentionBench(build, [case, int4]), max_cycles=2_000)


@pytest.mark.cosim
@pytest.mark.slow
def test_rtl_equals_golden_under_cocotb() -> None:
    run_bench(Path("build") / "bench_attention")


@pytest.fixture(scope="module")
def harness(request: pytest.FixtureRequest) -> tuple[AttentionBuild, AttentionHarness]:
    build = BUILDS[request.param]
    return build, AttentionHarness(build)


Built = tuple[AttentionBuild, AttentionHarness]
each_build = pytest.mark.parametrize("harness", BUILDS, indirect=True)


@pytest.mark.cosim
@each_build
def test_corner_cases(harness: Built) -> None:
    build, engine = harness
    for head_dim, group, kv_heads in build.heads:
        shape: dict[str, Any] = {"head_dim": head_dim, "group": group, "kv_heads": kv_heads}
        tokens = min(build.tokens, build.config.max_rows // group)
        for case in (
            AttentionCase(**shape, tokens=1, position=0, slots=16, seed=1),  # one slot
            AttentionCase(**shape, tokens=tokens, position=0, slots=16, seed=2),
            AttentionCase(**shape, tokens=1, position=15, slots=16, seed=3),  # a full block
            AttentionCase(**shape, tokens=1, position=16, slots=48, seed=4),  # and one slot more
            AttentionCase(**shape, tokens=tokens, position=14, slots=32, seed=5),  # rows that skip a block
            AttentionCase(**shape, tokens=tokens, position=193, slots=224, seed=6),
        ):
            engine.check(case)


@pytest.mark.cosim
@each_build
def test_every_mode(harness: Built) -> None:
    build, engine = harness
    head_dim, group, kv_heads = build.heads[0]
    tokens = min(build.tokens, build.config.max_rows // group)
    for seed, (bias, resume, export, extreme) in enumerate(product((False, True), repeat=4)):
        case = AttentionCase(
            head_dim=head_dim, group=group, kv_heads=kv_heads, tokens=tokens, position=30, slots=48, seed=seed,
            bias=bias, resume=resume, export=export, extreme=extreme,
        )  # fmt: skip
        engine.check(case)


@pytest.mark.cosim
@pytest.mark.parametrize(("k_int4", "v_int4"), [(False, True), (True, False), (True, True)])
@each_build
def test_int4_cache(harness: Built, k_int4: bool, v_int4: bool) -> None:
    """Every head, from one slot to several blocks; as many cycles as with int8 where memory is fast enough."""
    build, engine = harness
    for head_dim, group, kv_heads in build.heads:
        tokens = min(build.tokens, build.config.max_rows // group)
        shape: dict[str, Any] = {"head_dim": head_dim, "group": group, "kv_heads": kv_heads}
        for position, seed in ((0, 1), (15, 2), (71, 3)):
            for extreme in (False, True):
                case = AttentionCase(
                    **shape, tokens=tokens, position=position, slots=96, seed=seed, extreme=extreme, bias=extreme,
                    k_int4=k_int4, v_int4=v_int4,
                )  # fmt: skip
                engine.check(case, stall_beat=0.3 * extreme)
        cycles = []
        for int4 in ({}, {"k_int4": k_int4, "v_int4": v_int4}):
            short, long = (
                AttentionCase(**shape, tokens=tokens, position=end - tokens, slots=112, scores="equal", seed=8, **int4)
                for end in (64, 112)
            )
            cycles.append(engine.check(long).busy - engine.check(short).busy)
        step = steady_cycles(build, short, rescales=False)
        if step >= 1.1 * kv_heads * 16 * (2 * head_dim + 8) / (build.data_bits // 8):
            assert cycles == [3 * step, 3 * step]
        else:
            assert cycles[1] < cycles[0], "less memory traffic takes less time"


@pytest.mark.cosim
@pytest.mark.parametrize("stall", [0.0, 0.3, 0.9])
@each_build
def test_random_cases(harness: Built, stall: float, rng: random.Random) -> None:
    build, engine = harness
    for _ in range(40):
        engine.check(
            random_case(rng, build), latency=rng.randrange(1, 80), stall_command=stall, stall_beat=stall * rng.random(),
            seed=rng.getrandbits(32),
        )  # fmt: skip


@pytest.mark.cosim
@each_build
def test_cycles_of_a_block(harness: Built) -> None:
    """From 4 to 7 blocks an operation grows by the stated cycles, exactly, where memory keeps up."""
    build, engine = harness
    checked = 0
    for head_dim, group, kv_heads in build.heads:
        for tokens in range(1, min(build.tokens, build.config.max_rows // group) + 1):
            for rising in (False, True):
                short, long = (
                    AttentionCase(
                        head_dim=head_dim, group=group, kv_heads=kv_heads, tokens=tokens,
                        position=end - tokens, slots=112, scores="rising" if rising else "equal", seed=8,
                    )
                    for end in (64, 112)
                )  # fmt: skip
                step = steady_cycles(build, short, rescales=rising)
                if step < 1.1 * kv_heads * 16 * (2 * head_dim + 8) / (build.data_bits // 8):
                    continue
                grown = engine.check(long).busy - engine.check(short).busy
                assert grown == 3 * step, (head_dim, group, kv_heads, tokens, rising)
                checked += 1
    assert checked >= 4


# 3. configurations


def test_lanes_must_be_8_16_or_32() -> None:
    config = AttentionConfig(lanes=24, max_rows=4, max_head_dim=48, max_q_dim=96)
    with pytest.raises(ValueError, match=r"^attention lanes must be 8, 16 or 32, not 24$"):
        Attention(config, tokens=1, data_bits=64, addr_bits=32)


def test_data_bits_must_be_a_bus_width() -> None:
    config = AttentionConfig(lanes=8, max_rows=4, max_head_dim=48, max_q_dim=96)
    with pytest.raises(ValueError, match=r"^data_bits must be 64, 128, 256 or 512, not 96$"):
        Attention(config, tokens=1, data_bits=96, addr_bits=32).elaborate(None)
