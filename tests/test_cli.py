"""The command line: text on stdout, one line on stderr when something is wrong, exit codes, whole JSON or none."""

import io
import json
import subprocess
import sys
import threading
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cosim.checkpoint_folder import byte_tokenizer, write_folder
from cosim.random_model import TINY, TINY_PLAIN, random_checkpoint
from golden.device import GoldenTransport
from golden.model import GoldenModel
from host_driver import cli, progress, transport
from host_driver.accounting import CLASSES, decode_cost
from host_driver.compiler import compile_model
from host_driver.report import Report
from host_driver.sampling import Sampler, SamplingConfig
from spec.config import KvFormat
from spec.presets import TEST

ROOT = Path(__file__).parent.parent
CHECKPOINT = random_checkpoint(TINY, seed=2)  # its greedy tokens vary
PROMPT = "Otters swim"
KEYS = [
    "prompt_tokens", "tokens", "text", "device", "preset", "model", "kv", "verified", "clock_hz", "prefill_cycles",
    "decode_cycles", "ttft_s", "decode_tokens_per_s", "dram_bytes", "bandwidth_utilisation", "mac_utilisation",
    "wall_s", "decode_wall_tokens_per_s", "sim_cycles_per_s", "sim_macs_per_s",
]  # fmt: skip


class WrongByte(GoldenTransport):
    """A golden device with one wrong byte in the value projection of layer 1."""

    def write_mem(self, address: int, data: bytes) -> None:
        """That segment of the stream, with another group in its first byte."""
        if data[:4] == b"LTRS" and self._is_value_of_layer_1(len(data)):
            changed = bytearray(data)
            changed[32] = 8 if changed[32] != 8 else 9
            data = bytes(changed)
        super().write_mem(address, data)

    def _is_value_of_layer_1(self, size: int) -> bool:
        self.seen = [*getattr(self, "seen", []), size]
        value_bytes = 32 + 3 * 96 * 2  # 2 row blocks x 5 k blocks = 2 superbeats
        return size == value_bytes and self.seen.count(value_bytes) == 4  # k and v of layer 0, then k, then v


class Interrupted(GoldenTransport):
    """A device during whose work the user presses Ctrl-C."""

    def wait(self, timeout_s: float | None = None, progress: object = None) -> None:
        """The second doorbell does not come back."""
        self.waits = getattr(self, "waits", 0) + 1
        if self.waits == 2:
            raise KeyboardInterrupt
        super().wait(timeout_s)


def open_golden(preset: str, memory_bytes: int) -> GoldenTransport:
    """A device without options."""
    assert preset == "test"
    return GoldenTransport(TEST, memory_bytes)


def open_wrong(preset: str, memory_bytes: int) -> GoldenTransport:
    """See WrongByte."""
    assert preset == "test"
    return WrongByte(TEST, memory_bytes)


def open_interrupted(preset: str, memory_bytes: int) -> GoldenTransport:
    """See Interrupted."""
    assert preset == "test"
    return Interrupted(TEST, memory_bytes)


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices by name without an installed distribution: those of pyproject.toml, and some of this file."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][transport.ENTRY_POINTS]
    here = {"plain": "open_golden", "wrong": "open_wrong", "interrupted": "open_interrupted"}
    monkeypatch.setitem(sys.modules, "devices_of_test_cli", sys.modules[__name__])
    values = declared | {name: f"devices_of_test_cli:{factory}" for name, factory in here.items()}
    values["uninstalled"] = "no_such_module_of_ours:open_device"
    points = [EntryPoint(name, value, transport.ENTRY_POINTS) for name, value in values.items()]
    monkeypatch.setattr(transport, "entry_points", lambda group: [point for point in points if point.group == group])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that fits the `test` preset."""
    return write_folder(tmp_path_factory.mktemp("models") / TINY.name, CHECKPOINT)


def command(name: str, folder: Path, **options: Any) -> list[str]:
    """A command line; True stands for a flag."""
    options = {"model": folder, "preset": "test"} | options
    arguments = [name]
    for option, value in options.items():
        arguments += [f"--{option.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return arguments


def generate(folder: Path, **options: Any) -> list[str]:
    """`lutra generate` on the golden device."""
    return command("generate", folder, **{"prompt": PROMPT, "device": "golden", "max_new_tokens": 5} | options)


def reference_tokens(count: int, sampler: Sampler) -> list[int]:
    """Tokens by the golden model, which knows neither programs nor packed memory."""
    model = GoldenModel(CHECKPOINT, slots=80)
    ids = byte_tokenizer().encode(PROMPT).ids
    logits = np.zeros(0)
    for start in range(0, len(ids), 3):
        logits = model.step(ids[start : start + 3], start).numpy()[-1]
    tokens: list[int] = []
    while True:
        tokens.append(sampler.sample(logits))
        if len(tokens) == count:
            return tokens
        logits = model.step(tokens[-1:], len(ids) + len(tokens) - 1).numpy()[-1]


def test_generate_streams_the_models_text_and_reports(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    assert cli.run(generate(folder, json=file, verify=True)) == 0
    out, err = capsys.readouterr()
    report = json.loads(file.read_text())
    assert list(report) == KEYS == list(Report.__dataclass_fields__)
    tokens = reference_tokens(5, Sampler(SamplingConfig()))
    assert report["tokens"] == tokens
    assert report["prompt_tokens"] == byte_tokenizer().encode(PROMPT).ids
    assert out == report["text"] + "\n" == byte_tokenizer().decode(tokens) + "\n"
    assert report["verified"] is True
    assert report["kv"] == "int8"
    assert "PASS: golden and golden agree" in err
    assert (report["device"], report["preset"], report["model"]) == ("golden", "test", TINY.name)
    assert report["clock_hz"] == TEST.clock_hz
    assert report["prefill_cycles"] is None  # golden has no clock
    assert report["decode_cycles"] == []
    assert set(report["dram_bytes"]) == {"weights", "kv", "activations", "head"}
    assert all(value > 0 for value in report["dram_bytes"].values())
    assert not [name for name in tmp_path.iterdir() if name != file]


@pytest.mark.parametrize("kv", KvFormat)
def test_measured_bytes_are_those_that_follow_from_the_programs(folder: Path, tmp_path: Path, kv: KvFormat) -> None:
    assert cli.run(generate(folder, json=tmp_path / "run.json", max_new_tokens=2, kv=kv)) == 0
    report = json.loads((tmp_path / "run.json").read_text())
    cost = decode_cost(compile_model(TINY, TEST, kv=kv), position=len(PROMPT))
    assert report["dram_bytes"] == {name: getattr(cost, name) for name in CLASSES}
    assert report["kv"] == kv.value


def test_size_of_a_cache_format_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["info", "--model", str(folder), "--preset", "test", "--kv", "k8v4"]) == 0
    assert "int8, int4, 88 B" in capsys.readouterr().out  # 2 layers of one head: 24 + 12 + 8 bytes
    assert cli.run(["info", "--model", str(folder), "--preset", "test", "--kv", "int4"]) == 0
    assert "int4, int4, 64 B" in capsys.readouterr().out
    assert cli.run(["info", "--model", str(folder), "--preset", "test"]) == 0
    assert "int8, int8, 112 B" in capsys.readouterr().out


@pytest.mark.parametrize(("delay", "shown"), [(0.0, "packing\n"), (60.0, "")])
def test_only_what_takes_long_is_said(monkeypatch: pytest.MonkeyPatch, delay: float, shown: str) -> None:
    monkeypatch.setattr(progress, "DELAY_S", delay)
    said = threading.Event()
    file = io.StringIO()
    console = Console(file=file)
    monkeypatch.setattr(console, "print", lambda *a, **k: (Console.print(console, *a, **k), said.set()))
    with progress.task(console, "packing") as update:
        assert said.wait(0 if delay else 10) == (not delay)
        update("still packing")
    assert file.getvalue() == shown


def test_seeded_sampling_repeats_and_is_the_reference_samplers(folder: Path, tmp_path: Path) -> None:
    options = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "seed": 11}
    runs = []
    for name in ("a.json", "b.json"):
        assert cli.run(generate(folder, json=tmp_path / name, **options)) == 0
        runs.append(json.loads((tmp_path / name).read_text())["tokens"])
    config = SamplingConfig(temperature=1.5, top_k=40, top_p=0.9, seed=11)
    assert runs[0] == runs[1] == reference_tokens(5, Sampler(config))


def test_verify_names_the_first_difference(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(command("verify", folder, prompt=PROMPT, device="wrong", against="plain")) == 3
    line = capsys.readouterr().err.strip().splitlines()[-1]
    start = "FAIL: first difference in layer 1, step 3 (query, key and value projection), position 0: V cache KV head 0"
    assert line.startswith(start), line
    assert "slot 0 element" in line
    assert ": wrong " in line
    assert ", plain " in line


def test_generate_verify_names_the_first_difference(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    assert cli.run(generate(folder, device="wrong", verify=True, json=file)) == 3
    assert "FAIL: first difference in layer 1, step 3" in capsys.readouterr().err
    assert json.loads(file.read_text())["verified"] is False


@pytest.mark.parametrize("kv", KvFormat)
def test_verify_passes_on_equal_devices(folder: Path, capsys: pytest.CaptureFixture[str], kv: KvFormat) -> None:
    arguments = command("verify", folder, prompt=PROMPT, device="plain", against="golden", max_new_tokens=2, kv=kv)
    assert cli.run(arguments) == 0
    assert "PASS: plain and golden agree on every token, logit and cache entry" in capsys.readouterr().err


def test_generation_stops_when_the_cache_is_full(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    assert cli.run(generate(folder, cache_slots=16, max_new_tokens=40, json=file)) == 0
    assert len(json.loads(file.read_text())["tokens"]) == 16 - len(PROMPT) + 1
    assert "the KV cache of 16 slots is full" in capsys.readouterr().err


def test_generation_stops_at_the_end_token(tmp_path: Path) -> None:
    tokens = reference_tokens(5, Sampler(SamplingConfig()))
    end = next(token for place, token in enumerate(tokens) if place and token not in tokens[:place])
    folder = write_folder(tmp_path / "m", CHECKPOINT)
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": end}
    (folder / "config.json").write_text(json.dumps(config))
    assert cli.run(generate(folder, json=tmp_path / "run.json")) == 0
    assert json.loads((tmp_path / "run.json").read_text())["tokens"] == tokens[: tokens.index(end) + 1]


def test_interrupt_ends_with_130_and_leaves_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(generate(folder, device="interrupted", json=tmp_path / "run.json")) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "error: interrupted"
    assert not list(tmp_path.iterdir())


def test_info_prints_derived_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["info", "--model", str(folder), "--preset", "test"]) == 0
    out = capsys.readouterr().out
    for number in ("288", f"{TINY.linear_weights:,}", "80 slots"):
        assert number in out


def line_of(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The single line that a failing command prints."""
    assert cli.run(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    return err[len("error: ") :].rstrip()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "fpga"}, "no device 'fpga'; choose one of: golden, interrupted, plain, rtl, uninstalled, wrong"),
        ({"preset": "huge"}, "there is no preset 'huge'; choose one of: test, sim, kv260"),
        ({"preset": "sim"}, "does not fit preset 'sim': head_dim 24 is not a multiple of attention lanes (16)"),
        ({"prompt": "x" * 81}, "the prompt has 81 tokens, the KV cache 80 slots: shorten the prompt"),
        ({"prompt": ""}, "the prompt is empty: it has no tokens"),
        ({"temperature": -1}, "temperature must be 0 or more, not -1"),
        ({"top_k": 3}, "top-k and top-p need a temperature above 0: at 0 the largest logit always wins"),
        ({"max_new_tokens": 0}, "at least 1 new token must be asked for, not 0"),
        ({"cache_slots": "many"}, "Invalid value for '--cache-slots': "),
        ({"cache_slots": 0}, "the KV cache needs at least 1 slot, not 0"),
        ({"timeout": 0}, "the deadline must be above 0 s, not 0"),
        ({"model": "/nowhere/model"}, "/nowhere/model: no such model folder"),
        ({"json": "/nowhere/run.json"}, "/nowhere/run.json: the folder /nowhere does not exist"),
        ({"trace": "wave.vcd", "device": "plain"}, "device 'plain' has no option 'trace'"),
        ({"trace": "wave.vcd"}, "device 'golden': the golden device has no option 'trace'"),
        ({"kv": "int3"}, "Invalid value for '--kv': Value error, 'int3' is not one of 'int8', 'k8v4', 'int4'"),
        ({"zzz": 1}, "No such option: --zzz (see lutra --help)"),
    ],
)
def test_wrong_request_is_one_line_and_exit_1(
    folder: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], message: str
) -> None:
    assert message in line_of(generate(folder, **options), 1, capsys)


def test_wrong_checkpoint_is_one_line_and_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "m", CHECKPOINT)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    assert "cut short" in line_of(generate(folder), 1, capsys)


def test_tokenizer_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = random_checkpoint(TINY_PLAIN, seed=1)  # 203 tokens, the byte tokenizer has 256
    folder = write_folder(tmp_path / "m", small)
    assert "token id 255 is beyond the model's vocabulary of 203" in line_of(generate(folder), 1, capsys)
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json: not a tokenizer: " in line_of(generate(folder), 1, capsys)
    (folder / "tokenizer.json").unlink()
    assert line_of(generate(folder), 1, capsys).endswith("tokenizer.json is missing")


def test_device_whose_package_is_missing_is_exit_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = line_of(generate(folder, device="uninstalled"), 2, capsys)
    assert line.startswith("device 'uninstalled' needs the Python package 'no_such_module_of_ours'")


def test_device_without_a_build_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert line_of(["build", "--device", "golden"], 1, capsys) == "device 'golden' needs no build"


def test_command_line_as_a_process(folder: Path) -> None:
    program = "import sys; from host_driver.cli import run; sys.exit(run())"
    arguments = [sys.executable, "-c", program, *generate(folder, device="fpga")]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: there is no device 'fpga'")


def test_host_driver_needs_neither_torch_nor_amaranth() -> None:
    program = "import sys, host_driver.cli; sys.exit(bool({'torch', 'amaranth'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
