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
row. What backward="exact" and "fast" compute is explained in matmul.py.

Suffixes: N tokens, I in_features, O out_features, S linears that share an input.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bitdistill.kernels.gpu import matmul, norm_quantize, quantize, swiglu_quantize
from bitdistill.kernels.gpu.gradient_codes import quantize_gradient, transpose_codes

TOKENS_OF_A_SUM = 2**17  # of int8 times int8, in int32


class Activation(NamedTuple):
    """``x ~ act_scale * act_codes``."""

    act_codes: Tensor  # int8 (..., I)
    act_scale: Tensor  # fp32 (..., 1)


class Ternary(NamedTuple):
    """One or more linears, stacked: ``W_s ~ weight_scale[s] * weight_codes[rows of s]``."""

    weight_codes: Tensor  # int8 (O, I)
    weight_scale: Tensor  # fp32 (S,)


# ---------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("bitdistill::quantize_activation", mutates_args=())
def _quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(quantize.quantize_activation(x))


@_quantize_activation.register_fake
def _(x):
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.custom_op("bitdistill::quantize_weights", mutates_args=())
def _quantize_weights(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    codes, scale = stacked(quantize.quantize_weights([weight.contiguous() for weight in weights]))
    return codes, scale


@_quantize_weights.register_fake
def _(weights):
    first, rows = weights[0], sum(weight.shape[0] for weight in weights)
    codes = first.new_empty((rows, first.shape[1]), dtype=torch.int8)
    return codes, first.new_empty((len(weights),), dtype=torch.float32)


@torch.library.custom_op("bitdistill::rms_norm_quantize", mutates_args=())
def _rms_norm_quantize(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    quantized, rstd = norm_quantize.rms_norm_quantize(x, gain, eps)
    return quantized.act_codes, quantized.act_scale, rstd, _anchor(x)


@_rms_norm_quantize.register_fake
def _(x, gain, eps):
    vector = (*x.shape[:-1], 1)
    codes = x.new_empty(x.shape, dtype=torch.int8)
    return codes, x.new_empty(vector, dtype=torch.float32), x.new_empty(vector, dtype=torch.float32), _anchor(x)


def _anchor(x: Tensor) -> Tensor:
    return x.new_zeros((1,) * x.dim()).expand(x.shape)


def _save_norm(ctx, inputs, output):
    x, gain, _ = inputs
    codes, scale, rstd, _ = output
    ctx.mark_non_differentiable(codes, scale, rstd)
    ctx.save_for_backward(x, gain, rstd)


def _norm_gradients(ctx, _codes, _scale, _rstd, dy):
    x, gain, rstd = ctx.saved_tensors
    dx, dgain = torch.ops.bitdistill.rms_norm_quantize_backward(dy, x, gain, rstd)
    return dx, dgain, None


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
    gate: Tensor, up: Tensor, gain: Tensor | None, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    quantized, rstd = swiglu_quantize.swiglu_norm_quantize(gate, up, gain, eps, activation)
    rstd = gate.new_empty(0, dtype=torch.float32) if rstd is None else rstd
    return quantized.act_codes, quantized.act_scale, rstd, _anchor(gate)


@_swiglu_norm_quantize.register_fake
def _(gate, up, gain, eps, activation):
    vector = (*gate.shape[:-1], 1)
    rstd = gate.new_empty(0 if gain is None else vector, dtype=torch.float32)
    codes = gate.new_empty(gate.shape, dtype=torch.int8)
    return codes, gate.new_empty(vector, dtype=torch.float32), rstd, _anchor(gate)


def _save_gated(ctx, inputs, output):
    gate, up, gain, _, ctx.activation = inputs
    codes, scale, rstd, _ = output
    ctx.mark_non_differentiable(codes, scale, rstd)
    ctx.save_for_backward(gate, up, gain, rstd)


def _gated_gradients(ctx, _codes, _scale, _rstd, dy):
    gate, up, gain, rstd = ctx.saved_tensors
    gradients = torch.ops.bitdistill.swiglu_norm_quantize_backward(dy, gate, up, gain, rstd, ctx.activation)
    return *gradients[:2], None if gain is None else gradients[2], None, None


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
    sizes: Sequence[int],
    dtype: torch.dtype,
    fast: bool,
) -> Tensor:
    bias = None if not biases else biases[0] if len(biases) == 1 else torch.cat(list(biases))
    y = matmul.int8_linear(act_codes, act_scale, weight_codes, weight_scale, sizes, bias, dtype=dtype)
    return y.view(*x.shape[:-1], y.shape[1])


@_ternary_linear.register_fake
def _(x, act_codes, act_scale, weights, biases, weight_codes, weight_scale, sizes, dtype, fast):
    return x.new_empty((*x.shape[:-1], weight_codes.shape[0]), dtype=dtype)


def _save_linear(ctx, inputs, output):
    x, act_codes, act_scale, weights, biases, weight_codes, weight_scale, sizes, _, fast = inputs
    ctx.save_for_backward(act_codes, act_scale, weight_codes, weight_scale)
    ctx.sizes, ctx.fast, ctx.x_dtype = list(sizes), fast, x.dtype
    ctx.weight_dtype, ctx.bias_dtypes = weights[0].dtype, [bias.dtype for bias in biases]


def _linear_gradients(ctx, dy):
    act_codes, act_scale, weight_codes, weight_scale = ctx.saved_tensors
    needs_x, needs_weights, needs_biases = (ctx.needs_input_grad[place] for place in (0, 3, 4))
    dx, dws, dbs = None, [None] * len(ctx.sizes), [None] * len(ctx.bias_dtypes)
    ops = torch.ops.bitdistill
    if ctx.fast:
        dx, dw = ops.fast_gradients(
            dy, act_codes, act_scale, weight_codes, weight_scale, ctx.sizes, ctx.x_dtype, ctx.weight_dtype
        )
        dws = list(dw.split(ctx.sizes))
    else:
        if needs_x:
            dx = ops.grad_input(dy, weight_codes, weight_scale, ctx.sizes, ctx.x_dtype)
        if any(needs_weights):
            dws = list(ops.grad_weight(dy, act_codes, act_scale, ctx.weight_dtype).split(ctx.sizes))
    if any(needs_biases):
        db = dy.flatten(0, -2).sum(0, dtype=torch.float32)
        dbs = [part.to(dtype) for part, dtype in zip(db.split(ctx.sizes), ctx.bias_dtypes, strict=True)]
    return dx, None, None, dws, dbs, None, None, None, None, None


_ternary_linear.register_autograd(_linear_gradients, setup_context=_save_linear)


@torch.library.custom_op("bitdistill::grad_input", mutates_args=())
def _grad_input(
    dy: Tensor, weight_codes: Tensor, weight_scale: Tensor, sizes: Sequence[int], dtype: torch.dtype
) -> Tensor:
    dx = matmul.grad_input(dy, weight_codes, weight_scale, sizes, dtype)
    return dx.view(*dy.shape[:-1], dx.shape[1])


@_grad_input.register_fake
def _(dy, weight_codes, weight_scale, sizes, dtype):
    return dy.new_empty((*dy.shape[:-1], weight_codes.shape[1]), dtype=dtype)


@torch.library.custom_op("bitdistill::grad_weight", mutates_args=())
def _grad_weight(dy: Tensor, act_codes: Tensor, act_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return matmul.grad_weight(dy, act_codes, act_scale, dtype)


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
) -> tuple[Tensor, Tensor]:
    rows, codes, scale = dy.flatten(0, -2), act_codes.flatten(0, -2), act_scale.flatten()
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    (N, O), I = rows.shape, weight_codes.shape[1]
    if N == 0:
        return dy.new_empty((*dy.shape[:-1], I), dtype=x_dtype), dy.new_zeros((O, I), dtype=weight_dtype)
    weight_codes_T = transpose_codes(weight_codes)[:, :O]
    dxs, dw = [], None
    for start in range(0, N, TOKENS_OF_A_SUM):
        part = slice(start, start + TOKENS_OF_A_SUM)
        seed = int(torch.randint(2**31 - 1, ()))  # from the CPU's generator: no wait for the GPU
        gradient = quantize_gradient(rows[part], scale[part], weight_scale, sizes, seed)
        dxs.append(matmul.int8_linear(gradient.row_codes, gradient.row_scale, weight_codes_T, None, dtype=x_dtype))
        codes_T = transpose_codes(codes[part])
        add = matmul.int8_linear(gradient.column_codes, gradient.column_scale, codes_T, None, dtype=weight_dtype)
        dw = add if dw is None else dw.add_(add)
    dx = dxs[0] if len(dxs) == 1 else torch.cat(dxs)
    return dx.view(*dy.shape[:-1], I), dw


@_fast_gradients.register_fake
def _(dy, act_codes, act_scale, weight_codes, weight_scale, sizes, x_dtype, weight_dtype):
    dx = dy.new_empty((*dy.shape[:-1], weight_codes.shape[1]), dtype=x_dtype)
    return dx, dy.new_empty((weight_codes.shape[0], weight_codes.shape[1]), dtype=weight_dtype)


# ---------------------------------------------------------------------------------------------------- functions


def knows(columns: int | None, act_scale: str) -> bool:
    """Whether these kernels have weight scales of groups of `columns` (None: one per linear) and activation scales per
    `act_scale`: they have one per linear and one per token."""
    return columns is None and act_scale == "token"


def quantize_input(x: Tensor, act_scale: str = "token") -> Activation:
    """Per-token int8 codes of x (..., I): ``reference.quantize_activation``, bit for bit. No gradient.

    Args:
        x: (..., I) fp32, bf16 or fp16. act_scale: "token" (`knows`).
    """
    assert knows(None, act_scale)
    return Activation(*_quantize_activation(x.detach()))


def norm_quantize_input(x: Tensor, gain: Tensor, eps: float, act_scale: str = "token") -> tuple[Activation, Tensor]:
    """int8 codes of ``rms_norm(x, gain, eps)``, and the anchor through which its gradient flows.

    Args:
        x: (..., I) fp32, bf16 or fp16. gain: (I,). eps: inside the square root. act_scale: "token".

    Returns: (Activation, anchor (..., I) in x.dtype, zeros that take no memory), differentiable in x and gain.
    """
    assert knows(None, act_scale)
    act_codes, scale, _, anchor = _rms_norm_quantize(x, gain, eps)
    return Activation(act_codes, scale), anchor


def gated_quantize_input(
    gate: Tensor, up: Tensor, gain: Tensor | None, eps: float, activation: str, act_scale: str = "token"
) -> tuple[Activation, Tensor]:
    """int8 codes of ``rms_norm(act(gate) * up, gain, eps)``, or without a gain of ``act(gate) * up``, and the anchor.

    Args:
        gate, up: (..., I) fp32, bf16 or fp16. gain: (I,) or None. activation: one of swiglu_quantize.ACTIVATIONS.
        eps: of the norm. act_scale: "token".

    Returns: (Activation, anchor (..., I) in gate.dtype), differentiable in gate, up and gain.
    """
    assert knows(None, act_scale)
    act_codes, scale, _, anchor = _swiglu_norm_quantize(gate, up, gain, eps, activation)
    return Activation(act_codes, scale), anchor


def ternarize(weights: Sequence[Tensor], columns: int | None = None) -> Ternary:
    """Codes and scales of linears (O_s, I) that share an input, stacked: ``reference.quantize_weight``, bit for bit.

    Args:
        weights: of one dtype and device. columns: None (`knows`).
    """
    assert knows(columns, "token")
    return Ternary(*_quantize_weights([weight.detach() for weight in weights]))


def ternarize_each(weights: Sequence[Tensor], columns: int | None = None) -> list[quantize.TernaryWeight]:
    """Codes and scales of any linears (O, I) of one dtype and device, in one launch; for `stacked`.

    Args:
        weights, columns: as in `ternarize`.
    """
    assert knows(columns, "token")
    return quantize.quantize_weights([weight.detach() for weight in weights])


def as_ternary(codes: Tensor, scale: Tensor) -> quantize.TernaryWeight:
    """Codes int8 (O, I) and their scale fp32 () as one of `ternarize_each`."""
    return quantize.TernaryWeight(codes, scale)


def stacked(parts: Sequence[quantize.TernaryWeight]) -> Ternary:
    """Linears of one in_features side by side: a view where `ternarize_each` laid them so (neighbors whose sizes 16
    divides), else a copy."""
    codes, scales = [part.weight_codes for part in parts], [part.weight_scale for part in parts]
    if not (_adjacent(codes) and _adjacent(scales)):
        return Ternary(torch.cat(codes), torch.stack(scales))
    O, I = sum(code.shape[0] for code in codes), codes[0].shape[1]
    return Ternary(codes[0].as_strided((O, I), (I, 1)), scales[0].as_strided((len(scales),), (1,)))


def _adjacent(tensors: Sequence[Tensor]) -> bool:
    """Whether each begins in the same storage where the one before it ends."""
    one_storage = len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    neighbors = itertools.pairwise(tensors)
    return one_storage and all(a.storage_offset() + a.numel() == b.storage_offset() for a, b in neighbors)


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
        x: (..., I), which `activation` are the codes of, or an anchor; gets dX. weights: (O_s, I) each; get dW.
        biases: (O_s,) each, or empty. ternary: the codes of `weights`. dtype: of y.
        backward: "exact" (products in dY's dtype) or "fast" (int8 products, stochastic rounding).
        activation: the int8 codes and scales of x.

    Returns: (..., O), O = sum of O_s, in `dtype`.

    Numerics: forward bit for bit the reference but for the rounding of ``acc * scale + bias`` (one instead of two).
    """
    assert backward in ("exact", "fast"), backward
    sizes = [weight.shape[0] for weight in weights]
    return _ternary_linear(x, *activation, list(weights), list(biases), *ternary, sizes, dtype, backward == "fast")
