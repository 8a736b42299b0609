"""Products of small int8 matrices for compiled code, a tile of int32 sums in vector registers at a time: what tiles.py does by
AMX, for the processors without it.

    sums[m, n] = starts[m] + sum over k of left[m, k] * right[k, n]         ROWS x COLUMNS sums, k over whole tiles
    out[m, n] = sums[m, n], or sums[m, n] * (row_scale[m] * column_scale[n]) + bias[n] in float32

Operands lie as those of training_tiles.py: four neighboring numbers of a left row are repeated in all lanes, and 64 bytes of the
right operand hold four summed columns of each of 16 results. So a left operand is rows of any stride, or tiles of 16 rows of
64 bytes.

vpdpbusd adds four products of unsigned and signed bytes to an int32, without saturation. There the right operand is kept as
``code + OFFSET``, and what that adds to a sum, OFFSET times the sum of the left row, is taken away where the sums begin
(`row_starts`). With AVX2 alone there are only sums of two products in an int16, which saturate:

    ternary codes    are kept as code + TERNARY_OFFSET, 0 to 2: a tile of 64 columns adds up to 16 * 508, and is then widened
    other codes      are kept as they are: |code| times the number with the sign of the code, at most 2 * 127**2, widened at once

Eight rows of two vectors are what hides the latency of vpdpbusd, and keep the loads of operands well below the multiplications.
On 16 registers of half that width there is room for four rows of one.
"""

import ctypes

import numpy as np
from llvmlite import ir
from numba import types

from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.floats import stream_lanes
from bitdistill.kernels.cpu.native import keep, native
from bitdistill.kernels.cpu.tile_layout import transpose_ints
from bitdistill.kernels.cpu.tiles import TILES
from bitdistill.kernels.cpu.vector import (
    AVX512,
    SIGNED_OFFSET,
    WIDE,
    add_ints,
    dot_bytes,
    dot_signed,
    load_bytes,
    load_ints,
    mul_ints,
    pair_products,
    repeat_byte,
    repeat_int,
    repeat_lanes,
    store_ints,
    sub_bytes,
    widen_words,
)

OFFSET = 0 if TILES else SIGNED_OFFSET  # what a right operand's codes are kept with
BY_PAIRS = not WIDE  # whether ternary codes have an instruction of their own, and another offset
TERNARY_OFFSET = 1 if BY_PAIRS else OFFSET
ROWS, GROUPS = (8, 2) if AVX512 else (4, 1)
COLUMNS = 16 * GROUPS
SUMS, SCALED, STREAMED = range(3)  # what is written: int32; float32; float32 past the caches, to whole lines
QUADS = 16 if AVX512 else 2  # of a tile at a time: with few registers more would be kept in memory
_TILE_QUADS, _TILE_BYTES, _LINE = 16, 1024, 64  # four summed columns each, of a tile; of a tile; of a row of it
_I64, _I32 = ir.IntType(64), ir.IntType(32)
_INTS, _WORDS, _BYTES = (ir.VectorType(ir.IntType(bits), 512 // bits) for bits in (32, 16, 8))
_FLOATS = ir.VectorType(ir.FloatType(), 16)


def _at(address, count, dtype):
    size = count * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(int(address)), dtype)


def _py_tile(
    left, left_row, left_step, count, right, gap, depth, starts, out, out_row, kind, row_scale, column_scale, bias
):
    for m in range(ROWS):
        n = min(m, count - 1)
        for group in range(GROUPS):
            line = _LINE * group if gap else 0
            sums, place = np.full(16, _at(starts + 4 * n, 1, np.int32)[0]), out + n * out_row + line
            for tile in range(depth):
                row = _at(left + n * left_row + tile * left_step, _LINE, np.int8).astype(np.int32)
                codes = _at(right + group * gap + tile * _TILE_BYTES, _TILE_BYTES, np.uint8 if OFFSET else np.int8)
                products = codes.reshape(_TILE_QUADS, 16, 4).astype(np.int32) * row.reshape(_TILE_QUADS, 1, 4)
                sums += products.sum((0, 2), np.int32)
            if kind == SUMS:
                _at(place, 16, np.int32)[:] = sums
            else:
                scale = _at(row_scale + 4 * n, 1, np.float32) * _at(column_scale + line, 16, np.float32)
                _at(place, 16, np.float32)[:] = sums.astype(np.float32) * scale + _at(bias + line, 16, np.float32)
    return 0


def _word(value):
    return ir.Constant(_I64, value)


def _load(builder, address, kind):
    value = builder.load(builder.inttoptr(address, ir.PointerType(kind)))
    value.align = 1
    return value


def _loop(builder, count, values, body):
    """IR: the values after `count` turns, one or more, of ``values = body(turn, values)``."""
    before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("loop.end")
    builder.branch(loop)
    builder.position_at_end(loop)
    turn, *carried = (builder.phi(value.type) for value in [_I64(0), *values])
    results = [builder.add(turn, _word(1)), *body(turn, carried)]
    builder.cbranch(builder.icmp_signed("<", results[0], count), loop, after)
    for value, first, later in zip([turn, *carried], [_word(0), *values], results, strict=True):
        value.add_incoming(first, before)
        value.add_incoming(later, builder.block)
    builder.position_at_end(after)
    return results[1:]


def _write(builder, values, places, kind):
    """Stores every value at its place, past the caches where kind is STREAMED."""
    with builder.if_else(builder.icmp_signed("==", kind, _word(STREAMED))) as (past, otherwise):
        with past:
            for place, value in zip(places, values, strict=True):
                stream_lanes(builder, place, value)
        with otherwise:
            _store(builder, values, places)


def _store(builder, values, places):
    for place, value in zip(places, values, strict=True):
        builder.store(value, builder.inttoptr(place, ir.PointerType(value.type)), align=1)


def _tile(
    builder, by_pairs, left, left_row, left_step, count, right, gap, depth, starts, out, out_row, kind, row_scale, column_scale,
    bias,
):  # fmt: skip
    """The loop over tiles, which carries all sums, and in it one over their quads; then the sums are written."""
    last, rows, scales, places, first = builder.sub(count, _word(1)), [], [], [], []
    line = builder.select(builder.icmp_signed("==", gap, _word(0)), _word(0), _word(_LINE))
    lines = [_word(0), line][:GROUPS]
    for m in range(ROWS):
        n = builder.select(builder.icmp_signed("<", _word(m), count), _word(m), last)
        rows.append(builder.add(left, builder.mul(n, left_row)))
        scales.append(builder.add(row_scale, builder.mul(n, _word(4))))
        start = _load(builder, builder.add(starts, builder.mul(n, _word(4))), _I32)
        for group in range(GROUPS):
            places.append(builder.add(builder.add(out, builder.mul(n, out_row)), lines[group]))
            first.append(repeat_lanes(builder, start, _INTS))

    def add_tile(tile, sums):
        skip, at = builder.mul(tile, left_step), builder.add(right, builder.mul(tile, _word(_TILE_BYTES)))

        def add_quads(turn, results):
            results = list(results)
            line = builder.add(at, builder.mul(turn, _word(_LINE * QUADS)))
            quads = builder.add(skip, builder.mul(turn, _word(4 * QUADS)))
            for quad in range(QUADS):
                codes = [
                    _load(builder, builder.add(end, _word(_LINE * quad)), _BYTES)
                    for end in [line, builder.add(line, gap)][:GROUPS]
                ]
                for m, row in enumerate(rows):
                    four = _load(builder, builder.add(builder.add(row, quads), _word(4 * quad)), _I32)
                    acts = builder.bitcast(repeat_lanes(builder, four, _INTS), _BYTES)
                    for group in range(GROUPS):
                        place = GROUPS * m + group
                        if by_pairs:
                            results[place] = builder.add(results[place], pair_products(builder, codes[group], acts))
                        else:
                            results[place] = dot_bytes(builder, results[place], codes[group], acts)
            return results

        begin = [ir.Constant(_WORDS, [0] * 32)] * len(sums) if by_pairs else sums
        results = _loop(builder, _word(_TILE_QUADS // QUADS), begin, add_quads)
        if not by_pairs:
            return results
        return [builder.add(value, widen_words(builder, words)) for value, words in zip(sums, results, strict=True)]

    sums = _loop(builder, depth, first, add_tile)
    with builder.if_else(builder.icmp_signed("==", kind, _word(SUMS))) as (integers, floats):
        with integers:
            _store(builder, sums, places)
        with floats:
            columns = [_load(builder, builder.add(column_scale, line), _FLOATS) for line in lines]
            biases = [_load(builder, builder.add(bias, line), _FLOATS) for line in lines]
            values = []
            for m, scale in enumerate(scales):
                row = repeat_lanes(builder, _load(builder, scale, ir.FloatType()), _FLOATS)
                for group in range(GROUPS):
                    value = builder.sitofp(sums[GROUPS * m + group], _FLOATS)
                    value = builder.fmul(value, builder.fmul(row, columns[group]))
                    values.append(builder.fadd(value, biases[group]))
            _write(builder, values, places, kind)
    return _word(0)


_SIGNATURE = types.int64(*[types.int64] * 14)


@native(_SIGNATURE, _py_tile)
def multiply_tile(
    builder, left, left_row, left_step, count, right, gap, depth, starts, out, out_row, kind, row_scale, column_scale, bias
):  # fmt: skip
    """The tile of sums of `depth` tiles of 64 summed columns, one or more. Returns 0.

    left is the address of the first of `count` rows, left_row bytes apart; the next 64 columns of a row lie left_step bytes on.
    right is the address of the tiles of the first 16 columns, those of the next ones lie `gap` bytes on, 0 where there are none;
    starts that of an int32 for each row. The rows are written to out, out_row bytes apart: the sums themselves where kind is
    SUMS, else scaled: row_scale, column_scale and bias are addresses of float32, one for each row and column of the tile.
    """
    work = (left, left_row, left_step, count, right, gap, depth, starts, out, out_row, kind)
    return _tile(builder, False, *work, row_scale, column_scale, bias)


@native(_SIGNATURE, _py_tile)
def multiply_ternary_tile(
    builder, left, left_row, left_step, count, right, gap, depth, starts, out, out_row, kind, row_scale, column_scale, bias
):  # fmt: skip
    """The same where BY_PAIRS, with a right operand of ternary codes. Returns 0."""
    work = (left, left_row, left_step, count, right, gap, depth, starts, out, out_row, kind)
    return _tile(builder, True, *work, row_scale, column_scale, bias)


@jit
def _lane_sums(row, stride, step, count, depth, room):
    """The sums of up to 16 rows of int8, one in each lane; room: 1,024 bytes."""
    one = repeat_byte(1)
    for m in range(16):
        sums, at = repeat_int(0), row + min(m, count - 1) * stride
        for tile in range(depth):
            sums = dot_signed(sums, sub_bytes(one, repeat_byte(OFFSET)), load_bytes(at + step * tile))
        store_ints(room + _LINE * m, sums)
    transpose_ints(room, _LINE, room, _LINE)
    sums = repeat_int(0)
    for m in range(16):
        sums = add_ints(sums, load_ints(room + _LINE * m))
    return sums


@jit
def row_starts(first, last, left, rows, tiled, planes, depth, offset, starts):
    """-offset times the sum of each row, of groups first .. last - 1 of 16 rows of each plane.

    Args:
        first, last: groups. left, rows, tiled, planes, depth: as in training_tiles.multiply_tiles.
        offset: of the right operand. starts: address of int32 (planes, rows rounded up to a multiple of 16).
    """
    groups, room = (rows + 15) // 16, np.empty(_TILE_BYTES, np.int8)
    stride, step = (_LINE, _TILE_BYTES) if tiled else (_LINE * depth, _LINE)
    for group in range(first, last):
        for plane in range(planes):
            at = plane * groups + group
            row = left + 16 * _LINE * depth * at
            sums = _lane_sums(row, stride, step, min(16, rows - 16 * group), depth, room.ctypes.data)
            store_ints(starts + 64 * at, mul_ints(sums, repeat_int(-offset)))
    keep(room)
