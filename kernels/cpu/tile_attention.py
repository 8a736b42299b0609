"""Attention over a bf16 cache by tile products (tiles.py): the loop of attention.py where there is AMX.

Keys and values are bf16 and so operands as they lie in the cache. Queries and weights are fp32: each is the sum of three
bf16 numbers, its first, second and third eight bits, and each of these is multiplied, so that only sums are rounded.

    scores (16 queries x 32 positions)    the products of the queries' first part, plus those of the other two
    sums (16 queries x E)                 += weights (16 x 32) @ values (32 x E), for each part of the weights

One row's numbers do not depend on the other rows of a tile: an instruction adds the products of each row in one order. A
position that a row may not see has weight 0, which an infinity or NaN in its value would turn into NaN. So where not all
rows see all positions of a chunk, values that are not finite are left out of the products, and make NaN of the sums of
those rows that see them, as the products would.

Addresses are int64, strides are bytes.
"""

import numpy as np

from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.elementwise import ROW, padded
from bitdistill.kernels.cpu.floats import (
    LANES,
    add,
    between,
    cut_to_bf16,
    exp,
    largest,
    load,
    load_bf16_half,
    maximum,
    multiply,
    multiply_add,
    nan_where_not_finite,
    splat,
    store,
    store_cut_bf16,
    subtract,
    total,
)
from bitdistill.kernels.cpu.native import float32s, uint16s
from bitdistill.kernels.cpu.tiles import (
    TILE_ROWS,
    configure,
    load_sums_0,
    load_sums_1,
    load_sums_2,
    load_sums_3,
    multiply_keys,
    multiply_values,
    release,
    store_sums_0,
    store_sums_1,
    store_sums_2,
    store_sums_3,
    zero_sums,
)
from bitdistill.kernels.cpu.vector import prefetch

CHUNK = 32  # positions: two vectors of scores, the columns of a tile of weights
PARTS = 3
DEPTH = 32  # columns of a tile of bf16
_SCORES = 4 * CHUNK * TILE_ROWS  # bytes of a tile's scores
_WEIGHTS = 2 * CHUNK * TILE_ROWS  # bytes of one part of a tile's weights


@jit
def _deep(head_dim):
    """`head_dim` rounded up to whole tiles."""
    return (head_dim + DEPTH - 1) // DEPTH * DEPTH


@jit
def tile_scratch_floats(queries, head_dim):
    """Floats of private memory that `attend_tiles` needs: parts of queries, scores, parts of weights, a chunk of values."""
    return (PARTS * 2 * queries * _deep(head_dim) + 2 * _SCORES + PARTS * _WEIGHTS + 2 * CHUNK * padded(head_dim)) // 4


@jit
def _store_parts(value, at, part_bytes):
    """Sixteen floats as three bf16 each: their first, second and third eight bits."""
    first = cut_to_bf16(value)
    rest = subtract(value, first)
    second = cut_to_bf16(rest)
    store_cut_bf16(at, first)
    store_cut_bf16(at + part_bytes, second)
    store_cut_bf16(at + 2 * part_bytes, subtract(rest, second))


@jit
def soften(s0, s1, first, low, high, maxima, totals, sums, width):
    """One chunk of online softmax for one query: its totals and sums shrink to the new maximum; the weights of CHUNK positions.

    Args:
        s0, s1: their scores. first: the first of these positions.
        low, high: the query sees positions low .. high - 1.
        maxima, totals, sums: addresses of the query's; updated. width: of its sums, in floats.
    """
    s0, s1 = between(s0, low - first, high - first), between(s1, low - first - LANES, high - first - LANES)
    before, top = load(maxima), largest(maximum(s0, s1))
    if not top <= float32s(maxima, 1)[0]:  # else all that is below would be multiplied by 1
        now = maximum(splat(top), before)
        shrink = exp(subtract(before, now))
        store(maxima, now)
        store(totals, multiply(load(totals), shrink))
        for at in range(0, 4 * width, ROW):
            store(sums + at, multiply(load(sums + at), shrink))
        before = now
    w0, w1 = exp(subtract(s0, before)), exp(subtract(s1, before))
    store(totals, add(load(totals), add(w0, w1)))
    return w0, w1


@jit
def _soften(scores, first, low, high, maxima, totals, sums, width, weights):
    """One chunk of online softmax for one query: its scores become the parts of its weights."""
    s0, s1 = add(load(scores), load(scores + _SCORES)), add(load(scores + ROW), load(scores + _SCORES + ROW))
    w0, w1 = soften(s0, s1, first, low, high, maxima, totals, sums, width)
    _store_parts(w0, weights, _WEIGHTS)
    _store_parts(w1, weights + 2 * LANES, _WEIGHTS)


@jit
def _all_finite(values, width):
    """Whether no number of a chunk of values is an infinity or NaN."""
    zero = splat(np.float32(0))
    a = b = c = d = zero
    for at in range(
        values, values + 2 * CHUNK * width, 2 * ROW
    ):  # 0 x infinity is NaN; a pair is a float like its second
        a, b = multiply_add(load(at), zero, a), multiply_add(load_bf16_half(at, 0), zero, b)
        c, d = multiply_add(load(at + ROW), zero, c), multiply_add(load_bf16_half(at + ROW, 0), zero, d)
    return total(add(add(a, b), add(c, d))) == np.float32(0)


@jit
def _copy_finite(values, width, clean):
    """A chunk of values with 0 in place of what is not finite."""
    numbers, copies = uint16s(values, CHUNK * width), uint16s(clean, CHUNK * width)
    for i in range(CHUNK * width):
        copies[i] = 0 if numbers[i] & 0x7F80 == 0x7F80 else numbers[i]


@jit
def _spoil(values, width, low, high, sums):
    """NaN for each sum to which positions low .. high - 1 of a chunk give an infinity or NaN."""
    for p in range(low, high):
        for d in range(0, width, LANES):
            value = load_bf16_half(values + 4 * (p // 2 * width + d), p % 2)
            store(sums + 4 * d, add(load(sums + 4 * d), nan_where_not_finite(value)))


@jit
def split_queries(queries, count, head_dim, scratch):
    """The parts of queries, as `attend_tiles` reads them at `scratch`; the arguments are its own."""
    width, depth = padded(head_dim), _deep(head_dim)
    for query in range(count):
        for d in range(0, depth, LANES):
            value = load(queries + 4 * (query * width + d)) if d < width else splat(np.float32(0))
            _store_parts(value, scratch + 2 * (query * depth + d), 2 * count * depth)


@jit
def attend_tiles(
    keys, values, begin, end, position, heads_per_group, window, head_dim, count, sums, totals, maxima, scratch
):
    """The sums of `attention.attend_span`, for a bf16 cache.

    Args:
        keys, values: addresses of this head's. begin: the first position, a multiple of CHUNK. end: the last one + 1.
        position: of the first row. heads_per_group, window, head_dim: as in `attend`.
        count: rows x heads_per_group.
        sums, totals, maxima: addresses of their zeros and of maxima below all scores, as in `attend_span`; they are updated.
        scratch: address of `tile_scratch_floats` floats that begin with the parts of the queries; fastest if 64 divides it.

    Numerics: products of fp32 by bf16 are exact, as sums of three; sums are fp32, in the order of the tile products.
    """
    width, depth = padded(head_dim), _deep(head_dim)
    part_bytes = 2 * count * depth
    scores = scratch + PARTS * part_bytes
    weights = scores + 2 * _SCORES
    clean = weights + PARTS * _WEIGHTS
    for start in range(0, count, TILE_ROWS):
        piece = min(TILE_ROWS, count - start)
        oldest, newest = position + start // heads_per_group, position + (start + piece - 1) // heads_per_group
        configure(piece)
        for first in range(begin, min(newest + 1, end), CHUNK):
            chunk_keys, chunk_values = keys + 2 * first * depth, values + 2 * first * width
            ahead = piece < TILE_ROWS and first + CHUNK <= newest  # few queries wait for memory
            if ahead:
                for at in range(0, 2 * CHUNK * depth, 64):
                    prefetch(chunk_keys + 2 * CHUNK * depth + at)
            zero_sums()
            for d in range(0, depth, DEPTH):
                at = chunk_keys + 2 * LANES * d
                multiply_keys(scratch + 2 * (start * depth + d), part_bytes, 2 * depth, at, at + 2 * LANES * depth)
            store_sums_0(scores, 4 * CHUNK)
            store_sums_1(scores + _SCORES, 4 * CHUNK)
            store_sums_2(scores + ROW, 4 * CHUNK)
            store_sums_3(scores + _SCORES + ROW, 4 * CHUNK)
            if ahead:
                for at in range(0, 2 * CHUNK * width, 64):
                    prefetch(chunk_values + 2 * CHUNK * width + at)
            for each in range(piece):
                query = start + each
                row = position + query // heads_per_group
                low = max(0, row - window + 1) if window > 0 else 0
                _soften(
                    scores + 4 * CHUNK * each, first, low, row + 1, maxima + ROW * query, totals + ROW * query,
                    sums + 4 * query * width, width, weights + 2 * CHUNK * each,
                )  # fmt: skip
            source, spoiled = chunk_values, False
            partly = first + CHUNK > oldest + 1 or (window > 0 and newest - window + 1 > first)
            if partly and not _all_finite(chunk_values, width):
                _copy_finite(chunk_values, width, clean)
                source, spoiled = clean, True
            for d in range(0, width, 4 * LANES):
                at, more, stride = sums + 4 * (start * width + d), min(3, (width - d) // LANES - 1), 4 * width
                load_sums_0(at, stride)
                if more > 0:
                    load_sums_1(at + ROW, stride)
                if more > 1:
                    load_sums_2(at + 2 * ROW, stride)
                if more > 2:
                    load_sums_3(at + 3 * ROW, stride)
                multiply_values(weights, _WEIGHTS, 2 * CHUNK, source + 4 * d, stride, more)
                store_sums_0(at, stride)
                if more > 0:
                    store_sums_1(at + ROW, stride)
                if more > 1:
                    store_sums_2(at + 2 * ROW, stride)
                if more > 2:
                    store_sums_3(at + 3 * ROW, stride)
            if spoiled:
                for each in range(piece):
                    query = start + each
                    row = position + query // heads_per_group
                    low = max(0, row - window + 1 - first) if window > 0 else 0
                    _spoil(chunk_values, width, low, min(CHUNK, row + 1 - first), sums + 4 * query * width)
        release()
