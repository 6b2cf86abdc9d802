"""Models by path or name: a checkpoint folder, a GGUF file, or a model that an installed package carries."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from host_driver.chat_template import ChatTemplate
from host_driver.checkpoint import is_float_llama, load_checkpoint, read_model_config
from host_driver.errors import InvalidRequest
from host_driver.gguf_file import GgufFile
from host_driver.gguf_model import has_floats, load_gguf, open_gguf
from host_driver.gguf_tokenizer import build_tokenizer, token_id
from host_driver.group_quantiser import GroupQuantiser
from host_driver.safetensors_file import read_json
from host_driver.smollm2 import NAME as SMOLLM2
from host_driver.smollm2 import find_smollm2
from host_driver.tokenizer import TextTokenizer
from host_driver.weights import Checkpoint
from spec.config import ModelConfig

PACKAGED = {SMOLLM2: find_smollm2}
"""Models that packages carry: name to the function that finds the file."""


class ModelSource(ABC):
    """A model whose headers were read and checked; its weights are read by `load`."""

    path: Path
    config: ModelConfig

    @abstractmethod
    def load(self) -> Checkpoint:
        """The weights as the accelerator takes them."""

    @abstractmethod
    def tokenizer(self) -> TextTokenizer:
        """Text to token ids and back."""

    @abstractmethod
    def chat_template(self) -> ChatTemplate:
        """How a conversation becomes text. Raises InvalidRequest where the model was not made for conversations."""

    def _no_template(self) -> InvalidRequest:
        return InvalidRequest(f"model {self.config.name!r} has no chat template: it goes on from a text, use lutra generate")


def _refuse_quantiser(path: Path, quantiser: GroupQuantiser | None) -> None:
    if quantiser is not None:
        raise InvalidRequest(
            f"{path}: its weights are quantised already: --bits, --group, --quantiser and --symmetric are for float weights"
        )


class FolderModel(ModelSource):
    """A Hugging Face folder."""

    def __init__(self, path: Path, quantiser: GroupQuantiser | None) -> None:
        self.path = path
        self.config = read_model_config(path)
        if not is_float_llama(path):
            _refuse_quantiser(path, quantiser)
        self._quantiser = quantiser

    def load(self) -> Checkpoint:
        """See `ModelSource`."""
        return load_checkpoint(self.path, self._quantiser)

    def tokenizer(self) -> TextTokenizer:
        """tokenizer.json"""
        return TextTokenizer.from_folder(self.path, bos_id=self.config.bos_id, vocab=self.config.vocab)

    def chat_template(self) -> ChatTemplate:
        """chat_template.jinja, or that of tokenizer_config.json."""
        file = self.path / "tokenizer_config.json"
        settings = read_json(file) if file.is_file() else {}
        source: Any = settings.get("chat_template")
        single = self.path / "chat_template.jinja"
        if single.is_file():
            try:
                source = single.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                raise InvalidRequest(f"{single}: not a readable text file") from None
        if isinstance(source, list):  # several by name
            named = [entry for entry in source if isinstance(entry, dict) and entry.get("name") == "default"]
            source = named[0].get("template") if named else None
        if not isinstance(source, str) or not source:
            raise self._no_template()
        return ChatTemplate(
            source=source, origin=str(self.path), bos=_token_text(settings, "bos_token"), eos=_token_text(settings, "eos_token")
        )


def _token_text(settings: dict[str, Any], key: str) -> str:
    """A special token of tokenizer_config.json, which may be a text or an object with one."""
    value = settings.get(key)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


class GgufModel(ModelSource):
    """A GGUF file."""

    def __init__(self, path: Path, quantiser: GroupQuantiser | None) -> None:
        self.path = path
        self._file, self.config = open_gguf(path)
        if not has_floats(self._file):
            _refuse_quantiser(path, quantiser)
        self._quantiser = quantiser

    @property
    def file(self) -> GgufFile:
        """The file's header."""
        return self._file

    def load(self) -> Checkpoint:
        """See `ModelSource`."""
        return load_gguf(self._file, self._quantiser)

    def tokenizer(self) -> TextTokenizer:
        """From the metadata."""
        return TextTokenizer(build_tokenizer(self._file), bos_id=self.config.bos_id)

    def chat_template(self) -> ChatTemplate:
        """tokenizer.chat_template"""
        source = self._file.metadata.get("tokenizer.chat_template")
        if not isinstance(source, str) or not source:
            raise self._no_template()
        tokens = self._file.metadata.get("tokenizer.ggml.tokens")
        texts = {}
        for key in ("bos", "eos"):
            number = token_id(self._file, key, self.config.vocab)
            texts[key] = tokens[number] if isinstance(tokens, list) and number is not None and number < len(tokens) else ""
        return ChatTemplate(source=source, origin=str(self.path), **texts)


def open_model(path_or_name: str | Path, quantiser: GroupQuantiser | None = None) -> ModelSource:
    """A folder, a file, or a name (``smollm2``). What exists under a path goes before a name.

    ``quantiser``: how float weights are quantised; asking for one where there are none is an error.
    """
    path = Path(path_or_name)
    if not path.exists() and str(path_or_name) in PACKAGED:
        path = PACKAGED[str(path_or_name)]()
    if path.is_file():
        return GgufModel(path, quantiser)
    if not path.exists():
        names = ", ".join(PACKAGED)
        raise InvalidRequest(f"{path}: no such model folder or file; models by name: {names}")
    return FolderModel(path, quantiser)
