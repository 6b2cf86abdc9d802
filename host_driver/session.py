"""Generation: prefill in tiles, then a doorbell a token; greedy on the device, sampling here."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from host_driver.device import StepResult
from host_driver.errors import InvalidRequest
from host_driver.sampling import Sampler
from host_driver.transport import Progress


class Stepper(Protocol):
    """What a generation drives: `Device`, or a baseline (`host_driver/plain_device.py`)."""

    @property
    def compiled(self) -> Any:
        """With the fields ``slots`` and ``tile``."""
        ...

    def run_step(
        self, tokens: Sequence[int], position: int, *, head: bool, logits: bool = False, progress: Progress | None = None
    ) -> StepResult:
        """Tokens at a position through the model."""
        ...


@dataclass(frozen=True, kw_only=True)
class Step:
    """One doorbell of a run: which tokens at which position, and what the device gave."""

    tokens: tuple[int, ...]
    position: int
    head: bool
    result: StepResult

    @property
    def cycles(self) -> int:
        """Cycles of the doorbell; 0 on a device without a clock."""
        return self.result.counters["cycles"]


@dataclass(kw_only=True)
class Run:
    """A generation so far."""

    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @property
    def prefill(self) -> list[Step]:
        """Steps of the prompt, up to the first new token."""
        return [step for step in self.steps if step.position < len(self.prompt)]

    @property
    def decode(self) -> list[Step]:
        """Steps of one token each."""
        return [step for step in self.steps if step.position >= len(self.prompt)]


def check_prompt(prompt: list[int], *, slots: int) -> None:
    """Raises InvalidRequest on an empty prompt, or one that leaves no room for a new token."""
    if not prompt:
        raise InvalidRequest("the prompt is empty: it has no tokens")
    if len(prompt) > slots:
        raise InvalidRequest(f"the prompt has {len(prompt)} tokens, the KV cache {slots} slots: shorten the prompt")


def tiles(prompt: tuple[int, ...], tile: int, cached: int = 0) -> Iterator[tuple[int, tuple[int, ...], bool]]:
    """(position, tokens, last) of the steps of a prompt behind its first ``cached`` tokens."""
    for position in range(cached, len(prompt), tile):
        yield position, prompt[position : position + tile], position + tile >= len(prompt)


def generate(
    device: Stepper,
    prompt: list[int],
    sampler: Sampler,
    *,
    max_new_tokens: int,
    cached: int = 0,
    stop_ids: tuple[int, ...] = (),
    keep_logits: bool = False,
    on_tile: Callable[[int], Progress | None] | None = None,
) -> Iterator[tuple[int, Run]]:
    """Yields each new token with the run so far. Ends at a stop id, at the limit, or when the cache is full.

    ``cached``: leading tokens of the prompt whose keys and values an earlier run left in the cache; at least one is left
    to run. ``keep_logits``: read the logits of every step, as sampling does anyway. ``on_tile``: called with the prompt tokens
    done so far before each prefill step; gives the step's progress callback.
    """
    compiled = device.compiled
    if max_new_tokens < 1:
        raise InvalidRequest(f"at least 1 new token must be asked for, not {max_new_tokens}")
    check_prompt(prompt, slots=compiled.slots)
    if not 0 <= cached < len(prompt):
        raise InvalidRequest(f"of a prompt of {len(prompt)} tokens, 0 to {len(prompt) - 1} can be in the cache, not {cached}")
    run = Run(prompt=tuple(prompt))
    want_logits = keep_logits or not sampler.config.greedy

    def step(tokens: tuple[int, ...], position: int, head: bool, progress: Progress | None = None) -> StepResult:
        result = device.run_step(tokens, position, head=head, logits=want_logits, progress=progress)
        run.steps.append(Step(tokens=tokens, position=position, head=head, result=result))
        return result

    result: StepResult | None = None
    for position, tokens, last in tiles(run.prompt, compiled.tile, cached):
        result = step(tokens, position, last, on_tile(position) if on_tile else None)
    assert result is not None, "a checked prompt has at least one tile"
    while True:
        token = result.tokens[-1] if sampler.config.greedy else sampler.sample(_logits(result))
        run.tokens.append(token)
        yield token, run
        position = len(run.prompt) + len(run.tokens) - 1
        if token in stop_ids or len(run.tokens) >= max_new_tokens or position >= compiled.slots:
            return
        result = step((token,), position, True)


def _logits(result: StepResult) -> NDArray[np.float32]:
    if result.logits is None:
        raise InvalidRequest("sampling needs the logits of every step")
    return result.logits
