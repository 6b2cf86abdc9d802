"""Packing of group-quantised matrices: against the slow packer, bounds, the exponent of a matrix."""

import random

import numpy as np
import pytest

from cosim.slow_group_pack import matrix_payload
from host_driver.group_pack import groups_payload_bytes, matrix_exponent, pack_groups
from host_driver.weights import GroupMatrix
from spec.config import K_GROUP, GroupEngine, GroupMatmulConfig


def config(engine: GroupEngine) -> GroupMatmulConfig:
    return GroupMatmulConfig(engine=engine, lanes=32, dequant_lanes=8, tokens=1, max_k=384, ring_rows=16)


def random_matrix(rng: random.Random, n: int, k: int, bits: int, group: int) -> GroupMatrix:
    source = np.random.default_rng(rng.getrandbits(64))
    scale, minimum = source.standard_normal((2, n, k // group)).astype(np.float16)
    codes = source.integers(0, 1 << bits, (n, k), dtype=np.uint8)
    return GroupMatrix(codes=codes, scale=scale, minimum=minimum, bits=bits, group=group)


CASES = [(engine, bits) for engine in GroupEngine for bits in config(engine).weight_bits]


@pytest.mark.parametrize(("engine", "bits"), CASES)
@pytest.mark.parametrize(("n", "k", "group"), [(32, 32, 32), (70, 384, 128), (1, 64, 64), (33, 96, 32)])
def test_packs_what_the_layout_says(rng: random.Random, engine: GroupEngine, bits: int, n: int, k: int, group: int) -> None:
    cfg, matrix = config(engine), random_matrix(rng, n, k, bits, group)
    scale, minimum = (np.repeat(part, group // K_GROUP, axis=1) for part in (matrix.scale, matrix.minimum))
    payload = pack_groups(matrix, cfg)
    assert payload.tobytes() == matrix_payload(matrix.codes, scale, minimum, bits, cfg)
    assert payload.dtype == np.uint8 and len(payload) == groups_payload_bytes(n, k, bits, cfg)


def test_exponent_of_a_matrix() -> None:
    codes = np.zeros((2, 64), dtype=np.uint8)
    for largest, exponent in ((0.0, 1), (2.0**-24, 1), (2.0**-14, 1), (2.0**-13, 2), (-1.5, 15), (65504.0, 30)):
        small = np.full((2, 2), 2.0**-20, dtype=np.float16)
        other = small.copy()
        other[1, 0] = largest
        for scale, minimum in ((small, other), (other, small)):
            assert matrix_exponent(GroupMatrix(codes=codes, scale=scale, minimum=minimum, bits=4, group=32)) == exponent


def test_refuses_what_the_engine_does_not_take(rng: random.Random) -> None:
    for bits in (1, 2, 3):
        with pytest.raises(ValueError, match=rf"mixpe takes weights of \(4, 8\) bits, not {bits}"):
            pack_groups(random_matrix(rng, 8, 32, bits, 32), config(GroupEngine.MIXPE))


def test_refuses_codes_and_scales_out_of_range(rng: random.Random) -> None:
    cfg, matrix = config(GroupEngine.LUT_TENSOR_CORE), random_matrix(rng, 8, 32, 2, 32)
    matrix.codes[3, 5] = 4
    with pytest.raises(ValueError, match="codes of 2 bits are below 4, not 4"):
        pack_groups(matrix, cfg)
    matrix.codes[3, 5] = 3
    matrix.minimum[2, 0] = np.inf
    with pytest.raises(ValueError, match="must be finite"):
        pack_groups(matrix, cfg)
