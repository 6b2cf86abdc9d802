"""Packs group-quantised blocks the slow way, straight from the text of spec/layout.py: owes nothing to the driver."""

import numpy as np
from numpy.typing import NDArray

from spec.config import K_GROUP, GroupEngine, GroupMatmulConfig, ceil_div

__all__ = ["block_rows", "matrix_payload"]


def block_rows(codes: NDArray[np.uint8], bits: int, cfg: GroupMatmulConfig) -> list[bytes]:
    """The code rows of a block: codes (lanes, 32)."""
    numbers = codes.tolist()
    words = []
    if cfg.engine is GroupEngine.LUT_TENSOR_CORE:
        for plane in reversed(range(bits)):
            word = 0
            for j in range(cfg.lanes):
                for t in range(8):
                    b0, b1, b2, b3 = (numbers[j][4 * t + i] >> plane & 1 for i in range(4))
                    if b3:
                        b0, b1, b2 = 1 - b0, 1 - b1, 1 - b2
                    word |= (b0 + 2 * b1 + 4 * b2 + 8 * b3) << 4 * (8 * j + t)
            words.append(word)
    else:
        quarter = cfg.lanes // 4
        for part in range(4):
            for shift in (4, 0) if bits == 8 else (0,):  # the high nibbles first
                word = 0
                for j in range(quarter):
                    for i in range(K_GROUP):
                        nibble = numbers[part * quarter + j][i] >> shift & 15
                        word |= ((nibble - 8) & 15) << 4 * (32 * j + i)
                words.append(word)
    return [word.to_bytes(cfg.row_bytes, "little") for word in words]


def matrix_payload(
    codes: NDArray[np.uint8],
    scale: NDArray[np.float16],
    minimum: NDArray[np.float16],
    bits: int,
    cfg: GroupMatmulConfig,
) -> bytes:
    """GROUPS payload: codes (n, k), FP16 scale and minimum (n, k / 32)."""
    n, k = codes.shape
    blocks = ceil_div(n, cfg.lanes)
    padded = np.zeros((blocks * cfg.lanes, k), dtype=np.uint8)
    padded[:n] = codes
    data = b""
    for nb in range(blocks):
        for g in range(k // K_GROUP):
            outputs = range(nb * cfg.lanes, (nb + 1) * cfg.lanes)
            for part in (scale, minimum):
                data += b"".join(part[j, g].tobytes() if j < n else b"\0\0" for j in outputs)
            block = padded[nb * cfg.lanes :][: cfg.lanes, g * K_GROUP :][:, :K_GROUP]
            data += b"".join(block_rows(block, bits, cfg))
    return data
