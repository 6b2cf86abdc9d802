"""Errors of the host driver: what was asked, the limit, and what to do. `exit_code` is what the command returns."""

from enum import IntEnum

from spec.faults import FaultCode

STEP_NAMES = {
    0: "weight stream",
    1: "embedding",
    2: "input norm",
    3: "query, key and value projection",
    4: "RoPE and KV cache",
    5: "attention",
    6: "output projection",
    7: "feed-forward network",
    8: "final norm and LM head",
}
"""Step numbers of the prompt-to-token table, as tags carry them."""


class ExitCode(IntEnum):
    """What the command returns."""

    REQUEST = 1
    BUILD = 2
    DEVICE = 3
    INTERRUPTED = 130


class LutraError(Exception):
    """Base of all errors that are reported as one line."""

    exit_code: int = ExitCode.REQUEST


class InvalidRequest(LutraError):
    """The user's input: a file, an option, a model that does not fit."""


class BuildError(LutraError):
    """A device could not be built."""

    exit_code = ExitCode.BUILD


class DeviceError(LutraError):
    """A device could not be opened or did not do its work."""

    exit_code = ExitCode.DEVICE


class SpecMismatch(DeviceError):
    """The device was made from another spec or preset."""


class DeviceTimeout(DeviceError):
    """The device was still busy at the deadline; `registers` holds its state by register name."""

    def __init__(self, message: str, registers: dict[str, int]) -> None:
        dump = " ".join(f"{name}={value:#x}" for name, value in registers.items())
        super().__init__(f"{message} [{dump}]")
        self.registers = registers


class DeviceFault(DeviceError):
    """The device stopped by itself; `code`, `layer`, `step` and `address` say why and where."""

    def __init__(self, *, code: int, tag: int, address: int, descriptor: int) -> None:
        known = code in FaultCode._value2member_map_
        self.code: FaultCode | int = FaultCode(code) if known else code
        self.layer, self.step = tag >> 8, tag & 0xFF
        self.address, self.descriptor = address, descriptor
        name = FaultCode(code).name if known else f"unknown code {code}"
        super().__init__(
            f"device fault {name} in {describe_tag(tag)} (descriptor {descriptor}), address {address:#x}"
        )


def describe_tag(tag: int) -> str:
    """``layer 3, step 5 (attention)`` for a descriptor's tag."""
    layer, step = tag >> 8, tag & 0xFF
    return f"layer {layer}, step {step} ({STEP_NAMES.get(step, 'unknown')})"
