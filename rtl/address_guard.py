"""Address guard: no DMA command reaches memory beyond the model's."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from rtl.lib.ports import dma_command


class AddressGuard(wiring.Component):
    """Pass commands whose bytes all lie below ``i_limit``; swallow others and report them.

    Function
        A command is in range when ``addr + beats * beat_bytes <= i_limit``. One that is not disappears;
        ``o_fault`` is 1 in that cycle, with its address in ``o_address``.
    Timing
        Combinational.
    """

    i_cmd: stream.Interface
    o_cmd: stream.Interface
    i_limit: Signal
    o_fault: Signal
    o_address: Signal

    def __init__(self, *, addr_bits: int, data_bits: int) -> None:
        self._beat_bytes_log2 = (data_bits // 8).bit_length() - 1
        command = stream.Signature(dma_command(addr_bits))
        super().__init__(
            {
                "i_cmd": In(command),
                "o_cmd": Out(command),
                "i_limit": In(64),
                "o_fault": Out(1),
                "o_address": Out(addr_bits),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        command = self.i_cmd
        legal = Signal()
        m.d.comb += [
            legal.eq(command.p.addr + (command.p.beats << self._beat_bytes_log2) <= self.i_limit),
            self.o_cmd.valid.eq(command.valid & legal),
            self.o_cmd.payload.eq(command.payload),
            command.ready.eq(Mux(legal, self.o_cmd.ready, 1)),
            self.o_fault.eq(command.valid & ~legal),
            self.o_address.eq(command.p.addr),
        ]
        return m
