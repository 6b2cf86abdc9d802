"""Buffer of norm weights or row scales that come as beats of the weight port."""

from amaranth.hdl import Const, Module, Signal, Value
from amaranth.lib import stream
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import Component, In, Out

from rtl.lib.ports import ROW_ADDR_BITS


class AuxBuffer(Component):
    """Rows of a datapath's width, written a weight beat (several rows) at a time.

    Function
        Row r of an operation is bits [r * row_bits, (r + 1) * row_bits) of its beats in a row, lowest first.
        `i_start` forgets the rows and takes ``ceil(i_rows / rows_per_beat)`` beats from the next cycle on.

    Streams
        i_aux, in, `weight_bits`: taken one a cycle while a load is under way, else not ready.

    Handshake
        i_rows, In(16): constant while loading. i_row, In(16): row to read; o_loaded, Out(1): it is there (this
        cycle already readable). i_en: read; o_data, Out(row_bits): the row, one cycle later; holds without `i_en`.
        o_done, Out(1): no load is under way.

    Timing
        One beat a cycle; a row is readable in the cycle after its beat. Read latency 1.

    Cost
        ``max_rows * row_bits`` bits of memory in weight_bits / row_bits banks, a multiplexer of that many inputs.

    Twins
        tests/test_norm.py, tests/test_epilogue.py.
    """

    i_aux: stream.Interface
    i_start: Signal
    i_rows: Signal
    i_en: Signal
    i_row: Signal
    o_loaded: Signal
    o_data: Signal
    o_done: Signal

    def __init__(self, *, weight_bits: int, row_bits: int, max_rows: int) -> None:
        banks = weight_bits // row_bits
        if banks * row_bits != weight_bits or banks & (banks - 1) or not banks:
            raise ValueError(f"weight_bits must be a power of two times {row_bits}, not {weight_bits}")
        self._row_bits = row_bits
        self._banks = banks
        self._depth = -(-max_rows // banks)
        super().__init__(
            {
                "i_aux": In(stream.Signature(weight_bits)),
                "i_start": In(1),
                "i_rows": In(ROW_ADDR_BITS),
                "i_en": In(1),
                "i_row": In(ROW_ADDR_BITS),
                "o_loaded": Out(1),
                "o_data": Out(row_bits),
                "o_done": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        shift = (self._banks - 1).bit_length()
        loading = Signal()
        count = Signal(ROW_ADDR_BITS)  # beats taken
        push = Signal()
        m.d.comb += [
            self.i_aux.ready.eq(loading),
            push.eq(self.i_aux.valid & loading),
            self.o_loaded.eq((self.i_row >> shift) < count),
            self.o_done.eq(~loading),
        ]
        with m.If(push):
            m.d.sync += [count.eq(count + 1), loading.eq(count != (self.i_rows - 1) >> shift)]
        with m.If(self.i_start):
            m.d.sync += [count.eq(0), loading.eq(1)]

        chosen = Signal(max(1, shift))
        with m.If(self.i_en):
            m.d.sync += chosen.eq(self.i_row[:shift])
        selected: list[Value] = []
        for n in range(self._banks):
            m.submodules[f"bank_{n}"] = bank = Memory(shape=self._row_bits, depth=self._depth, init=[])
            write = bank.write_port()
            read = bank.read_port()
            m.d.comb += [
                write.addr.eq(count),
                write.en.eq(push),
                write.data.eq(self.i_aux.payload[n * self._row_bits :][: self._row_bits]),
                read.addr.eq(self.i_row >> shift),
                read.en.eq(self.i_en),
            ]
            selected.append(read.data & (chosen == n).replicate(self._row_bits))
        data = Const(0, self._row_bits)
        for row in selected:
            data = data | row
        m.d.comb += self.o_data.eq(data if self._banks > 1 else selected[0])
        return m
