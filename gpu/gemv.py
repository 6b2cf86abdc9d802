"""One token: y = W x on packed weights and int8 activations, by byte-wise dot products (dp4a); split-K where rows are few.

Every thread reads 16 bytes of a row at a time, neighbours read neighbours, and a program holds several rows, so that an
activation word is loaded once for all of them. Integer sums of a whole row (matrix or row scales) are exact in int32; with
groups, the sum of a group of 32 is exact, and scale and minimum come behind it.
"""

# A kernel looks like Python to a type checker, and is not.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu.dot import dp4a, half_pair, plane_of_words, trit_step
from gpu.packing import BLOCK_WORDS, PLANE, TRITS_KIND, PackedMatrix, Scaling, planes_of
from gpu.quantise import Activations
from gpu.tuning import Choice, tuned

_TRITS = tl.constexpr(TRITS_KIND)


@triton.jit
def _group_terms(codes, x, group, column, live, x_scale, x_sums, w_scale, rows, row_live, groups, pitch, sums_out,
                 OFFSET: tl.constexpr, SUMS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    """One plane of a tile: integer sums of its groups, then scale and minimum. (BLOCK_N, BLOCK_S) float32."""
    zero = tl.zeros_like(codes)
    words = dp4a(codes, tl.broadcast_to(x[None, :], codes.shape), zero)  # (BLOCK_N, 8 BLOCK_S)
    total = tl.sum(tl.reshape(words, [BLOCK_N, BLOCK_S, 8]), axis=2)  # (BLOCK_N, BLOCK_S), exact
    x_sum = tl.load(x_sums + group, mask=live, other=0)
    total += OFFSET * x_sum[None, :]
    both = row_live[:, None] & live[None, :]
    if SUMS:
        tl.store(sums_out + rows[:, None] * groups + group[None, :], total, mask=both & (group < groups)[None, :])
    pair = tl.load(w_scale + rows[:, None] * pitch + column[None, :], mask=both, other=0, eviction_policy="evict_first")
    scale, minimum = half_pair(pair)
    per_group = tl.load(x_scale + group, mask=live, other=0.0)
    return (scale * total.to(tl.float32) + minimum * x_sum.to(tl.float32)[None, :]) * per_group[None, :]


@triton.jit
def _gemv_kernel(
    words, x, x_scale, x_sums, w_scale, residual, y, sums_out, outputs, blocks, groups, columns,
    BITS: tl.constexpr, PLANES: tl.constexpr, OFFSET: tl.constexpr, GROUPED: tl.constexpr, RUN_PLANES: tl.constexpr,
    PER_ROW: tl.constexpr, RESIDUAL: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    RUNS: tl.constexpr = (PLANES + RUN_PLANES - 1) // RUN_PLANES
    COLUMN_BLOCKS: tl.constexpr = (RUN_PLANES + PLANES - 1) // PLANES
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    row_live = rows < outputs
    part = tl.program_id(1)
    steps = tl.cdiv(blocks, BLOCK_S * SPLIT)
    first = part * steps * BLOCK_S
    last = tl.minimum(first + steps * BLOCK_S, blocks)
    place = tl.arange(0, BLOCK_S * 8)
    column = tl.arange(0, BLOCK_S)
    if GROUPED:
        sums = tl.zeros([BLOCK_N, BLOCK_S], dtype=tl.float32)
    else:
        sums = tl.zeros([BLOCK_N, BLOCK_S * 8], dtype=tl.int32)
    for start in range(first, last, BLOCK_S):
        word = start * 8 + place
        live = word < last * 8
        tile = tl.load(
            words + rows[:, None] * (blocks * 8) + word[None, :], mask=row_live[:, None] & live[None, :], other=0,
            eviction_policy="evict_first",
        )  # fmt: skip
        if BITS == _TRITS:
            even, odd = tile & 0x00FF00FF, (tile >> 8) & 0x00FF00FF
        for plane in tl.static_range(PLANES):
            if BITS == _TRITS:
                codes, even, odd = trit_step(even, odd)
            else:
                codes = plane_of_words(tile, plane, BITS)
            inputs = tl.load(
                x + ((start + place // 8) * PLANES + plane) * 8 + place % 8, mask=live, other=0, eviction_policy="evict_last"
            )
            if GROUPED:
                block = start + column
                run_column = (plane // RUN_PLANES) * columns + block // COLUMN_BLOCKS
                sums += _group_terms(
                    codes, inputs, block * PLANES + plane, run_column, block < last, x_scale, x_sums, w_scale, rows, row_live,
                    groups, RUNS * columns, sums_out, OFFSET, SUMS, BLOCK_N, BLOCK_S,
                )  # fmt: skip
            else:
                sums = dp4a(codes, tl.broadcast_to(inputs[None, :], codes.shape), sums)
    total = tl.sum(sums, axis=1)  # (BLOCK_N,)
    if SPLIT > 1:  # the offset and all scales wait for the other parts
        tl.store(y + part * outputs + rows, total, mask=row_live)
    else:
        if not GROUPED:
            total += OFFSET * tl.load(x_sums)
            if SUMS:
                tl.store(sums_out + rows, total, mask=row_live)
            if PER_ROW:
                scale = tl.load(w_scale + rows, mask=row_live, other=0.0)
            else:
                scale = tl.load(w_scale)
            total = total.to(tl.float32) * scale * tl.load(x_scale)
        if RESIDUAL:
            total += tl.load(residual + rows, mask=row_live, other=0.0)
        tl.store(y + rows, total, mask=row_live)


@triton.jit
def _finish_kernel(
    parts, x_scale, x_sums, w_scale, residual, y, sums_out, outputs, tokens,
    OFFSET: tl.constexpr, GROUPED: tl.constexpr, PER_ROW: tl.constexpr, RESIDUAL: tl.constexpr, SUMS: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the parts of a split product in order, then scales: parts (SPLIT, tokens, outputs) -> y (tokens, outputs)."""
    token = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = rows < outputs
    here = token * outputs + rows
    total = tl.load(parts + here, mask=live, other=0)
    for part in tl.static_range(1, SPLIT):
        total += tl.load(parts + part * tokens * outputs + here, mask=live, other=0)
    if not GROUPED:
        total += OFFSET * tl.load(x_sums + token)
        if SUMS:
            tl.store(sums_out + here, total, mask=live)
        if PER_ROW:
            scale = tl.load(w_scale + rows, mask=live, other=0.0)
        else:
            scale = tl.load(w_scale)
        total = total.to(tl.float32) * scale * tl.load(x_scale + token)
    if RESIDUAL:
        total += tl.load(residual + here, mask=live, other=0.0)
    tl.store(y + here, total, mask=live)


FINISH_BLOCK = 256

FEW_PROGRAMS = 1024
"""Below so many programs a card of some hundred multiprocessors is not full."""


def finish(
    parts: Tensor, a: Activations, w: PackedMatrix, residual: Tensor | None, y: Tensor, sums: Tensor | None
) -> None:
    """`_finish_kernel` over parts (split, tokens, outputs)."""
    grid = (triton.cdiv(w.outputs, FINISH_BLOCK), a.tokens)
    _finish_kernel[grid](
        parts, a.scale, a.sums, w.scale, y if residual is None else residual, y, y if sums is None else sums,
        w.outputs, a.tokens, OFFSET=w.offset, GROUPED=w.scaling is Scaling.GROUP, PER_ROW=w.scaling is Scaling.ROW,
        RESIDUAL=residual is not None, SUMS=sums is not None, SPLIT=parts.shape[0], BLOCK=FINISH_BLOCK,
    )  # fmt: skip


def check(a: Activations, w: PackedMatrix) -> None:
    """Raises ValueError where activations and weights do not belong together."""
    grouped = w.scaling is Scaling.GROUP
    if a.grouped != grouped or a.q.shape[1] != w.padded:
        raise ValueError(
            f"a {w.scaling} matrix of {w.padded} padded inputs takes activations of that length with scales per "
            f"{'group' if grouped else 'token'}, not {a.q.shape[1]} with scales per {'group' if a.grouped else 'token'}"
        )


def sums_like(w: PackedMatrix, tokens: int, device: torch.device) -> Tensor:
    """Room for integer sums: (tokens, outputs), with groups (tokens, outputs, inputs / 32)."""
    groups = (w.inputs // PLANE,) if w.scaling is Scaling.GROUP else ()
    return torch.empty((tokens, w.outputs, *groups), dtype=torch.int32, device=device)


_TILINGS = ((4, 64, 4), (8, 64, 4), (8, 32, 2), (16, 32, 4), (4, 128, 8), (2, 64, 4), (8, 16, 1), (4, 16, 1))
"""(outputs, blocks, warps) of a program; a warp reads 16 blocks of a row at once."""


def candidates(w: PackedMatrix) -> list[Choice]:
    """Tilings worth trying; K is split where programs of whole rows would leave a large card half empty."""
    most = max(16, triton.next_power_of_2(w.words.shape[1] // BLOCK_WORDS))
    return [
        Choice(rows=rows, columns=columns, split=split, warps=warps, stages=2)
        for rows, columns, warps in _TILINGS
        for split in (1, 4)
        if columns * split <= most and (split == 1 or w.outputs // rows < FEW_PROGRAMS)
    ]


def gemv(
    a: Activations, w: PackedMatrix, *, residual: Tensor | None = None, sums: Tensor | None = None,
    choice: Choice | None = None,
) -> Tensor:
    """y (1, outputs) float32 = W a (+ residual) for one token.

    ``sums``: see `sums_like`; filled with the exact integer sums. ``choice``: a tiling; None: the tuned one.
    """
    check(a, w)
    if a.tokens != 1:
        raise ValueError(f"a GEMV takes one token, not {a.tokens}")
    if choice is None:
        key = ("gemv", w.bits, w.scaling.value, w.outputs, w.padded)
        choice = tuned(key, lambda: candidates(w), lambda option: gemv(a, w, choice=option), a.q.device)
    y = torch.empty(1, w.outputs, dtype=torch.float32, device=a.q.device)
    grouped = w.scaling is Scaling.GROUP
    out = y
    if choice.split > 1:
        dtype = torch.float32 if grouped else torch.int32
        out = torch.empty(choice.split, 1, w.outputs, dtype=dtype, device=y.device)
    grid = (triton.cdiv(w.outputs, choice.rows), choice.split)
    _gemv_kernel[grid](
        w.words, a.q.view(torch.int32), a.scale, a.sums, w.scale, y if residual is None else residual, out,
        y if sums is None else sums, w.outputs, w.words.shape[1] // BLOCK_WORDS, w.inputs // PLANE,
        w.scale.shape[-1],
        BITS=w.bits, PLANES=planes_of(w.bits), OFFSET=w.offset, GROUPED=grouped, RUN_PLANES=max(1, w.group // PLANE),
        PER_ROW=w.scaling is Scaling.ROW, RESIDUAL=residual is not None, SUMS=sums is not None,
        BLOCK_N=choice.rows, BLOCK_S=choice.columns, SPLIT=choice.split, num_warps=choice.warps, num_stages=choice.stages,
    )  # fmt: skip
    if choice.split > 1:
        finish(out, a, w, residual, y, None if grouped else sums)
    return y
