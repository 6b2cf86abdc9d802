"""Does this model fit that build? Every limit with both numbers, before anything is packed."""

from host_driver.errors import InvalidRequest
from host_driver.memory_map import vector_map
from spec.config import K_GROUP, KEY_BLOCK, LANES, AcceleratorConfig, ModelConfig, ceil_div
from spec.layout import embed_row_bytes
from spec.presets import PRESETS


def _limits(model: ModelConfig, build: AcceleratorConfig) -> list[tuple[str, int, str, int]]:
    """(what the model needs, how much, what the preset has, how much)."""
    attention, matmul = build.attention, build.matmul
    gamma_beats = ceil_div(4 * max(model.hidden, model.q_dim, model.ffn), build.bus.weight_bytes)
    return [
        ("hidden", model.hidden, "max_k", matmul.max_k),
        ("q_dim", model.q_dim, "max_k", matmul.max_k),
        ("ffn", model.ffn, "max_k", matmul.max_k),
        ("hidden", model.hidden, "max_vector", build.max_vector),
        ("q_dim", model.q_dim, "max_vector", build.max_vector),
        ("ffn", model.ffn, "max_vector", build.max_vector),
        ("head_dim", model.head_dim, "max_head_dim", attention.max_head_dim),
        ("q_dim", model.q_dim, "max_q_dim", attention.max_q_dim),
        ("query heads a KV head", model.group, "max_rows", attention.max_rows),
        ("vector rows for one token", vector_map(model, 1).rows, "vector_rows", build.vector_rows),
        ("beats of norm weights", gamma_beats, "aux_beats", build.aux_beats),
        ("head_dim (rows of one operation)", model.head_dim, "max_n", matmul.max_n(1)),
    ]


def _multiples(model: ModelConfig, build: AcceleratorConfig) -> list[tuple[str, int, str, int]]:
    """(what of the model, how much, of what of the preset it must be a multiple, how much)."""
    lengths = [("hidden", model.hidden), ("q_dim", model.q_dim), ("ffn", model.ffn)] if build.grouped else []
    return [
        *((name, length, "the weight group", K_GROUP) for name, length in lengths),
        ("head_dim", model.head_dim, "attention lanes", build.attention.lanes),
        ("head_dim", model.head_dim, "bytes of the data port", build.bus.data_bytes),
        ("embedding row", embed_row_bytes(model.hidden, grouped=build.grouped), "bytes of the data port", build.bus.data_bytes),
    ]


def check_fit(model: ModelConfig, build: AcceleratorConfig) -> None:
    """Raises InvalidRequest naming the first limit that the model exceeds."""
    for what, needed, limit_name, limit in _limits(model, build):
        if needed > limit:
            raise InvalidRequest(
                f"model {model.name!r} is too large for preset {build.name!r}: {what} {needed} > {limit_name} {limit}"
            )
    for what, value, unit_name, unit in _multiples(model, build):
        if value % unit:
            raise InvalidRequest(
                f"model {model.name!r} does not fit preset {build.name!r}: "
                f"{what} {value} is not a multiple of {unit_name} ({unit})"
            )


def check_channels(model: ModelConfig, build: AcceleratorConfig) -> None:
    """Raises InvalidRequest if the build has no key channels, or too few for the model."""
    if model.q_dim > build.max_channels:
        fitting = ", ".join(preset.name for preset in PRESETS.values() if preset.max_channels >= model.q_dim) or "none"
        raise InvalidRequest(
            f"model {model.name!r} needs {model.q_dim} key channels, preset {build.name!r} has {build.max_channels}; "
            f"presets with as many: {fitting}"
        )


def tile_tokens(model: ModelConfig, build: AcceleratorConfig) -> int:
    """Tokens of a prefill tile: the build's, or as many as the model's vectors, query rows and heads leave room for."""
    vector = build.vector_rows // vector_map(model, 1).rows
    rows = build.attention.max_rows // model.group
    tokens = min(build.matmul.tokens, vector, rows)
    while tokens > 1 and build.matmul.max_n(tokens) < max(model.head_dim, LANES):
        tokens -= 1
    return tokens


def cache_slots(model: ModelConfig, requested: int | None) -> int:
    """Slots of the KV cache: the request, at most the model's positions, rounded up to a block of 16 keys."""
    if requested is not None and requested < 1:
        raise InvalidRequest(f"the KV cache needs at least 1 slot, not {requested}")
    wanted = model.max_positions if requested is None else min(requested, model.max_positions)
    return ceil_div(wanted, KEY_BLOCK) * KEY_BLOCK
