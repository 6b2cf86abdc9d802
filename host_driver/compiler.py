"""A model's dimensions and a build to programs: memory map, descriptors, and the plan of the weight stream.

Nothing here reads a weight: `host_driver/image.py` packs them along the plan. Two programs are made, each good for
every position and for 1 to `tile` tokens: ``layers`` (steps 1-7 of the prompt-to-token table) for the first tiles of a
prompt, and ``step`` (steps 1-8) for its last tile and for decoding.
"""

from dataclasses import dataclass
from math import sqrt

from host_driver.errors import InvalidRequest
from host_driver.fit import cache_slots, check_channels, check_fit, tile_tokens
from host_driver.key_channels import KeyChannels
from host_driver.memory_map import MemoryMap, VectorMap, place, vector_map
from host_driver.program_builder import (
    WAIT_ALL,
    WAIT_ATTEND,
    Instruction,
    MatrixFormat,
    Program,
    ProgramBuilder,
    Segment,
    fp32_bits,
    tag_of,
)
from spec.config import LANES, AcceleratorConfig, Activation, KvFormat, ModelConfig, ceil_div
from spec.descriptors import DESCRIPTOR_BYTES, Epilogue, Opcode
from spec.layout import KvLayout, embed_header_words, embed_row_bytes

LAYERS, STEP = "layers", "step"
"""Names of the programs."""


@dataclass(frozen=True, kw_only=True)
class CompiledModel:
    """All that the driver must know to run a model on a build; `host_driver/image.py` adds the weights."""

    model: ModelConfig
    accelerator: AcceleratorConfig
    slots: int
    """Slots of the KV cache."""
    kv: KvFormat
    keys: KeyChannels | None
    """Offsets and shifts behind RoPE; None: keys and queries are quantised as they are."""
    tile: int
    """Tokens of a prefill step."""
    memory: MemoryMap
    vector: VectorMap
    layer_stream: tuple[Segment, ...]
    head_stream: tuple[Segment, ...]
    programs: dict[str, Program]

    def stream_bytes(self, segments: tuple[Segment, ...]) -> int:
        """Bytes of a stream, headers included."""
        return sum(segment.beats + 1 for segment in segments) * self.accelerator.bus.weight_bytes

    @property
    def kv_layout(self) -> KvLayout:
        """The cache of a KV head of a layer."""
        return kv_layout(self.model, self.slots, self.kv)

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of the KV cache that a token takes, in all layers."""
        return self.model.layers * self.model.kv_heads * self.kv_layout.slot_bytes

    def kv_address(self, layer: int, kv_head: int = 0) -> int:
        """First byte of the cache of a KV head of a layer."""
        return self.memory["kv"].address + (layer * self.model.kv_heads + kv_head) * self.kv_layout.head_bytes


def kv_layout(model: ModelConfig, slots: int, kv: KvFormat) -> KvLayout:
    """The cache of a KV head of a layer."""
    return KvLayout(slots=slots, head_dim=model.head_dim, k_bits=kv.k_bits, v_bits=kv.v_bits)


def _layer(builder: ProgramBuilder, layer: int, vector: VectorMap, kv: dict[str, int], *, channels: bool) -> None:
    """Steps 2 to 7 of one layer. ``kv``: the descriptors' fields about its cache; ``channels``: of Q and K behind RoPE."""
    model = builder.model
    gate = Epilogue.GATE_SILU if model.activation is Activation.SILU else Epilogue.GATE_RELU2
    hidden, q_dim, kv_dim, ffn = model.hidden, model.q_dim, model.kv_dim, model.ffn

    # 2. norm and quantise
    builder.norm(length=hidden, source=vector.x, layer=layer, gamma="attn_norm", step=2)
    # 3., 4. projections; RoPE, quantise, append to the cache
    builder.matmul(layer=layer, weights="q", n=q_dim, k=hidden, epilogue=Epilogue.QUERY, step=3, channels=channels)
    builder.matmul(
        layer=layer, weights="k", n=kv_dim, k=hidden, epilogue=Epilogue.KEY, step=3, kv=kv, channels=channels
    )
    builder.matmul(layer=layer, weights="v", n=kv_dim, k=hidden, epilogue=Epilogue.VALUE, step=3, kv=kv)
    # 5. attention
    builder.emit(
        Opcode.ATTEND,
        wait=WAIT_ATTEND,
        tag=tag_of(layer, 5),
        kv_heads=model.kv_heads,
        group=model.group,
        head_beats=model.head_dim // LANES,
        dst=vector.y.row,
        dst_stride=vector.y.stride,
        score_scale=fp32_bits(1 / sqrt(model.head_dim)),
        **kv,
    )
    # 6. output projection
    gamma = "attn_sub_norm" if model.sub_norms else None
    builder.norm(length=q_dim, source=vector.y, layer=layer, gamma=gamma, step=6)
    builder.matmul(layer=layer, weights="o", n=hidden, k=q_dim, epilogue=Epilogue.RESIDUAL, step=6, dst=vector.x)
    # 7. feed-forward network
    builder.norm(length=hidden, source=vector.x, layer=layer, gamma="ffn_norm", step=7)
    builder.matmul(layer=layer, weights="gate", n=ffn, k=hidden, epilogue=gate, step=7, dst=vector.h)
    builder.matmul(layer=layer, weights="up", n=ffn, k=hidden, epilogue=Epilogue.UP, step=7, dst=vector.h)
    gamma = "ffn_sub_norm" if model.sub_norms else None
    builder.norm(length=ffn, source=vector.h, layer=layer, gamma=gamma, step=7)
    builder.matmul(layer=layer, weights="down", n=hidden, k=ffn, epilogue=Epilogue.RESIDUAL, step=7, dst=vector.x)


def _stream(region_address: int, size: int, beat_bytes: int, *, head: bool, layers: int) -> Instruction:
    fields = {"address": region_address, "beats": size // beat_bytes, "head": int(head)}
    return Instruction(opcode=Opcode.STREAM, fields=fields | {"tag": tag_of(layers if head else 0, 8 if head else 0)})


def _check_field_limits(programs: dict[str, Program], model: ModelConfig) -> None:
    """The largest dimensions may pass every limit of the build and still not fit a descriptor's field."""
    for program in programs.values():
        for instruction in program.instructions:
            try:
                instruction.pack()
            except ValueError as error:
                raise InvalidRequest(f"model {model.name!r} is too large for a descriptor: {error}") from None


def compile_model(
    model: ModelConfig,
    accelerator: AcceleratorConfig,
    *,
    slots: int | None = None,
    kv: KvFormat = KvFormat.INT8,
    keys: KeyChannels | None = None,
    formats: dict[tuple[int | None, str], MatrixFormat] | None = None,
) -> CompiledModel:
    """Memory map, programs and stream plan.

    ``slots``: wanted size of the KV cache; ``kv``: its number format; ``keys``: its key channels, if they
    have offsets and shifts. ``formats``: of the matrices by (layer, name), with layer
    None for the head; scale 1, 4 bits (head: 8) where none is given. Raises InvalidRequest if the model does not fit.
    """
    check_fit(model, accelerator)
    if keys is not None:
        check_channels(model, accelerator)
    tile = tile_tokens(model, accelerator)
    total_slots = cache_slots(model, slots)
    layout = kv_layout(model, total_slots, kv)
    vector = vector_map(model, tile)
    beat_bytes = accelerator.bus.weight_bytes
    kv_layer_bytes = model.kv_heads * layout.head_bytes
    kv_fields = {"kv_stride": layout.head_bytes, "k_int4": int(kv.k_bits == 4), "v_int4": int(kv.v_bits == 4)}

    def build(memory: MemoryMap | None) -> tuple[ProgramBuilder, ProgramBuilder]:
        """Layers and head. Sizes do not depend on addresses, so a first pass without a map gives the sizes."""
        kv_base = memory["kv"].address if memory else 0
        layers, head = (
            ProgramBuilder(model=model, accelerator=accelerator, tile=tile, formats=formats or {}) for _ in range(2)
        )
        layers.emit(  # for step 4: cos, sin of the tokens' positions
            Opcode.ROPE,
            tag=tag_of(0, 1),
            address=memory["rope"].address if memory else 0,
            row_beats=model.head_dim // LANES,
        )
        layers.emit(  # 1. embedding rows
            Opcode.EMBED,
            tag=tag_of(0, 1),
            address=memory["embedding"].address if memory else 0,
            row_bytes=embed_row_bytes(model.hidden, grouped=accelerator.grouped),
            grouped=int(accelerator.grouped),
            header_words=embed_header_words(model.hidden, grouped=accelerator.grouped),
            row_beats=model.hidden // LANES,
            dst=vector.x.row,
            dst_stride=vector.x.stride,
            vocab=model.vocab,
        )
        for layer in range(model.layers):
            cache = kv_fields | {"kv_address": kv_base + layer * kv_layer_bytes}
            _layer(layers, layer, vector, cache, channels=keys is not None)
        # 8. final norm and head, for the last token alone
        head.norm(length=model.hidden, source=vector.x, layer=None, gamma="final_norm", step=8, last_only=True)
        head.head()
        return layers, head

    layers, head = build(None)
    stream_sizes = [sum(s.beats + 1 for s in part.segments) * beat_bytes for part in (layers, head)]
    counts = {LAYERS: len(layers.instructions) + 2, STEP: len(layers.instructions) + len(head.instructions) + 3}
    memory = place(
        [
            (f"program_{LAYERS}", counts[LAYERS] * DESCRIPTOR_BYTES),
            (f"program_{STEP}", counts[STEP] * DESCRIPTOR_BYTES),
            ("embedding", model.vocab * embed_row_bytes(model.hidden, grouped=accelerator.grouped)),
            ("rope", total_slots * model.head_dim * 4),
            ("layer_stream", stream_sizes[0]),
            ("head_stream", stream_sizes[1]),
            ("kv", model.layers * kv_layer_bytes),
            ("logits", ceil_div(model.vocab, LANES) * LANES * 4),
        ]
    )
    if memory.limit > 1 << accelerator.bus.addr_bits:
        raise InvalidRequest(
            f"model {model.name!r} needs {memory.limit} bytes; preset {accelerator.name!r} addresses "
            f"{1 << accelerator.bus.addr_bits}"
        )
    layers, head = build(memory)
    streams = [
        _stream(memory[name].address, size, beat_bytes, head=name == "head_stream", layers=model.layers)
        for name, size in zip(("layer_stream", "head_stream"), stream_sizes, strict=True)
    ]
    end = Instruction(opcode=Opcode.END, fields={"wait": WAIT_ALL})
    # The head's STREAM follows the last matrix of the layers: by then the first stream's commands can all be given, so
    # the sequencer never stands before a stream unit whose data only a later descriptor would consume.
    bodies = {
        LAYERS: [streams[0], *layers.instructions, end],
        STEP: [streams[0], *layers.instructions, streams[1], *head.instructions, end],
    }
    programs = {
        name: Program(address=memory[f"program_{name}"].address, instructions=tuple(body))
        for name, body in bodies.items()
    }
    _check_field_limits(programs, model)
    return CompiledModel(
        model=model,
        accelerator=accelerator,
        slots=total_slots,
        kv=kv,
        keys=keys,
        tile=tile,
        memory=memory,
        vector=vector,
        layer_stream=tuple(layers.segments),
        head_stream=tuple(head.segments),
        programs=programs,
    )
