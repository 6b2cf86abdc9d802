"""What the GPU paths share: inputs that stay on the device, decode steps as CUDA graphs, the next token in advance."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spec.config import ModelConfig

WARM_UP_STEPS = 3
"""Eager decode steps in front of a capture: libraries choose their kernels and allocate their work space in them."""

NORMS = ("attn_norm", "attn_sub_norm", "ffn_norm", "ffn_sub_norm")


class Decoder(ABC):
    """A decoder with its KV cache.

    A decode step reads `_ids` and `_position`, and leaves the logits, the most likely token and the next position in them:
    it can be repeated without the host.

    Parameters
    ----------
    config, slots
        Of the model, and of its KV cache.
    device, position_type
        Where all of it lives, and the integer type that the path's kernels take positions in.
    """

    def __init__(self, config: ModelConfig, slots: int, device: torch.device, position_type: torch.dtype) -> None:
        self.config, self.slots, self.device = config, slots, device
        self._ids = torch.zeros(1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=position_type, device=device)
        self._logits = torch.zeros(config.vocab, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._ahead: tuple[int, int] | None = None
        """Token and position that the device already holds as its next input."""
        self._behind = 0

    # the path's own --------------------------------------------------------------------------------------------------

    @abstractmethod
    def _prefill(self, ids: list[int], position: int) -> None:
        """Several tokens; leaves what a decode step leaves."""

    @abstractmethod
    def _decode(self, keys: int) -> None:
        """One token, from the inputs on the device. `keys`: what `_bucket` said."""

    def _bucket(self, position: int) -> int:
        """Keys that a decode step at this position reads: one graph for each size. 0: any number, by one graph."""
        return 0

    # shared ----------------------------------------------------------------------------------------------------------

    def _vector(self, values: np.ndarray | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.float32, device=self.device)

    def _norms(self, layer: Any) -> dict[str, Tensor | None]:
        """Gains by field name; None where the model has no such norm."""
        return {name: self._vector(getattr(layer, name)) for name in NORMS}

    def _capture(self, keys: int) -> torch.cuda.CUDAGraph:
        """A decode graph. Warm-up steps write slots from the current position on, which later steps write again."""
        ids, position = self._ids.clone(), self._position.clone()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self._position.copy_(position)
                self._decode(keys)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._decode(keys)
        self._ids.copy_(ids)
        self._position.copy_(position)
        return graph

    @torch.inference_mode()
    def step(self, ids: list[int], position: int) -> None:
        """Tokens at positions ``position`` on. Raises ValueError when they do not fit in the cache."""
        if position + len(ids) > self.slots:
            raise ValueError(
                f"positions up to {position + len(ids) - 1} need more than the {self.slots} slots of the cache"
            )
        known, self._ahead, self._behind = self._ahead, None, position + len(ids)
        if len(ids) > 1:
            self._prefill(ids, position)
            return
        if known != (ids[0], position):
            self._ids.fill_(ids[0])
            self._position.fill_(position)
        keys = self._bucket(position)
        if self.device.type != "cuda":
            self._decode(keys)
            return
        if keys not in self._graphs:
            self._graphs[keys] = self._capture(keys)
        self._graphs[keys].replay()

    def token(self) -> int:
        """The most likely next token. Waits for the device."""
        token = int(self._ids.item())
        self._ahead = (token, self._behind)
        return token

    def logits(self) -> Tensor:
        """(vocab,) float32 on the host, after the last step."""
        return self._logits.cpu()
