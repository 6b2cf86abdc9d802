"""What is left of the dequantisation behind a core that dequantises in its loop: the activations' scale."""

from amaranth.hdl import Module, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from rtl.group_dequant import TERM_BITS, term
from rtl.group_feed import MOST_SHIFT


class TermScale(wiring.Component):
    """The last two stages of rtl/group_dequant.py alone.

    Function
        ``o_terms = (i_values * i_significand) >> i_shift``, rounded down: step 3 of docs/numerics.md section 3b.
    Timing
        Two cycles; `lanes` values of `bits` bits a cycle.
    """

    latency = 2

    def __init__(self, *, lanes: int, bits: int) -> None:
        super().__init__(
            {
                "i_valid": In(1),
                "i_values": In(signed(bits)).array(lanes),
                "i_significand": In(8),
                "i_shift": In(range(MOST_SHIFT + 1)),
                "o_valid": Out(1),
                "o_terms": Out(signed(TERM_BITS)).array(lanes),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        valid = Signal()
        shift = Signal.like(self.i_shift, reset_less=True)
        m.d.sync += [valid.eq(self.i_valid), self.o_valid.eq(valid)]
        with m.If(self.i_valid):
            m.d.sync += shift.eq(self.i_shift)
        for lane, value in enumerate(self.i_values):
            m.d.comb += self.o_terms[lane].eq(term(m, lane, (self.i_valid, valid), value, self.i_significand, shift))
        return m
