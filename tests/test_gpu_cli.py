"""`--device cpu|gpu` and `lutra compare`: the accelerator's text, table and JSON, and one line where there is no GPU."""

import json
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from cosim.checkpoint_folder import byte_tokenizer, write_folder
from cosim.random_model import TINY, random_checkpoint
from golden.model import FloatModel
from host_driver import cli, plain_device, transport
from host_driver.report import Report
from host_driver.sampling import Sampler, SamplingConfig

ROOT = Path(__file__).parent.parent
CHECKPOINT = random_checkpoint(TINY, seed=2)
PROMPT = "Otters swim"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices and baselines of pyproject.toml, without an installed distribution."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    for module in (transport, plain_device):
        points = [EntryPoint(*item, module.ENTRY_POINTS) for item in declared[module.ENTRY_POINTS].items()]
        monkeypatch.setattr(module, "entry_points", lambda group, points=points: [p for p in points if p.group == group])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that fits the `test` preset."""
    return write_folder(tmp_path_factory.mktemp("models") / TINY.name, CHECKPOINT)


def generate(folder: Path, device: str, **options: object) -> list[str]:
    """`lutra generate` on a baseline."""
    arguments = ["generate", "--model", str(folder), "--prompt", PROMPT, "--device", device, "--max-new-tokens", "5"]
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return arguments


def float_tokens(count: int, sampler: Sampler) -> list[int]:
    """Tokens of the float meaning."""
    ids, model = byte_tokenizer().encode(PROMPT).ids, FloatModel(CHECKPOINT)
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(sampler.sample(model.logits(ids + tokens)[-1].float().numpy()))
    return tokens


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "seed": 11}])
def test_cpu_generates_the_float_meanings_tokens_and_reports(
    options: dict[str, float], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    assert cli.run(generate(folder, "cpu", json=file, **options)) == 0
    out, err = capsys.readouterr()
    report = json.loads(file.read_text())
    assert list(report) == list(Report.__dataclass_fields__)  # the accelerator's keys
    tokens = float_tokens(5, Sampler(SamplingConfig(**options)))  # pyright: ignore[reportArgumentType]
    assert report["tokens"] == tokens
    assert out == report["text"] + "\n" == byte_tokenizer().decode(tokens) + "\n"
    assert (report["device"], report["model"]) == ("cpu", TINY.name)
    assert report["preset"].startswith("float32")
    for nothing in ("clock_hz", "prefill_cycles", "verified", "sim_cycles_per_s", "sim_macs_per_s"):
        assert report[nothing] is None
    assert report["decode_cycles"] == []
    assert report["dram_bytes"]["weights"] == 4 * TINY.linear_weights
    for number in ("ttft_s", "decode_tokens_per_s", "bandwidth_utilisation", "mac_utilisation", "wall_s"):
        assert report[number] > 0
    assert "time to first token  " in err


def test_prompt_beyond_the_cache_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(generate(folder, "cpu", cache_slots=1, max_new_tokens=2) + ["--prompt", "x" * 17]) == 1
    assert "error: the prompt has 17 tokens, the KV cache 16 slots" in capsys.readouterr().err


@pytest.mark.parametrize("option", [{"verify": True}, {"trace": "wave.vcd"}])
def test_baseline_has_no_bits_to_verify_and_no_waveform(
    option: dict[str, object], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(generate(folder, "cpu", **option)) == 1
    assert "device 'cpu' is a baseline: it has no bits to verify and no waveform" in capsys.readouterr().err


def test_baseline_has_a_cache_of_its_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(generate(folder, "cpu", kv="k8v4")) == 1
    assert "device 'cpu' is a baseline with a KV cache of its own: leave out --kv k8v4" in capsys.readouterr().err


@without_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("device", ["gpu", "gpu-packed"])
def test_gpu_that_is_not_there_is_one_line_and_exit_3(
    device: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(generate(folder, device)) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"error: device '{device}' needs a CUDA GPU, and this machine has none")


def test_missing_package_is_a_build_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    point = EntryPoint("gpu", "no_such_module_of_ours:GpuBaseline", plain_device.ENTRY_POINTS)
    monkeypatch.setattr(plain_device, "entry_points", lambda group: [point] if group == point.group else [])
    assert cli.run(generate(folder, "gpu")) == 2
    assert "error: device 'gpu' needs the Python package 'no_such_module_of_ours'" in capsys.readouterr().err


def test_a_gpu_that_fails_in_the_run_is_a_device_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def out_of_memory(*arguments: object, **options: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")

    monkeypatch.setattr("gpu.baseline.CpuBaseline.run", out_of_memory)
    assert cli.run(generate(folder, "cpu")) == 3
    assert capsys.readouterr().err == "error: device 'cpu': CUDA out of memory. Tried to allocate 2 GiB.\n"


def test_compare_puts_every_device_beside_its_roofline(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    arguments = ["compare", "--model", str(folder), "--prompt", PROMPT, "--preset", "test", "--device", "golden", "--kv", "k8v4"]
    assert cli.run([*arguments, "--max-new-tokens", "3", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    rows = {row["device"]: row for row in json.loads(file.read_text())}
    assert list(rows) == ["golden", "gpu", "gpu-packed", "cpu"]
    assert rows["golden"]["ttft_s"] is None and "no clock" in rows["golden"]["runs_on"]
    assert "KV cache k8v4" in rows["golden"]["runs_on"]
    assert len(rows["golden"]["tokens"]) == 3
    assert rows["cpu"]["tokens"] == float_tokens(3, Sampler(SamplingConfig()))
    assert rows["cpu"]["ttft_s"] > 0 and rows["cpu"]["decode_tokens_per_s"] > 0 and rows["cpu"]["roofline_share"] > 0
    assert "Otters" not in out and f"{len(PROMPT)} prompt tokens" in out
    if not torch.cuda.is_available():
        assert rows["gpu"]["runs_on"] == "not available" and rows["gpu"]["decode_tokens_per_s"] is None
        assert "gpu: device 'gpu' needs a CUDA GPU, and this machine has none" in out


@pytest.mark.cosim
def test_compare_takes_the_accelerators_times_from_its_cycles(folder: Path, tmp_path: Path) -> None:
    file, run = tmp_path / "rows.json", tmp_path / "run.json"
    shared = ["--model", str(folder), "--prompt", PROMPT, "--preset", "test", "--device", "rtl", "--max-new-tokens", "3"]
    assert cli.run(["compare", *shared, "--json", str(file)]) == 0
    assert cli.run(["generate", *shared, "--json", str(run)]) == 0
    row, report = json.loads(file.read_text())[0], json.loads(run.read_text())
    assert row["tokens"] == report["tokens"]
    assert row["ttft_s"] == report["ttft_s"]
    assert row["decode_tokens_per_s"] == report["decode_tokens_per_s"]
    assert 0 < row["roofline_share"] <= 1


def test_compare_needs_a_decode_step(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["compare", "--model", str(folder), "--max-new-tokens", "1"]) == 1
    assert "a comparison of decode speed needs at least 2 new tokens, not 1" in capsys.readouterr().err


def test_host_driver_needs_neither_torch_nor_triton() -> None:
    program = "import sys, host_driver.cli; sys.exit(bool({'torch', 'triton', 'gpu'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
