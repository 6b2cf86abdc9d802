"""Cell counts of components small enough to be known by hand."""

import subprocess
import sys
from pathlib import Path

import pytest
from amaranth.hdl import Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from cosim.synthesis import FLIPFLOP_TRANSISTORS, PRODUCT_ROWS, Gates, synthesise, synthesise_gates


class Parts(wiring.Component):
    """One of each: a 16-bit adder and its register, a registered 8 by 8 product, a 16 x 4 memory read at once."""

    a: Signal
    b: Signal
    en: Signal
    total: Signal
    product: Signal
    word: Signal

    def __init__(self) -> None:
        super().__init__(
            {"a": In(16), "b": In(16), "en": In(1), "total": Out(16), "product": Out(16), "word": Out(4)}
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.memory = memory = Memory(shape=4, depth=16, init=[])
        read, write = memory.read_port(domain="comb"), memory.write_port()
        m.d.comb += [
            read.addr.eq(self.a[:4]), self.word.eq(read.data),
            write.addr.eq(self.b[:4]), write.data.eq(self.a[4:8]), write.en.eq(self.en),
        ]  # fmt: skip
        m.d.sync += [self.total.eq(self.a + self.b), self.product.eq(self.a[:8] * self.b[:8])]
        return m


@pytest.mark.synth
@pytest.mark.parametrize(("technology", "carry"), [("ecp5", 8), ("xcup", 2)])
def test_counts_of_known_parts(technology: str, carry: int) -> None:
    cells = synthesise(Parts(), technology, dsp=True)
    assert cells.carry == carry and cells.lutram >= 1 and cells.blockram == 0
    assert cells.dsp == 1 and 16 <= cells.flipflop <= 32  # the product's register may lie in the DSP block
    without = synthesise(Parts(), technology, dsp=False)
    assert without.dsp == 0 and without.flipflop == 32 and without.lut > cells.lut


def test_unknown_technology() -> None:
    with pytest.raises(ValueError, match="cells are counted for ecp5, xcup, not 'ice40'"):
        synthesise(Parts(), "ice40")


class Registers(wiring.Component):
    """Five bits registered with an enable, three without, and the AND and exclusive OR of two inputs."""

    a: Signal
    en: Signal
    held: Signal
    plain: Signal
    both: Signal
    odd: Signal

    def __init__(self) -> None:
        super().__init__({"a": In(5), "en": In(1), "held": Out(5), "plain": Out(3), "both": Out(1), "odd": Out(1)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        held, plain = (Signal(bits, reset_less=True) for bits in (5, 3))
        with m.If(self.en):
            m.d.sync += held.eq(self.a)
        m.d.sync += plain.eq(self.a[1:4])
        m.d.comb += [self.held.eq(held), self.plain.eq(plain), self.both.eq(self.a[0] & self.en), self.odd.eq(self.a[:2].xor())]
        return m


class Sums(wiring.Component):
    """A signed product, added to two more: 12 by 4 bits."""

    def __init__(self) -> None:
        super().__init__({"a": In(signed(12)), "b": In(signed(4)), "c": In(16), "d": In(16), "total": Out(16)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.d.comb += self.total.eq(self.a * self.b + self.c + self.d)
        return m


@pytest.mark.synth
def test_chains_are_carry_chains() -> None:
    """A product of 4 rows is 3 adders of 13 to 15 bits, the sums are two of 16, of 2 bits a cell."""
    with_chains, without = (synthesise(Sums(), "ecp5", dsp=False, chains=chains) for chains in (True, False))
    assert 2 * 7 + 7 + 2 * 8 <= with_chains.carry <= 2 * 8 + 8 + 2 * 8 + 2
    assert with_chains.carry > 2 * without.carry
    assert with_chains.lut + 2 * with_chains.carry < without.lut + 2 * without.carry
    for technology, carry in (("ecp5", 2 * 8), ("xcup", 2 * 2)):
        blocks = synthesise(Sums(), technology, dsp=True, chains=True)
        assert blocks.dsp == 1 and carry <= blocks.carry <= carry + 2


class Choice(wiring.Component):
    """One of two, four, or 64 bits."""

    def __init__(self, bits: int) -> None:
        self._bits = bits
        super().__init__({"bits": In(bits), "which": In(range(bits)), "chosen": Out(1)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        level = list(self.bits)
        for bit in self.which:
            level = [Mux(bit, level[n + 1], level[n]) for n in range(0, len(level), 2)]
        m.d.comb += self.chosen.eq(level[0])
        return m


@pytest.mark.synth
@pytest.mark.parametrize(("bits", "least", "most"), [(4, 1, 1), (64, 22, 28)])
def test_wide_luts_are_several(bits: int, least: int, most: int) -> None:
    """A choice of 4 is a LUT6, one of 64 is 21 of those, but abc takes some as LUTs of 7 inputs: each counts as two LUT6."""
    assert least <= synthesise(Choice(bits), "xcup", dsp=False, chains=True).lut <= most


@pytest.mark.synth
@pytest.mark.parametrize("signs", ["", "signed"])
@pytest.mark.parametrize(("a", "b", "y"), [(1, 1, 2), (5, 1, 6), (5, 2, 7), (3, 5, 8), (6, 3, 6), (4, 4, 11), (7, 6, 13)])
def test_rows_are_the_product(tmp_path: Path, a: int, b: int, y: int, signs: str) -> None:
    """Proven by yosys for every value."""
    Path(tmp_path, "rows.v").write_text(PRODUCT_ROWS)
    Path(tmp_path, "top.v").write_text(
        f"module top(input {signs} [{a - 1}:0] a, input {signs} [{b - 1}:0] b, output {signs} [{y - 1}:0] y);"
        " assign y = a * b; endmodule"
    )
    prove = f"equiv_opt -assert techmap -map {tmp_path}/rows.v"
    for commands in (
        [f"read_verilog {tmp_path}/top.v", "hierarchy -top top", prove],
        [f"read_verilog {tmp_path}/top.v", f"techmap -map {tmp_path}/rows.v", "select -assert-none t:$mul"],
    ):
        program = "import sys; from pyosys import libyosys as y; d = y.Design(); [y.run_pass(c, d) for c in sys.argv[1:]]"
        done = subprocess.run([sys.executable, "-c", program, *commands], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-600:]


@pytest.mark.synth
def test_gates_of_known_parts() -> None:
    """A NAND and an inverter have 4 and 2 transistors, an exclusive OR 12 by yosys' table."""
    assert synthesise_gates(Registers()) == Gates(logic=6 + 12, flipflop=8)
    assert Gates(logic=1, flipflop=2).transistors == 1 + 2 * FLIPFLOP_TRANSISTORS
    parts = synthesise_gates(Parts())
    assert parts.flipflop == 16 + 16 + 16 * 4  # sum, product, and the memory
