"""A first-in first-out queue with stream ports on both sides."""

from amaranth.hdl import Module, Mux, ShapeLike, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

__all__ = ["StreamFifo"]


class StreamFifo(wiring.Component):
    """Queue of ``depth`` stream payloads in one memory.

    Function
        What goes in comes out, in order. ``i_clear`` = 1 empties the queue at the clock edge; a
        beat that is offered in that cycle is lost even when it is taken.
    Streams
        ``i_data`` in, ``o_data`` out, payload ``shape``. ``o_level`` is the number of beats inside.
    Handshake
        ``i_data.ready`` depends on registers only (not on ``o_data.ready``).
    Timing
        Latency 1 cycle, 2 if ``buffered``. One beat a cycle.
    Cost
        ``depth`` x width bits. ``buffered=False``: a memory with a combinational read port
        (distributed RAM, fastest in Verilator). ``buffered=True``: a synchronous read port (block RAM).
    Twins
        Test: ``tests/test_bus.py``.

    Parameters
    ----------
    shape
        Shape of the payload.
    depth
        Beats it holds: a power of two from 2.
    buffered
        Read through a register, so that block RAM can be used.
    """

    i_data: stream.Interface
    o_data: stream.Interface
    i_clear: Signal
    o_level: Signal

    def __init__(self, shape: ShapeLike, *, depth: int, buffered: bool = False) -> None:
        if depth < 2 or depth & (depth - 1):
            raise ValueError(f"FIFO depth must be a power of two from 2, not {depth}")
        self._shape = shape
        self._depth = depth
        self._buffered = buffered
        super().__init__(
            {
                "i_data": In(stream.Signature(shape)),
                "o_data": Out(stream.Signature(shape)),
                "i_clear": In(1),
                "o_level": Out(range(depth + 1)),
            }
        )

    @property
    def depth(self) -> int:
        """Beats the queue holds."""
        return self._depth

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.storage = storage = Memory(shape=self._shape, depth=self._depth, init=[])
        write = storage.write_port()
        read = storage.read_port(domain="sync" if self._buffered else "comb")

        head = Signal(range(self._depth))
        tail = Signal(range(self._depth))
        level = Signal(range(self._depth + 1))  # beats in the memory and in the output register
        push = Signal()
        pop = Signal()
        m.d.comb += [
            self.o_level.eq(level),
            self.i_data.ready.eq(level != self._depth),
            push.eq(self.i_data.valid & self.i_data.ready),
            pop.eq(self.o_data.valid & self.o_data.ready),
            write.addr.eq(tail),
            write.data.eq(self.i_data.payload),
            write.en.eq(push),
            read.addr.eq(head),
            self.o_data.payload.eq(read.data),
        ]
        m.d.sync += [
            tail.eq(tail + push),
            level.eq(level + push - pop),
        ]

        if self._buffered:
            fetch = Signal()  # memory -> output register
            valid = Signal()
            m.d.comb += [
                self.o_data.valid.eq(valid),
                fetch.eq((level != valid) & (~valid | pop)),
                read.en.eq(fetch),
            ]
            m.d.sync += [
                head.eq(head + fetch),
                valid.eq(Mux(pop, fetch, valid | fetch)),
            ]
        else:
            m.d.comb += self.o_data.valid.eq(level != 0)
            m.d.sync += head.eq(head + pop)

        with m.If(self.i_clear):
            m.d.sync += [head.eq(0), tail.eq(0), level.eq(0)]
            if self._buffered:
                m.d.sync += valid.eq(0)
        return m
