"""The three matrix products of a BitLinear on a GPU, from int8 codes.

    int8_linear   y_NO  = (act_codes_NI @ weight_codes_OI.T) * (act_scale_N * weight_scale) + bias_O     int32, exact
    grad_input    dX_NI = (dY_NO @ weight_codes_OI) * weight_scale                                       in dY's dtype
    grad_weight   dW_OI = dY_NO.T @ (act_scale_N * act_codes_NI)                                         in dY's dtype

The two gradients are the *exact* backward pass: the codes are widened to dY's dtype in registers, on their way from
shared memory to the tensor core, and nothing but the result is written to memory. Tensor cores of Hopper take only their
first operand from registers, so the codes are the first operand of both, and both compute their result transposed.
(With the codes as second operand the widened tile goes back to shared memory and every product waits for it.)

The *fast* backward pass is `int8_linear` twice more, on quantized gradients (gradient_codes.py): the first operand is then
the codes of a gradient, the second a transposed copy of codes that the forward pass made. Tensor cores take int8 only where
the summed dimension is the contiguous one in both operands.

**Segments.** Linears that read the same codes (q, k, v; gate, up) are one product over their stacked rows, O = O_0 + O_1 +
O_2, with one weight_scale per segment. In the forward pass, a column looks up the scale of its segment. In grad_input the
segments are successive parts of one sum, and the accumulator is kept in units of the current segment's scale.

Suffixes: N tokens, I in_features, O out_features, S segments (1 to 3).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitdistill.kernels.gpu.rounding import narrow

INTERPRETED = triton.knobs.runtime.interpret
MAX_SEGMENTS = 3


@triton.jit
def _place(rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """This program's tile (row, column). GROUP rows of tiles are walked column by column, so that programs which run at
    the same time read the same operands from the L2 cache."""
    pid = tl.program_id(0)
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(columns, BLOCK_COLUMNS)
    first = pid // (GROUP * column_tiles) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    inside = pid % (GROUP * column_tiles)
    return first + inside % height, inside // height


@triton.jit
def _int8_linear(
    a_ptr,  # int8 (N, I): act_codes, or a gradient's codes
    a_scale_ptr,  # fp32 (N,)
    b_ptr,  # int8 (O, I): weight_codes, or transposed codes
    b_scale_ptr,  # fp32 (S,), or (O,)
    bias_ptr,  # (O,)
    y_ptr,
    N,
    O,
    I,
    a_stride,
    b_stride,
    y_stride,
    end_0,  # where segments 0 and 1 end
    end_1,
    SEGMENTS: tl.constexpr,  # 0: no b_scale; -1: one for each row of b
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,  # I is a multiple of BLOCK_I
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_N, tile_O = _place(N, O, BLOCK_N, BLOCK_O, GROUP)
    n = tile_N * BLOCK_N + tl.arange(0, BLOCK_N)
    o = tile_O * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    # Rows beyond the end read row 0 once more: no mask in the loop, and what they give is not stored.
    a_ptrs = a_ptr + tl.where(n < N, n, 0).to(tl.int64)[:, None] * a_stride + i[None, :]
    b_ptrs = b_ptr + tl.where(o < O, o, 0).to(tl.int64)[None, :] * b_stride + i[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.int32)
    for start in range(0, I, BLOCK_I):
        if EVEN:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(start + i < I)[None, :], other=0)
            b = tl.load(b_ptrs, mask=(start + i < I)[:, None], other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        a_ptrs += BLOCK_I
        b_ptrs += BLOCK_I
    scale = tl.load(a_scale_ptr + n, mask=n < N, other=0.0)[:, None]
    if SEGMENTS > 0:
        segment = (o >= end_0).to(tl.int32) + (o >= end_1).to(tl.int32)
        scale = scale * tl.load(b_scale_ptr + segment, mask=o < O, other=0.0)[None, :]
    if SEGMENTS < 0:
        scale = scale * tl.load(b_scale_ptr + o, mask=o < O, other=0.0)[None, :]
    y = acc.to(tl.float32) * scale
    if HAS_BIAS:
        y += tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + n.to(tl.int64)[:, None] * y_stride + o[None, :]
    tl.store(y_ptrs, narrow(y, y_ptr.dtype.element_ty), mask=(n < N)[:, None] & (o < O)[None, :])


@triton.jit
def _grad_input(
    dy_ptr,  # (N, O)
    codes_ptr,  # int8 (O, I)
    scale_ptr,  # fp32 (S,)
    dx_ptr,  # (N, I)
    N,
    O,
    I,
    dy_stride,
    codes_stride,
    dx_stride,
    end_0,
    end_1,
    SEGMENTS: tl.constexpr,
    EVEN: tl.constexpr,  # no tile reaches beyond a segment or beyond I
    DOT: tl.constexpr,  # the dtype of the product's operands
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_N, tile_I = _place(N, I, BLOCK_N, BLOCK_I, GROUP)
    n = tile_N * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tile_I * BLOCK_I + tl.arange(0, BLOCK_I)
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
            o = start + tl.arange(0, BLOCK_O)
            codes_ptrs = codes_ptr + o.to(tl.int64)[None, :] * codes_stride + i[:, None]
            if EVEN:
                codes = tl.load(codes_ptrs)
                dy = tl.load(dy_rows + o[:, None])
            else:
                codes = tl.load(codes_ptrs, mask=(o < end)[None, :] & (i < I)[:, None], other=0)
                dy = tl.load(dy_rows + o[:, None], mask=(o < end)[:, None], other=0.0)
            acc = tl.dot(codes.to(DOT), dy.to(DOT), acc, input_precision="ieee")
        scale = tl.load(scale_ptr + segment)
        if segment < SEGMENTS - 1:
            scale = tl.div_rn(scale, tl.load(scale_ptr + segment + 1))
        acc = acc * scale
        begin = end
    dx_ptrs = dx_ptr + n.to(tl.int64)[:, None] * dx_stride + i[None, :]
    dx = narrow(tl.trans(acc), dx_ptr.dtype.element_ty)
    tl.store(dx_ptrs, dx, mask=(n < N)[:, None] & (i < I)[None, :])


@triton.jit
def _grad_weight(
    dy_ptr,  # (N, O)
    codes_ptr,  # int8 (N, I)
    scale_ptr,  # fp32 (N,)
    dw_ptr,  # (O, I)
    N,
    O,
    I,
    dy_stride,
    codes_stride,
    dw_stride,
    EVEN: tl.constexpr,  # no tile reaches beyond N, O or I
    DOT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_O, tile_I = _place(O, I, BLOCK_O, BLOCK_I, GROUP)
    o = tile_O * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile_I * BLOCK_I + tl.arange(0, BLOCK_I)
    n = tl.arange(0, BLOCK_N)
    dy_ptrs = dy_ptr + n.to(tl.int64)[:, None] * dy_stride + o[None, :]
    codes_ptrs = codes_ptr + n.to(tl.int64)[None, :] * codes_stride + i[:, None]
    dy_step, codes_step = tl.cast(dy_stride, tl.int64) * BLOCK_N, tl.cast(codes_stride, tl.int64) * BLOCK_N
    acc = tl.zeros((BLOCK_I, BLOCK_O), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        if EVEN:
            dy = tl.load(dy_ptrs)
            codes = tl.load(codes_ptrs)
            scale = tl.load(scale_ptr + start + n)
        else:
            there = start + n < N
            dy = tl.load(dy_ptrs, mask=there[:, None] & (o < O)[None, :], other=0.0)
            codes = tl.load(codes_ptrs, mask=there[None, :] & (i < I)[:, None], other=0)
            scale = tl.load(scale_ptr + start + n, mask=there, other=0.0)
        x = codes.to(tl.float32) * scale[None, :]
        acc = tl.dot(x.to(DOT), dy.to(DOT), acc, input_precision="ieee")
        dy_ptrs += dy_step
        codes_ptrs += codes_step
    dw_ptrs = dw_ptr + o.to(tl.int64)[:, None] * dw_stride + i[None, :]
    dw = narrow(tl.trans(acc), dw_ptr.dtype.element_ty)
    tl.store(dw_ptrs, dw, mask=(o < O)[:, None] & (i < I)[None, :])


# ---------------------------------------------------------------------------------------------------- tiles


@dataclass(frozen=True)
class Tile:
    """A program's part of a result, (rows, columns), and how much of the sum it takes at a time.

    `rate` is what a part filled with such tiles does, relative to the best: an estimate by operands read for a product
    (a wide tile reads each value once for more products), with the share of instructions that only widen codes.
    """

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int
    rate: float = 1.0


# Inner steps of 128 bytes of int8 (64 of bf16): whole lines of memory, and the widest swizzle of shared memory. Three
# stages hide the memory's latency during two steps of products. Per part:
#   Hopper: two warp groups on 128 x 256, half of a thread's registers for the sums. In the gradients the 128 is the side
#     of the codes: 128 x 64 codes are widened for 256 columns of products, else widening is the bottleneck.
#     Triton (3.6 to 3.9) waits for every int8 product before it issues the next one: only fp32 sums are kept in flight. The
#     wait is shortest against a 128 x 256 x 128 step; two blocks per processor with 128 x 128 would hide it, but read a third
#     more from the L2 cache. To be decided on a device.
#   Blackwell: sums live in tensor memory; 128 x 256 of them do not fit into registers beside scales and biases.
#   Ampere, Ada, consumer Blackwell: sums and operands share a thread's registers, and a block has 99 KB.
#   CDNA 3 (compiled for the check, not launched: no such part is supported today): 64 KB of shared memory.
INT8_TILES = {
    "sm_90": (Tile(128, 256, 128, 8, 3), Tile(128, 128, 128, 8, 3, 0.85), Tile(64, 128, 128, 4, 3, 0.65)),
    "sm_100": (Tile(128, 128, 128, 8, 3), Tile(64, 128, 128, 4, 3, 0.75)),
    "sm_80": (Tile(128, 128, 128, 8, 3), Tile(64, 128, 128, 4, 3, 0.75)),
    "gfx942": (Tile(128, 128, 64, 8, 2),),
}
GRADIENT_TILES = {
    "sm_90": (Tile(256, 128, 64, 8, 3), Tile(128, 128, 64, 8, 3, 0.75), Tile(128, 64, 64, 4, 3, 0.6)),
    "sm_100": (Tile(256, 128, 64, 8, 3), Tile(128, 128, 64, 8, 3, 0.75), Tile(128, 64, 64, 4, 3, 0.6)),
    "sm_80": (Tile(128, 128, 32, 8, 3), Tile(128, 64, 64, 4, 3, 0.75)),
    "gfx942": (Tile(128, 128, 32, 8, 2),),
}
# fp32 gradients are multiplied in fp32 proper, which no tensor core does.
FP32_TILES = (Tile(64, 64, 16, 4, 2),)
GROUP = 8


@functools.lru_cache
def _tile_family(device: torch.device) -> tuple[str, int]:
    """(key of the tile tables, number of processors)."""
    if device.type != "cuda":
        return "sm_90", 1  # interpreted
    properties = torch.cuda.get_device_properties(device)
    part = {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(properties.major, "sm_80")
    return part, properties.multi_processor_count


def choose_tile(tiles: Sequence[Tile], rows: int, columns: int, inner: int, processors: int) -> Tile:
    """The tile whose rounds over all processors take least time, not larger than the problem needs.

    Args:
        tiles: from the tables above. rows, columns, inner: of the product. processors: of the device.
    """

    def time(tile: Tile) -> float:
        count = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
        return triton.cdiv(count, processors) * tile.rows * tile.columns / tile.rate

    best = min(tiles, key=time)
    return Tile(
        min(best.rows, max(16, triton.next_power_of_2(rows))),
        min(best.columns, max(16, triton.next_power_of_2(columns))),
        min(best.inner, max(32, triton.next_power_of_2(inner))),
        best.num_warps,
        best.num_stages,
    )


# ---------------------------------------------------------------------------------------------------- launchers


def _ends(sizes: Sequence[int]) -> tuple[int, int]:
    """Where the first and the second segment end; O where there is no further one."""
    assert 1 <= len(sizes) <= MAX_SEGMENTS, sizes
    return sizes[0], sum(sizes[:2])


def _matrix(x: Tensor) -> Tensor:
    """(..., C) as (R, C) with neighboring columns; a copy only where strides leave no other way."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty((x.shape[:-1].numel(), x.shape[-1]))
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The operands' dtype in a gradient; the interpreter gets fp32, because it cannot multiply bf16."""
    return tl.float32 if INTERPRETED or dtype == torch.float32 else getattr(tl, str(dtype).removeprefix("torch."))


def int8_linear(
    act_codes: Tensor,
    act_scale: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor | None,
    sizes: Sequence[int] = (),
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """``y = (act_codes @ weight_codes.T) * (act_scale * weight_scale) + bias``.

    Args:
        act_codes: int8 (N, I). act_scale: fp32, N values. weight_codes: int8 (O, I), any int8 values.
        weight_scale: fp32 (S,), of each segment of columns; (O, 1), of each column; None for 1.
        sizes: columns of each segment, their sum O.
        bias: (O,) or None. dtype: of the result.

    Returns: (N, O) in `dtype`.

    Numerics: the integer sums are exact while I <= 132,104 (any I for ternary weight_codes); the rest is fp32 in the
    order of the reference, rounded once. Bit for bit the reference without bias; with one, within an fp32 rounding.
    """
    a, b = _matrix(act_codes), _matrix(weight_codes)
    (N, I), O = a.shape, b.shape[0]
    assert b.shape[1] == I, (a.shape, b.shape)
    assert weight_scale is None or sum(sizes) == O, (b.shape, sizes)
    y = torch.empty((N, O), dtype=dtype, device=a.device)
    if N == 0 or O == 0:
        return y
    part, processors = _tile_family(a.device)
    tile = choose_tile(INT8_TILES[part], N, O, I, processors)
    segments = 0 if weight_scale is None else len(sizes) if weight_scale.dim() == 1 else -1
    _int8_linear[(triton.cdiv(N, tile.rows) * triton.cdiv(O, tile.columns),)](
        a, act_scale, b, act_scale if weight_scale is None else weight_scale, y if bias is None else bias, y,
        N, O, I, a.stride(0), b.stride(0), y.stride(0), *(_ends(sizes) if segments > 0 else (O, O)),
        SEGMENTS=segments, HAS_BIAS=bias is not None, EVEN=I % tile.inner == 0,
        BLOCK_N=tile.rows, BLOCK_O=tile.columns, BLOCK_I=tile.inner, GROUP=GROUP,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def grad_input(
    dy: Tensor, weight_codes: Tensor, weight_scale: Tensor, sizes: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """``dX = sum over segments s of weight_scale_s * dY_s @ weight_codes_s``: the gradient of a BitLinear's input.

    Args:
        dy: (N, O) fp32, bf16 or fp16. weight_codes: int8 (O, I). weight_scale: fp32 (S,). sizes: as in int8_linear.
        dtype: of the result.

    Returns: (N, I) in `dtype`. Numerics: products exact, sums in fp32, scaled and rounded once at the end.
    """
    dy, codes = _matrix(dy), _matrix(weight_codes)
    (N, O), I = dy.shape, codes.shape[1]
    assert codes.shape[0] == O == sum(sizes), (dy.shape, codes.shape, sizes)
    dx = torch.empty((N, I), dtype=dtype, device=dy.device)
    if N == 0:
        return dx
    part, processors = _tile_family(dy.device)
    tile = choose_tile(FP32_TILES if dy.dtype == torch.float32 else GRADIENT_TILES[part], N, I, O, processors)
    even = all(size % tile.inner == 0 for size in sizes) and I % tile.columns == 0
    _grad_input[(triton.cdiv(N, tile.rows) * triton.cdiv(I, tile.columns),)](
        dy, codes, weight_scale, dx, N, O, I, dy.stride(0), codes.stride(0), dx.stride(0), *_ends(sizes),
        SEGMENTS=len(sizes), EVEN=even, DOT=_dot_dtype(dy.dtype),
        BLOCK_N=tile.rows, BLOCK_I=tile.columns, BLOCK_O=tile.inner, GROUP=GROUP,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return dx


def grad_weight(dy: Tensor, act_codes: Tensor, act_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``dW = dY.T @ (act_scale * act_codes)``: the straight-through gradient of a BitLinear's weight.

    Args:
        dy: (N, O) fp32, bf16 or fp16. act_codes: int8 (N, I). act_scale: fp32, N values. dtype: of the result.

    Returns: (O, I) in `dtype`; zeros where N is 0.

    Numerics: act_scale * act_codes is rounded to dy's dtype (the reference rounds dY * act_scale), sums in fp32.
    """
    dy, codes = _matrix(dy), _matrix(act_codes)
    (N, O), I = dy.shape, codes.shape[1]
    assert codes.shape[0] == N, (dy.shape, codes.shape)
    if N == 0:
        return torch.zeros((O, I), dtype=dtype, device=dy.device)
    dw = torch.empty((O, I), dtype=dtype, device=dy.device)
    part, processors = _tile_family(dy.device)
    tile = choose_tile(FP32_TILES if dy.dtype == torch.float32 else GRADIENT_TILES[part], O, I, N, processors)
    _grad_weight[(triton.cdiv(O, tile.rows) * triton.cdiv(I, tile.columns),)](
        dy, codes, act_scale, dw, N, O, I, dy.stride(0), codes.stride(0), dw.stride(0),
        EVEN=N % tile.inner == 0 and O % tile.rows == 0 and I % tile.columns == 0, DOT=_dot_dtype(dy.dtype),
        BLOCK_O=tile.rows, BLOCK_I=tile.columns, BLOCK_N=tile.inner, GROUP=GROUP,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return dw
