"""Loops of tile products (tiles.py): the ternary product of many tokens where there is AMX.

    acc = weight_codes @ act_codes = sum(u * act_codes) - sum(act_codes),        u = weight_codes + 1

16 blocks of a row group that are unpacked (unpacking.py) are a tile of codes as they lie, and the codes in 16 records
(activations.py) are a tile of activations. The sums begin as -sum(act_codes), from a small table of those of 32 tokens.
A tile product takes no more than 16 cycles, so what decides is where its operands come from:

* Many tokens: up to CHUNK blocks of GROUPS row groups are unpacked and stay in the second-level cache, from which each 32
  tokens multiply them; the activations of these 32 tokens stay in the first-level cache meanwhile.
* Up to 32 tokens use what is unpacked once, so it should stay in the first-level cache: fewer groups, and for 16 tokens
  shorter chunks.

A number of blocks that is no multiple of 16 is multiplied with whatever follows in `scratch`; the activations are zeros there.
A number of row groups that is no multiple of a step's is multiplied with it, too, and that is not stored.

Addresses are int64, strides are bytes.
"""

from bitdistill.kernels.cpu.activations import CODES
from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.native import int32s
from bitdistill.kernels.cpu.tiles import (
    TILE_BLOCKS,
    TILE_COLUMNS,
    TILE_ROWS,
    TILES,
    configure,
    load_sums_0,
    load_sums_1,
    load_sums_2,
    load_sums_3,
    multiply_1x4,
    multiply_2x2,
    release,
    store_sums_0,
    store_sums_1,
    store_sums_2,
    store_sums_3,
)
from bitdistill.kernels.cpu.unpacking import MARGIN, unpack_blocks
from bitdistill.kernels.cpu.vector import repeat_int, store_ints

TILED_TOKENS = 3  # from here on tile products are faster
CHUNK, GROUPS = 128, 8
FEW_CHUNK, FEW_GROUPS = 64, 4  # for 16 tokens, and for 32
STEP_TOKENS = 2 * TILE_ROWS
SLOT = (
    64 * CHUNK + 2 * MARGIN + 64
)  # bytes of a row group; an odd number of cache lines, so that groups do not share sets
_STARTS = 64 * STEP_TOKENS  # bytes of -sum(act_codes), 16 times each
TILED_UNPACKED_BYTES = GROUPS * SLOT + _STARTS + 64 if TILES else 0


@jit
def _two_by_two(source, steps, acts, stride, start, start_stride, gap, out, out_stride, groups):
    """17 to 32 tokens with two row groups at `source`, or with one; gap: from one group's start to the next one's."""
    second = TILE_ROWS * start_stride
    load_sums_0(start, start_stride)
    load_sums_2(start + second, start_stride)
    if groups > 1:
        load_sums_1(start + gap, start_stride)
        load_sums_3(start + second + gap, start_stride)
    for step in range(steps):
        at, codes = acts + TILE_COLUMNS * step, source + 64 * TILE_BLOCKS * step
        multiply_2x2(at, at + TILE_ROWS * stride, stride, codes, codes + SLOT)
    second = TILE_ROWS * out_stride
    store_sums_0(out, out_stride)
    store_sums_2(out + second, out_stride)
    if groups > 1:
        store_sums_1(out + 64, out_stride)
        store_sums_3(out + second + 64, out_stride)


@jit
def _one_by_four(source, steps, acts, stride, start, start_stride, gap, out, out_stride, groups):
    """Up to 16 tokens with four row groups at `source`, or with fewer."""
    load_sums_0(start, start_stride)
    if groups > 1:
        load_sums_1(start + gap, start_stride)
    if groups > 2:
        load_sums_2(start + 2 * gap, start_stride)
    if groups > 3:
        load_sums_3(start + 3 * gap, start_stride)
    for step in range(steps):
        multiply_1x4(acts + TILE_COLUMNS * step, stride, source + 64 * TILE_BLOCKS * step, SLOT)
    store_sums_0(out, out_stride)
    if groups > 1:
        store_sums_1(out + 64, out_stride)
    if groups > 2:
        store_sums_2(out + 128, out_stride)
    if groups > 3:
        store_sums_3(out + 192, out_stride)


@jit
def tiled_gemm(weight, packing, blocks, records, stride, tokens, acc, acc_stride, first_group, last_group, scratch):
    """`matmul.gemm` for any number of tokens, by tile products.

    Args:
        weight, packing, records, stride, tokens, acc, acc_stride, first_group, last_group: as there.
        blocks: of a row group, ceil(I / 4).
        scratch: address of TILED_UNPACKED_BYTES of the calling thread's own.

    Numerics: exact.
    """
    starts = (scratch + 63) // 64 * 64
    unpacked = starts + _STARTS + MARGIN
    most_blocks = FEW_CHUNK if tokens <= TILE_ROWS else CHUNK
    most_groups = FEW_GROUPS if tokens <= STEP_TOKENS else GROUPS
    configured = 0
    for group in range(first_group, last_group, most_groups):
        groups = min(most_groups, last_group - group)
        for chunk in range(0, blocks, most_blocks):
            count = min(most_blocks, blocks - chunk)
            steps = (count + TILE_BLOCKS - 1) // TILE_BLOCKS
            for slot in range(groups):
                unpack_blocks(weight, packing, (group + slot) * blocks + chunk, count, unpacked + slot * SLOT)
            for n in range(0, tokens, STEP_TOKENS):
                rows = min(STEP_TOKENS, tokens - n)
                if rows != configured:
                    configure(rows)
                    configured = rows
                if chunk == 0:
                    for row in range(rows):
                        store_ints(starts + 64 * row, repeat_int(-int32s(records + (n + row) * stride + 4, 1)[0]))
                acts = records + n * stride + CODES + 4 * chunk
                for slot in range(0, groups, 2 if rows > TILE_ROWS else 4):
                    source, left = unpacked + slot * SLOT, groups - slot
                    out, out_stride = acc + 4 * n * acc_stride + 64 * (group + slot), 4 * acc_stride
                    start, start_stride, gap = (starts, 64, 0) if chunk == 0 else (out, out_stride, 64)
                    if rows > TILE_ROWS:
                        _two_by_two(source, steps, acts, stride, start, start_stride, gap, out, out_stride, left)
                    else:
                        _one_by_four(source, steps, acts, stride, start, start_stride, gap, out, out_stride, left)
    release()
