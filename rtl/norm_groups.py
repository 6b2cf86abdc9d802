"""The group section of NORM: from the largest magnitudes of a token's groups of 32 to their scales and factors."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import Component, In, Out

from rtl.lib.delay import Delay
from rtl.lib.ports import ROW_ADDR_BITS
from rtl.lib.quant import GroupScale

_HEADROOM = 7
"""s0 has the exponent field X - 7: the weight of the lowest bit of the largest d's 8-bit significand."""


class NormGroups(Component):
    """Scale each group, keep the factors until pass 2, and the largest exponent for the token's scale.

    Function
        ``(c_G, d_G)`` by `GroupScale`; ``s0 = 2**(X - 134)``, X the largest exponent field of the token's d_G (0 where
        X < 8).

    Ports
        en, In(1): everything advances. a, In(32): largest magnitude of group `group`, In(16), in a cycle with `ends`,
        In(1). d_en, Out(1), d_group, Out(16), d, Out(16): its bfloat16 scale, one cycle a group. used, In(16): the
        group whose factor c, Out(32), shows in the same cycle. s0, Out(32): of the groups since group 0.

    Timing
        d follows a by `d_latency` enabled edges, c is there a cycle after `latency` of them. s0 changes a cycle after d.

    Numbers
        docs/numerics.md section 2b.

    Cost
        `GroupScale`, `groups` words of 32 bits in a memory with a combinational read port.

    Twins
        golden/norm.py `norm_quantise_groups`, tests/test_norm.py.
    """

    d_latency = GroupScale.d_latency
    latency = GroupScale.latency
    en: Signal
    a: Signal
    ends: Signal
    group: Signal
    d_en: Signal
    d_group: Signal
    d: Signal
    used: Signal
    c: Signal
    s0: Signal

    def __init__(self, *, groups: int) -> None:
        self._groups = groups
        super().__init__(
            {
                "en": In(1),
                "a": In(32),
                "ends": In(1),
                "group": In(ROW_ADDR_BITS),
                "d_en": Out(1),
                "d_group": Out(ROW_ADDR_BITS),
                "d": Out(16),
                "used": In(ROW_ADDR_BITS),
                "c": Out(32),
                "s0": Out(32),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.factors = factors = GroupScale()
        m.submodules.to_d = to_d = Delay(1 + ROW_ADDR_BITS, self.d_latency, reset=True)
        m.submodules.to_c = to_c = Delay(1 + ROW_ADDR_BITS, self.latency - self.d_latency, reset=True)
        m.d.comb += [unit.en.eq(self.en) for unit in (factors, to_d, to_c)]
        m.d.comb += [
            factors.a.eq(self.a),
            to_d.i.eq(Cat(self.ends, self.group)),
            to_c.i.eq(to_d.o),
            self.d_en.eq(to_d.o[0] & self.en),
            self.d_group.eq(to_d.o[1:]),
            self.d.eq(factors.d),
        ]

        # c waits for pass 2
        m.submodules.storage = storage = Memory(shape=32, depth=self._groups, init=[])
        write, read = storage.write_port(), storage.read_port(domain="comb")
        m.d.comb += [
            write.en.eq(to_c.o[0] & self.en),
            write.addr.eq(to_c.o[1:]),
            write.data.eq(factors.c),
            read.addr.eq(self.used),
            self.c.eq(read.data),
        ]

        # X: bfloat16 has the exponent field of float32
        top = Signal(8)
        field = factors.d[7:15]
        with m.If(self.d_en & ((self.d_group == 0) | (field > top))):
            m.d.sync += top.eq(field)
        m.d.comb += self.s0.eq(Mux(top > _HEADROOM, Cat(Const(0, 23), (top - _HEADROOM)[0:8]), 0))
        return m
