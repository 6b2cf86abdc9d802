"""Measure the shipped checkpoint on the held-out text, and let it write.

Perplexity: non-overlapping windows of 256 tokens of the held-out text, every position counted, float32. Rows:

* the checkpoint as the accelerator means it: ternary weights, int8 embedding and head, int8 activations;
* the same weights with float activations;
* the float twin (`train.py --float`), where its training checkpoint is in the cache.

Bits per character does not depend on the tokenizer, so it may be compared with other models' on this text.

    python models/train/evaluate.py --prompt "It was a truth"
"""

import argparse
import json
import math

import corpus
import torch
from export import unpack
from network import Arithmetic, LanguageModel, Shape
from safetensors.torch import load_file
from tokens import CHECKPOINT, token_stream, tokenizer_of, windows
from torch.nn import functional as F


def read_checkpoint(folder, int8_activations=True):
    """The folder written by export.py as a network whose weights are the float values the integers stand for."""
    config = json.loads((folder / "config.json").read_text())
    shape = Shape(**{name: config[name] for name in Shape.__dataclass_fields__})
    network = LanguageModel(shape, Arithmetic(ternary_weights=False, int8_activations=int8_activations))
    stored = load_file(folder / "model.safetensors")
    weights = {}
    for name in network.state_dict():
        weight, scale = stored[name], stored.get(f"{name}_scale")
        if weight.dtype == torch.uint8:
            weight = unpack(weight) * scale
        elif weight.dtype == torch.int8:
            weight = weight.float() * scale.float()[:, None]
        weights[name] = weight
    network.load_state_dict(weights)
    return network


def read_float_twin(path):
    network = LanguageModel(Shape(), Arithmetic(ternary_weights=False, int8_activations=False))
    network.load_state_dict(torch.load(path, weights_only=True)["network"])
    return network


@torch.no_grad()
def mean_loss(network, inputs, targets):
    """Nats per token over all windows."""
    total = 0.0
    for rows, wanted in zip(inputs.split(8), targets.split(8), strict=True):
        total += F.cross_entropy(network(rows).flatten(0, 1), wanted.flatten(), reduction="sum").item()
    return total / targets.numel()


@torch.no_grad()
def generate(network, tokens, count, temperature, seed, top_k=40):
    """Continue a list of tokens by up to `count`; the window slides once it is full."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        logits = network(torch.tensor([tokens[-network.shape.max_position_embeddings :]]))[0, -1]
        if temperature == 0:
            token = int(logits.argmax())
        else:
            best, ids = logits.topk(top_k)
            token = int(ids[torch.multinomial((best / temperature).softmax(0), 1, generator=generator)])
        if token == 0:
            break
        tokens = [*tokens, token]
    return tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", action="append", help="text to continue (may be repeated; default: a new chapter)")
    parser.add_argument("--count", type=int, default=120, help="tokens to write")
    parser.add_argument("--temperature", type=float, action="append", help="(may be repeated; default: 0 and 0.8)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shipped = read_checkpoint(CHECKPOINT)
    tokenizer = tokenizer_of((), 0)

    if not args.samples_only:
        _, held_out = corpus.load()
        stream = token_stream(tokenizer, held_out)
        pairs = windows(stream, shipped.shape.max_position_embeddings)
        per_character = len(stream) / sum(map(len, held_out)) / math.log(2)
        networks = {
            "ternary weights, int8 embedding, int8 activations": shipped,
            "the same weights, float activations": read_checkpoint(CHECKPOINT, int8_activations=False),
        }
        twin = corpus.CACHE / "float.pt"
        if twin.exists():
            networks["float twin"] = read_float_twin(twin)
        print(f"| {pairs[0].numel()} held-out tokens | nats per token | perplexity | bits per character |")
        print("|---|---|---|---|")
        for name, network in networks.items():
            loss = mean_loss(network, *pairs)
            print(f"| {name} | {loss:.3f} | {math.exp(loss):.2f} | {loss * per_character:.3f} |", flush=True)

    for temperature in args.temperature or (0, 0.8):
        for prompt in args.prompt or [""]:
            tokens = [0, *tokenizer.encode(prompt).ids]
            text = tokenizer.decode(generate(shipped, tokens, args.count, temperature, args.seed))
            print(f"\n--- temperature {temperature}, seed {args.seed}\n{text}")


if __name__ == "__main__":
    try:
        main()
    except (corpus.CorpusError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
