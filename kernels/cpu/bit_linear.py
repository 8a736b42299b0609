"""BitLinear on a CPU: compiled quantizers, int8 products, and their gradients. It has the interface of
kernels/gpu/bit_linear.py.

    quantize_input(x)                             act_codes int8, act_scale
    norm_quantize_input(x, gain, eps)             the same of SubLN(x), and an anchor
    gated_quantize_input(gate, up, ...)           the same of SubLN(act(gate) * up), and an anchor
    ternarize(weights)                            weight_codes int8 of linears stacked, weight_scale of each
    ternary_linear(x, ...)                        y = int8 product * scales + bias, of linears on the same codes

As on a GPU, the straight-through gradient goes around the int8 codes. `ternary_linear` gives its input gradient to x, of
which it reads only the shape. After a fused norm x does not exist; an *anchor* with memory for one value takes its place.

Weights may have scales of rows or of groups of columns in place of one each, activations scales of blocks of 32 columns in place
of one per token; training_groups.py has the products then.

Saved for backward: act_codes, act_scale, weight_codes, weight_scale; for a norm x, or gate and up, and one number per row. What
backward="exact" and "fast" compute is explained in training_gradients.py.

torch.compile leaves these functions alone: its graph is broken around them.
Suffixes: N tokens, I in_features, O out_features, S linears that share an input.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bitdistill.kernels import reference
from bitdistill.kernels.cpu import training_norms, training_quantize
from bitdistill.kernels.cpu.rows import BLOCK, COMPILED, rows_of, share_rows
from bitdistill.kernels.cpu.training_gradients import digit_gradients, exact_gradients, fast_gradients
from bitdistill.kernels.cpu.training_groups import grouped_product
from bitdistill.kernels.cpu.training_products import Ternary, has_products, leave_out_products, scaled, scaled_product
from bitdistill.kernels.numerics import ACT_BLOCK, ACTIVATIONS, EPSILON
from bitdistill.kernels.views import concatenate

PIECE = 1 << 16  # weights that are quantized at a time
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
    act_scale: Tensor  # fp32 (..., 1), or (..., ceil(I / ACT_BLOCK)) of blocks


# --- quantizers ----------------------------------------------------------------------------------------------------------


def _empty_codes(x: Tensor, act_scale: str) -> tuple[Tensor, Tensor, int]:
    """Where codes and scales go, and how many columns share a scale."""
    width = x.shape[-1]
    if width == 0:
        raise ValueError("x: expected a last dimension of at least 1; got 0")
    part = ACT_BLOCK if act_scale == "block" else width
    scale = torch.empty((*x.shape[:-1], -(-width // part)), dtype=torch.float32)
    return torch.empty(x.shape, dtype=torch.int8), scale, part


@torch.compiler.disable
def quantize_input(x: Tensor, act_scale: str = "token") -> Activation:
    """int8 codes of x, bit for bit ``reference.quantize_activation`` or `quantize_activation_blocks`. No gradient.

    Args:
        x: (..., I), any float dtype. act_scale: what has a scale of its own, "token" or "block".
    """
    codes, scale, part = _empty_codes(x, act_scale)
    rows, address, stride, half = rows_of(x)
    work = (address, stride, half, rows.shape[1], part, codes.data_ptr(), scale.data_ptr())
    share_rows(training_quantize.quantize_rows, *rows.shape, *work)
    return Activation(codes, scale)


def _anchor(x: Tensor) -> Tensor:
    return x.new_zeros((1,) * x.dim()).expand(x.shape)


def _gain(gain: Tensor) -> Tensor:
    return gain.detach().float().contiguous()


class _NormQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gain, eps, act_scale):
        codes, scale, part = _empty_codes(x, act_scale)
        rstd, gains = torch.empty((*x.shape[:-1], 1), dtype=torch.float32), _gain(gain)
        rows, address, stride, half = rows_of(x)
        work = (address, stride, half, rows.shape[1], part, gains.data_ptr(), np.float32(eps))
        outputs = (codes.data_ptr(), scale.data_ptr(), rstd.data_ptr())
        share_rows(training_norms.norm_quantize_rows, *rows.shape, *work, *outputs)
        ctx.mark_non_differentiable(codes, scale)
        ctx.set_materialize_grads(False)  # else autograd makes zeros for the gradients of codes and scale
        ctx.save_for_backward(x, gain, rstd)
        return codes, scale, _anchor(x)

    @staticmethod
    def backward(ctx, _codes, _scale, dy):
        x, gain, rstd = ctx.saved_tensors
        rows, address, stride, half = rows_of(x)
        _grads, grad_address, grad_stride, grad_half = rows_of(dy)
        dx, gains = torch.empty_like(rows, memory_format=torch.contiguous_format), _gain(gain)
        parts = torch.empty((-(-len(rows) // BLOCK), rows.shape[1]), dtype=torch.float32)
        work = (grad_address, grad_stride, grad_half, address, stride, half, rows.shape[1], gains.data_ptr())
        outputs = (rstd.data_ptr(), dx.data_ptr(), parts.data_ptr())
        share_rows(training_norms.norm_backward_rows, *rows.shape, *work, *outputs)
        return dx.view(x.shape), parts.sum(0).to(gain.dtype), None, None


class _GatedQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, gain, eps, gelu, act_scale):
        codes, scale, part = _empty_codes(gate, act_scale)
        rstd = torch.empty((*gate.shape[:-1], 1), dtype=torch.float32)
        gains = None if gain is None else _gain(gain)
        rows, address, stride, half = rows_of(gate)
        _ups, up_address, up_stride, _ = rows_of(up)
        work = (
            address,
            stride,
            up_address,
            up_stride,
            half,
            rows.shape[1],
            part,
            gelu,
            0 if gain is None else gains.data_ptr(),
        )
        outputs = (np.float32(eps), codes.data_ptr(), scale.data_ptr(), rstd.data_ptr())
        share_rows(training_norms.gated_quantize_rows, *rows.shape, *work, *outputs)
        ctx.mark_non_differentiable(codes, scale)
        ctx.set_materialize_grads(False)  # else autograd makes zeros for the gradients of codes and scale
        ctx.save_for_backward(gate, up, gain, rstd)
        ctx.gelu = gelu
        return codes, scale, _anchor(gate)

    @staticmethod
    def backward(ctx, _codes, _scale, dy):
        gate, up, gain, rstd = ctx.saved_tensors
        rows, address, stride, half = rows_of(gate)
        _ups, up_address, up_stride, _ = rows_of(up)
        _grads, grad_address, grad_stride, grad_half = rows_of(dy)
        gains = None if gain is None else _gain(gain)
        # side by side, as the product that made gate and up wants their gradient
        both = torch.empty((*gate.shape[:-1], 2 * rows.shape[1]), dtype=rows.dtype)
        dgate, dup = both.chunk(2, dim=-1)
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
            2 * rows.shape[1] * rows.element_size(),
            parts.data_ptr(),
        )
        share_rows(training_norms.gated_backward_rows, *rows.shape, *work, *outputs)
        dgain = None if gain is None else parts.sum(0).to(gain.dtype)
        return dgate, dup, dgain, None, None, None


@torch.compiler.disable
def norm_quantize_input(x: Tensor, gain: Tensor, eps: float, act_scale: str = "token") -> tuple[Activation, Tensor]:
    """int8 codes of ``rms_norm(x, gain, eps)``, and the anchor through which its gradient flows.

    Args:
        x: (..., I), any float dtype. gain: (I,). eps: inside the square root. act_scale: as in `quantize_input`.

    Returns: (Activation, anchor (..., I) in x.dtype, zeros that take no memory), differentiable in x and gain.

    Numerics: fp32, rounded to bf16 before quantization where x is bf16; float16 is normalized by PyTorch.
    """
    if x.dtype not in COMPILED:
        y = reference.rms_norm(x, gain, eps)
        return quantize_input(y, act_scale), y
    codes, scale, anchor = _NormQuantize.apply(x, gain, eps, act_scale)
    return Activation(codes, scale), anchor


@torch.compiler.disable
def gated_quantize_input(
    gate: Tensor, up: Tensor, gain: Tensor | None, eps: float, activation: str, act_scale: str = "token"
) -> tuple[Activation, Tensor]:
    """int8 codes of ``rms_norm(act(gate) * up, gain, eps)``, or without a gain of ``act(gate) * up``, and the anchor.

    Args:
        gate, up: (..., I) of one float dtype. gain: (I,) or None. eps: inside the square root.
        activation: one of numerics.ACTIVATIONS. act_scale: as in `quantize_input`.

    Returns: (Activation, anchor (..., I) in gate.dtype), differentiable in gate, up and gain.

    Raises:
        ValueError: another activation, or gate and up differ in shape or dtype.
    """
    if activation not in ACTIVATIONS:
        known = " or ".join(ACTIVATIONS)
        raise ValueError(f"activation: expected {known}; got {activation}. Others have no kernel.")
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"up: expected the shape and dtype of gate, {tuple(gate.shape)} {gate.dtype}; got {tuple(up.shape)} "
            f"{up.dtype}. Both come from the same input."
        )
    gelu = activation != "silu"
    if gate.dtype not in COMPILED:
        h = (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up
        y = h if gain is None else reference.rms_norm(h, gain, eps)
        return quantize_input(y, act_scale), y
    codes, scale, anchor = _GatedQuantize.apply(gate, up, gain, eps, gelu, act_scale)
    return Activation(codes, scale), anchor


# --- weights -------------------------------------------------------------------------------------------------------------


def ternarize_each(weights: Sequence[Tensor], columns: int | None = None) -> list[Ternary]:
    """Codes and scales of any linears, side by side in memory; for `stacked`. Bit for bit ``reference.quantize_weight``, or
    `quantize_weight_groups` with `columns`.

    Args:
        weights: (O, I) each. columns: of a group with a scale of its own; I or more for one per row, None for one per linear.

    Raises:
        ValueError: a weight has no elements.
    """
    if any(weight.numel() == 0 for weight in weights):
        raise ValueError("weight: expected at least one element; got none. Under ZeRO-3 gather the parameter first.")
    masters = [weight.detach().float().contiguous() for weight in weights]
    if columns is not None:
        return _ternarize_groups(masters, columns)
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


def _ternarize_groups(masters: Sequence[Tensor], columns: int) -> list[Ternary]:
    groups = [-(-weight.shape[1] // columns) for weight in masters]
    counts = [weight.shape[0] * count for weight, count in zip(masters, groups, strict=True)]
    sizes = [weight.numel() for weight in masters]
    codes = torch.empty(sum(sizes), dtype=torch.int8).split(sizes)
    scales = torch.empty(sum(counts), dtype=torch.float32).split(counts)
    parts = []
    for weight, part, scale, count in zip(masters, codes, scales, groups, strict=True):
        work = (weight.data_ptr(), weight.shape[1], columns, part.data_ptr(), scale.data_ptr())
        share_rows(training_quantize.weight_groups, *weight.shape, *work)
        parts.append(Ternary(part.view(weight.shape), scale.view(-1, count), (weight.shape[0],), columns))
    return parts


def stacked(parts: Sequence[Ternary]) -> Ternary:
    """Linears of one in_features side by side: a view where `ternarize_each` laid them so, else a copy; made once."""
    if len(parts) == 1:
        return parts[0]
    key = ("stacked", *map(id, parts[1:]))
    if key not in parts[0].kept:
        codes, scales = (
            concatenate([getattr(part, name) for part in parts], 0) for name in ("weight_codes", "weight_scale")
        )
        sizes = tuple(part.sizes[0] for part in parts)
        parts[0].kept[key] = Ternary(codes, scales, sizes, parts[0].columns), parts[1:]
    return parts[0].kept[key][0]


@torch.compiler.disable
def ternarize(weights: Sequence[Tensor], columns: int | None = None) -> Ternary:
    """`ternarize_each` of linears (O_s, I) that share an input, stacked.

    Args:
        weights, columns: as there.
    """
    return stacked(ternarize_each(weights, columns))


# --- the linear ----------------------------------------------------------------------------------------------------------


def _product(codes: Tensor, act_scale: Tensor, ternary: Ternary, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(N, O) in dtype: what stands before the sum over columns is multiplied last, and the bias is added."""
    blocks, grouped = act_scale.shape[1] > 1, ternary.grouped()
    by_row, by_column = None if blocks else act_scale, None if grouped else ternary.of_columns()
    if blocks or grouped:
        return scaled(grouped_product(codes, act_scale, ternary, dtype), by_row, by_column, bias, dtype)
    return scaled_product("forward", codes, ternary, by_row, by_column, bias, dtype)


class _TernaryLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, act_codes, act_scale, ternary, dtype, fast, segments, *parameters):
        codes = act_codes.reshape(-1, act_codes.shape[-1])
        biases = parameters[segments:]
        bias = torch.cat([bias.detach().float() for bias in biases]) if biases else None
        act_scale = act_scale.reshape(len(codes), act_scale.shape[-1])
        y = _product(codes, act_scale, ternary, bias, dtype)
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
        gradients = fast_gradients if ctx.fast else exact_gradients
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
    """``y_s = (act_codes @ weight_codes_s.T) * (act_scale * weight_scale_s) + bias_s``, s = 1..S, side by side; with scales
    of groups of columns or of blocks of activations the sums of training_groups.py.

    Backward, with ``x~ = act_scale * act_codes``: ``dX = sum_s dY_s W~_s``, ``dW_s = dY_s^T x~``, ``db_s = sum(dY_s)``.

    Args:
        x: (..., I), which `activation` are the codes of, or an anchor; gets dX. activation: codes and scale of x.
        weights: (O_s, I) each; get dW. biases: (O_s,) each, or empty. ternary: the codes of `weights`. dtype: of y.
        backward: "exact" (products in dY's dtype) or "fast" (int8 products of dY rounded to the nearest code).

    Returns: (..., O), O = sum of O_s, in `dtype`.

    Numerics: forward bit for bit the reference; with groups or blocks the sum of floats may have another order.
    """
    assert backward in ("exact", "fast"), backward
    return _TernaryLinear.apply(x, *activation, ternary, dtype, backward == "fast", len(weights), *weights, *biases)
