"""Attention in training on a CPU, forward and backward, in float32.

    S = scale * Q K^T, -inf where a query may not look      P = softmax(S)       O = P V
    dV = P^T dO     dP = dO V^T     dS = P * (dP - sum of P * dP over a row)     dQ = scale * dS K     dK = scale * dS^T Q

A thread does all query heads of one key/value head of a sequence, QUERIES positions at a time, whose scores with all positions
stay in its caches; nothing of size T x T is in memory. Squares of QUERIES x QUERIES scores at either end of a row that nobody
looks at (half of all, where attention is causal) are not computed. Beside its inputs, the backward pass needs two numbers of
each row from the forward one: the largest score, and 1 over the sum of e^(S - largest).

Operands are copied to where products (float_tiles.py) read them, with zeros around them: keys and values also transposed, queries
times scale. Where these copies of one head outgrow the second-level cache, at LARGEST, PyTorch's own attention is faster.

Addresses are int64, strides in bytes. Suffixes: B sequences, H query heads, G key/value heads, T positions, D head width.
"""

import numpy as np
import torch
from torch import Tensor

from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.float_tiles import COLUMNS, ROWS, add_tile, multiply_tile
from bitdistill.kernels.cpu.floats import (
    LANES,
    add,
    exp,
    largest,
    load,
    maximum,
    multiply,
    multiply_add,
    splat,
    store,
    subtract,
    total,
)
from bitdistill.kernels.cpu.native import float32s, int64s, keep, uint8s
from bitdistill.kernels.cpu.rows import get, put, share_rows
from bitdistill.kernels.cpu.vector import prefetch

QUERIES = COLUMNS  # positions of queries that are worked on together, and the width of a square of scores
ROW = 4 * LANES  # bytes of a vector
WORK = 4  # numbers of an operand in the table: address, strides of b, h and t
Q, K, V, OUT, DO, DQ, DK, DV, MASK, ROWS_SEEN = range(
    10
)  # places in the table; ROWS_SEEN: largest and 1 / sum, of each row
PART, DEPTH = 512, 64  # positions, and columns of a head, that are summed one by one: a sum of sums has smaller errors
LARGEST = 1 << 17  # T * D
LOWEST = np.float32(-3e38)  # below all finite scores, above -inf: a row that sees nothing has weights of 0, not NaN


@jit
def _place(table, operand, b, h, t):
    """Address of an operand's row."""
    work = int64s(table + 8 * WORK * operand, WORK)
    return work[0] + b * work[1] + h * work[2] + t * work[3]


@jit
def _step(table, operand):
    """Bytes from one position of an operand to the next."""
    return int64s(table + 8 * WORK * operand, WORK)[3]


@jit
def _copy(source, step, half, rows, all_rows, width, to, to_step, factor):
    """``rows`` rows of an operand times a factor, as float32; zeros to the end of each row of to_step bytes and of all_rows."""
    by = splat(factor)
    for t in range(all_rows):
        for i in range(0, to_step // 4, LANES):
            value = splat(np.float32(0))
            if t < rows and i < width:
                value = multiply(get(source + t * step + (2 if half else 4) * i, width - i, half), by)
            store(to + t * to_step + 4 * i, value)


@jit
def _fetch(row, width, half):
    """Asks for a row that is needed in a moment."""
    for at in range(0, (2 if half else 4) * width, 64):
        prefetch(row + at)


@jit
def _across(rows, step, count, width, to):
    """float32 (count, width), its rows step bytes apart, as squares of (width, QUERIES), one for each QUERIES of its rows."""
    for first in range(0, count, LANES):
        square = to + 4 * (first // QUERIES * QUERIES * width + first % QUERIES)
        for d in range(width):
            column = float32s(square + 4 * QUERIES * d, LANES)
            for lane in range(LANES):
                column[lane] = float32s(rows + (first + lane) * step + 4 * d, 1)[0]


@jit
def _seen(table, b, t, positions, causal, bias, width):
    """What is added to the scores of a query: 0 where it looks, else -inf, `width` float32 at `bias`."""
    room = float32s(bias, width)
    room[:] = -np.inf
    if causal:
        room[: t + 1] = 0
    else:
        looks = uint8s(_place(table, MASK, b, 0, t), positions)
        for p in range(positions):
            if looks[p] != 0:
                room[p] = 0


@jit
def _range_seen(table, b, first, rows, positions, causal):
    """The first position that `rows` queries look at, and the one after the last, in whole squares and at least one."""
    low, high = 0, first + rows
    if not causal:
        low, high = positions, 0
        for t in range(first, first + rows):
            looks = uint8s(_place(table, MASK, b, 0, t), positions)
            for p in range(low):
                if looks[p] != 0:
                    low = p
                    break
            for p in range(positions - 1, high - 1, -1):
                if looks[p] != 0:
                    high = p + 1
                    break
    low = min(low, positions - 1) // QUERIES * QUERIES
    return low, max(low + QUERIES, (high + QUERIES - 1) // QUERIES * QUERIES)


@jit
def _scores(left, left_step, rows, squares, depth, low, high, out, out_step):
    """``left @ right`` for columns low .. high - 1 of right (depth, .), which lies `_across`; rows a multiple of ROWS."""
    step = 4 * QUERIES
    for c in range(low, high, QUERIES):
        square = squares + 4 * c * depth
        for m in range(0, rows, ROWS):
            row, place = left + m * left_step, out + m * out_step + 4 * c
            multiply_tile(row, left_step, 4, square, step, min(DEPTH, depth), place, out_step)
            for d in range(DEPTH, depth, DEPTH):
                add_tile(row + 4 * d, left_step, 4, square + d * step, step, min(DEPTH, depth - d), place, out_step)


@jit
def _mixed(left, left_step, rows, right, right_step, low, high, width, out):
    """``left @ right`` summed over low .. high - 1, PART of them at a time; right and out have rows of right_step bytes."""
    for part in range(low, high, PART):
        count, first = min(PART, high - part), right + part * right_step
        for at in range(0, 4 * width, 4 * COLUMNS):
            for m in range(0, rows, ROWS):
                weights, place = left + m * left_step + 4 * part, out + m * right_step + at
                if part == low:
                    multiply_tile(weights, left_step, 4, first + at, right_step, count, place, right_step)
                else:
                    add_tile(weights, left_step, 4, first + at, right_step, count, place, right_step)


@jit
def _gathered(weights, weights_step, right, rows, width, low, high, out):
    """``out[p] += sum over rows of weights[row, p] * right[row]`` for positions low .. high - 1."""
    step = 4 * width
    for p in range(low, high, ROWS):
        for n in range(0, width, COLUMNS):
            add_tile(weights + 4 * p, 4, weights_step, right + 4 * n, step, rows, out + p * step + 4 * n, step)


@jit
def _weights(scores, bias, low, high):
    """Scores of a row become e^(S - largest); returns the largest, and 1 over the sum, 0 where nothing is seen."""
    peaks = splat(LOWEST)
    for at in range(4 * low, 4 * high, ROW):
        value = add(load(scores + at), load(bias + at))
        store(scores + at, value)
        peaks = maximum(value, peaks)
    peak = largest(peaks)
    sums, by = splat(np.float32(0)), splat(peak)
    for at in range(4 * low, 4 * high, ROW):
        value = exp(subtract(load(scores + at), by))
        store(scores + at, value)
        sums = add(sums, value)
    whole = total(sums)
    return peak, np.float32(0) if whole == 0 else np.float32(1) / whole


@jit
def _weights_and_gradients(scores, gradients, bias, low, high, peak, inverse):
    """Of a row: S becomes P, and dP becomes dS before its scale."""
    by, factor, dots = splat(peak), splat(inverse), splat(np.float32(0))
    for at in range(4 * low, 4 * high, ROW):
        weight = multiply(exp(subtract(add(load(scores + at), load(bias + at)), by)), factor)
        store(scores + at, weight)
        dots = multiply_add(weight, load(gradients + at), dots)
    mean = splat(total(dots))
    for at in range(4 * low, 4 * high, ROW):
        store(gradients + at, multiply(load(scores + at), subtract(load(gradients + at), mean)))


@jit
def _write(rows, step, count, width, to, to_step, half, factors):
    """`count` rows, each times its factor, to an operand's place."""
    for t in range(count):
        by = splat(float32s(factors + 4 * t, 1)[0])
        for i in range(0, width, LANES):
            put(to + t * to_step + (2 if half else 4) * i, multiply(load(rows + t * step + 4 * i), by), width - i, half)


@jit
def attend_forward(first, last, table, groups, heads, positions, head_dim, scale, causal, half):
    """O, and ROWS_SEEN, of all query heads of key/value heads first .. last - 1, counted over all sequences.

    Args:
        first, last: b * groups + g.
        table: address of int64 (10, WORK): for each operand its address and its strides of b, h and t; MASK is uint8, with a
            stride of 0 for h; ROWS_SEEN is float32 (B, H, T, 2); the others are float32, or bf16, with neighboring columns.
        groups, heads: G, and H / G. positions, head_dim: T and D.
        scale: of the scores. causal: position t sees 0 .. t, and MASK is not read. half: whether operands are bf16.
    """
    width = (head_dim + COLUMNS - 1) // COLUMNS * COLUMNS
    padded = (positions + QUERIES - 1) // QUERIES * QUERIES
    row = 4 * width
    step = 4 * (padded + LANES)  # a power of two would put all rows of a column into one set of the cache
    floats = padded * (2 * width + head_dim) + QUERIES * (2 * width + padded + LANES) + padded
    room = np.empty(floats, np.float32)
    keys = room.ctypes.data
    values = keys + padded * row
    keys_across = values + padded * row
    queries = keys_across + 4 * head_dim * padded
    mixed = queries + QUERIES * row
    scores = mixed + QUERIES * row
    bias = scores + QUERIES * step
    factors = np.empty(QUERIES, np.float32)
    one = np.float32(1)
    for unit in range(first, last):
        b, g = unit // groups, unit % groups
        _copy(_place(table, K, b, g, 0), _step(table, K), half, positions, padded, head_dim, keys, row, one)
        _copy(_place(table, V, b, g, 0), _step(table, V), half, positions, padded, head_dim, values, row, one)
        _across(keys, row, padded, head_dim, keys_across)
        for h in range(g * heads, (g + 1) * heads):
            for begin in range(0, positions, QUERIES):
                rows = min(QUERIES, positions - begin)
                tiles = (rows + ROWS - 1) // ROWS * ROWS
                low, high = _range_seen(table, b, begin, rows, positions, causal)
                place = _place(table, Q, b, h, begin)
                _copy(place, _step(table, Q), half, rows, tiles, head_dim, queries, row, scale)
                _scores(queries, row, tiles, keys_across, head_dim, low, high, scores, step)
                for t in range(rows):
                    _fetch(_place(table, Q, b, h, begin + QUERIES + t), head_dim, half)
                    _fetch(_place(table, OUT, b, h, begin + t), head_dim, half)
                    _seen(table, b, begin + t, positions, causal, bias, padded)
                    peak, inverse = _weights(scores + t * step, bias, low, high)
                    factors[t] = inverse
                    seen = float32s(_place(table, ROWS_SEEN, b, h, begin + t), 2)
                    seen[0], seen[1] = peak, inverse
                _mixed(scores, step, tiles, values, row, low, high, width, mixed)
                place = _place(table, OUT, b, h, begin)
                _write(mixed, row, rows, head_dim, place, _step(table, OUT), half, factors.ctypes.data)
    keep(room)


@jit
def attend_backward(first, last, table, groups, heads, positions, head_dim, scale, causal, half):
    """dQ, dK and dV of the same heads, from dO and ROWS_SEEN; everything as in `attend_forward`."""
    width = (head_dim + COLUMNS - 1) // COLUMNS * COLUMNS
    padded = (positions + QUERIES - 1) // QUERIES * QUERIES
    row, step = 4 * width, 4 * (padded + LANES)
    floats = padded * (4 * width + 2 * head_dim) + QUERIES * (3 * width + 2 * (padded + LANES)) + padded
    room = np.empty(floats, np.float32)
    keys = room.ctypes.data
    values = keys + padded * row
    dk = values + padded * row
    dv = dk + padded * row
    keys_across = dv + padded * row
    values_across = keys_across + 4 * head_dim * padded
    queries = values_across + 4 * head_dim * padded
    douts = queries + QUERIES * row
    mixed = douts + QUERIES * row
    scores = mixed + QUERIES * row
    gradients = scores + QUERIES * step
    bias = gradients + QUERIES * step
    scales, ones, one = np.full(QUERIES, scale, np.float32), np.ones(padded, np.float32), np.float32(1)
    for unit in range(first, last):
        b, g = unit // groups, unit % groups
        _copy(_place(table, K, b, g, 0), _step(table, K), half, positions, padded, head_dim, keys, row, one)
        _copy(_place(table, V, b, g, 0), _step(table, V), half, positions, padded, head_dim, values, row, one)
        _across(keys, row, padded, head_dim, keys_across)
        _across(values, row, padded, head_dim, values_across)
        float32s(dk, 2 * padded * width)[:] = 0  # dv, too
        for h in range(g * heads, (g + 1) * heads):
            for begin in range(0, positions, QUERIES):
                rows = min(QUERIES, positions - begin)
                tiles = (rows + ROWS - 1) // ROWS * ROWS
                low, high = _range_seen(table, b, begin, rows, positions, causal)
                place = _place(table, Q, b, h, begin)
                _copy(place, _step(table, Q), half, rows, tiles, head_dim, queries, row, scale)
                place = _place(table, DO, b, h, begin)
                _copy(place, _step(table, DO), half, rows, tiles, head_dim, douts, row, one)
                _scores(queries, row, tiles, keys_across, head_dim, low, high, scores, step)
                _scores(douts, row, tiles, values_across, head_dim, low, high, gradients, step)
                for t in range(rows):
                    _fetch(_place(table, Q, b, h, begin + QUERIES + t), head_dim, half)
                    _fetch(_place(table, DO, b, h, begin + QUERIES + t), head_dim, half)
                    _fetch(_place(table, DQ, b, h, begin + t), head_dim, half)
                    _seen(table, b, begin + t, positions, causal, bias, padded)
                    seen = float32s(_place(table, ROWS_SEEN, b, h, begin + t), 2)
                    _weights_and_gradients(scores + t * step, gradients + t * step, bias, low, high, seen[0], seen[1])
                _mixed(gradients, step, tiles, keys, row, low, high, width, mixed)
                place = _place(table, DQ, b, h, begin)
                _write(mixed, row, rows, head_dim, place, _step(table, DQ), half, scales.ctypes.data)
                _gathered(gradients, step, queries, rows, width, low, high, dk)
                _gathered(scores, step, douts, rows, width, low, high, dv)
        _write(dk, row, positions, head_dim, _place(table, DK, b, g, 0), _step(table, DK), half, ones.ctypes.data)
        _write(dv, row, positions, head_dim, _place(table, DV, b, g, 0), _step(table, DV), half, ones.ctypes.data)
    keep(room)


def _share(kernel, operands: dict[int, Tensor], mask: Tensor | None, scale: float) -> None:
    """Runs a kernel on operands (B, H or G, T, D) by their place in the table."""
    table = np.zeros((10, WORK), np.int64)
    for place, x in operands.items():
        table[place] = x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:3])
    if mask is not None:
        table[MASK] = mask.data_ptr(), mask.stride(0), 0, mask.stride(2)
    (B, H, T, D), G = operands[Q].shape, operands[K].shape[1]
    half = operands[Q].dtype == torch.bfloat16
    work = (table.ctypes.data, G, H // G, T, D, np.float32(scale), mask is None, half)
    share_rows(kernel, B * G, H // G * T * T, *work, block=1)


def _rows(x: Tensor) -> Tensor:
    """x with neighboring columns."""
    x = x.detach()
    return x if x.stride(3) == 1 else x.contiguous()


def _room(x: Tensor) -> Tensor:
    """For a result like x (B, H, T, D), which is (B, T, H, D) in memory."""
    B, H, T, D = x.shape
    return torch.empty((B, T, H, D), dtype=x.dtype).transpose(1, 2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        seen, out = torch.empty((*q.shape[:3], 2), dtype=torch.float32), _room(q)
        if q.numel():
            _share(attend_forward, {Q: _rows(q), K: _rows(k), V: _rows(v), OUT: out, ROWS_SEEN: seen}, mask, scale)
        ctx.save_for_backward(q, k, v, mask, seen)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        *qkv, mask, seen = ctx.saved_tensors
        grads = [_room(x) for x in qkv]
        if dout.numel():
            operands = dict(zip((Q, K, V, DQ, DK, DV), (*map(_rows, qkv), *grads), strict=True))
            _share(attend_backward, operands | {DO: _rows(dout), ROWS_SEEN: seen}, mask, ctx.scale)
        return *grads, None, None


@torch.compiler.disable
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """``softmax(scale * Q K^T + seen) V`` of each query head with its key/value head, and its gradients.

    Args:
        q: float32 or bf16 (B, H, T, D), any strides. k, v: (B, G, T, D) of the same dtype; H is a multiple of G, and heads
            h * H / G to (h + 1) * H / G - 1 share k[:, h].
        mask: bool (B or 1, 1, T, T), True where a query (row) looks at a position; None for causal attention.
        scale: of the scores.

    Returns: (B, H, T, D) in this dtype, (B, T, H, D) in memory. A row that sees nothing is zero, and so is its gradient.

    Numerics: products and sums in float32, of bf16 operands too; sums over positions in their order, so the number of
    threads changes no bit.
    """
    if mask is not None:
        mask = mask.expand(len(q), -1, -1, -1)
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
    return _Attention.apply(q, k, v, mask, scale)
