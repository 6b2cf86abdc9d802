"""Bench of the epilogue against golden/epilogue.py, for both simulators.

`EpilogueBench` serves tests/test_epilogue.py (Amaranth's simulator) and the coroutines marked ``cocotb.test``, which
run inside Verilator by ``run_bench``.
"""

import random
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cocotb
import torch
from torch import Tensor

from cosim.bench_norm import packed_int8, packed_rows, payload
from cosim.cycle_bench import CycleBench, Stalls, geometric_stalls, run_cocotb_module, run_in_cocotb
from cosim.pysim import no_stalls
from golden import epilogue as golden
from golden.fp import bits_of, h2f
from rtl.epilogue import Epilogue
from rtl.lib.ops import op_layout
from rtl.lib.ports import KvBeat, MatmulBeat
from spec.config import LANES
from spec.descriptors import Epilogue as Kind
from spec.descriptors import Opcode

WEIGHT_BITS = 256
TOKENS = 3
OUTPUTS = 16
MAX_ROW_SCALES = 240
MAX_HEAD_DIM = 24
BLOCK_BEATS = OUTPUTS // LANES

HEADS = (Kind.QUERY, Kind.KEY, Kind.VALUE)
LATENCY = {
    Kind.STORE: 8,
    Kind.RESIDUAL: 12,
    Kind.GATE_SILU: 25,
    Kind.GATE_RELU2: 11,
    Kind.UP: 11,
    Kind.QUERY: 15,
    Kind.KEY: 15,
    Kind.VALUE: 8,
    Kind.LOGITS: 8,
}
"""Cycles from a beat to its result."""

ARGMAX = 3
"""More cycles until the argmax has seen it."""


def epilogue_unit() -> Epilogue:
    """The unit under test, of preset `test`'s sizes."""
    return Epilogue(
        weight_bits=WEIGHT_BITS,
        tokens=TOKENS,
        outputs=OUTPUTS,
        max_row_scales=MAX_ROW_SCALES,
        max_head_dim=MAX_HEAD_DIM,
    )


@dataclass
class Outputs:
    """All that leaves the unit, each in order."""

    vector: list[tuple[int, int]] = field(default_factory=list)
    """(row, data)"""
    query: list[tuple[int, int]] = field(default_factory=list)
    """(row, data)"""
    query_scales: list[tuple[int, int, int]] = field(default_factory=list)
    """(token, head, bits)"""
    kv: list[int] = field(default_factory=list)
    logits: list[int] = field(default_factory=list)
    argmax: int | None = None
    """None: not known, as no LOGITS with first_row = 0 has been."""


@dataclass(kw_only=True)
class EpilogueCase:
    """One MATMUL: sums (tokens, row_blocks * outputs) with padding, scales, what is in the memories."""

    kind: Kind
    sums: Tensor
    beats: int
    act_scale: Tensor
    weight: Tensor
    """One FP32, or int16 bits of FP16 (8 * beats,)."""
    old: Tensor
    rope: Tensor
    tokens: int
    last_only: bool = False
    logits_enable: bool = False
    dst: int = 0
    dst_stride: int = 0
    first_row: int = 0
    first_head: int = 0
    head_beats: int = 1
    valid: int = LANES

    def name(self) -> str:
        """For messages."""
        return f"{self.kind.name} sums={list(self.sums.shape)} beats={self.beats} head_beats={self.head_beats}"

    def op(self) -> int:
        """Payload of the operation."""
        row_scale = self.weight.dim() == 1
        values: dict[int | str, Any] = {
            "epilogue": self.kind,
            "last_only": int(self.last_only),
            "row_scale": int(row_scale),
            "planes": 1,
            "k_blocks": 3,
            "row_blocks": self.sums.shape[1] // OUTPUTS,
            "beats": self.beats,
            "valid": self.valid,
            "dst": self.dst,
            "dst_stride": self.dst_stride,
            "scale": 0x7FC00000 if row_scale else int(bits_of(self.weight)),
            "first_row": self.first_row,
            "first_head": self.first_head,
            "head_beats": self.head_beats,
            "position": 7,
            "tokens": self.tokens,
        }
        return payload(op_layout(Opcode.MATMUL), values)

    def aux(self) -> list[int]:
        """Beats of row scales."""
        if self.weight.dim() == 0:
            return []
        padded = torch.cat([self.weight, torch.zeros(-self.weight.numel() % (WEIGHT_BITS // 16), dtype=torch.int16)])
        rows = padded.reshape(-1, WEIGHT_BITS // 16).tolist()
        return [int.from_bytes(struct.pack(f"<{len(row)}h", *row), "little") for row in rows]

    def y_beats(self) -> list[int]:
        """Payloads of i_y."""
        return [
            payload(MatmulBeat, {"sums": row, "token": token})
            for token, sums in enumerate(self.sums)
            for row in sums.reshape(-1, LANES).tolist()
        ]

    def cycles(self) -> int:
        """Cycles from taking the operation to idle, nothing late."""
        count = self.sums.numel() // LANES
        aux = len(self.aux())
        last_real = count - (self.sums.shape[1] // LANES - self.beats)
        # after the last beat of a head: 2 + 7 cycles to its factors, 1 in their queue, 6 to its first int8
        head = 15 + self.head_beats if self.kind in HEADS else 0
        argmax = self.beats + LATENCY[self.kind] + ARGMAX if self.kind is Kind.LOGITS else 0  # of token 0
        return 3 + aux + max(count, last_real + LATENCY[self.kind] + head, argmax)

    def expected(self, argmax: "ArgmaxModel") -> Outputs:
        """What must come out, by the golden model."""
        n = self.beats * LANES
        weight = h2f(self.weight) if self.weight.dim() else self.weight
        y = golden.dequant(self.sums[:, :n], weight, self.act_scale[: self.sums.shape[0]])
        out = Outputs()
        if self.kind in HEADS:
            self._expect_heads(y, out)
        elif self.kind is Kind.LOGITS:
            if self.logits_enable:  # of token 0 alone, as in the golden device
                rows = enumerate(packed_rows(y[0]), self.first_row // LANES)
                out.logits = [row | beat << 32 * LANES for beat, row in rows]
            argmax.see(y[0, : n - LANES + self.valid], self.first_row)
        else:
            match self.kind:
                case Kind.RESIDUAL:
                    y = golden.residual(self.old, y)
                case Kind.GATE_SILU:
                    y = golden.gate_silu(y)
                case Kind.GATE_RELU2:
                    y = golden.gate_relu2(y)
                case Kind.UP:
                    y = golden.up(self.old, y)
            out.vector = list(zip(self.rows(), packed_rows(y), strict=True))
        out.argmax = argmax.row
        return out

    def rows(self) -> list[int]:
        """Rows of the vector memory, or of the query buffer without `first_head`, in order."""
        starts = [self.dst + token * self.dst_stride for token in range(self.sums.shape[0])]
        return [start + beat for start in starts for beat in range(self.beats)]

    def _expect_heads(self, y: Tensor, out: Outputs) -> None:
        heads = y.unflatten(1, (-1, self.head_beats * LANES))
        if self.kind is not Kind.VALUE:
            heads = golden.rope(heads, self.rope[: y.shape[0]])
        q, scale = golden.quantise_heads(heads)
        rows = packed_int8(q)
        numbers = [
            (token, self.first_head + head, int(bits_of(scale[token, head])))
            for token in range(y.shape[0])
            for head in range(heads.shape[1])
        ]
        if self.kind is Kind.QUERY:
            base = self.first_head * self.head_beats
            out.query = [(base + row, bits) for row, bits in zip(self.rows(), rows, strict=True)]
            out.query_scales = numbers
            return
        for (token, head, bits), start in zip(numbers, range(0, len(rows), self.head_beats), strict=True):
            for beat in range(self.head_beats):
                last = beat == self.head_beats - 1
                values: dict[int | str, Any] = {
                    "data": rows[start + beat],
                    "value": int(self.kind is Kind.VALUE),
                    "token": token,
                    "head": head,
                    "last": int(last),
                    "scale": bits if last else 0,
                }
                out.kv.append(payload(KvBeat, values))


class ArgmaxModel:
    """Argmax over several operations, one value after the other."""

    def __init__(self) -> None:
        self.row: int | None = None
        self._best: float | None = None

    def see(self, values: Tensor, first_row: int) -> None:
        """Rows from `first_row` on; 0 starts anew."""
        if first_row == 0:
            self.row, self._best = 0, None
        for n, value in enumerate(values.tolist()):
            if value == value and self.row is not None and (self._best is None or value > self._best):
                self.row, self._best = first_row + n, value


def _numbers(generator: torch.Generator, *shape: int) -> Tensor:
    """float32 of ordinary size, with some of every other kind."""
    x = torch.randn(*shape, generator=generator)
    odd = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e38, -1e38, 1e-40, -1e-45, 1.0, -1.0])
    pick = torch.randint(0, 20 * len(odd), shape, generator=generator)
    return torch.where(pick < len(odd), odd[pick % len(odd)], x)


def first_difference(got: Any, want: Any) -> str:
    """Where two lists, or two values, differ."""
    if not isinstance(want, list):
        return f"{got}, not {want}"
    for n, (a, b) in enumerate(zip(got, want, strict=False)):
        if a != b:
            show = [hex(value) if isinstance(value, int) else [hex(part) for part in value] for value in (a, b)]
            return f"item {n} of {len(want)} is {show[0]}, not {show[1]}"
    return f"{len(got)} items, not {len(want)}"


SUMS = ("random", "zero", "equal", "full range", "one hot", "small")


def _sums(name: str, generator: torch.Generator, tokens: int, n: int) -> Tensor:
    """Integer sums of one of the kinds `SUMS`: (tokens, n)."""
    shape = (tokens, n)
    match name:
        case "zero":
            return torch.zeros(shape, dtype=torch.int64)
        case "equal":
            return torch.full(shape, -77)
        case "one hot":
            return torch.nn.functional.one_hot(torch.tensor([n // 3] * tokens), n) * -12345
    limit = {"random": 30000, "small": 2, "full range": (1 << 31) - 1}[name]
    return torch.randint(-limit, limit + 1, shape, generator=generator)


SCALES = {"ordinary": 3e-4, "one": 1.0, "large": 1e25, "tiny": 1e-33, "subnormal": 1e-42}


def random_case(
    rng: random.Random,
    generator: torch.Generator,
    kind: Kind,
    *,
    sums: str | None = None,
    scale: str | None = None,
    padding: bool = True,
) -> EpilogueCase:
    """A case of random sizes; `sums` and `scale` name a distribution."""
    tokens = rng.randint(1, TOKENS)
    last_only = kind is Kind.LOGITS and rng.random() < 0.7
    rows = 1 if last_only else tokens
    head_beats = rng.randint(1, MAX_HEAD_DIM // LANES)
    beats = head_beats * rng.randint(1, 4) if kind in HEADS else rng.randint(1, MAX_ROW_SCALES // LANES)
    blocks = -(-beats // BLOCK_BEATS) + (rng.randrange(2) if padding else 0)
    row_scale = rng.random() < 0.4
    act = SCALES[scale or rng.choice(list(SCALES))]
    halves = torch.randint(-(1 << 15), 1 << 15, (beats * LANES,), generator=generator).to(torch.int16)
    ordinary = torch.rand(beats * LANES, generator=generator).to(torch.float16).view(torch.int16)
    return EpilogueCase(
        kind=kind,
        sums=_sums(sums or rng.choice(SUMS), generator, rows, blocks * OUTPUTS),
        beats=beats,
        act_scale=act * (0.5 + torch.rand(tokens, generator=generator)),
        weight=(rng.choice([halves, ordinary]) if row_scale else torch.tensor(rng.uniform(-2, 2))),
        old=_numbers(generator, rows, beats * LANES),
        rope=torch.randn(tokens, head_beats * LANES, generator=generator).clamp(-1, 1),
        tokens=tokens,
        last_only=last_only,
        logits_enable=rng.random() < 0.6,
        dst=rng.randrange(20),
        dst_stride=beats + rng.randrange(5),
        first_row=rng.choice([0, 0, 8 * rng.randrange(1, 4000)]),
        first_head=rng.randrange(5),
        head_beats=head_beats,
        valid=rng.randint(1, LANES),
    )


class EpilogueBench(CycleBench):
    """Runs cases one after the other: loads scales and RoPE rows, gives the operation, checks all that came out."""

    def __init__(
        self,
        cases: list[EpilogueCase],
        *,
        in_stalls: Stalls = no_stalls,
        out_stalls: Stalls = no_stalls,
        check_cycles: bool = False,
    ) -> None:
        super().__init__()
        self._cases = iter(cases)
        self._check_cycles = check_cycles
        self._case: EpilogueCase | None = None
        self._loads: list[dict[str, int]] = []
        self._memory: dict[int, int] = {}
        self._out = Outputs()
        self._argmax = ArgmaxModel()
        self._busy = 0
        self.source("i_y", [beat for case in cases for beat in case.y_beats()], in_stalls)
        self.source("i_aux", [beat for case in cases for beat in case.aux()], in_stalls)
        self.sink("o_kv", out_stalls)
        self.sink("o_logits", out_stalls)
        self.inputs |= {"i_op_valid": 0, "i_op_payload": 0, "vector_read_data": 0, "scale_en": 0, "rope_en": 0}

    def step(self, seen: dict[str, int]) -> bool:
        sources_done = super().step(seen)
        out = self._out
        if seen["vector_read_en"]:
            self.inputs["vector_read_data"] = self._memory[seen["vector_read_addr"]]
        if seen["vector_write_en"]:
            out.vector.append((seen["vector_write_addr"], seen["vector_write_data"]))
        if seen["query_en"]:
            out.query.append((seen["query_row"], seen["query_data"]))
        if seen["query_scale_en"]:
            assert seen["query_en"]
            out.query_scales.append((seen["query_token"], seen["query_head"], seen["query_scale"]))
        self.inputs |= {"scale_en": 0, "rope_en": 0}
        if seen["i_op_valid"] and seen["i_op_ready"]:
            self.inputs["i_op_valid"] = 0
            self._busy = 0
        elif seen["o_busy"]:
            self._busy += 1
        elif self._loads:
            self.inputs |= self._loads.pop()
        elif not seen["i_op_valid"]:
            self._finish(seen)
            return not self._start() and sources_done
        return False

    def _finish(self, seen: dict[str, int]) -> None:
        out, case = self._out, self._case
        out.kv, out.logits = self.received["o_kv"], self.received["o_logits"]
        if case:
            # the scale of a head counts with its last beat only
            last_at, scale_at = 64 + 1 + 6 + 8, 64 + 1 + 6 + 8 + 1
            out.kv = [beat if beat >> last_at & 1 else beat & (1 << scale_at) - 1 for beat in out.kv]
            expected = case.expected(self._argmax)
            out.argmax = None if expected.argmax is None else seen["o_argmax"]
            for name, want in vars(expected).items():
                got = getattr(out, name)
                assert got == want, f"{name} of {case.name()}: {first_difference(got, want)}"
            if self._check_cycles:
                assert self._busy + 1 == case.cycles(), f"{self._busy + 1} cycles, not {case.cycles()}: {case.name()}"
        else:
            assert out == Outputs()
        self._case, self._out = None, Outputs()
        self.received |= {"o_kv": [], "o_logits": []}

    def _start(self) -> bool:
        case = next(self._cases, None)
        if case is None:
            return False
        self._case = case
        self._memory = {}
        if case.kind in (Kind.RESIDUAL, Kind.UP):
            self._memory = dict(zip(case.rows(), packed_rows(case.old), strict=True))
        self._loads = [
            {"i_op_valid": 1, "i_op_payload": case.op(), "i_logits_enable": int(case.logits_enable)},
            *({"scale_en": 1, "scale_token": token, "scale_data": int(bits_of(scale))}
              for token, scale in enumerate(case.act_scale)),
            *({"rope_en": 1, "rope_token": token, "rope_row": row, "rope_data": packed}
              for token, values in enumerate(case.rope)
              for row, packed in enumerate(packed_rows(values))),
        ]  # fmt: skip
        return True


def coverage_cases(rng: random.Random, generator: torch.Generator, rounds: int) -> list[EpilogueCase]:
    """Every epilogue with every distribution of sums and every scale once, then `rounds` random ones."""
    cases = [random_case(rng, generator, kind, sums=sums, scale="ordinary") for kind in Kind for sums in SUMS]
    cases += [random_case(rng, generator, kind, sums="random", scale=scale) for kind in Kind for scale in SCALES]
    cases += [random_case(rng, generator, rng.choice(list(Kind))) for _ in range(rounds)]
    rng.shuffle(cases)
    return cases


def run_bench(directory: Path) -> None:
    """Build under ``directory`` and run the tests below."""
    run_cocotb_module(epilogue_unit(), "epilogue_bench", "cosim.bench_epilogue", directory)


@cocotb.test()
@cocotb.parametrize(stalled=["none", "in", "out", "both"])
async def every_epilogue(dut, stalled: str) -> None:
    rng, generator = random.Random(5), torch.Generator().manual_seed(5)
    cases = coverage_cases(rng, generator, 30)
    stalls = geometric_stalls(rng, 0.4)
    bench = EpilogueBench(
        cases,
        in_stalls=stalls if stalled in ("in", "both") else no_stalls,
        out_stalls=stalls if stalled in ("out", "both") else no_stalls,
        check_cycles=stalled == "none",
    )
    await run_in_cocotb(dut, epilogue_unit(), bench, 60_000)
