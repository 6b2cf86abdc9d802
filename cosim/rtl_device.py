"""The accelerator as RTL, simulated cycle by cycle in this process: what the host driver calls device ``rtl``."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cosim.generate import accelerator_verilog, compiled_accelerator
from cosim.simulator import Reason, SimulationError, Simulator, build_compiled, build_simulator
from cosim.vector.expression import UnsupportedError
from host_driver.errors import InvalidRequest
from spec.config import AcceleratorConfig
from spec.csr import STATUS
from spec.presets import PRESETS

__all__ = ["RtlTransport", "build", "open_device"]

SLICE_CYCLES = 50_000
"""First slice of a run, between two looks at the clock and two calls of `progress`."""

SLICE_S = 0.1
"""Wall time that a slice should take."""


class RtlTransport:
    """Registers, memory and time of a simulated device (the driver's `Transport`).

    Register accesses clock the design; memory is written and read through the simulator's back door and takes no
    cycles. ``cycles`` and ``wall_s`` say how much was simulated in `wait`, and how long that took.
    """

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator
        self.cycles = 0
        self.wall_s = 0.0
        self._slice = SLICE_CYCLES

    @property
    def memory_bytes(self) -> int:
        """Size of the simulated memory."""
        return self.simulator.memory_bytes

    def read32(self, offset: int) -> int:
        """One register. Raises SimulationError where the device has none."""
        value, response = self.simulator.csr_read(offset)
        if response:
            raise SimulationError(f"register {offset:#05x} cannot be read: bus response {response}")
        return value

    def write32(self, offset: int, value: int) -> None:
        """One register. Raises SimulationError where the device has none that can be written."""
        if not 0 <= value < 1 << 32:
            raise SimulationError(f"register {offset:#05x} takes 32 bits, not {value:#x}")
        if response := self.simulator.csr_write(offset, value):
            raise SimulationError(f"register {offset:#05x} cannot be written: bus response {response}")

    def read_mem(self, address: int, size: int) -> bytes:
        """Bytes of the memory."""
        return self.simulator.mem_read(address, size)

    def write_mem(self, address: int, data: bytes) -> None:
        """Bytes of the memory."""
        self.simulator.mem_write(address, data)

    def wait(self, timeout_s: float | None, progress: Callable[[int], None] | None = None) -> bool:
        """Simulates until the device is no longer busy: True; False if it still is after ``timeout_s`` of wall time.

        ``progress`` is called with the cycles of this wait, some ten times a second. Raises ProtocolError if the
        design breaks a rule of the bus.
        """
        begin, started = self.simulator.cycle, time.monotonic()
        try:
            while self._busy():
                before = time.monotonic()
                reason = self.simulator.run(self._slice)
                now = time.monotonic()
                if progress:
                    progress(self.simulator.cycle - begin)
                if reason is Reason.IRQ:
                    continue  # ask the register: it decides
                if timeout_s is not None and now - started >= timeout_s:
                    return False
                pace = SLICE_S / max(now - before, SLICE_S / 4)
                self._slice = max(1000, int(self._slice * min(pace, 4.0)))
            return True
        finally:
            self.cycles += self.simulator.cycle - begin
            self.wall_s += time.monotonic() - started

    def _busy(self) -> bool:
        return bool(self.read32(STATUS.offset) & STATUS.field("busy").mask)

    def close(self) -> None:
        """Frees the simulation."""
        self.simulator.close()


def _config(preset: str) -> AcceleratorConfig:
    if preset not in PRESETS:
        raise InvalidRequest(f"there is no preset {preset!r}; choose one of: {', '.join(sorted(PRESETS))}")
    return PRESETS[preset]


def build(preset: str, *, verilator: bool = False, trace: bool = False) -> Path:
    """Simulator of a preset, from the cache where nothing changed: the library's path.

    It is made by cosim/vector, or with ``verilator`` or ``trace`` by Verilator, which is slower and can write waveforms.
    Verilator also makes it, with a line on stderr, if the design has something that cosim/vector does not compile.
    """
    config = _config(preset)
    if not (verilator or trace):
        try:
            return build_compiled(compiled_accelerator(config))
        except UnsupportedError as error:
            print(f"note: cosim/vector does not compile {error}: Verilator simulates the device, more slowly", file=sys.stderr)
    return build_simulator(accelerator_verilog(config), trace=trace)


def open_device(
    preset: str,
    memory_bytes: int,
    *,
    dram: dict[str, float] | None = None,
    stall_probability: float = 0.0,
    stall_seed: int = 1,
    verilator: bool = False,
    trace: str | Path | None = None,
    trace_cycles: tuple[int, int] = (0, 10_000),
) -> RtlTransport:
    """The RTL of a preset with so much memory; builds it first if it is not in the cache.

    Parameters
    ----------
    dram
        Fields of `spec.config.DramConfig` that differ from the preset's.
    stall_probability, stall_seed
        Every bus channel stands still in a cycle with this probability.
    verilator
        Simulated by Verilator instead of cosim/vector: slower, the same in every cycle.
    trace
        File for waveforms (VCD); needs a build of its own by Verilator, and simulates several times slower.
    trace_cycles
        First cycle of the waveforms, and the one after the last.
    """
    config = _config(preset)
    try:
        memory = replace(config.dram, **(dram or {}))
    except TypeError:
        known = ", ".join(config.dram.__dataclass_fields__)
        raise InvalidRequest(f"dram takes {known}, not {', '.join(dram or {})}") from None
    simulator = Simulator(
        build(preset, verilator=verilator, trace=trace is not None),
        memory_bytes=memory_bytes,
        dram=memory,
        stall_probability=stall_probability,
        stall_seed=stall_seed,
        max_reads=max(config.bus.weight_outstanding, config.bus.data_outstanding),
        max_writes=config.bus.data_outstanding,
    )
    if trace is not None:
        first, end = trace_cycles
        simulator.trace(Path(trace), first=first, end=end)
    return RtlTransport(simulator)
