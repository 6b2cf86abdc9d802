"""The model step on the golden engines, in the order of the prompt-to-token table: what programs must compute.

It reads the weights directly, not the packed memory, so that compiler, packer and device are checked against it.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from golden import attention, epilogue, fp
from golden.linear import Activations, dense, linear
from spec.config import Activation, KvFormat, ModelConfig


@lru_cache(maxsize=8)
def rope_table(config: ModelConfig, positions: int) -> Tensor:
    """cos, sin of every position, interleaved (cos0, sin0, cos1, ...): (positions, head_dim) float32."""
    pair = np.arange(config.head_dim // 2, dtype=np.float64)
    angle = np.arange(positions, dtype=np.float64)[:, None] * config.rope_theta ** (-2.0 * pair / config.head_dim)
    return torch.from_numpy(np.stack([np.cos(angle), np.sin(angle)], axis=-1).reshape(positions, -1).astype(np.float32))


def embedding_rows(matrix: Any, ids: list[int]) -> tuple[Tensor, Tensor]:
    """int8 values (M, hidden) and their float32 scales, (M, 1) or (M, hidden). A GroupMatrix must be symmetric."""
    if not hasattr(matrix, "codes"):
        return torch.tensor(matrix.values[ids]), torch.from_numpy(np.asarray(matrix.scale[ids], dtype=np.float32))[:, None]
    half = 1 << matrix.bits - 1
    scale = matrix.scale[ids].astype(np.float32)
    if not np.array_equal(matrix.minimum[ids], -half * scale):
        raise ValueError("the embedding's minima must be -2^(bits-1) times the scales: rows are int8 times a scale")
    values = torch.from_numpy((matrix.codes[ids].astype(np.int16) - half).astype(np.int8))
    return values, torch.from_numpy(np.repeat(scale, matrix.group, axis=1))


class GoldenModel:
    """A decoder with its KV cache.

    Parameters
    ----------
    checkpoint
        Anything with the fields of ``host_driver.weights.Checkpoint``.
    slots
        Slots of the KV cache.
    kv
        Its number format.
    keys
        Anything with the fields of ``host_driver.key_channels.KeyChannels``: offsets and shifts of the keys' channels.
    """

    def __init__(self, checkpoint: Any, slots: int, kv: KvFormat = KvFormat.INT8, keys: Any = None) -> None:
        self.config: ModelConfig = checkpoint.config
        self.slots = slots
        self.kv = kv
        self._channels: list[tuple[Tensor, Tensor]] | None = None
        if keys is not None:
            offset, shift = torch.tensor(keys.offset).float(), torch.tensor(keys.shift).long()
            self._channels = list(zip(offset, shift, strict=True))
        self._weights = checkpoint
        self._layers = [
            {name: linear(getattr(layer, name)) for name in ("q", "k", "v", "o", "gate", "up", "down")}
            for layer in checkpoint.layers
        ]
        self._head = linear(checkpoint.head)
        self._rope = rope_table(self.config, slots)
        shape = (self.config.layers, self.config.kv_heads, slots)
        self._k = torch.zeros(*shape, self.config.head_dim, dtype=torch.int8)
        self._v = torch.zeros_like(self._k)
        self._k_scale, self._v_scale = torch.zeros(*shape), torch.zeros(*shape)

    def _norm(self, x: Tensor, gamma: np.ndarray | None) -> Activations:
        inv_length = torch.tensor(np.float32(1.0 / x.shape[-1]))
        eps = torch.tensor(np.float32(self.config.rms_eps))
        return self._head.norm(x, None if gamma is None else torch.tensor(gamma), inv_length, eps)

    def step(self, ids: list[int], position: int, *, all_logits: bool = False) -> Tensor:
        """Logits (1, vocab) after the last token of a tile, or (tokens, vocab) after each; the cache grows.

        Raises ValueError when the tile does not fit in the cache.
        """
        x = self.embed(ids)
        for number in range(self.config.layers):
            x = self.layer(number, x, position)
        # 8. norm, LM head
        return self._head(self._norm(x if all_logits else x[-1:], self._weights.final_norm))

    def embed(self, ids: list[int]) -> Tensor:
        """1. Embedding rows: (tokens, hidden) float32."""
        rows, scales = embedding_rows(self._weights.embedding, ids)
        return fp.fmul(fp.i2f(rows), scales)

    def layer(self, number: int, x: Tensor, position: int) -> Tensor:
        """Residual stream (tokens, hidden) behind a layer, of the tokens at `position` and on; its cache grows."""
        config, layer, matrices = self.config, self._weights.layers[number], self._layers[number]
        if position + len(x) > self.slots:
            raise ValueError(f"positions up to {position + len(x) - 1} need more than the {self.slots} slots of the cache")
        here = slice(position, position + len(x))
        # 2. RMSNorm, absmax, round to int8
        a = self._norm(x, layer.attn_norm)
        # 3. q, k, v
        q, k, v = (matrices[name](a).unflatten(-1, (-1, config.head_dim)) for name in "qkv")
        # 4. RoPE; quantise; append K, V to the cache
        q, k = (epilogue.rope(y, self._rope[here]) for y in (q, k))
        if self._channels is not None:
            offset, shift = self._channels[number]
            k = epilogue.channels(k, offset, shift)
            q = epilogue.query_channels(q, shift)
        q8, q_scale = epilogue.quantise_heads(q)
        for cache, scales, value, bits in (
            (self._k, self._k_scale, k, self.kv.k_bits),
            (self._v, self._v_scale, v, self.kv.v_bits),
        ):
            quantised, scale = epilogue.quantise_heads(value, int4=bits == 4)
            cache[number, :, here] = quantised.transpose(0, 1)
            scales[number, :, here] = scale.transpose(0, 1)
        # 5. attention over the cache
        seen = slice(0, here.stop)
        out = attention.attend(
            q8,
            q_scale,
            self._k[number, :, seen],
            self._k_scale[number, :, seen],
            self._v[number, :, seen],
            self._v_scale[number, :, seen],
            positions=torch.arange(here.start, here.stop),
            score_scale=torch.tensor(np.float32(config.head_dim**-0.5)),
        )
        # 6. (sub-norm) quantise, output projection, residual add
        a = self._norm(out.flatten(1), layer.attn_sub_norm)
        x = epilogue.residual(x, matrices["o"](a))
        # 7. RMSNorm, quantise, gate/up, GLU, (sub-norm) quantise, down, residual
        a = self._norm(x, layer.ffn_norm)
        gate = matrices["gate"](a)
        act = epilogue.gate_silu if config.activation is Activation.SILU else epilogue.gate_relu2
        h = epilogue.up(act(gate), matrices["up"](a))
        a = self._norm(h, layer.ffn_sub_norm)
        return epilogue.residual(x, matrices["down"](a))


Cache = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(layer, q, k, v) to what attention sees of q, k, v: (..., tokens, heads, head_dim) each."""


class FloatModel:
    """The float meaning of the same weights: nothing quantised but the weights, no cache, whole sequences.

    It reads nothing but `dense` of each matrix: no engine, no integer. ids and what comes of them may have leading
    dimensions for windows of one length: (..., tokens) to (..., tokens, vocab). Studies of number formats put theirs in at
    `product` and `cache`.

    Parameters
    ----------
    dtype
        float64, or float32 where perplexities of large models are to take minutes.
    """

    def __init__(self, checkpoint: Any, *, dtype: torch.dtype = torch.float64) -> None:
        self.config: ModelConfig = checkpoint.config
        self._weights = checkpoint
        self._dtype = dtype
        self._dense: dict[int, Tensor] = {}
        self.cache: Cache | None = None
        """What q, k, v go through on their way from RoPE to attention; None: nothing."""

    def logits(self, ids: list[int] | Tensor) -> Tensor:
        """Logits after every token."""
        return self.head(self.hidden(ids))

    def hidden(self, ids: list[int] | Tensor) -> Tensor:
        """Residual stream behind the last layer: (..., tokens, hidden)."""
        x = self.embed(ids)
        for number in range(self.config.layers):
            x = self.layer(number, x)
        return x

    def embed(self, ids: list[int] | Tensor) -> Tensor:
        """Embedding rows."""
        return self._matrix(self._weights.embedding)[torch.as_tensor(ids)]

    def layer(self, number: int, x: Tensor) -> Tensor:
        """Residual stream behind a layer, of all tokens from position 0 on."""
        config, layer = self.config, self._weights.layers[number]
        rope = rope_table(config, x.shape[-2]).to(self._dtype)
        a = self._norm(x, layer.attn_norm)
        q, k, v = (self.product(a, getattr(layer, name)).unflatten(-1, (-1, config.head_dim)) for name in "qkv")
        q, k = self._turn(q, rope), self._turn(k, rope)
        if self.cache is not None:
            q, k, v = self.cache(number, q, k, v)
        q, k, v = (value.transpose(-2, -3) for value in (q, k, v))
        k, v = (value.repeat_interleave(config.group, dim=-3) for value in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-2, -3).flatten(-2)
        x = x + self.product(self._norm(out, layer.attn_sub_norm), layer.o)
        a = self._norm(x, layer.ffn_norm)
        gate = self.product(a, layer.gate)
        gate = torch.nn.functional.silu(gate) if config.activation is Activation.SILU else torch.relu(gate) ** 2
        h = gate * self.product(a, layer.up)
        return x + self.product(self._norm(h, layer.ffn_sub_norm), layer.down)

    def head(self, x: Tensor) -> Tensor:
        """Logits of a residual stream."""
        return self._norm(x, self._weights.final_norm) @ self._matrix(self._weights.head).T

    def product(self, x: Tensor, matrix: Any) -> Tensor:
        """A matrix of a layer: (..., inputs) to (..., outputs)."""
        return x @ self._matrix(matrix).T

    def _norm(self, x: Tensor, gamma: np.ndarray | None) -> Tensor:
        if gamma is None:
            return x
        gain = torch.from_numpy(gamma).to(self._dtype)
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.config.rms_eps) * gain

    def _matrix(self, matrix: Any) -> Tensor:
        if id(matrix) not in self._dense:
            self._dense[id(matrix)] = dense(matrix).to(self._dtype)
        return self._dense[id(matrix)]

    @staticmethod
    def _turn(y: Tensor, rope: Tensor) -> Tensor:
        """RoPE on pairs (2i, 2i+1): y (..., tokens, heads, head_dim)."""
        cos, sin = rope[:, None, 0::2], rope[:, None, 1::2]
        even, odd = y[..., 0::2], y[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
