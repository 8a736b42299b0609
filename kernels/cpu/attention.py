"""Grouped-query attention over the KV cache: one pass with online softmax, in fp32 arithmetic, over a cache of fp32, bf16
or int8.

    s_p = attention_scale * q . k_p      out = sum_p e^(s_p - m) v_p / sum_p e^(s_p - m)      over the positions p of a row

Layout of the cache, per layer, slot and key/value head ("head" below; D head width, E = D padded to 16):

    keys     (capacity / 16, D, 16)   a lane is a position: 16 scores at once with no sum across lanes
    values   (capacity, E)            a lane is a dimension
             bf16 in pairs, as tile products want them: (capacity / 16, D' / 2, 16, 2), D' = D padded to 32 with zeros,
             and (capacity / 2, E, 2)
    scales   (capacity,), for keys and for values; int8 only: key = code * scale, scale = max|k| / 127 of that position

Positions are visited in chunks of CHUNK that begin at multiples of CHUNK. A position that a row may not see has weight 0
and leaves the row's sums as they are. Every SPAN positions have a maximum, a total and sums of their own, a part, which
begins with nothing; a row's parts are merged one after the other, the oldest first:

    m = max(m_a, m_b)    total = e^(m_a - m) total_a + e^(m_b - m) total_b    sums likewise

This is done whoever computes the parts: one thread for all of a row, or many threads for a few spans each. So the result of
a row depends on its own position, window and sequence only, and neither on which rows are computed together nor on the
threads. Rows of one prompt are computed in tiles: the query heads of
up to TILE_ROWS rows of one sequence are multiplied with each chunk of keys and values while it is in the first-level cache,
two queries at a time in registers, or four where there are 32 wide ones. Where there is AMX, a bf16 cache meets all queries of
a tile in tile products (tile_attention.py), in decoding, too: so the bits are the same.
"""

import numpy as np

from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.elementwise import ROW, copy_floats, padded
from bitdistill.kernels.cpu.floats import (
    LANES,
    add,
    divide,
    exp,
    largest_magnitude,
    load,
    load_bf16_half,
    load_int8,
    maximum,
    maximum_magnitude,
    multiply,
    multiply_add,
    repeat,
    round_bf16,
    splat,
    store,
    store_bf16,
    store_codes,
    subtract,
    total,
)
from bitdistill.kernels.cpu.native import float32s, int8s, uint16s, view_of
from bitdistill.kernels.cpu.records import BF16, CALL, FP32, INT8
from bitdistill.kernels.cpu.tile_attention import CHUNK, attend_tiles, soften, split_queries, tile_scratch_floats
from bitdistill.kernels.cpu.tiles import TILES
from bitdistill.kernels.cpu.vector import AVX512, prefetch
from bitdistill.kernels.numerics import ACT_MAX, EPSILON

BYTES = (4, 2, 1)  # of a cached number
SPAN = 512  # positions of a part, of which a thread computes one or more: 256 KB of keys and values in bf16, 128 wide
TILE_QUERIES = 16  # rows of a tile x query heads of a key/value head, but at least one row
_NONE_YET = np.float32(-3e38)  # the running maximum before any score: e^(-inf - it) is 0, not NaN
_caches = view_of(CALL, "_caches")


@jit
def tile_rows(heads_per_group):
    """Rows of one sequence that are worked on together."""
    return max(1, TILE_QUERIES // heads_per_group)


@jit
def part_floats(queries, head_dim):
    """Floats of a part: the sums of each query, then their totals, then their maxima."""
    return queries * (padded(head_dim) + 2 * LANES)


@jit
def attention_scratch_floats(heads_per_group, head_dim):
    """Floats of private memory that `attend` needs: queries of a tile, two parts, and four chunks of weights."""
    queries = tile_rows(heads_per_group) * heads_per_group
    floats = queries * padded(head_dim) + 2 * part_floats(queries, head_dim) + 4 * CHUNK + padded(head_dim)
    return floats + tile_scratch_floats(queries, head_dim) if TILES else floats


@jit
def first_span(position, window):
    """The oldest span that a row at this position sees; its newest is ``position // SPAN``."""
    return max(0, position - window + 1) // SPAN if window > 0 else 0


@jit
def key_rows(dtype, head_dim):
    """Numbers of a position's key in the cache."""
    return (head_dim + 31) // 32 * 32 if dtype == BF16 else head_dim


@jit
def _element_bytes(dtype):
    if dtype == FP32:
        return 4
    return 2 if dtype == BF16 else 1


@jit
def write_position(cache, head, position, key, value, head_dim, scratch):
    """Stores one position's key (after norm and RoPE) and value.

    Args:
        cache: record with the addresses keys, values, key_scales, value_scales, and dtype, capacity.
        head: ``(layer * slots + slot) * key/value heads + head``.
        key, value: addresses of float32 (head_dim,), padded with zeros to a multiple of 16.
        scratch: address of padded(head_dim) floats.
        position: where in the slot. head_dim: entries of a key or value.

    Numerics: bf16 rounded half to even, an infinity in a value becomes NaN (what tile products make of it depends on the
    other factor's digits); int8 as `quantize_activation` does it.
    """
    dtype, capacity, width = cache["dtype"], cache["capacity"], padded(head_dim)
    number = _element_bytes(dtype)
    rows, first = key_rows(dtype, head_dim), head * capacity + position // LANES * LANES
    keys = cache["keys"] + number * first * rows
    values = cache["values"] + number * (head * capacity + position) * width
    lane = position % LANES
    if dtype == FP32:
        column, row = float32s(keys, head_dim * LANES), float32s(key, head_dim)
        for d in range(head_dim):
            column[d * LANES + lane] = row[d]
        for at in range(0, 4 * width, ROW):
            store(values + at, load(value + at))
    elif dtype == BF16:
        for at in range(0, width, LANES):
            store_bf16(scratch + 2 * at, load(key + 4 * at))
            rounded = round_bf16(load(value + 4 * at))
            store_bf16(scratch + 2 * (width + at), add(rounded, multiply(rounded, splat(np.float32(0)))))
        columns, pairs = uint16s(keys, rows * LANES), uint16s(values - 2 * (position % 2) * width, 2 * width)
        halves = uint16s(scratch, 2 * width)
        for d in range(head_dim):
            columns[(d // 2 * LANES + lane) * 2 + d % 2] = halves[d]
        for d in range(head_dim, rows):
            columns[(d // 2 * LANES + lane) * 2 + d % 2] = 0
        for d in range(width):
            pairs[2 * d + position % 2] = halves[width + d]
    else:
        float32s(cache["key_scales"] + 4 * (head * capacity + position), 1)[0] = _quantize(key, width, scratch)
        codes, bytes_ = int8s(keys, head_dim * LANES), int8s(scratch, head_dim)
        for d in range(head_dim):
            codes[d * LANES + lane] = bytes_[d]
        float32s(cache["value_scales"] + 4 * (head * capacity + position), 1)[0] = _quantize(value, width, values)


@jit
def _quantize(x, width, codes):
    """Per-row absmax int8, as reference.quantize_activation; the scale."""
    peaks = splat(np.float32(EPSILON))
    for at in range(0, width, LANES):
        peaks = maximum_magnitude(peaks, load(x + 4 * at))
    peak = largest_magnitude(peaks)
    factor = splat(np.float32(ACT_MAX) / peak)
    for at in range(0, width, LANES):
        store_codes(codes + at, multiply(load(x + 4 * at), factor))
    return peak / np.float32(ACT_MAX)


@jit
def _vectors(at, other, dtype, odd):
    """Sixteen cached numbers at `at`, and sixteen at `other`, as floats; of pairs the first ones, or the second ones if `odd`.

    Callers give `odd` as a constant: so the first ones are a shift, and the second ones a mask, of what is loaded once for both.
    """
    if dtype == FP32:
        return load(at), load(other)
    if dtype == BF16:
        return load_bf16_half(at, odd), load_bf16_half(other, odd)
    return load_int8(at), load_int8(other)


@jit
def _add_two(a0, a1, b0, b1, x0, x1, factors, row):
    """``sums + factor * x`` of two rows' sums, whose factors are floats `row` bytes apart."""
    a, b = repeat(factors), repeat(factors + row)
    return multiply_add(a, x0, a0), multiply_add(a, x1, a1), multiply_add(b, x0, b0), multiply_add(b, x1, b1)


@jit
def _per_load(dtype):
    """Neighbors that a vector of the cache holds: two bf16 as a pair, else one number."""
    return 2 if dtype == BF16 else 1


@jit
def _scores(q0, q1, keys, dtype, head_dim, s0, s1):
    """q . k of two queries and the CHUNK positions at `keys`. Writes CHUNK floats to s0 and to s1.

    Of an odd `head_dim` in bf16, the last pair's second numbers are zeros, of the keys as of the queries.
    """
    a0 = a1 = b0 = b1 = splat(np.float32(0))
    step, row = LANES * _element_bytes(dtype), q1 - q0
    other = step * key_rows(dtype, head_dim)
    for d in range(0, head_dim, _per_load(dtype)):
        at, query = keys + d * step, q0 + 4 * d
        prefetch(at + 2 * other)
        prefetch(at + 3 * other)
        k0, k1 = _vectors(at, at + other, dtype, 0)
        a0, a1, b0, b1 = _add_two(a0, a1, b0, b1, k0, k1, query, row)
        if dtype == BF16:
            k0, k1 = _vectors(at, at + other, dtype, 1)
            a0, a1, b0, b1 = _add_two(a0, a1, b0, b1, k0, k1, query + 4, row)
    store(s0, a0)
    store(s0 + ROW, a1)
    store(s1, b0)
    store(s1 + ROW, b1)


@jit
def _scores_of_four(queries, width, keys, dtype, head_dim, scores):
    """`_scores` of four queries, `width` floats apart; their scores are CHUNK floats apart."""
    row = 4 * width
    a0 = a1 = b0 = b1 = c0 = c1 = d0 = d1 = splat(np.float32(0))
    step = LANES * _element_bytes(dtype)
    other = step * key_rows(dtype, head_dim)
    for d in range(0, head_dim, _per_load(dtype)):
        at, query = keys + d * step, queries + 4 * d
        prefetch(at + 2 * other)
        prefetch(at + 3 * other)
        k0, k1 = _vectors(at, at + other, dtype, 0)
        a0, a1, b0, b1 = _add_two(a0, a1, b0, b1, k0, k1, query, row)
        c0, c1, d0, d1 = _add_two(c0, c1, d0, d1, k0, k1, query + 2 * row, row)
        if dtype == BF16:
            k0, k1 = _vectors(at, at + other, dtype, 1)
            a0, a1, b0, b1 = _add_two(a0, a1, b0, b1, k0, k1, query + 4, row)
            c0, c1, d0, d1 = _add_two(c0, c1, d0, d1, k0, k1, query + 4 + 2 * row, row)
    store(scores, a0)
    store(scores + ROW, a1)
    store(scores + 2 * ROW, b0)
    store(scores + 3 * ROW, b1)
    store(scores + 4 * ROW, c0)
    store(scores + 5 * ROW, c1)
    store(scores + 6 * ROW, d0)
    store(scores + 7 * ROW, d1)


@jit
def _soften(scores, first, low, high, key_scales, value_scales, dtype, maxima, totals, sums, width):
    """One chunk of online softmax for one query: scores become weights; its sums shrink to the new maximum."""
    s0, s1 = load(scores), load(scores + ROW)
    if dtype == INT8:
        s0, s1 = multiply(s0, load(key_scales)), multiply(s1, load(key_scales + ROW))
    w0, w1 = soften(s0, s1, first, low, high, maxima, totals, sums, width)
    if dtype == INT8:
        w0, w1 = multiply(w0, load(value_scales)), multiply(w1, load(value_scales + ROW))
    store(scores, w0)
    store(scores + ROW, w1)


@jit
def _mix(w0, w1, values, dtype, first, last, width, sums0, sums1):
    """``sums += weights @ values`` of two queries, positions first .. last - 1 of a chunk."""
    size, pair, row = _element_bytes(dtype), _per_load(dtype), w1 - w0
    for d in range(0, width, 2 * LANES):
        other = LANES if d + LANES < width else 0  # the last tile may be a single vector: it is then done twice
        gap, column = size * pair * other, values + size * pair * d
        a0, a1, b0, b1 = (
            load(sums0 + 4 * d),
            load(sums0 + 4 * (d + other)),
            load(sums1 + 4 * d),
            load(sums1 + 4 * (d + other)),
        )
        for p in range(first - first % pair, last, pair):
            at, weight = column + size * p * width, w0 + 4 * p
            prefetch(at + CHUNK * size * width)
            if p >= first:
                v0, v1 = _vectors(at, at + gap, dtype, 0)
                a0, a1, b0, b1 = _add_two(a0, a1, b0, b1, v0, v1, weight, row)
            if dtype == BF16 and p + 1 < last:
                v0, v1 = _vectors(at, at + gap, dtype, 1)
                a0, a1, b0, b1 = _add_two(a0, a1, b0, b1, v0, v1, weight + 4, row)
        store(sums0 + 4 * d, a0)
        store(sums0 + 4 * (d + other), a1)
        store(sums1 + 4 * d, b0)
        store(sums1 + 4 * (d + other), b1)


@jit
def _mix_four(weights, values, dtype, first, last, width, sums):
    """`_mix` of four queries, whose weights are CHUNK floats apart, and their sums `width`."""
    size, row, pair = _element_bytes(dtype), 4 * width, _per_load(dtype)
    for d in range(0, width, 2 * LANES):
        other = LANES if d + LANES < width else 0  # the last tile may be a single vector: it is then done twice
        gap, column = size * pair * other, values + size * pair * d
        low, high = sums + 4 * d, sums + 4 * (d + other)
        a0, a1, b0, b1 = load(low), load(high), load(low + row), load(high + row)
        c0, c1, d0, d1 = load(low + 2 * row), load(high + 2 * row), load(low + 3 * row), load(high + 3 * row)
        for p in range(first - first % pair, last, pair):
            at, weight = column + size * p * width, weights + 4 * p
            prefetch(at + CHUNK * size * width)
            if p >= first:
                v0, v1 = _vectors(at, at + gap, dtype, 0)
                a0, a1, b0, b1 = _add_two(a0, a1, b0, b1, v0, v1, weight, 4 * CHUNK)
                c0, c1, d0, d1 = _add_two(c0, c1, d0, d1, v0, v1, weight + 8 * CHUNK, 4 * CHUNK)
            if dtype == BF16 and p + 1 < last:
                v0, v1 = _vectors(at, at + gap, dtype, 1)
                a0, a1, b0, b1 = _add_two(a0, a1, b0, b1, v0, v1, weight + 4, 4 * CHUNK)
                c0, c1, d0, d1 = _add_two(c0, c1, d0, d1, v0, v1, weight + 4 + 8 * CHUNK, 4 * CHUNK)
        store(low, a0)
        store(high, a1)
        store(low + row, b0)
        store(high + row, b1)
        store(low + 2 * row, c0)
        store(high + 2 * row, c1)
        store(low + 3 * row, d0)
        store(high + 3 * row, d1)


@jit
def _weights(queries, head_dim, scratch):
    """Where the memory begins that an `attend_span` needs for itself: behind queries and two parts."""
    return scratch + 4 * (queries * padded(head_dim) + 2 * part_floats(queries, head_dim))


@jit
def prepare(cache_at, queries, head_dim, scratch):
    """What `attend_span` needs once before the first span of a tile: see there. `queries`: rows x heads_per_group."""
    if TILES and _caches(cache_at, 1)[0]["dtype"] == BF16:
        split_queries(scratch, queries, head_dim, _weights(queries, head_dim, scratch) + 16 * CHUNK)


@jit
def attend_span(cache_at, head, position, rows, heads_per_group, window, head_dim, span, part, scratch):
    """The part of one span: online softmax over its positions, for the rows of `attend`.

    Args:
        cache_at, head, position, rows, heads_per_group, window, head_dim, scratch: as in `attend`, after `prepare`. The queries
            stay as they are.
        span: positions SPAN * span .. SPAN * (span + 1) - 1.
        part: address of part_floats(rows * heads_per_group, head_dim) floats, to be written; those of a query that does not
            see the span are not meant to be used.
    """
    cache = _caches(cache_at, 1)[0]
    dtype, capacity, width = cache["dtype"], cache["capacity"], padded(head_dim)
    number, queries = _element_bytes(dtype), rows * heads_per_group
    sums = part
    totals = sums + 4 * queries * width
    maxima = totals + ROW * queries
    weights = _weights(queries, head_dim, scratch)
    for query in range(queries):
        store(totals + ROW * query, splat(np.float32(0)))
        store(maxima + ROW * query, splat(_NONE_YET))
        for at in range(0, 4 * width, ROW):
            store(sums + 4 * query * width + at, splat(np.float32(0)))
    end = min(position + rows, SPAN * (span + 1))
    oldest_seen = max(0, position - window + 1) if window > 0 else 0
    begin = max(oldest_seen // CHUNK * CHUNK, SPAN * span)
    tiled = TILES and dtype == BF16
    if tiled:
        attend_tiles(
            cache["keys"] + 2 * head * capacity * key_rows(dtype, head_dim), cache["values"] + 2 * head * capacity * width,
            begin, end, position, heads_per_group, window, head_dim, queries, sums, totals, maxima,
            weights + 16 * CHUNK,
        )  # fmt: skip
    for first in range(begin, 0 if tiled else end, CHUNK):
        keys = cache["keys"] + number * (head * capacity + first) * key_rows(dtype, head_dim)
        values = cache["values"] + number * (head * capacity + first) * width
        key_scales = cache["key_scales"] + 4 * (head * capacity + first)
        value_scales = cache["value_scales"] + 4 * (head * capacity + first)
        query = 0
        while query < queries:
            four = AVX512 and queries - query >= 4
            last = min(query + (4 if four else 2), queries) - 1  # of an odd number the last one is its own partner
            if first >= position + last // heads_per_group + 1:
                query = last + 1
                continue  # all of it is the future of these
            w1, q0, q1 = weights + 4 * CHUNK * (last - query), scratch + 4 * query * width, scratch + 4 * last * width
            if four:
                _scores_of_four(q0, width, keys, dtype, head_dim, weights)
            else:
                _scores(q0, q1, keys, dtype, head_dim, weights, w1)
            for each in range(query, last + 1):
                row = position + each // heads_per_group
                low = max(0, row - window + 1) if window > 0 else 0
                _soften(
                    weights + 4 * CHUNK * (each - query), first, low, row + 1, key_scales, value_scales, dtype,
                    maxima + ROW * each, totals + ROW * each, sums + 4 * each * width, width,
                )  # fmt: skip
            oldest = position + query // heads_per_group
            low = max(0, oldest - window + 1 - first) if window > 0 else 0
            high = min(CHUNK, position + last // heads_per_group + 1 - first)
            if four:
                _mix_four(weights, values, dtype, low, high, width, sums + 4 * query * width)
            else:
                _mix(weights, w1, values, dtype, low, high, width, sums + 4 * query * width, sums + 4 * last * width)
            query = last + 1


@jit
def merge_span(part, whole, span, position, queries, heads_per_group, window, head_dim):
    """Adds a part to what a row's older parts have become: online softmax of two sums. The oldest one is copied.

    Args:
        part: address of what `attend_span` wrote. span: which one that was. whole: address of as many floats, updated.
        position, heads_per_group, window, head_dim: as in `attend`. queries: rows x heads_per_group.
    """
    width = padded(head_dim)
    for query in range(queries):
        row = position + query // heads_per_group
        oldest = first_span(row, window)
        if span < oldest or span > row // SPAN:
            continue
        sums, totals = 4 * query * width, 4 * queries * width + ROW * query
        maxima = totals + ROW * queries
        if span == oldest:
            copy_floats(part + sums, whole + sums, width)
            store(whole + totals, load(part + totals))
            store(whole + maxima, load(part + maxima))
            continue
        before, new = load(whole + maxima), load(part + maxima)
        top = maximum(new, before)
        shrink, share = exp(subtract(before, top)), exp(subtract(new, top))
        store(whole + maxima, top)
        store(whole + totals, multiply_add(load(part + totals), share, multiply(load(whole + totals), shrink)))
        for at in range(sums, sums + 4 * width, ROW):
            store(whole + at, multiply_add(load(part + at), share, multiply(load(whole + at), shrink)))


@jit
def finish_parts(whole, queries, head_dim, out):
    """``sums / total`` of each query.

    Args:
        whole: address of merged parts. queries: how many. head_dim: entries of each.
        out: address of float32 (queries, padded(head_dim)).
    """
    width = padded(head_dim)
    for query in range(queries):
        by = splat(total(load(whole + 4 * queries * width + ROW * query)))
        for at in range(4 * query * width, 4 * (query + 1) * width, ROW):
            store(out + at, divide(load(whole + at), by))


@jit
def attend(cache_at, head, position, rows, heads_per_group, window, head_dim, scratch):
    """Attention of the query heads of one key/value head, for `rows` neighboring positions of one sequence.

    Args:
        cache_at: address of a record as in `write_position`; the keys and values of all these rows are written already.
        head: ``(layer * slots + slot) * key/value heads + head``.
        position: of the first row. rows: at most `tile_rows`.
        window: a row sees that many last positions, itself included; 0 is all.
        scratch: address of `attention_scratch_floats` floats. Query g of row r lies at float
            ``(r * heads_per_group + g) * padded(head_dim)``, multiplied by attention_scale; its result takes its place.
        heads_per_group: query heads per key/value head. head_dim: entries of a query, key or value.

    Numerics: fp32; on a bf16 or int8 cache the arithmetic is the same on the rounded numbers.
    """
    queries = rows * heads_per_group
    whole = scratch + 4 * queries * padded(head_dim)
    part = whole + 4 * part_floats(queries, head_dim)
    prepare(cache_at, queries, head_dim, scratch)
    for span in range(first_span(position, window), (position + rows - 1) // SPAN + 1):
        attend_span(cache_at, head, position, rows, heads_per_group, window, head_dim, span, part, scratch)
        merge_span(part, whole, span, position, queries, heads_per_group, window, head_dim)
    finish_parts(whole, queries, head_dim, scratch)
