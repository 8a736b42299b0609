"""Checks of the compiled CPU kernels against numpy, by tests in this process and by processes with another instruction set:

BITDISTILL_CPU_FEATURES=portable python cpu_checks.py run        compiles and runs everything small
NUMBA_CPU_NAME=... NUMBA_CPU_FEATURES=... python cpu_checks.py assembly       compiles only; prints instructions as JSON
"""

import json
import platform
import re
import sys

import numpy as np
from numba import int64

from bitdistill.kernels import packing
from bitdistill.kernels.cpu import activations, floats, grouped, instructions, matmul, tables, tiles, unpacking, vector
from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.numerics import EPSILON


def odd(array):
    """The same content, read-only and at an odd address."""
    buffer = np.zeros(array.nbytes + 1, np.uint8)
    view = buffer[1:].view(array.dtype) if array.itemsize == 1 else np.frombuffer(buffer, array.dtype, array.size, 1)
    view.reshape(array.shape)[...] = array
    buffer.flags.writeable = False
    view = np.frombuffer(buffer, array.dtype, array.size, 1).reshape(array.shape)
    assert view.ctypes.data % 2
    assert not view.flags.writeable
    return view


# --- operations of vector.py ------------------------------------------------------------------------------------------


@jit
def _operations(p, out):
    """Every operation once: p holds six vectors of bytes, out takes one of 64 bytes for each result."""
    a, b, act = vector.load_bytes(p), vector.load_bytes(p + 64), vector.load_bytes(p + 128)
    digits, ints = vector.load_bytes(p + 192), vector.load_ints(p + 256)
    at = out
    for result in (
        vector.repeat_quad(p + 3),
        vector.repeat_byte(200),
        vector.and_bytes(a, b),
        vector.add_bytes(a, b),
        vector.sub_bytes(a, b),
        vector.min_bytes(a, b),
        vector.shift_words(a, 3),
        vector.third(a),
    ):
        vector.store_bytes(at, result)
        at += 64
    sums = vector.dot(vector.dot(vector.no_sums(), digits, act), digits, act)
    for numbers in (
        vector.widen(vector.add_sums(sums, sums)),
        vector.dot_signed(ints, a, act),
        vector.repeat_int(-7),
        vector.add_ints(ints, ints),
        vector.sub_ints(vector.repeat_int(3), ints),
        vector.mul_ints(ints, ints),
        vector.shift_ints(ints, 5),
    ):
        vector.store_ints(at, numbers)
        at += 64
    floats.store(at, vector.floats_of(ints))
    floats.store(at + 64, vector.load_halves(p + 320))
    vector.prefetch(at)


def check_operations():
    rng = np.random.default_rng(0)
    p = np.zeros(385, np.uint8)[1:]  # misaligned
    a, b, act, digits = p[:64], p[64:128], p[128:192], p[192:256]
    a[:], b[:], digits[:] = (rng.integers(0, high, 64) for high in (256, 256, 31))
    a[a == 128] = 127  # as int8 within +-127
    act.view(np.int8)[:] = rng.integers(-127, 128, 64)
    ints = p[256:320].view(np.int32)
    ints[:] = rng.integers(-(2**31), 2**31, 16)
    halves = p[320:352].view(np.float16)
    halves[:] = [0, -0.0, 1, -1.5, 65504, -65504, 6e-8, 2**-14, 6e-5, 1 / 3, np.inf, -np.inf, np.nan, 1e-3, 7, -2048]
    out = np.full(64 * 17, 99, np.uint8)
    _operations(p.ctypes.data, out.ctypes.data)
    signed, quads = act.view(np.int8).reshape(16, 4).astype(int), digits.reshape(16, 4).astype(int)
    offset = (a.view(np.int8).astype(int) + vector.SIGNED_OFFSET).reshape(16, 4)
    shifted = (a.view("<u2") >> 3).view(np.uint8)
    expected = [np.tile(p[3:7], 16), np.full(64, 200), a & b, a + b, a - b, np.minimum(a, b), shifted, a // 3]
    expected = [value.astype(np.uint8) for value in expected]
    numbers = [4 * (quads * signed).sum(1), ints + (offset * signed).sum(1), np.full(16, -7), ints.astype(int) * 2]
    numbers += [3 - ints.astype(int), ints.astype(int) ** 2, ints >> 5]
    expected += [value.astype(np.int64).astype(np.int32).view(np.uint8) for value in numbers]
    expected += [ints.astype(np.float32).view(np.uint8), halves.astype(np.float32).view(np.uint8)]
    for index, (got, want) in enumerate(zip(out.reshape(17, 64), expected, strict=True)):
        if index == 16:  # NaN has more than one pattern
            np.testing.assert_array_equal(got.view(np.float32), want.view(np.float32))
        else:
            np.testing.assert_array_equal(got, want, err_msg=f"operation {index}")


@jit
def _all_digits(source, out):
    for at in range(0, 256, 64):
        rest, u4 = unpacking.top_digit(vector.load_bytes(source + at))
        u0, u1, u2, u3 = unpacking.low_digits(rest)
        vector.store_bytes(out + at, u0)
        vector.store_bytes(out + 256 + at, u1)
        vector.store_bytes(out + 512 + at, u2)
        vector.store_bytes(out + 768 + at, u3)
        vector.store_bytes(out + 1024 + at, u4)


def check_digits():
    """All 243 bytes that base 3 has."""
    source, out = np.arange(256, dtype=np.uint8), np.zeros((5, 256), np.uint8)
    source[243:] = 0
    _all_digits(source.ctypes.data, out.ctypes.data)
    for digit in range(5):
        np.testing.assert_array_equal(out[digit], source // 3**digit % 3)


# --- operations of tiles.py -------------------------------------------------------------------------------------------


@jit
def _tiles_2x2(tokens, acts, stride, codes, steps, sums, sums_stride, signed):
    """32 rows of codes, which lie as two times `steps` tiles; adds to `sums`."""
    tiles.configure(tokens)
    second = sums + 16 * sums_stride
    tiles.load_sums_0(sums, sums_stride)
    tiles.load_sums_1(sums + 64, sums_stride)
    tiles.load_sums_2(second, sums_stride)
    tiles.load_sums_3(second + 64, sums_stride)
    for step in range(steps):
        at, here, there = acts + 64 * step, codes + 1024 * step, codes + 1024 * (steps + step)
        if signed:
            tiles.multiply_2x2_signed(at, at + 16 * stride, stride, here, there)
        else:
            tiles.multiply_2x2(at, at + 16 * stride, stride, here, there)
    tiles.store_sums_0(sums, sums_stride)
    tiles.store_sums_1(sums + 64, sums_stride)
    tiles.store_sums_2(second, sums_stride)
    tiles.store_sums_3(second + 64, sums_stride)
    tiles.release()


@jit
def _tiles_bf16(tokens, acts, stride, pairs, steps, sums, sums_stride):
    """`_tiles_2x2` of bf16."""
    tiles.configure(tokens)
    for step in range(steps):
        at, here = acts + 64 * step, pairs + 1024 * step
        tiles.multiply_2x2_bf16(at, at + 16 * stride, stride, here, here + 1024 * steps)
    tiles.store_sums_0(sums, sums_stride)
    tiles.store_sums_1(sums + 64, sums_stride)
    tiles.store_sums_2(sums + 16 * sums_stride, sums_stride)
    tiles.store_sums_3(sums + 16 * sums_stride + 64, sums_stride)
    tiles.release()


@jit
def _tiles_1x4(tokens, acts, stride, codes, steps, sums, sums_stride, signed):
    """64 rows of codes; writes `sums`, twice, so that what is zeroed is seen to be."""
    tiles.configure(tokens)
    for _ in range(2):
        tiles.zero_sums()
        for step in range(steps):
            if signed:
                tiles.multiply_1x4_signed(acts + 64 * step, stride, codes + 1024 * step, 1024 * steps)
            else:
                tiles.multiply_1x4(acts + 64 * step, stride, codes + 1024 * step, 1024 * steps)
        tiles.store_sums_0(sums, sums_stride)
        tiles.store_sums_1(sums + 64, sums_stride)
        tiles.store_sums_2(sums + 128, sums_stride)
        tiles.store_sums_3(sums + 192, sums_stride)
    tiles.release()


def check_tiles(tokens, steps, signed, extreme=None):
    """Both forms for a number of tokens, at odd addresses; what lies around the sums stays as it is."""
    rng = np.random.default_rng(64 * tokens + steps)
    columns, low, high = 64 * steps, -127 if signed else 0, 127 if signed else 2
    acts = rng.integers(-127, 128, (tokens, columns), dtype=np.int8)
    codes = rng.integers(low, high + 1, (64, columns), dtype=np.int16)
    if extreme is not None:
        acts[:], codes[:] = extreme, high
    blocks = codes.astype(np.uint8).reshape(4, 16, columns // 4, 4).transpose(0, 2, 1, 3)
    expected = acts.astype(np.int64) @ codes.T.astype(np.int64)
    blocks, stride = odd(np.ascontiguousarray(blocks).reshape(-1)), columns + 13
    rows = np.full((tokens, stride), 99, np.int8)
    rows[:, :columns] = acts
    rows = odd(rows)
    for kernel, groups, most, start in ((_tiles_2x2, 2, 32, 7), (_tiles_1x4, 4, 16, 0)):
        if tokens > most or (kernel is _tiles_2x2 and tokens <= 16):
            continue
        sums = np.full((tokens + 1, 16 * groups + 3), 7, np.int32)
        kernel(tokens, rows.ctypes.data, stride, blocks.ctypes.data, steps, sums.ctypes.data, sums.strides[0], signed)
        np.testing.assert_array_equal(sums[:-1, : 16 * groups], expected[:, : 16 * groups] + start)
        sums[:-1, : 16 * groups] = 7
        assert (sums == 7).all()


@jit
def _tiles_of_halves(tokens, acts, stride, codes, more, sums):
    """Four tiles of sums, one after the other."""
    tiles.configure_halves(tokens)
    tiles.multiply_halves(acts, stride, codes, more)
    tiles.store_sums_0(sums, 64)
    tiles.store_sums_1(sums + 1024, 64)
    tiles.store_sums_2(sums + 2048, 64)
    tiles.store_sums_3(sums + 3072, 64)
    tiles.release()


def check_halves(tokens, count, extreme=None):
    """Sums of `count` times 32 columns, each by itself; the last one stands for those that are not there."""
    rng = np.random.default_rng(8 * tokens + count)
    acts = rng.integers(-127, 128, (tokens, 32 * count), dtype=np.int8)
    codes = rng.integers(0, 256, (16, 32 * count), dtype=np.uint8)
    if extreme is not None:
        acts[:], codes[:] = extreme, 255
    blocks = odd(np.ascontiguousarray(codes.reshape(16, 8 * count, 4).transpose(1, 0, 2)).reshape(-1))
    rows, sums = odd(acts), np.full((4, 16, 16), 7, np.int32)
    _tiles_of_halves(tokens, rows.ctypes.data, rows.strides[0], blocks.ctypes.data, count - 1, sums.ctypes.data)
    for half in range(4):
        at = slice(32 * min(half, count - 1), 32 * min(half, count - 1) + 32)
        expected = acts[:, at].astype(np.int64) @ codes[:, at].T.astype(np.int64)
        np.testing.assert_array_equal(sums[half, :tokens], expected)
    assert (sums[:, tokens:] == 7).all()


@jit
def _tiles_of_keys(queries, parts, part_bytes, stride, keys, more_keys, steps, sums):
    """Four tiles of sums, one after the other."""
    tiles.configure(queries)
    for step in range(steps):
        at = 1024 * step
        tiles.multiply_keys(parts + 64 * step, part_bytes, stride, keys + at, more_keys + at)
    tiles.store_sums_0(sums, 64)
    tiles.store_sums_1(sums + 1024, 64)
    tiles.store_sums_2(sums + 2048, 64)
    tiles.store_sums_3(sums + 3072, 64)
    tiles.release()


@jit
def _tiles_of_values(queries, parts, part_bytes, values, stride, more, sums):
    """`more` + 1 tiles of sums side by side, to which the products are added."""
    tiles.configure(queries)
    tiles.load_sums_0(sums, 256)
    tiles.load_sums_1(sums + 64, 256)
    tiles.load_sums_2(sums + 128, 256)
    tiles.load_sums_3(sums + 192, 256)
    tiles.multiply_values(parts, part_bytes, 64, values, stride, more)
    tiles.store_sums_0(sums, 256)
    tiles.store_sums_1(sums + 64, 256)
    tiles.store_sums_2(sums + 128, 256)
    tiles.store_sums_3(sums + 192, 256)
    tiles.release()


def bf16_bits(x):
    """uint16 of numbers that are bf16."""
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def in_pairs(x):
    """(K, N) -> uint16 (K / 2, N, 2), as tiles want bf16."""
    return bf16_bits(x).reshape(len(x) // 2, 2, -1).transpose(0, 2, 1).copy()


def bf16_product(sums, a, b):
    """One tile product in the documented order: float32 sums (M, N) += (M, 32) @ (32, N)."""
    halves = np.zeros((2, *sums.shape), np.float32)
    for k in range(32):
        product = a[:, k, None].astype(np.float64) * b[k].astype(np.float64)  # exact, so that the sum is fma's
        halves[k % 2] = (halves[k % 2] + product).astype(np.float32)
    return sums + (halves[0] + halves[1])


def check_bf16_tiles(queries, steps, whole):
    """Both products of attention; bit for bit in their order, or with whole numbers, whose sums have no order."""
    rng = np.random.default_rng(100 * queries + steps)

    def numbers(*shape):
        x = rng.integers(-9, 10, shape) if whole else rng.normal(size=shape) * 2.0 ** rng.integers(-9, 9, shape)
        return (x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)

    parts, keys = numbers(3, queries, 32 * steps), [numbers(32 * steps, 16) for _ in range(2)]
    packed, left = [odd(in_pairs(one)) for one in keys], odd(bf16_bits(parts))
    sums = np.full((4, 16, 16), 7, np.float32)
    _tiles_of_keys(
        queries, left.ctypes.data, left.strides[0], left.strides[1], *(one.ctypes.data for one in packed), steps,
        sums.ctypes.data,
    )  # fmt: skip
    for side, order in enumerate(([1, 2], [2, 1])):
        first, rest = np.zeros((2, queries, 16), np.float32)
        for step in range(steps):
            at = slice(32 * step, 32 * step + 32)
            first = bf16_product(first, parts[0][:, at], keys[side][at])
            for part in order:
                rest = bf16_product(rest, parts[part][:, at], keys[side][at])
        np.testing.assert_array_equal(sums[2 * side, :queries], first)
        np.testing.assert_array_equal(sums[2 * side + 1, :queries], rest)
    assert (sums[:, queries:] == 7).all()

    for count in (1, 3, 4):  # tiles of values
        weights, values = numbers(3, queries, 32), numbers(32, 16 * count)
        left, packed = odd(bf16_bits(weights)), odd(in_pairs(values))
        before = numbers(16, 64)
        sums = before.copy()
        _tiles_of_values(
            queries,
            left.ctypes.data,
            left.strides[0],
            packed.ctypes.data,
            packed.strides[0],
            count - 1,
            sums.ctypes.data,
        )
        for tile in range(count):
            at, expected = slice(16 * tile, 16 * tile + 16), before[:queries, 16 * tile : 16 * tile + 16]
            for part in (0, 1, 2) if tile % 2 == 0 else (2, 1, 0):
                expected = bf16_product(expected, weights[part], values[:, at])
            np.testing.assert_array_equal(sums[:queries, at], expected)
        np.testing.assert_array_equal(sums[queries:], before[queries:])


def check_bf16_pairs(tokens, steps):
    """For 17 to 32 tokens, with numbers whose sums are exact."""
    rng = np.random.default_rng(64 * tokens + steps)
    acts, weight = (rng.integers(-9, 10, (rows, 32 * steps)).astype(np.float32) for rows in (tokens, 32))
    halves = [(x.view(np.uint32) >> 16).astype(np.uint16) for x in (acts, weight)]
    pairs = odd(np.ascontiguousarray(halves[1].reshape(2, 16, 16 * steps, 2).transpose(0, 2, 1, 3)).reshape(-1))
    sums = np.full((tokens + 1, 35), 7, np.float32)
    rows = odd(halves[0])
    _tiles_bf16(tokens, rows.ctypes.data, rows.strides[0], pairs.ctypes.data, steps, sums.ctypes.data, sums.strides[0])
    np.testing.assert_array_equal(sums[:-1, :32], acts @ weight.T)
    sums[:-1, :32] = 7
    assert (sums == 7).all()


# --- activations ------------------------------------------------------------------------------------------------------


def planes(x):
    """16-bit activations in numpy: (hi, lo) int64 (N, I), act_scale float32 (N, 1)."""
    peak = np.maximum(np.abs(x).max(axis=1, keepdims=True), np.float32(EPSILON))
    q = np.rint(x * (np.float32(32512) / peak))
    hi = np.rint(q / np.float32(255))
    return hi.astype(np.int64), (q - np.float32(255) * hi).astype(np.int64), peak / np.float32(32512)


def check_planes(x):
    """`quantize_planes` of float32 (N, I): codes, sums, scale, and the zeros around the codes."""
    columns = x.shape[1]
    expected = planes(x)
    size = activations.record_bytes(columns)
    for n in range(len(x)):
        records = np.full((2, size), 77, np.uint8)
        row = odd(x[n])
        activations.quantize_planes(row.ctypes.data, columns, records.ctypes.data, size)
        whole = 255 * expected[0][n] + expected[1][n]
        for record, codes, summed in zip(records, expected[:2], (whole, expected[1][n]), strict=True):
            np.testing.assert_array_equal(record[64 : 64 + columns].view(np.int8), codes[n])
            assert np.abs(codes[n]).max() <= 127
            assert record[:4].view(np.float32)[0] == expected[2][n, 0]
            assert record[4:8].view(np.int32)[0] == codes[n].sum()
            assert not record[48:64].any()
            assert not record[64 + columns : activations.group_sums_offset(columns)].any()
            sums = record[activations.group_sums_offset(columns) :].view(np.int32)[: -(-columns // 32)]
            np.testing.assert_array_equal(sums, np.add.reduceat(summed, range(0, columns, 32)))


# --- products ---------------------------------------------------------------------------------------------------------


def check_product(weight_codes, act_codes):
    """Both packings, all tokens and the first token alone, against int64."""
    expected = act_codes.astype(np.int64) @ weight_codes.T.astype(np.int64)
    for name in packing.PACKINGS:
        weight = odd(packing.pack(weight_codes, name))
        for tokens in {1, len(act_codes)}:
            got = matmul.ternary_accumulate(act_codes[:tokens], weight, name, len(weight_codes))
            assert got.dtype == np.int32
            np.testing.assert_array_equal(got, expected[:tokens], err_msg=name)


def check_products(shapes):
    rng = np.random.default_rng(1)
    for rows, columns, tokens in shapes:
        codes = rng.integers(-1, 2, (rows, columns), dtype=np.int8)
        check_product(codes, rng.integers(-127, 128, (tokens, columns), dtype=np.int8))


def check_extremes(columns, tokens):
    """The largest sums: every step of the 16-bit sums at its bound."""
    for code in (-1, 1):
        for act in (-128, 127):
            check_product(np.full((17, columns), code, np.int8), np.full((tokens, columns), act, np.int8))


def check_grouped(weight_codes, act_codes, columns):
    """Both packings, all tokens and the first token alone: exact integers of each group, scaled and added up in fp32."""
    rows, in_features = weight_codes.shape
    generator = np.random.default_rng(3)
    scales = (generator.integers(128, 256, (rows, -(-in_features // columns))) * 2.0**-14).astype(np.float16)
    expected = np.zeros((len(act_codes), rows), np.float32)
    for group, start in enumerate(range(0, in_features, columns)):
        part = slice(start, start + columns)
        integers = act_codes[:, part].astype(np.int64) @ weight_codes[:, part].T.astype(np.int64)
        expected += integers.astype(np.float32) * scales[:, group].astype(np.float32)
    stored = packing.pack_scales(scales)
    for name in packing.PACKINGS:
        weight = odd(packing.pack(weight_codes, name))
        for tokens in {1, len(act_codes)}:
            got = grouped.grouped_product(act_codes[:tokens], weight, name, rows, stored, columns)
            np.testing.assert_array_equal(got, expected[:tokens], err_msg=f"{name}, {columns}")


def check_grouped_extremes(columns):
    """The largest sums of a group: every step of the 16-bit sums at its bound."""
    for code in (-1, 1):
        for act in (-127, 127):
            check_grouped(
                np.full((17, 2 * columns + 12), code, np.int8), np.full((5, 2 * columns + 12), act, np.int8), columns
            )


# --- tables -----------------------------------------------------------------------------------------------------------


def make_table(rng, format, rows, columns, extreme=None):
    """(codes or None, weight, scale, the table in float64)."""
    scale = rng.uniform(0.01, 0.1, rows).astype(np.float32)
    if format == "fp16":
        weight = rng.standard_normal((rows, columns)).astype(np.float16)
        return None, weight, None, weight.astype(np.float64)
    low, high = {"int8": (-127, 127), "int4": (-8, 7)}.get(format, (-1, 1))
    codes = rng.integers(low, high + 1, (rows, columns), dtype=np.int8)
    if extreme is not None:
        codes[:] = (low, high)[extreme]
    if format == "int8":
        return codes, packing.pack_int8(codes), scale, codes * scale[:, None].astype(np.float64)
    if format == "int4":
        scale = rng.uniform(0.01, 0.1, (rows, columns // 32)).astype(np.float16)
        full = codes * np.repeat(scale.astype(np.float64), 32, axis=1)
        return codes, packing.pack_int4(codes), packing.pack_scales(scale), full
    return codes, packing.pack(codes, format), scale, codes * scale[:, None].astype(np.float64)


def table_product(x, codes, format, scale):
    """The definition in tables.py, operation by operation."""
    hi, lo, act_scale = planes(x)
    if format != "int4":
        hi, lo = (plane @ codes.T.astype(np.int64) for plane in (hi, lo))
        return (np.float32(255) * hi.astype(np.float32) + lo.astype(np.float32)) * (act_scale * scale)
    rows, groups = len(codes), codes.shape[1] // 32
    scale = packing.unpack_scales(scale, slice(0, rows)).astype(np.float32)
    result = np.zeros((len(x), rows), np.float32)
    for group in range(groups):
        columns = slice(32 * group, 32 * group + 32)
        both = (255 * hi[:, columns] + lo[:, columns]) @ codes[:, columns].T.astype(np.int64)
        assert np.abs(both).max() < 2**24
        result += both.astype(np.float32) * scale[:, group]
    return act_scale * result


def check_table(format, rows, columns, tokens, extreme=None):
    """Logits bit for bit the definition (fp16: within float32's error), and the rows of the embedding."""
    rng = np.random.default_rng(rows + columns)
    codes, weight, scale, full = make_table(rng, format, rows, columns, extreme)
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    if extreme is not None:
        x[:] = 1
    weight, scale = odd(weight), None if scale is None else odd(scale)
    got = tables.multiply_table(x, weight, format, rows, scale)
    if format == "fp16":
        bound = np.abs(x).astype(np.float64) @ np.abs(full).T
        assert (np.abs(got - x.astype(np.float64) @ full.T) <= 16 * 2.0**-24 * bound).all()
    else:
        np.testing.assert_array_equal(got, table_product(x, codes, format, scale))
    row = np.full(columns + 1, 99, np.float32)
    address = 0 if scale is None else scale.ctypes.data
    for number in {0, rows // 2, rows - 1}:
        arguments = weight.ctypes.data, address, tables.MATRIX_FORMATS.index(format), columns, number, row.ctypes.data
        tables.table_row(*arguments)
        np.testing.assert_array_equal(row[:-1], full[number].astype(np.float32))
        assert row[-1] == 99


# --- in a process of its own ------------------------------------------------------------------------------------------


def run():
    """Everything, small."""
    check_operations()
    check_digits()
    if tiles.TILES:
        for tokens in (1, 5, 16, 17, 32):
            check_tiles(tokens, 2, signed=tokens % 2 == 1)
        for queries in (1, 16):
            check_bf16_tiles(queries, 2, whole=True)
        check_bf16_pairs(19, 3)
        check_halves(9, 3)
    check_planes(np.random.default_rng(2).standard_normal((2, 49)).astype(np.float32))
    check_products([(1, 1, 1), (33, 37, 5), (17, 1090, 1), (16, 260, 11), (50, 300, 18)])
    check_extremes(1290, 1)
    check_extremes(260, 4)
    rng = np.random.default_rng(4)
    for columns in grouped.GROUP_COLUMNS:
        shape = (18, 2 * columns + 69)
        acts = rng.integers(-127, 128, (9, shape[1]), dtype=np.int8)
        check_grouped(rng.integers(-1, 2, shape, dtype=np.int8), acts, columns)
        check_grouped_extremes(columns)
    check_table("int8", 50, 128, 3)
    check_table("int4", 35, 160, 9)
    for format in tables.MATRIX_FORMATS:
        check_table(format, 33, 64, 2)
        check_table(format, 5, 96, 1)
        if format != "int4":
            check_table(format, 18, 37, 1)
        if format != "fp16":
            check_table(format, 3, 288, 1, extreme=0)
            check_table(format, 3, 288, 1, extreme=1)


KERNELS = (
    (matmul._multiply_2bit, 4),
    (matmul._multiply_base3, 4),
    (unpacking.unpack_blocks, 5),
    (matmul._tile_2_of_4, 8),
    (matmul._tile_4_of_4, 8),
    (matmul._tile_4, 6),
    (tables._multiply_int8, 5),
    (tables._multiply_int4, 6),
    (tables._multiply_int4_pair, 6),
)


def counted(text):
    """Counts of 'mnemonic register-class' in x86 or aarch64 assembly."""
    counts = {}
    for line in text.splitlines():
        found = re.match(r"\s+(?:\{vex\}\s+)?([a-z]\w*)\s+(.*)", line)
        if found:
            wide = re.search(r"[xyz]mm|v\d+(?=\.)", found[2])
            name = found[1] + (f" {wide[0] if wide[0][1:] == 'mm' else 'v'}" if wide else "")
            counts[name] = counts.get(name, 0) + 1
    return counts


def assembly():
    """Instructions of each kernel for the target that the environment names, an Arm one by way of its LLVM IR."""
    from numba.core.caching import NullCache
    from numba.core.codegen import JITCodeLibrary
    from numba.core.cpu import CPUContext
    from numba.core.dispatcher import Dispatcher

    for name, module in list(sys.modules.items()):
        for value in vars(module).values() if name.startswith(("bitdistill.kernels.cpu.", "__main__")) else ():
            if isinstance(value, Dispatcher):
                value._cache = NullCache()  # what comes from the cache cannot be inspected
    foreign = instructions.FEATURES == "neon_dot" and platform.machine() not in ("aarch64", "arm64")
    if foreign:  # no machine code for this processor, and some built-in function in its place
        JITCodeLibrary._finalize_specific = lambda library: None
        CPUContext.get_executable = lambda context, library, *rest: library._ensure_finalized() or [].append
    found = {}
    for kernel, arguments in (
        *KERNELS,
        *([(_tiles_2x2, 8), (_tiles_bf16, 7), (_tiles_of_halves, 6)] if tiles.TILES else []),
    ):
        kernel.compile((int64,) * arguments)
        signature = kernel.signatures[0]
        text = for_arm(kernel.inspect_llvm(signature)) if foreign else kernel.inspect_asm(signature)
        found[kernel.py_func.__name__] = counted(text)
    print(json.dumps({"features": instructions.FEATURES, "instructions": found}))


def for_arm(text):
    """LLVM IR to aarch64 assembly."""
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple = "aarch64-unknown-linux-gnu"
    text = re.sub(r'target (datalayout|triple) = ".*"', "", text)
    module = llvm.parse_assembly(text)
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu="neoverse-n1", opt=3)
    module.triple, module.data_layout = triple, str(machine.target_data)
    return machine.emit_assembly(module)


if __name__ == "__main__":
    {"run": run, "assembly": assembly}[sys.argv[1]]()
