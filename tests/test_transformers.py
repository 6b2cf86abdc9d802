"""An outside anchor: the float meaning of a checkpoint is what Hugging Face's own classes compute, in float64."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BitNetConfig, BitNetForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from cosim.checkpoint_folder import STEMS, config_json, half_split_rows
from cosim.random_model import TINY, TINY_GROUPED, random_checkpoint, random_group_checkpoint
from golden.linear import dense
from golden.model import FloatModel
from host_driver.weights import Checkpoint
from spec.config import Activation, ModelConfig

SQUARE = replace(TINY, hidden=96, heads=4, kv_heads=2)
"""Hugging Face's BitNet has as many attention outputs as hidden values."""

IDS = [3, 200, 17, 5, 5, 150, 99, 0, 31]


def dimensions(model: ModelConfig) -> dict[str, Any]:
    """What config.json says, where these classes know it: plain float weights, RoPE's base in its new place."""
    config = config_json(model)
    del config["model_type"], config["quantization_config"]
    rope = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    return config | {"rope_parameters": rope, "pad_token_id": None, "eos_token_id": None}


def with_weights(network: PreTrainedModel, checkpoint: Checkpoint) -> PreTrainedModel:
    """The same numbers under Hugging Face's names; query and key rows in its order of RoPE pairs."""
    state = {
        "model.embed_tokens.weight": dense(checkpoint.embedding),
        "lm_head.weight": dense(checkpoint.head),
        "model.norm.weight": torch.from_numpy(checkpoint.final_norm),
    }
    for index, layer in enumerate(checkpoint.layers):
        for field, stem in STEMS.items():
            part = getattr(layer, field)
            if part is None:
                continue
            values = part if isinstance(part, np.ndarray) else dense(part).numpy()
            if field in ("q", "k"):
                values = half_split_rows(values, checkpoint.config.head_dim)
            state[f"model.layers.{index}.{stem}.weight"] = torch.from_numpy(np.ascontiguousarray(values))
    network = network.double().eval()
    network.load_state_dict({name: value.double() for name, value in state.items()})
    return network


@pytest.mark.parametrize(
    ("checkpoint", "config", "network"),
    [
        (random_checkpoint(replace(SQUARE, activation=Activation.RELU2), seed=1), BitNetConfig, BitNetForCausalLM),
        (random_checkpoint(SQUARE, seed=2), BitNetConfig, BitNetForCausalLM),
        (random_group_checkpoint(TINY_GROUPED, seed=3), LlamaConfig, LlamaForCausalLM),
    ],
    ids=["bitnet-relu2", "bitnet-silu", "llama"],
)
def test_float_model_is_that_of_transformers(
    checkpoint: Checkpoint, config: type[PreTrainedConfig], network: type[PreTrainedModel]
) -> None:
    judge = with_weights(network(config(**dimensions(checkpoint.config))), checkpoint)
    with torch.no_grad():
        want = judge(torch.tensor([IDS])).logits[0]
    got = FloatModel(checkpoint).logits(IDS)
    # both compute in float64, except for RoPE's angles, of which each rounds something to float32
    assert float((got - want).abs().max()) < 2e-5 * float(want.abs().max())
