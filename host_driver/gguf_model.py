"""GGUF files of Llama models as checkpoints.

The rows of the query and key projections are in RoPE pairs (2i, 2i+1) already: llama.cpp's converter puts them so.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from host_driver import gguf_blocks
from host_driver.checkpoint import quantise_rows
from host_driver.errors import InvalidRequest
from host_driver.gguf_file import GgufFile, GgufTensor, read_gguf
from host_driver.gguf_tokenizer import token_id
from host_driver.group_quantiser import TABLE, GroupQuantiser
from host_driver.weights import Checkpoint, GroupMatrix, LayerWeights, RowMatrix, TernaryMatrix, layer_shapes
from spec.config import Activation, ModelConfig

ARCHITECTURE = "llama"

NAMES = {
    "attn_norm": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "ffn_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
"""Tensor names of a layer's parts, without ``blk.N.`` and ``.weight``."""

EMBEDDING, HEAD, FINAL_NORM = "token_embd.weight", "output.weight", "output_norm.weight"

FLOATS = ("F32", "F16", "BF16")

MAX_DIMENSION = 1 << 24
"""Of any of the model's dimensions."""


def _number(file: GgufFile, key: str, default: Any = None) -> Any:
    """A positive number of the metadata."""
    value = file.metadata.get(key, default)
    if value is None:
        raise InvalidRequest(f"{file.path}: key {key!r} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise InvalidRequest(f"{file.path}: {key} must be a positive number, not {str(value)[:64]}")
    return value


def _whole(file: GgufFile, key: str, default: int | None = None) -> int:
    value = _number(file, f"{ARCHITECTURE}.{key}", default)
    if not isinstance(value, int) or value > MAX_DIMENSION:
        raise InvalidRequest(f"{file.path}: {ARCHITECTURE}.{key} must be a whole number up to {MAX_DIMENSION}, not {value}")
    return value


def _check_supported(file: GgufFile, head_dim: int) -> None:
    """Refuses, by name, what this architecture may have and we do not."""

    def refuse(what: str) -> InvalidRequest:
        return InvalidRequest(f"{file.path}: {what} is not supported")

    scaling = file.metadata.get(f"{ARCHITECTURE}.rope.scaling.type", "none")
    if scaling != "none":
        raise refuse(f"RoPE scaling of type {str(scaling)[:64]!r}")
    if file.metadata.get(f"{ARCHITECTURE}.expert_count", 0) != 0:
        raise refuse("a mixture of experts")
    for key in ("rope.dimension_count", "attention.value_length"):
        value = _whole(file, key, head_dim)
        if value != head_dim:
            raise refuse(f"{ARCHITECTURE}.{key} {value} with a head of {head_dim}")


def read_gguf_config(file: GgufFile) -> ModelConfig:
    """The dimensions, checked against the tensors' shapes."""
    architecture = file.metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise InvalidRequest(f"{file.path}: architecture {str(architecture)[:64]!r} is not supported, only {ARCHITECTURE!r}")
    embedding = file.tensors.get(EMBEDDING)
    if embedding is None:
        raise InvalidRequest(f"{file.path}: tensor {EMBEDDING!r} is missing")
    vocab, hidden = embedding.shape[0], _whole(file, "embedding_length")
    heads = _whole(file, "attention.head_count")
    head_dim = _whole(file, "attention.key_length", max(hidden // heads, 1))
    _check_supported(file, head_dim)
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != vocab:
        raise InvalidRequest(f"{file.path}: the tokenizer has {len(tokens)} tokens, {EMBEDDING!r} {vocab} rows")
    add_bos = file.metadata.get("tokenizer.ggml.add_bos_token", False) is True
    stops = [token_id(file, key, vocab) for key in ("eos", "eot")]
    try:
        model = ModelConfig(
            name=file.path.stem,
            vocab=vocab,
            hidden=hidden,
            layers=_whole(file, "block_count"),
            heads=heads,
            kv_heads=_whole(file, "attention.head_count_kv", heads),
            head_dim=head_dim,
            ffn=_whole(file, "feed_forward_length"),
            max_positions=_whole(file, "context_length"),
            activation=Activation.SILU,
            sub_norms=False,
            rope_theta=float(_number(file, f"{ARCHITECTURE}.rope.freq_base", 10_000.0)),
            rms_eps=float(_number(file, f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon")),
            bos_id=token_id(file, "bos", vocab) if add_bos else None,
            eos_ids=tuple(dict.fromkeys(stop for stop in stops if stop is not None)),
        )
    except ValueError as error:
        raise InvalidRequest(f"{file.path}: {error}") from None
    _check_tensors(file, model)
    return model


def _wanted(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the model but the head."""
    shapes = layer_shapes(model)
    return {EMBEDDING: (model.vocab, model.hidden), FINAL_NORM: (model.hidden,)} | {
        f"blk.{layer}.{stem}.weight": shapes[field] for layer in range(model.layers) for field, stem in NAMES.items()
    }


def _check_tensors(file: GgufFile, model: ModelConfig) -> None:
    """The tensors are those of the model, with its shapes, and no others: a bias left out would be another model."""
    if 9 * model.layers > len(file.tensors):
        raise InvalidRequest(f"{file.path}: {model.layers} layers take more than the {len(file.tensors)} tensors of the file")
    wanted = _wanted(model)
    if HEAD in file.tensors:
        wanted[HEAD] = (model.vocab, model.hidden)
    for name, shape in wanted.items():
        tensor = file.tensors.get(name)
        if tensor is None:
            raise InvalidRequest(f"{file.path}: tensor {name!r} is missing")
        if tensor.shape != shape:
            raise InvalidRequest(
                f"{file.path}: tensor {name!r}: shape {list(tensor.shape)} disagrees with the metadata, which say {list(shape)}"
            )
        if len(shape) == 1 and tensor.kind not in FLOATS:
            raise InvalidRequest(f"{file.path}: tensor {name!r}: a norm must be {' or '.join(FLOATS)}, not {tensor.kind}")
    extra = sorted(file.tensors.keys() - wanted.keys())
    if extra:
        raise InvalidRequest(f"{file.path}: tensor {extra[0][:64]!r} is no part of a Llama model that is supported")


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """Tensors of a file as numbers."""

    file: GgufFile
    quantiser: GroupQuantiser

    def _wrong(self, tensor: GgufTensor, what: object) -> InvalidRequest:
        return InvalidRequest(f"{self.file.path}: tensor {tensor.name!r}: {what}")

    def vector(self, name: str) -> NDArray[np.float32]:
        """Of a norm."""
        tensor = self.file.tensors[name]
        try:
            return gguf_blocks.floats(tensor.kind, tensor.blocks(), tensor.shape)
        except ValueError as error:
            raise self._wrong(tensor, error) from None

    def matrix(self, name: str, quantiser: GroupQuantiser) -> GroupMatrix | TernaryMatrix:
        """As stored, or quantised here where the file has floats."""
        tensor = self.file.tensors[name]
        shape = (tensor.shape[0], tensor.shape[1])
        try:
            if tensor.kind in FLOATS:
                return quantiser.quantise(gguf_blocks.floats(tensor.kind, tensor.blocks(), shape))
            return gguf_blocks.QUANTISED[tensor.kind](tensor.blocks(), shape)
        except ValueError as error:
            raise self._wrong(tensor, error) from None

    def table(self, name: str, *, ternary: bool) -> GroupMatrix | RowMatrix:
        """Embedding or head; beside ternary layers int8 with a scale a row, as the ternary engine takes it."""
        matrix = self.matrix(name, TABLE)
        if not ternary and isinstance(matrix, GroupMatrix):
            return matrix
        try:
            values, scale = quantise_rows(matrix.dense())
        except ValueError as error:
            raise self._wrong(self.file.tensors[name], error) from None
        return RowMatrix(values=values, scale=scale)

    def layer(self, number: int, *, ternary: bool) -> LayerWeights:
        """One decoder layer."""
        parts: dict[str, Any] = {"attn_sub_norm": None, "ffn_sub_norm": None}
        for field, stem in NAMES.items():
            name = f"blk.{number}.{stem}.weight"
            if field.endswith("norm"):
                parts[field] = self.vector(name)
                continue
            part = self.matrix(name, self.quantiser)
            parts[field] = gguf_blocks.ternary_groups(part) if isinstance(part, TernaryMatrix) and not ternary else part
        return LayerWeights(**parts)

    def all_ternary(self) -> bool:
        """Whether every matrix of every layer is ternary with one scale."""
        stems = [stem for field, stem in NAMES.items() if not field.endswith("norm")]
        names = [name for name in self.file.tensors if name.split(".")[-2] in stems]
        kinds = {self.file.tensors[name].kind for name in names}
        return kinds <= {"TQ1_0", "TQ2_0"} and all(isinstance(self.matrix(name, TABLE), TernaryMatrix) for name in names)


def has_floats(file: GgufFile) -> bool:
    """Whether a layer's matrix is stored as floats, so that it is quantised here."""
    matrices = (tensor for name, tensor in file.tensors.items() if name.startswith("blk.") and len(tensor.shape) > 1)
    return any(tensor.kind in FLOATS for tensor in matrices)


def load_gguf(file: GgufFile, quantiser: GroupQuantiser | None = None) -> Checkpoint:
    """A file as the accelerator takes it; ``quantiser`` of the matrices that are stored as floats."""
    model = read_gguf_config(file)
    reader = _Reader(file=file, quantiser=GroupQuantiser() if quantiser is None else quantiser)
    ternary = reader.all_ternary()
    embedding = reader.table(EMBEDDING, ternary=ternary)
    return Checkpoint(
        config=model,
        layers=tuple(reader.layer(number, ternary=ternary) for number in range(model.layers)),
        final_norm=reader.vector(FINAL_NORM),
        embedding=embedding,
        head=reader.table(HEAD, ternary=ternary) if HEAD in file.tensors else embedding,
    )


def open_gguf(path: Path) -> tuple[GgufFile, ModelConfig]:
    """A file's checked header and its model's dimensions."""
    file = read_gguf(path)
    return file, read_gguf_config(file)
