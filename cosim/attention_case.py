"""Cases of the attention engine: inputs, memory image and expected vector-memory rows, for every simulator."""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from golden.attention import AttentionState, attend, attend_state
from golden.fp import bits_of
from golden.quant import pack_int4
from rtl.attention import Attention
from spec.config import LANES, AttentionConfig
from spec.layout import KvLayout

__all__ = ["ADDR_BITS", "BUILDS", "AttentionBuild", "AttentionCase", "random_case", "steady_cycles"]

ADDR_BITS = 32


@dataclass(frozen=True, kw_only=True)
class AttentionBuild:
    """A build of the engine, and heads that fit it: (head_dim, group, kv_heads)."""

    config: AttentionConfig
    tokens: int
    data_bits: int
    heads: tuple[tuple[int, int, int], ...]

    def engine(self, addr_bits: int) -> Attention:
        """The component."""
        return Attention(self.config, tokens=self.tokens, data_bits=self.data_bits, addr_bits=addr_bits)


BUILDS = {
    # preset `test`: three chunks a head, so a slot waits a cycle
    "test": AttentionBuild(
        config=AttentionConfig(lanes=8, max_rows=9, max_head_dim=24, max_q_dim=144),
        tokens=3,
        data_bits=64,
        heads=((24, 3, 2), (16, 1, 3), (8, 2, 1)),
    ),
    # wide beats, narrow lanes: each beat is several chunks; up to five chunks a head
    "narrow": AttentionBuild(
        config=AttentionConfig(lanes=8, max_rows=7, max_head_dim=40, max_q_dim=160),
        tokens=2,
        data_bits=256,
        heads=((40, 2, 2), (32, 1, 1), (24, 3, 1)),
    ),
    # narrow beats, wide lanes: a chunk is two beats, and two rows of the vector memory
    "wide": AttentionBuild(
        config=AttentionConfig(lanes=16, max_rows=10, max_head_dim=96, max_q_dim=384),
        tokens=5,
        data_bits=64,
        heads=((32, 2, 2), (16, 1, 5), (64, 2, 3), (96, 2, 2), (80, 1, 2)),
    ),
    "widest": AttentionBuild(
        config=AttentionConfig(lanes=32, max_rows=4, max_head_dim=64, max_q_dim=256),
        tokens=4,
        data_bits=128,
        heads=((64, 1, 2), (32, 1, 3)),
    ),
}

_GAP_BYTES = 64
"""Between KV heads, so that a wrong stride shows."""


@dataclass(kw_only=True)
class AttentionCase:
    """One ATTEND operation. ``extreme``: values are the least, 0 or the largest of their format; scales span many octaves.

    ``k_int4``, ``v_int4``: K, V of the cache are int4 in [-8, 7]: all nibbles that memory may hold.
    """

    head_dim: int
    group: int
    kv_heads: int
    tokens: int
    position: int
    slots: int
    seed: int = 0
    extreme: bool = False
    k_int4: bool = False
    v_int4: bool = False
    bias: bool = False
    resume: bool = False
    export: bool = False
    scores: str = "any"
    """"equal": all are 0, so the maximum never grows after the first block; "rising": it grows with every block."""
    kv_address: int = 0x1000
    dst: int = 3
    state: int = 700
    q: Tensor = field(init=False)
    initial: AttentionState | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        heads, slots = self.kv_heads * self.group, self.slots

        def values(*shape: int, int4: bool = False) -> Tensor:
            least, largest = (-8, 7) if int4 else (-127, 127)
            if self.extreme:
                pick = torch.randint(0, 3, shape, generator=generator)
                return torch.tensor([least, 0, largest], dtype=torch.int8)[pick]
            return torch.randint(least, largest + 1, shape, generator=generator, dtype=torch.int8)

        def scales(*shape: int) -> Tensor:
            plain = torch.rand(shape, generator=generator) * 0.02 + 0.001
            if self.extreme:
                plain = plain * 2.0 ** torch.randint(-70, 12, shape, generator=generator)
            return plain

        self.q = values(self.tokens, heads, self.head_dim)
        self.q_scale = scales(self.tokens, heads)
        self.k, self.v = (
            values(self.kv_heads, slots, self.head_dim, int4=int4) for int4 in (self.k_int4, self.v_int4)
        )
        self.k_scale, self.v_scale = scales(self.kv_heads, slots), scales(self.kv_heads, slots)
        if self.scores == "equal":
            self.q = torch.zeros_like(self.q)
        elif self.scores == "rising":
            self.q, self.k = torch.full_like(self.q, 3), torch.full_like(self.k, 5)
            self.k_scale = torch.arange(1, slots + 1).expand_as(self.k_scale).clone() * 1e-3
        self.slot_bias = torch.randn(slots, generator=generator) * 3
        # slots behind the last position hold garbage, which must not matter
        end = self.position + self.tokens
        for garbage in (self.k_scale[:, end:], self.v_scale[:, end:], self.slot_bias[end:]):
            garbage.fill_(torch.nan)
        self.score_scale = torch.tensor(self.head_dim, dtype=torch.float32) ** -0.5
        self.positions = self.position + torch.arange(self.tokens)
        if self.resume:
            self.initial = AttentionState(
                m=torch.randn(self.tokens, heads, generator=generator) * 2,
                l=torch.rand(self.tokens, heads, generator=generator) * 9 + 1,
                o=torch.randn(self.tokens, heads, self.head_dim, generator=generator),
            )

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group

    @property
    def head_beats(self) -> int:
        """Rows of 8 a head."""
        return self.head_dim // LANES

    @property
    def dst_stride(self) -> int:
        """Vector rows between tokens; one more than needed."""
        return self.heads * self.head_beats + 1

    @property
    def layout(self) -> KvLayout:
        """The cache of a KV head."""
        bits = {name: 4 if int4 else 8 for name, int4 in (("k_bits", self.k_int4), ("v_bits", self.v_int4))}
        return KvLayout(slots=self.slots, head_dim=self.head_dim, **bits)

    @property
    def kv_stride(self) -> int:
        """Bytes between KV heads."""
        return self.layout.head_bytes + _GAP_BYTES

    @property
    def bias_address(self) -> int:
        """The bias lies behind the cache."""
        return self.kv_address + self.kv_heads * self.kv_stride

    @property
    def blocks(self) -> int:
        """Blocks of 16 slots up to the last position."""
        return -(-(self.position + self.tokens) // 16)

    @property
    def read_bytes(self) -> int:
        """Bytes that the operation reads."""
        block = 16 * self.layout.slot_bytes + (64 if self.bias else 0)
        return self.kv_heads * self.blocks * block

    def op(self) -> dict[int | str, int]:
        """Fields of the operation."""
        return {
            "resume": self.resume,
            "export": self.export,
            "bias": self.bias,
            "k_int4": self.k_int4,
            "v_int4": self.v_int4,
            "kv_heads": self.kv_heads,
            "group": self.group,
            "head_beats": self.head_beats,
            "dst": self.dst,
            "dst_stride": self.dst_stride,
            "score_scale": int(bits_of(self.score_scale)),
            "state": self.state,
            "kv_address": self.kv_address,
            "kv_stride": self.kv_stride,
            "bias_address": self.bias_address,
            "position": self.position,
            "tokens": self.tokens,
        }

    def memory(self) -> bytes:
        """Memory from address 0 to the end of the bias; gaps are noise."""
        image = bytearray(random.Random(self.seed).randbytes(self.bias_address + 4 * self.slots))
        for head in range(self.kv_heads):
            at = self.kv_address + head * self.kv_stride
            scales = torch.stack((self.k_scale[head], self.v_scale[head]), -1)
            k, v = (pack_int4(x) if int4 else x for x, int4 in ((self.k[head], self.k_int4), (self.v[head], self.v_int4)))
            for part in (k, v, scales):
                raw = part.contiguous().numpy().tobytes()
                image[at : at + len(raw)] = raw
                at += len(raw)
        image[self.bias_address :] = self.slot_bias.numpy().tobytes()
        return bytes(image)

    def query_rows(self) -> list[int]:
        """The query buffer from row 0 on: (token, head, beat), 8 int8 each."""
        raw = self.q.numpy().tobytes()
        return [int.from_bytes(raw[at : at + LANES], "little") for at in range(0, len(raw), LANES)]

    def query_scales(self) -> list[tuple[int, int, int]]:
        """(token, head, FP32 bits)."""
        bits = bits_of(self.q_scale).tolist()
        return [(t, h, bits[t][h]) for t in range(self.tokens) for h in range(self.heads)]

    def _state_rows(self, state: AttentionState) -> dict[int, list[int]]:
        rows = {}
        m, sums, o = (bits_of(x).tolist() for x in (state.m, state.l, state.o))
        for t in range(self.tokens):
            for h in range(self.heads):
                at = self.state + (t * self.heads + h) * (self.head_beats + 1)
                for b in range(self.head_beats):
                    rows[at + b] = o[t][h][LANES * b :][:LANES]
                rows[at + self.head_beats] = [m[t][h], sums[t][h]] + [0] * (LANES - 2)
        return rows

    def vector_rows(self) -> dict[int, list[int]]:
        """Vector-memory rows before the operation: the imported state."""
        return {} if self.initial is None else self._state_rows(self.initial)

    def expected(self) -> dict[int, list[int]]:
        """Rows that the operation writes."""
        args = (self.q, self.q_scale, self.k, self.k_scale, self.v, self.v_scale, self.positions, self.score_scale)
        bias = self.slot_bias if self.bias else None
        if self.export:
            return self._state_rows(attend_state(*args, bias=bias, state=self.initial))
        out = bits_of(attend(*args, bias=bias, state=self.initial)).tolist()
        return {
            self.dst + t * self.dst_stride + h * self.head_beats + b: out[t][h][LANES * b :][:LANES]
            for t in range(self.tokens)
            for h in range(self.heads)
            for b in range(self.head_beats)
        }


PERIOD = 4
"""Cycles of a slot at least."""


def steady_cycles(build: AttentionBuild, case: "AttentionCase", *, rescales: bool) -> int:
    """Cycles by which one more full block makes an operation longer, memory fast enough."""
    period = max(case.head_dim // build.config.lanes, PERIOD)
    slots = 17 if rescales else 16
    rows = case.tokens * case.group
    wait = 0
    if rows == 1:  # until the row's last sums are written
        wait = max(0, (9 if rescales else 6) - period)
    elif rows == 2:
        wait = 2 * max(0, 5 - period)
    return case.kv_heads * (rows * slots * period + wait)


def random_case(rng: random.Random, build: AttentionBuild) -> AttentionCase:
    """A case of any kind that fits the build."""
    head_dim, group, kv_heads = rng.choice(build.heads)
    tokens = rng.randint(1, min(build.tokens, build.config.max_rows // group))
    position = rng.choice([0, rng.randrange(16), rng.randrange(60)])
    slots = -(-(position + tokens) // 16) * 16 + 16 * rng.randrange(3)
    flag = [rng.random() < 0.4 for _ in range(7)]
    return AttentionCase(
        head_dim=head_dim, group=group, kv_heads=kv_heads, tokens=tokens, position=position, slots=slots,
        seed=rng.getrandbits(32), extreme=flag[0], bias=flag[1], resume=flag[2], export=flag[3],
        scores="equal" if flag[4] else "any", k_int4=flag[5], v_int4=flag[6],
        kv_address=64 * rng.randrange(32), dst=rng.randrange(9), state=rng.randrange(700, 720),
    )  # fmt: skip
