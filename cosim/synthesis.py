"""Cells of a component after synthesis by yosys: counts, not a bitstream and no timing.

FPGAs: ``synth_ecp5`` (Lattice ECP5) and ``synth_xilinx -family xcup`` (AMD UltraScale+), as the `pyosys` wheel has them. DSP
blocks are used where yosys finds products for them; ``dsp=False`` has it make them of LUTs, so that arithmetic compares.
Left to itself yosys makes sums of three and more summands, and products, of LUTs as compressors, with few carry chains: up to
2.5 times as many LUTs, more for some ways of writing a sum than for others. ``chains=True`` has it use carry chains throughout,
and map LUTs by abc instead of abc9: counts that differ by a percent, in a tenth of the time.
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

__all__ = ["PRODUCT_ROWS", "TECHNOLOGIES", "Cells", "Gates", "synthesise", "synthesise_gates"]

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
    with_abc: Callable[[str], list[str]]
    """The same, from what `commands` gives, without abc9."""
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
        lut=_sum(cells, "LUT", "$lut") + _sum(cells, "$lut_7") + 3 * _sum(cells, "$lut_8"),  # of two LUT6 and of four
        carry=_sum(cells, "CARRY8") + -(-_sum(cells, "CARRY4") // 2),
        mux=_sum(cells, "MUXF"),
        flipflop=_sum(cells, "FD"),
        dsp=_sum(cells, "DSP48"),
        lutram=_sum(cells, "RAM32", "RAM64", "RAM128", "RAM256", "RAM512"),
        blockram=_sum(cells, "RAMB", "URAM"),
    )


def _xcup_with_abc(synth: str) -> list[str]:
    """`synth_xilinx` up to the LUTs, its own costs for abc: one LUT up to 6 inputs, two of them with 7, four with 8."""
    return [f"{synth} -run :map_luts", "opt_expr -mux_undef -noclkinv", "abc -luts 2:3,6:5,10,20", "clean"]


TECHNOLOGIES = {
    "ecp5": _Technology(
        lambda dsp: f"synth_ecp5 {'' if dsp else '-nodsp'} -top {NAME}", lambda synth: [f"{synth} -noabc9"], _ecp5
    ),
    "xcup": _Technology(
        lambda dsp: f"synth_xilinx -family xcup -flatten -noiopad -noclkbuf {'' if dsp else '-nodsp'} -top {NAME}",
        _xcup_with_abc,
        _xcup,
    ),
}


PRODUCT_ROWS = """
(* techmap_celltype = "$mul" *)
module product (A, B, Y);
    parameter A_SIGNED = 0;
    parameter B_SIGNED = 0;
    parameter A_WIDTH = 1;
    parameter B_WIDTH = 1;
    parameter Y_WIDTH = 1;
    localparam BITS = A_WIDTH + B_WIDTH;
    input [A_WIDTH-1:0] A;
    input [B_WIDTH-1:0] B;
    output [Y_WIDTH-1:0] Y;
    wire [BITS-1:0] full;
    wire [BITS+Y_WIDTH-1:0] extended = {{Y_WIDTH{(A_SIGNED || B_SIGNED) && full[BITS-1]}}, full};
    assign Y = extended[Y_WIDTH-1:0];
    generate
        if (A_WIDTH < B_WIDTH)
            product_rows #(.A_SIGNED(B_SIGNED), .B_SIGNED(A_SIGNED), .A_WIDTH(B_WIDTH), .B_WIDTH(A_WIDTH))
                rows (.A(B), .B(A), .Y(full));
        else
            product_rows #(.A_SIGNED(A_SIGNED), .B_SIGNED(B_SIGNED), .A_WIDTH(A_WIDTH), .B_WIDTH(B_WIDTH))
                rows (.A(A), .B(B), .Y(full));
    endgenerate
endmodule

(* techmap_celltype = "product_rows" *)
module half_and_half (A, B, Y);
    parameter A_SIGNED = 0;
    parameter B_SIGNED = 0;
    parameter A_WIDTH = 1;
    parameter B_WIDTH = 1;
    localparam LOW = B_WIDTH / 2;
    localparam HIGH = B_WIDTH - LOW;
    input [A_WIDTH-1:0] A;
    input [B_WIDTH-1:0] B;
    output [A_WIDTH+B_WIDTH-1:0] Y;
    wire sign = A_SIGNED && A[A_WIDTH-1];
    generate
        if (B_WIDTH == 1) begin
            wire [A_WIDTH:0] row = {sign, A} & {(A_WIDTH+1){B[0]}};
            assign Y = B_SIGNED ? -row : row;
        end else if (B_WIDTH == 2) begin
            wire [A_WIDTH+1:0] low = {sign, sign, A} & {(A_WIDTH+2){B[0]}};
            wire [A_WIDTH:0] high = {sign, A} & {(A_WIDTH+1){B[1]}};
            assign Y = {B_SIGNED ? low[A_WIDTH+1:1] - high : low[A_WIDTH+1:1] + high, low[0]};
        end else begin
            wire [A_WIDTH+LOW-1:0] low;
            wire [A_WIDTH+HIGH-1:0] high;
            product_rows #(.A_SIGNED(A_SIGNED), .B_SIGNED(0), .A_WIDTH(A_WIDTH), .B_WIDTH(LOW))
                below (.A(A), .B(B[LOW-1:0]), .Y(low));
            product_rows #(.A_SIGNED(A_SIGNED), .B_SIGNED(B_SIGNED), .A_WIDTH(A_WIDTH), .B_WIDTH(HIGH))
                above (.A(A), .B(B[B_WIDTH-1:LOW]), .Y(high));
            wire [A_WIDTH+HIGH-1:0] carried = {{HIGH{A_SIGNED && low[A_WIDTH+LOW-1]}}, low[A_WIDTH+LOW-1:LOW]};
            assign Y = {high + carried, low[LOW-1:0]};
        end
    endgenerate
endmodule
"""
"""For yosys' techmap: a product is a tree of additions of rows, a row a copy of A gated by a bit of B, the narrower factor."""

_SUMS = "t:$add t:$sub %u t:$neg %u"


def _chains(*, dsp: bool) -> list[str]:
    """Turns additions, and without DSP blocks products (by file {rows}), into single adders before yosys merges them."""
    tidy = ["opt -full", "wreduce", "opt_clean"]
    return [
        f"hierarchy -top {NAME}", "proc", "flatten", *tidy,
        *([] if dsp else ["techmap -map {rows}", *tidy]),
        # yosys merges sums into what else they are added to, but not where the sum itself is to be kept
        f"select -set sums {_SUMS} %co:+[Y] w:* %i", "setattr -set keep 1 @sums", f"alumacc {_SUMS}",
        "setattr -unset keep @sums",
    ]  # fmt: skip


_GATES = (
    f"synth -flatten -noabc -booth -arith_tree -top {NAME}",
    "setattr -unset init w:*",  # power-up values are a matter of FPGAs
    "dfflegalize -cell $_DFFE_PP_ x -cell $_DFF_P_ x",  # resets become gates
    "techmap",
    "opt -fast -nodffe -nosdff",
    "abc -g cmos",
    "opt_clean",
)


def synthesise(component: wiring.Component, technology: str, *, dsp: bool = True, chains: bool = False) -> Cells:
    """Elaborates and synthesises a component (which can be done once with each); minutes for large ones."""
    if technology not in TECHNOLOGIES:
        raise ValueError(f"cells are counted for {', '.join(TECHNOLOGIES)}, not {technology!r}")
    chosen = TECHNOLOGIES[technology]
    commands = [chosen.commands(dsp)]
    if chains:
        commands = [*_chains(dsp=dsp), *chosen.with_abc(commands[0])]
    report = _report(component, technology, commands, "stat -width -json")
    return chosen.count(report["design"]["num_cells_by_type"])


def synthesise_gates(component: wiring.Component) -> Gates:
    """The same, to CMOS gates."""
    design = _report(component, "cmos", _GATES, "stat -tech cmos -json")["design"]
    cells = design["num_cells_by_type"]
    plain = _sum(cells, "$_DFF_P_")
    transistors = int(design["estimated_num_transistors"].removesuffix("+"))  # without flip-flops that have an enable
    return Gates(logic=transistors - FLIPFLOP_TRANSISTORS * plain, flipflop=plain + _sum(cells, "$_DFFE_PP_"))


def _report(component: wiring.Component, technology: str, commands: Sequence[str], statistics: str) -> dict:
    """What yosys' `statistics` command says after `commands`, in which {rows} is the file of `PRODUCT_ROWS`."""
    with tempfile.TemporaryDirectory(prefix="lutra-") as folder:
        source, target, rows = (Path(folder, name) for name in ("design.il", "cells.json", "rows.v"))
        rows.write_text(PRODUCT_ROWS)
        source.write_text(rtlil.convert(component, name=NAME, ports=flat_ports(component), emit_src=False))
        commands = [f"read_rtlil {source}", *(each.format(rows=rows) for each in commands), f"tee -q -o {target} {statistics}"]
        done = subprocess.run([sys.executable, "-c", _YOSYS, *commands], capture_output=True, text=True, check=False)
        if done.returncode or not target.exists():
            raise BuildError(f"yosys cannot synthesise for {technology}: {(done.stderr or done.stdout).strip()[-300:]}")
        return json.loads(target.read_text())
