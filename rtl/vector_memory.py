"""The vector memory: FP32 rows that the units work on."""

from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In

from rtl.lib.ports import VectorRead, VectorRow, VectorWrite


class VectorMemory(wiring.Component):
    """One memory of ``rows`` x 8 FP32 with one read and one write port, each shared by units that never work together.

    Function
        The client with ``en`` reads or writes. The wait masks of a program see to it that there is one at a time; were
        there two, the lower index would win.
    Ports
        ``read[n]``, ``write[n]``: see rtl/lib/ports.py.
    Timing
        Reads take 1 cycle; a read in the cycle of a write to the same row gets the old row.
    Cost
        ``rows`` x 256 bits of block RAM.
    """

    read: list[wiring.PureInterface]
    write: list[wiring.PureInterface]

    def __init__(self, *, rows: int, readers: int, writers: int) -> None:
        self._rows = rows
        super().__init__({"read": In(VectorRead).array(readers), "write": In(VectorWrite).array(writers)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.storage = storage = Memory(shape=VectorRow, depth=self._rows, init=[])
        read, write = storage.read_port(), storage.write_port()
        m.d.comb += [read.en.eq(0), write.en.eq(0)]
        for client in reversed(self.read):
            m.d.comb += client.data.eq(read.data)
            with m.If(client.en):
                m.d.comb += [read.en.eq(1), read.addr.eq(client.addr)]
        for client in reversed(self.write):
            with m.If(client.en):
                m.d.comb += [write.en.eq(1), write.addr.eq(client.addr), write.data.eq(client.data)]
        return m
