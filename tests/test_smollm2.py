"""SmolLM2-135M on simulated RTL, prefill and decode: every token and logit equal to golden, with each group engine.

The reference prompts (see cosim/reference_data.py) are slow; without them that test is not collected.
"""

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cosim.reference_data import REFERENCE
from golden.model import GoldenModel
from host_driver.device import Device
from host_driver.image import compile_checkpoint, memory_image
from host_driver.model_source import open_model
from host_driver.session import tiles
from host_driver.transport import open_device
from host_driver.weights import Checkpoint
from spec.presets import PRESETS

pytestmark = pytest.mark.cosim

NEW_TOKENS = 32
FIRST_IDS = (504, 2365, 282, 4649, 314, 253, 3575, 282, 1123, 284, 253, 2365, 28, 527, 665, 436, 1194, 351)
"""Any tokens: a tile of 16, and two more."""

SLOTS = 112
ENGINES = ("wide", "wide_mixpe", "wide_multiplier")


@cache
def checkpoint() -> Checkpoint:
    return open_model("smollm2").load()


@cache
def golden() -> GoldenModel:
    torch.set_num_threads(1)
    return GoldenModel(checkpoint(), SLOTS)


@cache
def judged(prompt: tuple[int, ...], new_tokens: int) -> list[NDArray[np.uint32]]:
    """Golden's logits, as bits, after the prompt and after each of its greedy tokens; once for all engines."""
    logits = golden().step(list(prompt), 0)[0]
    kept = [logits]
    for position in range(len(prompt), len(prompt) + new_tokens - 1):
        logits = golden().step([int(logits.argmax())], position)[0]
        kept.append(logits)
    return [values.numpy().view(np.uint32) for values in kept]


@cache
def device(preset: str) -> Device:
    compiled = compile_checkpoint(checkpoint(), PRESETS[preset], slots=SLOTS)
    opened = Device(open_device("rtl", preset, compiled.memory.limit), PRESETS[preset])
    opened.load(compiled, memory_image(compiled, checkpoint()))
    return opened


def prompts() -> list[dict[str, Any]]:
    file = REFERENCE / "smollm2_f32.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def check(preset: str, ids: tuple[int, ...], new_tokens: int) -> None:
    """The prompt in tiles, then greedy tokens: all ids and logits."""
    under_test = device(preset)
    result = None
    for position, tile, last in tiles(ids, under_test.compiled.tile):
        result = under_test.run_step(tile, position, head=last, logits=last)
    for position, want in enumerate(judged(ids, new_tokens), start=len(ids)):
        assert result is not None and result.logits is not None
        np.testing.assert_array_equal(result.logits.view(np.uint32), want)
        assert result.tokens == (int(want.view(np.float32).argmax()),)
        if position < len(ids) + new_tokens - 1:
            result = under_test.run_step(result.tokens, position, head=True, logits=True)


def test_first_tokens_are_golden() -> None:
    """In every run of the tests."""
    check("wide", FIRST_IDS, 3)


if prompts():

    @pytest.mark.slow
    @pytest.mark.parametrize("prompt", prompts(), ids=lambda entry: entry["name"])
    @pytest.mark.parametrize("preset", ENGINES)
    def test_tokens_and_logits_are_golden(preset: str, prompt: dict[str, Any]) -> None:
        check(preset, tuple(prompt["prompt_ids"]), NEW_TOKENS)
