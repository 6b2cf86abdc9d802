"""C++ to a shared library, cached by content.

A build is named by a hash of everything that goes into it: texts, C++ files and headers, flags, the versions of the tools and
the processor it compiles for. Results lie in ``build/simulators`` of the repository, or in the user's cache when that cannot
be written; ``LUTRA_CACHE`` names another folder. Builds are atomic (a folder is renamed into place) and safe against each
other (a lock a build). Needs a C++ compiler, neither make nor perl.
"""

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from host_driver.errors import BuildError

__all__ = [
    "COLD", "HOT", "LARGE", "LIBRARY", "Job", "build_cpp", "cache_folder", "content_key", "cxx_command", "folders_of", "open_job",
]  # fmt: skip

LIBRARY = "lib.so"
JOBS = min(2, os.cpu_count() or 1)

CXX_FLAGS = ("-std=c++17", "-march=native", "-fPIC", "-fvisibility-inlines-hidden", "-w")
HOT, LARGE, COLD = "-O2", "-O2", "-O0"
"""Optimisation of the harness and small designs, of large designs (-O2 takes twice as long to compile and simulates no
faster), and of what runs once (Verilator's run-time library, too)."""


def cache_folder() -> Path:
    """Where builds are kept."""
    if named := os.environ.get("LUTRA_CACHE"):
        return _writable(Path(named)) or _refuse(f"LUTRA_CACHE={named} cannot be written")
    root = Path(__file__).resolve().parent.parent
    if (root / "pyproject.toml").exists() and (folder := _writable(root / "build" / "simulators")):
        return folder
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lutra" / "simulators"
    return _writable(user) or _refuse(f"the build cache {user} cannot be written: set LUTRA_CACHE to another folder")


def _writable(folder: Path) -> Path | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder.resolve() if os.access(folder, os.W_OK) else None


def _refuse(message: str) -> Path:
    raise BuildError(message)


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


def cxx_command(flags: Sequence[str] = ()) -> list[str]:
    """The compiler with the flags of every build, and some more."""
    return [*_compiler(), *CXX_FLAGS, *flags]


def folders_of(sources: Sequence[Path]) -> list[Path]:
    """Where ``sources`` find headers: in their own folders and these folders' siblings."""
    return sorted({folder for source in sources for folder in source.parent.parent.iterdir() if folder.is_dir()})


def content_key(command: Sequence[str], sources: Sequence[Path], parts: Iterable[str]) -> str:
    """Hash of a build: C++ files with all headers that they may include, compiler, processor, and what else goes in."""
    headers = [header for folder in folders_of(sources) for header in sorted(folder.glob("*.hpp"))]
    key = hashlib.sha256()
    files = (f"{path.name}\n{path.read_text()}" for path in (*sources, *headers))
    for part in (*parts, *files, shlex.join(command), HOT, LARGE, COLD, _target(tuple(command))):
        key.update(f"{len(part)}\n{part}".encode())
    return key.hexdigest()[:16]


def build_cpp(
    name: str,
    texts: Mapping[str, str],
    sources: Sequence[Path],
    *,
    defines: Sequence[str] = (),
    compile_flags: Sequence[str] = (),
    cold: Sequence[str] = (),
) -> Path:
    """Shared library of C++ ``sources`` and of texts by the name of their file, which the sources may include.

    ``cold`` are the names of texts that run seldom: they are not optimised. Raises BuildError: one line, with the name of
    the log where there is one.
    """
    sources = [source.resolve() for source in sources]
    command = cxx_command(compile_flags)
    options = [f"-D{define}" for define in defines]
    key = content_key([*command, *options], sources, (*(piece for item in texts.items() for piece in item), *cold))
    folder = cache_folder() / f"{name}-{key}"
    with open_job(folder, command, [*options, *(f"-I{path}" for path in folders_of(sources))]) as job:
        if job:
            written = [job.folder / file for file in texts]
            for path, text in zip(written, texts.values(), strict=True):
                path.write_text(text)
            units = [path for path in (*written, *sources) if path.suffix == ".cpp"]
            job.link(job.compile([(path, COLD if path.name in cold else HOT) for path in units]))
            for path in written:
                path.unlink()
    return folder / LIBRARY


@contextmanager
def open_job(folder: Path, command: list[str], options: list[str]) -> "Iterator[Job | None]":
    """The job that makes ``folder``, under its lock, or None if it is there already."""
    if folder.exists():
        yield None
        return
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go by closing, also when the process is killed
        if folder.exists():
            yield None
            return
        job = Job(folder.with_suffix(".partial"), command, options)
        try:
            yield job
            job.finish(folder)
        finally:
            shutil.rmtree(job.folder, ignore_errors=True)


class Job:
    """One build in a folder of its own, which `finish` renames into place."""

    def __init__(self, folder: Path, command: list[str], options: list[str]) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # left by a killed build
        folder.mkdir()
        self.folder = folder
        self._options = [*options, f"-I{folder}"]
        self._command = command
        self._started = time.monotonic()
        self._seconds: dict[str, float] = {}

    def compile(self, units: Sequence[tuple[Path, str]]) -> list[Path]:
        """Objects of the files, each with its optimisation, two at a time, the largest first."""
        units = sorted(units, key=lambda unit: unit[0].stat().st_size, reverse=True)

        def one(unit: tuple[Path, str]) -> Path:
            path, level = unit
            made = self.folder / f"{path.stem}.o"
            self.call("C++ compiler", [*self._command, level, *self._options, "-c", str(path), "-o", str(made)])
            return made

        with ThreadPoolExecutor(JOBS) as pool:
            return list(pool.map(one, units))

    def link(self, objects: Sequence[Path]) -> None:
        """The library; objects of this job are removed."""
        inputs = [str(path) for path in objects]
        self.call("linker", [*self._command, "-shared", "-pthread", "-o", str(self.folder / LIBRARY), *inputs])
        for path in objects:
            if path.parent == self.folder:
                path.unlink()

    def finish(self, folder: Path) -> None:
        """Puts the result in its place."""
        self._seconds["total"] = round(time.monotonic() - self._started, 2)
        (self.folder / "seconds.json").write_text(json.dumps(self._seconds, indent=1) + "\n")
        self.folder.rename(folder)

    def call(self, tool: str, command: list[str], environment: Mapping[str, str] | None = None) -> None:
        """Runs a tool; where it fails, its output is kept in a log."""
        started = time.monotonic()
        done = subprocess.run(
            command, env={**os.environ, **(environment or {})}, cwd=self.folder, text=True, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._seconds[f"{tool} {Path(command[-1]).name}"] = round(time.monotonic() - started, 2)
        if done.returncode:
            log = self.folder.with_suffix(".log")
            log.write_text(f"$ {shlex.join(command)}\n{done.stdout}")
            raise BuildError(f"the {tool} failed (exit status {done.returncode}): see {log}")
