"""The BitNet b1.58 decoder in plain PyTorch: float, or with ternary weights and int8 activations.

Architecture: "BitNet b1.58 2B4T Technical Report" (arXiv:2504.12285) and Hugging Face `BitNetForCausalLM`, whose tensor
names the modules here repeat, so that `state_dict()` needs no renaming. A layer is

    x = x + o_proj(attn_sub_norm(attention(input_layernorm(x))))
    x = x + down_proj(ffn_sub_norm(relu(gate_proj(h))^2 * up_proj(h))),   h = post_attention_layernorm(x)

Quantisation: "The Era of 1-bit LLMs" (arXiv:2402.17764) and its training FAQ. A weight matrix is ternary times one
scale, mean|W|; the input of every matrix (the tied head included) is int8 per token, absmax/127 a step, round half to
even. The gradient passes through both roundings unchanged (straight-through).

Letters in shapes: B sequences, T tokens, D hidden, H heads, G key/value heads, E head_dim, F ffn, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Field names are those of Hugging Face's config.json."""

    vocab_size: int = 2048
    hidden_size: int = 192
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 512
    max_position_embeddings: int = 256
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0


@dataclass
class Arithmetic:
    """What the matrices compute with; it can be changed between two calls of the same network."""

    ternary_weights: bool = True  # round the float weights to ternary (a checkpoint already ternary needs no rounding)
    int8_activations: bool = True
    matmul: torch.dtype = torch.float32  # bfloat16 holds ternary and int8 exactly and is 4x faster with AMX


class Round(torch.autograd.Function):
    """Round half to even; the gradient passes unchanged."""

    @staticmethod
    def forward(_, x):
        return torch.round(x)

    @staticmethod
    def backward(_, gradient):
        return gradient


def ternary(weight):
    """Float weight (N, K) -> values in {-1, 0, 1} (N, K) and their one scale (), mean|weight|."""
    scale = weight.detach().abs().mean().clamp(min=1e-5)
    steps = weight / scale
    # Clipping is part of the rounding: weights beyond the clip keep their gradient.
    return Round.apply(steps + (steps.clamp(-1, 1) - steps).detach()), scale


def matrices(x, weights, arithmetic, keep_float=False):
    """x (B, T, K) times each weight (N_i, K): one quantisation of x and one product. Returns a tuple of (B, T, N_i)."""
    if arithmetic.ternary_weights and not keep_float:
        values, scales = zip(*map(ternary, weights), strict=True)
        scales = torch.cat([scale.expand(len(value)) for value, scale in zip(values, scales, strict=True)])
    else:
        values, scales = weights, None
    matrix = torch.cat(values) if len(values) > 1 else values[0]
    if arithmetic.int8_activations:
        step = x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
        x = Round.apply(x / step)
    y = F.linear(x.to(arithmetic.matmul), matrix.to(arithmetic.matmul)).float()
    if arithmetic.int8_activations:
        y = y * step
    if scales is not None:
        y = y * scales
    return y.split([len(weight) for weight in weights], -1)


def rotate(x, cos, sin):
    """Rotary embedding as Hugging Face pairs it: element e with e + E/2. x (B, *, T, E); cos, sin (T, E)."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def attention(q, k, v, future, dtype, block=64):
    """Causal attention: q (B, H, T, E), k and v (B, G, T, E) -> (B, H, T, E); future (T, T) is 0 or -infinity.

    Query heads that share a key head are laid one below the other, so that each key head takes one matrix product.
    Queries go in blocks against the keys before their end: no work on what the mask hides, and a block stays in cache.
    The backward pass of PyTorch's fused CPU kernel takes four times as long at this size.
    """
    tokens, size = q.shape[-2:]
    q = (q * size**-0.5).to(dtype).unflatten(1, (k.shape[1], -1))  # (B, G, H/G, T, E)
    k, v = k.to(dtype), v.to(dtype)
    blocks = []
    for start in range(0, tokens, block):
        rows, end = q[:, :, :, start : start + block], min(start + block, tokens)
        scores = rows.flatten(2, 3) @ k[:, :, :end].transpose(-1, -2)
        scores = scores.float().unflatten(2, (-1, end - start)) + future[start:end, :end]
        weights = scores.softmax(-1).to(dtype).flatten(2, 3)  # (B, G, H/G * block, end)
        blocks.append((weights @ v[:, :, :end]).float().unflatten(2, (-1, end - start)))
    return torch.cat(blocks, 3).flatten(1, 2)


class Attention(nn.Module):
    def __init__(self, shape, arithmetic):
        super().__init__()
        self.shape, self.arithmetic = shape, arithmetic
        wide, narrow = (n * shape.head_dim for n in (shape.num_attention_heads, shape.num_key_value_heads))
        self.q_proj = nn.Linear(shape.hidden_size, wide, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, narrow, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, narrow, bias=False)
        self.o_proj = nn.Linear(wide, shape.hidden_size, bias=False)
        self.attn_sub_norm = nn.RMSNorm(wide, eps=shape.rms_norm_eps)

    def forward(self, x, cos, sin, future):
        """x (B, T, D) -> (B, T, D)"""
        weights = self.q_proj.weight, self.k_proj.weight, self.v_proj.weight
        q, k, v = (
            part.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)  # (B, H or G, T, E)
            for part in matrices(x, weights, self.arithmetic)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        heads = attention(q, k, v, future, self.arithmetic.matmul)
        joined = self.attn_sub_norm(heads.transpose(1, 2).flatten(2))  # (B, T, H*E)
        return matrices(joined, (self.o_proj.weight,), self.arithmetic)[0]


class FeedForward(nn.Module):
    def __init__(self, shape, arithmetic):
        super().__init__()
        self.arithmetic = arithmetic
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)
        self.ffn_sub_norm = nn.RMSNorm(shape.intermediate_size, eps=shape.rms_norm_eps)

    def forward(self, x):
        """x (B, T, D) -> (B, T, D)"""
        gate, up = matrices(x, (self.gate_proj.weight, self.up_proj.weight), self.arithmetic)
        inner = self.ffn_sub_norm(torch.relu(gate).square() * up)  # (B, T, F)
        return matrices(inner, (self.down_proj.weight,), self.arithmetic)[0]


class Layer(nn.Module):
    def __init__(self, shape, arithmetic):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.self_attn = Attention(shape, arithmetic)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.mlp = FeedForward(shape, arithmetic)

    def forward(self, x, cos, sin, future):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, future)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """What Hugging Face calls `model`: embedding, layers, final norm."""

    def __init__(self, shape, arithmetic):
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, arithmetic) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        frequency = shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        places = shape.max_position_embeddings
        angle = torch.outer(torch.arange(places), frequency.repeat(2))  # (T, E)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.register_buffer("future", torch.full((places, places), -torch.inf).triu(1), persistent=False)

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin, self.future)
        return self.norm(x)


class LanguageModel(nn.Module):
    def __init__(self, shape, arithmetic):
        super().__init__()
        self.shape, self.arithmetic = shape, arithmetic
        self.model = Decoder(shape, arithmetic)
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens):
        """tokens (B, T) int64 -> logits (B, T, V) float32"""
        return self.head(self.model(tokens))

    def head(self, x):
        """x (B, T, D) -> logits (B, T, V); the head is the embedding, never ternary."""
        return matrices(x, (self.model.embed_tokens.weight,), self.arithmetic, keep_float=True)[0]
