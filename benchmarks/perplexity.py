"""What the integer datapath costs in quality: held-out perplexity of the bundled model, golden against float.

    python -m benchmarks.perplexity [--windows 16] [--kv int8] [--json FILE]

Both use the same ternary weights, int8 embedding and int8 head. "golden" is the exact datapath of the hardware (int8
activations, KV cache of ``--kv``, stated float32 operations); "float" quantises nothing else (float64). Windows of the
model's context do not overlap; every position but the first of a window is predicted.
"""

import json
import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from golden.model import FloatModel, GoldenModel
from host_driver.checkpoint import load_checkpoint
from host_driver.tokenizer import TextTokenizer
from spec.config import KvFormat

BUNDLED = Path(__file__).resolve().parent.parent / "models" / "austen"


def window_nll(logits: torch.Tensor, ids: list[int]) -> float:
    """Sum of -log p of ids[1:] given logits (tokens, vocab)."""
    logp = torch.log_softmax(logits[:-1].double(), dim=-1)
    return -float(logp.gather(1, torch.tensor(ids[1:])[:, None]).sum())


def main(
    model: Path = BUNDLED,
    text: Annotated[Path | None, typer.Option(help="held-out text; the model's own by default")] = None,
    windows: int = 16,
    kv: Annotated[KvFormat, typer.Option(help="number format of the KV cache")] = KvFormat.INT8,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures as one object")] = None,
) -> None:
    """Print both perplexities."""
    torch.set_num_threads(1)
    checkpoint = load_checkpoint(model)
    config = checkpoint.config
    tokenizer = TextTokenizer.from_folder(model, bos_id=None, vocab=config.vocab)
    ids = tokenizer.encode((text or model / "heldout.txt").read_text(encoding="utf-8"))
    length = config.max_positions
    pieces = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:windows]
    if not pieces:
        raise typer.BadParameter(f"the text has {len(ids)} tokens, one window takes {length}")
    nll = {"golden": 0.0, "float": 0.0}
    agree = 0
    reference = FloatModel(checkpoint)
    for piece in track(pieces, description="windows", console=Console(stderr=True)):
        exact = GoldenModel(checkpoint, length, kv).step(piece, 0, all_logits=True)
        meant = reference.logits(piece)
        nll["golden"] += window_nll(exact, piece)
        nll["float"] += window_nll(meant, piece)
        agree += int((exact[:-1].argmax(-1) == meant[:-1].argmax(-1)).sum())
    count = len(pieces) * (length - 1)
    ppl = {name: math.exp(value / count) for name, value in nll.items()}
    change = ppl["golden"] / ppl["float"] - 1
    table = Table(title=f"held-out perplexity of {config.name}, {count} predictions", show_header=False)
    table.add_row(f"golden (int8 activations, KV cache {kv})", f"{ppl['golden']:.3f}")
    table.add_row("float activations, same weights", f"{ppl['float']:.3f}")
    table.add_row("change", f"{change:+.2%}")
    table.add_row("same most likely token", f"{agree / count:.1%}")
    Console().print(table)
    if json_file is not None:
        figures = {"kv": kv.value, "predictions": count, "perplexity": ppl, "change": change, "same_top1": agree / count}
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
