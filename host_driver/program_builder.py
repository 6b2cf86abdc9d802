"""Descriptors and stream segments of single operations, collected in the one order in which both are consumed."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from host_driver.group_pack import groups_payload_bytes
from host_driver.memory_map import VectorRegion
from host_driver.pack import trits_payload_bytes
from spec import descriptors
from spec.config import ALIGN_BITS, HEAD_PLANES, LANES, AcceleratorConfig, ModelConfig, TlmmConfig, ceil_div
from spec.descriptors import Epilogue, Opcode, Unit
from spec.layout import CHANNEL_BYTES, SegmentKind


def _mask(*units: Unit) -> int:
    return sum(1 << unit for unit in units)


WAIT_COMPUTE = _mask(Unit.LOADER, Unit.VECTOR, Unit.MATMUL, Unit.ATTENTION)
"""What NORM and MATMUL wait for: these units share the vector memory's ports and the AUX stream, one at a time."""

WAIT_ATTEND = WAIT_COMPUTE | _mask(Unit.KV_WRITE)
"""ATTEND also reads what KEY and VALUE appended."""

WAIT_ALL = _mask(*Unit)

FP16_BIAS = 25
"""An FP16 number is a whole significand times 2^(exponent - 25)."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One segment of the weight stream and whose numbers it holds: ``layer`` None is the final norm or the head."""

    kind: SegmentKind
    layer: int | None
    weights: str
    """Field of `LayerWeights`, or ``final_norm``, ``head``. AUX of a `RowMatrix` is its scales, of ``q`` and ``k`` of a layer
    their key channels."""
    start: int
    stop: int
    """Rows of a matrix, or elements of a vector."""
    beats: int
    """Payload beats, without the header."""


@dataclass(frozen=True, kw_only=True)
class MatrixFormat:
    """What a MATMUL descriptor says about its matrix besides its shape."""

    scale: float = 1.0
    """FP32 scale of a ternary matrix."""
    bits: int = 4
    """Bits of a group-quantised weight."""
    exponent: int = 15
    """Largest exponent of its scales and minima (docs/numerics.md section 3b)."""


HEAD_FORMAT = MatrixFormat(bits=8)
"""Of the head, as long as its weights are not known."""


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One descriptor before it is packed."""

    opcode: Opcode
    fields: dict[str, int]

    def pack(self) -> bytes:
        """Its 64 bytes."""
        return descriptors.pack(self.opcode, **self.fields)


@dataclass(frozen=True, kw_only=True)
class Program:
    """Descriptors at consecutive addresses, ended by END."""

    address: int
    instructions: tuple[Instruction, ...]

    def pack(self) -> bytes:
        """All descriptors."""
        return b"".join(instruction.pack() for instruction in self.instructions)


def fp32_bits(value: float) -> int:
    """Bit pattern of the binary32 next to a number."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


def tag_of(layer: int, step: int) -> int:
    """A descriptor's tag: layer, and step of the prompt-to-token table."""
    return layer << 8 | step


@dataclass(kw_only=True)
class ProgramBuilder:
    """Descriptors and stream segments so far. `formats`: of the matrices by (layer, name), (None, "head") for the head."""

    model: ModelConfig
    accelerator: AcceleratorConfig
    tile: int
    formats: dict[tuple[int | None, str], MatrixFormat]
    instructions: list[Instruction] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    def emit(self, opcode: Opcode, **fields: int) -> None:
        """One descriptor."""
        self.instructions.append(Instruction(opcode=opcode, fields=fields))

    def segment(self, kind: SegmentKind, layer: int | None, weights: str, start: int, stop: int, size: int) -> None:
        """One stream segment of ``size`` payload bytes."""
        beats = ceil_div(size, self.accelerator.bus.weight_bytes)
        self.segments.append(
            Segment(kind=kind, layer=layer, weights=weights, start=start, stop=stop, beats=beats)
        )

    def norm(
        self,
        *,
        length: int,
        source: VectorRegion,
        layer: int | None,
        gamma: str | None,
        step: int,
        last_only: bool = False,
    ) -> None:
        """Quantise `source` for the next matrices, with the norm of that name in front if there is one."""
        if gamma is not None:
            self.segment(SegmentKind.AUX, layer, gamma, 0, length, 4 * length)
        self.emit(
            Opcode.NORM,
            wait=WAIT_COMPUTE,
            tag=tag_of(self.model.layers if layer is None else layer, step),
            norm=int(gamma is not None),
            last_only=int(last_only),
            beats=length // LANES,
            src=source.row,
            src_stride=source.stride,
            inv_length=fp32_bits(1 / length),
            eps=fp32_bits(self.model.rms_eps),
        )

    def pieces(self, n: int, *, most: int, multiple: int) -> Iterator[tuple[int, int]]:
        """Row ranges of at most `most` rows, each but the last a multiple of `multiple`."""
        size = most // multiple * multiple
        for start in range(0, n, size):
            yield start, min(start + size, n)

    def matmul(
        self,
        *,
        layer: int,
        weights: str,
        n: int,
        k: int,
        epilogue: Epilogue,
        step: int,
        dst: VectorRegion | None = None,
        kv: dict[str, int] | None = None,
        channels: bool = False,
    ) -> None:
        """Matrix ``weights`` (n, k) of a layer on the activation tile, in as many operations as the engine needs.

        ``kv``: the fields of KEY and VALUE about the cache. ``channels``: QUERY and KEY have words of `KeyChannels`.
        """
        engine, head_dim = self.accelerator.matmul, self.model.head_dim
        by_head = epilogue in (Epilogue.QUERY, Epilogue.KEY, Epilogue.VALUE)
        most, multiple = engine.max_n(self.tile), head_dim if by_head else engine.outputs
        if self.accelerator.grouped and by_head and engine.outputs % head_dim:
            most = engine.outputs  # results leave block by block, so a head must not lie in two
        for start, stop in self.pieces(n, most=most, multiple=multiple):
            heads = {"first_head": start // head_dim, "head_beats": head_dim // LANES} if by_head else {}
            if by_head:
                place = {"dst": 0, "dst_stride": self.model.q_dim // LANES} if epilogue == Epilogue.QUERY else {}
            else:
                assert dst is not None, "only QUERY, KEY and VALUE leave the vector memory alone"
                place = {"dst": dst.row + start // LANES, "dst_stride": dst.stride}
            if channels:
                self.segment(SegmentKind.AUX, layer, weights, start, stop, CHANNEL_BYTES * (stop - start))
            form = self.formats.get((layer, weights), MatrixFormat())
            fields = self._weights(layer, weights, start, stop, k, form, planes=1) | place | heads | (kv or {})
            self.emit(
                Opcode.MATMUL, tag=tag_of(layer, step), epilogue=int(epilogue), channels=int(channels), **fields
            )

    def head(self) -> None:
        """LM head, with an argmax over all its pieces: group-quantised, or int8 rows as five ternary planes."""
        engine, model = self.accelerator.matmul, self.model
        grouped = self.accelerator.grouped
        most = engine.max_n(1) if grouped else min(self.accelerator.max_row_scales, engine.max_n(1))
        form = self.formats.get((None, "head"), HEAD_FORMAT)
        for start, stop in self.pieces(model.vocab, most=most, multiple=engine.outputs):
            if not grouped:
                self.segment(SegmentKind.AUX, None, "head", start, stop, 2 * (stop - start))
            self.emit(
                Opcode.MATMUL,
                tag=tag_of(model.layers, 8),
                epilogue=int(Epilogue.LOGITS),
                last_only=1,
                row_scale=int(not grouped),
                first_row=start,
                **self._weights(None, "head", start, stop, model.hidden, form, planes=HEAD_PLANES),
            )

    def _weights(
        self, layer: int | None, name: str, start: int, stop: int, k: int, form: MatrixFormat, *, planes: int
    ) -> dict[str, int]:
        """The stream segment of rows of a matrix, and the descriptor's fields about it."""
        engine, rows = self.accelerator.matmul, stop - start
        if isinstance(engine, TlmmConfig):
            self.segment(SegmentKind.TRITS, layer, name, start, stop, trits_payload_bytes(rows, k, engine, planes))
            numbers = {"planes": planes, "scale": fp32_bits(form.scale)}
        else:
            self.segment(SegmentKind.GROUPS, layer, name, start, stop, groups_payload_bytes(rows, k, form.bits, engine))
            scale = 2.0 ** (form.exponent - FP16_BIAS - ALIGN_BITS)
            numbers = {"planes": form.bits, "scale": fp32_bits(scale), "exponent": form.exponent}
        return numbers | {
            "wait": WAIT_COMPUTE,
            "k_blocks": ceil_div(k, engine.k_block),
            "row_blocks": ceil_div(rows, engine.outputs),
            "beats": ceil_div(rows, LANES),
            "valid": (rows - 1) % LANES + 1,
        }
