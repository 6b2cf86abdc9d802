"""One lane of the values stage of the attention engine: one element of every chunk of o."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from rtl.lib.fp_add import FpAdd
from rtl.lib.fp_convert import IntToFp
from rtl.lib.fp_mul import FpMul

__all__ = ["AT_ADD", "AT_MULTIPLY", "AT_SUM", "AT_VALUE", "ValueLane", "lane_control"]

AT_VALUE = 3
"""Cycle in which a lane takes the int8 value, counted from the issue of the operation."""

AT_MULTIPLY = AT_VALUE + 2
AT_ADD = AT_MULTIPLY + FpMul.latency
AT_SUM = AT_ADD + FpAdd.latency
"""Cycle in which the sum is written; an operation on the same chunk may be issued AT_SUM - AT_ADD cycles later."""


def lane_control(chunk_bits: int, row_bits: int) -> data.StructLayout:
    """What all lanes get at the same time; each field belongs to the cycle that is noted, counted from the issue."""
    return data.StructLayout(
        {
            "read_addr": chunk_bits + row_bits,  # AT_MULTIPLY - 1 (rescale, finish) or AT_ADD - 1 (from_row)
            "use_row": 1,  # AT_MULTIPLY: multiply o of the row (rescale, finish) instead of the value
            "from_row": 1,  # AT_ADD: add to o of the row, not to the sum in progress
            "constant": 1,  # AT_ADD: add to +0 (first slot) or -0 (rescale)
            "constant_sign": 1,  # AT_ADD
            "forward": 1,  # the sum in progress is that which is just ready
            "add_chunk": chunk_bits,  # AT_ADD
            "sum_en": 1,  # AT_SUM
            "sum_chunk": chunk_bits,  # AT_SUM
            "row_en": 1,  # AT_SUM: the row's last slot of the block
            "row_addr": chunk_bits + row_bits,  # AT_SUM
        }
    )


class ValueLane(wiring.Component):
    """Scale and accumulate one element: ``o = o * e``, ``o = o + w * float(v)``, ``product = o * f``.

    Function
        Two memories: o of every row and chunk, and the sums in progress of the row at work (one a chunk). An operation
        multiplies ``i_scalar`` by float(``i_value``) or by the row's o, then adds to the sum in progress, the row's o,
        or a zero that changes no bit. The sum becomes the sum in progress, and with ``row_en`` the row's o.
    Timing
        ``i_en`` is 1 from the issue of an operation until AT_SUM. One operation a cycle; on the same chunk one every 4
        cycles. ``o_product`` is ready AT_ADD cycles after the issue.
    Numbers
        Separate roundings of product and sum. x + -0 is x, so a rescale is the product alone.
    Cost
        1 FP32 multiplier, 1 FP32 adder, an int8 to FP32 conversion, rows * chunks + chunks words of 32 bits.
    Twins
        golden/attention.py, tests/test_attention.py.
    """

    i_en: Signal
    i_value: Signal
    i_scalar: Signal
    i_control: data.View
    i_state_en: Signal
    i_state_addr: Signal
    i_state: Signal
    o_product: Signal
    o_sum: Signal

    def __init__(self, *, chunk_bits: int, row_bits: int, max_rows: int) -> None:
        self._chunk_bits = chunk_bits
        self._depth = max_rows << chunk_bits
        super().__init__(
            {
                "i_en": In(1),
                "i_value": In(signed(8)),
                "i_scalar": In(32),
                "i_control": In(lane_control(chunk_bits, row_bits)),
                "i_state_en": In(1),
                "i_state_addr": In(chunk_bits + row_bits),
                "i_state": In(32),
                "o_product": Out(32),
                "o_sum": Out(32),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        control = self.i_control

        m.submodules.rows = rows = Memory(shape=32, depth=self._depth, init=[])
        row_write = rows.write_port()
        row_read = rows.read_port(domain="sync")
        m.submodules.sums = sums = Memory(shape=32, depth=1 << self._chunk_bits, init=[])
        sum_write = sums.write_port()
        sum_read = sums.read_port(domain="comb")

        m.submodules.to_float = to_float = IntToFp(8)
        m.submodules.multiply = multiply = FpMul()
        m.submodules.add = add = FpAdd()
        assert to_float.latency == AT_MULTIPLY - AT_VALUE
        running = Mux(control.forward, add.y, sum_read.data)
        zero = Cat(Const(0, 31), control.constant_sign)
        m.d.comb += [
            to_float.en.eq(self.i_en),
            multiply.en.eq(self.i_en),
            add.en.eq(self.i_en),
            to_float.x.eq(self.i_value),
            row_read.addr.eq(control.read_addr),
            multiply.a.eq(self.i_scalar),
            multiply.b.eq(Mux(control.use_row, row_read.data, to_float.y)),
            sum_read.addr.eq(control.add_chunk),
            add.a.eq(Mux(control.from_row, row_read.data, Mux(control.constant, zero, running))),
            add.b.eq(multiply.y),
            sum_write.addr.eq(control.sum_chunk),
            sum_write.data.eq(add.y),
            sum_write.en.eq(control.sum_en),
            row_write.addr.eq(Mux(self.i_state_en, self.i_state_addr, control.row_addr)),
            row_write.data.eq(Mux(self.i_state_en, self.i_state, add.y)),
            row_write.en.eq(self.i_state_en | control.row_en),
            self.o_product.eq(multiply.y),
            self.o_sum.eq(add.y),
        ]
        return m
