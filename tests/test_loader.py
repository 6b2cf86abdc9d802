"""Loader: embedding rows with a scale a row or a group, and RoPE rows, against golden float32; every width of the port."""

import random
import struct
from typing import Any

import numpy as np
import pytest
import torch

from cosim.pysim import Process, no_stalls, run, source, stall_matrix
from golden.fp import bits_of, fmul, h2f, i2f
from rtl.loader import Loader
from spec.config import LANES
from spec.layout import embed_header_words

ADDR_BITS = 32
TABLE = 0x1000
MAX_GROUPED = 544
STALLS = stall_matrix("loader")


def row_bytes(hidden: int, grouped: bool, data_bytes: int) -> int:
    """Stride: header and values, padded to whole beats."""
    size = 8 * embed_header_words(hidden, grouped=grouped) + hidden
    return -(-size // data_bytes) * data_bytes


def embedding(rng: random.Random, hidden: int, grouped: bool, stride: int) -> tuple[bytes, list[int]]:
    """A row of the table, and the bits of what it means."""
    values = torch.tensor([rng.randint(-128, 127) for _ in range(hidden)])
    if grouped:
        halves = [rng.choice([0, 0x8001, 0x03FF, rng.randrange(0x7C00)]) for _ in range(-(-hidden // 32))]
        scale = h2f(torch.tensor(halves)).repeat_interleave(32)[:hidden]
        header = struct.pack(f"<{len(halves)}H", *halves)
    else:
        scale = torch.tensor(rng.uniform(-2, 2))
        header = struct.pack("<f", scale.item())
    header = header.ljust(8 * embed_header_words(hidden, grouped=grouped), b"\0")
    padding = rng.randbytes(stride - len(header) - hidden)
    return header + np.array(values.tolist(), dtype=np.int8).tobytes() + padding, bits_of(fmul(i2f(values), scale)).tolist()


def memory_reads(dut: Any, memory: bytes, data_bytes: int, stalls: Any) -> list[Process]:
    """Answer the read client's commands, in order, with pauses."""
    queue: list[tuple[int, int]] = []
    pattern = iter(no_stalls() if not hasattr(stalls, "__next__") else stalls)

    async def commands(ctx: Any) -> None:
        while True:
            ctx.set(dut.read.cmd.ready, int(not next(pattern)))
            _clk, _rst, valid, ready, payload = await ctx.tick().sample(
                dut.read.cmd.valid, dut.read.cmd.ready, dut.read.cmd.payload
            )
            if valid and ready:
                assert payload.addr % data_bytes == 0
                queue.extend((payload.addr + n * data_bytes, n == payload.beats - 1) for n in range(payload.beats))

    async def beats(ctx: Any) -> None:
        while True:
            if not queue or next(pattern):
                ctx.set(dut.read.beat.valid, 0)
                await ctx.tick()
                continue
            address, last = queue.pop(0)
            data = int.from_bytes(memory[address : address + data_bytes], "little")
            await source(dut.read.beat, [{"data": data, "last": last}])(ctx)

    return [commands, beats]


def run_loader(
    dut: Any, ops: list[tuple[Any, dict[str, int]]], ids: list[int], memory: bytes, data_bytes: int, stalls: Any
) -> tuple[list[tuple[int, int]], list[tuple[int, int, int]]]:
    """Operations one after the other; the writes to the vector memory and to the RoPE rows."""
    vector: list[tuple[int, int]] = []
    rope: list[tuple[int, int, int]] = []

    async def process(ctx: Any) -> None:
        for port, op in ops:
            await source(port, [op])(ctx)
            for _ in range(2000):
                ctx.set(dut.i_token, ids[ctx.get(dut.o_token_index) % len(ids)])
                await ctx.tick()
                if not ctx.get(dut.o_busy):
                    break
            else:
                raise AssertionError("the loader did not finish")

    async def writes(ctx: Any) -> None:
        while True:
            _clk, _rst, v_en, v_addr, v_data, r_en, r_token, r_row, r_data = await ctx.tick().sample(
                dut.vector.en, dut.vector.addr, dut.vector.data.as_value(),
                dut.rope.en, dut.rope.token, dut.rope.row, dut.rope.data.as_value(),
            )  # fmt: skip
            if v_en:
                vector.append((v_addr, v_data))
            if r_en:
                rope.append((r_token, r_row, r_data))

    run(dut, process, background=[writes, *memory_reads(dut, memory, data_bytes, stalls)], max_cycles=20_000)
    return vector, rope


def packed(bits: list[int]) -> list[int]:
    return [int.from_bytes(struct.pack("<8I", *bits[at : at + LANES]), "little") for at in range(0, len(bits), LANES)]


@pytest.mark.parametrize(
    ("data_bits", "stalls"),
    [(64, "none"), (256, "none"), (512, "none"), (1024, "none"), (256, "both-geometric"), (1024, "both-geometric")],
)
def test_embedding_rows(rng: random.Random, data_bits: int, stalls: str) -> None:
    """Both forms in turn, lengths that end within a group, headers of 4 and of 8 words."""
    data_bytes, ops, vocab, memory, expected = data_bits // 8, [], 5, bytearray(TABLE), []
    dut = Loader(addr_bits=ADDR_BITS, data_bits=data_bits, max_grouped=MAX_GROUPED)
    ids = [rng.randrange(vocab) for _ in range(4)]
    for tokens, grouped, hidden in ((2, False, 40), (1, True, 536), (3, True, 40), (1, False, 64)):
        stride = row_bytes(hidden, grouped, data_bytes)
        rows = [embedding(rng, hidden, grouped, stride) for _ in range(vocab)]
        dst, dst_stride = rng.randrange(100), 30
        op = {
            "address": len(memory), "row_bytes": stride, "row_beats": hidden // LANES, "dst": dst, "tokens": tokens,
            "dst_stride": dst_stride, "vocab": vocab, "grouped": int(grouped),
            "header_words": embed_header_words(hidden, grouped=grouped),
        }  # fmt: skip
        ops.append((dut.i_embed, op))
        memory += b"".join(row for row, _ in rows)
        for token in range(tokens):
            meant = packed(rows[ids[token]][1])
            expected += [(dst + token * dst_stride + i, data) for i, data in enumerate(meant)]
    vector, rope = run_loader(dut, ops, ids, bytes(memory), data_bytes, STALLS[stalls][0]())
    assert vector == expected
    assert rope == []


@pytest.mark.parametrize("data_bits", [64, 256, 512, 1024])
def test_rope_rows(rng: random.Random, data_bits: int) -> None:
    data_bytes, head_dim, positions = data_bits // 8, 64, 9
    memory = bytes(TABLE) + rng.randbytes(4 * head_dim * positions)
    dut = Loader(addr_bits=ADDR_BITS, data_bits=data_bits)
    op = {"address": TABLE, "row_beats": head_dim // LANES, "position": 5, "tokens": 3}
    vector, rope = run_loader(dut, [(dut.i_rope, op)], [0], memory, data_bytes, STALLS["both-geometric"][0]())
    rows = [memory[at : at + 32] for at in range(TABLE, len(memory), 32)]
    assert rope == [
        (token, row, int.from_bytes(rows[8 * (5 + token) + row], "little")) for token in range(3) for row in range(8)
    ]
    assert vector == []


def test_an_id_beyond_the_vocabulary_is_reported() -> None:
    dut: Any = Loader(addr_bits=ADDR_BITS, data_bits=64)
    seen: list[int] = []

    async def process(ctx: Any) -> None:
        ctx.set(dut.i_token, 5)
        op = {"address": 0, "row_bytes": 64, "row_beats": 4, "tokens": 1, "vocab": 5, "header_words": 4}
        await source(dut.i_embed, [op])(ctx)
        for _ in range(20):
            _clk, _rst, bad, valid = await ctx.tick().sample(dut.o_bad_token, dut.read.cmd.valid)
            seen.append(bad)
            assert not valid

    run(dut, process, max_cycles=100)
    assert sum(seen) == 1


def test_bad_width() -> None:
    with pytest.raises(ValueError, match="data_bits must be 64, 128, 256, 512 or 1024, not 2048"):
        Loader(addr_bits=ADDR_BITS, data_bits=2048)
