"""A model's numbers in the form in which the accelerator takes them, whatever file they came from."""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from spec.config import ModelConfig

Int8 = NDArray[np.int8]
UInt8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]
Float16 = NDArray[np.float16]

GROUP_SIZES = (32, 64, 128)
"""Weights of a row that may share a scale."""

CODE_BITS = (1, 2, 3, 4, 8)
"""Widths of a group-quantised weight."""


@dataclass(frozen=True, kw_only=True)
class TernaryMatrix:
    """weight = values * scale; `values` (outputs, inputs) in {-1, 0, 1}, `scale` a binary32 number."""

    values: Int8
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)"""
        return self.values.shape[0], self.values.shape[1]

    def dense(self) -> Float32:
        """The weights as binary32 numbers."""
        return self.values * np.float32(self.scale)


@dataclass(frozen=True, kw_only=True)
class RowMatrix:
    """weight[n, k] = values[n, k] * scale[n]; `values` (outputs, inputs) in [-121, 121]: five balanced ternary digits."""

    values: Int8
    scale: Float16 | Float32
    """(outputs,); a head's are FP16, an embedding's FP32"""

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)"""
        return self.values.shape[0], self.values.shape[1]

    def dense(self) -> Float32:
        """The weights as binary32 numbers."""
        return self.values * self.scale.astype(np.float32)[:, None]


@dataclass(frozen=True, kw_only=True)
class GroupMatrix:
    """weight[n, k] = scale[n, g] * codes[n, k] + minimum[n, g], g = k // group: ggml's Q4_1 convention.

    Symmetric formats have minimum = -2^(bits-1) * scale (Q4_0, Q8_0), which FP16 holds exactly.
    """

    codes: UInt8
    """(outputs, inputs) in [0, 2^bits)"""
    scale: Float16
    """(outputs, inputs / group), finite"""
    minimum: Float16
    """(outputs, inputs / group), finite"""
    bits: int
    group: int

    def __post_init__(self) -> None:
        if self.bits not in CODE_BITS or self.group not in GROUP_SIZES:
            raise ValueError(f"codes have {CODE_BITS} bits in groups of {GROUP_SIZES}, not {self.bits} in {self.group}")
        outputs, inputs = self.codes.shape
        wanted = (outputs, inputs // self.group)
        if inputs % self.group or self.scale.shape != wanted or self.minimum.shape != wanted:
            raise ValueError(
                f"codes {self.codes.shape} in groups of {self.group} need scales and minima {wanted}, "
                f"not {self.scale.shape} and {self.minimum.shape}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)"""
        return self.codes.shape[0], self.codes.shape[1]

    def dense(self) -> Float32:
        """The weights, each product and sum rounded once to binary32."""
        scale, minimum = (np.repeat(part.astype(np.float32), self.group, axis=1) for part in (self.scale, self.minimum))
        return self.codes * scale + minimum


LayerMatrix = TernaryMatrix | GroupMatrix


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One decoder layer. The rows of `q` and `k` are in pairs (2i, 2i+1) that RoPE turns together."""

    attn_norm: Float32
    q: LayerMatrix
    k: LayerMatrix
    v: LayerMatrix
    attn_sub_norm: Float32 | None
    o: LayerMatrix
    ffn_norm: Float32
    gate: LayerMatrix
    up: LayerMatrix
    ffn_sub_norm: Float32 | None
    down: LayerMatrix


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole model."""

    config: ModelConfig
    layers: tuple[LayerWeights, ...]
    final_norm: Float32
    embedding: RowMatrix | GroupMatrix
    """(vocab, hidden)"""
    head: RowMatrix | GroupMatrix
    """(vocab, hidden); the same object as `embedding` where the two are tied"""


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
        ("head", checkpoint.head, (model.vocab, model.hidden)),
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
