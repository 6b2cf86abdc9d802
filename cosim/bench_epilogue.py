"""Bench of the epilogue against golden/epilogue.py, for both simulators.

`EpilogueBench` serves tests/test_epilogue.py (Amaranth's simulator) and the coroutines marked ``cocotb.test``, which
run inside Verilator by ``run_bench``.
"""

import os
import random
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cocotb
import torch
from torch import Tensor

from cosim.bench_norm import packed_int8, packed_rows, payload
from cosim.cycle_bench import CycleBench, Stalls, geometric_stalls, run_cocotb_module, run_in_cocotb
from cosim.pysim import no_stalls
from golden import epilogue as golden
from golden.fp import bits_of, h2f
from golden.layout import unpack_channels
from rtl.epilogue import Epilogue
from rtl.lib.ops import op_layout
from rtl.lib.ports import KvBeat, matmul_beat
from spec.config import LANES
from spec.descriptors import Epilogue as Kind
from spec.descriptors import Opcode

WEIGHT_BITS = 256
TOKENS = 3
MAX_BEATS = 30
MAX_HEAD_DIM = 24


@dataclass(frozen=True, kw_only=True)
class Build:
    """What tells one unit under test from the other."""

    name: str
    outputs: int
    sum_bits: int = 32
    block_major: bool = False
    row_scales: bool = True
    channels: bool = False

    @property
    def block_beats(self) -> int:
        """Beats of a row block and token."""
        return self.outputs // LANES

    def unit(self) -> Epilogue:
        """The unit, of preset `test`'s sizes."""
        return Epilogue(
            weight_bits=WEIGHT_BITS,
            tokens=TOKENS,
            outputs=self.outputs,
            max_row_scales=MAX_BEATS * LANES if self.row_scales else 0,
            max_head_dim=MAX_HEAD_DIM,
            max_channels=MAX_BEATS * LANES if self.channels else 0,
            sum_bits=self.sum_bits,
            block_major=self.block_major,
        )


TERNARY = Build(name="ternary", outputs=16)
GROUPED = Build(name="grouped", outputs=32, sum_bits=58, block_major=True, row_scales=False, channels=True)
BOTH = Build(name="both", outputs=16, channels=True)
"""Row scales and channel words from one stream."""
BUILDS = {build.name: build for build in (TERNARY, GROUPED, BOTH)}

_BUILD = "LUTRA_BENCH_BUILD"

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
"""Cycles from a beat to its result; `CHANNELS` more with channels."""

CHANNELS = 5

ARGMAX = 3
"""More cycles until the argmax has seen it."""


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

    build: Build
    kind: Kind
    sums: Tensor
    beats: int
    act_scale: Tensor
    weight: Tensor
    """One FP32, or int16 bits of FP16 (8 * beats,)."""
    old: Tensor
    rope: Tensor
    channels: Tensor | None
    """QUERY, KEY: a word a row (8 * beats,), int32."""
    tokens: int
    last_only: bool = False
    logits_enable: bool = False
    dst: int = 0
    dst_stride: int = 0
    first_row: int = 0
    first_head: int = 0
    head_beats: int = 1
    k_int4: bool = False
    v_int4: bool = False
    valid: int = LANES

    def name(self) -> str:
        """For messages."""
        sizes = f"sums={list(self.sums.shape)} beats={self.beats} head_beats={self.head_beats} int4={self.int4}"
        return f"{self.build.name} {self.kind.name} {sizes}"

    @property
    def int4(self) -> bool:
        """Whether heads become int4."""
        return {Kind.KEY: self.k_int4, Kind.VALUE: self.v_int4}.get(self.kind, False)

    def op(self) -> int:
        """Payload of the operation."""
        row_scale = self.weight.dim() == 1
        values: dict[int | str, Any] = {
            "epilogue": self.kind,
            "last_only": int(self.last_only),
            "row_scale": int(row_scale),
            "planes": 1,
            "k_blocks": 3,
            "row_blocks": self.sums.shape[1] // self.build.outputs,
            "beats": self.beats,
            "valid": self.valid,
            "dst": self.dst,
            "dst_stride": self.dst_stride,
            "scale": 0x7FC00000 if row_scale else int(bits_of(self.weight)),
            "first_row": self.first_row,
            "first_head": self.first_head,
            "head_beats": self.head_beats,
            "channels": int(self.channels is not None),
            "k_int4": self.k_int4,
            "v_int4": self.v_int4,
            "position": 7,
            "tokens": self.tokens,
        }
        return payload(op_layout(Opcode.MATMUL), values)

    def aux(self) -> list[int]:
        """Beats of row scales, or of channel words."""
        values = self.weight if self.weight.dim() else self.channels
        if values is None:
            return []
        size, code = (16, "h") if values.dtype is torch.int16 else (32, "i")
        padded = torch.cat([values, torch.zeros(-values.numel() % (WEIGHT_BITS // size), dtype=values.dtype)])
        rows = padded.reshape(-1, WEIGHT_BITS // size).tolist()
        return [int.from_bytes(struct.pack(f"<{len(row)}{code}", *row), "little") for row in rows]

    def y_beats(self) -> list[int]:
        """Payloads of i_y."""
        rows = self.sums.unflatten(-1, (-1, LANES)).tolist()
        return [
            payload(matmul_beat(self.build.sum_bits), {"sums": rows[token][beat], "token": token})
            for token, beat in self.order()
        ]

    def order(self) -> list[tuple[int, int]]:
        """(token, beat) of all beats of i_y, padding too, as the engine gives them."""
        tokens, beats = self.sums.shape[0], self.sums.shape[1] // LANES
        block = self.build.block_beats if self.build.block_major else beats
        return [
            (token, beat)
            for first in range(0, beats, block)
            for token in range(tokens)
            for beat in range(first, first + block)
        ]

    def real(self) -> list[tuple[int, int]]:
        """The same without padding."""
        return [(token, beat) for token, beat in self.order() if beat < self.beats]

    def cycles(self) -> int:
        """Cycles from taking the operation to idle, nothing late."""
        order, last = self.order(), self.beats - 1
        count = len(order)
        aux = len(self.aux())
        last_real = order.index((self.sums.shape[0] - 1, last)) + 1
        # after the last beat of a head: 2 + 7 cycles to its factors, 1 in their queue, 6 to its first int8
        head = 15 + self.head_beats if self.kind in HEADS else 0
        if self.channels is not None:
            head += CHANNELS
        argmax = order.index((0, last)) + 1 + LATENCY[self.kind] + ARGMAX if self.kind is Kind.LOGITS else 0
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
            rows = packed_rows(y)
            out.vector = [(self.row(token, beat), rows[token * self.beats + beat]) for token, beat in self.real()]
        out.argmax = argmax.row
        return out

    def row(self, token: int, beat: int) -> int:
        """Row of the vector memory, or of the query buffer without `first_head`."""
        return self.dst + token * self.dst_stride + beat

    def _expect_heads(self, y: Tensor, out: Outputs) -> None:
        heads = y.unflatten(1, (-1, self.head_beats * LANES))
        if self.kind is not Kind.VALUE:
            heads = golden.rope(heads, self.rope[: y.shape[0]])
        if self.channels is not None:
            heads = golden.channels(heads, *unpack_channels(self.channels.reshape(heads.shape[1:])))
        q, scale = golden.quantise_heads(heads, int4=self.int4)
        rows = packed_int8(q)
        for token, beat in self.real():
            head, at = divmod(beat, self.head_beats)
            last = at == self.head_beats - 1
            number, bits = self.first_head + head, int(bits_of(scale[token, head]))
            row = rows[token * self.beats + beat]
            if self.kind is Kind.QUERY:
                out.query.append((self.first_head * self.head_beats + self.row(token, beat), row))
                if last:
                    out.query_scales.append((token, number, bits))
                continue
            values: dict[int | str, Any] = {
                "data": row,
                "value": int(self.kind is Kind.VALUE),
                "token": token,
                "head": number,
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


def _channel_words(generator: torch.Generator, count: int) -> Tensor:
    """Offsets of every kind, shifts that are mostly small."""
    offset = _numbers(generator, count).to(torch.float16).view(torch.int16).to(torch.int32) & 0xFFFF
    shift = torch.randint(-8, 9, (count,), generator=generator, dtype=torch.int32)
    far = torch.randint(-128, 128, (count,), generator=generator, dtype=torch.int32)
    chosen = torch.where(torch.randint(0, 10, (count,), generator=generator) == 0, far, shift)
    return offset | (chosen & 0xFF) << 16


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


def _sums(name: str, generator: torch.Generator, tokens: int, n: int, bits: int) -> Tensor:
    """Integer sums of one of the kinds `SUMS`, of so many bits: (tokens, n)."""
    shape = (tokens, n)
    match name:
        case "zero":
            return torch.zeros(shape, dtype=torch.int64)
        case "equal":
            return torch.full(shape, -77)
        case "one hot":
            return torch.nn.functional.one_hot(torch.tensor([n // 3] * tokens), n) * -12345
    limit = {"random": 30000, "small": 2, "full range": (1 << bits - 1) - 1}[name]
    return torch.randint(-limit, limit + 1, shape, generator=generator)


SCALES = {"ordinary": 3e-4, "one": 1.0, "large": 1e25, "tiny": 1e-33, "subnormal": 1e-42}


def random_case(
    rng: random.Random,
    generator: torch.Generator,
    build: Build,
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
    heads = rng.randint(1, 4)
    if build.block_major and build.block_beats % head_beats:
        heads = 1  # heads lie within a row block
    beats = head_beats * heads if kind in HEADS else rng.randint(1, MAX_BEATS)
    blocks = -(-beats // build.block_beats) + (rng.randrange(2) if padding else 0)
    row_scale = build.row_scales and rng.random() < 0.4
    act = SCALES[scale or rng.choice(list(SCALES))]
    channels = None
    if build.channels and kind in (Kind.QUERY, Kind.KEY) and rng.random() < 0.6:
        row_scale = False  # the words of both would come in one stream
        channels = _channel_words(generator, beats * LANES)
    halves = torch.randint(-(1 << 15), 1 << 15, (beats * LANES,), generator=generator).to(torch.int16)
    ordinary = torch.rand(beats * LANES, generator=generator).to(torch.float16).view(torch.int16)
    return EpilogueCase(
        build=build,
        kind=kind,
        sums=_sums(sums or rng.choice(SUMS), generator, rows, blocks * build.outputs, build.sum_bits),
        beats=beats,
        act_scale=act * (0.5 + torch.rand(tokens, generator=generator)),
        weight=(rng.choice([halves, ordinary]) if row_scale else torch.tensor(rng.uniform(-2, 2))),
        old=_numbers(generator, rows, beats * LANES),
        rope=torch.randn(tokens, head_beats * LANES, generator=generator).clamp(-1, 1),
        channels=channels,
        tokens=tokens,
        last_only=last_only,
        logits_enable=rng.random() < 0.6,
        dst=rng.randrange(20),
        dst_stride=beats + rng.randrange(5),
        first_row=rng.choice([0, 0, 8 * rng.randrange(1, 4000)]),
        first_head=rng.randrange(5),
        head_beats=head_beats,
        k_int4=rng.random() < 0.5,
        v_int4=rng.random() < 0.5,
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
            old = packed_rows(case.old)
            self._memory = {case.row(token, beat): old[token * case.beats + beat] for token, beat in case.real()}
        self._loads = [
            {"i_op_valid": 1, "i_op_payload": case.op(), "i_logits_enable": int(case.logits_enable)},
            *({"scale_en": 1, "scale_token": token, "scale_data": int(bits_of(scale))}
              for token, scale in enumerate(case.act_scale)),
            *({"rope_en": 1, "rope_token": token, "rope_row": row, "rope_data": packed}
              for token, values in enumerate(case.rope)
              for row, packed in enumerate(packed_rows(values))),
        ]  # fmt: skip
        return True


def coverage_cases(rng: random.Random, generator: torch.Generator, build: Build, rounds: int) -> list[EpilogueCase]:
    """Every epilogue with every distribution of sums and every scale once, then `rounds` random ones."""
    cases = [random_case(rng, generator, build, kind, sums=sums, scale="ordinary") for kind in Kind for sums in SUMS]
    cases += [random_case(rng, generator, build, kind, sums="random", scale=scale) for kind in Kind for scale in SCALES]
    cases += [random_case(rng, generator, build, rng.choice(list(Kind))) for _ in range(rounds)]
    rng.shuffle(cases)
    return cases


def run_bench(directory: Path, build: Build) -> None:
    """Build under ``directory`` and run the tests below."""
    with patch.dict(os.environ, {_BUILD: build.name}):  # the tests run in a process of the simulator
        run_cocotb_module(build.unit(), "epilogue_bench", "cosim.bench_epilogue", directory)


@cocotb.test()
@cocotb.parametrize(stalled=["none", "in", "out", "both"])
async def every_epilogue(dut, stalled: str) -> None:
    build = BUILDS[os.environ[_BUILD]]
    rng, generator = random.Random(5), torch.Generator().manual_seed(5)
    cases = coverage_cases(rng, generator, build, 30)
    stalls = geometric_stalls(rng, 0.4)
    bench = EpilogueBench(
        cases,
        in_stalls=stalls if stalled in ("in", "both") else no_stalls,
        out_stalls=stalls if stalled in ("out", "both") else no_stalls,
        check_cycles=stalled == "none",
    )
    await run_in_cocotb(dut, build.unit(), bench, 60_000)
