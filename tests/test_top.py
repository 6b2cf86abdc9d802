"""The whole device: RTL against golden, from prompt to logits, and what happens when something is wrong."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from cosim.bench_top import run_bench
from cosim.random_model import TINY, TINY_PLAIN, random_checkpoint
from cosim.rtl_device import RtlTransport
from golden.model import GoldenModel
from host_driver.device import Device
from host_driver.errors import DeviceFault, InvalidRequest, SpecMismatch
from host_driver.image import compile_checkpoint, memory_image
from host_driver.observe import kv_slots
from host_driver.transport import open_device
from host_driver.verify import compare_step
from rtl.top import GATED
from spec.config import KEY_BLOCK, KvFormat, ModelConfig
from spec.csr import BY_NAME
from spec.descriptors import DESCRIPTOR_BYTES, Opcode, pack
from spec.faults import FaultCode
from spec.presets import SIM, TEST

pytestmark = pytest.mark.cosim
STALLED = {"stall_probability": 0.3, "stall_seed": 7}


@dataclass
class Bench:
    """A model on an RTL device, and the golden model beside it."""

    device: Device
    golden: GoldenModel
    model: ModelConfig

    @property
    def transport(self) -> RtlTransport:
        transport = self.device.transport
        assert isinstance(transport, RtlTransport)
        return transport

    def tile(self, ids: list[int], position: int, *, head: bool) -> int | None:
        """One step on both; all logits must be equal to the bit. The token that follows."""
        result = self.device.run_step(ids, position, head=head, logits=head)
        expected = self.golden.step(ids, position)[0]
        if not head:
            return None
        assert result.logits is not None
        np.testing.assert_array_equal(result.logits.view(np.uint32), expected.numpy().view(np.uint32))
        assert result.tokens == (int(expected.argmax()),)
        return result.tokens[0]

    def run(self, prompt: list[int], new_tokens: int) -> list[int]:
        """Prefill in tiles, then greedy decode."""
        tile = self.device.compiled.tile
        token = None
        for position in range(0, len(prompt), tile):
            token = self.tile(prompt[position : position + tile], position, head=position + tile >= len(prompt))
        assert token is not None
        tokens = [token]
        while len(tokens) < new_tokens and len(prompt) + len(tokens) <= self.device.compiled.slots:
            following = self.tile([tokens[-1]], len(prompt) + len(tokens) - 1, head=True)
            assert following is not None
            tokens.append(following)
        return tokens


def bench(
    model: ModelConfig, *, slots: int = 48, device: str = "rtl", kv: KvFormat = KvFormat.INT8, **options: float
) -> Bench:
    """A fresh device of the `test` preset with a random model."""
    checkpoint = random_checkpoint(model, seed=3)
    compiled = compile_checkpoint(checkpoint, TEST, slots=slots, kv=kv)
    transport = open_device(device, "test", compiled.memory.limit, **options)
    opened = Device(transport, TEST)
    opened.load(compiled, memory_image(compiled, checkpoint))
    return Bench(opened, GoldenModel(checkpoint, compiled.slots, kv), model)


def prompt(rng: random.Random, model: ModelConfig, length: int) -> list[int]:
    return [rng.randrange(model.vocab) for _ in range(length)]


# 1. equal bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [TINY, TINY_PLAIN], ids=lambda model: model.name)
@pytest.mark.parametrize("options", [{}, STALLED], ids=["quiet", "stalled"])
@pytest.mark.parametrize("length", [1, 7, 20])
def test_prompt_to_logits(rng: random.Random, model: ModelConfig, options: dict[str, float], length: int) -> None:
    bench(model, **options).run(prompt(rng, model, length), new_tokens=6)


def test_units_without_work_sleep(rng: random.Random) -> None:
    cell = bench(TINY_PLAIN)
    cell.device.run_step(prompt(rng, TINY_PLAIN, 3), 0, head=False)
    first, start = cell.transport.simulator.awake(), cell.transport.simulator.cycle
    cell.device.run_step([1], 3, head=True)
    cycles = cell.transport.simulator.cycle - start
    ticked = {unit: after - first[unit] for unit, after in cell.transport.simulator.awake().items()}
    assert set(ticked) == set(GATED)
    assert ticked.pop("silu") == 0, "its activation function is another"
    assert ticked.pop("channels") == 0, "its keys are quantised as they are"
    assert all(0 < count < cycles for count in ticked.values()), ticked


@pytest.mark.parametrize("model", [TINY, TINY_PLAIN], ids=lambda model: model.name)
@pytest.mark.parametrize("options", [{}, STALLED], ids=["quiet", "stalled"])
def test_smaller_cache_formats(rng: random.Random, model: ModelConfig, options: dict[str, float]) -> None:
    """Rows of half a beat side by side, several blocks, then one over the other: a second prompt in the same slots."""
    for kv in KvFormat:
        cell = bench(model, kv=kv, **options)
        cell.run(prompt(rng, model, 20), new_tokens=6)
        read = cell.device.counters()["kv_read_bytes"]
        blocks = -(-25 // KEY_BLOCK)
        assert read == blocks * KEY_BLOCK * cell.device.compiled.kv_token_bytes
        cell.run(prompt(rng, model, 4), new_tokens=2)


def test_cache_to_its_last_slot(rng: random.Random) -> None:
    cell = bench(TINY, slots=32)
    assert len(cell.run(prompt(rng, TINY, 29), new_tokens=99)) == 4  # the last one is not appended any more
    with pytest.raises(InvalidRequest, match="do not fit a cache of 32"):
        cell.device.run_step([1], 32, head=True)


def test_repeat_is_the_same_as_one_doorbell_a_token(rng: random.Random) -> None:
    cell = bench(TINY)
    start = prompt(rng, TINY, 3)
    expected = cell.run(start, new_tokens=5)
    result = cell.device.run_step(start, 0, head=True, repeat=5)
    assert list(result.tokens) == expected
    assert all(a < b for a, b in zip(result.cycles, result.cycles[1:], strict=False))
    stopped = cell.device.run_step(start, 0, head=True, repeat=5, stop_token=expected[2])
    assert list(stopped.tokens) == expected[: expected.index(expected[2]) + 1]


def test_golden_device_is_the_golden_model(rng: random.Random) -> None:
    """Compiler, packer and golden device against the model that reads the weights directly."""
    cell = bench(TINY, device="golden")
    ids = prompt(rng, TINY, 3)
    result = cell.device.run_step(ids, 0, head=True, logits=True)
    assert result.logits is not None
    assert torch.equal(torch.from_numpy(result.logits), cell.golden.step(ids, 0)[0])


def test_verify_reads_nibbles(rng: random.Random) -> None:
    """V of the smaller cache, element by element: one wrong nibble is found and named."""
    rtl, golden = (bench(TINY, device=device, kv=KvFormat.K8V4) for device in ("rtl", "golden"))
    ids = tuple(prompt(rng, TINY, 3))
    assert compare_step(rtl.device, golden.device, ids, 0, head=True) is None
    compiled = rtl.device.compiled
    address = compiled.kv_address(1) + compiled.kv_layout.v_offset + 1 * compiled.kv_layout.v_row_bytes + 2
    byte = golden.device.transport.read_mem(address, 1)[0]
    assert byte == rtl.transport.read_mem(address, 1)[0]
    rtl.transport.write_mem(address, bytes([byte ^ 0x10]))
    found = [
        (name.what, name.name(int(np.flatnonzero(name.bits != other.bits)[0])))
        for name, other in zip(*(kv_slots(cell.device, 1, 0, 3) for cell in (rtl, golden)), strict=True)
        if (name.bits != other.bits).any()
    ]
    assert found == [("V cache", "KV head 0 slot 1 element 5")]


def test_verify_compares_every_descriptor(rng: random.Random) -> None:
    rtl, golden = bench(TINY), bench(TINY, device="golden")
    ids = prompt(rng, TINY, 3)
    assert compare_step(rtl.device, golden.device, tuple(ids), 0, head=True) is None
    # a wrong weight byte in one device is found, in its layer
    compiled = rtl.device.compiled
    address = compiled.memory["layer_stream"].address
    for segment in compiled.layer_stream:
        if (segment.layer, segment.weights) == (1, "o"):
            break
        address += (1 + segment.beats) * TEST.bus.weight_bytes
    address += TEST.bus.weight_bytes  # behind the header: row 0, cell 0
    byte = rtl.transport.read_mem(address, 1)[0]
    rtl.transport.write_mem(address, bytes([(byte + 8) % 216]))  # the next group value, the same pair
    difference = compare_step(rtl.device, golden.device, tuple(ids), 0, head=True)
    assert difference is not None
    assert (difference.layer, difference.step, difference.what) == (1, 6, "X (residual stream)")


# 2. faults: a state with an address, and recovery without reloading ------------------------------------------------------


@pytest.fixture
def cell() -> Bench:
    return bench(TINY)


def fault_of(cell: Bench) -> DeviceFault:
    with pytest.raises(DeviceFault) as caught:
        cell.device.run_step([1, 2], 0, head=True)
    return caught.value


def assert_recovers(cell: Bench, rng: random.Random) -> None:
    cell.device.reset()
    cell.run(prompt(rng, TINY, 5), new_tokens=2)


@pytest.mark.parametrize(
    ("region", "code"), [("layer_stream", FaultCode.AXI_WEIGHT_READ), ("embedding", FaultCode.AXI_DATA_READ)]
)
def test_read_error(cell: Bench, rng: random.Random, region: str, code: FaultCode) -> None:
    where = cell.device.compiled.memory[region]
    cell.transport.simulator.inject_errors(where.address, where.end)
    fault = fault_of(cell)
    assert fault.code == code
    assert where.address <= fault.address < where.end
    cell.transport.simulator.inject_errors(0, 0)
    assert_recovers(cell, rng)


def test_write_error(cell: Bench, rng: random.Random) -> None:
    logits = cell.device.compiled.memory["logits"]
    cell.transport.simulator.inject_errors(logits.address, logits.end)
    with pytest.raises(DeviceFault) as caught:
        cell.device.run_step([1, 2], 0, head=True, logits=True)
    assert caught.value.code == FaultCode.AXI_DATA_WRITE
    cell.transport.simulator.inject_errors(0, 0)
    assert_recovers(cell, rng)


@pytest.mark.parametrize(
    "descriptor",
    [b"\x0f" + bytes(63), pack(Opcode.NORM, beats=TEST.max_vector // 8 + 1), bytes([int(Opcode.MATMUL)]) + bytes(63)],
    ids=["opcode", "beyond the build", "zero planes"],
)
def test_illegal_descriptor(cell: Bench, rng: random.Random, descriptor: bytes) -> None:
    address = cell.device.compiled.memory["program_step"].address + 4 * DESCRIPTOR_BYTES
    saved = cell.transport.read_mem(address, DESCRIPTOR_BYTES)
    cell.transport.write_mem(address, descriptor)
    fault = fault_of(cell)
    assert (fault.code, fault.address, fault.descriptor) == (FaultCode.ILLEGAL_DESCRIPTOR, address, 4)
    cell.transport.write_mem(address, saved)
    assert_recovers(cell, rng)


def test_address_beyond_the_model(cell: Bench, rng: random.Random) -> None:
    limit = cell.device.read64("memory_limit")
    cell.device.write64("memory_limit", cell.device.compiled.memory["kv"].address)
    assert fault_of(cell).code == FaultCode.ADDRESS
    cell.device.write64("memory_limit", limit)
    assert_recovers(cell, rng)


def test_broken_weight_stream(cell: Bench, rng: random.Random) -> None:
    address = cell.device.compiled.memory["layer_stream"].address
    saved = cell.transport.read_mem(address, 4)
    cell.transport.write_mem(address, b"oops")
    assert fault_of(cell).code == FaultCode.WEIGHT_STREAM
    cell.transport.write_mem(address, saved)
    assert_recovers(cell, rng)


def test_position_beyond_the_cache(cell: Bench, rng: random.Random) -> None:
    cell.device.prepare([1, 2], 0, head=True)
    cell.device.write("position", 47)
    cell.device.command("start")
    with pytest.raises(DeviceFault) as caught:
        cell.device.wait()
    assert caught.value.code == FaultCode.POSITION
    assert_recovers(cell, rng)


def test_watchdog(cell: Bench, rng: random.Random) -> None:
    """A NORM that waits for weights nobody streams."""
    address = cell.device.compiled.memory["program_step"].address
    saved = cell.transport.read_mem(address, DESCRIPTOR_BYTES)
    cell.transport.write_mem(address, pack(Opcode.NORM, beats=1, norm=1))
    cell.device.write("watchdog", 2000)
    assert fault_of(cell).code == FaultCode.WATCHDOG
    cell.transport.write_mem(address, saved)
    cell.device.write("watchdog", BY_NAME["watchdog"].reset)
    assert_recovers(cell, rng)


def test_device_of_another_build(cell: Bench) -> None:
    with pytest.raises(SpecMismatch, match="another spec or preset than 'sim'"):
        Device(cell.transport, SIM)


# 3. foreign bus models around the one-clock Verilog ---------------------------------------------------------------------


@pytest.mark.slow
def test_cocotb_bench() -> None:
    run_bench(Path(__file__).parents[1] / "build" / "bench_top")
