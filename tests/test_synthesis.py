"""Cell counts of components small enough to be known by hand."""

import pytest
from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from cosim.synthesis import FLIPFLOP_TRANSISTORS, Gates, synthesise, synthesise_gates


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


@pytest.mark.synth
def test_gates_of_known_parts() -> None:
    """A NAND and an inverter have 4 and 2 transistors, an exclusive OR 12 by yosys' table."""
    assert synthesise_gates(Registers()) == Gates(logic=6 + 12, flipflop=8)
    assert Gates(logic=1, flipflop=2).transistors == 1 + 2 * FLIPFLOP_TRANSISTORS
    parts = synthesise_gates(Parts())
    assert parts.flipflop == 16 + 16 + 16 * 4  # sum, product, and the memory
