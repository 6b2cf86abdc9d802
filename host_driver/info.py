"""Derived numbers of a preset, and of a model on it."""

from rich.table import Table

from host_driver.accounting import CLASSES, cycles_floor, decode_cost
from host_driver.compiler import STEP, CompiledModel
from spec.config import AcceleratorConfig, GroupEngine, GroupMatmulConfig, TlmmConfig
from spec.hashing import spec_hash


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _engine_rows(matmul: TlmmConfig | GroupMatmulConfig) -> list[tuple[str, str]]:
    if isinstance(matmul, TlmmConfig):
        return [
            ("engine", "tlmm"),
            ("lookup tables x outputs", f"{matmul.tables} x {matmul.outputs}"),
            ("entries of a table", "27" if matmul.full_table else "14 and a sign"),
        ]
    rows = [
        ("engine", str(matmul.engine)),
        ("weight bits", ", ".join(map(str, matmul.weight_bits))),
        ("outputs x inputs of a block", f"{matmul.lanes} x {matmul.k_block}"),
        ("group sums scaled a cycle", str(matmul.dequant_lanes)),
    ]
    if matmul.engine is GroupEngine.LUT_TENSOR_CORE:
        rows.append(("entries of a table", "16" if matmul.full_table else "8 and a sign"))
    return rows


def preset_table(build: AcceleratorConfig) -> Table:
    """What a preset's free choices come to."""
    matmul, dram = build.matmul, build.dram
    peak, bandwidth = matmul.macs_per_cycle * build.clock_hz, dram.bytes_per_cycle * build.clock_hz
    kind = "4-bit" if build.grouped else "ternary"
    return _table(
        f"preset {build.name}",
        [
            ("clock", f"{build.clock_hz / 1e6:g} MHz"),
            *_engine_rows(matmul),
            (f"{kind} MACs a cycle", f"{matmul.macs_per_cycle:,}"),
            (f"{kind} MACs a second", f"{peak / 1e9:,.1f} G"),
            ("tokens of a prefill tile", str(matmul.tokens)),
            ("attention lanes", str(build.attention.lanes)),
            ("weight port, data port", f"{build.bus.weight_bits}, {build.bus.data_bits} bits"),
            ("DRAM bandwidth", f"{dram.bytes_per_cycle:g} B a cycle, {bandwidth / 1e9:g} GB/s"),
            ("longest vector", f"{build.max_vector:,}"),
            ("longest head, all heads", f"{build.attention.max_head_dim}, {build.attention.max_q_dim:,}"),
            ("spec hash", f"{spec_hash(build):#018x}"),
        ],
    )


def model_table(compiled: CompiledModel) -> Table:
    """What a model takes on its build."""
    model, build, kv = compiled.model, compiled.accelerator, compiled.kv
    first, last = decode_cost(compiled, 0), decode_cost(compiled, compiled.slots - 1)
    floors = [cycles_floor(compiled, cost) for cost in (first, last)]
    rates = [build.clock_hz / floor for floor in floors]
    return _table(
        f"model {model.name} on {build.name}",
        [
            ("layers, hidden, ffn", f"{model.layers}, {model.hidden:,}, {model.ffn:,}"),
            ("heads, KV heads, head_dim", f"{model.heads}, {model.kv_heads}, {model.head_dim}"),
            ("vocabulary", f"{model.vocab:,}"),
            ("weights of the layers", f"{model.linear_weights:,}"),
            ("weights of the head", f"{model.head_weights:,}"),
            ("KV cache", f"{compiled.slots:,} slots, {compiled.memory['kv'].size:,} B"),
            ("format of K and V, bytes a token", f"int{kv.k_bits}, int{kv.v_bits}, {compiled.kv_token_bytes:,} B"),
            ("tokens of a prefill tile", str(compiled.tile)),
            ("descriptors of a step", str(len(compiled.programs[STEP].instructions))),
            ("device memory", f"{compiled.memory.limit:,} B"),
            ("bytes a token, empty cache", f"{first.total_bytes:,}"),
            *((f"  {name}", f"{getattr(first, name):,}") for name in CLASSES),
            ("bytes a token, full cache", f"{last.total_bytes:,}"),
            ("MACs a token", f"{first.macs:,}"),
            ("fewest cycles a token", f"{floors[0]:,.0f} to {floors[1]:,.0f}"),
            ("most tokens/s", f"{rates[0]:,.1f} to {rates[1]:,.1f}"),
        ],
    )
