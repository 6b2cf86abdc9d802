"""Stream of a group engine: code rows, scale rows and AUX beats in order, under stalls; errors and recovery."""

import random
from collections.abc import Iterator
from typing import Any

import pytest

from cosim.pysim import Process, geometric, no_stalls, run, sink, source, stall_matrix
from cosim.slow_pack import aux_segment, segment
from rtl.group_stream import GroupStream, scale_rows
from spec.config import GroupEngine, GroupMatmulConfig
from spec.layout import SegmentKind

BEAT = 32
TABLES = GroupMatmulConfig(
    engine=GroupEngine.LUT_TENSOR_CORE, lanes=32, dequant_lanes=16, tokens=3, max_k=96, ring_rows=17
)
NIBBLES = GroupMatmulConfig(engine=GroupEngine.MIXPE, lanes=64, dequant_lanes=16, tokens=2, max_k=64, ring_rows=16)
CONFIGS = {"four beats a row": (TABLES, 32), "one beat a row": (TABLES, 128), "two beats a row": (NIBBLES, 128)}

Block = list[bytes]
"""The rows of a block: scales, then codes."""


def random_blocks(rng: random.Random, cfg: GroupMatmulConfig, bits: int, count: int) -> list[Block]:
    return [[rng.randbytes(cfg.row_bytes) for _ in range(cfg.block_rows(bits))] for _ in range(count)]


def groups_segment(blocks: list[Block], bits: int, beat: int) -> bytes:
    return segment(SegmentKind.GROUPS, b"".join(row for block in blocks for row in block), bits, beat)


def beats_of(data: bytes, size: int) -> list[int]:
    return [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]


def rows_of(blocks: list[Block]) -> list[list[int]]:
    return [[int.from_bytes(row, "little") for row in block] for block in blocks]


def mixed_stream(rng: random.Random, cfg: GroupMatmulConfig, beat: int) -> tuple[bytes, list[Block], bytes]:
    """Segments of every width, with AUX segments between; also the blocks and the AUX payloads."""
    stream, blocks, aux = b"", [], b""
    for bits in rng.sample(cfg.weight_bits, len(cfg.weight_bits)):
        part = random_blocks(rng, cfg, bits, rng.randint(1, 4))
        payload = rng.randbytes(beat * rng.randint(0, 3))
        stream += aux_segment(payload, beat) + groups_segment(part, bits, beat)
        blocks, aux = blocks + part, aux + payload
    return stream, blocks, aux


def reader(dut: GroupStream, shapes: list[int], got: list[list[int]], stalls: Iterator[bool], turns: int = 1) -> Process:
    """Read blocks of so many rows as the engine does: the scales once, with the first code row; the codes ``turns`` times.

    What a read shows has to stay until the next one: it is looked at just before that.
    """

    async def process(ctx: Any) -> None:
        codes, scales = dut.codes, dut.scales
        for rows in shapes:
            block: list[int] = []
            for turn in range(turns):
                for row in range(1, rows):
                    while next(stalls) or not ctx.get(codes.valid):
                        ctx.set(codes.en, 0)
                        ctx.set(scales.en, 0)
                        await ctx.tick()
                    if block:
                        block.append(ctx.get(codes.data[0]))
                    ctx.set(codes.en, 1)
                    ctx.set(codes.free, turn == turns - 1)
                    ctx.set(codes.rewind, row == rows - 1 and turn != turns - 1)
                    ctx.set(scales.en, not block)
                    await ctx.tick()
                    if not block:
                        block.append(ctx.get(scales.data))
            ctx.set(codes.en, 0)
            ctx.set(scales.en, 0)
            while next(stalls):
                await ctx.tick()
            assert block[0] == ctx.get(scales.data), "the scales did not hold"
            got.append([*block, ctx.get(codes.data[0])])

    return process


@pytest.mark.parametrize("stalls", stall_matrix(5).values(), ids=stall_matrix(5).keys())
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_and_aux_in_order(rng: random.Random, name: str, stalls: Any) -> None:
    cfg, beat = CONFIGS[name]
    stream, blocks, aux = mixed_stream(rng, cfg, beat)
    dut = GroupStream(cfg, weight_bytes=beat, aux_beats=5)
    got: list[list[int]] = []
    beats: list[int] = []
    in_stalls, out_stalls = stalls
    out = out_stalls()
    run(
        dut,
        source(dut.i_beat, beats_of(stream, beat), in_stalls()),
        reader(dut, [len(block) for block in blocks], got, out if isinstance(out, Iterator) else no_stalls()),
        sink(dut.o_aux, beats, count=len(aux) // beat, stalls=out_stalls()),
        max_cycles=5_000,
    )
    assert got == rows_of(blocks)
    assert beats == beats_of(aux, beat)


@pytest.mark.parametrize("turns", [2, 3])
def test_codes_are_replayed_until_they_are_freed(rng: random.Random, turns: int) -> None:
    """The writer never overtakes a block that is read again, nor its scales."""
    for bits in TABLES.weight_bits:
        blocks = random_blocks(rng, TABLES, bits, 7)
        dut = GroupStream(TABLES, weight_bytes=BEAT, aux_beats=4)
        got: list[list[int]] = []
        stream = beats_of(groups_segment(blocks, bits, BEAT), BEAT)
        stalls = geometric(random.Random(bits), 0.3)
        run(dut, source(dut.i_beat, stream), reader(dut, [1 + bits] * 7, got, stalls, turns), max_cycles=5_000)
        assert got == [[scales, *codes * turns] for scales, *codes in rows_of(blocks)]


@pytest.mark.parametrize("name", CONFIGS)
def test_takes_a_beat_a_cycle(rng: random.Random, name: str) -> None:
    cfg, beat = CONFIGS[name]
    blocks = random_blocks(rng, cfg, 4, 20)
    stream = beats_of(groups_segment(blocks, 4, beat), beat)
    dut = GroupStream(cfg, weight_bytes=beat, aux_beats=4)
    got: list[list[int]] = []
    cycles = run(dut, source(dut.i_beat, stream), reader(dut, [5] * 20, got, no_stalls()), max_cycles=5_000)
    assert got == rows_of(blocks)
    assert cycles <= len(stream) + 3, "the input waited"


@pytest.mark.parametrize(("bits", "blocks"), [(8, 2), (1, scale_rows(TABLES))])
def test_waits_for_space(rng: random.Random, bits: int, blocks: int) -> None:
    """Without a reader the input stops when either ring is full: 17 code rows, or 4 scale rows."""
    stream = beats_of(groups_segment(random_blocks(rng, TABLES, bits, 9), bits, BEAT), BEAT)
    dut = GroupStream(TABLES, weight_bytes=BEAT, aux_beats=4)
    taken = 0

    async def process(ctx: Any) -> None:
        nonlocal taken
        for beat in stream:
            ctx.set(dut.i_beat.payload, beat)
            ctx.set(dut.i_beat.valid, 1)
            for _ in range(20):
                ready = ctx.get(dut.i_beat.ready)
                await ctx.tick()
                if ready:
                    taken += 1
                    break
            else:
                return

    run(dut, process, max_cycles=500, idle_cycles=0)
    rows = blocks * (1 + bits) + (2 if bits == 8 else 0)  # 8 bits: a third scale row and a 17th code row fit
    assert taken == 1 + rows * TABLES.row_bytes // BEAT


ROW = bytes(TABLES.row_bytes)
BAD = {
    "magic": segment(SegmentKind.AUX, bytes(BEAT), 0, BEAT, magic=0x5352544D),
    "kind 0": segment(0, bytes(BEAT), 0, BEAT),
    "trits": segment(SegmentKind.TRITS, ROW, 5, BEAT),
    "kind 4": segment(4, bytes(BEAT), 0, BEAT),
    "no payload": segment(SegmentKind.GROUPS, b"", 4, BEAT),
    "0 bits": segment(SegmentKind.GROUPS, ROW, 0, BEAT),
    "5 bits": segment(SegmentKind.GROUPS, 6 * ROW, 5, BEAT),
    "bits beyond the register": segment(SegmentKind.GROUPS, 5 * ROW, 16 + 4, BEAT),
    "a row too short": segment(SegmentKind.GROUPS, 9 * ROW, 4, BEAT),
    "a beat too short": segment(SegmentKind.GROUPS, (5 * ROW)[BEAT:], 4, BEAT),
    "a beat too long": segment(SegmentKind.GROUPS, 5 * ROW + bytes(BEAT), 4, BEAT),
}


@pytest.mark.parametrize("kind", BAD)
def test_stops_at_an_error_and_recovers_by_clear(rng: random.Random, kind: str) -> None:
    blocks = random_blocks(rng, TABLES, 3, 3)
    good = groups_segment(blocks, 3, BEAT)
    dut = GroupStream(TABLES, weight_bytes=BEAT, aux_beats=4)
    got: list[list[int]] = []

    async def process(ctx: Any) -> None:
        left = beats_of(aux_segment(bytes(BEAT), BEAT) + BAD[kind] + good, BEAT)
        ctx.set(dut.i_beat.valid, 1)
        for _ in range(80):
            if left:
                ctx.set(dut.i_beat.payload, left[0])
            ready = ctx.get(dut.i_beat.ready)
            await ctx.tick()
            if ready and left:
                left.pop(0)
        assert ctx.get(dut.o_error), "no error"
        assert left, "the input was consumed to its end"
        ctx.set(dut.i_beat.valid, 0)
        ctx.set(dut.i_clear, 1)
        await ctx.tick()
        ctx.set(dut.i_clear, 0)
        assert not ctx.get(dut.o_error)
        assert not ctx.get(dut.o_aux.valid)
        assert not ctx.get(dut.codes.valid)
        await source(dut.i_beat, beats_of(good, BEAT))(ctx)
        await reader(dut, [4] * 3, got, no_stalls())(ctx)
        assert not ctx.get(dut.o_error)

    run(dut, process, max_cycles=500, check=False)
    assert got == rows_of(blocks)


def test_clear_in_any_cycle_leaves_nothing_behind(rng: random.Random) -> None:
    first = beats_of(groups_segment(random_blocks(rng, TABLES, 2, 2), 2, BEAT), BEAT)
    blocks = random_blocks(rng, TABLES, 4, 2)
    second = beats_of(groups_segment(blocks, 4, BEAT), BEAT)
    dut = GroupStream(TABLES, weight_bytes=BEAT, aux_beats=4)

    async def process(ctx: Any) -> None:
        for cut in range(1, len(first) + 1):
            await source(dut.i_beat, first[:cut])(ctx)
            ctx.set(dut.i_clear, 1)
            await ctx.tick()
            ctx.set(dut.i_clear, 0)
            await source(dut.i_beat, second)(ctx)
            got: list[list[int]] = []
            await reader(dut, [5, 5], got, no_stalls())(ctx)
            assert got == rows_of(blocks), f"cleared after {cut} beats"

    run(dut, process, max_cycles=3_000, check=False)


def test_beats_that_do_not_divide_a_row_are_refused() -> None:
    with pytest.raises(ValueError, match="a row of 128 bytes must be a multiple of 256 bytes a beat"):
        GroupStream(TABLES, weight_bytes=256, aux_beats=4)
