"""The baselines that the host driver finds by name: `cpu`, `gpu` (plain path) and `gpu-packed` (Triton kernels).

A factory takes a checkpoint and the slots of the cache. RuntimeError with one line where the device is not there or too
small; ValueError where the model is of a kind that the path cannot run.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpu import roofline
from gpu.accounting import StepBytes, step_bytes, step_macs
from gpu.plain_model import PlainModel
from spec.config import ModelConfig

if TYPE_CHECKING:
    from gpu.packed_model import PackedModel

GPU_DTYPE = torch.bfloat16
"""Of the plain path: as wide as FP16 in memory, and a ReLU2 model's hidden values do not overflow it."""


def require_gpu(name: str) -> torch.device:
    """The GPU. Raises RuntimeError with one line where PyTorch has none."""
    if not torch.cuda.is_available():
        why = "is built without CUDA" if torch.version.cuda is None else "finds no driver or no card"
        raise RuntimeError(
            f"device {name!r} needs a CUDA GPU, and this machine has none (torch {torch.__version__} {why}): use --device cpu"
        )
    return torch.device("cuda")


class CpuBaseline:
    """The plain path in float32 on the processor."""

    name = "cpu"

    def __init__(self, checkpoint: Any, slots: int) -> None:
        self.check()
        self.model: ModelConfig = checkpoint.config
        self.device, self.dtype = self._place()
        self._walk = self._open(checkpoint, slots)
        self._ceilings: roofline.Roofline | None = None

    @classmethod
    def check(cls) -> None:
        """Raises RuntimeError where the device is not there."""

    def _place(self) -> tuple[torch.device, torch.dtype]:
        return torch.device("cpu"), torch.float32

    def _open(self, checkpoint: Any, slots: int) -> "PlainModel | PackedModel":
        return PlainModel(checkpoint, slots, device=self.device, dtype=self.dtype)

    @property
    def description(self) -> str:
        """Device and number format, as a report names them."""
        return f"float32, {torch.get_num_threads()} threads"

    def run(self, tokens: list[int], position: int, *, logits: bool) -> tuple[int, NDArray[np.float32] | None]:
        """Runs tokens through the model: the most likely next one, and the logits (vocab,) if they are asked for."""
        self._walk.step(tokens, position)
        token = self._walk.token()
        return token, self._walk.logits().numpy() if logits else None

    def bytes_of(self, tokens: int, position: int, heads: int) -> StepBytes:
        """Bytes that a step must move."""
        width, model = self.dtype.itemsize, self.model
        return step_bytes(
            model, weights=width * model.linear_weights, head=width * model.head_weights,
            slot_bytes=2 * width * model.head_dim, row_bytes=width * model.hidden,
            tokens=tokens, position=position, heads=heads,
        )  # fmt: skip

    def macs_of(self, tokens: int, position: int, heads: int) -> int:
        """Multiply-accumulates of a step."""
        return step_macs(self.model, tokens=tokens, position=position, heads=heads)

    def ceilings(self) -> tuple[float, float]:
        """Measured bytes a second and multiply-accumulates a second of this device."""
        if self._ceilings is None:
            self._ceilings = roofline.measure(self.device, self.dtype)
        return self._ceilings.bytes_per_s, self._ceilings.macs_per_s


class GpuBaseline(CpuBaseline):
    """The plain path in bfloat16 on the GPU, decoding by CUDA graphs."""

    name = "gpu"

    @classmethod
    def check(cls) -> None:
        require_gpu(cls.name)

    def _place(self) -> tuple[torch.device, torch.dtype]:
        return require_gpu(self.name), GPU_DTYPE

    @property
    def description(self) -> str:
        return f"{torch.cuda.get_device_name(self.device)}, {str(self.dtype).removeprefix('torch.')}"


class PackedGpuBaseline(GpuBaseline):
    """The packed path on the GPU: weights as stored, int8 activations and cache. Its product ceiling is int8's."""

    name = "gpu-packed"

    def _place(self) -> tuple[torch.device, torch.dtype]:
        return require_gpu(self.name), torch.int8

    def _open(self, checkpoint: Any, slots: int) -> "PackedModel":
        from gpu.packed_model import PackedModel  # here, as the plain path needs no Triton

        self._packed = PackedModel(checkpoint, slots, device=self.device)
        return self._packed

    @property
    def description(self) -> str:
        return f"{torch.cuda.get_device_name(self.device)}, packed weights, int8 activations"

    def bytes_of(self, tokens: int, position: int, heads: int) -> StepBytes:
        model = self.model
        return step_bytes(
            model, weights=self._packed.layer_bytes, head=self._packed.head.size,
            slot_bytes=2 * (model.head_dim + 4), row_bytes=4 * model.hidden,
            tokens=tokens, position=position, heads=heads,
        )  # fmt: skip
