"""What the matmul engines cost: adds a MAC, cycles, and cells of FPGAs by yosys, at equal function and equal MAC/cycle.

    python -m benchmarks.engines [--lanes 32] [--part cores|ternary|all] [--json FILE]

Cores of group-quantised weights: blocks of `lanes` outputs by 32 inputs, ``8 * lanes`` 4-bit MAC a cycle each; what is around
them (control, dequantisation, accumulators) is the same and left out. Ternary: the lookup part of `tlmm` on preset `test`
(288 MAC a cycle), against selecting adders. Counts are yosys' own, before placement; no timing. Minutes.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from amaranth.lib.wiring import Component
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.ternary_select import TernarySelect
from cosim.synthesis import TECHNOLOGIES, Cells, synthesise
from rtl.group_core import GroupCore
from rtl.lut_tensor_core import LutTensorCore
from rtl.mixpe import MixPe
from rtl.multiplier import MultiplierCore
from rtl.tlmm_tables import LookupTables
from spec.config import K_GROUP, GroupEngine, GroupMatmulConfig
from spec.presets import TEST

BASELINE = "multiplier, LUTs only"

TABLES = 8
"""Tables of four activations that cover a group."""

TECHNOLOGY_NAMES = {"ecp5": "ECP5", "xcup": "UltraScale+"}


def core_config(engine: GroupEngine, lanes: int, *, full_table: bool = False) -> GroupMatmulConfig:
    """A core of `lanes` outputs."""
    return GroupMatmulConfig(
        engine=engine, lanes=lanes, dequant_lanes=lanes // 4, tokens=1, max_k=1536, ring_rows=16, full_table=full_table
    )


def cores(lanes: int) -> dict[str, tuple[type[GroupCore], GroupMatmulConfig, bool]]:
    """(class, configuration, may use DSP blocks) by name."""
    table, full = (core_config(GroupEngine.LUT_TENSOR_CORE, lanes, full_table=full) for full in (False, True))
    multiplier = core_config(GroupEngine.MULTIPLIER, lanes)
    return {
        BASELINE: (MultiplierCore, multiplier, False),
        "multiplier, DSPs": (MultiplierCore, multiplier, True),
        "mixpe": (MixPe, core_config(GroupEngine.MIXPE, lanes), True),
        "lut_tensor_core, 8 entries and a sign": (LutTensorCore, table, True),
        "lut_tensor_core, 16 entries": (LutTensorCore, full, True),
    }


def adds_per_mac(engine: GroupEngine, bits: int, lanes: int) -> float:
    """Additions a MAC, those that fill tables shared by the lanes. A multiplier's product is not counted as additions."""
    if engine is GroupEngine.LUT_TENSOR_CORE:
        fill = 12 * TABLES / (lanes * K_GROUP)  # 12 additions a table of four activations, once a pass
        return bits * TABLES / K_GROUP + fill
    rows = bits // 4
    return rows * (4.0 if engine is GroupEngine.MIXPE else 1.0)


def luts(cells: Cells, technology: str) -> int:
    """Logic in LUTs, with the carry cells of ECP5 (2 LUTs each) and LUTs used as memory (UltraScale+: 8 each, ECP5: 2)."""
    carry = 2 * cells.carry if technology == "ecp5" else 0
    return cells.lut + carry + cells.lutram * (2 if technology == "ecp5" else 8)


def core_table(lanes: int, console: Console) -> tuple[Table, list[dict]]:
    """Engines by precisions."""
    records = []
    for name, (kind, cfg, dsp) in track(cores(lanes).items(), description="cores", console=console):
        counts = {technology: synthesise(kind(cfg), technology, dsp=dsp) for technology in TECHNOLOGIES}
        for bits in cfg.weight_bits:
            records.append(
                {
                    "engine": name, "bits": bits, "cycles": max(bits, cfg.slices),
                    "adds_per_mac": adds_per_mac(cfg.engine, bits, lanes),
                    "cells": {technology: asdict(cells) for technology, cells in counts.items()},
                    "luts": {technology: luts(cells, technology) for technology, cells in counts.items()},
                }
            )  # fmt: skip
    base = {record["bits"]: record["luts"] for record in records if record["engine"] == BASELINE}
    table = Table(title=f"group cores, {lanes} outputs x 32 inputs a block, {8 * lanes} 4-bit MAC/cycle", box=MARKDOWN)
    for heading in ("engine", "weights", "adds a MAC", "cycles a block"):
        table.add_column(heading)
    for label in TECHNOLOGY_NAMES.values():
        for heading in ("LUT", "FF", "DSP", "LUT x cycles, baseline 1.00"):
            table.add_column(f"{label} {heading}")
    for record in records:
        row = [record["engine"], f"W{record['bits']}", f"{record['adds_per_mac']:.2f}", str(record["cycles"])]
        for technology in TECHNOLOGY_NAMES:
            cells = record["cells"][technology]
            against = base[max(4, record["bits"])][technology] * max(4, record["bits"])
            ratio = record["luts"][technology] * record["cycles"] / against
            row += [f"{record['luts'][technology]:,}", f"{cells['flipflop']:,}", str(cells["dsp"]), f"{ratio:.2f}"]
        table.add_row(*row)
    return table, records


def ternary_table(console: Console) -> tuple[Table, list[dict]]:
    """TeLLMe's three options for a ternary lookup."""
    tlmm = TEST.tlmm
    banks = TEST.ring_banks
    half = replace(tlmm, full_table=False)
    designs: dict[str, Callable[[], Component]] = {
        "select, negate or drop (M1)": lambda: TernarySelect(tlmm),
        "half table, 14 entries and a sign (M2)": lambda: LookupTables(half, banks=banks),
        "full table, 27 entries (M3)": lambda: LookupTables(tlmm, banks=banks),
    }
    records = []
    for technology in TECHNOLOGY_NAMES:
        for name, make in track(designs.items(), description=f"ternary, {technology}", console=console):
            cells = synthesise(make(), technology, dsp=False)
            records.append({"design": name, "technology": technology, "luts": luts(cells, technology), **asdict(cells)})
    table = Table(title=f"ternary lookups, {tlmm.macs_per_cycle} MAC/cycle", box=MARKDOWN)
    for heading in ("design", "FPGA", "LUT", "of them memory", "FF", "LUT, full table 1.00"):
        table.add_column(heading)
    full = {record["technology"]: record["luts"] for record in records if record["design"].endswith("(M3)")}
    for record in records:
        technology = record["technology"]
        memory = record["lutram"] * (2 if technology == "ecp5" else 8)
        numbers = [f"{record['luts']:,}", f"{memory:,}", f"{record['flipflop']:,}"]
        table.add_row(
            record["design"], TECHNOLOGY_NAMES[technology], *numbers, f"{record['luts'] / full[technology]:.2f}"
        )
    return table, records


def main(
    lanes: int = 32,
    part: Annotated[str, typer.Option(help="cores, ternary or all")] = "all",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures as one object")] = None,
) -> None:
    """Print the tables of docs/results.md."""
    if part not in ("cores", "ternary", "all"):
        raise typer.BadParameter(f"part must be cores, ternary or all, not {part!r}")
    console, figures = Console(stderr=True), {}
    if part != "ternary":
        table, figures["cores"] = core_table(lanes, console)
        Console(width=200).print(table)
    if part != "cores":
        table, figures["ternary"] = ternary_table(console)
        Console(width=200).print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
