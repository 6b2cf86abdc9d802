"""Programs and memory maps: legal, disjoint, in one order with the weight stream, within the limits of the build."""

import struct
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from cosim.random_model import TINY, TINY_PLAIN, random_checkpoint
from host_driver.compiler import LAYERS, STEP, CompiledModel, compile_model
from host_driver.errors import InvalidRequest
from host_driver.image import compile_checkpoint, memory_image
from spec.config import AcceleratorConfig, KvFormat, ModelConfig
from spec.descriptors import DESCRIPTOR_BYTES, UNIT_OF, Epilogue, Opcode, Unit, unpack
from spec.limits import field_limits
from spec.presets import KV260, SIM, TEST

CUT = replace(TEST, name="cut", matmul=replace(TEST.matmul, acc_rows=9, ring_rows=8))
"""Accumulators so small that nearly every matrix takes several operations: 3 row blocks of 16 at 3 tokens."""

BITNET_730M = ModelConfig(
    name="bitnet-0.73b", vocab=32002, hidden=1536, layers=24, heads=16, kv_heads=16, head_dim=96, ffn=4096,
    max_positions=2048,
)  # fmt: skip

CASES = [(TINY, TEST), (TINY_PLAIN, TEST), (TINY, CUT), (TINY_PLAIN, CUT)]
IDS = ["sub-norms", "plain", "sub-norms-cut", "plain-cut"]

Op = tuple[Opcode, dict[str, int]]


def decode(compiled: CompiledModel, name: str) -> list[Op]:
    """A program's descriptors from its bytes, each checked against the spec's and the build's ranges."""
    data = compiled.programs[name].pack()
    ops = [unpack(data[at : at + DESCRIPTOR_BYTES]) for at in range(0, len(data), DESCRIPTOR_BYTES)]
    limits = field_limits(compiled.accelerator)
    for opcode, fields in ops:
        for field, value in fields.items():
            assert value <= limits.get((opcode, field), value), f"{opcode.name}.{field} = {value}"
    return ops


def stream_order(ops: list[Op], build: AcceleratorConfig) -> Iterator[tuple[int, int, int]]:
    """(kind, lookup rows or 0, elements or 0) of the segments that a program consumes, from its descriptors alone."""
    for opcode, fields in ops:
        if opcode is Opcode.NORM and fields["norm"]:
            yield 1, 0, 4 * 8 * fields["beats"]
        if opcode is Opcode.MATMUL:
            if fields["row_scale"]:
                yield 1, 0, 2 * (8 * (fields["beats"] - 1) + fields["valid"])
            yield 2, fields["planes"] * fields["k_blocks"] * fields["row_blocks"], 0


@pytest.mark.parametrize(("model", "build"), CASES, ids=IDS)
def test_stream_holds_what_the_programs_consume_in_that_order(model: ModelConfig, build: AcceleratorConfig) -> None:
    checkpoint = random_checkpoint(model)
    compiled = compile_checkpoint(checkpoint, build)
    memory = bytearray(compiled.memory.limit)
    for address, data in memory_image(compiled, checkpoint):
        memory[address : address + len(data)] = data
    beat = build.bus.weight_bytes
    for name in (LAYERS, STEP):
        ops = decode(compiled, name)
        streams = [fields for opcode, fields in ops if opcode is Opcode.STREAM]
        assert [fields["head"] for fields in streams] == ([0] if name == LAYERS else [0, 1])
        found = []
        for fields in streams:
            at, end = fields["address"], fields["address"] + fields["beats"] * beat
            while at < end:
                magic, kind, beats, rows = struct.unpack_from("<4I", memory, at)
                assert magic == 0x5352544C
                found.append((kind, beats, rows))
                at += (1 + beats) * beat
            assert at == end
        wanted = list(stream_order(ops, build))
        assert len(found) == len(wanted)
        for (kind, beats, rows), (wanted_kind, wanted_rows, size) in zip(found, wanted, strict=True):
            superbeats = -(-wanted_rows // 5) * 3 * build.matmul.cells
            assert (kind, rows, beats) == (wanted_kind, wanted_rows, -(-(size or superbeats) // beat))


@pytest.mark.parametrize(("model", "build"), CASES, ids=IDS)
def test_regions_are_aligned_and_disjoint(model: ModelConfig, build: AcceleratorConfig) -> None:
    compiled = compile_model(model, build)
    regions = compiled.memory.regions
    assert all(region.address % 4096 == 0 and region.size > 0 for region in regions)
    assert all(first.end <= second.address for first, second in pairwise(regions))
    assert compiled.memory.limit >= regions[-1].end
    last = compiled.kv_address(model.layers - 1, model.kv_heads - 1)
    assert last + compiled.kv_layout.head_bytes == compiled.memory["kv"].end
    # beats of the data port never straddle what belongs to two rows, heads or arrays
    for size in (model.head_dim, compiled.kv_layout.head_bytes, compiled.slots * 8, 4 * model.head_dim):
        assert size % build.bus.data_bytes == 0


@pytest.mark.parametrize(("model", "build"), CASES, ids=IDS)
def test_images_stay_inside_their_regions(model: ModelConfig, build: AcceleratorConfig) -> None:
    checkpoint = random_checkpoint(model)
    compiled = compile_checkpoint(checkpoint, build)
    spans = [(address, address + len(data)) for address, data in memory_image(compiled, checkpoint)]
    for start, end in spans:
        assert any(region.address <= start and end <= region.end for region in compiled.memory.regions)
    assert all(first[1] <= second[0] for first, second in pairwise(sorted(spans)))


@pytest.mark.parametrize(("model", "build"), CASES, ids=IDS)
@pytest.mark.parametrize("name", [LAYERS, STEP])
def test_each_operation_waits_for_every_unit_it_could_collide_with(
    model: ModelConfig, build: AcceleratorConfig, name: str
) -> None:
    ops = decode(compile_model(model, build), name)
    assert [opcode for opcode, _ in ops[:3]] == [Opcode.STREAM, Opcode.ROPE, Opcode.EMBED]
    shared = {Unit.LOADER, Unit.VECTOR, Unit.MATMUL, Unit.ATTENTION}  # one port of the vector memory, one AUX stream
    needs = {Opcode.NORM: shared, Opcode.MATMUL: shared, Opcode.ATTEND: shared | {Unit.KV_WRITE}, Opcode.END: set(Unit)}
    for opcode, fields in ops:
        wait = {unit for unit in Unit if fields["wait"] >> unit & 1}
        assert wait == needs.get(opcode, set()), opcode.name
        if opcode is not Opcode.END:
            assert Unit.STREAM not in wait, "the stream is idle only when it was consumed: waiting for it is a deadlock"
    assert [opcode for opcode, _ in ops].count(Opcode.END) == 1
    assert ops[-1][0] is Opcode.END


def test_second_stream_is_issued_when_all_that_consumes_the_first_was_issued() -> None:
    ops = decode(compile_model(TINY, TEST), STEP)
    head = next(place for place, (opcode, fields) in enumerate(ops) if opcode is Opcode.STREAM and fields["head"])
    consumers = [fields for opcode, fields in ops[head:] if UNIT_OF.get(opcode) in (Unit.VECTOR, Unit.MATMUL)]
    assert all(fields["tag"] == TINY.layers << 8 | 8 for fields in consumers)
    assert len(consumers) == 1 + 2  # final norm, head in two operations


@pytest.mark.parametrize(("model", "build"), CASES, ids=IDS)
def test_pieces_of_a_matrix_cover_its_rows_once(model: ModelConfig, build: AcceleratorConfig) -> None:
    compiled = compile_model(model, build)
    ops = [fields for opcode, fields in decode(compiled, STEP) if opcode is Opcode.MATMUL]
    most = build.matmul.max_n(compiled.tile)
    for layer in range(model.layers):
        for epilogue, heads in ((Epilogue.QUERY, model.heads), (Epilogue.KEY, model.kv_heads)):
            pieces = [f for f in ops if f["epilogue"] == epilogue and f["tag"] >> 8 == layer]
            at = 0
            for piece in pieces:
                assert piece["first_head"] == at
                assert 8 * piece["beats"] <= most
                assert piece["beats"] % piece["head_beats"] == 0
                at += piece["beats"] // piece["head_beats"]
            assert at == heads
        for epilogue, region, n in (
            (Epilogue.UP, compiled.vector.h, model.ffn),
            (Epilogue.RESIDUAL, compiled.vector.x, model.hidden),
        ):
            pieces = [f for f in ops if f["epilogue"] == epilogue and f["tag"] >> 8 == layer]
            repeats = 2 if epilogue is Epilogue.RESIDUAL else 1
            rows = [row for f in pieces for row in range(f["dst"], f["dst"] + f["beats"])]
            assert sorted(rows) == sorted([*range(region.row, region.row + n // 8)] * repeats)
            assert all(f["dst_stride"] == n // 8 and f["row_blocks"] * build.matmul.outputs <= most for f in pieces)
    head = [f for f in ops if f["epilogue"] == Epilogue.LOGITS]
    at = 0
    for piece in head:
        assert piece["first_row"] == at
        at += 8 * (piece["beats"] - 1) + piece["valid"]
        assert at - piece["first_row"] <= build.max_row_scales
        assert piece["row_blocks"] <= build.matmul.acc_rows
    assert at == model.vocab


@pytest.mark.parametrize(("model", "build"), CASES, ids=IDS)
def test_vector_memory_holds_a_whole_tile(model: ModelConfig, build: AcceleratorConfig) -> None:
    compiled = compile_model(model, build)
    x, y, h = compiled.vector.x, compiled.vector.y, compiled.vector.h
    assert (x.stride, y.stride, h.stride) == (model.hidden // 8, model.q_dim // 8, model.ffn // 8)
    assert x.row + compiled.tile * x.stride <= y.row
    assert y.row + compiled.tile * y.stride <= h.row
    assert h.row + compiled.tile * h.stride <= build.vector_rows
    assert compiled.tile * model.group <= build.attention.max_rows


def test_weight_scales_and_constants_reach_the_descriptors() -> None:
    checkpoint = random_checkpoint(TINY)
    compiled = compile_checkpoint(checkpoint, TEST)
    ops = decode(compiled, LAYERS)
    down = [f for opcode, f in ops if opcode is Opcode.MATMUL and f["dst"] == 0 and f["k_blocks"] == 8]
    bits = [int(np.float32(layer.down.scale).view(np.uint32)) for layer in checkpoint.layers]
    assert [f["scale"] for f in down] == bits
    attend = next(f for opcode, f in ops if opcode is Opcode.ATTEND)
    assert attend["score_scale"] == int(np.float32(1 / np.sqrt(24)).view(np.uint32))
    norm = next(f for opcode, f in ops if opcode is Opcode.NORM)
    assert norm["inv_length"] == int(np.float32(1 / 88).view(np.uint32))


@pytest.mark.parametrize("kv", KvFormat)
def test_cache_format_reaches_the_descriptors_and_the_map(kv: KvFormat) -> None:
    compiled = compile_model(TINY, TEST, kv=kv)
    flags = {"k_int4": int(kv.k_bits == 4), "v_int4": int(kv.v_bits == 4)}
    users = [
        fields
        for opcode, fields in decode(compiled, STEP)
        if opcode is Opcode.ATTEND or (opcode is Opcode.MATMUL and fields["epilogue"] in (Epilogue.KEY, Epilogue.VALUE))
    ]
    assert len(users) == 3 * TINY.layers
    token_bytes = TINY.layers * TINY.kv_heads * (TINY.head_dim * kv.k_bits // 8 + TINY.head_dim * kv.v_bits // 8 + 8)
    assert compiled.kv_token_bytes == token_bytes
    assert compiled.memory["kv"].size == compiled.slots * token_bytes
    for fields in users:
        assert {name: fields[name] for name in flags} == flags
        assert fields["kv_stride"] * TINY.layers * TINY.kv_heads == compiled.memory["kv"].size
        assert (fields["kv_address"] - compiled.memory["kv"].address) % fields["kv_stride"] == 0
    # what the reader asks for begins on a beat of the widest port: blocks of K, of V and of scales
    layout = compiled.kv_layout
    for size in (16 * layout.k_row_bytes, 16 * layout.v_row_bytes, layout.v_offset, layout.scale_offset, layout.head_bytes):
        assert size % 64 == 0


def test_tile_shrinks_when_queries_of_a_full_tile_do_not_fit() -> None:
    wide = replace(TINY, heads=5, head_dim=16)
    assert compile_model(wide, TEST).tile == 1  # 9 resident rows, 5 query heads a KV head


def test_published_730m_model_fits_kv260() -> None:
    compiled = compile_model(BITNET_730M, replace(KV260, vector_rows=14336))
    assert compiled.tile == 16
    assert compiled.stream_bytes(compiled.layer_stream) / BITNET_730M.linear_weights == pytest.approx(0.2, rel=0.06)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 176}, "hidden 176 > max_k 168"),
        ({"ffn": 176}, "ffn 176 > max_k 168"),
        ({"heads": 7, "kv_heads": 7}, "q_dim 168 > max_q_dim 144"),
        ({"head_dim": 32, "heads": 3}, "head_dim 32 > max_head_dim 24"),
        ({"heads": 10, "head_dim": 8}, "query heads a KV head 10 > max_rows 9"),
    ],
)
def test_model_beyond_a_limit_is_refused_with_both_numbers(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        compile_model(replace(TINY, **changes), TEST)
    assert str(error.value) == f"model 'tiny-random' is too large for preset 'test': {message}"


def test_vector_memory_too_small_for_one_token_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"vector rows for one token 37 > vector_rows 36$"):
        compile_model(TINY, replace(TEST, vector_rows=36))


def test_head_dim_that_the_data_port_cannot_address_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"head_dim 16 is not a multiple of bytes of the data port \(32\)$"):
        compile_model(TINY_PLAIN, SIM)


@pytest.mark.parametrize(("requested", "slots"), [(None, 80), (1, 16), (17, 32), (80, 80), (5000, 80)])
def test_cache_slots_are_whole_blocks_within_the_models_positions(requested: int | None, slots: int) -> None:
    assert compile_model(TINY, TEST, slots=requested).slots == slots


def test_empty_cache_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"^the KV cache needs at least 1 slot, not 0$"):
        compile_model(TINY, TEST, slots=0)


def test_checkpoint_of_other_shapes_is_refused() -> None:
    checkpoint = random_checkpoint(TINY)
    with pytest.raises(InvalidRequest, match=r"final_norm must have shape \(88,\), not \(80,\)$"):
        compile_checkpoint(replace(checkpoint, final_norm=checkpoint.final_norm[:80]), TEST)
