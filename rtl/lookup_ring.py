"""Ring of weight rows between the weight stream and the matmul engine: decoded lookup rows, or code rows."""

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from spec.layout import ROWS_PER_SUPERBEAT

__all__ = ["CODE_BITS", "LookupRing", "ring_read"]

CODE_BITS = 5
"""Index form of a group: sign and magnitude."""


def ring_read(banks: int, bank_bits: int) -> wiring.Signature:
    """Reader's side of the ring (the engine has it as ``Out``).

    ``valid``: the row at the read pointer is there. ``en`` (only with ``valid``): read it; ``data`` shows it in the
    next cycle and holds until the next ``en``; the read pointer advances. With ``en``, ``free`` gives the row's place
    back (only while no older row is kept), and ``rewind`` puts the read pointer back on the oldest row not freed.
    ``data[b]`` of lookup rows holds cells ``b*weight_bytes`` and on, 5 bits each, lowest cell lowest.
    """
    return wiring.Signature(
        {
            "valid": In(1),
            "en": Out(1),
            "free": Out(1),
            "rewind": Out(1),
            "data": In(bank_bits).array(banks),
        }
    )


class LookupRing(wiring.Component):
    """Banked row memory with one writer that fills bank by bank and one reader that takes whole rows.

    Function
        Rows leave in the order in which they were reported by ``done``; a row can be read again until it is freed.
    Ports
        ``i_write``: per bank ``en``, ``addr``, ``data``. ``i_done``: one more row, in ring order, is complete (its last
        bank is written at this clock edge, or was before). ``i_take`` rows are claimed for writing at this clock edge;
        ``o_space``: ``claim`` rows may be claimed (of the ternary stream: a superbeat). ``read``: the reader, see `ring_read`.
        ``i_clear``: the ring is empty after this clock edge.
    Timing
        A row reported in cycle t can be read in t + 1. One row a cycle.
    Cost
        ``rows * banks`` words of ``bank_bits``, block RAM.
    Twins
        golden/layout.py `unpack_rows` gives its rows; test: tests/test_weight_stream.py, tests/test_group_stream.py.
    """

    i_done: Signal
    i_take: Signal
    i_clear: Signal
    o_space: Signal

    def __init__(self, *, rows: int, banks: int, bank_bits: int, claim: int = ROWS_PER_SUPERBEAT) -> None:
        if rows < claim:
            raise ValueError(f"the ring must hold a superbeat of {claim} rows, not {rows}")
        self._claim = claim
        self._rows = rows
        self._banks = banks
        self._bank_bits = bank_bits
        write = wiring.Signature({"en": Out(1), "addr": Out(range(rows)), "data": Out(bank_bits)})
        super().__init__(
            {
                "i_write": In(write).array(banks),
                "i_done": In(1),
                "i_take": In(range(claim + 1)),
                "i_clear": In(1),
                "o_space": Out(1),
                "read": In(ring_read(banks, bank_bits)),
            }
        )

    def next_row(self, row: Value, step: Value | int = 1) -> Value:
        """Row ``step`` places on; ``step`` is at most the number of rows."""
        total = row + step
        return Mux(total >= self._rows, total - self._rows, total)[: len(row)]

    def elaborate(self, platform: object) -> Module:
        m = Module()
        read = self.read
        head = Signal(range(self._rows))  # oldest row kept
        pointer = Signal(range(self._rows))  # next row to read
        kept = Signal(range(self._rows + 1))  # complete rows from the head on
        unread = Signal(range(self._rows + 1))  # complete rows from the read pointer on
        claimed = Signal(range(self._rows + 1))  # rows from the head on that are complete or being written

        # 1. rows, one memory a bank
        for b in range(self._banks):
            storage = Memory(shape=self._bank_bits, depth=self._rows, init=[])
            m.submodules[f"bank_{b}"] = storage
            write, fetch = storage.write_port(), storage.read_port()
            m.d.comb += [
                Cat(write.en, write.addr, write.data).eq(Cat(self.i_write[b].en, self.i_write[b].addr, self.i_write[b].data)),
                fetch.en.eq(read.en),
                fetch.addr.eq(pointer),
                read.data[b].eq(fetch.data),
            ]

        # 2. pointers and counts
        freed = Signal()
        next_head = Signal.like(head)
        m.d.comb += [
            freed.eq(read.en & read.free),
            next_head.eq(Mux(freed, self.next_row(head), head)),
            read.valid.eq(unread != 0),
            self.o_space.eq(claimed <= self._rows - self._claim),
        ]
        m.d.sync += [
            head.eq(next_head),
            kept.eq(kept + self.i_done - freed),
            claimed.eq(claimed + self.i_take - freed),
            unread.eq(unread + self.i_done - read.en),
        ]
        with m.If(read.en):
            m.d.sync += pointer.eq(self.next_row(pointer))
            with m.If(read.rewind):
                m.d.sync += [pointer.eq(next_head), unread.eq(kept + self.i_done - freed)]
        with m.If(self.i_clear):
            m.d.sync += [head.eq(0), pointer.eq(0), kept.eq(0), unread.eq(0), claimed.eq(0)]
        return m
