"""cocotb bench of the whole device: foreign AXI slaves and a foreign register master around the one-clock Verilog.

cocotbext-axi's memories and its `AxiLiteMaster` replace our DRAM model, harness and driver; only the memory image is
ours. A prompt of two tiles and one decode step, all logits against the golden model, with and without bus pauses.
"""

import random
from pathlib import Path
from typing import Any

import cocotb
import numpy as np
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge, with_timeout
from cocotbext.axi import (
    AxiBus,
    AxiLiteBus,
    AxiLiteMaster,
    AxiReadBus,
    AxiSlave,
    AxiSlaveRead,
)

from cosim.cycle_bench import run_cocotb_module
from cosim.random_model import TINY, random_checkpoint
from golden.model import GoldenModel
from host_driver.compiler import LAYERS, STEP
from host_driver.image import compile_checkpoint, memory_image
from rtl.top import Lutra
from spec import csr
from spec.presets import TEST

PROMPT = (7, 100, 23, 300)
SLOTS = 16


class Memory:
    """Target of the foreign slaves."""

    def __init__(self, size: int) -> None:
        self.contents = bytearray(size)

    async def read(self, address: int, length: int) -> bytes:
        assert address + length <= len(self.contents), f"read beyond the memory at {address:#x}"
        return bytes(self.contents[address : address + length])

    async def write(self, address: int, data: bytes) -> None:
        assert address + len(data) <= len(self.contents), f"write beyond the memory at {address:#x}"
        self.contents[address : address + len(data)] = data


def pauses(rng: random.Random, probability: float):
    """Pause generator in cocotbext-axi's sense."""
    while True:
        yield rng.random() < probability


class TopBench:
    """The device with a model in its memory."""

    def __init__(self, dut: Any, pause: float) -> None:
        self.dut = dut
        self.checkpoint = random_checkpoint(TINY, seed=3)
        self.compiled = compile_checkpoint(self.checkpoint, TEST, slots=SLOTS)
        self.memory = Memory(self.compiled.memory.limit)
        for address, data in memory_image(self.compiled, self.checkpoint):
            self.memory.contents[address : address + len(data)] = data
        weights = AxiSlaveRead(AxiReadBus.from_prefix(dut, "m_axi_w"), dut.clk, dut.rst, target=self.memory)
        data = AxiSlave(AxiBus.from_prefix(dut, "m_axi_d"), dut.clk, dut.rst, target=self.memory)
        self.registers: Any = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "s_axil"), dut.clk, dut.rst)
        rng = random.Random(5)
        reads: Any = (weights, data.read_if)
        for part in reads:
            part.log.setLevel("ERROR")
            for channel in (part.ar_channel, part.r_channel):
                channel.log.setLevel("WARNING")
                if pause:
                    channel.set_pause_generator(pauses(random.Random(rng.random()), pause))
        writes: Any = data.write_if
        for channel in (writes.aw_channel, writes.w_channel, writes.b_channel):
            channel.log.setLevel("WARNING")
            if pause:
                channel.set_pause_generator(pauses(random.Random(rng.random()), pause))
        for part in (writes, self.registers.write_if, self.registers.read_if):
            part.log.setLevel("ERROR")

    async def start(self) -> None:
        self.dut.rst.value = 1
        cocotb.start_soon(Clock(self.dut.clk, 10, unit="ns").start())
        for _ in range(5):
            await FallingEdge(self.dut.clk)
        self.dut.rst.value = 0
        await FallingEdge(self.dut.clk)

    async def write(self, name: str, value: int, index: int = 0) -> None:
        await self.registers.write_dword(csr.BY_NAME[name].offset + 4 * index, value)

    async def read(self, name: str) -> int:
        return await self.registers.read_dword(csr.BY_NAME[name].offset)

    async def step(self, tokens: tuple[int, ...], position: int, *, head: bool) -> np.ndarray | None:
        """One doorbell; the logits."""
        memory = self.compiled.memory
        await self.write("program", self.compiled.programs[STEP if head else LAYERS].address)
        await self.write("memory_limit", memory.limit)
        await self.write("cache_slots", self.compiled.slots)
        await self.write("logits", memory["logits"].address)
        await self.write("logits_enable", int(head))
        await self.write("position", position)
        await self.write("token_count", len(tokens))
        for index, token in enumerate(tokens):
            await self.write("tokens", token, index)
        await self.registers.write_dword(csr.CONTROL.offset, csr.CONTROL.field("start").mask)
        while True:
            await FallingEdge(self.dut.clk)
            if int(self.dut.irq.value):
                break
        assert await self.read("status") == csr.STATUS.field("done").mask
        if not head:
            return None
        first = memory["logits"].address
        return np.frombuffer(bytes(self.memory.contents[first : first + 4 * TINY.vocab]), dtype="<u4")


@cocotb.test()
@cocotb.parametrize(pause=[0.0, 0.3])
async def prompt_to_logits(dut: Any, pause: float) -> None:
    bench = TopBench(dut, pause)
    await bench.start()
    assert await bench.read("magic") == csr.MAGIC
    golden = GoldenModel(bench.checkpoint, bench.compiled.slots)
    tile = bench.compiled.tile
    position, tokens = 0, PROMPT
    while position < len(PROMPT) + 1:
        part = tokens[position : position + tile]
        head = position + tile >= len(PROMPT)
        logits = await with_timeout(bench.step(part, position, head=head), 10, "ms")
        expected = golden.step(list(part), position)[0]
        if logits is not None:
            np.testing.assert_array_equal(logits, expected.numpy().view(np.uint32))
            assert await bench.read("argmax") == int(expected.argmax())
            tokens = (*tokens, int(expected.argmax()))
        position += len(part)


def run_bench(directory: Path) -> None:
    """Build the one-clock device and run the coroutines above on it."""
    run_cocotb_module(Lutra(TEST), "lutra", "cosim.bench_top", directory)
