"""A conversation whose cache goes on from turn to turn: only what a turn adds is run through the model.

After a turn the cache holds the keys and values of its prompt and of its answer, but for the answer's last token, which
nothing has read yet. The next prompt is those same tokens, as they were generated, and behind them the tokens of what
the template adds. Encoding the whole text again could split the answer otherwise; it is done only where the template
does not go on from its own earlier text (one that trims answers, say), and then as much of the cache is used as is equal.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from host_driver.chat_template import ChatTemplate, Message
from host_driver.errors import InvalidRequest
from host_driver.sampling import Sampler
from host_driver.session import Run, Stepper, generate
from host_driver.tokenizer import TextStream, TextTokenizer


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Equal tokens at the start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


@dataclass(kw_only=True)
class Turn:
    """A prompt, and what of it the cache holds already."""

    prompt: list[int]
    cached: int
    text: str
    """The rendered conversation up to where the answer begins."""
    reply: str = ""
    run: Run | None = None


@dataclass(kw_only=True)
class Conversation:
    """Messages so far, and the tokens of the device's cache."""

    device: Stepper
    tokenizer: TextTokenizer
    template: ChatTemplate
    sampler: Sampler
    stop_ids: tuple[int, ...]
    messages: list[Message] = field(default_factory=list)
    _turn: Turn | None = None
    _cache: list[int] = field(default_factory=list)

    def _prompt(self, text: str) -> list[int]:
        """Tokens of a rendered conversation, of which the last turn is the beginning."""
        last = self._turn
        before = last.text + last.reply if last else ""
        if last is None or last.run is None or not text.startswith(before):
            return self.tokenizer.encode_rendered(text)
        ids = [*last.prompt, *last.run.tokens]
        added = self.tokenizer.encode_rendered(text[len(before) :])
        if ids[-1] in self.stop_ids:  # the template writes it too
            ids.pop()
        return ids + added

    def ask(self, text: str, *, max_new_tokens: int) -> Iterator[str]:
        """The answer's text as it comes. Raises InvalidRequest where the conversation does not fit the cache.

        A turn that is refused leaves the conversation as it was.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        rendered = self.template.render(messages, prompt=True)
        prompt = self._prompt(rendered)
        slots = self.device.compiled.slots
        if len(prompt) > slots:
            raise InvalidRequest(
                f"the conversation has {len(prompt)} tokens with this message, the KV cache {slots} slots: "
                "start a new one with /new, or ask for more with --cache-slots"
            )
        turn = Turn(prompt=prompt, cached=min(common_prefix(prompt, self._cache), len(prompt) - 1), text=rendered)
        self._cache = prompt[: turn.cached]
        return self._answer(turn, messages, max_new_tokens)

    def _answer(self, turn: Turn, messages: list[Message], max_new_tokens: int) -> Iterator[str]:
        stream = TextStream(self.tokenizer, turn.prompt)
        pieces = []
        for token, run in generate(
            self.device, turn.prompt, self.sampler, max_new_tokens=max_new_tokens, cached=turn.cached, stop_ids=self.stop_ids
        ):
            turn.run = run
            self._cache = [*turn.prompt, *run.tokens[:-1]]
            pieces.append(stream.add(token))
            yield pieces[-1]
        pieces.append(stream.end())
        yield pieces[-1]
        turn.reply = "".join(pieces)
        self.messages = [*messages, {"role": "assistant", "content": turn.reply}]
        self._turn = turn

    @property
    def last(self) -> Turn:
        """The last whole turn. Raises InvalidRequest in front of the first."""
        if self._turn is None:
            raise InvalidRequest("nothing was asked yet")
        return self._turn

    def restart(self, messages: Sequence[Message] = ()) -> None:
        """Forgets every turn; ``messages`` stand in front of the next. The cache's tokens stay usable."""
        self.messages = list(messages)
        self._turn = None
