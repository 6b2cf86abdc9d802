"""What each format of the KV cache costs a model in quality, and how many bytes a token takes.

    python -m benchmarks.kv_formats --reference FOLDER [--model smollm2] [--contexts 4] [--json FILE]

FOLDER holds `perplexity_austen_ids.json` (token ids). Only K and V are quantised, all else is float32 on the model's own
weights: so a row shows its format alone. Perplexity by llama-perplexity's rule: contexts of 512 tokens, of which the
predictions of positions 256 to 510 count. The rows of `KvFormat` use the hardware's quantiser (docs/numerics.md section 1);
those behind them are ways to an int4 K (benchmarks/int4_keys.py) that are only measured here.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.int4_keys import SCHEMES, cached, calibrate
from benchmarks.smollm2_accuracy import CONTEXT, FIRST_SCORED, log_probabilities
from golden.model import Cache, FloatModel
from host_driver.compiler import kv_layout
from host_driver.model_source import open_model
from spec.config import KvFormat

CALIBRATION = Path(__file__).resolve().parent.parent / "LICENSE"
"""Its first 512 tokens calibrate what is static: a text that nobody would test on."""


def format_cache(kv: KvFormat) -> Cache:
    """K and V as they come back out of a cache of that format."""
    return lambda _, q, k, v: (q, cached(k, kv.k_bits), cached(v, kv.v_bits))


def main(
    reference: Annotated[Path, typer.Option(help="folder of the reference data")],
    model: Annotated[str, typer.Option(help="name or path of the model")] = "smollm2",
    contexts: Annotated[int, typer.Option(help="contexts of 512 tokens")] = 4,
    only: Annotated[list[str] | None, typer.Option(help="run the rows whose name contains one of these, and float32")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures as one object")] = None,
) -> None:
    """Print the table of docs/results/formats.md."""
    torch.set_num_threads(1)
    source = open_model(model)
    network, config = FloatModel(source.load(), dtype=torch.float32), source.config
    ids = json.loads((reference / "perplexity_austen_ids.json").read_text())
    text = source.tokenizer().encode(CALIBRATION.read_text(encoding="utf-8"))[:CONTEXT]
    statistics = calibrate(network, text)
    heads = config.layers * config.kv_heads
    rows: list[tuple[str, int, Cache | None]] = [("float32", heads * 2 * 4 * config.head_dim, None)]
    rows += [(kv.value, heads * kv_layout(config, CONTEXT, kv).slot_bytes, format_cache(kv)) for kv in KvFormat]
    rows += [
        (name, heads * (config.head_dim + 8 + extra), scheme(statistics, config.group))
        for name, (extra, scheme) in SCHEMES.items()
    ]
    rows = rows[:1] + [row for row in rows[1:] if not only or any(part in row[0] for part in only)]
    nll = torch.zeros(len(rows), dtype=torch.float64)
    divergence, agree = torch.zeros_like(nll), torch.zeros_like(nll)
    count = min(contexts, len(ids) // CONTEXT)
    for number in track(range(count), description="contexts", console=Console(stderr=True)):
        piece = ids[number * CONTEXT : (number + 1) * CONTEXT]
        targets = torch.tensor(piece[1:])[:, None]
        base: Tensor | None = None
        for row, (_, _, network.cache) in enumerate(rows):
            logp = log_probabilities(network.logits([piece])[0])
            base = logp if base is None else base
            nll[row] -= logp.gather(1, targets)[FIRST_SCORED:].double().sum()
            divergence[row] += (base.exp() * (base - logp)).double().sum()
            agree[row] += (base.argmax(-1) == logp.argmax(-1)).sum()
    table = Table("K, V", "bytes a token", "perplexity", "change", "KL", "same top-1", title=config.name, box=MARKDOWN)
    figures = []
    perplexity = (nll / (count * (CONTEXT - 1 - FIRST_SCORED))).exp().tolist()
    for row, (name, size, _) in enumerate(rows):
        figure = {
            "kv": name,
            "bytes_a_token": size,
            "perplexity": perplexity[row],
            "change": perplexity[row] / perplexity[0] - 1,
            "kl": float(divergence[row]) / (count * (CONTEXT - 1)),
            "top1": float(agree[row]) / (count * (CONTEXT - 1)),
        }
        figures.append(figure)
        table.add_row(
            name, f"{size:,}", f"{perplexity[row]:.3f}", f"{100 * figure['change']:+.2f} %", f"{figure['kl']:.4f}",
            f"{100 * figure['top1']:.1f} %",
        )  # fmt: skip
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
