"""What the integer datapath costs SmolLM2: golden against float, and both against the reference's recorded figures.

    python -m benchmarks.smollm2_accuracy --reference FOLDER [--contexts 4] [--kv int4 --keys FILE] [--json FILE]

FOLDER holds `perplexity_austen_ids.json` (token ids) and `smollm2_f32.json` (prompts, 32 greedy tokens and the ten
best logits of every step, by llama.cpp in float32). Golden computes with int8 activations (a scale for each 32), the KV
cache that is asked for (int8) and the head quantised like every matrix; "float" is float64 on the same weights. Perplexity by
llama-perplexity's rule: contexts of 512 tokens, of which the predictions of positions 256 to 510 count.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from golden.model import FloatModel, GoldenModel
from host_driver.key_channels import load_channels
from host_driver.model_source import open_model
from host_driver.weights import Checkpoint
from spec.config import KvFormat

CONTEXT = 512
FIRST_SCORED = CONTEXT // 2


def log_probabilities(logits: Tensor) -> Tensor:
    """(tokens, vocab) of the tokens that follow; the last position predicts nothing."""
    return torch.log_softmax(logits[:-1].double(), dim=-1)


Golden = Callable[[int], GoldenModel]
"""A model with an empty cache of so many slots."""


def contexts(golden: Golden, checkpoint: Checkpoint, ids: list[int], count: int, console: Console) -> dict[str, float]:
    """Perplexities, KL(float || golden) and top-1 agreement over `count` contexts."""
    reference = FloatModel(checkpoint)
    nll = {name: torch.zeros(0, dtype=torch.float64) for name in ("golden", "float")}
    scored = torch.zeros(0, dtype=torch.bool)
    divergence, agree = 0.0, 0
    for number in track(range(count), description="contexts", console=console):
        piece = ids[number * CONTEXT : (number + 1) * CONTEXT]
        targets = torch.tensor(piece[1:])[:, None]
        logp = {
            "golden": log_probabilities(golden(CONTEXT).step(piece, 0, all_logits=True)),
            "float": log_probabilities(reference.logits(piece)),
        }
        for name, values in logp.items():
            nll[name] = torch.cat([nll[name], -values.gather(1, targets).squeeze(1)])
        scored = torch.cat([scored, torch.arange(CONTEXT - 1) >= FIRST_SCORED])
        divergence += float((logp["float"].exp() * (logp["float"] - logp["golden"])).sum())
        agree += int((logp["float"].argmax(-1) == logp["golden"].argmax(-1)).sum())
    total = count * (CONTEXT - 1)
    result = {"predictions": float(total), "kl": divergence / total, "top1": agree / total}
    for name, values in nll.items():
        result[f"ppl_{name}"] = math.exp(float(values[scored].mean()))
        result[f"ppl_all_{name}"] = math.exp(float(values.mean()))
    return result


def prompts(golden: Golden, records: list[dict], console: Console) -> dict[str, float]:
    """Teacher-forced: after each prompt and each of its reference tokens, is golden's best token the reference's?"""
    agree = total = 0
    worst = 0.0
    for record in track(records, description="prompts", console=console):
        ids = record["prompt_ids"] + record["greedy_ids"]
        first = len(record["prompt_ids"]) - 1
        logits = golden(len(ids)).step(ids, 0, all_logits=True)[first:-1]
        for step, top in enumerate(record["top10"]):
            agree += int(logits[step].argmax()) == top["ids"][0]
            total += 1
            there = logits[step][torch.tensor(top["ids"])].double()
            worst = max(worst, float((there - torch.tensor(top["logits"], dtype=torch.float64)).abs().max()))
    return {"prompt_tokens": float(total), "prompt_top1": agree / total, "prompt_worst_logit": worst}


def main(
    reference: Annotated[Path, typer.Option(help="folder of the reference data")],
    model: Annotated[str, typer.Option(help="name or path of the model")] = "smollm2",
    count: Annotated[int, typer.Option("--contexts", help="contexts of 512 tokens")] = 4,
    kv: Annotated[KvFormat, typer.Option(help="golden's KV cache")] = KvFormat.INT8,
    keys: Annotated[Path | None, typer.Option(help="golden's key channels")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures as one object")] = None,
) -> None:
    """Print the table of docs/results.md."""
    torch.set_num_threads(1)
    console = Console(stderr=True)
    checkpoint = open_model(model).load()
    channels = None if keys is None else load_channels(keys, checkpoint.config)

    def golden(slots: int) -> GoldenModel:
        return GoldenModel(checkpoint, slots, kv, channels)

    ids = json.loads((reference / "perplexity_austen_ids.json").read_text())
    figures = prompts(golden, json.loads((reference / "smollm2_f32.json").read_text()), console)
    figures |= contexts(golden, checkpoint, ids, min(count, len(ids) // CONTEXT), console)
    table = Table("", "float", "golden", "change", title=f"{checkpoint.config.name}: what the datapath costs", box=MARKDOWN)
    for label, key in (("perplexity, positions 256..510", "ppl"), ("perplexity, all positions", "ppl_all")):
        meant, exact = figures[f"{key}_float"], figures[f"{key}_golden"]
        table.add_row(label, f"{meant:.3f}", f"{exact:.3f}", f"{100 * (exact / meant - 1):+.2f} %")
    table.add_row("KL(float, golden), nats a token", "", f"{figures['kl']:.5f}", "")
    table.add_row(f"top-1 agreement, {figures['predictions']:.0f} predictions", "", f"{100 * figures['top1']:.1f} %", "")
    label = f"top-1 agreement with llama.cpp float32, {figures['prompt_tokens']:.0f} teacher-forced tokens"
    table.add_row(label, "", f"{100 * figures['prompt_top1']:.1f} %", "")
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
