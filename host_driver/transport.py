"""What a device must offer to the driver, and how a device is found by name."""

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from inspect import Parameter, signature
from types import ModuleType
from typing import Protocol

from host_driver.errors import BuildError, DeviceError, InvalidRequest

ENTRY_POINTS = "lutra.devices"

Progress = Callable[[int], None]
"""Called now and then with the cycles that the running program has taken so far."""


class Transport(Protocol):
    """Registers and memory of one device. Offsets and addresses are in bytes."""

    @property
    def memory_bytes(self) -> int:
        """Size of the device's memory."""
        ...

    def read32(self, offset: int) -> int:
        """One register."""
        ...

    def write32(self, offset: int, value: int) -> None:
        """One register."""
        ...

    def read_mem(self, address: int, size: int) -> bytes:
        """Bytes of the device's memory."""
        ...

    def write_mem(self, address: int, data: bytes) -> None:
        """Bytes of the device's memory."""
        ...

    def wait(self, timeout_s: float, progress: Progress | None = None) -> object:
        """Returns as soon as `status.busy` is 0, or after ``timeout_s`` seconds; the caller reads `status`."""
        ...


class OpenDevice(Protocol):
    """Factory behind an entry point."""

    def __call__(self, preset: str, memory_bytes: int, **options: object) -> Transport:
        """A device of that preset with so much memory."""
        ...


def device_names() -> list[str]:
    """Names of the installed devices."""
    return sorted({point.name for point in entry_points(group=ENTRY_POINTS)})


def _entry_point(name: str) -> tuple[str, str]:
    """Module and attribute of a device's factory."""
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            return point.module, point.attr
    known = ", ".join(device_names()) or "none is installed"
    raise InvalidRequest(f"there is no device {name!r}; choose one of: {known}")


def require_device(name: str) -> None:
    """Raises InvalidRequest if no device of that name is installed."""
    _entry_point(name)


def device_module(name: str) -> ModuleType:
    """The module that holds a device's factory. Raises BuildError if something that it needs is not installed."""
    try:
        return import_module(_entry_point(name)[0])
    except ModuleNotFoundError as error:
        raise BuildError(
            f"device {name!r} needs the Python package {error.name!r}: pip install 'lutra[{name}]', or 'lutra[dev]'"
        ) from None


def open_device(name: str, preset: str, memory_bytes: int, **options: object) -> Transport:
    """Opens a device by name. Raises InvalidRequest on an unknown name or an option that this device does not have."""
    factory: OpenDevice = getattr(device_module(name), _entry_point(name)[1])
    parameters = signature(factory).parameters.values()
    if not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters):
        for option in options:
            if option not in {parameter.name for parameter in parameters}:
                raise InvalidRequest(f"device {name!r} has no option {option!r}")
    try:
        return factory(preset, memory_bytes, **options)
    except ValueError as error:
        raise InvalidRequest(f"device {name!r}: {error}") from error
    except MemoryError:
        raise DeviceError(f"device {name!r}: this machine has no {memory_bytes:,} bytes for its memory") from None
