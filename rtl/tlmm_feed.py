"""Activation tile of the table-lookup engine, and the collector that brings its K blocks in order."""

from amaranth.hdl import Cat, Const, Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from rtl.lib.ports import ActivationWrite
from spec.config import LANES, TlmmConfig, ceil_div

__all__ = ["ActivationFeed", "feed_cycles"]

_ROW_BITS = 8 * LANES


def feed_cycles(cfg: TlmmConfig) -> int:
    """Cycles from one K block to the next when nobody waits: reads of all its rows, and the memory's latency."""
    return ceil_div(cfg.k_block, LANES) + 3


class ActivationFeed(wiring.Component):
    """Memory of the int8 activation tile, read as K blocks of all tokens.

    Function
        After ``i_start``, for each plane, each of ``i_k_blocks`` blocks, each of ``i_tokens`` tokens, token innermost:
        activations ``kb*k_block .. (kb+1)*k_block - 1`` of the token. They begin at any byte of a row.
    Streams
        ``o_block``: k_block bytes, lowest activation lowest. ``act``: writes of 8 activations.
    Handshake
        ``i_start`` only while ``o_block`` has been taken for all passes of the operation before; it takes
        ``i_planes``, ``i_k_blocks``, ``i_tokens`` (all at least 1), which must hold until the last block was taken.
        Activations of the operation are written before ``i_start``.
    Timing
        A block every ``feed_cycles`` cycles: 14 for kv260 (84 activations), 9 for sim (48).
    Cost
        ``tokens*act_rows`` words of 64 bits, block RAM; a shift register of one block.
    Twins
        golden/tlmm.py; test: tests/test_tlmm.py.
    """

    act: wiring.FlippedInterface
    i_start: Signal
    i_tokens: Signal
    i_k_blocks: Signal
    i_planes: Signal
    i_clear: Signal
    o_block: stream.Interface

    def __init__(self, cfg: TlmmConfig) -> None:
        self._cfg = cfg
        super().__init__(
            {
                "act": In(ActivationWrite),
                "i_start": In(1),
                "i_tokens": In(range(cfg.tokens + 1)),
                "i_k_blocks": In(range(cfg.max_k_blocks + 1)),
                "i_planes": In(3),
                "i_clear": In(1),
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

        # 2. which block is collected: token, block, plane
        active, reading = Signal(), Signal()
        token, block, plane = Signal.like(self.i_tokens), Signal.like(self.i_k_blocks), Signal.like(self.i_planes)
        token_row = Signal(range(depth))  # first row of the token
        offset = Signal(range(cfg.max_k_blocks * cfg.k_block + 1))  # first byte of the block
        step = Signal(range(shifts + 1))  # row of the block that is read
        last_step, last_token, last_block = Signal(), Signal(), Signal()
        m.d.comb += [
            last_step.eq(step == shifts),
            last_token.eq(token == self.i_tokens - 1),
            last_block.eq(block == self.i_k_blocks - 1),
            read.en.eq(reading),
            read.addr.eq(token_row + (offset >> 3) + step),
        ]
        arriving, arriving_first, arriving_last = Signal(), Signal(), Signal()
        shift = Signal(3)  # bytes by which the arriving rows are misaligned
        m.d.sync += arriving.eq(reading)
        with m.If(reading):
            m.d.sync += [step.eq(step + 1), arriving_first.eq(step == 0), arriving_last.eq(last_step)]
            m.d.sync += shift.eq(offset[:3])
            with m.If(last_step):
                m.d.sync += [step.eq(0), reading.eq(0)]
                m.d.sync += [token.eq(token + 1), token_row.eq(token_row + cfg.act_rows)]
                with m.If(last_token):
                    m.d.sync += [token.eq(0), token_row.eq(0)]
                    m.d.sync += [block.eq(block + 1), offset.eq(offset + cfg.k_block)]
                    with m.If(last_block):
                        m.d.sync += [block.eq(0), offset.eq(0), plane.eq(plane + 1)]
                        with m.If(plane == self.i_planes - 1):
                            m.d.sync += active.eq(0)

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
        taken = Signal()
        m.d.comb += taken.eq(full & self.o_block.ready)
        with m.If(taken):
            m.d.sync += [full.eq(0), reading.eq(active)]
        with m.If(self.i_start):
            m.d.sync += [active.eq(1), reading.eq(1), plane.eq(0)]
        with m.If(self.i_clear):
            m.d.sync += [active.eq(0), reading.eq(0), arriving.eq(0), full.eq(0), step.eq(0)]
            m.d.sync += [token.eq(0), token_row.eq(0), block.eq(0), offset.eq(0)]
        return m
