"""The simulated accelerator in this process: clock, memory, registers, by ctypes (cosim/harness/lutra.cpp)."""

import ctypes
import math
import re
from collections.abc import Mapping, Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path

from cosim.cpp_build import build_cpp
from cosim.vector.compile import COLD_FILES
from cosim.verilate import build
from host_driver.errors import DeviceError
from spec.config import DramConfig

__all__ = ["PortCounters", "ProtocolError", "Reason", "SimulationError", "Simulator", "build_compiled", "build_simulator"]

HARNESS = Path(__file__).resolve().parent / "harness" / "lutra.cpp"
FRACTION_BITS = 16
"""Fraction bits of the bandwidth in the model."""


class SimulationError(DeviceError):
    """The simulation was asked for something it does not have."""


class ProtocolError(DeviceError):
    """The design broke a rule of the bus, or the simulation itself failed."""


class Reason(IntEnum):
    """Why `Simulator.run` came back."""

    IRQ = 0
    BUDGET = 1
    VIOLATION = 2


class DramParams(Structure):
    """Mirrors the structure of the same name in cosim/dram/dram.hpp."""

    _fields_ = [
        ("memory_bytes", c_uint64),
        ("bytes_per_cycle_q16", c_uint64),
        ("stall_seed", c_uint64),
        ("stall_threshold", c_uint32),
        ("latency_cycles", c_uint32),
        ("max_reads", c_uint32),
        ("max_writes", c_uint32),
        ("refresh_interval", c_uint32),
        ("refresh_cycles", c_uint32),
    ]


@dataclass(frozen=True, kw_only=True)
class PortCounters:
    """Traffic of one AXI port, in full beats."""

    read_bytes: int
    write_bytes: int
    read_bursts: int
    write_bursts: int


def build_simulator(verilog: str, *, trace: bool = False, name: str = "lutra") -> Path:
    """The library for a top module ``name`` with the ports that cosim/harness/simulator.hpp lists, by Verilator."""
    gates = re.findall(r"^\s*output wake_(\w+);", verilog, re.MULTILINE)
    return build(name, verilog, [HARNESS], trace=trace, defines=[_gates(gates)])


def build_compiled(files: Mapping[str, str], name: str = "lutra") -> Path:
    """The same library for C++ that cosim/vector made (`cosim.vector.compile.compile_design`)."""
    gates = re.findall(r"^\w+ wake_(\w+)\{\};", files["Vdut.h"], re.MULTILINE)
    return build_cpp(name, files, [HARNESS], defines=[_gates(gates)], cold=COLD_FILES)


def _gates(units: Sequence[str]) -> str:
    """Definition of the harness: what has a clock of its own."""
    return f"LUTRA_GATES(f)={' '.join(f'f({unit})' for unit in units)}"


@cache
def _load(library: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library))
    for function, result, arguments in (
        ("sim_create", c_void_p, [POINTER(DramParams)]),
        ("sim_destroy", None, [c_void_p]),
        ("sim_reset", c_int, [c_void_p]),
        ("sim_run", c_int, [c_void_p, c_uint64]),
        ("sim_csr_read", c_int, [c_void_p, c_uint32, POINTER(c_uint32)]),
        ("sim_csr_write", c_int, [c_void_p, c_uint32, c_uint32]),
        ("sim_mem_read", c_int, [c_void_p, c_uint64, c_void_p, c_uint64]),
        ("sim_mem_write", c_int, [c_void_p, c_uint64, c_void_p, c_uint64]),
        ("sim_inject", None, [c_void_p, c_uint64, c_uint64]),
        ("sim_cycle", c_uint64, [c_void_p]),
        ("sim_irq", c_int, [c_void_p]),
        ("sim_violation", c_char_p, [c_void_p]),
        ("sim_counters", None, [c_void_p, POINTER(c_uint64)]),
        ("sim_awake", None, [c_void_p, POINTER(c_uint64)]),
        ("sim_gates", c_char_p, []),
        ("sim_trace_open", c_int, [c_void_p, c_char_p, c_uint64, c_uint64]),
        ("sim_trace_close", None, [c_void_p]),
    ):
        entry = getattr(lib, function)
        entry.restype, entry.argtypes = result, arguments
    return lib


def _dram_params(
    memory_bytes: int, dram: DramConfig, stall_seed: int, stall_probability: float, max_reads: int, max_writes: int
) -> DramParams:
    for ok, message in (
        (memory_bytes > 0, f"memory_bytes must be positive, not {memory_bytes}"),
        (dram.bytes_per_cycle > 0, f"bytes_per_cycle must be positive, not {dram.bytes_per_cycle}"),
        (dram.latency_cycles >= 1, f"latency_cycles must be at least 1, not {dram.latency_cycles}"),
        (
            0 <= dram.refresh_cycles < max(1, dram.refresh_interval_cycles),
            "refresh_cycles must be below refresh_interval_cycles: "
            f"{dram.refresh_cycles} of {dram.refresh_interval_cycles}",
        ),
        (0 <= stall_probability < 1, f"stall_probability must be in [0, 1), not {stall_probability}"),
        (max_reads >= 1 and max_writes >= 1, f"max_reads and max_writes must be positive: {max_reads}, {max_writes}"),
    ):
        if not ok:
            raise ValueError(message)
    return DramParams(
        memory_bytes=memory_bytes,
        bytes_per_cycle_q16=round(dram.bytes_per_cycle * (1 << FRACTION_BITS)),
        stall_seed=stall_seed,
        stall_threshold=int(stall_probability * 2**32),
        latency_cycles=dram.latency_cycles,
        max_reads=max_reads,
        max_writes=max_writes,
        refresh_interval=dram.refresh_interval_cycles,
        refresh_cycles=dram.refresh_cycles,
    )


class Simulator:
    """One simulated device: the library's design with its own memory.

    Function
        `run` clocks the design until ``irq`` is high, a number of cycles has passed or it broke a bus rule; registers
        are read and written through the AXI4-Lite port, which takes cycles; memory through a back door, which takes
        none. Memory is mapped on demand: what is never touched costs nothing.
    Timing
        Everything repeats exactly for equal parameters and calls.

    Parameters
    ----------
    library
        What `build_simulator` made.
    memory_bytes, dram
        Size, bandwidth, latency and refresh of the memory.
    stall_probability, stall_seed
        Each channel stands still in a cycle with this probability.
    max_reads, max_writes
        Bursts that a port may have in flight.
    """

    def __init__(
        self,
        library: Path,
        *,
        memory_bytes: int,
        dram: DramConfig,
        stall_probability: float = 0.0,
        stall_seed: int = 1,
        max_reads: int = 32,
        max_writes: int = 32,
    ) -> None:
        self._handle = None
        self._lib = _load(library)
        self.memory_bytes = memory_bytes
        params = _dram_params(memory_bytes, dram, stall_seed, stall_probability, max_reads, max_writes)
        self._handle = self._lib.sim_create(byref(params))
        if not self._handle:
            raise SimulationError(f"cannot map {memory_bytes} bytes of simulated memory")

    def close(self) -> None:
        """Frees memory and design; further calls are errors."""
        if self._handle:
            self._lib.sim_destroy(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.close()

    def _alive(self) -> int:
        if not self._handle:
            raise SimulationError("the simulation was closed")
        return self._handle

    def reset(self) -> None:
        """Hardware reset; memory and traffic counters keep their contents."""
        if self._lib.sim_reset(self._alive()):
            raise ProtocolError(self.violation)

    def run(self, max_cycles: int) -> Reason:
        """Clocks until an event. Raises ProtocolError if a bus rule was broken."""
        reason = Reason(self._lib.sim_run(self._alive(), max_cycles))
        if reason is Reason.VIOLATION:
            raise ProtocolError(f"bus rule broken in {self.violation}")
        return reason

    def csr_read(self, offset: int) -> tuple[int, int]:
        """(value, response) of a register."""
        value = c_uint32()
        response = self._lib.sim_csr_read(self._alive(), offset, byref(value))
        return value.value, self._answered(offset, response)

    def csr_write(self, offset: int, value: int) -> int:
        """Response of a register write."""
        return self._answered(offset, self._lib.sim_csr_write(self._alive(), offset, value))

    def _answered(self, offset: int, response: int) -> int:
        if self.violation:
            raise ProtocolError(f"bus rule broken in {self.violation}")
        if response < 0:
            raise ProtocolError(f"register {offset:#x}: no answer within 1000 cycles")
        return response

    def mem_read(self, address: int, size: int) -> bytes:
        """Bytes of the memory."""
        self._check_range(address, size)
        buffer = ctypes.create_string_buffer(size)
        self._lib.sim_mem_read(self._alive(), address, buffer, size)
        return buffer.raw

    def mem_write(self, address: int, data: bytes) -> None:
        """Bytes of the memory."""
        self._check_range(address, len(data))
        self._lib.sim_mem_write(self._alive(), address, bytes(data), len(data))

    def _check_range(self, address: int, size: int) -> None:
        if address < 0 or size < 0 or address + size > self.memory_bytes:
            limit = self.memory_bytes
            raise SimulationError(f"{size} bytes at {address:#x} are not inside the memory of {limit} bytes")

    def inject_errors(self, first: int, end: int) -> None:
        """Addresses from ``first`` up to ``end`` answer SLVERR; equal arguments end it."""
        self._lib.sim_inject(self._alive(), first, end)

    @property
    def cycle(self) -> int:
        """Clock cycles since the beginning."""
        return self._lib.sim_cycle(self._alive())

    @property
    def irq(self) -> bool:
        """Level of the interrupt output."""
        return bool(self._lib.sim_irq(self._alive()))

    @property
    def violation(self) -> str:
        """First bus rule that was broken since the last reset, or nothing."""
        return self._lib.sim_violation(self._alive()).decode()

    def counters(self) -> tuple[PortCounters, PortCounters]:
        """Traffic of the weight port and of the data port."""
        values = (c_uint64 * 8)()
        self._lib.sim_counters(self._alive(), values)
        names = ("read_bytes", "write_bytes", "read_bursts", "write_bursts")
        weight, data = (dict(zip(names, values[i : i + 4], strict=True)) for i in (0, 4))
        return PortCounters(**weight), PortCounters(**data)

    def awake(self) -> dict[str, int]:
        """Cycles in which the clock of each unit that may sleep ticked."""
        units = self._lib.sim_gates().decode().split()
        values = (c_uint64 * (len(units) + 1))()
        self._lib.sim_awake(self._alive(), values)
        return dict(zip(units, values, strict=False))

    def trace(self, path: Path, *, first: int = 0, end: float = math.inf) -> None:
        """Writes waveforms (VCD) of the cycles from ``first`` up to ``end``. Needs a library built with ``trace``."""
        last = 2**64 - 1 if end == math.inf else int(end)
        if self._lib.sim_trace_open(self._alive(), str(path).encode(), first, last):
            raise SimulationError(f"cannot write waveforms to {path}: not writable, or a device without `trace`")

    def trace_close(self) -> None:
        """Ends the waveforms."""
        self._lib.sim_trace_close(self._alive())
