"""Text to token ids and back, as tokenizer.json says."""

from pathlib import Path

from tokenizers import Tokenizer

from host_driver.errors import InvalidRequest

UNFINISHED = "\ufffd"
"""What a decoder shows for bytes that are not yet a whole character."""


class TextTokenizer:
    """A tokenizer with the beginning-of-sequence token of its model."""

    def __init__(self, tokenizer: Tokenizer, *, bos_id: int | None) -> None:
        self._tokenizer = tokenizer
        self._bos_id = bos_id

    @classmethod
    def from_folder(cls, folder: Path, *, bos_id: int | None, vocab: int) -> "TextTokenizer":
        """The tokenizer.json of a checkpoint folder; ``vocab`` is the model's."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise InvalidRequest(f"{folder}: tokenizer.json is missing")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001 (the library raises bare Exception on a bad file)
            raise InvalidRequest(f"{file}: not a tokenizer: {error}") from None
        largest = max(tokenizer.get_vocab().values(), default=-1)
        if largest >= vocab:
            raise InvalidRequest(f"{file}: token id {largest} is beyond the model's vocabulary of {vocab}")
        return cls(tokenizer, bos_id=bos_id)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, beginning of sequence first where the model has one."""
        ids = self._tokenizer.encode(text).ids
        if self._bos_id is not None and ids[:1] != [self._bos_id]:
            ids = [self._bos_id, *ids]
        return ids

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of a text that a chat template wrote, with every special token in it; nothing is added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], *, special: bool = False) -> str:
        """Text of token ids; ``special``: special tokens are part of it."""
        return self._tokenizer.decode(ids, skip_special_tokens=not special)


class TextStream:
    """Text of tokens as they come: every piece ends with a whole character, and the pieces join to `decode` of all.

    ``before``: the tokens in front (the prompt), on whose last ones the first piece's spacing may depend.
    """

    _CONTEXT = 8
    """Tokens in front of a new one that are decoded with it, so that spacing and split characters come out right."""

    def __init__(self, tokenizer: TextTokenizer, before: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before[-self._CONTEXT :])
        self._shown = len(self._decoded())

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._ids)

    def add(self, token: int) -> str:
        """The new piece of text; empty while a character is unfinished."""
        self._ids.append(token)
        text = self._decoded()
        if text.endswith(UNFINISHED):
            return ""
        piece = text[self._shown :]
        if len(self._ids) > 4 * self._CONTEXT:
            self._ids = self._ids[-self._CONTEXT :]
            text = self._decoded()
        self._shown = len(text)
        return piece

    def end(self) -> str:
        """What is left when no more tokens come."""
        piece = self._decoded()[self._shown :]
        self._shown += len(piece)
        return piece
