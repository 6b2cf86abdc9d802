"""Brings the activations of a group of 32 to a common fixed point."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib.wiring import Component, In, Out

from rtl.lib.fp import named
from spec.act_formats import FIXED_BITS, HALF_FRACTION_BITS, ActFormat
from spec.config import K_GROUP, LANES

__all__ = ["BEATS", "HALF_FIELD_BITS", "FixedGroup"]

BEATS = K_GROUP // LANES
"""Beats of a group."""

HALF_FIELD_BITS = 5

_FP8_FRACTION_BITS = 3


class FixedGroup(Component):
    """From INT16, FP8 or FP16 to 19-bit integers with one exponent a group.

    Function
        v and e_G of docs/numerics.md section 2c: int16 as it is; E4M3 in units of 2^-9, exactly; FP16 in units of
        2^(e_G - 32), e_G the largest exponent field of the group (at least 1), rounded to nearest, halves up.

    Ports
        en, In(1): everything advances. i_valid, In(1), i_data, In(8 x bits): 8 activations, lowest lowest; four valid beats
        are a group. o_valid, Out(1), o_fixed, Out(8 x 19 signed): the beats in order, o_exponent, Out(5): e_G (FP16; else 0).

    Timing
        A beat an enabled edge. INT16, FP8: a beat leaves `latency` = 1 edge later. FP16: a group's first beat leaves 2 edges
        after its last has come, so `latency` = 5 after itself at full rate, and its four beats on consecutive edges.

    Cost
        FP16: registers for 56 activations, 8 right shifters of 20 bits by up to 29 places.

    Twins
        golden/act_formats.py `fixed_group`; tests/test_quantised_tables.py, tests/test_mixpe_fp.py.
    """

    en: Signal
    i_valid: Signal
    i_data: Signal
    o_valid: Signal
    o_fixed: list[Signal]
    o_exponent: Signal

    def __init__(self, form: ActFormat) -> None:
        self._form = form
        self.latency = 1 + BEATS * (form is ActFormat.FP16)
        super().__init__(
            {
                "en": In(1),
                "i_valid": In(1),
                "i_data": In(LANES * form.bits),
                "o_valid": Out(1),
                "o_fixed": Out(signed(FIXED_BITS)).array(LANES),
                "o_exponent": Out(HALF_FIELD_BITS),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bits = self._form.bits
        if self._form is ActFormat.FP16:
            valid, data, top = self._collect(m)
            m.d.comb += self.o_exponent.eq(self._held(m, "exponent", valid, top))
        else:
            valid, data, top = self.i_valid, self.i_data, Const(0)
        for lane, port in enumerate(self.o_fixed):
            x = data[bits * lane :][:bits]
            if self._form is ActFormat.INT16:
                value = named(m, f"value_{lane}", x.as_signed(), signed(FIXED_BITS))
            elif self._form is ActFormat.FP8:
                value = _fp8(m, lane, x)
            else:
                value = _fp16(m, lane, x, top)
            m.d.comb += port.eq(self._held(m, f"fixed_{lane}", valid, value))
        o_valid = Signal()
        with m.If(self.en):
            m.d.sync += o_valid.eq(valid)
        m.d.comb += self.o_valid.eq(o_valid)
        return m

    def _held(self, m: Module, name: str, valid: Value, value: Value) -> Signal:
        register = Signal(value.shape(), name=name, reset_less=True)
        with m.If(self.en & valid):
            m.d.sync += register.eq(value)
        return register

    def _collect(self, m: Module) -> tuple[Value, Value, Value]:
        """(valid, beat, e_G): the beats of whole groups, one behind the other."""
        width = len(self.i_data)
        fields = []
        for lane in range(LANES):
            field = self.i_data[16 * lane + 10 :][:HALF_FIELD_BITS]
            fields.append(named(m, f"field_{lane}", Cat(field[0] | ~field.any(), field[1:]), unsigned(HALF_FIELD_BITS)))
        while len(fields) > 1:
            fields = [Mux(b > a, b, a) for a, b in zip(fields[0::2], fields[1::2], strict=True)]
        beat_top = named(m, "beat_top", fields[0], unsigned(HALF_FIELD_BITS))

        collected = Signal(width * (BEATS - 1), reset_less=True)
        place, so_far = Signal(range(BEATS)), Signal.like(beat_top, reset_less=True)
        held, top, left = Signal(width * BEATS, reset_less=True), Signal.like(beat_top, reset_less=True), Signal(range(BEATS + 1))
        larger = named(m, "larger", Mux((place == 0) | (beat_top > so_far), beat_top, so_far), unsigned(HALF_FIELD_BITS))
        with m.If(self.en):
            with m.If(left != 0):
                m.d.sync += [left.eq(left - 1), held.eq(held >> width)]
            with m.If(self.i_valid):
                m.d.sync += [place.eq(place + 1), so_far.eq(larger), collected.eq(Cat(collected[width:], self.i_data))]
                with m.If(place == BEATS - 1):
                    m.d.sync += [held.eq(Cat(collected, self.i_data)), top.eq(larger), left.eq(BEATS)]
        return named(m, "leaves", left != 0), held[:width], top


def _fp8(m: Module, lane: int, x: Value) -> Value:
    field = x[_FP8_FRACTION_BITS:7]
    normal = field.any()
    place = Mux(normal, field - 1, 0)[:4]
    magnitude = named(m, f"magnitude_{lane}", Cat(x[:_FP8_FRACTION_BITS], normal) << place, unsigned(FIXED_BITS - 1))
    return _signed(m, lane, magnitude, x[7])


def _fp16(m: Module, lane: int, x: Value, top: Value) -> Value:
    field = x[10:15]
    normal = field.any()
    magnitude = Cat(Const(0, HALF_FRACTION_BITS + 1), x[:10], normal)
    down = named(m, f"down_{lane}", top - Cat(field[0] | ~normal, field[1:]), unsigned(HALF_FIELD_BITS))
    value = _signed(m, lane, magnitude, x[15])
    rounded = ((value >> down) + 1) >> 1
    return named(m, f"rounded_{lane}", rounded, signed(FIXED_BITS))


def _signed(m: Module, lane: int, magnitude: Value, negative: Value) -> Value:
    """Two's complement of one more bit."""
    width = len(magnitude) + 1
    return named(m, f"value_{lane}", ((magnitude ^ negative.replicate(width)) + negative)[:width].as_signed(), signed(width))
