"""The quantizers of training on a CPU, and the scaling of products: compiled, over rows of float32 or bf16.

    quantize_rows      act_codes, act_scale          reference.quantize_activation and its blocks, bit for bit
    weight_sums, weight_codes                        reference.quantize_weight, bit for bit
    weight_groups                                    reference.quantize_weight_groups, bit for bit
    dequantize_rows    act_scale * act_codes
    scale_rows         sums -> float: ``acc * (row_scale * column_scale) + bias``

Addresses are int64, strides in bytes; `half` says that floats are bf16.
"""

import numpy as np

from bitdistill.kernels.cpu.compilation import jit, jit_sums
from bitdistill.kernels.cpu.floats import (
    LANES,
    add,
    divide,
    largest_magnitude,
    load_int8,
    load_int32,
    maximum,
    maximum_magnitude,
    multiply,
    repeat,
    round_bf16,
    splat,
    store_first_codes,
    store_int8,
    subtract,
)
from bitdistill.kernels.cpu.native import float32s, float64s, int8s, int32s, int64s
from bitdistill.kernels.cpu.rows import get, put
from bitdistill.kernels.numerics import ACT_MAX, EPSILON, MAX_SCALE

WORK = 5  # numbers of a row of the table of `weight_sums`
_EPSILON, _ACT_MAX, _MAX_SCALE = np.float32(EPSILON), np.float32(ACT_MAX), np.float32(MAX_SCALE)


@jit
def put_codes(address, value, count):
    """Rounds half to even and writes the first `count` of 16 codes."""
    if count >= LANES:
        store_int8(address, value)
    else:
        store_first_codes(address, value, count)


@jit
def quantize_rows(first, last, x, stride, half, width, part, codes, scale):
    """``act_codes = round(x * (127 / m))``, ``act_scale = m / 127``, ``m = max(max|x|, EPSILON)`` of rows first .. last - 1.

    Args:
        first, last: rows.
        x: address of rows of `width` floats, bf16 where `half`.
        stride, half, width: of these rows.
        part: columns that share a scale: `width`, or ACT_BLOCK.
        codes: address of int8 (N, width). scale: of float32 (N, ceil(width / part)).

    Numerics: bit for bit the reference. With a NaN or an infinity in a part its scale is not finite and its codes mean nothing.
    """
    size, parts = 2 if half else 4, (width + part - 1) // part
    for n in range(first, last):
        row, out = x + n * stride, codes + n * width
        for p in range(parts):
            start, end = p * part, min(width, (p + 1) * part)
            peaks = splat(_EPSILON)
            for i in range(start, end, LANES):
                peaks = maximum_magnitude(peaks, get(row + size * i, end - i, half))
            peak = largest_magnitude(peaks)
            factor = splat(_ACT_MAX / peak)
            for i in range(start, end, LANES):
                put_codes(out + i, multiply(get(row + size * i, end - i, half), factor), end - i)
            float32s(scale + 4 * (n * parts + p), 1)[0] = peak / _ACT_MAX


@jit
def dequantize_rows(first, last, codes, width, scale, out, half):
    """``out = codes * scale`` of rows first .. last - 1.

    Args:
        first, last: rows. codes: address of int8 (N, width). width: of a row. scale: address of float32 (N,).
        out: address of (N, width) floats, bf16 where `half`. half: see there.
    """
    size = 2 if half else 4
    for n in range(first, last):
        source, target, by = codes + n * width, out + size * n * width, repeat(scale + 4 * n)
        for i in range(0, width - LANES + 1, LANES):
            put(target + size * i, multiply(load_int8(source + i), by), LANES, half)
        for i in range(width // LANES * LANES, width):
            put(target + size * i, multiply(splat(np.float32(int8s(source + i, 1)[0])), by), 1, half)


@jit_sums
def _sum_of_magnitudes(weight, count):
    total = 0.0
    for value in float32s(weight, count):
        total += np.float64(abs(value))
    return total


@jit
def weight_sums(first, last, table):
    """``sum|W|`` in float64, of pieces of weights.

    Args:
        first, last: pieces.
        table: address of int64 (pieces, WORK): addresses of a piece's float32 weights, of its int8 codes, of its float64
            sum and of its tensor's float32 scale, and its number of weights.
    """
    for piece in range(first, last):
        work = int64s(table + 8 * WORK * piece, WORK)
        float64s(work[2], 1)[0] = _sum_of_magnitudes(work[0], work[4])


@jit
def weight_codes(first, last, table):
    """``clip(round(W / weight_scale), -1, 1)`` of pieces of weights, bit for bit the reference.

    Args:
        first, last, table: as in `weight_sums`.
    """
    least, zero = splat(np.float32(-1)), splat(np.float32(0))
    for piece in range(first, last):
        work = int64s(table + 8 * WORK * piece, WORK)
        weight, codes, count = work[0], work[1], work[4]
        scale = splat(float32s(work[3], 1)[0])
        for i in range(0, count, LANES):
            low = maximum(divide(get(weight + 4 * i, count - i, False), scale), least)
            put_codes(codes + i, subtract(zero, maximum(subtract(zero, low), least)), count - i)


@jit
def weight_groups(first, last, weight, width, columns, codes, scale):
    """``clip(round(W / s), -1, 1)`` with ``s = snapped_scale(mean|W|)`` of each row and group of columns.

    Args:
        first, last: rows. weight: address of float32 (O, width). width: I.
        columns: of a group; the last one of a row may be narrower.
        codes: address of int8 (O, width). scale: of float32 (O, ceil(width / columns)).

    Numerics: summed in float64 in the order of the columns; the scale rounded to fp32, then to bf16.
    """
    least, zero = splat(np.float32(-1)), splat(np.float32(0))
    groups = (width + columns - 1) // columns
    for row in range(first, last):
        for group in range(groups):
            start, end = group * columns, min(width, (group + 1) * columns)
            at = weight + 4 * (row * width + start)
            mean = np.float32(_sum_of_magnitudes(at, end - start) / (end - start))
            place = scale + 4 * (row * groups + group)
            put(place, round_bf16(splat(min(max(mean, _EPSILON), _MAX_SCALE))), 1, False)
            by = splat(float32s(place, 1)[0])
            for i in range(start, end, LANES):
                value = divide(get(weight + 4 * (row * width + i), end - i, False), by)
                low = subtract(zero, maximum(value, least))
                put_codes(codes + row * width + i, subtract(zero, maximum(low, least)), end - i)


@jit
def scale_rows(first, last, acc, integers, width, row_scale, column_scale, bias, out, half):
    """``out = acc * (row_scale * column_scale) + bias``, each operation rounded as in the reference.

    Args:
        first, last: rows.
        acc: address of (N, width) numbers, int32 where `integers`, else float32.
        integers: which of the two. width: O.
        row_scale: address of float32 (N,). column_scale: of float32 (width,). Either may be 0 for ones.
        bias: address of float32 (width,), or 0 for none.
        out: address of (N, width) floats, may be acc where not half.
        half: whether out is bf16.
    """
    size = 2 if half else 4
    for n in range(first, last):
        source, target = acc + 4 * n * width, out + size * n * width
        whole = width // LANES * LANES
        row = float32s(row_scale + 4 * n, 1)[0] if row_scale != 0 else np.float32(1)
        by = splat(row)
        for i in range(0, whole, LANES):
            scale = multiply(by, get(column_scale + 4 * i, LANES, False)) if column_scale != 0 else by
            number = load_int32(source + 4 * i) if integers else get(source + 4 * i, LANES, False)
            value = multiply(number, scale)
            if bias != 0:
                value = add(value, get(bias + 4 * i, LANES, False))
            put(target + size * i, value, LANES, half)
        for i in range(whole, width):
            scale = row * float32s(column_scale + 4 * i, 1)[0] if column_scale != 0 else row
            at = source + 4 * i
            value = (np.float32(int32s(at, 1)[0]) if integers else float32s(at, 1)[0]) * scale
            if bias != 0:
                value = value + float32s(bias + 4 * i, 1)[0]
            put(target + size * i, splat(value), 1, half)
