"""What activation formats, int8 tables and FP4 weights cost: relative errors of a matmul, and perplexity of SmolLM2-135M.

    python -m benchmarks.table_formats [--part matmul|model|weights|all] [--reference FOLDER] [--only NAME ...] [--json FILE]

matmul: golden, bit for bit as the cores compute, on random data against float64: weights of 1 to 4 bits in groups of 32,
activations as int8 with a scale for each 32 (exact tables), and as INT16, FP8 (E4M3) and FP16 with int8 tables; FP4
weights on FP16 activations. model: the linear layers of SmolLM2-135M (Q4_1) fed with each kind of activations, all else
float32; weights: its matrices quantised again. FOLDER holds `perplexity_austen_ids.json`; contexts of 512 tokens.
The model runs compute with golden's entries and scales, but add up in float32.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.quantiser import FIRST_COUNTED, WINDOW, requantised
from golden import act_formats, group_dequant, mixpe_fp, norm, quantised_tables
from golden.group_dequant import GroupWeights
from golden.linear import half_bits
from golden.model import FloatModel
from host_driver.fp4_quantiser import Fp4Quantiser
from host_driver.group_quantiser import GroupQuantiser, Method
from host_driver.model_source import open_model
from host_driver.weights import Checkpoint, GroupMatrix
from spec.act_formats import ActFormat
from spec.config import K_GROUP

TABLE_BITS = (1, 2, 3, 4)
SEED = 20


# 1. kinds of activations: what the matrices get to see


def int8_groups(t: Tensor) -> Tensor:
    """Numerics 2b without a norm: float32 (M, K) to what its int8 mean, float32."""
    q, d, token = norm.norm_quantise_groups(t, None, 0.0, 0.0)
    field = d >> 7 & 0xFF
    step = group_dequant.act_parts(d)[0] * torch.exp2((field - field.amax(-1, keepdim=True)).double()) * token.double()[:, None]
    return (q.double() * step.repeat_interleave(K_GROUP, -1)).to(torch.float32)


def in_format(t: Tensor, form: ActFormat) -> Tensor:
    """Rounded to the format, and to its group's fixed point."""
    bits, s = act_formats.to_format(t, form)
    v, unit = act_formats.fixed_group(bits.unflatten(-1, (-1, K_GROUP)), form)
    return (v * torch.exp2(unit.double()).unsqueeze(-1)).flatten(-2).mul(s.double()[:, None]).to(torch.float32)


def entries_in_format(t: Tensor, form: ActFormat) -> Tensor:
    """The 64 entries of each group times d and the token's scale: float32 (M, K) to (M, 2 K)."""
    bits, s = act_formats.to_format(t, form)
    tables = quantised_tables.quantise(bits, form)
    step = group_dequant.act_value(tables.d) * s.double()[:, None]
    return (tables.entries.flatten(-2) * step.unsqueeze(-1)).flatten(-2).to(torch.float32)


def entry_weights(weights: GroupWeights) -> Tensor:
    """What those entries are multiplied by: float32 (2 K, N)."""
    scale, minimum = (group_dequant.half_value(part).T.unsqueeze(1) for part in (weights.scale, weights.minimum))  # (G, 1, N)
    each = quantised_tables.factors(weights.codes, weights.bits).double() * scale
    each[:, ::8] -= 2 * minimum  # A is -2 times the sum of entries 0
    return each.flatten(0, 1).to(torch.float32)


def group_weights(matrix: GroupMatrix) -> GroupWeights:
    """As golden holds it."""
    scale, minimum = (half_bits(part, matrix.group // K_GROUP) for part in (matrix.scale, matrix.minimum))
    exponent = group_dequant.largest_exponent(scale, minimum)
    return GroupWeights(torch.from_numpy(matrix.codes), scale, minimum, matrix.bits, exponent)


# 2. errors of one matmul, golden bit for bit


def like_smollm2(tokens: int, inputs: int, generator: torch.Generator) -> Tensor:
    """Activations whose largest is 6 to 17 times their root mean square, 9 in the median: about as behind SmolLM2's norms."""
    channel, size = (torch.exp(0.5 * torch.randn(*shape, generator=generator)) for shape in ((inputs,), (tokens, inputs)))
    return torch.randn(tokens, inputs, generator=generator) * size * channel


def matmul_errors(tokens: int = 64, inputs: int = 1536, outputs: int = 256) -> list[dict[str, Any]]:
    """A record a combination: root mean square of the error over that of the exact result, weights as quantised."""
    generator = torch.Generator().manual_seed(SEED)
    t = like_smollm2(tokens, inputs, generator)
    dense = (torch.randn(outputs, inputs, generator=generator) * 0.04).numpy()
    records = []

    def record(weights: str, acts: str, y: Tensor, exact: Tensor) -> None:
        records.append({"weights": weights, "activations": acts, "error": _relative(y, exact)})

    def scaled(acc: Tensor, token: Tensor, matrix: GroupWeights) -> Tensor:
        return acc.double() * (group_dequant.weight_scale(matrix.exponent).double() * token.double())[:, None]

    for bits in TABLE_BITS:
        matrix, name = group_weights(GroupQuantiser(bits=bits).quantise(dense)), f"W{bits}"
        weights = group_dequant.dense(matrix).T
        exact = t.double() @ weights
        q, d, token = norm.norm_quantise_groups(t, None, 0.0, 0.0)
        record(name, "INT8, exact tables", scaled(group_dequant.accumulate(q, d, matrix), token, matrix), exact)
        for form in ActFormat:
            acts, s = act_formats.to_format(t, form)
            record(name, f"{form.upper()} alone", act_formats.value_of(acts, form) * s.double()[:, None] @ weights, exact)
            tables = quantised_tables.quantise(acts, form)
            acc, token = quantised_tables.accumulate(tables, matrix), s * group_dequant.top_scale(tables.d)
            record(name, f"{form.upper()}, int8 tables", scaled(acc, token, matrix), exact)
    matrix = fp4_weights(dense, Method.MSE)
    acts, s = act_formats.to_format(t, ActFormat.FP16)
    acc, d = mixpe_fp.accumulate(acts, matrix)
    y = scaled(acc, s * group_dequant.top_scale(d), matrix)
    record("FP4", "FP16, MixPE", y, t.double() @ mixpe_fp.dense(matrix).T)
    return records


def fp4_weights(dense: np.ndarray, method: Method) -> GroupWeights:
    """FP4 groups as golden holds them: codes are E2M1, minima 0."""
    matrix = Fp4Quantiser(method=method).quantise(dense)
    scale = half_bits(matrix.scale, 1)
    return GroupWeights(torch.from_numpy(matrix.codes), scale, torch.zeros_like(scale), 4, group_dequant.largest_exponent(scale))


def random_weights(inputs: int = 1536, outputs: int = 256) -> dict[str, list[np.ndarray]]:
    """A matrix of each distribution."""
    generator = torch.Generator().manual_seed(SEED)
    normal = torch.randn(outputs, inputs, generator=generator)
    tails = normal * torch.rsqrt(torch.distributions.Chi2(5.0).sample(torch.Size((outputs, inputs))) / 5)
    return {"normal": [normal.numpy()], "heavy tails (t, 5)": [tails.numpy()]}


def some_layers(checkpoint: Checkpoint, every: int = 10) -> dict[str, list[np.ndarray]]:
    """The matrices of every tenth layer, as floats."""
    layers = checkpoint.layers[::every]
    matrices = [part.dense() for layer in layers for part in vars(layer).values() if hasattr(part, "dense")]
    return {f"{len(layers)} of {len(checkpoint.layers)} layers": matrices}


def weight_errors(weights: dict[str, list[np.ndarray]]) -> dict[str, dict[str, float]]:
    """Relative error of the weights alone, over all matrices of each kind, by weight format."""
    found: dict[str, dict[str, float]] = {}
    for name, make in weight_formats().items():
        if make is not None:
            for kind, matrices in weights.items():
                off = sum(float(np.square(make(w) - w, dtype=np.float64).sum()) for w in matrices)
                power = sum(float(np.square(w, dtype=np.float64).sum()) for w in matrices)
                found.setdefault(name, {})[kind] = math.sqrt(off / power)
    return found


def weight_table(errors: dict[str, dict[str, float]]) -> Table:
    """A row a format."""
    kinds = list(next(iter(errors.values())))
    table = Table("weights", *kinds, title="relative error of the weights, groups of 32", box=MARKDOWN)
    for name, each in errors.items():
        table.add_row(name, *(f"{each[kind]:.4f}" for kind in kinds))
    return table


def _relative(got: Tensor, exact: Tensor) -> float:
    return float(((got - exact).square().mean() / exact.square().mean()).sqrt())


# 3. a whole model


class ActivationModel(FloatModel):
    """The float model with what its layers' matrices get to see replaced."""

    def __init__(self, checkpoint: Checkpoint, see: Callable[[Tensor], Tensor]) -> None:
        super().__init__(checkpoint, dtype=torch.float32)
        self._see = see

    def product(self, x: Tensor, matrix: Any) -> Tensor:
        return super().product(self._see(x.flatten(0, -2)), matrix).unflatten(0, x.shape[:-1])


class TableModel(FloatModel):
    """The float model with quantised tables in its layers' matrices."""

    def __init__(self, checkpoint: Checkpoint, form: ActFormat) -> None:
        super().__init__(checkpoint, dtype=torch.float32)
        self._form = form

    def product(self, x: Tensor, matrix: Any) -> Tensor:
        entries = entries_in_format(x.flatten(0, -2), self._form)
        return (entries @ entry_weights(group_weights(matrix))).unflatten(0, x.shape[:-1])


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Against the float model, on the same text."""

    second_half: float
    every: float
    change: float
    """Of `every`, relative"""
    standard_error: float
    """Of `change`, paired by token"""
    kl: float
    """KL(base, model) in nats a prediction"""
    top1: float


@torch.no_grad()
def qualities(models: dict[str, Callable[[], FloatModel]], ids: list[int], console: Console) -> dict[str, Quality]:
    """The first model is the base."""
    windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).reshape(-1, WINDOW)
    found: dict[str, Quality] = {}
    base_hidden, base_nll = None, torch.zeros(0)
    for name, make in track(models.items(), description="models", console=console):
        model = make()
        hidden = model.hidden(windows)
        base_hidden = hidden if base_hidden is None else base_hidden
        nll, kl, agree = [], 0.0, 0
        for number, window in enumerate(windows):
            logp, base = (torch.log_softmax(model.head(h[number, :-1]), -1) for h in (hidden, base_hidden))
            nll.append(-logp.gather(1, window[1:, None])[:, 0].double())
            kl += float((base.exp() * (base - logp)).sum(dtype=torch.float64))
            agree += int((base.argmax(-1) == logp.argmax(-1)).sum())
        every = torch.stack(nll)
        base_nll = every if not found else base_nll
        difference = (every - base_nll).flatten()
        count = difference.numel()
        found[name] = Quality(
            second_half=math.exp(every[:, FIRST_COUNTED:].mean()), every=math.exp(every.mean()),
            change=math.expm1(difference.mean()), standard_error=float(difference.std() / math.sqrt(count)),
            kl=kl / count, top1=agree / count,
        )  # fmt: skip
        console.print(f"{name}: perplexity {found[name].every:.3f}, KL {found[name].kl:.5f}", highlight=False)
    return found


def activation_models(checkpoint: Checkpoint) -> dict[str, Callable[[], FloatModel]]:
    """By kind of activations; the float model first."""
    models: dict[str, Callable[[], FloatModel]] = {
        "float32": lambda: FloatModel(checkpoint, dtype=torch.float32),
        "INT8, a scale for each 32, exact tables": lambda: ActivationModel(checkpoint, int8_groups),
    }
    for form in ActFormat:
        models[f"{form.upper()} alone"] = lambda form=form: ActivationModel(checkpoint, lambda t: in_format(t, form))
        models[f"{form.upper()}, int8 tables"] = lambda form=form: TableModel(checkpoint, form)
    return models


def weight_formats() -> dict[str, Callable[[np.ndarray], np.ndarray] | None]:
    """What a float matrix becomes; None: it stays."""
    formats: dict[str, Callable[[np.ndarray], np.ndarray] | None] = {"as they are": None}
    for method in Method:
        formats[f"INT4 with minimum, {method}"] = lambda w, method=method: GroupQuantiser(method=method).quantise(w).dense()
    for method in Method:
        symmetric = GroupQuantiser(method=method, symmetric=True)
        formats[f"INT4 symmetric, {method}"] = lambda w, symmetric=symmetric: symmetric.quantise(w).dense()
    for method in Method:
        formats[f"FP4, {method}"] = lambda w, method=method: Fp4Quantiser(method=method).quantise(w).dense()
    return formats


def weight_models(checkpoint: Checkpoint) -> dict[str, Callable[[], FloatModel]]:
    """The layers' matrices quantised again from their floats; FP4 on FP16 activations too."""
    formats = weight_formats()
    models: dict[str, Callable[[], FloatModel]] = {
        f"{name}, float32": lambda make=make: FloatModel(requantised(checkpoint, make), dtype=torch.float32)
        for name, make in formats.items()
    }
    best = formats[f"FP4, {Method.MSE}"]
    models[f"FP4, {Method.MSE}, FP16"] = lambda: ActivationModel(
        requantised(checkpoint, best), lambda t: in_format(t, ActFormat.FP16)
    )
    return models


def quality_table(title: str, found: dict[str, Quality]) -> Table:
    """A row a model."""
    table = Table(title, "positions 256..510", "all", "change", "KL, nats", "top-1", box=MARKDOWN)
    for name, one in found.items():
        change = f"{one.change:+.2%} ± {one.standard_error:.2%}"
        table.add_row(name, f"{one.second_half:.3f}", f"{one.every:.3f}", change, f"{one.kl:.5f}", f"{one.top1:.1%}")
    return table


def main(
    part: Annotated[str, typer.Option(help="matmul, model, weights or all")] = "all",
    reference: Annotated[Path | None, typer.Option(help="folder of perplexity_austen_ids.json")] = None,
    model: Annotated[str, typer.Option(help="path or name, as for lutra")] = "smollm2",
    only: Annotated[list[str] | None, typer.Option(help="models whose name contains this, beside the float one")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures as one object")] = None,
) -> None:
    """Print the tables of docs/results/formats.md."""
    if part not in ("matmul", "model", "weights", "all"):
        raise typer.BadParameter(f"part must be matmul, model, weights or all, not {part!r}")
    if part != "matmul" and reference is None:
        raise typer.BadParameter("the model needs --reference")
    torch.set_num_threads(1)
    console, figures = Console(stderr=True), {}
    if part in ("matmul", "all"):
        records = matmul_errors()
        names = list(dict.fromkeys(record["activations"] for record in records))
        table = Table("weights", *names, title="relative error of a matmul, 1536 inputs", box=MARKDOWN)
        for weights in dict.fromkeys(record["weights"] for record in records):
            cells = {record["activations"]: f"{record['error']:.2e}" for record in records if record["weights"] == weights}
            table.add_row(weights, *(cells.get(name, "") for name in names))
        Console(width=200).print(table)
        errors = weight_errors(random_weights())
        Console(width=200).print(weight_table(errors))
        figures |= {"matmul": records, "weights_alone": errors}
    if reference is not None and part != "matmul":
        ids = json.loads((reference / "perplexity_austen_ids.json").read_text())
        checkpoint = open_model(model).load()
        if part != "model":
            figures["layers_alone"] = weight_errors(some_layers(checkpoint))
            Console(width=200).print(weight_table(figures["layers_alone"]))
        for name, title, make in (("model", "activations", activation_models), ("weights", "weights", weight_models)):
            if part in (name, "all"):
                base, *others = make(checkpoint).items()
                chosen = [item for item in others if not only or any(piece in item[0] for piece in only)]
                found = qualities(dict([base, *chosen]), ids, console)
                Console(width=200).print(quality_table(title, found))
                figures[name] = {key: vars(one) for key, one in found.items()}
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
