"""The benchmark of activation formats computes what golden computes, and its figures are of the size they must be."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from rich.console import Console

from benchmarks import table_formats
from benchmarks.table_formats import ActivationModel, Quality, TableModel, entries_in_format, entry_weights, qualities
from cosim.gguf_checkpoint import TINY_CHAT, random_llama, write_gguf
from golden import act_formats, group_dequant, norm, quantised_tables
from golden.model import FloatModel
from host_driver.group_quantiser import GroupQuantiser
from host_driver.model_source import open_model
from spec.act_formats import ActFormat
from spec.config import K_GROUP


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("form", list(ActFormat))
def test_emulation_is_golden_but_for_the_shifts(form: ActFormat, bits: int, generator: torch.Generator) -> None:
    """Its entries are golden's, to the bit of a float32; its sums differ by what 3b's right shifts and float32 sums lose."""
    t = table_formats.like_smollm2(7, 192, generator)
    values = (torch.randn(24, 192, generator=generator) * 0.05).numpy()
    matrix = table_formats.group_weights(GroupQuantiser(bits=bits).quantise(values))
    acts, s = act_formats.to_format(t, form)
    tables = quantised_tables.quantise(acts, form)

    seen = entries_in_format(t, form).unflatten(-1, (-1, 64)).double()
    step = (group_dequant.act_value(tables.d) * s.double()[:, None]).unsqueeze(-1)
    entries = tables.entries.flatten(-2).double()
    assert torch.equal(torch.round(seen / step.clamp(min=1e-300)), entries)
    assert ((seen - entries * step).abs() <= 2.0**-24 * (entries * step).abs()).all()

    y = entries_in_format(t, form) @ entry_weights(matrix)
    token = s * group_dequant.top_scale(tables.d)
    scale = group_dequant.weight_scale(matrix.exponent).double() * token.double()[:, None]
    golden = quantised_tables.accumulate(tables, matrix).double() * scale
    rounding = seen.flatten(1).abs() @ entry_weights(matrix).double().abs() * 128 * 2.0**-24
    assert ((y.double() - golden).abs() <= group_dequant.bound(tables.d, token, matrix.exponent) + rounding).all()


def test_int8_is_what_the_accumulators_mean(generator: torch.Generator) -> None:
    t = table_formats.like_smollm2(5, 96, generator)
    matrix = table_formats.group_weights(GroupQuantiser().quantise(torch.randn(8, 96, generator=generator).numpy()))
    q, d, token = norm.norm_quantise_groups(t, None, 0.0, 0.0)
    meant = group_dequant.matmul_float(q, d, token, matrix)
    torch.testing.assert_close(table_formats.int8_groups(t).double() @ group_dequant.dense(matrix).T, meant, rtol=1e-6, atol=1e-6)
    assert float((table_formats.int8_groups(t) - t).abs().max()) > 0


def test_errors_of_a_matmul_are_of_the_right_size() -> None:
    """INT16 and FP16 tables are alike, and of the size of int8 activations; FP8's own rounding is far above."""
    records = table_formats.matmul_errors(tokens=16, inputs=320, outputs=32)
    errors = {(record["weights"], record["activations"]): record["error"] for record in records}
    for bits in table_formats.TABLE_BITS:
        of = {acts: error for (weights, acts), error in errors.items() if weights == f"W{bits}"}
        assert of["INT16 alone"] < 1e-3 and of["FP16 alone"] < 1e-3 and 0.01 < of["FP8 alone"] < 0.05
        assert 0.5 < of["INT16, int8 tables"] / of["INT8, exact tables"] < 1.5
        assert of["FP16, int8 tables"] == pytest.approx(of["INT16, int8 tables"], rel=0.3)
        assert of["FP8, int8 tables"] == pytest.approx(float(np.hypot(of["FP8 alone"], of["INT16, int8 tables"])), rel=0.1)
    assert errors["FP4", "FP16, MixPE"] < 5e-4


def test_errors_of_the_weights() -> None:
    """Heavier tails favour FP4, normal weights a minimum."""
    errors = table_formats.weight_errors(table_formats.random_weights(inputs=256, outputs=64))
    normal, tails = ({name: each[one] for name, each in errors.items()} for one in ("normal", "heavy tails (t, 5)"))
    assert tails["FP4, mse"] < tails["INT4 symmetric, mse"] and normal["INT4 with minimum, mse"] < normal["INT4 symmetric, rtn"]
    for name in ("FP4", "INT4 symmetric", "INT4 with minimum"):
        assert all(errors[f"{name}, mse"][one] <= errors[f"{name}, rtn"][one] for one in errors["FP4, mse"])


def test_models_see_what_they_should(tmp_path: Path, generator: torch.Generator) -> None:
    """A small model: with nothing replaced nothing changes; formats rank as they must."""
    checkpoint = open_model(write_gguf(tmp_path / "m.gguf", TINY_CHAT, random_llama(TINY_CHAT), default=Kind.Q4_1)).load()
    ids = torch.randint(checkpoint.config.vocab, (1, 48), generator=generator)
    base = FloatModel(checkpoint, dtype=torch.float32).logits(ids)
    assert torch.equal(ActivationModel(checkpoint, lambda t: t).logits(ids), base)
    off = {
        "int8": (ActivationModel(checkpoint, table_formats.int8_groups).logits(ids) - base).square().mean(),
        **{form: (TableModel(checkpoint, form).logits(ids) - base).square().mean() for form in ActFormat},
    }
    assert 0 < max(off["int8"], off[ActFormat.INT16], off[ActFormat.FP16]) < off[ActFormat.FP8]


def test_quality_of_the_base_is_perfect_and_worse_models_are_worse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpoint = open_model(write_gguf(tmp_path / "m.gguf", TINY_CHAT, random_llama(TINY_CHAT), default=Kind.Q4_1)).load()
    monkeypatch.setattr(table_formats, "WINDOW", K_GROUP)
    monkeypatch.setattr(table_formats, "FIRST_COUNTED", K_GROUP // 2)
    ids = np.random.default_rng(1).integers(0, checkpoint.config.vocab, 4 * K_GROUP + 3).tolist()
    models = {"base": lambda: FloatModel(checkpoint, dtype=torch.float32), "fp8": lambda: TableModel(checkpoint, ActFormat.FP8)}
    found = qualities(models, ids, Console(quiet=True))
    assert found["base"] == Quality(
        second_half=found["base"].second_half, every=found["base"].every, change=0.0, standard_error=0.0, kl=0.0, top1=1.0
    )
    assert found["fp8"].kl > 0 and found["fp8"].top1 < 1 and found["fp8"].standard_error > 0
    assert found["fp8"].every == pytest.approx(found["base"].every * (1 + found["fp8"].change))
