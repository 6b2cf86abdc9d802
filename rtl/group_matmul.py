"""Matmul engine of group-quantised weights: one of three cores for the integer sums, and all around it."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import ceil_log2

from rtl.group_accumulators import BUFFERS, GroupAccumulators, sum_place
from rtl.group_core import NibbleCore
from rtl.group_dequant import EXPONENT_BITS, GroupDequant, PassScales
from rtl.group_feed import GroupFeed
from rtl.group_stream import scale_read
from rtl.lib.fifo import StreamFifo
from rtl.lib.ops import op_layout
from rtl.lib.ports import GroupScaleWrite, activation_write, matmul_beat
from rtl.lookup_ring import ring_read
from rtl.lut_tensor_core import LutTensorCore
from rtl.mixpe import MixPe
from rtl.multiplier import MultiplierCore
from rtl.table_feed import TableFeed
from spec.config import LANES, GroupEngine, GroupMatmulConfig
from spec.descriptors import Opcode

__all__ = ["CORES", "GroupMatmul"]

Core = LutTensorCore | NibbleCore

CORES: dict[GroupEngine, type[LutTensorCore] | type[NibbleCore]] = {
    GroupEngine.LUT_TENSOR_CORE: LutTensorCore,
    GroupEngine.MIXPE: MixPe,
    GroupEngine.MULTIPLIER: MultiplierCore,
}
"""What computes the integer sums of a group."""

_BLOCK_COUNT_BITS = 16
"""Of the descriptor: any number of row blocks, as sums leave block by block."""


class GroupMatmul(wiring.Component):
    """Multiplies a tile of int8 activations, scaled by groups of 32, by a matrix of codes, scaled by groups of 32.

    Function
        The accumulators of docs/numerics.md section 3b for the M tokens of the tile (1 with ``last_only``). A block is
        ``lanes`` outputs by 32 inputs, a pass one token of a block::

            for nb: for g: for token m: (S of the pass by its ``planes`` code rows); acc[m, nb] += dequantised S

        The code rows of a block stay in the ring, are read for each token, and freed in the last token's pass.
    Streams
        ``i_op``: MATMUL operations; used are planes (bits of a weight), k_blocks, row_blocks, tokens, last_only and
        exponent. ``act``, ``group_scale``: activation tile, see `GroupFeed`. ``codes``, ``scales``: see `GroupStream`.
        ``o_y``: for nb, for token: lanes/8 beats of 8 sums of ``acc_bits``.
    Handshake
        An operation is taken as soon as the last code row of the one before is issued (``i_op.ready``); results of the
        two do not mix. The tile may be written only while ``i_op.ready`` is 1, and must be complete before the cycle
        in which its operation is taken. ``o_busy`` from the cycle after an operation is taken until its last beat
        is. ``o_lookup``: a code row is issued; ``o_starved``: one would be, but the ring has none; ``o_stalled``: ``o_y``
        is held back. ``i_clear`` drops all work but the tile; ``i_op.ready`` is 0 until the pipeline has run dry.
        An operation must keep within ``k_blocks <= max_k_blocks``, ``tokens`` of the config, ``planes`` in
        ``weight_bits``.
    Timing
        A pass takes max(planes, slices) cycles, from pass to pass without a gap. Row block nb leaves, 8 sums a cycle,
        while nb + 1 is computed; nb + 2 waits until all rows of nb have left for the output register.
    Numbers
        Exact but for the two right shifts of numerics 3b; nothing overflows (`GroupMatmulConfig.acc_bits`).
    Cost
        See the parts: `GroupFeed`, the core, `GroupDequant`, `GroupAccumulators`.
    Twins
        golden/group_dequant.py; test: tests/test_group_matmul.py, cosim/bench_group_matmul.py.

    Parameters
    ----------
    core
        Computes the integer sums; by default the one that ``cfg.engine`` names.
    feed
        The activation tile, which must hold what the core takes. With a `TableFeed` there is no ``group_scale``, and the tile
        may be written until the operation is offered: it is taken when the tables are made.
    """

    i_op: stream.Interface
    act: wiring.FlippedInterface
    group_scale: wiring.FlippedInterface
    codes: wiring.PureInterface
    scales: wiring.PureInterface
    o_y: stream.Interface
    i_clear: Signal
    o_busy: Signal
    o_lookup: Signal
    o_starved: Signal
    o_stalled: Signal

    def __init__(self, cfg: GroupMatmulConfig, *, core: Core | None = None, feed: GroupFeed | None = None) -> None:
        self._cfg = cfg
        self._core = core or CORES[cfg.engine](cfg)
        self._feed = feed or GroupFeed(cfg)
        if self._feed.group_bits != self._core.act_bits:
            raise ValueError(f"the core takes {self._core.act_bits} bits of a group, the feed holds {self._feed.group_bits}")
        self._makes_tables = isinstance(self._feed, TableFeed)
        super().__init__(
            {
                "i_op": In(stream.Signature(op_layout(Opcode.MATMUL))),
                "act": In(activation_write(self._feed.act_bits)),
                **({} if self._makes_tables else {"group_scale": In(GroupScaleWrite)}),
                "codes": Out(ring_read(1, 8 * cfg.row_bytes)),
                "scales": Out(scale_read(8 * cfg.row_bytes)),
                "o_y": Out(stream.Signature(matmul_beat(cfg.acc_bits))),
                "i_clear": In(1),
                "o_busy": Out(1),
                "o_lookup": Out(1),
                "o_starved": Out(1),
                "o_stalled": Out(1),
            }
        )

    def cycles(self, *, bits: int, k_blocks: int, row_blocks: int, tokens: int = 1) -> int:
        """Cycles from taking an operation to the last beat, when rows are there and ``o_y`` is always ready.

        Long operations: ``row_blocks * k_blocks * tokens * max(bits, slices)`` and the beats of the last row block.
        """
        cfg = self._cfg
        beats, pitch = cfg.dequant_lanes // LANES, max(bits, cfg.slices)
        issue, left = 1, 0  # cycle of the next pass's first row; cycle of the last beat so far
        fetched = [0, 0]  # cycles in which the last row of a row block left its buffer
        for _ in range(row_blocks):
            issue = max(issue, fetched[-2] + 1)
            for token in range(tokens):
                first = issue + ((k_blocks - 1) * tokens + token) * pitch
                for part in range(cfg.slices):
                    done = first + 1 + self._slice_cycle(part, bits) + GroupDequant.latency
                    left = max(done + 1, left) + beats
            fetched.append(left - beats)
            issue += k_blocks * tokens * pitch
        return left + 1  # the output register

    def _slice_cycle(self, part: int, bits: int) -> int:
        """Cycles from a pass's first row at the core to a slice of its sums."""
        rows = bits // 4  # of a slice, in the 4-bit cores
        row = bits - 1 + part if self._cfg.engine is GroupEngine.LUT_TENSOR_CORE else rows * (part + 1) - 1
        return row + self._core.latency

    def elaborate(self, platform: object) -> Module:
        m = Module()
        cfg, slices = self._cfg, self._cfg.slices
        place_layout = sum_place(cfg)
        pass_layout = data.StructLayout({"scales": PassScales, "place": place_layout, "new_block": 1})
        m.submodules.feed = feed = self._feed
        m.submodules.core = core = self._core
        m.submodules.dequant = dequant = GroupDequant(cfg, place_layout)
        m.submodules.accumulators = accumulators = GroupAccumulators(cfg)
        # passes between the issue of their first row and the dequantisation of their last slice
        m.submodules.passes = passes = StreamFifo(pass_layout, depth=1 << ceil_log2(core.latency + slices + 2))
        connect(m, flipped(self.act), feed.act)
        if not self._makes_tables:
            connect(m, flipped(self.group_scale), feed.scale)
        connect(m, accumulators.o_y, flipped(self.o_y))
        m.d.comb += [passes.i_clear.eq(self.i_clear), accumulators.i_clear.eq(self.i_clear)]

        # 1. take an operation
        tokens, k_blocks, row_blocks, bits, exponent = (
            Signal(range(cfg.tokens + 1)),
            Signal(range(cfg.max_k_blocks + 1)),
            Signal(_BLOCK_COUNT_BITS),
            Signal(range(max(cfg.weight_bits) + 1)),
            Signal(EXPONENT_BITS),
        )
        issuing = Signal()
        most_dry = core.latency + slices + dequant.latency + 2
        dry = Signal(range(most_dry + 1))  # cycles until nothing cleared comes out of the pipeline
        op = self.i_op.payload
        ready = ~issuing & (dry == 0)
        m.d.comb += self.i_op.ready.eq(ready & ~feed.o_busy if isinstance(feed, TableFeed) else ready)
        with m.If(self.i_op.valid & self.i_op.ready):
            m.d.sync += [
                tokens.eq(Mux(op.last_only, 1, op.tokens)),
                k_blocks.eq(op.k_blocks),
                row_blocks.eq(op.row_blocks),
                bits.eq(op.planes),
                exponent.eq(op.exponent),
                issuing.eq(1),
            ]
        with m.If(dry != 0):
            m.d.sync += dry.eq(dry - 1)

        # 2. issue code rows: row within token within group within row block
        row, token, block, row_block = (Signal.like(s) for s in (bits, tokens, k_blocks, row_blocks))
        leaving = Signal(range(max(2, slices)))  # slices of the last pass that have not left: the next must end behind them
        want, issue, first_row, last_row, last_token, last_block, first_pass = (
            Signal(name=name)
            for name in ("want", "issue", "first_row", "last_row", "last_token", "last_block", "first_pass")
        )
        m.d.comb += [
            first_row.eq(row == 0),
            last_row.eq(row == bits - 1),
            last_token.eq(token == tokens - 1),
            last_block.eq(block == k_blocks - 1),
            first_pass.eq((token == 0) & (block == 0)),
            want.eq(issuing & (~first_row | ((leaving < bits) & (accumulators.o_room | ~first_pass)))),
            issue.eq(want & self.codes.valid),
            self.o_lookup.eq(issue),
            self.o_starved.eq(want & ~self.codes.valid),
            self.codes.en.eq(issue),
            self.codes.free.eq(last_token),
            self.codes.rewind.eq(last_row & ~last_token),
            feed.i_en.eq(issue & first_row),
            feed.i_token.eq(token),
            feed.i_group.eq(block),
            accumulators.i_begin.eq(issue & first_row & first_pass),
            accumulators.i_tokens.eq(tokens),
        ]
        with m.If(leaving != 0):
            m.d.sync += leaving.eq(leaving - 1)
        with m.If(issue):
            m.d.sync += row.eq(row + 1)
            with m.If(last_row):
                m.d.sync += [row.eq(0), token.eq(token + 1), leaving.eq(slices - 1)]
                with m.If(last_token):
                    m.d.sync += [token.eq(0), block.eq(block + 1)]
                    with m.If(last_block):
                        m.d.sync += [block.eq(0), row_block.eq(row_block + 1)]
                        with m.If(row_block == row_blocks - 1):
                            m.d.sync += [row_block.eq(0), issuing.eq(0)]

        # 3. in the next cycle code row and activations are there
        arriving, arrived_first, arrived_last, arrived_row = Signal(), Signal(), Signal(), Signal.like(row)
        arrived_start, arrived_end, arrived_new, arrived_token = Signal(), Signal(), Signal(), Signal.like(token)
        strip = Signal(range(BUFFERS * cfg.tokens * slices))  # first accumulator row of the row block
        strip_next = Mux(accumulators.o_buffer, cfg.tokens * slices, 0)
        m.d.sync += arriving.eq(issue)
        with m.If(issue):
            m.d.sync += [arrived_first.eq(first_row), arrived_last.eq(last_row), arrived_row.eq(row)]
            with m.If(first_row):
                m.d.sync += [
                    arrived_start.eq(block == 0),
                    arrived_end.eq(last_block),
                    arrived_new.eq(token == 0),
                    arrived_token.eq(token),
                ]
                with m.If(first_pass):
                    m.d.sync += strip.eq(strip_next)
        m.d.comb += [
            core.i_valid.eq(arriving),
            core.i_first.eq(arrived_first),
            core.i_last.eq(arrived_last),
            core.i_row.eq(arrived_row),
            core.i_codes.eq(self.codes.data[0]),
            core.i_acts.eq(feed.o_acts),
            core.i_sum_acts.eq(feed.o_sum),
            core.i_bits.eq(bits),
            passes.i_data.valid.eq(arriving & arrived_first),
            passes.i_data.payload.place.first.eq(arrived_start),
            passes.i_data.payload.place.last.eq(arrived_end),
            passes.i_data.payload.place.row.eq(strip + arrived_token * slices),
            passes.i_data.payload.new_block.eq(arrived_new),
            passes.i_data.payload.scales.sum_acts.eq(feed.o_sum),
            passes.i_data.payload.scales.significand.eq(feed.o_significand),
            passes.i_data.payload.scales.shift.eq(feed.o_shift),
            passes.i_data.payload.scales.exponent.eq(exponent),
        ]

        # 4. slices of sums, in the order of the passes, are dequantised and added
        scaled = passes.o_data.payload
        m.d.comb += [
            dequant.i_valid.eq(core.o_valid & (dry == 0)),
            dequant.i_slice.eq(core.o_slice),
            *(port.eq(value) for port, value in zip(dequant.i_sums, core.o_sums, strict=True)),
            dequant.i_scales.eq(scaled.scales),
            dequant.i_tag.first.eq(scaled.place.first),
            dequant.i_tag.last.eq(scaled.place.last),
            dequant.i_tag.row.eq(scaled.place.row + core.o_slice),
            passes.o_data.ready.eq(dequant.i_valid & (core.o_slice == slices - 1)),
            self.scales.en.eq(dequant.i_valid & (core.o_slice == 0) & scaled.new_block),
            dequant.i_row.eq(self.scales.data),
            accumulators.i_valid.eq(dequant.o_valid & (dry == 0)),
            accumulators.i_place.eq(dequant.o_tag),
            *(port.eq(term) for port, term in zip(accumulators.i_terms, dequant.o_terms, strict=True)),
            self.o_busy.eq(issuing | accumulators.o_busy),
            self.o_stalled.eq(self.o_y.valid & ~self.o_y.ready),
        ]

        with m.If(self.i_clear):
            m.d.sync += [issuing.eq(0), arriving.eq(0), leaving.eq(0), dry.eq(most_dry)]
            m.d.sync += [row.eq(0), token.eq(0), block.eq(0), row_block.eq(0)]
        return m
