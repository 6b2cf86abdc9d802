"""Write the trained weights as the checkpoint folder `models/austen/`, in the layout of Hugging Face's packed BitNet.

The layout is that of `microsoft/bitnet-b1.58-2B-4T`, checked against transformers 5.23 (`integrations/bitnet.py`):

* A ternary matrix (N, K) is `weight`, uint8 (N/4, K), as `pack_weights` makes it: row i holds the rows i, i + N/4,
  i + 2N/4, i + 3N/4 at bits 0-1, 2-3, 4-5, 6-7, each as value + 1. `weight_scale`, float32 (1,), multiplies:
  matrix = ternary * weight_scale. That is what transformers' `AutoBitLinear` does (linear_class "autobitlinear", mode
  "offline", as our config says); its other class, `BitLinear`, divides by a tensor of the same name.
* `model.embed_tokens.weight`, int8 (V, D), values in [-121, 121] so that five balanced ternary digits hold each;
  `model.embed_tokens.weight_scale`, float16 (V,), multiplies its row. It is embedding and head. transformers does not
  know this scale: multiply it in before loading there.
* Norms are float32.

    python models/train/export.py
"""

import argparse
import json
from dataclasses import asdict

import corpus
import torch
from network import Arithmetic, LanguageModel, Shape, ternary
from safetensors.torch import save_file
from tokens import CHECKPOINT

EMBEDDING_LIMIT = 121  # (3**5 - 1) / 2


HELD_OUT_PASSAGES, HELD_OUT_CHARACTERS = 6, 8000


def pack(values):
    """Ternary (N, K) -> uint8 (N/4, K)."""
    quarters = (values.round().to(torch.int8) + 1).to(torch.uint8).unflatten(0, (4, -1))
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def unpack(packed):
    """uint8 (N/4, K) -> ternary float32 (N, K)."""
    return torch.cat([packed >> shift & 3 for shift in (0, 2, 4, 6)]).float() - 1


def quantise_rows(weight):
    """Float (V, D) -> int8 (V, D) and float16 (V,), the scale of each row."""
    scale = (weight.abs().amax(1) / EMBEDDING_LIMIT).clamp(min=2.0**-14).half()  # never a subnormal
    values = (weight / scale.float()[:, None]).round().clamp(-EMBEDDING_LIMIT, EMBEDDING_LIMIT)
    return values.to(torch.int8), scale


def tensors_of(network):
    """The tensors of the checkpoint by their Hugging Face names."""
    tensors = {}
    for name, weight in network.state_dict().items():
        if "norm" in name:
            tensors[name] = weight.float()
        elif "embed" in name:
            tensors[name], tensors[f"{name}_scale"] = quantise_rows(weight)
        else:
            values, scale = ternary(weight)
            tensors[name], tensors[f"{name}_scale"] = pack(values), scale.reshape(1)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def config_of(shape):
    quantisation = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
    return {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        **asdict(shape),
        "hidden_act": "relu2",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "quantization_config": quantisation,
    }


def held_out_sample(passages):
    """Held-out text for `benchmarks/perplexity.py`, which then needs no corpus: the start of the longest passages."""
    longest = sorted(passages, key=len, reverse=True)[:HELD_OUT_PASSAGES]
    return "\n".join(passage[:HELD_OUT_CHARACTERS] for passage in longest) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--name", default="ternary", help="of the training checkpoint in the cache")
    args = parser.parse_args()
    path = corpus.CACHE / f"{args.name}.pt"
    if not path.exists():
        raise corpus.CorpusError(f"no training checkpoint {path}: run train.py first")
    state = torch.load(path, weights_only=True)
    network = LanguageModel(Shape(), Arithmetic())
    network.load_state_dict(state["network"])
    CHECKPOINT.mkdir(exist_ok=True)
    sampling = {"bos_token_id": 0, "eos_token_id": 0, "do_sample": True, "temperature": 0.8, "top_k": 40}
    for name, content in (("config", config_of(network.shape)), ("generation_config", sampling)):
        (CHECKPOINT / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    save_file(tensors_of(network), CHECKPOINT / "model.safetensors", metadata={"format": "pt"})
    (CHECKPOINT / "heldout.txt").write_text(held_out_sample(corpus.load()[1]), encoding="utf-8")
    size = (CHECKPOINT / "model.safetensors").stat().st_size
    print(f"{CHECKPOINT / 'model.safetensors'}: {size} bytes, after step {state['step']} of {state['steps']}")


if __name__ == "__main__":
    try:
        main()
    except corpus.CorpusError as error:
        raise SystemExit(f"error: {error}") from None
