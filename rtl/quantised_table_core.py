"""LUT Tensor Core on ready tables of int8 entries, instead of tables that it builds from int8 activations."""

from amaranth.hdl import Const, Module, Value

from rtl.lut_tensor_core import TABLES, LutTensorCore
from rtl.table_quantiser import ENTRIES, ENTRY_BITS

__all__ = ["QuantisedTableCore"]


class QuantisedTableCore(LutTensorCore):
    """The lookups of `LutTensorCore` in tables that `TableQuantiser` made, of INT16, FP8 or FP16 activations.

    Function
        ``S = sum_b 2^b (P_b + A / 2)``, with ``P_b = sum_t +-E_t[index]``: twice what `LutTensorCore` gives, as P_b + A / 2
        need not be even. A (``i_sum_acts``) is twice the sum of the all-plus entries, -E[0], and d of the group half of the
        tables' scale, so that group dequantisation takes S, A and d as they are (docs/numerics.md section 3c).
        With signs the sums start from A / 2. ``full_table``: entries ``A_t / 2 +- E``.
    Ports
        See rtl/group_core.py; ``i_acts``: 8 tables, the lowest lowest, of 8 int8 entries in [-127, 127].
    Timing
        As `LutTensorCore`.
    Numbers
        |S| <= 255 * 2 * 8 * 127, 20 bits.
    Cost
        As `LutTensorCore`, less the adders of the tables; entries of 8 (9) bits.
    Twins
        golden/quantised_tables.py `group_sums`; test: tests/test_quantised_tables.py.
    """

    act_bits = TABLES * ENTRIES * ENTRY_BITS

    @property
    def _entry_bits(self) -> int:
        return ENTRY_BITS + self.cfg.full_table

    def _entries(self, t: int) -> list[Value]:
        e = [self.i_acts[ENTRY_BITS * (ENTRIES * t + n) :][:ENTRY_BITS].as_signed() for n in range(ENTRIES)]
        return [*(one - e[0] for one in e), *(-one - e[0] for one in e)] if self.cfg.full_table else [*e]

    def _parities(self, m: Module) -> Value:
        return Const(0, TABLES)  # A is even, and E is stored as it is
