"""Runs operations on a Verilated group engine and its weight stream (cosim/harness/group_matmul.cpp)."""

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
from rtl.lib.ports import TOKEN_BITS
from spec.config import LANES, GroupMatmulConfig

__all__ = ["GroupHarness", "GroupOperation", "GroupResult", "build_group_engine"]

HARNESS = Path(__file__).resolve().parent / "harness" / "group_matmul.cpp"


class _Operation(Structure):
    """Mirrors ``Operation`` of group_matmul.cpp."""

    _fields_ = [
        ("activations", c_void_p),
        ("scales", c_void_p),
        ("payload", c_void_p),
        ("tokens", c_uint32),
        ("groups", c_uint32),
        ("beats", c_uint64),
        ("prefetch", c_uint64),
    ]


class _Result(Structure):
    """Mirrors ``Result`` of group_matmul.cpp."""

    _fields_ = [(name, c_uint64) for name in ("taken", "last", "lookups", "starved", "stalled")]


class _Run(Structure):
    """Mirrors ``Run`` of group_matmul.cpp."""

    _fields_ = [
        ("weights", c_void_p),
        ("weight_beats", c_uint64),
        ("operations", POINTER(_Operation)),
        ("count", c_uint64),
        ("results", POINTER(_Result)),
        ("beats", c_void_p),
        ("capacity", c_uint64),
        ("stall_in", c_uint32),
        ("stall_out", c_uint32),
        ("stall_op", c_uint32),
        ("overlap", c_uint32),
        ("clear_after", c_uint64),
        ("seed", c_uint64),
        ("max_cycles", c_uint64),
    ]


@dataclass(kw_only=True)
class GroupOperation:
    """One operation; ``activations`` (tokens, bytes of K activations), or None for those of the operation before."""

    payload: int
    activations: NDArray[np.int8] | None
    scales: NDArray[np.uint16] | None
    """bfloat16 bits (tokens, K / 32)."""
    beats: int
    """Beats of ``o_y`` it gives."""
    prefetch: int = 0
    """Beats of the weight stream that must have been taken before."""


@dataclass(kw_only=True)
class GroupResult:
    """``sums`` (beats, 8), ``tokens`` (beats,); cycles from taking the operation to its last beat."""

    sums: NDArray[np.int64]
    tokens: NDArray[np.uint8]
    cycles: int
    lookups: int
    starved: int
    stalled: int


def build_group_engine(engine: StreamedEngine[GroupMatmulConfig]) -> Path:
    """Library of a group engine and its weight stream."""
    return build("group_bench", verilog(engine, "group_bench"), [HARNESS])


def unpack_beats(payloads: NDArray[np.uint8], sum_bits: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Payloads of `matmul_beat` (beats, bytes), lowest bit first, to sums (beats, 8) and tokens (beats,)."""
    bits = np.unpackbits(payloads, axis=1, bitorder="little")
    lanes = bits[:, : LANES * sum_bits].reshape(-1, LANES, sum_bits).astype(np.int64)
    sums = (lanes[..., :-1] << np.arange(sum_bits - 1)).sum(-1) - (lanes[..., -1] << (sum_bits - 1))
    token = bits[:, LANES * sum_bits :][:, :TOKEN_BITS]
    return sums, (token << np.arange(TOKEN_BITS, dtype=np.uint8)).sum(-1, dtype=np.uint8)


class GroupHarness:
    """One engine after reset; what `run` leaves in it (activations) stays for the next."""

    def __init__(self, library: Path, cfg: GroupMatmulConfig) -> None:
        self._bench = UnitBench(library)
        self._sum_bits = cfg.acc_bits

    def run(
        self,
        weights: bytes,
        weight_bytes: int,
        operations: Sequence[GroupOperation],
        *,
        stall_in: float = 0.0,
        stall_out: float = 0.0,
        stall_op: float = 0.0,
        overlap: bool = False,
        clear_after: int = 0,
        seed: int = 1,
        max_cycles: int = 10_000_000,
    ) -> tuple[list[GroupResult], int]:
        """Results of the operations in order, and all cycles. Stalls are chances a cycle.

        ``overlap``: an operation is offered as soon as the one before allows; otherwise when the engine is idle.
        ``clear_after``: clears engine and stream so many cycles after taking the first operation; results are void.
        """
        capacity = sum(operation.beats for operation in operations)
        beats = np.zeros((capacity, self._bench.lib.bench_y_bytes()), dtype=np.uint8)
        stream = np.frombuffer(weights, dtype=np.uint8)
        keep: list[object] = []
        records = (_Operation * len(operations))()
        for record, operation in zip(records, operations, strict=True):
            payload = self._bench.operation(operation.payload)
            record.payload = ctypes.cast(ctypes.c_char_p(payload), c_void_p)
            keep.append(payload)
            record.beats, record.prefetch = operation.beats, operation.prefetch
            if operation.activations is not None and operation.scales is not None:
                activations = np.ascontiguousarray(operation.activations, dtype=np.int8)
                scales = np.ascontiguousarray(operation.scales, dtype=np.uint16)
                keep += [activations, scales]
                record.activations, record.scales = activations.ctypes.data, scales.ctypes.data
                record.tokens, record.groups = scales.shape
        results = (_Result * len(operations))()
        job = _Run(
            stream.ctypes.data, len(weights) // weight_bytes, records, len(operations), results,
            beats.ctypes.data, capacity,
            of_256(stall_in), of_256(stall_out), of_256(stall_op), int(overlap), clear_after, seed, max_cycles,
        )  # fmt: skip
        cycles = self._bench.run(job)
        sums, tokens = unpack_beats(beats, self._sum_bits)
        answers, first = [], 0
        for operation, result in zip(operations, results, strict=True):
            end = first + operation.beats
            answers.append(
                GroupResult(
                    sums=sums[first:end], tokens=tokens[first:end], cycles=result.last - result.taken,
                    lookups=result.lookups, starved=result.starved, stalled=result.stalled,
                )
            )  # fmt: skip
            first = end
        return answers, cycles
