"""AXI4 read master: commands in, a gapless stream of beats out."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from rtl.bus.axi import CACHE_NORMAL, Axi4ReadSignature, Burst, Resp
from rtl.bus.burst import BurstSplitter, burst_layout, check_burst, command_layout, read_layout
from rtl.lib.fifo import StreamFifo

__all__ = ["BurstReader"]


class BurstReader(wiring.Component):
    """Read memory by AXI4 bursts, with several bursts in flight, ahead of the consumer.

    Function
        For each command {addr, beats} in order: ``o_data`` gives memory[addr + i * beat_bytes],
        i = 0 .. beats-1, ``last`` with the last one. A command of 0 beats gives nothing.
    Streams
        ``i_cmd`` in: `command_layout`, ``addr`` a multiple of the beat (lower bits are ignored).
        ``o_data`` out: `read_layout`. ``m_axi``: AXI4 read channels, one ID, INCR bursts only.
    Handshake
        RREADY is always 1: a burst is issued only when the queue has room for all of its beats.
        The bursts of later commands are issued while the beats of earlier ones still arrive.
        ``o_idle`` = 1: no command, no burst in flight, no beat in the queue.
        ``i_clear`` = 1 (one cycle or more) drops commands, queued beats and the error; no command
        is taken until the responses in flight have come and have been dropped (``o_idle`` = 1).
        On a response other than OKAY, or an RLAST in the wrong place, ``o_error`` becomes 1 and
        ``o_error_addr`` the byte address of the first such beat; data flows on.
    Timing
        A command reaches ARVALID 3 cycles after its transfer; a beat reaches ``o_data`` 1 cycle
        (``buffered``: 2) after RVALID. One beat a cycle while ``fifo_beats`` and
        ``max_outstanding * max_burst`` are at least the memory's latency in cycles + max_burst,
        and, for commands shorter than max_burst, ``max_outstanding * command beats`` too.
    Cost
        ``fifo_beats * (data_bits + 1)`` bits of memory; the defaults at 64 bits: 4,160 bits.
    Twins
        Test: ``tests/test_bus.py``; bench: ``cosim/bench_axi.py``.

    Parameters
    ----------
    data_bits, addr_bits, id_bits
        Widths of the bus.
    max_burst
        Beats of the longest burst, a power of two; bursts end on multiples of it.
    max_outstanding
        Bursts in flight, a power of two.
    fifo_beats
        Beats that may be in flight or in the queue, a power of two, at least ``max_burst``.
    buffered
        Keep the queue in block RAM instead of distributed RAM.
    """

    i_cmd: stream.Interface
    o_data: stream.Interface
    m_axi: wiring.PureInterface
    i_clear: Signal
    o_idle: Signal
    o_error: Signal
    o_error_addr: Signal

    def __init__(
        self,
        *,
        data_bits: int,
        addr_bits: int = 40,
        id_bits: int = 1,
        max_burst: int = 16,
        max_outstanding: int = 4,
        fifo_beats: int = 64,
        buffered: bool = False,
    ) -> None:
        check_burst(data_bits, max_burst)
        if fifo_beats < max_burst:
            raise ValueError(f"fifo_beats must hold a burst: {fifo_beats} < max_burst {max_burst}")
        self._data_bits = data_bits
        check_burst(data_bits, max_burst)
        self._data_bits = data_bits
        self._beat_bytes = data_bits // 8
        self._max_outstanding = max_outstanding
        self._buffered = buffered
        self._fifo_beats = fifo_beats
        self._addr_bits = addr_bits
        self._max_burst = max_burst
        self._burst = burst_layout(addr_bits, data_bits, max_burst)
        super().__init__(
            {
                "i_cmd": In(stream.Signature(command_layout(addr_bits))),
                "o_data": Out(stream.Signature(read_layout(data_bits))),
                "m_axi": Out(
                    Axi4ReadSignature(addr_bits=addr_bits, data_bits=data_bits, id_bits=id_bits)
                ),
                "i_clear": In(1),
                "o_idle": Out(1),
                "o_error": Out(1),
                "o_error_addr": Out(addr_bits),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        axi = self.m_axi
        offset_bits = self._beat_bytes.bit_length() - 1

        draining = Signal()  # after a clear, until the bursts in flight have ended
        clear = Signal()
        m.d.comb += clear.eq(self.i_clear | draining)

        # 1. commands -> bursts
        m.submodules.splitter = splitter = BurstSplitter(
            data_bits=self._data_bits, addr_bits=self._addr_bits, max_burst=self._max_burst
        )
        wiring.connect(m, wiring.flipped(self.i_cmd), splitter.i_cmd)
        burst = splitter.o_burst
        m.d.comb += splitter.i_clear.eq(clear)

        # 2. issue a burst when its beats have room and its place in the order is noted
        m.submodules.order = order = StreamFifo(self._burst, depth=self._max_outstanding)
        credit = Signal(range(self._fifo_beats + 1), init=self._fifo_beats)
        issue = Signal()
        m.d.comb += [
            issue.eq(
                burst.valid
                & ~clear
                & (credit > burst.p.len)
                & order.i_data.ready
                & (~axi.arvalid | axi.arready)
            ),
            burst.ready.eq(issue),
            order.i_data.valid.eq(issue),
            order.i_data.payload.eq(burst.payload),
            axi.arid.eq(0),
            axi.arsize.eq(offset_bits),
            axi.arburst.eq(Burst.INCR),
            axi.arcache.eq(CACHE_NORMAL),
            axi.arprot.eq(0),
        ]
        with m.If(axi.arready):
            m.d.sync += axi.arvalid.eq(0)
        with m.If(issue):
            m.d.sync += [
                axi.arvalid.eq(1),
                axi.araddr.eq(Cat(Const(0, offset_bits), burst.p.beat)),
                axi.arlen.eq(burst.p.len),
            ]

        # 3. receive: the oldest burst in flight owns the beat
        oldest = order.o_data
        index = Signal(self._burst["len"].shape)
        beat = Signal()
        burst_end = Signal()
        m.d.comb += [
            axi.rready.eq(1),
            beat.eq(axi.rvalid & oldest.valid),
            burst_end.eq(index == oldest.p.len),
            oldest.ready.eq(beat & burst_end),
        ]
        with m.If(beat):
            m.d.sync += index.eq(Mux(burst_end, 0, index + 1))
        with m.If(beat & ~self.o_error & ((axi.rresp != Resp.OKAY) | (axi.rlast != burst_end))):
            m.d.sync += [
                self.o_error.eq(1),
                self.o_error_addr.eq(Cat(Const(0, offset_bits), oldest.p.beat + index)),
            ]

        # 4. queue of beats; what leaves it gives its credit back
        m.submodules.queue = queue = StreamFifo(
            read_layout(self._data_bits), depth=self._fifo_beats, buffered=self._buffered
        )
        m.d.comb += [
            queue.i_data.valid.eq(beat),
            queue.i_data.p.data.eq(axi.rdata),
            queue.i_data.p.last.eq(burst_end & oldest.p.last),
            queue.i_clear.eq(clear),
        ]
        wiring.connect(m, queue.o_data, wiring.flipped(self.o_data))
        returned = self.o_data.valid & self.o_data.ready
        m.d.sync += credit.eq(credit + returned - Mux(issue, burst.p.len + 1, 0))

        # 5. clear
        with m.If(clear):
            m.d.sync += [
                credit.eq(self._fifo_beats),
                self.o_error.eq(0),
                draining.eq(self.i_clear | oldest.valid),
            ]
        m.d.comb += self.o_idle.eq(
            splitter.o_idle & ~oldest.valid & ~queue.o_data.valid & (queue.o_level == 0) & ~clear
        )
        return m
