"""Fetch of descriptors ahead of their use."""

from amaranth import unsigned
from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from rtl.lib.fifo import StreamFifo
from rtl.lib.ports import read_client
from spec.descriptors import DESCRIPTOR_BYTES, Opcode

INDEX_BITS = 24

FetchedDescriptor = data.StructLayout({"words": unsigned(8 * DESCRIPTOR_BYTES), "index": unsigned(INDEX_BITS)})
"""A descriptor and its number in the program."""


class DescriptorFetch(wiring.Component):
    """Read a program's descriptors in order, a few ahead, up to its END.

    Function
        After ``i_start`` the descriptors at ``i_program + 64 * index``, index = 0, 1, ..., come out of ``o_descriptor``.
        Reading stops behind the first END; the few descriptors read beyond it are dropped.
    Streams
        ``read``: one command of 64 bytes a descriptor. ``o_descriptor``: FetchedDescriptor.
    Handshake
        A command is given only when the queue has room for its descriptor. ``i_start`` starts from index 0; it is
        legal when ``o_idle``: END was read, and nothing is in flight.
    Timing
        One descriptor per max(1, 64 / beat bytes) cycles.
    """

    i_start: Signal
    i_program: Signal
    o_idle: Signal
    o_descriptor: stream.Interface

    def __init__(self, *, addr_bits: int, data_bits: int, depth: int = 4) -> None:
        self._addr_bits = addr_bits
        self._data_bits = data_bits
        self._depth = depth
        super().__init__(
            {
                "i_start": In(1),
                "i_program": In(addr_bits),
                "o_idle": Out(1),
                "read": Out(read_client(addr_bits, data_bits)),
                "o_descriptor": Out(stream.Signature(FetchedDescriptor)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        beats = DESCRIPTOR_BYTES * 8 // self._data_bits
        m.submodules.queue = queue = StreamFifo(FetchedDescriptor, depth=self._depth)
        command, beat = self.read.cmd, self.read.beat

        # 1. commands: while no END was seen and the queue has room for what is in flight
        running = Signal()
        next_index = Signal(INDEX_BITS)
        in_flight = Signal(range(self._depth + 1))  # commands offered or given, whose beats have not all come
        ask, full = Signal(), Signal()
        m.d.comb += [
            ask.eq(running & ~command.valid & (in_flight + queue.o_level < self._depth)),
            command.p.addr.eq(self.i_program + (next_index << (DESCRIPTOR_BYTES.bit_length() - 1))),
            command.p.beats.eq(beats),
            self.o_idle.eq(~running & (in_flight == 0)),
        ]
        m.d.sync += in_flight.eq(in_flight + ask - full)
        with m.If(ask):
            m.d.sync += command.valid.eq(1)
        with m.Elif(command.ready):
            m.d.sync += command.valid.eq(0)
        with m.If(command.valid & command.ready):
            m.d.sync += next_index.eq(next_index + 1)

        # 2. beats: collect a descriptor; those behind END are dropped
        words = Signal(8 * DESCRIPTOR_BYTES)
        collected = Signal(range(max(beats, 2)))
        index = Signal(INDEX_BITS)
        m.d.comb += [beat.ready.eq(1), full.eq(beat.valid & (collected == beats - 1)), words.eq(beat.p.data)]
        if beats > 1:
            held = Signal(8 * DESCRIPTOR_BYTES - self._data_bits)
            m.d.comb += words.eq(Cat(held, beat.p.data))
            with m.If(beat.valid):
                m.d.sync += [held.eq(words >> self._data_bits), collected.eq(Mux(full, 0, collected + 1))]
        m.d.comb += [
            queue.i_data.valid.eq(full & running),
            queue.i_data.p.words.eq(words),
            queue.i_data.p.index.eq(index),
        ]
        with m.If(full & running):
            m.d.sync += index.eq(index + 1)
            with m.If(words[:4] == Const(Opcode.END, 4)):
                m.d.sync += running.eq(0)
        wiring.connect(m, queue.o_data, wiring.flipped(self.o_descriptor))

        # 3. start
        with m.If(self.i_start):
            m.d.sync += [running.eq(1), next_index.eq(0), index.eq(0)]
        return m
