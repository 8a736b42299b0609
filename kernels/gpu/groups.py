"""Training on a GPU where columns have scales: a weight's rows or groups of columns, blocks of a token's columns.

    y = acc * (act_scale * weight_scale_o)                              rows, one scale per token: matmul.int8_linear
    y = sum_g(acc_g * weight_scale_g) * act_scale                       groups, one scale per token
    y = sum_b(acc_b * act_scale_b) * weight_scale                       blocks, one scale per tensor or row
    y = sum_b(acc_b * (act_scale_b * weight_scale_g))                   blocks and groups

The integers of a unit (a group, or a block of ACT_BLOCK columns) are summed in int32 on the tensor cores, exactly. They are then
scaled and added up in fp32, the first unit first, as in the reference, whose bits the result has.

The gradient of such a product has its scales inside the sum, too: `dequantized_product` multiplies dY by codes times scales, in
dY's dtype. Scales of rows and groups are snapped, so that this factor is exact in bf16 and fp16. Its memory is freed at once.

Suffixes: N tokens, I in_features, O out_features, G groups of columns, B blocks.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitdistill.kernels.gpu.matmul import GROUP, Tile, _ends, _matrix, _place, _tile_family, choose_tile
from bitdistill.kernels.gpu.quantize import TRITON_DTYPES, TernaryWeight
from bitdistill.kernels.gpu.rounding import narrow, round_to_bf16
from bitdistill.kernels.numerics import ACT_BLOCK, EPSILON, MAX_SCALE
from bitdistill.kernels.reference import spread_scales

_EPSILON, _MAX_SCALE = tl.constexpr(EPSILON), tl.constexpr(MAX_SCALE)
ROWS, CHUNK, WARPS = 16, 256, 4  # of a program that ternarizes: 32 values per thread at a time

# Inner steps are units: of 32 to 256 columns. At 256 two stages fit into the shared memory of every part. Two sums of
# 128 x 128, in int32 and in fp32, do not fit into the registers of sm_100.
TILES = (Tile(128, 64, 128, 8, 3), Tile(64, 64, 128, 4, 3, 0.75))
WIDE_TILES = (Tile(64, 128, 256, 8, 2), Tile(64, 64, 256, 4, 2, 0.75))


# ---------------------------------------------------------------------------------------------------- weights


@triton.jit
def _quantize_groups(
    weight_ptr, codes_ptr, scale_ptr, O, I, G, columns, DTYPE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """One group of columns of ROWS rows: its scales, and then its codes; CHUNK columns at a time, read twice."""
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    first = group * columns
    end = tl.minimum(first + columns, I)
    lanes = tl.arange(0, CHUNK)
    row = o.to(tl.int64)[:, None] * I
    sums = tl.zeros((ROWS,), tl.float64)
    for start in range(first, end, CHUNK):
        i = start + lanes
        inside = (o < O)[:, None] & (i < end)[None, :]
        weight = tl.load(weight_ptr + row + i[None, :], mask=inside, other=0.0).to(tl.float32)
        sums += tl.sum(tl.abs(weight).to(tl.float64), 1)
    mean = (sums / (end - first).to(tl.float64)).to(tl.float32)
    scale = tl.where(mean < _EPSILON, _EPSILON, mean)
    scale = round_to_bf16(tl.where(scale > _MAX_SCALE, _MAX_SCALE, scale))
    tl.store(scale_ptr + o.to(tl.int64) * G + group, scale, mask=o < O)
    half = (scale * 0.5)[:, None]
    for start in range(first, end, CHUNK):
        i = start + lanes
        inside = (o < O)[:, None] & (i < end)[None, :]
        weight = tl.load(weight_ptr + row + i[None, :], mask=inside, other=0.0).to(tl.float32)
        codes = (weight > half).to(tl.int8) - (weight < -half).to(tl.int8)
        tl.store(codes_ptr + row + i[None, :], codes, mask=inside)


def quantize_weight_groups(weights: Sequence[Tensor], columns: int) -> list[TernaryWeight]:
    """Ternary codes and scales of linears, with a scale for each row and group of columns.

    Args:
        weights: (O, I) each, fp32, bf16 or fp16, on one GPU. columns: of a group; I or more for one scale per row.

    Returns: a TernaryWeight for each: weight_codes int8 (O, I), weight_scale fp32 (O, G). All codes are views of one buffer,
    all scales of another.

    Raises:
        ValueError: a weight without elements, as a parameter has that ZeRO-3 has divided.

    Numerics: bit for bit ``reference.quantize_weight_groups``: sums in fp64, whose order the rounding to bf16 hides.
    """
    if any(weight.numel() == 0 for weight in weights):
        raise ValueError("weight: expected at least one element; got none. Under ZeRO-3 gather the parameter first.")
    if not weights:
        return []
    shapes = [tuple(weight.shape) for weight in weights]
    groups = [triton.cdiv(I, columns) for _, I in shapes]
    room = [triton.cdiv(O * I, 16) * 16 for O, I in shapes]  # every tensor's codes start at a multiple of 16 bytes
    scales = [O * G for (O, _), G in zip(shapes, groups, strict=True)]
    device = weights[0].device
    all_codes = torch.empty(sum(room), dtype=torch.int8, device=device).split(room)
    all_scales = torch.empty(sum(scales), dtype=torch.float32, device=device).split(scales)
    result = []
    for weight, (O, I), G, codes, scale in zip(weights, shapes, groups, all_codes, all_scales, strict=True):
        codes, scale = codes[: O * I].view(O, I), scale.view(O, G)
        _quantize_groups[(triton.cdiv(O, ROWS), G)](
            weight.contiguous(), codes, scale, O, I, G, min(columns, I), TRITON_DTYPES[weight.dtype], ROWS, CHUNK,
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        result.append(TernaryWeight(codes, scale, columns))
    return result


# ---------------------------------------------------------------------------------------------------- the product


@triton.jit
def _grouped_linear(
    a_ptr,  # int8 (N, I)
    a_scale_ptr,  # fp32 (N,), or (N, B)
    b_ptr,  # int8 (O, I)
    b_scale_ptr,  # fp32 (O, G); or (S,) with SEGMENTS
    bias_ptr,  # (O,)
    y_ptr,
    N,
    O,
    I,
    B,
    G,
    a_stride,
    b_stride,
    y_stride,
    end_0,  # where segments 0 and 1 end
    end_1,
    ACT_BLOCKS: tl.constexpr,  # an activation scale for every UNIT columns, not one for the token
    GROUPED: tl.constexpr,  # weight scales change inside a row
    SEGMENTS: tl.constexpr,  # 0: a weight scale for each row
    HAS_BIAS: tl.constexpr,
    UNIT: tl.constexpr,  # columns that are summed as integers
    UNITS: tl.constexpr,  # of a group
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_N, tile_O = _place(N, O, BLOCK_N, BLOCK_O, GROUP)
    n = tile_N * BLOCK_N + tl.arange(0, BLOCK_N)
    o = tile_O * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.arange(0, UNIT)
    # Rows beyond the end read row 0 once more: what they give is not stored.
    row_n, row_o = tl.where(n < N, n, 0).to(tl.int64), tl.where(o < O, o, 0).to(tl.int64)
    a_ptrs = a_ptr + row_n[:, None] * a_stride + i[None, :]
    b_ptrs = b_ptr + row_o[None, :] * b_stride + i[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.float32)
    for start in range(0, I, UNIT):
        unit = start // UNIT
        a = tl.load(a_ptrs, mask=(start + i < I)[None, :], other=0)
        b = tl.load(b_ptrs, mask=(start + i < I)[:, None], other=0)
        acc = tl.dot(a, b, out_dtype=tl.int32).to(tl.float32)
        if ACT_BLOCKS:
            by = tl.load(a_scale_ptr + row_n * B + unit)[:, None]
            if GROUPED:
                by = by * tl.load(b_scale_ptr + row_o * G + unit // UNITS)[None, :]
            total += acc * by
        else:
            total += acc * tl.load(b_scale_ptr + row_o * G + unit)[None, :]
        a_ptrs += UNIT
        b_ptrs += UNIT
    if not ACT_BLOCKS:
        total = total * tl.load(a_scale_ptr + row_n)[:, None]
    elif not GROUPED:
        place = row_o
        if SEGMENTS > 0:
            place = (row_o >= end_0).to(tl.int64) + (row_o >= end_1).to(tl.int64)
        total = total * tl.load(b_scale_ptr + place)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + row_o).to(tl.float32)[None, :]
    y_ptrs = y_ptr + n.to(tl.int64)[:, None] * y_stride + o[None, :]
    tl.store(y_ptrs, narrow(total, y_ptr.dtype.element_ty), mask=(n < N)[:, None] & (o < O)[None, :])


def is_grouped(weight_scale: Tensor) -> bool:
    """Whether scales change inside a row."""
    return weight_scale.dim() == 2 and weight_scale.shape[1] > 1


def grouped_linear(
    act_codes: Tensor,
    act_scale: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    columns: int,
    sizes: Sequence[int],
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """The product with scales of groups of columns, of blocks, or of both: the sums at the top of this file, and a bias.

    Args:
        act_codes: int8 (N, I). act_scale: fp32 (N, 1), or (N, B) for blocks. weight_codes: int8 (O, I), ternary.
        weight_scale: fp32 (O, G), or (S,) of each segment of rows. columns: of a group, where G > 1: 32 times a power of two.
        sizes: rows of each segment, their sum O. bias: (O,) or None. dtype: of the result.

    Returns: (N, O) in `dtype`.

    Numerics: integers exact, fp32 in the order of the reference, without fused multiply-add, rounded once: bit for bit the
    reference.
    """
    a, b = _matrix(act_codes), _matrix(weight_codes)
    (N, I), O = a.shape, b.shape[0]
    blocks, grouped = act_scale.shape[-1] > 1, is_grouped(weight_scale)
    assert blocks or grouped, (act_scale.shape, weight_scale.shape)
    y = torch.empty((N, O), dtype=dtype, device=a.device)
    if N == 0 or O == 0:
        return y
    unit = ACT_BLOCK if blocks else columns
    tile = choose_tile(TILES if unit <= 128 else WIDE_TILES, N, O, I, _tile_family(a.device)[1])
    segments = len(sizes) if weight_scale.dim() == 1 else 0
    _grouped_linear[(triton.cdiv(N, tile.rows) * triton.cdiv(O, tile.columns),)](
        a, act_scale, b, weight_scale, y if bias is None else bias, y,
        N, O, I, act_scale.shape[-1], weight_scale.shape[-1], a.stride(0), b.stride(0), y.stride(0),
        *(_ends(sizes) if segments else (O, O)),
        ACT_BLOCKS=blocks, GROUPED=grouped, SEGMENTS=segments, HAS_BIAS=bias is not None,
        UNIT=unit, UNITS=columns // unit if grouped else 1, BLOCK_N=tile.rows, BLOCK_O=tile.columns, GROUP=GROUP,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    return y


# ---------------------------------------------------------------------------------------------------- gradients


def dequantized_product(dy: Tensor, codes: Tensor, scale: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """``dY @ (scale * codes)``: the gradient of an input, with W~; of a weight, with dY transposed and x~.

    Args:
        dy: (R, C) fp32, bf16 or fp16. codes: int8 (C, I). scale: fp32 (C, G), of groups of `columns`. columns: of a group.
        dtype: of the result.

    Returns: (R, I) in `dtype`. Numerics: ``scale * codes`` is rounded to dY's dtype, and is exact there where the scales are
    snapped; the product is torch's in that dtype.
    """
    with torch.autocast(dy.device.type, enabled=False):
        factor = (codes * spread_scales(scale, codes.shape[1], min(columns, codes.shape[1]))).to(dy.dtype)
        return (dy @ factor).to(dtype)
