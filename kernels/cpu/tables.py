"""Products with a table of the vocabulary: logits of an LM head, rows of an embedding.

    logits = x @ table.T        (N, V) from x (N, hidden), where table ~ scale * codes, in a layout of packing.py

Integer tables are multiplied with activations of 16 bits, as two planes of int8 (activations.py), so that the only rounding
besides the table's own is that of x to 16 bits. With hi and lo the exact integer products of a row with the planes, the
rest is fp32, with every operation rounded by itself and in this order:

    2bit, base3, int8   (255 float(hi) + float(lo)) * (act_scale * scale_row)
    int4                act_scale * sum over groups of 32 columns, ascending, of float(255 hi + lo) * scale_group,
                        in which float(255 hi + lo) is exact
    fp16                fp32 activations: 64 partial sums, column i in number i % 64 (multiples of 16 at the end: i % 16),
                        with fused multiply-adds where the processor has them; then the sum of those by halves

Where there is AMX, an int8 table is multiplied with several tokens by tile products, with AVX512 alone as a ternary one is; the
integers are the same. An int4 table's sums stop every 32 columns, which half a tile has; without tiles, two tokens share what
is unpacked.

So the logit of a row depends only on the row and the token, and all but those of fp16 tables are the same on every
processor.
Shape suffixes: N tokens, V rows of the table. Addresses are int64.
"""

import numpy as np

from bitdistill.kernels.cpu.activations import (
    CODES,
    PLANE_BASE,
    SUM_COLUMNS,
    group_sums_offset,
    quantize_planes,
    record_bytes,
)
from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.floats import LANES, add, load, multiply, multiply_add, splat, store, total
from bitdistill.kernels.cpu.matmul import (
    ACC_BYTES,
    PREFETCH,
    SCRATCH_BYTES,
    UNPACKED_BYTES,
    check_packed,
    gemm,
)
from bitdistill.kernels.cpu.native import float16s, float32s, int32s, uint8s
from bitdistill.kernels.cpu.records import MATRIX_FORMATS
from bitdistill.kernels.cpu.tiles import (
    HALF_BYTES,
    TILE_BYTES,
    TILE_COLUMNS,
    TILE_ROWS,
    TILES,
    configure,
    configure_halves,
    multiply_1x4_signed,
    multiply_halves,
    release,
    store_sums_0,
    store_sums_1,
    store_sums_2,
    store_sums_3,
    zero_sums,
)
from bitdistill.kernels.cpu.unpacking import BASE3, INT8, TWO_BIT
from bitdistill.kernels.cpu.vector import (
    AVX512,
    SIGNED_OFFSET,
    add_ints,
    and_bytes,
    dot,
    dot_signed,
    floats_of,
    load_bytes,
    load_halves,
    load_ints,
    mul_ints,
    no_sums,
    prefetch,
    repeat_byte,
    repeat_int,
    repeat_quad,
    shift_words,
    store_bytes,
    sub_ints,
    widen,
)
from bitdistill.kernels.packing import packed_bytes, row_groups

INT4, FP16 = 3, 4  # numbers of MATRIX_FORMATS, after TWO_BIT, BASE3 and INT8
INT4_OFFSET = 8  # a stored value is code + 8
_BASE = np.float32(PLANE_BASE)
_TOKENS = 64  # at a time, of a table that `gemm` multiplies
_TILED_TOKENS = 2  # from here on tile products are faster than `_multiply_int8`
_TILED_INT4_FROM = 4  # and than `_int4_logits`
_TILED_INT4_TOKENS = 32  # for which a row group of an int4 table is unpacked once
_GEMM_TOKENS = 4  # and where there are none, the product of matmul.py


@jit
def _copy_floats(source, count, target):
    """A loop: a slice assignment takes Numba two seconds to compile."""
    values, copies = float32s(source, count), float32s(target, count)
    for i in range(count):
        copies[i] = values[i]


@jit
def _write(row, rows, values, spare, out):
    """Sixteen logits from `row` on, as far as the table goes; spare: 64 bytes."""
    if row + LANES <= rows:
        store(out + 4 * row, values)
    else:
        store(spare, values)
        _copy_floats(spare, rows - row, out + 4 * row)


@jit
def _row_scales(scale, row, rows, spare):
    if row + LANES <= rows:
        return load(scale + 4 * row)
    _copy_floats(scale + 4 * row, rows - row, spare)
    return load(spare)


@jit
def _joined_planes(high, low, act_scale, scales):
    both = add(multiply(floats_of(high), splat(_BASE)), floats_of(low))
    return multiply(both, multiply(splat(act_scale), scales))


@jit
def _multiply_int8(weight, blocks, high, low, group):
    """A row group's integer products with both planes; high, low: addresses of records."""
    start_high = repeat_int(-SIGNED_OFFSET * int32s(high + 4, 1)[0])
    start_low = repeat_int(-SIGNED_OFFSET * int32s(low + 4, 1)[0])
    more_high, more_low = repeat_int(0), repeat_int(0)
    high_quads, low_quads = high + CODES, low + CODES
    source = weight + 64 * blocks * group
    for pair in range(blocks // 2):
        prefetch(source + 128 * pair + PREFETCH)
        prefetch(source + 128 * pair + PREFETCH + 64)
        even, odd = load_bytes(source + 128 * pair), load_bytes(source + 128 * pair + 64)
        start_high = dot_signed(start_high, even, repeat_quad(high_quads + 8 * pair))
        start_low = dot_signed(start_low, even, repeat_quad(low_quads + 8 * pair))
        more_high = dot_signed(more_high, odd, repeat_quad(high_quads + 8 * pair + 4))
        more_low = dot_signed(more_low, odd, repeat_quad(low_quads + 8 * pair + 4))
    if blocks % 2:
        last = load_bytes(source + 64 * (blocks - 1))
        start_high = dot_signed(start_high, last, repeat_quad(high_quads + 4 * (blocks - 1)))
        start_low = dot_signed(start_low, last, repeat_quad(low_quads + 4 * (blocks - 1)))
    return add_ints(start_high, more_high), add_ints(start_low, more_low)


@jit
def _int4_sums(high, low, even, odd, high_quads, low_quads):
    """The sums of both planes, with the eight columns of one load of an int4 table added."""
    high = dot(dot(high, even, repeat_quad(high_quads)), odd, repeat_quad(high_quads + 4))
    low = dot(dot(low, even, repeat_quad(low_quads)), odd, repeat_quad(low_quads + 4))
    return high, low


@jit
def _int4_result(result, high, low, sums, scales):
    """Adds ``float(255 hi + lo) * scale`` of one column group; sums: address of the token's sum of ``255 hi + lo`` there."""
    both = add_ints(mul_ints(high, repeat_int(PLANE_BASE)), low)
    both = sub_ints(both, repeat_int(INT4_OFFSET * int32s(sums, 1)[0]))
    return add(result, multiply(floats_of(both), scales))


@jit
def _multiply_int4(weight, scale, columns, high, stride, group):
    """sum over column groups of (255 hi + lo) * scale, 16 floats; high: address of the record of hi, lo `stride` bytes after."""
    groups, sums = columns // SUM_COLUMNS, high + group_sums_offset(columns)
    quads = high + CODES
    source, scales = weight + 256 * groups * group, scale + 32 * groups * group
    fifteen, result = repeat_byte(15), splat(np.float32(0))
    for g in range(groups):
        hi, lo = no_sums(), no_sums()
        for _ in range(4):
            prefetch(source + PREFETCH)
            q = load_bytes(source)
            even, odd = and_bytes(q, fifteen), and_bytes(shift_words(q, 4), fifteen)
            hi, lo = _int4_sums(hi, lo, even, odd, quads, quads + stride)
            source, quads = source + 64, quads + 8
        result = _int4_result(result, widen(hi), widen(lo), sums + 4 * g, load_halves(scales))
        scales += 32
    return result


@jit
def _multiply_int4_pair(weight, scale, columns, high, stride, group):
    """`_multiply_int4` of two tokens, whose four records follow each other: a row group is unpacked once for both."""
    groups, sums, next_token = columns // SUM_COLUMNS, high + group_sums_offset(columns), 2 * stride
    quads = high + CODES
    source, scales = weight + 256 * groups * group, scale + 32 * groups * group
    fifteen, result_a, result_b = repeat_byte(15), splat(np.float32(0)), splat(np.float32(0))
    for g in range(groups):
        hi_a, lo_a, hi_b, lo_b = no_sums(), no_sums(), no_sums(), no_sums()
        for _ in range(4):
            prefetch(source + PREFETCH)
            q = load_bytes(source)
            even, odd = and_bytes(q, fifteen), and_bytes(shift_words(q, 4), fifteen)
            hi_a, lo_a = _int4_sums(hi_a, lo_a, even, odd, quads, quads + stride)
            hi_b, lo_b = _int4_sums(hi_b, lo_b, even, odd, quads + next_token, quads + next_token + stride)
            source, quads = source + 64, quads + 8
        row_scales = load_halves(scales)
        result_a = _int4_result(result_a, widen(hi_a), widen(lo_a), sums + 4 * g, row_scales)
        result_b = _int4_result(result_b, widen(hi_b), widen(lo_b), sums + 4 * g + next_token, row_scales)
        scales += 32
    return result_a, result_b


@jit
def _int4_logits(weight, scale, rows, columns, records, stride, tokens, logits, logits_stride, first, last, scratch):
    """`table_logits` of an int4 table, two tokens at a time."""
    for group in range(first, last):
        row = 16 * group
        for n in range(0, tokens - 1, 2):
            high = records + 2 * n * stride
            a, b = _multiply_int4_pair(weight, scale, columns, high, stride, group)
            out = logits + 4 * n * logits_stride
            _write(row, rows, multiply(splat(float32s(high, 1)[0]), a), scratch, out)
            _write(row, rows, multiply(splat(float32s(high + 2 * stride, 1)[0]), b), scratch, out + 4 * logits_stride)
        if tokens % 2:
            high = records + 2 * (tokens - 1) * stride
            product = _multiply_int4(weight, scale, columns, high, stride, group)
            out = logits + 4 * (tokens - 1) * logits_stride
            _write(row, rows, multiply(splat(float32s(high, 1)[0]), product), scratch, out)


@jit
def _multiply_fp16(weight, x, columns, spare):
    """The dot product of a row of float16 with float32; spare: 128 bytes."""
    a, b, c, d = splat(np.float32(0)), splat(np.float32(0)), splat(np.float32(0)), splat(np.float32(0))
    i = 0
    while i + 64 <= columns:
        at = weight + 2 * i
        prefetch(at + PREFETCH)
        prefetch(at + PREFETCH + 64)
        a = multiply_add(load_halves(at), load(x + 4 * i), a)
        b = multiply_add(load_halves(at + 32), load(x + 4 * i + 64), b)
        c = multiply_add(load_halves(at + 64), load(x + 4 * i + 128), c)
        d = multiply_add(load_halves(at + 96), load(x + 4 * i + 192), d)
        i += 64
    while i + LANES <= columns:
        a = multiply_add(load_halves(weight + 2 * i), load(x + 4 * i), a)
        i += LANES
    if i < columns:  # the rest among zeros
        store_bytes(spare, repeat_byte(0))
        store_bytes(spare + 64, repeat_byte(0))
        _copy_floats(x + 4 * i, columns - i, spare)
        rest, halves = float16s(weight + 2 * i, columns - i), float16s(spare + 64, columns - i)
        for j in range(columns - i):
            halves[j] = rest[j]
        a = multiply_add(load_halves(spare + 64), load(spare), a)
    return total(add(add(a, b), add(c, d)))


@jit
def _logits_of_planes(
    weight, scale, packing, rows, columns, records, stride, tokens, logits, logits_stride, first, last, scratch
):
    """`table_logits` of a ternary or an int8 table: both planes of some tokens as the tokens of one integer product."""
    acc, spare = scratch + UNPACKED_BYTES, scratch + UNPACKED_BYTES + ACC_BYTES
    for start in range(0, tokens, _TOKENS):
        count = min(_TOKENS, tokens - start)
        step = ACC_BYTES // (128 * count)
        for group in range(first, last, step):
            stop = min(last, group + step)
            these = records + 2 * start * stride
            gemm(weight, packing, columns, these, stride, 2 * count, acc - 64 * group, 16 * step, group, stop, scratch)
            for n in range(count):
                act_scale = float32s(these + 2 * n * stride, 1)[0]
                out = logits + 4 * (start + n) * logits_stride
                for g in range(group, stop):
                    high = acc + 64 * (2 * n * step + g - group)
                    scales = _row_scales(scale, 16 * g, rows, spare)
                    values = _joined_planes(load_ints(high), load_ints(high + 64 * step), act_scale, scales)
                    _write(16 * g, rows, values, spare, out)


@jit
def _tiled_int8_logits(
    weight, scale, rows, columns, records, stride, tokens, logits, logits_stride, first, last, scratch
):
    """`table_logits` of an int8 table by tile products: its blocks are tiles of codes as they lie, planes are tokens.

    For whole tiles: columns a multiple of 64, and last - first of four. The table is read once for every 16 planes, the second
    time from the cache.
    """
    sums = (scratch + 63) // 64 * 64  # int32 (16 planes, 4 row groups, 16)
    spare = sums + 64 * 4 * TILE_ROWS
    group_bytes = 16 * columns
    configured = 0
    for group in range(first, last, 4):
        for start in range(0, 2 * tokens, TILE_ROWS):
            planes = min(TILE_ROWS, 2 * tokens - start)
            if planes != configured:
                configure(planes)
                configured = planes
            zero_sums()
            these, source = records + start * stride, weight + group * group_bytes
            for column in range(0, columns, TILE_COLUMNS):
                multiply_1x4_signed(these + CODES + column, stride, source + 16 * column, group_bytes)
            store_sums_0(sums, 256)
            store_sums_1(sums + 64, 256)
            store_sums_2(sums + 128, 256)
            store_sums_3(sums + 192, 256)
            for g in range(4):
                row = 16 * (group + g)
                row_scales = _row_scales(scale, row, rows, spare)
                for plane in range(0, planes, 2):
                    high = sums + 256 * plane + 64 * g
                    act_scale = float32s(these + plane * stride, 1)[0]
                    values = _joined_planes(load_ints(high), load_ints(high + 256), act_scale, row_scales)
                    _write(row, rows, values, spare, logits + 4 * ((start + plane) // 2) * logits_stride)
    release()


@jit
def _unpack_int4(source, columns, codes):
    """`columns` columns of an int4 row group, a multiple of 8, as unsigned codes, a block of 64 bytes for each four columns."""
    fifteen = repeat_byte(15)
    for block in range(columns // 8):
        prefetch(source + 64 * block + PREFETCH)
        q = load_bytes(source + 64 * block)
        store_bytes(codes + 128 * block, and_bytes(q, fifteen))
        store_bytes(codes + 128 * block + 64, and_bytes(shift_words(q, 4), fifteen))


@jit
def _tiled_int4_logits(
    weight, scale, rows, columns, records, stride, tokens, logits, logits_stride, first, last, scratch
):
    """`table_logits` of an int4 table by products of half a tile, which is a column group; planes are tokens.

    A row group is unpacked once for every 32 tokens. Four column groups at a time: their sums go through memory, where a token's
    logits wait for the next four.
    """
    groups, sums_at = columns // SUM_COLUMNS, group_sums_offset(columns)
    sums = (scratch + 63) // 64 * 64  # int32 (4 column groups, 16 planes, 16)
    results = sums + 4 * TILE_BYTES  # float32 (_TILED_INT4_TOKENS, 16)
    codes = results + 64 * _TILED_INT4_TOKENS  # of four column groups
    spare = codes + 4 * HALF_BYTES
    configured = 0
    for group in range(first, last):
        row = 16 * group
        for start in range(0, tokens, _TILED_INT4_TOKENS):
            count = min(_TILED_INT4_TOKENS, tokens - start)
            for n in range(count):
                store(results + 64 * n, splat(np.float32(0)))
            for g in range(0, groups, 4):
                several = min(4, groups - g)
                scales = scale + 32 * (groups * group + g)
                _unpack_int4(weight + 256 * (groups * group + g), several * SUM_COLUMNS, codes)
                for n in range(0, count, TILE_ROWS // 2):
                    pairs = min(TILE_ROWS // 2, count - n)
                    if pairs != configured:
                        configure_halves(2 * pairs)
                        configured = pairs
                    zero_sums()
                    these = records + 2 * (start + n) * stride
                    multiply_halves(these + CODES + SUM_COLUMNS * g, stride, codes, several - 1)
                    store_sums_0(sums, 64)
                    store_sums_1(sums + TILE_BYTES, 64)
                    store_sums_2(sums + 2 * TILE_BYTES, 64)
                    store_sums_3(sums + 3 * TILE_BYTES, 64)
                    for pair in range(pairs):
                        result = load(results + 64 * (n + pair))
                        of_token = these + 2 * pair * stride + sums_at + 4 * g
                        for k in range(several):
                            at = sums + TILE_BYTES * k + 128 * pair
                            high, low = load_ints(at), load_ints(at + 64)
                            result = _int4_result(result, high, low, of_token + 4 * k, load_halves(scales + 32 * k))
                        store(results + 64 * (n + pair), result)
            for n in range(count):
                act_scale = float32s(records + 2 * (start + n) * stride, 1)[0]
                out = logits + 4 * (start + n) * logits_stride
                _write(row, rows, multiply(splat(act_scale), load(results + 64 * n)), spare, out)
    release()


@jit
def table_logits(
    weight,
    scale,
    format,
    rows,
    columns,
    x,
    x_stride,
    records,
    stride,
    tokens,
    logits,
    logits_stride,
    first_group,
    last_group,
    scratch,
):
    """``logits = x @ table.T`` for the rows 16 first_group .. min(V, 16 last_group) - 1; definition at the top.

    Args:
        weight: address of the packed table; format: TWO_BIT, BASE3, INT8, INT4 or FP16.
        scale: address of float32 (V,); int4: float16 (ceil(V/16), columns/32, 16); fp16: not read.
        rows: V. columns: hidden; int4: a multiple of 32.
        x: address of float32 rows, `x_stride` floats apart; read by fp16 only.
        records: two records a token from `quantize_planes`, `stride` bytes apart; not read by fp16.
        logits: address of float32 rows, `logits_stride` floats apart; nothing beyond V is written.
        scratch: address of SCRATCH_BYTES of the calling thread's own.
        x_stride, stride, logits_stride: distances of rows, in the units said above. tokens: how many there are.
        first_group, last_group: the groups of 16 rows of the table to compute, the last one excluded.
    """
    by_gemm = AVX512 and not TILES and format == INT8 and tokens >= _GEMM_TOKENS
    if format in (TWO_BIT, BASE3) or by_gemm:
        _logits_of_planes(
            weight, scale, format, rows, columns, records, stride, tokens, logits, logits_stride, first_group,
            last_group, scratch,
        )  # fmt: skip
        return
    if TILES and format == INT4 and tokens >= _TILED_INT4_FROM:
        _tiled_int4_logits(
            weight, scale, rows, columns, records, stride, tokens, logits, logits_stride, first_group, last_group,
            scratch,
        )  # fmt: skip
        return
    if format == INT4:
        _int4_logits(
            weight, scale, rows, columns, records, stride, tokens, logits, logits_stride, first_group, last_group,
            scratch,
        )  # fmt: skip
        return
    if TILES and format == INT8 and tokens >= _TILED_TOKENS and columns % TILE_COLUMNS == 0:
        tiled = first_group + (last_group - first_group) // 4 * 4
        _tiled_int8_logits(
            weight, scale, rows, columns, records, stride, tokens, logits, logits_stride, first_group, tiled, scratch
        )
        first_group = tiled
    for group in range(first_group, last_group):
        row = 16 * group
        for n in range(tokens):
            out = logits + 4 * n * logits_stride
            if format == FP16:
                values = float32s(out, rows)
                for r in range(row, min(rows, row + 16)):
                    values[r] = _multiply_fp16(weight + 2 * r * columns, x + 4 * n * x_stride, columns, scratch)
                continue
            high = records + 2 * n * stride
            hi, lo = _multiply_int8(weight, (columns + 3) // 4, high, high + stride, group)
            product = _joined_planes(hi, lo, float32s(high, 1)[0], _row_scales(scale, row, rows, scratch))
            _write(row, rows, product, scratch, out)


@jit
def _half(bits):
    """A float16 from its bits, as float32; exact."""
    exponent, mantissa = np.int32((bits >> 10) & 31), np.float32(bits & 1023)
    if exponent == 31:
        size = np.float32(np.inf) if mantissa == 0 else np.float32(np.nan)
    elif exponent == 0:
        size = mantissa * np.float32(2.0**-24)
    else:
        size = (mantissa + np.float32(1024)) * np.float32(2.0 ** (exponent - 25))
    return -size if bits >> 15 else size


@jit
def _code(weight, format, block, lane):
    """One code of an integer table: number `lane` of a block."""
    if format == TWO_BIT:
        return np.int64((weight[64 * (block // 4) + lane] >> (2 * (block % 4))) & 3) - 1
    if format == BASE3:
        byte = np.int64(weight[64 * (block // 5) + lane])
        for _ in range(block % 5):
            byte //= 3
        return byte % 3 - 1
    if format == INT8:
        return np.int64(np.int8(weight[64 * block + lane]))
    return np.int64((weight[64 * (block // 2) + lane] >> (4 * (block % 2))) & 15) - INT4_OFFSET


@jit
def table_row(weight, scale, format, columns, row, out):
    """One row of a table as floats: the embedding of a token. ``codes * scale``, one rounding.

    Args:
        weight, scale, format, columns: as in `table_logits`.
        row: its number.
        out: address of float32 (columns,).
    """
    values = float32s(out, columns)
    if format == FP16:
        halves = float16s(weight + 2 * row * columns, columns)
        for i in range(columns):
            values[i] = _half(halves[i])
        return
    group, r = row // 16, row % 16
    blocks, groups = (columns + 3) // 4, columns // SUM_COLUMNS
    codes = uint8s(weight, 64 * blocks * (group + 1))  # an upper bound of where it ends
    factor = np.float32(0)
    if format == INT4:
        factors = float16s(scale + 32 * groups * group, 16 * groups)
    else:
        factor = float32s(scale, row + 1)[row]
    for i in range(columns):
        if format == INT4 and i % SUM_COLUMNS == 0:
            factor = _half(factors[16 * (i // SUM_COLUMNS) + r])
        values[i] = np.float32(_code(codes, format, group * blocks + i // 4, 4 * r + i % 4)) * factor


def multiply_table(
    x: np.ndarray, weight: np.ndarray, format: str, rows: int, scale: np.ndarray | None = None
) -> np.ndarray:
    """``x @ table.T`` in the calling thread; definition and order of the sums at the top.

    Args:
        x: float32 (N, hidden).
        weight: the table, also read-only or misaligned: uint8 (2bit, base3, int4) or int8 1-D from packing.py; fp16:
            float16 (V, hidden).
        format: one of MATRIX_FORMATS.
        rows: V.
        scale: float32 (V,); int4: float16 (ceil(V/16), hidden/32, 16) from `packing.pack_scales`; fp16: None.

    Returns: float32 (N, V). Numerics: exact integers of x rounded to 16 bits per token, then fp32.

    Raises:
        ValueError: another dtype or shape, or an unknown format.
    """
    if x.dtype != np.float32 or x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"x: expected float32 (N, hidden) with at least one column; got {x.dtype} {x.shape}")
    if format not in MATRIX_FORMATS:
        raise ValueError(f"format: expected one of {', '.join(MATRIX_FORMATS)}; got {format!r}")
    tokens, columns = x.shape
    scale_shape: tuple[int, ...] = (rows,)
    if format == "fp16":
        if weight.dtype != np.float16 or weight.shape != (rows, columns) or not weight.flags.c_contiguous:
            raise ValueError(
                f"weight: expected a contiguous float16 {(rows, columns)}; got {weight.dtype} {weight.shape} with strides "
                f"{weight.strides}"
            )
    else:
        if format == "int4":
            if columns % SUM_COLUMNS:
                raise ValueError(f"x: expected a multiple of {SUM_COLUMNS} columns for int4; got {columns}")
            scale_shape = (row_groups(rows), columns // SUM_COLUMNS, LANES)
        check_packed(weight, np.int8 if format == "int8" else np.uint8, packed_bytes(rows, columns, format))
        dtype = np.float16 if format == "int4" else np.float32
        if scale is None or scale.dtype != dtype or scale.shape != scale_shape or not scale.flags.c_contiguous:
            got = "None" if scale is None else f"{scale.dtype} {scale.shape} with strides {scale.strides}"
            raise ValueError(f"scale: expected a contiguous {np.dtype(dtype)} {scale_shape} for {format}; got {got}")
    x = np.ascontiguousarray(x)
    records = np.empty((2 * tokens, record_bytes(columns)), np.uint8)
    if format != "fp16":
        for n in range(tokens):
            quantize_planes(x[n].ctypes.data, columns, records[2 * n].ctypes.data, records.shape[1])
    logits = np.empty((tokens, rows), np.float32)
    scratch = np.empty(SCRATCH_BYTES, np.uint8)
    table_logits(
        weight.ctypes.data,
        0 if scale is None else scale.ctypes.data,
        MATRIX_FORMATS.index(format),
        rows,
        columns,
        x.ctypes.data,
        columns,
        records.ctypes.data,
        records.shape[1],
        tokens,
        logits.ctypes.data,
        rows,
        0,
        row_groups(rows),
        scratch.ctypes.data,
    )
    return logits
