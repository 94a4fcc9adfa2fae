"""The byte layouts, bit by bit and by round trip."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdistill_core import panels
from bitdistill_core.engine.kernels import expand_base3, is_sound
from bitdistill_core.panels import (
    base3_shape,
    pack_base3,
    pack_int8_rows,
    pack_ternary,
    packed_shape,
    panel_scales,
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


def test_a_group_of_base_three_bit_by_bit() -> None:
    w_ternary = np.zeros((16, 100), np.int8)
    w_ternary[2, 4 * 7 + 1] = 1  # step 7 = 3 * 2 + 1, element 16 * 1 + 2: value 2 is 3, line 1, low nibble
    w_ternary[2, 4 * 15 + 1] = 1  # step 15 = 3 * 5, the same element: 1 of value 5, line 2, high nibble
    w_ternary[2, 4 * 17 + 1] = -1  # step 17 = 3 * 5 + 2: -9 of value 5, so that it is -8, and bit 5
    w_ternary[15, 4 * 23 + 3] = -1  # step 23 = 3 * 7 + 2, element 63: value 7 is -9, line 3, high nibble, and bit 7
    w_ternary[0, 96] = 1  # in the line that is left, byte 0, plane 0
    w_base3 = pack_base3(pack_ternary(w_ternary))
    assert w_base3.shape == base3_shape(16, 100) == (1, 320 + 64)
    expected = np.zeros(384, np.uint8)
    expected[[64 + 18, 128 + 18, 256 + 18, 192 + 63, 256 + 63]] = [3, 8 << 4, 1 << 5, 9 << 4, 1 << 7]
    expected[320:] = 0b01_01_01_01  # code 1; columns 100 to 111 are padding
    expected[320] = 0b01_01_01_10
    np.testing.assert_array_equal(w_base3[0], expected)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), lines=st.integers(1, 14), blocks=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_base_three_expands_to_the_packed_bytes(n: int, lines: int, blocks: int, seed: int) -> None:
    k = 16 * lines * blocks - (seed % 16 if blocks == 1 else 0)
    w_packed = pack_ternary(np.random.default_rng(seed).integers(-1, 2, (n, k)).astype(np.int8))
    w_base3 = pack_base3(w_packed, blocks)
    assert (w_base3.dtype, w_base3.shape) == (np.uint8, base3_shape(n, k, blocks))
    assert w_base3.flags.c_contiguous
    assert is_sound(w_base3, n, k, blocks)
    expanded = expand_base3(w_base3, n, k, blocks)
    np.testing.assert_array_equal(expanded, w_packed)
    assert expanded.ctypes.data % 64 == 0


def test_what_is_no_ternary_code_is_found_wherever_it_is() -> None:
    w_packed = pack_ternary(np.random.default_rng(0).integers(-1, 2, (16, 208)).astype(np.int8))
    w_base3 = pack_base3(w_packed)
    assert is_sound(w_base3, 16, 208)
    for group, element, i in product(range(2), range(0, 64, 7), range(8)):
        for value in range(32):
            changed = w_base3.copy()
            lines = changed[0, 320 * group : 320 * (group + 1)].reshape(5, 64)[:, element]
            shift = i % 2 * 4
            lines[i // 2] = lines[i // 2] & (240 >> shift) | (value & 15) << shift
            lines[4] = lines[4] & (255 - (1 << i)) | value >> 4 << i
            assert is_sound(changed, 16, 208) == (value % 16 < 14)  # a magnitude, and a sign
    for codes in (w_base3, w_packed):
        changed = codes.copy()
        changed.reshape(-1)[-1] |= 0b11 << 4
        assert not is_sound(changed, 16, 208)


def test_base_three_rejects_another_shape_and_blocks_of_no_whole_lines() -> None:
    w_packed = pack_ternary(np.ones((16, 48), np.int8))
    with pytest.raises(ValueError, match=r"n=17 k=48 in num_blocks=1 have shape=\(2, 192\); got shape=\(1, 192\)"):
        expand_base3(pack_base3(w_packed), 17, 48)
    with pytest.raises(ValueError, match="blocks of a multiple of 16; got num_blocks=2 in 3 times 16 columns; choose"):
        pack_base3(w_packed, 2)


def test_unpack_rejects_another_shape_and_the_code_three() -> None:
    with pytest.raises(ValueError, match=r"w_packed of n=17 k=16 has shape \(2, 1, 64\); got shape=\(1, 1, 64\)"):
        unpack_ternary(pack_ternary(np.ones((16, 16), np.int8)), 17, 16)
    with pytest.raises(ValueError, match="code 3"):
        unpack_ternary(np.full((1, 1, 64), 255, np.uint8), 16, 16)


def test_one_int8_row_bit_by_bit() -> None:
    w_int8 = np.full((16, 32), -128, np.int8)  # u = 0
    w_int8[2, 13] = 0b1011_0101 - 128  # k = 13 = 8 * 1 + 4 + 1 = 4 * 3 + 1: nibble line 1, high half, byte 1; bit 3
    scan, next_bits, rest = pack_int8_rows(w_int8)
    assert (scan.shape, next_bits.shape, rest.shape) == ((1, 1, 320), (16, 1, 4), (16, 1, 8))
    expected_scan, expected_next, expected_rest = np.zeros(320), np.zeros((16, 4)), np.zeros((16, 8))
    expected_scan[64 + 4 * 2 + 1] = 0b1011 << 4
    expected_next[2, 1] = 1 << 3
    expected_rest[2, 1] = 1 << 3
    np.testing.assert_array_equal(scan[0, 0], expected_scan)
    np.testing.assert_array_equal(next_bits[:, 0], expected_next)
    np.testing.assert_array_equal(rest[:, 0], expected_rest)
    w_int8[2, 13] = 0b1010 - 128
    scan, next_bits, rest = pack_int8_rows(w_int8)
    assert (scan[0, 0, 256 + 4 * 2 + 1], scan.sum(), next_bits.sum()) == (1 << 3, 1 << 3, 0)
    assert (rest[2, 0, 4 + 1], rest.sum()) == (1 << 3, 1 << 3)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 70), size=st.integers(1, 100), seed=st.integers(0, 2**32 - 1))
def test_unpack_gives_back_the_int8_rows(rows: int, size: int, seed: int) -> None:
    w_int8 = np.random.default_rng(seed).integers(-128, 128, (rows, size)).astype(np.int8)
    np.testing.assert_array_equal(unpack_int8_rows(*pack_int8_rows(w_int8), size), w_int8)


def test_blocks_of_rows_are_packed_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    w_int8 = np.random.default_rng(0).integers(-127, 128, (100, 40)).astype(np.int8)
    whole = pack_int8_rows(w_int8)
    monkeypatch.setattr(panels, "BLOCK_PANELS", 2)
    for part, expected in zip(pack_int8_rows(w_int8), whole, strict=True):
        np.testing.assert_array_equal(part, expected)
