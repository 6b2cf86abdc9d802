"""Writes small random Llamas as GGUF files, by llama.cpp's own writer and quantiser, and as Hugging Face folders."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers

from cosim.checkpoint_folder import STEMS, byte_tokenizer, config_json, half_split_rows
from cosim.random_model import TINY_GROUPED
from host_driver.weights import layer_shapes
from spec.config import ModelConfig

Tensors = dict[str, NDArray[np.float32]]

TINY_CHAT = replace(TINY_GROUPED, name="tiny-chat-random", vocab=262, eos_ids=(258,))
"""With room for every byte and the tokens of `TOKENS`."""

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL, "he", "ll", "hell"]
MERGES = ["h e", "l l", "he ll"]

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

GGUF_STEMS = {
    "attn_norm": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "ffn_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


def random_llama(model: ModelConfig, seed: int = 0, *, tied: bool = True) -> Tensors:
    """Float tensors by field name (``0.q``), ``embedding``, ``final_norm`` and, if not tied, ``head``; RoPE pairs (2i, 2i+1)."""
    rng = np.random.default_rng(seed)

    def values(shape: tuple[int, ...]) -> NDArray[np.float32]:
        numbers = rng.uniform(0.5, 1.5, shape) if len(shape) == 1 else rng.normal(0, 1.5 / np.sqrt(shape[1]), shape)
        return numbers.astype(np.float32)

    tensors = {
        f"{layer}.{field}": values(shape) for layer in range(model.layers) for field, shape in layer_shapes(model).items()
    }
    tensors["embedding"] = values((model.vocab, model.hidden))
    tensors["final_norm"] = values((model.hidden,))
    if not tied:
        tensors["head"] = values((model.vocab, model.hidden))
    return tensors


def gguf_name(name: str) -> str:
    """The tensor's name in a GGUF file."""
    ends = {"embedding": "token_embd.weight", "head": "output.weight", "final_norm": "output_norm.weight"}
    if name in ends:
        return ends[name]
    layer, field = name.split(".")
    return f"blk.{layer}.{GGUF_STEMS[field]}.weight"


def metadata(model: ModelConfig) -> dict[str, Any]:
    """Keys and values of a Llama with the small tokenizer."""
    return {
        "llama.context_length": model.max_positions,
        "llama.embedding_length": model.hidden,
        "llama.block_count": model.layers,
        "llama.feed_forward_length": model.ffn,
        "llama.attention.head_count": model.heads,
        "llama.attention.head_count_kv": model.kv_heads,
        "llama.rope.freq_base": float(model.rope_theta),
        "llama.rope.dimension_count": model.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(model.rms_eps),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in TOKENS],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }


def write_gguf(
    file: Path,
    model: ModelConfig,
    tensors: Tensors,
    *,
    kinds: Mapping[str, Kind] | None = None,
    default: Kind = Kind.F32,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """A file with these tensors; ``kinds`` by tensor name, ``changes`` of the metadata (None: left out). Norms are F32."""
    writer = gguf.GGUFWriter(file, "llama")
    for key, value in (metadata(model) | dict(changes or {})).items():
        if value is None:
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    for name, values in tensors.items():
        kind = Kind.F32 if values.ndim == 1 else (kinds or {}).get(name, default)
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_llama_folder(folder: Path, model: ModelConfig, tensors: Tensors, *, dtype: Any = np.float32) -> Path:
    """The same model as a Hugging Face folder with float weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_json(model) | {"model_type": "llama", "tie_word_embeddings": "head" not in tensors}
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    names = {"embedding": "model.embed_tokens", "head": "lm_head", "final_norm": "model.norm"}
    stored = {}
    for name, values in tensors.items():
        layer, _, field = name.partition(".")
        stem = f"model.layers.{layer}.{STEMS[field]}" if field else names[name]
        rows = half_split_rows(values, model.head_dim) if field in ("q", "k") else values  # pyright: ignore[reportArgumentType]
        stored[f"{stem}.weight"] = np.ascontiguousarray(rows, dtype=dtype)
    save_file(stored, folder / "model.safetensors")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder
