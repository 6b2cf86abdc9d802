"""Lookup tables of the ternary engine: pipelined fill of a double buffer, lookups of all lanes, adder tree."""

from collections.abc import Sequence

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from rtl.lookup_ring import CODE_BITS
from spec.config import GROUP, TlmmConfig
from spec.layout import index_code

__all__ = ["LookupTables", "fill_order", "tree_stages"]

_TREE_WAYS = 4
"""Summands of one pipeline stage of the adder tree: two levels of two-input adders."""

_BIAS = 512
"""Entries are stored as unsigned value + 512, so that sums need no sign extension."""

_LAST_SUMMANDS = 2
"""Partial sums that the accumulator adds itself."""


def fill_order(full_table: bool) -> list[tuple[int, int, int]]:
    """Trits of the entries in the order of the fill: each differs from the one before (zero at first) by 1 in one trit.

    27 entries, or, for a table of half size, the 14 whose value t0 + 3*t1 + 9*t2 is not negative.
    """
    wanted = [(a, b, c) for c in (0, 1, -1) for b in (0, 1, -1) for a in (1, 0, -1)]
    if not full_table:
        wanted = [t for t in wanted if t[0] + 3 * t[1] + 9 * t[2] >= 0]

    def extend(path: list[tuple[int, int, int]]) -> bool:
        if len(path) == len(wanted):
            return True
        for trits in wanted:
            if trits not in path and sum(abs(a - b) for a, b in zip(path[-1], trits, strict=True)) == 1:
                if extend([*path, trits]):
                    path.append(trits)
                    return True
        return False

    raise NotImplementedError


def tree_stages(tables: int) -> int:
    """Pipeline stages from the lookup to at most 2 partial sums a lane; the lookup is in the first."""
    stages, left = 1, -(-tables // _TREE_WAYS)
    while left > _LAST_SUMMANDS:
        stages, left = stages + 1, -(-left // _TREE_WAYS)
    return stages
