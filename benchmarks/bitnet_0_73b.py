"""BitNet b1.58 0.73B on preset kv260, beside TeLLMe v2 on the same platform: whole-token figures from simulated RTL.

The shape is 1bitLLM/bitnet_b1_58-large's (24 layers, hidden 1536, 16 heads of 96, FFN 4096, vocabulary 32002) with random
weights: cycles do not depend on their values. Simulating 24 layers would only repeat two: models of 1 and 2 layers run in
full, the difference is one layer, and a whole token is `first layer + 23 * layer + head`. Every term is measured at
the position it is quoted for.

    python -m benchmarks.bitnet_0_73b [--contexts 128,512] [--prompts 64,128] [--json FILE]
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cosim.random_model import random_checkpoint
from host_driver.device import Device
from host_driver.image import compile_checkpoint, memory_image
from host_driver.transport import open_device
from spec.config import ModelConfig
from spec.presets import PRESETS

SHAPE = ModelConfig(
    name="bitnet-0.73b", vocab=32002, hidden=1536, layers=24, heads=16, kv_heads=16, head_dim=96, ffn=4096,
    max_positions=2048,
)
SIMULATED_LAYERS = (1, 2)
TELLME_DECODE, TELLME_PREFILL = 25.0, 143.0
TELLME_TTFT = {64: 0.45, 128: 0.96}
"""TeLLMe v2 (arXiv 2510.15926, tables 1 and 2): tokens/s, tokens/s, seconds by prompt length; its LM head runs on the CPU."""


class Measurement:
    """Cycles of one model of a few layers on one simulated device."""

    def __init__(self, preset: str, layers: int, slots: int) -> None:
        self.config = PRESETS[preset]
        checkpoint = random_checkpoint(replace(SHAPE, layers=layers), seed=layers)
        compiled = compile_checkpoint(checkpoint, self.config, slots=slots)
        transport = open_device("rtl", preset, compiled.memory.limit)
        self.device = Device(transport, self.config)
        self.device.load(compiled, memory_image(compiled, checkpoint))
        self.tile = compiled.tile
        self.rng = np.random.default_rng(0)

    def step(self, tokens: int, position: int, *, head: bool) -> dict[str, int]:
        """Counters of one step."""
        ids = self.rng.integers(0, SHAPE.vocab, tokens).tolist()
        return self.device.run_step(ids, position, head=head).counters


def whole(one: float, two: float) -> float:
    """A count of the 24-layer model from those of 1 and 2 layers."""
    return one + (SHAPE.layers - 1) * (two - one)


def main(
    contexts: Annotated[str, typer.Option(help="cache lengths at which decode is measured")] = "128",
    prompts: Annotated[str, typer.Option(help="prompt lengths of prefill")] = "64",
    preset: str = "kv260",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures as one object")] = None,
) -> None:
    """Print decode and prefill figures."""
    context_list, prompt_list = ([int(part) for part in text.split(",")] for text in (contexts, prompts))
    clock = PRESETS[preset].clock_hz
    slots = max([*context_list, *prompt_list]) + 16
    models = [Measurement(preset, layers, slots) for layers in SIMULATED_LAYERS]
    tile = models[0].tile
    decode, prefill = [], []
    steps = len(context_list) + sum(-(-prompt // tile) for prompt in prompt_list)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("simulating", total=len(models) * steps)
        for context in context_list:
            counters = []
            for model in models:
                counters.append(model.step(1, context - 1, head=True))
                bar.advance(task)
            total = {name: whole(counters[0][name], counters[1][name]) for name in counters[0]}
            sent = sum(value for name, value in total.items() if name.endswith("_bytes"))
            decode.append(
                {
                    "context": context,
                    "cycles": total["cycles"],
                    "tokens_per_s": clock / total["cycles"],
                    "bytes": sent,
                    "bandwidth_utilisation": sent / total["cycles"] / PRESETS[preset].dram.bytes_per_cycle,
                    "layer_cycles": counters[1]["cycles"] - counters[0]["cycles"],
                }
            )
        for prompt in prompt_list:
            cycles = 0.0
            for position in range(0, prompt, tile):
                tokens = min(tile, prompt - position)
                last = position + tokens == prompt
                parts = []
                for model in models:
                    parts.append(model.step(tokens, position, head=last)["cycles"])
                    bar.advance(task)
                cycles += whole(parts[0], parts[1])
            macs = prompt * SHAPE.linear_weights
            prefill.append(
                {
                    "prompt": prompt,
                    "cycles": cycles,
                    "ttft_s": cycles / clock,
                    "tokens_per_s": prompt * clock / cycles,
                    "mac_utilisation": macs / cycles / PRESETS[preset].matmul.macs_per_cycle,
                }
            )

    table = Table(title=f"BitNet 0.73B on {preset}, {clock / 1e6:g} MHz, {SHAPE.layers} layers from measured layers and head")
    for column in ("figure", "Lutra (simulated RTL)", "TeLLMe v2 (KV260)", "ratio"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for row in decode:
        speed = row["tokens_per_s"]
        name = f"decode tokens/s at context {row['context']}"
        table.add_row(name, f"{speed:.1f}", f"{TELLME_DECODE:g}", f"{speed / TELLME_DECODE:.2f}")
        cost = f"{row['cycles']:,.0f}; {row['bandwidth_utilisation']:.1%}"
        table.add_row("  cycles a token; of the DRAM's bandwidth", cost, "", "")
    for row in prefill:
        speed = row["tokens_per_s"]
        name = f"prefill tokens/s, {row['prompt']} tokens"
        table.add_row(name, f"{speed:.1f}", f"{TELLME_PREFILL:g}", f"{speed / TELLME_PREFILL:.2f}")
        theirs = TELLME_TTFT.get(row["prompt"])
        table.add_row(
            f"TTFT({row['prompt']}), s", f"{row['ttft_s']:.3f}", "" if theirs is None else f"{theirs:g}",
            "" if theirs is None else f"{theirs / row['ttft_s']:.2f}",
        )
        table.add_row("  of the engine's MACs", f"{row['mac_utilisation']:.1%}", "", "")
    Console().print(table)
    if json_file is not None:
        figures = {"preset": preset, "decode": decode, "prefill": prefill}
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
