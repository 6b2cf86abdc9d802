"""The memory image: a compiled model's regions filled with a checkpoint's numbers."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from host_driver.compiler import LAYERS, STEP, CompiledModel, compile_model
from host_driver.errors import InvalidRequest
from host_driver.group_pack import matrix_exponent, pack_groups
from host_driver.key_channels import KeyChannels
from host_driver.pack import embedding_table, pack_matrix, rope_table, segment
from host_driver.program_builder import MatrixFormat, Segment
from host_driver.weights import Checkpoint, GroupMatrix, RowMatrix, TernaryMatrix, check_shapes
from spec.config import HEAD_PLANES, K_GROUP, AcceleratorConfig, GroupMatmulConfig, KvFormat
from spec.layout import SegmentKind
from spec.presets import PRESETS

UInt8 = NDArray[np.uint8]

AnyMatrix = TernaryMatrix | RowMatrix | GroupMatrix

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


def compile_checkpoint(
    checkpoint: Checkpoint,
    accelerator: AcceleratorConfig,
    *,
    slots: int | None = None,
    kv: KvFormat = KvFormat.INT8,
    keys: KeyChannels | None = None,
) -> CompiledModel:
    """`compile_model` with the checkpoint's weight scales. Raises InvalidRequest if a shape is wrong or too large."""
    try:
        check_shapes(checkpoint)
    except ValueError as error:
        raise InvalidRequest(f"model {checkpoint.config.name!r}: {error}") from None
    formats: dict[tuple[int | None, str], MatrixFormat] = {(None, "head"): _format("head", checkpoint.head, accelerator)}
    for index, layer in enumerate(checkpoint.layers):
        for name in MATRICES:
            formats[index, name] = _format(f"layer {index}: {name}", getattr(layer, name), accelerator)
    return compile_model(checkpoint.config, accelerator, slots=slots, kv=kv, keys=keys, formats=formats)


def _format(name: str, matrix: AnyMatrix, accelerator: AcceleratorConfig) -> MatrixFormat:
    """Of a matrix that this build's engine can take. Raises InvalidRequest on any other."""
    engine, grouped = accelerator.matmul, isinstance(matrix, GroupMatrix)
    if grouped is not accelerator.grouped:
        kind = "group-quantised" if grouped else "ternary"
        fitting = ", ".join(preset.name for preset in PRESETS.values() if preset.grouped is grouped)
        raise InvalidRequest(
            f"{name}: weights are {kind}, preset {accelerator.name!r} computes with others; presets for them: {fitting}"
        )
    if isinstance(matrix, TernaryMatrix):
        return MatrixFormat(scale=matrix.scale)
    if isinstance(matrix, GroupMatrix):
        assert isinstance(engine, GroupMatmulConfig), "checked above"
        if matrix.bits not in engine.weight_bits:
            widths = ", ".join(map(str, engine.weight_bits))
            raise InvalidRequest(
                f"{name}: weights have {matrix.bits} bits, engine {engine.engine} of preset {accelerator.name!r} takes {widths}"
            )
        return MatrixFormat(bits=matrix.bits, exponent=matrix_exponent(matrix))
    return MatrixFormat()


def _channel_words(plan: Segment, compiled: CompiledModel) -> NDArray[np.uint32]:
    """Words of the channels of a layer's Q or K."""
    assert compiled.keys is not None, "only their segments are AUX of q and k"
    assert plan.layer is not None, "they are a layer's"
    if plan.weights == "q":
        return compiled.keys.q_words(plan.layer, compiled.model.group)
    return compiled.keys.k_words(plan.layer)


def _payload(plan: Segment, checkpoint: Checkpoint, compiled: CompiledModel) -> tuple[UInt8, int]:
    """Bytes of a segment, and its lookup rows (TRITS), bits of a weight (GROUPS), 0 (AUX)."""
    accelerator = compiled.accelerator
    source = checkpoint if plan.layer is None else checkpoint.layers[plan.layer]
    weights = getattr(source, plan.weights)
    if plan.kind is SegmentKind.AUX and plan.layer is not None and plan.weights in ("q", "k"):
        return _channel_words(plan, compiled)[plan.start : plan.stop].astype("<u4").view(np.uint8), 0
    if plan.kind is SegmentKind.AUX:
        numbers, dtype = (weights.scale, "<f2") if isinstance(weights, RowMatrix) else (weights, "<f4")
        return np.ascontiguousarray(numbers[plan.start : plan.stop], dtype=dtype).view(np.uint8), 0
    rows = slice(plan.start, plan.stop)
    if isinstance(weights, GroupMatrix):
        assert isinstance(accelerator.matmul, GroupMatmulConfig), "checked when compiled"
        piece = replace(weights, codes=weights.codes[rows], scale=weights.scale[rows], minimum=weights.minimum[rows])
        return pack_groups(piece, accelerator.matmul), weights.bits
    planes = 1 if isinstance(weights, TernaryMatrix) else HEAD_PLANES
    values = weights.values[rows]
    lookup_rows = accelerator.tlmm.matmul_rows(values.shape[1], values.shape[0], planes)
    return pack_matrix(values, accelerator.tlmm, planes), lookup_rows


def symmetric_int8(matrix: GroupMatrix) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Values (n, k) and scales (n, k / 32): as they are where minimum = -2^(bits-1) scale, else rounded to 8 bits again."""
    half = 1 << matrix.bits - 1
    if np.array_equal(matrix.minimum, -half * matrix.scale.astype(np.float32)):
        values = (matrix.codes.astype(np.int16) - half).astype(np.int8)
        return values, np.repeat(matrix.scale, matrix.group // K_GROUP, axis=1)
    groups = matrix.dense().reshape(matrix.shape[0], -1, K_GROUP)
    scale = (np.abs(groups).max(-1) / 127).astype(np.float16)
    wide = np.where(scale > 0, scale, np.float16(1)).astype(np.float32)[..., None]
    values = np.clip(np.rint(groups / wide), -127, 127).astype(np.int8)
    return values.reshape(matrix.shape), scale


def _embedding(matrix: RowMatrix | GroupMatrix) -> UInt8:
    """The embedding table. A group-quantised one must be int8 times a scale; see `symmetric_int8`."""
    if isinstance(matrix, RowMatrix):
        return embedding_table(matrix.values, matrix.scale)
    values, scale = symmetric_int8(matrix)
    return embedding_table(values, scale)


def stream_segments(compiled: CompiledModel, checkpoint: Checkpoint, plan: tuple[Segment, ...]) -> Iterator[UInt8]:
    """Segments of a stream, header and payload, in order."""
    for part in plan:
        payload, rows = _payload(part, checkpoint, compiled)
        yield segment(part.kind, payload, beat_bytes=compiled.accelerator.bus.weight_bytes, rows=rows)


def memory_image(compiled: CompiledModel, checkpoint: Checkpoint) -> Iterator[tuple[int, bytes]]:
    """(address, bytes) of everything that must be in memory before the first step; the cache needs no contents."""
    memory, model = compiled.memory, compiled.model
    for name in (LAYERS, STEP):
        yield compiled.programs[name].address, compiled.programs[name].pack()
    yield memory["embedding"].address, _embedding(checkpoint.embedding).tobytes()
    rope = rope_table(positions=compiled.slots, head_dim=model.head_dim, theta=model.rope_theta)
    yield memory["rope"].address, rope.astype("<f4").tobytes()
    for name, plan in (("layer_stream", compiled.layer_stream), ("head_stream", compiled.head_stream)):
        address = memory[name].address
        for data in stream_segments(compiled, checkpoint, plan):
            yield address, data.tobytes()
            address += len(data)
        assert address == memory[name].end, f"{name} ends at {address:#x}, planned {memory[name].end:#x}"
