"""Imports Hugging Face safetensors folders of BitNet b1.58 and of Llama models.

BitNet's matrices come packed (uint8, four ternary values a byte: transformers' BitNet, both its linear classes) or as float
master weights, quantised here as BitNet defines it: scale = mean |W|, values = clip(round(W / scale), -1, 1).
Llama's are floats, quantised here in groups (`host_driver/group_quantiser.py`), embedding and head to 8 bits.
Hugging Face turns pairs (i, i + head_dim/2) of a head by RoPE, the accelerator pairs (2i, 2i+1): the rows of the query
and key projections are put into that order, which leaves every attention score as it was.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from host_driver.errors import InvalidRequest
from host_driver.group_quantiser import TABLE, GroupQuantiser
from host_driver.model_config import read_config
from host_driver.safetensors_file import TensorEntry, read_directory
from host_driver.weights import Checkpoint, GroupMatrix, LayerWeights, RowMatrix, TernaryMatrix, layer_shapes
from spec.config import ModelConfig

PACKED_VALUES = 4
"""Ternary values of a byte; byte row i holds the rows i, i + n/4, i + 2n/4, i + 3n/4, low bits first, each plus 1."""

HEAD_LIMIT = 121
"""Largest value that five balanced ternary digits hold."""

MIN_SCALE = 2.0**-14
"""Smallest row scale: the smallest normal FP16 number."""

FLOATS = ("F64", "F32", "F16", "BF16")

LLAMA_TYPES = ("llama", "mistral")
"""Values of model_type that mean a Llama unless the tensors are a BitNet's."""

NAMES = {
    "attn_norm": ("input_layernorm",),
    "q": ("self_attn.q_proj",),
    "k": ("self_attn.k_proj",),
    "v": ("self_attn.v_proj",),
    "attn_sub_norm": ("self_attn.attn_sub_norm", "self_attn.inner_attn_ln"),
    "o": ("self_attn.o_proj",),
    "ffn_norm": ("post_attention_layernorm",),
    "gate": ("mlp.gate_proj",),
    "up": ("mlp.up_proj",),
    "ffn_sub_norm": ("mlp.ffn_sub_norm", "mlp.ffn_layernorm"),
    "down": ("mlp.down_proj",),
}
"""Tensor names of a layer's parts, without ``model.layers.N.`` and ``.weight``; the second names are 1bitLLM's."""

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens", "lm_head", "model.norm"


def rope_pairs(values: NDArray[Any], head_dim: int) -> NDArray[Any]:
    """Rows of each head from Hugging Face's order to pairs: new row 2i = old i, new row 2i+1 = old i + head_dim/2."""
    heads = values.reshape(-1, 2, head_dim // 2, values.shape[1])
    return np.ascontiguousarray(heads.transpose(0, 2, 1, 3)).reshape(values.shape)


def unpack_ternary(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """(n/4, k) bytes to (n, k) values in {-1, 0, 1}. Raises ValueError on bits 11, which mean nothing."""
    values = np.concatenate([packed >> np.uint8(2 * part) & np.uint8(3) for part in range(PACKED_VALUES)]).view(np.int8)
    if values.size and int(values.max()) > 2:
        raise ValueError("it holds bits 11, which stand for no ternary value")
    return values - np.int8(1)


def quantise_ternary(weights: NDArray[Any]) -> TernaryMatrix:
    """BitNet's absmean quantisation of a float matrix."""
    weights = weights.astype(np.float32)
    scale = np.float32(max(float(np.abs(weights).mean(dtype=np.float64)), 1e-5))
    values = np.clip(np.rint(weights / scale), -1, 1).astype(np.int8)
    return TernaryMatrix(values=values, scale=float(scale))


def quantise_rows(weights: NDArray[Any]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """int8 in [-121, 121] and an FP16 scale a row; the values are rounded with the scale as FP16 holds it."""
    weights = weights.astype(np.float32)
    with np.errstate(over="ignore"):
        scale = np.maximum(np.abs(weights).max(axis=1) / HEAD_LIMIT, MIN_SCALE).astype(np.float16)
    if not np.isfinite(scale).all():
        raise ValueError("a row's largest value is beyond what an FP16 scale can hold")
    values = np.rint(weights / scale.astype(np.float32)[:, None])
    return np.clip(values, -HEAD_LIMIT, HEAD_LIMIT).astype(np.int8), scale


@dataclass(frozen=True, kw_only=True)
class _Folder:
    """A checkpoint folder whose headers were read."""

    path: Path
    tensors: dict[str, TensorEntry]
    model: ModelConfig
    scale_divides: bool
    """transformers' BitLinear divides by `weight_scale`; its AutoBitLinear multiplies."""
    float_llama: bool
    """A Llama with float weights, to be quantised in groups."""

    def wrong(self, name: str, what: object) -> InvalidRequest:
        return InvalidRequest(f"{self.path}: tensor {name!r}: {what}")

    def find(self, *stems: str) -> str:
        """The first of these tensors that is there, without ``.weight``."""
        for stem in stems:
            if f"{stem}.weight" in self.tensors:
                return stem
        raise InvalidRequest(f"{self.path}: tensor {stems[0] + '.weight'!r} is missing")

    def check(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> TensorEntry:
        """The entry of a tensor that must be there with this shape and one of these dtypes."""
        entry = self.tensors.get(name)
        if entry is None:
            raise InvalidRequest(f"{self.path}: tensor {name!r} is missing")
        if entry.dtype not in dtypes:
            raise self.wrong(name, f"dtype {entry.dtype} is not supported here; expected {' or '.join(dtypes)}")
        if entry.shape != shape:
            raise self.wrong(name, f"shape {list(entry.shape)} disagrees with config.json, which says {list(shape)}")
        return entry

    def floats(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Finite float32 numbers."""
        with np.errstate(over="ignore"):
            values = self.check(name, shape, FLOATS).read().astype(np.float32)
        if not np.isfinite(values).all():
            raise self.wrong(name, "it holds numbers that are not finite")
        return values

    def weight_scale(self, stem: str) -> float:
        """The scale by which ternary values are multiplied."""
        name = f"{stem}.weight_scale"
        shape = self.tensors[name].shape if name in self.tensors else ()
        scale = self.floats(name, shape if shape == () else (1,)).reshape(())
        if not scale > 0:
            raise self.wrong(name, f"a scale must be positive, not {scale}")
        return float(np.float32(1) / scale) if self.scale_divides else float(scale)

    def check_matrix(self, stem: str, shape: tuple[int, int]) -> None:
        """Header check of a matrix in one of its forms."""
        name = f"{stem}.weight"
        if self.float_llama:
            self.check(name, shape, FLOATS)
        elif name in self.tensors and self.tensors[name].dtype == "U8":
            if shape[0] % PACKED_VALUES:
                raise self.wrong(name, f"{shape[0]} rows cannot be packed four a byte")
            self.check(name, (shape[0] // PACKED_VALUES, shape[1]), ("U8",))
        else:
            self.check(name, shape, (*FLOATS, "I8"))

    def matrix(self, stem: str, shape: tuple[int, int]) -> TernaryMatrix:
        """A ternary matrix in one of its forms."""
        name = f"{stem}.weight"
        entry = self.tensors[name]
        if entry.dtype == "U8":
            try:
                return TernaryMatrix(values=unpack_ternary(entry.read()), scale=self.weight_scale(stem))
            except ValueError as error:
                raise self.wrong(name, error) from None
        has_scale = f"{stem}.weight_scale" in self.tensors
        values = entry.read() if entry.dtype == "I8" else self.floats(name, shape)
        if not has_scale and entry.dtype != "I8":
            return quantise_ternary(values)
        if not np.isin(values, (-1, 0, 1)).all():
            raise self.wrong(name, "with a weight_scale beside it, it must hold -1, 0 and 1 only")
        return TernaryMatrix(values=values.astype(np.int8), scale=self.weight_scale(stem))

    def groups(self, stem: str, shape: tuple[int, int], quantiser: GroupQuantiser, *, turned: bool = False) -> GroupMatrix:
        """A float matrix quantised in groups; ``turned``: its rows are put into RoPE pairs."""
        weights = self.floats(f"{stem}.weight", shape)
        try:
            return quantiser.quantise(rope_pairs(weights, self.model.head_dim) if turned else weights)
        except ValueError as error:
            raise self.wrong(f"{stem}.weight", error) from None

    def table(self, stem: str) -> RowMatrix:
        """Embedding or head: int8 with a scale a row, from either form."""
        name, shape = f"{stem}.weight", (self.model.vocab, self.model.hidden)
        entry = self.check(name, shape, (*FLOATS, "I8"))
        if entry.dtype != "I8":
            matrix = self.head_form(stem, self.floats(name, shape))
            return RowMatrix(values=matrix.values, scale=matrix.scale.astype(np.float32))
        scale = self.floats(f"{stem}.weight_scale", (self.model.vocab,))
        if not (scale >= 0).all():
            raise self.wrong(name, "a row's scale is negative")
        return RowMatrix(values=entry.read(), scale=scale)

    def head_form(self, stem: str, weights: NDArray[np.float32]) -> RowMatrix:
        """`quantise_rows` of a tensor."""
        try:
            values, scale = quantise_rows(weights)
            return RowMatrix(values=values, scale=scale)
        except ValueError as error:
            raise self.wrong(f"{stem}.weight", error) from None

    def head(self, stem: str) -> RowMatrix:
        """int8 in [-121, 121] and FP16 scales: as stored where that already holds, else quantised again."""
        table = self.table(stem)
        with np.errstate(over="ignore"):
            half = table.scale.astype(np.float16)
        if np.array_equal(half, table.scale) and np.abs(table.values.astype(np.int16)).max() <= HEAD_LIMIT:
            return RowMatrix(values=table.values, scale=half)
        return self.head_form(stem, table.dense())


def _open(path: Path) -> _Folder:
    """Headers and config, checked against each other; no tensor is read."""
    if not path.is_dir():
        raise InvalidRequest(f"{path}: no such model folder" if not path.exists() else f"{path}: not a model folder")
    tensors = read_directory(path)
    sub_norms = any(f"model.layers.0.{stem}.weight" in tensors for stem in NAMES["attn_sub_norm"])
    model, config = read_config(path, sub_norms=sub_norms)
    quantisation = config.get("quantization_config") or {}
    divides = isinstance(quantisation, dict) and quantisation.get("quant_method") == "bitnet"
    if divides:
        divides = quantisation.get("linear_class", "bitlinear") == "bitlinear"
    folder = _Folder(
        path=path, tensors=tensors, model=model, scale_divides=divides,
        float_llama=not sub_norms and not quantisation and _is_float_llama(config, tensors),
    )  # fmt: skip
    for layer in range(model.layers):
        for field, shape in layer_shapes(model).items():
            stem = folder.find(*(f"model.layers.{layer}.{name}" for name in NAMES[field]))
            if len(shape) == 2:
                folder.check_matrix(stem, (shape[0], shape[1]))
            else:
                folder.check(f"{stem}.weight", shape, FLOATS)
    folder.check(f"{FINAL_NORM}.weight", (model.hidden,), FLOATS)
    for stem in (EMBEDDING, HEAD):
        if stem == EMBEDDING or f"{stem}.weight" in tensors:
            folder.check(f"{stem}.weight", (model.vocab, model.hidden), (*FLOATS, "I8"))
    if f"{HEAD}.weight" not in tensors and config.get("tie_word_embeddings") is False:
        raise InvalidRequest(f"{path}: tensor {HEAD + '.weight'!r} is missing, and config.json says it is not tied")
    return folder


def _is_float_llama(config: dict[str, Any], tensors: dict[str, TensorEntry]) -> bool:
    """By the first matrix: a BitNet's is packed or has a scale beside it."""
    stem = f"model.layers.0.{NAMES['q'][0]}"
    first = tensors.get(f"{stem}.weight")
    floats = first is not None and first.dtype in FLOATS and f"{stem}.weight_scale" not in tensors
    return floats and config.get("model_type") in LLAMA_TYPES


def _layer(folder: _Folder, layer: int, quantiser: GroupQuantiser) -> LayerWeights:
    model = folder.model
    parts: dict[str, Any] = {"attn_sub_norm": None, "ffn_sub_norm": None}
    for field, shape in layer_shapes(model).items():
        stem = folder.find(*(f"model.layers.{layer}.{name}" for name in NAMES[field]))
        if len(shape) == 1:
            parts[field] = folder.floats(f"{stem}.weight", shape)
            continue
        if folder.float_llama:
            parts[field] = folder.groups(stem, (shape[0], shape[1]), quantiser, turned=field in ("q", "k"))
            continue
        matrix = folder.matrix(stem, (shape[0], shape[1]))
        if field in ("q", "k"):
            matrix = TernaryMatrix(values=rope_pairs(matrix.values, model.head_dim), scale=matrix.scale)
        parts[field] = matrix
    return LayerWeights(**parts)


def read_model_config(path: Path) -> ModelConfig:
    """The dimensions of a checkpoint folder; all headers are checked, no weight is read."""
    return _open(path).model


def is_float_llama(path: Path) -> bool:
    """Whether a checkpoint folder's weights are floats that are quantised in groups when they are read."""
    return _open(path).float_llama


def _tables(folder: _Folder) -> tuple[RowMatrix | GroupMatrix, RowMatrix | GroupMatrix]:
    """Embedding and head; a Llama's are the same object where they are tied."""
    stem = HEAD if f"{HEAD}.weight" in folder.tensors else EMBEDDING
    if not folder.float_llama:
        return folder.table(EMBEDDING), folder.head(stem)
    shape = (folder.model.vocab, folder.model.hidden)
    embedding = folder.groups(EMBEDDING, shape, TABLE)
    return embedding, embedding if stem == EMBEDDING else folder.groups(stem, shape, TABLE)


def load_checkpoint(path: Path, quantiser: GroupQuantiser | None = None) -> Checkpoint:
    """A checkpoint folder as the accelerator takes it. Raises InvalidRequest with one line on anything wrong.

    ``quantiser``: of a Llama's float weights.
    """
    folder = _open(path)
    groups = GroupQuantiser() if quantiser is None else quantiser
    embedding, head = _tables(folder)
    return Checkpoint(
        config=folder.model,
        layers=tuple(_layer(folder, layer, groups) for layer in range(folder.model.layers)),
        final_norm=folder.floats(f"{FINAL_NORM}.weight", (folder.model.hidden,)),
        embedding=embedding,
        head=head,
    )
