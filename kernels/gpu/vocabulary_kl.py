"""The work of `kernels/vocabulary_rows.py` on rows, on the GPU: log-sum-exp, losses, and the gradient in place.

A program works on one row of logits and goes through it twice. The first time it takes the sums of exponentials; the second
time it writes the gradient over the student's logits, from where the two products that follow read it. Per logit of a
student and a teacher in bf16, 4 bytes are read, 4 are read again, and 2 are written: about 2.9 ms for 8,192 x 151,936 at
4.3 TB/s.

The first pass is online, lane by lane: a lane keeps the largest logit that it has seen and the sum relative to it. It needs
one exponential per logit, ``e = exp(-|z - m|)``: either the sum is multiplied by e and 1 is added, or e is added. So there
is no reduction, and hence no barrier, in the loop. The temperature costs a second exponential of the same difference.

The KL is summed in the second pass from terms that are never negative, ``q - p - p d`` with ``d = log(q / p)``, near d = 0
by the series of ``expm1(d) - d``, so that nothing cancels where student and teacher agree.

The loops use plain masked pointers, and every row is summed in one fixed order.

Shape suffixes: N rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitdistill.kernels.numerics import IGNORED

# 8 logits a thread: one 16-byte load of bf16 from each tensor. About 80 registers let three rows share a multiprocessor,
# each at another point of its work. With fewer rows than two a multiprocessor, a row gets twice the threads.
MANY_ROWS = 256
TILE, TILE_FEW = (2048, 8), (4096, 16)  # (BLOCK, num_warps)
_IGNORED = tl.constexpr(IGNORED)
_LOWEST = tl.constexpr(-3.0e38)  # finite, so that a lane without a logit yet subtracts to an infinity and not to a NaN


@triton.jit
def _add_one(maximum, total, z, scale):
    """``total`` of ``exp((z - maximum) * scale)`` with one more z, before ``maximum`` takes z in; z may be -inf."""
    e = tl.exp(-tl.abs(z - maximum) * scale)
    return tl.where(z > maximum, total * e + 1.0, total + e)


@triton.jit
def _expm1_less_d(d):
    """``expm1(d) - d`` for |d| < 0.5, by its series: the first term left out is 2e-9 of the sum."""
    series = 1.0 + d * (1.0 / 10)
    series = 1.0 + d * (1.0 / 9) * series
    series = 1.0 + d * (1.0 / 8) * series
    series = 1.0 + d * (1.0 / 7) * series
    series = 1.0 + d * (1.0 / 6) * series
    series = 1.0 + d * (1.0 / 5) * series
    series = 1.0 + d * (1.0 / 4) * series
    series = 1.0 + d * (1.0 / 3) * series
    return 0.5 * d * d * series


@triton.jit
def _dense_rows(
    z_ptr,
    t_ptr,
    target_ptr,
    ce_ptr,
    kl_ptr,
    z_stride,
    t_stride,
    ce_weight,
    kl_weight,
    inverse_temperature,
    V: tl.constexpr,
    DISTILL: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row, t_row = z_ptr + row * z_stride, t_ptr + row * t_stride
    lanes = tl.arange(0, BLOCK)
    target = tl.load(target_ptr + row)
    has_target = target != _IGNORED
    named = (target >= 0) & (target < V)  # a target that is no word makes the loss NaN
    z_target = tl.load(z_row + target, mask=named, other=float("nan")).to(tl.float32)

    z_max, z_sum = tl.full((BLOCK,), _LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32)
    t_max, t_sum, z_sum_tau = z_max, z_sum, z_sum
    for begin in range(0, V, BLOCK):
        inside = begin + lanes < V
        z = tl.load(z_row + begin + lanes, mask=inside, other=-float("inf")).to(tl.float32)
        z_sum = _add_one(z_max, z_sum, z, 1.0)
        if DISTILL:
            t = tl.load(t_row + begin + lanes, mask=inside, other=-float("inf")).to(tl.float32)
            z_sum_tau = _add_one(z_max, z_sum_tau, z, inverse_temperature)
            t_sum = _add_one(t_max, t_sum, t, inverse_temperature)
            t_max = tl.maximum(t_max, t)
        z_max = tl.maximum(z_max, z)
    z_peak = tl.max(z_max, 0)
    z_log = tl.log(tl.sum(z_sum * tl.exp(z_max - z_peak), 0))
    tl.store(ce_ptr + row, tl.where(has_target, z_log - (z_target - z_peak), 0.0))
    ce_weight = tl.where(has_target, ce_weight, 0.0)
    if DISTILL:
        t_peak = tl.max(t_max, 0)
        z_log_tau = tl.log(tl.sum(z_sum_tau * tl.exp((z_max - z_peak) * inverse_temperature), 0))
        t_log = tl.log(tl.sum(t_sum * tl.exp((t_max - t_peak) * inverse_temperature), 0))

    if DISTILL or GRADIENT:
        kl = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, V, BLOCK):
            inside = begin + lanes < V
            z = tl.load(z_row + begin + lanes, mask=inside, other=0.0).to(tl.float32) - z_peak
            gradient = ce_weight * (tl.exp(z - z_log) - tl.where(begin + lanes == target, 1.0, 0.0))
            if DISTILL:
                t = tl.load(t_row + begin + lanes, mask=inside, other=0.0).to(tl.float32) - t_peak
                p, q = tl.exp(t * inverse_temperature - t_log), tl.exp(z * inverse_temperature - z_log_tau)
                d = (z - t) * inverse_temperature - (z_log_tau - t_log)
                near = tl.abs(d) < 0.5
                beyond = _expm1_less_d(tl.where(near, d, 0.0))
                change = tl.where(near, p * (beyond + d), q - p)
                kl += tl.where(inside, tl.where(near, p * beyond, q - p - p * d), 0.0)
                gradient += kl_weight * change
            if GRADIENT:
                tl.store(z_row + begin + lanes, gradient.to(z_ptr.dtype.element_ty), mask=inside)
        if DISTILL:
            tl.store(kl_ptr + row, tl.sum(kl, 0))


@triton.jit
def _rest_rows(
    z_ptr,
    target_ptr,
    kept_max_ptr,
    kept_sum_ptr,
    kept_sum_tau_ptr,
    p_rest_ptr,
    stats_ptr,
    z_stride,
    ce_weight,
    kl_weight,
    inverse_temperature,
    V: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * z_stride
    lanes = tl.arange(0, BLOCK)
    z_max, z_sum = tl.full((BLOCK,), _LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32)
    z_sum_tau = z_sum
    for begin in range(0, V, BLOCK):
        z = tl.load(z_row + begin + lanes, mask=begin + lanes < V, other=-float("inf")).to(tl.float32)
        z_sum = _add_one(z_max, z_sum, z, 1.0)
        z_sum_tau = _add_one(z_max, z_sum_tau, z, inverse_temperature)
        z_max = tl.maximum(z_max, z)
    kept_max = tl.load(kept_max_ptr + row)
    rest_max = tl.max(z_max, 0)
    peak = tl.maximum(rest_max, kept_max)
    # tau relative to the largest outside K: the sum is 1 at least, however small its share of the whole
    rest = tl.sum(z_sum_tau * tl.exp((z_max - rest_max) * inverse_temperature), 0)
    some = rest > 0
    log_rest = tl.log(tl.where(some, rest, 1.0)) + tl.where(
        some, (rest_max - peak) * inverse_temperature, -float("inf")
    )
    total = tl.sum(z_sum * tl.exp(z_max - peak), 0) + tl.load(kept_sum_ptr + row) * tl.exp(kept_max - peak)
    total_tau = tl.exp(log_rest) + tl.load(kept_sum_tau_ptr + row) * tl.exp((kept_max - peak) * inverse_temperature)
    log_total, log_total_tau = tl.log(total), tl.log(total_tau)
    tl.store(stats_ptr + 4 * row, peak)
    tl.store(stats_ptr + 4 * row + 1, log_total)
    tl.store(stats_ptr + 4 * row + 2, log_total_tau)
    tl.store(stats_ptr + 4 * row + 3, log_rest)
    if GRADIENT:
        target = tl.load(target_ptr + row)
        ce_weight = tl.where(target != _IGNORED, ce_weight, 0.0)
        change = kl_weight * (tl.exp(log_rest - log_total_tau) - tl.load(p_rest_ptr + row))
        of_kl = change / tl.maximum(rest, 1.0)
        for begin in range(0, V, BLOCK):
            inside = begin + lanes < V
            z = tl.load(z_row + begin + lanes, mask=inside, other=-float("inf")).to(tl.float32)
            gradient = ce_weight * (tl.exp(z - peak - log_total) - tl.where(begin + lanes == target, 1.0, 0.0))
            gradient += of_kl * tl.exp((z - rest_max) * inverse_temperature)
            tl.store(z_row + begin + lanes, gradient.to(z_ptr.dtype.element_ty), mask=inside)


def _tile(rows: int, vocabulary: int) -> tuple[int, int]:
    """(BLOCK, num_warps); a narrow vocabulary gets a narrow tile."""
    block, warps = TILE if rows >= MANY_ROWS else TILE_FEW
    block = min(block, triton.next_power_of_2(vocabulary))
    return block, max(1, min(warps, block // 256))


def dense_rows_(
    z_NV: Tensor,
    t_NV: Tensor | None,
    targets_N: Tensor,
    ce_weight: float,
    kl_weight: float,
    inverse_temperature: float,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """`kernels/vocabulary_rows.py`'s function of this name in one launch: the same equations, arguments and results.

    Numerics: sums in fp32; the exponential is the GPU's exp2, 2 ulp.
    """
    N, V = z_NV.shape
    ce_N, kl_N = torch.empty(N, device=z_NV.device), torch.zeros(N, device=z_NV.device)
    block, warps = _tile(N, V)
    teacher_NV = z_NV if t_NV is None else t_NV
    assert z_NV.stride(1) == teacher_NV.stride(1) == 1, "logits lie row by row"
    _dense_rows[(N,)](
        z_NV,
        teacher_NV,
        targets_N,
        ce_N,
        kl_N,
        z_NV.stride(0),
        teacher_NV.stride(0),
        ce_weight,
        kl_weight,
        inverse_temperature,
        V=V,
        DISTILL=t_NV is not None,
        GRADIENT=gradient,
        BLOCK=block,
        num_warps=warps,
    )
    return ce_N, kl_N


def rest_rows_(
    z_NV: Tensor,
    targets_N: Tensor,
    kept_max_N: Tensor,
    kept_sum_N: Tensor,
    kept_sum_tau_N: Tensor,
    p_rest_N: Tensor,
    ce_weight: float,
    kl_weight: float,
    inverse_temperature: float,
    gradient: bool,
) -> Tensor:
    """`kernels/vocabulary_rows.py`'s function of this name in one launch: the same equations, arguments and results."""
    N, V = z_NV.shape
    stats_N4 = torch.empty((N, 4), device=z_NV.device)
    block, warps = _tile(N, V)
    assert z_NV.stride(1) == 1, "logits lie row by row"
    _rest_rows[(N,)](
        z_NV,
        targets_N,
        kept_max_N,
        kept_sum_N,
        kept_sum_tau_N,
        p_rest_N,
        stats_N4,
        z_NV.stride(0),
        ce_weight,
        kl_weight,
        inverse_temperature,
        V=V,
        GRADIENT=gradient,
        BLOCK=block,
        num_warps=warps,
    )
    return stats_N4
