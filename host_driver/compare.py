"""`lutra compare`: one model and one prompt on the accelerator, on the GPU and on the CPU, each beside its own roofline."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from host_driver import commands
from host_driver.accounting import cycles_floor, decode_cost
from host_driver.commands import CacheOptions
from host_driver.compiler import CompiledModel
from host_driver.errors import InvalidRequest, LutraError
from host_driver.model_source import ModelSource
from host_driver.output_file import check_writable, write_whole
from host_driver.plain_device import baseline_names, check_baseline, roofline_share
from host_driver.progress import task
from host_driver.report import format_number
from host_driver.sampling import Sampler, SamplingConfig
from host_driver.session import Run, Stepper, generate
from host_driver.transport import require_device

BASELINES = ("gpu", "gpu-packed", "cpu")
"""In the order of the table."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one device did; `None` where it has nothing to say."""

    device: str
    runs_on: str
    """Preset and clock, or hardware and number format."""
    missing: str | None = None
    """Why there is nothing, if there is nothing."""
    ttft_s: float | None = None
    """The accelerator's times are cycles at the preset's clock, the others' wall time."""
    decode_tokens_per_s: float | None = None
    roofline_share: float | None = None
    """Of the decode steps: the shortest time that bandwidth and arithmetic allow over the time they took."""
    tokens: list[int] | None = None


def _run(device: Stepper, prompt: list[int], max_new_tokens: int, stop_ids: tuple[int, ...]) -> Run:
    """A greedy generation."""
    sampler = Sampler(SamplingConfig())
    steps = generate(device, prompt, sampler, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
    return [run for _, run in steps][-1]


def decode_share(compiled: CompiledModel, run: Run) -> float | None:
    """Fewest cycles of the decode steps, by DRAM bandwidth and engine, over the cycles they took."""
    cycles = sum(step.cycles for step in run.decode)
    floor = sum(cycles_floor(compiled, decode_cost(compiled, step.position)) for step in run.decode)
    return floor / cycles if cycles else None


def accelerator_row(
    console: Console, name: str, *, source: ModelSource, preset: str, prompt: str, cache: CacheOptions,
    max_new_tokens: int, timeout_s: float,
) -> Row:  # fmt: skip
    """The accelerator's row: cycles come from a device with a clock."""
    loaded = commands._load(console, source, preset, prompt, cache)
    device = loaded.open(console, name, timeout_s=timeout_s)
    with task(console, f"running on {name}"):
        run = _run(device, loaded.prompt, max_new_tokens, loaded.compiled.model.eos_ids)
    clock = loaded.compiled.accelerator.clock_hz
    prefill, decode = (sum(step.cycles for step in steps) for steps in (run.prefill, run.decode))
    runs_on = f"preset {preset} at {clock / 1e6:g} MHz, KV cache {cache.kv}" + ("" if prefill else "; this device has no clock")
    return Row(
        device=name, runs_on=runs_on, ttft_s=prefill / clock if prefill else None,
        decode_tokens_per_s=len(run.decode) * clock / decode if decode else None,
        roofline_share=decode_share(loaded.compiled, run), tokens=run.tokens,
    )  # fmt: skip


def baseline_row(
    console: Console, name: str, *, source: ModelSource, prompt: str, slots: int, max_new_tokens: int
) -> Row:
    """A baseline's row; that its hardware or a package is missing is a row too."""
    try:
        check_baseline(name)
        loaded = commands.load_plain(console, name, source, prompt, slots, max_new_tokens)
        with task(console, f"running on {name}"):
            run = _run(loaded.device, loaded.prompt, max_new_tokens, loaded.compiled.model.eos_ids)
            share = roofline_share(loaded.device, run.decode)
    except InvalidRequest:
        raise
    except LutraError as error:
        return Row(device=name, runs_on="not available", missing=str(error))
    seconds = sum(step.result.wall_s for step in run.decode)
    return Row(
        device=name, runs_on=loaded.device.baseline.description,
        ttft_s=sum(step.result.wall_s for step in run.prefill),
        decode_tokens_per_s=len(run.decode) / seconds if seconds else None, roofline_share=share, tokens=run.tokens,
    )  # fmt: skip


def compare_table(rows: list[Row], *, model: str, prompt_tokens: int) -> Table:
    """The rows for people."""
    table = Table(title=f"{model}, {prompt_tokens} prompt tokens, greedy", title_justify="left")
    for name in ("device", "runs on", "first token", "decode", "of its roofline"):
        table.add_column(name, justify="left" if name in ("device", "runs on") else "right", overflow="fold")
    for row in rows:
        table.add_row(
            row.device,
            row.runs_on,
            "-" if row.ttft_s is None else f"{1e3 * row.ttft_s:.4g} ms",
            format_number(row.decode_tokens_per_s, "token/s"),
            "-" if row.roofline_share is None else f"{100 * row.roofline_share:.1f} %",
        )
    return table


def compare_devices(
    *, prompt: str, source: ModelSource, device_name: str, preset: str, max_new_tokens: int, cache: CacheOptions,
    timeout_s: float, json_file: Path | None,
) -> int:  # fmt: skip
    """Prints the table on stdout. Returns the exit code."""
    console = Console(stderr=True)
    if max_new_tokens < 2:
        raise InvalidRequest(f"a comparison of decode speed needs at least 2 new tokens, not {max_new_tokens}")
    if json_file is not None:
        check_writable(json_file)
    require_device(device_name)
    rows = [
        accelerator_row(
            console, device_name, source=source, preset=preset, prompt=prompt, cache=cache,
            max_new_tokens=max_new_tokens, timeout_s=timeout_s,
        )
    ]
    installed = baseline_names()
    rows += [
        baseline_row(console, name, source=source, prompt=prompt, slots=cache.wanted_slots, max_new_tokens=max_new_tokens)
        for name in BASELINES
        if name in installed
    ]
    prompt_tokens = len(source.tokenizer().encode(prompt))
    Console().print(compare_table(rows, model=source.config.name, prompt_tokens=prompt_tokens))
    for row in rows:
        if row.missing is not None:
            Console(soft_wrap=True).print(f"{row.device}: {row.missing}", highlight=False, markup=False)
    Console(soft_wrap=True).print(
        "The accelerator's times are cycles at its preset's clock, the others' wall time; a roofline is the shorter of memory "
        "bandwidth and arithmetic: the preset's own, and as measured on the GPU and CPU.",
        highlight=False,
    )
    if json_file is not None:
        write_whole(json.dumps([asdict(row) for row in rows], indent=2) + "\n", json_file)
    return 0
