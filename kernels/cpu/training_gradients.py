"""The gradients of a BitLinear's product on a CPU, straight through both quantizers: ``dX = dY W~``, ``dW = dY^T x~``.

 exact    float products of dY with int8 operands turned into floats, in fp32; in bf16 where dY is bf16 and such products are fast
          here (bf16.py). A float32 dY is taken apart into three int8 digits where their three int8 products, as accurate, are
          faster (choices.py).
 fast     int8 products of dY rounded to the nearest code (training_quantize.py). Where int8 times int8 is not exact
          (training_products.py) dW stays a float product.

An int8 product needs scales that stand before its sum: with scales of groups of columns dX stays a float product, with
activation scales of blocks dW does.

Suffixes: N tokens, I in_features, O out_features.
"""

import functools

import torch
from torch import Tensor

from bitdistill.kernels.cpu import training_quantize
from bitdistill.kernels.cpu.bf16 import has_bf16_products
from bitdistill.kernels.cpu.choices import fastest
from bitdistill.kernels.cpu.rows import BLOCK, COMPILED, rows_of, share_rows
from bitdistill.kernels.cpu.training_groups import rounded
from bitdistill.kernels.cpu.training_products import (
    Ternary,
    dense_product,
    dense_products_are_exact,
    scaled_product,
    ternary_product,
)
from bitdistill.kernels.numerics import ACT_MAX, TOKENS_OF_A_SUM

DIGITS = 3  # planes of int8 codes that are as good as a float32


def exact_gradients(dy, codes, act_scale, ternary, needs_x, needs_weight):
    """(dX, dW) in dY's dtype: float products, or int8 products of all digits of a float32 dY where these are faster."""
    if dy.dtype not in COMPILED or not has_bf16_products():
        dy = dy.float()
    dx = dw = None
    work = (dy, codes, act_scale, ternary)
    if needs_x:
        dx = _float_dx(*work) if ternary.grouped() else _exact_product("dX", _float_dx, _digit_dx, *work)
    if needs_weight:
        dw = _float_dw(*work) if act_scale.shape[1] > 1 else _exact_product("dW", _float_dw, _digit_dw, *work)
    return dx, dw


def _float_dx(dy, _codes, _act_scale, ternary):
    return dy @ ternary.dequantized(dy.dtype)


def _float_dw(dy, codes, act_scale, _ternary):
    if act_scale.shape[1] > 1:
        return dy.t() @ rounded(codes, act_scale).to(dy.dtype)
    return dy.t() @ codes.to(dy.dtype).mul_(act_scale)


def digit_gradients(
    dy: Tensor, codes: Tensor, act_scale: Tensor, ternary: Ternary, needs_x: bool = True, needs_weight: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """``(dY W~, dY^T x~)`` by int8 products of three digits of dY, where `dense_products_are_exact`.

    Args:
        dy: float32 (N, O). codes: int8 (N, I). act_scale: fp32 (N, 1). ternary: of the weight (O, I).
        needs_x, needs_weight: which of the two.

    Returns: fp32 (N, I) and (O, I). Numerics: the integers are exact; dY is rounded to 2^-24 of the largest magnitude in its row,
    and in its column for the second, scales included.
    """
    return _in_parts(dy, codes, act_scale, ternary, needs_x, needs_weight, DIGITS)


def _digit_dx(*work):
    return digit_gradients(*work, needs_weight=False)[0]


def _digit_dw(*work):
    return digit_gradients(*work, needs_x=False)[1]


def _exact_product(name, of_floats, of_digits, dy, codes, act_scale, ternary):
    """One of the two by the faster way, of which this machine is asked once for a shape."""
    work = (dy, codes, act_scale, ternary)
    if dy.dtype != torch.float32 or not len(dy) or not dense_products_are_exact():
        return of_floats(*work)
    ways = {"floats": functools.partial(of_floats, *work), "digits": functools.partial(of_digits, *work)}
    shape = f"{len(dy).bit_length()} bits, {'x'.join(map(str, ternary.weight_codes.shape))}"
    return ways[fastest(f"exact {name} {shape}", ways)]()


def fast_gradients(dy, codes, act_scale, ternary, needs_x, needs_weight):
    """(dX, dW) fp32, int8 products; floats where an int8 product cannot have the scales, or would not be exact."""
    int8_x = needs_x and not ternary.grouped()
    int8_weight = needs_weight and act_scale.shape[1] == 1 and dense_products_are_exact()
    dx = dw = None
    if int8_x or int8_weight:
        dx, dw = _in_parts(dy, codes, act_scale, ternary, int8_x, int8_weight, 1)
    if int8_x < needs_x or int8_weight < needs_weight:
        rest = exact_gradients(dy, codes, act_scale, ternary, int8_x < needs_x, int8_weight < needs_weight)
        dx, dw = dx if int8_x else rest[0], dw if int8_weight else rest[1]
    return dx, dw


def _in_parts(dy, codes, act_scale, ternary, needs_x, needs_weight, planes):
    """(dX, dW) fp32 from int8 codes of dY, of as many tokens at a time as an int32 can sum."""
    dxs, dw = [], None
    for part in range(0, max(1, len(dy)), TOKENS_OF_A_SUM):
        tokens = slice(part, part + TOKENS_OF_A_SUM)
        rest = (ternary, needs_x, needs_weight, planes)
        dx, add = _quantized_gradients(dy[tokens], codes[tokens], act_scale[tokens], *rest)
        dxs.append(dx)
        dw = add if dw is None else dw.add_(add)
    return (torch.cat(dxs) if len(dxs) > 1 else dxs[0]), dw


def _quantized_gradients(dy, codes, act_scale, ternary, needs_x, needs_weight, planes):
    rows, address, stride, half = rows_of(dy)
    N, O = rows.shape
    dx = dw = row_codes = column_codes = factor = None
    row_scale = torch.empty(N, dtype=torch.float32)
    if needs_x:
        row_codes = torch.empty((planes * N, O), dtype=torch.int8)
    if needs_weight:
        column_codes = torch.empty((N, planes * O), dtype=torch.int8)
        peaks = torch.zeros((-(-N // BLOCK), O), dtype=torch.float32)
        share_rows(
            training_quantize.gradient_peaks, N, O, address, stride, half, O, act_scale.data_ptr(), peaks.data_ptr()
        )
        peak = peaks.amax(0).clamp_min_(float(training_quantize.TINY)) if N else peaks.new_zeros(O)
        factor, column_scale = torch.full_like(peak, ACT_MAX) / peak, peak / ACT_MAX
    pointers = [0 if t is None else t.data_ptr() for t in (row_codes, row_scale, act_scale, factor, column_codes)]
    scales = ternary.of_columns().data_ptr() if needs_x else 0
    work = (address, stride, half, O, scales, *pointers, N, planes)
    share_rows(training_quantize.gradient_codes, N, O, *work)
    if planes == 1:  # the scales as the sums come out
        if needs_x:
            dx = scaled_product("backward", row_codes, ternary, row_scale, None, None, torch.float32)
        if needs_weight:
            dw = dense_product(column_codes, codes, column_scale)
        return dx, dw
    if needs_x:
        dx = _joined(ternary_product("backward", row_codes, ternary), row_scale, planes)
    if needs_weight:
        dw = _joined(dense_product(column_codes, codes), column_scale, planes)
    return dx, dw


def _joined(acc: Tensor, row_scale: Tensor, planes: int) -> Tensor:
    """The fp32 product from the int32 ones of all planes, one below the other."""
    rows, width = len(acc) // planes, acc.shape[1]
    out = torch.empty((rows, width), dtype=torch.float32)
    work = (acc.data_ptr(), 4 * rows * width, width, row_scale.data_ptr(), out.data_ptr())
    share_rows(training_quantize.join_rows, rows, width, *work)
    return out
