"""`lutra chat`: a line in, an answer out; messages on stdin, answers on stdout, all else on stderr."""

import sys
from collections.abc import Iterator
from time import perf_counter

from rich.console import Console

from host_driver.chat import Conversation, Turn
from host_driver.chat_template import Message
from host_driver.errors import InvalidRequest
from host_driver.model_source import ModelSource
from host_driver.sampling import Sampler, SamplingConfig
from host_driver.session import Stepper

NEW, EXIT = "/new", "/exit"


def _lines() -> Iterator[str]:
    """Messages until the end of the input or /exit; a person is shown a prompt."""
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line or line.strip() == EXIT:
            return
        if line.strip():
            yield line.strip()


def _summary(turn: Turn, seconds: float, clock_hz: int | None) -> str:
    """What a turn took, as one line."""
    if turn.run is None:
        return "no answer"
    tokens, read = len(turn.run.tokens), len(turn.prompt) - turn.cached
    line = f"{read} tokens read, {turn.cached} from the cache, {tokens} written in {seconds:.1f} s"
    cycles = sum(step.cycles for step in turn.run.steps)
    if not (clock_hz and cycles):
        return line
    return f"{line}; {cycles:,} cycles, {1e3 * cycles / clock_hz:.1f} ms at {clock_hz / 1e6:g} MHz"


def chat(
    device: Stepper,
    source: ModelSource,
    *,
    system: str | None,
    sampling: SamplingConfig,
    max_new_tokens: int,
    clock_hz: int | None,
) -> int:
    """Answers every line of stdin. Returns the exit code."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    conversation = Conversation(
        device=device, tokenizer=source.tokenizer(), template=source.chat_template(), sampler=Sampler(sampling),
        stop_ids=source.config.eos_ids, messages=first,
    )  # fmt: skip
    for line in _lines():
        if line == NEW:
            conversation.restart(first)
            continue
        started = perf_counter()
        try:
            answer = conversation.ask(line, max_new_tokens=max_new_tokens)
        except InvalidRequest as error:
            console.print(f"error: {error}", style="red", markup=False)
            if not sys.stdin.isatty():
                raise
            continue
        try:
            for piece in answer:
                sys.stdout.write(piece)
                sys.stdout.flush()
        finally:
            sys.stdout.write("\n")
            sys.stdout.flush()
        console.print(_summary(conversation.last, perf_counter() - started, clock_hz), style="dim", markup=False)
    return 0
