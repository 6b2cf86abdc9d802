"""Runs operations on the Verilated attention engine (cosim/harness/attention.cpp) and compares them with golden."""

import ctypes
from ctypes import Structure, c_char_p, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cosim.attention_case import ADDR_BITS, AttentionBuild, AttentionCase
from cosim.generate import verilog
from cosim.unit_bench import UnitBench, of_256
from cosim.verilate import build
from rtl.lib.ops import op_layout
from spec.config import LANES
from spec.descriptors import Opcode

__all__ = ["AttentionHarness", "AttentionRun"]

HARNESS = Path(__file__).resolve().parent / "harness" / "attention.cpp"
_ROWS = 1 << 16


class _Run(Structure):
    """Mirrors ``Run`` of attention.cpp."""

    _fields_ = [
        ("payload", c_void_p),
        ("memory", c_void_p),
        ("memory_bytes", c_uint64),
        ("query", c_void_p),
        ("query_rows", c_uint64),
        ("scales", c_void_p),
        ("scale_count", c_uint64),
        ("vector", c_void_p),
        ("written", c_void_p),
        ("writes", c_void_p),
        ("slots", c_uint32),
        ("latency", c_uint32),
        ("stall_command", c_uint32),
        ("stall_beat", c_uint32),
        ("seed", c_uint64),
        ("max_cycles", c_uint64),
        ("busy", c_uint64),
        ("starved", c_uint64),
        ("beats", c_uint64),
    ]


@dataclass(frozen=True, kw_only=True)
class AttentionRun:
    """Cycles of one operation."""

    busy: int
    starved: int


class AttentionHarness:
    """One engine after reset; operations run one after the other."""

    def __init__(self, built: AttentionBuild) -> None:
        self._beat_bytes = built.data_bits // 8
        text = verilog(built.engine(ADDR_BITS), "attention_bench")
        self._bench = UnitBench(build("attention_bench", text, [HARNESS], defines=[f"DATA_BITS={built.data_bits}"]))

    def check(
        self,
        case: AttentionCase,
        *,
        latency: int = 1,
        stall_command: float = 0.0,
        stall_beat: float = 0.0,
        seed: int = 1,
        max_cycles: int = 1_000_000,
        compare: bool = True,
    ) -> AttentionRun:
        """Run a case; raise AssertionError on any wrong bit, write or read. Stalls are chances a cycle."""
        payload = op_layout(Opcode.ATTEND).const(case.op()).as_value().value
        op = self._bench.operation(payload)
        memory = np.frombuffer(case.memory(), dtype=np.uint8)
        query = np.array(case.query_rows(), dtype=np.uint64)
        scales = np.array(case.query_scales(), dtype=np.uint32)
        vector = np.full((_ROWS, LANES), 0xDEADBEEF, dtype=np.uint32)
        for row, words in case.vector_rows().items():
            vector[row] = words
        written = np.zeros((_ROWS, LANES), dtype=np.uint32)
        writes = np.zeros(_ROWS, dtype=np.uint8)
        job = _Run(
            ctypes.cast(c_char_p(op), c_void_p), memory.ctypes.data, memory.size, query.ctypes.data, query.size,
            scales.ctypes.data, len(scales), vector.ctypes.data, written.ctypes.data, writes.ctypes.data,
            case.slots, latency, of_256(stall_command), of_256(stall_beat), seed, max_cycles, 0, 0, 0,
        )  # fmt: skip
        try:
            self._bench.run(job)
        except AssertionError as error:
            raise AssertionError(f"{error}: {case}") from None
        assert job.beats * self._beat_bytes == case.read_bytes, f"each byte is read once: {case}"
        if compare:
            expected = case.expected()
            assert set(np.flatnonzero(writes).tolist()) == expected.keys(), f"rows written: {case}"
            assert writes.max() == 1, f"a row is written twice: {case}"
            wrong = [row for row, words in expected.items() if written[row].tolist() != words]
            assert not wrong, f"rows {wrong} differ, the first is {written[wrong[0]]}: {case}"
        return AttentionRun(busy=job.busy, starved=job.starved)
