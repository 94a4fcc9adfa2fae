"""Codes <-> bytes: ternary weights and INT8 embedding rows in the layouts that the CPU kernels stream. NumPy only.

Ternary weights, uint8 (ceil(N / 16), ceil(K / 16), 64), for codes w_ternary + 1 in {0, 1, 2}:

    A panel is 16 rows. It is stored as one 64-byte line for every 16 columns k, so one thread reads one stream.

    line of panel P, step S = rows n = 16 P + r, r = 0..15, columns k = 16 S + 4 p + j, p = 0..3, j = 0..3

    byte     0     1     2     3  |  4 ...  7 | ... | 28 .. 31 | 32 .. 35 | ... | 60 .. 63
    row r    0     0     0     0  |  1 ...  1 | ... |  7 ..  7 |  8 ..  8 | ... | 15 .. 15
    j        0     1     2     3  |  0 ...  3 | ... |  0 ..  3 |  0 ..  3 | ... |  0 ..  3

    bits     7 6 | 5 4 | 3 2 | 1 0        of each byte: one code a plane
    plane p   3  |  2  |  1  |  0

    So bytes 0..31 shifted right by 2p and masked with 3 are 8 rows x 4 columns: what one AVX2 multiply takes
    together with the dword x[16 S + 4 p .. + 3] in every lane. Byte 4 r + j of the line is
        code(k = j) + 4 code(k = 4 + j) + 16 code(k = 8 + j) + 64 code(k = 12 + j)   of row r, k counted from 16 S.
    Rows and columns beyond N and K have code 1 (weight 0): a line of padding is 64 times 0x55.

Five codes a byte, in files only: `w_base3`, uint8 (4 ceil(B / 5),) for the B bytes of `w_packed` in their order:

    w_base3[4 g + p] = sum over i = 0..4 of 3^i * (code in plane p of byte 5 g + i),   at most 242

    So the four planes of five bytes are four bytes. Bytes beyond B are taken for padding, code 1.

INT8 rows, u = w_int8 + 128, split so that the output head can scan five bits of every row and read the other three of
the few rows that matter. V rows of D columns, both padded with u = 128, in groups of 32 columns:

    scan, uint8 (ceil(V / 16), ceil(D / 32), 320): 16 rows x 32 k as four lines of nibbles u >> 4, one line of bits
        nibble line i = 0..3, byte 4 r + b:   low nibble k = 8 i + b, high nibble k = 8 i + 4 + b, of row r
        bit line, byte 4 r + b:               bit j is u >> 3 & 1 of k = 4 j + b, j = 0..7
    rest, uint8 (V, ceil(D / 32), 12): bits 0, 1 and 2 of u, four bytes each, laid out as row r of the bit line
"""

import math

import numpy as np
from numpy.typing import NDArray

PANEL_ROWS, LINE_K, LINE_BYTES = 16, 16, 64
GROUP_K, SCAN_GROUP_BYTES, REST_GROUP_BYTES = 32, 320, 12

BASE3_CODES, BASE3_VALUES = 5, 3**5  # codes of a byte, and how many values it may have
PADDING = 0x55  # a byte of `w_packed` that holds four codes 1

BLOCK_PANELS = 1024  # panels of INT8 rows coded at once
BLOCK_GROUPS = 1 << 15  # groups of five bytes expanded at once: what stays in the cache


def packed_shape(n: int, k: int) -> tuple[int, int, int]:
    """Shape of `w_packed` for N = n rows of K = k columns."""
    return -(-n // PANEL_ROWS), -(-k // LINE_K), LINE_BYTES


def base3_shape(n: int, k: int) -> tuple[int]:
    """Shape of `w_base3` for N = n rows of K = k columns."""
    return (-(-math.prod(packed_shape(n, k)) // BASE3_CODES) * 4,)


def scan_shape(vocab_size: int, size: int) -> tuple[int, int, int]:
    """Shape of `scan` for V rows of D columns."""
    return -(-vocab_size // PANEL_ROWS), -(-size // GROUP_K), SCAN_GROUP_BYTES


def rest_shape(vocab_size: int, size: int) -> tuple[int, int, int]:
    """Shape of `rest` for V rows of D columns."""
    return vocab_size, -(-size // GROUP_K), REST_GROUP_BYTES


def pack_ternary(w_ternary: NDArray[np.int8]) -> NDArray[np.uint8]:
    """`w_packed` of (N, K) codes in {-1, 0, 1}."""
    if w_ternary.ndim != 2 or 0 in w_ternary.shape:
        raise ValueError(f"packing needs a matrix (N, K) that is not empty; got shape={w_ternary.shape}")
    if w_ternary.dtype != np.int8 or w_ternary.min() < -1 or w_ternary.max() > 1:
        raise ValueError(
            f"packing needs int8 codes -1, 0 and 1; got dtype={w_ternary.dtype} min={w_ternary.min()} "
            f"max={w_ternary.max()}; quantise with quantize_weight first"
        )
    n, k = w_ternary.shape
    panels, lines, _ = packed_shape(n, k)
    codes = np.ones((panels * PANEL_ROWS, lines * LINE_K), np.uint8)
    codes[:n, :k] = w_ternary + 1
    by_plane = codes.reshape(panels, PANEL_ROWS, lines, 4, 4).transpose(3, 0, 2, 1, 4)  # plane, panel, line, row, j
    packed = by_plane[0] | by_plane[1] << 2 | by_plane[2] << 4 | by_plane[3] << 6
    return packed.reshape(panels, lines, LINE_BYTES)


def unpack_ternary(w_packed: NDArray[np.uint8], n: int, k: int) -> NDArray[np.int8]:
    """The (N, K) codes in {-1, 0, 1} that `pack_ternary` packed."""
    if w_packed.shape != packed_shape(n, k):
        raise ValueError(f"w_packed of n={n} k={k} has shape {packed_shape(n, k)}; got shape={w_packed.shape}")
    panels, lines, _ = w_packed.shape
    line_rows = w_packed.reshape(panels, lines, PANEL_ROWS, 4)
    planes = np.stack([line_rows >> 2 * plane & 3 for plane in range(4)], axis=3)  # panel, line, row, plane, j
    codes = planes.transpose(0, 2, 1, 3, 4).reshape(panels * PANEL_ROWS, lines * LINE_K)[:n, :k]
    if (codes == 3).any():
        raise ValueError("w_packed holds code 3, which is no ternary weight; the bytes are corrupted; pack it again")
    return codes.astype(np.int8) - 1


def pack_base3(w_packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`w_base3` of `w_packed`."""
    groups = np.full((-(-w_packed.size // BASE3_CODES), BASE3_CODES), PADDING, np.uint8)
    groups.reshape(-1)[: w_packed.size] = w_packed.reshape(-1)
    w_base3 = np.zeros((len(groups), 4), np.uint8)
    for plane in range(4):
        for i in range(BASE3_CODES):
            w_base3[:, plane] += (groups[:, i] >> 2 * plane & 3) * np.uint8(3**i)
    return w_base3.reshape(-1)


def unpack_base3(w_base3: NDArray[np.uint8], n: int, k: int) -> NDArray[np.uint8]:
    """The `w_packed` of N = n by K = k that `pack_base3` was given, on a 64-byte address.

    Raises:
        ValueError: another shape, or a byte that no five codes give.
    """
    if w_base3.shape != base3_shape(n, k):
        raise ValueError(f"w_base3 of n={n} k={k} has shape {base3_shape(n, k)}; got shape={w_base3.shape}")
    if w_base3.max() >= BASE3_VALUES:
        raise ValueError(
            f"five ternary codes are a byte below {BASE3_VALUES}; got byte={w_base3.max()}; the bytes are corrupted; "
            "pack it again"
        )
    planes = w_base3.reshape(-1, 4)
    buffer = np.empty(len(planes) * BASE3_CODES + LINE_BYTES, np.uint8)
    expanded = buffer[-buffer.ctypes.data % LINE_BYTES :][: len(planes) * BASE3_CODES]
    groups = expanded.reshape(-1, BASE3_CODES)
    for begin in range(0, len(planes), BLOCK_GROUPS):
        block = planes[begin : begin + BLOCK_GROUPS]
        words = _WORDS[0].take(block[:, 0])
        for plane in range(1, 4):
            words |= _WORDS[plane].take(block[:, plane])
        groups[begin : begin + BLOCK_GROUPS] = words.view(np.uint8).reshape(-1, 8)[:, :BASE3_CODES]
    shape = packed_shape(n, k)
    return expanded[: math.prod(shape)].reshape(shape)


def _base3_words() -> NDArray[np.uint64]:
    """(4, 243) for each plane and byte of `w_base3`: its five codes in that plane of the word's bytes 0 to 4."""
    words = np.zeros((4, BASE3_VALUES), "<u8")
    for plane in range(4):
        for i in range(BASE3_CODES):
            words[plane] |= (np.arange(BASE3_VALUES, dtype=np.uint64) // 3**i % 3) << np.uint64(8 * i + 2 * plane)
    return words


_WORDS = _base3_words()


def panel_scales(weight_scale: NDArray[np.float32], n: int) -> NDArray[np.float32]:
    """(ceil(N / 16), G, 16) scales of (N,) or (N, G), as the kernels read them, zeros beyond N; (1, 1, 16) of ()."""
    if weight_scale.ndim == 0:
        return np.full((1, 1, PANEL_ROWS), weight_scale, np.float32)
    rows = weight_scale.reshape(n, -1)
    scales = np.zeros((-(-n // PANEL_ROWS), rows.shape[1], PANEL_ROWS), np.float32)
    for row in range(PANEL_ROWS):
        part = rows[row::PANEL_ROWS]
        scales[: len(part), :, row] = part
    return scales


def pack_int8_rows(w_int8: NDArray[np.int8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """`scan` and `rest` of (V, D) rows."""
    if w_int8.ndim != 2 or 0 in w_int8.shape or w_int8.dtype != np.int8:
        raise ValueError(
            f"packing needs an int8 matrix (V, D) that is not empty; got dtype={w_int8.dtype} shape={w_int8.shape}"
        )
    size = w_int8.shape[1]
    scan, rest = np.empty(scan_shape(*w_int8.shape), np.uint8), np.empty(rest_shape(*w_int8.shape), np.uint8)
    groups = scan.shape[1]
    for panel in range(0, len(scan), BLOCK_PANELS):
        rows = w_int8[panel * PANEL_ROWS : (panel + BLOCK_PANELS) * PANEL_ROWS]
        panels = -(-len(rows) // PANEL_ROWS)
        u = np.full((panels * PANEL_ROWS, groups * GROUP_K), 128, np.uint8)
        u[: len(rows), :size] = rows.view(np.uint8) ^ 0x80
        halves = (u >> 4).reshape(panels, PANEL_ROWS, groups, 4, 2, 4)  # panel, row, group, line, half, b
        nibbles = (halves[..., 0, :] | halves[..., 1, :] << 4).transpose(0, 2, 3, 1, 4)
        bits = [_gather_bits(u, bit, groups) for bit in range(4)]  # (rows, groups, 4)
        line = bits[3].reshape(panels, PANEL_ROWS, groups, 4).transpose(0, 2, 1, 3)
        part = scan[panel : panel + panels]
        part[..., : 4 * LINE_BYTES] = nibbles.reshape(panels, groups, 4 * LINE_BYTES)
        part[..., 4 * LINE_BYTES :] = line.reshape(panels, groups, LINE_BYTES)
        rest[panel * PANEL_ROWS :][: len(rows)] = np.concatenate(bits[:3], axis=-1)[: len(rows)]
    return scan, rest


def unpack_int8_rows(scan: NDArray[np.uint8], rest: NDArray[np.uint8], size: int) -> NDArray[np.int8]:
    """The (V, D) rows that `pack_int8_rows` packed, D = `size`."""
    vocab_size, groups, _ = rest.shape
    if scan.shape != scan_shape(vocab_size, size) or rest.shape != rest_shape(vocab_size, size):
        raise ValueError(f"scan and rest do not fit size={size}; got shapes {scan.shape} and {rest.shape}")
    nibbles = scan[..., : 4 * LINE_BYTES].reshape(len(scan), groups, 4, PANEL_ROWS, 4).transpose(0, 3, 1, 2, 4)
    high = np.stack((nibbles & 15, nibbles >> 4), axis=4).reshape(-1, groups * GROUP_K)[:vocab_size]
    line = scan[..., 4 * LINE_BYTES :].reshape(len(scan), groups, PANEL_ROWS, 4).transpose(0, 2, 1, 3)
    u = high << 4 | _spread_bits(line.reshape(-1, groups, 4)[:vocab_size]) << 3
    for bit in range(3):
        u |= _spread_bits(rest[..., 4 * bit : 4 * bit + 4]) << bit
    return (u[:, :size] ^ 0x80).view(np.int8)


def _gather_bits(u: NDArray[np.uint8], bit: int, groups: int) -> NDArray[np.uint8]:
    """One bit of (R, 32 groups) codes to (R, groups, 4): bit j of byte b is that of column 4 j + b of its group."""
    bits = (u >> bit & 1).reshape(-1, groups, 8, 4)
    return np.packbits(bits.astype(np.uint8), axis=2, bitorder="little")[:, :, 0]


def _spread_bits(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    rows, groups, _ = packed.shape
    return np.unpackbits(packed[:, :, None], axis=2, bitorder="little").reshape(rows, groups * GROUP_K)
