"""The gradients of a BitLinear's product on a CPU, straight through both quantizers: ``dX = dY W~``, ``dW = dY^T x~``.

 exact    float products of dY with int8 operands turned into floats, in fp32; in bf16 where dY is bf16 and such products are fast
          here (bf16.py). A float32 dY is taken apart into three int8 digits where their three int8 products, as accurate, are
          faster.
 fast     int8 products of dY rounded to the nearest code (training_digits.py). Where oneDNN's int8 times int8 is not exact
          (training_products.py) dW is a float product, or an int8 one in tiles.

An int8 product is one in tiles (training_tiles.py), or one of whole matrices by oneDNN ("rows"), whichever is known to be faster
or was when it was measured (choices.py).

An int8 product needs scales that stand before its sum: with scales of groups of columns dX stays a float product, with
activation scales of blocks dW does.

Suffixes: N tokens, I in_features, O out_features.
"""

import functools

import torch
from torch import Tensor

from bitdistill.kernels.cpu import training_digits
from bitdistill.kernels.cpu.bf16 import has_bf16_products
from bitdistill.kernels.cpu.choices import fastest
from bitdistill.kernels.cpu.instructions import FEATURES
from bitdistill.kernels.cpu.rows import BLOCK, COMPILED, rows_of, share_rows
from bitdistill.kernels.cpu.training_groups import rounded
from bitdistill.kernels.cpu.training_products import (
    SHAPE,
    Ternary,
    dense_product,
    dense_products_are_exact,
    is_left_out,
    multiply_tiles,
    padded,
    scaled,
    scaled_product,
    ternary_product,
    tiles_are_fastest,
    tiles_of_columns,
)
from bitdistill.kernels.numerics import TOKENS_OF_A_SUM

DIGITS = 3  # planes of int8 codes that are as good as a float32


def exact_gradients(dy, codes, act_scale, ternary, needs_x, needs_weight):
    """(dX, dW) in dY's dtype: float products, or int8 products of all digits of a float32 dY where these are faster."""
    dy = _factor(dy)
    planes = DIGITS if dy.dtype == torch.float32 else 0
    return _gradients(dy, codes, act_scale, ternary, needs_x, needs_weight, planes)


def fast_gradients(dy, codes, act_scale, ternary, needs_x, needs_weight):
    """(dX, dW) fp32, int8 products; floats where an int8 product cannot have the scales, or would not be exact."""
    return _gradients(dy, codes, act_scale, ternary, needs_x, needs_weight, 1)


def _gradients(dy, codes, act_scale, ternary, needs_x, needs_weight, planes):
    x_way, weight_way = (
        _way(of_x, planes, dy, act_scale, ternary) if needed else None
        for of_x, needed in ((True, needs_x), (False, needs_weight))
    )
    dx = dw = None
    for way in {x_way, weight_way} - {None}:
        found = WAYS[way](dy, codes, act_scale, ternary, way == x_way, way == weight_way, planes)
        dx, dw = found[0] if way == x_way else dx, found[1] if way == weight_way else dw
    return dx, dw


def _way(of_x, planes, dy, act_scale, ternary):
    """By which of WAYS dX, or else dW, is computed."""
    if planes == 0 or (ternary.grouped() if of_x else act_scale.shape[1] > 1):
        return "floats"
    exact = dense_products_are_exact()
    if (exact or not is_left_out("tiles")) and planes > 1 and not digits_are_fastest():
        return "floats"
    if _tiles_multiply():
        return "tiles"
    return "rows" if exact or (of_x and planes == 1) else "floats"


def _tiles_multiply():
    """Whether int8 products are ones in tiles: where they are fastest, or alone exact."""
    return not is_left_out("tiles") and (tiles_are_fastest() or not dense_products_are_exact())


@functools.cache
def digits_are_fastest() -> bool:
    """Whether the products of all digits of a float32 take less time than its own: known for AMX, and for AVX2, where they take
    more; by measurement elsewhere."""
    if FEATURES in ("amx", "avx2"):
        return FEATURES == "amx"
    N, I, O = SHAPE
    ternary = Ternary(torch.ones((O, I), dtype=torch.int8), torch.ones(1), (O,))
    work = (torch.ones(N, O), torch.ones((N, I), dtype=torch.int8), torch.ones(N, 1), ternary, True, True, DIGITS)
    ways = {"floats": functools.partial(_by_floats, *work), "digits": functools.partial(_in_parts, *work)}
    return fastest(f"exact gradients {N}x{I}x{O}", ways) == "digits"


def _factor(dy):
    """dY as a float product takes it: in bf16 only where such products are fast."""
    return dy if dy.dtype in COMPILED and has_bf16_products() else dy.float()


def _by_floats(dy, codes, act_scale, ternary, needs_x, needs_weight, _planes):
    dy = _factor(dy)
    return _float_dx(dy, ternary) if needs_x else None, _float_dw(dy, codes, act_scale) if needs_weight else None


def _float_dx(dy, ternary):
    return dy @ ternary.dequantized(dy.dtype)


def _float_dw(dy, codes, act_scale):
    return dy.t() @ rounded(codes, act_scale, dy.dtype)


def _by_rows(*work):
    return _in_parts(*work, tiled=False)


def _by_tiles(*work):
    return _in_parts(*work, tiled=True)


WAYS = {"floats": _by_floats, "rows": _by_rows, "tiles": _by_tiles}


def digit_gradients(
    dy: Tensor,
    codes: Tensor,
    act_scale: Tensor,
    ternary: Ternary,
    needs_x: bool = True,
    needs_weight: bool = True,
    tiled: bool | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """``(dY W~, dY^T x~)`` by int8 products of three digits of dY, in tiles, or where `dense_products_are_exact`.

    Args:
        dy: float32 (N, O). codes: int8 (N, I). act_scale: fp32 (N, 1). ternary: of the weight (O, I).
        needs_x, needs_weight: which of the two. tiled: whether tiles multiply; by default where they are
            fastest, or alone exact.

    Returns: fp32 (N, I) and (O, I), the same bits with and without tiles.

    Numerics: the integers are exact; dY is rounded to 2^-24 of the largest magnitude in its row, and in its column for the
    second, scales included.
    """
    return _in_parts(dy, codes, act_scale, ternary, needs_x, needs_weight, DIGITS, tiled)


def _in_parts(dy, codes, act_scale, ternary, needs_x, needs_weight, planes, tiled=None):
    """(dX, dW) fp32 from int8 codes of dY, of as many tokens at a time as an int32 can sum."""
    if tiled is None:
        tiled = _tiles_multiply()
    gradients = _in_tiles if tiled and len(dy) else _in_rows
    rest = (ternary, needs_x, needs_weight, planes)
    if len(dy) <= TOKENS_OF_A_SUM:
        return gradients(dy, codes, act_scale, *rest)
    dxs, dw = [], None
    for part in range(0, len(dy), TOKENS_OF_A_SUM):
        tokens = slice(part, part + TOKENS_OF_A_SUM)
        dx, add = gradients(dy[tokens], codes[tokens], act_scale[tokens], *rest)
        dxs.append(dx)
        dw = add if dw is None else dw.add_(add)
    return (torch.cat(dxs) if needs_x else None), dw


def _quantized(kernel, dy, act_scale, ternary, planes, row_codes, column_codes):
    """Writes the codes of dY where `row_codes` and `column_codes`, if any, are; returns their scales of rows and of columns."""
    rows, address, stride, half = rows_of(dy)
    N, O = rows.shape
    row_scale, column_scale = torch.empty(N, dtype=torch.float32), torch.zeros(O, dtype=torch.float32)  # 0 where N is 0
    peaks = torch.empty((-(-N // BLOCK) if column_codes is not None else 0, O), dtype=torch.float32)
    dense = (address, stride, half, O)
    if column_codes is not None:
        share_rows(training_digits.gradient_peaks, N, O, *dense, act_scale.data_ptr(), peaks.data_ptr())
    weight_scale = None if row_codes is None else padded(ternary.of_columns()[None], 1, 16)  # as wide as dY, or wider
    tensors = (weight_scale, row_codes, row_scale, act_scale, peaks, column_codes, column_scale)
    share_rows(kernel, N, O, *dense, N, planes, *(0 if t is None else t.data_ptr() for t in tensors))
    return row_scale, column_scale


def _in_tiles(dy, codes, act_scale, ternary, needs_x, needs_weight, planes):
    """By `multiply_tiles`: the codes are written as its operands, and the digits are joined as the sums leave the registers."""
    dy = padded(dy, 1, 16)
    (N, O), I = dy.shape, codes.shape[1]
    tokens, columns = -(-N // 64) * 64, -(-O // 64) * 64
    row_tiles = torch.empty(planes * -(-N // 16) * 16 * columns, dtype=torch.int8) if needs_x else None
    column_tiles = torch.empty(planes * O * tokens, dtype=torch.int8) if needs_weight else None
    kernel = training_digits.gradient_tiles
    row_scale, column_scale = _quantized(kernel, dy, act_scale, ternary, planes, row_tiles, column_tiles)
    dx = dw = None
    rest = {"tiled": True, "planes": planes}
    if needs_x:
        dx = torch.empty((N, I), dtype=torch.float32)
        multiply_tiles(row_tiles, (N, columns), ternary.tiles("backward"), dx, True, row_scale, **rest)
    if needs_weight:
        dw = torch.empty((O, I), dtype=torch.float32)
        right = tiles_of_columns(codes, False)
        dw = multiply_tiles(column_tiles, (O, tokens), right, dw, False, column_scale, **rest)[
            : len(ternary.weight_codes)
        ]
    return dx, dw


def _in_rows(dy, codes, act_scale, ternary, needs_x, needs_weight, planes):
    """By the int8 products of whole matrices."""
    N, O = dy.shape
    row_codes = torch.empty((planes * N, O), dtype=torch.int8) if needs_x else None
    column_codes = torch.empty((N, planes * O), dtype=torch.int8) if needs_weight else None
    kernel = training_digits.gradient_rows
    row_scale, column_scale = _quantized(kernel, dy, act_scale, ternary, planes, row_codes, column_codes)
    dx = dw = None
    if needs_x and planes == 1:  # the scales as the sums come out, where that is possible
        dx = scaled_product("backward", row_codes, ternary, row_scale, None, None, torch.float32)
    elif needs_x:
        dx = _joined(ternary_product("backward", row_codes, ternary), row_scale, planes)
    if needs_weight:
        acc = dense_product(column_codes, codes)
        one = planes == 1
        dw = scaled(acc, column_scale, None, None, torch.float32) if one else _joined(acc, column_scale, planes)
    return dx, dw


def _joined(acc: Tensor, row_scale: Tensor, planes: int) -> Tensor:
    """The fp32 product from the int32 ones of all planes, one below the other."""
    rows, width = len(acc) // planes, acc.shape[1]
    out = torch.empty((rows, width), dtype=torch.float32)
    work = (acc.data_ptr(), 4 * rows * width, width, row_scale.data_ptr(), out.data_ptr())
    share_rows(training_digits.join_rows, rows, width, *work)
    return out
