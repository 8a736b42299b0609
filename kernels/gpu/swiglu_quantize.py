"""SwiGLU (or its tanh-GELU twin) + SubLN that gives int8 codes for down_proj: ``y = h * rstd * gain``, quantized.

``h = act(gate) * up``, ``rstd = 1 / sqrt(mean(h^2) + eps)``. gate and up are read once, and h and y never leave the
registers: 5 bytes per element in bf16. h is not rounded on the way (PyTorch rounds ``act(gate)`` and the product), which is
closer to float64; y is rounded to the dtype of gate, as ``reference.rms_norm`` does.

Both activations are ``act(g) = g * sigmoid(v)``: v = g for SiLU, ``v = sqrt(8 / pi) * (g + 0.044715 g^3)`` for the tanh
form of GELU, which so needs no tanh and loses no digits where it is nearly 0; ``act' = s + act * (1 - s) * v'``.

Gradients are those of y, straight through the quantizer, in two stages for dgain as in norm_quantize.py:
``dh = rstd * (dy * gain - h^ * mean(dy * gain * h^))`` with ``h^ = h * rstd``, ``dup = dh * act``, ``dgate = dh * up * act'``.

Shape suffixes: N tokens, I in_features.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitdistill.kernels.gpu.norm_quantize import gain_of, inverse_rms, runs
from bitdistill.kernels.gpu.quantize import Quantized, empty_quantized, row_tile, rows_of, store_quantized
from bitdistill.kernels.gpu.rounding import rounded
from bitdistill.kernels.numerics import ACTIVATIONS

_SQRT_8_PI = tl.constexpr(math.sqrt(8 / math.pi))


@triton.jit
def _gated(gate, GELU: tl.constexpr):
    """act(gate) and act'(gate)."""
    if GELU:
        held = tl.minimum(tl.maximum(gate, -64.0), 64.0)  # beyond, the sigmoid is 0 or 1 and the cube could overflow
        v = _SQRT_8_PI * (held + 0.044715 * held * held * held)
        slope = _SQRT_8_PI * (1.0 + 0.134145 * held * held)
    else:
        v = gate
        slope = 1.0
    e = tl.exp(
        -tl.abs(v)
    )  # never overflows, and gives sigmoid(v) and sigmoid(-v) = 1 - sigmoid(v) without cancellation
    large, small = 1.0 / (1.0 + e), e / (1.0 + e)
    act = gate * tl.where(v >= 0, large, small)
    return act, tl.where(v >= 0, large, small) + act * tl.where(v >= 0, small, large) * slope


@triton.jit
def _swiglu_norm_quantize(
    gate_ptr, up_ptr, gain_ptr, codes_ptr, scale_ptr, rstd_ptr, N, gate_stride, up_stride, eps,
    I: tl.constexpr, GELU: tl.constexpr, NORM: tl.constexpr, ACT_BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows[:, None] < N) & (columns < I)
    gate = tl.load(gate_ptr + rows[:, None] * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows[:, None] * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    y = _gated(gate, GELU)[0] * up
    if NORM:
        rstd = inverse_rms(y, eps, I)
        tl.store(rstd_ptr + rows, rstd, mask=rows < N)
        y = y * rstd[:, None] * tl.load(gain_ptr + columns, mask=columns < I, other=0.0)
    y = rounded(y, gate_ptr.dtype.element_ty)
    store_quantized(y, codes_ptr, scale_ptr, rows, columns, inside, N, I, ACT_BLOCKS, ROWS, BLOCK)


@triton.jit
def _swiglu_operands(
    dy_ptr, gate_ptr, up_ptr, gain_ptr, rows, columns, dy_stride, gate_stride, up_stride, N,
    I: tl.constexpr, GELU: tl.constexpr, NORM: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """act(gate), act'(gate), up, dy and the gain at some rows and columns."""
    inside = (rows[:, None] < N) & (columns < I)
    gate = tl.load(gate_ptr + rows[:, None] * gate_stride + columns, mask=inside, other=0.0, eviction_policy=POLICY)
    up = tl.load(up_ptr + rows[:, None] * up_stride + columns, mask=inside, other=0.0, eviction_policy=POLICY)
    dy = tl.load(dy_ptr + rows[:, None] * dy_stride + columns, mask=inside, other=0.0, eviction_policy=POLICY)
    gain = 1.0
    if NORM:
        gain = tl.load(gain_ptr + columns, mask=columns < I, other=0.0, eviction_policy=POLICY)
    act, slope = _gated(gate.to(tl.float32), GELU)
    return act, slope, up.to(tl.float32), dy.to(tl.float32), gain


@triton.jit
def _swiglu_norm_backward(
    dy_ptr, gate_ptr, up_ptr, gain_ptr, rstd_ptr, dgate_ptr, dup_ptr, part_ptr,
    N, dy_stride, gate_stride, up_stride, run,
    I: tl.constexpr, GELU: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    dtype = gate_ptr.dtype.element_ty
    part0 = tl.zeros((BLOCK,), tl.float32)
    part1 = tl.zeros((BLOCK,), tl.float32)
    part2 = tl.zeros((BLOCK,), tl.float32)
    part3 = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, run, ROWS):
        rows = program * run + start + tl.arange(0, ROWS)
        rstd = tl.zeros((ROWS,), tl.float32)
        mean = tl.zeros((ROWS,), tl.float32)
        if NORM:
            rstd = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)
            for c in tl.static_range(CHUNKS):
                act, slope, up, dy, gain = _swiglu_operands(
                    dy_ptr, gate_ptr, up_ptr, gain_ptr, rows, c * BLOCK + lanes, dy_stride, gate_stride, up_stride, N,
                    I, GELU, NORM, "evict_last",
                )  # fmt: skip
                mean += tl.sum(dy * gain * (act * up * rstd[:, None]), 1) / I
        for c in tl.static_range(CHUNKS):
            columns = c * BLOCK + lanes
            # With one chunk this is the load above, and the compiler keeps what it has; else it comes from the L1 cache.
            act, slope, up, dy, gain = _swiglu_operands(
                dy_ptr, gate_ptr, up_ptr, gain_ptr, rows, columns, dy_stride, gate_stride, up_stride, N,
                I, GELU, NORM, "evict_last" if CHUNKS == 1 else "evict_first",
            )  # fmt: skip
            dh = dy
            if NORM:
                h_hat = act * up * rstd[:, None]
                dh = rstd[:, None] * (dy * gain - h_hat * mean[:, None])
                if c == 0:
                    part0 += tl.sum(dy * h_hat, 0)
                if c == 1:
                    part1 += tl.sum(dy * h_hat, 0)
                if c == 2:
                    part2 += tl.sum(dy * h_hat, 0)
                if c == 3:
                    part3 += tl.sum(dy * h_hat, 0)
            inside = (rows[:, None] < N) & (columns < I)
            out = rows[:, None] * I + columns
            tl.store(dgate_ptr + out, rounded(dh * up * slope, dtype).to(dtype), mask=inside)
            tl.store(dup_ptr + out, rounded(dh * act, dtype).to(dtype), mask=inside)
    if NORM:
        ptr = part_ptr + program * I
        tl.store(ptr + lanes, part0, mask=lanes < I)
        if CHUNKS > 1:
            tl.store(ptr + BLOCK + lanes, part1, mask=BLOCK + lanes < I)
        if CHUNKS > 2:
            tl.store(ptr + 2 * BLOCK + lanes, part2, mask=2 * BLOCK + lanes < I)
        if CHUNKS > 3:
            tl.store(ptr + 3 * BLOCK + lanes, part3, mask=3 * BLOCK + lanes < I)


def swiglu_norm_quantize(
    gate: Tensor, up: Tensor, gain: Tensor | None, eps: float, activation: str = "silu", blocks: bool = False
) -> tuple[Quantized, Tensor | None]:
    """``h = act(gate) * up``, ``y = h / sqrt(mean(h^2) + eps) * gain`` (or h without a gain), quantized to int8.

    Args:
        gate, up: (..., I) fp32, bf16 or fp16 on the GPU; halves of one wider tensor are taken as they are.
        gain: (I,), or None for no norm. eps: of the norm. activation: one of ACTIVATIONS.
        blocks: whether each ACT_BLOCK columns of a token have a scale.

    Returns: (Quantized, rstd fp32 (..., 1) or None).

    Raises:
        ValueError: another activation, dtype, width or gain.

    Numerics: fp32 until y, which is rounded to gate.dtype; within twice PyTorch's error against float64. Codes and scales
    are bit for bit ``reference.quantize_activation`` of that y.
    """
    gates, ups = _pair(gate, up, activation)
    N, I = gates.shape
    out = empty_quantized(gate.shape, gate.device, blocks)
    rstd = None if gain is None else torch.empty((*gate.shape[:-1], 1), dtype=torch.float32, device=gate.device)
    norm = out.act_scale if gain is None else gain_of(gain, gate)  # a pointer has to be there, read or not
    if N:
        ROWS, BLOCK, num_warps = gated_tile(I)
        _swiglu_norm_quantize[(triton.cdiv(N, ROWS),)](
            gates, ups, norm, *out, out.act_scale if rstd is None else rstd, N, gates.stride(0), ups.stride(0), eps,
            I, activation != "silu", gain is not None, blocks, ROWS, BLOCK, num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out, rstd


def swiglu_norm_quantize_backward(
    grad: Tensor, gate: Tensor, up: Tensor, gain: Tensor | None, rstd: Tensor | None, activation: str = "silu"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of ``swiglu_norm_quantize``, straight through the quantizer.

    Args:
        grad: dy (..., I), any float dtype. gate, up, gain, activation: as in the forward pass. rstd: what it returned.

    Returns: (dgate, dup (..., I) in gate.dtype, dgain fp32 (I,) or None).

    Numerics: fp32; dgate and dup are rounded once. Deterministic.
    """
    gates, ups = _pair(gate, up, activation)
    dy = rows_of("grad", grad)
    assert dy.shape == gates.shape, "the gradient has the shape of gate"
    assert (gain is None) == (rstd is None), "rstd belongs to the gain"
    N, I = gates.shape
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    if not N:
        return dgate, dup, None if gain is None else gate.new_zeros(I, dtype=torch.float32)
    ROWS, BLOCK, num_warps, chunks = chunk_tile(I)
    programs, run = runs(N, ROWS)
    parts = torch.empty((programs, I if gain is not None else 0), dtype=torch.float32, device=gate.device)
    norm = (parts, parts) if gain is None else (gain_of(gain, gate), rstd)
    _swiglu_norm_backward[(programs,)](
        dy, gates, ups, *norm, dgate, dup, parts, N, dy.stride(0), gates.stride(0), ups.stride(0), run,
        I, activation != "silu", gain is not None, ROWS, BLOCK, chunks, num_warps=num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return dgate, dup, None if gain is None else parts.sum(0)


def chunk_tile(width: int) -> tuple[int, int, int, int]:
    """(ROWS, BLOCK, num_warps, CHUNKS) of the backward pass: with three operands, a row of more than 4,096 is walked in three
    or four pieces, once for its mean and once for its gradients."""
    block = triton.next_power_of_2(width if width <= 4096 else triton.cdiv(width, 4))
    rows = max(1, 2048 // block)
    return rows, block, min(16, rows * block // 256), triton.cdiv(width, block)


def _pair(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gate and up as rows, checked."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected {' or '.join(ACTIVATIONS)}; got {activation}. Others have no kernel.")
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"up: expected the shape and dtype of gate, {tuple(gate.shape)} {gate.dtype}; got {tuple(up.shape)} "
            f"{up.dtype}. Both come from the same input."
        )
    return rows_of("gate", gate), rows_of("up", up)


def gated_tile(width: int) -> tuple[int, int, int]:
    """row_tile with twice its warps, up to 16: two rows are loaded, and 32 values of each spill on sm_100."""
    rows, block, num_warps = row_tile(width)
    return rows, block, min(16, 2 * num_warps)
