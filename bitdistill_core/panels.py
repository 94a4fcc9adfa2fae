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

The same codes in base 3, three in five bits: `w_base3`, uint8 (ceil(N / 16), bytes of a panel).

    A panel is its blocks of columns one after the other, as many as a row has scales. A block is a group of 320 bytes
    for every six lines, and then the lines that are left, as above. With 24 steps of 4 columns, step s = k // 4 in its
    group, element e = 16 j + r of step s is the weight of row r, column k = 4 s + j, and of 8 x 64 values

        value(i, e) = w(step 3 i, e) + 3 w(step 3 i + 1, e) + 9 w(step 3 i + 2, e),   from -13 to 13

    line 0..3, byte e:   |value(2 line, e)| in bits 0 to 3, |value(2 line + 1, e)| in bits 4 to 7
    line 4, byte e:      bit i is 1 where value(i, e) is negative

INT8 rows, u = w_int8 + 128, split so that the output head can scan five bits of every row, look at the sixth of those
that matter, and read the last two of the few that still do. V rows of D columns, both padded with u = 128, in groups of
32 columns:

    scan, uint8 (ceil(V / 16), ceil(D / 32), 320): 16 rows x 32 k as four lines of nibbles u >> 4, one line of bits
        nibble line i = 0..3, byte 4 r + b:   low nibble k = 8 i + b, high nibble k = 8 i + 4 + b, of row r
        bit line, byte 4 r + b:               bit j is u >> 3 & 1 of k = 4 j + b, j = 0..7
    next, uint8 (V, ceil(D / 32), 4): bit 2 of u, laid out as row r of the bit line
    rest, uint8 (V, ceil(D / 32), 8): bits 0 and 1 of u, four bytes each, likewise
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

PANEL_ROWS, LINE_K, LINE_BYTES = 16, 16, 64
GROUP_K, SCAN_GROUP_BYTES, NEXT_GROUP_BYTES, REST_GROUP_BYTES = 32, 320, 4, 8

BASE3_LINES, BASE3_BYTES = 6, 320  # lines of a group, and its bytes

BLOCK_PANELS = 1024  # panels of INT8 rows coded at once


def packed_shape(n: int, k: int) -> tuple[int, int, int]:
    """Shape of `w_packed` for N = n rows of K = k columns."""
    return -(-n // PANEL_ROWS), -(-k // LINE_K), LINE_BYTES


def base3_shape(n: int, k: int, num_blocks: int = 1) -> tuple[int, int]:
    """Shape of `w_base3` for N = n rows of K = k columns in blocks of whole lines."""
    panels, lines, _ = packed_shape(n, k)
    groups, rest = divmod(lines // num_blocks, BASE3_LINES)
    return panels, num_blocks * (groups * BASE3_BYTES + rest * LINE_BYTES)


def empty_lines(shapes: Sequence[tuple[int, ...]]) -> list[NDArray[np.uint8]]:
    """Uninitialised uint8 arrays of whole lines, on 64-byte addresses, side by side in one block of memory.

    NumPy asks for a block of megabytes in large pages, which are read faster than many small ones.
    """
    sizes = [math.prod(shape) for shape in shapes]
    block = np.empty(sum(sizes) + LINE_BYTES, np.uint8)
    ends = (-block.ctypes.data % LINE_BYTES) + np.cumsum(sizes)
    return [block[end - size : end].reshape(shape) for shape, size, end in zip(shapes, sizes, ends, strict=True)]


def scan_shape(vocab_size: int, size: int) -> tuple[int, int, int]:
    """Shape of `scan` for V rows of D columns."""
    return -(-vocab_size // PANEL_ROWS), -(-size // GROUP_K), SCAN_GROUP_BYTES


def next_shape(vocab_size: int, size: int) -> tuple[int, int, int]:
    """Shape of `next` for V rows of D columns."""
    return vocab_size, -(-size // GROUP_K), NEXT_GROUP_BYTES


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


def pack_base3(w_packed: NDArray[np.uint8], num_blocks: int = 1) -> NDArray[np.uint8]:
    """`w_base3` of `w_packed`, its lines in `num_blocks` blocks."""
    panels, lines, _ = w_packed.shape
    if num_blocks < 1 or lines % num_blocks:
        raise ValueError(
            f"weights that share a scale are packed in blocks of a multiple of {LINE_K}; got num_blocks={num_blocks} "
            f"in {lines} times {LINE_K} columns; choose another block size for the student"
        )
    blocks = w_packed.reshape(panels, num_blocks, lines // num_blocks, LINE_BYTES)
    groups, rest = divmod(lines // num_blocks, BASE3_LINES)
    grouped = blocks[:, :, : groups * BASE3_LINES].reshape(panels, num_blocks, groups, BASE3_LINES, LINE_BYTES)
    steps = np.stack([grouped >> 2 * plane & 3 for plane in range(4)], axis=4)  # panel, block, group, line, plane, e
    codes = steps.reshape(panels, num_blocks, groups, 8, 3, LINE_BYTES)
    values = (codes[..., 0, :] + 3 * codes[..., 1, :] + 9 * codes[..., 2, :]).view(np.int8) - 13
    by_column = values.reshape(*values.shape[:-1], PANEL_ROWS, 4).swapaxes(-1, -2).reshape(values.shape)
    magnitudes = np.abs(by_column).view(np.uint8)
    nibbles = magnitudes[..., 0::2, :] | magnitudes[..., 1::2, :] << 4
    bits = np.packbits(by_column < 0, axis=-2, bitorder="little")
    coded = np.concatenate((nibbles, bits), axis=-2).reshape(panels, num_blocks, groups * BASE3_BYTES)
    left = blocks[:, :, groups * BASE3_LINES :].reshape(panels, num_blocks, rest * LINE_BYTES)
    return np.concatenate((coded, left), axis=-1).reshape(panels, -1)


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


def pack_int8_rows(w_int8: NDArray[np.int8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """`scan`, `next` and `rest` of (V, D) rows."""
    if w_int8.ndim != 2 or 0 in w_int8.shape or w_int8.dtype != np.int8:
        raise ValueError(
            f"packing needs an int8 matrix (V, D) that is not empty; got dtype={w_int8.dtype} shape={w_int8.shape}"
        )
    size = w_int8.shape[1]
    shapes = (shape(*w_int8.shape) for shape in (scan_shape, next_shape, rest_shape))
    scan, next_bits, rest = (np.empty(shape, np.uint8) for shape in shapes)
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
        next_bits[panel * PANEL_ROWS :][: len(rows)] = bits[2][: len(rows)]
        rest[panel * PANEL_ROWS :][: len(rows)] = np.concatenate(bits[:2], axis=-1)[: len(rows)]
    return scan, next_bits, rest


def unpack_int8_rows(
    scan: NDArray[np.uint8], next_bits: NDArray[np.uint8], rest: NDArray[np.uint8], size: int
) -> NDArray[np.int8]:
    """The (V, D) rows that `pack_int8_rows` packed, D = `size`."""
    vocab_size, groups, _ = rest.shape
    shapes = scan.shape, next_bits.shape, rest.shape
    if shapes != tuple(shape(vocab_size, size) for shape in (scan_shape, next_shape, rest_shape)):
        raise ValueError(f"scan, next and rest do not fit size={size}; got shapes {shapes}")
    nibbles = scan[..., : 4 * LINE_BYTES].reshape(len(scan), groups, 4, PANEL_ROWS, 4).transpose(0, 3, 1, 2, 4)
    high = np.stack((nibbles & 15, nibbles >> 4), axis=4).reshape(-1, groups * GROUP_K)[:vocab_size]
    line = scan[..., 4 * LINE_BYTES :].reshape(len(scan), groups, PANEL_ROWS, 4).transpose(0, 2, 1, 3)
    u = high << 4 | _spread_bits(line.reshape(-1, groups, 4)[:vocab_size]) << 3
    for bit, plane in enumerate((rest[..., :4], rest[..., 4:], next_bits)):
        u |= _spread_bits(plane) << bit
    return (u[:, :size] ^ 0x80).view(np.int8)


def _gather_bits(u: NDArray[np.uint8], bit: int, groups: int) -> NDArray[np.uint8]:
    """One bit of (R, 32 groups) codes to (R, groups, 4): bit j of byte b is that of column 4 j + b of its group."""
    bits = (u >> bit & 1).reshape(-1, groups, 8, 4)
    return np.packbits(bits.astype(np.uint8), axis=2, bitorder="little")[:, :, 0]


def _spread_bits(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    rows, groups, _ = packed.shape
    return np.unpackbits(packed[:, :, None], axis=2, bitorder="little").reshape(rows, groups * GROUP_K)
