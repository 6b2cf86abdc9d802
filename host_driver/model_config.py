"""Hugging Face's config.json to `ModelConfig`: what we support is checked, what we do not is refused by name."""

from pathlib import Path
from typing import Any

from host_driver.errors import InvalidRequest
from host_driver.safetensors_file import read_json
from spec.config import Activation, ModelConfig

ACTIVATIONS = {"silu": Activation.SILU, "swish": Activation.SILU, "relu2": Activation.RELU2}

MODEL_TYPES = ("bitnet", "llama", "mistral")
"""Families of the BitNet shape; 1bitLLM's BitNet checkpoints call themselves llama."""


def _number(config: dict[str, Any], file: Path, key: str, default: float | None = None) -> Any:
    """A positive number of the config."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise InvalidRequest(f"{file}: {key} must be a positive number, not {value!r}")
    return value


def _whole(config: dict[str, Any], file: Path, key: str, default: int | None = None) -> int:
    value = _number(config, file, key, default)
    if value != int(value) or value >= 1 << 32:
        raise InvalidRequest(f"{file}: {key} must be a whole number below 2^32, not {value!r}")
    return int(value)


def _rope_theta(config: dict[str, Any], file: Path) -> float:
    """Base of RoPE, from the new or the old place. Any scaling of positions is refused."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise InvalidRequest(f"{file}: rope_parameters must be an object, not {parameters!r}")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise InvalidRequest(f"{file}: RoPE of type {kind!r} is not supported, only 'default'")
    default = 500_000.0 if config.get("model_type") == "bitnet" else 10_000.0
    source = parameters if "rope_theta" in parameters else config
    return float(_number(source, file, "rope_theta", default))


def _token_ids(value: object, file: Path, key: str) -> tuple[int, ...]:
    listed = value if isinstance(value, list) else [] if value is None else [value]
    ids = tuple(token for token in listed if type(token) is int and token >= 0)
    if len(ids) != len(listed):
        raise InvalidRequest(f"{file}: {key} must be a token id or a list of them, not {value!r}")
    return ids


def read_config(folder: Path, *, sub_norms: bool) -> tuple[ModelConfig, dict[str, Any]]:
    """The dimensions, and config.json itself. ``sub_norms``: whether the checkpoint has them."""
    file = folder / "config.json"
    config = read_json(file)
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise InvalidRequest(f"{file}: model_type {model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
    activation = config.get("hidden_act", "relu2" if model_type == "bitnet" else "silu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise InvalidRequest(f"{file}: hidden_act {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise InvalidRequest(f"{file}: {key} is not supported")
    hidden, heads = _whole(config, file, "hidden_size"), _whole(config, file, "num_attention_heads")
    bos = _token_ids(config.get("bos_token_id"), file, "bos_token_id")
    try:
        model = ModelConfig(
            name=folder.resolve().name,
            vocab=_whole(config, file, "vocab_size"),
            hidden=hidden,
            layers=_whole(config, file, "num_hidden_layers"),
            heads=heads,
            kv_heads=_whole(config, file, "num_key_value_heads", heads),
            head_dim=_whole(config, file, "head_dim", max(hidden // heads, 1)),
            ffn=_whole(config, file, "intermediate_size"),
            max_positions=_whole(config, file, "max_position_embeddings", 2048),
            activation=ACTIVATIONS[activation],
            sub_norms=sub_norms,
            rope_theta=_rope_theta(config, file),
            rms_eps=float(_number(config, file, "rms_norm_eps", 1e-5)),
            bos_id=bos[0] if bos else None,
            eos_ids=_token_ids(config.get("eos_token_id"), file, "eos_token_id"),
        )
    except ValueError as error:
        raise InvalidRequest(f"{file}: {error}") from None
    return model, config
