"""Activations to int8: (GLU), (RMSNorm), absmax, round; a scale a token, or one for each 32 activations of a token."""

# A kernel looks like Python to a type checker, and is not.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu.packing import PLANE

NONE, SILU, RELU2 = 0, 1, 2
"""Gate functions by which the kernel knows them; NONE: the input is no gate and up."""

_ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and taking it away rounds a small float32 to the nearest integer, halves to even."""

_SMALLEST = tl.constexpr(2.0**-100)
"""A vector whose largest magnitude is below this counts as zero."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """int8 activations of some tokens; the value meant is ``q * scale``."""

    q: Tensor
    """int8 (tokens, padded), zeros behind the inputs"""
    scale: Tensor
    """float32 (tokens,), or (tokens, padded / 32)"""
    sums: Tensor
    """int32 like `scale`: sums of q, by which offsets and minima enter a product"""
    grouped: bool

    @property
    def tokens(self) -> int:
        """Rows of q."""
        return self.q.shape[0]


@triton.jit
def _quantise_kernel(
    x, gain, q, scale, sums, inputs, padded, stride, eps,
    GATE: tl.constexpr, NORM: tl.constexpr, GROUPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    live = k < inputs
    t = tl.load(x + token * stride + k, mask=live, other=0.0).to(tl.float32)
    if GATE != 0:
        up = tl.load(x + token * stride + inputs + k, mask=live, other=0.0).to(tl.float32)
        if GATE == 1:
            small = tl.exp(-tl.abs(t))  # no overflow, whatever t is
            t = t * tl.where(t >= 0, 1.0, small) / (1.0 + small) * up
        else:
            t = tl.maximum(t, 0.0)
            t = t * t * up
    factor = 1.0
    if NORM:
        factor = 1.0 / tl.sqrt(tl.sum(t * t, axis=0) / inputs + eps)
        t *= tl.load(gain + k, mask=live, other=0.0)
    groups = tl.reshape(t, [BLOCK // 32, 32])
    largest = tl.max(tl.abs(groups), axis=1)  # (groups,)
    if not GROUPED:
        largest = tl.max(largest, axis=0)
    # the common factor of the norm cancels in q and goes into the scale
    up_scale = tl.where(largest >= _SMALLEST, 127.0 / tl.maximum(largest, _SMALLEST), 0.0)
    down_scale = tl.where(largest >= _SMALLEST, largest / 127.0, 0.0) * factor
    if GROUPED:
        up_scale = tl.expand_dims(up_scale, 1)
    rounded = (groups * up_scale + _ROUND) - _ROUND
    values = tl.minimum(tl.maximum(rounded, -127.0), 127.0).to(tl.int32)
    totals = tl.sum(values, axis=1)  # (groups,)
    tl.store(q + token * padded + k, tl.reshape(values, [BLOCK]).to(tl.int8), mask=k < padded)
    if GROUPED:
        group = tl.arange(0, BLOCK // 32)
        here = token * (padded // 32) + group
        tl.store(scale + here, down_scale, mask=group < padded // 32)
        tl.store(sums + here, totals, mask=group < padded // 32)
    else:
        tl.store(scale + token, down_scale)
        tl.store(sums + token, tl.sum(totals, axis=0))


def quantise(
    x: Tensor, padded: int, *, grouped: bool, gain: Tensor | None = None, eps: float = 0.0, gate: int = NONE
) -> Activations:
    """int8 of every row of x (tokens, inputs), or with a gate of its GLU: x (tokens, 2 inputs), gates first.

    ``padded``: length of a row of q, a multiple of 32. ``gain`` (inputs,): RMSNorm in front. One program a token.
    """
    tokens, columns = x.shape
    inputs = columns if gate == NONE else columns // 2
    shape = (tokens, padded // PLANE) if grouped else (tokens,)
    result = Activations(
        q=torch.empty(tokens, padded, dtype=torch.int8, device=x.device),
        scale=torch.empty(shape, dtype=torch.float32, device=x.device),
        sums=torch.empty(shape, dtype=torch.int32, device=x.device),
        grouped=grouped,
    )
    block = max(64, triton.next_power_of_2(padded))
    _quantise_kernel[(tokens,)](
        x, x if gain is None else gain, result.q, result.scale, result.sums, inputs, padded, x.stride(0), eps,
        GATE=gate, NORM=gain is not None, GROUPED=grouped, BLOCK=block, num_warps=max(1, min(16, block // 512)),
    )  # fmt: skip
    return result
