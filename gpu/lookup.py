"""Ternary GEMV by table lookup, as T-MAC, LUT-GEMM and our accelerator do it: do tables pay on a GPU?

Five activations make a table of their 3^5 = 243 signed sums; five weights are one byte, which is the place in the table: one
lookup in shared memory instead of five products. The weights lie table after table, outputs side by side,
``codes[t, n] = sum_i 3^i (W[n, 5t + i] + 1)``, so that the threads of a program read neighbouring bytes and look them up in the
same few tables. K is split among programs, whose exact int32 sums are added in order.
"""

# A kernel looks like Python to a type checker, and is not.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu.gemv import finish
from gpu.packing import PackedMatrix, pack
from gpu.quantise import Activations
from gpu.tuning import Choice, tuned

TABLE_INPUTS = 5
"""Activations of a table."""

ENTRIES = 256
"""Places of a table, of which 243 are used."""


@dataclass(frozen=True, kw_only=True)
class LookupMatrix:
    """A ternary matrix as table places, with the packed form whose scale and shape `finish` needs."""

    codes: Tensor
    """uint8 (tables, outputs)"""
    packed: PackedMatrix

    @property
    def padded(self) -> int:
        """Inputs of whole tables."""
        return self.codes.shape[0] * TABLE_INPUTS


def pack_lookup(matrix: Any, device: torch.device | str = "cpu") -> LookupMatrix:
    """A `TernaryMatrix` as table places; weights behind the inputs are zero."""
    outputs, inputs = matrix.values.shape
    tables = -(-inputs // TABLE_INPUTS)
    digits = np.ones((outputs, tables * TABLE_INPUTS), dtype=np.int64)
    digits[:, :inputs] = matrix.values.astype(np.int64) + 1
    places = digits.reshape(outputs, tables, TABLE_INPUTS) @ 3 ** np.arange(TABLE_INPUTS)
    codes = torch.from_numpy(np.ascontiguousarray(places.T.astype(np.uint8))).to(device)
    return LookupMatrix(codes=codes, packed=pack(matrix, device=device))


@triton.jit
def _lookup_kernel(
    codes, x, parts, outputs, tables, padded,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    table, entry = tl.arange(0, BLOCK_T), tl.arange(0, 256)
    steps = tl.cdiv(tables, BLOCK_T * SPLIT)
    first = part * steps * BLOCK_T
    last = tl.minimum(first + steps * BLOCK_T, tables)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_live = rows < outputs
    sums = tl.zeros([BLOCK_N], dtype=tl.int32)
    for start in range(first, last, BLOCK_T):
        live = start + table < last
        # 1. tables of signed sums, (BLOCK_T, 256)
        sums_of = tl.zeros([BLOCK_T, 256], dtype=tl.int32)
        rest = entry
        for digit in tl.static_range(5):
            at = (start + table) * 5 + digit
            value = tl.load(x + at, mask=live & (at < padded), other=0).to(tl.int32)
            sums_of += value[:, None] * (rest % 3 - 1)[None, :]
            rest = rest // 3
        # 2. one lookup for each table and output, (BLOCK_T, BLOCK_N)
        where = (start + table).to(tl.int64)[:, None] * outputs + rows[None, :]
        place = tl.load(codes + where, mask=live[:, None] & row_live[None, :], other=0).to(tl.int32)
        # all tables are one axis: a gather along an axis that one warp can hold would become shuffles
        entries = tl.reshape(sums_of, [BLOCK_T * 256])
        found = tl.gather(entries, tl.reshape(place + table[:, None] * 256, [BLOCK_T * BLOCK_N]), axis=0)
        sums += tl.sum(tl.reshape(found, [BLOCK_T, BLOCK_N]), axis=0)
    tl.store(parts + part * outputs + rows, sums, mask=row_live)


def _candidates(w: LookupMatrix) -> list[Choice]:
    """Tilings: outputs and tables of a step, parts of K."""
    return [
        Choice(rows=rows, columns=tables, split=split, warps=warps, stages=1)
        for rows, tables, warps in ((512, 8, 8), (1024, 8, 8), (1024, 4, 8), (256, 8, 4))
        for split in (16, 32, 64)
        if tables * split <= w.codes.shape[0]
    ] or [Choice(rows=64, columns=2, split=1, warps=1, stages=1)]


def lookup_gemv(
    a: Activations, w: LookupMatrix, *, residual: Tensor | None = None, sums: Tensor | None = None,
    choice: Choice | None = None,
) -> Tensor:
    """y (1, outputs) float32 = W a (+ residual); ``a`` of one token with a scale a token, any padded length from inputs on."""
    if a.tokens != 1 or a.grouped or a.q.shape[1] < w.packed.inputs:
        raise ValueError(f"a table GEMV takes one token of at least {w.packed.inputs} activations with one scale")
    if choice is None:
        key = ("lookup", w.packed.outputs, w.padded)
        choice = tuned(key, lambda: _candidates(w), lambda option: lookup_gemv(a, w, choice=option), a.q.device)
    outputs, device = w.packed.outputs, a.q.device
    y = torch.empty(1, outputs, dtype=torch.float32, device=device)
    parts = torch.empty(choice.split, 1, outputs, dtype=torch.int32, device=device)
    _lookup_kernel[(triton.cdiv(outputs, choice.rows), choice.split)](
        w.codes, a.q, parts, outputs, w.codes.shape[0], a.q.shape[1],
        BLOCK_N=choice.rows, BLOCK_T=choice.columns, SPLIT=choice.split, num_warps=choice.warps,
    )  # fmt: skip
    finish(parts, signed(a), w.packed, residual, y, sums)
    return y


def signed(a: Activations) -> Activations:
    """The same activations for sums that hold the signs already: no offset is to be taken off."""
    return Activations(q=a.q, scale=a.scale, sums=torch.zeros_like(a.sums), grouped=a.grouped)
