"""A model's numbers in the form in which the accelerator takes them, whatever file they came from."""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from spec.config import ModelConfig

Int8 = NDArray[np.int8]
Float32 = NDArray[np.float32]
Float16 = NDArray[np.float16]


@dataclass(frozen=True, kw_only=True)
class TernaryMatrix:
    """weight = values * scale; `values` (outputs, inputs) in {-1, 0, 1}, `scale` a binary32 number."""

    values: Int8
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)"""
        return self.values.shape[0], self.values.shape[1]


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One decoder layer. The rows of `q` and `k` are in pairs (2i, 2i+1) that RoPE turns together."""

    attn_norm: Float32
    q: TernaryMatrix
    k: TernaryMatrix
    v: TernaryMatrix
    attn_sub_norm: Float32 | None
    o: TernaryMatrix
    ffn_norm: Float32
    gate: TernaryMatrix
    up: TernaryMatrix
    ffn_sub_norm: Float32 | None
    down: TernaryMatrix


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole model. Embedding row = `embedding` * `embedding_scale`; head row = `head` * `head_scale`."""

    config: ModelConfig
    layers: tuple[LayerWeights, ...]
    final_norm: Float32
    embedding: Int8
    """(vocab, hidden)"""
    embedding_scale: Float32
    """(vocab,)"""
    head: Int8
    """(vocab, hidden) in [-121, 121]: five balanced ternary digits"""
    head_scale: Float16
    """(vocab,)"""


def layer_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each field of `LayerWeights`; sub-norms only where the model has them."""
    hidden, ffn, q_dim, kv_dim = model.hidden, model.ffn, model.q_dim, model.kv_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "q": (q_dim, hidden),
        "k": (kv_dim, hidden),
        "v": (kv_dim, hidden),
        "attn_sub_norm": (q_dim,),
        "o": (hidden, q_dim),
        "ffn_norm": (hidden,),
        "gate": (ffn, hidden),
        "up": (ffn, hidden),
        "ffn_sub_norm": (ffn,),
        "down": (hidden, ffn),
    }
    if not model.sub_norms:
        del shapes["attn_sub_norm"], shapes["ffn_sub_norm"]
    return shapes


def check_shapes(checkpoint: Checkpoint) -> None:
    """Raises ValueError if an array does not have the shape that the model's dimensions say."""
    model = checkpoint.config
    wanted: list[tuple[str, object, tuple[int, ...]]] = [
        ("final_norm", checkpoint.final_norm, (model.hidden,)),
        ("embedding", checkpoint.embedding, (model.vocab, model.hidden)),
        ("embedding_scale", checkpoint.embedding_scale, (model.vocab,)),
        ("head", checkpoint.head, (model.vocab, model.hidden)),
        ("head_scale", checkpoint.head_scale, (model.vocab,)),
    ]
    if len(checkpoint.layers) != model.layers:
        raise ValueError(f"the model has {model.layers} layers, the checkpoint {len(checkpoint.layers)}")
    shapes = layer_shapes(model)
    for index, layer in enumerate(checkpoint.layers):
        for field in fields(layer):
            value = getattr(layer, field.name)
            if (value is None) != (field.name not in shapes):
                raise ValueError(f"layer {index}: {field.name} must be present exactly when the model has sub-norms")
            if value is not None:
                wanted.append((f"layer {index}: {field.name}", value, shapes[field.name]))
    for name, value, shape in wanted:
        found = getattr(value, "shape", None)
        if found != shape:
            raise ValueError(f"{name} must have shape {shape}, not {found}")
