"""Decoders of the dense weight form: bytes to index codes and pairs, pairs to the index codes of rows D and E."""

from functools import reduce
from operator import or_

from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from rtl.lookup_ring import CODE_BITS
from spec.layout import DENSE_CODES, PAIR_MAX, dense_values, index_code

__all__ = ["PAIR_BITS", "DenseDecoder", "PairDecoder"]

PAIR_BITS = 4
"""A pair on chip: trit u0 plus 1 in the low two bits, trit u1 plus 1 in the high two."""


class DenseDecoder(wiring.Component):
    """Index codes and pairs of ``count`` dense bytes.

    Function
        ``o_codes[i]``: index code of the byte's group; ``o_pairs[i]``: its pair as two trits; ``o_illegal``: some byte
        is above 242 (its code and pair are those of a zero group and a pair of -4).
    Timing
        Combinational.
    Cost
        A constant table a byte: 24 LUTs of 6 inputs, or 60 of 4.
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
        # one table for all three: a lookup a byte is what simulates fastest
        illegal = 1 << CODE_BITS + PAIR_BITS
        table = [_table_entry(byte) for byte in range(DENSE_CODES)] + [illegal] * (256 - DENSE_CODES)
        m.submodules.table = memory = Memory(shape=CODE_BITS + PAIR_BITS + 1, depth=256, init=table)
        entries = []
        for i in range(self._count):
            port = memory.read_port(domain="comb")
            m.d.comb += port.addr.eq(self.i_bytes[8 * i :][:8])
            entries.append(port.data)
        m.d.comb += [
            self.o_codes.eq(Cat(entry[:CODE_BITS] for entry in entries)),
            self.o_pairs.eq(Cat(entry[CODE_BITS:][:PAIR_BITS] for entry in entries)),
            self.o_illegal.eq(reduce(or_, entries)[-1]),
        ]
        return m


def _table_entry(byte: int) -> int:
    group, pair = dense_values(byte)
    u1, u0 = divmod(pair + PAIR_MAX, 3)
    return index_code(group) | (u0 | u1 << 2) << CODE_BITS


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
        super().__init__({"i_pairs": In(PAIR_BITS * count), "i_trits": In(PAIR_BITS * count), "o_codes": Out(CODE_BITS * count)})

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
