"""Named builds. CI, docs, benchmarks and the command line speak only of these."""

from dataclasses import replace

from spec.config import (
    AcceleratorConfig,
    AttentionConfig,
    BusConfig,
    DramConfig,
    GroupEngine,
    GroupMatmulConfig,
    TlmmConfig,
)

TEST = AcceleratorConfig(
    name="test",
    clock_hz=50_000_000,
    matmul=TlmmConfig(
        tables=6, outputs=16, full_table=True, tokens=3, max_k=168, acc_rows=48, ring_rows=40
    ),
    attention=AttentionConfig(lanes=8, max_rows=9, max_head_dim=24, max_q_dim=144),
    bus=BusConfig(weight_bits=256, data_bits=64, weight_outstanding=4, data_outstanding=4),
    dram=DramConfig(bytes_per_cycle=24, latency_cycles=20),
    vector_rows=192,
    max_vector=168,
    aux_beats=48,
    max_row_scales=240,
)
"""Tiny, all dimensions different and few powers of two: 288 MAC/cycle."""

SIM = AcceleratorConfig(
    name="sim",
    clock_hz=100_000_000,
    matmul=TlmmConfig(
        tables=16, outputs=16, full_table=False, tokens=8, max_k=1536, acc_rows=1024, ring_rows=512
    ),
    attention=AttentionConfig(lanes=16, max_rows=64, max_head_dim=64, max_q_dim=512),
    bus=BusConfig(weight_bits=512, data_bits=256),
    dram=DramConfig(bytes_per_cycle=64, latency_cycles=40),
    vector_rows=2560,
    max_vector=1536,
    aux_beats=256,
    max_row_scales=4096,
)
"""The default of ``lutra generate``: 768 MAC/cycle, quick to build and to simulate."""

KV260 = AcceleratorConfig(
    name="kv260",
    clock_hz=250_000_000,
    matmul=TlmmConfig(
        tables=28, outputs=16, full_table=True, tokens=16, max_k=4096, acc_rows=1024, ring_rows=512
    ),
    attention=AttentionConfig(lanes=16, max_rows=64, max_head_dim=128, max_q_dim=2048),
    bus=BusConfig(weight_bits=512, data_bits=256),
    dram=DramConfig(bytes_per_cycle=61.6, latency_cycles=60),
    vector_rows=14336,
    max_vector=4096,
    aux_beats=512,
    max_row_scales=4096,
)
"""TeLLMe's platform: 1,344 ternary MAC/cycle at 250 MHz, DDR4 of 15.4 GB/s effective (61.6 bytes a cycle)."""

TEST_LUT = replace(
    TEST,
    name="test_lut",
    matmul=GroupMatmulConfig(
        engine=GroupEngine.LUT_TENSOR_CORE, lanes=32, dequant_lanes=8, tokens=3, max_k=160, ring_rows=24
    ),
    max_vector=160,
    max_row_scales=0,
    max_channels=144,
)
"""`test` with a group engine: blocks of 32 outputs, four beats of the weight port a code row."""

WIDE = AcceleratorConfig(
    name="wide",
    clock_hz=250_000_000,
    matmul=GroupMatmulConfig(
        engine=GroupEngine.LUT_TENSOR_CORE, lanes=128, dequant_lanes=32, tokens=16, max_k=2560, ring_rows=512,
        full_table=True,
    ),
    attention=AttentionConfig(lanes=16, max_rows=64, max_head_dim=64, max_q_dim=960),
    bus=BusConfig(weight_bits=4096, data_bits=512, max_burst_beats=8),
    dram=DramConfig(bytes_per_cycle=512, latency_cycles=60),
    vector_rows=8960,
    max_vector=2560,
    aux_beats=64,
    max_row_scales=0,
    max_channels=960,
)
"""To simulate models of 100 to 400 million weights fast: 1,024 lookups a cycle (1,024 4-bit or 4,096 1-bit MAC/cycle), a
code row of 512 bytes a beat; tables of 16 entries, which simulate faster than 8 and a sign. The weight port stands for
eight channels of stacked memory; no single AXI4 port is so wide."""


def _with_engine(preset: AcceleratorConfig, engine: GroupEngine, name: str) -> AcceleratorConfig:
    """The same build around another engine of the same MAC/cycle."""
    assert isinstance(preset.matmul, GroupMatmulConfig), "only group engines can be swapped for each other"
    return replace(preset, name=name, matmul=replace(preset.matmul, engine=engine))


TEST_MIXPE = _with_engine(TEST_LUT, GroupEngine.MIXPE, "test_mixpe")
TEST_MULTIPLIER = _with_engine(TEST_LUT, GroupEngine.MULTIPLIER, "test_multiplier")
WIDE_MIXPE = _with_engine(WIDE, GroupEngine.MIXPE, "wide_mixpe")
WIDE_MULTIPLIER = _with_engine(WIDE, GroupEngine.MULTIPLIER, "wide_multiplier")

PRESETS = {
    preset.name: preset
    for preset in (
        TEST, SIM, KV260, TEST_LUT, TEST_MIXPE, TEST_MULTIPLIER, WIDE, WIDE_MIXPE, WIDE_MULTIPLIER,
    )
}  # fmt: skip
