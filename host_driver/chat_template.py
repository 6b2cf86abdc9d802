"""Chat templates: a conversation to the text that a model was trained to go on from.

A template is a Jinja program that comes with the model, so it runs in Jinja's sandbox, which gives no way to the file
system or to Python's internals; here it also may not multiply texts, and what it writes is bounded. Its time is not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from host_driver.errors import InvalidRequest

MAX_TEXT = 1 << 22
"""Characters of a rendered conversation: more than any cache holds tokens of."""

Message = dict[str, str]
"""``role`` (system, user, assistant) and ``content``."""


class _Environment(ImmutableSandboxedEnvironment):
    """Without the operators that make large values from small ones."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Numbers only, and small ones."""
        small = all(isinstance(value, (int, float)) and abs(value) < 1 << 32 for value in (left, right))
        if not small or (operator == "**" and abs(right) > 64):
            raise TemplateError(f"operator {operator} on these values is not allowed")
        return super().call_binop(context, operator, left, right)


def _raise(message: object) -> None:
    """`raise_exception` of the templates."""
    raise TemplateError(str(message))


@cache
def _environment() -> _Environment:
    """As Hugging Face renders templates, less what pads texts."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals = {name: environment.globals[name] for name in ("range", "dict", "namespace", "cycler", "joiner")}
    environment.globals["raise_exception"] = _raise
    for name in ("center", "format", "indent", "pprint", "wordwrap"):
        del environment.filters[name]
    return environment


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A model's template, with the texts of its special tokens."""

    source: str
    origin: str
    """Where it comes from, for messages."""
    bos: str = ""
    eos: str = ""

    def render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """The conversation's text; ``prompt``: up to where the assistant's next words begin."""
        try:
            tree = _environment().from_string(self.source)
            pieces, length = [], 0
            for piece in tree.generate(
                messages=[dict(message) for message in messages], add_generation_prompt=prompt,
                bos_token=self.bos, eos_token=self.eos,
            ):  # fmt: skip
                pieces.append(piece)
                length += len(piece)
                if length > MAX_TEXT:
                    raise InvalidRequest(f"{self.origin}: its chat template writes more than {MAX_TEXT} characters")
        except (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            reason = str(error).splitlines() or [type(error).__name__]
            raise InvalidRequest(f"{self.origin}: its chat template fails: {reason[0][:200]}") from None
        return "".join(pieces)
