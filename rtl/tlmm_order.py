"""Order in which the table-lookup engine goes through an operation: which plane, K block and token is next."""

from amaranth.hdl import Module, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from spec.config import TlmmConfig

__all__ = ["PassOrder", "pass_shape"]


def pass_shape(cfg: TlmmConfig) -> data.StructLayout:
    """Numbers of an operation, all at least 1. ``group``: `TlmmConfig.last_group`."""
    return data.StructLayout(
        {
            "tokens": range(cfg.tokens + 1),
            "k_blocks": range(cfg.max_k_blocks + 1),
            "planes": 3,
            "group": range(cfg.row_beats + 1),
        }
    )


class PassOrder(wiring.Component):
    """Walks through the passes of an operation; a pass is one K block of one plane for one token.

    Function
        ::

            for p in P-1..0: for G in groups of K blocks: for token m: for kb in G: pass (p, kb, m)

        A group is one K block; the last ``group`` blocks of the last plane are one group, so that a token's sums are
        finished after all of its blocks, and the tokens are spread over the time of the group.
    Handshake
        ``i_start`` takes ``i_shape``; only when not ``o_active`` or with the last ``i_next``. The outputs are those of
        the pass that is next, while ``o_active``; ``i_next`` goes on to the one after.
    Outputs
        ``o_first``: the sums begin at 0. ``o_triple``: a plane begins, not the first. ``o_emit``: sums are finished.
        ``o_ends``: the token's last pass of the group. ``o_last_token``, ``o_last_block`` (group of its plane),
        ``o_last`` (pass).
    Twins
        golden/tlmm.py (any order gives the same sums); test: tests/test_tlmm.py `test_order_of_the_passes`.
    """

    i_start: Signal
    i_shape: data.View
    i_next: Signal
    i_clear: Signal
    o_active: Signal
    o_token: Signal
    o_first: Signal
    o_triple: Signal
    o_emit: Signal
    o_ends: Signal
    o_last_token: Signal
    o_last_block: Signal
    o_last: Signal

    def __init__(self, cfg: TlmmConfig) -> None:
        self._cfg = cfg
        flags = ("active", "first", "triple", "emit", "ends", "last_token", "last_block", "last")
        super().__init__(
            {
                "i_start": In(1),
                "i_shape": In(pass_shape(cfg)),
                "i_next": In(1),
                "i_clear": In(1),
                "o_token": Out(range(cfg.tokens + 1)),
                **{f"o_{flag}": Out(1) for flag in flags},
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        shape = Signal(pass_shape(self._cfg))
        token = self.o_token
        begin = Signal.like(shape.k_blocks)  # first block of the group
        within = Signal.like(shape.group)  # block within the group
        plane = Signal.like(shape.planes)
        grouped = Signal()  # the last group
        m.d.comb += [
            grouped.eq((plane == shape.planes - 1) & (begin == shape.k_blocks - shape.group)),
            self.o_ends.eq(~grouped | (within == shape.group - 1)),
            self.o_last_token.eq(token == shape.tokens - 1),
            self.o_last_block.eq(grouped | (begin == shape.k_blocks - 1)),
            self.o_emit.eq(grouped & self.o_ends),
            self.o_last.eq(self.o_emit & self.o_last_token),
            self.o_first.eq((plane == 0) & (begin == 0) & (within == 0)),
            self.o_triple.eq((plane != 0) & (begin == 0) & (within == 0)),
        ]
        with m.If(self.i_next):
            m.d.sync += within.eq(within + 1)
            with m.If(self.o_ends):
                m.d.sync += [within.eq(0), token.eq(token + 1)]
                with m.If(self.o_last_token):
                    m.d.sync += [token.eq(0), begin.eq(begin + 1)]
                    with m.If(self.o_last_block):
                        m.d.sync += [begin.eq(0), plane.eq(plane + 1)]
                        with m.If(grouped):
                            m.d.sync += self.o_active.eq(0)
        with m.If(self.i_start):
            m.d.sync += [shape.eq(self.i_shape), self.o_active.eq(1), plane.eq(0)]
        with m.If(self.i_clear):
            m.d.sync += [self.o_active.eq(0), within.eq(0), token.eq(0), begin.eq(0), plane.eq(0)]
        return m
