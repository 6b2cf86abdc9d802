"""Verilator bench of the bus masters and the register bank against cocotbext-axi.

The judge is foreign code: cocotbext-axi's `AxiSlaveRead`/`AxiSlaveWrite` serve the masters from one memory and check
4 KiB and WLAST; its `AxiLiteMaster` drives the register bank. ``run_bench`` builds and runs it (see
``tests/test_bus.py``); the coroutines marked ``cocotb.test`` run inside the simulator.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cocotb
from amaranth.hdl import Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge, ReadOnly, with_timeout
from cocotbext.axi import (
    AxiLiteBus,
    AxiLiteMaster,
    AxiReadBus,
    AxiResp,
    AxiSlaveRead,
    AxiSlaveWrite,
    AxiWriteBus,
)

from cosim.cycle_bench import run_cocotb_module
from rtl.bus.axi import Axi4LiteSignature, Axi4ReadSignature, Axi4WriteSignature
from rtl.bus.burst import command_layout, read_layout, write_layout
from rtl.bus.csr_bank import CsrBank
from rtl.bus.reader import BurstReader
from rtl.bus.writer import BurstWriter
from spec.csr import BY_NAME, REGISTERS

DATA_BITS = 128
BEAT = DATA_BITS // 8
SIZE = 1 << 16
BAD = range(0xF000, 0x1_0000)
"""Addresses of the bench's memory that answer SLVERR."""


class BusBench(wiring.Component):
    """A reader, a writer and the accelerator's register bank side by side."""

    i_read_cmd: stream.Interface
    o_read: stream.Interface
    m_axi_r: wiring.PureInterface
    i_write_cmd: stream.Interface
    i_write: stream.Interface
    m_axi_w: wiring.PureInterface
    s_axil: wiring.PureInterface
    i_clear: Signal
    o_read_error: Signal
    o_read_error_addr: Signal
    o_read_idle: Signal
    o_write_error: Signal
    o_write_error_addr: Signal
    o_write_idle: Signal

    def __init__(self) -> None:
        super().__init__(
            {
                "i_read_cmd": In(stream.Signature(command_layout())),
                "o_read": Out(stream.Signature(read_layout(DATA_BITS))),
                "m_axi_r": Out(Axi4ReadSignature(data_bits=DATA_BITS)),
                "i_write_cmd": In(stream.Signature(command_layout())),
                "i_write": In(stream.Signature(write_layout(DATA_BITS))),
                "m_axi_w": Out(Axi4WriteSignature(data_bits=DATA_BITS)),
                "s_axil": In(Axi4LiteSignature()),
                "i_clear": In(1),
                "o_read_error": Out(1),
                "o_read_error_addr": Out(40),
                "o_read_idle": Out(1),
                "o_write_error": Out(1),
                "o_write_error_addr": Out(40),
                "o_write_idle": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.reader = reader = BurstReader(data_bits=DATA_BITS)
        m.submodules.writer = writer = BurstWriter(data_bits=DATA_BITS)
        m.submodules.csr_bank = bank = CsrBank(REGISTERS)
        wiring.connect(m, wiring.flipped(self.i_read_cmd), reader.i_cmd)
        wiring.connect(m, reader.o_data, wiring.flipped(self.o_read))
        wiring.connect(m, reader.m_axi, wiring.flipped(self.m_axi_r))
        wiring.connect(m, wiring.flipped(self.i_write_cmd), writer.i_cmd)
        wiring.connect(m, wiring.flipped(self.i_write), writer.i_data)
        wiring.connect(m, writer.m_axi, wiring.flipped(self.m_axi_w))
        wiring.connect(m, wiring.flipped(self.s_axil), bank.s_axil)
        m.d.comb += [
            reader.i_clear.eq(self.i_clear),
            writer.i_clear.eq(self.i_clear),
            self.o_read_error.eq(reader.o_error),
            self.o_read_error_addr.eq(reader.o_error_addr),
            self.o_read_idle.eq(reader.o_idle),
            self.o_write_error.eq(writer.o_error),
            self.o_write_error_addr.eq(writer.o_error_addr),
            self.o_write_idle.eq(writer.o_idle),
        ]
        return m


# 1. build and run, called by pytest


def run_bench(directory: Path) -> None:
    """Build the bench under ``directory`` (kept from an earlier run if nothing changed) and run all its tests."""
    run_cocotb_module(BusBench(), "bus_bench", "cosim.bench_axi", directory)


# 2. inside the simulator


class Memory:
    """Target of cocotbext-axi's slaves: bytes, of which a range fails."""

    def __init__(self, seed: int) -> None:
        self.contents = bytearray(random.Random(seed).randbytes(SIZE))

    async def read(self, address: int, length: int) -> bytes:
        if address in BAD or address + length > SIZE:
            raise ValueError(f"read of {address:#x} fails as asked")
        return bytes(self.contents[address : address + length])

    async def write(self, address: int, data: bytes) -> None:
        if address in BAD or address + len(data) > SIZE:
            raise ValueError(f"write of {address:#x} fails as asked")
        self.contents[address : address + len(data)] = data


def pauses(rng: random.Random, probability: float):
    """Pause generator in cocotbext-axi's sense."""
    while True:
        yield rng.random() < probability


class Bench:
    """Clock, reset, the foreign slaves, and streams driven between the clock edges."""

    def __init__(self, dut, seed: int, *, pause: float) -> None:
        self.dut = dut
        self.rng = random.Random(seed)
        self.pause = pause
        self.memory = Memory(seed)
        self.read_slave = AxiSlaveRead(AxiReadBus.from_prefix(dut, "m_axi_r"), dut.clk, dut.rst, target=self.memory)
        self.write_slave = AxiSlaveWrite(AxiWriteBus.from_prefix(dut, "m_axi_w"), dut.clk, dut.rst, target=self.memory)
        self.csr: Any = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "s_axil"), dut.clk, dut.rst)
        reads, writes, csr = self.read_slave, self.write_slave, self.csr
        channels = [reads.ar_channel, reads.r_channel, writes.aw_channel, writes.w_channel, writes.b_channel]
        channels += [csr.write_if.aw_channel, csr.write_if.w_channel, csr.write_if.b_channel]
        channels += [csr.read_if.ar_channel, csr.read_if.r_channel]
        for channel in channels:
            channel.log.setLevel("WARNING")
            if pause:
                channel.set_pause_generator(pauses(random.Random(self.rng.random()), pause))
        for part in (reads, writes, csr.write_if, csr.read_if):
            part.log.setLevel("ERROR")

    async def start(self) -> None:
        dut = self.dut
        for name in ("i_read_cmd_valid", "o_read_ready", "i_write_cmd_valid", "i_write_valid", "i_clear"):
            getattr(dut, name).value = 0
        dut.rst.value = 1
        cocotb.start_soon(Clock(dut.clk, 10, unit="ns").start())
        for _ in range(4):
            await FallingEdge(dut.clk)
        dut.rst.value = 0
        await FallingEdge(dut.clk)

    def stalled(self) -> bool:
        return self.rng.random() < self.pause

    async def send(self, prefix: str, payloads: Sequence[int]) -> None:
        """Offer payloads to a stream; set after the falling edge, so that nothing races with the clock."""
        valid, ready = getattr(self.dut, f"{prefix}_valid"), getattr(self.dut, f"{prefix}_ready")
        for payload in payloads:
            while self.stalled():
                await FallingEdge(self.dut.clk)
            valid.value = 1
            getattr(self.dut, f"{prefix}_payload").value = payload
            taken = False
            while not taken:
                await ReadOnly()
                taken = bool(ready.value)
                await FallingEdge(self.dut.clk)
            valid.value = 0

    async def receive(self, count: int) -> list[tuple[int, int]]:
        """(data, last) of the next ``count`` beats read."""
        beats = []
        while len(beats) < count:
            ready = not self.stalled()
            self.dut.o_read_ready.value = int(ready)
            await ReadOnly()
            if ready and self.dut.o_read_valid.value:
                payload = int(self.dut.o_read_payload.value)
                beats.append((payload & (1 << DATA_BITS) - 1, payload >> DATA_BITS))
            await FallingEdge(self.dut.clk)
        self.dut.o_read_ready.value = 0
        return beats

    async def until(self, signal) -> None:
        await ReadOnly()
        while not signal.value:
            await FallingEdge(self.dut.clk)
            await ReadOnly()
        await FallingEdge(self.dut.clk)

    async def clear(self) -> None:
        self.dut.i_clear.value = 1
        await FallingEdge(self.dut.clk)
        self.dut.i_clear.value = 0

    def expected(self, address: int, beats: int) -> list[tuple[int, int]]:
        contents = self.memory.contents
        return [
            (int.from_bytes(contents[address + i * BEAT :][:BEAT], "little"), int(i == beats - 1)) for i in range(beats)
        ]

    def commands(self, count: int, limit: int = BAD.start) -> list[tuple[int, int]]:
        """(address, beats) below ``limit``."""
        made = []
        for _ in range(count):
            beats = self.rng.choice([0, 1, 3, 17, 40, self.rng.randint(1, 300)])
            made.append((BEAT * self.rng.randrange(limit // BEAT - beats), beats))
        return made


def command(address: int, beats: int) -> int:
    """Payload of a command stream, as packed in Verilog."""
    return address | beats << 40


async def together(*coroutines):
    tasks = [cocotb.start_soon(coroutine) for coroutine in coroutines]
    return [await with_timeout(task, 2, "ms") for task in tasks]


@cocotb.test()
@cocotb.parametrize(pause=[0.0, 0.4])
async def reads(dut, pause: float) -> None:
    bench = Bench(dut, 1, pause=pause)
    await bench.start()
    commands = bench.commands(20)
    expected = [beat for cmd in commands for beat in bench.expected(*cmd)]
    _, received = await together(
        bench.send("i_read_cmd", [command(*cmd) for cmd in commands]), bench.receive(len(expected))
    )
    assert received == expected
    await together(bench.until(dut.o_read_idle))
    assert not dut.o_read_error.value


@cocotb.test()
@cocotb.parametrize(pause=[0.0, 0.4])
async def writes(dut, pause: float) -> None:
    bench = Bench(dut, 2, pause=pause)
    await bench.start()
    commands = bench.commands(20)
    expected = bytearray(bench.memory.contents)
    payloads = []
    for address, beats in commands:
        for i in range(beats):
            word, strobes = bench.rng.randbytes(BEAT), bench.rng.getrandbits(BEAT)
            payloads.append(int.from_bytes(word, "little") | strobes << DATA_BITS)
            for lane in range(BEAT):
                if strobes >> lane & 1:
                    expected[address + i * BEAT + lane] = word[lane]
    await together(
        bench.send("i_write_cmd", [command(*cmd) for cmd in commands]), bench.send("i_write", payloads)
    )
    await together(bench.until(dut.o_write_idle))
    assert bench.memory.contents == expected
    assert not dut.o_write_error.value


@cocotb.test()
async def faults_are_reported_and_cleared(dut) -> None:
    bench = Bench(dut, 3, pause=0.2)
    await bench.start()
    beats = 30
    address = BAD.start - 10 * BEAT
    words = [bench.rng.getrandbits(DATA_BITS) | (1 << BEAT) - 1 << DATA_BITS for _ in range(beats)]
    await together(
        bench.send("i_read_cmd", [command(address, beats)]),
        bench.receive(beats),
        bench.send("i_write_cmd", [command(address, beats)]),
        bench.send("i_write", words),
    )
    await together(bench.until(dut.o_write_idle))
    assert dut.o_read_error.value
    assert dut.o_read_error_addr.value == BAD.start
    assert dut.o_write_error.value
    assert dut.o_write_error_addr.value == BAD.start
    # a clear with work under way: then only new work is seen
    await together(bench.send("i_read_cmd", [command(0, 500)]), bench.send("i_write_cmd", [command(0, 500)]))
    await bench.clear()
    await together(bench.until(dut.o_read_idle), bench.until(dut.o_write_idle))
    assert not dut.o_read_error.value
    assert not dut.o_write_error.value
    _, received = await together(bench.send("i_read_cmd", [command(0x2340, 33)]), bench.receive(33))
    assert received == bench.expected(0x2340, 33)


@cocotb.test()
@cocotb.parametrize(pause=[0.0, 0.4])
async def registers(dut, pause: float) -> None:
    bench = Bench(dut, 4, pause=pause)
    await bench.start()
    values = {}
    for register in REGISTERS:
        for i in range(register.count):
            offset = register.offset + 4 * i
            if register.access == "rw":
                values[offset] = bench.rng.getrandbits(32)
                response = await with_timeout(bench.csr.write(offset, values[offset].to_bytes(4, "little")), 1, "ms")
                assert response.resp == AxiResp.OKAY
            elif register.access == "ro":
                values[offset] = register.reset
    for offset, value in values.items():
        answer = await with_timeout(bench.csr.read(offset, 4), 1, "ms")
        assert answer.resp == AxiResp.OKAY
        assert int.from_bytes(answer.data, "little") == value, hex(offset)
    # one byte of a word, then what must be refused
    watchdog = BY_NAME["watchdog"].offset
    await bench.csr.write(watchdog + 2, b"\x5a")
    answer = await bench.csr.read(watchdog, 4)
    assert int.from_bytes(answer.data, "little") == values[watchdog] & 0xFF00FFFF | 0x5A0000
    assert (await bench.csr.write(BY_NAME["magic"].offset, bytes(4))).resp == AxiResp.SLVERR
    assert (await bench.csr.read(0xFFC, 4)).resp == AxiResp.SLVERR
    assert (await bench.csr.write(0xFFC, bytes(4))).resp == AxiResp.SLVERR
