"""What a run took: one object of numbers, as a table for people and as JSON for programs."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from host_driver.accounting import CLASSES, macs
from host_driver.compiler import CompiledModel
from host_driver.output_file import write_whole
from host_driver.session import Run, Step

_CLASS_COUNTERS = {
    "weights": ("weight_bytes",),
    "kv": ("kv_read_bytes", "kv_write_bytes"),
    "activations": ("activation_bytes",),
    "head": ("head_bytes",),
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """Numbers of one run; `None` where there is nothing to measure (a device without a clock, no decode step)."""

    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    device: str
    preset: str
    """Of a baseline: what it ran on, and in which number format."""
    model: str
    kv: str | None
    """Number format of the KV cache (`KvFormat`); None: a baseline."""
    verified: bool | None
    """None: not asked for."""
    clock_hz: int | None
    """None: a baseline; its times are wall times."""
    prefill_cycles: int | None
    decode_cycles: list[int]
    """One for each new token after the first, which prefill gives."""
    ttft_s: float | None
    """Time to the first token at the preset's clock."""
    decode_tokens_per_s: float | None
    """At the preset's clock."""
    dram_bytes: dict[str, float]
    """Mean of a decode step; of a prefill step when there was no decode step."""
    bandwidth_utilisation: float | None
    """DRAM traffic of these steps over what the preset's memory can move in their cycles."""
    mac_utilisation: float | None
    """Multiply-accumulates of these steps (`accounting.macs`) over the engine's peak."""
    wall_s: float
    decode_wall_tokens_per_s: float | None
    sim_cycles_per_s: float | None
    sim_macs_per_s: float | None


def _ratio(over: float, under: float) -> float | None:
    return over / under if over and under else None


def _heads(steps: list[Step]) -> int:
    return sum(step.head for step in steps)


def _step_macs(compiled: CompiledModel, steps: list[Step]) -> int:
    return macs(compiled, tokens=sum(len(step.tokens) for step in steps), heads=_heads(steps))


def summarise(
    run: Run, compiled: CompiledModel, *, text: str, device: str, verified: bool | None, wall_s: float
) -> Report:
    """The numbers of a finished run."""
    build = compiled.accelerator
    clocked = any(step.cycles for step in run.steps)
    steps = run.decode or run.prefill
    cycles = sum(step.cycles for step in steps)
    prefill_cycles = sum(step.cycles for step in run.prefill)
    totals = {
        name: sum(step.result.counters[counter] for step in steps for counter in counters)
        for name, counters in _CLASS_COUNTERS.items()
    }
    decode_wall = sum(step.result.wall_s for step in run.decode)
    all_wall = sum(step.result.wall_s for step in run.steps)
    return Report(
        prompt_tokens=list(run.prompt),
        tokens=list(run.tokens),
        text=text,
        device=device,
        preset=build.name,
        model=compiled.model.name,
        kv=compiled.kv.value,
        verified=verified,
        clock_hz=build.clock_hz,
        prefill_cycles=prefill_cycles if clocked else None,
        decode_cycles=[step.cycles for step in run.decode] if clocked else [],
        ttft_s=prefill_cycles / build.clock_hz if clocked else None,
        decode_tokens_per_s=_ratio(
            len(run.decode) * build.clock_hz, sum(step.cycles for step in run.decode)
        ),
        dram_bytes={name: totals[name] / len(steps) for name in CLASSES},
        bandwidth_utilisation=_ratio(sum(totals.values()), cycles * build.dram.bytes_per_cycle),
        mac_utilisation=_ratio(_step_macs(compiled, steps), cycles * build.matmul.macs_per_cycle),
        wall_s=wall_s,
        decode_wall_tokens_per_s=_ratio(len(run.decode), decode_wall),
        sim_cycles_per_s=_ratio(sum(step.cycles for step in run.steps), all_wall),
        sim_macs_per_s=_ratio(_step_macs(compiled, run.steps), all_wall),
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def format_number(value: float | None, unit: str = "") -> str:
    """Four significant digits and a decimal prefix."""
    if value is None:
        return "-"
    for limit, divisor, prefix in ((1e3, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M"), (float("inf"), 1e9, "G")):
        if abs(value) < limit:
            return f"{value / divisor:.4g} {prefix}{unit}".rstrip()
    raise AssertionError(f"no prefix for {value}")


def table(report: Report) -> Table:
    """The report for people."""
    rows = Table(title=f"{report.model} on {report.device} ({report.preset})", show_header=False, title_justify="left")
    rows.add_column("quantity")
    rows.add_column("value", justify="right")
    decode = report.decode_cycles
    total = sum(report.dram_bytes.values())
    clock = "" if report.clock_hz is None else f" at {format_number(report.clock_hz, 'Hz')}"
    milliseconds = None if report.ttft_s is None else f"{1e3 * report.ttft_s:.4g} ms"
    for name, value in (
        ("prompt tokens", str(len(report.prompt_tokens))),
        ("new tokens", str(len(report.tokens))),
        (f"time to first token{clock}", milliseconds or "-"),
        (f"decode{clock}", format_number(report.decode_tokens_per_s, "token/s")),
        ("prefill cycles", format_number(report.prefill_cycles)),
        ("decode cycles a token", format_number(sum(decode) / len(decode) if decode else None)),
        ("DRAM bytes a token" if len(report.tokens) > 1 else "DRAM bytes a prefill step", format_number(total, "B")),
        *((f"  {name}", format_number(count, "B")) for name, count in report.dram_bytes.items()),
        ("DRAM bandwidth used", _percent(report.bandwidth_utilisation)),
        ("MACs used", _percent(report.mac_utilisation)),
        ("wall time", f"{report.wall_s:.2f} s"),
        ("decode in wall time", format_number(report.decode_wall_tokens_per_s, "token/s")),
        ("simulated cycles", format_number(report.sim_cycles_per_s, "cycle/s")),
        ("simulated MACs", format_number(report.sim_macs_per_s, "MAC/s")),
    ):
        rows.add_row(name, value)
    return rows


def write_json(report: Report, file: Path) -> None:
    """Writes the report whole or not at all."""
    write_whole(json.dumps(asdict(report), indent=2) + "\n", file)
