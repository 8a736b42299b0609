"""The work of `kernels/vocabulary_rows.py` on rows of logits, compiled for a CPU: losses, and the gradient in place.

A row of logits fits into the second-level cache (151,936 words in fp32 are 0.6 MB), and so do the exponentials that are kept
between its passes. From memory a row is read once, and once the gradient is written over it. The passes: the largest logit;
the exponentials and their sum; the gradient. So there is one exponential per logit for a cross-entropy, and three where a
teacher's distribution at a temperature is compared with the student's.

The KL is summed from terms that are never negative, ``q - p - p d`` with ``d = log(q / p)``, for small d by the series of
``expm1(d) - d``, so that nothing cancels where student and teacher agree.

Sums run in fp32 over SUMMED logits, and in float64 over these parts; so do the few numbers of a whole row. A row is computed
alike whatever rows lie beside it and however many threads there are.

In compiled functions, `half` says that floats are bf16, strides are in bytes, and every tensor is passed by its address.
Shape suffixes: N rows, V vocabulary.
"""

import numpy as np
import torch
from torch import Tensor

from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.floats import (
    LANES,
    add,
    between,
    exp,
    largest,
    load,
    maximum,
    maximum_magnitude,
    multiply,
    multiply_add,
    splat,
    store,
    subtract,
    total,
    where_positive,
)
from bitdistill.kernels.cpu.native import float32s, int64s, keep
from bitdistill.kernels.cpu.rows import COMPILED, get, put, share_rows
from bitdistill.kernels.numerics import IGNORED

SUMMED = 64 * LANES
_ZERO, _ONE, _NEAR = np.float32(0), np.float32(1), np.float32(0.5)
_LOWEST = np.finfo(np.float32).min
# 1 / 10!, ... 1 / 2!: expm1(d) - d = d^2 (1 / 2! + d / 3! + ...); for |d| <= 0.5 what is left out is 1e-10 of the sum
_SERIES = tuple(np.float32(1 / f) for f in (3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2))


@jit
def _logits(row, i, width, half):
    """Logits i .. i + 15 of a row; -inf beyond its last."""
    left = width - i
    value = get(row + (2 if half else 4) * i, left, half)
    if left < LANES:
        value = between(value, 0, left)
    return value


@jit
def _peak(row, half, width):
    """The largest logit of a row; a NaN is passed over, and found again by its exponential."""
    peaks = splat(np.float32(-np.inf))
    for i in range(0, width, LANES):
        peaks = maximum(_logits(row, i, width, half), peaks)
    return largest(peaks)


@jit
def _exponentials(row, half, width, peak, scale, out):
    """``exp((z - peak) * scale)`` of a row, kept at `out` as float32, and their sum as float64."""
    whole, peaks, by = 0.0, splat(peak), splat(scale)
    for start in range(0, width, SUMMED):
        part = splat(_ZERO)
        for i in range(start, min(width, start + SUMMED), LANES):
            e = exp(multiply(subtract(_logits(row, i, width, half), peaks), by))
            store(out + 4 * i, e)
            part = add(part, e)
        whole += total(part)
    return whole


@jit
def _expm1_less_d(d):
    """``expm1(d) - d`` for |d| <= 0.5."""
    series = splat(_SERIES[0])
    for coefficient in _SERIES[1:]:
        series = multiply_add(series, d, splat(coefficient))
    return multiply(multiply(d, d), series)


@jit
def _mark(hot, target, weight):
    """Writes `weight` into the lane of the target, and returns where its 16 logits begin; below 0 without a target."""
    lanes = float32s(hot, LANES)
    lanes[:] = _ZERO
    if target == IGNORED:
        return -LANES
    lanes[target % LANES] = weight
    return target - target % LANES


@jit
def _ratio_terms(p, q, d):
    """``(q - p, q - p - p d)`` for ``d = log(q / p)``, without cancellation where d is small; p = 0 is allowed."""
    zero = splat(_ZERO)
    near = subtract(splat(_NEAR), maximum_magnitude(zero, d))
    beyond, difference = _expm1_less_d(d), subtract(q, p)
    surprise = where_positive(subtract(zero, p), zero, multiply(p, d))
    change = where_positive(near, multiply(p, add(beyond, d)), difference)
    return change, where_positive(near, multiply(p, beyond), subtract(difference, surprise))


@jit
def _distill(
    row, half, peak, teacher, teacher_half, teacher_peak, width, kept, by_e, by_q, by_p, shift,
    kl_weight, inverse_temperature, hot, at, gradient,
):  # fmt: skip
    """The KL of a row as float64, and its gradient over the row.

    Args:
        kept: address of the row's exponentials, of those at the temperature, and of the teacher's, float32 (3, width + LANES).
        by_e, by_q, by_p: what they are multiplied by: the CE's weight over their sum, and 1 over theirs.
        shift: the student's log of the sum at the temperature less the teacher's.
        hot, at: of `_mark`.
    """
    e, q, p = kept, kept + 4 * (width + LANES), kept + 8 * (width + LANES)
    by_e, by_q, by_p, shift = splat(by_e), splat(by_q), splat(by_p), splat(shift)
    peak, teacher_peak = splat(peak), splat(teacher_peak)
    weight, scale, whole = splat(kl_weight), splat(inverse_temperature), 0.0
    for start in range(0, width, SUMMED):
        part = splat(_ZERO)
        for i in range(start, min(width, start + SUMMED), LANES):
            z = subtract(_logits(row, i, width, half), peak)
            t = subtract(_logits(teacher, i, width, teacher_half), teacher_peak)
            d = subtract(multiply(subtract(z, t), scale), shift)
            change, terms = _ratio_terms(multiply(load(p + 4 * i), by_p), multiply(load(q + 4 * i), by_q), d)
            part = add(part, terms)
            if gradient:
                g = multiply_add(weight, change, multiply(load(e + 4 * i), by_e))
                if i == at:
                    g = subtract(g, load(hot))
                put(row + (2 if half else 4) * i, g, width - i, half)
        whole += total(part)
    return whole


@jit
def _write_sum(row, half, width, e, by_e, f, by_f, hot, at):
    """Writes ``e * by_e - (the marked lane) + f * by_f`` over a row; without f (0), the first two."""
    by_e, by_f = splat(by_e), splat(by_f)
    for i in range(0, width, LANES):
        g = multiply(load(e + 4 * i), by_e)
        if i == at:
            g = subtract(g, load(hot))
        if f != 0:
            g = multiply_add(load(f + 4 * i), by_f, g)
        put(row + (2 if half else 4) * i, g, width - i, half)


@jit
def dense_rows(
    first, last, z, z_stride, z_half, t, t_stride, t_half, width, targets, z_target, ce_weight, kl_weight,
    inverse_temperature, gradient, ce, kl,
):  # fmt: skip
    """CE and KL of rows first .. last - 1, and their gradient over z.

    Args:
        first, last: rows.
        z, t: the student's and the teacher's logits; t is 0 for none.
        z_stride, z_half, t_stride, t_half, width: of these rows.
        targets: int64 (N,). z_target: float32 (N,), the logit of each target.
        ce_weight, kl_weight, inverse_temperature: float32, as in the specification.
        gradient: whether z becomes the gradient.
        ce, kl: float32 (N,), written; kl only with a teacher.
    """
    room, lanes = np.empty((3 if t != 0 else 1, width + LANES), np.float32), np.empty(LANES, np.float32)
    e, hot = room.ctypes.data, lanes.ctypes.data
    q, p = e + 4 * (width + LANES), e + 8 * (width + LANES)
    for n in range(first, last):
        row, target = z + n * z_stride, int64s(targets + 8 * n, 1)[0]
        weight = _ZERO if target == IGNORED else ce_weight
        at = _mark(hot, target, weight)
        peak = _peak(row, z_half, width)
        e_sum = _exponentials(row, z_half, width, peak, _ONE, e)
        found = 0.0
        if target != IGNORED:
            found = np.log(e_sum) - (np.float64(float32s(z_target + 4 * n, 1)[0]) - np.float64(peak))
        float32s(ce + 4 * n, 1)[0] = np.float32(found)
        by_e = np.float32(weight / e_sum)
        if t != 0:
            teacher = t + n * t_stride
            teacher_peak = _peak(teacher, t_half, width)
            q_sum = _exponentials(row, z_half, width, peak, inverse_temperature, q)
            p_sum = _exponentials(teacher, t_half, width, teacher_peak, inverse_temperature, p)
            shift = np.float32(np.log(q_sum) - np.log(p_sum))
            found = _distill(
                row, z_half, peak, teacher, t_half, teacher_peak, width, e, by_e, np.float32(1 / q_sum),
                np.float32(1 / p_sum), shift, kl_weight, inverse_temperature, hot, at, gradient,
            )  # fmt: skip
            float32s(kl + 4 * n, 1)[0] = np.float32(found)
        elif gradient:
            _write_sum(row, z_half, width, e, by_e, 0, _ZERO, hot, at)
    keep(room)
    keep(lanes)


@jit
def rest_rows(
    first, last, z, z_stride, z_half, width, targets, kept_max, kept_sum, kept_sum_tau, p_rest, ce_weight, kl_weight,
    inverse_temperature, gradient, stats,
):  # fmt: skip
    """The sums of rows first .. last - 1 with the words of K, and the gradient of the other words over z.

    Args:
        first, last, z, z_stride, z_half, width, targets, ce_weight, kl_weight, inverse_temperature, gradient: as in
            `dense_rows`; z is -inf at the words of K.
        kept_max, kept_sum, kept_sum_tau, p_rest: float32 (N,), as in the specification.
        stats: float32 (N, 4), written: what the specification returns.
    """
    room, lanes = np.empty((2, width + LANES), np.float32), np.empty(LANES, np.float32)
    e, hot = room.ctypes.data, lanes.ctypes.data
    q = e + 4 * (width + LANES)
    for n in range(first, last):
        row, target = z + n * z_stride, int64s(targets + 8 * n, 1)[0]
        weight = _ZERO if target == IGNORED else ce_weight
        at = _mark(hot, target, weight)
        of_kept = float32s(kept_max + 4 * n, 1)[0]
        rest_max = max(_peak(row, z_half, width), _LOWEST)  # without a word outside K: finite, so no NaN below
        peak = max(rest_max, of_kept)
        e_sum = _exponentials(row, z_half, width, peak, _ONE, e)
        # relative to the largest outside K: the sum is 1 at least, however small their share
        rest = _exponentials(row, z_half, width, rest_max, inverse_temperature, q)
        scale, beyond = np.float64(inverse_temperature), np.float64(of_kept) - np.float64(peak)
        e_sum += float32s(kept_sum + 4 * n, 1)[0] * np.exp(beyond)
        log_rest = np.log(rest) + (np.float64(rest_max) - np.float64(peak)) * scale
        of_rest = np.exp(log_rest)
        q_sum = of_rest + float32s(kept_sum_tau + 4 * n, 1)[0] * np.exp(beyond * scale)
        row_stats = float32s(stats + 16 * n, 4)
        row_stats[0], row_stats[1] = peak, np.float32(np.log(e_sum))
        row_stats[2], row_stats[3] = np.float32(np.log(q_sum)), np.float32(log_rest)
        if gradient:
            change = kl_weight * (of_rest / q_sum - float32s(p_rest + 4 * n, 1)[0])
            by_q = np.float32(change / max(rest, 1.0))
            _write_sum(row, z_half, width, e, np.float32(weight / e_sum), q, by_q, hot, at)
    keep(room)
    keep(lanes)


def serves(*dtypes: torch.dtype) -> bool:
    """Whether the kernels read logits of these dtypes."""
    return all(dtype in COMPILED for dtype in dtypes)


def _rows(x: Tensor) -> tuple[int, int, bool]:
    """Address, stride in bytes, and whether they are bf16."""
    assert x.stride(1) == 1 or x.shape[1] == 1, "logits lie row by row"
    return x.data_ptr(), x.stride(0) * x.element_size(), x.dtype == torch.bfloat16


def dense_rows_(
    z_NV: Tensor,
    t_NV: Tensor | None,
    targets_N: Tensor,
    ce_weight: float,
    kl_weight: float,
    inverse_temperature: float,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """`kernels/vocabulary_rows.py`'s function of this name, compiled: the same equations, arguments and results.

    Numerics: exponentials within 2 units in the last place; sums of a row in float64 over parts in fp32.
    """
    N, V = z_NV.shape
    targets_N = targets_N.contiguous()
    z_target_N = z_NV.gather(
        1, torch.where(targets_N != IGNORED, targets_N, 0)[:, None]
    ).float()  # refuses other targets
    ce_N, kl_N = torch.empty(N, dtype=torch.float32), torch.zeros(N, dtype=torch.float32)
    teacher = (0, 0, False) if t_NV is None else _rows(t_NV)
    weights = [np.float32(number) for number in (ce_weight, kl_weight, inverse_temperature)]
    results = (ce_N.data_ptr(), kl_N.data_ptr())
    work = (*_rows(z_NV), *teacher, V, targets_N.data_ptr(), z_target_N.data_ptr(), *weights, bool(gradient), *results)
    share_rows(dense_rows, N, V, *work, block=1)
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
    """`kernels/vocabulary_rows.py`'s function of this name, compiled: the same equations, arguments and results."""
    N, V = z_NV.shape
    targets_N = targets_N.contiguous()
    kept = [x.float().contiguous() for x in (kept_max_N, kept_sum_N, kept_sum_tau_N, p_rest_N)]
    stats_N4 = torch.empty((N, 4), dtype=torch.float32)
    weights = [np.float32(number) for number in (ce_weight, kl_weight, inverse_temperature)]
    work = (*_rows(z_NV), V, targets_N.data_ptr(), *(x.data_ptr() for x in kept), *weights)
    share_rows(rest_rows, N, V, *work, bool(gradient), stats_N4.data_ptr(), block=1)
    return stats_N4
