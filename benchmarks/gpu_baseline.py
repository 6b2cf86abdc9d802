"""The GPU baseline: packed kernels beside torch FP16 and a copy, and whole models; one command, one JSON file.

    python -m benchmarks.gpu_baseline [--json FILE] [--models austen,smollm2,bitnet-0.73b] [--device cuda|cpu]

Kernel times are medians of CUDA-graph replays, each of which runs over so many copies of a matrix that the last-level cache
holds none of them, so that weights come from memory as in decoding; a kernel's integer sums are compared with exact ones on the
same card before it is timed. Ceilings (copy bandwidth, FP16 and int8 products) are measured in the same run. On ``--device
cpu`` there are no kernels to time: the end-to-end table alone, in float32.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import torch
import triton
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.bitnet_0_73b import SHAPE
from cosim.random_model import random_checkpoint, random_groups
from gpu import half, lookup, roofline
from gpu.accounting import step_bytes, step_macs
from gpu.energy import EnergyMeter
from gpu.gemm import gemm
from gpu.gemv import gemv, sums_like
from gpu.packed_model import PackedModel
from gpu.packing import PLANE, pack
from gpu.plain_model import PlainModel
from gpu.quantise import quantise
from host_driver.errors import ExitCode
from host_driver.model_source import open_model
from host_driver.weights import Checkpoint, TernaryMatrix
from spec.config import ModelConfig

BUNDLED = str(Path(__file__).resolve().parent.parent / "models" / "austen")
SHAPES = ((4096, 4096), (8192, 8192), (11008, 4096), (4096, 11008), (1536, 576), (4096, 1536))
"""(outputs, inputs): square, a 7B model's FFN, SmolLM2's and BitNet 0.73B's FFN."""
FORMATS = ("ternary W2 A8", "ternary 1.6-bit A8", "ternary tables A8", "W4 g32 A8", "W4 g32 A16")
BATCHES = (1, 8, 64)
COLD_BYTES = 1 << 29
"""Bytes of all copies of a matrix: several times the last-level cache."""
MOST_COPIES = 256
REPLAYS = 50
DECODE_TOKENS = 128
PROMPTS = (64, 512)

Product = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class KernelRow:
    """One kernel on one shape."""

    outputs: int
    inputs: int
    form: str
    batch: int
    exact: bool | None
    """Are the integer sums exact on this card? None: there are none."""
    microseconds: float
    bytes: int
    """Weights, scales, activations and results."""
    bandwidth_share: float
    """Bytes a second over the measured copy bandwidth."""
    peak_share: float
    """Multiply-accumulates a second over the measured product rate of the activations' type."""
    torch_fp16_ratio: float
    """How many times faster than torch's FP16 product of the same shape."""
    copy_ratio: float
    """Time of a copy that moves as many bytes over the kernel's."""


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """One model on one path."""

    model: str
    path: str
    prompt: int
    ttft_ms: float
    prefill_tokens_per_s: float
    prefill_roofline_share: float
    decode_tokens_per_s: float
    decode_roofline_share: float
    tokens_per_joule: float | None
    """None: the card's energy counter cannot be read."""


def copies(size: int) -> int:
    """So many that they do not fit in a cache."""
    return max(2, min(MOST_COPIES, -(-COLD_BYTES // size)))


def seconds(products: list[Product]) -> float:
    """Median time of one of the products, each run once a replay of one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for product in products:  # tunes, compiles, loads
            product()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times) / len(products)


def fp16_seconds(outputs: int, inputs: int, batch: int, device: torch.device) -> float:
    """torch's product with dense FP16 weights."""
    weights = [torch.randn(outputs, inputs, device=device).half() for _ in range(copies(2 * outputs * inputs))]
    x = torch.randn(batch, inputs, device=device).half()
    return seconds([lambda w=w: torch.nn.functional.linear(x, w) for w in weights])


def copy_seconds(size: int, device: torch.device) -> float:
    """A copy that moves ``size`` bytes: half of them read, half written."""
    count = copies(size)
    pairs = [[torch.empty(size // 2, dtype=torch.uint8, device=device) for _ in range(2)] for _ in range(count)]
    return seconds([lambda pair=pair: pair[1].copy_(pair[0]) for pair in pairs])


def _cloned(w: Any) -> Any:
    """Another matrix of the same contents, elsewhere in memory."""
    fields = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in vars(w).items()}
    if isinstance(w, lookup.LookupMatrix):
        fields["packed"] = _cloned(w.packed)
    return type(w)(**fields)


def products_of(form: str, outputs: int, inputs: int, batch: int, device: torch.device) -> tuple[list[Product], int, bool | None]:
    """The kernel over copies of a matrix, bytes of one product, and whether its integer sums are exact."""
    rng = np.random.default_rng(0)
    values = rng.integers(-1, 2, (outputs, inputs)).astype(np.int8)
    groups = form.startswith("W4")
    matrix = random_groups(rng, (outputs, inputs), bits=4) if groups else TernaryMatrix(values=values, scale=0.5)
    w: Any = (
        lookup.pack_lookup(matrix, device) if "tables" in form else pack(matrix, device=device, trits="1.6" in form)
    )
    packed = w.packed if isinstance(w, lookup.LookupMatrix) else w
    size = w.codes.numel() if isinstance(w, lookup.LookupMatrix) else w.size
    x = torch.randn(batch, inputs, device=device)
    results = 4 * batch * outputs
    every = [w, *(_cloned(w) for _ in range(copies(size) - 1))]
    if form.endswith("A16"):
        halves = half.prepare_half(x, packed)
        return [lambda w=w: half.half_matmul(halves, w) for w in every], size + 2 * batch * inputs + results, None
    a = quantise(x, packed.padded, grouped=groups)
    product: Any = lookup.lookup_gemv if "tables" in form else gemv if batch == 1 else gemm
    sums = sums_like(packed, batch, device)
    product(a, w, sums=sums)
    q = a.q[:, :inputs].double()
    if groups:
        codes = torch.from_numpy(matrix.codes).to(device).double().unflatten(1, (-1, PLANE))
        exact = torch.einsum("mgk,ngk->mng", q.unflatten(1, (-1, PLANE)), codes)
    else:
        exact = q @ torch.from_numpy(values).to(device).double().T
    right = torch.equal(sums.double(), exact)
    return [lambda w=w: product(a, w) for w in every], size + batch * inputs + results, right


def kernel_table(console: Console, device: torch.device) -> tuple[list[KernelRow], dict[str, float]]:
    """All kernels on all shapes, and the ceilings."""
    bandwidth = roofline.copy_bytes_per_s(device)
    peaks = {dtype: roofline.product_macs_per_s(device, dtype) for dtype in (torch.float16, torch.bfloat16, torch.int8)}
    rows = []
    for outputs, inputs in SHAPES:
        for batch in BATCHES:
            dense = fp16_seconds(outputs, inputs, batch, device)
            for form in FORMS_OF_BATCH[batch]:
                console.print(f"{outputs} x {inputs}, batch {batch}: {form}", highlight=False)
                products, size, exact = products_of(form, outputs, inputs, batch, device)
                took = seconds(products)
                del products
                peak = peaks[torch.float16 if form.endswith("A16") else torch.int8]
                rows.append(
                    KernelRow(
                        outputs=outputs, inputs=inputs, form=form, batch=batch, exact=exact, microseconds=1e6 * took,
                        bytes=size, bandwidth_share=size / took / bandwidth,
                        peak_share=batch * outputs * inputs / took / peak, torch_fp16_ratio=dense / took,
                        copy_ratio=copy_seconds(size, device) / took,
                    )
                )
                torch.cuda.empty_cache()
    ceilings = {"copy_bytes_per_s": bandwidth} | {
        f"{str(dtype).removeprefix('torch.')}_macs_per_s": peak for dtype, peak in peaks.items()
    }
    return rows, ceilings


FORMS_OF_BATCH = {batch: [form for form in FORMATS if batch == 1 or "tables" not in form] for batch in BATCHES}
"""Tables are a GEMV only."""


def checkpoint_of(name: str) -> Checkpoint:
    """A model of the end-to-end table."""
    if name == SHAPE.name:
        return random_checkpoint(SHAPE)
    return open_model(BUNDLED if name == "austen" else name, None).load()


def paths_of(device: torch.device) -> dict[str, Callable[[Checkpoint, int], PlainModel | PackedModel]]:
    """Ways to run a model on a device."""

    def plain(dtype: torch.dtype, compiled: bool = False) -> Callable[[Checkpoint, int], PlainModel]:
        return lambda checkpoint, slots: PlainModel(checkpoint, slots, device=device, dtype=dtype, compiled=compiled)

    if device.type == "cpu":
        return {"torch float32": plain(torch.float32)}
    return {
        "torch FP16": plain(torch.float16),
        "torch BF16": plain(torch.bfloat16),
        "torch BF16, compiled": plain(torch.bfloat16, True),
        "packed": lambda checkpoint, slots: PackedModel(checkpoint, slots, device=device),
    }


def cost(walk: PlainModel | PackedModel, config: ModelConfig, tokens: int, position: int) -> tuple[int, int]:
    """Bytes and multiply-accumulates of a step."""
    if isinstance(walk, PackedModel):
        sizes = {"weights": walk.layer_bytes, "head": walk.head.size}
        slot, row = 2 * (config.head_dim + 4), 4 * config.hidden
    else:
        width = walk.dtype.itemsize
        sizes = {"weights": width * config.linear_weights, "head": width * config.head_weights}
        slot, row = 2 * width * config.head_dim, width * config.hidden
    size = step_bytes(config, **sizes, slot_bytes=slot, row_bytes=row, tokens=tokens, position=position, heads=1)
    return size.total, step_macs(config, tokens=tokens, position=position, heads=1)


def measure_model(
    path: str, walk: PlainModel | PackedModel, name: str, prompt: int, count: int, ceiling: roofline.Roofline, meter: EnergyMeter
) -> ModelRow:
    """One prefill and ``count`` decode steps, each once before the clock runs."""
    config = walk.config
    ids = np.random.default_rng(0).integers(0, config.vocab, prompt).tolist()

    def prefill() -> float:
        began = perf_counter()
        walk.step(ids, 0)
        walk.token()  # waits
        return perf_counter() - began

    def decode() -> float:
        began = perf_counter()
        for position in range(prompt, prompt + count):
            walk.step([walk.token()], position)
        walk.token()
        return perf_counter() - began

    prefill()
    decode()
    ttft = median(prefill() for _ in range(5))
    before = meter.joules()
    decoded = decode()
    after = meter.joules()
    size, macs = cost(walk, config, prompt, 0)
    floors = [cost(walk, config, 1, position) for position in range(prompt, prompt + count)]
    return ModelRow(
        model=name, path=path, prompt=prompt, ttft_ms=1e3 * ttft, prefill_tokens_per_s=prompt / ttft,
        prefill_roofline_share=ceiling.seconds(size=size, macs=macs) / ttft, decode_tokens_per_s=count / decoded,
        decode_roofline_share=sum(ceiling.seconds(size=size, macs=macs) for size, macs in floors) / decoded,
        tokens_per_joule=None if before is None or after is None or after <= before else count / (after - before),
    )  # fmt: skip


def model_table(console: Console, names: list[str], device: torch.device, count: int) -> list[ModelRow]:
    """Whole models on all paths."""
    meter, rows = EnergyMeter(device), []
    ceilings: dict[torch.dtype, roofline.Roofline] = {}
    for name in names:
        checkpoint = checkpoint_of(name)
        for path, make in paths_of(device).items():
            fitting = [prompt for prompt in PROMPTS if prompt + count <= checkpoint.config.max_positions]
            if not fitting:
                fitting = [checkpoint.config.max_positions - count]
            walk = make(checkpoint, max(fitting) + count)
            dtype = torch.int8 if isinstance(walk, PackedModel) else walk.dtype
            if dtype not in ceilings:
                ceilings[dtype] = roofline.measure(device, dtype)
            for prompt in fitting:
                console.print(f"{name}, {path}, prompt {prompt}", highlight=False)
                rows.append(measure_model(path, walk, name, prompt, count, ceilings[dtype], meter))
            del walk
    return rows


def show(console: Console, title: str, rows: list[Any]) -> None:
    """Rows of one dataclass as a table."""
    table = Table(title=title, title_justify="left")
    for name in vars(rows[0]):
        table.add_column(name.replace("_", " "), justify="right", overflow="fold")
    for row in rows:
        values = ["-" if value is None else value for value in vars(row).values()]
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    console.print(table)


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="write all figures as one object")] = None,
    models: Annotated[str, typer.Option(help="models of the end-to-end table")] = f"austen,smollm2,{SHAPE.name}",
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    tokens: Annotated[int, typer.Option(help="decoded tokens of the end-to-end table")] = DECODE_TOKENS,
) -> None:
    """Measure, print, write."""
    progress, place = Console(stderr=True), torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        progress.print(f"error: no CUDA GPU (torch {torch.__version__}): nothing can be measured here", highlight=False)
        raise typer.Exit(ExitCode.DEVICE)
    kernels: list[KernelRow] = []
    ceilings: dict[str, float] = {}
    if place.type == "cuda":
        kernels, ceilings = kernel_table(progress, place)
    rows = model_table(progress, models.split(","), place, tokens)
    console = Console(width=200)
    if kernels:
        show(console, "packed kernels", kernels)
    show(console, "end to end", rows)
    figures = {
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ceilings": ceilings,
        "kernels": [asdict(row) for row in kernels],
        "models": [asdict(row) for row in rows],
    }
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
