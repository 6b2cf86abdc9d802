"""MixPE: group sums by gated shifts and adds on signed nibbles, without multipliers."""

from amaranth.hdl import Cat, Const, Module, Signal, Value
from amaranth.lib.memory import Memory

from rtl.group_core import NIBBLE, NibbleCore
from spec.config import K_GROUP

__all__ = ["MixPe"]

_WAYS = 8
"""Gated words of a partial sum."""

_FIELD = 12
"""Bits of a field: 16 biased activations."""

_BIAS = 0x80


def _word(field: int, gates: int) -> int:
    """`field` in the places of the bits of `gates`."""
    return sum(field << _FIELD * b for b in range(NIBBLE) if gates >> b & 1)


class MixPe(NibbleCore):
    """Activations gated by the bits of a two's complement nibble, shifted and added (Zhang et al., arXiv:2411.16158).

    Function
        ``w x = (x & b0) + ((x & b1) << 1) + ((x & b2) << 2) - ((x & b3) << 3)`` for ``w = -8 b3 + 4 b2 + 2 b1 + b0``.
        Shifts come last: ``sum w x = G0 + 2 G1 + 4 G2 - 8 G3`` with ``G_b = sum (x & b_b)``, so that the adders are as
        narrow as activations. The four gated copies stand side by side in a word, whose sums make all four G at once;
        biased (x + 128, or 128 where the gate is shut), so that no carry leaves a field.
    Ports, Handshake
        See rtl/group_core.py.
    Timing
        Latency 3: row and activations are registered first.
    Numbers
        Fields of 12 bits hold sums of 16. Nothing overflows.
    Cost
        8 * lanes processing elements: 4 gates of 8 bits, an adder of 48.
        The gates are written as a table of 16 constants that a nibble addresses, as Verilator is quick with tables; to
        synthesis its outputs are the nibble's bits.
    Twins
        golden/mixpe.py; test: tests/test_mixpe.py.
    """

    row_cycles = 2

    def elaborate_row(self, m: Module) -> list[Value]:
        # 0. four copies of each activation
        codes = Signal.like(self.i_codes, reset_less=True)
        copies = [Signal(NIBBLE * _FIELD, name=f"copies_{i}", reset_less=True) for i in range(K_GROUP)]
        valid = Signal()
        m.d.sync += valid.eq(self.i_valid)
        with m.If(self.i_valid):
            m.d.sync += codes.eq(self.i_codes)
            for i, word in enumerate(copies):
                x = self.i_acts[8 * i :][:8]
                m.d.sync += word.eq(Cat(Cat(x[:-1], ~x[-1], Const(0, _FIELD - 8)) for _ in range(NIBBLE)))

        # 1. gate, add up eight  (slice, 32) -> (slice, 4)
        width = NIBBLE * _FIELD
        m.submodules.gate = gate = Memory(shape=width, depth=16, init=[_word(0xFF, n) for n in range(16)])
        m.submodules.shut = shut = Memory(shape=width, depth=16, init=[_word(_BIAS, ~n) for n in range(16)])
        words = []
        for j in range(self.cfg.dequant_lanes):
            gated: list[Value] = []
            for i, word in enumerate(copies):
                mask, rest = gate.read_port(domain="comb"), shut.read_port(domain="comb")
                m.d.comb += [port.addr.eq(codes[NIBBLE * (K_GROUP * j + i) :][:NIBBLE]) for port in (mask, rest)]
                gated.append(word & mask.data | rest.data)
            partial = [Signal(width, name=f"partial_{j}_{c}", reset_less=True) for c in range(K_GROUP // _WAYS)]
            with m.If(valid):
                for c, total in enumerate(partial):
                    m.d.sync += total.eq(_add(gated[_WAYS * c :][:_WAYS]))
            words.append(partial)

        # 2. G of the four bits, less their biases; shift and add
        rows = []
        for j, partial in enumerate(words):
            halves = [Signal(width, name=f"half_{j}_{h}") for h in range(2)]
            m.d.comb += [half.eq(_add(partial[2 * h :][:2])) for h, half in enumerate(halves)]
            gs = []
            for b in range(NIBBLE):
                low, high = (half[_FIELD * b :][:_FIELD] for half in halves)
                g = low + high
                gs.append(Cat(g[:_FIELD], ~g[_FIELD]).as_signed())
            rows.append(gs[0] + (gs[1] << 1) + (gs[2] << 2) - (gs[3] << 3))
        return rows


def _add(words: list[Value]) -> Value:
    """Sum of words of which no field overflows."""
    total = words[0]
    for word in words[1:]:
        total = (total + word)[: len(word)]
    return total
