"""Broken and hostile GGUF files: one clear line each, no traceback, no memory to speak of; 10,000 mutated headers."""

import random
import resource
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from cosim.gguf_checkpoint import TINY_CHAT, gguf_name, random_llama, write_gguf
from host_driver.errors import InvalidRequest
from host_driver.gguf_file import read_gguf
from host_driver.gguf_tokenizer import build_tokenizer
from host_driver.model_source import open_model

SMALL = replace(TINY_CHAT, name="small", vocab=8, hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16, ffn=64, eos_ids=(7,))
TOKENS = ["h", "e", "l", "he", "ll", "hell", "<|im_start|>", "<|im_end|>"]
TOKENIZER = {
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [1] * 6 + [3] * 2,
    "tokenizer.ggml.merges": ["h e", "l l", "he ll"],
    "tokenizer.ggml.bos_token_id": 6,
    "tokenizer.ggml.eos_token_id": 7,
}
MUTANTS = 10_000
MEMORY_KB = 64 * 1024


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole small file that loads."""
    file = tmp_path_factory.mktemp("gguf") / "small.gguf"
    kinds = {"embedding": Kind.Q8_0, "0.q": Kind.F16, "0.down": Kind.F32, "0.up": Kind.Q4_0}
    write_gguf(file, SMALL, random_llama(SMALL), default=Kind.Q4_1, kinds=kinds, changes=TOKENIZER)
    use(file)
    return file.read_bytes()


def use(file: Path) -> None:
    """Everything that a run makes of a file before a device is opened."""
    source = open_model(file)
    tokenizer = source.tokenizer()
    tokenizer.decode(tokenizer.encode("hello"))
    source.chat_template().render([{"role": "user", "content": "hell"}], prompt=True)
    source.load()


def message_of(file: Path) -> str:
    with pytest.raises(InvalidRequest) as error:
        use(file)
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    return text


def number(letter: str, value: int | float) -> bytes:
    return struct.pack(f"<{letter}", value)


def text(value: str) -> bytes:
    return number("Q", len(value)) + value.encode()


def tensor_entry(data: bytes, name: str) -> int:
    """Where the entry of a tensor goes on behind its name: u32 dimensions, u64 each, u32 type, u64 offset."""
    return data.index(text(name)) + 8 + len(name)


def patched(data: bytes, place: int, piece: bytes) -> bytes:
    return data[:place] + piece + data[place + len(piece) :]


MATRIX = "blk.0.attn_k.weight"

BROKEN: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("empty", lambda data: data[:0], "not a GGUF file: it is empty"),
    ("three bytes", lambda data: data[:3], "not a GGUF file: it does not start with 'GGUF'"),
    ("magic", lambda data: b"GGML" + data[4:], "not a GGUF file: it does not start with 'GGUF'"),
    ("magic only", lambda data: data[:4], "the version at byte 4 takes 4 bytes, 0 are left"),
    ("version", lambda data: patched(data, 4, number("I", 4)), "GGUF version 4 is not supported, only 2 and 3, little-endian"),
    ("big-endian", lambda data: patched(data, 4, b"\0\0\0\x03"), "GGUF version 50331648 is not supported"),
    ("tensors", lambda data: patched(data, 8, number("Q", 1 << 63)), "9223372036854775808 tensors, the limit is 65536"),
    ("more tensors", lambda data: patched(data, 8, number("Q", 65000)), "tensor '': it must have 1 to 4 dimensions, not 0"),
    ("keys", lambda data: patched(data, 16, number("Q", 1 << 40)), "1099511627776 keys, the limit is 4096"),
    ("key length", lambda data: patched(data, 24, number("Q", 1 << 62)), "the name of key 0 has 4611686018427387904 bytes"),
    ("half", lambda data: data[: len(data) // 2], "it is cut short or damaged"),
    ("one byte short", lambda data: data[:-1], "it is cut short or damaged"),
    ("key type", lambda data: patched(data, 24 + 8 + 20, number("I", 13)), "key 'general.architecture' has the unknown type 13"),
    (
        "array length",
        lambda data: patched(data, data.index(b"ggml.merges") + 11 + 8, number("Q", 1 << 60)),
        "key 'tokenizer.ggml.merges' has 1152921504606846976 elements, the limit is 4194304",
    ),
    (
        "array of four million strings",
        lambda data: patched(data, data.index(b"ggml.merges") + 11 + 8, number("Q", 1 << 22)),
        "key 'tokenizer.ggml.merges' has 4194304 strings, the file has no room for them",
    ),
    (
        "array of arrays",
        lambda data: patched(data, data.index(b"ggml.merges") + 11 + 4, number("I", 9)),
        "key 'tokenizer.ggml.merges' is an array of type 9, only scalars and strings are read",
    ),
    (
        "key twice",
        lambda data: data.replace(b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id"),
        "key 'tokenizer.ggml.eos_token_id' is there twice",
    ),
    ("not UTF-8", lambda data: data.replace(b"llama.block_count", b"llama.\xff\xfeock_count"), "is not UTF-8"),
    (
        "dimensions",
        lambda data: patched(data, tensor_entry(data, MATRIX), number("I", 1 << 31)),
        f"tensor {MATRIX!r}: it must have 1 to 4 dimensions, not 2147483648",
    ),
    (
        "shape",
        lambda data: patched(data, tensor_entry(data, MATRIX) + 4, number("Q", 32) + number("Q", 1 << 63)),
        f"tensor {MATRIX!r}: its 184467440737095516160 bytes end at byte",
    ),
    (
        "rows of half a block",
        lambda data: patched(data, tensor_entry(data, MATRIX) + 4, number("Q", 16)),
        f"tensor {MATRIX!r}: shape [16, 16] cannot be of type Q4_1, which comes in rows of blocks of 32",
    ),
    (
        "no rows",
        lambda data: patched(data, tensor_entry(data, MATRIX) + 12, number("Q", 0)),
        f"tensor {MATRIX!r}: shape [0, 32] cannot be of type Q4_1",
    ),
    (
        "Q6_K",
        lambda data: patched(data, tensor_entry(data, MATRIX) + 20, number("I", 14)),
        f"tensor {MATRIX!r}: type Q6_K (14) is not supported; supported: F32, F16, BF16, Q4_0, Q4_1, Q8_0, TQ1_0, TQ2_0",
    ),
    (
        "unknown type",
        lambda data: patched(data, tensor_entry(data, MATRIX) + 20, number("I", 4711)),
        f"tensor {MATRIX!r}: type unknown (4711) is not supported",
    ),
    (
        "misaligned",
        lambda data: patched(data, tensor_entry(data, MATRIX) + 24, number("Q", 33)),
        f"tensor {MATRIX!r}: offset 33 is not a multiple of the alignment 32",
    ),
    (
        "overlap",
        lambda data: patched(data, tensor_entry(data, MATRIX) + 24, number("Q", 0)),
        "overlaps the one in front of it",
    ),
    (
        "beyond the end",
        lambda data: patched(data, tensor_entry(data, MATRIX) + 24, number("Q", (1 << 64) - 32)),
        f"tensor {MATRIX!r}: its 320 bytes end at byte",
    ),
    (
        "tensor twice",
        lambda data: data.replace(b"blk.0.ffn_up.weight", b"blk.0.attn_k.weight"),
        f"tensor {MATRIX!r} is there twice",
    ),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_broken_file_is_one_clear_line(
    tmp_path: Path, good: bytes, change: Callable[[bytes], bytes], message: str
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(change(good))
    assert message in message_of(file)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["0.gate", "embedding", "0.down", "final_norm"])
def test_numbers_that_are_not_finite_name_their_tensor(tmp_path: Path, good: bytes, name: str, value: float) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(good)
    tensor = read_gguf(file).tensors[gguf_name(name)]
    piece = np.array([value], dtype="<f4" if tensor.kind == "F32" else "<f2").tobytes()
    file.write_bytes(patched(good, tensor.offset, piece))
    assert f"tensor {gguf_name(name)!r}: " in message_of(file)
    assert "not finite" in message_of(file) or "not a finite number" in message_of(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer of type 'llama' is not supported, only 'gpt2'"),
        ({"tokenizer.ggml.model": None}, "tokenizer of type 'None' is not supported"),
        ({"tokenizer.ggml.pre": "qwen2"}, "pre-tokenizer 'qwen2' is not supported; supported: codeshell, "),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing or no list of strings"),
        ({"tokenizer.ggml.tokens": [1] * 8}, "tokenizer.ggml.tokens is missing or no list of strings"),
        ({"tokenizer.ggml.tokens": ["h", *TOKENS[:-1]]}, "token 'h' is there twice"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing or no list of strings"),
        ({"tokenizer.ggml.merges": ["h e", "he he"]}, "merge 1, 'he he', does not join two tokens to a third"),
        ({"tokenizer.ggml.merges": ["h"]}, "merge 0, 'h', does not join two tokens to a third"),
        ({"tokenizer.ggml.merges": ["hell "]}, "merge 0, 'hell ', does not join two tokens to a third"),
        ({"tokenizer.ggml.merges": [" hell"]}, "merge 0, ' hell', does not join two tokens to a third"),
        ({"tokenizer.ggml.token_type": [1] * 7}, "tokenizer.ggml.token_type must be 8 whole numbers, one for each token"),
        ({"tokenizer.ggml.token_type": [1] * 7 + [70]}, "tokenizer.ggml.token_type has values outside 1 to 6"),
        ({"tokenizer.ggml.eos_token_id": 8}, "tokenizer.ggml.eos_token_id must be a token id below 8, not 8"),
        ({"tokenizer.ggml.add_space_prefix": True}, "add_space_prefix is not supported"),
        ({"tokenizer.chat_template": "{% for %}"}, "its chat template fails: "),
        ({"tokenizer.chat_template": "{{ ''.__class__.__mro__ }}"}, "its chat template fails: "),
        ({"tokenizer.chat_template": "{{ 'x' * 1000000000000 }}"}, "its chat template fails: "),
        ({"tokenizer.chat_template": "{{ messages[3].content }}"}, "its chat template fails: "),
        ({"tokenizer.chat_template": "{{ raise_exception('no\nway') }}"}, "its chat template fails: no"),
        ({"tokenizer.chat_template": "{% for a in range(99999) %}{{ messages ~ messages }}{% endfor %}"}, "more than 4194304"),
    ],
)
def test_tokenizer_data_that_make_no_tokenizer(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = write_gguf(tmp_path / "m.gguf", SMALL, random_llama(SMALL), default=Kind.Q4_1, changes=TOKENIZER | changes)
    assert message in message_of(file)


def test_merges_of_a_token_with_itself_end(tmp_path: Path) -> None:
    """Merges cannot run in a circle: each makes a longer token. The longest chain that the tokens allow is walked once."""
    chain = ["a" * length for length in range(1, 9)]
    pairs = [(left, length - len(left)) for length in range(2, 9) for left in chain[: length - 1]]
    changes = TOKENIZER | {
        "tokenizer.ggml.tokens": chain,
        "tokenizer.ggml.token_type": None,
        "tokenizer.ggml.merges": [f"{left} {'a' * rest}" for left, rest in pairs],
    }
    file = write_gguf(tmp_path / "m.gguf", SMALL, random_llama(SMALL), default=Kind.Q4_1, changes=changes)
    tokenizer = build_tokenizer(read_gguf(file))
    assert tokenizer.decode(tokenizer.encode("a" * 100_000).ids) == "a" * 100_000


def mutate(rng: random.Random, data: bytes, end: int) -> bytes:
    """One to four changes of the first ``end`` bytes: bits, numbers that hurt, pieces lost, doubled or moved, the end cut off."""
    mutant = bytearray(data)
    hurting = [0, 1, 2, 31, 255, 256, 1 << 16, 1 << 22, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1, len(data)]
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(min(end, len(mutant)))
        size = rng.choice((1, 2, 4, 8, 24))
        match rng.randrange(7):
            case 0 | 1:
                mutant[place] ^= 1 << rng.randrange(8)
            case 2:
                mutant[place : place + 8] = struct.pack("<Q", rng.choice(hurting))
            case 3:
                mutant[place : place + 4] = struct.pack("<I", rng.choice(hurting) & 0xFFFFFFFF)
            case 4:
                del mutant[place : place + size]
            case 5:
                mutant[place:place] = mutant[place : place + size]
            case 6:
                other = rng.randrange(min(end, len(mutant)))
                mutant[place : place + size] = mutant[other : other + size]
    if rng.random() < 0.05:
        del mutant[rng.randrange(len(mutant)) :]
    return bytes(mutant) if mutant else b"\0"


def test_mutated_headers(tmp_path: Path, good: bytes, rng: random.Random) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(good)
    end = min(tensor.offset for tensor in read_gguf(file).tensors.values())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    messages = []
    for _ in range(MUTANTS):
        mutant = mutate(rng, good, end)
        file.write_bytes(mutant)
        try:
            use(file)
        except InvalidRequest as error:
            messages.append(str(error))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MEMORY_KB, f"{grown} kB more at the peak"
    assert all("\n" not in message and len(message) < 600 for message in messages)
    assert MUTANTS // 2 < len(messages) < MUTANTS  # most are refused; one in a name of no meaning may pass
