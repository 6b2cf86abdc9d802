"""Bench of the attention engine against golden/attention.py, for both simulators.

`AttentionBench` is memory, vector memory and query writer around the engine, cycle by cycle. tests/test_attention.py
runs it in Amaranth's simulator, the coroutine marked ``cocotb.test`` inside Verilator, built by ``run_bench``. Most
cases run on the compiled loop of cosim/attention_harness.py, which is much faster.
"""

from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cocotb

from cosim.attention_case import ADDR_BITS, BUILDS, AttentionBuild, AttentionCase
from cosim.cycle_bench import CycleBench, Stalls, run_cocotb_module, run_in_cocotb
from cosim.pysim import no_stalls, periodic
from rtl.lib.ops import op_layout
from spec.config import LANES
from spec.descriptors import Opcode


class AttentionBench(CycleBench):
    """Runs cases one after the other. ``latency``: cycles from a command to its first beat."""

    def __init__(
        self,
        build: AttentionBuild,
        cases: Iterable[AttentionCase],
        *,
        latency: int = 1,
        cmd_stalls: Stalls = no_stalls,
        beat_stalls: Stalls = no_stalls,
    ) -> None:
        super().__init__()
        self._beat_bytes = build.data_bits // 8
        self._cases = iter(cases)
        self._latency = latency
        self._cmd_stalls = iter(cmd_stalls())
        self._beat_stalls = iter(beat_stalls())
        self._case: AttentionCase | None = None
        self._image = b""
        self._vector: dict[int, list[int]] = {}
        self._written: dict[int, list[int]] = {}
        self._beats: deque[tuple[int, int]] = deque()
        self._beats_read = 0
        self._setup: deque[dict[str, int]] = deque()
        self._cmd_pending: int | None = None
        self.busy: list[int] = []
        """Busy cycles of each case."""
        self.starved = 0
        self.inputs |= {"i_op_valid": 0, "kv_beat_valid": 0, "kv_cmd_ready": 0}

    def step(self, seen: dict[str, int]) -> bool:
        super().step(seen)
        self._vector_memory(seen)
        self._memory(seen)
        self.starved += seen["o_starved"]
        if self._setup:
            self.inputs |= {"query_en": 0, "query_scale_en": 0, **self._setup.popleft()}
            return False
        if seen["i_op_valid"]:
            assert seen["i_op_ready"], "an idle engine takes an operation"
            self.inputs["i_op_valid"] = 0
            self.busy.append(0)
            return False
        if seen["o_busy"]:
            assert self._case is not None, "busy without an operation"
            self.busy[-1] += 1
            return False
        self._judge()
        self._case = next(self._cases, None)
        if self._case is None:
            return True
        self._prepare(self._case)
        return False

    def _vector_memory(self, seen: dict[str, int]) -> None:
        if seen["vector_read_en"]:
            row = self._vector.get(seen["vector_read_addr"], [0xDEADBEEF] * LANES)
            self.inputs["vector_read_data"] = sum(word << (32 * n) for n, word in enumerate(row))
        if seen["vector_write_en"]:
            row = seen["vector_write_addr"]
            assert row not in self._written, f"row {row} is written twice"
            data = seen["vector_write_data"]
            self._written[row] = [data >> (32 * n) & 0xFFFF_FFFF for n in range(LANES)]

    def _memory(self, seen: dict[str, int]) -> None:
        if seen["kv_cmd_valid"]:
            payload = seen["kv_cmd_payload"]
            assert self._cmd_pending in (None, payload), "an offered command changed"
            self._cmd_pending = payload
            if seen["kv_cmd_ready"]:
                self._cmd_pending = None
                addr, beats = payload & ((1 << ADDR_BITS) - 1), payload >> ADDR_BITS
                self._command(addr, beats)
        else:
            assert self._cmd_pending is None, "an offered command was withdrawn"
        if seen["kv_beat_valid"]:
            assert seen["kv_beat_ready"], "the engine takes every beat that it asked for"
            self._beats_read += 1
        self.inputs["kv_cmd_ready"] = int(not next(self._cmd_stalls))
        self.inputs["kv_beat_valid"] = 0
        if not next(self._beat_stalls) and self._beats and self._beats[0][0] <= self.cycle:
            self.inputs |= {"kv_beat_valid": 1, "kv_beat_payload": self._beats.popleft()[1]}

    def _command(self, addr: int, beats: int) -> None:
        size = self._beat_bytes
        assert addr % size == 0, f"address {addr:#x} is no multiple of {size}"
        assert beats > 0
        assert addr + beats * size <= len(self._image)
        for n in range(beats):
            data = int.from_bytes(self._image[addr + n * size :][:size], "little")
            self._beats.append((self.cycle + self._latency, data | (n == beats - 1) << (8 * size)))

    def _prepare(self, case: AttentionCase) -> None:
        self._image, self._vector, self._written, self._beats_read = case.memory(), case.vector_rows(), {}, 0
        for row, value in enumerate(case.query_rows()):
            self._setup.append({"query_en": 1, "query_row": row, "query_data": value})
        for token, head, scale in case.query_scales():
            self._setup.append(
                {"query_scale_en": 1, "query_token": token, "query_head": head, "query_scale": scale}
            )
        op = op_layout(Opcode.ATTEND).const(case.op()).as_value().value
        self._setup.append({"i_op_valid": 1, "i_op_payload": op, "i_slots": case.slots})

    def _judge(self) -> None:
        case = self._case
        if case is None:
            return
        expected = case.expected()
        assert self._written.keys() == expected.keys(), case
        wrong = {row: (self._written[row], expected[row]) for row in expected if self._written[row] != expected[row]}
        assert not wrong, f"{len(wrong)} rows differ, first {next(iter(wrong.items()))}: {case}"
        assert not self._beats, "every beat is read before the engine is idle"
        assert self._beats_read * self._beat_bytes == case.read_bytes, "each byte is read once"


def run_bench(directory: Path) -> None:
    """Build the engine of preset `test` under ``directory`` and run the tests below."""
    run_cocotb_module(BUILDS["test"].engine(ADDR_BITS), "attention_bench", "cosim.bench_attention", directory)


@cocotb.test()
async def modes(dut: Any) -> None:
    build = BUILDS["test"]
    shape: dict[str, Any] = {"head_dim": 24, "group": 3, "kv_heads": 2}
    cases = [
        AttentionCase(**shape, tokens=1, position=0, slots=16, seed=1),
        AttentionCase(**shape, tokens=3, position=14, slots=48, seed=2, bias=True),
        AttentionCase(**shape, tokens=1, position=36, slots=48, seed=3, extreme=True),
        AttentionCase(**shape, tokens=3, position=29, slots=32, seed=4, resume=True),
        AttentionCase(**shape, tokens=2, position=15, slots=32, seed=5, export=True),
    ]
    bench = AttentionBench(build, cases, latency=7, beat_stalls=periodic, cmd_stalls=periodic)
    await run_in_cocotb(dut, build.engine(ADDR_BITS), bench, 40_000)
