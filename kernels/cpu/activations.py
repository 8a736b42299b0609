"""The activations of a token as the products read them: int8 codes in a record of bytes.

    offset 0            float32  act_scale
    offset 4            int32    sum of the codes: what weights stored as code + 1 add too much
    offset 48           16 zeros
    offset CODES = 64   int8     codes of the I columns, then zeros: at least 16 after a multiple of 4, and up to what follows
    group_sums_offset   int32    sums of the codes of every group of columns (planes and groups only; of planes, see below)
    act_scales_offset   float32  act_scale of every 32 columns (blocks only)

Why the zeros: a vector of packed weights may also hold blocks of the row groups before and after (packing.py), up to four
of them, whose products must vanish; and a tile (tiles.py) takes 64 columns, whatever is left of a row. A buffer of N tokens
is N records, `record_bytes` apart or more.

Integer tables (LM heads) need activations of more than 8 bits, because the model was not trained with quantized ones there.
Two planes keep 16 bits: ``x ~ act_scale * (255 hi + lo)`` with hi and lo in -127..127, in one record each, so that a
product with them is two exact integer products. The group sums in the record of hi are those of 255 hi + lo.
Addresses are int64. Shape suffixes: I in_features.
"""

import numpy as np

from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.floats import (
    LANES,
    ROUNDER,
    add,
    divide,
    largest_magnitude,
    load,
    maximum_magnitude,
    multiply,
    splat,
    store_codes,
    subtract,
)
from bitdistill.kernels.cpu.native import float32s, int8s, int32s
from bitdistill.kernels.cpu.vector import repeat_byte, store_bytes
from bitdistill.kernels.numerics import ACT_BLOCK, ACT_MAX, EPSILON

CODES = 64
PLANE_BASE = 255  # 2 * 127 + 1: every integer up to 255 * 127 + 127 is one 255 * hi + lo
PLANE_MAX = PLANE_BASE * ACT_MAX + ACT_MAX
SUM_COLUMNS = 32  # the group of an int4 table's scale
_EPSILON = np.float32(EPSILON)


@jit
def group_sums_offset(in_features):
    """Where the group sums of a record are."""
    return CODES + (4 * ((in_features + 3) // 4) + 16 + 63) // 64 * 64


@jit
def act_scales_offset(in_features):
    """Where the scales of a record's blocks are."""
    groups = (in_features + SUM_COLUMNS - 1) // SUM_COLUMNS
    return group_sums_offset(in_features) + (4 * groups + 63) // 64 * 64


@jit
def record_bytes(in_features):
    """Bytes of a record, a multiple of 64."""
    offset = act_scales_offset(in_features)
    return offset + (offset - group_sums_offset(in_features))  # as many scales as sums


@jit
def _peak(x, in_features):
    """max(max|x|, EPSILON), NaN if there is one."""
    peaks = splat(_EPSILON)
    whole = in_features // LANES * LANES
    for i in range(0, whole, LANES):
        peaks = maximum_magnitude(peaks, load(x + 4 * i))
    for value in float32s(x + 4 * whole, in_features - whole):
        peaks = maximum_magnitude(peaks, splat(value))
    return largest_magnitude(peaks)


@jit
def _clear(record, in_features):
    """Zeros wherever neither a code nor a sum will be written."""
    zeros = repeat_byte(0)
    end = record + group_sums_offset(in_features)
    store_bytes(record, zeros)
    store_bytes(end - 128, zeros)
    store_bytes(end - 64, zeros)


@jit
def quantize_activation(x, in_features, record):
    """``act_codes = round(x * (127 / m))``, ``act_scale = m / 127``, ``m = max(max|x|, EPSILON)``, into a record.

    Args:
        x: address of float32 (I,).
        in_features: I, at least 1.
        record: address of `record_bytes(I)` bytes; all but the group sums is written.

    Numerics: bit for bit ``kernels/reference.py:quantize_activation``. With a NaN or an infinity among x the scale is not
    finite and the codes mean nothing.
    """
    peak = _peak(x, in_features)
    _clear(record, in_features)
    int32s(record + 4, 1)[0] = _store_rounded(x, in_features, np.float32(ACT_MAX) / peak, record + CODES)
    float32s(record, 1)[0] = peak / np.float32(ACT_MAX)


@jit
def quantize_activation_blocks(x, in_features, record):
    """`quantize_activation` for each block of ACT_BLOCK columns, with the blocks' sums and scales in their own places.

    Args:
        x: address of float32 (I,). in_features: I, at least 1. record: address of `record_bytes(I)` bytes.

    Numerics: bit for bit ``kernels/reference.py:quantize_activation_blocks``. The record's own act_scale is 1.
    """
    _clear(record, in_features)
    blocks = (in_features + ACT_BLOCK - 1) // ACT_BLOCK
    float32s(record, 1)[0] = 1
    sums = int32s(record + group_sums_offset(in_features), blocks)
    scales = float32s(record + act_scales_offset(in_features), blocks)
    for block in range(blocks):
        start = block * ACT_BLOCK
        width = min(ACT_BLOCK, in_features - start)
        peak = _peak(x + 4 * start, width)
        factor = np.float32(ACT_MAX) / peak
        sums[block] = _store_rounded(x + 4 * start, width, factor, record + CODES + start)
        scales[block] = peak / np.float32(ACT_MAX)


@jit
def _store_rounded(x, count, factor, codes_at):
    """Stores ``round(x * factor)`` as int8, and returns the sum."""
    factors, total = splat(factor), 0
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        total += store_codes(codes_at + i, multiply(load(x + 4 * i), factors))
    values, codes = float32s(x, count), int8s(codes_at, count)
    for i in range(whole, count):
        total += _store_code(codes, i, values[i] * factor)
    return total


@jit
def _store_code(codes, i, value):
    code = np.int64((value + ROUNDER) - ROUNDER)
    codes[i] = code
    return code


@jit
def quantize_planes(x, in_features, records, stride):
    """``q = round(x * (32512 / m)) = 255 hi + lo``, ``act_scale = m / 32512``: hi and lo as two records, with group sums.

    Args:
        x: address of float32 (I,).
        in_features: I, at least 1.
        records: address of the record of hi; that of lo follows `stride` bytes later.
        stride: bytes from the record of hi to that of lo.

    Numerics: fp32, one rounding a step: factor, product, round half to even; ``hi = round(q / 255)``.
    """
    low_record = records + stride
    peak = _peak(x, in_features)
    factor = np.float32(PLANE_MAX) / peak
    factors, rounder, base = splat(factor), splat(ROUNDER), splat(np.float32(PLANE_BASE))
    _clear(records, in_features)
    _clear(low_record, in_features)
    high_sums = int32s(records + group_sums_offset(in_features), (in_features + SUM_COLUMNS - 1) // SUM_COLUMNS)
    low_sums = int32s(low_record + group_sums_offset(in_features), high_sums.size)
    for group in range(high_sums.size):
        high_sums[group] = low_sums[group] = 0
    whole = in_features // LANES * LANES
    for i in range(0, whole, LANES):
        q = subtract(add(multiply(load(x + 4 * i), factors), rounder), rounder)
        high = subtract(add(divide(q, base), rounder), rounder)
        high_sums[i // SUM_COLUMNS] += store_codes(records + CODES + i, high)
        low_sums[i // SUM_COLUMNS] += store_codes(low_record + CODES + i, subtract(q, multiply(high, base)))
    values = float32s(x, in_features)
    high_codes, low_codes = int8s(records + CODES, in_features), int8s(low_record + CODES, in_features)
    for i in range(whole, in_features):
        q = (values[i] * factor + ROUNDER) - ROUNDER
        high = (q / np.float32(PLANE_BASE) + ROUNDER) - ROUNDER
        high_sums[i // SUM_COLUMNS] += _store_code(high_codes, i, high)
        low_sums[i // SUM_COLUMNS] += _store_code(low_codes, i, q - high * np.float32(PLANE_BASE))
    float32s(records, 1)[0] = float32s(low_record, 1)[0] = peak / np.float32(PLANE_MAX)
    high_total, low_total = 0, 0
    for group in range(high_sums.size):
        high_total += high_sums[group]
        low_total += low_sums[group]
        high_sums[group] = PLANE_BASE * high_sums[group] + low_sums[group]
    int32s(records + 4, 1)[0] = high_total
    int32s(low_record + 4, 1)[0] = low_total


def quantize_activations(x: np.ndarray, blocks: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Absmax int8 of an array, row by row: `quantize_activation`, or `quantize_activation_blocks`.

    Args:
        x: float32 (N, I). blocks: a scale for each ACT_BLOCK columns, in place of one for the token.

    Returns: (act_codes int8 (N, I), act_scale float32 (N, 1) or (N, ceil(I / ACT_BLOCK))). Numerics: bit for bit the
        reference.

    Raises:
        ValueError: another dtype or shape.
    """
    if x.dtype != np.float32 or x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"x: expected float32 (N, I) with at least one column; got {x.dtype} {x.shape}")
    x = np.ascontiguousarray(x)
    records = np.empty((len(x), record_bytes(x.shape[1])), np.uint8)
    for row, record in zip(x, records, strict=True):
        (quantize_activation_blocks if blocks else quantize_activation)(row.ctypes.data, row.size, record.ctypes.data)
    start, count = (act_scales_offset(x.shape[1]), -(-x.shape[1] // ACT_BLOCK)) if blocks else (0, 1)
    scales = records[:, start : start + 4 * count].copy().view(np.float32)
    return records[:, CODES : CODES + x.shape[1]].view(np.int8).copy(), scales
