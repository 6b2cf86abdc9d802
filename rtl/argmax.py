"""Largest of a sequence of beats of 8 float32, and where it was."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, unsigned
from amaranth.lib import data
from amaranth.lib.wiring import Component, In, Out

from rtl.lib.fp import is_nan, named
from rtl.lib.ports import VectorRow
from spec.config import LANES

ROW_BITS = 32
_LANE_BITS = (LANES - 1).bit_length()


class Argmax(Component):
    """Row number of the largest value since a reset; the lowest row wins a tie.

    Function
        Values compare as floats: -0 = +0; a NaN never wins. Before anything won the row is 0.

    Ports
        en, In(1): the pipeline advances. i_reset, In(1): forget (in the pipeline too; independent of `en`).
        i_valid, In(1); i_data, In(8 x 32): rows ``8 * i_beat`` and up; i_lanes, In(4): so many are real, the lowest.
        o_row, Out(32). o_busy, Out(1): beats are under way.

    Timing
        `latency` 4 enabled edges, one beat an edge: three levels of a tree, then the best so far.

    Numbers
        Exact.

    Cost
        8 comparisons of 32 bits, about 500 registers.

    Twins
        golden/epilogue.py `argmax`, tests/test_epilogue.py.
    """

    latency = _LANE_BITS + 1
    en: Signal
    i_reset: Signal
    i_valid: Signal
    i_data: data.View
    i_beat: Signal
    i_lanes: Signal
    o_row: Signal
    o_busy: Signal

    def __init__(self) -> None:
        super().__init__(
            {
                "en": In(1),
                "i_reset": In(1),
                "i_valid": In(1),
                "i_data": In(VectorRow),
                "i_beat": In(ROW_BITS - _LANE_BITS),
                "i_lanes": In(range(LANES + 1)),
                "o_row": Out(ROW_BITS),
                "o_busy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()

        # Keys order as the floats do, as unsigned integers; 0 is below -inf and stands for what cannot win.
        level: list[tuple[Value, Value]] = []
        for lane in range(LANES):
            y = self.i_data[lane]
            negative = named(m, f"negative_{lane}", y[31] & y[0:31].any())
            key = Cat(y[0:31] ^ negative.replicate(31), ~negative)
            wins = ~is_nan(y) & (lane < self.i_lanes)
            level.append((named(m, f"key_{lane}", key & wins.replicate(32)), Const(lane, _LANE_BITS)))

        # 1. to 3. tree
        depth = 0
        valid = Cat(self.i_valid)
        beat: Value = self.i_beat
        flying: list[Value] = []
        while len(level) > 1:
            depth += 1
            following: list[tuple[Value, Value]] = []
            for n, ((key_a, lane_a), (key_b, lane_b)) in enumerate(zip(level[0::2], level[1::2], strict=True)):
                above = named(m, f"above_{depth}_{n}", key_b > key_a)
                key = Signal(32, name=f"key_{depth}_{n}", reset_less=True)
                lane = Signal(_LANE_BITS, name=f"lane_{depth}_{n}", reset_less=True)
                with m.If(self.en):
                    m.d.sync += [key.eq(Mux(above, key_b, key_a)), lane.eq(Mux(above, lane_b, lane_a))]
                following.append((key, lane))
            next_valid = Signal(name=f"valid_{depth}")
            next_beat = Signal(unsigned(ROW_BITS - _LANE_BITS), name=f"beat_{depth}", reset_less=True)
            with m.If(self.en):
                m.d.sync += [next_valid.eq(valid), next_beat.eq(beat)]
            with m.If(self.i_reset):
                m.d.sync += next_valid.eq(0)
            level, valid, beat = following, next_valid, next_beat
            flying.append(next_valid)

        # 4. best so far
        best = Signal(32)
        (key, lane), *_ = level
        with m.If(self.en & valid & (key > best)):
            m.d.sync += [best.eq(key), self.o_row.eq(Cat(lane, beat))]
        with m.If(self.i_reset):
            m.d.sync += [best.eq(0), self.o_row.eq(0)]
        m.d.comb += self.o_busy.eq(Cat(*flying).any())
        return m
