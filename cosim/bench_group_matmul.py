"""Bench of the group engines behind their weight stream, against golden/group_dequant.py.

`GroupCase` is one operation with what must come out of it; its weights are packed here, straight from the text of
spec/layout.py. tests/test_group_matmul.py runs cases on Verilator (cosim/group_harness.py).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosim.group_harness import GroupHarness, GroupOperation, GroupResult
from cosim.slow_pack import aux_segment, segment
from cosim.streamed_engine import matmul_op
from golden.group_dequant import GroupWeights, accumulate, largest_exponent
from golden.lut_tensor_core import plane_nibbles
from rtl.group_stream import scale_rows
from spec.config import K_GROUP, LANES, GroupEngine, GroupMatmulConfig, ceil_div
from spec.layout import SegmentKind

__all__ = ["GroupCase", "extreme_cases", "random_case", "ring_blocks", "run_cases"]


@dataclass(kw_only=True)
class GroupCase:
    """One operation: int8 x (M, K), bfloat16 scales d (M, K / 32) as int64, a matrix (N, K). ``tile``: tokens of the step,
    where ``last_only`` takes one of them."""

    x: Tensor
    d: Tensor
    weights: GroupWeights
    tile: int | None = None

    def sizes(self, cfg: GroupMatmulConfig) -> dict[str, int]:
        """Dimensions as a descriptor has them."""
        n, k = self.weights.codes.shape
        return {"bits": self.weights.bits, "k_blocks": k // K_GROUP, "row_blocks": ceil_div(n, cfg.lanes)}

    def operation(self, cfg: GroupMatmulConfig, *, prefetch: int = 0) -> GroupOperation:
        """For the harness."""
        tokens = self.x.shape[0]
        sizes = self.sizes(cfg)
        payload = matmul_op(
            planes=sizes["bits"], k_blocks=sizes["k_blocks"], row_blocks=sizes["row_blocks"], tokens=self.tile or tokens,
            last_only=int(self.tile is not None), exponent=self.weights.exponent,
        )  # fmt: skip
        beats = sizes["row_blocks"] * tokens * cfg.lanes // LANES
        return GroupOperation(
            payload=payload, activations=self.x.numpy(), scales=self.d.numpy().astype(np.uint16), beats=beats, prefetch=prefetch
        )

    def segment(self, cfg: GroupMatmulConfig, weight_bytes: int) -> bytes:
        """Its weights."""
        return segment(SegmentKind.GROUPS, _pack(self.weights, cfg), self.weights.bits, weight_bytes)

    def sums(self) -> Tensor:
        """What golden says, (M, N)."""
        return accumulate(self.x, self.d, self.weights)

    def expected(self, cfg: GroupMatmulConfig) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Sums (beats, 8) and tokens (beats,) in the order in which they leave: for row block, for token."""
        y = self.sums()
        y = torch.nn.functional.pad(y, (0, -y.shape[1] % cfg.lanes)).unflatten(1, (-1, cfg.lanes))  # (M, nb, lanes)
        tokens = torch.arange(y.shape[0]).repeat_interleave(cfg.lanes // LANES).repeat(y.shape[1])
        return y.transpose(0, 1).reshape(-1, LANES).numpy(), tokens.numpy().astype(np.uint8)


def _pack(weights: GroupWeights, cfg: GroupMatmulConfig) -> bytes:
    """Payload of a GROUPS segment, block by block."""
    bits, lanes = weights.bits, cfg.lanes
    pad = (0, 0, 0, -weights.codes.shape[0] % lanes)
    codes, scale, minimum = (torch.nn.functional.pad(t, pad) for t in (weights.codes, weights.scale, weights.minimum))
    payload = bytearray()
    for first in range(0, codes.shape[0], lanes):
        here = slice(first, first + lanes)
        for group in range(scale.shape[1]):
            halves = torch.stack([scale[here, group], minimum[here, group]])
            payload += halves.numpy().astype("<u2").tobytes()
            block = codes[here, K_GROUP * group :][:, :K_GROUP].to(torch.int32)
            if cfg.engine is GroupEngine.LUT_TENSOR_CORE:
                rows = plane_nibbles(block, bits).flip(0).reshape(bits, -1)  # highest plane first, cell (j, t) at 8j + t
            elif bits == 4:
                rows = ((block - 8) & 15).reshape(bits, -1)
            else:  # rows 2r, 2r + 1: high and low nibbles of a quarter of the outputs
                digits = torch.stack([(block >> 4) - 8, (block & 15) - 8]) & 15
                rows = digits.unflatten(1, (4, -1)).transpose(0, 1).reshape(bits, -1)
            nibbles = rows.reshape(-1, 2).numpy().astype(np.uint8)
            payload += (nibbles[:, 0] | nibbles[:, 1] << 4).tobytes()
    return bytes(payload)


def halves(shape: Sequence[int], low: int, high: int, generator: torch.Generator) -> Tensor:
    """Random FP16 bit patterns of both signs with exponent fields ``low`` to ``high``."""
    field = torch.randint(low, high + 1, tuple(shape), generator=generator)
    rest = torch.randint(0, 1 << 11, tuple(shape), generator=generator)
    return field << 10 | rest & 0x3FF | (rest >> 10) << 15


def random_case(rng: random.Random, cfg: GroupMatmulConfig, **fixed: Any) -> GroupCase:
    """A case of random size within the config; ``tokens``, ``bits``, ``n`` and ``k`` may be given."""
    generator = torch.Generator().manual_seed(rng.getrandbits(48))
    tokens = fixed.get("tokens", rng.randint(1, cfg.tokens))
    n = fixed.get("n", rng.randint(1, 4 * cfg.lanes))
    groups = fixed.get("k", K_GROUP * rng.randint(1, cfg.max_k_blocks)) // K_GROUP
    bits = fixed.get("bits", rng.choice(cfg.weight_bits))
    lowest, highest = sorted((rng.randint(0, 30), rng.randint(0, 30)))
    weights = (halves((n, groups), lowest, highest, generator) for _ in range(2))
    scale, minimum = (half * (torch.rand(half.shape, generator=generator) > 0.1) for half in weights)
    field = torch.randint(*rng.choice([(100, 131), (1, 256), (0, 3), (120, 121)]), (tokens, groups), generator=generator)
    d = field << 7 | torch.randint(0, 128, (tokens, groups), generator=generator)
    d *= torch.rand(d.shape, generator=generator) > 0.1
    x = torch.randint(-127, 128, (tokens, groups, K_GROUP), dtype=torch.int8, generator=generator)
    return GroupCase(
        x=(x * (d > 0).unsqueeze(-1)).flatten(1),
        d=d,
        weights=GroupWeights(
            codes=torch.randint(0, 1 << bits, (n, groups * K_GROUP), dtype=torch.uint8, generator=generator),
            scale=scale,
            minimum=minimum,
            bits=bits,
            exponent=largest_exponent(scale, minimum),
        ),
        tile=cfg.tokens if tokens == 1 and rng.random() < 0.5 else None,
    )


_Value = int | Tensor


def extreme_cases(cfg: GroupMatmulConfig) -> dict[str, GroupCase]:
    """Largest sums of either sign, the ends of every shift, and operations that show where one weight goes."""
    k, tokens, groups = cfg.max_k, min(2, cfg.tokens), cfg.max_k_blocks
    n, bits = cfg.lanes + 3, max(cfg.weight_bits)
    largest, subnormal, minus = 0x7BFF, 0x0001, 0x8000

    def case(x: _Value, d: _Value, code: _Value, scale: _Value, minimum: _Value, bits: int) -> GroupCase:
        def full(value: _Value, shape: tuple[int, int]) -> Tensor:
            return torch.as_tensor(value, dtype=torch.int64).broadcast_to(shape).contiguous()

        halves = full(scale, (n, groups)), full(minimum, (n, groups))
        return GroupCase(
            x=full(x, (tokens, k)).to(torch.int8),
            d=full(d, (tokens, groups)),
            weights=GroupWeights(
                codes=full(code, (n, k)).to(torch.uint8),
                scale=halves[0],
                minimum=halves[1],
                bits=bits,
                exponent=largest_exponent(*halves),
            ),
        )

    top = (1 << bits) - 1
    far = torch.arange(groups) % 3 * 126 + 1 << 7 | 0x7F  # exponent fields 1, 127, 253: shifts 252, 126, 0
    edge = 190 - torch.tensor([0, 62, 63, 64, 1]).repeat(groups)[:groups] << 7 | 0x7F
    ramp = torch.arange(tokens * k).reshape(tokens, k) % 255 - 127
    one = torch.zeros(n, k, dtype=torch.int64)
    one[torch.arange(n), torch.arange(n) * 7 % k] = 1
    exponents = (torch.arange(n)[:, None] + torch.arange(groups)) % 31 << 10 | 0x3FF
    return {
        "largest": case(127, 0x7F7F, top, largest, largest, bits),
        "least": case(127, 0x7F7F, top, largest | minus, largest | minus, bits),
        "scale against minimum": case(-127, 0x7F7F, top, largest, largest | minus, bits),
        "subnormal beside largest": case(ramp, 0x3F80, top, torch.tensor([subnormal, largest]).repeat(n, groups)[:, :groups],
                                         subnormal | minus, bits),
        "only subnormal": case(ramp, 0x3F80, top, subnormal, subnormal | minus, bits),
        "every exponent": case(ramp, 0x3FC5, 1, exponents, exponents ^ minus, min(cfg.weight_bits)),
        "shifts saturate": case(-127, far, top, largest, 0x3C00, bits),
        "shifts around their end": case(-127, edge, top, largest, largest | minus, bits),
        "zero activations": case(0, 0, top, largest, largest, bits),
        "zero scales": case(ramp, 0x3F80, top, 0, 0, bits),
        "one weight an output": case(ramp, 0x3F80, one, 0x3C00, 0, min(cfg.weight_bits)),
        "minimum alone": case(ramp, 0x4049, 0, largest, exponents, 4),
    }  # fmt: skip


def ring_blocks(cfg: GroupMatmulConfig, bits: int) -> int:
    """Blocks that the rings hold."""
    return min(cfg.ring_rows // bits, scale_rows(cfg))


def run_cases(
    harness: GroupHarness,
    cfg: GroupMatmulConfig,
    weight_bytes: int,
    cases: Sequence[GroupCase],
    rng: random.Random,
    *,
    prefetched: bool = False,
    **how: Any,
) -> list[GroupResult]:
    """Runs cases one after the other, with AUX segments between them; compares every beat. ``how``: see `GroupHarness.run`.

    ``prefetched``: each operation waits until as many of its blocks as the rings can hold were sent.
    """
    weights, operations = b"", []
    for case in cases:
        weights += aux_segment(rng.randbytes(weight_bytes * rng.randint(0, 2)), weight_bytes)
        prefetch = 0
        if prefetched:
            room = ring_blocks(cfg, case.weights.bits) * cfg.block_rows(case.weights.bits) * cfg.row_bytes
            prefetch = (len(weights) + room) // weight_bytes + 1
        weights += case.segment(cfg, weight_bytes)
        operations.append(case.operation(cfg, prefetch=min(prefetch, len(weights) // weight_bytes)))
    results, _ = harness.run(weights, weight_bytes, operations, seed=rng.getrandbits(32), **how)
    lookups = 0
    for number, (case, result) in enumerate(zip(cases, results, strict=True)):
        sums, tokens = case.expected(cfg)
        sizes = case.sizes(cfg)
        assert np.array_equal(result.tokens, tokens), (number, sizes, case.x.shape)
        assert np.array_equal(result.sums, sums), (number, sizes, case.x.shape)
        lookups += sizes["bits"] * sizes["k_blocks"] * sizes["row_blocks"] * case.x.shape[0]
    assert sum(result.lookups for result in results) == lookups
    return results
