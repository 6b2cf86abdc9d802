"""KV and logits writers: every byte lands where spec/layout.py says, and no other byte changes."""

import random
import struct
from typing import Any

import pytest

from cosim.pysim import run, sink, source, stall_matrix
from rtl.kv_writer import KvWriter, LogitsWriter
from spec.config import LANES
from spec.descriptors import Epilogue
from spec.layout import KV_SCALE_BYTES, KvLayout

ADDR_BITS = 32
STALLS = stall_matrix("kv_writer")


def replay(image: bytearray, commands: list[dict[str, int]], beats: list[dict[str, int]], data_bytes: int) -> None:
    """What the memory holds after the writes."""
    left = iter(beats)
    for command in commands:
        assert command["addr"] % data_bytes == 0
        for n in range(command["beats"]):
            beat = next(left)
            data = beat["data"].to_bytes(data_bytes, "little")
            for byte in range(data_bytes):
                if beat["strb"] >> byte & 1:
                    image[command["addr"] + n * data_bytes + byte] = data[byte]
    assert next(left, None) is None, "a beat without a command"


def kv_beats(
    rng: random.Random, *, tokens: int, first_head: int, heads: int, head_dim: int, value: int, bits: int
) -> tuple[list[dict[str, int]], dict[tuple[int, int], tuple[bytes, int]]]:
    """Beats in the order of the epilogue, and (token, head) -> the head as it lies in memory, scale bits."""
    beats, heads_of = [], {}
    for token in range(tokens):
        for head in range(first_head, first_head + heads):
            row, scale = rng.randbytes(head_dim), rng.getrandbits(32)
            if bits == 4:
                values = [rng.randrange(-8, 8) for _ in range(head_dim)]
                row = bytes(value & 255 for value in values)
                packed = bytes(low & 15 | (high & 15) << 4 for low, high in zip(row[0::2], row[1::2], strict=True))
            else:
                packed = row
            heads_of[token, head] = packed, scale
            for at in range(0, head_dim, LANES):
                last = at + LANES == head_dim
                beats.append(
                    {
                        "data": int.from_bytes(row[at : at + LANES], "little"),
                        "value": value, "token": token, "head": head, "last": last,
                        "scale": scale if last else rng.getrandbits(32),  # valid with last only
                    }
                )  # fmt: skip
    return beats, heads_of


def run_kv_writer(
    rng: random.Random, data_bits: int, stalls: str, *, head_dim: int, heads: int, slots: int,
    operations: list[tuple[int, int, int, int]], k_bits: int = 8, v_bits: int = 8,
) -> int:  # fmt: skip
    """Operations (value, position, tokens, first_head), one after the other; returns the cycles of all."""
    make_in, make_out = STALLS[stalls]
    dut = KvWriter(addr_bits=ADDR_BITS, data_bits=data_bits)
    data_bytes = data_bits // 8
    layout = KvLayout(slots=slots, head_dim=head_dim, k_bits=k_bits, v_bits=v_bits)
    address, stride = 0x240, layout.head_bytes + 128
    image = bytearray(rng.randbytes(address + (heads + 2) * stride))
    expected = bytearray(image)
    ops, all_beats, rows, row_beats = [], [], 0, 0
    for value, position, tokens, first_head in operations:
        count = heads - first_head
        beats, heads_of = kv_beats(
            rng, tokens=tokens, first_head=first_head, heads=count, head_dim=head_dim, value=value,
            bits=v_bits if value else k_bits,
        )  # fmt: skip
        all_beats += beats
        rows += tokens * count
        ops.append(
            {
                "epilogue": Epilogue.VALUE if value else Epilogue.KEY, "beats": count * head_dim // LANES,
                "head_beats": head_dim // LANES, "first_head": first_head, "kv_address": address,
                "kv_stride": stride, "position": position, "tokens": tokens, "k_int4": k_bits == 4, "v_int4": v_bits == 4,
            }
        )  # fmt: skip
        for (token, head), (row, scale) in heads_of.items():
            slot, base = position + token, address + head * stride
            at = base + (layout.v_offset if value else 0) + slot * len(row)
            expected[at : at + len(row)] = row
            row_beats += (at + len(row) - 1) // data_bytes - at // data_bytes + 1
            at = base + layout.scale_offset + slot * KV_SCALE_BYTES + 4 * value
            expected[at : at + 4] = struct.pack("<I", scale)
    commands: list[dict[str, int]] = []
    beats_out: list[dict[str, int]] = []

    async def settings(ctx: Any) -> None:
        ctx.set(dut.i_slots, slots)
        # busy until all is written, and not for ever
        await ctx.tick().until(dut.o_busy)
        while ctx.get(dut.o_busy) or len(commands) < 2 * rows:
            await ctx.tick()

    cycles = run(
        dut,
        settings,
        source(dut.i_op, ops),
        source(dut.i_beat, all_beats, make_in()),
        sink(dut.write.cmd, commands, count=2 * rows, stalls=make_out()),
        sink(dut.write.beat, beats_out, count=rows + row_beats, stalls=make_out()),
        max_cycles=40 * len(all_beats) + 400,
    )
    replay(image, commands, beats_out, data_bytes)
    assert image == expected
    return cycles


@pytest.mark.parametrize("stalls", STALLS)
@pytest.mark.parametrize(("data_bits", "head_dim"), [(64, 24), (64, 8), (128, 48), (256, 64), (256, 32), (512, 64)])
def test_heads_land_in_the_cache(rng: random.Random, data_bits: int, head_dim: int, stalls: str) -> None:
    run_kv_writer(
        rng, data_bits, stalls, head_dim=head_dim, heads=3, slots=48,
        operations=[(0, 0, 1, 0), (1, 0, 1, 0), (0, 13, 3, 0), (1, 47, 1, 2)],
    )  # fmt: skip


@pytest.mark.parametrize("stalls", STALLS)
@pytest.mark.parametrize(("k_bits", "v_bits"), [(8, 4), (4, 4)])
@pytest.mark.parametrize(("data_bits", "head_dim"), [(64, 24), (128, 80), (256, 96), (512, 64)])
def test_int4_heads_land_in_the_cache(
    rng: random.Random, data_bits: int, head_dim: int, k_bits: int, v_bits: int, stalls: str
) -> None:
    """Rows that begin or end inside a beat leave their neighbours alone; an int8 row is whole beats."""
    if head_dim % (data_bits // 8) and max(k_bits, v_bits) == 8:
        head_dim = data_bits // 8
    run_kv_writer(
        rng, data_bits, stalls, head_dim=head_dim, heads=3, slots=32, k_bits=k_bits, v_bits=v_bits,
        operations=[(0, 0, 1, 0), (1, 0, 1, 0), (0, 13, 3, 0), (1, 14, 3, 0), (1, 31, 1, 2)],
    )  # fmt: skip


@pytest.mark.parametrize("bits", [8, 4])
def test_cycles_of_a_head(rng: random.Random, bits: int) -> None:
    shape = {"head_dim": 64, "slots": 32, "operations": [(0, 3, 2, 0)], "k_bits": bits}
    few = run_kv_writer(rng, 256, "none", heads=2, **shape)
    many = run_kv_writer(rng, 256, "none", heads=5, **shape)
    assert many - few == 2 * 3 * (64 // LANES + 5)


@pytest.mark.parametrize("stalls", STALLS)
@pytest.mark.parametrize("data_bits", [64, 128, 256, 512])
def test_logits_land_in_memory(rng: random.Random, data_bits: int, stalls: str) -> None:
    make_in, make_out = STALLS[stalls]
    dut = LogitsWriter(addr_bits=ADDR_BITS, data_bits=data_bits)
    address = 0x7A0
    image = bytearray(rng.randbytes(address + 400))
    expected = bytearray(image)
    beats = []
    for beat in [0, 1, 2, 7, 4, 11]:
        row = [rng.getrandbits(32) for _ in range(LANES)]
        beats.append({"data": row, "beat": beat})
        expected[address + 32 * beat : address + 32 * beat + 32] = struct.pack("<8I", *row)
    commands: list[dict[str, int]] = []
    written: list[dict[str, int]] = []

    async def settings(ctx: Any) -> None:
        ctx.set(dut.i_address, address)

    run(
        dut,
        settings,
        source(dut.i_beat, beats, make_in()),
        sink(dut.write.cmd, commands, count=len(beats), stalls=make_out()),
        sink(dut.write.beat, written, count=len(beats) * max(1, 256 // data_bits), stalls=make_out()),
        max_cycles=2_000,
    )
    replay(image, commands, written, data_bits // 8)
    assert image == expected
