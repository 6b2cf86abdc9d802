"""Models with random weights of any dimensions, for tests and benchmarks."""

from dataclasses import replace

import numpy as np

from host_driver.key_channels import KeyChannels
from host_driver.weights import Checkpoint, GroupMatrix, LayerWeights, RowMatrix, TernaryMatrix, layer_shapes
from spec.config import Activation, ModelConfig

HEAD_LIMIT = 121

TINY = ModelConfig(
    name="tiny-random",
    vocab=301,
    hidden=88,
    layers=2,
    heads=3,
    kv_heads=1,
    head_dim=24,
    ffn=136,
    max_positions=80,
    activation=Activation.SILU,
    sub_norms=True,
)
"""Fits the `test` preset; all dimensions different; its head takes two operations there."""

TINY_PLAIN = ModelConfig(
    name="tiny-plain-random",
    vocab=203,
    hidden=72,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn=104,
    max_positions=64,
    activation=Activation.RELU2,
    sub_norms=False,
    rope_theta=5e5,
    rms_eps=1e-6,
)
"""Without sub-norms, two KV heads; fits the `test` preset."""


TINY_GROUPED = ModelConfig(
    name="tiny-grouped-random",
    vocab=229,
    hidden=96,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=24,
    ffn=160,
    max_positions=72,
    sub_norms=False,
    rope_theta=1e5,
)
"""A Llama for group engines; fits `test_lut` and its like."""


def _ternary(rng: np.random.Generator, shape: tuple[int, int]) -> TernaryMatrix:
    """Signs and zeros as BitNet has them; the scale keeps the variance of the output near that of the input."""
    values = rng.choice(np.array([-1, 0, 1], dtype=np.int8), size=shape, p=(0.3, 0.4, 0.3))
    return TernaryMatrix(values=values, scale=float(np.float32(rng.uniform(0.8, 1.2) / np.sqrt(0.6 * shape[1]))))


def _norm(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.uniform(0.5, 1.5, length).astype(np.float32)


def random_checkpoint(model: ModelConfig, seed: int = 0) -> Checkpoint:
    """A checkpoint of those dimensions; the same seed gives the same numbers."""
    rng = np.random.default_rng(seed)
    shapes = layer_shapes(model)
    layers = []
    for _ in range(model.layers):
        parts: dict[str, object] = {"attn_sub_norm": None, "ffn_sub_norm": None}
        for name, shape in shapes.items():
            parts[name] = _norm(rng, shape[0]) if len(shape) == 1 else _ternary(rng, (shape[0], shape[1]))
        layers.append(LayerWeights(**parts))  # pyright: ignore[reportArgumentType]
    table = (model.vocab, model.hidden)
    scale = rng.uniform(0.5, 1.5, model.vocab) / HEAD_LIMIT
    return Checkpoint(
        config=model,
        layers=tuple(layers),
        final_norm=_norm(rng, model.hidden),
        embedding=RowMatrix(
            values=rng.integers(-HEAD_LIMIT, HEAD_LIMIT + 1, table, dtype=np.int8), scale=scale.astype(np.float32)
        ),
        head=RowMatrix(
            values=rng.integers(-HEAD_LIMIT, HEAD_LIMIT + 1, table, dtype=np.int8),
            scale=(scale / np.sqrt(model.hidden)).astype(np.float16),
        ),
    )


def random_groups(rng: np.random.Generator, shape: tuple[int, int], *, bits: int, group: int = 32) -> GroupMatrix:
    """Random codes; scales spread over a few exponents, minima near those of symmetric weights."""
    groups = (shape[0], shape[1] // group)
    spread = rng.uniform(0.5, 1.5, groups) * 2.0 ** rng.integers(-2, 3, groups) * rng.choice((-1, 1), groups)
    scale = (spread * 3.0 / ((1 << bits) * np.sqrt(shape[1]))).astype(np.float16)
    middle = ((1 << bits) - 1) / 2 * rng.uniform(0.8, 1.2, groups)
    return GroupMatrix(
        codes=rng.integers(0, 1 << bits, shape, dtype=np.uint8),
        scale=scale,
        minimum=(-middle * scale).astype(np.float16),
        bits=bits,
        group=group,
    )


def random_group_checkpoint(model: ModelConfig, seed: int = 0, *, bits: int = 4) -> Checkpoint:
    """A group-quantised checkpoint of those dimensions, its 8-bit embedding tied to the head."""
    rng = np.random.default_rng(seed)
    layers = []
    for _ in range(model.layers):
        parts: dict[str, object] = {"attn_sub_norm": None, "ffn_sub_norm": None}
        for name, shape in layer_shapes(model).items():
            whole = len(shape) == 1
            parts[name] = _norm(rng, shape[0]) if whole else random_groups(rng, (shape[0], shape[1]), bits=bits)
        layers.append(LayerWeights(**parts))  # pyright: ignore[reportArgumentType]
    table = random_groups(rng, (model.vocab, model.hidden), bits=8)
    scale = np.abs(table.scale) * np.float16(16)
    table = replace(table, scale=scale, minimum=-128 * scale)
    return Checkpoint(
        config=model, layers=tuple(layers), final_norm=_norm(rng, model.hidden), embedding=table, head=table
    )


def random_channels(model: ModelConfig, rng: np.random.Generator, *, shift: int) -> KeyChannels:
    """Offsets about as large as keys, shifts of -shift to shift."""
    shape = (model.layers, model.kv_heads, model.head_dim)
    offset = rng.normal(0, 5, shape).astype(np.float16)
    return KeyChannels(offset=offset, shift=rng.integers(-shift, shift + 1, shape).astype(np.int8))
