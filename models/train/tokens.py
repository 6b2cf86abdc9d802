"""From text to rows of token numbers: the byte-level BPE tokenizer, and windows for training and for measuring."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CHECKPOINT = Path(__file__).resolve().parent.parent / "austen"  # the folder that ships
END = "<|endoftext|>"  # id 0; before each passage, so it is both the first and the last token of a text


def tokenizer_of(passages, vocab_size):
    """The shipped tokenizer, or one trained on the passages where none is there yet (and kept)."""
    path = CHECKPOINT / "tokenizer.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, so that any text can be encoded
    options = {"special_tokens": [END], "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(passages, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    path.parent.mkdir(exist_ok=True)
    tokenizer.save(str(path))
    return tokenizer


def token_stream(tokenizer, passages):
    """All passages as one row of tokens (int64), END before each and after the last."""
    rows = tokenizer.encode_batch([END + passage for passage in passages])
    return torch.from_numpy(np.concatenate([row.ids for row in rows] + [[0]]).astype(np.int64))


def windows(stream, length):
    """Non-overlapping windows: inputs and targets, each (windows, length)."""
    count = (len(stream) - 1) // length
    return stream[: count * length].view(count, length), stream[1 : count * length + 1].view(count, length)


def batch_at(stream, step, seed, batch, length):
    """Inputs and targets (batch, length) of one step: windows at random places, decided by (seed, step) alone."""
    starts = np.random.default_rng((seed, step)).integers(0, len(stream) - length, batch)
    rows = torch.stack([stream[start : start + length + 1] for start in starts.tolist()])
    return rows[:, :-1], rows[:, 1:]
