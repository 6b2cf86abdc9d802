"""A design to C++ that Verilator is not needed for: what has lanes works on vectors, what is guarded only when it must."""

import sys
import threading
from collections.abc import Callable
from typing import Any

from cosim.vector.assume import resets_of, without
from cosim.vector.emit import emit_edge, emit_header, emit_rest
from cosim.vector.layout import lay_out
from cosim.vector.netlist import Modules, read_unit
from cosim.vector.pack import pack_edge, pack_outputs

__all__ = ["COLD_FILES", "compile_design"]

COLD_FILES = ("Vdut_reset.cpp",)
"""What runs in few cycles."""

STACK_BYTES = 1 << 29
"""Expressions are followed by recursion, some thousands deep."""


def compile_design(modules: Modules, top: str) -> dict[str, str]:
    """C++ by file name, of the netlist that Yosys writes as JSON: ``Vdut.h``, ``Vdut.cpp``, and ``Vdut_reset.cpp`` for the cycles
    in which something is reset, which are few. Raises UnsupportedError.
    """

    def work() -> dict[str, str]:
        unit = read_unit(modules, top)
        layout, flags = lay_out(unit), resets_of(unit)
        files = {"Vdut.h": emit_header(unit, layout)}
        if flags:
            files["Vdut_reset.cpp"] = emit_edge(unit, "edge_in_reset", pack_edge(unit, layout))
        edge = emit_edge(unit, "edge", pack_edge(without(unit, flags), layout))
        return files | {"Vdut.cpp": edge + emit_rest(unit, flags, pack_outputs(unit))}

    return _deep(work)


def _deep(work: Callable[[], Any]) -> Any:
    """The result of a call that may recurse deeply."""
    done: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:  # noqa: BLE001 # raised again below
            failed.append(error)

    size, limit = threading.stack_size(STACK_BYTES), sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(size)
        sys.setrecursionlimit(limit)
    if failed:
        raise failed[0]
    return done[0]
