"""What the cores of the group engines have in common: ports, timing, and the core of a configuration."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from amaranth.hdl import Module, Mux, Signal, Value, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from spec.config import K_GROUP, GroupMatmulConfig

__all__ = ["GroupCore", "NIBBLE", "NibbleCore", "ROW_BITS", "SUM_ACTS_BITS"]

ROW_BITS = 3
"""Number of a code row in its pass: 8-bit weights have 8."""

SUM_ACTS_BITS = 13
"""A = sum of 32 activations of [-127, 127], with its sign."""

NIBBLE = 4
"""Bits of a code of the 4-bit cores."""

ROW_SUM_BITS = 17
"""Sum of 32 activations times an unsigned nibble."""


class GroupCore(wiring.Component, ABC):
    """Group sums ``S[n] = sum_i q[n, i] x[i]`` of ``lanes`` outputs by 32 inputs, q an unsigned code of B bits.

    Ports
        A *pass* is one token of one block: B code rows (`spec/layout.py`), in order, each with ``i_valid``, with any gaps.
        ``i_row``: number of the row, 0 to B - 1; ``i_first``, ``i_last``: whether it is the first, the last;
        ``i_codes``: the row; ``i_bits``: B. ``i_acts`` (32 int8 of [-127, 127], lowest input lowest; some
        subclasses take them in another form) and ``i_sum_acts`` (their sum) hold from the first row to the last. What stands
        there in other cycles does not matter.
        ``o_valid``: ``o_sums`` are the sums of slice ``o_slice``: outputs ``o_slice * dequant_lanes`` and on.
    Timing
        A row a cycle. `latency` cycles lie between the row that completes a slice (all its codes have come) and the slice.
        The table core completes all slices with the last row, and gives them in as many consecutive cycles: there must be
        ``slices`` cycles or more from a last row to the next. The 4-bit cores complete slice s with row s (4 bits) or
        2s + 1 (8 bits). Neither waits for anybody.
    Numbers
        Sums of ``sum_bits`` = 21 bits, exact.

    Parameters
    ----------
    ports
        Of a core that takes more than codes and activations.
    """

    act_bits = 8 * K_GROUP
    """Bits of a group's activations, as the core takes them."""

    latency: int
    """Cycles from the row that completes a slice to the slice."""

    i_valid: Signal
    i_first: Signal
    i_last: Signal
    i_row: Signal
    i_codes: Signal
    i_acts: Signal
    i_sum_acts: Signal
    i_bits: Signal
    o_valid: Signal
    o_slice: Signal
    o_sums: list[Signal]

    def __init__(self, cfg: GroupMatmulConfig, *, ports: Mapping[str, wiring.Member] | None = None) -> None:
        self.cfg = cfg
        super().__init__(
            {
                "i_valid": In(1),
                "i_first": In(1),
                "i_last": In(1),
                "i_row": In(ROW_BITS),
                "i_codes": In(K_GROUP * cfg.lanes),
                "i_acts": In(self.act_bits),
                "i_sum_acts": In(signed(SUM_ACTS_BITS)),
                "i_bits": In(4),
                "o_valid": Out(1),
                "o_slice": Out(range(max(2, cfg.slices))),
                "o_sums": Out(signed(self.sum_bits)).array(cfg.dequant_lanes),
                **(ports or {}),
            }
        )

    @property
    def sum_bits(self) -> int:
        """Bits of a sum."""
        return self.cfg.sum_bits

    @abstractmethod
    def elaborate(self, platform: object) -> Module:
        """The subclass's."""


class NibbleCore(GroupCore):
    """A core that takes nibbles: a row is one slice of 4-bit codes, or the high or low nibbles of one of 8-bit codes.

    Function
        ``R[j] = sum_i (w[j, i] + 8) x_i`` of the row's signed nibbles w; 4 bits: ``S = R``, 8 bits: ``S = 16 R_high + R_low``.
        How ``sum_i w x_i`` comes about is the subclass's: `elaborate_row`.
    Timing
        `row_cycles` of the subclass to the registers of its partial sums, and 1: the latency.
    """

    row_cycles = 1
    """Clock edges from a row at the ports to the registers in front of what `elaborate_row` gives."""

    def __init__(self, cfg: GroupMatmulConfig) -> None:
        self.latency = self.row_cycles + 1
        super().__init__(cfg)

    @abstractmethod
    def elaborate_row(self, m: Module) -> list[Value]:
        """``sum_i w[j, i] x_i``, signed, of the row that came `row_cycles` before."""

    def elaborate(self, platform: object) -> Module:
        m = Module()

        # 1. partial sums of the row
        rows = self.elaborate_row(m)
        valid, wide, row, bias = self.i_valid, self.i_bits == 8, self.i_row, self.i_sum_acts
        for n in range(self.row_cycles):
            earlier = (wide, row, bias)
            wide, row = Signal(name=f"wide_{n}", reset_less=True), Signal(ROW_BITS, name=f"row_{n}", reset_less=True)
            bias = Signal(signed(SUM_ACTS_BITS), name=f"bias_{n}", reset_less=True)
            with m.If(valid):
                m.d.sync += [port.eq(value) for port, value in zip((wide, row, bias), earlier, strict=True)]
            following = Signal(name=f"valid_{n}")
            m.d.sync += following.eq(valid)
            valid = following

        # 2. the row's sum; the low nibbles meet the high ones
        completes = Signal()
        m.d.comb += completes.eq(valid & (~wide | row[0]))
        m.d.sync += self.o_valid.eq(completes)
        with m.If(completes):
            m.d.sync += self.o_slice.eq(Mux(wide, row[1:], row))
        for j, value in enumerate(rows):
            total = Signal(signed(ROW_SUM_BITS), name=f"total_{j}")
            high = Signal(signed(ROW_SUM_BITS), name=f"high_{j}", reset_less=True)
            m.d.comb += total.eq(value + (bias << 3))
            with m.If(valid):
                m.d.sync += [
                    high.eq(Mux(wide & ~row[0], total, 0)),
                    self.o_sums[j].eq((high << 4) + total),
                ]
        return m
