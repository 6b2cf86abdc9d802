"""MixPE with floats: group sums of FP4 (E2M1) weights and FP16 activations, without multipliers."""

from amaranth.hdl import Module, Signal, Value, signed
from amaranth.lib.memory import Memory

from rtl.group_core import NIBBLE, ROW_BITS, GroupCore
from spec.act_formats import FIXED_BITS
from spec.config import K_GROUP

__all__ = ["MixPeFp"]

_WAYS = 8
"""Products of a partial sum."""

_MULTIPLE_BITS = FIXED_BITS + 2
"""Of three times an activation."""

_PRODUCT_BITS = FIXED_BITS + 4
"""Of twelve times an activation."""

_SUM_BITS = 28
"""|S| <= 32 * 12 * (2^18 - 1), and a sign."""


class MixPeFp(GroupCore):
    """Activations in their group's fixed point, times E2M1 weights by a choice and a shift (Zhang et al., arXiv:2411.16158).

    Function
        ``S[n] = sum_i 2 w[n, i] v_i``, w of sign s, exponent E and mantissa M: ``2 w v = (-1)^s (2 v + M v) 2^(E - 1)``,
        for E = 0 ``(-1)^s M v``. The one addition, 3 v, is the same for all outputs and is made once an activation, and so
        are the negatives; what is left of an element is a choice of four, a gate, and a shift by up to 3 places.
    Ports, Handshake
        See rtl/group_core.py. A row is a slice of ``lanes / 4`` outputs; a nibble of it is E2M1, sign highest. ``i_acts``: 32
        of 19 bits, lowest input lowest, as `FixedGroup` gives them. ``i_bits`` must be 4; ``i_sum_acts`` is not used.
    Timing
        Latency 3: row and multiples are registered first. Slice s follows row s.
    Numbers
        Exact: the group's fixed point is where bits were lost (docs/numerics.md sections 2c and 3d).
    Cost
        8 * lanes processing elements: a choice of four numbers of 21 bits, a shifter to 23, an adder of 23 to 28. 32 adders
        and 64 negations of up to 21 bits for the multiples.
    Twins
        golden/mixpe_fp.py; test: tests/test_mixpe_fp.py.
    """

    act_bits = K_GROUP * FIXED_BITS
    latency = 3

    @property
    def sum_bits(self) -> int:
        """28: finer than the integer cores', as the fixed point's lowest bits count too."""
        return _SUM_BITS

    def elaborate(self, platform: object) -> Module:
        m = Module()

        # 0. the row; of each activation v, 3 v and their negatives
        codes = Signal.like(self.i_codes, reset_less=True)
        valid = Signal(2)
        rows = [Signal(ROW_BITS, name=f"row_{n}", reset_less=True) for n in range(2)]
        m.d.sync += [valid[0].eq(self.i_valid), valid[1].eq(valid[0])]
        with m.If(self.i_valid):
            m.d.sync += [codes.eq(self.i_codes), rows[0].eq(self.i_row)]
        with m.If(valid[0]):
            m.d.sync += rows[1].eq(rows[0])
        tables = []
        for i in range(K_GROUP):
            v = self.i_acts[FIXED_BITS * i :][:FIXED_BITS].as_signed()
            m.submodules[f"multiples_{i}"] = table = Memory(shape=signed(_MULTIPLE_BITS), depth=4, init=[])
            for address, multiple in enumerate((v, (v << 1) + v, -v, -(v << 1) - v)):
                port = table.write_port()
                m.d.comb += [
                    port.en.eq(self.i_valid & self.i_first), port.addr.eq(address), port.data.eq(multiple),
                ]  # fmt: skip
            tables.append(table)

        # 1. products, sums of eight
        partials = []
        for j in range(self.cfg.dequant_lanes):
            products = []
            for i, table in enumerate(tables):
                code = codes[NIBBLE * (K_GROUP * j + i) :][:NIBBLE]
                products.append(_product(m, f"{j}_{i}", table, code))
            partial = [
                Signal(signed(_PRODUCT_BITS + 3), name=f"partial_{j}_{c}", reset_less=True) for c in range(K_GROUP // _WAYS)
            ]
            with m.If(valid[0]):
                for c, total in enumerate(partial):
                    m.d.sync += total.eq(sum(products[_WAYS * c :][:_WAYS]))
            partials.append(partial)

        # 2. sums of 32
        m.d.sync += self.o_valid.eq(valid[1])
        with m.If(valid[1]):
            m.d.sync += self.o_slice.eq(rows[1])
            m.d.sync += [port.eq(sum(partial)) for port, partial in zip(self.o_sums, partials, strict=True)]
        return m


def _product(m: Module, name: str, table: Memory, code: Value) -> Signal:
    """Of an activation's multiples and an E2M1 nibble: codes 1 to 7 are 1, 2, 3, 4, 6, 8, 12 times v."""
    mantissa, exponent, sign = code[0], code[1:3], code[3]
    normal = exponent.any()
    port = table.read_port(domain="comb")
    m.d.comb += [port.addr[0].eq(mantissa & normal), port.addr[1].eq(sign)]
    gate = (normal | mantissa).replicate(_MULTIPLE_BITS)
    product = Signal(signed(_PRODUCT_BITS), name=f"product_{name}")
    m.d.comb += product.eq((port.data.as_unsigned() & gate).as_signed() << (exponent - (mantissa & normal))[:2])
    return product
