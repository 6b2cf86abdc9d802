"""The packer against a slow reader written from the words of spec/layout.py alone."""

import numpy as np
import pytest

from host_driver.pack import (
    embedding_table,
    pack_matrix,
    rope_table,
    segment,
    ternary_planes,
    trits_payload_bytes,
)
from spec.config import TlmmConfig
from spec.layout import SegmentKind

# 5 tables, 8 outputs: no dimension below is a multiple of another one.
NARROW = TlmmConfig(tables=5, outputs=8, full_table=True, tokens=1, max_k=90, acc_rows=24, ring_rows=40)
WIDE = TlmmConfig(tables=7, outputs=16, full_table=False, tokens=1, max_k=90, acc_rows=24, ring_rows=40)


def digits(value: int, count: int) -> list[int]:
    """Balanced ternary digits, lowest first, by search: independent of the packer's arithmetic."""
    if count == 0:
        assert value == 0
        return []
    digit = next(d for d in (-1, 0, 1) if (value - d) % 3 == 0)
    return [digit, *digits((value - digit) // 3, count - 1)]


def read_byte(byte: int) -> tuple[list[int], list[int]]:
    """Trits of the group and of the pair of a dense byte, from the formula in the layout's text."""
    g, p = (byte // 8, byte % 8) if byte < 216 else (byte - 216, 8)
    assert g < 27, f"byte {byte} is illegal"
    return digits(g - 13, 3), digits(p - 4, 2)


def slow_unpack(data: bytes, n: int, k: int, planes: int, tlmm: TlmmConfig) -> np.ndarray:
    """The matrix (n, k), weight by weight."""
    cells = tlmm.tables * tlmm.outputs
    k_blocks, row_blocks = -(-k // (3 * tlmm.tables)), -(-n // tlmm.outputs)
    rows: list[list[list[int]]] = []  # lookup rows of cells of three trits
    for base in range(0, len(data), 3 * cells):
        groups, pairs = [], []
        for part in range(3):
            read = [read_byte(byte) for byte in data[base + part * cells : base + (part + 1) * cells]]
            groups.append([group for group, _ in read])
            pairs.append([pair for _, pair in read])
        a, b, c = pairs
        d_row = [[*a[cell], c[cell][0]] for cell in range(cells)]
        e_row = [[*b[cell], c[cell][1]] for cell in range(cells)]
        rows += [*groups, d_row, e_row]
    total = planes * k_blocks * row_blocks
    assert len(rows) == -(-total // 5) * 5
    assert all(cell == [0, 0, 0] for row in rows[total:] for cell in row), "rows of the padding must be zero"
    padded = np.zeros((row_blocks * tlmm.outputs, k_blocks * 3 * tlmm.tables), dtype=np.int64)
    number = 0
    for plane in reversed(range(planes)):
        for kb in range(k_blocks):
            for nb in range(row_blocks):
                for q in range(tlmm.outputs):
                    for t in range(tlmm.tables):
                        at = kb * 3 * tlmm.tables + 3 * t
                        trits = rows[number][q * tlmm.tables + t]
                        padded[nb * tlmm.outputs + q, at : at + 3] += 3**plane * np.array(trits)
                number += 1
    assert not padded[n:].any(), "rows behind the matrix must be zero"
    assert not padded[:, k:].any(), "columns behind the matrix must be zero"
    return padded[:n, :k]


@pytest.mark.parametrize("tlmm", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize(("n", "k"), [(8, 15), (21, 44), (33, 86), (1, 1), (16, 45)])
def test_ternary_matrix_is_read_back_weight_by_weight(tlmm: TlmmConfig, n: int, k: int) -> None:
    values = np.random.default_rng([n, k]).integers(-1, 2, (n, k), dtype=np.int8)
    data = pack_matrix(values, tlmm)
    assert len(data) == trits_payload_bytes(n, k, tlmm)
    np.testing.assert_array_equal(slow_unpack(data.tobytes(), n, k, 1, tlmm), values)


@pytest.mark.parametrize("tlmm", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize(("planes", "limit"), [(2, 4), (5, 121)])
def test_plane_matrix_is_read_back_weight_by_weight(tlmm: TlmmConfig, planes: int, limit: int) -> None:
    n, k = 19, 37
    values = np.random.default_rng(planes).integers(-limit, limit + 1, (n, k), dtype=np.int8)
    values[0, 0], values[-1, -1] = limit, -limit
    data = pack_matrix(values, tlmm, planes)
    assert len(data) == trits_payload_bytes(n, k, tlmm, planes)
    np.testing.assert_array_equal(slow_unpack(data.tobytes(), n, k, planes, tlmm), values)


def test_all_superbeat_bytes_are_legal_for_every_group_in_every_row() -> None:
    tlmm = TlmmConfig(tables=1, outputs=32, full_table=True, tokens=1, max_k=90, acc_rows=24, ring_rows=40)
    groups = np.array([digits(value, 3) for value in range(-13, 14)], dtype=np.int8)
    values = np.concatenate([np.roll(groups, shift, axis=0) for shift in range(5)], axis=1)  # five lookup rows
    data = pack_matrix(values, tlmm)
    assert len(data) == 3 * 32
    assert int(data.max()) < 243
    np.testing.assert_array_equal(slow_unpack(data.tobytes(), 27, 15, 1, tlmm), values)


def test_planes_are_the_digits_of_the_value() -> None:
    values = np.arange(-121, 122, dtype=np.int8)[None]
    planes = ternary_planes(values, 5)
    assert planes.tolist() == np.array([digits(int(value), 5) for value in values[0]]).T[:, None].tolist()


def test_value_beyond_the_planes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^5 ternary planes hold \[-121, 121\], not 122$"):
        ternary_planes(np.array([[-122]], dtype=np.int8), 5)


def test_segment_has_a_header_beat_and_whole_beats_of_payload() -> None:
    payload = np.arange(1, 70, dtype=np.uint8)
    data = segment(SegmentKind.TRITS, payload, beat_bytes=32, rows=11).tobytes()
    assert data[:16] == b"LTRS" + bytes([2, 0, 0, 0, 3, 0, 0, 0, 11, 0, 0, 0])
    assert data[16:32] == bytes(16)
    assert data[32:] == payload.tobytes() + bytes(96 - 69)


def test_embedding_row_is_scale_then_values_in_units_of_32_bytes() -> None:
    rng = np.random.default_rng(7)
    values = rng.integers(-128, 128, (5, 40), dtype=np.int8)
    scale = rng.uniform(0.01, 1, 5).astype(np.float32)
    table = embedding_table(values, scale).tobytes()
    assert len(table) == 5 * 96
    for row in range(5):
        at = 96 * row
        assert table[at : at + 32] == scale[row].tobytes() + bytes(28)
        assert table[at + 32 : at + 96] == values[row].tobytes() + bytes(24)


def test_rope_table_interleaves_cosine_and_sine_of_each_pair() -> None:
    table = rope_table(positions=6, head_dim=16, theta=100.0)
    assert table.dtype == np.float32
    for position in range(6):
        for pair in range(8):
            angle = position * 100.0 ** (-2 * pair / 16)
            assert table[position, 2 * pair] == np.float32(np.cos(angle))
            assert table[position, 2 * pair + 1] == np.float32(np.sin(angle))
