"""Cell counts of components small enough to be known by hand."""

import pytest
from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from cosim.synthesis import synthesise


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
