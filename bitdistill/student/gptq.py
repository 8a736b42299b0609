"""GPTQ: a weight is rounded column by column, and the columns to come make up for what each rounding costs.

Source: Frantar et al., arXiv 2210.17323, section 3 and algorithm 1.
"""

import torch
from torch import Tensor

from bitdistill.kernels.numerics import EPSILON
from bitdistill.kernels.reference import weight_scale

BLOCK_COLUMNS = 128
DAMPING = 0.01  # of the mean of the Hessian's diagonal, as in GPTQ


def gptq_factor(gram: Tensor) -> Tensor:
    """``U`` with ``U^T U = H^-1``, upper triangular, ``H = 2 X^T X + DAMPING * mean(diag) * 1``.

    Args:
        gram: (I, I), ``X^T X`` of the calibration.

    Returns: fp32 (I, I); computed in fp64. A channel that was always 0 counts as one that was as the damping.

    Source: GPTQ, arXiv 2210.17323, section 3.
    """
    hessian = 2 * gram.double()
    diagonal = hessian.diagonal()
    diagonal += max(DAMPING * diagonal.mean().item(), EPSILON)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True).float()


def gptq_codes(weight: Tensor, factor: Tensor, columns: int = BLOCK_COLUMNS) -> tuple[Tensor, Tensor]:
    """Columns in order; what rounding a column costs is made up by those that follow, as the inverse Hessian says:

        codes_j = clip(round(W_j / s), -1, 1)        W_k -= (W_j - s codes_j) / U_jj * U_jk   for all k > j

    Args:
        weight: (O, I) float. factor: (I, I), from `gptq_factor`. columns: after how many the rest of the row is brought up
            to date, in one product; no influence on the result but rounding.

    Returns: (codes int8 (O, I), weight_scale fp32 () = absmean of the weight as it came). I sequential steps.

    Source: GPTQ, arXiv 2210.17323, algorithm 1.
    """
    scale = weight_scale(weight)
    rest = weight.detach().float().clone()
    codes = torch.empty_like(rest)
    for start in range(0, rest.shape[1], columns):
        part, block = rest[:, start : start + columns], factor[start : start + columns, start : start + columns]
        errors = torch.empty_like(part)
        for j in range(part.shape[1]):
            codes[:, start + j] = torch.round(part[:, j] / scale).clamp_(-1, 1)
            errors[:, j] = (part[:, j] - scale * codes[:, start + j]) / block[j, j]
            part[:, j + 1 :] -= torch.outer(errors[:, j], block[j, j + 1 :])
        rest[:, start + columns :] -= errors @ factor[start : start + columns, start + columns :]
    return codes.to(torch.int8), scale
