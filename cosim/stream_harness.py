"""Runs a component with one input stream and one output stream, Verilated, over whole arrays of beats, with stalls."""

import ctypes
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from amaranth.hdl import Module, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from numpy.typing import NDArray

from cosim.generate import verilog
from cosim.verilate import build, cache_folder

__all__ = ["StreamHarness", "StreamRun"]

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

static uint32_t noise(uint64_t &state) {  // xorshift64
    state ^= state << 13; state ^= state >> 7; state ^= state << 17;
    return uint32_t(state >> 16);
}

// Sends in_beats beats, takes up to out_beats of them; each side stands still in its number of 256 cycles. cycle[] are the
// cycles in which they were taken. After the last one `idle` more cycles. Returns the number of beats taken, or -1 where a
// beat that waited changed or vanished.
extern "C" int64_t run_stream(const uint8_t *in, uint64_t in_beats, uint8_t *out, uint64_t *cycle, uint64_t out_beats,
                              uint32_t in_stall, uint32_t out_stall, uint64_t seed, uint64_t most_cycles, uint64_t idle) {
    VerilatedContext context;
    Vdut model(&context);
    auto edge = [&] { model.clk = 1; model.eval(); model.clk = 0; };
    uint64_t state = seed | 1, sent = 0, taken = 0;
    uint8_t held[OUT_BYTES];
    bool offering = false, waiting = false;
    model.clk = 0; model.rst = 1; model.i_valid = 0; model.o_ready = 0;
    model.eval(); edge();
    model.rst = 0;
    for (uint64_t c = 0; c < most_cycles && idle; c++) {
        if (!offering && sent < in_beats && (noise(state) & 255) >= in_stall) {
            offering = true;
            std::memcpy(&model.i_payload, in + IN_BYTES * sent, IN_BYTES);
        }
        model.i_valid = offering;
        model.o_ready = (noise(state) & 255) >= out_stall;
        model.eval();
        if (waiting && (!model.o_valid || std::memcmp(held, &model.o_payload, OUT_BYTES))) return -1;
        waiting = model.o_valid && !model.o_ready;
        std::memcpy(held, &model.o_payload, OUT_BYTES);
        if (model.o_valid && model.o_ready) {
            if (taken < out_beats) { std::memcpy(out + OUT_BYTES * taken, &model.o_payload, OUT_BYTES); cycle[taken] = c; }
            taken++;
        }
        if (taken >= out_beats) idle--;
        if (offering && model.i_ready) { offering = false; sent++; }
        edge();
    }
    model.final();
    return int64_t(taken);
}
"""


@dataclass(frozen=True, kw_only=True)
class StreamRun:
    """What came out."""

    beats: NDArray[np.uint8]
    """(beats, bytes of the payload, a multiple of 4)"""
    cycle: NDArray[np.uint64]
    """(beats,): cycle in which each was taken; the first input beat may be taken in cycle 0"""


class _Top(wiring.Component):
    """The component with its streams as plain ports, the output's payload padded to whole words."""

    i_valid: Signal
    i_payload: Signal
    i_ready: Signal
    o_valid: Signal
    o_payload: Signal
    o_ready: Signal

    def __init__(self, dut: Any, i: str, o: str) -> None:
        self._dut, self._i, self._o = dut, getattr(dut, i), getattr(dut, o)
        self.in_bits, out_bits = (len(Value.cast(port.payload)) for port in (self._i, self._o))
        self.out_bits = -(-out_bits // 32) * 32
        super().__init__(
            {
                "i_valid": In(1), "i_payload": In(self.in_bits), "i_ready": Out(1),
                "o_valid": Out(1), "o_payload": Out(self.out_bits), "o_ready": In(1),
            }
        )  # fmt: skip

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.dut = self._dut
        m.d.comb += [
            self._i.valid.eq(self.i_valid), Value.cast(self._i.payload).eq(self.i_payload), self.i_ready.eq(self._i.ready),
            self.o_valid.eq(self._o.valid), self.o_payload.eq(Value.cast(self._o.payload)), self._o.ready.eq(self.o_ready),
        ]  # fmt: skip
        return m


class StreamHarness:
    """A component with the input stream `i` (whole bytes) and the output stream `o`; cached by content."""

    def __init__(self, dut: Any, i: str, o: str) -> None:
        top = _Top(dut, i, o)
        self._in, self._out = top.in_bits // 8, top.out_bits // 8
        text = _RUN_CPP.replace("IN_BYTES", str(self._in)).replace("OUT_BYTES", str(self._out))
        folder = cache_folder() / "sources" / hashlib.sha256(text.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        source = Path(folder, "run.cpp")
        source.write_text(text)
        self._library = ctypes.CDLL(str(build("stream", verilog(top, "stream"), [source])))
        self._library.run_stream.restype = ctypes.c_int64

    def run(
        self, beats: NDArray[np.uint8], count: int, *, in_stall: float = 0.0, out_stall: float = 0.0, seed: int = 1
    ) -> StreamRun:
        """Sends `beats` (n, bytes), takes `count`. Raises RuntimeError if there are more or fewer, or a beat does not hold."""
        beats = np.ascontiguousarray(beats, dtype=np.uint8)
        if beats.ndim != 2 or beats.shape[1] != self._in:
            raise ValueError(f"beats have {self._in} bytes, not {beats.shape}")
        out, cycle = np.zeros((count, self._out), dtype=np.uint8), np.zeros(count, dtype=np.uint64)
        rate = (1 - in_stall) * (1 - out_stall)
        taken = self._library.run_stream(
            ctypes.c_void_p(beats.ctypes.data), ctypes.c_uint64(len(beats)),
            ctypes.c_void_p(out.ctypes.data), ctypes.c_void_p(cycle.ctypes.data), ctypes.c_uint64(count),
            ctypes.c_uint32(round(256 * in_stall)), ctypes.c_uint32(round(256 * out_stall)), ctypes.c_uint64(seed),
            ctypes.c_uint64(round(4 * (len(beats) + count + 100) / rate)), ctypes.c_uint64(64),
        )  # fmt: skip
        if taken < 0:
            raise RuntimeError("a beat changed or vanished while it waited")
        if taken != count:
            raise RuntimeError(f"{taken} beats came out, not {count}")
        return StreamRun(beats=out, cycle=cycle)
