"""The memory image: a compiled model's regions filled with a checkpoint's numbers."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from host_driver.compiler import LAYERS, STEP, CompiledModel, compile_model
from host_driver.errors import InvalidRequest
from host_driver.pack import embedding_table, pack_matrix, rope_table, segment
from host_driver.program_builder import Segment
from host_driver.weights import Checkpoint, TernaryMatrix, check_shapes
from spec.config import HEAD_PLANES, AcceleratorConfig
from spec.layout import SegmentKind

UInt8 = NDArray[np.uint8]

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


def compile_checkpoint(
    checkpoint: Checkpoint, accelerator: AcceleratorConfig, *, slots: int | None = None
) -> CompiledModel:
    """`compile_model` with the checkpoint's weight scales. Raises InvalidRequest if a shape is wrong or too large."""
    try:
        check_shapes(checkpoint)
    except ValueError as error:
        raise InvalidRequest(f"model {checkpoint.config.name!r}: {error}") from None
    scales = {
        (index, name): getattr(layer, name).scale for index, layer in enumerate(checkpoint.layers) for name in MATRICES
    }
    return compile_model(checkpoint.config, accelerator, slots=slots, scales=scales)


def _payload(plan: Segment, checkpoint: Checkpoint, accelerator: AcceleratorConfig) -> tuple[UInt8, int]:
    """Bytes of a segment and its lookup rows (0 for AUX)."""
    source = checkpoint if plan.layer is None else checkpoint.layers[plan.layer]
    weights = getattr(source, plan.weights)
    if plan.kind is SegmentKind.AUX:
        dtype = "<f2" if plan.weights == "head_scale" else "<f4"
        return np.ascontiguousarray(weights[plan.start : plan.stop], dtype=dtype).view(np.uint8), 0
    planes = 1 if isinstance(weights, TernaryMatrix) else HEAD_PLANES
    values = weights.values if isinstance(weights, TernaryMatrix) else weights
    piece = values[plan.start : plan.stop]
    rows = accelerator.tlmm.matmul_rows(piece.shape[1], piece.shape[0], planes)
    return pack_matrix(piece, accelerator.tlmm, planes), rows


def stream_segments(compiled: CompiledModel, checkpoint: Checkpoint, plan: tuple[Segment, ...]) -> Iterator[UInt8]:
    """Segments of a stream, header and payload, in order."""
    for part in plan:
        payload, rows = _payload(part, checkpoint, compiled.accelerator)
        yield segment(part.kind, payload, beat_bytes=compiled.accelerator.bus.weight_bytes, rows=rows)


def memory_image(compiled: CompiledModel, checkpoint: Checkpoint) -> Iterator[tuple[int, bytes]]:
    """(address, bytes) of everything that must be in memory before the first step; the cache needs no contents."""
    memory, model = compiled.memory, compiled.model
    for name in (LAYERS, STEP):
        yield compiled.programs[name].address, compiled.programs[name].pack()
    yield memory["embedding"].address, embedding_table(checkpoint.embedding, checkpoint.embedding_scale).tobytes()
    rope = rope_table(positions=compiled.slots, head_dim=model.head_dim, theta=model.rope_theta)
    yield memory["rope"].address, rope.astype("<f4").tobytes()
    for name, plan in (("layer_stream", compiled.layer_stream), ("head_stream", compiled.head_stream)):
        address = memory[name].address
        for data in stream_segments(compiled, checkpoint, plan):
            yield address, data.tobytes()
            address += len(data)
        assert address == memory[name].end, f"{name} ends at {address:#x}, planned {memory[name].end:#x}"
