"""Runs `FpUnit`s, and Berkeley SoftFloat, over numpy arrays: the bench of the float32 arithmetic.

The units given stand side by side in one Verilated model that is built once (cached by content) and driven by a
compiled loop.
"""

import ctypes
import hashlib
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from amaranth.hdl import Cat, Module, Signal, unsigned
from amaranth.lib.wiring import Component, In, Out
from numpy.typing import NDArray

from cosim.generate import verilog
from cosim.verilate import build
from rtl.lib.fp import FpUnit

BUILD_ROOT = Path(__file__).resolve().parent.parent / "build" / "fp_harness"

_RUN_CPP = """\
#include "Vdut.h"
#include "verilated.h"
#include <cstdint>
#include <cstdio>
#include <cstdlib>

void vl_fatal(const char *file, int line, const char *, const char *message) {  // the build leaves it to us
    std::fprintf(stderr, "%s:%d: %s\\n", file, line, message);
    std::abort();
}

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
    Vdut model(&context);
    uint32_t out[units], held[units] = {};
    auto read = [&] { READ_OUT };
    auto settle = [&] { model.clk = 0; model.eval(); };
    auto edge = [&] { model.clk = 1; model.eval(); };
    uint64_t state = seed | 1, moved = 0;
    model.rst = 0;
    for (uint64_t k = 0; k < n + longest; k++) {
        while (stall_256 && (noise(state) & 255) < stall_256) {
            model.en = 0; model.a = noise(state); model.b = noise(state);
            settle(); edge(); read();
            for (int u = 0; u < units; u++) moved += k && latency[u] && out[u] != held[u];
        }
        model.en = 1;
        model.a = k < n ? a[k] : noise(state);
        model.b = k < n ? b[k] : noise(state);
        settle();
        if (HAS_COMB) {
            read();
            for (int u = 0; u < units; u++) if (!latency[u] && k < n) y[u][k] = out[u];
        }
        edge();
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
extern "C" void map_2(uint32_t (*f)(uint32_t, uint32_t), const uint32_t *a, const uint32_t *b, uint32_t *y,
                      uint64_t n) {
    for (uint64_t i = 0; i < n; i++) y[i] = f(a[i], b[i]);
}
extern "C" void map_1(uint32_t (*f)(uint32_t), const uint32_t *a, uint32_t *y, uint64_t n) {
    for (uint64_t i = 0; i < n; i++) y[i] = f(a[i]);
}
extern "C" void map_1_long(uint32_t (*f)(int64_t), const int64_t *a, uint32_t *y, uint64_t n) {
    for (uint64_t i = 0; i < n; i++) y[i] = f(a[i]);
}
extern "C" void map_1_mode(uint32_t (*f)(uint32_t, uint8_t, bool), const uint32_t *a, uint32_t *y, uint64_t n) {
    for (uint64_t i = 0; i < n; i++) y[i] = f(a[i], 0, false);  // 0: nearest even
}
"""

Bits = NDArray[np.uint32]


class _Top(Component):
    """All units side by side on the same inputs, each cut or extended to its own widths (an `x` of more than 32 bits: a, b)."""

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
            for port, value in (("a", self.a), ("b", self.b), ("x", Cat(self.a, self.b))):
                if port in unit.signature.members:
                    target = getattr(unit, port)
                    m.d.comb += target.eq(value[: len(target)])
        # gives the model a clock and a reset even when all units are combinational
        tick = Signal()
        m.d.sync += tick.eq(~tick)
        return m


def _source(name: str, text: str) -> Path:
    """A C++ file of `text`, under build/ by its content."""
    folder = BUILD_ROOT / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if not path.exists():
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            file.write(text)
        Path(file.name).replace(path)
    return path


class FpHarness:
    """A set of units, Verilated, driven with arrays.

    `units` maps a name to a unit; one-input units are driven by `a`, those of more than 32 bits by `a` below `b`. Integers
    go in and come out in the low bits.
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
    latencies = [unit.latency for unit in units.values()]
    read_out = " ".join(f"out[{n}] = uint32_t(model.y_{name});" for n, name in enumerate(units))
    run_cpp = (
        _RUN_CPP.replace("LATENCIES", ", ".join(map(str, latencies)))
        .replace("READ_OUT", read_out)
        .replace("HAS_COMB", "true" if 0 in latencies else "false")
    )
    library = ctypes.CDLL(str(build("fp_units", verilog(_Top(units), "fp_units"), [_source("run.cpp", run_cpp)])))
    library.run_units.restype = ctypes.c_uint64
    return library


class SoftFloat:
    """Berkeley SoftFloat (package softfloatpy) over arrays of bits; its C functions are called in a compiled loop."""

    def __init__(self) -> None:
        import softfloatpy._core

        self._functions = ctypes.CDLL(softfloatpy._core.__file__)
        source = _source("loops.cpp", _SOFTFLOAT_CPP)
        library = source.with_name("loops.so")
        if not library.exists():
            with tempfile.NamedTemporaryFile(dir=source.parent, delete=False) as file:
                command = ["g++", "-O2", "-fPIC", "-shared", "-o", file.name, str(source)]
                subprocess.run(command, check=True, capture_output=True)
            Path(file.name).replace(library)
        self._loops = ctypes.CDLL(str(library))

    def _map(self, loop: str, function: str, *operands: Bits | NDArray[np.int64]) -> Bits:
        arrays = [np.ascontiguousarray(operand) for operand in operands]
        y = np.empty(arrays[0].shape, dtype=np.uint32)
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

    def from_int64(self, x: NDArray[np.int64]) -> Bits:
        """float32 of int64."""
        return self._map("map_1_long", "i64_to_f32", x)

    def from_half(self, x: Bits) -> Bits:
        """float32 of binary16 bit patterns."""
        return self._map("map_1", "f16_to_f32", x)

    def to_int32(self, x: Bits) -> Bits:
        """int32 bit patterns of float32, nearest even."""
        return self._map("map_1_mode", "f32_to_i32", x)
