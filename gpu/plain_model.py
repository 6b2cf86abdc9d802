"""The plain path: dense weights in one float type, PyTorch's own kernels, a KV cache, CUDA graphs for decoding.

What a user gets from a framework without custom kernels: weights are dequantised when the model is made, norms and the
rotation are computed in float32, everything else in `dtype`. Step numbers are those of the prompt-to-token table.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from gpu.decoder import Decoder
from spec.config import Activation, ModelConfig

FIRST_BUCKET = 128
"""Keys that the shortest decode graph reads; longer ones read a power of two."""


def rope_angles(config: ModelConfig, positions: int) -> tuple[Tensor, Tensor]:
    """cos, sin of every position and pair, each (positions, head_dim / 2) float32, from angles in float64."""
    pair = np.arange(config.head_dim // 2, dtype=np.float64)
    angle = np.arange(positions, dtype=np.float64)[:, None] * config.rope_theta ** (-2.0 * pair / config.head_dim)
    return torch.from_numpy(np.cos(angle).astype(np.float32)), torch.from_numpy(np.sin(angle).astype(np.float32))


def turn(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in float32 on pairs (2i, 2i+1): y (tokens, heads, head_dim), cos, sin (tokens, head_dim / 2)."""
    even, odd = y[..., 0::2].float(), y[..., 1::2].float()
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(y.dtype)


class PlainModel(Decoder):
    """A decoder with its KV cache, dense.

    Parameters
    ----------
    checkpoint
        Anything with the fields of ``host_driver.weights.Checkpoint``.
    slots
        Slots of the KV cache.
    device, dtype
        Where the model lives, and the type of weights, activations and cache.
    compiled
        Let torch.compile fuse the decode step.
    """

    def __init__(
        self, checkpoint: Any, slots: int, *, device: torch.device, dtype: torch.dtype, compiled: bool = False
    ) -> None:
        super().__init__(checkpoint.config, slots, device, torch.int64)
        self.dtype = dtype
        self._layers = [self._layer(layer) for layer in checkpoint.layers]
        self._final_norm = self._vector(checkpoint.final_norm)
        self._embedding = self._matrix(checkpoint.embedding)
        self._head = self._embedding if checkpoint.head is checkpoint.embedding else self._matrix(checkpoint.head)
        self._cos, self._sin = (part.to(device) for part in rope_angles(self.config, slots))
        shape = (self.config.layers, self.config.kv_heads, slots, self.config.head_dim)
        self._k, self._v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self._forward = torch.compile(self._token, dynamic=False, fullgraph=True) if compiled else self._token

    def _matrix(self, *matrices: Any) -> Tensor:
        """Dense weights of matrices below each other: (sum of outputs, inputs)."""
        parts = [torch.from_numpy(matrix.dense()).to(self.device, self.dtype) for matrix in matrices]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _layer(self, layer: Any) -> dict[str, Any]:
        """q, k, v and gate, up are one product each."""
        return {
            "qkv": self._matrix(layer.q, layer.k, layer.v),
            "o": self._matrix(layer.o),
            "gate_up": self._matrix(layer.gate, layer.up),
            "down": self._matrix(layer.down),
        } | self._norms(layer)

    # the walk ----------------------------------------------------------------------------------------------------

    def _norm(self, x: Tensor, gain: Tensor | None) -> Tensor:
        if gain is None:
            return x
        wide = x.float()
        return functional.rms_norm(wide, wide.shape[-1:], gain, self.config.rms_eps).to(x.dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        """q (tokens, heads, hd), k, v (kv_heads, keys, hd); `seen` (tokens, keys) bool, None: causal from slot 0."""
        tokens, heads, head_dim = q.shape
        if tokens == 1:  # query heads that share a KV head become rows of one product
            rows = q.view(1, self.config.kv_heads, self.config.group, head_dim)
            out = functional.scaled_dot_product_attention(rows, k[None], v[None], attn_mask=seen)
            return out.reshape(1, heads * head_dim)
        out = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k[None], v[None], attn_mask=seen, is_causal=seen is None,
            enable_gqa=self.config.group > 1,
        )  # fmt: skip
        return out[0].transpose(0, 1).reshape(tokens, heads * head_dim)

    def _run(self, ids: Tensor, positions: Tensor, keys: int, seen: Tensor | None) -> Tensor:
        """Logits (vocab,) float32 after the last token; the cache grows. ids, positions (tokens,) int64."""
        config = self.config
        x = self._embedding[ids]  # 1. embedding rows
        cos, sin = self._cos[positions], self._sin[positions]
        for number, layer in enumerate(self._layers):
            a = self._norm(x, layer["attn_norm"])  # 2.
            qkv = functional.linear(a, layer["qkv"]).unflatten(-1, (-1, config.head_dim))  # 3.
            q, k, v = qkv.split([config.heads, config.kv_heads, config.kv_heads], dim=1)
            q, k = turn(q, cos, sin), turn(k, cos, sin)  # 4. RoPE; append
            self._k[number].index_copy_(1, positions, k.transpose(0, 1))
            self._v[number].index_copy_(1, positions, v.transpose(0, 1))
            out = self._attend(q, self._k[number, :, :keys], self._v[number, :, :keys], seen)  # 5.
            x = x + functional.linear(self._norm(out, layer["attn_sub_norm"]), layer["o"])  # 6.
            a = self._norm(x, layer["ffn_norm"])  # 7.
            gate, up = functional.linear(a, layer["gate_up"]).chunk(2, dim=-1)
            gate = functional.silu(gate) if config.activation is Activation.SILU else functional.relu(gate).square()
            x = x + functional.linear(self._norm(gate * up, layer["ffn_sub_norm"]), layer["down"])
        return functional.linear(self._norm(x[-1:], self._final_norm), self._head)[0].float()  # 8.

    def _token(self, keys: int) -> None:
        seen = torch.arange(keys, device=self.device)[None] <= self._position
        self._logits.copy_(self._run(self._ids, self._position, keys, seen))
        self._ids.copy_(self._logits.argmax(keepdim=True))
        self._position.add_(1)

    def _decode(self, keys: int) -> None:
        self._forward(keys)

    def _bucket(self, position: int) -> int:
        return min(self.slots, max(FIRST_BUCKET, 1 << position.bit_length()))

    def _prefill(self, ids: list[int], position: int) -> None:
        behind = position + len(ids)
        positions = torch.arange(position, behind, device=self.device)
        seen = None if position == 0 else torch.arange(behind, device=self.device)[None] <= positions[:, None]
        self._logits.copy_(self._run(torch.tensor(ids, device=self.device), positions, behind, seen))
        self._ids.copy_(self._logits.argmax(keepdim=True))
        self._position.fill_(behind)
