"""Group dequantisation: what a group's integer sums add to the accumulators (docs/numerics.md section 3b, steps 2 and 3)."""

from collections.abc import Sequence

from amaranth.hdl import Array, Cat, Const, Module, ShapeLike, Signal, Value, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from rtl.group_feed import GROUP_SUM_BITS, MOST_SHIFT
from spec.config import ACT_SCALE_BITS, ALIGN_BITS, GroupMatmulConfig

__all__ = ["EXPONENT_BITS", "HALF_BITS", "TERM_BITS", "GroupDequant", "Half", "PassScales", "scale_rows", "term"]

_MOST_SUM_BITS = 28
"""So that all registers below hold what they must: 28 + 11 + 8 bits of V."""

_FACTOR = 32
_ALIGNED = 2 * _FACTOR
_VALUE = 64 - ACT_SCALE_BITS
"""Bits of the registers of a lane. Their values need fewer (`GroupMatmulConfig.sum_bits`, `term_bits`); with these widths no
expression is wider than 64 bits or needs a sign extension of its own, which simulates twice as fast. Synthesis merges the
registers that only repeat a sign, but makes its multipliers as wide as they are written: hence ``narrow``."""

TERM_BITS = _VALUE + ACT_SCALE_BITS
"""Bits of a term, 64."""

EXPONENT_BITS = 5
"""Exponent field of an FP16."""

HALF_BITS = 12
"""Significand of an FP16, with its sign."""

PassScales = data.StructLayout(
    {
        "sum_acts": signed(GROUP_SUM_BITS),
        "significand": unsigned(8),
        "shift": range(MOST_SHIFT + 1),
        "exponent": unsigned(EXPONENT_BITS),
    }
)
"""Of one token and group: A, m_G, min(X - e_G, 63), and the matrix's E."""


class GroupDequant(wiring.Component):
    """Scales ``dequant_lanes`` group sums a cycle.

    Function
        ``V = ((S m_s) << 8 >> (E - e_s)) + ((A m_z) << 8 >> (E - e_z))``, ``o_terms = (V m_G) >> shift``; both right shifts
        round down. m, e of an FP16: signed significand, exponent field of at least 1.
    Ports
        ``i_valid``, ``i_slice``, ``i_sums`` (S of outputs ``slice*dequant_lanes`` and on), ``i_scales`` (`PassScales`),
        ``i_tag``. One cycle later ``i_row``: the scale row of the block, FP16 scale of output j at bits 16j, minimum at
        bits ``16 * (lanes + j)``. ``o_valid``, ``o_terms``, ``o_tag``.
    Timing
        `latency` = 5 cycles, ``dequant_lanes`` sums a cycle, always ready.
    Numbers
        Exact integers but the shifts; finite FP16 with exponents up to E.
    Cost
        A lane: products of 21 x 12, 13 x 12 and 41 x 9 bits, three barrel shifters.
    Twins
        golden/group_dequant.py `accumulate_sums`; test: tests/test_group_dequant.py.

    Parameters
    ----------
    sum_bits
        Bits of a sum, up to 28; by default those of the integer cores.
    narrow
        Registers have the bits that their values need: what to synthesise. By default those that simulate fast.
    """

    latency = 5

    i_valid: Signal
    i_slice: Signal
    i_sums: list[Signal]
    i_scales: data.View
    i_tag: Signal
    i_row: Signal
    o_valid: Signal
    o_terms: list[Signal]
    o_tag: Signal

    def __init__(self, cfg: GroupMatmulConfig, tag: ShapeLike, *, sum_bits: int | None = None, narrow: bool = False) -> None:
        sum_bits = cfg.sum_bits if sum_bits is None else sum_bits
        if sum_bits > _MOST_SUM_BITS:
            raise ValueError(f"sums have at most {_MOST_SUM_BITS} bits, not {sum_bits}")
        self._sum_bits = sum_bits
        self._cfg = cfg
        self._narrow = narrow
        lanes = cfg.dequant_lanes
        super().__init__(
            {
                "i_valid": In(1),
                "i_slice": In(range(max(2, cfg.slices))),
                "i_sums": In(signed(sum_bits)).array(lanes),
                "i_scales": In(PassScales),
                "i_tag": In(tag),
                "i_row": In(8 * cfg.row_bytes),
                "o_valid": Out(1),
                "o_terms": Out(signed(TERM_BITS)).array(lanes),
                "o_tag": Out(tag),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        cfg, lanes = self._cfg, self._cfg.dequant_lanes
        factor, aligned, value_bits = _FACTOR, _ALIGNED, _VALUE
        if self._narrow:
            factor, aligned = self._sum_bits, self._sum_bits + HALF_BITS + ALIGN_BITS
            value_bits = cfg.term_bits + self._sum_bits - cfg.sum_bits
        # stage n works on what the registers of stage n - 1 hold
        valid = [self.i_valid, *(Signal(name=f"valid_{n}") for n in range(1, self.latency + 1))]
        scales = [self.i_scales, *(Signal(PassScales, name=f"scales_{n}", reset_less=True) for n in range(1, self.latency))]
        tags = [self.i_tag, *(Signal.like(self.i_tag, name=f"tag_{n}", reset_less=True) for n in range(1, self.latency + 1))]
        for n in range(self.latency):
            m.d.sync += valid[n + 1].eq(valid[n])
            with m.If(valid[n]):
                m.d.sync += tags[n + 1].eq(tags[n])
                if n + 1 < self.latency:
                    m.d.sync += scales[n + 1].eq(scales[n])
        m.d.comb += [self.o_valid.eq(valid[-1]), self.o_tag.eq(tags[-1])]

        # 1. sums wait for the scales of their slice
        part = Signal.like(self.i_slice, reset_less=True)
        with m.If(valid[0]):
            m.d.sync += part.eq(self.i_slice)
        halves = Signal(32 * lanes)
        m.d.comb += halves.eq(scale_rows(cfg, self.i_row, part))

        sum_acts = Signal(signed(GROUP_SUM_BITS if self._narrow else factor))  # of stage 1
        m.d.comb += sum_acts.eq(_extend(scales[1].sum_acts, factor))

        for lane in range(lanes):
            # 2. integer times significand: |S| * 2047 * 2^8 < 2^46
            low, width = (0, HALF_BITS) if self._narrow else (ALIGN_BITS, _FACTOR)
            weight, minimum = (Half(halves[16 * n :][:16], low, width) for n in (lane, lanes + lane))
            total = Signal(signed(factor), name=f"sum_{lane}", reset_less=True)
            scaled = Signal(signed(aligned), name=f"scaled_{lane}", reset_less=True)
            offset = Signal(signed(aligned), name=f"offset_{lane}", reset_less=True)
            down = Signal(EXPONENT_BITS, name=f"down_{lane}", reset_less=True)
            offset_down = Signal(EXPONENT_BITS, name=f"offset_down_{lane}", reset_less=True)
            with m.If(valid[0]):
                m.d.sync += total.eq(_extend(self.i_sums[lane], factor))
            with m.If(valid[1]):
                m.d.sync += [
                    scaled.eq(self._up(total * weight.significand)),
                    down.eq(scales[1].exponent - weight.exponent),
                    offset.eq(self._up(sum_acts * minimum.significand)),
                    offset_down.eq(scales[1].exponent - minimum.exponent),
                ]
            # 3. align and add
            value = Signal(signed(value_bits), name=f"value_{lane}", reset_less=True)
            with m.If(valid[2]):
                m.d.sync += value.eq(((scaled >> down) + (offset >> offset_down))[:value_bits].as_signed())
            # 4., 5. times the activation scale
            scaled_term = term(m, lane, valid[3:], value, scales[3].significand, scales[4].shift)
            m.d.comb += self.o_terms[lane].eq(scaled_term)
        return m

    def _up(self, product: Value) -> Value:
        """Times 2^ALIGN_BITS, which wide significands have in them."""
        return product << ALIGN_BITS if self._narrow else product


def scale_rows(cfg: GroupMatmulConfig, row: Value, part: Value) -> Value:
    """FP16 scales, then minima, of the ``dequant_lanes`` outputs of slice `part`, out of a scale row."""
    kinds, width = (row[: 16 * cfg.lanes], row[16 * cfg.lanes :]), 16 * cfg.dequant_lanes
    return Cat(Array(kind.word_select(s, width) for s in range(cfg.slices))[part] for kind in kinds)


def term(m: Module, lane: int, valid: Sequence[Value], value: Value, significand: Value, shift: Value) -> Signal:
    """``(value significand) >> shift`` in two stages, of which `valid` says when they work; `shift` one cycle later."""
    product = Signal(signed(TERM_BITS), name=f"product_{lane}", reset_less=True)
    with m.If(valid[0]):
        m.d.sync += product.eq(value * significand)
    result = Signal.like(product, name=f"term_{lane}", reset_less=True)
    with m.If(valid[1]):
        m.d.sync += result.eq(product >> shift)
    return result


class Half:
    """Signed significand, times 2^low, in `width` bits, and exponent (at least 1) of the bits of a finite FP16."""

    def __init__(self, bits: Value, low: int = 0, width: int = HALF_BITS) -> None:
        normal = bits[10:15].any()
        magnitude = Cat(Const(0, low), bits[:10], normal)
        # two's complement by hand: a choice between two values would be a branch in the simulator, taken at random
        self.significand = ((magnitude ^ bits[15].replicate(width)) + bits[15])[:width].as_signed()
        self.exponent = Cat(bits[10] | ~normal, bits[11:15])


def _extend(value: Value, width: int) -> Value:
    """Sign extension as an addition, which Verilator makes one of (and not a choice for each bit)."""
    return value + Const(0, signed(width - 1))
