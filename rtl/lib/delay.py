"""A delay line that advances with `en`: keeps side data in step with a pipelined unit."""

from amaranth.hdl import Module, Shape, ShapeLike, Signal
from amaranth.lib.wiring import Component, In, Out


class Delay(Component):
    """`o` is `i` as it was `cycles` enabled clock edges ago.

    Function
        Enabled edges are clock edges with `en` = 1; on others nothing changes. ``cycles=0`` is a wire.

    Ports
        en, In(1): the line advances. i, In(shape). o, Out(shape).

    Timing
        `latency` = `cycles` enabled edges, one item an edge.

    Numbers
        No arithmetic. The line holds zeros before its first item when `reset` is set; without it only the
        power-up value is zero, and a reset leaves what is inside (data paths want that: no reset wiring).

    Cost
        `cycles` registers of the shape's width.

    Twins
        tests/test_fp.py.
    """

    en: Signal
    i: Signal
    o: Signal

    def __init__(self, shape: ShapeLike, cycles: int, *, reset: bool = False) -> None:
        if cycles < 0:
            raise ValueError(f"cycles must not be negative, not {cycles}")
        self._cycles = cycles
        self._reset = reset
        super().__init__({"en": In(1), "i": In(shape), "o": Out(shape)})

    @property
    def latency(self) -> int:
        """Enabled clock edges from `i` to `o`."""
        return self._cycles

    def elaborate(self, platform: object) -> Module:
        m = Module()
        stage = self.i
        for n in range(self._cycles):
            following = Signal(Shape.cast(self.i.shape()), name=f"stage_{n}", reset_less=not self._reset)
            with m.If(self.en):
                m.d.sync += following.eq(stage)
            stage = following
        m.d.comb += self.o.eq(stage)
        return m
