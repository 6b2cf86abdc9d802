"""What the matmul engines cost: adds a MAC, cycles, FPGA cells and CMOS transistors by yosys, at equal function and MAC/cycle.

    python -m benchmarks.engines [--part cores|ablation|ternary|all] [--json FILE]

Cores: blocks of `lanes` outputs by 32 inputs, ``8 * lanes`` 4-bit MAC a cycle, alone and with the dequantisation of
``lanes / 4`` group sums a cycle that each still needs; feed, control and accumulators are the same for all and left out.
Outputs are copies of each other beside what they share, so that two small blocks are counted and the line through them is
followed to `lanes`. Ablation: LUT Tensor Core's, on tiles of the paper's shape, in the same way. Ternary: the lookup part of
`tlmm` on preset `test`, against selecting adders. Counts are yosys' own, before placement; no timing. Sums and products of
LUTs are carry chains (cosim/synthesis.py), for all engines alike. All parts: about half an hour of one processor.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from amaranth.lib.wiring import Component
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.lut_ablation import TABLE_K, LutTile, Precompute, Step
from benchmarks.packed_multiplier import PackedMultiplier
from benchmarks.term_scale import TermScale
from benchmarks.ternary_select import TernarySelect
from cosim.synthesis import TECHNOLOGIES, Cells, synthesise, synthesise_gates
from rtl.dequant_multiplier import DequantMultiplier
from rtl.group_core import NibbleCore
from rtl.group_dequant import GroupDequant
from rtl.lut_tensor_core import LutTensorCore
from rtl.mixpe import MixPe
from rtl.multiplier import MultiplierCore
from rtl.tlmm_tables import LookupTables
from spec.config import ALIGN_BITS, K_GROUP, GroupEngine, GroupMatmulConfig
from spec.presets import TEST

TABLES = K_GROUP // TABLE_K
"""Tables of four activations that cover a group."""

TECHNOLOGY_NAMES = {"ecp5": "ECP5", "xcup": "UltraScale+", "cmos": "CMOS"}

PAPER_ABLATION = dict(zip(Step, (1.0, 1.317, 1.351, 1.440), strict=True))
"""Density of LUT Tensor Core's table 2: 28 nm, W2A8, 512 one-bit MAC a cycle."""

PAPER_TERNARY = {"M1": 43_176, "M2": 35_200, "M3": 23_082}
"""LUTs of TeLLMe's options (KV260, 1,344 MAC a cycle)."""

Make = Callable[[], Component]
Sized = Callable[[int], Component]
"""Of so many outputs."""
Step_ = Callable[[str], None]
"""Tells the progress bar what is being synthesised."""


# 1. counting


def luts(cells: Cells, technology: str) -> int:
    """Logic in LUTs, with the carry cells of ECP5 (2 LUTs each) and LUTs used as memory (UltraScale+: 8 each, ECP5: 2)."""
    carry = 2 * cells.carry if technology == "ecp5" else 0
    return cells.lut + carry + cells.lutram * (2 if technology == "ecp5" else 8)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one technology. `area`: LUTs, or transistors with those of the flip-flops."""

    area: float
    flipflop: float = 0
    dsp: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(area=self.area + other.area, flipflop=self.flipflop + other.flipflop, dsp=self.dsp + other.dsp)

    def part(self, share: float) -> "Cost":
        """Of something without DSPs that `1 / share` others use too."""
        return Cost(area=self.area * share, flipflop=self.flipflop * share)

    def line(self, larger: "Cost", steps: float) -> "Cost":
        """`steps` times as far from this as `larger` is."""
        mine, other = asdict(self), asdict(larger)
        found = {name: round(mine[name] + steps * (other[name] - mine[name])) for name in mine}
        return Cost(area=found["area"], flipflop=found["flipflop"], dsp=found["dsp"])


def cost(make: Make, technology: str, *, dsp: bool = False) -> Cost:
    """Of a component, synthesised anew."""
    if technology == "cmos":
        gates = synthesise_gates(make())
        return Cost(area=gates.transistors, flipflop=gates.flipflop)
    cells = synthesise(make(), technology, dsp=dsp, chains=True)
    return Cost(area=luts(cells, technology), flipflop=cells.flipflop, dsp=cells.dsp)


def sized_cost(make: Sized, sizes: tuple[int, int], size: int, technology: str, *, dsp: bool = False) -> Cost:
    """Of `size` outputs, on the line through two `sizes`."""
    small, large = (cost(lambda counted=counted: make(counted), technology, dsp=dsp) for counted in sizes)
    return small.line(large, (size - sizes[0]) / (sizes[1] - sizes[0]))


def with_progress(console: Console, total: int, work: Callable[[Step_], list[dict]]) -> list[dict]:
    """Runs `work`, which announces each of its `total` syntheses."""
    with Progress(console=console) as progress:
        task = progress.add_task("yosys", total=total)

        def step(name: str) -> None:
            progress.update(task, description=name, advance=1)

        return work(step)


def markdown(title: str, headings: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """A table as docs/results/engines.md has it."""
    table = Table(title=title, box=MARKDOWN)
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*row)
    return table


# 2. group cores


@dataclass(frozen=True)
class Part(GroupMatmulConfig):
    """Of a few outputs, which no build has: its cores are, but not what surrounds them."""

    def __post_init__(self) -> None:
        """No check."""


def core_config(engine: GroupEngine, lanes: int, *, full_table: bool = False) -> GroupMatmulConfig:
    """A core of `lanes` outputs."""
    return Part(
        engine=engine, lanes=lanes, dequant_lanes=lanes // 4, tokens=1, max_k=1536, ring_rows=16, full_table=full_table
    )


@dataclass(frozen=True, kw_only=True)
class Design:
    """A core and what must follow it."""

    engine: GroupEngine
    make: Sized
    rest: str
    """What dequantises the sums: a key of `RESTS`."""
    adds: float
    """Additions a MAC of four weight bits; those of products not counted."""
    fill: int = 0
    """Additions that build a table."""
    products: int = 0
    """Multiplications a MAC of four weight bits."""
    dsp: bool = False
    sizes: tuple[int, int] = (4, 8)
    """Outputs of the blocks that are counted."""

    def adds_per_mac(self, bits: int, lanes: int) -> float:
        """Lookups go by the bit, all else by the nibble; tables are built once a pass."""
        return self.adds * bits / 4 + self.fill * TABLES / (lanes * K_GROUP)


BASELINE = "dequant_multiplier, 16-bit weights, LUTs"

GROUP = "after the group"

RESTS: dict[str, Sized] = {
    GROUP: lambda lanes: GroupDequant(core_config(GroupEngine.MULTIPLIER, lanes), 1, narrow=True),
    "in the loop, 16 bits": lambda lanes: TermScale(lanes=lanes // 4, bits=32),
    "in the loop, 24 bits": lambda lanes: TermScale(lanes=lanes // 4, bits=32 + ALIGN_BITS),
}
"""What is left of dequantisation behind a core, for ``lanes / 4`` sums a cycle."""


def _in_loop(align_bits: int, *, dsp: bool) -> Design:
    def make(lanes: int) -> Component:
        return DequantMultiplier(core_config(GroupEngine.MULTIPLIER, lanes), align_bits=align_bits)

    rest = f"in the loop, {16 + align_bits} bits"
    return Design(engine=GroupEngine.MULTIPLIER, make=make, rest=rest, adds=2, products=2, dsp=dsp)


def _multiplier(core: type[NibbleCore], *, dsp: bool, sizes: tuple[int, int] = (4, 8)) -> Design:
    def make(lanes: int) -> Component:
        return core(core_config(GroupEngine.MULTIPLIER, lanes))

    return Design(engine=GroupEngine.MULTIPLIER, make=make, rest=GROUP, adds=1, products=1, dsp=dsp, sizes=sizes)


def _lookups(*, full_table: bool) -> Design:
    engine = GroupEngine.LUT_TENSOR_CORE

    def make(lanes: int) -> Component:
        return LutTensorCore(core_config(engine, lanes, full_table=full_table))

    return Design(engine=engine, make=make, rest=GROUP, adds=4 / TABLE_K, fill=11 if full_table else 12)


DESIGNS = {
    BASELINE: _in_loop(0, dsp=False),
    "multiplier, LUTs": _multiplier(MultiplierCore, dsp=False),
    "mixpe": Design(
        engine=GroupEngine.MIXPE, make=lambda lanes: MixPe(core_config(GroupEngine.MIXPE, lanes)), rest=GROUP, adds=4
    ),
    "lut_tensor_core, 8 entries and a sign": _lookups(full_table=False),
    "lut_tensor_core, 16 entries": _lookups(full_table=True),
    "dequant_multiplier, 24-bit weights, LUTs": _in_loop(ALIGN_BITS, dsp=False),
    "dequant_multiplier, 16-bit weights, DSPs": _in_loop(0, dsp=True),
    "multiplier, DSPs": _multiplier(MultiplierCore, dsp=True),
    "multiplier, two products a DSP": _multiplier(PackedMultiplier, dsp=True, sizes=(8, 16)),
}
"""By name; the baseline first."""


def technologies(design: Design) -> list[str]:
    """Transistors are counted of what has no DSPs."""
    return [*TECHNOLOGIES] if design.dsp else [*TECHNOLOGIES, "cmos"]


def core_records(lanes: int, step: Step_) -> list[dict]:
    """A record a design and technology: costs of the core, of the rest, and of both."""
    left: dict[tuple[str, str, bool], Cost] = {}
    records = []
    for name, design in DESIGNS.items():
        for technology in technologies(design):
            step(f"{name}, {technology}")
            core = sized_cost(design.make, design.sizes, lanes, technology, dsp=design.dsp)
            key = (design.rest, technology, design.dsp)
            if key not in left:
                step(f"dequantisation, {design.rest}, {technology}")
                left[key] = sized_cost(RESTS[design.rest], (4, 8), lanes, technology, dsp=design.dsp)
            records.append(
                {
                    "design": name, "technology": technology, "core": asdict(core), "dequantisation": asdict(left[key]),
                    "both": asdict(core + left[key]), "lanes": lanes, "counted_lanes": design.sizes,
                }
            )  # fmt: skip
    return records


def core_steps() -> int:
    """Steps of `core_records`."""
    pairs = [(design, technology) for design in DESIGNS.values() for technology in technologies(design)]
    return len(pairs) + len({(design.rest, technology, design.dsp) for design, technology in pairs})


def cycles(design: Design, bits: int, lanes: int) -> tuple[int, int]:
    """Of a block of `bits`-bit weights: the core alone, and with the slices that are dequantised."""
    cfg = core_config(design.engine, lanes)
    return bits, max(bits, cfg.slices)


def precision_records(lanes: int, records: list[dict]) -> list[dict]:
    """Engines by precisions: work a MAC, and area times cycles against the baseline, which takes narrow weights as 4 bits."""
    area = {(r["design"], r["technology"]): r for r in records}
    found = []
    for name, design in DESIGNS.items():
        for bits in core_config(design.engine, lanes).weight_bits:
            alone, together = cycles(design, bits, lanes)
            ratios = {}
            for technology in technologies(design):
                one, base = area[name, technology], area[BASELINE, technology]
                ratios[technology] = {
                    "core": one["core"]["area"] * alone / (base["core"]["area"] * max(4, bits)),
                    "both": one["both"]["area"] * together / (base["both"]["area"] * max(4, bits)),
                }
            found.append(
                {
                    "design": name, "bits": bits, "adds_per_mac": design.adds_per_mac(bits, lanes),
                    "products_per_mac": design.products * bits / 4,
                    "cycles": alone, "cycles_dequantised": together, "ratio": ratios,
                }
            )  # fmt: skip
    return found


def core_tables(lanes: int, records: list[dict], by_precision: list[dict]) -> list[Table]:
    """Cells by technology; engines by precisions."""
    tables = []
    for technology, label in TECHNOLOGY_NAMES.items():
        unit = "transistors" if technology == "cmos" else "LUT"
        here = [r for r in records if r["technology"] == technology]
        base = next(r for r in here if r["design"] == BASELINE)
        headings = ["engine"]
        for part in ("core", "with dequantisation"):
            headings += [f"{part}: {unit}", "FF", *(["DSP"] if technology != "cmos" else []), f"{unit}, baseline 1.00"]
        rows = []
        for record in here:
            row = [record["design"]]
            for part in ("core", "both"):
                numbers = record[part]
                row += [f"{numbers['area']:,}", f"{numbers['flipflop']:,}"]
                row += [str(numbers["dsp"])] if technology != "cmos" else []
                row.append(f"{numbers['area'] / base[part]['area']:.2f}")
            rows.append(row)
        tables.append(markdown(f"group cores, {label}, {8 * lanes} 4-bit MAC/cycle", headings, rows))
    headings = ["engine", "weights", "adds a MAC", "products a MAC", "cycles: core, dequantised"]
    headings += [f"{label} area x cycles: core, dequantised" for label in TECHNOLOGY_NAMES.values()]
    rows = []
    for record in by_precision:
        row = [record["design"], f"W{record['bits']}", f"{record['adds_per_mac']:.2f}", f"{record['products_per_mac']:g}"]
        row.append(f"{record['cycles']}, {record['cycles_dequantised']}")
        for technology in TECHNOLOGY_NAMES:
            ratio = record["ratio"].get(technology)
            row.append(f"{ratio['core']:.2f}, {ratio['both']:.2f}" if ratio else "")
        rows.append(row)
    tables.append(markdown("engines by precisions, baseline 1.00", headings, rows))
    return tables


# 3. LUT Tensor Core's ablation


CORRECTED = "the same, zero point corrected in the lanes"

ABLATION = {**{str(step): (step, False) for step in Step}, CORRECTED: (Step.SHARED, True)}
"""The steps, and the last one with the correction by A that the paper leaves out."""

TILE_SIZES = (8, 16)
"""Columns of the tiles that are counted."""


def ablation_records(
    step: Step_, *, rows: int, columns: int, bits: int, share: int, counted: Iterable[str] = tuple(TECHNOLOGY_NAMES)
) -> list[dict]:
    """A record a step and technology; a shared precomputation counts with ``1 / share``."""
    records = []
    for technology in counted:
        base = 0.0
        for name, (kind, corrected) in ABLATION.items():
            step(f"{name}, {technology}")

            def make(size: int, kind: Step = kind, corrected: bool = corrected) -> Component:
                return LutTile(kind, rows=rows, columns=size, bits=bits, corrected=corrected)

            total = sized_cost(make, TILE_SIZES, columns, technology)
            builder = cost(lambda kind=kind: Precompute(kind, rows), technology)
            if kind is Step.SHARED:
                total += builder.part(1 / share)
            base = base or total.area
            records.append(
                {
                    "design": name, "technology": technology, **asdict(total), "precompute": builder.area, "share": share,
                    "density": base / total.area, "paper": None if corrected else PAPER_ABLATION[kind],
                }
            )  # fmt: skip
    return records


def ablation_table(records: list[dict], *, rows: int, columns: int, bits: int) -> Table:
    """Densities beside the paper's."""
    headings = ["tile", "paper"]
    for label, unit in zip(TECHNOLOGY_NAMES.values(), ("LUT", "LUT", "transistors"), strict=True):
        headings += [f"{label} {unit}", "FF", "density"]
    lines: dict[str, list[str]] = {}
    for record in records:
        paper = "" if record["paper"] is None else f"{record['paper']:.3f}"
        line = lines.setdefault(record["design"], [record["design"], paper])
        line += [f"{record['area']:,.0f}", f"{record['flipflop']:,.0f}", f"{record['density']:.3f}"]
    title = f"LUT Tensor Core's ablation, M{rows}N{columns}K{TABLE_K}, W{bits}A8, tables shared by {records[0]['share']} tiles"
    return markdown(title, headings, lines.values())


# 4. TeLLMe's options


def ternary_records(step: Step_) -> list[dict]:
    """A record an option and FPGA."""
    tlmm, banks = TEST.tlmm, TEST.ring_banks
    half = replace(tlmm, full_table=False)
    options: dict[str, tuple[str, Make]] = {
        "select, negate or drop (M1)": ("M1", lambda: TernarySelect(tlmm)),
        "half table, 14 entries and a sign (M2)": ("M2", lambda: LookupTables(half, banks=banks)),
        "full table, 27 entries (M3)": ("M3", lambda: LookupTables(tlmm, banks=banks)),
    }
    records = []
    for technology in TECHNOLOGIES:
        for name, (option, make) in options.items():
            step(f"{name}, {technology}")
            cells = synthesise(make(), technology, dsp=False, chains=True)
            records.append(
                {
                    "design": name, "technology": technology, "luts": luts(cells, technology), **asdict(cells),
                    "paper": PAPER_TERNARY[option] / PAPER_TERNARY["M3"],
                }
            )  # fmt: skip
    return records


def ternary_table(records: list[dict]) -> Table:
    """Ratios beside the paper's."""
    full = {record["technology"]: record["luts"] for record in records if record["design"].endswith("(M3)")}
    rows = []
    for record in records:
        technology = record["technology"]
        memory = record["lutram"] * (2 if technology == "ecp5" else 8)
        numbers = [f"{record['luts']:,}", f"{memory:,}", f"{record['flipflop']:,}"]
        ratios = [f"{record['luts'] / full[technology]:.2f}", f"{record['paper']:.2f}"]
        rows.append([record["design"], TECHNOLOGY_NAMES[technology], *numbers, *ratios])
    headings = ("design", "FPGA", "LUT", "of them memory", "FF", "LUT, full table 1.00", "TeLLMe")
    return markdown(f"ternary lookups, {TEST.tlmm.macs_per_cycle} MAC/cycle", headings, rows)


def main(
    lanes: Annotated[int, typer.Option(help="outputs of a group core's block; preset wide has 128")] = 128,
    columns: Annotated[int, typer.Option(help="columns of an ablation tile; the paper has 64")] = 64,
    share: Annotated[int, typer.Option(help="tiles that a shared precomputation serves")] = 16,
    part: Annotated[str, typer.Option(help="cores, ablation, ternary or all")] = "all",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures as one object")] = None,
) -> None:
    """Print the tables of docs/results/engines.md."""
    if part not in ("cores", "ablation", "ternary", "all"):
        raise typer.BadParameter(f"part must be cores, ablation, ternary or all, not {part!r}")
    console, out, figures = Console(stderr=True), Console(width=240), {}
    if part in ("cores", "all"):
        figures["cores"] = with_progress(console, core_steps(), lambda step: core_records(lanes, step))
        figures["precisions"] = precision_records(lanes, figures["cores"])
        for table in core_tables(lanes, figures["cores"], figures["precisions"]):
            out.print(table)
    if part in ("ablation", "all"):
        shape = {"rows": 2, "columns": columns, "bits": 2}
        total = len(TECHNOLOGY_NAMES) * len(ABLATION)
        figures["ablation"] = with_progress(console, total, lambda step: ablation_records(step, **shape, share=share))
        out.print(ablation_table(figures["ablation"], **shape))
    if part in ("ternary", "all"):
        figures["ternary"] = with_progress(console, 3 * len(TECHNOLOGIES), ternary_records)
        out.print(ternary_table(figures["ternary"]))
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
