"""Attention: golden against float64, RTL against golden bit for bit, cycles against the stated formula."""

from pathlib import Path

import pytest
import torch

from cosim.attention_case import AttentionCase
from cosim.bench_attention import BUILDS, AttentionBench, run_bench
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
    args = [case.q, case.q_scale * scale, case.k, torch.nan_to_num(case.k_scale), case.v, torch.nan_to_num(case.v_scale)]
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
        m, l, o = torch.tensor(-torch.inf), torch.tensor(0.0), torch.zeros(case.head_dim)
        end = case.position + t + 1
        for start in range(0, end, 16):
            s = []
            for j in range(start, min(start + 16, end)):
                dot = sum(int(a) * int(b) for a, b in zip(case.q[t, h], case.k[g, j], strict=True))
                s.append(fmul(fmul(i2f(torch.tensor(dot)), case.k_scale[g, j]), cq))
            larger = torch.stack([m, *s]).max()
            e = fexp(fsub(m, larger))
            l, o, m = fmul(l, e), fmul(o, e), larger
            for j, score in enumerate(s, start):
                p = fexp(fsub(score, m))
                l = fadd(l, p)
                o = fadd(o, fmul(fmul(p, case.v_scale[g, j]), i2f(case.v[g, j])))
        assert bits_of(out[t, h]).tolist() == bits_of(fmul(o, frecip(l))).tolist()


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
    run_in_python(build.engine(), AttentionBench(build, [case]), max_cycles=2_000)


@pytest.mark.cosim
@pytest.mark.parametrize("name", BUILDS)
def test_rtl_equals_golden_in_verilator(name: str) -> None:
    run_bench(name, Path("build") / "attention")


# 3. configurations


def test_lanes_must_be_8_16_or_32() -> None:
    config = AttentionConfig(lanes=24, max_rows=4, max_head_dim=48, max_q_dim=96)
    with pytest.raises(ValueError, match="^attention lanes must be 8, 16 or 32, not 24$"):
        Attention(config, tokens=1, data_bits=64, addr_bits=32)


def test_data_bits_must_be_a_bus_width() -> None:
    config = AttentionConfig(lanes=8, max_rows=4, max_head_dim=48, max_q_dim=96)
    with pytest.raises(ValueError, match="^data_bits must be 64, 128, 256 or 512, not 96$"):
        Attention(config, tokens=1, data_bits=96, addr_bits=32).elaborate(None)
