"""The gradient dY in int8: one code, or the three digits that hold a float32, for both products of the backward pass.

    gradient_peaks    the largest magnitude of each column
    gradient_rows     codes as rows: what oneDNN multiplies
    gradient_tiles    the same codes as tiles: left operands of training_tiles.py
    join_rows         the float32 product of digits from the int32 ones

In each product, the scale that varies along the summed dimension is multiplied into dY before dY is quantized. The other scale
is applied afterwards:

    dX = (dY * weight_scale) @ weight_codes    summed over O: one scale per token, row codes
    dW = (dY * act_scale).T @ act_codes        summed over N: one scale per column, column codes

Codes are rounded to the nearest. With more than one plane, the codes of the rest follow, times DIGIT, and so on:
``value = code0 + code1 / 254 + code2 / 254**2``.

Addresses are int64, strides in bytes; `half` says that floats are bf16. Shape suffixes: N tokens, O out_features.
"""

import numpy as np

from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.floats import (
    LANES,
    ROUNDER,
    add,
    divide,
    largest_magnitude,
    load_int32,
    maximum_magnitude,
    multiply,
    multiply_add,
    repeat,
    splat,
    store_four_int8,
    store_int8,
    subtract,
)
from bitdistill.kernels.cpu.native import float32s, int32s, keep
from bitdistill.kernels.cpu.rows import BLOCK, get, put
from bitdistill.kernels.cpu.tile_layout import transpose_ints
from bitdistill.kernels.cpu.tiles import TILE_BYTES, TILE_COLUMNS, TILE_ROWS
from bitdistill.kernels.cpu.training_quantize import put_codes
from bitdistill.kernels.numerics import ACT_MAX

TINY = np.float32(1e-30)  # below it a peak counts as it: 127 / peak must be finite
DIGIT = 254.0  # a rest of at most half a code, times this, is a code again
_ACT_MAX = np.float32(ACT_MAX)
assert BLOCK == TILE_COLUMNS, "a block of rows is what a tile of column codes sums over"


# --- scales --------------------------------------------------------------------------------------------------------------


@jit
def gradient_peaks(first, last, dy, stride, half, width, act_scale, peaks):
    """``max|dY * act_scale|`` of every column, within each BLOCK of rows.

    Args:
        first, last: rows.
        dy: address of rows of `width` floats, bf16 where `half`.
        stride, half, width: of these rows.
        act_scale: address of float32 (N,). peaks: of float32 (blocks, width), written.
    """
    size = 2 if half else 4
    for begin in range(first, last, BLOCK):
        end, out = min(last, begin + BLOCK), peaks + 4 * width * (begin // BLOCK)
        for n in range(begin, end, 4):  # of less than four rows the last one counts again
            second, third, fourth = min(n + 1, end - 1), min(n + 2, end - 1), min(n + 3, end - 1)
            a, b, c, d = dy + n * stride, dy + second * stride, dy + third * stride, dy + fourth * stride
            by_a, by_b = repeat(act_scale + 4 * n), repeat(act_scale + 4 * second)
            by_c, by_d = repeat(act_scale + 4 * third), repeat(act_scale + 4 * fourth)
            for i in range(0, width, LANES):
                count = width - i
                peak = splat(np.float32(0)) if n == begin else get(out + 4 * i, count, False)
                peak = maximum_magnitude(peak, multiply(get(a + size * i, count, half), by_a))
                peak = maximum_magnitude(peak, multiply(get(b + size * i, count, half), by_b))
                peak = maximum_magnitude(peak, multiply(get(c + size * i, count, half), by_c))
                peak = maximum_magnitude(peak, multiply(get(d + size * i, count, half), by_d))
                put(out + 4 * i, peak, count, False)


@jit
def _column_factors(peaks, blocks, width, factors, column_scale):
    """127 / peak of every column, and peak / 127 unless column_scale is 0."""
    most = splat(_ACT_MAX)
    for i in range(0, width, LANES):
        count, peak = width - i, splat(TINY)
        for block in range(blocks):
            peak = maximum_magnitude(peak, get(peaks + 4 * (block * width + i), count, False))
        put(factors + 4 * i, divide(most, peak), count, False)
        if column_scale != 0:
            put(column_scale + 4 * i, divide(peak, most), count, False)


@jit
def _row_peak(row, half, width, weight_scale):
    """``max|dY * weight_scale|`` of a row, at least TINY."""
    size, peaks = 2 if half else 4, splat(TINY)
    for i in range(0, width, LANES):
        value = multiply(get(row + size * i, width - i, half), get(weight_scale + 4 * i, width - i, False))
        peaks = maximum_magnitude(peaks, value)
    return largest_magnitude(peaks)


@jit
def _rest(value):
    """What rounding to the nearest code leaves, as a value of the next plane."""
    big = splat(ROUNDER)
    return multiply(subtract(value, subtract(add(value, big), big)), splat(np.float32(DIGIT)))


# --- codes ---------------------------------------------------------------------------------------------------------------


@jit
def gradient_rows(
    first, last, dy, stride, half, width, rows, planes, weight_scale, row_codes, row_scale, act_scale, peaks, column_codes,
    column_scale,
):  # fmt: skip
    """int8 codes of dY: ``round(dY * weight_scale / row_scale)`` and ``round(dY * act_scale / column_scale)``, either or both.

    Args:
        first, last: rows, whole blocks of BLOCK but for the last one.
        dy: address of rows of `width` floats, bf16 where `half`.
        stride, half, width: of these rows. rows: N.
        planes: 1, or 3, which hold all of a float32 that is not far below the peak.
        weight_scale: address of float32 (width,). row_codes: of int8 (planes, rows, width), or 0 for none.
        row_scale: address of float32 (N,), written. act_scale: of float32 (N,).
        peaks: address of what `gradient_peaks` writes. column_codes: of int8 (rows, planes, width), or 0 for none.
        column_scale: address of float32 (width,), written.

    Numerics: a NaN or an infinity in a row or column makes its scale NaN or infinite. A row of zeros has codes 0.
    """
    size, factors = 2 if half else 4, np.empty(width, np.float32)
    factor = factors.ctypes.data
    if column_codes != 0:
        _column_factors(peaks, (rows + BLOCK - 1) // BLOCK, width, factor, column_scale if first == 0 else 0)
    for n in range(first, last):
        row = dy + n * stride
        if row_codes != 0:
            peak = _row_peak(row, half, width, weight_scale)
            by = splat(_ACT_MAX / peak)
            for i in range(0, width, LANES):
                value = multiply(get(row + size * i, width - i, half), get(weight_scale + 4 * i, width - i, False))
                value = multiply(value, by)
                put_codes(row_codes + n * width + i, value, width - i)
                for plane in range(1, planes):
                    value = _rest(value)
                    put_codes(row_codes + (plane * rows + n) * width + i, value, width - i)
            float32s(row_scale + 4 * n, 1)[0] = peak / _ACT_MAX
        if column_codes != 0:
            scale = repeat(act_scale + 4 * n)
            for i in range(0, width, LANES):
                value = multiply(get(row + size * i, width - i, half), scale)
                value = multiply(value, get(factor + 4 * i, width - i, False))
                put_codes(column_codes + n * planes * width + i, value, width - i)
                for plane in range(1, planes):
                    value = _rest(value)
                    put_codes(column_codes + (n * planes + plane) * width + i, value, width - i)
    keep(factors)


@jit
def _row_tiles(begin, end, dy, stride, half, width, planes, weight_scale, tiles, plane_bytes, row_scale):
    """The row codes of rows begin .. end - 1; columns beyond the last are zeros."""
    size, depth, zero = 2 if half else 4, (width + TILE_COLUMNS - 1) // TILE_COLUMNS, splat(np.float32(0))
    for n in range(begin, end):
        row, target = dy + n * stride, tiles + n // TILE_ROWS * depth * TILE_BYTES + n % TILE_ROWS * TILE_COLUMNS
        peak = _row_peak(row, half, width, weight_scale)
        by = splat(_ACT_MAX / peak)
        for i in range(0, depth * TILE_COLUMNS, LANES):
            value = zero
            if i < width:
                value = multiply(
                    multiply(get(row + size * i, LANES, half), get(weight_scale + 4 * i, LANES, False)), by
                )
            at = target + i // TILE_COLUMNS * TILE_BYTES + i % TILE_COLUMNS
            store_int8(at, value)
            for plane in range(1, planes):
                value = _rest(value)
                store_int8(at + plane * plane_bytes, value)
        float32s(row_scale + 4 * n, 1)[0] = peak / _ACT_MAX


@jit
def _scaled(n, end, at, stride, half, act_scale, factor):
    """Sixteen values of row n on the scale of their columns; zeros beyond the last row."""
    if n >= end:
        return splat(np.float32(0))
    return multiply(multiply(get(at + n * stride, LANES, half), repeat(act_scale + 4 * n)), factor)


@jit
def _column_tiles(begin, end, dy, stride, half, width, planes, act_scale, factors, tiles, plane_bytes, depth, room):
    """The column codes of rows begin .. end - 1, one tile for each 16 columns and plane; rows beyond the last are zeros."""
    size = 2 if half else 4
    for group in range(width // TILE_ROWS):
        at, factor = dy + size * TILE_ROWS * group, get(factors + 4 * TILE_ROWS * group, LANES, False)
        for quad in range(TILE_COLUMNS // 4):
            n = begin + 4 * quad
            a = _scaled(n, end, at, stride, half, act_scale, factor)
            b = _scaled(n + 1, end, at, stride, half, act_scale, factor)
            c = _scaled(n + 2, end, at, stride, half, act_scale, factor)
            d = _scaled(n + 3, end, at, stride, half, act_scale, factor)
            store_four_int8(room + TILE_COLUMNS * quad, a, b, c, d)
            for plane in range(1, planes):
                a, b, c, d = _rest(a), _rest(b), _rest(c), _rest(d)
                store_four_int8(room + TILE_BYTES * plane + TILE_COLUMNS * quad, a, b, c, d)
        target = tiles + TILE_BYTES * (group * depth + begin // TILE_COLUMNS)
        for plane in range(planes):
            transpose_ints(room + TILE_BYTES * plane, TILE_COLUMNS, target + plane * plane_bytes, TILE_COLUMNS)


@jit
def gradient_tiles(
    first, last, dy, stride, half, width, rows, planes, weight_scale, row_tiles, row_scale, act_scale, peaks, column_tiles,
    column_scale,
):  # fmt: skip
    """The codes of `gradient_rows` as tiles of 16 x 64 (training_tiles.py), padded with zeros; width a multiple of 16.

    Args:
        row_tiles: address of the left operand (N, O) of each plane, or 0 for none.
        column_tiles: address of the left operand (O, N) of each plane, or 0 for none.
        first, last, dy, stride, half, width, rows, planes, weight_scale, row_scale, act_scale, peaks, column_scale: as there.
    """
    factors, room = np.empty(width, np.float32), np.empty(planes * TILE_BYTES, np.int8)
    row_depth, column_depth = (width + TILE_COLUMNS - 1) // TILE_COLUMNS, (rows + TILE_COLUMNS - 1) // TILE_COLUMNS
    row_plane = (rows + TILE_ROWS - 1) // TILE_ROWS * row_depth * TILE_BYTES
    column_plane = width // TILE_ROWS * column_depth * TILE_BYTES
    if column_tiles != 0:
        _column_factors(peaks, column_depth, width, factors.ctypes.data, column_scale if first == 0 else 0)
    for begin in range(first, last, BLOCK):
        end = min(last, begin + BLOCK)
        if row_tiles != 0:
            _row_tiles(begin, end, dy, stride, half, width, planes, weight_scale, row_tiles, row_plane, row_scale)
        if column_tiles != 0:
            work = (act_scale, factors.ctypes.data, column_tiles, column_plane, column_depth, room.ctypes.data)
            _column_tiles(begin, end, dy, stride, half, width, planes, *work)
    keep(factors)
    keep(room)


# --- products ------------------------------------------------------------------------------------------------------------


@jit
def joined(at, plane_stride, scale):
    """16 of ``(acc0 + (acc1 + acc2 / 254) / 254) * scale``.

    Args:
        at: address of int32, those of the next planes `plane_stride` bytes further each.
        plane_stride: see there. scale: 16 floats.
    """
    over = splat(np.float32(1 / DIGIT))
    low = multiply_add(load_int32(at + 2 * plane_stride), over, load_int32(at + plane_stride))
    return multiply(multiply_add(low, over, load_int32(at)), scale)


@jit
def join_rows(first, last, acc, plane_stride, width, row_scale, out):
    """``out = (acc0 + (acc1 + acc2 / 254) / 254) * row_scale``: the product of three planes of codes, float32.

    Args:
        first, last: rows.
        acc: address of int32 (3, N, width). plane_stride: bytes from one plane to the next. width: of a row.
        row_scale: address of float32 (N,). out: address of float32 (N, width); may be acc.
    """
    room = np.zeros((3, LANES), np.int32)  # what is left of a row, with zeros behind it
    for n in range(first, last):
        source, target, scale = acc + 4 * n * width, out + 4 * n * width, repeat(row_scale + 4 * n)
        for i in range(0, width, LANES):
            at, stride, count = source + 4 * i, plane_stride, width - i
            if count < LANES:
                for plane in range(3):
                    room[plane, :count] = int32s(at + plane * plane_stride, count)
                at, stride = room.ctypes.data, 4 * LANES
            put(target + 4 * i, joined(at, stride, scale), count, False)
    keep(room)
