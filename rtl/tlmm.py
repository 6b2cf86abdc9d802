"""Ternary table-lookup matmul engine (TeLLMe's TLMM) with bit planes for wider weights."""

from itertools import pairwise

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out, connect, flipped

from rtl.lib.fifo import StreamFifo
from rtl.lib.ops import op_layout
from rtl.lib.ports import TOKEN_BITS, ActivationWrite, MatmulBeat
from rtl.lookup_ring import CODE_BITS, ring_read
from rtl.tlmm_feed import ActivationFeed, feed_cycles
from rtl.tlmm_order import PassOrder, pass_shape
from rtl.tlmm_tables import LookupTables, tree_stages
from spec.config import LANES, TlmmConfig
from spec.descriptors import Opcode

__all__ = ["Tlmm", "steady_cycles", "tlmm_cycles"]

_SUM_BITS = 32
"""Width of a sum in a `MatmulBeat`."""

_HAZARD_ROWS = 3
"""A row may be issued this many cycles after another on the same accumulators."""


def tlmm_cycles(cfg: TlmmConfig, *, k_blocks: int, row_blocks: int, planes: int = 1, tokens: int = 1) -> int:
    """Cycles from taking an operation to the last beat, when rows are there, ``o_y`` is always ready, nothing ran before.

    A pass takes ``row_blocks`` cycles, but not less than the fill of a set of tables. Results of a token leave at 8 sums a
    cycle from its last pass on; a pass that gives more of them than wait for room is held up. kv260, 1536 x 1536: 19 K
    blocks of 96 rows, 1,966 cycles for a token, 18,382 for 10.
    """
    one_pass = _pass_cycles(cfg, row_blocks)
    group = cfg.last_group(k_blocks, row_blocks)
    beats = row_blocks * cfg.row_beats
    way = tree_stages(cfg.tables) + 3  # from the issue of a row to its first beat
    start = feed_cycles(cfg) + cfg.fill_cycles + way
    held_up = max(one_pass, way + 1 + (row_blocks - cfg.result_rows) * cfg.row_beats)  # a pass that gives results
    a_token = max((group - 1) * one_pass + held_up, beats)
    return start + ((planes * k_blocks - group) * tokens + group - 1) * one_pass + (tokens - 1) * a_token + beats


def steady_cycles(cfg: TlmmConfig, *, k_blocks: int, row_blocks: int, planes: int = 1, tokens: int = 1) -> int:
    """Cycles from the last beat of an operation to that of an equal one that waited behind it.

    Rows are there, ``o_y`` is always ready, and `TlmmConfig.result_rows` hold what a token's last pass leaves behind.
    kv260, 1536 x 1536: the lookups, 1,824 a token.
    """
    passes = planes * k_blocks * tokens
    return max(passes * _pass_cycles(cfg, row_blocks), tokens * row_blocks * cfg.row_beats)


def _pass_cycles(cfg: TlmmConfig, row_blocks: int) -> int:
    return max(row_blocks, cfg.fill_cycles, feed_cycles(cfg))


class Tlmm(wiring.Component):
    """Multiplies an int8 activation tile by a balanced-ternary matrix without multipliers.

    Function
        ``y[m, n] = sum_p 3^p sum_k plane_p[n, k] x[m, k]`` for the M tokens of the tile (1 with ``last_only``)::

            for p in P-1..0: for kb: for token m: tables(m, kb); for nb: acc[m, nb] += lookup(row(p, kb, nb))

        with ``acc = 3*acc`` in front of a plane's first K block. A strip of ``row_blocks`` rows stays in the ring, is
        read for each token, and freed row by row in the last token's pass. The last K blocks are one group that a token
        takes as a whole (`PassOrder`): so results, 8 sums a beat, leave while the next token accumulates.
    Streams
        ``i_op``: MATMUL operations; the next is taken while one runs. ``act``: activation tile. ``read``: rows of the
        lookup ring. ``o_y``: operations in order, in each tokens in order, ``row_blocks*outputs/8`` beats of 8 sums.
    Handshake
        ``i_op.ready``: no operation that was taken will read the activation tile any more. The activations of an
        operation are written while it is high and before the operation is offered (so at any time while not ``o_busy``);
        an operation without writes before it has those of the one before. ``o_busy`` from the cycle after an operation is
        taken until the last beat of all is. ``o_lookup``: a row is issued; ``o_starved``: a row would be, but the ring
        has none; ``o_stalled``: ``o_y`` is held back. ``i_clear`` drops all work.
        An operation must keep within ``row_blocks * tokens <= acc_rows``, ``k_blocks <= max_k_blocks`` and, with more
        than one token, ``row_blocks <= ring_rows``.
    Timing
        `tlmm_cycles` for one alone: after the first fill (46 cycles for kv260, 28 for sim) a row a cycle, and at the end
        the results of the last row blocks. `steady_cycles` for one behind another: a row a cycle.
    Numbers
        Exact; accumulators of ``acc_bits`` cannot overflow, results are sign-extended to 32 bits.
    Cost
        See `LookupTables`; accumulators ``acc_rows``, results ``result_rows x outputs x acc_bits`` block RAM.
    Twins
        golden/tlmm.py; test: tests/test_tlmm.py, cosim/bench_tlmm.py.
    """

    i_op: stream.Interface
    act: wiring.FlippedInterface
    read: wiring.PureInterface
    o_y: stream.Interface
    i_clear: Signal
    o_busy: Signal
    o_lookup: Signal
    o_starved: Signal
    o_stalled: Signal

    def __init__(self, cfg: TlmmConfig, *, weight_bytes: int) -> None:
        self._cfg = cfg
        self._banks = cfg.cells // weight_bytes
        super().__init__(
            {
                "i_op": In(stream.Signature(op_layout(Opcode.MATMUL))),
                "act": In(ActivationWrite),
                "read": Out(ring_read(self._banks, CODE_BITS * weight_bytes)),
                "o_y": Out(stream.Signature(MatmulBeat)),
                "i_clear": In(1),
                "o_busy": Out(1),
                "o_lookup": Out(1),
                "o_starved": Out(1),
                "o_stalled": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        cfg = self._cfg
        m.submodules.feed = feed = ActivationFeed(cfg)
        m.submodules.tables = tables = LookupTables(cfg, banks=self._banks)
        connect(m, flipped(self.act), feed.act)
        connect(m, feed.o_block, tables.i_block)
        m.d.comb += [feed.i_clear.eq(self.i_clear), tables.i_clear.eq(self.i_clear)]

        # 1. take an operation: the collector begins with it, the issue of rows when that of the one before has ended
        m.submodules.order = order = PassOrder(cfg)
        shape, row_blocks = Signal(pass_shape(cfg)), Signal(range(cfg.acc_rows + 1))
        waiting, waiting_shape, waiting_row_blocks = Signal(), Signal.like(shape), Signal.like(row_blocks)
        taken, load, ended = Signal(), Signal(), Signal()
        op = self.i_op.payload
        m.d.comb += [
            self.i_op.ready.eq(feed.o_ready & ~waiting),
            taken.eq(self.i_op.valid & self.i_op.ready),
            shape.tokens.eq(Mux(op.last_only, 1, op.tokens)),
            shape.k_blocks.eq(op.k_blocks),
            shape.planes.eq(op.planes),
            shape.group.eq(Mux(op.row_blocks > cfg.group_rows, 1, Mux(op.k_blocks < cfg.row_beats, op.k_blocks, cfg.row_beats))),
            feed.i_start.eq(taken),
            feed.i_shape.eq(shape),
            load.eq(waiting & (~order.o_active | ended)),
            order.i_start.eq(load),
            order.i_shape.eq(waiting_shape),
            order.i_clear.eq(self.i_clear),
        ]
        with m.If(load):
            m.d.sync += [waiting.eq(0), row_blocks.eq(waiting_row_blocks)]
        with m.If(taken):
            m.d.sync += [waiting.eq(1), waiting_shape.eq(shape), waiting_row_blocks.eq(op.row_blocks)]

        # 2. issue rows, pass by pass
        issue, want = Signal(), Signal()
        row_block = Signal.like(row_blocks)
        address, token_address = Signal(range(cfg.acc_rows)), Signal(range(cfg.acc_rows))  # of the row, of the token's first
        last_row = Signal()
        places = Signal(range(cfg.result_rows + 1), init=cfg.result_rows)  # free places for result rows
        stages = tree_stages(cfg.tables) + 1  # cycles from issue to accumulation
        steps = [_Step(cfg, n) for n in range(stages + 1)]
        hazard, drained = Signal(), Signal()
        m.d.comb += [
            last_row.eq(row_block == row_blocks - 1),
            # a pass this short may follow one on the same accumulators before they are written
            hazard.eq((row_blocks < _HAZARD_ROWS) & (row_block == 0)),
            drained.eq(~Cat(step.valid for step in steps[1:]).any()),
            want.eq(order.o_active & tables.o_ready & (~order.o_emit | (places != 0)) & (~hazard | drained)),
            issue.eq(want & self.read.valid),
            self.o_lookup.eq(issue),
            self.o_starved.eq(want & ~self.read.valid),
            self.read.en.eq(issue),
            self.read.free.eq(order.o_last_token),
            self.read.rewind.eq(last_row & order.o_ends & ~order.o_last_token),
            tables.i_release.eq(issue & last_row),
            tables.i_valid.eq(steps[1].valid),
            order.i_next.eq(issue & last_row),
            ended.eq(order.i_next & order.o_last),
        ]
        for bank in range(self._banks):
            m.d.comb += tables.i_codes[bank].eq(self.read.data[bank])
        with m.If(issue):
            m.d.sync += [row_block.eq(row_block + 1), address.eq(address + 1)]
            with m.If(last_row):
                m.d.sync += [row_block.eq(0), address.eq(token_address)]
                with m.If(order.o_ends):
                    following = Mux(order.o_last_token, 0, address + 1)
                    m.d.sync += [address.eq(following), token_address.eq(following)]

        # 3. side data of a row on its way through the tables and the tree
        m.d.comb += [
            steps[0].valid.eq(issue),
            steps[0].address.eq(address),
            steps[0].first.eq(order.o_first),
            steps[0].triple.eq(order.o_triple),
            steps[0].emit.eq(order.o_emit),
            steps[0].token.eq(order.o_token),
        ]
        for before, after in pairwise(steps):
            m.d.sync += after.valid.eq(before.valid)
            with m.If(before.valid):
                m.d.sync += [
                    after.address.eq(before.address),
                    after.first.eq(before.first),
                    after.triple.eq(before.triple),
                    after.emit.eq(before.emit),
                    after.token.eq(before.token),
                ]

        # 4. accumulate: read, prepare, add and write
        fetch, prepare, add = steps[-3], steps[-2], steps[-1]
        row_layout = data.ArrayLayout(signed(cfg.acc_bits), cfg.outputs)
        result = Signal(row_layout)
        m.submodules.accumulators = memory = Memory(shape=row_layout, depth=cfg.acc_rows, init=[])
        acc_read, acc_write = memory.read_port(), memory.write_port()
        m.d.comb += [
            acc_read.en.eq(fetch.valid),
            acc_read.addr.eq(fetch.address),
            acc_write.en.eq(add.valid & ~add.emit),
            acc_write.addr.eq(add.address),
            acc_write.data.eq(result),
        ]
        for q in range(cfg.outputs):
            base = Signal(signed(cfg.acc_bits), name=f"base_{q}", reset_less=True)
            with m.If(prepare.valid):
                old = acc_read.data[q]
                m.d.sync += base.eq(Mux(prepare.first, 0, old + Mux(prepare.triple, old << 1, 0)))
            m.d.comb += result[q].eq(sum(tables.o_sums[q], base))

        # 5. emit: finished rows wait for their turn, 8 sums a beat
        emit_layout = data.StructLayout({"sums": row_layout, "token": TOKEN_BITS})
        m.submodules.results = results = StreamFifo(emit_layout, depth=cfg.result_rows, buffered=True)
        beat = Signal(range(max(2, cfg.row_beats)))
        leaving, row_left = Signal(), Signal()
        m.d.comb += [
            results.i_clear.eq(self.i_clear),
            results.i_data.valid.eq(add.valid & add.emit),
            results.i_data.payload.sums.eq(result),
            results.i_data.payload.token.eq(add.token),
            self.o_y.valid.eq(results.o_data.valid),
            self.o_y.payload.token.eq(results.o_data.payload.token),
            leaving.eq(self.o_y.valid & self.o_y.ready),
            row_left.eq(leaving & (beat == cfg.row_beats - 1)),
            results.o_data.ready.eq(row_left),
            self.o_stalled.eq(self.o_y.valid & ~self.o_y.ready),
        ]
        for lane in range(LANES):
            # every multiplexer is as wide as the port: a sign extension behind it looks like a loop to Verilator
            chosen = Signal(signed(_SUM_BITS), name=f"chosen_{lane}")
            for number in range(cfg.row_beats):
                following = Signal(signed(_SUM_BITS), name=f"chosen_{lane}_{number}")
                value = results.o_data.payload.sums[LANES * number + lane]
                m.d.comb += following.eq(Mux(beat == number, value, chosen))
                chosen = following
            m.d.comb += self.o_y.payload.sums[lane].eq(chosen)
        with m.If(leaving):
            m.d.sync += beat.eq(Mux(row_left, 0, beat + 1))
        m.d.sync += places.eq(places - (issue & order.o_emit) + row_left)
        m.d.comb += self.o_busy.eq(waiting | order.o_active | (places != cfg.result_rows))

        with m.If(self.i_clear):
            m.d.sync += [waiting.eq(0), row_block.eq(0), address.eq(0), token_address.eq(0)]
            m.d.sync += [places.eq(cfg.result_rows), beat.eq(0)]
            m.d.sync += [step.valid.eq(0) for step in steps[1:]]
        return m


class _Step:
    """Side data of a row, ``number`` cycles after its issue."""

    def __init__(self, cfg: TlmmConfig, number: int) -> None:
        self.valid = Signal(name=f"valid_{number}")
        self.address = Signal(range(cfg.acc_rows), name=f"address_{number}")
        self.first = Signal(name=f"first_{number}")  # the accumulators begin at 0
        self.triple = Signal(name=f"triple_{number}")  # a plane begins
        self.emit = Signal(name=f"emit_{number}")  # the sums are results
        self.token = Signal(range(cfg.tokens + 1), name=f"token_{number}")
