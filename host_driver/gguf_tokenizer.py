"""The tokenizer in a GGUF file's metadata: byte-level BPE, with the same ids as llama.cpp's.

llama.cpp splits special tokens out first, then by the pre-tokenizer's rules, each within the pieces of the one before;
bytes stand as the letters of GPT-2's byte-to-unicode map; then merges in the order of their list.
"""

from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from host_driver.errors import InvalidRequest
from host_driver.gguf_file import GgufFile

CONTROL, USER_DEFINED = 3, 4
"""Token types that are split out of the text before anything else; control tokens are not shown."""

TOKEN_TYPES = range(1, 7)

DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""Pre-tokenizers that split off every single digit, then use GPT-2's expression."""
GPT2 = frozenset({"gpt-2"})


def _strings(file: GgufFile, key: str) -> list[str]:
    value = file.metadata.get(key)
    if not isinstance(value, list) or not value:
        raise InvalidRequest(f"{file.path}: {key} is missing or no list of strings")
    return value


def _token_types(file: GgufFile, count: int) -> list[int]:
    """Of each token; all normal where the file says nothing."""
    value = file.metadata.get("tokenizer.ggml.token_type")
    if value is None:
        return [1] * count
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or len(value) != count:
        raise InvalidRequest(f"{file.path}: tokenizer.ggml.token_type must be {count} whole numbers, one for each token")
    if not np.isin(value, TOKEN_TYPES).all():
        raise InvalidRequest(f"{file.path}: tokenizer.ggml.token_type has values outside 1 to {TOKEN_TYPES[-1]}")
    return value.tolist()


def _merges(file: GgufFile, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs in their order. Each must join two tokens to a third."""
    pairs = []
    for number, merge in enumerate(_strings(file, "tokenizer.ggml.merges")):
        left, blank, right = merge.partition(" ")
        if not (left and blank and right) or left not in vocab or right not in vocab or left + right not in vocab:
            raise InvalidRequest(f"{file.path}: merge {number}, {merge[:64]!r}, does not join two tokens to a third")
        pairs.append((left, right))
    return pairs


def _pre_tokenizer(file: GgufFile) -> Any:
    name = file.metadata.get("tokenizer.ggml.pre", "default")
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in DIGITS_APART:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_of_words])
    if name in GPT2:
        return bytes_of_words
    supported = ", ".join(sorted(DIGITS_APART | GPT2))
    raise InvalidRequest(f"{file.path}: pre-tokenizer {str(name)[:64]!r} is not supported; supported: {supported}")


def build_tokenizer(file: GgufFile) -> Tokenizer:
    """The file's tokenizer. Raises InvalidRequest, one line, on data that make none."""
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise InvalidRequest(f"{file.path}: tokenizer of type {str(kind)[:64]!r} is not supported, only 'gpt2' (byte-level BPE)")
    pre_tokenizer = _pre_tokenizer(file)
    tokens = _strings(file, "tokenizer.ggml.tokens")
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise InvalidRequest(f"{file.path}: token {twice[:64]!r} is there twice")
    types = _token_types(file, len(tokens))
    merges = _merges(file, vocab)
    if file.metadata.get("tokenizer.ggml.add_space_prefix", False) is not False:
        raise InvalidRequest(f"{file.path}: tokenizer.ggml.add_space_prefix is not supported with byte-level BPE")
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizer
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_tokens(
            [
                AddedToken(token, special=kind == CONTROL, normalized=False)
                for token, kind in zip(tokens, types, strict=True)
                if kind in (CONTROL, USER_DEFINED) and token
            ]
        )
    except Exception as error:  # noqa: BLE001 (the library raises bare Exception on bad data)
        raise InvalidRequest(f"{file.path}: its tokenizer data make no tokenizer: {str(error)[:200]}") from None
    return tokenizer


def token_id(file: GgufFile, key: str, vocab: int) -> int | None:
    """``tokenizer.ggml.<key>_token_id``, checked against the vocabulary; None where the file has none."""
    name = f"tokenizer.ggml.{key}_token_id"
    value = file.metadata.get(name)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < vocab:
        raise InvalidRequest(f"{file.path}: {name} must be a token id below {vocab}, not {str(value)[:32]}")
    return value
