"""Runs a component with one input stream and one output stream, Verilated, over whole arrays of beats, with stalls."""

from ctypes import Structure, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from amaranth.hdl import Module, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from numpy.typing import NDArray

from cosim.generate import verilog
from cosim.unit_bench import UnitBench, of_256
from cosim.verilate import build

__all__ = ["StreamHarness", "StreamRun"]

HARNESS = Path(__file__).resolve().parent / "harness" / "stream.cpp"

IDLE_CYCLES = 64
"""After the last beat: what comes then is one too many."""


class _Run(Structure):
    """Mirrors ``Run`` of stream.cpp."""

    _fields_ = [
        ("in", c_void_p),
        ("in_beats", c_uint64),
        ("out", c_void_p),
        ("cycle", c_void_p),
        ("out_beats", c_uint64),
        ("stall_in", c_uint32),
        ("stall_out", c_uint32),
        ("seed", c_uint64),
        ("max_cycles", c_uint64),
        ("idle", c_uint64),
    ]


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
        sizes = [f"IN_BYTES={self._in}", f"OUT_BYTES={self._out}"]
        self._bench = UnitBench(build("stream", verilog(top, "stream"), [HARNESS], defines=sizes))

    def run(
        self, beats: NDArray[np.uint8], count: int, *, in_stall: float = 0.0, out_stall: float = 0.0, seed: int = 1
    ) -> StreamRun:
        """Sends `beats` (n, bytes), takes `count`. Raises AssertionError if there are more or fewer, or a beat does not hold."""
        beats = np.ascontiguousarray(beats, dtype=np.uint8)
        if beats.ndim != 2 or beats.shape[1] != self._in:
            raise ValueError(f"beats have {self._in} bytes, not {beats.shape}")
        out, cycle = np.zeros((count, self._out), dtype=np.uint8), np.zeros(count, dtype=np.uint64)
        rate = (1 - in_stall) * (1 - out_stall)
        job = _Run(
            beats.ctypes.data, len(beats), out.ctypes.data, cycle.ctypes.data, count, of_256(in_stall), of_256(out_stall), seed,
            round(4 * (len(beats) + count + 100) / rate), IDLE_CYCLES,
        )  # fmt: skip
        taken = self._bench.run(job)
        if taken != count:
            raise AssertionError(f"{taken} beats came out, not {count}")
        return StreamRun(beats=out, cycle=cycle)
