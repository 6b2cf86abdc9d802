"""The kernels compile for a Hopper card, which needs no card: the instructions they are written for are there, and no spills."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gpu.gemm import _gemm_kernel
from gpu.gemv import _gemv_kernel
from gpu.half import _half_gemm_kernel, _half_gemv_kernel
from gpu.kv_attention import _append_kernel, _attend_kernel, _join_kernel
from gpu.lookup import _lookup_kernel
from gpu.quantise import _quantise_kernel

POINTERS = dict(
    words="*i32", packed="*i8", x_scale="*fp32", x_sums="*i32", residual="*fp32", y="*fp32", sums_out="*i32", codes="*u8",
    parts="*i32", qkv="*fp32", cos="*fp32", sin="*fp32", start="*i32", q="*i8", q_scale="*fp32", k="*i8", k_scale="*fp32",
    v="*i8", v_scale="*fp32", out="*fp32", top="*fp32", weight="*fp32", gain="*fp32", scale="*fp32", sums="*i32",
    score_scale="fp32", eps="fp32",
)

def ptx(kernel, constants, **types):
    names = kernel.arg_names
    types = POINTERS | types
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] in "*i" and n not in ("start",)}
    source = ASTSource(
        kernel, signature=signature, constexprs={(names.index(n),): value for n, value in constants.items()}, attrs=aligned
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, num_stages=3))
    assert ".local" not in made.asm["ptx"], f"{kernel.__name__} keeps an array in local memory"
    return made.asm["ptx"]

for bits, planes, grouped in ((2, 4, False), (5, 5, False), (8, 1, False), (4, 2, True)):
    shared = dict(
        BITS=bits, PLANES=planes, OFFSET=0 if grouped else -1, GROUPED=grouped, RUN_PLANES=1, PER_ROW=False, RESIDUAL=True,
        SUMS=False, SPLIT=1, BLOCK_N=8,
    )
    w = dict(w_scale="*i32" if grouped else "*fp32")
    text = ptx(_gemv_kernel, shared | dict(BLOCK_S=64), x="*i32", **w)
    assert text.count("dp4a.s32.s32") == 8 * planes * 4, (bits, text.count("dp4a"))
    assert ".v4.b32" in text  # 16 bytes a load
    text = ptx(_gemm_kernel, shared | dict(BLOCK_N=64, BLOCK_M=64, DEPTH=1 if grouped else 2), x="*i8", **w)
    assert "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8" in text
    assert "cp.async" in text
shared = dict(BITS=4, PLANES=2, RUN_PLANES=1, SPLIT=2)
ptx(_half_gemv_kernel, shared | dict(BLOCK_N=8, BLOCK_S=64), x="*fp16", w_scale="*i32")
assert "wgmma" in ptx(_half_gemm_kernel, shared | dict(BLOCK_N=64, BLOCK_M=64), x="*fp16", w_scale="*i32")
text = ptx(_lookup_kernel, dict(BLOCK_N=512, BLOCK_T=8, SPLIT=16), x="*i8")
assert "ld.shared" in text and "shfl.sync.idx" not in text  # tables in shared memory, not in registers
ptx(_quantise_kernel, dict(GATE=1, NORM=True, GROUPED=True, BLOCK=4096), x="*fp32")
ptx(_append_kernel, dict(HEADS=9, KV_HEADS=3, HEAD_DIM=64, HALF=32))
text = ptx(_attend_kernel, dict(HEADS=9, GROUP=3, HEAD_DIM=64, WIDTH=64, ROWS=16, KEYS=64, SPLIT=8))
assert ".s32.s8.s8" in text
ptx(_join_kernel, dict(HEAD_DIM=64, WIDTH=64, SPLIT=8), parts="*fp32")
print("compiled")
"""


@pytest.mark.slow
def test_kernels_compile_for_hopper() -> None:
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout == "compiled\n"
