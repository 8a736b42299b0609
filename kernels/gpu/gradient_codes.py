"""Rounds gradients to int8 for the fast backward pass of a BitLinear, in which both products are computed by int8_linear.

    dX = (dY * weight_scale) @ weight_codes    summed over O: one scale per token,  row codes (N, O)
    dW = (dY * act_scale).T @ act_codes        summed over N: one scale per column, column codes transposed (O, N)

In each product, the scale that varies along the summed dimension is multiplied into dY before dY is quantized; the other
scale is applied afterwards. One kernel makes both codes from one tile of dY, after another has found the peaks: 2 + 2 bytes
read and 1 + 1 bytes written per element.

**Stochastic rounding**: ``code = floor(v + u)`` with u uniform in [0, 1), so that the mean of a code is v. Rounding to the
nearest would lose every gradient below half a step, always in the same direction. u is a function of the seed, the tile and
the place in it (Philox with 7 rounds, the fewest that pass the tests of randomness), so a call with the same seed gives the
same bits. One Philox word of 32 bits serves one element, 16 bits for each of its two codes.

Suffixes: N tokens, O out_features, S segments.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitdistill.kernels.gpu.matmul import MAX_SEGMENTS

BLOCK_N, BLOCK_O, WARPS = 128, 64, 8  # 32 values per thread; 128-byte lines both of dY in bf16 and of transposed codes
PADDING = 128  # transposed codes are padded with zeros to whole inner steps of int8_linear


class GradientCodes(NamedTuple):
    """``dY * weight_scale ~ row_scale * row_codes`` and ``(dY * act_scale).T ~ column_scale * column_codes``."""

    row_codes: Tensor  # int8 (N, O)
    row_scale: Tensor  # fp32 (N,)
    column_codes: Tensor  # int8 (O, N padded to PADDING)
    column_scale: Tensor  # fp32 (O,)


@triton.jit
def _folded(
    dy_ptr, act_scale_ptr, weight_scale_ptr, n, o, N, O, dy_stride, end_0, end_1, ROW_SCALES: tl.constexpr
):  # fmt: skip
    """A tile of dY in fp32, times weight_scale, and times act_scale; 0 outside."""
    inside = (n < N)[:, None] & (o < O)[None, :]
    dy = tl.load(dy_ptr + n.to(tl.int64)[:, None] * dy_stride + o[None, :], mask=inside, other=0.0).to(tl.float32)
    segment = o
    if not ROW_SCALES:
        segment = (o >= end_0).to(tl.int32) + (o >= end_1).to(tl.int32)
    weight_scale = tl.load(weight_scale_ptr + segment, mask=o < O, other=0.0)
    act_scale = tl.load(act_scale_ptr + n, mask=n < N, other=0.0)
    return dy * weight_scale[None, :], dy * act_scale[:, None]


@triton.jit
def _peak(x, AXIS: tl.constexpr):
    """max|x| along an axis, taken on the bits, where NaN is above infinity: a NaN reaches its scale."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, AXIS).to(tl.float32, bitcast=True)


@triton.jit
def _peaks(
    dy_ptr, act_scale_ptr, weight_scale_ptr, row_ptr, column_ptr, N, O, dy_stride, end_0, end_1,
    ROW_SCALES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """row_ptr fp32 (tiles along O, N) and column_ptr fp32 (tiles along N, O): the peaks of each tile."""
    tile_O, tile_N = tl.program_id(0), tl.program_id(1)
    n, o = tile_N * BLOCK_N + tl.arange(0, BLOCK_N), tile_O * BLOCK_O + tl.arange(0, BLOCK_O)
    rows, columns = _folded(dy_ptr, act_scale_ptr, weight_scale_ptr, n, o, N, O, dy_stride, end_0, end_1, ROW_SCALES)
    tl.store(row_ptr + tile_O.to(tl.int64) * N + n, _peak(rows, 1), mask=n < N)
    tl.store(column_ptr + tile_N.to(tl.int64) * O + o, _peak(columns, 0), mask=o < O)


@triton.jit
def _rounded(value, random):
    """floor(value + u) as int8, u from 16 random bits; a peak of 127 that came out a rounding too high stays 127."""
    u = (random.to(tl.float32) + 0.5) * (1.0 / 65536)
    code = tl.floor(value + u)
    return tl.minimum(tl.maximum(code, -127.0), 127.0).to(tl.int8)


@triton.jit
def _codes(
    dy_ptr, act_scale_ptr, weight_scale_ptr, row_scale_ptr, column_scale_ptr, row_ptr, column_ptr,
    N, O, dy_stride, column_stride, end_0, end_1, seed,
    ROW_SCALES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    tile_O, tile_N = tl.program_id(0), tl.program_id(1)
    n, o = tile_N * BLOCK_N + tl.arange(0, BLOCK_N), tile_O * BLOCK_O + tl.arange(0, BLOCK_O)
    rows, columns = _folded(dy_ptr, act_scale_ptr, weight_scale_ptr, n, o, N, O, dy_stride, end_0, end_1, ROW_SCALES)
    row_scale = tl.load(row_scale_ptr + n, mask=n < N, other=1.0)
    column_scale = tl.load(column_scale_ptr + o, mask=o < O, other=1.0)
    # Philox gives four words for a counter: a quarter of the tile counts, and the four are laid side by side.
    quarter = tl.arange(0, BLOCK_N)[:, None] * (BLOCK_O // 4) + tl.arange(0, BLOCK_O // 4)[None, :]
    tile = tile_N * tl.num_programs(0) + tile_O
    a, b, c, d = tl.randint4x(seed, tile * (BLOCK_N * BLOCK_O // 4) + quarter, 7)
    random = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (BLOCK_N, BLOCK_O))
    row_codes = _rounded(rows / row_scale[:, None], random & 0xFFFF)
    column_codes = _rounded(columns / column_scale[None, :], (random >> 16) & 0xFFFF)
    row_ptrs = row_ptr + n.to(tl.int64)[:, None] * O + o[None, :]
    tl.store(row_ptrs, row_codes, mask=(n < N)[:, None] & (o < O)[None, :])
    column_ptrs = column_ptr + o.to(tl.int64)[:, None] * column_stride + n[None, :]
    tl.store(column_ptrs, tl.trans(column_codes), mask=(o < O)[:, None] & (n < column_stride)[None, :])


@triton.jit
def _transpose(x_ptr, y_ptr, R, C, x_stride, y_stride, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptrs = x_ptr + r.to(tl.int64)[:, None] * x_stride + c[None, :]
    x = tl.load(x_ptrs, mask=(r < R)[:, None] & (c < C)[None, :], other=0)
    y_ptrs = y_ptr + c.to(tl.int64)[:, None] * y_stride + r[None, :]
    tl.store(y_ptrs, tl.trans(x), mask=(c < C)[:, None] & (r < y_stride)[None, :])


def quantize_gradient(
    dy: Tensor, act_scale: Tensor, weight_scale: Tensor, sizes: Sequence[int], seed: int
) -> GradientCodes:
    """int8 codes of dY for both products of the fast backward pass, stochastically rounded.

    Args:
        dy: (N, O) fp32, bf16 or fp16, N and O at least 1, neighboring columns. act_scale: fp32, N values.
        weight_scale: fp32 (S,), of each segment of columns, or (O, 1), of each column. sizes: columns of each segment.
        seed: int32.

    Returns: GradientCodes. ``|code * scale - value| < scale``, exact in the mean; zeros stay zero.

    Numerics: the same bits for the same seed. A NaN or an infinity in dY makes its scales NaN or infinite, so that it
    reaches the gradients.
    """
    N, O = dy.shape
    assert dy.stride(1) == 1, dy.stride()
    assert sum(sizes) == O, (dy.shape, sizes)
    assert 1 <= len(sizes) <= MAX_SEGMENTS, sizes
    ends = sizes[0], sum(sizes[:2])
    grid = (triton.cdiv(O, BLOCK_O), triton.cdiv(N, BLOCK_N))
    blocks = {
        "ROW_SCALES": weight_scale.dim() == 2,
        "BLOCK_N": BLOCK_N,
        "BLOCK_O": BLOCK_O,
        "num_warps": WARPS,
        "enable_fp_fusion": True,
    }
    row_peaks = torch.empty((grid[0], N), dtype=torch.float32, device=dy.device)
    column_peaks = torch.empty((grid[1], O), dtype=torch.float32, device=dy.device)
    folded = (dy, act_scale, weight_scale)
    _peaks[grid](*folded, row_peaks, column_peaks, N, O, dy.stride(0), *ends, **blocks)
    row_scale, column_scale = _scale(row_peaks), _scale(column_peaks)
    row_codes = torch.empty((N, O), dtype=torch.int8, device=dy.device)
    column_codes = torch.empty((O, triton.cdiv(N, PADDING) * PADDING), dtype=torch.int8, device=dy.device)
    _codes[grid](
        *folded, row_scale, column_scale, row_codes, column_codes,
        N, O, dy.stride(0), column_codes.stride(0), *ends, seed, **blocks,
    )  # fmt: skip
    return GradientCodes(row_codes, row_scale, column_codes, column_scale)


def _scale(peaks: Tensor) -> Tensor:
    """The step of each row: peak / 127, and 1 for a row without a gradient, whose codes are all 0."""
    scale = peaks.amax(0) / 127
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def transpose_codes(codes: Tensor) -> Tensor:
    """int8 (R, C), neighboring columns -> (C, R padded with zeros to a multiple of PADDING)."""
    R, C = codes.shape
    assert codes.stride(1) == 1, codes.stride()
    result = torch.empty((C, triton.cdiv(R, PADDING) * PADDING), dtype=torch.int8, device=codes.device)
    grid = (triton.cdiv(R, PADDING), triton.cdiv(C, 128))
    _transpose[grid](
        codes, result, R, C, codes.stride(0), result.stride(0), PADDING, 128, num_warps=8, enable_fp_fusion=True
    )
    return result
