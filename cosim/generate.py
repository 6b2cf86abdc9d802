"""Verilog from Amaranth components: ``python -m cosim.generate --preset sim --output build/lutra_sim.v``.

Amaranth writes RTLIL, Yosys (the native library of the `pyosys` wheel) turns it into Verilog. The text depends on the
design only, not on where the sources lie or on their line numbers, so it can serve as the key of a build cache.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from amaranth.back import rtlil
from amaranth.lib import wiring

from rtl.bus.axi import flat_ports

__all__ = ["GenerateError", "verilog"]


class GenerateError(RuntimeError):
    """Yosys did not accept the design."""


_PASSES = ("read_rtlil {source}", "proc -norom", "opt_clean", "write_verilog -noattr -norename {target}")
"""``proc`` turns processes into registers and multiplexers; -norom keeps switches from becoming memories."""

_YOSYS = """
import sys
from pyosys import libyosys
design = libyosys.Design()
for command in sys.argv[1:]:
    libyosys.run_pass("tee -q " + command, design)
"""


def verilog(component: wiring.Component, name: str) -> str:
    """Verilog text of a component as module ``name``, ports ``clk``, ``rst`` and the flattened signature.

    Path elements of a port are joined by one underscore: member ``awaddr`` of ``s_axil`` is ``s_axil_awaddr``.
    Yosys runs in a process of its own, as an error in it would end ours.
    """
    text = rtlil.convert(component, name=name, ports=flat_ports(component), emit_src=False)
    with tempfile.TemporaryDirectory(prefix="lutra-") as folder:
        source, target = Path(folder, "design.il"), Path(folder, "design.v")
        source.write_text(text)
        commands = [command.format(source=source, target=target) for command in _PASSES]
        done = subprocess.run(
            [sys.executable, "-c", _YOSYS, *commands], capture_output=True, text=True, check=False
        )
        if done.returncode or not target.exists():
            lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
            raise GenerateError(f"Yosys failed on module {name}: {lines[-1]}")
        return target.read_text()


def main(arguments: list[str] | None = None) -> None:
    """Write the Verilog of a preset."""
    from rtl.top import Lutra  # not needed to convert other components
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
