"""Activation tile of the table-lookup engine, and the collector that brings its K blocks in order."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from rtl.lib.ports import ActivationWrite
from rtl.tlmm_order import PassOrder, pass_shape
from spec.config import LANES, TlmmConfig, ceil_div

__all__ = ["ActivationFeed", "feed_cycles"]

_ROW_BITS = 8 * LANES


def feed_cycles(cfg: TlmmConfig) -> int:
    """Cycles from one K block to the next when nobody waits: reads of all its rows, and the memory's latency."""
    return ceil_div(cfg.k_block, LANES) + 3


class ActivationFeed(wiring.Component):
    """Memory of the int8 activation tile, read as K blocks of all tokens.

    Function
        After ``i_start``, for each pass in the order of `PassOrder`: activations ``kb*k_block .. (kb+1)*k_block - 1`` of
        the token. They begin at any byte of a row.
    Streams
        ``o_block``: k_block bytes, lowest activation lowest. ``act``: writes of 8 activations.
    Handshake
        ``i_start`` only while ``o_ready``; it takes ``i_shape``. ``o_ready``: every row that an operation wants has been
        read (its last block may still wait at ``o_block``). Only then activations are written, before ``i_start``.
    Timing
        A block every ``feed_cycles`` cycles, from one operation to the next as well: 14 for kv260 (84 activations), 9 for
        sim (48).
    Cost
        ``tokens*act_rows`` words of 64 bits, block RAM; a shift register of one block.
    Twins
        golden/tlmm.py; test: tests/test_tlmm.py.
    """

    act: wiring.FlippedInterface
    i_start: Signal
    i_shape: data.View
    i_clear: Signal
    o_ready: Signal
    o_block: stream.Interface

    def __init__(self, cfg: TlmmConfig) -> None:
        self._cfg = cfg
        super().__init__(
            {
                "act": In(ActivationWrite),
                "i_start": In(1),
                "i_shape": In(pass_shape(cfg)),
                "i_clear": In(1),
                "o_ready": Out(1),
                "o_block": Out(stream.Signature(8 * cfg.k_block)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        cfg = self._cfg
        shifts = ceil_div(cfg.k_block, LANES)
        # an aligned chunk takes two rows, so the last block may look two rows beyond the last token
        depth = cfg.tokens * cfg.act_rows + 2

        # 1. tile
        m.submodules.tile = tile = Memory(shape=_ROW_BITS, depth=depth, init=[])
        write, read = tile.write_port(), tile.read_port()
        m.d.comb += [
            write.en.eq(self.act.en),
            write.addr.eq(self.act.token * cfg.act_rows + self.act.row),
            write.data.eq(self.act.data),
        ]

        # 2. which block is collected
        m.submodules.order = order = PassOrder(cfg)
        reading = Signal()
        token_row = Signal(range(depth))  # first row of the token
        group_offset = Signal(range(cfg.max_k_blocks * cfg.k_block + 1))  # first byte of the group of blocks
        offset = Signal.like(group_offset)  # first byte of the block
        step = Signal(range(shifts + 1))  # row of the block that is read
        last_step = Signal()
        m.d.comb += [
            last_step.eq(step == shifts),
            read.en.eq(reading),
            read.addr.eq(token_row + (offset >> 3) + step),
            order.i_start.eq(self.i_start),
            order.i_shape.eq(self.i_shape),
            order.i_next.eq(reading & last_step),
            order.i_clear.eq(self.i_clear),
            self.o_ready.eq(~order.o_active),
        ]
        arriving, arriving_first, arriving_last = Signal(), Signal(), Signal()
        shift = Signal(3)  # bytes by which the arriving rows are misaligned
        m.d.sync += arriving.eq(reading)
        with m.If(reading):
            m.d.sync += [step.eq(step + 1), arriving_first.eq(step == 0), arriving_last.eq(last_step)]
            m.d.sync += shift.eq(offset[:3])
            with m.If(last_step):
                following = Mux(order.o_last_block, 0, offset + cfg.k_block)
                m.d.sync += [step.eq(0), reading.eq(0), offset.eq(offset + cfg.k_block)]
                with m.If(order.o_ends):
                    m.d.sync += [token_row.eq(token_row + cfg.act_rows), offset.eq(group_offset)]
                    with m.If(order.o_last_token):
                        m.d.sync += [token_row.eq(0), offset.eq(following), group_offset.eq(following)]

        # 3. align, collect
        previous = Signal(_ROW_BITS, reset_less=True)
        window = Signal(_ROW_BITS * shifts, reset_less=True)
        full = Signal()
        with m.If(arriving):
            m.d.sync += previous.eq(read.data)
            with m.If(~arriving_first):
                aligned = (Cat(previous, read.data) >> Cat(Const(0, 3), shift))[:_ROW_BITS]
                m.d.sync += window.eq(Cat(window[_ROW_BITS:], aligned))
            with m.If(arriving_last):
                m.d.sync += full.eq(1)
        m.d.comb += [self.o_block.valid.eq(full), self.o_block.payload.eq(window)]

        # 4. the next block is read when this one is taken
        taken, idle = Signal(), Signal()
        m.d.comb += [taken.eq(full & self.o_block.ready), idle.eq(~reading & ~arriving & ~full)]
        with m.If(taken):
            m.d.sync += full.eq(0)
        with m.If((taken & order.o_active) | ((taken | idle) & self.i_start)):
            m.d.sync += reading.eq(1)
        with m.If(self.i_clear):
            m.d.sync += [reading.eq(0), arriving.eq(0), full.eq(0), step.eq(0)]
            m.d.sync += [token_row.eq(0), offset.eq(0), group_offset.eq(0)]
        return m
