"""Decoders of the dense weight form: bytes to index codes and pairs, pairs to the index codes of rows D and E."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from rtl.lookup_ring import CODE_BITS
from spec.layout import DENSE_CODES, GROUP_MAX, PAIR_ESCAPE, index_code

__all__ = ["PAIR_BITS", "DenseDecoder", "PairDecoder"]

PAIR_BITS = 4
"""A pair on chip: trit u0 plus 1 in the low two bits, trit u1 plus 1 in the high two."""

_PAIR_CODES = [p % 3 | p // 3 << 2 for p in range(9)]


class DenseDecoder(wiring.Component):
    """Index codes and pairs of ``count`` dense bytes.

    Function
        ``o_codes[i]``: index code of the byte's group; ``o_pairs[i]``: its pair as two trits; ``o_illegal``: some byte is
        above 242 (then its outputs mean nothing).
    Timing
        Combinational.
    Cost
        About a dozen 6-input LUTs a byte.
    Twins
        golden/layout.py `unpack_rows`; test: tests/test_weight_stream.py.
    """

    i_bytes: Signal
    o_codes: Signal
    o_pairs: Signal
    o_illegal: Signal

    def __init__(self, count: int) -> None:
        self._count = count
        super().__init__(
            {
                "i_bytes": In(8 * count),
                "o_codes": Out(CODE_BITS * count),
                "o_pairs": Out(PAIR_BITS * count),
                "o_illegal": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        # g = v + 13 -> index code: a 5-input function a bit
        m.submodules.code_of = code_of = Memory(
            shape=CODE_BITS, depth=32, init=[index_code(g - GROUP_MAX) for g in range(2 * GROUP_MAX + 1)]
        )
        # low 3 bits, escape -> two trits
        pairs = _PAIR_CODES[:8] + [_PAIR_CODES[8]] * 8
        m.submodules.pair_of = pair_of = Memory(shape=PAIR_BITS, depth=16, init=pairs)
        codes, trits, illegal = [], [], []
        for i in range(self._count):
            byte = self.i_bytes[8 * i :][:8]
            escape = byte >= PAIR_ESCAPE
            code, pair = code_of.read_port(domain="comb"), pair_of.read_port(domain="comb")
            m.d.comb += [
                # byte - 216 in 5 bits, as 216 = 6*32 + 24
                code.addr.eq(Mux(escape, (byte[:5] + (32 - PAIR_ESCAPE % 32))[:5], byte[3:])),
                pair.addr.eq(Cat(byte[:3], escape)),
            ]
            codes.append(code.data)
            trits.append(pair.data)
            illegal.append(byte >= DENSE_CODES)
        m.d.comb += [self.o_codes.eq(Cat(codes)), self.o_pairs.eq(Cat(trits)), self.o_illegal.eq(Cat(illegal).any())]
        return m


class PairDecoder(wiring.Component):
    """Index codes of one of the rows D and E: ``v = pair + 9 * trit``.

    Function
        ``o_codes[i]`` = index code of ``pair_i + 9*trit_i``; the trit is u0 of ``i_trits[i]`` or u1 (``high``).
    Timing
        Combinational.
    Cost
        5 LUTs of 6 inputs a cell.
    Twins
        golden/layout.py `unpack_rows`; test: tests/test_weight_stream.py.
    """

    i_pairs: Signal
    i_trits: Signal
    o_codes: Signal

    def __init__(self, count: int, *, high: bool) -> None:
        self._count = count
        self._high = high
        super().__init__(
            {"i_pairs": In(PAIR_BITS * count), "i_trits": In(PAIR_BITS * count), "o_codes": Out(CODE_BITS * count)}
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        table = [0] * 64
        for address in range(64):
            u0, u1, trit = (address & 3) - 1, (address >> 2 & 3) - 1, (address >> 4) - 1
            if max(u0, u1, trit) <= 1:
                table[address] = index_code(u0 + 3 * u1 + 9 * trit)
        m.submodules.code_of = code_of = Memory(shape=CODE_BITS, depth=64, init=table)
        codes = []
        for i in range(self._count):
            code = code_of.read_port(domain="comb")
            trit = self.i_trits[PAIR_BITS * i + 2 * self._high :][:2]
            m.d.comb += code.addr.eq(Cat(self.i_pairs[PAIR_BITS * i :][:PAIR_BITS], trit))
            codes.append(code.data)
        m.d.comb += self.o_codes.eq(Cat(codes))
        return m
