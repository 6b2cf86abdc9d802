"""The baselines: the same checkpoint and prompt on a plain CPU or GPU, found by name and driven like a device.

A baseline has no registers, programs or clock. It gives the next token for tokens at a position, says which bytes and
multiply-accumulates a step needs, and measures its own ceilings, so that it stands in the same report as the accelerator.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from host_driver.accounting import CLASSES
from host_driver.device import StepResult
from host_driver.errors import BuildError, DeviceError, InvalidRequest
from host_driver.report import Report
from host_driver.session import Run, Step
from host_driver.transport import Progress
from host_driver.weights import Checkpoint
from spec.config import ModelConfig

ENTRY_POINTS = "lutra.baselines"


class StepBytes(Protocol):
    """Bytes of a step by the classes of `host_driver.accounting`."""

    @property
    def total(self) -> int:
        """All classes."""
        ...


class Baseline(Protocol):
    """What stands behind an entry point; its class also has `check()`, which raises RuntimeError without its hardware."""

    @property
    def description(self) -> str:
        """Hardware and number format."""
        ...

    def run(self, tokens: list[int], position: int, *, logits: bool) -> tuple[int, NDArray[np.float32] | None]:
        """The most likely token behind these, and the logits (vocab,) if they are asked for."""
        ...

    def bytes_of(self, tokens: int, position: int, heads: int) -> StepBytes:
        """Bytes that a step of so many tokens must move."""
        ...

    def macs_of(self, tokens: int, position: int, heads: int) -> int:
        """Multiply-accumulates of a step of so many tokens."""
        ...

    def ceilings(self) -> tuple[float, float]:
        """Measured bytes and multiply-accumulates a second."""
        ...


@dataclass(frozen=True, kw_only=True)
class PlainProgram:
    """What a run must know of a model on a baseline: the counterpart of `CompiledModel`."""

    model: ModelConfig
    slots: int
    tile: int
    """Tokens of a prefill step: the whole cache, so a prompt is one step."""


def baseline_names() -> list[str]:
    """Names of the installed baselines."""
    return sorted({point.name for point in entry_points(group=ENTRY_POINTS)})


def _factory(name: str) -> Any:
    """The class behind a name. Raises BuildError where a package that it needs is missing."""
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            try:
                return getattr(import_module(point.module), point.attr)
            except ModuleNotFoundError as error:
                raise BuildError(
                    f"device {name!r} needs the Python package {error.name!r}: pip install 'lutra[gpu]', or 'lutra[dev]'"
                ) from None
    raise InvalidRequest(f"there is no baseline {name!r}; choose one of: {', '.join(baseline_names()) or 'none is installed'}")


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def check_baseline(name: str) -> None:
    """Raises DeviceError if the hardware of a baseline is not in this machine."""
    factory = _factory(name)
    try:
        factory.check()
    except RuntimeError as error:
        raise DeviceError(_one_line(error)) from None


class PlainDevice:
    """A model on a baseline, with the part of `Device` that `session.generate` drives."""

    def __init__(self, name: str, checkpoint: Checkpoint, slots: int) -> None:
        self.compiled = PlainProgram(model=checkpoint.config, slots=slots, tile=slots)
        self.name = name
        try:
            self.baseline: Baseline = _factory(name)(checkpoint, slots)
        except RuntimeError as error:  # out of memory is one
            raise DeviceError(f"device {name!r}: {_one_line(error)}") from None
        except ValueError as error:
            raise InvalidRequest(f"device {name!r}: {error}") from None

    def warm_up(self, prompt: int, new_tokens: int) -> None:
        """Runs the shapes of a generation once, so that its times hold no library start-up and no graph capture."""
        last = min(self.compiled.slots, prompt + new_tokens - 1)
        self.run_step([0] * prompt, 0, head=True)
        powers = (1 << bit for bit in range(last.bit_length()))  # decode graphs differ by powers of two of the position
        for position in sorted({prompt, *powers, last - 1}):
            if prompt <= position < last:
                self.run_step([0], position, head=True)

    def run_step(
        self, tokens: Sequence[int], position: int, *, head: bool, repeat: int = 1, stop_token: int | None = None,
        logits: bool = False, progress: Progress | None = None,
    ) -> StepResult:
        """``tokens`` at ``position`` on, to the next token. Always one token, through the head."""
        if not head or repeat != 1 or stop_token is not None:
            raise InvalidRequest(f"device {self.name!r} gives one token a step, always with the head")
        started = perf_counter()
        try:
            token, values = self.baseline.run(list(tokens), position, logits=logits)
        except RuntimeError as error:
            raise DeviceError(f"device {self.name!r}: {_one_line(error)}") from None
        return StepResult(
            tokens=(token,), cycles=(), logits=values, counters={"cycles": 0}, wall_s=perf_counter() - started
        )


def summarise_plain(run: Run, device: PlainDevice, *, text: str, wall_s: float) -> Report:
    """The numbers of a finished run. Times are wall times; utilisation is over the device's measured ceilings."""
    baseline = device.baseline
    steps = run.decode or run.prefill
    seconds = sum(step.result.wall_s for step in steps)
    shapes = [(len(step.tokens), step.position, int(step.head)) for step in steps]
    sizes = [baseline.bytes_of(*shape) for shape in shapes]
    macs = sum(baseline.macs_of(*shape) for shape in shapes)
    bytes_per_s, macs_per_s = baseline.ceilings()
    rate = len(run.decode) / seconds if run.decode else None
    return Report(
        prompt_tokens=list(run.prompt),
        tokens=list(run.tokens),
        text=text,
        device=device.name,
        preset=baseline.description,
        model=device.compiled.model.name,
        kv=None,
        verified=None,
        clock_hz=None,
        prefill_cycles=None,
        decode_cycles=[],
        ttft_s=sum(step.result.wall_s for step in run.prefill),
        decode_tokens_per_s=rate,
        dram_bytes={name: sum(getattr(size, name) for size in sizes) / len(steps) for name in CLASSES},
        bandwidth_utilisation=sum(size.total for size in sizes) / seconds / bytes_per_s,
        mac_utilisation=macs / seconds / macs_per_s,
        wall_s=wall_s,
        decode_wall_tokens_per_s=rate,
        sim_cycles_per_s=None,
        sim_macs_per_s=None,
    )


def roofline_share(device: PlainDevice, steps: list[Step]) -> float | None:
    """Shortest possible time of these steps by the measured ceilings over the time that they took."""
    seconds = sum(step.result.wall_s for step in steps)
    if not seconds:
        return None
    bytes_per_s, macs_per_s = device.baseline.ceilings()
    floor = 0.0
    for step in steps:
        shape = (len(step.tokens), step.position, int(step.head))
        size, macs = device.baseline.bytes_of(*shape).total, device.baseline.macs_of(*shape)
        floor += max(size / bytes_per_s, macs / macs_per_s)
    return floor / seconds
