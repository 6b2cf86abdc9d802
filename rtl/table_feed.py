"""Activation tile of the table engine for INT16, FP8 and FP16 activations: it holds their quantised tables."""

from amaranth.hdl import Cat, Module, Signal, Value
from amaranth.lib import data
from amaranth.lib.wiring import In, Member, Out

from rtl.fixed_group import BEATS
from rtl.group_feed import FeedScale, FeedWrite, GroupFeed
from rtl.lib.fifo import StreamFifo
from rtl.lib.ports import ROW_ADDR_BITS, TOKEN_BITS, activation_write
from rtl.quantised_table_core import QuantisedTableCore
from rtl.table_quantiser import TableQuantiser
from spec.act_formats import ActFormat
from spec.config import GroupMatmulConfig

__all__ = ["TableFeed"]

_GROUPS_ON_THE_WAY = 8
"""Groups that may be between the port and the tile: the quantiser's latency is less than 4 groups' beats."""


class TableFeed(GroupFeed):
    """Makes the tables of each group once, as it is written, and keeps them.

    Function
        As `GroupFeed`, with ``o_acts`` the 8 tables of the group, ``o_sum`` and the scale as `TableQuantiser` gives them.
    Ports
        ``act``: activations of the format, groups as `GroupFeed` wants them, of a token that of group 0 first; no scales.
        ``o_busy``: a group is on its way to the tile.
    Timing
        A row a cycle. Groups are in the tile when ``o_busy`` falls, at most `TableQuantiser.latency` cycles after their last row.
    Cost
        As `GroupFeed` with words of 512 bits, and a `TableQuantiser`.
    Twins
        golden/quantised_tables.py `quantise`; test: tests/test_table_matmul.py.
    """

    group_bits = QuantisedTableCore.act_bits

    o_busy: Signal

    def __init__(self, cfg: GroupMatmulConfig, form: ActFormat) -> None:
        self._form = form
        self.act_bits = form.bits
        super().__init__(cfg)

    def _write_ports(self) -> dict[str, Member]:
        return {"act": In(activation_write(self._form.bits)), "o_busy": Out(1)}

    def _collect(self, m: Module) -> tuple[FeedWrite, FeedScale]:
        act = self.act
        m.submodules.quantiser = quantiser = TableQuantiser(self._form)
        place = data.StructLayout({"token": TOKEN_BITS, "group": ROW_ADDR_BITS - 2})
        m.submodules.places = places = StreamFifo(place, depth=_GROUPS_ON_THE_WAY)
        tables = quantiser.o_tables
        entries = Value.cast(tables.payload.entries)
        collected = Signal(len(entries) * (BEATS - 1), reset_less=True)
        done = Signal()
        m.d.comb += [
            quantiser.i_x.valid.eq(act.en),
            Value.cast(quantiser.i_x.payload).eq(act.data),
            tables.ready.eq(1),
            places.i_data.valid.eq(act.en & (act.row[:2] == 0)),
            places.i_data.payload.token.eq(act.token),
            places.i_data.payload.group.eq(act.row >> 2),
            done.eq(tables.valid & tables.payload.last),
            places.o_data.ready.eq(done),
            self.o_busy.eq(places.o_data.valid),
        ]
        with m.If(tables.valid):
            m.d.sync += collected.eq(Cat(collected[len(entries) :], entries))
        token, group = places.o_data.payload.token, places.o_data.payload.group
        return (
            FeedWrite(en=done, token=token, group=group, data=Cat(collected, entries), total=tables.payload.sum_acts),
            FeedScale(en=done, token=token, group=group, data=tables.payload.scale),
        )
