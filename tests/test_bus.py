"""Memory masters, their multiplexers and the register bank, against a judging AXI memory."""

import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from amaranth.back import rtlil
from amaranth.hdl import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from cosim.bench_axi import run_bench
from cosim.pysim import AxiMemory, Process, WaitValid, geometric, no_stalls, run, sink, source
from rtl.bus.axi import Axi4LiteSignature, Axi4ReadSignature, Axi4Signature, Axi4WriteSignature, flat_ports
from rtl.bus.burst import BurstSplitter, command_layout, read_layout, write_layout
from rtl.bus.csr_bank import CsrBank
from rtl.bus.read_mux import ReadMux
from rtl.bus.reader import BurstReader
from rtl.bus.writer import BurstWriter, WriteMux
from rtl.lib.fifo import StreamFifo
from rtl.lib.round_robin import RoundRobin
from spec.csr import REGISTERS, Register

Command = dict[str, int]

SIZE = 3 * 4096
BASE = 0x12_3450_0000


def contents(seed: int, size: int = SIZE) -> bytearray:
    return bytearray(random.Random(seed).randbytes(size))


def words(memory: Sequence[int], cmd: Command, beat: int) -> list[dict[str, int]]:
    """What a reader must answer to a command."""
    start = cmd["addr"] - BASE
    return [
        {
            "data": int.from_bytes(bytes(memory[start + i * beat :][:beat]), "little"),
            "last": int(i == cmd["beats"] - 1),
        }
        for i in range(cmd["beats"])
    ]


def random_commands(rng: random.Random, count: int, beat: int, longest: int) -> list[Command]:
    """Commands of 0 to ``longest`` beats anywhere in the memory, many of them across 4 KiB."""
    made = []
    for _ in range(count):
        beats = rng.choice([0, 1, 1, 2, rng.randint(1, longest), longest])
        made.append({"addr": BASE + beat * rng.randrange(SIZE // beat - beats), "beats": beats})
    return made


def all_stalls(rng: random.Random, probability: float = 0.4) -> dict:
    return {channel: geometric(rng, probability) for channel in ("ar", "r", "aw", "w", "b")}


async def pulse(ctx, clear, offers: Sequence = (), cycles: int = 1) -> None:
    """Clear for some cycles; offers are withdrawn after the first, as clients under the same clear do."""
    ctx.set(clear, 1)
    for _ in range(cycles):
        await ctx.tick()
        for port in offers:
            ctx.set(port.valid, 0)
    ctx.set(clear, 0)


def until(signal) -> Process:
    async def process(ctx) -> None:
        await ctx.tick().until(signal)

    return process


# 1. small blocks


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize("depth", [2, 8])
@pytest.mark.parametrize("stalls", ["none", "in", "out", "both", "wait"])
def test_fifo_keeps_order(buffered: bool, depth: int, stalls: str) -> None:
    rng = random.Random(1)
    dut = StreamFifo(12, depth=depth, buffered=buffered)
    items = [rng.randrange(1 << 12) for _ in range(60)]
    received: list[int] = []
    slow_in = geometric(rng, 0.5) if stalls in ("in", "both") else no_stalls()
    slow_out = geometric(rng, 0.5) if stalls in ("out", "both") else no_stalls()
    cycles = run(
        dut,
        source(dut.i_data, items, slow_in),
        sink(dut.o_data, received, count=60, stalls=WaitValid() if stalls == "wait" else slow_out),
        max_cycles=400,
    )
    assert received == items
    if stalls == "none" and depth > 2:
        assert cycles == 60 + (2 if buffered else 1)


@pytest.mark.parametrize("buffered", [False, True])
def test_fifo_holds_depth_beats_and_clears(buffered: bool) -> None:
    dut = StreamFifo(8, depth=4, buffered=buffered)
    received: list[int] = []

    async def process(ctx) -> None:
        await source(dut.i_data, [1, 2, 3, 4])(ctx)
        await ctx.tick().repeat(2)
        assert ctx.get(dut.o_level) == 4
        assert not ctx.get(dut.i_data.ready)
        await pulse(ctx, dut.i_clear)
        assert ctx.get(dut.o_level) == 0
        await source(dut.i_data, [5, 6])(ctx)
        await sink(dut.o_data, received, count=2)(ctx)

    run(dut, process, max_cycles=50, excuse=dut.i_clear)
    assert received == [5, 6]


def test_round_robin_serves_everyone_in_turn() -> None:
    dut = RoundRobin(5)
    grants: list[int] = []

    async def process(ctx) -> None:
        ctx.set(dut.i_request, 0b10110)
        ctx.set(dut.i_next, 1)
        for _ in range(7):
            assert ctx.get(dut.o_grant) == 1 << ctx.get(dut.o_index)
            grants.append(ctx.get(dut.o_index))
            await ctx.tick()
        ctx.set(dut.i_request, 0)
        assert ctx.get(dut.o_grant) == 0

    run(dut, process, max_cycles=20)
    assert grants == [1, 2, 4, 1, 2, 4, 1]


def test_splitter_makes_full_bursts_between_boundaries() -> None:
    dut = BurstSplitter(data_bits=64, addr_bits=40, max_burst=16)
    bursts: list[dict[str, int]] = []
    run(
        dut,
        source(dut.i_cmd, [{"addr": 0xFE8, "beats": 40}, {"addr": 0, "beats": 0}, {"addr": 8, "beats": 1}]),
        sink(dut.o_burst, bursts, count=5),
        max_cycles=40,
    )
    assert [(burst["beat"] * 8, burst["len"] + 1, burst["last"]) for burst in bursts] == [
        (0xFE8, 3, 0),
        (0x1000, 16, 0),
        (0x1080, 16, 0),
        (0x1100, 5, 1),
        (0x8, 1, 1),
    ]


def test_longest_command_is_split_completely() -> None:
    """The largest beat count, with a sum of lengths as the witness."""
    dut = BurstSplitter(data_bits=8, addr_bits=40, max_burst=256)
    total = 0

    async def process(ctx) -> None:
        nonlocal total
        await source(dut.i_cmd, [{"addr": 3, "beats": (1 << 20) + 5}])(ctx)
        ctx.set(dut.o_burst.ready, 1)
        last = 0
        while not last:
            _c, _r, valid, burst = await ctx.tick().sample(dut.o_burst.valid, dut.o_burst.payload)
            if valid:
                total += burst["len"] + 1
                last = burst["last"]

    run(dut, process, max_cycles=5_000)
    assert total == (1 << 20) + 5


# 2. reader

READERS = {
    "small": {"data_bits": 32, "max_burst": 4, "max_outstanding": 2, "fifo_beats": 8},
    "wide": {"data_bits": 128, "max_burst": 16, "max_outstanding": 4, "fifo_beats": 64},
    "block-ram": {"data_bits": 64, "max_burst": 8, "max_outstanding": 8, "fifo_beats": 16, "buffered": True},
    "long": {"data_bits": 256, "max_burst": 128, "max_outstanding": 4, "fifo_beats": 256},
    "beyond AMBA": {"data_bits": 2048, "max_burst": 8, "max_outstanding": 4, "fifo_beats": 32},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("config", READERS)
def test_reader_under_random_stalls(config: str, seed: int) -> None:
    rng = random.Random(f"reader {config} {seed}")
    dut = BurstReader(**READERS[config])
    beat = READERS[config]["data_bits"] // 8
    memory = AxiMemory(
        contents(seed), base=BASE, latency=lambda: rng.randrange(30), stalls=all_stalls(rng)
    )
    commands = random_commands(rng, 24, beat, min(40, SIZE // beat // 3))
    expected = [word for cmd in commands for word in words(memory.contents, cmd, beat)]
    received: list[dict[str, int]] = []
    run(
        dut,
        source(dut.i_cmd, commands, geometric(rng, 0.3)),
        sink(dut.o_data, received, count=len(expected), stalls=geometric(rng, 0.4)),
        background=[memory.reads(dut.m_axi)],
        max_cycles=20_000,
    )
    assert received == expected


def test_reader_never_needs_the_consumer_to_take_responses() -> None:
    """RREADY is always 1, so a consumer that takes nothing must stop the issue of bursts."""
    dut = BurstReader(data_bits=64, max_burst=8, max_outstanding=8, fifo_beats=16)
    memory = AxiMemory(contents(0), base=BASE)
    received: list[dict[str, int]] = []
    cmd = {"addr": BASE, "beats": 100}

    async def late(ctx) -> None:
        for _ in range(100):
            await ctx.tick()
            assert ctx.get(dut.m_axi.rready)
        assert sum(beats for _addr, beats in memory.read_bursts) == 16
        await sink(dut.o_data, received, count=100, stalls=WaitValid())(ctx)

    run(
        dut,
        source(dut.i_cmd, [cmd]),
        late,
        background=[memory.reads(dut.m_axi)],
        max_cycles=2_000,
    )
    assert received == words(memory.contents, cmd, 8)


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize(
    ("beats", "count", "max_outstanding"), [(1000, 1, 4), (20, 50, 8), (4, 250, 16), (1, 1000, 64)]
)
def test_reader_sustains_one_beat_a_cycle(
    beats: int, count: int, max_outstanding: int, buffered: bool
) -> None:
    """1,000 beats from a memory with 40 cycles latency, in one command or in many."""
    dut = BurstReader(
        data_bits=64, max_burst=16, max_outstanding=max_outstanding, fifo_beats=64, buffered=buffered
    )
    memory = AxiMemory(contents(7), base=BASE, latency=40)
    commands = [{"addr": BASE + 16 * 8 * (i % 32), "beats": beats} for i in range(count)]
    received: list[dict[str, int]] = []
    cycles = run(
        dut,
        source(dut.i_cmd, commands),
        sink(dut.o_data, received, count=beats * count),
        background=[memory.reads(dut.m_axi)],
        max_cycles=1_200,
    )
    assert received == [word for cmd in commands for word in words(memory.contents, cmd, 8)]
    print(f"{count} x {beats} beats: {cycles} cycles")
    assert cycles <= beats * count + 40 + 8


@pytest.mark.parametrize("buffered", [False, True])
def test_reader_is_idle_only_when_all_is_delivered(buffered: bool) -> None:
    dut = BurstReader(data_bits=64, max_burst=2, fifo_beats=8, buffered=buffered)
    memory = AxiMemory(contents(1), base=BASE, latency=6)
    received: list[dict[str, int]] = []

    async def host(ctx) -> None:
        for beats in (1, 2, 3):
            assert ctx.get(dut.o_idle)
            await source(dut.i_cmd, [{"addr": BASE, "beats": beats}])(ctx)
            for _ in range(24):
                assert not ctx.get(dut.o_idle)
                await ctx.tick()
            await sink(dut.o_data, received, count=beats)(ctx)
            assert ctx.get(dut.o_idle)
        # a clear ends in idle only after the last response in flight
        await source(dut.i_cmd, [{"addr": BASE, "beats": 9}])(ctx)
        await ctx.tick().repeat(8)
        ctx.set(dut.i_clear, 1)
        await ctx.delay(1e-9)
        assert not ctx.get(dut.o_idle)
        await ctx.tick()
        ctx.set(dut.i_clear, 0)
        while not ctx.get(dut.o_idle):
            await ctx.tick()
        assert memory.read_beats == sum(beats for _addr, beats in memory.read_bursts)
        assert len(received) == 6

    run(dut, host, background=[memory.reads(dut.m_axi)], max_cycles=300, excuse=dut.i_clear)


def test_reader_reports_the_first_error_and_goes_on() -> None:
    rng = random.Random(5)
    dut = BurstReader(data_bits=64, max_burst=16, fifo_beats=64)
    bad, later = range(BASE + 0x1038, BASE + 0x1039), range(BASE + 0x1060, BASE + 0x1100)
    memory = AxiMemory(contents(5), base=BASE, errors=[bad, later], stalls={"r": geometric(rng, 0.3)})
    commands = [{"addr": BASE + 0xFF0, "beats": 50}, {"addr": BASE, "beats": 9}]
    expected = [word for cmd in commands for word in words(memory.contents, cmd, 8)]
    received: list[dict[str, int]] = []

    async def outcome(ctx) -> None:
        await sink(dut.o_data, received, count=len(expected))(ctx)
        assert ctx.get(dut.o_error)
        assert ctx.get(dut.o_error_addr) == BASE + 0x1038
        await pulse(ctx, dut.i_clear)
        assert not ctx.get(dut.o_error)
        await until(dut.o_idle)(ctx)

    run(
        dut,
        source(dut.i_cmd, commands),
        outcome,
        background=[memory.reads(dut.m_axi)],
        max_cycles=1_000,
    )
    assert received == expected


@pytest.mark.parametrize("seed", range(12))
def test_reader_recovers_from_a_clear_at_any_time(seed: int) -> None:
    """Clear in the middle of work; the next command must see its own data only, and no old error."""
    rng = random.Random(f"clear {seed}")
    dut = BurstReader(data_bits=64, max_burst=8, max_outstanding=4, fifo_beats=32, buffered=seed % 2 == 1)
    memory = AxiMemory(
        contents(seed),
        base=BASE,
        latency=lambda: rng.randrange(25),
        stalls=all_stalls(rng),
        errors=[range(BASE + 0x1000, BASE + 0x2000)],
    )
    received: list[dict[str, int]] = []
    again = {"addr": BASE + 8 * 13, "beats": 45}

    async def host(ctx) -> None:
        ctx.set(dut.i_cmd.payload, {"addr": BASE + 0x1010, "beats": 200})
        ctx.set(dut.i_cmd.valid, 1)
        ctx.set(dut.o_data.ready, rng.randrange(2))
        await ctx.tick().repeat(rng.randrange(1, 120))
        await pulse(ctx, dut.i_clear, [dut.i_cmd], rng.randrange(1, 4))
        ctx.set(dut.o_data.ready, 0)
        if seed % 3:
            await until(dut.o_idle)(ctx)  # the caution of a driver; not needed
        await source(dut.i_cmd, [again])(ctx)
        await sink(dut.o_data, received, count=45)(ctx)
        await ctx.tick().repeat(2)
        assert ctx.get(dut.o_idle)
        assert not ctx.get(dut.o_error)

    run(
        dut,
        host,
        background=[memory.reads(dut.m_axi)],
        max_cycles=3_000,
        excuse=dut.i_clear,
    )
    assert received == words(memory.contents, again, 8)


def test_reader_flags_a_misplaced_last() -> None:
    """A memory that ends a burst early is a fault, not a hang."""
    dut = BurstReader(data_bits=64, max_burst=4, fifo_beats=8)
    received: list[dict[str, int]] = []

    async def memory(ctx) -> None:
        ctx.set(dut.m_axi.arready, 1)
        await ctx.tick().until(dut.m_axi.arvalid)
        for index in range(3):
            ctx.set(dut.m_axi.rvalid, 1)
            ctx.set(dut.m_axi.rlast, index == 1)
            ctx.set(dut.m_axi.rdata, index)
            await ctx.tick()
        ctx.set(dut.m_axi.rvalid, 0)

    run(
        dut,
        source(dut.i_cmd, [{"addr": 0x40, "beats": 3}]),
        sink(dut.o_data, received, count=3),
        memory,
        until(dut.o_error),
        max_cycles=50,
    )
    assert received == [{"data": i, "last": int(i == 2)} for i in range(3)]


class SharedReader(wiring.Component):
    """A `ReadMux` and its `BurstReader`, as an accelerator has them."""

    def __init__(self, n: int, *, max_outstanding: int = 4, order_depth: int = 32) -> None:
        self.mux = ReadMux(n, data_bits=64, order_depth=order_depth)
        self.reader = BurstReader(data_bits=64, max_burst=16, max_outstanding=max_outstanding, fifo_beats=64)
        super().__init__(
            {
                "i_cmd": In(stream.Signature(command_layout())).array(n),
                "o_data": Out(stream.Signature(read_layout(64))).array(n),
                "m_axi": Out(Axi4ReadSignature(data_bits=64)),
                "i_clear": In(1),
                "o_idle": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.mux = mux = self.mux
        m.submodules.reader = reader = self.reader
        wiring.connect(m, mux.o_cmd, reader.i_cmd)
        wiring.connect(m, reader.o_data, mux.i_data)
        wiring.connect(m, wiring.flipped(self.m_axi), reader.m_axi)
        for mine, inner in zip(self.i_cmd, mux.i_cmd, strict=True):
            wiring.connect(m, wiring.flipped(mine), inner)
        for mine, inner in zip(self.o_data, mux.o_data, strict=True):
            wiring.connect(m, inner, wiring.flipped(mine))
        m.d.comb += [
            mux.i_clear.eq(self.i_clear),
            reader.i_clear.eq(self.i_clear),
            self.o_idle.eq(mux.o_idle & reader.o_idle),
        ]
        return m


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("seed", range(2))
def test_read_mux_gives_each_client_its_own(clients: int, seed: int) -> None:
    rng = random.Random(f"mux {clients} {seed}")
    dut = SharedReader(clients, order_depth=(2, 32)[seed])
    memory = AxiMemory(contents(seed), base=BASE, latency=20, stalls=all_stalls(rng, 0.2))
    commands = [random_commands(rng, 9 + i, 8, 30) for i in range(clients)]
    expected = [[word for cmd in mine for word in words(memory.contents, cmd, 8)] for mine in commands]
    received: list[list[dict[str, int]]] = [[] for _ in range(clients)]
    run(
        dut,
        *[source(dut.i_cmd[i], commands[i], geometric(rng, 0.3)) for i in range(clients)],
        *[
            sink(dut.o_data[i], received[i], count=len(expected[i]), stalls=geometric(rng, 0.3))
            for i in range(clients)
        ],
        until(dut.o_idle),
        background=[memory.reads(dut.m_axi)],
        max_cycles=10_000,
    )
    assert received == expected


def test_read_mux_keeps_one_beat_a_cycle() -> None:
    dut = SharedReader(2, max_outstanding=16)
    memory = AxiMemory(contents(3), base=BASE, latency=40)
    received: list[list[dict[str, int]]] = [[], []]
    cmd = {"addr": BASE + 0x100, "beats": 5}
    cycles = run(
        dut,
        *[source(dut.i_cmd[i], [cmd] * 100) for i in range(2)],
        *[sink(dut.o_data[i], received[i], count=500) for i in range(2)],
        background=[memory.reads(dut.m_axi)],
        max_cycles=1_200,
    )
    assert received == [words(memory.contents, cmd, 8) * 100] * 2
    assert cycles <= 1_000 + 40 + 9


def test_read_mux_recovers_from_a_clear() -> None:
    rng = random.Random(11)
    dut = SharedReader(3)
    memory = AxiMemory(contents(3), base=BASE, latency=20, stalls=all_stalls(rng))
    received: list[dict[str, int]] = []
    again = {"addr": BASE + 0x208, "beats": 33}

    async def host(ctx) -> None:
        for port in dut.i_cmd:
            ctx.set(port.payload, {"addr": BASE, "beats": 60})
            ctx.set(port.valid, 1)
        ctx.set(dut.o_data[0].ready, 1)
        await ctx.tick().repeat(150)
        await pulse(ctx, dut.i_clear, dut.i_cmd)
        ctx.set(dut.o_data[0].ready, 0)
        await until(dut.o_idle)(ctx)
        await source(dut.i_cmd[2], [again])(ctx)
        await sink(dut.o_data[2], received, count=33)(ctx)

    run(dut, host, background=[memory.reads(dut.m_axi)], max_cycles=2_000, excuse=dut.i_clear)
    assert received == words(memory.contents, again, 8)


# 3. writer

WRITERS = {
    "small": {"data_bits": 32, "max_burst": 4, "max_outstanding": 2},
    "wide": {"data_bits": 128, "max_burst": 16, "max_outstanding": 8},
}


def written(memory: Sequence[int], commands: Sequence[Command], beats: Sequence[Command], size: int):
    """Memory after the commands, by a slow loop."""
    result = bytearray(memory)
    supply = iter(beats)
    for cmd in commands:
        for index in range(cmd["beats"]):
            beat = next(supply)
            for lane in range(size):
                if beat["strb"] >> lane & 1:
                    result[cmd["addr"] - BASE + index * size + lane] = beat["data"] >> 8 * lane & 0xFF
    return result


def random_beats(rng: random.Random, commands: Sequence[Command], bits: int) -> list[Command]:
    count = sum(cmd["beats"] for cmd in commands)
    return [
        {"data": rng.getrandbits(bits), "strb": rng.getrandbits(bits // 8)} for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("config", WRITERS)
def test_writer_under_random_stalls(config: str, seed: int) -> None:
    rng = random.Random(f"writer {config} {seed}")
    dut = BurstWriter(**WRITERS[config])
    bits = WRITERS[config]["data_bits"]
    memory = AxiMemory(
        contents(seed), base=BASE, latency=lambda: rng.randrange(30), stalls=all_stalls(rng)
    )
    commands = random_commands(rng, 24, bits // 8, 40)
    beats = random_beats(rng, commands, bits)
    expected = written(memory.contents, commands, beats, bits // 8)

    async def command(ctx) -> None:
        await source(dut.i_cmd, commands, geometric(rng, 0.3))(ctx)
        await until(dut.o_idle)(ctx)
        # the fence: nothing is under way any more
        assert memory.responses == len(memory.write_bursts)
        assert memory.contents == expected

    run(
        dut,
        command,
        source(dut.i_data, beats, geometric(rng, 0.3)),
        background=[memory.writes(dut.m_axi)],
        max_cycles=20_000,
    )
    assert memory.contents == expected


@pytest.mark.parametrize(("beats", "count"), [(1000, 1), (20, 50), (4, 250)])
def test_writer_sustains_one_beat_a_cycle(beats: int, count: int) -> None:
    dut = BurstWriter(data_bits=64, max_burst=16, max_outstanding=16)
    memory = AxiMemory(contents(7), base=BASE, latency=40)
    commands = [{"addr": BASE + 128 * (i % 32), "beats": beats} for i in range(count)]
    data = random_beats(random.Random(8), commands, 64)
    expected = written(memory.contents, commands, data, 8)

    async def fence(ctx) -> None:
        await source(dut.i_cmd, commands)(ctx)
        await until(dut.o_idle)(ctx)

    cycles = run(
        dut,
        fence,
        source(dut.i_data, data),
        background=[memory.writes(dut.m_axi)],
        max_cycles=1_200,
    )
    assert memory.contents == expected
    print(f"{count} x {beats} beats: {cycles} cycles")
    assert cycles <= 1_000 + 40 + 9


def test_writer_fence_falls_at_once_and_waits_for_the_response() -> None:
    dut = BurstWriter(data_bits=64)
    memory = AxiMemory(contents(1), base=BASE, latency=50)

    async def process(ctx) -> None:
        assert ctx.get(dut.o_idle)
        await source(dut.i_cmd, [{"addr": BASE, "beats": 1}])(ctx)
        assert not ctx.get(dut.o_idle)
        await source(dut.i_data, [{"data": 0x0123456789ABCDEF, "strb": 0xFF}])(ctx)
        waited = 0
        while not ctx.get(dut.o_idle):
            waited += 1
            await ctx.tick()
        assert waited >= 50
        assert memory.contents[:8] == bytes.fromhex("efcdab8967452301")

    run(dut, process, background=[memory.writes(dut.m_axi)], max_cycles=100)


def test_writer_reports_the_first_error_and_goes_on() -> None:
    dut = BurstWriter(data_bits=64, max_burst=16)
    memory = AxiMemory(contents(1), base=BASE, errors=[range(BASE + 0x1108, BASE + 0x1190)])
    commands = [{"addr": BASE + 0xFF8, "beats": 60}]
    beats = random_beats(random.Random(4), commands, 64)

    async def process(ctx) -> None:
        await source(dut.i_cmd, commands)(ctx)
        await until(dut.o_idle)(ctx)
        assert ctx.get(dut.o_error)
        assert ctx.get(dut.o_error_addr) == BASE + 0x1100
        await pulse(ctx, dut.i_clear)
        assert not ctx.get(dut.o_error)

    run(
        dut,
        process,
        source(dut.i_data, beats),
        background=[memory.writes(dut.m_axi)],
        max_cycles=500,
    )
    assert len(memory.write_bursts) == 5


@pytest.mark.parametrize("seed", range(12))
def test_writer_recovers_from_a_clear_at_any_time(seed: int) -> None:
    """Bursts under way are completed without effect; the next command writes its own data."""
    rng = random.Random(f"write clear {seed}")
    dut = BurstWriter(data_bits=64, max_burst=8, max_outstanding=4)
    memory = AxiMemory(
        contents(seed),
        base=BASE,
        latency=lambda: rng.randrange(25),
        stalls=all_stalls(rng),
        errors=[range(BASE + 0x1000, BASE + 0x1800)],
    )
    first = {"addr": BASE + (0x1010 if seed % 2 else 0x2010), "beats": 200}  # into the errors, or not
    again = {"addr": BASE + 8 * 13, "beats": 45}
    word = {"data": 0x0123_4567_89AB_CDEF, "strb": 0xFF}
    beats = random_beats(rng, [again], 64)
    cleared = False
    commanded = False
    taken = 0  # beats of the first command

    async def watch(ctx) -> None:
        nonlocal taken
        while True:
            _c, _r, valid, ready = await ctx.tick().sample(dut.i_data.valid, dut.i_data.ready)
            if valid and ready and not cleared:
                taken += 1
            assert not (valid and ready and cleared and not commanded), "data taken before their command"

    async def host(ctx) -> None:
        nonlocal cleared, commanded
        ctx.set(dut.i_cmd.payload, first)
        ctx.set(dut.i_cmd.valid, 1)
        ctx.set(dut.i_data.payload, word)
        ctx.set(dut.i_data.valid, int(seed % 4 != 0))
        await ctx.tick().repeat(rng.randrange(1, 120))
        await pulse(ctx, dut.i_clear, [dut.i_cmd, dut.i_data], rng.randrange(1, 4))
        cleared = True
        if seed % 3:
            await until(dut.o_idle)(ctx)
        else:  # the new data are there before their command: they must wait for it
            ctx.set(dut.i_data.payload, beats[0])
            ctx.set(dut.i_data.valid, 1)
        await source(dut.i_cmd, [again])(ctx)
        commanded = True
        await source(dut.i_data, beats)(ctx)
        await until(dut.o_idle)(ctx)
        assert not ctx.get(dut.o_error)

    before = bytes(memory.contents)
    run(
        dut,
        host,
        background=[memory.writes(dut.m_axi), watch],
        max_cycles=3_000,
        excuse=dut.i_clear,
    )
    expected = written(before, [again], beats, 8)
    if seed % 2 == 0:
        expected = written(expected, [first | {"beats": taken}], [word] * taken, 8)
    assert memory.contents == expected


class SharedWriter(wiring.Component):
    """A `WriteMux` and its `BurstWriter`."""

    def __init__(self, n: int) -> None:
        self.mux = WriteMux(n, data_bits=64)
        self.writer = BurstWriter(data_bits=64, max_burst=16, max_outstanding=8)
        super().__init__(
            {
                "i_cmd": In(stream.Signature(command_layout())).array(n),
                "i_data": In(stream.Signature(write_layout(64))).array(n),
                "m_axi": Out(Axi4WriteSignature(data_bits=64)),
                "i_clear": In(1),
                "o_idle": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.mux = mux = self.mux
        m.submodules.writer = writer = self.writer
        wiring.connect(m, mux.o_cmd, writer.i_cmd)
        wiring.connect(m, mux.o_data, writer.i_data)
        wiring.connect(m, wiring.flipped(self.m_axi), writer.m_axi)
        for mine, inner in zip(self.i_cmd, mux.i_cmd, strict=True):
            wiring.connect(m, wiring.flipped(mine), inner)
        for mine, inner in zip(self.i_data, mux.i_data, strict=True):
            wiring.connect(m, wiring.flipped(mine), inner)
        m.d.comb += [
            mux.i_clear.eq(self.i_clear),
            writer.i_clear.eq(self.i_clear),
            self.o_idle.eq(mux.o_idle & writer.o_idle),
        ]
        return m


@pytest.mark.parametrize("clients", [1, 2, 3])
def test_write_mux_pairs_commands_with_their_data(clients: int) -> None:
    """Each client writes a region of its own; commands of all overlap in time."""
    rng = random.Random(f"write mux {clients}")
    dut = SharedWriter(clients)
    memory = AxiMemory(contents(2), base=BASE, latency=15, stalls=all_stalls(rng, 0.2))
    expected = bytes(memory.contents)
    commands, beats = [], []
    for client in range(clients):
        region = BASE + 4096 * client
        mine = [
            {"addr": region + 8 * rng.randrange(400), "beats": rng.choice([0, 1, 3, 20])}
            for _ in range(12)
        ]
        commands.append(mine)
        beats.append(random_beats(rng, mine, 64))
        expected = written(expected, mine, beats[-1], 8)
    idle: list[int] = []

    async def command(ctx, client: int) -> None:
        await source(dut.i_cmd[client], commands[client], geometric(rng, 0.3))(ctx)
        _c, _r, now = await ctx.tick().sample(dut.o_idle)
        idle.append(now)
        await until(dut.o_idle)(ctx)

    def commander(client: int) -> Process:
        async def process(ctx) -> None:
            await command(ctx, client)

        return process

    run(
        dut,
        *[commander(i) for i in range(clients)],
        *[source(dut.i_data[i], beats[i], geometric(rng, 0.3)) for i in range(clients)],
        background=[memory.writes(dut.m_axi)],
        max_cycles=10_000,
    )
    assert memory.contents == expected


def test_write_mux_recovers_from_a_clear() -> None:
    rng = random.Random(21)
    dut = SharedWriter(2)
    memory = AxiMemory(contents(2), base=BASE, latency=15, stalls=all_stalls(rng, 0.2))
    again = {"addr": BASE + 0x1000, "beats": 21}
    beats = random_beats(rng, [again], 64)

    async def host(ctx) -> None:
        for port in dut.i_cmd:
            ctx.set(port.payload, {"addr": BASE, "beats": 50})
            ctx.set(port.valid, 1)
        ctx.set(dut.i_data[0].valid, 1)  # strobes 0
        await source(dut.i_data[1], [{"data": 0, "strb": 0}] * 7)(ctx)  # then nothing: all stand still
        await ctx.tick().repeat(30)
        await pulse(ctx, dut.i_clear, [*dut.i_cmd, *dut.i_data])
        await until(dut.o_idle)(ctx)
        await source(dut.i_cmd[1], [again])(ctx)
        await source(dut.i_data[1], beats)(ctx)
        await until(dut.o_idle)(ctx)

    before = bytes(memory.contents)
    run(dut, host, background=[memory.writes(dut.m_axi)], max_cycles=2_000, excuse=dut.i_clear)
    assert memory.contents == written(before, [again], beats, 8)


# 4. register bank

BANK = (
    Register("magic", 0x00, "ro", "constant", reset=0x5254554C),
    Register("sensor", 0x04, "ro", "three inputs", count=3),
    Register("limit", 0x10, "rw", "a number", reset=7),
    Register("program", 0x14, "rw", "an address", count=2),
    Register("control", 0x20, "w1", "commands"),
    Register("kick", 0x24, "w1", "two commands", count=2),
    Register("pop", 0x40, "rs", "head of a queue"),
    Register("pops", 0x48, "rs", "heads of queues", count=2),
)


async def axil_write(ctx, bus, address: int, value: int, strobe: int = 0xF, *, late: str = "") -> int:
    """One write; ``late`` names the channel ("aw", "w") that comes three cycles after the other."""
    ctx.set(bus.awaddr, address)
    ctx.set(bus.wdata, value)
    ctx.set(bus.wstrb, strobe)
    ctx.set(bus.awvalid, int(late != "aw"))
    ctx.set(bus.wvalid, int(late != "w"))
    if late:
        for _ in range(3):
            _c, _r, awready, wready = await ctx.tick().sample(bus.awready, bus.wready)
            assert not awready and not wready
        ctx.set(bus.awvalid, 1)
        ctx.set(bus.wvalid, 1)
    await ctx.tick().until(bus.awready & bus.wready)
    ctx.set(bus.awvalid, 0)
    ctx.set(bus.wvalid, 0)
    ctx.set(bus.bready, 1)
    (response,) = await ctx.tick().sample(bus.bresp).until(bus.bvalid)
    ctx.set(bus.bready, 0)
    return response


async def axil_read(ctx, bus, address: int, *, wait: int = 0) -> tuple[int, int]:
    ctx.set(bus.araddr, address)
    ctx.set(bus.arvalid, 1)
    await ctx.tick().until(bus.arready)
    ctx.set(bus.arvalid, 0)
    for _ in range(wait):
        await ctx.tick()
    ctx.set(bus.rready, 1)
    value, response = await ctx.tick().sample(bus.rdata, bus.rresp).until(bus.rvalid)
    ctx.set(bus.rready, 0)
    return value, response


def test_csr_bank_every_access() -> None:
    dut = CsrBank(BANK, addr_bits=8)
    bus = dut.s_axil
    strobes: list[tuple[str, int]] = []
    watched = {
        "control": (dut.control_stb, dut.control),
        "kick0": (dut.kick_stb[0], dut.kick[0]),
        "kick1": (dut.kick_stb[1], dut.kick[1]),
        "pop": (dut.pop_stb, dut.pop),
        "pops0": (dut.pops_stb[0], dut.pops[0]),
        "pops1": (dut.pops_stb[1], dut.pops[1]),
    }

    async def watch(ctx) -> None:
        while True:
            signals = [signal for pair in watched.values() for signal in pair]
            _c, _r, *values = await ctx.tick().sample(*signals)
            for name, strobe, value in zip(watched, values[::2], values[1::2], strict=True):
                if strobe:
                    strobes.append((name, value))

    async def host(ctx) -> None:
        assert await axil_read(ctx, bus, 0x00) == (0x5254554C, 0)
        for i in range(3):
            ctx.set(dut.sensor[i], 100 + i)
        for i in range(3):
            assert await axil_read(ctx, bus, 0x04 + 4 * i, wait=i) == (100 + i, 0)
        assert await axil_read(ctx, bus, 0x10) == (7, 0)
        assert await axil_write(ctx, bus, 0x10, 0x11223344) == 0
        assert await axil_write(ctx, bus, 0x10, 0xAABBCCDD, 0b0101) == 0
        assert ctx.get(dut.limit) == 0x11BB33DD
        assert await axil_read(ctx, bus, 0x12) == (0x11BB33DD, 0)
        assert await axil_write(ctx, bus, 0x14, 1, late="aw") == 0
        assert await axil_write(ctx, bus, 0x18, 2, late="w") == 0
        assert [ctx.get(word) for word in dut.program] == [1, 2]
        assert await axil_write(ctx, bus, 0x20, 0x1234, 0b0001) == 0
        assert await axil_write(ctx, bus, 0x28, 0x99) == 0
        assert await axil_read(ctx, bus, 0x28) == (0, 0)
        ctx.set(dut.pop, 55)
        ctx.set(dut.pops[1], 66)
        assert await axil_read(ctx, bus, 0x40, wait=4) == (55, 0)
        assert await axil_read(ctx, bus, 0x4C) == (66, 0)
        assert strobes == [("control", 0x34), ("kick1", 0x99), ("pop", 55), ("pops1", 66)]
        # refused: no register there, or not for writing
        for address in (0x1C, 0x44, 0xFC):
            assert (await axil_read(ctx, bus, address))[1] == 2
            assert await axil_write(ctx, bus, address, 1) == 2
        for address in (0x00, 0x08, 0x40):
            assert await axil_write(ctx, bus, address, 1) == 2
        assert len(strobes) == 4
        assert await axil_read(ctx, bus, 0x00) == (0x5254554C, 0)

    run(dut, host, background=[watch], max_cycles=500)


def test_csr_bank_holds_its_answers() -> None:
    """While the host does not take an answer, the next request waits and the answer stays."""
    dut = CsrBank(BANK, addr_bits=8)
    bus = dut.s_axil

    async def host(ctx) -> None:
        ctx.set(bus.awaddr, 0xFC)  # refused
        ctx.set(bus.wdata, 9)
        ctx.set(bus.wstrb, 0xF)
        ctx.set(bus.araddr, 0x00)
        for signal in (bus.awvalid, bus.wvalid, bus.arvalid):
            ctx.set(signal, 1)
        await ctx.tick()
        ctx.set(bus.awaddr, 0x10)
        ctx.set(bus.araddr, 0x10)
        for _ in range(4):
            await ctx.tick()
            assert ctx.get(bus.bvalid) and ctx.get(bus.bresp) == 2
            assert ctx.get(bus.rvalid) and ctx.get(bus.rdata) == 0x5254554C
            assert not ctx.get(bus.awready) and not ctx.get(bus.wready) and not ctx.get(bus.arready)
            assert ctx.get(dut.limit) == 7
        ctx.set(bus.bready, 1)
        ctx.set(bus.rready, 1)
        await ctx.tick()  # both answers go, both requests come
        for signal in (bus.awvalid, bus.wvalid, bus.arvalid):
            ctx.set(signal, 0)
        assert ctx.get(bus.bvalid) and ctx.get(bus.bresp) == 0
        assert ctx.get(bus.rvalid) and ctx.get(bus.rdata) == 7
        assert ctx.get(dut.limit) == 9
        await ctx.tick()
        assert not ctx.get(bus.bvalid) and not ctx.get(bus.rvalid)

    run(dut, host, max_cycles=50)


def test_csr_bank_of_the_accelerator() -> None:
    """Every word of the declared map answers, and resets to its declared value."""
    dut = CsrBank(REGISTERS)

    async def host(ctx) -> None:
        for register in REGISTERS:
            for i in range(register.count):
                value, response = await axil_read(ctx, dut.s_axil, register.offset + 4 * i)
                expected = 0 if register.access == "w1" else register.reset
                assert (value, response) == (expected, 0), register.name

    run(dut, host, max_cycles=2_000)


@pytest.mark.parametrize(
    ("registers", "message"),
    [
        ([Register("a", 2, "ro", "")], "register a: offset must be a multiple of 4, not 0x2"),
        ([Register("a", 0x100, "ro", "")], "register a does not fit in 8 address bits"),
        (
            [Register("a", 0, "ro", "", count=2), Register("b", 4, "rw", "")],
            "registers a and b share offset 0x4",
        ),
        (
            [Register("a", 0, "w1", ""), Register("a_stb", 4, "rw", "")],
            "two ports of the register bank would be called 'a_stb'",
        ),
    ],
)
def test_csr_bank_refuses_bad_maps(registers: list[Register], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        CsrBank(registers, addr_bits=8)


# 5. parameters and names


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StreamFifo(8, depth=3), "FIFO depth must be a power of two from 2, not 3"),
        (
            lambda: BurstReader(data_bits=64, max_burst=12),
            "max_burst must be a power of two from 2 to 256 beats, not 12",
        ),
        (
            lambda: BurstWriter(data_bits=512, max_burst=128),
            "a burst of max_burst beats must fit in 4096 bytes: 128 beats of 512 bits are 8192 bytes",
        ),
        (
            lambda: BurstReader(data_bits=64, max_burst=16, fifo_beats=8),
            "fifo_beats must hold a burst: 8 < max_burst 16",
        ),
        (lambda: ReadMux(0, data_bits=64), "ReadMux needs at least 1 client, not 0"),
        (lambda: WriteMux(0, data_bits=64), "WriteMux needs at least 1 client, not 0"),
        (
            lambda: Axi4Signature(data_bits=48),
            "AXI4 data_bits must be a power of two from 8 to 4096, not 48",
        ),
        (lambda: Axi4ReadSignature(data_bits=64, id_bits=5), "AXI4 id_bits must be 1 to 4, not 5"),
        (lambda: Axi4LiteSignature(data_bits=16), "AXI4-Lite data_bits must be 32 or 64, not 16"),
    ],
)
def test_bad_parameters_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: CsrBank(BANK), {"s_axil_awvalid", "s_axil_rdata", "kick_stb_1", "clk", "rst"}),
        (lambda: BurstReader(data_bits=64), {"m_axi_araddr", "m_axi_rready", "i_cmd_payload"}),
    ],
)
def test_verilog_port_names(make, expected: set[str]) -> None:
    dut = make()
    text = rtlil.convert(dut, name="dut", ports=flat_ports(dut))
    top = text[text.index("module \\dut\n") :]
    top = top[: top.index("\nend\n")]
    ports = set(re.findall(r"wire (?:width \d+ )?(?:input|output) \d+ +\\(\w+)", top))
    assert expected <= ports
    assert not any("__" in name for name in ports)


# 6. Verilator, against cocotbext-axi


@pytest.mark.cosim
def test_against_cocotbext_axi() -> None:
    run_bench(Path(__file__).parents[1] / "build" / "bench_axi")
