"""Weight stream: golden unpacker against a slow packer, RTL parser and ring against the golden unpacker."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cosim.pysim import Process, geometric, no_stalls, run, sink, source, stall_matrix
from cosim.slow_pack import aux_segment, matrix_rows, matrix_segment, rows_segment, segment
from golden import layout
from rtl.lookup_ring import LookupRing
from rtl.weight_stream import WeightStream
from spec.config import TlmmConfig, ceil_div
from spec.layout import BYTES_PER_CELL, DENSE_CODES, SegmentKind, index_code
from spec.presets import KV260, TEST

BEAT = 32
SMALL = TlmmConfig(tables=4, outputs=24, full_table=False, tokens=2, max_k=60, acc_rows=9, ring_rows=13)
WIDE = TlmmConfig(tables=20, outputs=8, full_table=True, tokens=2, max_k=130, acc_rows=9, ring_rows=16)
CONFIGS = {"test": TEST.matmul, "small": SMALL, "wide": WIDE}
"""3, 3 and 5 banks of 32 bytes; rings of 40, 13 and 16 rows."""


def random_rows(rng: random.Random, count: int, cells: int) -> list[list[int]]:
    return [[rng.randint(-13, 13) for _ in range(cells)] for _ in range(count)]


def beats_of(data: bytes, size: int = BEAT) -> list[int]:
    return [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]


# 1. golden unpacker against the slow packer


@pytest.mark.parametrize("planes", [1, 2, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_golden_unpacks_what_was_packed(rng: random.Random, name: str, planes: int) -> None:
    cfg = CONFIGS[name]
    k, n = cfg.max_k - 7, 2 * cfg.outputs - 3
    trits = np.random.default_rng(rng.getrandbits(32)).integers(-1, 2, (planes, n, k), dtype=np.int8)
    stream = aux_segment(b"head", BEAT) + matrix_segment(trits, cfg, BEAT) + aux_segment(b"", BEAT)
    (first, norm), (header, payload), (last, empty) = layout.read_stream(stream, BEAT)
    assert (first.kind, first.beats, norm[:5]) == (SegmentKind.AUX, 1, b"head\0")
    assert (last.kind, last.beats, empty) == (SegmentKind.AUX, 0, b"")
    assert (header.kind, header.rows) == (SegmentKind.TRITS, cfg.matmul_rows(k, n, planes))
    back = layout.unpack_segment(
        payload,
        planes=planes,
        k_blocks=ceil_div(k, cfg.k_block),
        row_blocks=ceil_div(n, cfg.outputs),
        tables=cfg.tables,
        outputs=cfg.outputs,
    )
    assert (back[:, :n, :k] == trits).all()
    assert np.abs(back).sum(dtype=int) == np.abs(trits).sum(dtype=int), "padding holds trits other than zero"


def test_golden_unpacks_a_matrix_from_memory(rng: random.Random) -> None:
    trits = np.random.default_rng(rng.getrandbits(32)).integers(-1, 2, (2, 37, 71), dtype=np.int8)
    stream = np.frombuffer(matrix_segment(trits, TEST.matmul, BEAT) + b"\xff" * 99, dtype=np.uint8)
    back = layout.unpack_matrix(stream, TEST, k_blocks=4, row_blocks=3, planes=2)
    assert back.shape == (2, 48, 72)
    assert (back[:, :37, :71].numpy() == trits).all()
    with pytest.raises(ValueError, match="an operation of 20 lookup rows meets a TRITS segment of 24"):
        layout.unpack_matrix(stream, TEST, k_blocks=5, row_blocks=2, planes=2)


def test_golden_rejects_what_is_illegal(rng: random.Random) -> None:
    good = rows_segment(random_rows(rng, 4, 96), BEAT)
    with pytest.raises(ValueError, match="a segment must begin with 0x5352544c, not 0x5352544d"):
        list(layout.read_stream(good + segment(1, b"x", 0, BEAT, magic=0x5352544D), BEAT))
    with pytest.raises(ValueError, match="4 is not a valid SegmentKind"):
        list(layout.read_stream(segment(4, b"x", 0, BEAT), BEAT))
    with pytest.raises(ValueError, match="the segment at byte 0 ends at 320, the stream at 288"):
        list(layout.read_stream(good[:-BEAT], BEAT))
    with pytest.raises(ValueError, match="byte 7 of the payload must be below 243, not 243"):
        layout.unpack_rows(bytes([242] * 7 + [DENSE_CODES] + [0] * 280), 5, 96)
    with pytest.raises(ValueError, match="6 rows of 96 cells take 576 bytes, not 288"):
        layout.unpack_rows(bytes(288), 6, 96)


# 2. RTL against the golden unpacker


def reader(dut: WeightStream, rows: list[list[int]], count: int, stalls: Iterator[bool]) -> Process:
    """Read ``count`` rows, freeing each, as lists of index codes."""

    async def process(ctx: Any) -> None:
        ctx.set(dut.read.free, 1)
        await read_rows(ctx, dut, rows, count, stalls)

    return process


async def read_rows(ctx: Any, dut: WeightStream, rows: list[list[int]], count: int, stalls: Iterator[bool]) -> None:
    port = dut.read
    banks = list(port.data)
    while count:
        stall = next(stalls)
        valid = ctx.get(port.valid)
        ctx.set(port.en, int(valid and not stall))
        await ctx.tick()
        if valid and not stall:
            rows.append([code for bank in banks for code in codes_of(ctx.get(bank), len(bank))])
            count -= 1
    ctx.set(port.en, 0)


def codes_of(word: int, width: int) -> list[int]:
    return [word >> shift & 31 for shift in range(0, width, 5)]


def expected_rows(stream: bytes, cells: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for header, payload in layout.read_stream(stream, BEAT):
        if header.kind is SegmentKind.TRITS:
            values = layout.unpack_rows(payload, header.rows, cells)
            rows += [[index_code(v) for v in row] for row in values.tolist()]
    return rows


def mixed_stream(rng: random.Random, cells: int, lengths: tuple[int, ...]) -> tuple[bytes, bytes]:
    """TRITS segments of these lengths with AUX segments between; also the AUX payloads."""
    stream, aux = b"", b""
    for length in lengths:
        stream += rows_segment(random_rows(rng, length, cells), BEAT)
        payload = rng.randbytes(BEAT * rng.randint(0, 3))
        stream += aux_segment(payload, BEAT)
        aux += payload
    return stream, aux


@pytest.mark.parametrize("stalls", stall_matrix(3).values(), ids=stall_matrix(3).keys())
@pytest.mark.parametrize("name", CONFIGS)
def test_rtl_gives_rows_and_aux_in_order(rng: random.Random, name: str, stalls: Any) -> None:
    cfg = CONFIGS[name]
    stream, aux = mixed_stream(rng, cfg.cells, (1, 5, 4, 12, 3, 2, 6))
    want = expected_rows(stream, cfg.cells)
    dut = WeightStream(cfg, weight_bytes=BEAT, aux_beats=5)
    rows: list[list[int]] = []
    beats: list[int] = []
    in_stalls, out_stalls = stalls
    out = out_stalls()
    run(
        dut,
        source(dut.i_beat, beats_of(stream), in_stalls()),
        reader(dut, rows, len(want), iter(no_stalls() if not isinstance(out, Iterator) else out)),
        sink(dut.o_aux, beats, count=len(aux) // BEAT, stalls=out_stalls()),
        max_cycles=5_000,
    )
    assert rows == want
    assert beats == beats_of(aux)


def test_rtl_decodes_every_dense_byte(rng: random.Random) -> None:
    """Each of the 243 bytes in each of the three places of a cell, with random neighbours."""
    cells, cfg = TEST.matmul.cells, TEST.matmul
    payload = bytes(
        (byte + 7 * cell) % DENSE_CODES if third == place else rng.randrange(DENSE_CODES)
        for place in range(BYTES_PER_CELL)
        for byte in range(0, DENSE_CODES, 8)
        for third in range(BYTES_PER_CELL)
        for cell in range(cells)
    )
    count = len(payload) // (BYTES_PER_CELL * cells) * 5
    thirds = np.frombuffer(payload, dtype=np.uint8).reshape(-1, BYTES_PER_CELL, cells)
    assert all(len(np.unique(thirds[:, third])) == DENSE_CODES for third in range(BYTES_PER_CELL))
    stream = segment(SegmentKind.TRITS, payload, count, BEAT)
    dut = WeightStream(cfg, weight_bytes=BEAT, aux_beats=4)
    rows: list[list[int]] = []
    run(dut, source(dut.i_beat, beats_of(stream)), reader(dut, rows, count, no_stalls()), max_cycles=5_000)
    assert rows == expected_rows(stream, cells)


@pytest.mark.parametrize("name", CONFIGS)
def test_rtl_takes_a_beat_a_cycle(rng: random.Random, name: str) -> None:
    cfg = CONFIGS[name]
    stream = b"".join(rows_segment(random_rows(rng, count, cfg.cells), BEAT) for count in (21, 7, 30))
    want = expected_rows(stream, cfg.cells)
    dut = WeightStream(cfg, weight_bytes=BEAT, aux_beats=4)
    rows: list[list[int]] = []
    cycles = run(dut, source(dut.i_beat, beats_of(stream)), reader(dut, rows, len(want), no_stalls()), max_cycles=5_000)
    assert rows == want
    assert cycles <= len(stream) // BEAT + 8, "the input waited"


def test_rtl_replays_a_strip_until_it_is_freed(rng: random.Random) -> None:
    """Rows stay for `rewind`, are freed in the last turn, and the writer never overtakes them."""
    cfg, strip, turns = SMALL, 6, 3
    source_rows = random_rows(rng, 5 * strip, cfg.cells)
    stream = rows_segment(source_rows, BEAT)
    want = expected_rows(stream, cfg.cells)
    dut = WeightStream(cfg, weight_bytes=BEAT, aux_beats=4)
    rows: list[list[int]] = []

    async def process(ctx: Any) -> None:
        stalls = geometric(random.Random(1), 0.3)
        for _ in range(5):
            for turn in range(turns):
                ctx.set(dut.read.free, turn == turns - 1)
                ctx.set(dut.read.rewind, 0)
                await read_rows(ctx, dut, rows, strip - 1, stalls)
                ctx.set(dut.read.rewind, turn != turns - 1)
                await read_rows(ctx, dut, rows, 1, stalls)

    run(dut, source(dut.i_beat, beats_of(stream)), process, max_cycles=5_000)
    strips = [want[i : i + strip] for i in range(0, len(want), strip)]
    assert rows == [row for one in strips for _ in range(turns) for row in one]


def test_rtl_waits_for_space(rng: random.Random) -> None:
    """Without a reader the input stops when fewer than 5 rows of the ring are free."""
    cfg = SMALL  # 13 rows: two superbeats
    stream = rows_segment(random_rows(rng, 20, cfg.cells), BEAT)
    dut = WeightStream(cfg, weight_bytes=BEAT, aux_beats=4)
    taken = 0

    async def process(ctx: Any) -> None:
        nonlocal taken
        for beat in beats_of(stream):
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
    assert taken == 1 + 2 * BYTES_PER_CELL * cfg.cells // BEAT


BAD = {
    "magic": lambda good: segment(SegmentKind.AUX, bytes(BEAT), 0, BEAT, magic=0x5352544D) + good,
    "kind 0": lambda good: segment(0, bytes(BEAT), 0, BEAT) + good,
    "kind 3": lambda good: segment(3, bytes(BEAT), 0, BEAT) + good,
    "no rows": lambda good: segment(SegmentKind.TRITS, bytes(3 * TEST.matmul.cells), 0, BEAT) + good,
    "no payload": lambda good: segment(SegmentKind.TRITS, b"", 4, BEAT) + good,
    "too short": lambda good: segment(SegmentKind.TRITS, bytes(5 * TEST.matmul.cells), 10, BEAT) + good,
    "too long": lambda good: segment(SegmentKind.TRITS, bytes(6 * TEST.matmul.cells), 5, BEAT) + good,
    "byte 243": lambda good: segment(SegmentKind.TRITS, bytes([0] * 287 + [243]), 5, BEAT) + good,
    "byte 255": lambda good: segment(SegmentKind.TRITS, bytes([0] * 100 + [255] + [0] * 187), 5, BEAT) + good,
}


@pytest.mark.parametrize("kind", BAD)
def test_rtl_stops_at_an_error_and_recovers_by_clear(rng: random.Random, kind: str) -> None:
    cfg = TEST.matmul
    good = rows_segment(random_rows(rng, 7, cfg.cells), BEAT)
    bad = BAD[kind](good)
    dut = WeightStream(cfg, weight_bytes=BEAT, aux_beats=4)
    rows: list[list[int]] = []

    async def process(ctx: Any) -> None:
        left = beats_of(aux_segment(bytes(BEAT), BEAT) + bad)
        ctx.set(dut.i_beat.valid, 1)
        for _ in range(60):
            if left:
                ctx.set(dut.i_beat.payload, left[0])
            ready = ctx.get(dut.i_beat.ready)
            await ctx.tick()
            if ready:
                left.pop(0)
        assert ctx.get(dut.o_error), "no error"
        assert left, "the input was consumed to its end"
        ctx.set(dut.i_beat.valid, 0)
        ctx.set(dut.i_clear, 1)
        await ctx.tick()
        ctx.set(dut.i_clear, 0)
        assert not ctx.get(dut.o_error)
        assert not ctx.get(dut.o_aux.valid)
        await source(dut.i_beat, beats_of(good))(ctx)
        ctx.set(dut.read.free, 1)
        await read_rows(ctx, dut, rows, 7, no_stalls())
        assert not ctx.get(dut.o_error)

    run(dut, process, max_cycles=500, check=False)
    assert rows == expected_rows(good, cfg.cells)


def test_clear_in_any_cycle_leaves_nothing_behind(rng: random.Random) -> None:
    cfg = SMALL
    first = rows_segment(random_rows(rng, 8, cfg.cells), BEAT)
    second = rows_segment(random_rows(rng, 9, cfg.cells), BEAT)
    for cut in range(1, 16):
        dut = WeightStream(cfg, weight_bytes=BEAT, aux_beats=4)
        rows: list[list[int]] = []

        async def process(ctx: Any, dut: WeightStream = dut, cut: int = cut) -> None:
            await source(dut.i_beat, beats_of(first)[:cut])(ctx)
            ctx.set(dut.i_clear, 1)
            await ctx.tick()
            ctx.set(dut.i_clear, 0)
            await source(dut.i_beat, beats_of(second))(ctx)

        run(dut, process, reader_after_clear(dut, rows, 9), max_cycles=500, check=False)
        assert rows == expected_rows(second, cfg.cells), f"cleared after {cut} beats"


def reader_after_clear(dut: WeightStream, rows: list[list[int]], count: int) -> Process:
    async def process(ctx: Any) -> None:
        while not ctx.get(dut.i_clear):
            await ctx.tick()
        await ctx.tick()
        ctx.set(dut.read.free, 1)
        await read_rows(ctx, dut, rows, count, no_stalls())

    return process


def test_configs_that_cannot_work_say_so() -> None:
    with pytest.raises(ValueError, match="cells must be a multiple of 64 bytes a beat, at least 3 times: 96"):
        WeightStream(TEST.matmul, weight_bytes=64, aux_beats=4)
    with pytest.raises(ValueError, match="the ring must hold a superbeat of 5 rows, not 4"):
        LookupRing(rows=4, banks=3, bank_bits=160)


def test_packer_and_presets_agree_on_rows() -> None:
    cfg = KV260.matmul
    assert len(matrix_rows(np.zeros((2, 20, 90), dtype=np.int8), cfg)) == cfg.matmul_rows(90, 20, 2) == 8
