"""What the commands do, in the order of the prompt-to-token table."""

import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from rich.console import Console

from host_driver.calibrate import calibrate
from host_driver.chat_command import chat
from host_driver.compiler import CompiledModel, compile_model
from host_driver.device import TIMEOUT_S, Device
from host_driver.errors import ExitCode, InvalidRequest
from host_driver.fit import cache_slots
from host_driver.image import compile_checkpoint, memory_image
from host_driver.info import model_table, preset_table
from host_driver.key_channels import KeyChannels, load_channels
from host_driver.model_source import ModelSource
from host_driver.output_file import check_writable
from host_driver.plain_device import PlainDevice, PlainProgram, baseline_names, check_baseline, summarise_plain
from host_driver.progress import task
from host_driver.report import summarise, table, write_json
from host_driver.sampling import Sampler, SamplingConfig
from host_driver.session import Run, Stepper, check_prompt, generate, tiles
from host_driver.tokenizer import TextStream, TextTokenizer
from host_driver.transport import Progress, device_module, open_device, require_device
from host_driver.verify import Difference, compare_run, compare_step
from host_driver.weights import Checkpoint
from spec.config import AcceleratorConfig, KvFormat, ModelConfig
from spec.presets import PRESETS

__all__ = [
    "TIMEOUT_S", "CacheOptions", "build_device", "calibrate_keys", "chat_with", "generate_text", "print_info", "verify_devices",
]  # fmt: skip

JUDGE = "golden"

DEFAULT_SLOTS = 4096
"""Largest cache that nobody asked for: long-context models would otherwise take gigabytes."""


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """What was asked of the KV cache."""

    slots: int | None = None
    """None: as many as `DEFAULT_SLOTS`."""
    kv: KvFormat = KvFormat.INT8
    keys: Path | None = None
    """File of the key channels (host_driver/key_channels.py)."""

    @property
    def wanted_slots(self) -> int:
        """Slots to ask the compiler for."""
        return DEFAULT_SLOTS if self.slots is None else self.slots

    def channels(self, model: ModelConfig) -> KeyChannels | None:
        """What the file of the key channels holds."""
        return None if self.keys is None else load_channels(self.keys, model)


def _preset(name: str) -> AcceleratorConfig:
    if name not in PRESETS:
        raise InvalidRequest(f"there is no preset {name!r}; choose one of: {', '.join(PRESETS)}")
    return PRESETS[name]


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """A model that fits a preset, ready for any number of devices."""

    checkpoint: Checkpoint
    compiled: CompiledModel
    tokenizer: TextTokenizer
    prompt: list[int]

    def open(self, console: Console, name: str, *, timeout_s: float, **options: object) -> Device:
        """A device with the model in its memory."""
        config = self.compiled.accelerator
        building = ", which is built at its first use" if hasattr(device_module(name), "build") else ""
        with task(console, f"opening {name} ({config.name}){building}") as update:
            device = Device(
                open_device(name, config.name, self.compiled.memory.limit, **options), config, timeout_s=timeout_s
            )
            update(f"loading {self.compiled.model.name} into {name}")
            device.load(self.compiled, memory_image(self.compiled, self.checkpoint))
        return device


def _check_run(*, max_new_tokens: int, timeout_s: float) -> None:
    if max_new_tokens < 1:
        raise InvalidRequest(f"at least 1 new token must be asked for, not {max_new_tokens}")
    if not timeout_s > 0:
        raise InvalidRequest(f"the deadline must be above 0 s, not {timeout_s:g}")


def _check_plain_cache(device_name: str, cache: CacheOptions) -> None:
    """A baseline's cache has one format, which is its own."""
    for option, given in ((f"--kv {cache.kv}", cache.kv is not KvFormat.INT8), ("--keys", cache.keys is not None)):
        if given:
            raise InvalidRequest(f"device {device_name!r} is a baseline with a KV cache of its own: leave out {option}")


def _load(
    console: Console, source: ModelSource, preset: str, prompt: str | None, cache: CacheOptions
) -> _Loaded:
    """Step 0, and everything that can be wrong before a device is opened. Without a prompt: for a chat."""
    build = _preset(preset)
    model = source.config
    keys = cache.channels(model)
    compile_model(model, build, slots=cache.wanted_slots, kv=cache.kv, keys=keys)  # does it fit? before any weight is read
    tokenizer = source.tokenizer()
    with task(console, f"reading {source.path}"):
        checkpoint = source.load()
        compiled = compile_checkpoint(checkpoint, build, slots=cache.wanted_slots, kv=cache.kv, keys=keys)
    ids = [] if prompt is None else tokenizer.encode(prompt)
    if prompt is not None:
        check_prompt(ids, slots=compiled.slots)
    return _Loaded(checkpoint=checkpoint, compiled=compiled, tokenizer=tokenizer, prompt=ids)


def generate_text(
    *,
    prompt: str,
    source: ModelSource,
    device_name: str,
    preset: str,
    max_new_tokens: int,
    sampling: SamplingConfig,
    cache: CacheOptions,
    verify: bool,
    json_file: Path | None,
    trace: Path | None,
    timeout_s: float,
) -> int:
    """Prompt to text on stdout, numbers on stderr. Returns the exit code."""
    console = Console(stderr=True)
    _check_run(max_new_tokens=max_new_tokens, timeout_s=timeout_s)
    for file in (json_file, trace):
        if file is not None:
            check_writable(file)
    if device_name in baseline_names():
        if verify or trace is not None:
            raise InvalidRequest(f"device {device_name!r} is a baseline: it has no bits to verify and no waveform to trace")
        _check_plain_cache(device_name, cache)
        return _generate_plain(console, device_name, source, prompt, cache.wanted_slots, sampling, max_new_tokens, json_file)
    for name in (device_name, JUDGE) if verify else (device_name,):
        require_device(name)
    loaded = _load(console, source, preset, prompt, cache)
    options = {} if trace is None else {"trace": str(trace)}
    device = loaded.open(console, device_name, timeout_s=timeout_s, **options)
    started = perf_counter()
    run, text = _stream(console, device, loaded, sampling, max_new_tokens, keep_logits=verify)
    wall_s = perf_counter() - started
    difference = None
    if verify:
        judge = loaded.open(console, JUDGE, timeout_s=timeout_s)
        with task(console, f"verifying against {JUDGE}") as update:
            count = len(run.steps)
            difference = compare_run(
                device, judge, run.steps, on_step=lambda done: update(f"verifying step {done + 1} of {count}")
            )
    verified = difference is None if verify else None
    report = summarise(run, loaded.compiled, text=text, device=device_name, verified=verified, wall_s=wall_s)
    console.print(table(report))
    if json_file is not None:
        write_json(report, json_file)
    return _verdict(console, difference, device_name, JUDGE) if verify else 0


@dataclass(frozen=True, kw_only=True)
class PlainLoaded:
    """A model on a baseline, with its tokenizer and the prompt's tokens."""

    device: PlainDevice
    tokenizer: TextTokenizer
    prompt: list[int]

    @property
    def compiled(self) -> PlainProgram:
        """Dimensions and cache."""
        return self.device.compiled


def load_plain(
    console: Console, name: str, source: ModelSource, prompt: str, slots: int, max_new_tokens: int
) -> PlainLoaded:
    """Step 0 and a warmed-up baseline with the model in its memory."""
    check_baseline(name)
    model = source.config
    slots = cache_slots(model, slots)
    tokenizer = source.tokenizer()
    ids = tokenizer.encode(prompt)
    check_prompt(ids, slots=slots)
    with task(console, f"reading {source.path}") as update:
        checkpoint = source.load()
        update(f"loading {model.name} into {name}")
        device = PlainDevice(name, checkpoint, slots)
        device.warm_up(len(ids), max_new_tokens)
    return PlainLoaded(device=device, tokenizer=tokenizer, prompt=ids)


def _generate_plain(
    console: Console, name: str, source: ModelSource, prompt: str, slots: int, sampling: SamplingConfig,
    max_new_tokens: int, json_file: Path | None,
) -> int:  # fmt: skip
    """`generate_text` on a baseline."""
    loaded = load_plain(console, name, source, prompt, slots, max_new_tokens)
    started = perf_counter()
    run, text = _stream(console, loaded.device, loaded, sampling, max_new_tokens, keep_logits=False)
    report = summarise_plain(run, loaded.device, text=text, wall_s=perf_counter() - started)
    console.print(table(report))
    if json_file is not None:
        write_json(report, json_file)
    return 0


def _stream(
    console: Console,
    device: Stepper,
    loaded: _Loaded | PlainLoaded,
    sampling: SamplingConfig,
    max_new_tokens: int,
    *,
    keep_logits: bool,
) -> tuple[Run, str]:
    """Generates, and writes the text to stdout as it comes."""
    text = TextStream(loaded.tokenizer, loaded.prompt)
    pieces: list[str] = []
    run: Run | None = None

    def show(piece: str) -> None:
        pieces.append(piece)
        sys.stdout.write(piece)
        sys.stdout.flush()

    total = len(loaded.prompt)
    # Text that appears is progress enough, and a status line would tear it apart.
    quiet = Console(stderr=True, quiet=sys.stdout.isatty())
    with task(console, f"prefill: {total} tokens") as update:

        def on_tile(done: int) -> Progress:
            update(f"prefill: {done} of {total} tokens")
            return lambda cycles: update(f"prefill: {done} of {total} tokens, {cycles:,} cycles into the next tile")

        steps = generate(
            device, loaded.prompt, Sampler(sampling), max_new_tokens=max_new_tokens,
            stop_ids=loaded.compiled.model.eos_ids, keep_logits=keep_logits, on_tile=on_tile,
        )  # fmt: skip
        token, run = next(steps)
    try:
        show(text.add(token))
        with task(quiet, "decoding") as update:
            for token, _ in steps:
                show(text.add(token))
                update(f"decoding: {len(run.tokens)} of up to {max_new_tokens} tokens")
        show(text.end())
    finally:
        sys.stdout.write("\n")
        sys.stdout.flush()
    if run.tokens[-1] not in loaded.compiled.model.eos_ids and len(run.tokens) < max_new_tokens:
        console.print(f"stopped: the KV cache of {loaded.compiled.slots} slots is full", highlight=False)
    return run, "".join(pieces)


def _verdict(console: Console, difference: Difference | None, first: str, second: str) -> int:
    if difference is None:
        console.print(f"PASS: {first} and {second} agree on every token, logit and cache entry", highlight=False)
        return 0
    line = difference.describe(first, second)
    console.print(f"FAIL: first difference in {line}", highlight=False, soft_wrap=True)
    return ExitCode.DEVICE


def verify_devices(
    *,
    prompt: str,
    source: ModelSource,
    device_name: str,
    against: str,
    preset: str,
    max_new_tokens: int,
    cache: CacheOptions,
    timeout_s: float,
) -> int:
    """Runs a prompt on two devices, descriptor by descriptor. Returns the exit code."""
    console = Console(stderr=True)
    _check_run(max_new_tokens=max_new_tokens, timeout_s=timeout_s)
    for name in (device_name, against):
        require_device(name)
    loaded = _load(console, source, preset, prompt, cache)
    first, second = (loaded.open(console, name, timeout_s=timeout_s) for name in (device_name, against))
    compiled = loaded.compiled
    steps = list(tiles(tuple(loaded.prompt), compiled.tile))
    difference: Difference | None = None
    done = 0
    with task(console, "comparing") as update:
        while steps:
            position, tokens, head = steps.pop(0)

            def on_descriptor(count: int, total: int, position: int = position) -> None:
                update(f"comparing position {position}, descriptor {count} of {total}")

            difference = compare_step(first, second, tokens, position, head=head, on_descriptor=on_descriptor)
            if difference is not None:
                break
            done += head
            behind = position + len(tokens)
            if head and done < max_new_tokens and behind < compiled.slots:
                steps.append((behind, (second.read("argmax"),), True))
    return _verdict(console, difference, device_name, against)


def chat_with(
    *,
    source: ModelSource,
    device_name: str,
    preset: str,
    system: str | None,
    max_new_tokens: int,
    sampling: SamplingConfig,
    cache: CacheOptions,
    timeout_s: float,
) -> int:
    """Answers the lines of stdin. Returns the exit code."""
    console = Console(stderr=True)
    _check_run(max_new_tokens=max_new_tokens, timeout_s=timeout_s)
    source.chat_template()  # is there one? before any weight is read
    options = {"system": system, "sampling": sampling, "max_new_tokens": max_new_tokens}
    if device_name in baseline_names():
        _check_plain_cache(device_name, cache)
        check_baseline(device_name)
        with task(console, f"reading {source.path}"):
            plain = PlainDevice(device_name, source.load(), cache_slots(source.config, cache.wanted_slots))
        return chat(plain, source, clock_hz=None, **options)
    require_device(device_name)
    loaded = _load(console, source, preset, None, cache)
    device = loaded.open(console, device_name, timeout_s=timeout_s)
    return chat(device, source, clock_hz=loaded.compiled.accelerator.clock_hz, **options)


def calibrate_keys(
    *, source: ModelSource, device_name: str, preset: str, text: Path, tokens: int, output: Path, timeout_s: float
) -> int:
    """Writes a model's key channels to a file. Returns the exit code."""
    console = Console(stderr=True)
    check_writable(output)
    if tokens < 2:
        raise InvalidRequest(f"a calibration needs at least 2 tokens, not {tokens}")
    require_device(device_name)
    try:
        words = text.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InvalidRequest(f"{text}: this is no UTF-8 text") from None
    ids = source.tokenizer().encode(words)[:tokens]
    if len(ids) < tokens:
        raise InvalidRequest(f"{text}: it has {len(ids)} tokens, {tokens} were asked for")
    loaded = _load(console, source, preset, None, CacheOptions(slots=tokens))
    device = loaded.open(console, device_name, timeout_s=timeout_s)
    with task(console, f"running {tokens} tokens") as update:
        channels = calibrate(device, ids, lambda done: update(f"running {tokens} tokens: {done} done"))
    channels.save(output)
    return 0


def print_info(*, source: ModelSource, preset: str, cache: CacheOptions) -> int:
    """Tables of a preset and of a model on it, on stdout. Returns the exit code."""
    build = _preset(preset)
    keys = cache.channels(source.config)
    compiled = compile_model(source.config, build, slots=cache.wanted_slots, kv=cache.kv, keys=keys)
    console = Console()
    console.print(preset_table(build))
    console.print(model_table(compiled))
    return 0


def build_device(*, device_name: str, preset: str) -> int:
    """Builds a device ahead of its first use. Returns the exit code."""
    _preset(preset)
    module = device_module(device_name)
    builder = getattr(module, "build", None)
    if builder is None:
        raise InvalidRequest(f"device {device_name!r} needs no build")
    console = Console(stderr=True)
    with task(console, f"building {device_name} ({preset})"):
        result = builder(preset)
    if result is not None:
        sys.stdout.write(f"{result}\n")
    return 0
