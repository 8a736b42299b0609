"""The ternary product of training on a CPU where columns have scales: groups of a weight's columns, blocks of a token's.

    y = sum_g(acc_g * weight_scale_g) * act_scale                       groups, one scale per token
    y = sum_b(acc_b * act_scale_b) * weight_scale                       blocks, one scale per tensor or row
    y = sum_b(acc_b * (act_scale_b * weight_scale_g))                   blocks and groups

Three ways, of which the fastest is found out once per shape (choices.py):

    integers    int8 products of each group or block, scaled and added up in the order of the reference: bit for bit its result
    floats      one product of x~ and W~ in fp32. With one act_scale per token both factors, act_codes and snapped scales times
                weight_codes, are bf16 numbers: where such products are fast (bf16.py) oneDNN multiplies them as bf16 and adds
                them up in fp32, which changes nothing but the order of the sum
    pieces      x~ = act_scale_b * act_codes as the sum of two bf16 numbers (2^-17): where the output is bf16 (2^-9) anyway

Addresses are int64. Shape suffixes: N tokens, I in_features, O out_features, G groups of columns, B blocks.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from bitdistill.kernels.cpu.activations import CODES, act_scales_offset, group_sums_offset, record_bytes
from bitdistill.kernels.cpu.bf16 import has_bf16_products
from bitdistill.kernels.cpu.choices import fastest
from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.floats import splat, store
from bitdistill.kernels.cpu.grouped import _tile_1, _tile_4, _tile_8, write_group_sums
from bitdistill.kernels.cpu.matmul import CHUNK, GROUPS
from bitdistill.kernels.cpu.native import float32s, int8s, int32s
from bitdistill.kernels.cpu.rows import share_rows
from bitdistill.kernels.cpu.training_products import Ternary, dequantized, is_left_out
from bitdistill.kernels.cpu.vector import AVX512, add_bytes, load_bytes, repeat_byte, store_bytes
from bitdistill.kernels.numerics import ACT_BLOCK
from bitdistill.kernels.reference import spread_scales

TOKENS = 256  # whose records and sums are worked on together: they stay in the second-level cache


# --- integers ------------------------------------------------------------------------------------------------------------


@jit
def lay_out_rows(first, last, codes, columns, blocks):
    """Blocks of the groups first .. last - 1 of a weight, int8 (R, K), like those of packing.py when they are unpacked: 64 bytes
    ``code + 1`` of 16 rows with four columns each.

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
def write_records(first, last, codes, width, act_scale, columns, records, stride):
    """The records (activations.py) of rows of codes, as far as a tile reads them: codes, group sums, scales of blocks.

    Args:
        first, last: rows. codes: address of int8 (N, width). width: I.
        act_scale: address of float32 (N, B), or 0 where tokens have one scale. columns: of a group, ACT_BLOCK with blocks.
        records: address. stride: bytes of a record.
    """
    blocks = (width + ACT_BLOCK - 1) // ACT_BLOCK
    for n in range(first, last):
        record = records + n * stride
        int8s(record + CODES, width)[:] = int8s(codes + n * width, width)
        write_group_sums(record, width, columns)
        if act_scale != 0:
            scales = float32s(act_scale + 4 * n * blocks, blocks)
            float32s(record + act_scales_offset(width), blocks)[:] = scales


@jit
def multiply_groups(first, last, blocks, width, scales, columns, act_blocks, records, stride, tokens, acc, acc_stride):
    """The sums above of the row groups first .. last - 1 for all tokens, without a token's own scale.

    Args:
        first, last: groups of 16 rows. blocks: address of the blocks of all groups (`lay_out_rows`). width: I.
        scales: address of fp16 (O / 16, G, 16), or 0 for ones. columns: of a group. act_blocks: whether tokens have blocks.
        records: address of records (`write_records`). stride: bytes of one. tokens: how many.
        acc: address of float32 rows, written. acc_stride: numbers from one row to the next.

    Numerics: integers exact; one rounding for each group, or block, in their order. Does not depend on how work is shared.
    """
    quads, sums_at = width // 4, group_sums_offset(width)
    group_blocks, shift, gap = columns // 4, 0, 0
    scale_groups = 0 if scales == 0 else (width + columns - 1) // columns
    if act_blocks:
        group_blocks, gap = ACT_BLOCK // 4, act_scales_offset(width) - sums_at
        while scales != 0 and ACT_BLOCK << shift < columns:
            shift += 1
    for group in range(first, last, GROUPS):
        slots = min(GROUPS, last - group)
        for n in range(tokens):
            for slot in range(slots):
                store(acc + 4 * n * acc_stride + 64 * (group + slot), splat(np.float32(0)))
        for chunk in range(0, quads, CHUNK):
            count = min(CHUNK, quads - chunk)
            stop = chunk // group_blocks
            n = 0
            while n < tokens:
                tile = 8 if AVX512 and tokens - n >= 8 else 4 if tokens - n >= 4 else 1
                at = records + n * stride + CODES + 4 * chunk
                sums = records + n * stride + sums_at + 4 * stop
                for slot in range(slots):
                    source = blocks + 64 * ((group + slot) * quads + chunk)
                    by = scales
                    if scales != 0:
                        by += 32 * (scale_groups * (group + slot) + (stop >> shift))
                    out = acc + 4 * n * acc_stride + 64 * (group + slot)
                    if AVX512 and tile == 8:
                        _tile_8(source, count, group_blocks, at, stride, sums, gap, by, shift, out, 4 * acc_stride)
                    elif tile == 4:
                        _tile_4(source, count, group_blocks, at, stride, sums, gap, by, shift, out, 4 * acc_stride)
                    else:
                        _tile_1(source, count, group_blocks, at, sums, gap, by, shift, out)
                n += tile


def _blocks(ternary: Ternary) -> Tensor:
    """The weight as `multiply_groups` reads it; made once."""
    if "blocks" not in ternary.kept:
        (O, I), codes = ternary.weight_codes.shape, ternary.weight_codes
        blocks = torch.empty(O * I, dtype=torch.int8)
        share_rows(lay_out_rows, O // 16, 16 * I, codes.data_ptr(), I, blocks.data_ptr(), block=1)
        ternary.kept["blocks"] = blocks
    return ternary.kept["blocks"]


def _integers(codes: Tensor, act_scale: Tensor, ternary: Ternary) -> Tensor:
    (N, I), O = codes.shape, len(ternary.weight_codes)
    act_blocks, grouped = act_scale.shape[1] > 1, ternary.grouped()
    columns = ternary.columns if grouped else ACT_BLOCK
    stride, out = record_bytes(I), torch.empty((N, O), dtype=torch.float32)
    records = torch.empty((min(N, TOKENS), stride), dtype=torch.uint8)
    scales = ternary.half_scales().data_ptr() if grouped else 0
    for start in range(0, N, TOKENS):
        some = min(TOKENS, N - start)
        act_scales = act_scale[start:].data_ptr() if act_blocks else 0
        sums = ACT_BLOCK if act_blocks else columns
        work = (codes[start:].data_ptr(), I, act_scales, sums, records.data_ptr(), stride)
        share_rows(write_records, some, I, *work)
        work = (_blocks(ternary).data_ptr(), I, scales, columns, act_blocks, records.data_ptr(), stride)
        share_rows(multiply_groups, O // 16, 16 * I * some, *work, some, out[start:].data_ptr(), O, block=1)
    return out


# --- floats --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _as_bf16(allowed: bool) -> Iterator[None]:
    """Inside, oneDNN may take the fp32 factors of a product as bf16; a setting of the whole process."""
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    if allowed:
        setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


def _floats(codes: Tensor, act_scale: Tensor, ternary: Ternary) -> Tensor:
    blocks = act_scale.shape[1] > 1
    with _as_bf16(not blocks and has_bf16_products()):
        return rounded(codes, act_scale if blocks else None) @ _columns_of(ternary, blocks).t()


def _pieces(codes: Tensor, act_scale: Tensor, ternary: Ternary) -> Tensor:
    x, weight = rounded(codes, act_scale), _columns_of(ternary, True).t()
    high = x.bfloat16().float()
    with _as_bf16(True):
        return torch.addmm(high @ weight, x.sub_(high), weight)


def rounded(codes: Tensor, act_scale: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """``act_codes * act_scale`` (N, I) in fp32 or bf16: codes int8 (N, I), act_scale fp32 (N, 1), (N, B), or None for ones."""
    if act_scale is None:
        return codes.to(dtype)
    if act_scale.shape[1] == 1:
        return dequantized(codes, act_scale, dtype)
    x = codes.float()
    if x.shape[1] % ACT_BLOCK == 0:
        x.view(len(x), x.shape[1] // ACT_BLOCK, ACT_BLOCK).mul_(act_scale.unsqueeze(2))
        return x.to(dtype)
    return x.mul_(spread_scales(act_scale, x.shape[1], ACT_BLOCK)).to(dtype)


def _columns_of(ternary: Ternary, blocks: bool) -> Tensor:
    """fp32 (O, I): the codes, times the scales that are inside the sum."""
    return ternary.dequantized(torch.float32) if ternary.grouped() else ternary.weight_codes.float()


# --- which one -----------------------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[Tensor, Tensor, Ternary], Tensor]] = {
    "integers": _integers,
    "floats": _floats,
    "pieces": _pieces,
}


def possible_ways(codes: Tensor, act_scale: Tensor, ternary: Ternary, dtype: torch.dtype) -> list[str]:
    """Names of WAYS that compute this product; the arguments of `grouped_product`."""
    names = ["floats"]
    if len(ternary.weight_codes) % 16 == 0 and codes.shape[1] % 4 == 0:
        names.append("integers")
    if act_scale.shape[1] > 1 and dtype == torch.bfloat16 and has_bf16_products():
        names.append("pieces")
    return [name for name in names if name == "floats" or not is_left_out(name)]


def grouped_product(
    codes: Tensor, act_scale: Tensor, ternary: Ternary, dtype: torch.dtype, way: str | None = None
) -> Tensor:
    """The sum over groups or blocks of a product, without the scales that stand before the sum.

    Args:
        codes: int8 (N, I), contiguous. act_scale: fp32 (N, 1) or (N, B). ternary: the weight.
        dtype: what the result will be rounded to. way: of WAYS; the fastest by default.

    Returns: fp32 (N, O). Numerics: see above.
    """
    (N, I), O = codes.shape, len(ternary.weight_codes)
    names = possible_ways(codes, act_scale, ternary, dtype)
    if way is None and len(names) > 1 and N:
        fresh = Ternary(ternary.weight_codes, ternary.weight_scale, ternary.sizes, ternary.columns)
        ways = {name: functools.partial(_with_layout, name, codes, act_scale, fresh) for name in names}
        kind = f"{ternary.columns if ternary.grouped() else 'no'} groups, {'blocks' if act_scale.shape[1] > 1 else 'token'}"
        way = fastest(f"{kind} {I}x{O} {dtype}, {N.bit_length()} bits", ways)
    return WAYS[way or names[0]](codes, act_scale, ternary)


def _with_layout(name: str, codes: Tensor, act_scale: Tensor, ternary: Ternary) -> Tensor:
    """A product that lays out the weight itself: that is a part of its time."""
    ternary.kept.clear()
    return WAYS[name](codes, act_scale, ternary)
