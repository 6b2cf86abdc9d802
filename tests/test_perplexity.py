"""The integer datapath keeps the model's quality: perplexity within 1 % of float activations on the same weights."""

import math

import torch

from benchmarks.perplexity import BUNDLED, window_nll
from golden.model import FloatModel, GoldenModel
from host_driver.checkpoint import load_checkpoint
from host_driver.tokenizer import TextTokenizer

WINDOWS = 2


def test_perplexity_of_the_integer_datapath() -> None:
    torch.set_num_threads(1)
    checkpoint = load_checkpoint(BUNDLED)
    length = checkpoint.config.max_positions
    tokenizer = TextTokenizer.from_folder(BUNDLED, bos_id=None, vocab=checkpoint.config.vocab)
    ids = tokenizer.encode((BUNDLED / "heldout.txt").read_text(encoding="utf-8"))
    golden = meaning = 0.0
    for start in range(0, WINDOWS * length, length):
        window = ids[start : start + length]
        golden += window_nll(GoldenModel(checkpoint, length).step(window, 0, all_logits=True), window)
        meaning += window_nll(FloatModel(checkpoint).logits(window), window)
    change = math.exp((golden - meaning) / (WINDOWS * (length - 1))) - 1
    assert abs(change) < 0.01
