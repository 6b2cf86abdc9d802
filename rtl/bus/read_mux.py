"""Several readers of memory share one `BurstReader`."""

from amaranth.hdl import Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from rtl.bus.burst import command_layout, read_layout
from rtl.lib.fifo import StreamFifo
from rtl.lib.round_robin import RoundRobin

__all__ = ["ReadMux"]


class ReadMux(wiring.Component):
    """Take commands of ``n`` clients in turn and give each client its own beats.

    Function
        Commands go to ``o_cmd`` round robin, one command at a time; the beats that come back on
        ``i_data`` go to the client whose command they answer, ``last`` with them. Commands of 0
        beats end here.
    Streams
        ``i_cmd[n]`` in and ``o_cmd`` out: `command_layout`; ``i_data`` in and ``o_data[n]`` out:
        `read_layout`. ``o_cmd`` and ``i_data`` belong to a `BurstReader`.
    Handshake
        One order for all: while a client does not take its beats, the others wait (head-of-line
        blocking). So a client asks only for beats that it will take without the help of another
        client's data. ``i_clear`` = 1 together with the reader's drops all; nothing is taken then.
        ``o_idle`` = 1: every command has been answered (``last`` was taken).
    Timing
        A command 1 cycle, a beat 0 cycles (combinational). One command and one beat a cycle.
    Cost
        ``order_depth`` x log2(n) bits: the commands between request and last beat.
    Twins
        Test: ``tests/test_bus.py``.
    """

    i_cmd: list[stream.Interface]
    o_cmd: stream.Interface
    i_data: stream.Interface
    o_data: list[stream.Interface]
    i_clear: Signal
    o_idle: Signal

    def __init__(
        self, n: int, *, data_bits: int, addr_bits: int = 40, order_depth: int = 32
    ) -> None:
        if n < 1:
            raise ValueError(f"ReadMux needs at least 1 client, not {n}")
        self._n = n
        self._order_depth = order_depth
        command = stream.Signature(command_layout(addr_bits))
        beat = stream.Signature(read_layout(data_bits))
        super().__init__(
            {
                "i_cmd": In(command).array(n),
                "o_cmd": Out(command),
                "i_data": In(beat),
                "o_data": Out(beat).array(n),
                "i_clear": In(1),
                "o_idle": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()

        # 1. commands: round robin into a register, the order noted
        m.submodules.order = order = StreamFifo(range(self._n), depth=self._order_depth)
        m.submodules.arbiter = arbiter = RoundRobin(self._n)
        accept = Signal()
        beats = Signal()  # the granted command is not empty
        m.d.comb += [
            accept.eq((~self.o_cmd.valid | self.o_cmd.ready) & order.i_data.ready & ~self.i_clear),
            arbiter.i_next.eq(accept),
            order.i_data.payload.eq(arbiter.o_index),
            order.i_data.valid.eq(accept & beats),
            order.i_clear.eq(self.i_clear),
        ]
        with m.If(self.o_cmd.ready):
            m.d.sync += self.o_cmd.valid.eq(0)
        for index, client in enumerate(self.i_cmd):
            m.d.comb += [
                arbiter.i_request[index].eq(client.valid),
                client.ready.eq(accept & arbiter.o_grant[index]),
            ]
            with m.If(accept & arbiter.o_grant[index]):
                m.d.comb += beats.eq(client.p.beats.any())
                m.d.sync += [
                    self.o_cmd.valid.eq(client.p.beats.any()),
                    self.o_cmd.payload.eq(client.payload),
                ]

        # 2. beats: the oldest command owns them
        owner = order.o_data
        taken = Signal()
        for index, client in enumerate(self.o_data):
            mine = Signal(name=f"mine_{index}")
            m.d.comb += [
                mine.eq(owner.valid & (owner.payload == index)),
                client.valid.eq(self.i_data.valid & mine),
                client.payload.eq(self.i_data.payload),
            ]
            with m.If(mine):
                m.d.comb += self.i_data.ready.eq(client.ready)
        m.d.comb += [
            taken.eq(self.i_data.valid & self.i_data.ready),
            owner.ready.eq(taken & self.i_data.p.last),
            self.o_idle.eq(~owner.valid & ~self.o_cmd.valid),
        ]

        with m.If(self.i_clear):
            m.d.sync += self.o_cmd.valid.eq(0)
        return m
