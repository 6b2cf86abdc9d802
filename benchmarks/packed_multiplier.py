"""Two products a DSP block: the multiplier engine as one would build it on an FPGA."""

from amaranth.hdl import Cat, Const, Module, Signal, Value, signed

from rtl.group_core import NIBBLE, NibbleCore
from spec.config import K_GROUP

_FIELD = 14
"""Bits to the upper product: a sum of four products of a nibble and an int8 has 14 bits, and 14 + 4 fit an 18-bit port."""

_WAYS = 4
"""Products of a packed sum."""


class PackedMultiplier(NibbleCore):
    """The nibbles of two outputs, side by side in one operand, times the activation that they share.

    Function
        ``(w_b 2^14 + q_a) x = (w_b x) 2^14 + q_a x``: the lower nibble unsigned (q = w + 8), so that packing them is wiring;
        8 times the sum of the activations is taken off the lower sum. Four packed products are added before they are parted.
    Ports, Handshake, Timing, Numbers
        See rtl/group_core.py.
    Cost
        4 * lanes products of 18 by 8 bits: two of them were 8 * lanes of 4 by 8.
    """

    def elaborate_row(self, m: Module) -> list[Value]:
        acts = [self.i_acts[8 * i :][:8].as_signed() for i in range(K_GROUP)]
        bias = Signal.like(self.i_sum_acts, reset_less=True)
        with m.If(self.i_valid):
            m.d.sync += bias.eq(self.i_sum_acts)
        rows: list[Value] = []
        for pair in range(self.cfg.dequant_lanes // 2):
            words = []
            for c in range(K_GROUP // _WAYS):
                products = []
                for i in range(_WAYS * c, _WAYS * (c + 1)):
                    low, high = (self.i_codes[NIBBLE * (K_GROUP * j + i) :][:NIBBLE] for j in (2 * pair, 2 * pair + 1))
                    products.append(Cat(low ^ (1 << NIBBLE - 1), Const(0, _FIELD - NIBBLE), high).as_signed() * acts[i])
                word = Signal(signed(2 * _FIELD), name=f"word_{pair}_{c}", reset_less=True)
                with m.If(self.i_valid):
                    m.d.sync += word.eq(sum(products))
                words.append(word)
            # a negative lower sum has borrowed one from the upper
            low = sum((word[:_FIELD].as_signed() for word in words), Const(0, signed(1)))
            high = sum((word[_FIELD:].as_signed() + word[_FIELD - 1] for word in words), Const(0, signed(1)))
            rows += [low - (bias << 3), high]
        return rows
