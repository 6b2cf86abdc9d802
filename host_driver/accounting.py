"""What a model costs on a build: bytes and multiply-accumulates a token, from the programs alone."""

from dataclasses import dataclass

from host_driver.compiler import STEP, CompiledModel
from spec.config import HEAD_PLANES, KEY_BLOCK, ceil_div
from spec.descriptors import DESCRIPTOR_BYTES
from spec.layout import embed_row_bytes

CLASSES = ("weights", "kv", "activations", "head")
"""Classes of DRAM traffic."""


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Bytes of DRAM traffic and multiply-accumulates of one step."""

    weights: int
    kv: int
    activations: int
    head: int
    macs: int

    @property
    def total_bytes(self) -> int:
        """All classes."""
        return self.weights + self.kv + self.activations + self.head


def macs(compiled: CompiledModel, *, tokens: int, heads: int) -> int:
    """Multiply-accumulates. Ternary engine: a weight of the head counts as its five planes. Group engines: any weight is one."""
    planes = 1 if compiled.accelerator.grouped else HEAD_PLANES
    return tokens * compiled.model.linear_weights + heads * planes * compiled.model.head_weights


def decode_cost(compiled: CompiledModel, position: int) -> StepCost:
    """One decode step at a position, logits not written. K and V are read in whole blocks of 16 slots."""
    model = compiled.model
    slots = ceil_div(position + 1, KEY_BLOCK) * KEY_BLOCK
    rope_row = 4 * model.head_dim
    return StepCost(
        weights=compiled.stream_bytes(compiled.layer_stream),
        kv=compiled.kv_token_bytes * (slots + 1),
        activations=len(compiled.programs[STEP].instructions) * DESCRIPTOR_BYTES
        + embed_row_bytes(model.hidden, grouped=compiled.accelerator.grouped)
        + rope_row,
        head=compiled.stream_bytes(compiled.head_stream),
        macs=macs(compiled, tokens=1, heads=1),
    )


def cycles_floor(compiled: CompiledModel, cost: StepCost) -> float:
    """Fewest cycles of a step: whichever is longer, DRAM traffic at full bandwidth or the engine at full use."""
    build = compiled.accelerator
    return max(cost.total_bytes / build.dram.bytes_per_cycle, cost.macs / build.matmul.macs_per_cycle)
