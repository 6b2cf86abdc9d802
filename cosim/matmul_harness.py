"""Runs operations on the Verilated table-lookup engine and its weight stream (cosim/harness/matmul.cpp)."""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cosim.generate import verilog
from cosim.streamed_engine import StreamedEngine
from cosim.unit_bench import UnitBench, of_256
from cosim.verilate import build
from spec.config import LANES, TlmmConfig

__all__ = ["MatmulHarness", "Operation", "OperationResult", "build_engine"]

HARNESS = Path(__file__).resolve().parent / "harness" / "matmul.cpp"


class _Operation(Structure):
    """Mirrors ``Operation`` of matmul.cpp."""

    _fields_ = [
        ("activations", c_void_p),
        ("payload", c_void_p),
        ("tokens", c_uint32),
        ("rows", c_uint32),
        ("prefetch", c_uint64),
        ("beats", c_uint64),
    ]


class _Result(Structure):
    """Mirrors ``Result`` of matmul.cpp."""

    _fields_ = [(name, c_uint64) for name in ("begun", "ended", "lookups", "starved", "stalled")]


class _Run(Structure):
    """Mirrors ``Run`` of matmul.cpp."""

    _fields_ = [
        ("weights", c_void_p),
        ("weight_beats", c_uint64),
        ("operations", POINTER(_Operation)),
        ("count", c_uint64),
        ("results", POINTER(_Result)),
        ("sums", c_void_p),
        ("tokens", c_void_p),
        ("overlap", c_uint32),
        ("stall_in", c_uint32),
        ("stall_out", c_uint32),
        ("stall_op", c_uint32),
        ("seed", c_uint64),
        ("max_cycles", c_uint64),
    ]


@dataclass(kw_only=True)
class Operation:
    """One operation; ``activations`` int8 (tokens, K padded to 8), or None for those of the operation before."""

    payload: int
    activations: NDArray[np.int8] | None
    beats: int
    """Beats of ``o_y`` it gives."""
    prefetch: int = 0
    """Beats of the weight stream that must have been taken before."""


@dataclass(kw_only=True)
class OperationResult:
    """``sums`` (beats, 8), ``tokens`` (beats,); ``begun`` and ``ended``: cycles in which it and its last beat were taken.

    ``lookups``, ``starved``, ``stalled``: such cycles while no operation before it ran.
    """

    sums: NDArray[np.int32]
    tokens: NDArray[np.uint8]
    begun: int
    ended: int
    lookups: int
    starved: int
    stalled: int

    @property
    def cycles(self) -> int:
        """From taking the operation to its last beat."""
        return self.ended - self.begun


def build_engine(engine: StreamedEngine[TlmmConfig]) -> Path:
    """Library of an engine and its weight stream."""
    return build("matmul_bench", verilog(engine, "matmul_bench"), [HARNESS])


class MatmulHarness:
    """One engine after reset; what `run` leaves in it (activations) stays for the next."""

    def __init__(self, library: Path) -> None:
        self._bench = UnitBench(library)

    def run(
        self,
        weights: bytes,
        weight_bytes: int,
        operations: Sequence[Operation],
        *,
        stall_in: float = 0.0,
        stall_out: float = 0.0,
        stall_op: float = 0.0,
        overlap: bool = False,
        seed: int = 1,
        max_cycles: int = 10_000_000,
    ) -> tuple[list[OperationResult], int]:
        """Results of the operations in order, and all cycles. Stalls are chances a cycle.

        ``overlap``: activations are written and the operation is offered as soon as the engine allows; else when the one
        before has ended.
        """
        capacity = sum(operation.beats for operation in operations)
        sums = np.zeros((capacity, LANES), dtype=np.int32)
        tokens = np.zeros(capacity, dtype=np.uint8)
        stream = np.frombuffer(weights, dtype=np.uint8)
        keep: list[object] = []
        records = (_Operation * len(operations))()
        for record, operation in zip(records, operations, strict=True):
            payload = self._bench.operation(operation.payload)
            record.payload = ctypes.cast(ctypes.c_char_p(payload), c_void_p)
            keep.append(payload)
            record.prefetch, record.beats = operation.prefetch, operation.beats
            if operation.activations is not None:
                activations = np.ascontiguousarray(operation.activations, dtype=np.int8)
                keep.append(activations)
                record.activations = activations.ctypes.data
                record.tokens, record.rows = activations.shape[0], activations.shape[1] // LANES
        results = (_Result * len(operations))()
        job = _Run(
            stream.ctypes.data, len(weights) // weight_bytes, records, len(operations), results,
            sums.ctypes.data, tokens.ctypes.data, overlap,
            of_256(stall_in), of_256(stall_out), of_256(stall_op), seed, max_cycles,
        )  # fmt: skip
        cycles = self._bench.run(job)
        answers, first = [], 0
        for operation, result in zip(operations, results, strict=True):
            end = first + operation.beats
            answers.append(
                OperationResult(
                    sums=sums[first:end], tokens=tokens[first:end], begun=result.begun, ended=result.ended,
                    lookups=result.lookups, starved=result.starved, stalled=result.stalled,
                )
            )  # fmt: skip
            first = end
        return answers, cycles
