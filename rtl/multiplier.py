"""The baseline of the group engines: 4-bit by 8-bit multipliers."""

from amaranth.hdl import Module, Signal, Value, signed

from rtl.group_core import NIBBLE, NibbleCore
from spec.config import K_GROUP

__all__ = ["MultiplierCore"]

_WAYS = 8
"""Products of a partial sum."""


class MultiplierCore(NibbleCore):
    """Multiplies and adds up, dequantised after the group as the other engines, so that only the arithmetic differs.

    Function
        ``sum_i w[j, i] x_i`` by ``*``; the rest is `NibbleCore`'s.
    Ports, Handshake, Timing, Numbers
        See rtl/group_core.py.
    Cost
        8 * lanes multipliers of 4 by 8 bits.
    Twins
        golden/multiplier.py; test: tests/test_multiplier.py.
    """

    def elaborate_row(self, m: Module) -> list[Value]:
        acts = [self.i_acts[8 * i :][:8].as_signed() for i in range(K_GROUP)]
        rows = []
        for j in range(self.cfg.dequant_lanes):
            weights = [self.i_codes[NIBBLE * (K_GROUP * j + i) :][:NIBBLE].as_signed() for i in range(K_GROUP)]
            products = [w * x for w, x in zip(weights, acts, strict=True)]
            partial = [Signal(signed(14), name=f"partial_{j}_{c}", reset_less=True) for c in range(K_GROUP // _WAYS)]
            with m.If(self.i_valid):
                for c, total in enumerate(partial):
                    m.d.sync += total.eq(sum(products[_WAYS * c :][:_WAYS]))
            rows.append(sum(partial))
        return rows
