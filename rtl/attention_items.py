"""What the stages of the attention engine hand to each other: sizes, items, and the queue between two stages."""

from dataclasses import dataclass
from typing import Any

from amaranth.hdl import Module, ShapeLike, Signal, ValueLike
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from rtl.lib.delay import Delay
from rtl.lib.fifo import StreamFifo
from rtl.lib.ports import HEAD_BITS, ROW_ADDR_BITS, TOKEN_BITS
from spec.config import KEY_BLOCK, LANES, AttentionConfig

BANKS = 4
"""Items that may stand between two stages: enough to hide every latency, short items included."""

BLOCK_BUFFERS = 4
"""Blocks of K and V on chip: one that the values stage works on, those that scores are ahead, one that loads."""

SLOT_BITS = (KEY_BLOCK - 1).bit_length()


@dataclass(frozen=True, kw_only=True)
class AttentionSizes:
    """Widths that follow from the configuration and the tokens of a tile."""

    config: AttentionConfig
    tokens: int

    def __post_init__(self) -> None:
        if self.config.lanes not in (8, 16, 32):
            raise ValueError(f"attention lanes must be 8, 16 or 32, not {self.config.lanes}")
        if not 1 <= self.tokens < 1 << TOKEN_BITS:
            raise ValueError(f"tokens must be in 1..{(1 << TOKEN_BITS) - 1}, not {self.tokens}")

    @property
    def lanes(self) -> int:
        """Elements of a chunk, the part of a head that a cycle works on."""
        return self.config.lanes

    @property
    def chunk_beats_log2(self) -> int:
        """Rows of 8 in a chunk."""
        return (self.lanes // LANES).bit_length() - 1

    @property
    def max_chunks(self) -> int:
        """Chunks of the longest head."""
        return self.config.max_head_dim // self.lanes

    @property
    def chunk_bits(self) -> int:
        """Bits of a chunk's number within its head (at least 1)."""
        return max(1, ceil_log2(self.max_chunks))

    @property
    def chunk_count_bits(self) -> int:
        """Bits of a number of chunks."""
        return self.max_chunks.bit_length()

    @property
    def block_chunk_bits(self) -> int:
        """Bits of a chunk's number within a block of K or V."""
        return ceil_log2(KEY_BLOCK * self.max_chunks)

    @property
    def row_bits(self) -> int:
        """Bits of the number of a resident row."""
        return max(1, ceil_log2(self.config.max_rows))

    @property
    def query_chunks(self) -> int:
        """Chunks of the query buffer."""
        return self.tokens * self.config.max_q_dim // self.lanes

    @property
    def head_bits(self) -> int:
        """Bits of a query head's number."""
        return max(1, ceil_log2(self.config.max_q_dim // self.lanes))

    @property
    def token_bits(self) -> int:
        """Bits of a token's number within the tile."""
        return max(1, ceil_log2(self.tokens))

    def item(self) -> data.StructLayout:
        """One (row, block), or the end of a row (``finish``)."""
        return data.StructLayout(
            {
                "finish": 1,  # all blocks of the row are done: write it out
                "row": self.row_bits,  # resident row
                "query": ceil_log2(self.query_chunks),  # first chunk of the row in the query buffer
                "token": TOKEN_BITS,
                "head": HEAD_BITS,
                "count": SLOT_BITS + 1,  # slots of the block that the row sees, 1 .. 16, the first ones
                "first": 1,  # the row has no state yet
                "buffer": ceil_log2(BLOCK_BUFFERS),
                "release": 1,  # last row of the block: its buffer is free afterwards
                "out_row": ROW_ADDR_BITS,  # finish: first vector-memory row
            }
        )

    def state_write(self) -> data.StructLayout:
        """A row of the vector memory that belongs to an imported state."""
        return data.StructLayout(
            {
                "en": 1,
                "row": self.row_bits,
                "scalars": 1,  # 1: (m, l, 0...); 0: 8 elements of o
                "chunk": self.chunk_bits,
                "part": max(1, self.chunk_beats_log2),  # which 8 lanes of the chunk
            }
        )


def delayed(m: Module, name: str, value: Any, cycles: int, shape: ShapeLike | None = None) -> Any:
    """`value` as it was `cycles` cycles ago; zero after reset. Control never stands still."""
    line = Delay(value.shape() if shape is None else shape, cycles, reset=True)
    m.submodules[name] = line
    m.d.comb += [line.en.eq(1), line.i.eq(value)]
    return line.o


def awake(m: Module, begin: ValueLike, cycles: int) -> Signal:
    """1 in the cycle of `begin` and in `cycles` more: the enable of a pipeline, which then sleeps while it is empty."""
    left = Signal(range(cycles + 1))
    enable = Signal()
    m.d.comb += enable.eq(begin | (left != 0))
    with m.If(begin):
        m.d.sync += left.eq(cycles)
    with m.Elif(left != 0):
        m.d.sync += left.eq(left - 1)
    return enable


class ItemQueue(wiring.Component):
    """Items on their way from one stage to the next; each comes out when its numbers are written.

    Function
        In order. An item leaves only after as many ``i_done`` pulses as items that left before it, plus one. Numbers
        of an item lie in the bank of its place: ``o_push_bank`` for the next item to enter, ``o_done_bank`` for the
        next one to be done, ``o_pop_bank`` for the one at the exit.
    Streams
        ``i_item`` in, ``o_item`` out.
    Timing
        An item comes out at the earliest in the cycle after its ``i_done``.
    Twins
        tests/test_attention.py, by way of the engine.
    """

    i_item: stream.Interface
    o_item: stream.Interface
    i_done: Signal
    o_push_bank: Signal
    o_done_bank: Signal
    o_pop_bank: Signal

    def __init__(self, sizes: AttentionSizes) -> None:
        self._sizes = sizes
        signature = stream.Signature(sizes.item())
        super().__init__(
            {
                "i_item": In(signature),
                "o_item": Out(signature),
                "i_done": In(1),
                "o_push_bank": Out(range(BANKS)),
                "o_done_bank": Out(range(BANKS)),
                "o_pop_bank": Out(range(BANKS)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.fifo = fifo = StreamFifo(self._sizes.item(), depth=BANKS)
        ready = Signal(range(BANKS + 1))  # items inside whose numbers are written
        pop = Signal()
        wiring.connect(m, wiring.flipped(self.i_item), fifo.i_data)
        m.d.comb += [
            self.o_item.valid.eq(fifo.o_data.valid & (ready != 0)),
            self.o_item.payload.eq(fifo.o_data.payload),
            pop.eq(self.o_item.valid & self.o_item.ready),
            fifo.o_data.ready.eq(pop),
        ]
        m.d.sync += [
            ready.eq(ready + self.i_done - pop),
            self.o_push_bank.eq(self.o_push_bank + (self.i_item.valid & self.i_item.ready)),
            self.o_done_bank.eq(self.o_done_bank + self.i_done),
            self.o_pop_bank.eq(self.o_pop_bank + pop),
        ]
        return m
