"""Import of Hugging Face folders: every form of a weight gives the same numbers, a bad file gives one clear line."""

import json
import struct
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from cosim.checkpoint_folder import Tensors, checkpoint_tensors, config_json, write_folder
from cosim.random_model import TINY, TINY_PLAIN, random_checkpoint
from host_driver.checkpoint import load_checkpoint, quantise_rows, quantise_ternary, read_model_config
from host_driver.errors import InvalidRequest
from host_driver.weights import Checkpoint, TernaryMatrix

CHECKPOINT = random_checkpoint(TINY, seed=3)


def assert_equal(loaded: Checkpoint, wanted: Checkpoint, *, scales: bool = True) -> None:
    """Every number of two checkpoints; ``scales``: also the weight scales."""
    np.testing.assert_array_equal(loaded.final_norm, wanted.final_norm)
    for name in ("embedding", "head"):
        a, b = getattr(loaded, name), getattr(wanted, name)
        np.testing.assert_array_equal(a.values, b.values, err_msg=name)
        np.testing.assert_array_equal(a.scale, b.scale, err_msg=name)
        assert (a.values.dtype, a.scale.dtype) == (b.values.dtype, b.scale.dtype)
    for number, (layer, other) in enumerate(zip(loaded.layers, wanted.layers, strict=True)):
        for field in fields(layer):
            a, b = getattr(layer, field.name), getattr(other, field.name)
            if isinstance(b, TernaryMatrix):
                np.testing.assert_array_equal(a.values, b.values, err_msg=f"{number} {field.name}")
                assert a.values.dtype == np.int8
                if scales:
                    assert a.scale == b.scale
            elif b is None:
                assert a is None
            else:
                np.testing.assert_array_equal(a, b)


def bf16_file(path: Path, tensors: Tensors) -> None:
    """A safetensors file written here, all float32 as BF16 (the low half of every number must be zero)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in tensors.items():
        bits = values.astype(np.float32).view(np.uint32)
        assert not (bits & 0xFFFF).any()
        raw = (bits >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def truncate_to_bf16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


@pytest.mark.parametrize("model", [TINY, TINY_PLAIN], ids=["sub-norms", "plain"])
def test_packed_folder_gives_back_every_number(tmp_path: Path, model: Any) -> None:
    wanted = random_checkpoint(model, seed=5)
    loaded = load_checkpoint(write_folder(tmp_path / model.name, wanted))
    assert loaded.config == model
    assert_equal(loaded, wanted)


def test_bitlinear_divides_by_its_scale(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", CHECKPOINT)
    config = config_json(TINY)
    config["quantization_config"] = {"quant_method": "bitnet", "linear_class": "bitlinear"}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_checkpoint(folder)
    assert_equal(loaded, CHECKPOINT, scales=False)
    assert loaded.layers[1].up.scale == float(np.float32(1) / np.float32(CHECKPOINT.layers[1].up.scale))


def test_master_weights_are_quantised_as_bitnet_defines(tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    weights = rng.normal(0, 0.02, (7, 24)).astype(np.float32)
    matrix = quantise_ternary(weights)
    scale = np.abs(weights.astype(np.float64)).mean()
    assert matrix.scale == pytest.approx(scale, rel=1e-7)
    for row, values in zip(weights, matrix.values, strict=True):
        for weight, value in zip(row, values, strict=True):
            assert value == max(-1, min(1, round(float(weight) / matrix.scale)))
    tensors = checkpoint_tensors(CHECKPOINT, packed=False)
    loaded = load_checkpoint(write_folder(tmp_path / "m", CHECKPOINT, tensors=tensors))
    assert_equal(loaded, CHECKPOINT, scales=False)
    share = np.count_nonzero(CHECKPOINT.layers[0].o.values) / CHECKPOINT.layers[0].o.values.size
    assert loaded.layers[0].o.scale == pytest.approx(CHECKPOINT.layers[0].o.scale * share, rel=1e-6)


def test_scaled_ternary_floats_are_taken_as_they_are(tmp_path: Path) -> None:
    tensors = checkpoint_tensors(CHECKPOINT, packed=False)
    for name in [name for name in tensors if "proj" in name]:
        scale = np.abs(tensors[name]).max()
        tensors[f"{name}_scale"] = np.array([scale], dtype=np.float32)
        tensors[name] = np.sign(tensors[name]).astype(np.float16)
    assert_equal(load_checkpoint(write_folder(tmp_path / "m", CHECKPOINT, tensors=tensors)), CHECKPOINT)


def test_bfloat16_shards_with_a_tied_float_embedding(tmp_path: Path) -> None:
    tensors = checkpoint_tensors(CHECKPOINT, packed=False)
    for name in [name for name in tensors if name.startswith("lm_head") or name.endswith("weight_scale")]:
        del tensors[name]
    rng = np.random.default_rng(2)
    tensors["model.embed_tokens.weight"] = rng.normal(0, 0.3, (TINY.vocab, TINY.hidden))
    tensors = {name: truncate_to_bf16(values) for name, values in tensors.items()}
    folder = write_folder(tmp_path / "m", CHECKPOINT)
    (folder / "model.safetensors").unlink()
    config = config_json(TINY) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for shard, held in shards.items():
        bf16_file(folder / shard, {name: tensors[name] for name in held})
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    loaded = load_checkpoint(folder)
    np.testing.assert_array_equal(loaded.layers[1].k.values, CHECKPOINT.layers[1].k.values)
    np.testing.assert_array_equal(loaded.layers[0].ffn_norm, tensors["model.layers.0.post_attention_layernorm.weight"])
    np.testing.assert_array_equal(loaded.head.values, loaded.embedding.values)
    np.testing.assert_array_equal(loaded.head.scale.astype(np.float32), loaded.embedding.scale)
    table, scale = tensors["model.embed_tokens.weight"], loaded.embedding.scale[:, None]
    assert np.abs(loaded.embedding.values).max() == 121
    assert (np.abs(loaded.embedding.dense() - table) <= 0.5 * scale + 1e-3 * np.abs(table)).all()


def test_row_quantisation_uses_the_scale_as_fp16_holds_it() -> None:
    weights = np.random.default_rng(1).normal(0, 1, (50, 40)).astype(np.float32)
    weights[7] = 0
    values, scale = quantise_rows(weights)
    wide = scale.astype(np.float32)[:, None]
    np.testing.assert_array_equal(values, np.clip(np.rint(weights / wide), -121, 121))
    assert not values[7].any()
    np.testing.assert_allclose(scale.astype(np.float64), np.maximum(np.abs(weights).max(1) / 121, 2**-14), rtol=2**-11)


def test_head_beyond_five_planes_is_quantised_again(tmp_path: Path) -> None:
    head = CHECKPOINT.head.values.copy()
    head[5, 3] = 127
    tensors = checkpoint_tensors(CHECKPOINT) | {"lm_head.weight": head}
    loaded = load_checkpoint(write_folder(tmp_path / "m", CHECKPOINT, tensors=tensors))
    assert loaded.head.values.max() == 121
    before = head * CHECKPOINT.head.scale.astype(np.float32)[:, None]
    after = loaded.head.dense()
    step = loaded.head.scale.astype(np.float32)[:, None]
    assert (np.abs(after - before) <= 0.5 * step + 1e-3 * np.abs(before)).all()


def test_rope_pairs_keep_every_attention_score(tmp_path: Path) -> None:
    """Hugging Face's rotate-half on its rows, against pairs (2i, 2i+1) on ours: q.k must agree at any two positions."""
    tensors = checkpoint_tensors(CHECKPOINT, packed=False)
    folder = write_folder(tmp_path / "m", CHECKPOINT, tensors=tensors)
    loaded = load_checkpoint(folder)
    x = np.random.default_rng(9).normal(0, 1, (2, TINY.hidden))
    dim = TINY.head_dim
    frequency = TINY.rope_theta ** (-np.arange(0, dim, 2) / dim)

    def half_split(vector: np.ndarray, position: int) -> np.ndarray:
        angle = np.concatenate((frequency, frequency)) * position
        rotated = np.concatenate((-vector[dim // 2 :], vector[: dim // 2]))
        return vector * np.cos(angle) + rotated * np.sin(angle)

    def pairwise(vector: np.ndarray, position: int) -> np.ndarray:
        even, odd = vector[0::2], vector[1::2]
        cos, sin = np.cos(frequency * position), np.sin(frequency * position)
        return np.stack((even * cos - odd * sin, even * sin + odd * cos), axis=1).reshape(-1)

    prefix = "model.layers.0.self_attn."
    for head in range(TINY.heads):
        rows = slice(head * dim, (head + 1) * dim)
        first_key = slice(0, dim)
        theirs = half_split(tensors[f"{prefix}q_proj.weight"][rows].astype(np.float64) @ x[0], 7) @ half_split(
            tensors[f"{prefix}k_proj.weight"][first_key].astype(np.float64) @ x[1], 3
        )
        q, k = loaded.layers[0].q, loaded.layers[0].k
        factor = CHECKPOINT.layers[0].q.scale * CHECKPOINT.layers[0].k.scale
        ours = factor * (pairwise(q.values[rows] @ x[0], 7) @ pairwise(k.values[first_key] @ x[1], 3))
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_1bitllm_names_of_the_sub_norms(tmp_path: Path) -> None:
    renamed = {
        name.replace("attn_sub_norm", "inner_attn_ln").replace("ffn_sub_norm", "ffn_layernorm"): values
        for name, values in checkpoint_tensors(CHECKPOINT).items()
    }
    assert_equal(load_checkpoint(write_folder(tmp_path / "m", CHECKPOINT, tensors=renamed)), CHECKPOINT)


def fails(folder: Path, pattern: str) -> None:
    """Reading config and headers, or all, fails with one line."""
    with pytest.raises(InvalidRequest, match=pattern) as error:
        load_checkpoint(folder)
    assert "\n" not in str(error.value)


def test_folder_that_is_none(tmp_path: Path) -> None:
    fails(tmp_path / "nowhere", "no such model folder$")
    file = tmp_path / "file"
    file.write_text("")
    fails(file, "not a model folder$")
    fails(tmp_path, r"neither model\.safetensors nor model\.safetensors\.index\.json is there$")


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 0.3, 0.9, -1])
def test_truncated_file_is_named_before_a_weight_is_read(tmp_path: Path, keep: float) -> None:
    folder = write_folder(tmp_path / "m", CHECKPOINT)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = int(keep * len(data)) if isinstance(keep, float) else len(data) + keep if keep < 0 else keep
    file.write_bytes(data[:size])
    with pytest.raises(InvalidRequest, match=r"model\.safetensors: .*cut short"):
        read_model_config(folder)


def hostile(header: object, data: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (struct.pack("<Q", 1 << 60) + bytes(100), "cut short"),
        (hostile(b"\xff\xfe not json"), "its header is not JSON$"),
        (hostile(b"[" * 100_000), "its header is not JSON$"),
        (hostile([1, 2]), "its header is not a JSON object$"),
        (hostile({"a": 1}), "'a': its header entry has no dtype, shape and data_offsets$"),
        (hostile({"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}), "'F8_E4M3' is not supported"),
        (hostile({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}), r"dtype \['F32'\] is not supported"),
        (hostile({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}), "whole numbers from 0 on"),
        (hostile({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}), "whole numbers from 0 on"),
        (hostile({"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}), "whole numbers from 0 on"),
        (hostile({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}), "data_offsets of two$"),
        (hostile({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}), "takes 8 bytes, data_offsets say 4$"),
        (hostile({"a": {"dtype": "F32", "shape": [2], "data_offsets": [64, 72]}}), "the file is cut short$"),
        (
            hostile({"a": {"dtype": "U8", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 1 << 124]}}),
            "the file is cut short$",
        ),
    ],
)
def test_hostile_header_is_one_line(tmp_path: Path, content: bytes, pattern: str) -> None:
    folder = write_folder(tmp_path / "m", CHECKPOINT)
    (folder / "model.safetensors").write_bytes(content)
    fails(folder, pattern)


@pytest.mark.parametrize(
    ("name", "values", "pattern"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight' is missing$"),
        ("model.layers.1.mlp.up_proj.weight_scale", None, r"up_proj\.weight_scale' is missing$"),
        ("model.norm.weight", None, r"'model\.norm\.weight' is missing$"),
        ("lm_head.weight", None, r"'lm_head\.weight' is missing, and config\.json says it is not tied$"),
        ("model.norm.weight", np.ones(80, np.float32), r"shape \[80\] disagrees with config\.json, which says \[88\]$"),
        ("model.norm.weight", np.ones(88, np.int64), "dtype I64 is not supported here"),
        ("model.norm.weight", np.full(88, np.nan, np.float32), "numbers that are not finite$"),
        ("model.layers.0.self_attn.v_proj.weight", np.zeros((6, 87), np.uint8), r"\[6, 87\] disagrees .* \[6, 88\]$"),
        ("model.layers.0.self_attn.v_proj.weight", np.full((6, 88), 255, np.uint8), "bits 11, which stand for no"),
        ("model.layers.0.self_attn.v_proj.weight", np.full((24, 88), 2, np.float32), "must hold -1, 0 and 1 only$"),
        ("model.layers.0.self_attn.v_proj.weight_scale", np.zeros(1, np.float32), "a scale must be positive, not 0"),
        ("model.layers.0.self_attn.v_proj.weight_scale", np.ones(2, np.float32), r"shape \[2\] disagrees"),
        ("lm_head.weight_scale", np.full(301, -1, np.float16), "a row's scale is negative$"),
        ("lm_head.weight", np.full((301, 88), 1e9, np.float32), "beyond what an FP16 scale can hold$"),
    ],
)
def test_wrong_tensor_is_named(tmp_path: Path, name: str, values: np.ndarray | None, pattern: str) -> None:
    tensors = checkpoint_tensors(CHECKPOINT)
    assert name in tensors
    if values is None:
        del tensors[name]
    else:
        tensors[name] = values
    fails(write_folder(tmp_path / "m", CHECKPOINT, tensors=tensors), pattern)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: bitnet, llama, mistral$"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu, swish, relu2$"),
        ({"hidden_act": ["relu2"]}, r"hidden_act \['relu2'\] is not supported"),
        ({"attention_bias": True}, "attention_bias is not supported$"),
        ({"hidden_size": "88"}, "hidden_size must be a positive number, not '88'$"),
        ({"hidden_size": 0}, "hidden_size must be a positive number, not 0$"),
        ({"vocab_size": 1e300}, "vocab_size must be a whole number below 2"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a positive number, not inf$"),
        ({"num_key_value_heads": 2}, "heads must be a multiple of kv_heads: 3 % 2 != 0$"),
        ({"hidden_size": 90}, "hidden must be a multiple of 8, not 90$"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "RoPE of type 'yarn' is not supported, only 'default'$"),
        ({"eos_token_id": "end"}, "eos_token_id must be a token id or a list of them, not 'end'$"),
        ({"intermediate_size": 144}, "disagrees with config.json"),
        ({"num_hidden_layers": 3}, r"'model\.layers\.2\.input_layernorm\.weight' is missing$"),
    ],
)
def test_wrong_config_is_named(tmp_path: Path, changes: dict[str, Any], pattern: str) -> None:
    folder = write_folder(tmp_path / "m", CHECKPOINT)
    (folder / "config.json").write_text(json.dumps(config_json(TINY) | changes))
    fails(folder, pattern)


def test_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", CHECKPOINT)
    (folder / "model.safetensors").rename(tmp_path / "away.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../away.safetensors"}}))
    fails(folder, r"shard '\.\./away\.safetensors' is not a file name in this folder$")
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    fails(folder, r"gone\.safetensors: No such file or directory$")
    save_file({"b": np.ones(1)}, folder / "here.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "here.safetensors"}}))
    fails(folder, "tensor 'a' is listed but in no shard$")


def test_config_that_is_no_json(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", CHECKPOINT)
    (folder / "config.json").write_text("{")
    fails(folder, r"config\.json: not a JSON file$")
    (folder / "config.json").unlink()
    fails(folder, r"config\.json: No such file or directory$")


def test_random_checkpoints_repeat_and_differ_by_seed() -> None:
    again, other = random_checkpoint(TINY, seed=3), random_checkpoint(TINY, seed=4)
    assert_equal(again, CHECKPOINT)
    assert not np.array_equal(other.layers[0].q.values, CHECKPOINT.layers[0].q.values)
    assert replace(again, config=TINY_PLAIN).config is TINY_PLAIN
