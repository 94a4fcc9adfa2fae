"""The byte layouts, bit by bit and by round trip."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdistill_core import panels
from bitdistill_core.panels import (
    base3_shape,
    pack_base3,
    pack_int8_rows,
    pack_ternary,
    packed_shape,
    panel_scales,
    unpack_base3,
    unpack_int8_rows,
    unpack_ternary,
)


def test_one_line_bit_by_bit() -> None:
    w_ternary = np.zeros((16, 16), np.int8)
    w_ternary[0, 0] = 1  # row 0, k = 0:  byte 0, plane 0: code 2 in bits 0-1
    w_ternary[0, 4] = -1  # row 0, k = 4:  byte 0, plane 1: code 0 in bits 2-3
    w_ternary[0, 12] = 1  # row 0, k = 12: byte 0, plane 3: code 2 in bits 6-7
    w_ternary[0, 11] = 1  # row 0, k = 11: byte 3, plane 2: code 2 in bits 4-5
    w_ternary[8, 1] = -1  # row 8, k = 1:  byte 33, plane 0: code 0 in bits 0-1
    w_ternary[15, 15] = 1  # row 15, k = 15: byte 63, plane 3: code 2 in bits 6-7
    expected = np.full(64, 0b01_01_01_01, np.uint8)
    expected[0] = 0b10_01_00_10
    expected[3] = 0b01_10_01_01
    expected[33] = 0b01_01_01_00
    expected[63] = 0b10_01_01_01
    np.testing.assert_array_equal(pack_ternary(w_ternary), expected.reshape(1, 1, 64))


def test_panels_then_lines() -> None:
    w_ternary = np.zeros((17, 33), np.int8)
    w_ternary[16, 32] = 1
    packed = pack_ternary(w_ternary)
    assert packed.shape == packed_shape(17, 33) == (2, 3, 64)
    assert packed[1, 2, 0] == 0b01_01_01_10
    assert (np.delete(packed.reshape(-1), (3 + 2) * 64) == 0x55).all()


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), k=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def test_unpack_gives_back_what_was_packed(n: int, k: int, seed: int) -> None:
    w_ternary = np.random.default_rng(seed).integers(-1, 2, (n, k)).astype(np.int8)
    packed = pack_ternary(w_ternary)
    assert packed.dtype == np.uint8
    assert packed.flags.c_contiguous
    np.testing.assert_array_equal(unpack_ternary(packed, n, k), w_ternary)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 40), k=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def test_every_byte_is_where_the_formula_says(n: int, k: int, seed: int) -> None:
    w_ternary = np.random.default_rng(seed).integers(-1, 2, (n, k)).astype(np.int8)
    packed = pack_ternary(w_ternary)
    for row in range(n):
        for column in range(k):
            byte = packed[row // 16, column // 16, row % 16 * 4 + column % 4]
            assert (byte >> column % 16 // 4 * 2 & 3) == w_ternary[row, column] + 1


def test_pack_rejects_what_is_not_ternary() -> None:
    with pytest.raises(ValueError, match="needs int8 codes -1, 0 and 1; got dtype=int8 min=-2 max=1"):
        pack_ternary(np.array([[1, -2]], np.int8))
    with pytest.raises(ValueError, match="got dtype=float32"):
        pack_ternary(np.ones((2, 2), np.float32))
    with pytest.raises(ValueError, match=r"a matrix .* that is not empty; got shape="):
        pack_ternary(np.empty((0, 4), np.int8))


def test_scales_lie_panel_by_panel_then_block_by_block() -> None:
    scales = np.arange(1, 19 * 3 + 1, dtype=np.float32).reshape(19, 3)
    by_panel = panel_scales(scales, 19)
    assert by_panel.shape == (2, 3, 16)
    assert by_panel.flags.c_contiguous
    for row in range(32):
        expected = scales[row] if row < 19 else np.zeros(3, np.float32)
        np.testing.assert_array_equal(by_panel[row // 16, :, row % 16], expected)
    np.testing.assert_array_equal(panel_scales(scales[:, 0], 19), panel_scales(scales[:, :1], 19))
    np.testing.assert_array_equal(panel_scales(np.array(3, np.float32), 19), np.full((1, 1, 16), 3, np.float32))


def test_five_bytes_of_a_line_are_four_bytes_of_base_three() -> None:
    w_packed = np.full((1, 1, 64), 0b01_01_01_01, np.uint8)
    w_packed[0, 0, :5] = [0b10_00_01_00, 0b10_00_01_01, 0b10_00_01_10, 0b10_00_01_01, 0b10_00_01_10]
    w_base3 = pack_base3(w_packed)
    assert w_base3.shape == base3_shape(16, 16) == (52,)
    assert w_base3[:4].tolist() == [0 + 3 * 1 + 9 * 2 + 27 * 1 + 81 * 2, 121, 0, 242]
    assert (w_base3[4:] == 121).all()  # code 1, and so is what fills up the last group


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 70), k=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def test_base_three_gives_back_the_packed_bytes(n: int, k: int, seed: int) -> None:
    w_packed = pack_ternary(np.random.default_rng(seed).integers(-1, 2, (n, k)).astype(np.int8))
    w_base3 = pack_base3(w_packed)
    assert (w_base3.dtype, w_base3.shape) == (np.uint8, base3_shape(n, k))
    expanded = unpack_base3(w_base3, n, k)
    np.testing.assert_array_equal(expanded, w_packed)
    assert expanded.flags.c_contiguous
    assert expanded.ctypes.data % 64 == 0


def test_blocks_of_groups_are_expanded_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    w_packed = pack_ternary(np.random.default_rng(0).integers(-1, 2, (100, 40)).astype(np.int8))
    monkeypatch.setattr(panels, "BLOCK_GROUPS", 7)
    np.testing.assert_array_equal(unpack_base3(pack_base3(w_packed), 100, 40), w_packed)


def test_base_three_rejects_another_shape_and_a_byte_of_243() -> None:
    w_base3 = pack_base3(pack_ternary(np.ones((16, 16), np.int8)))
    with pytest.raises(ValueError, match=r"w_base3 of n=17 k=16 has shape \(104,\); got shape=\(52,\)"):
        unpack_base3(w_base3, 17, 16)
    w_base3[51] = 243
    with pytest.raises(ValueError, match="a byte below 243; got byte=243; the bytes are corrupted"):
        unpack_base3(w_base3, 16, 16)


def test_unpack_rejects_another_shape_and_the_code_three() -> None:
    with pytest.raises(ValueError, match=r"w_packed of n=17 k=16 has shape \(2, 1, 64\); got shape=\(1, 1, 64\)"):
        unpack_ternary(pack_ternary(np.ones((16, 16), np.int8)), 17, 16)
    with pytest.raises(ValueError, match="code 3"):
        unpack_ternary(np.full((1, 1, 64), 255, np.uint8), 16, 16)


def test_one_int8_row_bit_by_bit() -> None:
    w_int8 = np.full((16, 32), -128, np.int8)  # u = 0
    w_int8[2, 13] = 0b1011_0101 - 128  # k = 13 = 8 * 1 + 4 + 1 = 4 * 3 + 1: nibble line 1, high half, byte 1; bit 3
    scan, rest = pack_int8_rows(w_int8)
    assert scan.shape == (1, 1, 320)
    assert rest.shape == (16, 1, 12)
    expected_scan, expected_rest = np.zeros(320, np.uint8), np.zeros((16, 12), np.uint8)
    expected_scan[64 + 4 * 2 + 1] = 0b1011 << 4
    expected_scan[256 + 4 * 2 + 1] = 0 << 3
    expected_rest[2, [1, 9]] = 1 << 3
    np.testing.assert_array_equal(scan[0, 0], expected_scan)
    np.testing.assert_array_equal(rest[:, 0], expected_rest)
    w_int8[2, 13] = 0b1010 - 128
    scan, rest = pack_int8_rows(w_int8)
    assert (scan[0, 0, 256 + 4 * 2 + 1], scan.sum()) == (1 << 3, 1 << 3)
    assert (rest[2, 0, 4 + 1], rest.sum()) == (1 << 3, 1 << 3)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 70), size=st.integers(1, 100), seed=st.integers(0, 2**32 - 1))
def test_unpack_gives_back_the_int8_rows(rows: int, size: int, seed: int) -> None:
    w_int8 = np.random.default_rng(seed).integers(-128, 128, (rows, size)).astype(np.int8)
    scan, rest = pack_int8_rows(w_int8)
    np.testing.assert_array_equal(unpack_int8_rows(scan, rest, size), w_int8)


def test_blocks_of_rows_are_packed_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    w_int8 = np.random.default_rng(0).integers(-127, 128, (100, 40)).astype(np.int8)
    whole = pack_int8_rows(w_int8)
    monkeypatch.setattr(panels, "BLOCK_PANELS", 2)
    for part, expected in zip(pack_int8_rows(w_int8), whole, strict=True):
        np.testing.assert_array_equal(part, expected)
