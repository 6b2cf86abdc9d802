"""Key channels: found on a device, kept in a file, applied behind RoPE; what they leave as it was and what they mend."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from cosim.gguf_checkpoint import TINY_CHAT, random_llama, write_gguf
from cosim.random_model import TINY_GROUPED, random_channels, random_group_checkpoint
from golden import epilogue
from golden.layout import unpack_channels
from golden.model import FloatModel, GoldenModel
from host_driver import cli
from host_driver.calibrate import calibrate
from host_driver.compiler import STEP, compile_model
from host_driver.device import Device
from host_driver.errors import InvalidRequest
from host_driver.image import compile_checkpoint, memory_image
from host_driver.key_channels import channels_of, load_channels
from host_driver.transport import open_device
from spec.config import KvFormat
from spec.descriptors import Epilogue, Opcode
from spec.layout import SegmentKind
from spec.presets import TEST_LUT, WIDE

SHAPE = (TINY_GROUPED.layers, TINY_GROUPED.kv_heads, TINY_GROUPED.head_dim)


# 1. what they are


def test_words_are_unpacked_as_they_were_packed(numbers: np.random.Generator) -> None:
    channels = random_channels(TINY_GROUPED, numbers, shift=6)
    for layer in range(SHAPE[0]):
        words = torch.from_numpy(channels.k_words(layer).astype(np.int64)).reshape(SHAPE[1:])
        offset, shift = unpack_channels(words)
        assert torch.equal(offset, torch.from_numpy(channels.offset[layer]).float())
        assert torch.equal(shift, torch.from_numpy(channels.shift[layer]).long())
        words = torch.from_numpy(channels.q_words(layer, 3).astype(np.int64)).reshape(3 * SHAPE[1], -1)
        offset, shift = unpack_channels(words)
        assert not offset.any()
        assert torch.equal(shift, -torch.from_numpy(channels.shift[layer]).long().repeat_interleave(3, 0))


def test_scores_of_a_query_move_together(numbers: np.random.Generator, generator: torch.Generator) -> None:
    """q . k in float64 from golden's channels: the same as before but for one number a query, which softmax does not see."""
    q, k = (torch.randn(40, 2, 24, generator=generator) for _ in range(2))
    offset = torch.from_numpy(numbers.normal(0, 5, (2, 24)).astype(np.float16)).float()
    shift = torch.from_numpy(numbers.integers(-6, 7, (2, 24)))
    moved = torch.einsum(
        "qhd,khd->hqk",
        epilogue.query_channels(q, shift).double(), epilogue.channels(k, offset, shift).double(),
    )  # fmt: skip
    plain = torch.einsum("qhd,khd->hqk", q.double(), k.double())
    difference = moved - plain
    assert float((difference - difference[..., :1]).abs().max()) < 1e-4  # k + offset is rounded
    assert float(difference.abs().max()) > 1


def test_channels_of_keys_are_centred_and_of_similar_width(numbers: np.random.Generator) -> None:
    width = 2.0 ** numbers.uniform(-6, 6, (1, 1, 1, 24))
    keys = (numbers.uniform(-1, 1, (2, 3, 200, 24)) * width + 10 * width).astype(np.float32)
    keys[..., 7] = 3.0
    found = channels_of(keys)
    assert np.array_equal(found.offset, -keys.mean(axis=2).astype(np.float16))
    moved = (keys + found.offset[:, :, None]) * 2.0 ** found.shift[:, :, None].astype(np.float64)
    spread = np.delete(np.abs(moved).max(axis=2), 7, axis=-1)
    assert spread.max() / spread.min() < 2 ** (12 / 4 + 1) < width.max() / width.min()
    assert (found.shift[..., 7] == 0).all()  # a constant channel becomes zeros


def test_outlier_channels_no_longer_cost_the_others_their_bits(generator: torch.Generator) -> None:
    """int4 keys with two channels of twenty times the size: the error of the scores falls to less than a third."""
    size = torch.ones(24)
    size[[3, 17]] = 20.0
    k = torch.randn(500, 1, 24, generator=generator) * size + size * 2
    q = torch.randn(500, 1, 24, generator=generator) / size
    found = channels_of(k.transpose(0, 1)[None].numpy())
    offset, shift = torch.from_numpy(found.offset[0]).float(), torch.from_numpy(found.shift[0]).long()

    def error(query: torch.Tensor, key: torch.Tensor) -> float:
        codes, scale = epilogue.quantise_heads(key, int4=True)
        moved = (codes * scale[..., None]).double() - key.double()
        return float(torch.einsum("qhd,khd->hqk", query.double(), moved).pow(2).mean().sqrt())

    centred = error(epilogue.query_channels(q, shift), epilogue.channels(k, offset, shift))
    assert centred < error(q, k) / 3


# 2. the file


def test_file_gives_back_what_was_saved(numbers: np.random.Generator, tmp_path: Path) -> None:
    channels, file = random_channels(TINY_GROUPED, numbers, shift=6), tmp_path / "keys.safetensors"
    channels.save(file)
    found = load_channels(file, TINY_GROUPED)
    assert np.array_equal(found.offset, channels.offset)
    assert np.array_equal(found.shift, channels.shift)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "there is no such file; lutra calibrate makes one"),
        (b"not a file of tensors", "no safetensors file"),
        ({"shift": None}, "tensor 'shift' of int8 is missing"),
        ({"offset": np.zeros(SHAPE, np.float32)}, "tensor 'offset' of float16 is missing"),
        ({"shift": np.zeros((1, 2, 3), np.int8)}, "key channels of another model: 'shift' has shape (1, 2, 3), not (2, 2, 24)"),
        ({"offset": np.full(SHAPE, np.inf, np.float16)}, "offsets must be finite"),
        ({"shift": np.full(SHAPE, -128, np.int8)}, "shifts in [-127, 127]"),
    ],
)
def test_bad_file_is_one_line(change: object, message: str, numbers: np.random.Generator, tmp_path: Path) -> None:
    file = tmp_path / "keys.safetensors"
    if isinstance(change, bytes):
        file.write_bytes(change)
    elif isinstance(change, dict):
        random_channels(TINY_GROUPED, numbers, shift=6).save(file)
        kept = {name: value for name, value in (load_file(file) | change).items() if value is not None}
        save_file(kept, file)
    with pytest.raises(InvalidRequest) as raised:
        load_channels(file, TINY_GROUPED)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


# 3. programs and devices


def test_programs_say_so_and_the_stream_brings_the_words(numbers: np.random.Generator) -> None:
    compiled = compile_model(TINY_GROUPED, TEST_LUT, keys=random_channels(TINY_GROUPED, numbers, shift=6))
    flags = {
        kind: [op.fields.get("channels", 0) for op in compiled.programs[STEP].instructions
               if op.opcode is Opcode.MATMUL and op.fields["epilogue"] == kind]
        for kind in Epilogue
    }  # fmt: skip
    assert flags[Epilogue.QUERY]
    assert flags[Epilogue.KEY]
    for kind, found in flags.items():
        assert set(found) <= {int(kind in (Epilogue.QUERY, Epilogue.KEY))}
    plan = compiled.layer_stream
    words = [place for place, part in enumerate(plan) if part.kind is SegmentKind.AUX and part.weights in ("q", "k")]
    assert len(words) == len(flags[Epilogue.QUERY]) + len(flags[Epilogue.KEY])
    for place in words:  # each in front of its weights
        one, two = plan[place], plan[place + 1]
        assert two.kind is SegmentKind.GROUPS
        assert (one.layer, one.weights, one.start, one.stop) == (two.layer, two.weights, two.start, two.stop)


def test_build_without_room_for_them_is_named(numbers: np.random.Generator) -> None:
    with pytest.raises(InvalidRequest, match="needs 96 key channels, preset 'test_lut' has 0; presets with as many: test_lut, "):
        compile_model(TINY_GROUPED, replace(TEST_LUT, max_channels=0), keys=random_channels(TINY_GROUPED, numbers, shift=6))


def golden_device(checkpoint, **options) -> Device:
    compiled = compile_checkpoint(checkpoint, TEST_LUT, slots=48, **options)
    device = Device(open_device("golden", TEST_LUT.name, compiled.memory.limit), TEST_LUT)
    device.load(compiled, memory_image(compiled, checkpoint))
    return device


def test_calibration_reads_the_keys_of_the_model() -> None:
    """Against the float model's keys: offsets within the cache's rounding, shifts but for a few at the edge of two."""
    checkpoint = random_group_checkpoint(TINY_GROUPED, seed=5, bits=8)
    ids = list(range(40))
    done: list[int] = []
    found = calibrate(golden_device(checkpoint), ids, done.append)
    assert done[-1] == 40
    network, keys = FloatModel(checkpoint), []
    network.cache = lambda _, q, k, v: (keys.append(k[0].transpose(0, 1).float().numpy()), (q, k, v))[1]
    network.logits(torch.tensor([ids]))
    wanted = channels_of(np.stack(keys))
    assert np.abs(found.offset - wanted.offset).max() < 0.03 * np.abs(np.stack(keys)).max()
    assert (found.shift == wanted.shift).mean() > 0.9


def test_calibration_needs_keys_as_they_are(numbers: np.random.Generator) -> None:
    checkpoint = random_group_checkpoint(TINY_GROUPED, seed=5)
    for options in ({"kv": KvFormat.INT4}, {"keys": random_channels(TINY_GROUPED, numbers, shift=6)}):
        with pytest.raises(ValueError, match="from a cache of int8, without channels"):
            calibrate(golden_device(checkpoint, **options), [1, 2, 3])


def test_golden_device_is_the_golden_model(numbers: np.random.Generator) -> None:
    checkpoint = random_group_checkpoint(TINY_GROUPED, seed=6)
    keys = random_channels(TINY_GROUPED, numbers, shift=6)
    device = golden_device(checkpoint, kv=KvFormat.INT4, keys=keys)
    golden, plain = (GoldenModel(checkpoint, 48, KvFormat.INT4, given) for given in (keys, None))
    ids = [3, 200, 17]
    got = device.run_step(ids, 0, head=True, logits=True).logits
    assert got is not None
    want, other = golden.step(ids, 0)[0], plain.step(ids, 0)[0]
    np.testing.assert_array_equal(got.view(np.uint32), want.numpy().view(np.uint32))
    assert not torch.equal(want, other)


# 4. the command line


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = replace(TINY_CHAT, max_positions=96)
    return write_gguf(tmp_path_factory.mktemp("keys") / "tiny.gguf", tiny, random_llama(tiny, seed=3))


def test_calibrate_then_generate(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, file = tmp_path / "text.txt", tmp_path / "keys.safetensors"
    text.write_text("hello there, all of hell. " * 4)
    options = ["--model", str(model), "--preset", "test_lut"]
    assert cli.run(["calibrate", "--text", str(text), "--output", str(file), "--tokens", "60", *options]) == 0
    run = ["generate", "--prompt", "hello", "--device", "golden", "--max-new-tokens", "3", *options]
    assert cli.run([*run, "--kv", "int4", "--keys", str(file)]) == 0
    assert cli.run(["info", "--keys", str(file), *options]) == 0
    assert cli.run([*run, "--keys", str(tmp_path / "none")]) == 1
    assert "there is no such file; lutra calibrate makes one" in capsys.readouterr().err
    assert cli.run(["generate", "--prompt", "hello", "--device", "cpu", "--model", str(model), "--keys", str(file)]) == 1
    assert "is a baseline with a KV cache of its own: leave out --keys" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--tokens", "1"], "a calibration needs at least 2 tokens, not 1"),
        (["--tokens", "90"], "tokens, 90 were asked for"),
        (["--output", "/nowhere/at/all"], "the folder /nowhere/at does not exist"),
        (["--device", "cpu"], "cpu"),
    ],
)
def test_bad_calibration_is_one_line(
    model: Path, tmp_path: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text, file = tmp_path / "text.txt", tmp_path / "keys.safetensors"
    text.write_text("hello there")
    command = ["calibrate", "--text", str(text), "--output", str(file), "--tokens", "5", "--model", str(model)]
    assert cli.run([*command, "--preset", "test_lut", *change]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not file.exists()


def test_wide_builds_hold_the_channels_of_smollm2() -> None:
    assert WIDE.max_channels >= 9 * 64
