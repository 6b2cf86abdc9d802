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


K_GROUP = 32
"""Weights of a row that share a scale and a minimum in memory, and activations of a token that share a scale: ggml's
block. Weight groups of 64 and 128 are stored as two and four groups of 32 with equal scales."""

WEIGHT_SCALE_BITS = 11
"""Significand of an FP16 weight scale, hidden bit included."""

ACT_SCALE_BITS = 8
"""Significand of a bfloat16 activation scale, hidden bit included."""

ALIGN_BITS = 8
"""Fraction bits below a group's products (docs/numerics.md section 3b)."""


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


class KvFormat(StrEnum):
    """Number format of the KV cache. Every K and V row has an FP32 scale of its own (docs/numerics.md section 1)."""

    INT8 = "int8"
    """K and V int8"""
    K8V4 = "k8v4"
    """K int8, V int4"""
    INT4 = "int4"
    """K and V int4: for models whose K has no outlier channels (docs/results.md)"""

    @property
    def k_bits(self) -> int:
        """Bits of an element of K."""
        return 4 if self is KvFormat.INT4 else 8

    @property
    def v_bits(self) -> int:
        """Bits of an element of V."""
        return 8 if self is KvFormat.INT8 else 4


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

    @property
    def row_beats(self) -> int:
        """Beats of `LANES` sums in which a row of ``outputs`` sums leaves."""
        return self.outputs // LANES

    @property
    def result_rows(self) -> int:
        """Rows of finished sums that wait to leave: an eighth of the ring, a power of two, at least 16.

        A pass that finishes its sums leaves half of its rows behind when a row takes two beats. 16 cover the way of a
        row from its issue to its last beat.
        """
        return max(16, 1 << (ceil_div(self.ring_rows, 8) - 1).bit_length())

    def last_group(self, k_blocks: int, row_blocks: int) -> int:
        """K blocks at the end of an operation that each token of the tile takes one after the other.

        Sums are finished in the last of them. With ``row_beats`` blocks they leave as quickly as they come, token by
        token. All their rows stay in the ring, which must have half a strip of room for what comes next.
        """
        return min(self.row_beats, k_blocks) if row_blocks <= self.group_rows else 1

    @property
    def group_rows(self) -> int:
        """Largest number of row blocks of which ``row_beats`` and a half strips fit into the ring.

        The ring claims rows five at a time, so all but four of its rows are sure to hold what an operation keeps.
        """
        return min(2 * self.ring_rows // (2 * self.row_beats + 1), (self.ring_rows - 4) // self.row_beats)

    def max_n(self, tokens: int) -> int:
        """Largest number of output rows of one operation on so many tokens."""
        blocks = self.acc_rows // tokens
        if tokens > 1:  # the strip is replayed for each token from the ring
            blocks = min(blocks, self.ring_rows // 2)
        return blocks * self.outputs


class GroupEngine(StrEnum):
    """What computes the integer sum of a group of 32."""

    LUT_TENSOR_CORE = "lut_tensor_core"
    MIXPE = "mixpe"
    MULTIPLIER = "multiplier"


@dataclass(frozen=True, kw_only=True)
class GroupMatmulConfig:
    """Engine of group-quantised matrices: blocks of ``lanes`` outputs by 32 inputs, a code row of them a cycle.

    A code row has ``32 * lanes`` bits. The table engine takes one bit plane of a block from it, so that B-bit weights
    take B cycles; the 4-bit engines take 4-bit codes of ``lanes / 4`` outputs.
    """

    engine: GroupEngine
    lanes: int
    dequant_lanes: int
    """Group sums that are scaled and accumulated a cycle."""
    tokens: int
    """Tokens of a prefill tile (M): weights are read once for so many."""
    max_k: int
    """Longest input vector."""
    ring_rows: int
    """Code rows that are buffered on chip, and so many scale rows: prefetch depth."""
    full_table: bool = False
    """LUT_TENSOR_CORE: True: 16 entries, no sign logic (quicker to simulate). False: 8 entries and a sign."""

    def __post_init__(self) -> None:
        _require(self.lanes % (4 * LANES) == 0, f"lanes must be a multiple of {4 * LANES}, not {self.lanes}")
        _require(
            self.dequant_lanes % LANES == 0 and self.lanes % self.dequant_lanes == 0,
            f"dequant_lanes must be a multiple of {LANES} that divides lanes, not {self.dequant_lanes}",
        )
        if self.engine is not GroupEngine.LUT_TENSOR_CORE:
            _require(self.dequant_lanes == self.lanes // 4, f"{self.engine} needs dequant_lanes = lanes / 4")
        _require(self.max_k % K_GROUP == 0, f"max_k must be a multiple of {K_GROUP}, not {self.max_k}")
        _require(self.ring_rows >= 2 * 8, f"the ring must hold two blocks of 8 rows, not {self.ring_rows} rows")

    @property
    def outputs(self) -> int:
        """Output rows of a block."""
        return self.lanes

    @property
    def k_block(self) -> int:
        """Activations of a block."""
        return K_GROUP

    @property
    def max_k_blocks(self) -> int:
        """Groups of the longest vector."""
        return self.max_k // K_GROUP

    @property
    def slices(self) -> int:
        """Cycles in which a block's sums are scaled and accumulated."""
        return self.lanes // self.dequant_lanes

    @property
    def row_bytes(self) -> int:
        """Bytes of a code row, and of a scale row: FP16 scale and minimum of ``lanes`` outputs."""
        return self.lanes * K_GROUP // 8

    @property
    def weight_bits(self) -> tuple[int, ...]:
        """Weight widths that the engine takes."""
        return (1, 2, 3, 4, 8) if self.engine is GroupEngine.LUT_TENSOR_CORE else (4, 8)

    @property
    def macs_per_cycle(self) -> int:
        """Multiply-accumulates of 4-bit weights a cycle."""
        return self.lanes * K_GROUP // 4

    @property
    def sum_bits(self) -> int:
        """Bits of a group's integer sum: |sum a q| <= 32 * 127 * 255, and a sign."""
        return (K_GROUP * 127 * 255).bit_length() + 1

    @property
    def term_bits(self) -> int:
        """Bits of a group's scaled term before the activation scale: sum * scale + activations * minimum, aligned."""
        return self.sum_bits + WEIGHT_SCALE_BITS + ALIGN_BITS + 1

    @property
    def acc_bits(self) -> int:
        """Accumulator width that cannot overflow: term times activation significand, once a group."""
        return self.term_bits + ACT_SCALE_BITS + self.max_k_blocks.bit_length()

    def max_n(self, tokens: int) -> int:
        """Largest number of output rows of one operation: sums leave block by block, so any number."""
        return 0xFFFF * self.lanes if tokens else 0

    def block_rows(self, bits: int) -> int:
        """Rows of a block in the stream: its scales, then its codes."""
        return 1 + bits

    def matmul_cycles(self, k: int, n: int, *, bits: int, tokens: int = 1) -> int:
        """Cycles of an n x k matrix: computing and scaling, or the rows of the stream at one a cycle."""
        blocks = ceil_div(k, K_GROUP) * ceil_div(n, self.lanes)
        return blocks * max(tokens * max(bits, self.slices), self.block_rows(bits))


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
    matmul: TlmmConfig | GroupMatmulConfig
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
    max_channels: int = 0
    """Rows of a Q or K operation that may have an offset and a shift of their own behind RoPE; 0: none may."""

    def __post_init__(self) -> None:
        beat = self.bus.weight_bytes
        if isinstance(self.matmul, TlmmConfig):
            cells = self.matmul.cells
            _require(
                cells % beat == 0 and cells // beat >= 3,
                f"tables * outputs must be at least 3 weight beats of {beat} cells, and a multiple: {cells}",
            )
        else:
            row = self.matmul.row_bytes
            _require(row % beat == 0, f"a code row of {row} bytes must be a multiple of the weight beat's {beat}")
        _require(beat >= 32, f"weight_bits must be at least 256, not {self.bus.weight_bits}")

    @property
    def tlmm(self) -> TlmmConfig:
        """The ternary engine; only builds that have it may be asked."""
        if not isinstance(self.matmul, TlmmConfig):
            raise TypeError(f"preset {self.name!r} has engine {self.matmul.engine}, not the ternary one")
        return self.matmul

    @property
    def grouped(self) -> bool:
        """Group-quantised weights and activations, instead of ternary weights and a scale a token."""
        return isinstance(self.matmul, GroupMatmulConfig)

    @property
    def row_beats(self) -> int:
        """Beats of the weight port in a code row (group engines)."""
        assert isinstance(self.matmul, GroupMatmulConfig), "only group engines have code rows"
        return self.matmul.row_bytes // self.bus.weight_bytes

    @property
    def ring_banks(self) -> int:
        """Banks of the lookup ring: one beat of the weight port fills one bank of one row."""
        return self.tlmm.cells // self.bus.weight_bytes
