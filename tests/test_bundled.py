"""The bundled model on preset `sim`: token ids and all logits of RTL and golden, bit for bit, with and without stalls."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from cosim.random_model import TINY, random_checkpoint
from golden.model import GoldenModel
from host_driver.checkpoint import load_checkpoint
from host_driver.device import Device
from host_driver.image import compile_checkpoint, memory_image
from host_driver.tokenizer import TextTokenizer
from host_driver.transport import open_device
from host_driver.weights import Checkpoint
from spec.presets import SIM, TEST

pytestmark = pytest.mark.cosim
MODEL = Path(__file__).resolve().parent.parent / "models" / "austen"
TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. "
    "However little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is so "
    "well fixed in the minds of the surrounding families, that he is considered the rightful property of some one or other of "
    "their daughters. My dear Mr. Bennet, said his lady to him one day, have you heard that Netherfield Park is let at last? "
)
NEW_TOKENS = 64
SLOTS = 256
PROMPTS = {"one token": 1, "about twenty": 20, "two tiles and a rest": 2 * SIM.matmul.tokens + 3, "to the last slot": SLOTS - 5}
STALLED = {"stall_probability": 0.2, "stall_seed": 11}


@cache
def checkpoint() -> Checkpoint:
    return load_checkpoint(MODEL)


def prompt_ids(length: int) -> list[int]:
    tokenizer = TextTokenizer.from_folder(MODEL, bos_id=None, vocab=checkpoint().config.vocab)
    ids = tokenizer.encode(TEXT * (1 + length // 80))
    assert len(ids) >= length
    return ids[:length]


@cache
def golden_run(length: int) -> tuple[list[int], np.ndarray]:
    """Greedy ids, and the logits of every step, of the golden model."""
    model = GoldenModel(checkpoint(), SLOTS)
    ids = prompt_ids(length)
    tile = SIM.matmul.tokens
    logits = None
    for position in range(0, length, tile):
        logits = model.step(ids[position : position + tile], position)
    assert logits is not None
    tokens, rows = [int(logits.argmax())], [logits[0].numpy()]
    while len(tokens) < NEW_TOKENS and length + len(tokens) <= SLOTS:
        logits = model.step([tokens[-1]], length + len(tokens) - 1)
        tokens.append(int(logits.argmax()))
        rows.append(logits[0].numpy())
    return tokens, np.stack(rows)


@pytest.mark.parametrize("options", [{}, STALLED], ids=["quiet", "stalled"])
@pytest.mark.parametrize("length", PROMPTS.values(), ids=PROMPTS.keys())
def test_ids_and_logits_are_equal(length: int, options: dict[str, float]) -> None:
    compiled = compile_checkpoint(checkpoint(), SIM, slots=SLOTS)
    assert compiled.slots == SLOTS
    device = Device(open_device("rtl", "sim", compiled.memory.limit, **options), SIM)
    device.load(compiled, memory_image(compiled, checkpoint()))
    expected_ids, expected_logits = golden_run(length)
    ids = prompt_ids(length)
    result = None
    for position in range(0, length, compiled.tile):
        tile = ids[position : position + compiled.tile]
        result = device.run_step(tile, position, head=position + compiled.tile >= length, logits=True)
    tokens: list[int] = []
    while True:
        assert result is not None and result.logits is not None
        row = len(tokens)
        np.testing.assert_array_equal(result.logits.view(np.uint32), expected_logits[row].view(np.uint32))
        tokens.append(result.tokens[-1])
        if len(tokens) == len(expected_ids):
            break
        result = device.run_step([tokens[-1]], length + row, head=True, logits=True)
    assert tokens == expected_ids
    assert len(tokens) == (NEW_TOKENS if length + NEW_TOKENS <= SLOTS else SLOTS - length + 1)


def test_builds_live_side_by_side() -> None:
    """Devices of two presets in one process, whose libraries have the same symbol names, do not disturb each other."""
    tiny = random_checkpoint(TINY, seed=3)
    devices = []
    for preset, weights in ((SIM, checkpoint()), (TEST, tiny), (SIM, checkpoint())):
        compiled = compile_checkpoint(weights, preset, slots=16)
        device = Device(open_device("rtl", preset.name, compiled.memory.limit), preset)
        device.load(compiled, memory_image(compiled, weights))
        devices.append((device, GoldenModel(weights, compiled.slots)))
    for device, golden in devices:
        result = device.run_step([1, 2], 0, head=True, logits=True)
        assert result.logits is not None
        expected = golden.step([1, 2], 0)[0].numpy()
        np.testing.assert_array_equal(result.logits.view(np.uint32), expected.view(np.uint32))
