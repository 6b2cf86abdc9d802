"""`lutra`: generate, chat, verify, calibrate, compare, info, build. One line on stderr and an exit code if something is wrong."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer.exceptions import TyperException

from host_driver import commands, compare
from host_driver.commands import CacheOptions
from host_driver.errors import ExitCode, InvalidRequest, LutraError
from host_driver.group_quantiser import GroupQuantiser, Method
from host_driver.model_source import ModelSource, open_model
from host_driver.sampling import SamplingConfig
from spec.config import KvFormat

DEFAULT_MODEL = str(Path(__file__).resolve().parent.parent / "models" / "austen")

app = typer.Typer(
    help="Run low-bit language models on the Lutra accelerator, simulated or real.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[
    str, typer.Option(help="Checkpoint folder (Hugging Face safetensors: BitNet b1.58, Llama), GGUF file, or the name smollm2.")
]
Bits = Annotated[int | None, typer.Option(help="Float weights are quantised to so many bits: 1, 2, 3, 4 (default), 8.")]
Group = Annotated[int | None, typer.Option(help="Float weights that share a scale: 32 (default), 64, 128.")]
Quantiser = Annotated[Method | None, typer.Option(help="How the scales of float weights are chosen (default mse).")]
Symmetric = Annotated[bool | None, typer.Option("--symmetric", help="Quantise float weights without a minimum of their own.")]
Preset = Annotated[str, typer.Option(help="Named build of the accelerator.")]
Prompt = Annotated[str, typer.Option(help="Text to go on from.")]
Slots = Annotated[int | None, typer.Option(help="Slots of the KV cache: the longest sequence.")]
Kv = Annotated[
    KvFormat,
    typer.Option("--kv", help="Numbers of the KV cache: int8; k8v4: K int8, V int4; int4: K too, which costs many models dear."),
]
Keys = Annotated[
    Path | None,
    typer.Option(help="Offset and shift of each key channel, from lutra calibrate: --kv int4 for models with outlier keys."),
]
Timeout = Annotated[float, typer.Option(help="Deadline of one doorbell in seconds.")]


def _open(model: str, bits: int | None, group: int | None, method: Method | None, symmetric: bool | None) -> ModelSource:
    """The model, with the quantiser that was asked for, if any was."""
    asked = {"bits": bits, "group": group, "method": method, "symmetric": symmetric}
    options = {name: value for name, value in asked.items() if value is not None}
    try:
        quantiser = GroupQuantiser(**options) if options else None
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
    return open_model(model, quantiser)


@app.command()
def generate(
    prompt: Prompt,
    model: Model = DEFAULT_MODEL,
    device: Annotated[str, typer.Option(help="Device to run on: rtl, golden; baselines: cpu, gpu, gpu-packed.")] = "rtl",
    preset: Preset = "sim",
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 48,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among so many most likely tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the most likely tokens of this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    cache_slots: Slots = None,
    kv: Kv = KvFormat.INT8,
    keys: Keys = None,
    verify: Annotated[bool, typer.Option("--verify", help="Repeat the run on golden and compare everything.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write all numbers of the run to this file.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write the waveform of the run to this file (rtl).")] = None,
    timeout: Timeout = commands.TIMEOUT_S,
    bits: Bits = None,
    group: Group = None,
    quantiser: Quantiser = None,
    symmetric: Symmetric = None,
) -> int:
    """Generate text; then print what it took."""
    sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    return commands.generate_text(
        prompt=prompt, source=_open(model, bits, group, quantiser, symmetric),
        device_name=device, preset=preset, max_new_tokens=max_new_tokens,
        sampling=sampling, cache=CacheOptions(slots=cache_slots, kv=kv, keys=keys), verify=verify, json_file=json, trace=trace,
        timeout_s=timeout,
    )  # fmt: skip


@app.command()
def verify(
    prompt: Prompt = "It is a truth universally acknowledged, that",
    model: Model = DEFAULT_MODEL,
    device: Annotated[str, typer.Option(help="Device under test.")] = "rtl",
    against: Annotated[str, typer.Option(help="Device to compare with.")] = "golden",
    preset: Preset = "sim",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 4,
    cache_slots: Slots = None,
    kv: Kv = KvFormat.INT8,
    keys: Keys = None,
    timeout: Timeout = commands.TIMEOUT_S,
    bits: Bits = None,
    group: Group = None,
    quantiser: Quantiser = None,
    symmetric: Symmetric = None,
) -> int:
    """Run two devices descriptor by descriptor and say where they first differ."""
    return commands.verify_devices(
        prompt=prompt, source=_open(model, bits, group, quantiser, symmetric),
        device_name=device, against=against, preset=preset,
        max_new_tokens=max_new_tokens, cache=CacheOptions(slots=cache_slots, kv=kv, keys=keys), timeout_s=timeout,
    )  # fmt: skip


@app.command()
def chat(
    model: Model = "smollm2",
    device: Annotated[str, typer.Option(help="Device to run on, as for generate.")] = "rtl",
    preset: Preset = "wide",
    system: Annotated[str | None, typer.Option(help="What the model is told before the first message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among so many most likely tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the most likely tokens of this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    cache_slots: Slots = None,
    kv: Kv = KvFormat.INT8,
    keys: Keys = None,
    timeout: Timeout = commands.TIMEOUT_S,
    bits: Bits = None,
    group: Group = None,
    quantiser: Quantiser = None,
    symmetric: Symmetric = None,
) -> int:
    """Talk with a model: one message a line. /new starts again, /exit or the end of input ends."""
    sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    return commands.chat_with(
        source=_open(model, bits, group, quantiser, symmetric), device_name=device, preset=preset, system=system,
        max_new_tokens=max_new_tokens, sampling=sampling, cache=CacheOptions(slots=cache_slots, kv=kv, keys=keys),
        timeout_s=timeout,
    )  # fmt: skip


@app.command()
def info(
    model: Model = DEFAULT_MODEL,
    preset: Preset = "sim",
    cache_slots: Slots = None,
    kv: Kv = KvFormat.INT8,
    keys: Keys = None,
    bits: Bits = None,
    group: Group = None,
    quantiser: Quantiser = None,
    symmetric: Symmetric = None,
) -> int:
    """Print what follows from a preset and a model: sizes, bytes and cycles a token."""
    return commands.print_info(
        source=_open(model, bits, group, quantiser, symmetric), preset=preset,
        cache=CacheOptions(slots=cache_slots, kv=kv, keys=keys),
    )  # fmt: skip


@app.command()
def calibrate(
    text: Annotated[Path, typer.Option(help="Text file whose first tokens are run.")],
    output: Annotated[Path, typer.Option(help="File to write, for --keys.")],
    model: Model = "smollm2",
    device: Annotated[str, typer.Option(help="Device to run on: rtl, golden.")] = "golden",
    preset: Preset = "wide",
    tokens: Annotated[int, typer.Option(help="Tokens to run.")] = 512,
    timeout: Timeout = commands.TIMEOUT_S,
    bits: Bits = None,
    group: Group = None,
    quantiser: Quantiser = None,
    symmetric: Symmetric = None,
) -> int:
    """Find a model's key channels: run a text with an int8 cache and read the keys back."""
    return commands.calibrate_keys(
        source=_open(model, bits, group, quantiser, symmetric), device_name=device, preset=preset, text=text,
        tokens=tokens, output=output, timeout_s=timeout,
    )  # fmt: skip


@app.command(name="compare")
def compare_command(
    prompt: Prompt = "It is a truth universally acknowledged, that",
    model: Model = DEFAULT_MODEL,
    device: Annotated[str, typer.Option(help="The accelerator's device; only rtl has a clock.")] = "rtl",
    preset: Preset = "sim",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate, greedily.")] = 16,
    cache_slots: Slots = None,
    kv: Kv = KvFormat.INT8,
    keys: Keys = None,
    json: Annotated[Path | None, typer.Option(help="Write the rows to this file.")] = None,
    timeout: Timeout = commands.TIMEOUT_S,
) -> int:
    """Run one model and prompt on the accelerator, the GPU and the CPU, each beside its own roofline."""
    return compare.compare_devices(
        prompt=prompt, source=open_model(model, None), device_name=device, preset=preset,
        max_new_tokens=max_new_tokens, cache=CacheOptions(slots=cache_slots, kv=kv, keys=keys), timeout_s=timeout, json_file=json,
    )  # fmt: skip


@app.command()
def build(
    preset: Preset = "sim",
    device: Annotated[str, typer.Option(help="Device to build.")] = "rtl",
) -> int:
    """Make a device's Verilog and simulator ahead of time."""
    return commands.build_device(device_name=device, preset=preset)


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    Console(stderr=True, soft_wrap=True).print(f"error: {line}", style="red", markup=False, highlight=False)
    return code


def run(arguments: list[str] | None = None) -> int:
    """The exit code of a command line."""
    try:
        result = app(arguments, standalone_mode=False, prog_name="lutra")
    except LutraError as error:
        return _fail(str(error), error.exit_code)
    except TyperException as error:
        return _fail(f"{error.format_message()} (see lutra --help)", ExitCode.REQUEST)
    except (KeyboardInterrupt, typer.Abort):
        result = ExitCode.INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return ExitCode.REQUEST
    except OSError as error:
        return _fail(str(error), ExitCode.REQUEST)
    if result == ExitCode.INTERRUPTED:
        return _fail("interrupted", ExitCode.INTERRUPTED)
    return int(result or 0)


def main() -> None:
    """Entry point of the command."""
    sys.exit(run())
