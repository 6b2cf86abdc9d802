"""The ablation of "LUT Tensor Core" (Mo et al., ISCA 2025, table 2) as generated tiles of equal function.

A tile is the paper's M x N x 4: M tables of four activations (one a token), N columns of weights, a multiplexer for each of
the M * N sums, one bit plane of four inputs a cycle: 4 M N one-bit multiply-accumulates. Each step keeps the ones before it.
"""

from enum import StrEnum

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from spec.config import K_GROUP

__all__ = ["ENTRY_BITS", "TABLE_K", "LutTile", "Precompute", "Step"]

TABLE_K = 4
"""Activations of a table."""

ENTRY_BITS = 10
"""Sum of up to four activations of [-127, 127], and a sign."""

_SUM_ACTS_BITS = 13
"""A = sum of the group's activations, and a sign."""


class Step(StrEnum):
    """What a tile has, with all before it."""

    CONVENTIONAL = "conventional table, 16 entries"
    """Sums of the activations whose bit is set; each tile builds its own tables."""
    REINTERPRETED = "+ weight reinterpretation, 8 entries and a sign"
    """Bits mean +-1 (equations 1 to 3), ``T[~w] = -T[w]`` (equation 5): the other half by complementing index and entry."""
    COMPLEMENTED = "+ complement of the index offline"
    """Weights are stored with the index that is looked up (equation 6)."""
    SHARED = "+ shared precomputation"
    """Tables come in; what builds them serves many tiles."""

    @property
    def signed(self) -> bool:
        """Half of the entries, and a sign."""
        return self is not Step.CONVENTIONAL

    @property
    def entries(self) -> int:
        """Of a table."""
        return 8 if self.signed else 16


class Precompute(wiring.Component):
    """Entries of `rows` tables, combinationally.

    Function
        With a sign: entry ``w2 w1 w0`` is ``x3 -+ x2 -+ x1 -+ x0``, minus where the bit is 1: the negative of equation 5's,
        so that each entry is one addition, 12 a table. Without: entry ``w3 w2 w1 w0`` is the sum of the x whose bit is 1, 11
        additions.
    """

    def __init__(self, step: Step, rows: int) -> None:
        self._signed, self._rows, self._entries = step.signed, rows, step.entries
        super().__init__(
            {"i_acts": In(8 * TABLE_K * rows), "o_tables": Out(signed(ENTRY_BITS)).array(rows, step.entries)}
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for row in range(self._rows):
            x = [self.i_acts[8 * (TABLE_K * row + i) :][:8].as_signed() for i in range(TABLE_K)]
            # sums of two first, by their two bits
            if self._signed:
                low = [Signal(signed(ENTRY_BITS - 1), name=f"low_{row}_{n}") for n in range(2)]
                high = [Signal.like(low[0], name=f"high_{row}_{n}") for n in range(2)]
                m.d.comb += [low[0].eq(x[1] - x[0]), low[1].eq(x[1] + x[0])]
                m.d.comb += [high[0].eq(x[3] + x[2]), high[1].eq(x[3] - x[2])]
                for entry, port in enumerate(self.o_tables[row]):
                    pair = low[(entry & 1) ^ (entry >> 1 & 1) ^ 1]
                    first = high[entry >> 2]
                    m.d.comb += port.eq(first - pair if entry & 2 else first + pair)
            else:
                choices: list[list[Value]] = [[Const(0, 8), a, b, a + b] for a, b in ((x[0], x[1]), (x[2], x[3]))]
                for entry, port in enumerate(self.o_tables[row]):
                    m.d.comb += port.eq(choices[0][entry & 3] + choices[1][entry >> 2])
        return m


class LutTile(wiring.Component):
    """Sums over groups of 32 inputs by lookups on bit planes, the lowest first.

    Function
        ``o_sums[m][n] = S = sum_i q[n, i] x[m, i]``, q an unsigned code of `bits` bits. With a sign ``sum q' x`` of
        ``q' = 2q - (2^bits - 1)``, that is ``2 S - (2^bits - 1) A``: equal in the end, as the scale and the minimum that
        follow are halved and moved offline (``s', z'`` of equation 3).
    Ports
        A cycle with ``i_valid`` is plane ``i_plane`` of four inputs: ``i_index``, a nibble a column, the highest input highest
        (`Step.COMPLEMENTED`: golden's `plane_nibbles`). ``i_load``: the first plane of these inputs, with ``i_acts`` (four
        int8 a row) or, `Step.SHARED`, ``i_tables`` (`Precompute`). ``i_start``: the first of the group, with ``i_sum_acts``.
    Timing
        Operands and tables are registered, then looked up and added: ``o_sums`` two cycles after a plane.

    Parameters
    ----------
    corrected
        With a sign: S all the same, with no other minimum. The sums start from ``(2^bits - 1) A`` and drop their lowest bit,
        a 0. The paper does not count it.
    """

    def __init__(self, step: Step, *, rows: int, columns: int, bits: int, corrected: bool = False) -> None:
        if corrected and not step.signed:
            raise ValueError("there is nothing to correct in a conventional table")
        self.step, self.rows, self.columns, self.bits, self.corrected = step, rows, columns, bits, corrected
        sum_bits = (K_GROUP * 127 * ((1 << bits) - 1)).bit_length() + 1
        self._acc_bits = sum_bits + corrected
        ports: dict[str, wiring.Member] = {
            "i_valid": In(1),
            "i_load": In(1),
            "i_start": In(1),
            "i_plane": In(range(max(2, bits))),
            "i_index": In(TABLE_K * columns),
            "o_sums": Out(signed(sum_bits)).array(rows, columns),
        }
        if corrected:
            ports["i_sum_acts"] = In(signed(_SUM_ACTS_BITS)).array(rows)
        if step is Step.SHARED:
            ports["i_tables"] = In(signed(ENTRY_BITS)).array(rows, step.entries)
        else:
            ports["i_acts"] = In(8 * TABLE_K * rows)
        super().__init__(ports)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        step = self.step

        # 0. operands
        if step is Step.SHARED:
            entries = self.i_tables
        else:
            m.submodules.precompute = precompute = Precompute(step, self.rows)
            m.d.comb += precompute.i_acts.eq(self.i_acts)
            entries = precompute.o_tables
        valid, start = Signal(), Signal(reset_less=True)
        plane = Signal.like(self.i_plane, reset_less=True)
        index = Signal.like(self.i_index, reset_less=True)
        m.d.sync += valid.eq(self.i_valid)
        with m.If(self.i_valid):
            m.d.sync += [start.eq(self.i_start), plane.eq(self.i_plane), index.eq(self.i_index)]
        tables: list[list[Signal]] = []
        for row in range(self.rows):
            tables.append([Signal(signed(ENTRY_BITS), name=f"entry_{row}_{n}", reset_less=True) for n in range(step.entries)])
            with m.If(self.i_valid & self.i_load):
                m.d.sync += [register.eq(entry) for register, entry in zip(tables[row], entries[row], strict=True)]
        origins: list[Value] = [Const(0, self._acc_bits)] * self.rows
        if self.corrected:
            registers = [Signal(signed(self._acc_bits), name=f"origin_{row}", reset_less=True) for row in range(self.rows)]
            with m.If(self.i_valid & self.i_start):
                m.d.sync += [port.eq((acts << self.bits) - acts) for port, acts in zip(registers, self.i_sum_acts, strict=True)]
            origins = [*registers]

        # 1. look up, negate, shift, add
        for column in range(self.columns):
            nibble = index[TABLE_K * column :][:TABLE_K]
            highest = nibble[-1]
            address = nibble
            if step.signed:
                address = nibble[:-1] ^ highest.replicate(3) if step is Step.REINTERPRETED else nibble[:-1]
            for row in range(self.rows):
                entry = _choose(tables[row], address).as_signed()
                acc = Signal(signed(self._acc_bits), name=f"acc_{row}_{column}", reset_less=True)
                base = Mux(start, origins[row], acc)
                # entries are the negatives: a clear highest bit subtracts. Inverted before the shift, which shifts in the
                # same bit, and the carry enters below.
                minus = ~highest if step.signed else Const(0, 1)
                inverted = (entry ^ minus.replicate(ENTRY_BITS))[:ENTRY_BITS]
                below = Cat(minus.replicate(self.bits), inverted).as_signed()
                addend = Signal(signed(self._acc_bits + 1), name=f"addend_{row}_{column}")
                m.d.comb += addend.eq((below << plane) >> self.bits - 1 if self.bits > 1 else below)
                total = (Cat(minus, base) + addend)[1:][: self._acc_bits].as_signed()
                with m.If(valid):
                    m.d.sync += acc.eq(total)
                m.d.comb += self.o_sums[row][column].eq(acc[int(self.corrected) :].as_signed())
        return m


def _choose(values: list[Signal], address: Value) -> Value:
    """A tree of two-way choices: what every synthesiser knows how to map."""
    level: list[Value] = list(values)
    for bit in address:
        level = [Mux(bit, level[n + 1], level[n]) for n in range(0, len(level), 2)]
    return level[0]
