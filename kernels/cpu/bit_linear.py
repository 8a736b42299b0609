"""BitLinear on a CPU: compiled quantizers, int8 products, and their gradients. It has the interface of
kernels/gpu/bit_linear.py.

    quantize_input(x)                             act_codes int8, act_scale
    norm_quantize_input(x, gain, eps)             the same of SubLN(x), and an anchor
    gated_quantize_input(gate, up, ...)           the same of SubLN(act(gate) * up), and an anchor
    ternarize(weights)                            weight_codes int8 of linears stacked, weight_scale of each
    ternary_linear(x, ...)                        y = int8 product * scales + bias, of linears on the same codes

As on a GPU, the straight-through gradient goes around the int8 codes. `ternary_linear` gives its input gradient to x, of
which it reads only the shape. After a fused norm x does not exist; an *anchor* with memory for one value takes its place.

Saved for backward: act_codes, act_scale, weight_codes, weight_scale; for a norm x, or gate and up, and one number per row.
 backward="exact":  float products of dY with int8 operands turned into floats: dX = dY W~, dW = dY^T x~, in fp32; in bf16
                    where dY is bf16 and such products are fast here (bf16.py). A float32 dY is taken apart into three int8
                    digits where their three int8 products, as accurate, are faster (choices.py).
 backward="fast":   int8 products of dY rounded to the nearest code (training_quantize.py). Where int8 times int8 is not exact
                    (training_products.py) dW stays a float product.

torch.compile leaves these functions alone: its graph is broken around them.
Suffixes: N tokens, I in_features, O out_features, S linears that share an input.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bitdistill.kernels import reference
from bitdistill.kernels.cpu import training_norms, training_quantize
from bitdistill.kernels.cpu.bf16 import has_bf16_products
from bitdistill.kernels.cpu.choices import fastest
from bitdistill.kernels.cpu.rows import BLOCK, share_rows
from bitdistill.kernels.cpu.training_products import (
    Ternary,
    dense_product,
    dense_products_are_exact,
    has_products,
    leave_out_products,
    ternary_product,
)
from bitdistill.kernels.numerics import ACT_MAX, EPSILON

PIECE = 1 << 16  # weights that are quantized at a time
DIGITS = 3  # planes of int8 codes that are as good as a float32
TOKENS_OF_A_SUM = 1 << 17  # of int8 times int8, in int32
_COMPILED = (torch.float32, torch.bfloat16)
__all__ = [
    "as_ternary",
    "digit_gradients",
    "gated_quantize_input",
    "has_products",
    "leave_out_products",
    "norm_quantize_input",
    "quantize_input",
    "stacked",
    "ternarize",
    "ternarize_each",
    "ternary_linear",
]


class Activation(NamedTuple):
    """``x ~ act_scale * act_codes``."""

    act_codes: Tensor  # int8 (..., I)
    act_scale: Tensor  # fp32 (..., 1)


# --- quantizers ----------------------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> tuple[Tensor, int, int, bool]:
    """x as (N, I) with neighboring columns in a dtype that the kernels read; its address, row stride in bytes, is it bf16."""
    x = x.detach()
    if x.dtype not in _COMPILED:
        x = x.float()
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1 and rows.shape[1] > 1:
        rows = rows.contiguous()
    return rows, rows.data_ptr(), rows.stride(0) * rows.element_size(), rows.dtype == torch.bfloat16


def _empty_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape[-1] == 0:
        raise ValueError("x: expected a last dimension of at least 1; got 0")
    return torch.empty(x.shape, dtype=torch.int8), torch.empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.compiler.disable
def quantize_input(x: Tensor) -> Activation:
    """Per-token int8 codes of x (..., I): ``reference.quantize_activation``, bit for bit. No gradient."""
    codes, scale = _empty_codes(x)
    rows, address, stride, half = _rows(x)
    work = (address, stride, half, rows.shape[1], codes.data_ptr(), scale.data_ptr())
    share_rows(training_quantize.quantize_rows, *rows.shape, *work)
    return Activation(codes, scale)


def _anchor(x: Tensor) -> Tensor:
    return x.new_zeros((1,) * x.dim()).expand(x.shape)


def _gain(gain: Tensor) -> Tensor:
    return gain.detach().float().contiguous()


class _NormQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gain, eps):
        codes, scale = _empty_codes(x)
        rstd, gains = torch.empty_like(scale), _gain(gain)
        rows, address, stride, half = _rows(x)
        work = (address, stride, half, rows.shape[1], gains.data_ptr(), np.float32(eps))
        outputs = (codes.data_ptr(), scale.data_ptr(), rstd.data_ptr())
        share_rows(training_norms.norm_quantize_rows, *rows.shape, *work, *outputs)
        ctx.mark_non_differentiable(codes, scale)
        ctx.save_for_backward(x, gain, rstd)
        return codes, scale, _anchor(x)

    @staticmethod
    def backward(ctx, _codes, _scale, dy):
        x, gain, rstd = ctx.saved_tensors
        rows, address, stride, half = _rows(x)
        _grads, grad_address, grad_stride, grad_half = _rows(dy)
        dx, gains = torch.empty_like(rows, memory_format=torch.contiguous_format), _gain(gain)
        parts = torch.empty((-(-len(rows) // BLOCK), rows.shape[1]), dtype=torch.float32)
        work = (grad_address, grad_stride, grad_half, address, stride, half, rows.shape[1], gains.data_ptr())
        outputs = (rstd.data_ptr(), dx.data_ptr(), parts.data_ptr())
        share_rows(training_norms.norm_backward_rows, *rows.shape, *work, *outputs)
        return dx.view(x.shape), parts.sum(0).to(gain.dtype), None


class _GatedQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, gain, eps, gelu):
        codes, scale = _empty_codes(gate)
        rstd, gains = torch.empty_like(scale), None if gain is None else _gain(gain)
        rows, address, stride, half = _rows(gate)
        _ups, up_address, up_stride, _ = _rows(up)
        work = (
            address,
            stride,
            up_address,
            up_stride,
            half,
            rows.shape[1],
            gelu,
            0 if gain is None else gains.data_ptr(),
        )
        outputs = (np.float32(eps), codes.data_ptr(), scale.data_ptr(), rstd.data_ptr())
        share_rows(training_norms.gated_quantize_rows, *rows.shape, *work, *outputs)
        ctx.mark_non_differentiable(codes, scale)
        ctx.save_for_backward(gate, up, gain, rstd)
        ctx.gelu = gelu
        return codes, scale, _anchor(gate)

    @staticmethod
    def backward(ctx, _codes, _scale, dy):
        gate, up, gain, rstd = ctx.saved_tensors
        rows, address, stride, half = _rows(gate)
        _ups, up_address, up_stride, _ = _rows(up)
        _grads, grad_address, grad_stride, grad_half = _rows(dy)
        gains = None if gain is None else _gain(gain)
        dgate, dup = (torch.empty(rows.shape, dtype=rows.dtype) for _ in range(2))
        parts = torch.empty((-(-len(rows) // BLOCK) if gain is not None else 0, rows.shape[1]), dtype=torch.float32)
        work = (
            grad_address,
            grad_stride,
            grad_half,
            address,
            stride,
            up_address,
            up_stride,
            half,
            rows.shape[1],
            ctx.gelu,
        )
        outputs = (
            0 if gain is None else gains.data_ptr(),
            rstd.data_ptr(),
            dgate.data_ptr(),
            dup.data_ptr(),
            parts.data_ptr(),
        )
        share_rows(training_norms.gated_backward_rows, *rows.shape, *work, *outputs)
        dgain = None if gain is None else parts.sum(0).to(gain.dtype)
        return dgate.view(gate.shape), dup.view(gate.shape), dgain, None, None


@torch.compiler.disable
def norm_quantize_input(x: Tensor, gain: Tensor, eps: float) -> tuple[Activation, Tensor]:
    """int8 codes of ``rms_norm(x, gain, eps)``, and the anchor through which its gradient flows.

    Args:
        x: (..., I), any float dtype. gain: (I,). eps: inside the square root.

    Returns: (Activation, anchor (..., I) in x.dtype, zeros that take no memory), differentiable in x and gain.

    Numerics: fp32, rounded to bf16 before quantization where x is bf16; float16 is normalized by PyTorch.
    """
    if x.dtype not in _COMPILED:
        y = reference.rms_norm(x, gain, eps)
        return quantize_input(y), y
    codes, scale, anchor = _NormQuantize.apply(x, gain, eps)
    return Activation(codes, scale), anchor


@torch.compiler.disable
def gated_quantize_input(
    gate: Tensor, up: Tensor, gain: Tensor | None, eps: float, activation: str
) -> tuple[Activation, Tensor]:
    """int8 codes of ``rms_norm(act(gate) * up, gain, eps)``, or without a gain of ``act(gate) * up``, and the anchor.

    Args:
        gate, up: (..., I) of one float dtype. gain: (I,) or None. eps: inside the square root.
        activation: one of training_norms.ACTIVATIONS.

    Returns: (Activation, anchor (..., I) in gate.dtype), differentiable in gate, up and gain.

    Raises:
        ValueError: another activation, or gate and up differ in shape or dtype.
    """
    if activation not in training_norms.ACTIVATIONS:
        known = " or ".join(training_norms.ACTIVATIONS)
        raise ValueError(f"activation: expected {known}; got {activation}. Others have no kernel.")
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"up: expected the shape and dtype of gate, {tuple(gate.shape)} {gate.dtype}; got {tuple(up.shape)} "
            f"{up.dtype}. Both come from the same input."
        )
    gelu = activation != "silu"
    if gate.dtype not in _COMPILED:
        h = (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up
        y = h if gain is None else reference.rms_norm(h, gain, eps)
        return quantize_input(y), y
    codes, scale, anchor = _GatedQuantize.apply(gate, up, gain, eps, gelu)
    return Activation(codes, scale), anchor


# --- weights -------------------------------------------------------------------------------------------------------------


def ternarize_each(weights: Sequence[Tensor]) -> list[Ternary]:
    """Codes and scales of any linears (O, I), side by side in memory; for `stacked`. ``reference.quantize_weight``, bit for bit.

    Raises:
        ValueError: a weight has no elements.
    """
    if any(weight.numel() == 0 for weight in weights):
        raise ValueError("weight: expected at least one element; got none. Under ZeRO-3 gather the parameter first.")
    masters = [weight.detach().float().contiguous() for weight in weights]
    sizes = np.array([weight.numel() for weight in masters])
    codes, scales = torch.empty(int(sizes.sum()), dtype=torch.int8), torch.empty(len(weights), dtype=torch.float32)
    pieces = -(-sizes // PIECE)
    tensor = np.repeat(np.arange(len(sizes)), pieces)
    first = np.concatenate([[0], np.cumsum(pieces)[:-1]])
    start = (np.arange(len(tensor)) - first[tensor]) * PIECE
    sums, table = np.empty(len(tensor)), np.empty((len(tensor), training_quantize.WORK), np.int64)
    table[:, 0] = np.array([weight.data_ptr() for weight in masters])[tensor] + 4 * start
    table[:, 1] = codes.data_ptr() + (np.cumsum(sizes) - sizes)[tensor] + start
    table[:, 2] = sums.ctypes.data + 8 * np.arange(len(tensor))
    table[:, 3] = scales.data_ptr() + 4 * tensor
    table[:, 4] = np.minimum(PIECE, sizes[tensor] - start)
    share_rows(training_quantize.weight_sums, len(table), PIECE, table.ctypes.data, block=1)
    means = torch.from_numpy(np.add.reduceat(sums, first) / sizes)
    scales.copy_(means.float().clamp_min_(EPSILON))
    share_rows(training_quantize.weight_codes, len(table), PIECE, table.ctypes.data, block=1)
    parts = codes.split(sizes.tolist())
    return [
        Ternary(part.view(weight.shape), scale, (weight.shape[0],))
        for part, weight, scale in zip(parts, masters, scales.split(1), strict=True)
    ]


def as_ternary(codes: Tensor, scale: Tensor) -> Ternary:
    """Codes int8 (O, I) and their scale fp32 () as one of `ternarize_each`."""
    return Ternary(codes, scale.view(1), (codes.shape[0],))


def stacked(parts: Sequence[Ternary]) -> Ternary:
    """Linears of one in_features side by side: a view where `ternarize_each` laid them so, else a copy; made once."""
    if len(parts) == 1:
        return parts[0]
    key = ("stacked", *map(id, parts[1:]))
    if key not in parts[0].kept:
        codes, scales = (
            _side_by_side([getattr(part, name) for part in parts]) for name in ("weight_codes", "weight_scale")
        )
        parts[0].kept[key] = Ternary(codes, scales, tuple(part.sizes[0] for part in parts)), parts[1:]
    return parts[0].kept[key][0]


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    ends = [tensor.storage_offset() + tensor.numel() for tensor in tensors]
    if len(storages) > 1 or [tensor.storage_offset() for tensor in tensors[1:]] != ends[:-1]:
        return torch.cat(list(tensors))
    shape = (sum(len(tensor) for tensor in tensors), *tensors[0].shape[1:])
    return tensors[0].as_strided(shape, tensors[0].stride())


@torch.compiler.disable
def ternarize(weights: Sequence[Tensor]) -> Ternary:
    """Codes and scales of linears (O_s, I) that share an input, stacked: ``reference.quantize_weight``, bit for bit."""
    return stacked(ternarize_each(weights))


# --- the linear ----------------------------------------------------------------------------------------------------------


def _scaled(
    acc: Tensor, row_scale: Tensor, column_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``acc * (row_scale * column_scale) + bias``; float32 takes the place of acc."""
    half = dtype == torch.bfloat16
    out = torch.empty(acc.shape, dtype=torch.bfloat16) if half else acc.view(torch.float32)
    rest = [0 if values is None else values.data_ptr() for values in (column_scale, bias)]
    work = (acc.data_ptr(), acc.shape[1], row_scale.data_ptr(), *rest, out.data_ptr(), half)
    share_rows(training_quantize.scale_rows, *acc.shape, *work)
    return out if dtype in _COMPILED else out.to(dtype)


class _TernaryLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, act_codes, act_scale, ternary, dtype, fast, segments, *parameters):
        codes = act_codes.reshape(-1, act_codes.shape[-1])
        biases = parameters[segments:]
        bias = torch.cat([bias.detach().float() for bias in biases]) if biases else None
        acc = ternary_product("forward", codes, ternary)
        y = _scaled(acc, act_scale, ternary.of_columns(), bias, dtype)
        ctx.save_for_backward(codes, act_scale)
        ctx.ternary, ctx.fast, ctx.segments = ternary, fast, segments
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    def backward(ctx, dy):
        codes, act_scale = ctx.saved_tensors
        ternary, segments, needs = ctx.ternary, ctx.segments, ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        gradients = _fast_gradients if ctx.fast else _exact_gradients
        with torch.autocast("cpu", enabled=False):
            dx, dw = gradients(rows, codes, act_scale, ternary, needs[0], any(needs[7 : 7 + segments]))
            dws, dbs = [None] * segments, [None] * (len(ctx.dtypes) - segments)
            if dw is not None:
                dws = dw.split(ternary.sizes)
            if any(needs[7 + segments :]):
                dbs = rows.sum(0, dtype=torch.float32).split(ternary.sizes)
        dx = None if dx is None else dx.view(ctx.x_shape).to(ctx.x_dtype)
        parameters = [None if d is None else d.to(dtype) for d, dtype in zip((*dws, *dbs), ctx.dtypes, strict=True)]
        return dx, None, None, None, None, None, None, *parameters


def _exact_gradients(dy, codes, act_scale, ternary, needs_x, needs_weight):
    """(dX, dW) in dY's dtype: float products, or int8 products of all digits of a float32 dY where these are faster."""
    if dy.dtype not in _COMPILED or not has_bf16_products():
        dy = dy.float()
    dx = dw = None
    work = (dy, codes, act_scale, ternary)
    if needs_x:
        dx = _exact_product("dX", _float_dx, _digit_dx, *work)
    if needs_weight:
        dw = _exact_product("dW", _float_dw, _digit_dw, *work)
    return dx, dw


def _float_dx(dy, _codes, _act_scale, ternary):
    return dy @ ternary.weight_codes.to(dy.dtype).mul_(ternary.of_columns().view(-1, 1))


def _float_dw(dy, codes, act_scale, _ternary):
    return dy.t() @ codes.to(dy.dtype).mul_(act_scale.view(-1, 1))


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


def _fast_gradients(dy, codes, act_scale, ternary, needs_x, needs_weight):
    """(dX, dW) fp32, int8 products; dW in floats where int8 times int8 is not exact."""
    dense = needs_weight and dense_products_are_exact()
    dx, dw = _in_parts(dy, codes, act_scale, ternary, needs_x, dense, 1)
    if needs_weight and not dense:
        dw = _exact_gradients(dy, codes, act_scale, ternary, False, True)[1]
    return dx, dw


def _in_parts(dy, codes, act_scale, ternary, needs_x, needs_weight, planes):
    """(dX, dW) fp32 from int8 codes of dY, of as many tokens at a time as an int32 can sum."""
    dxs, dw = [], None
    for part in range(0, max(1, len(dy)), TOKENS_OF_A_SUM):
        tokens = slice(part, part + TOKENS_OF_A_SUM)
        rest = (ternary, needs_x, needs_weight, planes)
        dx, add = _quantized_gradients(dy[tokens], codes[tokens], act_scale.view(-1)[tokens], *rest)
        dxs.append(dx)
        dw = add if dw is None else dw.add_(add)
    return (torch.cat(dxs) if len(dxs) > 1 else dxs[0]), dw


def _quantized_gradients(dy, codes, act_scale, ternary, needs_x, needs_weight, planes):
    rows, address, stride, half = _rows(dy)
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
    work = (address, stride, half, O, ternary.of_columns().data_ptr(), *pointers, N, planes)
    share_rows(training_quantize.gradient_codes, N, O, *work)
    if needs_x:
        dx = _joined(ternary_product("backward", row_codes, ternary), row_scale, planes)
    if needs_weight:
        width = codes.shape[1]
        acc = dense_product(column_codes.t(), codes) if N else torch.zeros((planes * O, width), dtype=torch.int32)
        dw = _joined(acc, column_scale, planes)
    return dx, dw


def _joined(acc: Tensor, row_scale: Tensor, planes: int) -> Tensor:
    """The fp32 product from the int32 ones of all planes, one below the other."""
    if planes == 1:
        return _scaled(acc, row_scale, None, None, torch.float32)
    rows, width = len(acc) // planes, acc.shape[1]
    out = torch.empty((rows, width), dtype=torch.float32)
    work = (acc.data_ptr(), 4 * rows * width, width, row_scale.data_ptr(), out.data_ptr())
    share_rows(training_quantize.join_rows, rows, width, *work)
    return out


@torch.compiler.disable
def ternary_linear(
    x: Tensor,
    activation: Activation,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    ternary: Ternary,
    dtype: torch.dtype,
    backward: str,
) -> Tensor:
    """``y_s = (act_codes @ weight_codes_s.T) * (act_scale * weight_scale_s) + bias_s``, s = 1..S, side by side.

    Backward, with ``x~ = act_scale * act_codes``: ``dX = sum_s dY_s W~_s``, ``dW_s = dY_s^T x~``, ``db_s = sum(dY_s)``.

    Args:
        x: (..., I), which `activation` are the codes of, or an anchor; gets dX. activation: codes and scale of x.
        weights: (O_s, I) each; get dW. biases: (O_s,) each, or empty. ternary: the codes of `weights`. dtype: of y.
        backward: "exact" (products in dY's dtype) or "fast" (int8 products of dY rounded to the nearest code).

    Returns: (..., O), O = sum of O_s, in `dtype`.

    Numerics: forward bit for bit the reference.
    """
    assert backward in ("exact", "fast"), backward
    return _TernaryLinear.apply(x, *activation, ternary, dtype, backward == "fast", len(weights), *weights, *biases)
