"""Bench of the attention engine against golden/attention.py, for both simulators.

`AttentionBench` is memory, vector memory and query writer around the engine. tests/test_attention.py runs it in Amaranth's
simulator, the coroutines marked ``cocotb.test`` inside Verilator, built by ``run_bench`` for each of `BUILDS`.
"""

import os
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import cocotb

from cosim.attention_case import AttentionCase
from cosim.cycle_bench import CycleBench, Stalls, geometric_stalls, run_cocotb_module, run_in_cocotb
from cosim.pysim import no_stalls
from rtl.attention import Attention
from rtl.lib.ops import op_layout
from spec.config import LANES, AttentionConfig
from spec.descriptors import Opcode

ADDR_BITS = 32


@dataclass(frozen=True, kw_only=True)
class Build:
    """A build of the engine, and heads that fit it: (head_dim, group, kv_heads)."""

    config: AttentionConfig
    tokens: int
    data_bits: int
    heads: tuple[tuple[int, int, int], ...]

    def engine(self) -> Attention:
        """The component."""
        return Attention(self.config, tokens=self.tokens, data_bits=self.data_bits, addr_bits=ADDR_BITS)


BUILDS = {
    # preset `test`: three chunks a head, so a slot waits a cycle
    "test": Build(
        config=AttentionConfig(lanes=8, max_rows=9, max_head_dim=24, max_q_dim=144),
        tokens=3,
        data_bits=64,
        heads=((24, 3, 2), (16, 1, 3), (8, 2, 1)),
    ),
    # wide beats, narrow lanes: each beat is several chunks; up to five chunks a head
    "narrow": Build(
        config=AttentionConfig(lanes=8, max_rows=7, max_head_dim=40, max_q_dim=160),
        tokens=2,
        data_bits=256,
        heads=((40, 2, 2), (32, 1, 1), (24, 3, 1)),
    ),
    # narrow beats, wide lanes: a chunk is two beats, and two rows of the vector memory
    "wide": Build(
        config=AttentionConfig(lanes=16, max_rows=10, max_head_dim=96, max_q_dim=384),
        tokens=5,
        data_bits=64,
        heads=((32, 2, 2), (16, 1, 5), (64, 2, 3), (96, 2, 2), (80, 1, 2)),
    ),
    "widest": Build(
        config=AttentionConfig(lanes=32, max_rows=4, max_head_dim=64, max_q_dim=256),
        tokens=4,
        data_bits=128,
        heads=((64, 1, 2), (32, 1, 3)),
    ),
}

PERIOD = 4
"""Cycles of a slot at least."""


def steady_cycles(build: Build, case: AttentionCase, *, rescales: bool) -> int:
    """Cycles by which one more full block makes an operation longer, memory fast enough."""
    period = max(case.head_dim // build.config.lanes, PERIOD)
    slots = 17 if rescales else 16
    rows = case.tokens * case.group
    wait = 0
    if rows == 1:  # until the row's last sums are written
        wait = max(0, (9 if rescales else 6) - period)
    elif rows == 2:
        wait = 2 * max(0, 5 - period)
    return case.kv_heads * (rows * slots * period + wait)


class AttentionBench(CycleBench):
    """Runs cases one after the other. ``latency``: cycles from a command to its first beat."""

    def __init__(
        self,
        build: Build,
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
        assert 0 < beats
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


def random_case(rng: random.Random, build: Build) -> AttentionCase:
    """A case of any kind that fits the build."""
    head_dim, group, kv_heads = rng.choice(build.heads)
    tokens = rng.randint(1, min(build.tokens, build.config.max_rows // group))
    position = rng.choice([0, rng.randrange(16), rng.randrange(60)])
    slots = -(-(position + tokens) // 16) * 16 + 16 * rng.randrange(3)
    flag = [rng.random() < 0.4 for _ in range(5)]
    return AttentionCase(
        head_dim=head_dim, group=group, kv_heads=kv_heads, tokens=tokens, position=position, slots=slots,
        seed=rng.getrandbits(32), extreme=flag[0], bias=flag[1], resume=flag[2], export=flag[3],
        equal_scores=flag[4] and not flag[0], kv_address=64 * rng.randrange(32), dst=rng.randrange(9),
        state=rng.randrange(700, 720),
    )  # fmt: skip


def run_bench(name: str, directory: Path) -> None:
    """Build `BUILDS[name]` under ``directory`` and run the tests below."""
    os.environ["ATTENTION_BUILD"] = name
    run_cocotb_module(BUILDS[name].engine(), f"attention_{name}", "cosim.bench_attention", directory)


def _build() -> Build:
    return BUILDS[os.environ["ATTENTION_BUILD"]]


async def _run(dut: Any, bench: AttentionBench) -> None:
    await run_in_cocotb(dut, _build().engine(), bench, 400_000)


@cocotb.test()
async def corner_cases(dut: Any) -> None:
    build = _build()
    cases = []
    for head_dim, group, kv_heads in build.heads:
        shape = {"head_dim": head_dim, "group": group, "kv_heads": kv_heads}
        tokens = min(build.tokens, build.config.max_rows // group)
        cases += [
            AttentionCase(**shape, tokens=1, position=0, slots=16, seed=1),  # one slot
            AttentionCase(**shape, tokens=tokens, position=0, slots=16, seed=2),
            AttentionCase(**shape, tokens=1, position=15, slots=16, seed=3),  # a full block
            AttentionCase(**shape, tokens=1, position=16, slots=48, seed=4),  # and one slot more
            AttentionCase(**shape, tokens=tokens, position=14, slots=32, seed=5),  # rows that skip a block
        ]
    await _run(dut, AttentionBench(build, cases))


@cocotb.test()
async def modes(dut: Any) -> None:
    build = _build()
    head_dim, group, kv_heads = build.heads[0]
    tokens = min(build.tokens, build.config.max_rows // group)
    cases = [
        AttentionCase(
            head_dim=head_dim, group=group, kv_heads=kv_heads, tokens=tokens, position=30, slots=48, seed=seed,
            bias=bias, resume=resume, export=export, extreme=extreme,
        )
        for seed, (bias, resume, export, extreme) in enumerate(product((False, True), repeat=4))
    ]  # fmt: skip
    await _run(dut, AttentionBench(build, cases))


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.5, 0.9])
async def random_cases(dut: Any, stall: float) -> None:
    build, rng = _build(), random.Random(f"{stall}")
    stalls = geometric_stalls(rng, stall) if stall else no_stalls
    cases = [random_case(rng, build) for _ in range(24)]
    await _run(dut, AttentionBench(build, cases, latency=rng.randrange(1, 60), cmd_stalls=stalls, beat_stalls=stalls))


@cocotb.test()
async def long_context(dut: Any) -> None:
    build = _build()
    head_dim, group, kv_heads = build.heads[0]
    case = AttentionCase(head_dim=head_dim, group=group, kv_heads=kv_heads, tokens=1, position=229, slots=256, seed=6)
    await _run(dut, AttentionBench(build, [case], latency=30))


@cocotb.test()
async def cycles_of_a_block(dut: Any) -> None:
    """From 4 to 7 blocks an operation grows by the stated cycles, exactly."""
    build = _build()
    for head_dim, group, kv_heads in build.heads:
        for tokens in range(1, min(build.tokens, build.config.max_rows // group) + 1):
            # memory must not be what limits: a beat a cycle is too slow for few rows of narrow beats
            def case(position: int, head: tuple[int, int, int] = (head_dim, group, kv_heads), n: int = tokens) -> AttentionCase:
                return AttentionCase(
                    head_dim=head[0], group=head[1], kv_heads=head[2], tokens=n, position=position, slots=128,
                    equal_scores=True, seed=8,
                )  # fmt: skip

            step = steady_cycles(build, case(63), rescales=False)
            if step < 1.1 * kv_heads * 16 * (2 * head_dim + 8) / (build.data_bits // 8):
                continue
            bench = AttentionBench(build, [case(63 - tokens + 1), case(111 - tokens + 1)])
            await _run(dut, bench)
            assert bench.busy[1] - bench.busy[0] == 3 * step, (bench.busy, step, head_dim, group, tokens)
            assert not bench.starved or bench.busy[0] > bench.starved
