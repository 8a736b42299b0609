"""BitLinear on a GPU as PyTorch operators: with autograd, unaffected by autocast, and opaque to torch.compile (no graph
break).

    quantize_input(x)                             act_codes int8, act_scale
    norm_quantize_input(x, gain, eps)             the same of SubLN(x), and an anchor
    gated_quantize_input(gate, up, ...)           the same of SubLN(act(gate) * up), and an anchor
    ternarize(weights)                            weight_codes int8 of linears stacked, weight_scale of each
    ternary_linear(x, ...)                        y = int8 product * scales + bias, of linears on the same codes

int8 codes carry no gradient. The straight-through gradient therefore goes around them: `ternary_linear` gives its input
gradient to x, the tensor whose codes it multiplied, of which it reads only the shape. After a fused norm that tensor was
never computed. The fused operators therefore return an *anchor* in its place, with the shape and dtype of the normalized x
but memory for one value. The gradient that arrives there continues through the norm's backward pass.

Saved for backward: act_codes, act_scale, weight_codes, weight_scale; for a norm also x, or gate and up, and one number per
row. What backward="exact" and "fast" compute is explained in matmul.py. An int8 product needs scales that stand before its
sum. With weight scales of groups (and, in "exact", of rows) dX is therefore torch's product of dY with the dequantized codes,
in dY's dtype (groups.py), and so is dW with activation scales of blocks, also in "fast".

Suffixes: N tokens, I in_features, O out_features, S linears that share an input, G groups of columns, B blocks of a token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bitdistill.kernels.gpu import groups, matmul, norm_quantize, quantize, swiglu_quantize
from bitdistill.kernels.gpu.gradient_codes import quantize_gradient, transpose_codes
from bitdistill.kernels.numerics import ACT_BLOCK, TOKENS_OF_A_SUM
from bitdistill.kernels.views import concatenate


class Activation(NamedTuple):
    """``x ~ act_scale * act_codes``."""

    act_codes: Tensor  # int8 (..., I)
    act_scale: Tensor  # fp32 (..., 1); (..., B) of blocks of ACT_BLOCK columns


class Ternary(NamedTuple):
    """One or more linears, stacked: ``W_s ~ weight_scale[s] * weight_codes[rows of s]``."""

    weight_codes: Tensor  # int8 (O, I)
    weight_scale: Tensor  # fp32 (S,); (O, G) of rows and groups of columns
    columns: int = 0  # of such a group


# ---------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("bitdistill::quantize_activation", mutates_args=())
def _quantize_activation(x: Tensor, blocks: bool) -> tuple[Tensor, Tensor]:
    return tuple(quantize.quantize_activation(x, blocks))


@_quantize_activation.register_fake
def _(x, blocks):
    return x.new_empty(x.shape, dtype=torch.int8), _empty_scales(x, blocks)


def _empty_scales(x: Tensor, blocks: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], -(-x.shape[-1] // ACT_BLOCK) if blocks else 1), dtype=torch.float32)


@torch.library.custom_op("bitdistill::quantize_weights", mutates_args=())
def _quantize_weights(weights: Sequence[Tensor], columns: int) -> tuple[Tensor, Tensor]:
    return stacked(ternarize_each([weight.contiguous() for weight in weights], columns or None))[:2]


@_quantize_weights.register_fake
def _(weights, columns):
    first, rows = weights[0], sum(weight.shape[0] for weight in weights)
    codes = first.new_empty((rows, first.shape[1]), dtype=torch.int8)
    shape = (rows, -(-first.shape[1] // columns)) if columns else (len(weights),)
    return codes, first.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("bitdistill::rms_norm_quantize", mutates_args=())
def _rms_norm_quantize(x: Tensor, gain: Tensor, eps: float, blocks: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    quantized, rstd = norm_quantize.rms_norm_quantize(x, gain, eps, blocks)
    return quantized.act_codes, quantized.act_scale, rstd, _anchor(x)


@_rms_norm_quantize.register_fake
def _(x, gain, eps, blocks):
    codes = x.new_empty(x.shape, dtype=torch.int8)
    return codes, _empty_scales(x, blocks), _empty_scales(x, False), _anchor(x)


def _anchor(x: Tensor) -> Tensor:
    return x.new_zeros((1,) * x.dim()).expand(x.shape)


def _save_norm(ctx, inputs, output):
    x, gain, *_ = inputs
    codes, scale, rstd, _ = output
    ctx.mark_non_differentiable(codes, scale, rstd)
    ctx.set_materialize_grads(False)  # else autograd makes zeros for the gradients of all three
    ctx.save_for_backward(x, gain, rstd)


def _norm_gradients(ctx, _codes, _scale, _rstd, dy):
    x, gain, rstd = ctx.saved_tensors
    dx, dgain = torch.ops.bitdistill.rms_norm_quantize_backward(dy, x, gain, rstd)
    return dx, dgain, None, None


_rms_norm_quantize.register_autograd(_norm_gradients, setup_context=_save_norm)


@torch.library.custom_op("bitdistill::rms_norm_quantize_backward", mutates_args=())
def _rms_norm_quantize_backward(dy: Tensor, x: Tensor, gain: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dx, dgain = norm_quantize.rms_norm_quantize_backward(dy, x, gain, rstd)
    return dx, dgain.to(gain.dtype)


@_rms_norm_quantize_backward.register_fake
def _(dy, x, gain, rstd):
    return x.new_empty(x.shape), torch.empty_like(gain)


@torch.library.custom_op("bitdistill::swiglu_norm_quantize", mutates_args=())
def _swiglu_norm_quantize(
    gate: Tensor, up: Tensor, gain: Tensor | None, eps: float, activation: str, blocks: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    quantized, rstd = swiglu_quantize.swiglu_norm_quantize(gate, up, gain, eps, activation, blocks)
    rstd = gate.new_empty(0, dtype=torch.float32) if rstd is None else rstd
    return quantized.act_codes, quantized.act_scale, rstd, _anchor(gate)


@_swiglu_norm_quantize.register_fake
def _(gate, up, gain, eps, activation, blocks):
    rstd = gate.new_empty(0 if gain is None else (*gate.shape[:-1], 1), dtype=torch.float32)
    codes = gate.new_empty(gate.shape, dtype=torch.int8)
    return codes, _empty_scales(gate, blocks), rstd, _anchor(gate)


def _save_gated(ctx, inputs, output):
    gate, up, gain, _, ctx.activation, _ = inputs
    codes, scale, rstd, _ = output
    ctx.mark_non_differentiable(codes, scale, rstd)
    ctx.set_materialize_grads(False)  # else autograd makes zeros for the gradients of all three
    ctx.save_for_backward(gate, up, gain, rstd)


def _gated_gradients(ctx, _codes, _scale, _rstd, dy):
    gate, up, gain, rstd = ctx.saved_tensors
    gradients = torch.ops.bitdistill.swiglu_norm_quantize_backward(dy, gate, up, gain, rstd, ctx.activation)
    return *gradients[:2], None if gain is None else gradients[2], None, None, None


_swiglu_norm_quantize.register_autograd(_gated_gradients, setup_context=_save_gated)


@torch.library.custom_op("bitdistill::swiglu_norm_quantize_backward", mutates_args=())
def _swiglu_norm_quantize_backward(
    dy: Tensor, gate: Tensor, up: Tensor, gain: Tensor | None, rstd: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    rstd = None if gain is None else rstd
    dgate, dup, dgain = swiglu_quantize.swiglu_norm_quantize_backward(dy, gate, up, gain, rstd, activation)
    return dgate, dup, gate.new_empty(0) if gain is None else dgain.to(gain.dtype)


@_swiglu_norm_quantize_backward.register_fake
def _(dy, gate, up, gain, rstd, activation):
    dgain = gate.new_empty(0) if gain is None else torch.empty_like(gain)
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape), dgain


@torch.library.custom_op("bitdistill::ternary_linear", mutates_args=())
def _ternary_linear(
    x: Tensor,
    act_codes: Tensor,
    act_scale: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    weight_codes: Tensor,
    weight_scale: Tensor,
    columns: int,
    sizes: Sequence[int],
    dtype: torch.dtype,
    fast: bool,
) -> Tensor:
    bias = None if not biases else biases[0] if len(biases) == 1 else torch.cat(list(biases))
    if act_scale.shape[-1] > 1 or groups.is_grouped(weight_scale):
        factors = (act_codes, act_scale, weight_codes, weight_scale, columns)
        y = groups.grouped_linear(*factors, sizes, bias, dtype=dtype)
    else:
        y = matmul.int8_linear(act_codes, act_scale, weight_codes, weight_scale, sizes, bias, dtype=dtype)
    return y.view(*x.shape[:-1], y.shape[1])


@_ternary_linear.register_fake
def _(x, act_codes, act_scale, weights, biases, weight_codes, weight_scale, columns, sizes, dtype, fast):
    return x.new_empty((*x.shape[:-1], weight_codes.shape[0]), dtype=dtype)


def _save_linear(ctx, inputs, output):
    x, act_codes, act_scale, weights, biases, weight_codes, weight_scale, columns, sizes, _, fast = inputs
    ctx.save_for_backward(act_codes, act_scale, weight_codes, weight_scale)
    ctx.columns, ctx.sizes, ctx.fast, ctx.x_dtype = columns, list(sizes), fast, x.dtype
    ctx.weight_dtype, ctx.bias_dtypes = weights[0].dtype, [bias.dtype for bias in biases]


def _linear_gradients(ctx, dy):
    act_codes, act_scale, weight_codes, weight_scale = ctx.saved_tensors
    needs_x, needs_weights, needs_biases = (ctx.needs_input_grad[place] for place in (0, 3, 4))
    dx, dws, dbs = None, [None] * len(ctx.sizes), [None] * len(ctx.bias_dtypes)
    ops = torch.ops.bitdistill
    blocks, grouped = act_scale.shape[-1] > 1, groups.is_grouped(weight_scale)
    if ctx.fast and not (blocks and grouped):
        # Scales inside a sum have no int8 product: that gradient is computed below.
        of_tokens = act_scale.new_ones((*act_scale.shape[:-1], 1)) if blocks else act_scale
        of_weights, sizes = (weight_scale.new_ones(1), [len(weight_codes)]) if grouped else (weight_scale, ctx.sizes)
        dx, dw = ops.fast_gradients(
            dy, act_codes, of_tokens, weight_codes, of_weights, sizes, ctx.x_dtype, ctx.weight_dtype,
            not grouped, not blocks,
        )  # fmt: skip
        dx = None if grouped else dx
        dws = dws if blocks else list(dw.split(ctx.sizes))
    if needs_x and (grouped or not ctx.fast):
        dx = ops.grad_input(dy, weight_codes, weight_scale, ctx.columns, ctx.sizes, ctx.x_dtype)
    if any(needs_weights) and (blocks or not ctx.fast):
        dws = list(ops.grad_weight(dy, act_codes, act_scale, ctx.weight_dtype).split(ctx.sizes))
    if any(needs_biases):
        db = dy.flatten(0, -2).sum(0, dtype=torch.float32)
        dbs = [part.to(dtype) for part, dtype in zip(db.split(ctx.sizes), ctx.bias_dtypes, strict=True)]
    return dx, None, None, dws, dbs, None, None, None, None, None, None


_ternary_linear.register_autograd(_linear_gradients, setup_context=_save_linear)


@torch.library.custom_op("bitdistill::grad_input", mutates_args=())
def _grad_input(
    dy: Tensor, weight_codes: Tensor, weight_scale: Tensor, columns: int, sizes: Sequence[int], dtype: torch.dtype
) -> Tensor:
    if weight_scale.dim() == 2:
        dx = groups.dequantized_product(dy.flatten(0, -2), weight_codes, weight_scale, columns, dtype)
    else:
        dx = matmul.grad_input(dy, weight_codes, weight_scale, sizes, dtype)
    return dx.view(*dy.shape[:-1], dx.shape[1])


@_grad_input.register_fake
def _(dy, weight_codes, weight_scale, columns, sizes, dtype):
    return dy.new_empty((*dy.shape[:-1], weight_codes.shape[1]), dtype=dtype)


@torch.library.custom_op("bitdistill::grad_weight", mutates_args=())
def _grad_weight(dy: Tensor, act_codes: Tensor, act_scale: Tensor, dtype: torch.dtype) -> Tensor:
    if act_scale.shape[-1] == 1:
        return matmul.grad_weight(dy, act_codes, act_scale, dtype)
    codes, scale = act_codes.flatten(0, -2), act_scale.flatten(0, -2)
    return groups.dequantized_product(dy.flatten(0, -2).t(), codes, scale, ACT_BLOCK, dtype)


@_grad_weight.register_fake
def _(dy, act_codes, act_scale, dtype):
    return dy.new_empty((dy.shape[-1], act_codes.shape[-1]), dtype=dtype)


@torch.library.custom_op("bitdistill::fast_gradients", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _fast_gradients(
    dy: Tensor,
    act_codes: Tensor,
    act_scale: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    sizes: Sequence[int],
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    of_x: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    """dX and dW; the one that is not wanted is empty."""
    rows, codes, scale = dy.flatten(0, -2), act_codes.flatten(0, -2), act_scale.flatten()
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    (N, O), I = rows.shape, weight_codes.shape[1]
    dxs, dw = [dy.new_empty((0, I), dtype=x_dtype)], dy.new_zeros((O if of_weight else 0, I), dtype=weight_dtype)
    weight_codes_T = transpose_codes(weight_codes)[:, :O] if of_x and N else None
    for start in range(0, N, TOKENS_OF_A_SUM):
        part = slice(start, start + TOKENS_OF_A_SUM)
        seed = int(torch.randint(2**31 - 1, ()))  # from the CPU's generator: no wait for the GPU
        gradient = quantize_gradient(rows[part], scale[part], weight_scale, sizes, seed)
        if of_x:
            add = matmul.int8_linear(gradient.row_codes, gradient.row_scale, weight_codes_T, None, dtype=x_dtype)
            dxs.append(add)
        if of_weight:
            codes_T = transpose_codes(codes[part])
            add = matmul.int8_linear(gradient.column_codes, gradient.column_scale, codes_T, None, dtype=weight_dtype)
            dw = add if start == 0 else dw.add_(add)
    dx = dxs[-1] if len(dxs) <= 2 else torch.cat(dxs)
    return dx.view(*dy.shape[:-1], I) if of_x else dx, dw


@_fast_gradients.register_fake
def _(dy, act_codes, act_scale, weight_codes, weight_scale, sizes, x_dtype, weight_dtype, of_x, of_weight):
    O, I = weight_codes.shape
    dx = dy.new_empty((*dy.shape[:-1], I) if of_x else (0, I), dtype=x_dtype)
    return dx, dy.new_empty((O if of_weight else 0, I), dtype=weight_dtype)


# ---------------------------------------------------------------------------------------------------- functions


def quantize_input(x: Tensor, act_scale: str = "token") -> Activation:
    """int8 codes of x (..., I): ``reference.quantize_activation``, or `quantize_activation_blocks`, bit for bit. No gradient.

    Args:
        x: (..., I) fp32, bf16 or fp16. act_scale: what has a scale of its own, "token" or "block".
    """
    return Activation(*_quantize_activation(x.detach(), act_scale == "block"))


def norm_quantize_input(x: Tensor, gain: Tensor, eps: float, act_scale: str = "token") -> tuple[Activation, Tensor]:
    """int8 codes of ``rms_norm(x, gain, eps)``, and the anchor through which its gradient flows.

    Args:
        x: (..., I) fp32, bf16 or fp16. gain: (I,). eps: inside the square root. act_scale: as in `quantize_input`.

    Returns: (Activation, anchor (..., I) in x.dtype, zeros that take no memory), differentiable in x and gain.
    """
    act_codes, scale, _, anchor = _rms_norm_quantize(x, gain, eps, act_scale == "block")
    return Activation(act_codes, scale), anchor


def gated_quantize_input(
    gate: Tensor, up: Tensor, gain: Tensor | None, eps: float, activation: str, act_scale: str = "token"
) -> tuple[Activation, Tensor]:
    """int8 codes of ``rms_norm(act(gate) * up, gain, eps)``, or without a gain of ``act(gate) * up``, and the anchor.

    Args:
        gate, up: (..., I) fp32, bf16 or fp16. gain: (I,) or None. activation: one of numerics.ACTIVATIONS.
        eps: of the norm. act_scale: as in `quantize_input`.

    Returns: (Activation, anchor (..., I) in gate.dtype), differentiable in gate, up and gain.
    """
    blocks = act_scale == "block"
    act_codes, scale, _, anchor = _swiglu_norm_quantize(gate, up, gain, eps, activation, blocks)
    return Activation(act_codes, scale), anchor


def ternarize(weights: Sequence[Tensor], columns: int | None = None) -> Ternary:
    """Codes and scales of linears (O_s, I) that share an input, stacked: ``reference.quantize_weight``, or
    `quantize_weight_groups` with `columns`, bit for bit.

    Args:
        weights: of one dtype and device.
        columns: of a group with a scale of its own: 32 times a power of two; I or more for one scale per row, None for one
            per linear.
    """
    return Ternary(*_quantize_weights([weight.detach() for weight in weights], columns or 0), columns or 0)


def ternarize_each(weights: Sequence[Tensor], columns: int | None = None) -> list[quantize.TernaryWeight]:
    """Codes and scales of any linears (O, I) of one dtype and device, in one launch without `columns`; for `stacked`.

    Args:
        weights, columns: as in `ternarize`.
    """
    masters = [weight.detach() for weight in weights]
    return quantize.quantize_weights(masters) if columns is None else groups.quantize_weight_groups(masters, columns)


def as_ternary(codes: Tensor, scale: Tensor) -> quantize.TernaryWeight:
    """Codes int8 (O, I) and their scale fp32 () as one of `ternarize_each`."""
    return quantize.TernaryWeight(codes, scale)


def stacked(parts: Sequence[quantize.TernaryWeight]) -> Ternary:
    """Linears of one in_features side by side: a view where `ternarize_each` laid them so (neighbors whose sizes 16
    divides), else a copy."""
    columns = parts[0].columns
    scales = [part.weight_scale if columns else part.weight_scale.view(1) for part in parts]
    return Ternary(concatenate([part.weight_codes for part in parts], 0), concatenate(scales, 0), columns)


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
    of groups of columns or of blocks of activations the sums of groups.py.

    Backward, with ``x~ = act_scale * act_codes``: ``dX = sum_s dY_s W~_s``, ``dW_s = dY_s^T x~``, ``db_s = sum(dY_s)``.

    Args:
        x: (..., I), which `activation` are the codes of, or an anchor; gets dX. weights: (O_s, I) each; get dW.
        biases: (O_s,) each, or empty. ternary: the codes of `weights`. dtype: of y.
        backward: "exact" (products in dY's dtype) or "fast" (int8 products, stochastic rounding; with groups dX and with
            blocks dW as in "exact").
        activation: the int8 codes and scales of x.

    Returns: (..., O), O = sum of O_s, in `dtype`.

    Numerics: forward bit for bit the reference but for the rounding of ``acc * scale + bias`` (one instead of two).
    """
    assert backward in ("exact", "fast"), backward
    sizes = [weight.shape[0] for weight in weights]
    return _ternary_linear(x, *activation, list(weights), list(biases), *ternary, sizes, dtype, backward == "fast")
