"""AXI4 write master, and several writers that share it."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from rtl.bus.axi import CACHE_NORMAL, Axi4WriteSignature, Burst, Resp
from rtl.bus.burst import (
    BEATS_BITS,
    BurstSplitter,
    burst_layout,
    check_burst,
    command_layout,
    write_layout,
)
from rtl.lib.fifo import StreamFifo
from rtl.lib.round_robin import RoundRobin

__all__ = ["BurstWriter", "WriteMux"]


class BurstWriter(wiring.Component):
    """Write memory by AXI4 bursts, with several bursts in flight.

    Function
        For each command {addr, beats} in order: the next ``beats`` beats of ``i_data`` go to
        memory[addr + i * beat_bytes], bytes with strobe 0 stay as they are.
    Streams
        ``i_cmd`` in: `command_layout`, ``addr`` a multiple of the beat (lower bits are ignored).
        ``i_data`` in: `write_layout`. ``m_axi``: AXI4 write channels, one ID, INCR bursts only.
    Handshake
        ``i_data`` is taken only after its command. An address may be issued before its data exist,
        so a client that commands must deliver, or the bus stands still.
        ``o_idle`` = 1: no command inside and every response received: a write fence. It falls in
        the cycle after a command was taken.
        ``i_clear`` = 1 (one cycle or more) drops commands and the error; bursts already issued are
        completed with strobes 0 and nothing is taken until their responses came (``o_idle`` = 1).
        On a response other than OKAY ``o_error`` becomes 1 and ``o_error_addr`` the byte address
        of the first such burst; data flows on.
    Timing
        A command reaches AWVALID 3 cycles after its transfer, a beat reaches WVALID after 1.
        One beat a cycle while ``max_outstanding`` bursts cover the memory's response latency.
    Cost
        One register a beat, two queues of ``max_outstanding`` entries.
    Twins
        Test: ``tests/test_bus.py``; bench: ``cosim/bench_axi.py``.

    Parameters
    ----------
    data_bits, addr_bits, id_bits
        Widths of the bus.
    max_burst
        Beats of the longest burst, a power of two; bursts end on multiples of it.
    max_outstanding
        Bursts without response, a power of two.
    """

    i_cmd: stream.Interface
    i_data: stream.Interface
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
    ) -> None:
        check_burst(data_bits, max_burst)
        self._data_bits = data_bits
        self._beat_bytes = data_bits // 8
        self._max_outstanding = max_outstanding
        self._addr_bits = addr_bits
        self._max_burst = max_burst
        self._burst = burst_layout(addr_bits, data_bits, max_burst)
        super().__init__(
            {
                "i_cmd": In(stream.Signature(command_layout(addr_bits))),
                "i_data": In(stream.Signature(write_layout(data_bits))),
                "m_axi": Out(
                    Axi4WriteSignature(addr_bits=addr_bits, data_bits=data_bits, id_bits=id_bits)
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

        # 2. issue: one note for the data (length), one for the response (address)
        m.submodules.lengths = lengths = StreamFifo(
            self._burst["len"].shape, depth=self._max_outstanding
        )
        m.submodules.responses = responses = StreamFifo(
            self._burst["beat"].shape, depth=self._max_outstanding
        )
        issue = Signal()
        m.d.comb += [
            issue.eq(
                burst.valid
                & ~clear
                & lengths.i_data.ready
                & responses.i_data.ready
                & (~axi.awvalid | axi.awready)
            ),
            burst.ready.eq(issue),
            lengths.i_data.valid.eq(issue),
            lengths.i_data.payload.eq(burst.p.len),
            responses.i_data.valid.eq(issue),
            responses.i_data.payload.eq(burst.p.beat),
            axi.awid.eq(0),
            axi.awsize.eq(offset_bits),
            axi.awburst.eq(Burst.INCR),
            axi.awcache.eq(CACHE_NORMAL),
            axi.awprot.eq(0),
        ]
        with m.If(axi.awready):
            m.d.sync += axi.awvalid.eq(0)
        with m.If(issue):
            m.d.sync += [
                axi.awvalid.eq(1),
                axi.awaddr.eq(Cat(Const(0, offset_bits), burst.p.beat)),
                axi.awlen.eq(burst.p.len),
            ]

        # 3. data, through one register; a clear fills up with empty beats
        index = Signal(self._burst["len"].shape)
        room = Signal()
        load = Signal()
        burst_end = Signal()
        m.d.comb += [
            room.eq(lengths.o_data.valid & (~axi.wvalid | axi.wready)),
            self.i_data.ready.eq(room & ~clear),
            load.eq(room & Mux(clear, draining, self.i_data.valid)),
            burst_end.eq(index == lengths.o_data.payload),
            lengths.o_data.ready.eq(load & burst_end),
        ]
        with m.If(axi.wready):
            m.d.sync += axi.wvalid.eq(0)
        with m.If(load):
            m.d.sync += [
                axi.wvalid.eq(1),
                axi.wdata.eq(self.i_data.p.data),
                axi.wstrb.eq(Mux(draining, 0, self.i_data.p.strb)),
                axi.wlast.eq(burst_end),
                index.eq(Mux(burst_end, 0, index + 1)),
            ]

        # 4. responses
        m.d.comb += [
            axi.bready.eq(1),
            responses.o_data.ready.eq(axi.bvalid),
        ]
        with m.If(axi.bvalid & responses.o_data.valid & ~self.o_error & (axi.bresp != Resp.OKAY)):
            m.d.sync += [
                self.o_error.eq(1),
                self.o_error_addr.eq(Cat(Const(0, offset_bits), responses.o_data.payload)),
            ]

        # 5. clear
        open_bursts = lengths.o_data.valid | responses.o_data.valid | axi.wvalid
        with m.If(clear):
            m.d.sync += [
                self.o_error.eq(0),
                draining.eq(self.i_clear | open_bursts),
            ]
        m.d.comb += self.o_idle.eq(splitter.o_idle & ~open_bursts & ~clear)
        return m


class WriteMux(wiring.Component):
    """Take write commands of ``n`` clients in turn, each with its data.

    Function
        Commands go to ``o_cmd`` round robin, one command at a time; the beats of the client whose
        command is the oldest go to ``o_data`` until the command is complete. Commands of 0 beats
        end here.
    Streams
        ``i_cmd[n]`` in and ``o_cmd`` out: `command_layout`; ``i_data[n]`` in and ``o_data`` out:
        `write_layout`. ``o_cmd`` and ``o_data`` belong to a `BurstWriter`.
    Handshake
        While the client in turn delivers no data, the others wait (head-of-line blocking): a client
        commands only what it can deliver. ``i_clear`` = 1 together with the writer's drops all;
        nothing is taken then. ``o_idle`` = 1: the data of every command were taken. The fence for
        all clients is ``o_idle`` of the mux and of the writer.
    Timing
        A command 1 cycle, a beat 0 cycles (combinational). One beat a cycle, across commands too.
    Cost
        A queue of ``order_depth`` entries, a multiplexer of n beats.
    Twins
        Test: ``tests/test_bus.py``.
    """

    i_cmd: list[stream.Interface]
    i_data: list[stream.Interface]
    o_cmd: stream.Interface
    o_data: stream.Interface
    i_clear: Signal
    o_idle: Signal

    def __init__(
        self, n: int, *, data_bits: int, addr_bits: int = 40, order_depth: int = 8
    ) -> None:
        if n < 1:
            raise ValueError(f"WriteMux needs at least 1 client, not {n}")
        self._n = n
        self._order_depth = order_depth
        command = stream.Signature(command_layout(addr_bits))
        beat = stream.Signature(write_layout(data_bits))
        super().__init__(
            {
                "i_cmd": In(command).array(n),
                "i_data": In(beat).array(n),
                "o_cmd": Out(command),
                "o_data": Out(beat),
                "i_clear": In(1),
                "o_idle": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()

        # 1. commands: round robin into a register, the order noted
        m.submodules.order = order = StreamFifo(
            data.StructLayout({"client": range(self._n), "beats": BEATS_BITS}),
            depth=self._order_depth,
        )
        m.submodules.arbiter = arbiter = RoundRobin(self._n)
        accept = Signal()
        m.d.comb += [
            accept.eq((~self.o_cmd.valid | self.o_cmd.ready) & order.i_data.ready & ~self.i_clear),
            arbiter.i_next.eq(accept),
            order.i_data.p.client.eq(arbiter.o_index),
            order.i_data.valid.eq(accept & order.i_data.p.beats.any()),
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
                m.d.comb += order.i_data.p.beats.eq(client.p.beats)
                m.d.sync += [
                    self.o_cmd.valid.eq(client.p.beats.any()),
                    self.o_cmd.payload.eq(client.payload),
                ]

        # 2. data of the oldest command
        owner = order.o_data
        done_beats = Signal(BEATS_BITS)
        taken = Signal()
        last = Signal()
        payload = self.i_data[0].payload.as_value()
        for index, client in enumerate(self.i_data):
            mine = Signal(name=f"mine_{index}")
            m.d.comb += [
                mine.eq(owner.valid & ~self.i_clear & (owner.p.client == index)),
                client.ready.eq(self.o_data.ready & mine),
            ]
            with m.If(mine):
                m.d.comb += self.o_data.valid.eq(client.valid)
            if index:
                payload = Mux(mine, client.payload.as_value(), payload)
        m.d.comb += [
            self.o_data.payload.eq(payload),
            taken.eq(self.o_data.valid & self.o_data.ready),
            last.eq(done_beats + 1 == owner.p.beats),
            owner.ready.eq(taken & last),
            self.o_idle.eq(~owner.valid & ~self.o_cmd.valid),
        ]
        with m.If(taken):
            m.d.sync += done_beats.eq(Mux(last, 0, done_beats + 1))

        with m.If(self.i_clear):
            m.d.sync += [self.o_cmd.valid.eq(0), done_beats.eq(0)]
        return m
