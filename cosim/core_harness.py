"""Runs group cores (rtl/group_core.py) side by side in one Verilated model, over whole schedules of rows.

All cores see the same rows; those that take another layout of codes belong into another harness. A compiled loop drives
the model, so millions of cycles cost seconds.
"""

import ctypes
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from amaranth.hdl import Cat, Module, Signal
from amaranth.lib.wiring import Component, In, Out
from amaranth.sim import Simulator
from numpy.typing import NDArray

from cosim.generate import verilog
from cosim.verilate import build, cache_folder
from rtl.group_core import ROW_BITS, SUM_ACTS_BITS, GroupCore
from spec.config import K_GROUP

__all__ = ["CoreHarness", "Rows", "Slices", "run_in_python"]

_RUN_CPP = """\
#include "Vdut.h"
#include "verilated.h"
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

void vl_fatal(const char *file, int line, const char *, const char *message) {  // the build leaves it to us
    std::fprintf(stderr, "%s:%d: %s\\n", file, line, message);
    std::abort();
}

struct Cycle { uint32_t valid, first, last, row, bits; int32_t sum_acts; };

// `cycles` cycles from reset; row c % rows of each array stands at the inputs in cycle c. out[core][cycle] are the
// words of the core's output port in that cycle (none: nothing is recorded). Cycles are evaluated with the outputs of
// registers, so what stands there is what the inputs of that cycle meet.
extern "C" void run_cores(const Cycle *rows, const uint8_t *codes, const uint8_t *acts, uint64_t rows_count,
                          uint64_t cycles, uint32_t *const *out) {
    VerilatedContext context;
    Vdut model(&context);
    auto edge = [&] { model.clk = 0; model.eval(); model.clk = 1; model.eval(); };
    model.rst = 1;
    model.i_valid = 0;
    edge();
    model.rst = 0;
    for (uint64_t c = 0, r = 0; c < cycles; c++, r = r + 1 == rows_count ? 0 : r + 1) {
        if (out) { RECORD }
        model.i_valid = rows[r].valid;
        model.i_first = rows[r].first;
        model.i_last = rows[r].last;
        model.i_row = rows[r].row;
        model.i_bits = rows[r].bits;
        model.i_sum_acts = rows[r].sum_acts & SUM_ACTS_MASK;
        std::memcpy(&model.i_codes, codes + CODE_BYTES * r, CODE_BYTES);
        std::memcpy(&model.i_acts, acts + ACT_BYTES * r, ACT_BYTES);
        edge();
    }
    model.final();
}
"""

_CYCLE = np.dtype(
    [(name, np.uint32) for name in ("valid", "first", "last", "row", "bits")] + [("sum_acts", np.int32)]
)
"""Mirrors ``Cycle`` of the compiled loop."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What stands at the inputs, cycle by cycle."""

    control: NDArray[np.void]
    """(cycles,) of `Rows.record`"""
    codes: NDArray[np.uint8]
    """(cycles, 4 * lanes)"""
    acts: NDArray[np.int8]
    """(cycles, act_bits / 8): 32 activations, or what else the core takes, byte by byte"""

    @staticmethod
    def record(cycles: int) -> NDArray[np.void]:
        """Empty `control`: valid, first, last, row, bits, sum_acts."""
        return np.zeros(cycles, dtype=_CYCLE)


@dataclass(frozen=True, kw_only=True)
class Slices:
    """All slices that a core gave, in order."""

    cycle: NDArray[np.int64]
    number: NDArray[np.uint32]
    sums: NDArray[np.int32]
    """(slices, dequant_lanes)"""


class _Top(Component):
    """The cores on common inputs; ``o_<name>`` are 32-bit words: valid, slice number, sums."""

    def __init__(self, cores: Mapping[str, GroupCore]) -> None:
        self._cores = cores
        lanes = {core.cfg.lanes for core in cores.values()}
        act_bits = {core.act_bits for core in cores.values()}
        if len(lanes) != 1 or len(act_bits) != 1:
            raise ValueError(f"cores on common inputs need equal lanes and activations, not {sorted(lanes)}, {sorted(act_bits)}")
        inputs = {"valid": 1, "first": 1, "last": 1, "row": ROW_BITS, "bits": 4, "sum_acts": SUM_ACTS_BITS}
        inputs |= {"codes": K_GROUP * lanes.pop(), "acts": act_bits.pop()}
        self._inputs = tuple(inputs)
        ports = {f"i_{name}": In(width) for name, width in inputs.items()}
        super().__init__(
            {**ports, **{f"o_{name}": Out(32 * (2 + core.cfg.dequant_lanes)) for name, core in cores.items()}}
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for name, core in self._cores.items():
            m.submodules[name] = core
            m.d.comb += [getattr(core, f"i_{port}").eq(getattr(self, f"i_{port}")) for port in self._inputs]
            words = [core.o_valid, core.o_slice, *core.o_sums]
            wide = [Signal(32, name=f"{name}_word_{n}") for n in range(len(words))]
            m.d.comb += [word.eq(value) for word, value in zip(wide, words, strict=True)]
            m.d.comb += getattr(self, f"o_{name}").eq(Cat(wide))
        return m


class CoreHarness:
    """Cores, by name, in one model; cached by content."""

    def __init__(self, cores: Mapping[str, GroupCore]) -> None:
        self._lanes = {name: core.cfg.dequant_lanes for name, core in cores.items()}
        one = next(iter(cores.values()))
        self._codes, self._acts = 4 * one.cfg.lanes, one.act_bits // 8
        record = " ".join(
            f"std::memcpy(out[{n}] + c * {2 + lanes}, &model.o_{name}, {4 * (2 + lanes)});"
            for n, (name, lanes) in enumerate(self._lanes.items())
        )
        text = (
            _RUN_CPP.replace("RECORD", record)
            .replace("CODE_BYTES", str(self._codes))
            .replace("ACT_BYTES", str(self._acts))
            .replace("SUM_ACTS_MASK", hex((1 << SUM_ACTS_BITS) - 1))
        )
        folder = cache_folder() / "sources" / hashlib.sha256(text.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        source = Path(folder, "run.cpp")
        source.write_text(text)
        self._library = ctypes.CDLL(str(build("group_cores", verilog(_Top(cores), "group_cores"), [source])))
        self._library.run_cores.restype = None

    def _call(self, rows: Rows, cycles: int, outputs: ctypes.Array[ctypes.c_void_p] | None) -> None:
        count = len(rows.control)
        if rows.codes.shape != (count, self._codes) or rows.acts.shape != (count, self._acts):
            raise ValueError(
                f"{count} cycles need {self._codes} bytes of codes and {self._acts} of activations, "
                f"not {rows.codes.shape}, {rows.acts.shape}"
            )
        arrays = [np.ascontiguousarray(array) for array in (rows.control, rows.codes, rows.acts)]
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
        self._library.run_cores(*pointers, ctypes.c_uint64(count), ctypes.c_uint64(cycles), outputs)

    def run(self, rows: Rows) -> dict[str, Slices]:
        """The slices of every core; cycle 0 is that of the first element of `rows`."""
        cycles = len(rows.control)
        words = {name: np.zeros((cycles, 2 + lanes), dtype=np.uint32) for name, lanes in self._lanes.items()}
        self._call(rows, cycles, (ctypes.c_void_p * len(words))(*(array.ctypes.data for array in words.values())))
        slices = {}
        for name, array in words.items():
            cycle = np.flatnonzero(array[:, 0])
            slices[name] = Slices(cycle=cycle, number=array[cycle, 1], sums=array[cycle, 2:].view(np.int32))
        return slices

    def speed(self, rows: Rows, cycles: int, repeats: int = 3) -> float:
        """Cycles a second of processor time, the best of some runs over `rows` again and again; nothing is recorded."""
        best = float("inf")
        for _ in range(repeats):
            start = time.process_time()
            self._call(rows, cycles, None)
            best = min(best, time.process_time() - start)
        return cycles / best


def run_in_python(core: GroupCore, rows: Rows) -> Slices:
    """`CoreHarness.run` of one core in Amaranth's own simulator: nothing to build, thousands of times slower."""
    found: list[tuple[int, int, list[int]]] = []

    async def bench(ctx: Any) -> None:
        for cycle, (record, codes, acts) in enumerate(zip(rows.control, rows.codes, rows.acts, strict=True)):
            if ctx.get(core.o_valid):
                found.append((cycle, ctx.get(core.o_slice), [ctx.get(port) for port in core.o_sums]))
            for name in _CYCLE.names or ():
                ctx.set(getattr(core, f"i_{name}"), int(record[name]))
            ctx.set(core.i_codes, int.from_bytes(codes.tobytes(), "little"))
            ctx.set(core.i_acts, int.from_bytes(acts.tobytes(), "little"))
            await ctx.tick()

    simulator = Simulator(core)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    return Slices(
        cycle=np.array([cycle for cycle, _, _ in found]),
        number=np.array([number for _, number, _ in found], dtype=np.uint32),
        sums=np.array([sums for _, _, sums in found], dtype=np.int32),
    )
