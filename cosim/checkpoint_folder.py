"""Writes checkpoints as Hugging Face folders, for tests and benchmarks of everything that starts from files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from host_driver.weights import Checkpoint, GroupMatrix, LayerWeights, RowMatrix, TernaryMatrix
from spec.config import ModelConfig

Tensors = dict[str, NDArray[Any]]

STEMS = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
    "down": "mlp.down_proj",
}


def config_json(model: ModelConfig) -> dict[str, Any]:
    """config.json of packed weights."""
    return {
        "model_type": "bitnet",
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn,
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": model.rms_eps,
        "rope_theta": model.rope_theta,
        "hidden_act": model.activation.value,
        "tie_word_embeddings": False,
        "bos_token_id": model.bos_id,
        "eos_token_id": list(model.eos_ids),
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
        },
    }


def half_split_rows(values: NDArray[np.int8], head_dim: int) -> NDArray[np.int8]:
    """Rows of each head from RoPE pairs (2i, 2i+1) to Hugging Face's pairs (i, i + head_dim/2)."""
    rows = [
        head * head_dim + 2 * pair + half
        for head in range(len(values) // head_dim)
        for half in (0, 1)
        for pair in range(head_dim // 2)
    ]
    return values[rows]


def pack_ternary(values: NDArray[np.int8]) -> NDArray[np.uint8]:
    """(n, k) to (n/4, k): byte row i holds rows i, i + n/4, i + 2n/4, i + 3n/4, low bits first, each plus 1."""
    parts = np.split((values + 1).astype(np.uint8), 4)
    packed = np.zeros_like(parts[0])
    for number, part in enumerate(parts):
        packed |= part << np.uint8(2 * number)
    return packed


def layer_tensors(layer: LayerWeights, prefix: str, head_dim: int, *, packed: bool) -> Tensors:
    """Tensors of a layer: matrices packed with a scale, or as floats whose absmean quantisation gives them back."""
    tensors: Tensors = {}
    for field, stem in STEMS.items():
        part = getattr(layer, field)
        if part is None:
            continue
        if not isinstance(part, TernaryMatrix):
            tensors[f"{prefix}{stem}.weight"] = part
            continue
        values = half_split_rows(part.values, head_dim) if field in ("q", "k") else part.values
        if packed:
            tensors[f"{prefix}{stem}.weight"] = pack_ternary(values)
            tensors[f"{prefix}{stem}.weight_scale"] = np.array([part.scale], dtype=np.float32)
        else:
            tensors[f"{prefix}{stem}.weight"] = values.astype(np.float32) * np.float32(part.scale)
    return tensors


def row_matrix(matrix: RowMatrix | GroupMatrix) -> RowMatrix:
    """An embedding or head that the folder can hold."""
    if not isinstance(matrix, RowMatrix):
        raise ValueError("a BitNet folder holds embedding and head with a scale a row, not a scale a group")
    return matrix


def checkpoint_tensors(checkpoint: Checkpoint, *, packed: bool = True) -> Tensors:
    """All tensors by their Hugging Face names; embedding and head as int8 with a scale a row."""
    embedding, head = row_matrix(checkpoint.embedding), row_matrix(checkpoint.head)
    tensors: Tensors = {
        "model.embed_tokens.weight": embedding.values,
        "model.embed_tokens.weight_scale": embedding.scale,
        "lm_head.weight": head.values,
        "lm_head.weight_scale": head.scale,
        "model.norm.weight": checkpoint.final_norm,
    }
    for index, layer in enumerate(checkpoint.layers):
        tensors |= layer_tensors(layer, f"model.layers.{index}.", checkpoint.config.head_dim, packed=packed)
    return tensors


def byte_tokenizer() -> Tokenizer:
    """One token a byte: 256 ids, so that any text can be encoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_folder(folder: Path, checkpoint: Checkpoint, *, tensors: Tensors | None = None) -> Path:
    """config.json, model.safetensors and a byte tokenizer; ``tensors`` instead of the packed ones."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(checkpoint.config)))
    contents = checkpoint_tensors(checkpoint) if tensors is None else tensors
    save_file({name: np.ascontiguousarray(values) for name, values in contents.items()}, folder / "model.safetensors")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder
