"""What a descriptor leaves behind on a device, as arrays that can be compared element by element."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from host_driver.compiler import CompiledModel
from host_driver.device import Device
from host_driver.memory_map import VectorRegion
from host_driver.program_builder import Instruction
from spec.config import LANES
from spec.descriptors import Epilogue, Opcode
from spec.layout import KV_SCALE_BYTES


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a descriptor left on one device: flat arrays with a name for each element."""

    what: str
    bits: NDArray[np.integer]
    """Compared for equality; FP32 as bit patterns."""
    floats: bool
    name: Callable[[int], str]

    def value(self, index: int) -> int | float:
        if self.floats:
            return float(self.bits[index : index + 1].view(np.float32)[0])
        return int(self.bits[index])


def _vector(device: Device, what: str, row: int, beats: int, stride: int, tokens: int, first: int) -> Observation:
    """``tokens`` vectors of ``beats`` rows, whose elements are numbered from ``first`` on."""
    words = np.concatenate([device.read_vector(row + token * stride, beats) for token in range(tokens)])
    width = beats * LANES
    return Observation(
        what=what, bits=words, floats=True, name=lambda index: f"token {index // width} element {first + index % width}"
    )


def _int4(packed: NDArray[np.int8]) -> NDArray[np.int8]:
    """Two values a byte, the lower nibble first, as int8."""
    return np.stack((packed << 4 >> 4, packed >> 4), axis=-1).reshape(-1)


def kv_slots(device: Device, layer: int, position: int, tokens: int) -> Iterator[Observation]:
    """K, V and their scales of all KV heads of a layer, at some slots."""
    compiled = device.compiled
    kv, dim = compiled.kv_layout, compiled.model.head_dim
    for head in range(compiled.model.kv_heads):
        base = compiled.kv_address(layer, head)
        for name, start, row, bits in (
            ("K", base, kv.k_row_bytes, kv.k_bits),
            ("V", base + kv.v_offset, kv.v_row_bytes, kv.v_bits),
        ):
            data = np.frombuffer(device.transport.read_mem(start + position * row, tokens * row), dtype=np.int8)
            yield Observation(
                what=f"{name} cache",
                bits=_int4(data) if bits == 4 else data,
                floats=False,
                name=lambda index, head=head: f"KV head {head} slot {position + index // dim} element {index % dim}",
            )
        start = base + kv.scale_offset + position * KV_SCALE_BYTES
        yield Observation(
            what="KV scale",
            bits=np.frombuffer(device.transport.read_mem(start, tokens * KV_SCALE_BYTES), dtype="<u4"),
            floats=True,
            name=lambda index, head=head: f"KV head {head} slot {position + index // 2} of {'KV'[index % 2]}",
        )


def _kv_part(device: Device, layer: int, position: int, tokens: int, epilogue: int) -> Iterator[Observation]:
    """What KEY or VALUE left."""
    letter = "K" if epilogue == Epilogue.KEY else "V"
    for part in kv_slots(device, layer, position, tokens):
        if part.what == f"{letter} cache":
            yield part
        elif part.what == "KV scale":
            yield Observation(
                what=f"{letter} scale",
                bits=part.bits["KV".index(letter) :: 2],
                floats=True,
                name=lambda index, part=part: part.name(2 * index + "KV".index(letter)),
            )


def head_result(logits: NDArray[np.float32], token: int) -> Iterator[Observation]:
    """What step 8 left: logits, and the greedy token."""
    yield Observation(what="logits", bits=logits.view(np.uint32), floats=True, name=lambda index: f"element {index}")
    yield Observation(what="argmax", bits=np.array([token]), floats=False, name=lambda _: "token")


def _region(compiled: CompiledModel, row: int) -> tuple[str, VectorRegion]:
    """The region of the vector memory that a row lies in."""
    regions = [
        ("X (residual stream)", compiled.vector.x),
        ("Y (attention output)", compiled.vector.y),
        ("H (hidden values)", compiled.vector.h),
    ]
    return next((name, region) for name, region in reversed(regions) if row >= region.row)


def observable(instruction: Instruction) -> bool:
    """Whether a descriptor leaves something that can be read at once; logits are compared at the end of the step."""
    if instruction.opcode is Opcode.MATMUL:
        return instruction.fields["epilogue"] not in (Epilogue.QUERY, Epilogue.LOGITS)
    return instruction.opcode in (Opcode.EMBED, Opcode.ATTEND)


def observe(device: Device, instruction: Instruction, position: int, tokens: int) -> Iterator[Observation]:
    """What a descriptor just left on a device."""
    fields, compiled = instruction.fields, device.compiled
    if instruction.opcode is Opcode.MATMUL and fields["epilogue"] in (Epilogue.KEY, Epilogue.VALUE):
        yield from _kv_part(device, fields["tag"] >> 8, position, tokens, fields["epilogue"])
    else:
        beats = {
            Opcode.EMBED: lambda: fields["row_beats"],
            Opcode.ATTEND: lambda: fields["kv_heads"] * fields["group"] * fields["head_beats"],
            Opcode.MATMUL: lambda: fields["beats"],
        }[instruction.opcode]()
        what, region = _region(compiled, fields["dst"])
        first = (fields["dst"] - region.row) * LANES
        yield _vector(device, what, fields["dst"], beats, fields["dst_stride"], tokens, first)
