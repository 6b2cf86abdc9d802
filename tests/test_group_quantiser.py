"""Float weights in groups: nearest codes, the symmetric rules of ggml, a search that never does worse, clear limits."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from benchmarks.quantiser import perplexity, requantised, variants
from cosim.gguf_checkpoint import TINY_CHAT, random_llama, write_gguf, write_llama_folder
from cosim.reference_data import REFERENCE
from golden.model import FloatModel
from host_driver import cli
from host_driver.errors import InvalidRequest
from host_driver.group_quantiser import TABLE, GroupQuantiser, Method
from host_driver.model_source import open_model
from host_driver.weights import CODE_BITS, GROUP_SIZES, GroupMatrix


def weights(seed: int = 0, shape: tuple[int, int] = (24, 256)) -> np.ndarray:
    """Heavy tails, and groups of very different size and centre."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(4, shape) * 2.0 ** rng.integers(-6, 3, (shape[0], 1)) + rng.normal(0, 0.3, (shape[0], 1))
    return values.astype(np.float32)


def error_of(matrix: GroupMatrix, values: np.ndarray) -> np.ndarray:
    """Squared error of each group."""
    return np.square(matrix.dense().astype(np.float64) - values).reshape(-1, matrix.group).sum(axis=1)


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize("symmetric", [False, True], ids=["minimum", "symmetric"])
def test_codes_are_the_nearest_and_the_search_is_no_worse(bits: int, group: int, symmetric: bool) -> None:
    values = weights()
    errors = {}
    for method in Method:
        matrix = GroupQuantiser(bits=bits, group=group, method=method, symmetric=symmetric).quantise(values)
        scale, minimum = (np.repeat(part.astype(np.float64), group, axis=1) for part in (matrix.scale, matrix.minimum))
        levels = minimum[..., None] + scale[..., None] * np.arange(1 << bits)
        nearest = np.abs(levels - values[..., None]).min(axis=-1)
        chosen = np.abs(matrix.dense().astype(np.float64) - values)
        assert (chosen <= nearest + 4e-5 * np.abs(scale)).all()  # (w - m) / s is rounded to binary32: 255 * 2^-23 steps
        errors[method] = error_of(matrix, values)
        if symmetric:
            share = -0.5 if bits == 1 else -(1 << bits - 1)
            np.testing.assert_array_equal(matrix.minimum, matrix.scale * np.float16(share))
    assert (errors[Method.MSE] <= errors[Method.RTN] * (1 + 1e-5)).all()
    if bits < 8 and (bits, symmetric) != (1, True):  # -a and +a: the mean of |w| is the best a
        assert errors[Method.MSE].sum() < 0.97 * errors[Method.RTN].sum()


def test_search_is_near_the_best_that_there_is() -> None:
    """2 bits of one group of 32 against 40,000 pairs of scale and minimum."""
    values = weights(5, (6, 32))
    matrix = GroupQuantiser(bits=2, group=32).quantise(values)
    for row, error in zip(values, error_of(matrix, values), strict=True):
        width = row.max() - row.min()
        minimum, scale = np.meshgrid(np.linspace(row.min(), row.max(), 200), np.linspace(0.02, 0.4, 200) * width)
        codes = np.clip(np.rint((row - minimum[..., None]) / scale[..., None]), 0, 3)
        best = np.square(codes * scale[..., None] + minimum[..., None] - row).sum(axis=-1).min()
        assert error <= 1.25 * best


@pytest.mark.parametrize(("bits", "kind"), [(4, Kind.Q4_0), (8, Kind.Q8_0)])
def test_symmetric_nearest_is_ggmls_rule(bits: int, kind: Kind) -> None:
    """The scales are ggml's; the codes differ only where its scale in float32 and ours in FP16 round otherwise."""
    values = weights(2)
    matrix = GroupQuantiser(bits=bits, group=32, method=Method.RTN, symmetric=True).quantise(values)
    stored = gguf.quants.quantize(values, kind).reshape(-1, {4: 18, 8: 34}[bits])
    np.testing.assert_array_equal(matrix.scale.reshape(-1), np.ascontiguousarray(stored[:, :2]).view(np.float16)[:, 0])
    ggml = gguf.quants.dequantize(stored, kind).reshape(values.shape)
    step = np.repeat(np.abs(matrix.scale.astype(np.float32)), 32, axis=1)
    assert (np.abs(matrix.dense() - ggml) <= 1.001 * step).all()
    assert np.mean(matrix.dense() == ggml) > (0.99 if bits == 4 else 0.9)
    assert error_of(matrix, values).sum() <= error_of_array(ggml, values) * (1 + 1e-6)


def error_of_array(found: np.ndarray, values: np.ndarray) -> float:
    return float(np.square(found.astype(np.float64) - values).sum())


def test_a_matrix_of_the_format_comes_back() -> None:
    """4 bits with a minimum are the format of Q4_1: quantising its floats again finds as good a matrix."""
    first = GroupQuantiser(method=Method.RTN).quantise(weights(3))
    again = GroupQuantiser(method=Method.RTN).quantise(first.dense())
    np.testing.assert_allclose(again.dense(), first.dense(), atol=2e-3 * np.abs(first.dense()).max())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("value", [0.0, 0.75, -3.0, 1e-9])
def test_constant_groups(symmetric: bool, method: Method, value: float) -> None:
    for bits in (2, 4, 8):
        matrix = GroupQuantiser(bits=bits, method=method, symmetric=symmetric).quantise(np.full((2, 64), value, dtype=np.float32))
        np.testing.assert_allclose(matrix.dense(), value, rtol=1e-2, atol=1e-7)


def test_limits_are_clear() -> None:
    with pytest.raises(ValueError, match=r"^weights have 1, 2, 3, 4, 8 bits, not 5$"):
        GroupQuantiser(bits=5)
    with pytest.raises(ValueError, match=r"^groups have 32, 64, 128 weights, not 48$"):
        GroupQuantiser(group=48)
    with pytest.raises(ValueError, match=r"^rows of 96 weights are not whole groups of 64$"):
        GroupQuantiser(group=64).quantise(np.zeros((1, 96), dtype=np.float32))
    for quantiser in (GroupQuantiser(), GroupQuantiser(symmetric=True), TABLE):
        with pytest.raises(ValueError, match=r"^a weight is beyond what an FP16 scale and minimum can hold$"):
            quantiser.quantise(np.array([[1e9] + [0.0] * 31], dtype=np.float32))


def test_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = GroupQuantiser(bits=3).quantise(weights(6))
    monkeypatch.setattr("host_driver.group_quantiser.CHUNK", 7 * 32)
    parts = GroupQuantiser(bits=3).quantise(weights(6))
    for name in ("codes", "scale", "minimum"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def test_options_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = random_llama(TINY_CHAT)
    folder = write_llama_folder(tmp_path / "m", TINY_CHAT, tensors, dtype=np.float16)
    base = ["info", "--model", str(folder), "--preset", "test_lut"]
    assert cli.run([*base, "--bits", "2", "--quantiser", "rtn"]) == 0
    for options, message in (
        (["--bits", "5"], "error: weights have 1, 2, 3, 4, 8 bits, not 5"),
        (["--group", "31"], "error: groups have 32, 64, 128 weights, not 31"),
    ):
        assert cli.run([*base, *options]) == 1
        assert message in capsys.readouterr().err
    file = write_gguf(tmp_path / "q.gguf", TINY_CHAT, tensors, default=Kind.Q4_1)
    assert cli.run(["info", "--model", str(file), "--preset", "test_lut", "--bits", "4"]) == 1
    assert "q.gguf: its weights are quantised already: --bits, --group" in capsys.readouterr().err
    with pytest.raises(InvalidRequest, match=r"rows of 96 weights are not whole groups of 64$"):
        open_model(folder, GroupQuantiser(group=64)).load()


def test_perplexity_is_cross_entropy_of_whole_windows() -> None:
    """Uniform logits: the vocabulary's size, whatever the text."""
    vocab = 12

    class Uniform(FloatModel):
        def __init__(self) -> None:
            pass

        def logits(self, ids: list[int] | torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(ids), vocab)

    found = perplexity(Uniform(), [3] * 1100)
    assert found.every == pytest.approx(vocab) and found.second_half == pytest.approx(vocab)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("as imported", 32.923 * 1.0005),
        ("4 bits, symmetric, group 32, rtn", 40.00 * 1.02),
        ("4 bits, symmetric, group 32, mse", 43.28 * 1.02),
    ],
)
def test_perplexity_of_smollm2(name: str, limit: float) -> None:
    """llama-perplexity's rule; the limits are an outside program's figures for the same rules, and 2 %."""
    torch.set_num_threads(1)
    ids = json.loads((REFERENCE / "perplexity_austen_ids.json").read_text())
    checkpoint = requantised(open_model("smollm2").load(), variants()[name])
    assert perplexity(FloatModel(checkpoint, dtype=torch.float32), ids).second_half < limit


if not REFERENCE.is_dir():
    del test_perplexity_of_smollm2
