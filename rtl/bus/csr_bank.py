"""AXI4-Lite register bank, built from the register declarations of ``spec.csr``."""

from collections.abc import Sequence

from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from rtl.bus.axi import Axi4LiteSignature, Resp
from spec.csr import Register

__all__ = ["CsrBank"]

WORD_BYTES = 4


class CsrBank(wiring.Component):
    """Registers of 32 bits behind an AXI4-Lite subordinate, each with ports of its own name.

    Function
        ========  =================================================  =========================
        access    ports of register ``x``                            host
        ========  =================================================  =========================
        ``ro``    ``x`` In: the value; ``reset`` where undriven      reads it
        ``rw``    ``x`` Out: last value written, ``reset`` at first  reads and writes
        ``w1``    ``x`` Out: data, valid with ``x_stb`` Out          writes; reads 0
        ``rs``    ``x`` In: the value; ``x_stb`` Out = 1 in the      reads it, with the effect
                  cycle in which it is sampled                       of the strobe
        ========  =================================================  =========================

        With ``count`` > 1 the ports are arrays, element i at ``offset + 4 * i``. A write obeys the
        byte strobes; bytes without strobe are 0 in the data of a ``w1``. An address without a
        register, and a write to ``ro`` or ``rs``, are answered by SLVERR and change nothing.
        The lowest two address bits are ignored.
    Streams
        ``s_axil``: AXI4-Lite, one read and one write at a time.
    Timing
        A write takes 1 cycle after both AW and W are there: an ``rw`` port has its new value, and
        a ``w1`` its strobe (one cycle long), in the cycle in which BVALID rises. A read is sampled
        in the cycle of its AR transfer.
    Cost
        32 flip-flops an ``rw`` or ``w1`` word and one read multiplexer.
    Twins
        Test: ``tests/test_bus.py``; bench: ``cosim/bench_axi.py``.

    Parameters
    ----------
    registers
        What the bank holds; names and words must be unique.
    addr_bits
        Width of the bus address; every register must fit.
    """

    s_axil: wiring.PureInterface

    def __init__(self, registers: Sequence[Register], *, addr_bits: int = 12) -> None:
        self._registers = tuple(registers)
        self._addr_bits = addr_bits
        members: dict[str, wiring.Member] = {
            "s_axil": In(Axi4LiteSignature(addr_bits=addr_bits, data_bits=32))
        }
        owners: dict[int, str] = {}

        def add(name: str, member: wiring.Member, count: int) -> None:
            if name in members:
                raise ValueError(f"two ports of the register bank would be called {name!r}")
            members[name] = member.array(count) if count > 1 else member

        for register in self._registers:
            name, count = register.name, register.count
            if register.access not in ("ro", "rw", "w1", "rs"):
                raise ValueError(f"register {name}: access must be ro, rw, w1 or rs, not {register.access!r}")
            if register.offset % WORD_BYTES:
                raise ValueError(f"register {name}: offset must be a multiple of 4, not {register.offset:#x}")
            if count < 1:
                raise ValueError(f"register {name}: count must be at least 1, not {count}")
            if register.offset + WORD_BYTES * count > 1 << addr_bits:
                raise ValueError(f"register {name} does not fit in {addr_bits} address bits")
            for i in range(count):
                word = register.offset // WORD_BYTES + i
                if word in owners:
                    raise ValueError(f"registers {owners[word]} and {name} share offset {4 * word:#x}")
                owners[word] = name
            flow = In if register.access in ("ro", "rs") else Out
            add(name, flow(32, init=register.reset), count)  # pyright: ignore[reportCallIssue]
            if register.access in ("w1", "rs"):
                add(f"{name}_stb", Out(1), count)
        super().__init__(members)

    @property
    def registers(self) -> tuple[Register, ...]:
        """The declarations."""
        return self._registers

    def _words(self, register: Register, suffix: str = "") -> list[tuple[int, Signal]]:
        """(word address, signal) of a register's ports."""
        port = getattr(self, register.name + suffix)
        signals = list(port) if register.count > 1 else [port]
        first = register.offset // WORD_BYTES
        return [(first + i, signal) for i, signal in enumerate(signals)]

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bus = self.s_axil

        # 1. write: both AW and W present, no response pending
        write = Signal()
        write_mask = Signal(32)
        m.d.comb += [
            write.eq(bus.awvalid & bus.wvalid & (~bus.bvalid | bus.bready)),
            bus.awready.eq(write),
            bus.wready.eq(write),
            write_mask.eq(Cat(strobe.replicate(8) for strobe in bus.wstrb)),
        ]
        with m.If(bus.bready):
            m.d.sync += bus.bvalid.eq(0)
        for register in self._registers:
            if register.access == "w1":
                for _word, strobe in self._words(register, "_stb"):
                    m.d.sync += strobe.eq(0)
        with m.If(write):
            m.d.sync += [bus.bvalid.eq(1), bus.bresp.eq(Resp.SLVERR)]
            with m.Switch(bus.awaddr[2:]):
                for register in self._registers:
                    if register.access == "rw":
                        for word, value in self._words(register):
                            with m.Case(word):
                                m.d.sync += [
                                    value.eq((value & ~write_mask) | (bus.wdata & write_mask)),
                                    bus.bresp.eq(Resp.OKAY),
                                ]
                    elif register.access == "w1":
                        strobes = self._words(register, "_stb")
                        for (word, value), (_word, strobe) in zip(
                            self._words(register), strobes, strict=True
                        ):
                            with m.Case(word):
                                m.d.sync += [
                                    value.eq(bus.wdata & write_mask),
                                    strobe.eq(1),
                                    bus.bresp.eq(Resp.OKAY),
                                ]

        # 2. read: no response pending
        read = Signal()
        m.d.comb += [
            read.eq(bus.arvalid & (~bus.rvalid | bus.rready)),
            bus.arready.eq(read),
        ]
        with m.If(bus.rready):
            m.d.sync += bus.rvalid.eq(0)
        with m.If(read):
            m.d.sync += [bus.rvalid.eq(1), bus.rresp.eq(Resp.SLVERR), bus.rdata.eq(0)]
            with m.Switch(bus.araddr[2:]):
                for register in self._registers:
                    for word, value in self._words(register):
                        with m.Case(word):
                            m.d.sync += bus.rresp.eq(Resp.OKAY)
                            if register.access != "w1":
                                m.d.sync += bus.rdata.eq(value)
        for register in self._registers:
            if register.access == "rs":
                for word, strobe in self._words(register, "_stb"):
                    m.d.comb += strobe.eq(read & (bus.araddr[2:] == word))
        return m
