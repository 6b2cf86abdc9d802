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
from rtl.tlmm_tables import LookupTables, tree_stages
from spec.config import LANES, TlmmConfig
from spec.descriptors import Opcode

__all__ = ["Tlmm", "tlmm_cycles"]

_SUM_BITS = 32
"""Width of a sum in a `MatmulBeat`."""

_RESULT_ROWS = 8
"""Rows of results that wait for ``o_y``: covers the way from the issue of a row to the return of its place."""

_HAZARD_ROWS = 3
"""A row may be issued this many cycles after another on the same accumulators."""


def tlmm_cycles(cfg: TlmmConfig, *, k_blocks: int, row_blocks: int, planes: int = 1, tokens: int = 1) -> int:
    """Cycles from taking an operation to the last beat, when rows are there and ``o_y`` is always ready.

    A pass takes ``row_blocks`` cycles, but not less than the fill of a set of tables; a pass of the last K block, which
    gives 8 results a cycle, takes ``row_blocks * outputs/8``. kv260, 1536 x 1536: 19 K blocks of 96 rows, 1,966 cycles.
    """
    one_pass = max(row_blocks, cfg.fill_cycles, feed_cycles(cfg))
    beats = row_blocks * cfg.outputs // LANES
    start = feed_cycles(cfg) + cfg.fill_cycles + tree_stages(cfg.tables) + 3
    return start + (planes * k_blocks - 1) * tokens * one_pass + (tokens - 1) * max(beats, one_pass) + beats


class Tlmm(wiring.Component):
    """Multiplies an int8 activation tile by a balanced-ternary matrix without multipliers.

    Function
        ``y[m, n] = sum_p 3^p sum_k plane_p[n, k] x[m, k]`` for the M tokens of the tile (1 with ``last_only``)::

            for p in P-1..0: for kb: for token m: tables(m, kb); for nb: acc[m, nb] += lookup(row(p, kb, nb))

        with ``acc = 3*acc`` in front of a plane's first K block. A strip of ``row_blocks`` rows stays in the ring, is
        read for each token, and freed row by row in the last token's pass.
    Streams
        ``i_op``: MATMUL operations, taken only when idle. ``act``: activation tile, written while idle. ``read``: rows
        of the lookup ring. ``o_y``: per token in order, ``row_blocks*outputs/8`` beats of 8 sums.
    Handshake
        ``o_busy`` from the cycle after an operation is taken until its last beat is. ``o_lookup``: a row is issued;
        ``o_starved``: a row would be, but the ring has none; ``o_stalled``: ``o_y`` is held back. ``i_clear`` drops
        all work.
        An operation must keep within ``row_blocks * tokens <= acc_rows``, ``k_blocks <= max_k_blocks`` and, with more
        than one token, ``row_blocks <= ring_rows``.
    Timing
        `tlmm_cycles`: after the first fill (46 cycles for kv260, 28 for sim) a row a cycle; in the last K block
        8 results a cycle.
    Numbers
        Exact; accumulators of ``acc_bits`` cannot overflow, results are sign-extended to 32 bits.
    Cost
        See `LookupTables`; accumulators ``acc_rows x outputs x acc_bits`` block RAM.
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

        # 1. take an operation
        tokens, k_blocks, row_blocks, planes = (
            Signal(range(cfg.tokens + 1)),
            Signal(range(cfg.max_k_blocks + 1)),
            Signal(range(cfg.acc_rows + 1)),
            Signal(3),
        )
        issuing, begin = Signal(), Signal()
        op = self.i_op.payload
        with m.If(self.i_op.valid & self.i_op.ready):
            m.d.sync += [
                tokens.eq(Mux(op.last_only, 1, op.tokens)),
                k_blocks.eq(op.k_blocks),
                row_blocks.eq(op.row_blocks),
                planes.eq(op.planes),
                issuing.eq(1),
                begin.eq(1),
            ]
        with m.Else():
            m.d.sync += begin.eq(0)
        m.d.comb += [
            self.i_op.ready.eq(~self.o_busy),
            feed.i_start.eq(begin),
            feed.i_tokens.eq(tokens),
            feed.i_k_blocks.eq(k_blocks),
            feed.i_planes.eq(planes),
        ]

        # 2. issue rows: row block within token within K block within plane
        issue, want = Signal(), Signal()
        row_block, token, block, plane = (Signal.like(s) for s in (row_blocks, tokens, k_blocks, planes))
        address = Signal(range(cfg.acc_rows))  # accumulators of (token, row block)
        last_row, last_token, last_block, last_plane = Signal(), Signal(), Signal(), Signal()
        emitting = Signal()
        places = Signal(range(_RESULT_ROWS + 1), init=_RESULT_ROWS)  # free places for result rows
        stages = tree_stages(cfg.tables) + 1  # cycles from issue to accumulation
        steps = [_Step(cfg, n) for n in range(stages + 1)]
        few, drained = Signal(), Signal()
        m.d.comb += [
            last_row.eq(row_block == row_blocks - 1),
            last_token.eq(token == tokens - 1),
            last_block.eq(block == k_blocks - 1),
            last_plane.eq(plane == planes - 1),
            emitting.eq(last_plane & last_block),
            few.eq(((row_blocks == 1) & (tokens < _HAZARD_ROWS)) | ((row_blocks == 2) & (tokens == 1))),
            drained.eq(~Cat(step.valid for step in steps[1:]).any()),
            want.eq(issuing & tables.o_ready & (~emitting | (places != 0)) & (~few | drained)),
            issue.eq(want & self.read.valid),
            self.o_lookup.eq(issue),
            self.o_starved.eq(want & ~self.read.valid),
            self.read.en.eq(issue),
            self.read.free.eq(last_token),
            self.read.rewind.eq(last_row & ~last_token),
            tables.i_release.eq(issue & last_row),
            tables.i_valid.eq(steps[1].valid),
        ]
        for bank in range(self._banks):
            m.d.comb += tables.i_codes[bank].eq(self.read.data[bank])
        with m.If(issue):
            m.d.sync += [row_block.eq(row_block + 1), address.eq(address + 1)]
            with m.If(last_row):
                m.d.sync += [row_block.eq(0), token.eq(token + 1)]
                with m.If(last_token):
                    m.d.sync += [token.eq(0), address.eq(0), block.eq(block + 1)]
                    with m.If(last_block):
                        m.d.sync += [block.eq(0), plane.eq(plane + 1)]
                        with m.If(last_plane):
                            m.d.sync += [plane.eq(0), issuing.eq(0)]

        # 3. side data of a row on its way through the tables and the tree
        m.d.comb += [
            steps[0].valid.eq(issue),
            steps[0].address.eq(address),
            steps[0].first.eq((block == 0) & (plane == 0)),
            steps[0].triple.eq((block == 0) & (plane != 0)),
            steps[0].emit.eq(emitting),
            steps[0].token.eq(token),
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

        # 5. emit: rows of the last pass, 8 sums a beat
        emit_layout = data.StructLayout({"sums": row_layout, "token": TOKEN_BITS})
        m.submodules.results = results = StreamFifo(emit_layout, depth=_RESULT_ROWS)
        beats = cfg.outputs // LANES
        beat = Signal(range(max(2, beats)))
        taken, row_taken = Signal(), Signal()
        m.d.comb += [
            results.i_clear.eq(self.i_clear),
            results.i_data.valid.eq(add.valid & add.emit),
            results.i_data.payload.sums.eq(result),
            results.i_data.payload.token.eq(add.token),
            self.o_y.valid.eq(results.o_data.valid),
            self.o_y.payload.token.eq(results.o_data.payload.token),
            taken.eq(self.o_y.valid & self.o_y.ready),
            row_taken.eq(taken & (beat == beats - 1)),
            results.o_data.ready.eq(row_taken),
            self.o_stalled.eq(self.o_y.valid & ~self.o_y.ready),
        ]
        for lane in range(LANES):
            # every multiplexer is as wide as the port: a sign extension behind it looks like a loop to Verilator
            chosen = Signal(signed(_SUM_BITS), name=f"chosen_{lane}")
            for number in range(beats):
                following = Signal(signed(_SUM_BITS), name=f"chosen_{lane}_{number}")
                value = results.o_data.payload.sums[LANES * number + lane]
                m.d.comb += following.eq(Mux(beat == number, value, chosen))
                chosen = following
            m.d.comb += self.o_y.payload.sums[lane].eq(chosen)
        with m.If(taken):
            m.d.sync += beat.eq(Mux(row_taken, 0, beat + 1))
        m.d.sync += places.eq(places - (issue & emitting) + row_taken)
        m.d.comb += self.o_busy.eq(issuing | (places != _RESULT_ROWS))

        with m.If(self.i_clear):
            m.d.sync += [issuing.eq(0), begin.eq(0), places.eq(_RESULT_ROWS), beat.eq(0)]
            m.d.sync += [row_block.eq(0), token.eq(0), block.eq(0), plane.eq(0), address.eq(0)]
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
