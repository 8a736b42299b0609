"""What is computed on rows of logits: losses, and their gradient, which is written over the student's logits. Plain
PyTorch; it is the specification of the kernels of the same names (gpu/vocabulary_kl.py, cpu/vocabulary_rows.py).

The KL is a sum of terms that are never negative, ``q - p - p d`` with ``d = log(q / p)``: where student and teacher
agree, the difference of two logarithms would be noise. Maxima are subtracted before anything else, so that the
size of the logits costs no accuracy.

When only some words are known (``top_k_rows_``), their logits are taken out of the row, and the rest is computed like any
other row. What was taken out is N x K numbers, which are put back as gradients.

Shape suffixes: N rows, V vocabulary, K cached words; N1 is (N, 1).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bitdistill.kernels.numerics import IGNORED

BLOCK_BYTES = (
    2**20
)  # of fp32 logits that PyTorch works on at a time: with a temporary or two they fit into two L2 caches


def dense_rows_(
    z_NV: Tensor,
    t_NV: Tensor | None,
    targets_N: Tensor,
    ce_weight: float,
    kl_weight: float,
    inverse_temperature: float,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """CE and KL of each row; with ``gradient``, ``z`` becomes ``ce_weight * (softmax(z) - onehot) + kl_weight * (q - p)``.

    Args:
        z_NV: the student's logits, overwritten if ``gradient``. t_NV: the teacher's, or None for no KL.
        targets_N: int64; a row with IGNORED has CE 0 and no share of it in the gradient.
        ce_weight: multiplies the CE's gradient. gradient: whether z_NV becomes the gradient.
        kl_weight: with the 1 / tau of the inner derivative in it. inverse_temperature: 1 / tau.

    Returns: (CE_N, KL_N) fp32, KL 0 without a teacher. Numerics: fp32 whatever the logits are.
    """
    if t_NV is None:
        ce_N = _cross_entropy_rows_(z_NV, targets_N, ce_weight, gradient)
        return ce_N, torch.zeros_like(ce_N)
    has_target = targets_N != IGNORED
    at_N1 = torch.where(has_target, targets_N, 0)[:, None]
    _, z, log_N1 = _relative(z_NV.float(), 1.0)
    ce_N = torch.where(has_target, (log_N1 - z.gather(1, at_N1)).squeeze(1), 0.0)
    _, t, t_log_N1 = _relative(t_NV.float(), inverse_temperature)
    z_tau = z * inverse_temperature
    z_log_N1 = z_tau.logsumexp(-1, keepdim=True)
    p, q = torch.exp(t - t_log_N1), torch.exp(z_tau - z_log_N1)
    d = z_tau.sub_(t).sub_(z_log_N1 - t_log_N1)
    change, terms = _ratio_terms(p, q, d)
    if gradient:
        weight_N1 = ce_weight * has_target[:, None].float()
        z = z.sub_(log_N1).exp_().mul_(weight_N1)
        z.scatter_add_(1, at_N1, -weight_N1)
        z_NV.copy_(z.add_(change, alpha=kl_weight))
    return ce_N, terms.sum(-1)


def _cross_entropy_rows_(z_NV: Tensor, targets_N: Tensor, ce_weight: float, gradient: bool) -> Tensor:
    """CE of each row alone: one exponential per logit, five passes over a row."""
    has_target = targets_N != IGNORED
    at_N1 = torch.where(has_target, targets_N, 0)[:, None]
    z = z_NV.float()
    z = z - z.amax(-1, keepdim=True)
    z_target_N = z.gather(1, at_N1).squeeze(1)
    z = z.exp_()
    total_N1 = z.sum(-1, keepdim=True)
    if gradient:
        weight_N1 = ce_weight * has_target[:, None].float()
        z = z.mul_(weight_N1 / total_N1)
        z.scatter_add_(1, at_N1, -weight_N1)
        z_NV.copy_(z)
    return torch.where(has_target, total_N1.squeeze(1).log() - z_target_N, 0.0)


def in_blocks(rows: Callable) -> Callable:
    """The same function of rows, called for a few rows at a time: on a CPU its temporaries then stay in the cache.

    Args:
        rows: takes z_NV first; of the other arguments every tensor has N rows. Returns a tensor, or a tuple of them, of N rows.
    """

    def run(z_NV: Tensor, *others):
        at_once = max(1, BLOCK_BYTES // (4 * z_NV.shape[1]))
        found = []
        for begin in range(0, max(len(z_NV), 1), at_once):
            of = slice(begin, begin + at_once)
            found.append(rows(z_NV[of], *(x[of] if isinstance(x, Tensor) else x for x in others)))
        if isinstance(found[0], Tensor):
            return torch.cat(found)
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    return run


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
    """What the words outside K add to the sums of a row; with ``gradient``, theirs is written over ``z``.

    Args:
        z_NV: the student's logits, -inf at the words of K.
        targets_N, ce_weight, kl_weight, inverse_temperature, gradient: as in dense_rows_.
        kept_max_N: the largest logit m in K. kept_sum_N: sum over K of exp(z - m). kept_sum_tau_N: of exp((z - m) / tau).
        p_rest_N: the teacher's probability outside K.

    Returns: (N, 4) fp32: the row's maximum M, and the logs of sum exp(z - M), of sum exp((z - M) / tau), and of the
    latter outside K, which may be -inf.
    """
    z = z_NV.float()
    z_max = z.amax(-1).clamp_min(torch.finfo(torch.float32).min)  # without a word outside K: finite, so no NaN below
    peak = torch.maximum(z_max, kept_max_N)
    tau_relative = (
        z - z_max[:, None]
    ) * inverse_temperature  # to the largest outside K: the sum is 1 at least, however small q_rest
    rest = tau_relative.exp().sum(-1)
    log_rest = rest.log() + (z_max - peak) * inverse_temperature
    z = z - peak[:, None]
    log_total = (z.exp().sum(-1) + kept_sum_N * torch.exp(kept_max_N - peak)).log()
    log_total_tau = (log_rest.exp() + kept_sum_tau_N * torch.exp((kept_max_N - peak) * inverse_temperature)).log()
    if gradient:
        has_target = targets_N != IGNORED
        at_N1 = torch.where(has_target, targets_N, 0)[:, None]
        weight_N1 = ce_weight * has_target[:, None].float()
        change_N = kl_weight * (torch.exp(log_rest - log_total_tau) - p_rest_N)
        of_kl = tau_relative.exp_().mul_((change_N / rest.clamp_min(1))[:, None])
        z = z.sub_(log_total[:, None]).exp_().mul_(weight_N1)
        z.scatter_add_(1, at_N1, -weight_N1)
        z_NV.copy_(z.add_(of_kl))
    return torch.stack([peak, log_total, log_total_tau, log_rest], dim=1)


def top_k_rows_(
    rest_rows: Callable,
    z_NV: Tensor,
    indices_NK: Tensor,
    values_NK: Tensor,
    log_rest_N: Tensor,
    targets_N: Tensor,
    ce_weight: float,
    kl_weight: float,
    inverse_temperature: float,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """``dense_rows_`` for a teacher known at K words: the same results, of KL_K. ``z`` is overwritten in any case."""
    has_target = targets_N != IGNORED
    indices_NK = indices_NK.long()
    z_target = z_NV.gather(1, torch.where(has_target, targets_N, 0)[:, None]).float().squeeze(1)
    kept = z_NV.gather(1, indices_NK).float()
    z_NV.scatter_(1, indices_NK, -math.inf)
    log_p = torch.cat([values_NK.float() * inverse_temperature, log_rest_N.float()[:, None]], dim=1).log_softmax(-1)
    kept_max = kept.amax(-1, keepdim=True)
    relative = kept - kept_max
    stats_N4 = rest_rows(
        z_NV,
        targets_N,
        kept_max.squeeze(1),
        relative.exp().sum(-1),
        (relative * inverse_temperature).exp().sum(-1),
        log_p[:, -1].exp(),
        ce_weight,
        kl_weight,
        inverse_temperature,
        gradient,
    )
    peak, log_total, log_total_tau, log_rest = stats_N4.split(1, dim=1)
    kept = kept - peak
    log_q = torch.cat([kept * inverse_temperature, log_rest], dim=1) - log_total_tau
    change, terms = _ratio_terms(log_p.exp(), log_q.exp(), log_q - log_p)
    if gradient:
        weight_N1 = ce_weight * has_target[:, None].float()
        of_ce = weight_N1 * (torch.exp(kept - log_total) - (indices_NK == targets_N[:, None]).float())
        z_NV.scatter_(1, indices_NK, (of_ce + kl_weight * change[:, :-1]).to(z_NV.dtype))
    ce_N = torch.where(has_target, log_total.squeeze(1) - (z_target - peak.squeeze(1)), 0.0)
    return ce_N, terms.sum(-1)


def _ratio_terms(p: Tensor, q: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """``(q - p, q - p - p d)`` for ``d = log(q / p)``, without cancellation where d is small; p = 0 allowed."""
    near = d.abs() < 1
    growth = torch.expm1(d)
    surprise = torch.where(p > 0, p * d, 0.0)
    return torch.where(near, p * growth, q - p), torch.where(near, p * (growth - d), q - p - surprise)


def _relative(x: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(max, (x - max) * scale, log sum exp of that)`` of each row, the outer ones (N, 1)."""
    peak = x.amax(-1, keepdim=True)
    x = (x - peak) * scale
    return peak, x, x.logsumexp(-1, keepdim=True)
