"""The three products of an LM head by AMX (tiles.py), bf16 operands and fp32 sums.

    z = x W^T  bf16 (N, V)        dx = dz W  fp32 (N, H)        dW = factor dz^T x  fp32 (V, H), or added to it

A right operand lies in tiles of 16 columns and 32 summed rows: 16 lines of 64 bytes, one for each two summed rows, in which the
16 columns stand as pairs. W is the right operand of two products, and is laid out anew for each, a block of words at a time in
the second-level cache; a copy of it in bf16 never exists. x is the right operand of the third and is laid out once; the left
operand there, ``dz^T``, is made from a block of words.

Two rows of tiles and two columns of tiles are multiplied at a time over DEPTH summed tiles. What all of them read of one operand
then stays in the first-level cache, which decides the speed: twice the depth is a third slower, four times the depth half as
fast. dW is written once, past the caches, after the sum over all tokens.

Everything is padded to multiples of 32 with zeros: tokens, words and hidden units alike. dx is summed in SLICES parts
of the vocabulary, which do not depend on the number of threads.

Addresses are int64, strides in bytes. Shape suffixes: N rows, H hidden, V vocabulary.
"""

import numpy as np
import torch
from torch import Tensor

from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.floats import (
    LANES,
    add,
    copy_pairs,
    end_streams,
    load,
    multiply,
    splat,
    store_bf16,
    store_pairs,
    stream,
    stream_bf16,
)
from bitdistill.kernels.cpu.native import keep
from bitdistill.kernels.cpu.rows import get, put, rows_of, share_rows
from bitdistill.kernels.cpu.tile_layout import transpose_ints
from bitdistill.kernels.cpu.tiles import (
    TILES,
    configure,
    load_sums_0,
    load_sums_1,
    load_sums_2,
    load_sums_3,
    multiply_2x2_bf16,
    release,
    store_sums_0,
    store_sums_1,
    store_sums_2,
    store_sums_3,
    zero_sums,
)

PAIR = 32  # rows of two tiles, columns of two tiles, and summed columns of one
TILE_BYTES, LINE = 1024, 64
DEPTH = 9  # tiles that are summed at a time
LOGIT_WORDS, HIDDEN_WORDS, WEIGHT_WORDS = (
    256,
    512,
    128,
)  # of a block, with whose operands a product fills the second-level cache
TOKENS = 1024  # of a part of dx
SLICES = 8


@jit
def _aligned(room):
    """The first whole cache line of an array."""
    return (room.ctypes.data + LINE - 1) // LINE * LINE


@jit
def _steps(depth):
    """Into how many parts of equal depth, DEPTH tiles at most, and how deep they are."""
    parts = (depth + DEPTH - 1) // DEPTH
    return (depth + parts - 1) // parts


@jit
def _lay_rows(source, stride, half, rows, columns, room, tile):
    """A tile of 16 columns, which are rows of the source, and 32 summed rows, which are its columns.

    Args:
        rows, columns: how many the source has from here on, any number.
        room: address of 1,024 bytes.
    """
    size = 2 if half else 4
    for n in range(LANES):
        for i in range(0, PAIR, LANES):
            value = splat(np.float32(0))
            if n < rows and i < columns:
                value = get(source + n * stride + size * i, columns - i, half)
            store_bf16(room + LINE * n + 2 * i, value)
    transpose_ints(room, LINE, tile, LINE)


@jit
def _lay_pairs(source, stride, half, rows, columns, tile):
    """A tile of 16 columns and 32 summed rows, which both are those of the source."""
    for n in range(0, PAIR, 2):
        a = b = splat(np.float32(0))
        if n < rows and columns > 0:
            a = get(source + n * stride, columns, half)
        if n + 1 < rows and columns > 0:
            b = get(source + (n + 1) * stride, columns, half)
        store_pairs(tile + LINE * (n // 2), a, b)


@jit
def _add_products(left, left_step, left_stride, left_more, right, depth, pairs, sums, stride, fresh):
    """``sums = (0 if fresh else sums) + left @ right`` of 32 rows and `pairs` times 32 columns, over `depth` tiles.

    Args:
        left: address of the tiles of the first 16 rows, one each `left_step` bytes, with rows `left_stride` apart.
        left_more: bytes from those to the tiles of the other 16 rows.
        right: address of (pairs, 2, depth) tiles.
        sums: address of float32 rows, `stride` bytes apart.
    """
    second = sums + 16 * stride
    for pair in range(pairs):
        at, tiles = 4 * PAIR * pair, right + 2 * TILE_BYTES * depth * pair
        if fresh:
            zero_sums()
        else:
            load_sums_0(sums + at, stride)
            load_sums_1(sums + at + LINE, stride)
            load_sums_2(second + at, stride)
            load_sums_3(second + at + LINE, stride)
        more = tiles + TILE_BYTES * depth
        for tile in range(depth):
            here, skip = left + left_step * tile, TILE_BYTES * tile
            multiply_2x2_bf16(here, here + left_more, left_stride, tiles + skip, more + skip)
        store_sums_0(sums + at, stride)
        store_sums_1(sums + at + LINE, stride)
        store_sums_2(second + at, stride)
        store_sums_3(second + at + LINE, stride)


@jit
def logit_words(first, last, x, tokens, hidden, weight, weight_stride, half, words, z, z_stride):
    """Columns of z, of words first .. last - 1, and zeros up to a multiple of 32 at the end.

    Args:
        first, last: words; multiples of LOGIT_WORDS but for the end.
        x: address of bf16 (tokens, hidden rounded up to a multiple of 32). tokens: a multiple of 32. hidden: H.
        weight: address of W's rows. weight_stride, half: of these. words: V.
        z: address of bf16 rows. z_stride: of these.
    """
    depth, size = (hidden + PAIR - 1) // PAIR, 2 if half else 4
    step, x_stride = _steps(depth), 2 * PAIR * depth
    right_room = np.empty(2 * LOGIT_WORDS * PAIR * depth + TILE_BYTES + LINE, np.int8)
    sums_room = np.empty(PAIR * LOGIT_WORDS + LANES, np.float32)
    room, sums = _aligned(right_room), _aligned(sums_room)
    right = room + TILE_BYTES
    configure(PAIR)
    for begin in range(first, last, LOGIT_WORDS):
        pairs = (min(LOGIT_WORDS, last - begin) + PAIR - 1) // PAIR
        for group in range(2 * pairs):
            word = begin + LANES * group
            for tile in range(depth):
                start = tile // step * step
                target = right + TILE_BYTES * (2 * pairs * start + group * min(step, depth - start) + tile - start)
                source = weight + word * weight_stride + size * PAIR * tile
                _lay_rows(source, weight_stride, half, words - word, hidden - PAIR * tile, room, target)
        for token in range(0, tokens, PAIR):
            row = x + token * x_stride
            for start in range(0, depth, step):
                tiles, deep = right + TILE_BYTES * 2 * pairs * start, min(step, depth - start)
                _add_products(
                    row + LINE * start, LINE, x_stride, LANES * x_stride, tiles, deep, pairs, sums, 4 * LOGIT_WORDS, start == 0
                )  # fmt: skip
            for n in range(PAIR):
                target = z + (token + n) * z_stride + 2 * begin
                for i in range(0, PAIR * pairs, PAIR):
                    at = sums + 4 * (LOGIT_WORDS * n + i)
                    stream_bf16(target + 2 * i, load(at), load(at + LINE))
    release()
    end_streams()
    keep(right_room)
    keep(sums_room)


@jit
def hidden_parts(first, last, z, z_stride, tokens, blocks, weight, weight_stride, half, words, slice_words, hidden, dx):
    """Parts first .. last - 1 of ``dz W``: each of TOKENS tokens and `slice_words` words.

    Args:
        first, last: parts, the blocks of tokens of a slice of words one after the other.
        z: address of bf16 rows, zeros beyond the last word. z_stride: of these. tokens: of all, a multiple of 32.
        blocks: of tokens. weight, weight_stride, half, words, hidden: as in `logit_words`.
        slice_words: a multiple of HIDDEN_WORDS.
        dx: address of float32 (slices, tokens, hidden rounded up to a multiple of 32).
    """
    pairs, size = (hidden + PAIR - 1) // PAIR, 2 if half else 4
    right_room = np.empty(2 * HIDDEN_WORDS * PAIR * pairs + LINE, np.int8)
    right, stride = _aligned(right_room), 4 * PAIR * pairs
    configure(PAIR)
    for part in range(first, last):
        piece, block = part // blocks, part % blocks
        for begin in range(piece * slice_words, min(words, (piece + 1) * slice_words), HIDDEN_WORDS):
            depth = (min(HIDDEN_WORDS, words - begin) + PAIR - 1) // PAIR
            for tile in range(depth):
                word = begin + PAIR * tile
                for group in range(2 * pairs):
                    source, target = (
                        weight + word * weight_stride + size * LANES * group,
                        TILE_BYTES * (group * depth + tile),
                    )
                    _lay_pairs(source, weight_stride, half, words - word, hidden - LANES * group, right + target)
            for token in range(block * TOKENS, min(tokens, (block + 1) * TOKENS), PAIR):
                left, sums = z + token * z_stride + 2 * begin, dx + (piece * tokens + token) * stride
                _add_products(
                    left, LINE, z_stride, LANES * z_stride, right, depth, pairs, sums, stride, begin == piece * slice_words
                )  # fmt: skip
    release()
    keep(right_room)


@jit
def lay_out_x(first, last, x, tokens, groups, tiles):
    """The right operand x, of groups first .. last - 1 of 16 hidden units.

    Args:
        first, last: groups. x: address of bf16 (tokens, 16 * groups). tokens: a multiple of 32. groups: even.
        tiles: address of as many bytes, parts of `_steps` tiles of tokens one after the other.
    """
    depth, stride = tokens // PAIR, 2 * LANES * groups
    step = _steps(depth)
    for group in range(first, last):
        for tile in range(depth):
            start = tile // step * step
            target = tiles + TILE_BYTES * (groups * start + group * min(step, depth - start) + tile - start)
            _lay_pairs(x + PAIR * tile * stride + 2 * LANES * group, stride, True, PAIR, LANES, target)


@jit
def _put_weight_row(sums, hidden, factor, dw, more, streamed):
    """``dw = (dw if more else 0) + factor * sums`` of a word."""
    by = splat(factor)
    for i in range(0, hidden, LANES):
        value = multiply(load(sums + 4 * i), by)
        if more:
            put(dw + 4 * i, add(get(dw + 4 * i, hidden - i, False), value), hidden - i, False)
        elif streamed:
            stream(dw + 4 * i, value)
        else:
            put(dw + 4 * i, value, hidden - i, False)


@jit
def weight_words(first, last, z, z_stride, tokens, tiles, hidden, factor, dw, more):
    """Rows of ``dW = (dW if more else 0) + factor * dz^T x``, of words first .. last - 1.

    Args:
        first, last: words; multiples of WEIGHT_WORDS but for the end.
        z, z_stride, tokens, hidden: as in `hidden_parts`. tiles: address of x's, by `lay_out_x`.
        factor: float32. dw: address of float32 (V, hidden). more: whether to add.
    """
    depth, pairs = tokens // PAIR, (hidden + PAIR - 1) // PAIR
    step, stride = _steps(depth), 4 * PAIR * pairs
    left_room = np.empty(2 * WEIGHT_WORDS * tokens + TILE_BYTES + LINE, np.int8)
    sums_room = np.empty(WEIGHT_WORDS * PAIR * pairs + LANES, np.float32)
    room, sums = _aligned(left_room), _aligned(sums_room)
    left = room + TILE_BYTES
    streamed = hidden % LANES == 0 and dw % LINE == 0
    configure(PAIR)
    for begin in range(first, last, WEIGHT_WORDS):
        count = min(WEIGHT_WORDS, last - begin)
        rows = (count + PAIR - 1) // PAIR
        for tile in range(depth):
            for group in range(2 * rows):
                source = z + PAIR * tile * z_stride + 2 * (begin + LANES * group)
                for n in range(0, PAIR, 2):
                    copy_pairs(room + LINE * (n // 2), source + n * z_stride, source + (n + 1) * z_stride)
                transpose_ints(room, LINE, left + TILE_BYTES * (group * depth + tile), LINE)
        for start in range(0, depth, step):
            deep, right = min(step, depth - start), tiles + TILE_BYTES * 2 * pairs * start
            for row in range(rows):
                here = left + TILE_BYTES * (2 * row * depth + start)
                _add_products(
                    here, TILE_BYTES, LINE, TILE_BYTES * depth, right, deep, pairs, sums + PAIR * row * stride, stride, start == 0
                )  # fmt: skip
        for n in range(count):
            _put_weight_row(sums + n * stride, hidden, factor, dw + 4 * (begin + n) * hidden, more, streamed)
    release()
    if streamed:
        end_streams()
    keep(left_room)
    keep(sums_room)


# --- on tensors ------------------------------------------------------------------------------------------------------------


def serves(dtype: torch.dtype) -> bool:
    """Whether products in this dtype are done here."""
    return TILES and dtype == torch.bfloat16


def _up(count: int) -> int:
    return -(-count // PAIR) * PAIR


def _padded(x_NH: Tensor) -> Tensor:
    """x in bf16, with rows and columns of zeros up to multiples of 32, from one cache line on."""
    N, H = x_NH.shape
    x = _room(_up(N), _up(H))
    x[:, H:], x[N:] = 0, 0
    x[:N, :H] = x_NH
    return x


def _room(rows: int, width: int) -> Tensor:
    """bf16 (rows, width) from one cache line on."""
    room = torch.empty(rows * width + LINE // 2, dtype=torch.bfloat16)
    skipped = -room.data_ptr() % LINE // 2
    return room[skipped : skipped + rows * width].view(rows, width)


def _logit_width(vocabulary: int) -> int:
    """Numbers from one row of logits to the next: an odd multiple of eight cache lines, so that pieces of eight lines are spread
    evenly over the first-level cache."""
    lines = _up(vocabulary) * 2 // LINE
    return (lines + (8 - lines) % 16) * LINE // 2


class TileProducts:
    """The products of a head with the logits of a chunk of rows, as `kernels/vocabulary.py` calls them.

    Args:
        x: float (N, H). weight: float (V, H), rounded to bf16 as it is laid out. at_once: rows of a chunk, at most.
    """

    def __init__(self, x: Tensor, weight: Tensor, at_once: int):
        self.x, self.hidden, self.words = x, x.shape[1], len(weight)
        self.weight, *self.rows = rows_of(weight)
        self.room = _room(_up(at_once), _logit_width(self.words))

    def logits(self, of: slice) -> Tensor:
        """``z = x W^T`` of these rows, good until the next call; what is written over it is meant below."""
        self.chunk = _padded(self.x[of])
        work = (self.chunk.data_ptr(), len(self.chunk), self.hidden, *self.rows, self.words, *self._z())
        share_rows(logit_words, self.words, len(self.chunk), *work, block=LOGIT_WORDS)
        return self.room[: of.stop - of.start, : self.words]

    def _z(self) -> tuple[int, int]:
        return self.room.data_ptr(), 2 * self.room.stride(0)

    def hidden_gradient(self, z: Tensor, dx: Tensor) -> None:
        """``dx = z W``, rounded once where dx is bf16."""
        N, V, H = len(self.chunk), self.words, self.hidden
        blocks = -(-N // TOKENS)
        slice_words = -(-V // (-(-SLICES // blocks) * HIDDEN_WORDS)) * HIDDEN_WORDS
        slices = -(-V // slice_words)
        parts = torch.empty((slices, N, _up(H)), dtype=torch.float32)
        work = (*self._z(), N, blocks, *self.rows, V, slice_words, H, parts.data_ptr())
        share_rows(hidden_parts, slices * blocks, TOKENS * slice_words, *work, block=1)
        dx.copy_(parts.sum(0)[: len(z), :H])

    def add_weight_gradient_(self, dw: Tensor, z: Tensor, first: bool, factor: float) -> None:
        """``dW = (0 if first else dW) + factor * z^T x``, fp32."""
        N, width = self.chunk.shape
        tiles, groups = _room(N, width), width // LANES
        share_rows(lay_out_x, groups, N, self.chunk.data_ptr(), N, groups, tiles.data_ptr(), block=2)
        work = (*self._z(), N, tiles.data_ptr(), self.hidden, np.float32(factor), dw.data_ptr(), not first)
        share_rows(weight_words, self.words, N, *work, block=WEIGHT_WORDS)
