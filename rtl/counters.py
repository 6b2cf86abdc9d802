"""Performance counters: 64 bits each, read through registers."""

from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from spec.csr import COUNTERS

LARGEST_STEP = 256
"""At least what a counter grows by in a cycle: the beats of three units of 512 bits."""


class Counters(wiring.Component):
    """One counter for each entry of ``spec.csr.COUNTERS``.

    Function
        Every cycle a counter grows by the input of its name (cycles: 1; bytes: the bytes of that cycle). ``i_clear``
        sets all to 0. ``words[2*i]``, ``words[2*i + 1]``: low and high word of counter i.
    Timing
        An input counts one cycle later.

    Parameters
    ----------
    beat_bytes
        Of the widest port.
    """

    def __init__(self, beat_bytes: int) -> None:
        step_bits = max(LARGEST_STEP, beat_bytes).bit_length()
        super().__init__(
            {name: In(step_bits) for name, _doc in COUNTERS}
            | {"i_clear": In(1), "words": Out(32).array(2 * len(COUNTERS)), "o_cycles": Out(64)}
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for i, (name, _doc) in enumerate(COUNTERS):
            value = Signal(64, name=name)
            m.d.comb += [self.words[2 * i].eq(value[:32]), self.words[2 * i + 1].eq(value[32:])]
            step = getattr(self, name)
            with m.If(self.i_clear):
                m.d.sync += value.eq(0)
            with m.Elif(step != 0):
                m.d.sync += value.eq(value + step)
            if name == "cycles":
                m.d.comb += self.o_cycles.eq(value)
        return m
