"""The packed path: the same walk with weights as they are stored, int8 activations and an int8 KV cache, on Triton kernels.

The integer meaning is the accelerator's: absmax int8 activations with a scale a token (ternary, rows) or for each 32 (groups),
exact integer sums, scales behind them, int8 K and V a head. What is float may differ from golden in the last bits, as order
and function approximations are the GPU's own. Step numbers are those of the prompt-to-token table.
"""

from typing import Any

import torch
from torch import Tensor

from gpu.decoder import Decoder
from gpu.gemm import gemm
from gpu.gemv import gemv
from gpu.kv_attention import KvCache, append, attend
from gpu.packing import PackedMatrix, Scaling, pack
from gpu.plain_model import rope_angles
from gpu.quantise import NONE, RELU2, SILU, quantise
from spec.config import Activation


class PackedModel(Decoder):
    """A decoder with its KV cache, packed.

    Parameters
    ----------
    checkpoint
        Anything with the fields of ``host_driver.weights.Checkpoint``.
    slots
        Slots of the KV cache.
    device
        A GPU, or the CPU under Triton's interpreter.
    """

    def __init__(self, checkpoint: Any, slots: int, *, device: torch.device) -> None:
        super().__init__(checkpoint.config, slots, device, torch.int32)
        self._layers = [self._layer(layer) for layer in checkpoint.layers]
        self._final_norm = self._vector(checkpoint.final_norm)
        self.head = pack(checkpoint.head, device=device)
        self._embedding = torch.from_numpy(checkpoint.embedding.dense()).to(device)
        self._cos, self._sin = (part.to(device) for part in rope_angles(self.config, slots))
        self._cache = KvCache.empty(self.config, slots, device)

    def _layer(self, layer: Any) -> dict[str, Any]:
        """q, k, v and gate, up are one product each."""
        return {
            "qkv": pack(layer.q, layer.k, layer.v, device=self.device),
            "o": pack(layer.o, device=self.device),
            "gate_up": pack(layer.gate, layer.up, device=self.device),
            "down": pack(layer.down, device=self.device),
        } | self._norms(layer)

    @property
    def layer_bytes(self) -> int:
        """Bytes of all layers' matrices."""
        names = ("qkv", "o", "gate_up", "down")
        return sum(layer[name].size for layer in self._layers for name in names)

    def _linear(
        self, x: Tensor, w: PackedMatrix, gain: Tensor | None, *, gate: int = NONE, residual: Tensor | None = None
    ) -> Tensor:
        """(GLU,) (norm,) quantise, product (, residual add)."""
        a = quantise(
            x, w.padded, grouped=w.scaling is Scaling.GROUP, gain=gain, eps=self.config.rms_eps, gate=gate
        )
        return (gemv if x.shape[0] == 1 else gemm)(a, w, residual=residual)

    def _run(self, ids: Tensor) -> None:
        """Tokens from position ``_position`` on through the model; leaves logits, next token and next position."""
        config = self.config
        gate = SILU if config.activation is Activation.SILU else RELU2
        x = self._embedding[ids]  # 1. embedding rows
        for number, layer in enumerate(self._layers):
            qkv = self._linear(x, layer["qkv"], layer["attn_norm"])  # 2., 3.
            q, q_scale = append(config, qkv, self._cos, self._sin, self._position, self._cache, number)  # 4.
            out = attend(config, q, q_scale, self._position, self._cache, number)  # 5.
            x = self._linear(out, layer["o"], layer["attn_sub_norm"], residual=x)  # 6.
            gate_up = self._linear(x, layer["gate_up"], layer["ffn_norm"])  # 7.
            x = self._linear(gate_up, layer["down"], layer["ffn_sub_norm"], gate=gate, residual=x)
        self._logits.copy_(self._linear(x[-1:], self.head, self._final_norm)[0])  # 8.
        self._ids.copy_(self._logits.argmax(keepdim=True))
        self._position.add_(len(ids))

    def _prefill(self, ids: list[int], position: int) -> None:
        self._position.fill_(position)
        self._run(torch.tensor(ids, device=self.device))

    def _decode(self, keys: int) -> None:
        self._run(self._ids)
