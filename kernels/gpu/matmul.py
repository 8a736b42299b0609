"""The three matrix products of a BitLinear on a GPU: int8 forward, and the gradients of its input and its weight.

    forward       acc_NO = act_codes_NI @ weight_codes_OI.T          int8 x int8 -> int32, exact
                  y_NO   = acc * (act_scale_N * weight_scale) + bias_O
    grad_input    dX_NI  = (dY_NO @ weight_codes_OI) * weight_scale   dY's dtype, codes widened in registers
    grad_weight   dW_OI  = dY_NO.T @ (act_scale_N * act_codes_NI)     dY's dtype, codes widened in registers

Nothing but the results is written to memory: the int8 codes are the only form in which weights and activations exist.

**Segments.** q, k and v (or gate and up) that read the same codes are one product over their stacked rows, O = O_0 + O_1 +
O_2, with one weight_scale a segment. In the forward product the scale is chosen per column. In grad_input the segments
are successive parts of the sum; one accumulator serves them all, kept in units of the current segment's scale.

**Layout.** Tensor cores take int8 only where the summed dimension is the contiguous one ("K-major") in both operands.
act_codes (N, I) and weight_codes (O, I) are so for the forward product; grad_input wants the transposed weight_codes
(I, O): the widened codes are then the *first* operand, which a warp group may hold in registers, so that they go from
int8 in shared memory to bf16 in registers to the tensor core. That is why it computes dX transposed.

`int8_linear` also serves the int8 backward (gradient_codes.py): with the roles of its two operands filled by quantised
gradients and transposed codes.

Suffixes: N tokens, I in_features, O out_features; S segments (1 to 3).
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitdistill.kernels.gpu.launches import Launch


@triton.jit
def _narrow(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 to `dtype`, half to even. The interpreter's own cast to bf16 truncates, so there it is done on the bits."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _tile(pid, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Program number -> tile (row, column). GROUP rows of tiles are walked column by column, so that the programs that
    run at the same time share their operands in the L2 cache."""
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(columns, BLOCK_COLUMNS)
    first = pid // (GROUP * column_tiles) * GROUP
    height = min(row_tiles - first, GROUP)
    inside = pid % (GROUP * column_tiles)
    return first + inside % height, inside // height


@triton.jit
def _int8_linear_kernel(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    bias_ptr,
    y_ptr,
    N,
    O,
    I,
    a_stride,
    b_stride,
    y_stride,
    end_0,
    end_1,
    SEGMENTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    EVEN_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    GROUP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    tile_n, tile_o = _tile(tl.program_id(0), N, O, BLOCK_N, BLOCK_O, GROUP)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    # Rows beyond the end read row 0 again: no mask in the loop, and the store drops what they gave.
    a_ptrs = a_ptr + tl.where(n < N, n, 0).to(tl.int64)[:, None] * a_stride + i[None, :]
    b_ptrs = b_ptr + tl.where(o < O, o, 0).to(tl.int64)[None, :] * b_stride + i[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.int32)
    for start in range(0, I, BLOCK_I):
        if EVEN_I:
            a, b = tl.load(a_ptrs), tl.load(b_ptrs)
        else:
            a = tl.load(a_ptrs, mask=i[None, :] < I - start, other=0)
            b = tl.load(b_ptrs, mask=i[:, None] < I - start, other=0)
        acc = tl.dot(a, b, acc)
        a_ptrs += BLOCK_I
        b_ptrs += BLOCK_I
    scale = tl.load(a_scale_ptr + n, mask=n < N, other=0.0)[:, None]
    if SEGMENTS > 0:  # a weight_scale for each segment of columns
        column_scale = tl.load(b_scale_ptr + (o >= end_0).to(tl.int32) + (o >= end_1).to(tl.int32))
        scale = scale * column_scale[None, :]
    y = acc.to(tl.float32) * scale
    if HAS_BIAS:
        y += tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + n.to(tl.int64)[:, None] * y_stride + o[None, :]
    inside = (n < N)[:, None] & (o < O)[None, :]
    if ACCUMULATE:
        y += tl.load(y_ptrs, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptrs, _narrow(y, y_ptr.dtype.element_ty, INTERPRETED), mask=inside)


@triton.jit
def _grad_input_kernel(
    dy_ptr,
    weight_t_ptr,
    scale_ptr,
    dx_ptr,
    N,
    O,
    I,
    dy_stride,
    weight_stride,
    dx_stride,
    end_0,
    end_1,
    SEGMENTS: tl.constexpr,
    EVEN_O: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    GROUP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    tile_n, tile_i = _tile(tl.program_id(0), N, I, BLOCK_N, BLOCK_I, GROUP)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    o = tl.arange(0, BLOCK_O)
    weight_rows = weight_t_ptr + tl.where(i < I, i, 0).to(tl.int64)[:, None] * weight_stride
    dy_rows = dy_ptr + tl.where(n < N, n, 0).to(tl.int64)[None, :] * dy_stride
    acc = tl.zeros((BLOCK_I, BLOCK_N), dtype=tl.float32)
    begin = 0
    for segment in tl.static_range(SEGMENTS):
        if segment == SEGMENTS - 1:
            end = O
        elif segment == 0:
            end = end_0
        else:
            end = end_1
        for start in range(begin, end, BLOCK_O):
            if EVEN_O:
                weight = tl.load(weight_rows + (start + o)[None, :])
                dy = tl.load(dy_rows + (start + o)[:, None])
            else:
                weight = tl.load(weight_rows + (start + o)[None, :], mask=(start + o)[None, :] < end, other=0)
                dy = tl.load(dy_rows + (start + o)[:, None], mask=(start + o)[:, None] < end, other=0.0)
            acc = tl.dot(weight.to(DOT), dy.to(DOT), acc, input_precision="ieee")
        scale = tl.load(scale_ptr + segment)
        if segment < SEGMENTS - 1:  # from units of this segment's scale to those of the next
            scale = tl.div_rn(scale, tl.load(scale_ptr + segment + 1))
        acc = acc * scale
        begin = end
    inside = (n < N)[:, None] & (i < I)[None, :]
    dx_ptrs = dx_ptr + n.to(tl.int64)[:, None] * dx_stride + i[None, :]
    tl.store(dx_ptrs, _narrow(tl.trans(acc), dx_ptr.dtype.element_ty, INTERPRETED), mask=inside)


@triton.jit
def _grad_weight_kernel(
    dy_ptr,
    act_ptr,
    act_scale_ptr,
    dw_ptr,
    N,
    O,
    I,
    dy_stride,
    act_stride,
    dw_stride,
    DOT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    tile_o, tile_i = _tile(tl.program_id(0), O, I, BLOCK_O, BLOCK_I, GROUP)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    n = tl.arange(0, BLOCK_N)
    o_in, i_in = o < O, i < I
    acc = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        token = start + n
        rows = token.to(tl.int64)
        dy = tl.load(
            dy_ptr + rows[None, :] * dy_stride + o[:, None], mask=(token < N)[None, :] & o_in[:, None], other=0.0
        )
        act = tl.load(
            act_ptr + rows[:, None] * act_stride + i[None, :], mask=(token < N)[:, None] & i_in[None, :], other=0
        )
        scale = tl.load(act_scale_ptr + token, mask=token < N, other=0.0)
        x = act.to(tl.float32) * scale[:, None]
        acc = tl.dot(dy.to(DOT), x.to(DOT), acc, input_precision="ieee")
    inside = o_in[:, None] & i_in[None, :]
    dw_ptrs = dw_ptr + o.to(tl.int64)[:, None] * dw_stride + i[None, :]
    tl.store(dw_ptrs, _narrow(acc, dw_ptr.dtype.element_ty, INTERPRETED), mask=inside)
