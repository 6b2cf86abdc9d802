"""Bytes and multiply-accumulates that a step cannot do without, for either path; classes as in the host's reports."""

from dataclasses import dataclass

from spec.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """Bytes of the device's memory by class."""

    weights: int
    kv: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        """All classes."""
        return self.weights + self.kv + self.activations + self.head


def step_bytes(
    model: ModelConfig, *, weights: int, head: int, slot_bytes: int, row_bytes: int, tokens: int, position: int, heads: int
) -> StepBytes:
    """A step of ``tokens`` tokens at ``position``, of which ``heads`` (0 or 1) go through the LM head.

    ``weights``, ``head``: stored bytes. ``slot_bytes``: K and V of a token, KV head and layer. ``row_bytes``: an embedding
    row. Weights are read once a step, the cache once (each key and value up to the last token), a token's K and V written once;
    intermediate activations can stay in caches and count nothing, embedding rows and logits (float32) are counted.
    """
    per_slot = model.layers * model.kv_heads * slot_bytes
    return StepBytes(
        weights=weights,
        kv=per_slot * (position + tokens) + per_slot * tokens,
        activations=tokens * row_bytes + heads * 4 * model.vocab,
        head=heads * head,
    )


def step_macs(model: ModelConfig, *, tokens: int, position: int, heads: int) -> int:
    """Multiply-accumulates: matrices, head, and the two products of attention over the keys that each token sees."""
    keys = tokens * position + tokens * (tokens + 1) // 2
    return tokens * model.linear_weights + heads * model.head_weights + 2 * model.layers * model.q_dim * keys
