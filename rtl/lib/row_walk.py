"""Counters that walk through the beats of an operation, in the order of the matmul engine."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib.wiring import Component, In, Out

from rtl.lib.ports import HEAD_BITS, ROW_ADDR_BITS, TOKEN_BITS


class RowWalk(Component):
    """Where the next beat of an operation lies: its row address, token, beat, head and beat of the head.

    Function
        ``o_addr = base + token * stride + beat``, ``o_beat = head * head_beats + head_beat``; a step goes to the
        next beat, after the last beat of a token to the next token. With `block_beats`, each token has so many beats
        before the next one, and after the last token's the walk goes on with the next beats of the first; the last
        block may be short, and heads lie within a block.

    Ports
        i_start, In(1): go to the first beat. i_base, i_stride, i_beats, i_head_beats, i_tokens: constant from the
        start to the last step. i_step, In(1): the beat is done. o_addr, o_beat, o_token, o_head, o_head_beat.
        o_last_in_head, o_last_in_token, o_last: the beat is the last one of its head, token, operation.

    Timing
        A start or a step shows in the next cycle.

    Cost
        Six counters without multipliers (eight and an adder with `block_beats`); unused ones vanish in synthesis.

    Twins
        tests/test_epilogue.py.
    """

    i_start: Signal
    i_base: Signal
    i_stride: Signal
    i_beats: Signal
    i_head_beats: Signal
    i_tokens: Signal
    i_step: Signal
    o_addr: Signal
    o_beat: Signal
    o_token: Signal
    o_head: Signal
    o_head_beat: Signal
    o_last_in_head: Signal
    o_last_in_token: Signal
    o_last: Signal

    def __init__(self, *, block_beats: int | None = None) -> None:
        self._block_beats = block_beats
        super().__init__(
            {
                "i_start": In(1),
                "i_base": In(ROW_ADDR_BITS),
                "i_stride": In(ROW_ADDR_BITS),
                "i_beats": In(ROW_ADDR_BITS),
                "i_head_beats": In(HEAD_BITS),
                "i_tokens": In(TOKEN_BITS),
                "i_step": In(1),
                "o_addr": Out(ROW_ADDR_BITS),
                "o_beat": Out(ROW_ADDR_BITS),
                "o_token": Out(TOKEN_BITS),
                "o_head": Out(HEAD_BITS),
                "o_head_beat": Out(HEAD_BITS),
                "o_last_in_head": Out(1),
                "o_last_in_token": Out(1),
                "o_last": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        base, following = Signal(ROW_ADDR_BITS), Signal(ROW_ADDR_BITS)
        last_token = Signal()
        m.d.comb += [
            following.eq(base + self.i_stride),
            self.o_last_in_head.eq(self.o_head_beat == self.i_head_beats - 1),
            self.o_last_in_token.eq(self.o_beat == self.i_beats - 1),
            last_token.eq(self.o_token == self.i_tokens - 1),
            self.o_last.eq(self.o_last_in_token & last_token),
        ]
        with m.If(self.i_step):
            m.d.sync += [
                self.o_beat.eq(self.o_beat + 1),
                self.o_addr.eq(self.o_addr + 1),
                self.o_head_beat.eq(Mux(self.o_last_in_head, 0, self.o_head_beat + 1)),
                self.o_head.eq(self.o_head + self.o_last_in_head),
            ]
        if self._block_beats is None:
            with m.If(self.i_step & self.o_last_in_token):
                m.d.sync += [
                    self.o_token.eq(self.o_token + 1),
                    base.eq(following),
                    self.o_addr.eq(following),
                    self.o_beat.eq(0),
                    self.o_head.eq(0),
                    self.o_head_beat.eq(0),
                ]
        else:
            self._walk_blocks(m, self._block_beats, base, following, last_token)
        with m.If(self.i_start):
            m.d.sync += [
                base.eq(self.i_base),
                self.o_addr.eq(self.i_base),
                self.o_beat.eq(0),
                self.o_token.eq(0),
                self.o_head.eq(0),
                self.o_head_beat.eq(0),
            ]
        return m

    def _walk_blocks(self, m: Module, block_beats: int, base: Signal, following: Signal, last_token: Signal) -> None:
        """After a block's last beat to the next token, or to the next block of the first one."""
        index = Signal(range(max(2, block_beats)))  # of the beat in its block
        first_beat, first_head = Signal(ROW_ADDR_BITS), Signal(HEAD_BITS)  # of the block
        beat, head, start = Signal(ROW_ADDR_BITS), Signal(HEAD_BITS), Signal(ROW_ADDR_BITS)  # where to go
        last_in_block = Signal()
        m.d.comb += [
            last_in_block.eq((index == block_beats - 1) | self.o_last_in_token),
            beat.eq(Mux(last_token, self.o_beat + 1, first_beat)),
            head.eq(Mux(last_token, self.o_head + self.o_last_in_head, first_head)),
            start.eq(Mux(last_token, self.i_base, following)),
        ]
        with m.If(self.i_step):
            m.d.sync += index.eq(index + 1)
            with m.If(last_in_block):
                m.d.sync += [
                    index.eq(0),
                    self.o_token.eq(Mux(last_token, 0, self.o_token + 1)),
                    base.eq(start),
                    self.o_addr.eq(start + beat),
                    self.o_beat.eq(beat),
                    self.o_head.eq(head),
                    self.o_head_beat.eq(0),
                    first_beat.eq(beat),
                    first_head.eq(head),
                ]
        with m.If(self.i_start):
            m.d.sync += [index.eq(0), first_beat.eq(0), first_head.eq(0)]
