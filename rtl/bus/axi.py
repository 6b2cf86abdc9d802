"""AXI4 and AXI4-Lite bus signatures, seen from the manager (which drives addresses).

Members carry the names of the AMBA specification in lower case (``araddr``, ``rvalid``), so that a
port ``m_axi_w`` becomes ``m_axi_w_araddr`` in Verilog when the design is converted with the names of
`flat_ports` (Amaranth's own choice would be ``m_axi_w__araddr``). A subordinate takes the signature
as ``In(...)``.

AXI4 ends at 1024 data bits. Ports of 2048 and 4096 bits are AXI4 in all but ``axsize``, which has 4 bits there: they are
for simulation only, where they stand for a memory of that many bytes a cycle.
"""

from enum import IntEnum

from amaranth.hdl import Value
from amaranth.hdl._ir import PortDirection  # what the converters take; not exported in 0.5
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

__all__ = [
    "Axi4LiteSignature",
    "Axi4ReadSignature",
    "Axi4Signature",
    "Axi4WriteSignature",
    "Burst",
    "Resp",
    "flat_ports",
]


class Resp(IntEnum):
    """Response codes (RRESP, BRESP)."""

    OKAY = 0
    EXOKAY = 1
    SLVERR = 2
    DECERR = 3


class Burst(IntEnum):
    """Burst types (ARBURST, AWBURST)."""

    FIXED = 0
    INCR = 1
    WRAP = 2


#: ARCACHE/AWCACHE that our managers drive: normal memory, modifiable and bufferable, not cached.
CACHE_NORMAL = 0b0011


AMBA_DATA_BITS = 1024
"""Widest data bus of the AMBA specification."""


def _check(addr_bits: int, data_bits: int, id_bits: int = 1) -> None:
    if not 12 <= addr_bits <= 64:
        raise ValueError(f"AXI4 addr_bits must be 12 to 64, not {addr_bits}")
    if data_bits not in (8, 16, 32, 64, 128, 256, 512, AMBA_DATA_BITS, 2048, 4096):
        raise ValueError(f"AXI4 data_bits must be a power of two from 8 to 4096, not {data_bits}")
    if not 1 <= id_bits <= 4:
        raise ValueError(f"AXI4 id_bits must be 1 to 4, not {id_bits}")


def _address_channel(x: str, addr_bits: int, data_bits: int, id_bits: int) -> dict[str, wiring.Member]:
    return {
        f"a{x}id": Out(id_bits),
        f"a{x}addr": Out(addr_bits),
        f"a{x}len": Out(8),
        f"a{x}size": Out(3 if data_bits <= AMBA_DATA_BITS else 4),
        f"a{x}burst": Out(2),
        f"a{x}cache": Out(4),
        f"a{x}prot": Out(3),
        f"a{x}valid": Out(1),
        f"a{x}ready": In(1),
    }


def _read_members(addr_bits: int, data_bits: int, id_bits: int) -> dict[str, wiring.Member]:
    return {
        **_address_channel("r", addr_bits, data_bits, id_bits),
        "rid": In(id_bits),
        "rdata": In(data_bits),
        "rresp": In(2),
        "rlast": In(1),
        "rvalid": In(1),
        "rready": Out(1),
    }


def _write_members(addr_bits: int, data_bits: int, id_bits: int) -> dict[str, wiring.Member]:
    return {
        **_address_channel("w", addr_bits, data_bits, id_bits),
        "wdata": Out(data_bits),
        "wstrb": Out(data_bits // 8),
        "wlast": Out(1),
        "wvalid": Out(1),
        "wready": In(1),
        "bid": In(id_bits),
        "bresp": In(2),
        "bvalid": In(1),
        "bready": Out(1),
    }


class Axi4ReadSignature(wiring.Signature):
    """The read channels of AXI4 (AR, R)."""

    def __init__(self, *, addr_bits: int = 40, data_bits: int, id_bits: int = 1) -> None:
        _check(addr_bits, data_bits, id_bits)
        self.addr_bits = addr_bits
        self.data_bits = data_bits
        self.id_bits = id_bits
        super().__init__(_read_members(addr_bits, data_bits, id_bits))


class Axi4WriteSignature(wiring.Signature):
    """The write channels of AXI4 (AW, W, B)."""

    def __init__(self, *, addr_bits: int = 40, data_bits: int, id_bits: int = 1) -> None:
        _check(addr_bits, data_bits, id_bits)
        self.addr_bits = addr_bits
        self.data_bits = data_bits
        self.id_bits = id_bits
        super().__init__(_write_members(addr_bits, data_bits, id_bits))


class Axi4Signature(wiring.Signature):
    """All five channels of AXI4."""

    def __init__(self, *, addr_bits: int = 40, data_bits: int, id_bits: int = 1) -> None:
        _check(addr_bits, data_bits, id_bits)
        self.addr_bits = addr_bits
        self.data_bits = data_bits
        self.id_bits = id_bits
        super().__init__(
            {
                **_write_members(addr_bits, data_bits, id_bits),
                **_read_members(addr_bits, data_bits, id_bits),
            }
        )


class Axi4LiteSignature(wiring.Signature):
    """All five channels of AXI4-Lite."""

    def __init__(self, *, addr_bits: int = 12, data_bits: int = 32) -> None:
        if not 2 <= addr_bits <= 64:
            raise ValueError(f"AXI4-Lite addr_bits must be 2 to 64, not {addr_bits}")
        if data_bits not in (32, 64):
            raise ValueError(f"AXI4-Lite data_bits must be 32 or 64, not {data_bits}")
        self.addr_bits = addr_bits
        self.data_bits = data_bits
        super().__init__(
            {
                "awaddr": Out(addr_bits),
                "awprot": Out(3),
                "awvalid": Out(1),
                "awready": In(1),
                "wdata": Out(data_bits),
                "wstrb": Out(data_bits // 8),
                "wvalid": Out(1),
                "wready": In(1),
                "bresp": In(2),
                "bvalid": In(1),
                "bready": Out(1),
                "araddr": Out(addr_bits),
                "arprot": Out(3),
                "arvalid": Out(1),
                "arready": In(1),
                "rdata": In(data_bits),
                "rresp": In(2),
                "rvalid": In(1),
                "rready": Out(1),
            }
        )


def flat_ports(component: wiring.Component) -> dict[str, tuple[Value, PortDirection]]:
    """Verilog ports of a component, path elements joined by one underscore.

    Give it to Amaranth's converters: ``rtlil.convert(top, name="top", ports=flat_ports(top))``;
    ``clk`` and ``rst`` are added by Amaranth.
    """
    ports: dict[str, tuple[Value, PortDirection]] = {}
    for path, member, value in component.signature.flatten(component):
        name = "_".join(str(element) for element in path)
        if name in ports:
            raise ValueError(f"two ports would be called {name!r} in Verilog: rename one of them")
        is_input = member.flow is wiring.In
        ports[name] = (
            Value.cast(value),
            PortDirection.Input if is_input else PortDirection.Output,
        )
    return ports
