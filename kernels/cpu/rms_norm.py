"""RMSNorm in training on a CPU, in one pass forward and one backward; autograd's own takes about twenty passes.

    y = x * rstd * gain        rstd = 1 / sqrt(mean(x^2) + eps)

A norm before a quantizer is fused with it (training_norms.py, which also has the gradient). This file is for the norms of
the model itself.
"""

import numpy as np
import torch
from torch import Tensor

from bitdistill.kernels.cpu import training_norms
from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.floats import LANES, multiply, splat
from bitdistill.kernels.cpu.native import float32s
from bitdistill.kernels.cpu.rows import BLOCK, get, put, share_rows


@jit
def norm_rows(first, last, x, width, gain, eps, y, rstd):
    """y of rows first .. last - 1, and rstd float32 (N,); x and y are addresses of float32 (N, width), gain of (width,)."""
    for n in range(first, last):
        row, out = x + 4 * n * width, y + 4 * n * width
        factor = training_norms._rstd(row, 4, False, width, eps)
        float32s(rstd + 4 * n, 1)[0] = factor
        by = splat(factor)
        for i in range(0, width, LANES):
            left = width - i
            put(
                out + 4 * i,
                multiply(multiply(get(row + 4 * i, left, False), by), get(gain + 4 * i, left, False)),
                left,
                False,
            )


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gain, eps):
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y, rstd = torch.empty_like(rows), torch.empty(len(rows), dtype=torch.float32)
        gains = gain.detach().contiguous()
        work = (rows.data_ptr(), rows.shape[1], gains.data_ptr(), np.float32(eps), y.data_ptr(), rstd.data_ptr())
        share_rows(norm_rows, *rows.shape, *work)
        ctx.save_for_backward(x, gain, rstd)
        return y.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, gain, rstd = ctx.saved_tensors
        rows, grads = (tensor.reshape(-1, x.shape[-1]).contiguous() for tensor in (x, dy))
        (N, width), gains, dx = rows.shape, gain.detach().contiguous(), torch.empty_like(rows)
        parts = torch.empty((-(-N // BLOCK), width), dtype=torch.float32)
        work = (grads.data_ptr(), 4 * width, False, rows.data_ptr(), 4 * width, False, width, gains.data_ptr())
        share_rows(training_norms.norm_backward_rows, N, width, *work, rstd.data_ptr(), dx.data_ptr(), parts.data_ptr())
        return dx.view(x.shape), parts.sum(0), None


@torch.compiler.disable
def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * gain`` over the last dimension, and its gradient.

    Args:
        x: float32 (..., I). gain: float32 (I,). eps: added to the mean of the squares.

    Returns: float32, like x. Numerics: all of it in float32; the gain's gradient is summed by blocks of rows, whatever the
    number of threads.
    """
    return _RMSNorm.apply(x, gain, eps)
