"""The int8 products of training by AMX (tiles.py), or by tiles of sums in vector registers (byte_tiles.py): a left operand times
a right operand laid out in tiles.

    acc = left (M, K) @ right (K, N)        out = acc, or acc * (row_scale * column_scale) + bias in float32 or bf16

A right operand is 1,024 bytes for each 16 of its N columns and 64 of its K rows, in this order: what `lay_out_rows` makes
of codes (N, K), and `lay_out_columns` of codes (K, N). A left operand is rows of int8, or tiles of 16 of its M rows and 64 of
its K columns in this order (training_digits.py), which lie in fewer sets of the first-level cache and need no stride. K is
padded with zeros to whole tiles. Without AMX, an offset is added to each number of a right operand (byte_tiles.py).

A left operand in tiles may have three planes, the digits of a float32 (training_digits.py): ``out = joined(acc of each) *
row_scale``. The planes take turns with the same columns of the right operand, which stay in the first-level cache.

The sums over K stay in registers and are scaled and joined where they come out, in the first-level cache: oneDNN's product
writes them to memory, and a second function reads them there. AMX and vector instructions have units of their own, so with AMX
the sums of one block are scaled a few rows at a time between the products of the next one. Large float32 results are then
written past the caches (`stream`): a normal store would first read each line from memory.

Addresses are int64, strides in bytes. N is a multiple of 16, K of 64.
"""

import numpy as np

from bitdistill.kernels.cpu.byte_tiles import (
    BY_PAIRS,
    COLUMNS,
    ROWS,
    SCALED,
    STREAMED,
    SUMS,
    multiply_ternary_tile,
    multiply_tile,
)
from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.floats import LANES, add, end_streams, load_int32, multiply, repeat, splat, stream
from bitdistill.kernels.cpu.native import int8s, keep
from bitdistill.kernels.cpu.rows import get, put
from bitdistill.kernels.cpu.tile_layout import interleave_codes, transpose_ints
from bitdistill.kernels.cpu.tiles import (
    TILE_BYTES,
    TILE_COLUMNS,
    TILE_ROWS,
    TILES,
    configure,
    multiply_2x2_signed,
    release,
    store_sums_0,
    store_sums_1,
    store_sums_2,
    store_sums_3,
    zero_sums,
)
from bitdistill.kernels.cpu.training_digits import joined
from bitdistill.kernels.cpu.vector import add_bytes, load_bytes, repeat_byte, store_bytes

LEFT_BYTES = 1 << (14 if BY_PAIRS else 19)  # of the left operand that meet all columns at a time: they stay in a cache
STREAMED_BYTES = 1 << 20  # a float32 result of so many bytes is written past the caches: it would not stay in them
SUMS_BYTES = 4 * (2 * TILE_ROWS) ** 2  # of the int32 that leave the four tiles of sums
INT32, FLOAT32, BF16 = range(3)  # what a product writes
TOGETHER = 2 * TILE_ROWS if TILES else TILE_ROWS  # rows of whole blocks: with AMX of pairs of tiles, else of some ROWS


@jit
def _add_offset(tile, offset):
    if offset != 0:
        by = repeat_byte(offset)
        for line in range(TILE_ROWS):
            at = tile + TILE_COLUMNS * line
            store_bytes(at, add_bytes(load_bytes(at), by))


@jit
def lay_out_rows(first, last, codes, columns, offset, tiles):
    """The right operand ``codes.T``, of groups first .. last - 1 of 16 rows.

    Args:
        first, last: groups. codes: address of int8 (R, columns). columns: K, a multiple of 64.
        offset: that is added to each. tiles: address of int8 (R * columns,).
    """
    depth = columns // TILE_COLUMNS
    for group in range(first, last):
        for tile in range(depth):
            source = codes + TILE_ROWS * group * columns + TILE_COLUMNS * tile
            target = tiles + TILE_BYTES * (group * depth + tile)
            transpose_ints(source, columns, target, TILE_COLUMNS)
            _add_offset(target, offset)


@jit
def _whole(source, columns, count, room):
    """`count` rows of 16 bytes and zeros, 64 rows in all, at `room`."""
    rows = int8s(room, TILE_BYTES)
    rows[:] = 0
    for n in range(count):
        rows[16 * n : 16 * n + 16] = int8s(source + n * columns, 16)


@jit
def lay_out_columns(first, last, codes, rows, columns, offset, tiles):
    """The right operand ``codes``, of groups first .. last - 1 of 16 columns; rows beyond the last are zeros.

    Args:
        first, last: groups. codes: address of int8 (rows, columns). rows, columns: K and N.
        offset: that is added to each. tiles: address of int8 (N * K rounded up to a multiple of 64,).
    """
    depth = (rows + TILE_COLUMNS - 1) // TILE_COLUMNS
    room = np.empty(TILE_BYTES, np.int8)
    for tile in range(depth):
        count = min(TILE_COLUMNS, rows - TILE_COLUMNS * tile)
        for group in range(first, last):
            source, stride = codes + TILE_COLUMNS * tile * columns + TILE_ROWS * group, columns
            target = tiles + TILE_BYTES * (group * depth + tile)
            if count < TILE_COLUMNS:
                _whole(source, columns, count, room.ctypes.data)
                source, stride = room.ctypes.data, TILE_ROWS
            interleave_codes(source, stride, target, TILE_COLUMNS)
            _add_offset(target, offset)
    keep(room)


@jit
def _padded(rows):
    """Rows of a plane in tiles."""
    return (rows + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS


@jit
def _rows_at_once(row_bytes):
    """Rows of the left operand that meet all columns before the next ones."""
    return max(1, LEFT_BYTES // row_bytes // TOGETHER) * TOGETHER


@jit
def _is_streamed(kind, rows, width, out):
    """Whether a result is written past the caches."""
    return kind == FLOAT32 and 4 * rows * width >= STREAMED_BYTES and out % 64 == 0


@jit
def _put(address, value, half, streamed):
    if streamed:
        stream(address, value)
    else:
        put(address, value, LANES, half)


@jit
def _put_scaled(sums, count, width, row_scale, column_scale, bias, out, out_stride, half, streamed):
    """``out = sums * (row_scale * column_scale) + bias`` of `count` rows of 16 or 32 sums, rounded as `scale_rows` does; float32
    past the caches where `streamed`."""
    size = 2 if half else 4
    for n in range(count):
        by = repeat(row_scale + 4 * n) if row_scale != 0 else splat(np.float32(1))
        for i in range(0, width, LANES):
            scale = multiply(by, get(column_scale + 4 * i, LANES, False)) if column_scale != 0 else by
            value = multiply(load_int32(sums + 4 * (2 * TILE_ROWS * n + i)), scale)
            if bias != 0:
                value = add(value, get(bias + 4 * i, LANES, False))
            _put(out + n * out_stride + size * i, value, half, streamed)


@jit
def _put_joined(sums, count, width, row_scale, out, out_stride, streamed):
    """The sums of three planes joined as `join_rows` does, float32."""
    for n in range(count):
        by = repeat(row_scale + 4 * n)
        for i in range(0, width, LANES):
            value = joined(sums + 4 * (2 * TILE_ROWS * n + i), SUMS_BYTES, by)
            _put(out + n * out_stride + 4 * i, value, False, streamed)


@jit
def _put_sums(
    sums, done, count, row, column, wide, row_scale, column_scale, bias, out, width, half, streamed, planes
):  # fmt: skip
    """Rows done .. done + count - 1 of a block of sums, scaled and joined, to their place in the result.

    Args:
        sums: address of int32 (planes, 32, 32). row, column: of the result, where the block begins. wide: columns of it.
        done, count, row_scale, column_scale, bias, out, width, half, streamed, planes: see above.
    """
    row += done
    sums, by = sums + 8 * TILE_ROWS * done, row_scale + 4 * row if row_scale != 0 else 0
    size = 2 if half else 4
    target = out + size * (row * width + column)
    if planes > 1:
        _put_joined(sums, count, wide, by, target, size * width, streamed)
    else:
        scales, biases = column_scale + 4 * column if column_scale != 0 else 0, bias + 4 * column if bias != 0 else 0
        _put_scaled(sums, count, wide, by, scales, biases, target, size * width, half, streamed)


@jit
def _store(place, stride, count, wide):
    """The sums of `count` rows and 16 or 32 columns."""
    store_sums_0(place, stride)
    if wide > TILE_ROWS:
        store_sums_1(place + 4 * TILE_ROWS, stride)
    if count > TILE_ROWS:
        store_sums_2(place + TILE_ROWS * stride, stride)
        if wide > TILE_ROWS:
            store_sums_3(place + TILE_ROWS * stride + 4 * TILE_ROWS, stride)


@jit
def _multiply_bytes(
    first, last, left, rows, tiled, planes, right, depth, width, ternary, starts, row_scale, column_scale, bias, out, kind
):  # fmt: skip
    """`multiply_tiles` in vector registers. One plane's float32 sums are scaled there, too."""
    row_bytes, size, gap = TILE_COLUMNS * depth, 2 if kind == BF16 else 4, TILE_BYTES * depth
    stride, step = (TILE_COLUMNS, TILE_BYTES) if tiled else (row_bytes, TILE_COLUMNS)
    plane_rows, at_once = _padded(rows), _rows_at_once(planes * row_bytes)
    room = np.empty(planes * SUMS_BYTES, np.int8)
    sums, streamed = room.ctypes.data, _is_streamed(kind, rows, width, out)
    scaled = kind == FLOAT32 and planes == 1
    direct, what = scaled or kind == INT32, SUMS if not scaled else STREAMED if streamed else SCALED
    for begin in range(0, rows, at_once):
        for column in range(2 * TILE_ROWS * first, min(width, 2 * TILE_ROWS * last), COLUMNS):
            wide, codes = min(COLUMNS, width - column), right + column // TILE_ROWS * gap
            more, of_column = gap if wide > TILE_ROWS else 0, 4 * column
            for row in range(begin, min(rows, begin + at_once), ROWS):
                count = min(ROWS, rows - row)
                for plane in range(planes):
                    place, place_stride = sums + plane * SUMS_BYTES, 8 * TILE_ROWS
                    if direct:
                        place, place_stride = out + size * (row * width + column), size * width
                    at, in_tile = row + plane * plane_rows, row % TILE_ROWS
                    acts, start = left + (at - in_tile) * row_bytes + in_tile * stride, starts + 4 * at
                    ends = (place, place_stride, what, row_scale + 4 * row, column_scale + of_column, bias + of_column)
                    if BY_PAIRS and ternary:
                        multiply_ternary_tile(acts, stride, step, count, codes, more, depth, start, *ends)
                    else:
                        multiply_tile(acts, stride, step, count, codes, more, depth, start, *ends)
                if not direct:
                    scales = (row_scale, column_scale, bias, out, width, kind == BF16, streamed, planes)
                    _put_sums(sums, 0, count, row, column, wide, *scales)
    if streamed:
        end_streams()
    keep(room)


@jit
def multiply_tiles(
    first, last, left, rows, tiled, planes, right, depth, width, ternary, starts, row_scale, column_scale, bias, out, kind
):  # fmt: skip
    """The product, of pairs first .. last - 1 of 16 columns each.

    Args:
        first, last: pairs; the last one of a right operand may be half of one.
        left: address of int8 (rows, 64 * depth), or of its tiles. rows: M.
        tiled: whether left is in tiles. planes: 1, or 3 in tiles: then kind is FLOAT32, without column_scale and bias.
        right: address of the tiles of all columns. depth: K / 64. width: N.
        ternary: whether right has no other codes than -1, 0 and 1.
        starts: address of what `byte_tiles.row_starts` writes; not read where there is AMX.
        row_scale: address of float32 (M,). column_scale, bias: of float32 (N,). With AMX 0 stands for ones, or no bias.
        out: address of (M, N) numbers. kind: INT32 for the sums alone, else FLOAT32 or BF16.

    Numerics: sums exact modulo 2**32; product and sum with the scales rounded one by one as in the reference.
    """
    if not TILES:
        return _multiply_bytes(
            first, last, left, rows, tiled, planes, right, depth, width, ternary, starts, row_scale, column_scale, bias, out, kind
        )  # fmt: skip
    row_bytes, size, gap = TILE_COLUMNS * depth, 2 if kind == BF16 else 4, TILE_BYTES * depth
    stride, step = (TILE_COLUMNS, TILE_BYTES) if tiled else (row_bytes, TILE_COLUMNS)
    plane_rows, at_once = _padded(rows), _rows_at_once(planes * row_bytes)
    room = np.empty(2 * planes * SUMS_BYTES + TILE_COLUMNS, np.int8)
    sums = (room.ctypes.data + TILE_COLUMNS - 1) // TILE_COLUMNS * TILE_COLUMNS
    others = sums + planes * SUMS_BYTES
    streamed = _is_streamed(kind, rows, width, out)
    ends = (row_scale, column_scale, bias, out, width, kind == BF16, streamed, planes)
    configured = 0
    # Rows of sums that were not written yet, and where they belong.
    waiting = row_waiting = column_waiting = wide_waiting = 0
    for begin in range(0, rows, at_once):
        for pair in range(first, last):
            column = 2 * TILE_ROWS * pair
            wide = min(2 * TILE_ROWS, width - column)
            codes = right + 2 * gap * pair
            more_codes = codes + gap if wide > TILE_ROWS else codes
            for row in range(begin, min(rows, begin + at_once), 2 * TILE_ROWS):
                count = min(2 * TILE_ROWS, rows - row)
                at_a_time, written = (waiting + planes * depth - 1) // (planes * depth), 0
                for plane in range(planes):
                    place, place_stride = sums + plane * SUMS_BYTES, 8 * TILE_ROWS
                    if kind == INT32:
                        place, place_stride = out + size * (row * width + column), 4 * width
                    place_row, in_tile = row + plane * plane_rows, row % TILE_ROWS
                    acts = left + (place_row - in_tile) * row_bytes + in_tile * stride
                    if count != configured:
                        configure(count)
                        configured = count
                    else:
                        zero_sums()
                    more_acts = acts + TILE_ROWS * row_bytes if count > TILE_ROWS else acts
                    for tile in range(depth):
                        at, skip = step * tile, TILE_BYTES * tile
                        multiply_2x2_signed(acts + at, more_acts + at, stride, codes + skip, more_codes + skip)
                        if written < waiting:
                            more = min(at_a_time, waiting - written)
                            _put_sums(others, written, more, row_waiting, column_waiting, wide_waiting, *ends)
                            written += more
                    _store(place, place_stride, count, wide)
                if kind != INT32:
                    waiting, row_waiting, column_waiting, wide_waiting = count, row, column, wide
                    sums, others = others, sums
    _put_sums(others, 0, waiting, row_waiting, column_waiting, wide_waiting, *ends)
    if configured:
        release()
    if streamed:
        end_streams()
    keep(room)
