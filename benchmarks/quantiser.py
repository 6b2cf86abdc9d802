"""What quantising float weights in groups costs: perplexity of SmolLM2-135M with its weights quantised again.

    python -m benchmarks.quantiser --ids IDS.json [--text FILE] [--only NAME ...] [--json FILE]

The weights are those of the Q4_1 file as floats, so every error comes on top of that format's; asymmetric 4-bit groups
of 32 are that format, and give it back. Embedding and head stay as they are; activations and cache are float32. A text
is cut into windows of 512 tokens that do not overlap; "second half" counts only the predictions from positions 256 to
510, as llama-perplexity does, "all" those of every position but the last.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from golden.model import FloatModel
from host_driver.group_quantiser import GroupQuantiser, Method
from host_driver.model_source import open_model
from host_driver.weights import Checkpoint, LayerWeights

WINDOW = 512
FIRST_COUNTED = 256


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Of a text; lower is better."""

    second_half: float
    every: float


Quantise = Callable[[np.ndarray], Any]
"""A dense matrix to a matrix, or to a dense one again."""


def variants() -> dict[str, Quantise | None]:
    """By name; None: the weights as they are."""
    table: dict[str, Quantise | None] = {"as imported": None}
    for bits, symmetric, method in (
        (8, True, Method.RTN), (4, True, Method.RTN), (4, True, Method.MSE), (4, False, Method.RTN), (4, False, Method.MSE),
        (3, True, Method.RTN), (3, True, Method.MSE), (3, False, Method.RTN), (3, False, Method.MSE),
        (2, True, Method.MSE), (2, False, Method.RTN), (2, False, Method.MSE), (1, False, Method.MSE),
    ):  # fmt: skip
        for group in (32, 64) if bits == 4 else (32,):
            name = f"{bits} bits, {'symmetric' if symmetric else 'minimum'}, group {group}, {method}"
            table[name] = GroupQuantiser(bits=bits, group=group, method=method, symmetric=symmetric).quantise
    return table


def requantised(checkpoint: Checkpoint, quantise: Quantise | None) -> Checkpoint:
    """The checkpoint with every matrix of every layer quantised from its float meaning."""
    if quantise is None:
        return checkpoint

    def layer(weights: LayerWeights) -> LayerWeights:
        matrices: dict[str, Any] = {
            name: quantise(part.dense()) for name, part in vars(weights).items() if hasattr(part, "dense")
        }
        return replace(weights, **matrices)

    return replace(checkpoint, layers=tuple(layer(weights) for weights in checkpoint.layers))


@torch.no_grad()
def perplexity(model: FloatModel, ids: list[int]) -> Perplexity:
    """Over the whole windows of a text."""
    windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).reshape(-1, WINDOW)
    if not len(windows):
        raise typer.BadParameter(f"the text has {len(ids)} tokens, one window takes {WINDOW}")
    losses = []
    for window in windows:  # one at a time: all logits of a window are 100 MB
        logits = model.logits(window)[:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").double())
    every = torch.stack(losses)
    return Perplexity(second_half=math.exp(every[:, FIRST_COUNTED:].mean()), every=math.exp(every.mean()))


def main(
    model: Annotated[str, typer.Option(help="path or name, as for lutra")] = "smollm2",
    ids: Annotated[Path | None, typer.Option(help="JSON list of token ids of a text")] = None,
    text: Annotated[Path | None, typer.Option(help="a text instead")] = None,
    only: Annotated[list[str] | None, typer.Option(help="variants whose name contains this")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures as one object")] = None,
) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    source = open_model(model)
    if (ids is None) is (text is None):
        raise typer.BadParameter("one of --ids and --text is needed")
    tokens = json.loads(ids.read_text()) if ids else source.tokenizer().encode(text.read_text(encoding="utf-8")) if text else []
    checkpoint = source.load()
    console = Console(stderr=True)
    table = Table("weights", "second half", "all", "change", title=f"perplexity of {source.config.name}")
    figures: dict[str, dict[str, float]] = {}
    for name, quantise in variants().items():
        if only and not any(part in name for part in only) and quantise is not None:
            continue
        started = perf_counter()
        found = perplexity(FloatModel(requantised(checkpoint, quantise), dtype=torch.float32), tokens)
        figures[name] = {"second_half": found.second_half, "all": found.every}
        base = figures["as imported"]["all"]
        table.add_row(name, f"{found.second_half:.3f}", f"{found.every:.3f}", f"{found.every / base - 1:+.2%}")
        console.print(f"{name}: {found.second_half:.3f} {found.every:.3f} ({perf_counter() - started:.0f} s)", highlight=False)
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
