"""Cells of a component after synthesis by yosys: counts, not a bitstream and no timing.

FPGAs: ``synth_ecp5`` (Lattice ECP5) and ``synth_xilinx -family xcup`` (AMD UltraScale+), as the `pyosys` wheel has them. DSP
blocks are used where yosys finds products for them; ``dsp=False`` has it make them of LUTs, so that arithmetic compares.
Standard cells: static CMOS gates by abc, weighed by the transistors that yosys takes for each (``stat -tech cmos``), with
Booth multipliers and carry-save adder trees; no library, no wires, no timing: good for ratios alone.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from amaranth.back import rtlil  # pyright: ignore[reportAttributeAccessIssue] # not in the stubs
from amaranth.lib import wiring

from host_driver.errors import BuildError
from rtl.bus.axi import flat_ports

__all__ = ["TECHNOLOGIES", "Cells", "Gates", "synthesise", "synthesise_gates"]

NAME = "component"

_YOSYS = """
import sys
from pyosys import libyosys
design = libyosys.Design()
for command in sys.argv[1:]:
    libyosys.run_pass("tee -q " + command, design)
"""


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Counts of one technology."""

    lut: int
    """LUTs of logic; ECP5: LUT4, those of carry cells not among them; UltraScale+: LUT1 to LUT6"""
    carry: int
    """ECP5: CCU2C (2 bits, 2 LUT4 each); UltraScale+: CARRY8 (CARRY4 counted as a half, rounded up)"""
    mux: int
    """Hard multiplexers behind LUTs: PFUMX and L6MUX21; MUXF7, MUXF8 and MUXF9"""
    flipflop: int
    dsp: int
    lutram: int
    """ECP5: DPR16X4; UltraScale+: RAM32M and its kin"""
    blockram: int


FLIPFLOP_TRANSISTORS = 16
"""Of a D flip-flop, as yosys counts; its enable is taken as a gated clock, which many share, and costs nothing."""


@dataclass(frozen=True, kw_only=True)
class Gates:
    """Static CMOS."""

    logic: int
    """Transistors of the gates."""
    flipflop: int
    """Flip-flops."""

    @property
    def transistors(self) -> int:
        """Of gates and flip-flops."""
        return self.logic + FLIPFLOP_TRANSISTORS * self.flipflop


@dataclass(frozen=True)
class _Technology:
    commands: Callable[[bool], str]
    """Of yosys, by whether DSP blocks may be used."""
    count: Callable[[dict[str, int]], Cells]


def _sum(cells: dict[str, int], *prefixes: str) -> int:
    return sum(count for name, count in cells.items() if name.startswith(prefixes))


def _ecp5(cells: dict[str, int]) -> Cells:
    return Cells(
        lut=_sum(cells, "LUT4"),
        carry=_sum(cells, "CCU2C"),
        mux=_sum(cells, "PFUMX", "L6MUX21"),
        flipflop=_sum(cells, "TRELLIS_FF"),
        dsp=_sum(cells, "MULT18X18D", "ALU54B"),
        lutram=_sum(cells, "TRELLIS_DPR16X4"),
        blockram=_sum(cells, "DP16KD", "PDPW16KD"),
    )


def _xcup(cells: dict[str, int]) -> Cells:
    return Cells(
        lut=_sum(cells, "LUT"),
        carry=_sum(cells, "CARRY8") + -(-_sum(cells, "CARRY4") // 2),
        mux=_sum(cells, "MUXF"),
        flipflop=_sum(cells, "FD"),
        dsp=_sum(cells, "DSP48"),
        lutram=_sum(cells, "RAM32", "RAM64", "RAM128", "RAM256", "RAM512"),
        blockram=_sum(cells, "RAMB", "URAM"),
    )


TECHNOLOGIES = {
    "ecp5": _Technology(lambda dsp: f"synth_ecp5 {'' if dsp else '-nodsp'} -top {NAME}", _ecp5),
    "xcup": _Technology(
        lambda dsp: f"synth_xilinx -family xcup -flatten -noiopad -noclkbuf {'' if dsp else '-nodsp'} -top {NAME}", _xcup
    ),
}


_GATES = (
    f"synth -flatten -noabc -booth -arith_tree -top {NAME}",
    "setattr -unset init w:*",  # power-up values are a matter of FPGAs
    "dfflegalize -cell $_DFFE_PP_ x -cell $_DFF_P_ x",  # resets become gates
    "techmap",
    "opt -fast -nodffe -nosdff",
    "abc -g cmos",
    "opt_clean",
)


def synthesise(component: wiring.Component, technology: str, *, dsp: bool = True) -> Cells:
    """Elaborates and synthesises a component (which can be done once with each); minutes for large ones."""
    if technology not in TECHNOLOGIES:
        raise ValueError(f"cells are counted for {', '.join(TECHNOLOGIES)}, not {technology!r}")
    chosen = TECHNOLOGIES[technology]
    report = _report(component, technology, [chosen.commands(dsp)], "stat -json")
    return chosen.count(report["design"]["num_cells_by_type"])


def synthesise_gates(component: wiring.Component) -> Gates:
    """The same, to CMOS gates."""
    design = _report(component, "cmos", _GATES, "stat -tech cmos -json")["design"]
    cells = design["num_cells_by_type"]
    plain = _sum(cells, "$_DFF_P_")
    transistors = int(design["estimated_num_transistors"].removesuffix("+"))  # without flip-flops that have an enable
    return Gates(logic=transistors - FLIPFLOP_TRANSISTORS * plain, flipflop=plain + _sum(cells, "$_DFFE_PP_"))


def _report(component: wiring.Component, technology: str, commands: Sequence[str], statistics: str) -> dict:
    """What yosys' `statistics` command says after `commands`."""
    with tempfile.TemporaryDirectory(prefix="lutra-") as folder:
        source, target = Path(folder, "design.il"), Path(folder, "cells.json")
        source.write_text(rtlil.convert(component, name=NAME, ports=flat_ports(component), emit_src=False))
        commands = [f"read_rtlil {source}", *commands, f"tee -q -o {target} {statistics}"]
        done = subprocess.run([sys.executable, "-c", _YOSYS, *commands], capture_output=True, text=True, check=False)
        if done.returncode or not target.exists():
            raise BuildError(f"yosys cannot synthesise for {technology}: {(done.stderr or done.stdout).strip()[-300:]}")
        return json.loads(target.read_text())
