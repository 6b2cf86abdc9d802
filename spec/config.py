"""Free choices of a model and of an accelerator; everything else is derived.

Fields are free choices, properties follow from them. A component receives its own part, never the whole.
Sizes carry their unit as a suffix: ``_bits``, ``_bytes``, ``_beats`` (one transfer), ``_rows`` (one memory row).
"""

from dataclasses import dataclass, field
from enum import StrEnum

LANES = 8
"""FP32 lanes of every element-wise datapath. A constant of the numerics, not of a preset: it fixes the order of sums."""

SUM_WAYS = 4
"""Interleaved partial sums of a long reduction (docs/numerics.md): beat b goes to partial sum b mod 4."""

KEY_BLOCK = 16
"""Keys per step of the online softmax. A constant of the numerics: it fixes the order of sums."""

GROUP = 3
"""Activations per lookup table (TeLLMe's G): 3 trits index 27 entries."""

TRITS_PER_BYTE = 5
"""Dense packing: 3^5 = 243 <= 256, 1.6 bit a weight."""

HEAD_PLANES = 5
"""Ternary planes of an 8-bit matrix: balanced ternary of 5 digits covers [-121, 121], one byte a weight."""


def ceil_div(a: int, b: int) -> int:
    """Smallest integer not below a / b, for a >= 0 and b > 0."""
    return -(-a // b)


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


class Activation(StrEnum):
    """Gate function of the GLU: ``h = act(gate) * up``."""

    SILU = "silu"
    RELU2 = "relu2"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Dimensions of a decoder-only transformer of the BitNet b1.58 family.

    ``sub_norms``: RMSNorm in front of the output and down projections, as BitNet b1.58 has them. Without them
    (Llama) the same inputs are quantised as they are.
    """

    name: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    max_positions: int
    activation: Activation = Activation.SILU
    sub_norms: bool = True
    rope_theta: float = 1e4
    rms_eps: float = 1e-5
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab", "hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "max_positions"):
            _require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        for name in ("hidden", "head_dim", "ffn"):
            _require(getattr(self, name) % LANES == 0, f"{name} must be a multiple of {LANES}, not {getattr(self, name)}")
        _require(
            self.heads % self.kv_heads == 0,
            f"heads must be a multiple of kv_heads: {self.heads} % {self.kv_heads} != 0",
        )

    @property
    def q_dim(self) -> int:
        """Rows of the query projection: heads * head_dim."""
        return self.heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Rows of the key and of the value projection: kv_heads * head_dim."""
        return self.kv_heads * self.head_dim

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    @property
    def linear_weights(self) -> int:
        """Ternary weights of all layers, without embedding and head; equals MACs a token in them."""
        per_layer = self.hidden * (2 * self.q_dim + 2 * self.kv_dim) + 3 * self.hidden * self.ffn
        return self.layers * per_layer

    @property
    def head_weights(self) -> int:
        """Weights of the LM head."""
        return self.vocab * self.hidden

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes appended to the KV cache a token: int8 K and V and one FP32 scale each, per layer and KV head."""
        return self.layers * self.kv_heads * (2 * self.head_dim + 8)


@dataclass(frozen=True, kw_only=True)
class TlmmConfig:
    """Ternary table-lookup matmul engine (TeLLMe's TLMM): ``tables`` tables of 3 activations, ``outputs`` lanes each."""

    tables: int
    outputs: int
    full_table: bool
    """True: 27 entries, no sign logic (fits UltraScale+'s 32-deep LUTRAM). False: 14 entries and a sign (ECP5)."""
    tokens: int
    """Tokens of a prefill tile (M): weights are read once for so many."""
    max_k: int
    """Longest input vector."""
    acc_rows: int
    """Accumulator rows of ``outputs`` sums: tokens * row blocks of one operation must fit."""
    ring_rows: int
    """Decoded lookup rows that are buffered on chip: prefetch depth, and twice a replayed strip must fit."""

    def __post_init__(self) -> None:
        _require(self.outputs % LANES == 0, f"outputs must be a multiple of {LANES}, not {self.outputs}")
        _require(self.acc_rows >= self.tokens, f"acc_rows must be at least tokens: {self.acc_rows} < {self.tokens}")

    @property
    def cells(self) -> int:
        """Lookups a cycle: tables * outputs."""
        return self.tables * self.outputs

    @property
    def macs_per_cycle(self) -> int:
        """Ternary multiply-accumulates a cycle: 3 a lookup."""
        return GROUP * self.cells

    @property
    def k_block(self) -> int:
        """Activations that one set of tables covers: 3 * tables."""
        return GROUP * self.tables

    @property
    def max_k_blocks(self) -> int:
        """K blocks of the longest vector."""
        return ceil_div(self.max_k, self.k_block)

    @property
    def act_rows(self) -> int:
        """Rows of 8 bytes that hold one token's padded activations."""
        return ceil_div(self.max_k_blocks * self.k_block, LANES)

    @property
    def fill_cycles(self) -> int:
        """Cycles to fill one set of tables through one write port: 27 or 14."""
        return 27 if self.full_table else 14

    @property
    def entry_bits(self) -> int:
        """Bits of a table entry: the sum of 3 values of [-128, 127] needs 10."""
        return 10

    @property
    def acc_bits(self) -> int:
        """Accumulator width that cannot overflow: |sum| <= max_k * 128 * 121 (five planes), plus the sign."""
        return (self.max_k * 128 * 121).bit_length() + 1

    def matmul_rows(self, k: int, n: int, planes: int = 1) -> int:
        """Lookup rows (beats of ``cells`` lookups) of an n x k matrix."""
        return planes * ceil_div(k, self.k_block) * ceil_div(n, self.outputs)

    def max_n(self, tokens: int) -> int:
        """Largest number of output rows of one operation on so many tokens."""
        blocks = self.acc_rows // tokens
        if tokens > 1:  # the strip is replayed for each token from the ring
            blocks = min(blocks, self.ring_rows // 2)
        return blocks * self.outputs


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Streaming attention engine."""

    lanes: int
    """int8 products a cycle of q.k, and FP32 multiply-adds a cycle of p*v; a multiple of 8."""
    max_rows: int
    """Resident query rows: tokens of a tile times query heads that share a KV head."""
    max_head_dim: int
    max_q_dim: int
    """Longest concatenation of all query heads of a token (size of the query buffer)."""

    def __post_init__(self) -> None:
        _require(self.lanes % LANES == 0, f"lanes must be a multiple of {LANES}, not {self.lanes}")
        _require(
            self.max_head_dim % self.lanes == 0,
            f"max_head_dim must be a multiple of lanes: {self.max_head_dim} % {self.lanes} != 0",
        )


@dataclass(frozen=True, kw_only=True)
class BusConfig:
    """The two AXI4 masters: ``w`` reads the weight stream, ``d`` reads and writes everything else."""

    weight_bits: int
    data_bits: int
    addr_bits: int = 40
    max_burst_beats: int = 16
    weight_outstanding: int = 16
    data_outstanding: int = 16

    @property
    def weight_bytes(self) -> int:
        """Bytes of one beat of the weight port."""
        return self.weight_bits // 8

    @property
    def data_bytes(self) -> int:
        """Bytes of one beat of the data port."""
        return self.data_bits // 8


@dataclass(frozen=True, kw_only=True)
class DramConfig:
    """Memory model of the simulation (cosim); no part of the hardware."""

    bytes_per_cycle: float
    """Sustained bandwidth shared by both ports."""
    latency_cycles: int
    refresh_interval_cycles: int = 0
    """0: no refresh."""
    refresh_cycles: int = 0


@dataclass(frozen=True, kw_only=True)
class AcceleratorConfig:
    """Everything that shapes one build of the accelerator."""

    name: str
    clock_hz: int
    tlmm: TlmmConfig
    attention: AttentionConfig
    bus: BusConfig
    dram: DramConfig = field(metadata={"hashed": False})
    vector_rows: int
    """Rows of 8 FP32 of the vector memory (residual, attention output, hidden values of all tokens of a tile)."""
    max_vector: int
    """Longest vector of the norm unit (its gamma buffer)."""
    aux_beats: int
    """Beats of the weight port buffered for norm weights and row scales."""
    max_row_scales: int
    """Output rows of one operation that has a scale a row (the LM head)."""

    def __post_init__(self) -> None:
        beat = self.bus.weight_bytes
        _require(
            self.tlmm.cells % beat == 0 and self.tlmm.cells // beat >= 3,
            f"tables * outputs must be at least 3 weight beats of {beat} cells, and a multiple: {self.tlmm.cells}",
        )
        _require(beat >= 32, f"weight_bits must be at least 256, not {self.bus.weight_bits}")

    @property
    def ring_banks(self) -> int:
        """Banks of the lookup ring: one beat of the weight port fills one bank of one row."""
        return self.tlmm.cells // self.bus.weight_bytes
