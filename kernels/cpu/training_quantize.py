"""The quantizers of training on a CPU, and the scaling of products: compiled, over rows of float32 or bf16.

    quantize_rows      act_codes, act_scale          reference.quantize_activation and its blocks, bit for bit
    weight_sums, weight_codes                        reference.quantize_weight, bit for bit
    weight_groups                                    reference.quantize_weight_groups, bit for bit
    gradient_peaks, gradient_codes                   dY to int8, for both products of the fast backward pass
    scale_rows         sums -> float: ``acc * (row_scale * column_scale) + bias``

**Gradients.** In each product, the scale that varies along the summed dimension is multiplied into dY before dY is
quantized. The other scale is applied afterwards:

    dX = (dY * weight_scale) @ weight_codes    summed over O: one scale per token, row codes (N, O)
    dW = (dY * act_scale).T @ act_codes        summed over N: one scale per column, column codes (N, O)

Codes are rounded to the nearest.

Addresses are int64, strides in bytes; `half` says that floats are bf16. Shape suffixes: N tokens, I in_features, O
out_features.
"""

import numpy as np

from bitdistill.kernels.cpu.compilation import jit, jit_sums
from bitdistill.kernels.cpu.floats import (
    LANES,
    add,
    divide,
    largest_magnitude,
    load_int32,
    maximum,
    maximum_magnitude,
    multiply,
    multiply_add,
    round_bf16,
    splat,
    store_first_codes,
    store_int8,
    subtract,
)
from bitdistill.kernels.cpu.native import float32s, float64s, int32s, int64s
from bitdistill.kernels.cpu.rows import BLOCK, get, put
from bitdistill.kernels.numerics import ACT_MAX, EPSILON, MAX_SCALE

TINY = np.float32(1e-30)  # below it a peak counts as it: 127 / peak must be finite
DIGIT = 254.0  # a rest of at most half a code, times this, is a code again
WORK = 5  # numbers of a row of the table of `weight_sums`
_EPSILON, _ACT_MAX, _MAX_SCALE = np.float32(EPSILON), np.float32(ACT_MAX), np.float32(MAX_SCALE)
_ROUNDING = np.float32(
    1.5 * 2**23
)  # added to a float32 below 2^22 and subtracted again, it rounds to integers, half to even


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
def gradient_peaks(first, last, dy, stride, half, width, act_scale, peaks):
    """``max|dY * act_scale|`` of every column, within each BLOCK of rows.

    Args:
        first, last: rows.
        dy: address of rows of `width` floats, bf16 where `half`.
        stride, half, width: of these rows.
        act_scale: address of float32 (N,). peaks: of float32 (blocks, width), written.
    """
    size = 2 if half else 4
    for n in range(first, last):
        row, out = dy + n * stride, peaks + 4 * width * (n // BLOCK)
        scale = splat(float32s(act_scale + 4 * n, 1)[0])
        for i in range(0, width, LANES):
            value = multiply(get(row + size * i, width - i, half), scale)
            before = splat(np.float32(0)) if n % BLOCK == 0 else get(out + 4 * i, width - i, False)
            put(out + 4 * i, maximum_magnitude(before, value), width - i, False)


@jit
def _put_digits(codes, stride, planes, value, count):
    """Balanced digits of 16 numbers within +-127, the first before the point, the others to the base of 254."""
    big, base = splat(_ROUNDING), splat(np.float32(DIGIT))
    for plane in range(planes):
        put_codes(codes + plane * stride, value, count)
        value = multiply(subtract(value, subtract(add(value, big), big)), base)


@jit
def gradient_codes(
    first, last, dy, stride, half, width, weight_scale, row_codes, row_scale, act_scale, factor, column_codes, rows, planes
):  # fmt: skip
    """int8 codes of dY: ``round(dY * weight_scale / row_scale)`` and ``round(dY * act_scale * factor)``, either or both.

    With more than one plane the codes of the rest follow, times DIGIT, and so on: ``value = code0 + code1 / 254 + ...``.

    Args:
        first, last: rows.
        dy: address of rows of `width` floats, bf16 where `half`.
        stride, half, width: of these rows.
        weight_scale: address of float32 (width,). row_codes: of int8 (planes, rows, width), or 0 for none.
        row_scale: address of float32 (N,), written. act_scale: of float32 (N,).
        factor: address of float32 (width,), 127 / peak of a column. column_codes: of int8 (rows, planes, width), or 0 for none.
        rows: N. planes: 1, or 3, which hold all of a float32 that is not far below the peak.

    Numerics: a NaN or an infinity in a row makes its row_scale NaN or infinite. A row of zeros has codes 0.
    """
    size = 2 if half else 4
    for n in range(first, last):
        row = dy + n * stride
        if row_codes != 0:
            peaks = splat(TINY)
            for i in range(0, width, LANES):
                value = multiply(get(row + size * i, width - i, half), get(weight_scale + 4 * i, width - i, False))
                peaks = maximum_magnitude(peaks, value)
            peak = largest_magnitude(peaks)
            by = splat(_ACT_MAX / peak)
            for i in range(0, width, LANES):
                value = multiply(get(row + size * i, width - i, half), get(weight_scale + 4 * i, width - i, False))
                _put_digits(row_codes + n * width + i, rows * width, planes, multiply(value, by), width - i)
            float32s(row_scale + 4 * n, 1)[0] = peak / _ACT_MAX
        if column_codes != 0:
            scale = splat(float32s(act_scale + 4 * n, 1)[0])
            for i in range(0, width, LANES):
                value = multiply(get(row + size * i, width - i, half), scale)
                value = multiply(value, get(factor + 4 * i, width - i, False))
                _put_digits(column_codes + n * planes * width + i, width, planes, value, width - i)


@jit
def join_rows(first, last, acc, plane_stride, width, row_scale, out):
    """``out = (acc0 + (acc1 + acc2 / 254) / 254) * row_scale``: the product of three planes of codes, float32.

    Args:
        first, last: rows.
        acc: address of int32 (3, N, width). plane_stride: bytes from one plane to the next. width: of a row.
        row_scale: address of float32 (N,). out: address of float32 (N, width); may be acc.
    """
    over = splat(np.float32(1 / DIGIT))
    for n in range(first, last):
        source, target, scale = acc + 4 * n * width, out + 4 * n * width, splat(float32s(row_scale + 4 * n, 1)[0])
        for i in range(0, width, LANES):
            at = source + 4 * i
            if width - i >= LANES:
                low = multiply_add(load_int32(at + 2 * plane_stride), over, load_int32(at + plane_stride))
                value = multiply(multiply_add(low, over, load_int32(at)), scale)
                put(target + 4 * i, value, LANES, False)
            else:
                factor = np.float32(1 / DIGIT)
                for j in range(width - i):
                    digits = (
                        np.float32(int32s(at + 4 * j, 1)[0]),
                        np.float32(int32s(at + 4 * j + plane_stride, 1)[0]),
                        np.float32(int32s(at + 4 * j + 2 * plane_stride, 1)[0]),
                    )
                    value = digits[0] + (digits[1] + digits[2] * factor) * factor
                    float32s(target + 4 * (i + j), 1)[0] = value * float32s(row_scale + 4 * n, 1)[0]


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
