"""Verilog from Amaranth components: ``python -m cosim.generate --preset sim --output build/lutra_sim.v``.

Amaranth writes RTLIL, Yosys (the native library of the `pyosys` wheel) turns it into Verilog. The text depends on the
design only, not on where the sources lie or on their line numbers, so it can serve as the key of a build cache.
"""

import argparse
import gc
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from amaranth.back import rtlil  # pyright: ignore[reportAttributeAccessIssue] # not in the stubs
from amaranth.lib import wiring

from cosim.cpp_build import cache_folder
from cosim.vector.compile import compile_design
from cosim.vector.netlist import Modules
from host_driver.errors import BuildError
from rtl.bus.axi import flat_ports
from spec.config import AcceleratorConfig

__all__ = ["accelerator_verilog", "compiled_accelerator", "netlist", "verilog"]


_PASSES = ("read_rtlil {source}", "proc -norom")
"""``proc`` turns processes into registers and multiplexers; -norom keeps switches from becoming memories. There is no
``opt_clean``: it names bits of a sign extension after each other, which Verilator takes for a combinational loop."""

_TO_VERILOG = ("write_verilog -noattr -norename {target}",)
_TO_NETLIST = ("memory_collect", "write_json {target}")
"""For cosim/vector: a memory and its ports are one cell."""

_YOSYS = """
import sys
from pyosys import libyosys
design = libyosys.Design()
for command in sys.argv[1:]:
    libyosys.run_pass("tee -q " + command, design)
"""


def _rtlil(component: wiring.Component, name: str) -> str:
    collects = gc.isenabled()
    gc.disable()  # a netlist is millions of objects that all live to its end: looking for garbage takes a third of it
    try:
        return rtlil.convert(component, name=name, ports=flat_ports(component), emit_src=False)
    finally:
        if collects:
            gc.enable()


def verilog(component: wiring.Component, name: str) -> str:
    """Verilog text of a component as module ``name``, ports ``clk``, ``rst`` and the flattened signature.

    Path elements of a port are joined by one underscore: member ``awaddr`` of ``s_axil`` is ``s_axil_awaddr``.
    """
    return _yosys(component, name, _TO_VERILOG)


def netlist(component: wiring.Component, name: str) -> Modules:
    """The cells of a component and of what is below it, as Yosys has them, with the ports of its Verilog."""
    return json.loads(_yosys(component, name, _TO_NETLIST))["modules"]


def _yosys(component: wiring.Component, name: str, output: tuple[str, ...]) -> str:
    """What Yosys writes. It runs in a process of its own, as an error in it would end ours."""
    text = _rtlil(component, name)
    with tempfile.TemporaryDirectory(prefix="lutra-") as folder:
        source, target = Path(folder, "design.il"), Path(folder, "design.out")
        source.write_text(text)
        commands = [command.format(source=source, target=target) for command in (*_PASSES, *output)]
        done = subprocess.run(
            [sys.executable, "-c", _YOSYS, *commands], capture_output=True, text=True, check=False
        )
        if done.returncode or not target.exists():
            lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
            raise BuildError(f"Yosys failed on module {name}: {lines[-1]}")
        return target.read_text()


def accelerator_verilog(config: AcceleratorConfig) -> str:
    """Verilog of the accelerator for simulation, module ``lutra``: with a clock for each unit that may sleep.

    Elaboration takes seconds, so the text is kept in the build cache, under a hash of all that can change it: the
    sources of rtl/ and spec/, the configuration, the versions of Amaranth and Yosys.
    """
    return _kept(config, "verilog", ("rtl", "spec"), lambda design: verilog(design, "lutra"))


def compiled_accelerator(config: AcceleratorConfig) -> dict[str, str]:
    """The same as C++, by file name: class ``Vdut``, as cosim/vector makes it. Kept as the Verilog is."""

    def make(design: wiring.Component) -> str:
        return json.dumps(compile_design(netlist(design, "lutra"), "lutra"))

    return json.loads(_kept(config, "vector", ("rtl", "spec", "cosim/vector"), make))


def _kept(config: AcceleratorConfig, kind: str, folders: tuple[str, ...], make: Callable[[wiring.Component], str]) -> str:
    """What is made of the accelerator, from the build cache where it was made before."""
    root = Path(__file__).resolve().parent.parent
    key = hashlib.sha256(repr((config, kind, sys.version_info[:2])).encode())
    for package in ("amaranth", "pyosys"):
        key.update(importlib.metadata.version(package).encode())
    for source in (*(file for folder in folders for file in sorted((root / folder).rglob("*.py"))), Path(__file__)):
        key.update(f"{source.name}\n{source.stat().st_size}\n".encode() + source.read_bytes())
    kept = cache_folder() / f"lutra-{config.name}-{key.hexdigest()[:16]}.{kind}"
    if not kept.exists():
        from rtl.top import Lutra  # loads the whole design: only when it is needed

        fresh = kept.with_suffix(f".{os.getpid()}")
        fresh.write_text(make(Lutra(config, gated=True)))
        fresh.replace(kept)
    return kept.read_text()


def main(arguments: list[str] | None = None) -> None:
    """Write the Verilog of a preset for synthesis: one clock, module ``lutra``."""
    from rtl.top import Lutra
    from spec.presets import PRESETS

    parser = argparse.ArgumentParser(prog="python -m cosim.generate", description=main.__doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="sim")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    text = verilog(Lutra(PRESETS[options.preset]), "lutra")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    print(f"{options.output}: {len(text.splitlines())} lines")


if __name__ == "__main__":
    main()
