"""Attention over an int8 or int4 KV cache with an online softmax, bit exact: the reference for rtl/attention.py.

docs/numerics.md, section 5, states every operation and its order. Rows (token, query head) are independent, so they
are computed side by side; the slots of a row are taken in order, in blocks of KEY_BLOCK.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from golden.fp import fadd, fexp, fmax, fmul, frecip, fsub, i2f
from spec.config import KEY_BLOCK


@dataclass(frozen=True)
class AttentionState:
    """Online softmax of rows (token, head): largest score m, sum of weights l, weighted sum of values o."""

    m: Tensor
    """[tokens, heads] float32."""
    l: Tensor  # noqa: E741 - its name in the literature
    """[tokens, heads] float32."""
    o: Tensor
    """[tokens, heads, head_dim] float32."""

    @staticmethod
    def empty(tokens: int, heads: int, head_dim: int) -> "AttentionState":
        """The state of rows that saw no slot yet."""
        return AttentionState(
            m=torch.full((tokens, heads), -torch.inf),
            l=torch.zeros(tokens, heads),
            o=torch.zeros(tokens, heads, head_dim),
        )


def attend_state(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor,
    positions: Tensor,
    score_scale: Tensor,
    bias: Tensor | None = None,
    state: AttentionState | None = None,
) -> AttentionState:
    """State of every row after the slots 0 .. its position, on top of `state`.

    q int8 [tokens, heads, head_dim], q_scale [tokens, heads]; k, v int8 [kv_heads, slots, head_dim], of which int4 uses
    [-8, 7]; k_scale, v_scale [kv_heads, slots]; positions [tokens] integers; score_scale a scalar; bias [slots]. Scales and
    bias are float32.
    Query head h reads KV head h // (heads / kv_heads).
    """
    tokens, heads, head_dim = q.shape
    group = heads // k.shape[0]
    cq = fmul(q_scale, score_scale)  # (tokens, heads)
    state = AttentionState.empty(tokens, heads, head_dim) if state is None else state
    m, weight_sum, o = state.m, state.l, state.o
    # one row of keys for each query head
    k, v = (x.to(torch.int32).repeat_interleave(group, 0) for x in (k, v))  # (heads, slots, head_dim)
    k_scale, v_scale = (x.repeat_interleave(group, 0) for x in (k_scale, v_scale))  # (heads, slots)

    for start in range(0, int(positions.max()) + 1, KEY_BLOCK):
        slots = range(start, min(start + KEY_BLOCK, int(positions.max()) + 1))
        visible = {j: (positions >= j)[:, None].expand(tokens, heads) for j in slots}

        # 1. scores: the integer dot product is exact
        scores = {}
        for j in slots:
            dot = (q.to(torch.int32) * k[:, j]).sum(-1)  # (tokens, heads)
            scores[j] = fmul(fmul(i2f(dot), k_scale[:, j]), cq)
            if bias is not None:
                scores[j] = fadd(scores[j], bias[j])

        # 2. new maximum; what was summed so far shrinks to it
        larger = m
        for j in slots:
            larger = torch.where(visible[j], fmax(larger, scores[j]), larger)
        e = fexp(fsub(m, larger))
        weight_sum = torch.where(visible[start], fmul(weight_sum, e), weight_sum)
        o = torch.where(visible[start][..., None], fmul(o, e[..., None]), o)
        m = torch.where(visible[start], larger, m)

        # 3. weights and weighted values, slot by slot
        for j in slots:
            p = fexp(fsub(scores[j], m))
            w = fmul(p, v_scale[:, j])
            weight_sum = torch.where(visible[j], fadd(weight_sum, p), weight_sum)
            o = torch.where(visible[j][..., None], fadd(o, fmul(w[..., None], i2f(v[:, j]))), o)
    return AttentionState(m=m, l=weight_sum, o=o)


def attend(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor,
    positions: Tensor,
    score_scale: Tensor,
    bias: Tensor | None = None,
    state: AttentionState | None = None,
) -> Tensor:
    """Attention output o / l, float32 [tokens, heads, head_dim]; arguments as `attend_state`."""
    return output(attend_state(q, q_scale, k, k_scale, v, v_scale, positions, score_scale, bias, state))


def output(end: AttentionState) -> Tensor:
    """o / l of every row: float32 [tokens, heads, head_dim]."""
    return fmul(end.o, frecip(end.l)[..., None])


def attend_float(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    v_scale: Tensor,
    positions: Tensor,
    score_scale: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The meaning in float64, and the bound of |attend - meaning|: [tokens, heads, head_dim] and [tokens, heads, 1].

    softmax(q.k * scales + bias) v over the slots that the row sees. The bound is `error_bound` with the row's own S
    and slots, times its largest |value|.
    """
    group = q.shape[1] // k.shape[0]
    keys = (k.double() * k_scale.double()[..., None]).repeat_interleave(group, 0)
    values = (v.double() * v_scale.double()[..., None]).repeat_interleave(group, 0)
    plain = torch.einsum("thd,hjd->thj", q.double() * q_scale.double()[..., None], keys) * score_scale.double()
    offset = torch.zeros(k.shape[1], dtype=torch.float64) if bias is None else bias.double()
    seen = torch.arange(k.shape[1])[None, None, :] <= positions[:, None, None]
    weights = torch.softmax((plain + offset).masked_fill(~seen, -torch.inf), -1)
    out = torch.einsum("thj,hjd->thd", weights, values)
    largest_score = (plain.abs() + offset.abs()).masked_fill(~seen, 0).amax(-1)
    largest_value = values.abs().amax(-1)[None].expand(*plain.shape).masked_fill(~seen, 0).amax(-1)
    bound = error_bound(largest_score, (positions + 1)[:, None]) * largest_value
    return out, bound[..., None]


def error_bound(largest_score: Tensor, slots: Tensor) -> Tensor:
    """Largest |attend - meaning| of a row, relative to its largest |value|: S = largest |score| + |bias|, n slots.

    With u = 2**-24, to first order: a score has 3 rounded products and a rounded sum (4 u S in the exponent), the
    differences of maxima telescope and are rounded (4 u S more); each of the nb = ceil(n / 16) rescales adds an exp
    (2u) and a product, a weight an exp and two products. That bounds a weight's relative error, and enters twice, by
    o and by l; so do the n sums. recip and the last product add 3u. The factor 1.01 covers higher orders as long as
    the bound stays below 1e-3; the last term covers weights that exp cuts to zero.
    """
    blocks = (slots + KEY_BLOCK - 1) // KEY_BLOCK
    weight = 8 * largest_score + 3 * blocks + 4
    return 1.01 * 2.0**-24 * (2 * weight + 2 * slots + 3) + slots * 2.0**-125
