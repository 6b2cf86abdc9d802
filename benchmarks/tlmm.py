"""Table-lookup engine alone, on Verilator: cycles of a 1536 x 1536 matrix and simulated speed.

"alone": from taking an operation to its last beat, "in a row": from the last beat of one to that of the next, "starved":
cycles of it in which the weight stream was late, "above": how many of the others there are above one a lookup row; for
one alone without the one-off collection of activations and fill of tables.
``python -m benchmarks.tlmm [--presets sim,kv260] [--size 1536]`` prints the table that docs/engines/tlmm.md quotes.
Speed is per second of processor time, so other processes on the machine disturb it less.
"""

import argparse
import time

import numpy as np
import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from cosim.bench_tlmm import streamed_engine
from cosim.matmul_harness import MatmulHarness, Operation, build_engine
from cosim.slow_pack import segment
from cosim.streamed_engine import matmul_op
from golden import layout, tlmm
from rtl.tlmm_feed import feed_cycles
from spec.config import LANES, AcceleratorConfig, ceil_div
from spec.layout import DENSE_CODES, SegmentKind
from spec.presets import PRESETS

REPEATS = 3
CYCLES = 300_000
"""Cycles of a measurement, about."""

PREFETCH = 1_000
"""Beats of weights that are there when the first operation begins."""


def measure(config: AcceleratorConfig, size: int, harness: MatmulHarness, tokens: int) -> list[str]:
    """One row of the table: operations one after the other, weights at a beat a cycle."""
    cfg = config.tlmm
    sizes = {"planes": 1, "k_blocks": ceil_div(size, cfg.k_block), "row_blocks": ceil_div(size, cfg.outputs)}
    rows = cfg.matmul_rows(size, size)
    rng = np.random.default_rng(1)
    payload = rng.integers(0, DENSE_CODES, ceil_div(rows, 5) * 3 * cfg.cells, dtype=np.uint8).tobytes()
    planes = torch.from_numpy(layout.unpack_segment(payload, **sizes, tables=cfg.tables, outputs=cfg.outputs))
    x = rng.integers(-128, 128, (tokens, planes.shape[2] + -planes.shape[2] % LANES), dtype=np.int8)
    want = tlmm.matmul(torch.from_numpy(x[:, : planes.shape[2]]), planes).numpy()

    beats = tokens * sizes["row_blocks"] * cfg.row_beats
    first = Operation(payload=matmul_op(**sizes, tokens=tokens), activations=x, beats=beats, prefetch=PREFETCH)
    again = Operation(payload=first.payload, activations=None, beats=beats)
    stream = segment(SegmentKind.TRITS, payload, rows, config.bus.weight_bytes)
    count = max(3, CYCLES // (rows * max(tokens, len(stream) // config.bus.weight_bytes // rows)))
    operations, weights = [first] + [again] * (count - 1), stream * count
    [alone], _ = harness.run(stream, config.bus.weight_bytes, [first])
    best, cycles, results = 0.0, 0, []
    for _ in range(REPEATS):
        start = time.process_time()
        results, cycles = harness.run(weights, config.bus.weight_bytes, operations, overlap=True)
        best = max(best, cycles / (time.process_time() - start))
    for result in (alone, *results):
        if not np.array_equal(result.sums.reshape(want.shape), want):
            raise AssertionError(f"{config.name}: the engine differs from golden")
    ideal = tokens * rows
    one_off = feed_cycles(cfg) + cfg.fill_cycles + 1
    behind, late = results[-1].ended - results[-2].ended, results[-1].starved
    macs = count * ideal * cfg.macs_per_cycle
    return [
        config.name,
        str(tokens),
        f"{ideal:,}",
        f"{alone.cycles:,}",
        f"{alone.starved:,}",
        f"{100 * ((alone.cycles - alone.starved - one_off) / ideal - 1):.2f} %",
        f"{behind:,}",
        f"{late:,}",
        f"{100 * ((behind - late) / ideal - 1):.2f} %",
        f"{best / 1e3:,.0f}",
        f"{best * macs / cycles / 1e6:,.0f}",
    ]


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tlmm", description=main.__doc__)
    parser.add_argument("--presets", default="sim,kv260")
    parser.add_argument("--size", type=int, default=1536, help="rows and columns of the matrix")
    options = parser.parse_args(arguments)
    table = Table(title=f"{options.size} x {options.size} ternary, weights at a beat a cycle", box=MARKDOWN)
    headings = ["preset", "tokens", "lookup rows", "alone", "starved", "above", "in a row", "starved", "above", "kcycles/s"]
    for heading in [*headings, "M MAC/s"]:
        table.add_column(heading, justify="left" if heading == "preset" else "right")
    for name in options.presets.split(","):
        config = PRESETS[name]
        harness = MatmulHarness(build_engine(streamed_engine(config)))
        tile = min(config.tlmm.tokens, config.tlmm.acc_rows // ceil_div(options.size, config.tlmm.outputs))
        for tokens in (1, tile):
            table.add_row(*measure(config, options.size, harness, tokens))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
