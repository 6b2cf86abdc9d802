"""The float meaning of a checkpoint in float32, fast enough for perplexities of SmolLM2-135M on one core.

It reads nothing but `dense()` of each matrix: no engine, no integer activation; a quantised cache only where a caller puts
one in. `golden.model.FloatModel` says the same in float64.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from golden.model import rope_table
from host_driver.weights import Checkpoint, LayerWeights
from spec.config import Activation


def _tensors(layer: LayerWeights) -> dict[str, Tensor]:
    """Norms and matrices by field name, float32."""
    parts = {name: value for name, value in vars(layer).items() if value is not None}
    return {name: torch.from_numpy(value.dense() if hasattr(value, "dense") else value) for name, value in parts.items()}


def _turn(y: Tensor, rope: Tensor) -> Tensor:
    """RoPE on pairs (2i, 2i+1): y (windows, tokens, heads, head_dim)."""
    cos, sin = rope[:, None, 0::2], rope[:, None, 1::2]
    even, odd = y[..., 0::2], y[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


Cache = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(layer, q, k, v) to what attention sees of q, k, v: (windows, tokens, heads, head_dim) each, behind RoPE."""


class FloatLlama:
    """A decoder for whole windows. ``cache``: what K and V go through on their way to attention; None: nothing."""

    cache: Cache | None = None

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config = checkpoint.config
        self.layers = [_tensors(layer) for layer in checkpoint.layers]
        self.final_norm = torch.from_numpy(checkpoint.final_norm)
        self.embedding = torch.from_numpy(checkpoint.embedding.dense())
        tied = checkpoint.head is checkpoint.embedding
        self.head = self.embedding if tied else torch.from_numpy(checkpoint.head.dense())

    def _norm(self, x: Tensor, gain: Tensor | None) -> Tensor:
        if gain is None:
            return x
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.rms_eps) * gain

    @torch.no_grad()
    def hidden(self, ids: Tensor) -> Tensor:
        """(windows, tokens) ids to (windows, tokens, hidden) behind the final norm."""
        config, rope = self.config, rope_table(self.config, ids.shape[-1])
        x = self.embedding[ids]
        for number, layer in enumerate(self.layers):
            a = self._norm(x, layer["attn_norm"])
            q, k, v = ((a @ layer[name].T).unflatten(-1, (-1, config.head_dim)) for name in "qkv")
            q, k = _turn(q, rope), _turn(k, rope)
            if self.cache is not None:
                q, k, v = self.cache(number, q, k, v)
            q, k, v = (value.transpose(1, 2) for value in (q, k, v))
            k, v = (value.repeat_interleave(config.group, dim=1) for value in (k, v))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
            x = x + self._norm(out, layer.get("attn_sub_norm")) @ layer["o"].T
            a = self._norm(x, layer["ffn_norm"])
            gate = a @ layer["gate"].T
            gate = torch.nn.functional.silu(gate) if config.activation is Activation.SILU else torch.relu(gate) ** 2
            x = x + self._norm(gate * (a @ layer["up"].T), layer.get("ffn_sub_norm")) @ layer["down"].T
        return self._norm(x, self.final_norm)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """(windows, tokens) ids to (windows, tokens, vocab)."""
        return self.hidden(ids) @ self.head.T
