"""Group-quantised weights times FP16 activations (W4 A16): GEMV with the scale behind the group's sum, GEMM in front of it.

The GEMV adds a group's 32 products ``code * x`` in float32 and applies scale and minimum to the sum. The GEMM turns codes into
FP16 weights in registers, two roundings each, because its tensor-core sums run over all of K.
"""

# A kernel looks like Python to a type checker, and is not.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu.dot import half_pair, masked_shift, plane_of_words
from gpu.gemv import candidates as gemv_candidates
from gpu.packing import BLOCK_WORDS, PLANE, PackedMatrix, Scaling, planes_of
from gpu.tuning import Choice, tuned


@triton.jit
def _half_gemv_kernel(
    words, x, w_scale, y, outputs, blocks, columns,
    BITS: tl.constexpr, PLANES: tl.constexpr, RUN_PLANES: tl.constexpr,
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
    place, column = tl.arange(0, BLOCK_S * 8), tl.arange(0, BLOCK_S)
    sums = tl.zeros([BLOCK_N, BLOCK_S], dtype=tl.float32)
    for start in range(first, last, BLOCK_S):
        word = start * 8 + place
        live = word < last * 8
        tile = tl.load(
            words + rows[:, None] * (blocks * 8) + word[None, :], mask=row_live[:, None] & live[None, :], other=0,
            eviction_policy="evict_first",
        )  # fmt: skip
        block = start + column
        both = row_live[:, None] & (block < last)[None, :]
        for plane in tl.static_range(PLANES):
            codes = plane_of_words(tile, plane, BITS)
            where = ((start + place // 8) * PLANES + plane) * 32 + place % 8
            total = tl.zeros([BLOCK_N, BLOCK_S * 8], dtype=tl.float32)
            x_sums = tl.zeros([BLOCK_S * 8], dtype=tl.float32)
            for byte in tl.static_range(4):
                inputs = tl.load(x + where + 8 * byte, mask=live, other=0.0, eviction_policy="evict_last").to(tl.float32)
                total += ((codes >> (8 * byte)) & 0xFF).to(tl.float32) * inputs[None, :]
                x_sums += inputs
            group = tl.sum(tl.reshape(total, [BLOCK_N, BLOCK_S, 8]), axis=2)
            x_sum = tl.sum(tl.reshape(x_sums, [BLOCK_S, 8]), axis=1)
            run_column = (plane // RUN_PLANES) * columns + block // COLUMN_BLOCKS
            pair = tl.load(
                w_scale + rows[:, None] * (RUNS * columns) + run_column[None, :], mask=both, other=0,
                eviction_policy="evict_first",
            )  # fmt: skip
            scale, minimum = half_pair(pair)
            sums += scale * group + minimum * x_sum[None, :]
    tl.store(y + part * outputs + rows, tl.sum(sums, axis=1), mask=row_live)


@triton.jit
def _half_gemm_kernel(
    packed, x, w_scale, y, outputs, tokens, blocks, columns,
    BITS: tl.constexpr, PLANES: tl.constexpr, RUN_PLANES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    RUNS: tl.constexpr = (PLANES + RUN_PLANES - 1) // RUN_PLANES
    COLUMN_BLOCKS: tl.constexpr = (RUN_PLANES + PLANES - 1) // PLANES
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    batch = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    row_live, token_live = rows < outputs, batch < tokens
    part = tl.program_id(2)
    steps = tl.cdiv(blocks, SPLIT)
    first = part * steps
    last = tl.minimum(first + steps, blocks)
    place = tl.arange(0, 32)
    sums = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    w_tile = packed + rows[:, None] * (blocks * 32) + place[None, :]
    x_tile = x + batch[None, :] * (blocks * PLANES * 32) + place[:, None]
    for block in range(first, last):
        tile = tl.load(w_tile + block * 32, mask=row_live[:, None], other=0)  # (BLOCK_N, 32) bytes
        for plane in tl.static_range(PLANES):
            codes = masked_shift(tile, plane * BITS, (1 << BITS) - 1).to(tl.float16)  # exact
            column = (plane // RUN_PLANES) * columns + block // COLUMN_BLOCKS
            scale, minimum = half_pair(tl.load(w_scale + rows * (RUNS * columns) + column, mask=row_live, other=0))
            weights = codes * scale.to(tl.float16)[:, None] + minimum.to(tl.float16)[:, None]
            inputs = tl.load(x_tile + (block * PLANES + plane) * 32, mask=token_live[None, :], other=0.0)
            sums = tl.dot(weights, inputs, acc=sums)
    here = batch[None, :] * outputs + rows[:, None]
    tl.store(y + part.to(tl.int64) * tokens * outputs + here, sums, mask=row_live[:, None] & token_live[None, :])


def _gemm_candidates(w: PackedMatrix, tokens: int) -> list[Choice]:
    """Tilings of the GEMM."""
    widest = min(128, max(16, triton.next_power_of_2(tokens)))
    return [
        Choice(rows=rows, columns=widest, split=split, warps=warps, stages=stages)
        for rows in (64, 128)
        for split in (1, 4)
        if split == 1 or w.words.shape[1] // BLOCK_WORDS >= 4 * split
        for warps, stages in ((4, 3), (8, 3), (4, 4))
    ]


def prepare_half(x: Tensor, w: PackedMatrix) -> Tensor:
    """x (tokens, inputs) as `half_matmul` takes it: FP16 (tokens, padded), zeros behind the inputs.

    For one token, each 32 activations lie as the bytes of eight words do, first bytes first, so that the GEMV's threads read
    neighbours: place 8b + j holds activation 4j + b.
    """
    padded = torch.nn.functional.pad(x.to(torch.float16), (0, w.padded - x.shape[1]))
    if x.shape[0] == 1:
        padded = padded.view(1, -1, BLOCK_WORDS, 4).transpose(2, 3).reshape(1, -1)
    return padded


def half_matmul(x: Tensor, w: PackedMatrix, *, choice: Choice | None = None) -> Tensor:
    """Y (tokens, outputs) float32 = x W^T for x by `prepare_half`; the GEMV for one token."""
    if w.scaling is not Scaling.GROUP or w.bits == 8:
        raise ValueError(f"FP16 activations go with groups of codes of at most 4 bits, not {w.bits} bits and {w.scaling} scales")
    if x.dtype != torch.float16 or x.shape[1] != w.padded:
        raise ValueError(f"x must be float16 (tokens, {w.padded}), not {x.dtype} {tuple(x.shape)}")
    tokens, one = x.shape[0], x.shape[0] == 1
    if choice is None:
        key = ("half", w.bits, w.outputs, w.padded, triton.next_power_of_2(tokens))
        options = gemv_candidates if one else lambda matrix: _gemm_candidates(matrix, tokens)
        choice = tuned(key, lambda: options(w), lambda option: half_matmul(x, w, choice=option), x.device)
    y = torch.empty(choice.split, tokens, w.outputs, dtype=torch.float32, device=x.device)
    blocks, columns = w.words.shape[1] // BLOCK_WORDS, w.scale.shape[-1]
    shared = {
        "BITS": w.bits, "PLANES": planes_of(w.bits), "RUN_PLANES": w.group // PLANE, "BLOCK_N": choice.rows,
        "SPLIT": choice.split, "num_warps": choice.warps, "num_stages": choice.stages,
    }  # fmt: skip
    if one:
        grid = (triton.cdiv(w.outputs, choice.rows), choice.split)
        _half_gemv_kernel[grid](w.words, x, w.scale, y, w.outputs, blocks, columns, BLOCK_S=choice.columns, **shared)
    else:
        grid = (triton.cdiv(w.outputs, choice.rows), triton.cdiv(tokens, choice.columns), choice.split)
        _half_gemm_kernel[grid](
            w.words.view(torch.int8), x, w.scale, y, w.outputs, tokens, blocks, columns, BLOCK_M=choice.columns, **shared
        )
    return y[0] if choice.split == 1 else y.sum(dim=0)
