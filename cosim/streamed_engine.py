"""A matmul engine and the parser of its weight stream, as a device joins them, with all other ports outside."""

from typing import Generic, TypeVar

from amaranth.hdl import Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from rtl.group_matmul import GroupMatmul
from rtl.group_stream import GroupStream
from rtl.lib.ops import op_layout
from rtl.lib.ports import GroupScaleWrite
from rtl.quantised_table_core import QuantisedTableCore
from rtl.table_feed import TableFeed
from rtl.tlmm import Tlmm
from rtl.weight_stream import WeightStream
from spec.act_formats import ActFormat
from spec.config import GroupMatmulConfig, TlmmConfig
from spec.descriptors import FIELDS, Opcode

__all__ = ["StreamedEngine", "matmul_op"]

Config = TypeVar("Config", TlmmConfig, GroupMatmulConfig)


class StreamedEngine(wiring.Component, Generic[Config]):
    """Streams: ``i_beat``, beats of the weight port; ``o_aux``, what is no matrix. The other ports are the engine's.

    Parameters
    ----------
    form
        Of a table engine: it takes activations of that format, and makes quantised tables of them. ``group_scale`` is there
        for the compiled loop, which serves all group engines, and does nothing.
    """

    i_beat: stream.Interface
    o_aux: stream.Interface
    i_op: stream.Interface
    act: wiring.FlippedInterface
    o_y: stream.Interface
    i_clear: Signal
    o_busy: Signal
    o_error: Signal
    o_lookup: Signal
    o_starved: Signal
    o_stalled: Signal

    def __init__(self, cfg: Config, *, weight_bytes: int, aux_beats: int = 4, form: ActFormat | None = None) -> None:
        self.cfg = cfg
        self.weight_bytes = weight_bytes
        if isinstance(cfg, TlmmConfig):
            self._weights, self._links = WeightStream(cfg, weight_bytes=weight_bytes, aux_beats=aux_beats), ("read",)
            self._engine = Tlmm(cfg, weight_bytes=weight_bytes)
        else:
            self._weights, self._links = GroupStream(cfg, weight_bytes=weight_bytes, aux_beats=aux_beats), ("codes", "scales")
            tables = {"core": QuantisedTableCore(cfg), "feed": TableFeed(cfg, form)} if form else {}
            self._engine = GroupMatmul(cfg, **tables)
        self._outside = {
            name: member for name, member in self._engine.signature.members.items() if name not in self._links
        }
        super().__init__(
            {
                "i_beat": In(stream.Signature(8 * weight_bytes)),
                "o_aux": Out(stream.Signature(8 * weight_bytes)),
                "o_error": Out(1),
            }
            | ({} if isinstance(cfg, TlmmConfig) else {"group_scale": In(GroupScaleWrite)})
            | self._outside
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.weights = weights = self._weights
        m.submodules.engine = engine = self._engine
        connect(m, flipped(self.i_beat), weights.i_beat)
        connect(m, weights.o_aux, flipped(self.o_aux))
        m.d.comb += [weights.i_clear.eq(self.i_clear), self.o_error.eq(weights.o_error)]
        for name in self._links:
            connect(m, getattr(engine, name), getattr(weights, name))
        for name, member in self._outside.items():
            ours, theirs = getattr(self, name), getattr(engine, name)
            if member.is_signature:
                connect(m, flipped(ours), theirs)
            else:
                m.d.comb += ours.eq(theirs) if member.flow is Out else theirs.eq(ours)
        return m


def matmul_op(**fields: int) -> int:
    """Payload of an operation; the fields that are not given hold ones, `last_only` 0."""
    ones: dict[int | str, int] = {field.name: (1 << field.width) - 1 for field in FIELDS[Opcode.MATMUL]}
    return op_layout(Opcode.MATMUL).const(ones | {"position": 0xABCDEF, "last_only": 0} | fields).as_value().value
