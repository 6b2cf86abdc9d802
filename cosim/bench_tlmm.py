"""Bench of the table-lookup engine behind its weight stream, against golden/tlmm.py, for both simulators.

`TlmmBench` serves tests/test_tlmm.py (Amaranth's simulator) and the coroutines marked ``cocotb.test``, which run inside
Verilator by ``run_bench``. Every weight goes the whole way: packed stream, parser, ring, tables, sums.
"""

import random
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cocotb
import torch
from amaranth.hdl import Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped
from torch import Tensor

from cosim.cycle_bench import CycleBench, Stalls, geometric_stalls, run_cocotb_module, run_in_cocotb
from cosim.pysim import no_stalls
from cosim.slow_pack import aux_segment, matrix_segment
from golden.tlmm import matmul
from rtl.lib.ops import op_layout
from rtl.lib.ports import ActivationWrite, MatmulBeat
from rtl.tlmm import Tlmm, tlmm_cycles
from rtl.weight_stream import WeightStream
from spec.config import LANES, AcceleratorConfig, TlmmConfig, ceil_div
from spec.descriptors import FIELDS, Opcode
from spec.presets import TEST

__all__ = [
    "MatmulCase",
    "StreamedTlmm",
    "TlmmBench",
    "extreme_cases",
    "op_payload",
    "random_case",
    "run_bench",
    "streamed_engine",
]


class StreamedTlmm(wiring.Component):
    """The engine and its weight stream, as a device joins them."""

    i_beat: stream.Interface
    o_aux: stream.Interface
    i_op: stream.Interface
    act: wiring.FlippedInterface
    o_y: stream.Interface
    i_clear: Signal
    o_busy: Signal
    o_error: Signal
    o_lookup: Signal
    o_starved: Signal
    o_stalled: Signal

    def __init__(self, cfg: TlmmConfig, *, weight_bytes: int, aux_beats: int) -> None:
        self.cfg = cfg
        self.weight_bytes = weight_bytes
        self._weights = WeightStream(cfg, weight_bytes=weight_bytes, aux_beats=aux_beats)
        self._engine = Tlmm(cfg, weight_bytes=weight_bytes)
        super().__init__(
            {
                "i_beat": In(stream.Signature(8 * weight_bytes)),
                "o_aux": Out(stream.Signature(8 * weight_bytes)),
                "i_op": In(stream.Signature(op_layout(Opcode.MATMUL))),
                "act": In(ActivationWrite),
                "o_y": Out(stream.Signature(MatmulBeat)),
                "i_clear": In(1),
                "o_busy": Out(1),
                "o_error": Out(1),
                "o_lookup": Out(1),
                "o_starved": Out(1),
                "o_stalled": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.weights = weights = self._weights
        m.submodules.engine = engine = self._engine
        connect(m, flipped(self.i_beat), weights.i_beat)
        connect(m, weights.o_aux, flipped(self.o_aux))
        connect(m, flipped(self.i_op), engine.i_op)
        connect(m, flipped(self.act), engine.act)
        connect(m, engine.o_y, flipped(self.o_y))
        connect(m, engine.read, weights.read)
        m.d.comb += [
            weights.i_clear.eq(self.i_clear),
            engine.i_clear.eq(self.i_clear),
            self.o_error.eq(weights.o_error),
            self.o_busy.eq(engine.o_busy),
            self.o_lookup.eq(engine.o_lookup),
            self.o_starved.eq(engine.o_starved),
            self.o_stalled.eq(engine.o_stalled),
        ]
        return m


def op_payload(*, planes: int, k_blocks: int, row_blocks: int, tokens: int, last_only: int = 0) -> int:
    """Payload of an operation; the fields that the engine does not read hold ones."""
    fields: dict[int | str, int] = {field.name: (1 << field.width) - 1 for field in FIELDS[Opcode.MATMUL]}
    fields |= {
        "planes": planes,
        "k_blocks": k_blocks,
        "row_blocks": row_blocks,
        "tokens": tokens,
        "last_only": last_only,
        "position": 0xABCDEF,
    }
    return op_layout(Opcode.MATMUL).const(fields).as_value().value


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
        return op_payload(**self.sizes(cfg), tokens=tokens, last_only=int(self.last_only))

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
    """Runs cases one after the other; their weights are prefetched, with an AUX segment before each.

    ``check_cycles``: each operation begins when its rows are in the ring, and must take exactly `tlmm_cycles`.
    """

    def __init__(
        self,
        dut: StreamedTlmm,
        cases: list[MatmulCase],
        *,
        in_stalls: Stalls = no_stalls,
        out_stalls: Stalls = no_stalls,
        check_cycles: bool = False,
        seed: int = 1,
    ) -> None:
        super().__init__()
        self._cfg = dut.cfg
        self._rng = random.Random(seed)
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
        self._case: MatmulCase | None = None
        self._phase = "begin"
        self._writes: list[tuple[int, int, int]] = []
        self._beats = 0  # of the weight stream, taken
        self._taken = self._last = 0  # cycles of the operation and of its last beat
        self._counts = dict.fromkeys(("lookup", "starved", "stalled"), 0)
        self.inputs |= {"i_op_valid": 0, "i_op_payload": 0, "act_en": 0, "i_clear": 0}

    def step(self, seen: dict[str, int]) -> bool:
        sources_done = super().step(seen)
        assert not seen["o_error"], "error in the weight stream"
        self._beats += seen["i_beat_valid"] & seen["i_beat_ready"]
        if seen["o_y_valid"] and seen["o_y_ready"]:
            self._last = self.cycle
        for name in self._counts:
            assert seen["o_busy"] or not seen[f"o_{name}"], f"o_{name} while idle"
            self._counts[name] += seen[f"o_{name}"]
        assert not (seen["o_busy"] and seen["i_op_ready"]), "ready for an operation while another runs"
        getattr(self, f"_phase_{self._phase}")(seen)
        return self._phase == "end" and sources_done and self.received["o_aux"] == self._aux

    def _phase_begin(self, _seen: dict[str, int]) -> None:
        self._case = next(self._cases, None)
        if self._case is None:
            self._phase = "end"
            return
        self._writes = self._case.writes(self._rng)
        self._rng.shuffle(self._writes)
        self._phase = "write"

    def _phase_write(self, seen: dict[str, int]) -> None:
        if self._writes:
            token, row, word = self._writes.pop()
            self.inputs |= {"act_en": 1, "act_token": token, "act_row": row, "act_data": word}
            return
        self.inputs["act_en"] = 0
        if self._check_cycles and self._beats < self._beats_needed[0]:
            return
        if not seen["act_en"]:
            self.inputs |= {"i_op_valid": 1, "i_op_payload": self._running().op(self._cfg)}
            self._phase = "offer"

    def _phase_offer(self, seen: dict[str, int]) -> None:
        if seen["i_op_valid"] and seen["i_op_ready"]:
            self.inputs["i_op_valid"] = 0
            self._taken = self.cycle
            self._counts = dict.fromkeys(self._counts, 0)
            self._phase = "run"

    def _phase_run(self, seen: dict[str, int]) -> None:
        if seen["o_busy"]:
            return
        case = self._running()
        sizes = case.sizes(self._cfg)
        got = [unpack_beat(payload) for payload in self.received["o_y"]]
        assert got == case.expected(self._cfg), sizes
        rows = sizes["planes"] * sizes["k_blocks"] * sizes["row_blocks"]
        assert self._counts["lookup"] == rows * case.x.shape[0], (self._counts, sizes)
        if self._check_cycles:
            assert not self._counts["starved"], (self._counts, sizes)
            assert self._last - self._taken == case.cycles(self._cfg), (self._last - self._taken, sizes, case.x.shape)
        self._beats_needed.pop(0)
        self.received["o_y"].clear()
        self._phase = "begin"
        self._phase_begin(seen)

    def _phase_end(self, _seen: dict[str, int]) -> None:
        assert not self.received["o_y"], "a beat after the last operation"

    def _running(self) -> MatmulCase:
        assert self._case is not None
        return self._case


def unpack_beat(payload: int) -> tuple[int, list[int]]:
    """(token, sums) of a beat."""
    words = payload.to_bytes(4 * LANES + 1, "little")
    return words[-1], list(struct.unpack(f"<{LANES}i", words[:-1]))


def streamed_engine(config: AcceleratorConfig) -> StreamedTlmm:
    """The engine of a preset."""
    return StreamedTlmm(config.tlmm, weight_bytes=config.bus.weight_bytes, aux_beats=config.aux_beats)


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
    await run_in_cocotb(dut, engine, TlmmBench(engine, cases, in_stalls=stalls, out_stalls=stalls), 60_000)
