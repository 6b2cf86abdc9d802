"""A delay line in a memory: for wide data, where registers would be many."""

from amaranth.hdl import Module, ShapeLike, Signal
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import Component, In, Out


class RingDelay(Component):
    """`o` is `i` as it was `cycles` enabled clock edges ago: `Delay` without its registers.

    Function
        A memory with one write and one combinational read port whose addresses go round together.

    Ports
        en, In(1): the line advances. i, In(shape). o, Out(shape).

    Timing
        `latency` = `cycles` enabled edges, at least 1, one item an edge.

    Cost
        2**ceil(log2(cycles + 1)) words of the shape's width, a counter.

    Twins
        tests/test_epilogue.py.
    """

    en: Signal
    i: Signal
    o: Signal

    def __init__(self, shape: ShapeLike, cycles: int) -> None:
        if cycles < 1:
            raise ValueError(f"cycles must be at least 1, not {cycles}")
        self._cycles = cycles
        super().__init__({"en": In(1), "i": In(shape), "o": Out(shape)})

    @property
    def latency(self) -> int:
        """Enabled clock edges from `i` to `o`."""
        return self._cycles

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bits = self._cycles.bit_length()
        m.submodules.memory = memory = Memory(shape=self.signature.members["i"].shape, depth=1 << bits, init=[])
        write, read = memory.write_port(), memory.read_port(domain="comb")
        place = Signal(bits)
        with m.If(self.en):
            m.d.sync += place.eq(place + 1)
        m.d.comb += [
            write.addr.eq(place),
            write.data.eq(self.i),
            write.en.eq(self.en),
            read.addr.eq(place - self._cycles),
            self.o.eq(read.data),
        ]
        return m
