"""Builds the tables of a group of 32 activations and quantises them to int8."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, stream
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import Component, In, Out

from rtl.fixed_group import BEATS, FixedGroup
from rtl.group_feed import GROUP_SUM_BITS
from rtl.lib.delay import Delay
from rtl.lib.fp import leading_zeros, named
from rtl.lut_tensor_core import TABLE_K
from spec.act_formats import FIXED_BITS, RECIPROCAL_BITS, ActFormat
from spec.config import LANES

__all__ = ["ENTRIES", "ENTRY_BITS", "TableBeat", "TableQuantiser"]

ENTRIES = 8
"""Entries of a table that are stored; the others are their negatives."""

ENTRY_BITS = 8
"""[-127, 127]"""

_TABLES = LANES // TABLE_K
"""Tables of a beat."""

_SUM_BITS = FIXED_BITS - 1 + 2
"""Of a sum of four magnitudes."""

_FACTOR_BITS = RECIPROCAL_BITS - 7
"""Of the reciprocal of an 8-bit significand."""

_DROPPED = RECIPROCAL_BITS + 5
"""Fraction bits of an entry's product."""

_UNIT = {ActFormat.INT16: 0, ActFormat.FP8: -9, ActFormat.FP16: -32}
"""log2 of what 1 in fixed point is worth, less e_G for FP16."""

TableBeat = data.StructLayout(
    {
        "entries": data.ArrayLayout(signed(ENTRY_BITS), _TABLES * ENTRIES),
        "scale": unsigned(16),
        "sum_acts": signed(GROUP_SUM_BITS),
        "last": unsigned(1),
    }
)
"""Two tables, the lower first, 8 entries each; ``scale``: the group's d; ``sum_acts``: A, complete with ``last``."""


class TableQuantiser(Component):
    """Tables with int8 entries from INT16, FP8 or FP16 activations, as they come.

    Function
        Entry w2w1w0 of a table is ``T = -x3 +- x2 +- x1 +- x0``, divided by the group's table scale and rounded. The scale is
        (the largest sum of four magnitudes of the 8 tables) / 127, rounded up to a bfloat16, so that nothing clips;
        ``scale`` is half of it, ``sum_acts`` twice the sum of the all-plus entries (docs/numerics.md section 2c).
    Streams
        ``i_x``: beats of 8 activations, lowest lowest; four are a group. ``o_tables``: `TableBeat`, a beat for each.
    Handshake
        ``i_x.ready`` follows ``o_tables.ready``: all of it stands still while a beat waits to be taken. Gaps may be anywhere.
    Timing
        A beat a cycle. `latency` cycles from a group's first beat to its first beat of tables, at full rate.
    Numbers
        An entry is within (1/2 + 2^-8) scales of the exact sum of the fixed-point activations.
    Cost
        16 products of 21 by 17 bits, 28 adders of 21 bits, 8 left shifters; a table of 128 reciprocals.
    Twins
        golden/quantised_tables.py `quantise`; test: tests/test_quantised_tables.py.
    """

    i_x: stream.Interface
    o_tables: stream.Interface

    def __init__(self, form: ActFormat) -> None:
        self._form = form
        self.latency = 11 + BEATS * (form is ActFormat.FP16)
        super().__init__(
            {
                "i_x": In(stream.Signature(data.ArrayLayout(unsigned(form.bits), LANES))),
                "o_tables": Out(stream.Signature(TableBeat)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        en = Signal()
        o_valid = Signal()
        m.d.comb += [en.eq(~o_valid | self.o_tables.ready), self.i_x.ready.eq(en), self.o_tables.valid.eq(o_valid)]

        def register(name: str, value: Value) -> Signal:
            """`value` as it was an enabled edge ago."""
            following = Signal(value.shape(), name=name, reset_less=True)
            with m.If(en):
                m.d.sync += following.eq(value)
            return following

        # 1. a common fixed point
        m.submodules.fixed = fixed = FixedGroup(self._form)
        m.d.comb += [fixed.en.eq(en), fixed.i_valid.eq(self.i_x.valid), fixed.i_data.eq(Value.cast(self.i_x.payload))]

        # 2. collect the group, find its largest sum of four magnitudes
        beat = Cat(fixed.o_fixed)
        magnitudes = [
            named(m, f"magnitude_{lane}", Mux(x[-1], -x, x), unsigned(FIXED_BITS - 1)) for lane, x in enumerate(fixed.o_fixed)
        ]
        sums = [
            named(m, f"sum_{t}", sum(magnitudes[TABLE_K * t :][:TABLE_K], Const(0)), unsigned(_SUM_BITS)) for t in range(_TABLES)
        ]
        place, so_far = Signal(range(BEATS)), Signal(_SUM_BITS, reset_less=True)
        most = named(m, "most", sums[0], unsigned(_SUM_BITS))
        for number, other in enumerate([*sums[1:], Mux(place == 0, 0, so_far)]):
            most = named(m, f"most_{number}", Mux(other > most, other, most), unsigned(_SUM_BITS))
        collected = Signal(len(beat) * (BEATS - 1), reset_less=True)
        group, left = Signal(len(beat) * BEATS, reset_less=True), Signal(range(BEATS + 1))
        largest, exponent = Signal.like(most, reset_less=True), Signal.like(fixed.o_exponent, reset_less=True)
        with m.If(en):
            with m.If(left != 0):
                m.d.sync += [left.eq(left - 1), group.eq(group >> len(beat))]
            with m.If(fixed.o_valid):
                m.d.sync += [place.eq(place + 1), so_far.eq(most), collected.eq(Cat(collected[len(beat) :], beat))]
                with m.If(place == BEATS - 1):
                    m.d.sync += [group.eq(Cat(collected, beat)), largest.eq(most), exponent.eq(fixed.o_exponent), left.eq(BEATS)]

        # From here on the four beats of a group come on consecutive edges, while what is common to them stands still.
        flags, beats, scales = Delay(3, 5, reset=True), Delay(len(beat), 2), Delay(1 + 15, 3)
        m.submodules.flags, m.submodules.beats, m.submodules.scales = flags, beats, scales
        m.d.comb += [delay.en.eq(en) for delay in (flags, beats, scales)]
        m.d.comb += [flags.i.eq(Cat(left != 0, left == BEATS, left == 1)), beats.i.eq(group[: len(beat)])]

        # 3. the largest sum to the top of its bits
        zeros = leading_zeros(m, "zeros", largest)
        up_3, normal = register("up_3", zeros), register("normal", (largest << zeros)[:_SUM_BITS])
        exponent_3 = register("exponent_3", exponent)

        # 4. its 127th, rounded up to 8 bits
        significand, wide = _by_127(m, normal)
        field = named(m, "field", 138 + _UNIT[self._form] + exponent_3 + wide - up_3, unsigned(8))
        up_4, significand_4 = register("up_4", up_3), register("significand_4", significand)
        field_4, wide_4 = register("field_4", field), register("wide_4", wide)
        m.d.comb += scales.i.eq(Cat(wide_4, Cat(significand_4[:7], field_4) & significand_4[7].replicate(15)))

        # 5. the reciprocal of that; activations to the place of the largest sum
        m.submodules.reciprocals = table = Memory(
            shape=_FACTOR_BITS, depth=128, init=[((1 << RECIPROCAL_BITS) - 1) // (128 + n) for n in range(128)]
        )
        read = table.read_port(domain="comb")
        m.d.comb += read.addr.eq(significand_4[:7])
        factor_5 = register("factor_5", read.data)
        fixed_4 = [beats.o[FIXED_BITS * lane :][:FIXED_BITS].as_signed() for lane in range(LANES)]
        acts = [register(f"act_{lane}", (x << up_4)[: _SUM_BITS + 1].as_signed()) for lane, x in enumerate(fixed_4)]

        # 6. entries, exact
        entries = []
        for t in range(_TABLES):
            x0, x1, x2, x3 = acts[TABLE_K * t :][:TABLE_K]
            for index in range(ENTRIES):
                low = (x0 if index & 1 else -x0) + (x1 if index & 2 else -x1)
                total = low + ((x2 if index & 4 else -x2) - x3)
                entries.append(register(f"entry_{t}_{index}", total[: _SUM_BITS + 1].as_signed()))
        factor_6 = register("factor_6", factor_5)

        # 7. times the reciprocal; one bit below the entry stays
        products = [register(f"product_{n}", (e * factor_6)[_DROPPED - 1 :].as_signed()) for n, e in enumerate(entries)]

        # 8. round to nearest, halves up
        wide_7, scale_7 = scales.o[0], scales.o[1:]
        valid_7, first_7, last_7 = flags.o
        rounded = [
            named(m, f"rounded_{n}", (Mux(wide_7, product >> 1, product) + 1) >> 1, signed(ENTRY_BITS))
            for n, product in enumerate(products)
        ]
        o = self.o_tables.payload
        all_minus = sum((rounded[ENTRIES * t] for t in range(_TABLES)), Const(0))
        total = named(m, "total", Mux(first_7, 0, o.sum_acts) - (all_minus << 1), signed(GROUP_SUM_BITS))
        with m.If(en):
            m.d.sync += o_valid.eq(valid_7)
            with m.If(valid_7):
                m.d.sync += [o.entries[n].eq(value) for n, value in enumerate(rounded)]
                m.d.sync += [o.scale.eq(scale_7), o.sum_acts.eq(total), o.last.eq(last_7)]
        return m


def _by_127(m: Module, normal: Value) -> tuple[Value, Value]:
    """(m, wide) of docs/numerics.md section 2c: 127 = 128 - 1, so y = 128 h + l is 127 h + (h + l)."""
    y = named(m, "y", ((normal + 31) >> 5) + 126)
    rest = named(m, "rest", y[7:] + y[:7])
    quotient = named(m, "quotient", y[7:] + (rest >= 127) + (rest >= 2 * 127) + (rest >= 3 * 127), unsigned(9))
    wide = quotient[8]
    return named(m, "significand", Mux(wide, (quotient + 1) >> 1, quotient), unsigned(8)), wide
