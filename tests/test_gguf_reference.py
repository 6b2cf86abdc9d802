"""SmolLM2 against llama.cpp: the imported file's float meaning gives its logits, the tokenizer its ids.

Needs the reference files (see cosim/reference_data.py), which llama.cpp made from the same GGUF file in float32. Without
them nothing here is collected.
"""

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from cosim.reference_data import REFERENCE
from golden.model import FloatModel
from host_driver.chat_template import ChatTemplate
from host_driver.model_source import ModelSource, open_model

__test__ = REFERENCE.is_dir()

LOGIT_BOUND = 1e-4
"""Largest difference of a logit (measured: 7e-5): two float32 programs with other orders of sums; logits reach 32."""

ANCHORED = ("p02_once", "c01_hi")


@cache
def source() -> ModelSource:
    return open_model("smollm2")


def reference(name: str) -> list[dict[str, Any]]:
    return json.loads((REFERENCE / name).read_text(encoding="utf-8"))


@cache
def model() -> FloatModel:
    return FloatModel(source().load(), dtype=torch.float32)


@pytest.mark.parametrize("name", ANCHORED)
def test_float_meaning_gives_the_reference_logits(name: str) -> None:
    torch.set_num_threads(1)
    entry = next(entry for entry in reference("smollm2_f32.json") if entry["name"] == name)
    wanted = np.load(REFERENCE / "smollm2_f32_last_logits.npz")[name]
    prompt = entry["prompt_ids"]
    logits = model().logits(prompt + entry["greedy_ids"])[len(prompt) - 1 :].numpy()
    assert wanted.shape == logits[0].shape
    assert np.abs(logits[0] - wanted).max() < LOGIT_BOUND
    for step, (values, top) in enumerate(zip(logits, entry["top10"], strict=False)):
        assert int(values.argmax()) == top["ids"][0] == entry["greedy_ids"][step], step
        assert np.abs(values[top["ids"]] - top["logits"]).max() < LOGIT_BOUND, step


def test_token_ids_are_llama_cpps() -> None:
    tokenizer = source().tokenizer()
    vectors = reference("tokenizer_vectors.json")
    assert len(vectors) > 50
    for vector in vectors:
        assert tokenizer.encode(vector["text"]) == vector["ids"], vector["text"]
        assert tokenizer.decode(vector["ids"], special=True) == vector["text"]
    for name in ("smollm2_f32.json", "smollm2_w4a8_llamacpp.json"):
        for entry in reference(name):
            assert tokenizer.encode(entry["prompt"]) == entry["prompt_ids"]
            assert tokenizer.decode(entry["greedy_ids"], special=True) == entry["greedy_text"]
    ids = reference("perplexity_austen_ids.json")
    text = (REFERENCE / "perplexity_austen.txt").read_text(encoding="utf-8")
    assert tokenizer.encode(text)[: len(ids)] == ids


def test_chat_template_gives_the_reference_prompts() -> None:
    template: ChatTemplate = source().chat_template()
    prompts = {entry["name"]: entry["prompt"] for entry in reference("smollm2_f32.json") if entry["kind"] == "chat"}
    assert template.render([{"role": "user", "content": "Hi"}], prompt=True) == prompts["c01_hi"]
    pirate = [
        {"role": "system", "content": "You are a grumpy pirate who answers every question briefly."},
        {"role": "user", "content": "Explain in two sentences why the sky is blue."},
    ]
    assert template.render(pirate, prompt=True) == prompts["c05_pirate"]
