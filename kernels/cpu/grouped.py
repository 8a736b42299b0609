"""The ternary product with a scale for each row and group of columns, on packed bytes: bit for bit the reference.

    y = sum_g(weight_scale_g * acc_g) * act_scale + bias,       acc_g = sum(u * act_codes) - sum(act_codes) over group g

It is the product of matmul.py, where the layout is explained, with a stop after each group: the integers of the group
become floats, are multiplied by the scales of 16 rows, and are added up. A group has 64, 128 or 256 columns (the last one
of a row may be narrower), that is 16, 32 or 64 blocks, so its int16 sums fit. Its product with a scale of eight significant
bits is exact in fp32; only the sum over groups rounds, in the order of the groups.

Activations may have a scale for each 32 columns, too. Then the walk stops every 32 columns, and what the integers of a
stop are multiplied by holds the activation's scale, times the 16 rows' where these change inside a row.

* One token: a vector of packed bytes may hold the last blocks of one group and the first of the next. It is taken apart
  once and multiplied twice: with the activations of the one group among zeros, and then with those of the other.
* More tokens with one act_scale each, where the processor has tile products: grouped_tiles.py.
* More tokens elsewhere: chunks of blocks are unpacked as in matmul.py. A tile of tokens keeps its float sums in registers
  while it goes through the groups of a chunk.

Scales are fp16 in the order of packing.py, (ceil(O / 16), G, 16). The sums of the activation codes of each group stand
after the codes in a token's record (`write_group_sums`).
"""

import numpy as np

from bitdistill.kernels.cpu.activations import (
    CODES,
    act_scales_offset,
    group_sums_offset,
    quantize_activation_blocks,
    record_bytes,
)
from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.floats import add, load, multiply, splat, store
from bitdistill.kernels.cpu.grouped_tiles import scaled, tiled_grouped_gemm
from bitdistill.kernels.cpu.matmul import (
    CHUNK,
    GROUPS,
    PREFETCH,
    SCRATCH_BYTES,
    SLOT,
    check_packed,
    dot_base3,
)
from bitdistill.kernels.cpu.native import int8s, int32s
from bitdistill.kernels.cpu.records import GROUP_COLUMNS
from bitdistill.kernels.cpu.tiles import TILES
from bitdistill.kernels.cpu.unpacking import MARGIN, TWO_BIT, low_digits, top_digit, unpack_blocks
from bitdistill.kernels.cpu.vector import (
    AVX512,
    add_ints,
    add_sums,
    and_bytes,
    dot,
    floats_of,
    load_bytes,
    load_halves,
    load_ints,
    no_sums,
    prefetch,
    repeat_byte,
    repeat_quad,
    shift_ints,
    shift_words,
    widen,
)
from bitdistill.kernels.numerics import ACT_BLOCK
from bitdistill.kernels.packing import PACKINGS, packed_bytes, row_groups

_ZEROS = CODES - 16  # of a record: 16 bytes of zeros


@jit
def write_group_sums(record, in_features, columns):
    """Sums of a record's codes over every `columns` columns, int32, at `group_sums_offset`.

    Args:
        record: address of a record with its codes. in_features: I. columns: of a group, at least 32.
    """
    groups = (in_features + columns - 1) // columns
    sums, codes = int32s(record + group_sums_offset(in_features), groups), int8s(record + CODES, in_features)
    for group in range(groups):
        total = np.int32(0)
        for i in range(group * columns, min(in_features, (group + 1) * columns)):
            total += np.int32(codes[i])
        sums[group] = total


@jit
def _row_scales(scales, stop, shift):
    """The 16 rows' weight scales at a stop, or ones; shift: log2 of the stops in a group of columns."""
    return splat(np.float32(1)) if scales == 0 else load_halves(scales + 32 * (stop >> shift))


# --- one token ----------------------------------------------------------------------------------------------------------


@jit
def _multiply_base3(weight, blocks, record, act_sums, gap, scales, shift, group_blocks, group):
    """16 floats of a row group, before a token's act_scale."""
    groups = (blocks + group_blocks - 1) // group_blocks
    first = group * blocks
    vector, last = first // 5, (first + blocks + 4) // 5
    source, end = weight + 64 * vector, weight + 64 * last
    block = 5 * vector - first  # the number, in this row group, of the vector's first block: -4 .. 0 at first
    quads = record + CODES + 4 * block
    zeros = record + _ZEROS
    total, next_sums = splat(np.float32(0)), no_sums()
    rest, u4 = top_digit(load_bytes(source))
    for g in range(groups):
        sums = next_sums
        next_sums = no_sums()
        stop = min(group_blocks * (g + 1), blocks)
        shared = 5 * ((stop - block) // 5) if g + 1 < groups else 5 * ((stop - block + 4) // 5)
        whole = source + 64 * (shared // 5)
        while source < whole:
            prefetch(source + PREFETCH)
            following = top_digit(load_bytes(min(source + 64, end - 64)))
            u0, u1, u2, u3 = low_digits(rest)
            sums = add_sums(sums, dot_base3(u0, u1, u2, u3, u4, quads))
            rest, u4 = following
            source += 64
            quads += 20
        block += shared
        own = stop - block  # blocks of this vector that are still this group's
        if own > 0:
            prefetch(source + PREFETCH)
            following = top_digit(load_bytes(min(source + 64, end - 64)))
            u0, u1, u2, u3 = low_digits(rest)
            q1, q2, q3 = quads + 4, quads + 8, quads + 12
            sums = dot(dot(sums, u0, repeat_quad(quads)), u1, repeat_quad(q1 if own > 1 else zeros))
            sums = dot(dot(sums, u2, repeat_quad(q2 if own > 2 else zeros)), u3, repeat_quad(q3 if own > 3 else zeros))
            next_sums = dot(dot(next_sums, u4, repeat_quad(quads + 16)), u3, repeat_quad(zeros if own > 3 else q3))
            next_sums = dot(next_sums, u2, repeat_quad(zeros if own > 2 else q2))
            next_sums = dot(next_sums, u1, repeat_quad(zeros if own > 1 else q1))
            rest, u4 = following
            source += 64
            quads += 20
            block += 5
        total = scaled(total, widen(sums), act_sums + 4 * g, gap, _row_scales(scales, g, shift))
    return total


@jit
def _multiply_2bit(weight, blocks, record, act_sums, gap, scales, shift, group_blocks, group):
    """16 floats of a row group, before a token's act_scale. Fields 1 and 3 stay in place, four times too large."""
    groups = (blocks + group_blocks - 1) // group_blocks
    three, twelve = repeat_byte(3), repeat_byte(12)
    first = group * blocks
    vector = first // 4
    source = weight + 64 * vector
    block = 4 * vector - first  # -3 .. 0 at first
    quads = record + CODES + 4 * block
    zeros = record + _ZEROS
    total = splat(np.float32(0))
    next1, next2, next3 = no_sums(), no_sums(), no_sums()
    for g in range(groups):
        sums0, sums1, sums2, sums3 = no_sums(), next1, next2, next3
        next1, next2, next3 = no_sums(), no_sums(), no_sums()
        stop = min(group_blocks * (g + 1), blocks)
        shared = 4 * ((stop - block) // 4) if g + 1 < groups else 4 * ((stop - block + 3) // 4)
        whole = source + 64 * (shared // 4)
        while source < whole:
            prefetch(source + PREFETCH)
            q = load_bytes(source)
            upper = shift_words(q, 4)
            sums0 = dot(sums0, and_bytes(q, three), repeat_quad(quads))
            sums1 = dot(sums1, and_bytes(q, twelve), repeat_quad(quads + 4))
            sums2 = dot(sums2, and_bytes(upper, three), repeat_quad(quads + 8))
            sums3 = dot(sums3, and_bytes(upper, twelve), repeat_quad(quads + 12))
            source += 64
            quads += 16
        block += shared
        own = stop - block
        if own > 0:
            q = load_bytes(source)
            upper = shift_words(q, 4)
            u1, u2, u3 = and_bytes(q, twelve), and_bytes(upper, three), and_bytes(upper, twelve)
            q1, q2 = quads + 4, quads + 8
            sums0 = dot(sums0, and_bytes(q, three), repeat_quad(quads))
            sums1 = dot(sums1, u1, repeat_quad(q1 if own > 1 else zeros))
            sums2 = dot(sums2, u2, repeat_quad(q2 if own > 2 else zeros))
            next1 = dot(next1, u1, repeat_quad(zeros if own > 1 else q1))
            next2 = dot(next2, u2, repeat_quad(zeros if own > 2 else q2))
            next3 = dot(next3, u3, repeat_quad(quads + 12))
            source += 64
            quads += 16
            block += 4
        ones, fours = add_ints(widen(sums0), widen(sums2)), add_ints(widen(sums1), widen(sums3))
        sums = add_ints(ones, shift_ints(fours, 2))
        total = scaled(total, sums, act_sums + 4 * g, gap, _row_scales(scales, g, shift))
    return total


# --- many tokens --------------------------------------------------------------------------------------------------------


@jit
def _tile_8(blocks, count, group_blocks, codes, stride, act_sums, gap, scales, shift, acc, acc_stride):
    """Eight tokens with `count` unpacked blocks, group after group, onto the float sums at `acc`."""
    t0, t1, t2, t3 = load(acc), load(acc + acc_stride), load(acc + 2 * acc_stride), load(acc + 3 * acc_stride)
    t4, t5 = load(acc + 4 * acc_stride), load(acc + 5 * acc_stride)
    t6, t7 = load(acc + 6 * acc_stride), load(acc + 7 * acc_stride)
    for start in range(0, count, group_blocks):
        s0, s1, s2, s3 = no_sums(), no_sums(), no_sums(), no_sums()
        s4, s5, s6, s7 = no_sums(), no_sums(), no_sums(), no_sums()
        for block in range(start, min(count, start + group_blocks)):
            u = load_bytes(blocks + 64 * block)
            quad = codes + 4 * block
            s0 = dot(s0, u, repeat_quad(quad))
            s1 = dot(s1, u, repeat_quad(quad + stride))
            s2 = dot(s2, u, repeat_quad(quad + 2 * stride))
            s3 = dot(s3, u, repeat_quad(quad + 3 * stride))
            s4 = dot(s4, u, repeat_quad(quad + 4 * stride))
            s5 = dot(s5, u, repeat_quad(quad + 5 * stride))
            s6 = dot(s6, u, repeat_quad(quad + 6 * stride))
            s7 = dot(s7, u, repeat_quad(quad + 7 * stride))
        g = start // group_blocks
        by, at = _row_scales(scales, g, shift), act_sums + 4 * g
        t0 = scaled(t0, widen(s0), at, gap, by)
        t1 = scaled(t1, widen(s1), at + stride, gap, by)
        t2 = scaled(t2, widen(s2), at + 2 * stride, gap, by)
        t3 = scaled(t3, widen(s3), at + 3 * stride, gap, by)
        t4 = scaled(t4, widen(s4), at + 4 * stride, gap, by)
        t5 = scaled(t5, widen(s5), at + 5 * stride, gap, by)
        t6 = scaled(t6, widen(s6), at + 6 * stride, gap, by)
        t7 = scaled(t7, widen(s7), at + 7 * stride, gap, by)
    store(acc, t0)
    store(acc + acc_stride, t1)
    store(acc + 2 * acc_stride, t2)
    store(acc + 3 * acc_stride, t3)
    store(acc + 4 * acc_stride, t4)
    store(acc + 5 * acc_stride, t5)
    store(acc + 6 * acc_stride, t6)
    store(acc + 7 * acc_stride, t7)


@jit
def _tile_4(blocks, count, group_blocks, codes, stride, act_sums, gap, scales, shift, acc, acc_stride):
    t0, t1, t2, t3 = load(acc), load(acc + acc_stride), load(acc + 2 * acc_stride), load(acc + 3 * acc_stride)
    for start in range(0, count, group_blocks):
        s0, s1, s2, s3 = no_sums(), no_sums(), no_sums(), no_sums()
        for block in range(start, min(count, start + group_blocks)):
            u = load_bytes(blocks + 64 * block)
            quad = codes + 4 * block
            s0 = dot(s0, u, repeat_quad(quad))
            s1 = dot(s1, u, repeat_quad(quad + stride))
            s2 = dot(s2, u, repeat_quad(quad + 2 * stride))
            s3 = dot(s3, u, repeat_quad(quad + 3 * stride))
        g = start // group_blocks
        by, at = _row_scales(scales, g, shift), act_sums + 4 * g
        t0 = scaled(t0, widen(s0), at, gap, by)
        t1 = scaled(t1, widen(s1), at + stride, gap, by)
        t2 = scaled(t2, widen(s2), at + 2 * stride, gap, by)
        t3 = scaled(t3, widen(s3), at + 3 * stride, gap, by)
    store(acc, t0)
    store(acc + acc_stride, t1)
    store(acc + 2 * acc_stride, t2)
    store(acc + 3 * acc_stride, t3)


@jit
def _tile_1(blocks, count, group_blocks, codes, act_sums, gap, scales, shift, acc):
    total = load(acc)
    for start in range(0, count, group_blocks):
        sums = no_sums()
        for block in range(start, min(count, start + group_blocks)):
            sums = dot(sums, load_bytes(blocks + 64 * block), repeat_quad(codes + 4 * block))
        g = start // group_blocks
        total = scaled(total, widen(sums), act_sums + 4 * g, gap, _row_scales(scales, g, shift))
    store(acc, total)


@jit
def grouped_gemm(
    weight,
    packing,
    in_features,
    scales,
    columns,
    act_blocks,
    records,
    stride,
    tokens,
    acc,
    acc_stride,
    first_group,
    last_group,
    scratch,
):
    """``acc = sum_g(weight_scale_g * acc_g)`` of the rows 16 first_group .. 16 last_group - 1, for all tokens.

    Args:
        weight, packing, in_features, records, stride, tokens, acc_stride, first_group, last_group, scratch: as in
            `matmul.gemm`; the records have their group sums (`write_group_sums` with the same `columns`).
        scales: address of fp16 (ceil(O / 16), G, 16); 0 with act_blocks: none, the caller scales the sums.
        columns: of a group: 64, 128 or 256. act_blocks: whether the records are those of `quantize_activation_blocks`: the
            sum is then ``sum_b(acc_b * (act_scale_b * weight_scale_g))`` over their blocks.
        acc: address of float32 rows, one per token; groups of rows are written whole.

    Numerics: integers exact, one rounding for each group; the sum begins with the first group. Does not depend on the number
    of tokens, nor on how row groups are shared among threads.
    """
    blocks = (in_features + 3) // 4
    groups = 0 if scales == 0 else (in_features + columns - 1) // columns
    group_blocks, shift, gap, sums_at = columns // 4, 0, 0, group_sums_offset(in_features)
    if act_blocks:
        group_blocks, gap = ACT_BLOCK // 4, act_scales_offset(in_features) - sums_at
        while scales != 0 and ACT_BLOCK << shift < columns:
            shift += 1
    if tokens <= 2:  # the second one finds the packed bytes in the first-level cache
        for group in range(first_group, last_group):
            for n in range(tokens):
                record = records + n * stride
                sums, by = record + sums_at, scales + 32 * groups * group
                if packing == TWO_BIT:
                    y = _multiply_2bit(weight, blocks, record, sums, gap, by, shift, group_blocks, group)
                else:
                    y = _multiply_base3(weight, blocks, record, sums, gap, by, shift, group_blocks, group)
                store(acc + 4 * n * acc_stride + 64 * group, y)
        return
    if TILES and not act_blocks:  # stops every 32 columns would take as long with tiles as without
        tiled_grouped_gemm(
            weight, packing, blocks, scales, groups, group_blocks, sums_at, records, stride, tokens, acc, acc_stride,
            first_group, last_group, scratch,
        )  # fmt: skip
        return
    for group in range(first_group, last_group):
        for n in range(tokens):
            store(acc + 4 * n * acc_stride + 64 * group, splat(np.float32(0)))
    for chunk in range(0, blocks, CHUNK):
        count = min(CHUNK, blocks - chunk)
        quads, sums_here = records + CODES + 4 * chunk, records + sums_at + 4 * (chunk // group_blocks)
        for group in range(first_group, last_group, GROUPS):
            slots = min(GROUPS, last_group - group)
            for slot in range(slots):
                unpack_blocks(weight, packing, (group + slot) * blocks + chunk, count, scratch + slot * SLOT + MARGIN)
            n = 0
            while n < tokens:
                width = 8 if AVX512 and tokens - n >= 8 else 4 if tokens - n >= 4 else 1
                for slot in range(slots):
                    source = scratch + slot * SLOT + MARGIN
                    by = scales
                    if scales != 0:
                        by += 32 * (groups * (group + slot) + (chunk // group_blocks >> shift))
                    out = acc + 4 * n * acc_stride + 64 * (group + slot)
                    at, sums = quads + n * stride, sums_here + n * stride
                    if AVX512 and width == 8:
                        _tile_8(source, count, group_blocks, at, stride, sums, gap, by, shift, out, 4 * acc_stride)
                    elif width == 4:
                        _tile_4(source, count, group_blocks, at, stride, sums, gap, by, shift, out, 4 * acc_stride)
                    else:
                        _tile_1(source, count, group_blocks, at, sums, gap, by, shift, out)
                n += width


@jit
def finish_grouped(acc, act_scale, bias, width, out):
    """``out = acc * act_scale + bias``, product and sum rounded one by one.

    Args:
        acc, bias, out: addresses of float32 (width,), width a multiple of 16; bias may be 0 for none. act_scale: float32.
        width: numbers in a row.
    """
    by = splat(act_scale)
    for at in range(0, 4 * width, 64):
        y = multiply(load(acc + at), by)
        store(out + at, y if bias == 0 else add(y, load(bias + at)))


@jit
def finish_rows(acc, act_scale, scales, bias, width, out):
    """``out = acc * (act_scale * weight_scale) + bias`` with a weight_scale for each row, rounded step by step.

    Args:
        acc: address of int32 (width,), width a multiple of 16. act_scale: float32. scales: address of fp16 (width,).
        bias: address of float32 (width,), or 0 for none. out: address of float32 (width,). width: numbers in a row.
    """
    by = splat(act_scale)
    for at in range(0, width, 16):
        y = multiply(floats_of(load_ints(acc + 4 * at)), multiply(by, load_halves(scales + 2 * at)))
        store(out + 4 * at, y if bias == 0 else add(y, load(bias + 4 * at)))


@jit
def finish_float_rows(acc, scales, bias, width, out):
    """``out = acc * weight_scale + bias`` with a weight_scale for each row, product and sum rounded one by one.

    Args:
        acc, bias, out: as in `finish_grouped`. scales: address of fp16 (width,). width: numbers in a row.
    """
    for at in range(0, width, 16):
        y = multiply(load(acc + 4 * at), load_halves(scales + 2 * at))
        store(out + 4 * at, y if bias == 0 else add(y, load(bias + 4 * at)))


def blocked_product(
    x: np.ndarray, weight: np.ndarray, packing: str, out_features: int, scales: np.ndarray | None, columns: int
) -> np.ndarray:
    """`grouped_product` of activations that are rounded in blocks: ``sum_b(acc_b * (act_scale_b * weight_scale_g))``.

    Args:
        x: float32 (N, I). weight, packing, out_features, columns: as there. scales: as there, or None: all are 1.

    Returns: float32 (N, O). Numerics: bit for bit the reference.
    """
    tokens, in_features = x.shape
    x, records = np.ascontiguousarray(x), np.empty((tokens, record_bytes(in_features)), np.uint8)
    for row, record in zip(x, records, strict=True):
        quantize_activation_blocks(row.ctypes.data, in_features, record.ctypes.data)
    return _product(records, in_features, weight, packing, out_features, scales, columns, True)


def grouped_product(
    act_codes: np.ndarray, weight: np.ndarray, packing: str, out_features: int, scales: np.ndarray, columns: int
) -> np.ndarray:
    """``sum_g(weight_scale_g * acc_g)`` from packed bytes, in the calling thread.

    Args:
        act_codes: int8 (N, I). weight: uint8 (packed_bytes(O, I, packing),). packing: "2bit" or "base3".
        out_features: O. scales: fp16 (ceil(O / 16), G, 16), `packing.pack_scales` of (O, G). columns: 64, 128 or 256.

    Returns: float32 (N, O), to be multiplied by act_scale. Numerics: bit for bit the reference.

    Raises:
        ValueError: another dtype or shape, an unknown packing, or other groups.
    """
    if act_codes.dtype != np.int8 or act_codes.ndim != 2 or act_codes.shape[1] == 0:
        raise ValueError(f"act_codes: expected int8 (N, I) with a column; got {act_codes.dtype} {act_codes.shape}")
    if packing not in PACKINGS:
        raise ValueError(f"packing: expected one of {', '.join(PACKINGS)}; got {packing!r}")
    if columns not in GROUP_COLUMNS:
        raise ValueError(f"columns: expected one of {', '.join(map(str, GROUP_COLUMNS))}; got {columns}")
    tokens, in_features = act_codes.shape
    check_packed(weight, np.uint8, packed_bytes(out_features, in_features, packing))
    shape = (row_groups(out_features), -(-in_features // columns), 16)
    if scales.dtype != np.float16 or scales.shape != shape or not scales.flags.c_contiguous:
        raise ValueError(f"scales: expected a contiguous float16 {shape}; got {scales.dtype} {scales.shape}")
    records = np.zeros((tokens, record_bytes(in_features)), np.uint8)
    records[:, CODES : CODES + in_features] = act_codes.view(np.uint8)
    for record in records:
        write_group_sums(record.ctypes.data, in_features, columns)
    return _product(records, in_features, weight, packing, out_features, scales, columns, False)


def _product(
    records: np.ndarray,
    in_features: int,
    weight: np.ndarray,
    packing: str,
    out_features: int,
    scales: np.ndarray | None,
    columns: int,
    act_blocks: bool,
) -> np.ndarray:
    """`grouped_gemm` of all rows on arrays: float32 (N, O)."""
    tokens, groups = len(records), row_groups(out_features)
    acc = np.empty((tokens, 16 * groups), np.float32)
    scratch = np.empty(SCRATCH_BYTES, np.uint8)
    grouped_gemm(
        weight.ctypes.data, PACKINGS.index(packing), in_features, 0 if scales is None else scales.ctypes.data, columns,
        int(act_blocks), records.ctypes.data, records.shape[1], tokens, acc.ctypes.data, acc.shape[1], 0, groups,
        scratch.ctypes.data,
    )  # fmt: skip
    return acc[:, :out_features]
