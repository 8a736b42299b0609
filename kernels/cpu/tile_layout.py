"""int8 matrices rearranged for products of tiles (tiles.py): 16 rows of 64 bytes, in plain vector operations.

    transpose_ints      16 rows of 16 int32 -> their transpose        rows of codes become a right operand
    interleave_codes    64 rows of 16 bytes -> 16 rows of 64 bytes    columns of codes become a right operand

A row of a right operand holds four summed columns of each of 16 results: ``row[4 n + k] = B[k, n]``. Addresses are int64,
strides in bytes.
"""

import ctypes

import numpy as np
from llvmlite import ir
from numba import types

from bitdistill.kernels.cpu.native import native

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_SIXTEEN_BYTES, _SIXTEEN_INTS = ir.VectorType(_I8, 16), ir.VectorType(_I32, 16)
_COPY = types.int64(types.int64, types.int64, types.int64, types.int64)


def _load(builder, address, kind):
    value = builder.load(builder.inttoptr(address, ir.PointerType(kind)))
    value.align = 1
    return value


def _load_rows(builder, address, stride, count, kind):
    """`count` vectors, the first at an address, each `stride` bytes after the one before."""
    rows = []
    for _ in range(count):
        rows.append(_load(builder, address, kind))
        address = builder.add(address, stride)
    return rows


def _store_rows(builder, rows, address, stride):
    for row in rows:
        builder.store(row, builder.inttoptr(address, ir.PointerType(row.type)), align=1)
        address = builder.add(address, stride)
    return ir.Constant(_I64, 0)


def _shuffle(builder, a, b, lanes):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def _transposed(builder, rows):
    """Of 16 vectors of 16 numbers: blocks of 1, 2, 4 and 8 numbers change places across the diagonal."""
    rows = list(rows)
    for step in (1, 2, 4, 8):
        low = [16 + (lane ^ step) if lane & step else lane for lane in range(16)]
        high = [16 + lane if lane & step else lane ^ step for lane in range(16)]
        for i in range(16):
            if not i & step:
                a, b = rows[i], rows[i + step]
                rows[i], rows[i + step] = _shuffle(builder, a, b, low), _shuffle(builder, a, b, high)
    return rows


def _interleaved(builder, address, stride):
    """Of 64 rows of 16 bytes: 16 vectors of 64 bytes, each of four rows, column by column."""
    rows = _load_rows(builder, address, stride, 64, _SIXTEEN_BYTES)
    vectors = []
    for quad in range(16):
        a, b, c, d = rows[4 * quad : 4 * quad + 4]
        # bytes of a and b in turn, and of c and d, then pairs of them in turn
        pair = [lane for column in range(16) for lane in (column, 16 + column)]
        ab, cd = _shuffle(builder, a, b, pair), _shuffle(builder, c, d, pair)
        both = [lane for column in range(16) for lane in (2 * column, 2 * column + 1, 32 + 2 * column, 33 + 2 * column)]
        vectors.append(_shuffle(builder, ab, cd, both))
    return vectors


def _rows_at(address, stride, count, size):
    return np.stack(
        [
            np.frombuffer((ctypes.c_char * size).from_address(int(address) + n * int(stride)), np.uint8)
            for n in range(count)
        ]
    )


def _write_rows(rows, address, stride):
    for n, row in enumerate(np.ascontiguousarray(rows)):
        ctypes.memmove(int(address) + n * int(stride), row.ctypes.data, row.nbytes)
    return 0


def _py_transpose_ints(source, stride, target, target_stride):
    return _write_rows(_rows_at(source, stride, 16, 64).view(np.int32).T, target, target_stride)


def _py_interleave_codes(source, stride, target, target_stride):
    rows = _rows_at(source, stride, 64, 16).reshape(16, 4, 16)
    return _write_rows(rows.transpose(0, 2, 1).reshape(16, 64), target, target_stride)


@native(_COPY, _py_transpose_ints)
def transpose_ints(builder, source, stride, target, target_stride):
    """16 rows of 64 bytes, 16 int32 each, and their transpose. Returns 0."""
    rows = _load_rows(builder, source, stride, 16, _SIXTEEN_INTS)
    return _store_rows(builder, _transposed(builder, rows), target, target_stride)


@native(_COPY, _py_interleave_codes)
def interleave_codes(builder, source, stride, target, target_stride):
    """64 rows of 16 bytes: row q of the target is bytes ``4 n + k = source[4 q + k, n]``. Returns 0."""
    return _store_rows(builder, _interleaved(builder, source, stride), target, target_stride)
