"""Attention over an int8 KV cache: rotate, quantise and append; then split-K online softmax and the join of its parts.

Queries, keys and values are int8 with a float32 scale a head and token. ``q . k`` is an exact int8 tensor-core product; the
softmax weights, times the values' scales, are FP16 in the second one (relative 2^-11 each; scaled by the block's largest value
scale, so that none is subnormal that matters). The query heads that share a KV head are rows of one program, times the tokens
of a prefill. How many keys there are is read from device memory: one captured graph serves every position.
"""

# A kernel looks like Python to a type checker, and is not.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from spec.config import ModelConfig

BLOCK_KEYS = 64
"""Keys of one step of the online softmax."""

SPLIT_PROGRAMS = 264
"""Programs to aim at when keys are split: two for each multiprocessor of a large GPU."""

_LOG2_E = tl.constexpr(1.4426950408889634)
_LEAST = tl.constexpr(-1e30)
"""Stands for minus infinity in running maxima, so that a difference of two is a number."""


@dataclass(frozen=True, kw_only=True)
class KvCache:
    """K and V of all layers: int8 (layers, kv_heads, slots, head_dim), scales float32 (layers, kv_heads, slots)."""

    k: Tensor
    v: Tensor
    k_scale: Tensor
    v_scale: Tensor

    @classmethod
    def empty(cls, model: ModelConfig, slots: int, device: torch.device) -> "KvCache":
        """A cache of zeros."""
        shape = (model.layers, model.kv_heads, slots)
        k, v = (torch.zeros(*shape, model.head_dim, dtype=torch.int8, device=device) for _ in range(2))
        k_scale, v_scale = (torch.zeros(shape, device=device) for _ in range(2))
        return cls(k=k, v=v, k_scale=k_scale, v_scale=v_scale)


@triton.jit
def _append_kernel(
    qkv, cos, sin, start, q, q_scale, k, k_scale, v, v_scale, slots,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(start) + token
    pair = tl.arange(0, HALF)
    live = pair < HEAD_DIM // 2
    source = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * HEAD_DIM + 2 * pair
    even = tl.load(source, mask=live, other=0.0).to(tl.float32)
    odd = tl.load(source + 1, mask=live, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        c = tl.load(cos + position * (HEAD_DIM // 2) + pair, mask=live, other=0.0)
        s = tl.load(sin + position * (HEAD_DIM // 2) + pair, mask=live, other=0.0)
        even, odd = even * c - odd * s, even * s + odd * c
    largest = tl.maximum(tl.max(tl.abs(even), axis=0), tl.max(tl.abs(odd), axis=0))
    usable = largest >= 1e-30
    factor = tl.where(usable, 127.0 / tl.maximum(largest, 1e-30), 0.0)
    scale = tl.where(usable, largest / 127.0, 0.0)
    even = (even * factor + 12582912.0) - 12582912.0  # to nearest even, as in gpu/quantise.py
    odd = (odd * factor + 12582912.0) - 12582912.0
    if head < HEADS:
        place = token * HEADS + head
        tl.store(q_scale + place, scale)
        target = q + place * HEAD_DIM + 2 * pair
    elif head < HEADS + KV_HEADS:
        place = (head - HEADS) * slots + position
        tl.store(k_scale + place, scale)
        target = k + place * HEAD_DIM + 2 * pair
    else:
        place = (head - HEADS - KV_HEADS) * slots + position
        tl.store(v_scale + place, scale)
        target = v + place * HEAD_DIM + 2 * pair
    tl.store(target, even.to(tl.int8), mask=live)
    tl.store(target + 1, odd.to(tl.int8), mask=live)


@triton.jit
def _attend_kernel(
    q, q_scale, k, k_scale, v, v_scale, start, out, top, weight, tokens, slots, score_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    kv_head, part = tl.program_id(0), tl.program_id(2)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_live = row < tokens * GROUP
    token = row // GROUP
    place = token * HEADS + kv_head * GROUP + row % GROUP  # of a row's query, among (tokens, heads)
    element = tl.arange(0, WIDTH)
    inside = element < HEAD_DIM
    first_position = tl.load(start)
    position = first_position + token
    query = tl.load(q + place[:, None] * HEAD_DIM + element[None, :], mask=row_live[:, None] & inside[None, :], other=0)
    row_scale = tl.load(q_scale + place, mask=row_live, other=0.0) * (score_scale * _LOG2_E)
    # keys that the last row of this program sees, cut into parts of whole blocks
    last_token = tl.minimum(tl.program_id(1) * ROWS + ROWS - 1, tokens * GROUP - 1) // GROUP
    seen = first_position + last_token + 1
    blocks = tl.cdiv(tl.cdiv(seen, KEYS), SPLIT)
    first = part * blocks * KEYS
    last = tl.minimum(first + blocks * KEYS, seen)
    m = tl.full([ROWS], _LEAST, dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    o = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    for begin in range(first, last, KEYS):
        slot = begin + tl.arange(0, KEYS)
        live = slot < last
        at = kv_head.to(tl.int64) * slots + slot
        keys = tl.load(k + at[None, :] * HEAD_DIM + element[:, None], mask=live[None, :] & inside[:, None], other=0)
        scores = tl.dot(query, keys, out_dtype=tl.int32).to(tl.float32)
        scores *= row_scale[:, None] * tl.load(k_scale + at, mask=live, other=0.0)[None, :]
        scores = tl.where(live[None, :] & (slot[None, :] <= position[:, None]), scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1))
        shrink = tl.exp2(m - m_new)
        p = tl.exp2(scores - m_new[:, None])
        total = total * shrink + tl.sum(p, axis=1)
        values = tl.load(v + at[:, None] * HEAD_DIM + element[None, :], mask=live[:, None] & inside[None, :], other=0)
        value_scale = tl.load(v_scale + at, mask=live, other=0.0)
        largest = tl.maximum(tl.max(value_scale, axis=0), 1e-30)
        w = (p * (value_scale / largest)[None, :]).to(tl.float16)
        o = o * shrink[:, None] + tl.dot(w, values.to(tl.float16)) * largest
        m = m_new
    if SPLIT > 1:
        here = part.to(tl.int64) * tokens * HEADS + place
        tl.store(top + here, m, mask=row_live)
        tl.store(weight + here, total, mask=row_live)
    else:
        here = place.to(tl.int64)
        o = o / total[:, None]
    tl.store(out + here[:, None] * HEAD_DIM + element[None, :], o, mask=row_live[:, None] & inside[None, :])


@triton.jit
def _join_kernel(parts, top, weight, out, count, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr):
    """Softmax parts of a query to its result: parts (SPLIT, count, HEAD_DIM), top, weight (SPLIT, count)."""
    place = tl.program_id(0)
    part = tl.arange(0, SPLIT)
    element = tl.arange(0, WIDTH)
    inside = element < HEAD_DIM
    m = tl.load(top + part * count + place)
    share = tl.exp2(m - tl.max(m, axis=0))
    total = tl.sum(share * tl.load(weight + part * count + place), axis=0)
    where = (part * count + place)[:, None] * HEAD_DIM + element[None, :]
    o = tl.load(parts + where, mask=inside[None, :], other=0.0) * share[:, None]
    tl.store(out + place * HEAD_DIM + element, tl.sum(o, axis=0) / total, mask=inside)


def split_of(model: ModelConfig, tokens: int, slots: int) -> int:
    """Parts of the keys, a power of two: enough programs for one token over a long cache, none for a prefill."""
    if tokens > 1:
        return 1
    most = max(1, slots // (2 * BLOCK_KEYS))
    split = 1
    while 2 * split <= min(most, 64) and split * model.kv_heads < SPLIT_PROGRAMS:
        split *= 2
    return split


def append(
    model: ModelConfig, qkv: Tensor, cos: Tensor, sin: Tensor, start: Tensor, cache: KvCache, layer: int
) -> tuple[Tensor, Tensor]:
    """RoPE, quantise, append: qkv float32 (tokens, (heads + 2 kv_heads) head_dim) -> int8 queries and scales (tokens, heads).

    ``start``: int32 (1,), the position of the first token, in device memory.
    """
    tokens = qkv.shape[0]
    q = torch.empty(tokens, model.heads, model.head_dim, dtype=torch.int8, device=qkv.device)
    q_scale = torch.empty(tokens, model.heads, device=qkv.device)
    _append_kernel[(tokens, model.heads + 2 * model.kv_heads)](
        qkv, cos, sin, start, q, q_scale, cache.k[layer], cache.k_scale[layer], cache.v[layer], cache.v_scale[layer],
        cache.k.shape[2], HEADS=model.heads, KV_HEADS=model.kv_heads, HEAD_DIM=model.head_dim,
        HALF=triton.next_power_of_2(model.head_dim // 2), num_warps=1,
    )  # fmt: skip
    return q, q_scale


def attend(
    model: ModelConfig, q: Tensor, q_scale: Tensor, start: Tensor, cache: KvCache, layer: int, *, split: int | None = None
) -> Tensor:
    """Causal attention of tokens from position ``start`` on, whose K and V are in the cache: float32 (tokens, q_dim)."""
    tokens, slots = q.shape[0], cache.k.shape[2]
    split = split_of(model, tokens, slots) if split is None else split
    out = torch.empty(tokens, model.q_dim, device=q.device)
    parts, shape = out, (split, tokens, model.heads)
    top, weight = (torch.empty(shape, device=q.device) for _ in range(2)) if split > 1 else (out, out)
    if split > 1:
        parts = torch.empty(*shape, model.head_dim, device=q.device)
    width = max(32, triton.next_power_of_2(model.head_dim))
    rows = min(64, max(16, triton.next_power_of_2(tokens * model.group)))
    _attend_kernel[(model.kv_heads, triton.cdiv(tokens * model.group, rows), split)](
        q, q_scale, cache.k[layer], cache.k_scale[layer], cache.v[layer], cache.v_scale[layer], start, parts, top, weight,
        tokens, slots, model.head_dim**-0.5, HEADS=model.heads, GROUP=model.group, HEAD_DIM=model.head_dim, WIDTH=width,
        ROWS=rows, KEYS=BLOCK_KEYS, SPLIT=split, num_warps=4, num_stages=3,
    )  # fmt: skip
    if split > 1:
        _join_kernel[(tokens * model.heads,)](
            parts, top, weight, out, tokens * model.heads, HEAD_DIM=model.head_dim, WIDTH=width, SPLIT=split, num_warps=1
        )
    return out
