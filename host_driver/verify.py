"""Two devices, one program: where do they first differ?

After each descriptor both devices pause, and what it left is compared: rows of the vector memory, bytes of the KV
cache, logits, the argmax. Operations whose result stays inside a unit (NORM, QUERY) show in the next one that writes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from host_driver.compiler import LAYERS, STEP
from host_driver.device import Device
from host_driver.errors import STEP_NAMES
from host_driver.observe import Observation, head_result, kv_slots, observable, observe
from host_driver.program_builder import fp32_bits
from host_driver.session import Step
from spec.csr import NONE


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first element on which two devices disagree."""

    layer: int
    step: int
    """Of the prompt-to-token table."""
    position: int
    """Of the first token of the step in which it shows."""
    what: str
    element: str
    first: int | float
    second: int | float

    def describe(self, first_name: str, second_name: str) -> str:
        """One line."""
        return (
            f"layer {self.layer}, step {self.step} ({STEP_NAMES.get(self.step, 'unknown')}), "
            f"position {self.position}: {self.what} {self.element}: "
            f"{first_name} {_number(self.first)}, {second_name} {_number(self.second)}"
        )


def _number(value: int | float) -> str:
    """Floats with their bits: two that print alike may still differ."""
    return f"{value:.9g} ({fp32_bits(value):#010x})" if isinstance(value, float) else str(value)


def _first(
    pairs: Iterator[tuple[Observation, Observation]], *, layer: int, step: int, position: int
) -> Difference | None:
    """The first unequal element of pairs of observations."""
    for first, second in pairs:
        unequal = np.flatnonzero(first.bits != second.bits)
        if unequal.size:
            index = int(unequal[0])
            return Difference(
                layer=layer, step=step, position=position, what=first.what, element=first.name(index),
                first=first.value(index), second=second.value(index),
            )  # fmt: skip
    return None


def compare_step(
    first: Device,
    second: Device,
    tokens: tuple[int, ...],
    position: int,
    *,
    head: bool,
    on_descriptor: Callable[[int, int], None] | None = None,
) -> Difference | None:
    """Runs one step on both devices, descriptor by descriptor, and compares what each leaves.

    Both must hold the same cache below ``position``. ``on_descriptor``: called with descriptors done and their number.
    """
    program = first.compiled.programs[STEP if head else LAYERS].instructions
    places = [place for place, instruction in enumerate(program) if observable(instruction)]
    devices = (first, second)
    for number, place in enumerate(places):
        for device in devices:
            if number == 0:
                device.prepare(tokens, position, head=head, logits=head, break_at=place + 1)
                device.command("start")
            else:
                device.write("break_at", place + 1)
                device.command("resume")
            device.wait()
        instruction = program[place]
        tag = instruction.fields["tag"]
        pairs = zip(*(observe(device, instruction, position, len(tokens)) for device in devices), strict=True)
        difference = _first(pairs, layer=tag >> 8, step=tag & 0xFF, position=position)
        if difference is not None:
            for device in devices:
                device.reset()
            return difference
        if on_descriptor is not None:
            on_descriptor(place + 1, len(program))
    for device in devices:
        device.write("break_at", NONE)
        device.command("resume")
        device.wait()
    if not head:
        return None
    pairs = zip(*(head_result(device.read_logits(), device.read("argmax")) for device in devices), strict=True)
    return _first(pairs, layer=first.compiled.model.layers, step=8, position=position)


def compare_run(
    device: Device, judge: Device, steps: list[Step], *, on_step: Callable[[int], None] | None = None
) -> Difference | None:
    """Repeats a finished run on ``judge``: the greedy ids, all logits and all of the KV cache must be equal.

    Where something differs, that step runs again on both, descriptor by descriptor. ``device`` still holds the run.
    """
    model = device.compiled.model
    for number, step in enumerate(steps):
        if on_step is not None:
            on_step(number)
        judged = judge.run_step(step.tokens, step.position, head=step.head, logits=step.head)
        coarse = _coarse_difference(device, judge, step, judged.logits, judged.tokens, layers=model.layers)
        if coarse is not None:
            fine = compare_step(device, judge, step.tokens, step.position, head=step.head)
            return fine or coarse
    return None


def _coarse_difference(
    device: Device,
    judge: Device,
    step: Step,
    judged_logits: NDArray[np.float32] | None,
    judged_tokens: tuple[int, ...],
    *,
    layers: int,
) -> Difference | None:
    """Cache of the step's positions, logits and greedy id, from what the run left."""
    count = len(step.tokens)
    for layer in range(layers):
        pairs = zip(*(kv_slots(which, layer, step.position, count) for which in (device, judge)), strict=True)
        difference = _first(pairs, layer=layer, step=4, position=step.position)
        if difference is not None:
            return difference
    if not step.head:
        return None
    logits = step.result.logits
    assert logits is not None and judged_logits is not None, "a run to be verified keeps the logits of every step"
    pairs = zip(
        head_result(logits, step.result.tokens[-1]), head_result(judged_logits, judged_tokens[-1]), strict=True
    )
    return _first(pairs, layer=layers, step=8, position=step.position)
