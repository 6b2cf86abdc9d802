"""Payloads of the memory masters, and the splitter of commands into legal AXI4 bursts."""

from amaranth.hdl import Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from rtl.lib.fifo import StreamFifo

__all__ = [
    "BEATS_BITS",
    "BurstSplitter",
    "burst_layout",
    "check_burst",
    "command_layout",
    "read_layout",
    "write_layout",
]

BEATS_BITS = 24
"""Width of the length of a command, in beats."""

PAGE_BYTES = 4096
"""An AXI4 burst must not cross a multiple of this address."""


def command_layout(addr_bits: int = 40) -> data.StructLayout:
    """A command: ``beats`` beats (0: none) from byte address ``addr`` on, a multiple of the beat."""
    return data.StructLayout({"addr": addr_bits, "beats": BEATS_BITS})


def read_layout(data_bits: int) -> data.StructLayout:
    """A beat read; ``last`` marks the last beat of a command."""
    return data.StructLayout({"data": data_bits, "last": 1})


def write_layout(data_bits: int) -> data.StructLayout:
    """A beat to write, with one strobe a byte."""
    return data.StructLayout({"data": data_bits, "strb": data_bits // 8})


def burst_layout(addr_bits: int, data_bits: int, max_burst: int) -> data.StructLayout:
    """A burst: beat address ``beat``, beats minus one ``len``, ``last`` of its command."""
    return data.StructLayout(
        {
            "beat": addr_bits - _log2(data_bits // 8),
            "len": _log2(max_burst),
            "last": 1,
        }
    )


def _log2(value: int) -> int:
    return value.bit_length() - 1


def check_burst(data_bits: int, max_burst: int) -> None:
    """Refuse lengths that AXI4 does not know or that could not avoid crossing 4 KiB."""
    if not 2 <= max_burst <= 256 or max_burst & (max_burst - 1):
        raise ValueError(f"max_burst must be a power of two from 2 to 256 beats, not {max_burst}")
    if max_burst * data_bits // 8 > PAGE_BYTES:
        raise ValueError(
            f"a burst of max_burst beats must fit in {PAGE_BYTES} bytes: "
            f"{max_burst} beats of {data_bits} bits are {max_burst * data_bits // 8} bytes"
        )


class BurstSplitter(wiring.Component):
    """Cut commands into INCR bursts that start anywhere but end at the latest on a burst boundary.

    Function
        A command {addr, beats} becomes bursts of at most ``max_burst`` beats. None crosses a
        multiple of ``max_burst`` beats, hence none crosses 4 KiB. All but the first and the last
        burst of a command have full length. A command of 0 beats becomes nothing.
    Streams
        ``i_cmd`` in, `command_layout`; ``o_burst`` out, `burst_layout`, in command order.
        The address bits below the beat are ignored.
    Handshake
        ``i_cmd.ready`` depends on registers and ``i_clear`` only. ``i_clear`` = 1 drops everything
        and takes nothing. ``o_idle`` = 1: no command inside.
    Timing
        Latency 2 cycles. One burst a cycle, across commands too.
    Cost
        A queue of ``queue_depth`` commands, one address register, two small subtractors.
    Twins
        Test: ``tests/test_bus.py``.
    """

    i_cmd: stream.Interface
    o_burst: stream.Interface
    i_clear: Signal
    o_idle: Signal

    def __init__(
        self, *, data_bits: int, addr_bits: int = 40, max_burst: int = 16, queue_depth: int = 4
    ) -> None:
        check_burst(data_bits, max_burst)
        self._offset_bits = _log2(data_bits // 8)
        self._len_bits = _log2(max_burst)
        self._command = command_layout(addr_bits)
        self._burst = burst_layout(addr_bits, data_bits, max_burst)
        self._queue_depth = queue_depth
        super().__init__(
            {
                "i_cmd": In(stream.Signature(self._command)),
                "o_burst": Out(stream.Signature(self._burst)),
                "i_clear": In(1),
                "o_idle": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()

        # 1. queue of commands
        m.submodules.queue = queue = StreamFifo(self._command, depth=self._queue_depth)
        m.d.comb += [
            queue.i_data.payload.eq(self.i_cmd.payload),
            queue.i_data.valid.eq(self.i_cmd.valid & ~self.i_clear),
            self.i_cmd.ready.eq(queue.i_data.ready & ~self.i_clear),
            queue.i_clear.eq(self.i_clear),
        ]

        # 2. the command in work: next beat address, beats left minus one
        k = self._len_bits
        beat = Signal(self._burst["beat"].shape)
        left = Signal(BEATS_BITS)
        valid = Signal()
        to_boundary = Signal(k)  # minus one, like `left`
        last = Signal()
        taken = Signal()
        m.d.comb += [
            to_boundary.eq(~beat[:k]),
            last.eq(left <= to_boundary),
            self.o_burst.valid.eq(valid),
            self.o_burst.p.beat.eq(beat),
            self.o_burst.p.len.eq(Mux(last, left[:k], to_boundary)),
            self.o_burst.p.last.eq(last),
            taken.eq(valid & self.o_burst.ready),
            queue.o_data.ready.eq(~valid | (taken & last)),
        ]
        with m.If(queue.o_data.ready):
            m.d.sync += [
                valid.eq(queue.o_data.valid & queue.o_data.p.beats.any()),
                beat.eq(queue.o_data.p.addr[self._offset_bits :]),
                left.eq(queue.o_data.p.beats - 1),
            ]
        with m.Elif(taken):
            m.d.sync += [
                beat[k:].eq(beat[k:] + 1),
                beat[:k].eq(Const(0, k)),
                left.eq(left - to_boundary - 1),
            ]
        with m.If(self.i_clear):
            m.d.sync += valid.eq(0)
        m.d.comb += self.o_idle.eq(~valid & ~queue.o_data.valid)
        return m
