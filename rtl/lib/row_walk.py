"""Counters that walk through the beats of an operation: token by token, beat by beat."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib.wiring import Component, In, Out

from rtl.lib.ports import HEAD_BITS, ROW_ADDR_BITS, TOKEN_BITS


class RowWalk(Component):
    """Where the next beat of an operation lies: its row address, token, beat, head and beat of the head.

    Function
        ``o_addr = base + token * stride + beat``, ``o_beat = head * head_beats + head_beat``; a step goes to the
        next beat, after the last beat of a token to the next token.

    Ports
        i_start, In(1): go to the first beat. i_base, i_stride, i_beats, i_head_beats, i_tokens: constant from the
        start to the last step. i_step, In(1): the beat is done. o_addr, o_beat, o_token, o_head, o_head_beat.
        o_last_in_head, o_last_in_token, o_last: the beat is the last one of its head, token, operation.

    Timing
        A start or a step shows in the next cycle.

    Cost
        Six counters without multipliers; unused ones vanish in synthesis.

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

    def __init__(self) -> None:
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
        m.d.comb += [
            following.eq(base + self.i_stride),
            self.o_last_in_head.eq(self.o_head_beat == self.i_head_beats - 1),
            self.o_last_in_token.eq(self.o_beat == self.i_beats - 1),
            self.o_last.eq(self.o_last_in_token & (self.o_token == self.i_tokens - 1)),
        ]
        with m.If(self.i_step):
            m.d.sync += [
                self.o_beat.eq(self.o_beat + 1),
                self.o_addr.eq(self.o_addr + 1),
                self.o_head_beat.eq(Mux(self.o_last_in_head, 0, self.o_head_beat + 1)),
                self.o_head.eq(self.o_head + self.o_last_in_head),
            ]
            with m.If(self.o_last_in_token):
                m.d.sync += [
                    self.o_token.eq(self.o_token + 1),
                    base.eq(following),
                    self.o_addr.eq(following),
                    self.o_beat.eq(0),
                    self.o_head.eq(0),
                    self.o_head_beat.eq(0),
                ]
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
