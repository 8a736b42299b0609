"""RMSNorm (a model's own before q/k/v and gate/up, or SubLN) that gives int8 codes: ``y_k = x * rstd * gain_k``, quantized.

``rstd = 1 / sqrt(mean(x^2) + eps)``. x is read once for all gains, y never leaves the registers, and the backward pass
recomputes it from x and one fp32 number a row. So n gains cost 2 + n bytes an element instead of 3 n, in bf16.

**What is rounded.** y is rounded to the dtype of x before it is quantized, because ``reference.rms_norm`` returns it in
that dtype: fused and unfused layers compute the same function.

**Gradients** are those of y: the quantizer is the identity (straight-through). With ``x^ = x * rstd``,
``u = sum_k dy_k * gain_k``: ``dx = rstd * (u - x^ * mean(u * x^))`` and ``dgain_k = sum over rows of dy_k * x^``. A program
walks a fixed run of rows and keeps its part of dgain in registers; the parts (256 at most) are then added by torch.sum:
two stages, no atomics, the same bits in every run.

swiglu_quantize.py builds on this file. Shape suffixes: N tokens, I in_features, G gains.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitdistill.kernels.gpu.quantize import Quantized, empty_quantized, quantize_tile, row_tile, rows_of
from bitdistill.kernels.gpu.rounding import rounded

MAX_GAINS = 3  # q, k and v with a SubLN each
PARTS = 256  # runs of rows whose parts of dgain are added at the end; also the programs of a backward pass


@triton.jit
def inverse_rms(x, eps, I: tl.constexpr):
    """rstd (ROWS,), each step correctly rounded: a row's value is the same on every device but for the sum's order."""
    mean = tl.div_rn(tl.sum(x * x, 1), tl.full((x.shape[0],), I, tl.float32))
    return tl.div_rn(tl.full((x.shape[0],), 1.0, tl.float32), tl.sqrt_rn(mean + eps))


@triton.jit
def _rms_norm_quantize(
    x_ptr, gain_ptr, codes_ptr, scale_ptr, rstd_ptr, N, x_stride, eps,
    I: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows[:, None] < N) & (columns < I)
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    rstd = inverse_rms(x, eps, I)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)
    for k in tl.static_range(G):
        gain = tl.load(gain_ptr + k * I + columns, mask=columns < I, other=0.0)
        y = rounded(x * rstd[:, None] * gain, x_ptr.dtype.element_ty)
        codes, scale = quantize_tile(y)
        out = rows + k * N.to(tl.int64)
        tl.store(codes_ptr + out[:, None] * I + columns, codes.to(tl.int8), mask=inside)
        tl.store(scale_ptr + out, scale, mask=rows < N)


@triton.jit
def _rms_norm_operands(
    dy0_ptr, dy1_ptr, dy2_ptr, x_ptr, gain_ptr, rstd, rows, columns, inside, dy0_stride, dy1_stride, dy2_stride, x_stride,
    I: tl.constexpr, G: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """x^, u and the dy_k of some rows."""
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns, mask=inside, other=0.0, eviction_policy=POLICY)
    x_hat = x.to(tl.float32) * rstd[:, None]
    dy = tl.load(dy0_ptr + rows[:, None] * dy0_stride + columns, mask=inside, other=0.0, eviction_policy=POLICY)
    dy0 = dy.to(tl.float32)
    u = dy0 * tl.load(gain_ptr + columns, mask=columns < I, other=0.0, eviction_policy=POLICY)
    dy1, dy2 = dy0, dy0
    if G > 1:
        dy = tl.load(dy1_ptr + rows[:, None] * dy1_stride + columns, mask=inside, other=0.0, eviction_policy=POLICY)
        dy1 = dy.to(tl.float32)
        u += dy1 * tl.load(gain_ptr + I + columns, mask=columns < I, other=0.0, eviction_policy=POLICY)
    if G > 2:
        dy = tl.load(dy2_ptr + rows[:, None] * dy2_stride + columns, mask=inside, other=0.0, eviction_policy=POLICY)
        dy2 = dy.to(tl.float32)
        u += dy2 * tl.load(gain_ptr + 2 * I + columns, mask=columns < I, other=0.0, eviction_policy=POLICY)
    return x_hat, u, dy0, dy1, dy2


@triton.jit
def _rms_norm_backward(
    dy0_ptr, dy1_ptr, dy2_ptr, x_ptr, gain_ptr, rstd_ptr, dx_ptr, part_ptr,
    N, dy0_stride, dy1_stride, dy2_stride, x_stride, run,
    I: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    part0 = tl.zeros((BLOCK,), tl.float32)
    part1 = tl.zeros((BLOCK,), tl.float32)
    part2 = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, run, ROWS):
        rows = program * run + start + tl.arange(0, ROWS)
        inside = (rows[:, None] < N) & (columns < I)
        rstd = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)
        x_hat, u, dy0, dy1, dy2 = _rms_norm_operands(
            dy0_ptr, dy1_ptr, dy2_ptr, x_ptr, gain_ptr, rstd, rows, columns, inside,
            dy0_stride, dy1_stride, dy2_stride, x_stride, I, G, "evict_last",
        )  # fmt: skip
        mean = tl.sum(u * x_hat, 1) / I
        if TWICE:
            x_hat, u, dy0, dy1, dy2 = _rms_norm_operands(
                dy0_ptr, dy1_ptr, dy2_ptr, x_ptr, gain_ptr, rstd, rows, columns, inside,
                dy0_stride, dy1_stride, dy2_stride, x_stride, I, G, "evict_first",
            )  # fmt: skip
        part0 += tl.sum(dy0 * x_hat, 0)
        if G > 1:
            part1 += tl.sum(dy1 * x_hat, 0)
        if G > 2:
            part2 += tl.sum(dy2 * x_hat, 0)
        dx = rounded(rstd[:, None] * (u - x_hat * mean[:, None]), dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + rows[:, None] * I + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    ptr = part_ptr + program * G * I + columns
    tl.store(ptr, part0, mask=columns < I)
    if G > 1:
        tl.store(ptr + I, part1, mask=columns < I)
    if G > 2:
        tl.store(ptr + 2 * I, part2, mask=columns < I)


def rms_norm_quantize(x: Tensor, gains: Sequence[Tensor], eps: float) -> tuple[list[Quantized], Tensor]:
    """``y_k = x / sqrt(mean(x^2) + eps) * gain_k``, each quantized to int8 per token; x is read once.

    Args:
        x: (..., I) fp32, bf16 or fp16 on the GPU. gains: one to three (I,). eps: added to the mean square.

    Returns: (one Quantized per gain, rstd fp32 (..., 1), which the backward pass wants).

    Raises:
        ValueError: another dtype or width, or gains that do not fit.

    Numerics: y is ``x * rstd * gain_k`` in fp32 rounded to x.dtype, within twice the error of ``reference.rms_norm`` (the
    order of the sum differs). Codes and scales are bit for bit ``reference.quantize_activation`` of that y.
    """
    rows = rows_of("x", x)
    gain = stacked_gains(gains, x)
    N, I = rows.shape
    G = len(gains)
    stacked = empty_quantized((G, *x.shape), x.device)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if N:
        ROWS, BLOCK, num_warps = row_tile(I)
        _rms_norm_quantize[(triton.cdiv(N, ROWS),)](
            rows, gain, *stacked, rstd, N, rows.stride(0), eps, I, G, ROWS, BLOCK,
            num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return [Quantized(*(part[k] for part in stacked)) for k in range(G)], rstd


def rms_norm_quantize_backward(
    grads: Sequence[Tensor], x: Tensor, gains: Sequence[Tensor], rstd: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the norms of ``rms_norm_quantize``, straight through the quantizers.

    Args:
        grads: dy_k (..., I) for each gain, any float dtype. x, gains: as in the forward pass. rstd: what it returned.

    Returns: (dx (..., I) in x.dtype, [dgain_k fp32 (I,)]).

    Numerics: fp32; dx is rounded once. Deterministic.
    """
    rows, gain = rows_of("x", x), stacked_gains(gains, x)
    dys = [rows_of("grads", dy) for dy in grads]
    assert len(dys) == len(gains), "one gradient per gain"
    assert all(dy.shape == rows.shape for dy in dys), "gradients have the shape of x"
    N, I = rows.shape
    G = len(gains)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not N:
        return dx, list(gain.new_zeros((G, I)))
    ROWS, BLOCK, num_warps, twice = backward_tile(I)
    programs, run = runs(N, ROWS)
    parts = torch.empty((programs, G, I), dtype=torch.float32, device=x.device)
    dys += [dys[0]] * (MAX_GAINS - G)
    _rms_norm_backward[(programs,)](
        *dys, rows, gain, rstd, dx, parts, N, *(dy.stride(0) for dy in dys), rows.stride(0), run, I, G, ROWS, BLOCK, twice,
        num_warps=num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return dx, list(parts.sum(0))


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


def stacked_gains(gains: Sequence[Tensor], x: Tensor) -> Tensor:
    """(G, I) fp32; a copy only of several gains, or of those in another dtype."""
    if not 1 <= len(gains) <= MAX_GAINS or any(gain.shape != x.shape[-1:] for gain in gains):
        raise ValueError(
            f"gains: expected 1 to {MAX_GAINS} of shape ({x.shape[-1]},); got {[tuple(gain.shape) for gain in gains]}. "
            "Each is as wide as x."
        )
    if len(gains) == 1:
        return gains[0].detach().float().contiguous().unsqueeze(0)
    return torch.stack([gain.detach().float() for gain in gains])
