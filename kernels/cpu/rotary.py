"""Rotary position embedding in training on a CPU: queries and keys in one pass forward and one backward, instead of twenty.

    y = x * cos + rotate_half(x) * sin          rotate_half(a, b) = (-b, a), the halves of a head

Every operation is rounded as in PyTorch, so that results and gradients are those of transformers, bit for bit. Results lie in
memory as (B, T, H, D), and there as (B, H, T, D): attention may round its own sums in another order after it.

Addresses are int64, strides in bytes. Shape suffixes: B sequences, H heads, T positions, D head width.
"""

import numpy as np
import torch
from torch import Tensor

from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.floats import LANES, add, multiply, splat, subtract
from bitdistill.kernels.cpu.native import int64s
from bitdistill.kernels.cpu.rows import get, put, share_rows

WORK = 9  # numbers of a row of the table of `rotate_rows`


@jit
def rotate_rows(first, last, table, tensors, positions, width, cos, sin, batch_stride, stride, back):
    """y of tokens first .. last - 1; where `back`, dx of dy.

    Args:
        first, last: tokens, b * T + t.
        table: address of int64 (tensors, WORK): address of x and its strides of b, h and t; the same of y; the heads.
        tensors: how many are rotated.
        positions, width: T, D.
        cos, sin: addresses of float32 (B, T, D).
        batch_stride, stride: theirs of b and t.
        back: whether to rotate gradients.
    """
    half = width // 2
    zero = splat(np.float32(0))
    for tensor in range(tensors):
        work = int64s(table + 8 * WORK * tensor, WORK)
        for n in range(first, last):
            b, t = n // positions, n % positions
            c, s = cos + b * batch_stride + t * stride, sin + b * batch_stride + t * stride
            for h in range(work[8]):
                x = work[0] + b * work[1] + h * work[2] + t * work[3]
                y = work[4] + b * work[5] + h * work[6] + t * work[7]
                for i in range(0, half, LANES):
                    left, low, high = half - i, 4 * i, 4 * (half + i)
                    x0, x1 = get(x + low, left, False), get(x + high, left, False)
                    s0, s1 = get(s + low, left, False), get(s + high, left, False)
                    y0, y1 = multiply(x0, get(c + low, left, False)), multiply(x1, get(c + high, left, False))
                    if back:
                        y0, y1 = add(y0, multiply(x1, s1)), add(y1, multiply(subtract(zero, x0), s0))
                    else:
                        y0, y1 = add(y0, multiply(subtract(zero, x1), s0)), add(y1, multiply(x0, s1))
                    put(y + low, y0, left, False)
                    put(y + high, y1, left, False)


def _rotate(tensors: list[Tensor], cos: Tensor, sin: Tensor, back: bool) -> list[Tensor]:
    B, _, T, D = tensors[0].shape
    sources = [x.detach() if x.stride(3) == 1 else x.detach().contiguous() for x in tensors]
    results = [torch.empty((B, T, x.shape[1], D)).transpose(1, 2) for x in sources]
    pairs = zip(sources, results, strict=True)
    table = np.array([[x.data_ptr(), *_strides(x), y.data_ptr(), *_strides(y), x.shape[1]] for x, y in pairs], np.int64)
    heads = sum(x.shape[1] for x in sources)
    work = (table.ctypes.data, len(table), T, D, cos.data_ptr(), sin.data_ptr(), *_strides(cos), back)
    share_rows(rotate_rows, B * T, heads * D, *work)
    return results


def _strides(x: Tensor) -> list[int]:
    """In bytes, of all dimensions but the last."""
    return [4 * stride for stride in x.stride()[:-1]]


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        shape = (len(q), *cos.shape[1:])
        cos, sin = (values.detach().contiguous().expand(shape) for values in (cos, sin))
        ctx.save_for_backward(cos, sin)
        return tuple(_rotate([q, k], cos, sin, back=False))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq, dk):
        return *_rotate([dq, dk], *ctx.saved_tensors, back=True), None, None


@torch.compiler.disable
def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``x * cos + rotate_half(x) * sin`` of queries and keys, and its gradient.

    Args:
        q, k: float32 (B, H, T, D), any strides, heads of their own; D even. cos, sin: float32 (B or 1, T, D).

    Returns: two float32 tensors of these shapes, (B, T, H, D) in memory. Numerics: bit for bit transformers'.
    """
    return _Rotary.apply(q, k, cos, sin)
