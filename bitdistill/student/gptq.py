"""GPTQ: a weight is rounded column by column, and the columns not yet rounded compensate for the error of each rounding.

    error = (w_j - scale * codes_j) / U_jj               w_k -= error * U_jk   for all k > j

with H = X^T X over calibration inputs X, plus a share of its mean diagonal (damping), and U the upper Cholesky factor of
H^-1 (U^T U = H^-1). The layer's output ``X W^T`` then changes least. `compensated_codes` walks through the columns for any
codes and scales; `gptq_codes` is the ternary quantizer; evaluation/weight_only.py uses it for integers of 2 to 8 bits in
groups.

Source: Frantar et al., arXiv 2210.17323, section 3 and algorithm 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bitdistill.kernels.numerics import EPSILON
from bitdistill.kernels.reference import group_scales, weight_scale

COLUMNS_AT_ONCE = 128  # whose errors reach the columns after them in one product
DAMPING = 0.01  # of the mean of the Hessian's diagonal, as in GPTQ


def inverse_factor(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """``U`` with ``U^T U = (H + damping * mean(diag H) * 1)^-1``, upper triangular.

    Args:
        hessian: (I, I), finite. damping: share of the mean diagonal; at least EPSILON is added.

    Returns: fp32 (I, I); computed in fp64. An input channel that was always 0 leaves the other columns as they are.
    """
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    diagonal += max(damping * diagonal.mean().item(), EPSILON)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def gptq_factor(gram: Tensor) -> Tensor:
    """`inverse_factor` of the Hessian ``2 X^T X`` of a layer's squared error.

    Args:
        gram: (I, I), ``X^T X`` of the calibration.

    Returns: fp32 (I, I).
    """
    return inverse_factor(2 * gram.double())


def compensated_codes(
    weight: Tensor,
    factor: Tensor,
    columns: int,
    scale_of: Callable[[Tensor], Tensor],
    round_to: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """The sweep of the module's docstring, a block of columns at a time.

    Args:
        weight: (O, I) float. factor: (I, I), of `inverse_factor`.
        columns: of a block; the last one may be narrower. The rest of a row is brought up to date after each block, in
            one product.
        scale_of: the scale of a block, fp32 () or (O, 1), from what its columns (O, columns) have become when it is reached.
        round_to: the codes, fp32 (O, 1), of a column (O, 1) and its block's scale.

    Returns: (codes int8 (O, I), the scale of each block).

    Numerics: fp32. I sequential steps.
    """
    rest = weight.detach().float().clone()
    codes, scales = torch.empty(rest.shape, dtype=torch.int8, device=rest.device), []
    for begin in range(0, rest.shape[1], columns):
        end = min(begin + columns, rest.shape[1])
        scale = scale_of(rest[:, begin:end])
        errors = torch.empty_like(rest[:, begin:end])
        for j in range(begin, end):
            column = rest[:, j : j + 1]
            code = round_to(column, scale)
            error = (column - scale * code) / factor[j, j]
            rest[:, j + 1 : end] -= error * factor[j, j + 1 : end]
            codes[:, j : j + 1], errors[:, j - begin : j - begin + 1] = code, error
        rest[:, end:] -= errors @ factor[begin:end, end:]
        scales.append(scale)
    return codes, scales


def gptq_codes(weight: Tensor, factor: Tensor, columns: int = COLUMNS_AT_ONCE) -> tuple[Tensor, Tensor]:
    """``codes_j = clip(round(W_j / s), -1, 1)``, column by column.

    Args:
        weight: (O, I) float. factor: (I, I), from `gptq_factor`. columns: of a block of `compensated_codes`; no influence
            on the result but rounding.

    Returns: (codes int8 (O, I), weight_scale fp32 () = absmean of the weight as it came).
    """
    scale = weight_scale(weight)
    codes, _ = compensated_codes(weight, factor, columns, lambda _: scale, _ternary)
    return codes, scale


def gptq_group_codes(weight: Tensor, factor: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """`gptq_codes` with a snapped absmean for each row and group of columns, taken when the group is reached.

    Args:
        weight: (O, I) float. factor: (I, I), from `gptq_factor`. columns: of a group; I for one scale per row.

    Returns: (codes int8 (O, I), scale fp32 (O, G)), G = ceil(I / columns).
    """
    codes, scales = compensated_codes(
        weight, factor, columns, lambda block: group_scales(block, block.shape[1]), _ternary
    )
    return codes, torch.cat(scales, dim=1)


def _ternary(column: Tensor, scale: Tensor) -> Tensor:
    return torch.round(column / scale).clamp_(-1, 1)
