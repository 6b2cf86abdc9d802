"""Bench of the table-lookup engine behind its weight stream, against golden/tlmm.py, for both simulators.

`TlmmBench` serves tests/test_tlmm.py (Amaranth's simulator) and the coroutines marked ``cocotb.test``, which run inside
Verilator by ``run_bench``. Every weight goes the whole way: packed stream, parser, ring, tables, sums.
"""

import math
import random
import struct
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cocotb
import torch
from torch import Tensor

from cosim.cycle_bench import CycleBench, Stalls, geometric_stalls, run_cocotb_module, run_in_cocotb
from cosim.pysim import no_stalls
from cosim.slow_pack import aux_segment, matrix_segment
from cosim.streamed_engine import StreamedEngine, matmul_op
from golden.tlmm import matmul
from rtl.tlmm import steady_cycles, tlmm_cycles
from spec.config import LANES, AcceleratorConfig, TlmmConfig, ceil_div
from spec.presets import TEST

__all__ = [
    "MatmulCase",
    "TlmmBench",
    "extreme_cases",
    "random_case",
    "run_bench",
    "streamed_engine",
]


@dataclass(kw_only=True)
class MatmulCase:
    """One operation: int8 x (M, K), trits (P, N, K). ``last_only``: the step has more tokens than the tile."""

    x: Tensor
    planes: Tensor
    last_only: bool = False

    def sizes(self, cfg: TlmmConfig) -> dict[str, int]:
        """Dimensions as a descriptor has them."""
        count, n, k = self.planes.shape
        return {"planes": count, "k_blocks": ceil_div(k, cfg.k_block), "row_blocks": ceil_div(n, cfg.outputs)}

    def op(self, cfg: TlmmConfig) -> int:
        """Payload of the operation."""
        tokens = cfg.tokens if self.last_only else self.x.shape[0]
        return matmul_op(**self.sizes(cfg), tokens=tokens, last_only=int(self.last_only))

    def segment(self, cfg: TlmmConfig, weight_bytes: int) -> bytes:
        """Its weights."""
        return matrix_segment(self.planes.numpy(), cfg, weight_bytes)

    def writes(self, rng: random.Random) -> list[tuple[int, int, int]]:
        """(token, row, data) of the activation writes; the rest of the last row is garbage."""
        rows = []
        for token, values in enumerate(self.x.tolist()):
            data = bytes(value & 255 for value in values)
            data += rng.randbytes(-len(data) % LANES)
            for row in range(len(data) // LANES):
                rows.append((token, row, int.from_bytes(data[LANES * row :][:LANES], "little")))
        return rows

    def expected(self, cfg: TlmmConfig) -> list[tuple[int, list[int]]]:
        """(token, 8 sums) of every beat."""
        y = torch.nn.functional.pad(matmul(self.x, self.planes), (0, -self.planes.shape[1] % cfg.outputs))
        return [(token, beat) for token, sums in enumerate(y) for beat in sums.reshape(-1, LANES).tolist()]

    def lookups(self, cfg: TlmmConfig) -> int:
        """Rows that are issued."""
        return math.prod(self.sizes(cfg).values()) * self.x.shape[0]

    def cycles(self, cfg: TlmmConfig) -> int:
        """Cycles from taking the operation to its last beat, nothing late."""
        return tlmm_cycles(cfg, **self.sizes(cfg), tokens=self.x.shape[0])


def random_case(rng: random.Random, cfg: TlmmConfig, **fixed: Any) -> MatmulCase:
    """A case of random size within the config; ``tokens``, ``planes``, ``n`` and ``k`` may be given."""
    generator = torch.Generator().manual_seed(rng.getrandbits(48))
    tokens = fixed.get("tokens", rng.randint(1, cfg.tokens))
    n = fixed.get("n", rng.randint(1, min(cfg.max_n(tokens), 6 * cfg.outputs)))
    k = fixed.get("k", rng.randint(1, cfg.max_k))
    planes = fixed.get("planes", rng.choice([1, 1, 1, 2, 5]))
    return MatmulCase(
        x=torch.randint(-128, 128, (tokens, k), dtype=torch.int8, generator=generator),
        planes=torch.randint(-1, 2, (planes, n, k), dtype=torch.int8, generator=generator),
        last_only=tokens == 1 and rng.random() < 0.5,
    )


def extreme_cases(cfg: TlmmConfig) -> dict[str, MatmulCase]:
    """Operations whose sums are the largest, or that show where one activation or weight goes."""
    k, n, tokens = cfg.max_k, cfg.outputs + 3, 2
    ones = torch.ones((5, n, k), dtype=torch.int8)
    hot_x = torch.zeros((tokens, k), dtype=torch.int8)
    hot_x[0, k - 1], hot_x[1, 0] = 127, -128
    hot_w = torch.zeros((2, n, k), dtype=torch.int8)
    hot_w[0, n - 1, k - 1], hot_w[1, 0, 0], hot_w[1, n - 1, 1] = 1, -1, 1
    ramp = (torch.arange(tokens * k) % 255 - 127).reshape(tokens, k).to(torch.int8)
    eye = torch.zeros((1, n, k), dtype=torch.int8)
    eye[0, torch.arange(n), torch.arange(n) * 7 % k] = 1
    full = {value: torch.full((tokens, k), value, dtype=torch.int8) for value in (-128, -127, 127, 0)}
    return {
        "least sum": MatmulCase(x=full[-128], planes=ones),
        "largest sum": MatmulCase(x=full[-128], planes=-ones),
        "all -127": MatmulCase(x=full[-127], planes=ones[:1]),
        "all 127": MatmulCase(x=full[127], planes=-ones[:2]),
        "zero activations": MatmulCase(x=full[0], planes=ones),
        "zero weights": MatmulCase(x=full[-128], planes=0 * ones),
        "one activation": MatmulCase(x=hot_x, planes=ones[:1]),
        "one weight": MatmulCase(x=ramp, planes=hot_w),
        "one weight an output": MatmulCase(x=ramp, planes=eye),
    }


class TlmmBench(CycleBench):
    """Runs cases in order; their weights are prefetched, with an AUX segment before each.

    A case that is given twice in a row writes its activations once.
    ``overlap``: the activations of a case are written, and it is offered, as soon as the engine allows; else when the
    one before has ended. ``check_cycles``: each operation begins when its rows are in the ring, and must take exactly
    `tlmm_cycles`; with ``overlap`` equal operations must end exactly `steady_cycles` after each other.
    """

    def __init__(
        self,
        dut: StreamedEngine[TlmmConfig],
        cases: list[MatmulCase],
        *,
        in_stalls: Stalls = no_stalls,
        out_stalls: Stalls = no_stalls,
        overlap: bool = False,
        check_cycles: bool = False,
        seed: int = 1,
    ) -> None:
        super().__init__()
        self._cfg = dut.cfg
        self._rng = random.Random(seed)
        self._overlap = overlap
        self._check_cycles = check_cycles
        size = dut.weight_bytes
        self._aux = [int.from_bytes(bytes([number % 256]) * size, "little") for number in range(len(cases))]
        data = b""
        self._beats_needed: list[int] = []
        for aux, case in zip(self._aux, cases, strict=True):
            data += aux_segment(aux.to_bytes(size, "little"), size) + case.segment(self._cfg, size)
            self._beats_needed.append(len(data) // size)
        beats = [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]
        self.source("i_beat", beats, in_stalls)
        self.sink("o_y", out_stalls)
        self.sink("o_aux", out_stalls)
        self._cases = iter(cases)
        self._case: MatmulCase | None = None  # is written or offered
        self._running: deque[tuple[MatmulCase, int]] = deque()  # were taken, and when
        self._before: tuple[MatmulCase, int] | None = None  # ended, and when
        self._phase = "begin"
        self._held: MatmulCase | None = None  # its activations are in the tile
        self._writes: list[tuple[int, int, int]] = []
        self._beats = 0  # of the weight stream, taken
        self._lookups = self._starved = 0  # since the engine was idle
        self._lookups_wanted = 0
        self.overlapped = 0  # operations that were taken while another ran
        self.inputs |= {"i_op_valid": 0, "i_op_payload": 0, "act_en": 0, "i_clear": 0}

    def step(self, seen: dict[str, int]) -> bool:
        assert seen["o_busy"] == bool(self._running), "o_busy is not that a beat is still to come"
        sources_done = super().step(seen)
        assert not seen["o_error"], "error in the weight stream"
        self._beats += seen["i_beat_valid"] & seen["i_beat_ready"]
        for name in ("lookup", "starved", "stalled"):
            assert seen["o_busy"] or not seen[f"o_{name}"], f"o_{name} while idle"
        self._lookups += seen["o_lookup"]
        self._starved += seen["o_starved"]
        if seen["o_y_valid"] and seen["o_y_ready"]:
            self._check_beats()
        getattr(self, f"_phase_{self._phase}")(seen)
        return self._phase == "end" and sources_done and not self._running and self.received["o_aux"] == self._aux

    def _check_beats(self) -> None:
        assert self._running, "a beat after the last operation"
        case, taken = self._running[0]
        expected = case.expected(self._cfg)
        if len(self.received["o_y"]) < len(expected):
            return
        sizes = case.sizes(self._cfg)
        assert [unpack_beat(payload) for payload in self.received["o_y"]] == expected, sizes
        self._running.popleft()
        self.received["o_y"].clear()
        self._lookups_wanted += case.lookups(self._cfg)
        if not self._running:
            assert self._lookups == self._lookups_wanted, sizes
            if self._check_cycles:
                assert not self._starved, sizes
            self._lookups = self._starved = self._lookups_wanted = 0
        if self._check_cycles and not self._overlap:
            assert self.cycle - taken == case.cycles(self._cfg), (self.cycle - taken, sizes, case.x.shape)
        if self._check_cycles and self._overlap and self._before is not None and self._before[0] is case:
            since = self.cycle - self._before[1]
            assert since == steady_cycles(self._cfg, **sizes, tokens=case.x.shape[0]), (since, sizes, case.x.shape)
        self._before = case, self.cycle

    def _phase_begin(self, seen: dict[str, int]) -> None:
        if self._running and not (self._overlap and seen["i_op_ready"]):
            return
        self._case = next(self._cases, None)
        if self._case is None:
            self._phase = "end"
            return
        self._writes = self._case.writes(self._rng) if self._case is not self._held else []
        self._rng.shuffle(self._writes)
        self._held = self._case
        self._phase = "write"

    def _phase_write(self, seen: dict[str, int]) -> None:
        assert seen["i_op_ready"], "not ready for an operation, and none was taken"
        if self._writes:
            token, row, word = self._writes.pop()
            self.inputs |= {"act_en": 1, "act_token": token, "act_row": row, "act_data": word}
            return
        self.inputs["act_en"] = 0
        if self._check_cycles and not self._overlap and self._beats < self._beats_needed[0]:
            return
        if not seen["act_en"]:
            assert self._case is not None
            self.inputs |= {"i_op_valid": 1, "i_op_payload": self._case.op(self._cfg)}
            self._phase = "offer"

    def _phase_offer(self, seen: dict[str, int]) -> None:
        assert seen["i_op_ready"], "not ready for an operation, and none was taken"
        assert self._case is not None
        self.inputs["i_op_valid"] = 0
        self.overlapped += bool(self._running)
        self._running.append((self._case, self.cycle))
        self._beats_needed.pop(0)
        self._phase = "begin"

    def _phase_end(self, _seen: dict[str, int]) -> None:
        """Nothing is offered any more."""


def unpack_beat(payload: int) -> tuple[int, list[int]]:
    """(token, sums) of a beat."""
    words = payload.to_bytes(4 * LANES + 1, "little")
    return words[-1], list(struct.unpack(f"<{LANES}i", words[:-1]))


def streamed_engine(config: AcceleratorConfig) -> StreamedEngine[TlmmConfig]:
    """The engine of a preset."""
    return StreamedEngine(config.tlmm, weight_bytes=config.bus.weight_bytes, aux_beats=config.aux_beats)


def run_bench(directory: Path) -> None:
    """Build under ``directory`` and run the tests below."""
    run_cocotb_module(streamed_engine(TEST), "tlmm_bench", "cosim.bench_tlmm", directory)


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.5])
async def many_cases(dut, stall: float) -> None:
    rng = random.Random(7)
    engine = streamed_engine(TEST)
    cases = [*extreme_cases(engine.cfg).values(), *(random_case(rng, engine.cfg) for _ in range(20))]
    stalls = geometric_stalls(rng, stall) if stall else no_stalls
    await run_in_cocotb(dut, engine, TlmmBench(engine, cases, in_stalls=stalls, out_stalls=stalls, overlap=True), 60_000)
