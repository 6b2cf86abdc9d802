"""Verilog from Amaranth components: ``python -m cosim.generate --preset sim --output build/lutra_sim.v``.

Amaranth writes RTLIL, Yosys (the native library of the `pyosys` wheel) turns it into Verilog. The text depends on the
design only, not on where the sources lie or on their line numbers, so it can serve as the key of a build cache.
"""

import argparse
import gc
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from amaranth.back import rtlil  # pyright: ignore[reportAttributeAccessIssue] # not in the stubs
from amaranth.lib import wiring

from cosim.verilate import cache_folder
from host_driver.errors import BuildError
from rtl.bus.axi import flat_ports
from spec.config import AcceleratorConfig

__all__ = ["accelerator_verilog", "verilog"]


_PASSES = ("read_rtlil {source}", "proc -norom", "write_verilog -noattr -norename {target}")
"""``proc`` turns processes into registers and multiplexers; -norom keeps switches from becoming memories. There is no
``opt_clean``: it names bits of a sign extension after each other, which Verilator takes for a combinational loop."""

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
    Yosys runs in a process of its own, as an error in it would end ours.
    """
    text = _rtlil(component, name)
    with tempfile.TemporaryDirectory(prefix="lutra-") as folder:
        source, target = Path(folder, "design.il"), Path(folder, "design.v")
        source.write_text(text)
        commands = [command.format(source=source, target=target) for command in _PASSES]
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
    root = Path(__file__).resolve().parent.parent
    key = hashlib.sha256(repr((config, sys.version_info[:2])).encode())
    for package in ("amaranth", "pyosys"):
        key.update(importlib.metadata.version(package).encode())
    for source in (*sorted((root / "rtl").rglob("*.py")), *sorted((root / "spec").rglob("*.py")), Path(__file__)):
        key.update(f"{source.name}\n{source.stat().st_size}\n".encode() + source.read_bytes())
    kept = cache_folder() / f"lutra-{config.name}-{key.hexdigest()[:16]}.v"
    if not kept.exists():
        from rtl.top import Lutra  # loads the whole design: only when it is needed

        fresh = kept.with_suffix(f".{os.getpid()}")
        fresh.write_text(verilog(Lutra(config, gated=True), "lutra"))
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
