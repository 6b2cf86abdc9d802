"""Activation tile of the group engines: groups of 32 int8 with their scale, their sum, and the largest exponent of a token."""

from dataclasses import dataclass

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from rtl.lib.ports import ActivationWrite, GroupScaleWrite
from spec.config import K_GROUP, LANES, GroupMatmulConfig

__all__ = ["GROUP_SUM_BITS", "MOST_SHIFT", "FeedScale", "FeedWrite", "GroupFeed"]

GROUP_SUM_BITS = 13
"""Sum of 32 int8: -4096 .. 4064."""

MOST_SHIFT = 63
"""Right shifts of a group's term saturate here (docs/numerics.md section 3b)."""

_ROWS = K_GROUP // LANES
"""Activation writes of a group."""

_FIELD_BITS = 8
"""Exponent field of a bfloat16."""


@dataclass(frozen=True, kw_only=True)
class FeedWrite:
    """A whole group for the tile."""

    en: Value
    token: Value
    group: Value
    data: Value
    total: Value
    """A"""


@dataclass(frozen=True, kw_only=True)
class FeedScale:
    """The scale of a group; that of group 0 begins a token."""

    en: Value
    token: Value
    group: Value
    data: Value
    """bfloat16"""


class GroupFeed(wiring.Component):
    """Memory of the activation tile, read a group at a time.

    Function
        ``o_acts``: the 32 int8 of group ``i_group`` of token ``i_token``, lowest input lowest. ``o_sum``: A, their sum.
        ``o_significand``: m_G of their scale, 0 where it is 0. ``o_shift``: min(X - e_G, 63), X the largest exponent field
        of the token's groups (docs/numerics.md sections 2b and 3b).
    Ports
        ``act``: whole groups, the four rows of a group one after the other, lowest first, with no row of another group
        between them. ``scale``: before or with the first row of its group; of a token, that of group 0 first, which
        restarts X. ``i_en``: read.
    Timing
        Outputs show what ``i_en`` asked for in the cycle after it, and hold until the next one. A row or scale that is
        written in a cycle can be read in the next.
    Numbers
        Exact: A is summed while the group is written, X is a running maximum.
    Cost
        ``tokens * max_k_blocks`` words of 256 (block RAM), 13 and 16 bits; a register of 192 bits; an adder tree of 8 int8.
    Twins
        golden/group_dequant.py `act_parts`; test: tests/test_group_matmul.py.
    """

    act_bits = 8
    """Of an activation at the port."""

    group_bits = 8 * K_GROUP
    """What a core takes for a group of activations."""

    act: wiring.FlippedInterface
    scale: wiring.FlippedInterface
    i_en: Signal
    i_token: Signal
    i_group: Signal
    o_acts: Signal
    o_sum: Signal
    o_significand: Signal
    o_shift: Signal

    def __init__(self, cfg: GroupMatmulConfig) -> None:
        self._cfg = cfg
        super().__init__({**self._write_ports(), **self._read_ports()})

    def _write_ports(self) -> dict[str, wiring.Member]:
        return {"act": In(ActivationWrite), "scale": In(GroupScaleWrite)}

    def _read_ports(self) -> dict[str, wiring.Member]:
        cfg = self._cfg
        return {
            "i_en": In(1),
            "i_token": In(range(max(2, cfg.tokens))),
            "i_group": In(range(max(2, cfg.max_k_blocks))),
            "o_acts": Out(self.group_bits),
            "o_sum": Out(signed(GROUP_SUM_BITS)),
            "o_significand": Out(8),
            "o_shift": Out(range(MOST_SHIFT + 1)),
        }

    def elaborate(self, platform: object) -> Module:
        m = Module()
        cfg = self._cfg
        depth = cfg.tokens * cfg.max_k_blocks

        m.submodules.tile = tile = Memory(shape=self.group_bits, depth=depth, init=[])
        m.submodules.sums = sums = Memory(shape=signed(GROUP_SUM_BITS), depth=depth, init=[])
        m.submodules.scales = scales = Memory(shape=16, depth=depth, init=[])
        m.submodules.tops = tops = Memory(shape=_FIELD_BITS, depth=cfg.tokens, init=[])

        # 1. whole groups
        arriving, scale = self._collect(m)
        tile_write, sum_write = tile.write_port(), sums.write_port()
        m.d.comb += [
            tile_write.en.eq(arriving.en),
            tile_write.addr.eq(arriving.group * cfg.tokens + arriving.token),
            tile_write.data.eq(arriving.data),
            sum_write.en.eq(arriving.en),
            sum_write.addr.eq(tile_write.addr),
            sum_write.data.eq(arriving.total),
        ]

        # 2. scales, and the largest exponent of each token
        scale_write, top_write, top_before = scales.write_port(), tops.write_port(), tops.read_port(domain="comb")
        field = scale.data[7:15]
        m.d.comb += [
            scale_write.en.eq(scale.en),
            scale_write.addr.eq(scale.group * cfg.tokens + scale.token),
            scale_write.data.eq(scale.data),
            top_before.addr.eq(scale.token),
            top_write.en.eq(scale.en),
            top_write.addr.eq(scale.token),
            top_write.data.eq(Mux((scale.group == 0) | (field > top_before.data), field, top_before.data)),
        ]

        # 3. read a group
        tile_read, sum_read, scale_read, top_read = (memory.read_port() for memory in (tile, sums, scales, tops))
        address = self.i_group * cfg.tokens + self.i_token
        for port in (tile_read, sum_read, scale_read):
            m.d.comb += [port.en.eq(self.i_en), port.addr.eq(address)]
        m.d.comb += [top_read.en.eq(self.i_en), top_read.addr.eq(self.i_token)]
        own = scale_read.data[7:15]
        below = Signal(_FIELD_BITS)  # the token's largest field less the group's own
        m.d.comb += [
            below.eq(top_read.data - own),
            self.o_acts.eq(tile_read.data),
            self.o_sum.eq(sum_read.data),
            self.o_significand.eq(Mux(own == 0, 0, Cat(scale_read.data[:7], Const(1, 1)))),
            self.o_shift.eq(Mux(below > MOST_SHIFT, MOST_SHIFT, below)),
        ]
        return m

    def _collect(self, m: Module) -> tuple[FeedWrite, FeedScale]:
        """Rows of 8 activations are collected to a group, and summed."""
        act, scale = self.act, self.scale
        place = act.row[:2]
        collected = Signal(8 * (K_GROUP - LANES), reset_less=True)
        partial = Signal(signed(GROUP_SUM_BITS), reset_less=True)
        values = [act.data[8 * lane : 8 * lane + 8].as_signed() for lane in range(LANES)]
        pairs = [values[lane] + values[lane + 1] for lane in range(0, LANES, 2)]
        beat = (pairs[0] + pairs[1]) + (pairs[2] + pairs[3])
        total = Mux(place == 0, 0, partial) + beat
        group_done = Signal()
        m.d.comb += group_done.eq(act.en & (place == _ROWS - 1))
        with m.If(act.en):
            m.d.sync += [collected.eq(Cat(collected[8 * LANES :], act.data)), partial.eq(total)]
        write = FeedWrite(en=group_done, token=act.token, group=act.row >> 2, data=Cat(collected, act.data), total=total)
        return write, FeedScale(en=scale.en, token=scale.token, group=scale.group, data=scale.data)
