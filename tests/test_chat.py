"""Chat: the cache goes on from turn to turn, and gives every bit that the whole conversation at once gives."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cosim.gguf_checkpoint import CHATML, SPECIAL, TINY_CHAT, TOKENS, random_llama, write_gguf, write_llama_folder
from golden.device import GoldenTransport
from host_driver import cli
from host_driver.chat import Conversation, common_prefix
from host_driver.chat_template import ChatTemplate
from host_driver.device import Device
from host_driver.errors import ExitCode, InvalidRequest
from host_driver.image import compile_checkpoint, memory_image
from host_driver.model_source import ModelSource, open_model
from host_driver.observe import kv_slots
from host_driver.sampling import Sampler, SamplingConfig
from host_driver.session import generate
from spec.presets import PRESETS

PRESET = PRESETS["test_lut"]
SLOTS = 96
TALK = ("hello there", "and then?", "hell")
SHORT = (
    "{% for message in messages %}<|im_start|>{{ message.role[0] }}{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>a{% endif %}"
)
"""Few tokens, so that the golden device has little to do."""
REWRITING = SHORT.replace("message.content", "('e' ~ message.content)")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a chat template."""
    model = replace(TINY_CHAT, max_positions=SLOTS)
    changes = {"tokenizer.chat_template": SHORT}
    return write_gguf(tmp_path_factory.mktemp("chat") / "tiny.gguf", model, random_llama(model, seed=3), changes=changes)


@pytest.fixture(scope="module")
def source(file: Path) -> ModelSource:
    return open_model(file)


def golden(source: ModelSource, slots: int = SLOTS) -> Device:
    """A golden device with the model in its memory."""
    checkpoint = source.load()
    compiled = compile_checkpoint(checkpoint, PRESET, slots=slots)
    device = Device(GoldenTransport(PRESET, compiled.memory.limit), PRESET)
    device.load(compiled, memory_image(compiled, checkpoint))
    return device


@pytest.fixture(scope="module")
def device(source: ModelSource) -> Device:
    return golden(source)


def conversation(device: Device, source: ModelSource, **changes: Any) -> Conversation:
    """With the source's own template."""
    parts: dict[str, Any] = {
        "device": device, "tokenizer": source.tokenizer(), "template": source.chat_template(),
        "sampler": Sampler(SamplingConfig()), "stop_ids": source.config.eos_ids,
    } | changes  # fmt: skip
    return Conversation(**parts)


def test_reused_cache_gives_the_bits_of_one_prefill(device: Device, source: ModelSource) -> None:
    """Tiles fall differently, but every number depends on its token and those in front only."""
    talk = conversation(device, source)
    for number, text in enumerate(TALK):
        list(talk.ask(text, max_new_tokens=4))
        turn = talk.last
        assert turn.run is not None
        assert sum(len(step.tokens) for step in turn.run.prefill) == len(turn.prompt) - turn.cached
        assert (turn.cached > 0) is (number > 0)
        assert turn.run.steps[0].position == turn.cached
    turn = talk.last
    fresh = golden(source)
    whole = generate(
        fresh, turn.prompt, Sampler(SamplingConfig()), max_new_tokens=4, stop_ids=source.config.eos_ids, keep_logits=True
    )
    *_, (_, run) = whole
    assert turn.run is not None and run.tokens == turn.run.tokens
    found, wanted = turn.run.steps[-1], run.steps[-1]
    assert (found.tokens, found.position) == (wanted.tokens, wanted.position)
    logits = device.run_step(found.tokens, found.position, head=True, logits=True).logits
    assert logits is not None and wanted.result.logits is not None
    np.testing.assert_array_equal(logits.view(np.uint32), wanted.result.logits.view(np.uint32))
    for layer in range(source.config.layers):
        pairs = zip(*(kv_slots(which, layer, 0, found.position + 1) for which in (device, fresh)), strict=True)
        for ours, theirs in pairs:
            np.testing.assert_array_equal(ours.bits, theirs.bits, err_msg=f"layer {layer} {ours.what}")


def test_cached_tokens_are_those_that_were_generated(device: Device, source: ModelSource) -> None:
    """The answer is not encoded again, which might split it otherwise: `h`, `e` may have been generated, not `he`."""
    talk = conversation(device, source)
    list(talk.ask("hello", max_new_tokens=5))
    first = talk.last
    assert first.run is not None
    list(talk.ask("hell", max_new_tokens=2))
    spoken = first.run.tokens[:-1] if first.run.tokens[-1] in source.config.eos_ids else first.run.tokens
    assert talk.last.prompt[: len(first.prompt) + len(spoken)] == [*first.prompt, *spoken]
    assert talk.last.cached == len(first.prompt) + len(first.run.tokens) - 1
    assert TOKENS[talk.last.prompt[len(first.prompt) + len(spoken)]] == "<|im_end|>"


def test_answer_that_ended_by_itself_is_not_ended_twice(source: ModelSource, device: Device) -> None:
    talk = conversation(device, source)
    list(talk.ask("hello", max_new_tokens=1))
    stop = talk.last.run.tokens[0] if talk.last.run else 0
    again = conversation(device, source, stop_ids=(stop,))
    list(again.ask("hello", max_new_tokens=5))
    first = again.last
    assert first.run is not None and first.run.tokens == [stop]
    list(again.ask("hell", max_new_tokens=1))
    assert again.last.prompt[: len(first.prompt)] == first.prompt
    assert again.last.prompt[len(first.prompt)] == TOKENS.index("<|im_end|>")
    assert again.last.cached == len(first.prompt)


def test_template_that_rewrites_answers_reuses_what_is_equal(device: Device, source: ModelSource) -> None:
    template = ChatTemplate(source=REWRITING, origin="here")
    talk = conversation(device, source, template=template)
    list(talk.ask("hello", max_new_tokens=3))
    first = talk.last
    list(talk.ask("hell", max_new_tokens=3))
    assert talk.last.prompt == source.tokenizer().encode_rendered(talk.last.text)
    assert 0 < talk.last.cached <= len(first.prompt) + 2
    assert talk.last.cached == common_prefix(talk.last.prompt, [*first.prompt, *(first.run.tokens if first.run else [])][:-1])
    *_, (_, run) = generate(golden(source), talk.last.prompt, Sampler(SamplingConfig()), max_new_tokens=3)
    assert talk.last.run is not None and talk.last.run.tokens == run.tokens


def test_conversation_beyond_the_cache_is_refused_and_can_start_again(source: ModelSource) -> None:
    talk = conversation(golden(source, slots=32), source)
    list(talk.ask("hello", max_new_tokens=3))
    before = list(talk.messages)
    with pytest.raises(InvalidRequest, match=r"with this message, the KV cache 32 slots: start a new one with /new"):
        talk.ask("h" * 40, max_new_tokens=3)
    assert talk.messages == before
    talk.restart()
    list(talk.ask("hello", max_new_tokens=3))
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]
    assert talk.last.cached == len(talk.last.prompt) - 1  # the same beginning lies there still


def run_cli(arguments: list[str], text: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return cli.run(["chat", "--device", "golden", "--preset", "test_lut", *arguments])


def test_command(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(file), "--max-new-tokens", "4", "--system", "hell"]
    assert run_cli(options, "hello\n\nand then?\n/new\nhello\n/exit\nunread\n", monkeypatch) == 0
    out, err = capsys.readouterr()
    answers = out.split("\n")
    assert len(answers) == 4 and answers[3] == ""
    assert answers[0] == answers[2]  # it started again
    lines = [line for line in err.splitlines() if "tokens read" in line]
    assert len(lines) == 3
    assert " 0 from the cache, 4 written in" in lines[0]
    assert " 0 from the cache" not in lines[1]


def test_folder_with_a_template(tmp_path: Path, source: ModelSource) -> None:
    folder = write_llama_folder(tmp_path / "m", TINY_CHAT, random_llama(TINY_CHAT))
    with pytest.raises(InvalidRequest, match=r"^model 'm' has no chat template: it goes on from a text, use lutra generate$"):
        open_model(folder).chat_template()
    settings: dict[str, Any] = {"chat_template": CHATML, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    template = open_model(folder).chat_template()
    assert (template.source, template.bos, template.eos) == (CHATML, "<s>", "</s>")
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}hi"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
    assert open_model(folder).chat_template().render([], prompt=True) == "<s>hi"
    (folder / "chat_template.jinja").write_text("{{ eos_token }}")
    assert open_model(folder).chat_template().render([], prompt=True) == "</s>"


def test_bundled_model_has_no_template(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["--model", cli.DEFAULT_MODEL], "hello\n", monkeypatch) == ExitCode.REQUEST
    assert capsys.readouterr().err == (
        "error: model 'austen' has no chat template: it goes on from a text, use lutra generate\n"
    )


def test_special_tokens_of_a_rendered_text_are_single_ids(source: ModelSource) -> None:
    ids = source.tokenizer().encode_rendered(source.chat_template().render([{"role": "user", "content": "hell"}], prompt=True))
    assert [TOKENS[token] for token in ids if TOKENS[token] in SPECIAL] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert TOKENS.index("hell") in ids
