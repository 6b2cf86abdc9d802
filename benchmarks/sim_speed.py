"""How fast the accelerator simulates: a model on simulated RTL, a prefill tile, then decode.

    python -m benchmarks.sim_speed [--preset sim] [--tokens 32] [--json FILE]
    python -m benchmarks.sim_speed --preset wide --model smollm2 --tokens 8
    python -m benchmarks.sim_speed --verilator   # the same design by Verilator, to compare (docs/simulation.md)

Wall time is this process's own, on whatever machine it runs; cycles and MACs are exact. A first decode step warms up
and is not counted. The greedy loop runs on the device, one doorbell for all tokens, so no host work is measured.
"""

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cosim.rtl_device import RtlTransport
from host_driver.accounting import cycles_floor, decode_cost, macs
from host_driver.device import Device
from host_driver.image import compile_checkpoint, memory_image
from host_driver.model_source import open_model
from host_driver.transport import open_device
from spec.presets import PRESETS

BUNDLED = Path(__file__).resolve().parent.parent / "models" / "austen"

MOST_SLOTS = 512
"""Of the KV cache: more than the run needs, and no more than a small memory."""


def awake(device: Device) -> dict[str, int]:
    """Cycles in which the clock of each unit that may sleep ticked."""
    assert isinstance(device.transport, RtlTransport)
    return device.transport.simulator.awake()


def main(
    preset: str = "sim",
    model: str = str(BUNDLED),
    tokens: int = 32,
    verilator: Annotated[bool, typer.Option("--verilator", help="simulate by Verilator instead of cosim/vector")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures as one object")] = None,
) -> None:
    """Print cycles/s, simulated MAC/s and tokens/s."""
    config = PRESETS[preset]
    checkpoint = open_model(model).load()
    compiled = compile_checkpoint(checkpoint, config, slots=MOST_SLOTS)
    started = time.perf_counter()
    device = Device(open_device("rtl", preset, compiled.memory.limit, verilator=verilator), config)
    opened_s = time.perf_counter() - started
    device.load(compiled, memory_image(compiled, checkpoint))
    tile = compiled.tile
    prefill = device.run_step(list(range(1, tile + 1)), 0, head=True)
    prefill_macs = macs(compiled, tokens=tile, heads=1)
    first = device.run_step([prefill.tokens[0]], tile, head=True)
    before = awake(device)
    started, cpu = time.perf_counter(), time.process_time()
    result = device.run_step([first.tokens[0]], tile + 1, head=True, repeat=tokens)
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    count, cycles = len(result.tokens), result.counters["cycles"]
    ticked = {unit: (after - before[unit]) / cycles for unit, after in awake(device).items()}
    decode_macs = count * decode_cost(compiled, 1).macs
    floor = sum(cycles_floor(compiled, decode_cost(compiled, tile + 1 + i)) for i in range(count))
    figures = {
        "preset": preset,
        "model": compiled.model.name,
        "simulator": "Verilator" if verilator else "cosim/vector",
        "tokens": count,
        "cycles_per_token": cycles / count,
        "floor_cycles_per_token": floor / count,
        "wall_tokens_per_s": count / wall_s,
        "cycles_per_s": cycles / wall_s,
        "macs_per_s": decode_macs / wall_s,
        "prefill_tokens": tile,
        "prefill_cycles": prefill.counters["cycles"],
        "prefill_macs_per_s": prefill_macs / prefill.wall_s,
        "cpu_s_per_wall_s": cpu_s / wall_s,
        "open_s": opened_s,
        "awake": ticked,
    }
    title = f"{compiled.model.name} on simulated RTL ({preset}, {config.matmul.macs_per_cycle} MAC/cycle, {figures['simulator']})"
    table = Table(title=title, show_header=False)
    for name, value in (
        ("decode tokens/s, wall", f"{count / wall_s:.1f}"),
        ("cycles/s", f"{cycles / wall_s:,.0f}"),
        ("simulated MAC/s, decode", f"{decode_macs / wall_s:,.0f}"),
        ("cycles a token", f"{cycles / count:,.0f}"),
        ("  of which the DRAM or MAC floor", f"{floor / count:,.0f}"),
        (f"cycles a prefill tile of {tile}", f"{prefill.counters['cycles']:,}"),
        ("simulated MAC/s, prefill", f"{prefill_macs / prefill.wall_s:,.0f}"),
        ("CPU time over wall time, decode", f"{cpu_s / wall_s:.2f}"),
        ("opening the device (building it, if new)", f"{opened_s:.1f} s"),
        *((f"clock of {unit}, share of the decode cycles", f"{share:.0%}") for unit, share in ticked.items()),
    ):
        table.add_row(name, value)
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
