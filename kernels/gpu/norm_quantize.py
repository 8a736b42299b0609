"""RMSNorm (a model's own before q/k/v and gate/up, or SubLN) that gives int8 codes: ``y = x * rstd * gain``, quantized.

``rstd = 1 / sqrt(mean(x^2) + eps)``. y never leaves the registers, and the backward pass recomputes it from x and one fp32
number per row. So norm and quantizer together move 3 bytes per element in bf16, what the quantizer alone moves.

**What is rounded.** y is rounded to the dtype of x before it is quantized, because ``reference.rms_norm`` returns it in
that dtype: fused and unfused layers compute the same function.

**Gradients** are those of y: the quantizer is the identity (straight-through). With ``x^ = x * rstd``,
``u = dy * gain``: ``dx = rstd * (u - x^ * mean(u * x^))`` and ``dgain = sum over rows of dy * x^``. A program walks a fixed
run of rows and keeps its part of dgain in registers; the parts (256 at most) are then added by torch.sum: two stages, no
atomics, the same bits in every run.

swiglu_quantize.py builds on this file. Shape suffixes: N tokens, I in_features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitdistill.kernels.gpu.quantize import Quantized, empty_quantized, row_tile, rows_of, store_quantized
from bitdistill.kernels.gpu.rounding import rounded

PARTS = 256  # runs of rows whose parts of dgain are added at the end; also the programs of a backward pass


@triton.jit
def inverse_rms(x, eps, I: tl.constexpr):
    """rstd (ROWS,), each step correctly rounded: a row's value is the same on every device but for the sum's order."""
    mean = tl.div_rn(tl.sum(x * x, 1), tl.full((x.shape[0],), I, tl.float32))
    return tl.div_rn(tl.full((x.shape[0],), 1.0, tl.float32), tl.sqrt_rn(mean + eps))


@triton.jit
def _rms_norm_quantize(
    x_ptr, gain_ptr, codes_ptr, scale_ptr, rstd_ptr, N, x_stride, eps,
    I: tl.constexpr, ACT_BLOCKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows[:, None] < N) & (columns < I)
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    rstd = inverse_rms(x, eps, I)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)
    gain = tl.load(gain_ptr + columns, mask=columns < I, other=0.0)
    y = rounded(x * rstd[:, None] * gain, x_ptr.dtype.element_ty)
    store_quantized(y, codes_ptr, scale_ptr, rows, columns, inside, N, I, ACT_BLOCKS, ROWS, BLOCK)


@triton.jit
def _rms_norm_operands(
    dy_ptr, x_ptr, gain_ptr, rstd, rows, columns, inside, dy_stride, x_stride, I: tl.constexpr, POLICY: tl.constexpr
):
    """x^, u and dy of some rows."""
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns, mask=inside, other=0.0, eviction_policy=POLICY)
    x_hat = x.to(tl.float32) * rstd[:, None]
    dy = tl.load(dy_ptr + rows[:, None] * dy_stride + columns, mask=inside, other=0.0, eviction_policy=POLICY)
    dy = dy.to(tl.float32)
    u = dy * tl.load(gain_ptr + columns, mask=columns < I, other=0.0, eviction_policy=POLICY)
    return x_hat, u, dy


@triton.jit
def _rms_norm_backward(
    dy_ptr, x_ptr, gain_ptr, rstd_ptr, dx_ptr, part_ptr, N, dy_stride, x_stride, run,
    I: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    part = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, run, ROWS):
        rows = program * run + start + tl.arange(0, ROWS)
        inside = (rows[:, None] < N) & (columns < I)
        rstd = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)
        x_hat, u, dy = _rms_norm_operands(
            dy_ptr, x_ptr, gain_ptr, rstd, rows, columns, inside, dy_stride, x_stride, I, "evict_last"
        )
        mean = tl.sum(u * x_hat, 1) / I
        if TWICE:
            x_hat, u, dy = _rms_norm_operands(
                dy_ptr, x_ptr, gain_ptr, rstd, rows, columns, inside, dy_stride, x_stride, I, "evict_first"
            )
        part += tl.sum(dy * x_hat, 0)
        dx = rounded(rstd[:, None] * (u - x_hat * mean[:, None]), dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + rows[:, None] * I + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(part_ptr + program * I + columns, part, mask=columns < I)


def rms_norm_quantize(x: Tensor, gain: Tensor, eps: float, blocks: bool = False) -> tuple[Quantized, Tensor]:
    """``y = x / sqrt(mean(x^2) + eps) * gain``, quantized to int8 per token or block.

    Args:
        x: (..., I) fp32, bf16 or fp16 on the GPU. gain: (I,). eps: added to the mean square.
        blocks: whether each ACT_BLOCK columns of a token have a scale.

    Returns: (Quantized, rstd fp32 (..., 1), which the backward pass wants).

    Raises:
        ValueError: another dtype or width, or a gain that does not fit.

    Numerics: y is ``x * rstd * gain`` in fp32 rounded to x.dtype, within twice the error of ``reference.rms_norm`` (the
    order of the sum differs). Codes and scales are bit for bit ``reference.quantize_activation`` of that y.
    """
    rows = rows_of("x", x)
    gain = gain_of(gain, x)
    N, I = rows.shape
    out = empty_quantized(x.shape, x.device, blocks)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if N:
        ROWS, BLOCK, num_warps = row_tile(I)
        _rms_norm_quantize[(triton.cdiv(N, ROWS),)](
            rows, gain, *out, rstd, N, rows.stride(0), eps, I, blocks, ROWS, BLOCK,
            num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out, rstd


def rms_norm_quantize_backward(grad: Tensor, x: Tensor, gain: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the norm of ``rms_norm_quantize``, straight through the quantizer.

    Args:
        grad: dy (..., I), any float dtype. x, gain: as in the forward pass. rstd: what it returned.

    Returns: (dx (..., I) in x.dtype, dgain fp32 (I,)).

    Numerics: fp32; dx is rounded once. Deterministic.
    """
    rows, gain, dy = rows_of("x", x), gain_of(gain, x), rows_of("grad", grad)
    assert dy.shape == rows.shape, "the gradient has the shape of x"
    N, I = rows.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not N:
        return dx, torch.zeros_like(gain)
    ROWS, BLOCK, num_warps, twice = backward_tile(I)
    programs, run = runs(N, ROWS)
    parts = torch.empty((programs, I), dtype=torch.float32, device=x.device)
    _rms_norm_backward[(programs,)](
        dy, rows, gain, rstd, dx, parts, N, dy.stride(0), rows.stride(0), run, I, ROWS, BLOCK, twice,
        num_warps=num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return dx, parts.sum(0)


def backward_tile(width: int) -> tuple[int, int, int, bool]:
    """(ROWS, BLOCK, num_warps, TWICE) of RMSNorm: up to 32 values of each operand a thread. In rows of more than 4,096 they
    do not fit into registers in every form that the gradients need, and are loaded a second time, from the L1 cache."""
    block = triton.next_power_of_2(width)
    rows = max(1, 2048 // block)
    return rows, block, max(4, min(16, rows * block // 512)), block > 4096


def runs(N: int, ROWS: int) -> tuple[int, int]:
    """(programs, rows of each): at most PARTS programs, whole tiles of rows; a function of the shape alone."""
    run = triton.cdiv(triton.cdiv(N, PARTS), ROWS) * ROWS
    return triton.cdiv(N, run), run


def gain_of(gain: Tensor, x: Tensor) -> Tensor:
    """The gain of a norm over x, fp32 (I,); a copy only of one in another dtype.

    Raises:
        ValueError: its width is not that of x.
    """
    if gain.shape != x.shape[-1:]:
        raise ValueError(f"gain: expected shape ({x.shape[-1]},), as wide as x; got {tuple(gain.shape)}.")
    return gain.detach().float().contiguous()
