"""The product of grouped.py for many tokens where there is AMX: tile products (tiles.py) with a stop after each group.

    y = sum_g(weight_scale_g * acc_g)        acc_g = sum(u * act_codes) - sum(act_codes) over group g

A group of 64 columns is a tile, a wider one several. The sums of each stop of a chunk go from the tiles into `scratch`, for
16 tokens and four row groups. From there, as in grouped.py, they become floats, are scaled, and are added up in the order of
the groups, for four tokens at a time, whose chains of additions overlap.

Addresses are int64.
"""

import numpy as np

from bitdistill.kernels.cpu.activations import CODES
from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.floats import add, load, multiply, splat, store
from bitdistill.kernels.cpu.native import float32s, int32s
from bitdistill.kernels.cpu.tiles import (
    TILE_COLUMNS,
    TILE_ROWS,
    TILES,
    configure,
    multiply_1x4,
    release,
    store_sums_0,
    store_sums_1,
    store_sums_2,
    store_sums_3,
    zero_sums,
)
from bitdistill.kernels.cpu.unpacking import MARGIN, unpack_blocks
from bitdistill.kernels.cpu.vector import floats_of, load_halves, load_ints, repeat_int, sub_ints

CHUNK = 64  # blocks, 256 columns: a whole number of groups
GROUPS = 4  # row groups
_SLOT = 64 * CHUNK + 2 * MARGIN
_SUMS = 64 * TILE_ROWS  # bytes of a stop's sums of one row group
_STOPS = 4 * CHUNK // TILE_COLUMNS  # of a chunk, at most
TILED_GROUPED_BYTES = GROUPS * (_SLOT + _STOPS * _SUMS) + 64 if TILES else 0


@jit
def scaled(total, sums, at, gap, rows):
    """total + (sums - act_sum) * (act_scale * rows), 16 floats.

    Args:
        at: address of act_sum. gap: bytes from there to the block's act_scale; 0: there is none.
        total, rows: 16 floats. sums: 16 int32.
    """
    if gap != 0:
        rows = multiply(splat(float32s(at + gap, 1)[0]), rows)
    return add(total, multiply(floats_of(sub_ints(sums, repeat_int(int32s(at, 1)[0]))), rows))


@jit
def _multiply_stops(source, count, group_blocks, acts, stride, sums):
    """The integers of each stop of `count` blocks, for up to 16 tokens and four row groups: int32 (stops, 4, 16, 16)."""
    columns = 4 * group_blocks
    for start in range(0, 4 * count, columns):
        zero_sums()
        for column in range(start, min(start + columns, 4 * count), TILE_COLUMNS):
            multiply_1x4(acts + column, stride, source + 16 * column, _SLOT)
        store_sums_0(sums, 64)
        store_sums_1(sums + _SUMS, 64)
        store_sums_2(sums + 2 * _SUMS, 64)
        store_sums_3(sums + 3 * _SUMS, 64)
        sums += GROUPS * _SUMS


@jit
def _add_four(sums, stops, act_sums, stride, scales, begins, acc, acc_stride):
    """The stops of four tokens and one row group onto the float sums at `acc`, or as their begin."""
    t0, t1, t2, t3 = splat(np.float32(0)), splat(np.float32(0)), splat(np.float32(0)), splat(np.float32(0))
    if not begins:
        t0, t1, t2, t3 = load(acc), load(acc + acc_stride), load(acc + 2 * acc_stride), load(acc + 3 * acc_stride)
    for stop in range(stops):
        by, at, here = load_halves(scales + 32 * stop), act_sums + 4 * stop, sums + GROUPS * _SUMS * stop
        t0 = scaled(t0, load_ints(here), at, 0, by)
        t1 = scaled(t1, load_ints(here + 64), at + stride, 0, by)
        t2 = scaled(t2, load_ints(here + 128), at + 2 * stride, 0, by)
        t3 = scaled(t3, load_ints(here + 192), at + 3 * stride, 0, by)
    store(acc, t0)
    store(acc + acc_stride, t1)
    store(acc + 2 * acc_stride, t2)
    store(acc + 3 * acc_stride, t3)


@jit
def _add_one(sums, stops, act_sums, scales, begins, acc):
    total = splat(np.float32(0)) if begins else load(acc)
    for stop in range(stops):
        by = load_halves(scales + 32 * stop)
        total = scaled(total, load_ints(sums + GROUPS * _SUMS * stop), act_sums + 4 * stop, 0, by)
    store(acc, total)


@jit
def tiled_grouped_gemm(
    weight, packing, blocks, scales, groups, group_blocks, sums_at, records, stride, tokens, acc, acc_stride,
    first_group, last_group, scratch,
):  # fmt: skip
    """`grouped.grouped_gemm` for any number of tokens, by tile products.

    Args:
        weight, packing, scales, records, stride, tokens, acc, acc_stride, first_group, last_group: as there.
        blocks: of a row group, ceil(I / 4). groups: of columns. group_blocks: of one: 16, 32 or 64.
        sums_at: offset in a record of the groups' sums of codes.
        scratch: address of TILED_GROUPED_BYTES of the calling thread's own.

    Numerics: as there, bit for bit.
    """
    sums = (scratch + 63) // 64 * 64
    unpacked = sums + GROUPS * _STOPS * _SUMS + MARGIN
    configured = 0
    for group in range(first_group, last_group, GROUPS):
        slots = min(GROUPS, last_group - group)
        for chunk in range(0, blocks, CHUNK):
            count = min(CHUNK, blocks - chunk)
            first_stop, stops = chunk // group_blocks, (count + group_blocks - 1) // group_blocks
            for slot in range(slots):
                unpack_blocks(weight, packing, (group + slot) * blocks + chunk, count, unpacked + slot * _SLOT)
            for n in range(0, tokens, TILE_ROWS):
                rows = min(TILE_ROWS, tokens - n)
                if rows != configured:
                    configure(rows)
                    configured = rows
                record = records + n * stride
                _multiply_stops(unpacked, count, group_blocks, record + CODES + 4 * chunk, stride, sums)
                act_sums = record + sums_at + 4 * first_stop
                for slot in range(slots):
                    by = scales + 32 * (groups * (group + slot) + first_stop)
                    out, here = acc + 4 * n * acc_stride + 64 * (group + slot), sums + _SUMS * slot
                    for row in range(0, rows // 4 * 4, 4):
                        at, to = act_sums + row * stride, out + 4 * row * acc_stride
                        _add_four(here + 64 * row, stops, at, stride, by, chunk == 0, to, 4 * acc_stride)
                    for row in range(rows // 4 * 4, rows):
                        at, to = act_sums + row * stride, out + 4 * row * acc_stride
                        _add_one(here + 64 * row, stops, at, by, chunk == 0, to)
    release()
