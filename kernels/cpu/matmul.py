"""The ternary product on packed bytes, for one token or many. Its integers are those of the reference, bit for bit.

    acc = weight_codes @ act_codes = sum(u * act_codes) - sum(act_codes),        u = weight_codes + 1

The unit of work is a group of 16 rows, whose blocks (packing.py) are 64 bytes each: 16 lanes, one for each row, with four
columns. A dot step multiplies a block with the same four activations in every lane, so no sum ever crosses lanes.
`act_codes` comes in records (activations.py) with zeros around the codes, because a vector of packed bytes may begin or end
in the blocks of another group, which are multiplied with these zeros.

* One token (`_multiply_2bit`, `_multiply_base3`), or two, as the planes of one token of an LM head are: packed bytes are
  read once and taken apart in registers; with AVX2, of 2 bits, for every two of up to PAIRED_2BIT_TOKENS. They are prefetched
  PREFETCH bytes ahead; without that, memory would wait for the
  loop. They may be read-only and have any alignment, and nothing beyond the last vector is read.
* From TILED_TOKENS tokens on, where the processor has tile products: tile_products.py.
* More tokens elsewhere: up to CHUNK blocks of GROUPS row groups are taken apart into `scratch`, which stays in the first-level
  cache, and are multiplied with one tile of up to four tokens after the other. Where there are 32 wide registers, a tile
  meets all four row groups at once: sixteen sums, because fewer would wait for each other's dot products (one takes five
  cycles, and two begin in each), and eight loads for sixteen of these.

int16 sums (vector.py): a dot step adds at most 2 * 2 * 128 = 512 in magnitude, so 64 steps fit. For one token with 2-bit
bytes, half of the fields are left in place, four times too large, which saves shifts; of those, 16 steps fit.
Everything is in integers, so the result depends neither on the number of tokens nor on how row groups are shared among
threads.

Shape suffixes: N tokens, I in_features, O out_features. Addresses are int64, strides of records in bytes.
"""

import numpy as np

from bitdistill.kernels.cpu.activations import CODES, record_bytes
from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.grouped_tiles import TILED_GROUPED_BYTES
from bitdistill.kernels.cpu.instructions import FEATURES
from bitdistill.kernels.cpu.native import int32s
from bitdistill.kernels.cpu.tile_products import TILED_TOKENS, TILED_UNPACKED_BYTES, tiled_gemm
from bitdistill.kernels.cpu.tiles import TILES
from bitdistill.kernels.cpu.unpacking import MARGIN, TWO_BIT, code_offset, low_digits, top_digit, unpack_blocks
from bitdistill.kernels.cpu.vector import (
    AVX512,
    add_ints,
    add_sums,
    and_bytes,
    dot,
    load_bytes,
    load_ints,
    no_sums,
    prefetch,
    repeat_byte,
    repeat_int,
    repeat_quad,
    shift_ints,
    shift_words,
    store_ints,
    sub_ints,
    widen,
)
from bitdistill.kernels.packing import PACKINGS, packed_bytes, row_groups

PREFETCH = 4096
STEPS_2BIT, STEPS_BASE3 = 16, 12  # vectors of a GEMV before a `widen`
# Up to so many tokens, the packed bytes of a row group are taken apart again for every two, from the first-level cache. With
# AVX2 that is faster than to unpack them once: 2 bits need little work, and sixteen registers hold few sums of a tile.
PAIRED_2BIT_TOKENS = 8 if FEATURES == "avx2" else 2
CHUNK = 64  # blocks of a row group that are unpacked at a time; a tile adds up as many before a `widen`
GROUPS = 4  # row groups that are unpacked at a time, 16 KB: a tile's activations come from the second-level cache once for all
TOKENS = 128  # at a time: with more, their sums for GROUPS do not stay in the second-level cache
SLOT = 64 * CHUNK + 2 * MARGIN
UNPACKED_BYTES = max(GROUPS * SLOT, TILED_UNPACKED_BYTES, TILED_GROUPED_BYTES)
ACC_BYTES = 32768  # accumulators of tables.py
SCRATCH_BYTES = UNPACKED_BYTES + ACC_BYTES + 128


# --- one or two tokens -------------------------------------------------------------------------------------------------


@jit
def _multiply_2bit(weight, blocks, codes, group):
    """sum(u * act) of a row group, 16 int32: codes is the address of the activation codes."""
    three, twelve = repeat_byte(3), repeat_byte(12)
    ones, fours = repeat_int(0), repeat_int(0)
    first = group * blocks
    vector, last = first // 4, (first + blocks + 3) // 4
    quads = codes + 4 * (4 * vector - first)
    source = weight + 64 * vector
    end = weight + 64 * last
    while source < end:
        even, odd, even4, odd4 = no_sums(), no_sums(), no_sums(), no_sums()
        stop = min(end, source + 64 * STEPS_2BIT)
        while source < stop:
            prefetch(source + PREFETCH)
            q = load_bytes(source)
            upper = shift_words(q, 4)
            even = dot(even, and_bytes(q, three), repeat_quad(quads))
            even4 = dot(even4, and_bytes(q, twelve), repeat_quad(quads + 4))
            odd = dot(odd, and_bytes(upper, three), repeat_quad(quads + 8))
            odd4 = dot(odd4, and_bytes(upper, twelve), repeat_quad(quads + 12))
            source += 64
            quads += 16
        ones = add_ints(ones, add_ints(widen(even), widen(odd)))
        fours = add_ints(fours, add_ints(widen(even4), widen(odd4)))
    return add_ints(ones, shift_ints(fours, 2))


@jit
def _multiply_2bit_twice(weight, blocks, codes, other_codes, group):
    """`_multiply_2bit` with two tokens' codes. Half as many sums for each, for want of registers."""
    three, twelve = repeat_byte(3), repeat_byte(12)
    ones, fours, other_ones, other_fours = repeat_int(0), repeat_int(0), repeat_int(0), repeat_int(0)
    first = group * blocks
    vector, last = first // 4, (first + blocks + 3) // 4
    quads = 4 * (4 * vector - first)
    source = weight + 64 * vector
    end = weight + 64 * last
    while source < end:
        sums, sums4, other, other4 = no_sums(), no_sums(), no_sums(), no_sums()
        stop = min(end, source + 64 * (STEPS_2BIT // 2))
        while source < stop:
            prefetch(source + PREFETCH)
            q = load_bytes(source)
            upper = shift_words(q, 4)
            u0, u1, u2, u3 = (
                and_bytes(q, three),
                and_bytes(q, twelve),
                and_bytes(upper, three),
                and_bytes(upper, twelve),
            )
            at = codes + quads
            sums = add_sums(sums, dot(dot(no_sums(), u0, repeat_quad(at)), u2, repeat_quad(at + 8)))
            sums4 = add_sums(sums4, dot(dot(no_sums(), u1, repeat_quad(at + 4)), u3, repeat_quad(at + 12)))
            at = other_codes + quads
            other = add_sums(other, dot(dot(no_sums(), u0, repeat_quad(at)), u2, repeat_quad(at + 8)))
            other4 = add_sums(other4, dot(dot(no_sums(), u1, repeat_quad(at + 4)), u3, repeat_quad(at + 12)))
            source += 64
            quads += 16
        ones, fours = add_ints(ones, widen(sums)), add_ints(fours, widen(sums4))
        other_ones, other_fours = add_ints(other_ones, widen(other)), add_ints(other_fours, widen(other4))
    return add_ints(ones, shift_ints(fours, 2)), add_ints(other_ones, shift_ints(other_fours, 2))


@jit
def dot_base3(u0, u1, u2, u3, u4, quads):
    """The five blocks of a vector times the activations at `quads`: one chain of dot products that begins with zero."""
    step = dot(dot(no_sums(), u4, repeat_quad(quads + 16)), u0, repeat_quad(quads))
    step = dot(dot(step, u1, repeat_quad(quads + 4)), u2, repeat_quad(quads + 8))
    return dot(step, u3, repeat_quad(quads + 12))


@jit
def _multiply_base3(weight, blocks, codes, group):
    """sum(u * act) of a row group, 16 int32: codes is the address of the activation codes."""
    total = repeat_int(0)
    first = group * blocks
    vector, last = first // 5, (first + blocks + 4) // 5
    quads = codes + 4 * (5 * vector - first)
    source = weight + 64 * vector
    end = weight + 64 * last
    rest, u4 = top_digit(load_bytes(source))
    while source < end:
        sums = no_sums()
        stop = min(end, source + 64 * STEPS_BASE3)
        while source < stop:
            prefetch(source + PREFETCH)
            # The next vector's first digit beside this one's others, and a chain of dot products from zero each time:
            # long chains of dependent operations, which a processor cannot look far enough ahead to overlap by itself.
            following = top_digit(load_bytes(min(source + 64, end - 64)))
            u0, u1, u2, u3 = low_digits(rest)
            sums = add_sums(sums, dot_base3(u0, u1, u2, u3, u4, quads))
            rest, u4 = following
            source += 64
            quads += 20
        total = add_ints(total, widen(sums))
    return total


@jit
def _multiply_base3_twice(weight, blocks, codes, other_codes, group):
    """`_multiply_base3` with two tokens' codes."""
    total, other_total = repeat_int(0), repeat_int(0)
    first = group * blocks
    vector, last = first // 5, (first + blocks + 4) // 5
    quads = 4 * (5 * vector - first)
    source = weight + 64 * vector
    end = weight + 64 * last
    rest, u4 = top_digit(load_bytes(source))
    while source < end:
        sums, other = no_sums(), no_sums()
        stop = min(end, source + 64 * STEPS_BASE3)
        while source < stop:
            prefetch(source + PREFETCH)
            following = top_digit(load_bytes(min(source + 64, end - 64)))
            u0, u1, u2, u3 = low_digits(rest)
            sums = add_sums(sums, dot_base3(u0, u1, u2, u3, u4, codes + quads))
            other = add_sums(other, dot_base3(u0, u1, u2, u3, u4, other_codes + quads))
            rest, u4 = following
            source += 64
            quads += 20
        total, other_total = add_ints(total, widen(sums)), add_ints(other_total, widen(other))
    return total, other_total


# --- many tokens ------------------------------------------------------------------------------------------------------


@jit
def _add_to(acc, sums):
    store_ints(acc, add_ints(load_ints(acc), widen(sums)))


@jit
def _add_4(acc, s0, s1, s2, s3):
    """Adds the sums of one token and four row groups."""
    _add_to(acc, s0)
    _add_to(acc + 64, s1)
    _add_to(acc + 128, s2)
    _add_to(acc + 192, s3)


@jit
def _no_sums_4():
    return no_sums(), no_sums(), no_sums(), no_sums()


@jit
def _dot_4(s0, s1, s2, s3, u0, u1, u2, u3, quad):
    """A step of one token and four row groups."""
    q = repeat_quad(quad)
    return dot(s0, u0, q), dot(s1, u1, q), dot(s2, u2, q), dot(s3, u3, q)


@jit
def _tile_4_of_4(blocks, gap, count, codes, stride, tokens, acc, acc_stride):
    """Three or four tokens and four row groups: sixteen sums, and eight loads for sixteen dot products."""
    a0, a1, a2, a3 = _no_sums_4()
    b0, b1, b2, b3 = _no_sums_4()
    c0, c1, c2, c3 = _no_sums_4()
    d0, d1, d2, d3 = _no_sums_4()
    last = codes + (tokens - 1) * stride  # of three, the last one is done twice
    for block in range(count):
        u0, u1 = load_bytes(blocks + 64 * block), load_bytes(blocks + 64 * block + gap)
        u2, u3 = load_bytes(blocks + 64 * block + 2 * gap), load_bytes(blocks + 64 * block + 3 * gap)
        quad = codes + 4 * block
        a0, a1, a2, a3 = _dot_4(a0, a1, a2, a3, u0, u1, u2, u3, quad)
        b0, b1, b2, b3 = _dot_4(b0, b1, b2, b3, u0, u1, u2, u3, quad + stride)
        c0, c1, c2, c3 = _dot_4(c0, c1, c2, c3, u0, u1, u2, u3, quad + 2 * stride)
        d0, d1, d2, d3 = _dot_4(d0, d1, d2, d3, u0, u1, u2, u3, last + 4 * block)
    _add_4(acc, a0, a1, a2, a3)
    _add_4(acc + acc_stride, b0, b1, b2, b3)
    _add_4(acc + 2 * acc_stride, c0, c1, c2, c3)
    if tokens == 4:
        _add_4(acc + 3 * acc_stride, d0, d1, d2, d3)


@jit
def _tile_2_of_4(blocks, gap, count, codes, stride, tokens, acc, acc_stride):
    """One or two tokens and four row groups."""
    a0, a1, a2, a3 = _no_sums_4()
    b0, b1, b2, b3 = _no_sums_4()
    last = codes + (tokens - 1) * stride
    for block in range(count):
        u0, u1 = load_bytes(blocks + 64 * block), load_bytes(blocks + 64 * block + gap)
        u2, u3 = load_bytes(blocks + 64 * block + 2 * gap), load_bytes(blocks + 64 * block + 3 * gap)
        a0, a1, a2, a3 = _dot_4(a0, a1, a2, a3, u0, u1, u2, u3, codes + 4 * block)
        b0, b1, b2, b3 = _dot_4(b0, b1, b2, b3, u0, u1, u2, u3, last + 4 * block)
    _add_4(acc, a0, a1, a2, a3)
    if tokens == 2:
        _add_4(acc + acc_stride, b0, b1, b2, b3)


@jit
def _tile_4(blocks, count, codes, stride, acc, acc_stride):
    s0, s1, s2, s3 = no_sums(), no_sums(), no_sums(), no_sums()
    for block in range(count):
        u = load_bytes(blocks + 64 * block)
        quad = codes + 4 * block
        s0 = dot(s0, u, repeat_quad(quad))
        s1 = dot(s1, u, repeat_quad(quad + stride))
        s2 = dot(s2, u, repeat_quad(quad + 2 * stride))
        s3 = dot(s3, u, repeat_quad(quad + 3 * stride))
    _add_to(acc, s0)
    _add_to(acc + acc_stride, s1)
    _add_to(acc + 2 * acc_stride, s2)
    _add_to(acc + 3 * acc_stride, s3)


@jit
def _tile_2(blocks, count, codes, stride, acc, acc_stride):
    s0, s1 = no_sums(), no_sums()
    for block in range(count):
        u = load_bytes(blocks + 64 * block)
        s0 = dot(s0, u, repeat_quad(codes + 4 * block))
        s1 = dot(s1, u, repeat_quad(codes + 4 * block + stride))
    _add_to(acc, s0)
    _add_to(acc + acc_stride, s1)


@jit
def _tile_1(blocks, count, codes, acc):
    s0 = no_sums()
    for block in range(count):
        s0 = dot(s0, load_bytes(blocks + 64 * block), repeat_quad(codes + 4 * block))
    _add_to(acc, s0)


@jit
def _multiply_unpacked(source, gap, groups, count, codes, stride, tokens, acc, acc_stride):
    """Adds the products of `groups` row groups with all tokens, over `count` blocks, to their sums.

    Args:
        source: address of the first group's blocks of bytes u. gap: bytes from one group's blocks to the next one's.
        groups, count, tokens: how many row groups, blocks of each, and tokens there are.
        codes: address of the first token's codes of the blocks' columns. stride: bytes from one token to the next.
        acc: address of the first group's int32 of the first token. acc_stride: bytes from one token to the next.
    """
    four = AVX512 and groups == 4
    n = 0
    while n < tokens:
        left, quads, sums = tokens - n, codes + n * stride, acc + n * acc_stride
        if four and left >= 3:
            width = min(4, left)
            _tile_4_of_4(source, gap, count, quads, stride, width, sums, acc_stride)
        elif four:
            width = left
            _tile_2_of_4(source, gap, count, quads, stride, width, sums, acc_stride)
        else:
            width = 4 if left >= 4 else 2 if left >= 2 else 1
            for slot in range(groups):
                at, out = source + slot * gap, sums + 64 * slot
                if width == 4:
                    _tile_4(at, count, quads, stride, out, acc_stride)
                elif width == 2:
                    _tile_2(at, count, quads, stride, out, acc_stride)
                else:
                    _tile_1(at, count, quads, out)
        n += width


@jit
def _multiply_groups(weight, packing, blocks, records, stride, tokens, acc, acc_stride, first, groups, scratch):
    """`gemm` of up to GROUPS row groups from `first` on, for up to TOKENS tokens: their sums stay in the caches until they are
    whole. `acc_stride` in bytes."""
    for n in range(tokens):
        start = repeat_int(-code_offset(packing) * int32s(records + n * stride + 4, 1)[0])
        for slot in range(groups):
            store_ints(acc + n * acc_stride + 64 * (first + slot), start)
    for chunk in range(0, blocks, CHUNK):
        count = min(CHUNK, blocks - chunk)
        for slot in range(groups):
            unpack_blocks(weight, packing, (first + slot) * blocks + chunk, count, scratch + slot * SLOT + MARGIN)
        quads, out = records + CODES + 4 * chunk, acc + 64 * first
        _multiply_unpacked(scratch + MARGIN, SLOT, groups, count, quads, stride, tokens, out, acc_stride)


@jit
def gemm(weight, packing, in_features, records, stride, tokens, acc, acc_stride, first_group, last_group, scratch):
    """``acc = act_codes @ weight_codes.T`` of the rows 16 first_group .. 16 last_group - 1, for all tokens.

    Args:
        weight: address of the packed bytes of all rows; packing: TWO_BIT or BASE3, or INT8 for three
            tokens and more of AVX512 without tile products.
        in_features: I, at least 1.
        records: address of `tokens` records (activations.py), `stride` bytes apart.
        acc: address of int32 rows, one per token, `acc_stride` numbers apart; row o of the weight is written to number o.
            Groups are written whole: there must be room for 16 ceil(O / 16).
        scratch: address of SCRATCH_BYTES of the calling thread's own; not touched for one token or two.
        stride: bytes between records. tokens: how many there are. acc_stride: numbers between rows of acc.
        first_group, last_group: the groups of 16 rows of the weight to compute, the last one excluded.

    Numerics: exact.
    """
    blocks = (in_features + 3) // 4
    codes = records + CODES
    if tokens <= (PAIRED_2BIT_TOKENS if packing == TWO_BIT else 2):
        for group in range(first_group, last_group):
            at, out = codes, acc + 64 * group
            for _ in range(tokens // 2):
                total, other_total = int32s(at - CODES + 4, 1)[0], int32s(at + stride - CODES + 4, 1)[0]
                if packing == TWO_BIT:
                    product, other = _multiply_2bit_twice(weight, blocks, at, at + stride, group)
                else:
                    product, other = _multiply_base3_twice(weight, blocks, at, at + stride, group)
                store_ints(out, sub_ints(product, repeat_int(total)))
                store_ints(out + 4 * acc_stride, sub_ints(other, repeat_int(other_total)))
                at, out = at + 2 * stride, out + 8 * acc_stride
            if tokens % 2:
                if packing == TWO_BIT:
                    product = _multiply_2bit(weight, blocks, at, group)
                else:
                    product = _multiply_base3(weight, blocks, at, group)
                store_ints(out, sub_ints(product, repeat_int(int32s(at - CODES + 4, 1)[0])))
        return
    if TILES and tokens >= TILED_TOKENS:
        tiled_gemm(weight, packing, blocks, records, stride, tokens, acc, acc_stride, first_group, last_group, scratch)
        return
    for start in range(0, tokens, TOKENS):
        count = min(TOKENS, tokens - start)
        these, out = records + start * stride, acc + 4 * start * acc_stride
        for group in range(first_group, last_group, GROUPS):
            groups = min(GROUPS, last_group - group)
            _multiply_groups(weight, packing, blocks, these, stride, count, out, 4 * acc_stride, group, groups, scratch)


def ternary_accumulate(act_codes: np.ndarray, weight: np.ndarray, packing: str, out_features: int) -> np.ndarray:
    """``act_codes @ weight_codes.T`` from packed bytes, in the calling thread.

    Args:
        act_codes: int8 (N, I), any strides.
        weight: uint8 (packed_bytes(O, I, packing),) from `packing.pack`, also read-only or misaligned. Trusted to be valid.
        packing: "2bit" or "base3".
        out_features: O.

    Returns: int32 (N, O). Numerics: exact.

    Raises:
        ValueError: another dtype or shape, or an unknown packing.
    """
    if act_codes.dtype != np.int8 or act_codes.ndim != 2 or act_codes.shape[1] == 0:
        raise ValueError(
            f"act_codes: expected int8 (N, I) with at least one column; got {act_codes.dtype} {act_codes.shape}"
        )
    if packing not in PACKINGS:
        raise ValueError(f"packing: expected one of {', '.join(PACKINGS)}; got {packing!r}")
    tokens, in_features = act_codes.shape
    check_packed(weight, np.uint8, packed_bytes(out_features, in_features, packing))
    records = np.zeros((tokens, record_bytes(in_features)), np.uint8)
    records[:, CODES : CODES + in_features] = act_codes.view(np.uint8)
    records[:, 4:8] = act_codes.sum(axis=1, dtype=np.int32)[:, None].view(np.uint8)
    groups = row_groups(out_features)
    acc = np.empty((tokens, 16 * groups), np.int32)
    scratch = np.empty(SCRATCH_BYTES, np.uint8)
    gemm(
        weight.ctypes.data,
        PACKINGS.index(packing),
        in_features,
        records.ctypes.data,
        records.shape[1],
        tokens,
        acc.ctypes.data,
        acc.shape[1],
        0,
        groups,
        scratch.ctypes.data,
    )
    return acc[:, :out_features]


def check_packed(weight: np.ndarray, dtype: type, size: int) -> None:
    """Refuses what is not a gap-free 1-D array of `size` numbers: kernels read it by its address.

    Raises:
        ValueError: another dtype, number of dimensions, length or stride.
    """
    if weight.dtype != dtype or weight.shape != (size,) or not weight.flags.c_contiguous:
        raise ValueError(
            f"weight: expected a contiguous array of {np.dtype(dtype)} ({size},); got {weight.dtype} {weight.shape} with "
            f"strides {weight.strides}. Pack it with packing.py for this number of rows and columns."
        )
