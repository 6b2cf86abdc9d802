"""The whole device with group engines: RTL against golden, from prompt to logits."""

import random

import numpy as np
import pytest

from cosim.random_model import TINY_GROUPED, random_channels, random_group_checkpoint
from golden.model import GoldenModel
from host_driver.device import Device
from host_driver.image import compile_checkpoint, memory_image
from host_driver.key_channels import KeyChannels
from host_driver.transport import open_device
from spec.config import KvFormat
from spec.presets import PRESETS

pytestmark = pytest.mark.cosim


def check_generation(
    preset: str, bits: int, stalls: float, rng: random.Random, kv: KvFormat = KvFormat.INT8, keys: KeyChannels | None = None
) -> None:
    """Two tiles and a rest, then greedy tokens; token ids and all logits equal to the bit."""
    checkpoint = random_group_checkpoint(TINY_GROUPED, seed=bits, bits=bits)
    config = PRESETS[preset]
    compiled = compile_checkpoint(checkpoint, config, slots=32, kv=kv, keys=keys)
    device = Device(open_device("rtl", preset, compiled.memory.limit, stall_probability=stalls), config)
    device.load(compiled, memory_image(compiled, checkpoint))
    golden = GoldenModel(checkpoint, compiled.slots, kv, keys)
    prompt = [rng.randrange(TINY_GROUPED.vocab) for _ in range(2 * compiled.tile + 1)]
    steps = [(prompt[at : at + compiled.tile], at) for at in range(0, len(prompt), compiled.tile)]
    token = 0
    for position in range(len(prompt), len(prompt) + 5):
        while steps:
            ids, at = steps.pop(0)
            result = device.run_step(ids, at, head=not steps, logits=not steps)
            want = golden.step(ids, at)[0]
        assert result.logits is not None
        np.testing.assert_array_equal(result.logits.view(np.uint32), want.numpy().view(np.uint32))
        token = int(want.argmax())
        assert result.tokens == (token,)
        steps = [([token], position)]


@pytest.mark.parametrize("stalls", [0.0, 0.3], ids=["free", "stalled"])
@pytest.mark.parametrize(
    ("preset", "bits"),
    [
        ("test_lut", 4), ("test_lut", 2), ("test_lut", 1), ("test_mixpe", 4),
        pytest.param("test_multiplier", 8, marks=pytest.mark.slow),  # a third device to build
    ],
)
def test_logits_are_golden(preset: str, bits: int, stalls: float, rng: random.Random) -> None:
    check_generation(preset, bits, stalls, rng)


@pytest.mark.parametrize("kv", [kv for kv in KvFormat if kv is not KvFormat.INT8])
@pytest.mark.parametrize("stalls", [0.0, 0.3], ids=["free", "stalled"])
def test_smaller_cache_formats(kv: KvFormat, stalls: float, rng: random.Random) -> None:
    check_generation("test_lut", 4, stalls, rng, kv)


@pytest.mark.parametrize("kv", [KvFormat.INT8, KvFormat.INT4])
@pytest.mark.parametrize("stalls", [0.0, 0.3], ids=["free", "stalled"])
def test_key_channels(kv: KvFormat, stalls: float, rng: random.Random, numbers: np.random.Generator) -> None:
    """Offsets and shifts of every size; the words come between the matrices of the stream."""
    check_generation("test_lut", 4, stalls, rng, kv, random_channels(TINY_GROUPED, numbers, shift=9))
