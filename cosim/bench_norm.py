"""Bench of the norm unit against golden/norm.py, for both simulators.

`NormBench` serves tests/test_norm.py (Amaranth's simulator) and the coroutines marked ``cocotb.test``, which run
inside Verilator by ``run_bench``.
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
from amaranth.lib import data
from torch import Tensor

from cosim.cycle_bench import CycleBench, Stalls, geometric_stalls, run_cocotb_module, run_in_cocotb
from cosim.pysim import no_stalls
from golden.fp import bits_of, from_bits
from golden.norm import norm_quantise, norm_quantise_groups
from rtl.lib.ops import op_layout
from rtl.norm import Norm
from spec.config import K_GROUP, LANES
from spec.descriptors import Opcode

WEIGHT_BITS = 256
TOKENS = 3
MAX_VECTOR = 192

_BUILD = "LUTRA_BENCH_BUILD"
BUILDS = {"token": False, "grouped": True}
"""What shares a scale -> `grouped`."""


def norm_unit(grouped: bool) -> Norm:
    """The unit under test, of about preset `test`'s sizes."""
    return Norm(weight_bits=WEIGHT_BITS, tokens=TOKENS, max_vector=MAX_VECTOR, grouped=grouped)


def payload(layout: data.StructLayout, values: dict[int | str, Any]) -> int:
    """Bits of a struct."""
    return layout.const(values).as_value().value


def float_bits(value: float) -> int:
    """Bits of a float32."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


def packed_rows(values: Tensor) -> list[int]:
    """Rows of 8 float32 as integers, lane 0 lowest."""
    return [int.from_bytes(struct.pack("<8I", *row), "little") for row in bits_of(values).reshape(-1, LANES).tolist()]


def packed_int8(values: Tensor) -> list[int]:
    """Rows of 8 int8 as integers, lane 0 lowest."""
    return [int.from_bytes(struct.pack("<8b", *row), "little") for row in values.reshape(-1, LANES).tolist()]


def extreme_vectors(length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Vectors that a sum, a maximum or a rounding may get wrong."""
    noise = torch.randn(length, generator=generator)
    one_hot = torch.zeros(length)
    one_hot[length - 1] = -3.0
    halves = torch.arange(length, dtype=torch.float32) - 126.5  # with the largest 127: ties when rounded
    halves[0] = 127.0
    specials = from_bits(torch.randint(0, 1 << 32, (length,), generator=generator))
    return {
        "random": noise,
        "zero": torch.zeros(length),
        "negative zero": torch.full((length,), -0.0),
        "equal": torch.full((length,), 0.7),
        "huge": noise * 1e30,
        "tiny": noise * 1e-35,
        "subnormal": noise * 1e-40,
        "one hot": one_hot,
        "wide range": noise * torch.logspace(-30, 18, length),
        "ties": halves,
        "threshold": torch.full((length,), 2.0**-100),
        "below threshold": torch.full((length,), 2.0**-100 * (1 - 2.0**-24)),
        "infinity": torch.where(one_hot != 0, float("inf"), noise),
        "nan": torch.where(one_hot != 0, float("nan"), noise),
        "any bits": specials,
    }


@dataclass(kw_only=True)
class NormCase:
    """One NORM operation: x (tokens, n) of the step's tokens, gamma (n,) or None."""

    x: Tensor
    gamma: Tensor | None
    last_only: bool = False
    eps: float = 1e-5
    src: int = 0
    src_stride: int = 0
    grouped: bool = False

    @property
    def beats(self) -> int:
        return self.x.shape[1] // LANES

    def op(self) -> int:
        """Payload of the operation."""
        values: dict[int | str, Any] = {
            "norm": int(self.gamma is not None),
            "last_only": int(self.last_only),
            "beats": self.beats,
            "src": self.src,
            "src_stride": self.src_stride,
            "inv_length": float_bits(1 / self.x.shape[1]),
            "eps": float_bits(self.eps),
            "position": 5,
            "tokens": self.x.shape[0],
        }
        return payload(op_layout(Opcode.NORM), values)

    def aux(self) -> list[int]:
        """Beats of gamma."""
        if self.gamma is None:
            return []
        raw = torch.cat([self.gamma, torch.zeros(-self.gamma.numel() % (WEIGHT_BITS // 32))])
        words = bits_of(raw).reshape(-1, WEIGHT_BITS // 32).tolist()
        return [int.from_bytes(struct.pack(f"<{len(row)}I", *row), "little") for row in words]

    def expected(self) -> "Writes":
        """All writes, each kind in order."""
        x = self.x[-1:] if self.last_only else self.x
        inv_length = from_bits(torch.tensor(float_bits(1 / x.shape[1])))
        eps = from_bits(torch.tensor(float_bits(self.eps)))
        out = Writes()
        if self.grouped:
            q, d, scale = norm_quantise_groups(x, self.gamma, inv_length, eps)
            out.groups = [(token, *pair) for token, row in enumerate(d.tolist()) for pair in enumerate(row)]
        else:
            q, scale = norm_quantise(x, self.gamma, inv_length, eps)
        out.activations = [(token, *pair) for token in range(x.shape[0]) for pair in enumerate(packed_int8(q[token]))]
        out.scales = list(enumerate(bits_of(scale).tolist()))
        return out

    def cycles(self) -> int:
        """Cycles from taking the operation to idle, nothing late."""
        tokens = 1 if self.last_only else self.x.shape[0]
        slots = -(-self.beats // 4) * 4
        passes = self.beats + max(self.beats, 13) if self.grouped else 2 * self.beats + 8
        token = max(passes + 3, slots + 42)
        return 1 + (self.gamma is not None) + (tokens - 1) * token + max(passes + 9, slots + 42)


@dataclass
class Writes:
    """What an operation writes."""

    activations: list[tuple[int, int, int]] = field(default_factory=list)
    """(token, row, data)"""
    groups: list[tuple[int, int, int]] = field(default_factory=list)
    """(token, group, bits)"""
    scales: list[tuple[int, int]] = field(default_factory=list)
    """(token, bits)"""


def random_case(rng: random.Random, generator: torch.Generator, *, kind: str | None = None, **fixed: Any) -> NormCase:
    """A case of random size; each token is of a kind of `extreme_vectors`, or with groups each group of 32."""
    tokens = fixed.get("tokens", rng.randint(1, TOKENS))
    grouped = fixed.get("grouped", False)
    beats = fixed.get("beats", rng.randint(1, MAX_VECTOR // LANES))
    length = LANES * (-(-beats // 4) * 4 if grouped else beats)
    kinds = extreme_vectors(length, generator)
    part = K_GROUP if grouped and rng.random() < 0.5 else length
    names = [kind or rng.choice(list(kinds)) for _ in range(tokens * length // part)]
    x = torch.cat([extreme_vectors(part, generator)[name] for name in names]).reshape(tokens, length)
    gamma = torch.randn(length, generator=generator) if fixed.get("norm", rng.random() < 0.7) else None
    beats = length // LANES
    return NormCase(
        x=x,
        gamma=gamma,
        last_only=rng.random() < 0.3,
        eps=rng.choice([0.0, 1e-5, 1e-6]),
        src=rng.randrange(8),
        src_stride=beats + rng.randrange(4),
        grouped=grouped,
    )


class NormBench(CycleBench):
    """Runs cases one after the other; the vector memory is emptied between them."""

    def __init__(self, cases: list[NormCase], *, in_stalls: Stalls = no_stalls, check_cycles: bool = False) -> None:
        super().__init__()
        self._cases = iter(cases)
        self._check_cycles = check_cycles
        self._case: NormCase | None = None
        self._memory: dict[int, int] = {}
        self._writes = Writes()
        self._busy = 0
        self.source("i_aux", [beat for case in cases for beat in case.aux()], in_stalls)
        self.inputs |= {"i_op_valid": 0, "i_op_payload": 0, "vector_data": 0}

    def step(self, seen: dict[str, int]) -> bool:
        sources_done = super().step(seen)
        if seen["vector_en"]:
            self.inputs["vector_data"] = self._memory[seen["vector_addr"]]
        out = self._writes
        if seen.get("group_scale_en"):
            out.groups.append((seen["group_scale_token"], seen["group_scale_group"], seen["group_scale_data"]))
        if seen["act_en"]:
            token, row = seen["act_token"], seen["act_row"]
            out.activations.append((token, row, seen["act_data"]))
            if self._case and self._case.grouped:
                assert any(write[:2] == (token, row // 4) for write in out.groups), "activations before their scale"
        if seen["scale_en"]:
            out.scales.append((seen["scale_token"], seen["scale_data"]))
        if seen["i_op_valid"] and seen["i_op_ready"]:
            self.inputs["i_op_valid"] = 0
            self._busy = 0
        elif seen["o_busy"]:
            self._busy += 1
        elif not seen["i_op_valid"]:
            self._finish()
            return not self._start() and sources_done
        return False

    def _finish(self) -> None:
        expected = self._case.expected() if self._case else Writes()
        assert self._writes == expected, self._case
        if self._case and self._check_cycles:
            assert self._busy + 1 == self._case.cycles(), (self._busy + 1, self._case.cycles(), self._case)
        self._case, self._writes = None, Writes()

    def _start(self) -> bool:
        case = next(self._cases, None)
        if case is None:
            return False
        self._case = case
        rows = packed_rows(case.x)
        self._memory = {
            case.src + token * case.src_stride + beat: rows[token * case.beats + beat]
            for token in range(case.x.shape[0])
            for beat in range(case.beats)
        }
        self.inputs |= {"i_op_valid": 1, "i_op_payload": case.op()}
        return True


def run_bench(directory: Path, build: str) -> None:
    """Build under ``directory`` and run the tests below."""
    with patch.dict(os.environ, {_BUILD: build}):  # the tests run in a process of the simulator
        run_cocotb_module(norm_unit(BUILDS[build]), "norm_bench", "cosim.bench_norm", directory)


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.5])
async def every_case(dut, stall: float) -> None:
    grouped = BUILDS[os.environ[_BUILD]]
    rng, generator = random.Random(11), torch.Generator().manual_seed(11)
    kinds = list(extreme_vectors(LANES, generator))
    sizes = range(1, MAX_VECTOR // LANES + 1)
    cases = [random_case(rng, generator, kind=kind, grouped=grouped) for kind in kinds]
    cases += [random_case(rng, generator, kind="random", beats=n, tokens=TOKENS, grouped=grouped) for n in sizes]
    cases += [random_case(rng, generator, grouped=grouped) for _ in range(60)]
    stalls = geometric_stalls(rng, stall) if stall else no_stalls
    bench = NormBench(cases, in_stalls=stalls, check_cycles=not stall)
    await run_in_cocotb(dut, norm_unit(grouped), bench, 60_000)
