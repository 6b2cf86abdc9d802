"""Errors of the driver: each says what was asked, the limit and what happened, and carries its exit code."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from cosim.random_model import TINY, TINY_PLAIN, random_checkpoint
from golden.device import GoldenTransport
from host_driver import errors
from host_driver.compiler import CompiledModel
from host_driver.device import Device
from host_driver.errors import DeviceFault, DeviceTimeout, InvalidRequest, LutraError, SpecMismatch
from host_driver.image import compile_checkpoint, memory_image
from host_driver.transport import open_device
from spec import csr
from spec.faults import FaultCode
from spec.hashing import spec_hash
from spec.presets import PRESETS, SIM, TEST

CHECKPOINT = random_checkpoint(TINY, seed=2)
COMPILED = compile_checkpoint(CHECKPOINT, TEST)


class Frozen(GoldenTransport):
    """Takes the doorbell and never gets anywhere."""

    def wait(self, timeout_s: float | None = None, progress: object = None) -> None:
        """Until the deadline."""


class Pretender(GoldenTransport):
    """Shows another value in one register."""

    def __init__(self, register: str, value: int) -> None:
        super().__init__(TEST, 4096)
        self._offset, self._value = csr.BY_NAME[register].offset, value

    def read32(self, offset: int) -> int:
        """The register as it is, but for one."""
        return self._value if offset == self._offset else super().read32(offset)


def loaded(transport: GoldenTransport | None = None, compiled: CompiledModel = COMPILED) -> Device:
    """A device with the model in its memory."""
    device = Device(transport or GoldenTransport(TEST, compiled.memory.limit), TEST, timeout_s=7)
    device.load(compiled, memory_image(compiled, CHECKPOINT))
    return device


def all_errors(base: type[LutraError]) -> Iterator[type[LutraError]]:
    for child in base.__subclasses__():
        yield child
        yield from all_errors(child)


def test_every_error_has_an_exit_code_of_its_layer() -> None:
    ours = [error for error in all_errors(LutraError) if error.__module__ == errors.__name__]
    codes = {error.__name__: int(error.exit_code) for error in ours}
    assert codes == {
        "InvalidRequest": 1, "BuildError": 2, "DeviceError": 3, "SpecMismatch": 3, "DeviceTimeout": 3, "DeviceFault": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("register", "value", "message"),
    [
        ("magic", 0xDEADBEEF, "this is no Lutra device: magic 0xdeadbeef, expected 0x5254554c"),
        ("version", 9, "the device has register map 9, this driver speaks 1: rebuild one"),
        ("spec_hash", 1, "the device was made from another spec or preset than 'test': hash 0x"),
    ],
)
def test_other_device_is_refused(register: str, value: int, message: str) -> None:
    with pytest.raises(SpecMismatch) as error:
        Device(Pretender(register, value), TEST)
    assert str(error.value).startswith(message)


def test_device_of_another_preset_is_refused() -> None:
    with pytest.raises(SpecMismatch, match=r"preset than 'sim': .*rebuild the device or choose its preset$"):
        Device(GoldenTransport(TEST, 4096), SIM)


def test_hash_tells_builds_apart_and_ignores_what_is_no_hardware() -> None:
    hashes = {spec_hash(preset) for preset in PRESETS.values()}
    assert len(hashes) == len(PRESETS)
    assert all(0 < value < 1 << 64 for value in hashes)
    other = replace(TEST, name="other", clock_hz=1, dram=replace(TEST.dram, latency_cycles=99))
    assert spec_hash(other) == spec_hash(TEST)
    changed = [
        replace(TEST, vector_rows=193),
        replace(TEST, matmul=replace(TEST.matmul, ring_rows=41)),
        replace(TEST, bus=replace(TEST.bus, data_outstanding=5)),
        replace(TEST, attention=replace(TEST.attention, max_rows=10)),
    ]
    assert len({spec_hash(config) for config in [TEST, *changed]}) == 5


def test_fault_names_where_and_the_device_goes_on_after_a_reset() -> None:
    device = loaded()
    before = device.run_step([65, 66], 0, head=True)
    with pytest.raises(DeviceFault) as error:
        device.run_step([TINY.vocab], 2, head=True)
    assert (error.value.layer, error.value.step) == (0, 1)
    assert isinstance(error.value.code, FaultCode)
    assert f"device fault {error.value.code.name} in layer 0, step 1 (embedding)" in str(error.value)
    device.reset()
    assert device.run_step([65, 66], 0, head=True).tokens == before.tokens


def test_damaged_stream_is_a_fault_with_its_address() -> None:
    device = loaded()
    address = COMPILED.memory["head_stream"].address
    device.transport.write_mem(address, b"\0\0\0\0")
    with pytest.raises(DeviceFault) as error:
        device.run_step([65], 0, head=True)
    assert error.value.code is FaultCode.WEIGHT_STREAM
    assert error.value.address == address
    assert (error.value.layer, error.value.step) == (TINY.layers, 8)
    assert str(error.value).endswith(f"address {address:#x}")


def test_unknown_fault_code_is_still_reported() -> None:
    fault = DeviceFault(code=77, tag=3 << 8 | 5, address=16, descriptor=9)
    assert str(fault) == "device fault unknown code 77 in layer 3, step 5 (attention) (descriptor 9), address 0x10"
    assert (fault.layer, fault.step, fault.code) == (3, 5, 77)


def test_deadline_comes_with_the_registers() -> None:
    device = loaded(Frozen(TEST, COMPILED.memory.limit))
    device.prepare([65], 5, head=True)
    device.command("start")
    with pytest.raises(DeviceTimeout, match=r"^the device is still busy after 7 s \[status=0x.* position=0x5 "):
        device.wait()


@pytest.mark.parametrize(
    ("tokens", "position", "repeat", "message"),
    [
        ([], 0, 1, "a step takes 1 to 3 tokens, not 0"),
        ([1, 2, 3, 4], 0, 1, "a step takes 1 to 3 tokens, not 4"),
        ([1, 2], 79, 1, "tokens at positions 79 to 80 do not fit a cache of 80"),
        ([1], -1, 1, "tokens at positions -1 to -1 do not fit a cache of 80"),
        ([1], 0, 0, "one doorbell generates 1 to 256 tokens, not 0"),
        ([1], 0, 257, "one doorbell generates 1 to 256 tokens, not 257"),
    ],
)
def test_step_that_does_not_fit_is_refused(tokens: list[int], position: int, repeat: int, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{message}$"):
        loaded().run_step(tokens, position, head=True, repeat=repeat)


def test_model_larger_than_the_memory_is_refused() -> None:
    size = COMPILED.memory.limit - 1
    with pytest.raises(InvalidRequest, match=f"needs {size + 1} bytes of device memory, there are {size}$"):
        loaded(GoldenTransport(TEST, size))


def test_device_without_a_model_says_so() -> None:
    with pytest.raises(errors.DeviceError, match="no model is in the device's memory: call load first"):
        Device(GoldenTransport(TEST, 4096), TEST).run_step([1], 0, head=True)


def test_unknown_device_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequest, match=r"^there is no device 'abacus'; choose one of: "):
        open_device("abacus", "test", 4096)


def test_repeat_gives_the_tokens_of_single_steps_and_stops_where_told() -> None:
    device = loaded()
    prompt = [79, 116, 116]
    single = list(device.run_step(prompt, 0, head=True).tokens)
    for position in range(3, 8):
        single += device.run_step(single[-1:], position, head=True).tokens
    again = loaded()
    assert list(again.run_step(prompt, 0, head=True, repeat=6).tokens) == single
    stop = next(token for place, token in enumerate(single) if place and token not in single[:place])
    stopped = again.run_step(prompt, 0, head=True, repeat=6, stop_token=stop)
    assert list(stopped.tokens) == single[: single.index(stop) + 1]


def test_models_share_a_device_one_after_the_other() -> None:
    device = loaded(GoldenTransport(TEST, 1 << 20))
    first = device.run_step([65], 0, head=True, logits=True)
    other = random_checkpoint(TINY_PLAIN, seed=4)
    compiled = compile_checkpoint(other, TEST)
    device.load(compiled, memory_image(compiled, other))
    assert device.run_step([65], 0, head=True, logits=True).logits.shape == (TINY_PLAIN.vocab,)  # pyright: ignore
    device.load(COMPILED, memory_image(COMPILED, CHECKPOINT))
    again = device.run_step([65], 0, head=True, logits=True)
    assert first.logits is not None
    assert again.logits is not None
    assert (first.logits == again.logits).all()
