"""Several tokens: Y = X W^T on packed weights and int8 activations by int8 tensor-core products (tl.dot); split-K for few.

The weights stand on the left, (outputs, 32 a block and plane) x (32, tokens): they are unpacked in registers, which is where
the tensor cores take a left operand from, so a weight goes through shared memory only in packed form. With groups, a plane
of 32 is one product of its own, whose exact integer sums are scaled before they are added; otherwise int32 runs over all K.
"""

# A kernel looks like Python to a type checker, and is not.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu.dot import half_pair, masked_shift
from gpu.gemv import FEW_PROGRAMS, check, finish
from gpu.packing import BLOCK_WORDS, PLANE, TRITS_KIND, PackedMatrix, Scaling, planes_of
from gpu.quantise import Activations
from gpu.tuning import Choice, tuned

_TRITS = tl.constexpr(TRITS_KIND)


@triton.jit
def next_trits(rest):
    """The next plane of base-243 bytes, given as int16, and what is left of them."""
    rest *= 3
    return (rest >> 8).to(tl.int8), rest & 0xFF


@triton.jit
def _gemm_kernel(
    packed, x, x_scale, x_sums, w_scale, residual, y, sums_out, outputs, tokens, blocks, groups, columns,
    BITS: tl.constexpr, PLANES: tl.constexpr, OFFSET: tl.constexpr, GROUPED: tl.constexpr, RUN_PLANES: tl.constexpr,
    PER_ROW: tl.constexpr, RESIDUAL: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, DEPTH: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    RUNS: tl.constexpr = (PLANES + RUN_PLANES - 1) // RUN_PLANES
    COLUMN_BLOCKS: tl.constexpr = (RUN_PLANES + PLANES - 1) // PLANES
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    batch = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    row_live, token_live = rows < outputs, batch < tokens
    both = row_live[:, None] & token_live[None, :]
    part = tl.program_id(2)
    steps = tl.cdiv(blocks, DEPTH * SPLIT)
    first = part * steps * DEPTH
    last = tl.minimum(first + steps * DEPTH, blocks)
    place = tl.arange(0, 32 * DEPTH)
    padded = blocks * PLANES * 32
    if GROUPED:
        sums = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    else:
        sums = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.int32)
    w_tile = packed + rows[:, None] * (blocks * 32) + place[None, :]
    x_tile = x + batch[None, :] * padded + (place // 32 * PLANES * 32 + place % 32)[:, None]
    for block in range(first, last, DEPTH):
        live = block * 32 + place < last * 32
        tile = tl.load(w_tile + block * 32, mask=row_live[:, None] & live[None, :], other=0)  # (BLOCK_N, 32 DEPTH) bytes
        if BITS == _TRITS:
            rest = tile.to(tl.int16) & 0xFF
        for plane in tl.static_range(PLANES):
            if BITS == 8:
                codes = tile
            elif BITS == _TRITS:
                codes, rest = next_trits(rest)
            else:
                codes = masked_shift(tile, plane * BITS, (1 << BITS) - 1)
            group = block * PLANES + plane
            inputs = tl.load(x_tile + group * 32, mask=token_live[None, :] & live[:, None], other=0)  # (32 DEPTH, BLOCK_M)
            if GROUPED:
                total = tl.dot(codes, inputs, out_dtype=tl.int32)
                x_place = batch * (blocks * PLANES) + group
                x_sum = tl.load(x_sums + x_place, mask=token_live, other=0)
                per_group = tl.load(x_scale + x_place, mask=token_live, other=0.0)
                total += OFFSET * x_sum[None, :]
                if SUMS:
                    here = (batch[None, :] * outputs + rows[:, None]) * groups + group
                    in_matrix = rows < tl.where(group < groups, outputs, 0)
                    tl.store(sums_out + here, total, mask=in_matrix[:, None] & token_live[None, :])
                column = (plane // RUN_PLANES) * columns + block // COLUMN_BLOCKS
                pair = tl.load(w_scale + rows * (RUNS * columns) + column, mask=row_live, other=0)
                scale, minimum = half_pair(pair)
                sums += scale[:, None] * (total.to(tl.float32) * per_group[None, :])
                sums += minimum[:, None] * (x_sum.to(tl.float32) * per_group)[None, :]
            else:
                sums = tl.dot(codes, inputs, acc=sums, out_dtype=tl.int32)
    here = batch[None, :] * outputs + rows[:, None]
    if SPLIT > 1:
        tl.store(y + part.to(tl.int64) * tokens * outputs + here, sums, mask=both)
    else:
        if not GROUPED:
            sums += OFFSET * tl.load(x_sums + batch, mask=token_live, other=0)[None, :]
            if SUMS:
                tl.store(sums_out + here, sums, mask=both)
            if PER_ROW:
                scale = tl.load(w_scale + rows, mask=row_live, other=0.0)[:, None]
            else:
                scale = tl.load(w_scale)
            sums = sums.to(tl.float32) * scale * tl.load(x_scale + batch, mask=token_live, other=0.0)[None, :]
        if RESIDUAL:
            sums += tl.load(residual + here, mask=both, other=0.0)
        tl.store(y + here, sums, mask=both)


def candidates(w: PackedMatrix, tokens: int) -> list[Choice]:
    """Tilings worth trying: up to 128 x 128 results a program; K is split where there are few of them."""
    columns = min(128, max(16, triton.next_power_of_2(tokens)))
    blocks = w.words.shape[1] // BLOCK_WORDS
    depth = 1 if w.scaling is Scaling.GROUP else 2
    return [
        Choice(rows=rows, columns=columns, split=split, depth=depth, warps=warps, stages=stages)
        for rows in (64, 128)
        for split in (1, 4)
        if split == 1
        or (triton.cdiv(w.outputs, rows) * triton.cdiv(tokens, columns) < FEW_PROGRAMS // split and blocks >= 4 * split)
        for warps, stages in ((4, 3), (8, 3), (4, 4))
    ]


def gemm(
    a: Activations, w: PackedMatrix, *, residual: Tensor | None = None, sums: Tensor | None = None,
    choice: Choice | None = None,
) -> Tensor:
    """Y (tokens, outputs) float32 = a W^T (+ residual); arguments as of `gpu.gemv.gemv`. ``choice.columns``: tokens."""
    check(a, w)
    if choice is None:
        batch = triton.next_power_of_2(a.tokens)  # neighbours share a tiling
        key = ("gemm", w.bits, w.scaling.value, w.outputs, w.padded, batch)
        choice = tuned(key, lambda: candidates(w, a.tokens), lambda option: gemm(a, w, choice=option), a.q.device)
    y = torch.empty(a.tokens, w.outputs, dtype=torch.float32, device=a.q.device)
    grouped = w.scaling is Scaling.GROUP
    out = y
    if choice.split > 1:
        dtype = torch.float32 if grouped else torch.int32
        out = torch.empty(choice.split, *y.shape, dtype=dtype, device=y.device)
    grid = (triton.cdiv(w.outputs, choice.rows), triton.cdiv(a.tokens, choice.columns), choice.split)
    _gemm_kernel[grid](
        w.words.view(torch.int8), a.q, a.scale, a.sums, w.scale, y if residual is None else residual, out,
        y if sums is None else sums, w.outputs, a.tokens, w.words.shape[1] // BLOCK_WORDS, w.inputs // PLANE,
        w.scale.shape[-1], BITS=w.bits, PLANES=planes_of(w.bits), OFFSET=w.offset, GROUPED=grouped,
        RUN_PLANES=max(1, w.group // PLANE), PER_ROW=w.scaling is Scaling.ROW, RESIDUAL=residual is not None,
        SUMS=sums is not None, BLOCK_N=choice.rows, BLOCK_M=choice.columns,
        DEPTH=1 if grouped else choice.depth, SPLIT=choice.split,
        num_warps=choice.warps, num_stages=choice.stages,
    )  # fmt: skip
    if choice.split > 1:
        finish(out, a, w, residual, y, None if grouped else sums)
    return y
