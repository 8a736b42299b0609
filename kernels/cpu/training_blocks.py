"""The ternary product of training by our own kernels: weight codes laid out as bytes for the tiles of matmul.py.

    acc = act_codes @ weight_codes.T = sum(u * act_codes) - sum(act_codes),        u = weight_codes + 1

Weights change at every step, so nothing is packed: a group of 16 rows is ceil(K / 4) blocks of 64 bytes u, with 16 rows of
four columns each, like the groups of packing.py when they are unpacked. Activations are plain int8 rows, which a tile reads
four columns at a time: K must be a multiple of 4, and the number of rows of the weight a multiple of 16. On processors
without VNNI this is three times as fast as oneDNN; elsewhere the faster of the two is chosen (training_products.py).

Addresses are int64. Shape suffixes: N tokens, K summed columns, R rows of the weight.
"""

import numpy as np

from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.matmul import CHUNK, GROUPS, multiply_unpacked
from bitdistill.kernels.cpu.native import int8s, int32s
from bitdistill.kernels.cpu.vector import (
    add_bytes,
    load_bytes,
    repeat_byte,
    repeat_int,
    store_bytes,
    store_ints,
)


@jit
def lay_out_rows(first, last, codes, columns, blocks):
    """Blocks of the groups first .. last - 1 of a weight, int8 (R, K).

    Args:
        first, last: groups. codes: address of int8 (R, columns), 16 rows per group.
        columns: K. blocks: address of 64-byte blocks (R / 16, columns / 4).
    """
    quads = columns // 4
    one = repeat_byte(1)
    for group in range(first, last):
        out = int32s(blocks + 64 * group * quads, 16 * quads)
        for row in range(16):
            source = int32s(codes + (16 * group + row) * columns, quads)
            for quad in range(quads):
                out[16 * quad + row] = source[quad]
        for quad in range(quads):
            at = blocks + 64 * (group * quads + quad)
            store_bytes(at, add_bytes(load_bytes(at), one))


@jit
def lay_out_columns(first, last, codes, rows, columns, blocks):
    """Blocks of the groups first .. last - 1 of a weight's transpose: its rows are 16 columns of int8 (rows, columns) each.

    Args:
        first, last: groups. codes: address of int8 (rows, columns).
        rows, columns: of the weight as it is. blocks: address of 64-byte blocks (columns / 16, rows / 4).
    """
    quads = rows // 4
    one = repeat_byte(1)
    byte = np.uint32(255)
    for group in range(first, last):
        for quad in range(quads):
            at = codes + 4 * quad * columns + 16 * group
            a, b = int32s(at, 4), int32s(at + columns, 4)
            c, d = int32s(at + 2 * columns, 4), int32s(at + 3 * columns, 4)
            out = int32s(blocks + 64 * (group * quads + quad), 16)
            for word in range(4):
                wa, wb, wc, wd = np.uint32(a[word]), np.uint32(b[word]), np.uint32(c[word]), np.uint32(d[word])
                for lane in range(4):
                    shift = np.uint32(8 * lane)
                    low = (wa >> shift & byte) | (wb >> shift & byte) << np.uint32(8)
                    high = (wc >> shift & byte) << np.uint32(16) | (wd >> shift & byte) << np.uint32(24)
                    out[4 * word + lane] = np.int32(np.uint32(low | high))
            at = blocks + 64 * (group * quads + quad)
            store_bytes(at, add_bytes(load_bytes(at), one))


@jit
def multiply_blocks(first, last, blocks, codes, columns, tokens, acc, acc_stride):
    """``acc = codes @ weight_codes.T`` of the row groups first .. last - 1, for all tokens.

    Args:
        first, last: groups. blocks: address of the blocks of all groups.
        codes: address of int8 (tokens, columns), columns a multiple of 4.
        columns, tokens: K and N.
        acc: address of int32 rows, written.
        acc_stride: numbers from one row to the next.

    Numerics: exact.
    """
    quads = columns // 4
    sums = np.empty(tokens, np.int32)
    for n in range(tokens):
        total = 0
        for code in int8s(codes + n * columns, columns):
            total += code
        sums[n] = total
    for group in range(first, last, GROUPS):  # their sums stay in the second-level cache until they are whole
        groups = min(GROUPS, last - group)
        for n in range(tokens):
            for slot in range(groups):
                store_ints(acc + 4 * n * acc_stride + 64 * (group + slot), repeat_int(-sums[n]))
        for chunk in range(0, quads, CHUNK):
            count = min(CHUNK, quads - chunk)
            source, out = blocks + 64 * (group * quads + chunk), acc + 64 * group
            multiply_unpacked(
                source, 64 * quads, groups, count, codes + 4 * chunk, columns, tokens, out, 4 * acc_stride
            )
