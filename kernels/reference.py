"""The specification: quantizers, ternary product and SubLN in plain PyTorch, short enough to check by eye.

Every kernel is tested against this file: codes, scales and integer accumulators bit for bit. numerics.py fixes the rounding
rules and constants. Shape suffixes: N tokens, I in_features, O out_features.

Source: BitNet Distillation, arXiv 2510.13998, equations 1-3; BitNet b1.58, arXiv 2402.17764.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from bitdistill.kernels.numerics import ACT_BLOCK, ACT_MAX, EPSILON, MAX_EXACT_IN_FEATURES, MAX_SCALE


def weight_scale(weight: Tensor) -> Tensor:
    """``max(mean|W|, EPSILON)``: the absmean scale of a whole tensor.

    Args:
        weight: any shape, any float dtype; on a ZeRO-3 shard the result would be the wrong mean, so an empty
            (partitioned) tensor is refused.

    Returns: fp32 scalar tensor, shape (). Numerics: summed in fp64, rounded to fp32 once, so independent of order.

    Raises:
        ValueError: the tensor has no elements.
    """
    if weight.numel() == 0:
        raise ValueError("weight: expected at least one element; got none. Under ZeRO-3 gather the parameter first.")
    total = weight.detach().float().abs().sum(dtype=torch.float64)
    return (total / weight.numel()).float().clamp_min(EPSILON)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Ternary codes and scale of a weight: ``clip(round(W / s), -1, 1)``, ``s = weight_scale(W)`` (eq. 1-2).

    Args:
        weight: (O, I), any float dtype; arithmetic in fp32.

    Returns: (codes int8 (O, I) in {-1, 0, 1}, weight_scale fp32 ()). ``W ~ weight_scale * codes``.
    """
    scale = weight_scale(weight)
    codes = torch.round(weight.detach().float() / scale).clamp_(-1, 1).to(torch.int8)
    return codes, scale


def snapped_scale(scale: Tensor) -> Tensor:
    """The nearest number that fp16 and bf16 both hold, at least EPSILON: what is stored is what training multiplies by.

    bf16's eight significant bits; fp16 holds each of these from 2^-17 on (EPSILON lies above) up to 65,280.

    Args:
        scale: fp32, any shape.

    Returns: fp32 like scale. Numerics: half to even.
    """
    return scale.clamp(EPSILON, MAX_SCALE).bfloat16().float()


def group_scales(weight: Tensor, columns: int) -> Tensor:
    """absmean of each row and group of columns, snapped: ``snapped_scale(mean|group|)``.

    Args:
        weight: (O, I), any float dtype. columns: of a group; the last group of a row may be narrower.

    Returns: fp32 (O, G), G = ceil(I / columns). Numerics: summed in fp64, rounded to fp32, then snapped.
    """
    if weight.numel() == 0:
        raise ValueError("weight: expected at least one element; got none. Under ZeRO-3 gather the parameter first.")
    parts = weight.detach().float().abs().split(columns, dim=1)
    return snapped_scale(torch.stack([part.mean(dim=1, dtype=torch.float64).float() for part in parts], dim=1))


def spread_scales(scale: Tensor, in_features: int, columns: int | None) -> Tensor:
    """The scale of every column: fp32 () as it is, or (O, I) of the (O, G) scales of groups of `columns`.

    Args:
        scale: fp32 () or (O, G); also (..., G) of a token's blocks. in_features: I. columns: of a group; None for a single scale.
    """
    return scale if columns is None else scale.repeat_interleave(columns, dim=-1)[..., :in_features]


def quantize_weight_groups(weight: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """`quantize_weight` with a scale for each row and group of columns: ``clip(round(W / s), -1, 1)``.

    Args:
        weight: (O, I), any float dtype; arithmetic in fp32. columns: of a group; I for one scale per row.

    Returns: (codes int8 (O, I) in {-1, 0, 1}, `group_scales` fp32 (O, G)).
    """
    scale = group_scales(weight, columns)
    spread = spread_scales(scale, weight.shape[1], columns)
    return torch.round(weight.detach().float() / spread).clamp_(-1, 1).to(torch.int8), scale


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token absmax int8: ``clip(round(x * (127 / m)), -128, 127)``, ``m = max(max|x|, EPSILON)`` (eq. 3).

    Args:
        x: (..., I), any float dtype; arithmetic in fp32.

    Returns: (codes int8 (..., I), act_scale fp32 (..., 1) = m / 127). ``x ~ act_scale * codes``.
    """
    x = x.detach().float()
    if x.shape[-1] == 0:
        raise ValueError("x: expected a last dimension of at least 1; got 0")
    peak = x.abs().amax(dim=-1, keepdim=True).clamp_min(EPSILON)
    codes = torch.round(x * (torch.full_like(peak, ACT_MAX) / peak)).clamp_(-128, 127).to(torch.int8)
    return codes, peak / torch.full_like(peak, ACT_MAX)


def quantize_activation_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_activation` for each block of ACT_BLOCK columns of a token, as llama.cpp's Q8_0 rounds activations.

    Args:
        x: (..., I), any float dtype; arithmetic in fp32. The last block of a token may be narrower.

    Returns: (codes int8 (..., I), act_scale fp32 (..., ceil(I / ACT_BLOCK))).
    """
    width = x.shape[-1]
    padded = F.pad(x.detach().float(), (0, -width % ACT_BLOCK)).unflatten(-1, (-1, ACT_BLOCK))  # zeros have code 0
    codes, scale = quantize_activation(padded)
    return codes.flatten(-2)[..., :width], scale.squeeze(-1)


def rounded_activation(x: Tensor, act_scale: str = "token") -> Tensor:
    """What a layer multiplies by in place of x: ``act_codes * act_scale``, fp32 (..., I), without a gradient.

    Args:
        x: (..., I) float. act_scale: what has a scale of its own, "token" or "block".
    """
    if act_scale == "block":
        codes, scale = quantize_activation_blocks(x)
        return codes * spread_scales(scale, x.shape[-1], ACT_BLOCK)
    codes, scale = quantize_activation(x)
    return codes * scale


def ternary_accumulate(act_codes: Tensor, weight_codes: Tensor) -> Tensor:
    """``acc = act_codes @ weight_codes.T`` as exact integers, int32 (..., O).

    Args:
        act_codes: int8 (..., I). weight_codes: int8 (O, I).
    """
    return _accumulate_fp32(act_codes, weight_codes).to(torch.int32)


def _accumulate_fp32(act_codes: Tensor, weight_codes: Tensor) -> Tensor:
    """The integers of ``ternary_accumulate`` held in fp32, where BLAS is fast. Exact: every partial sum is < 2**24."""
    if act_codes.shape[-1] > MAX_EXACT_IN_FEATURES:
        return F.linear(act_codes.double(), weight_codes.double())
    return F.linear(act_codes.float(), weight_codes.float())


class _BitLinear(torch.autograd.Function):
    """Quantized forward, straight-through backward: both quantizers are the identity for the gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, out_dtype, ternary, columns, blocks):
        # Autocast off: it would round the exact integer accumulators to bf16.
        with torch.autocast(x.device.type, enabled=False):
            act_codes, act_scale = quantize_activation_blocks(x) if blocks else quantize_activation(x)
            weight_codes, scale = quantize_weight(weight) if ternary is None else ternary
            product = _blocked_product if blocks else _scaled_product
            y = product(act_codes, act_scale, weight_codes, scale, columns)
            if bias is not None:
                y = y + bias.float()
        ctx.save_for_backward(act_codes, act_scale, weight_codes, scale)
        ctx.x_dtype, ctx.weight_dtype, ctx.columns, ctx.blocks = x.dtype, weight.dtype, columns, blocks
        return y.to(out_dtype)

    @staticmethod
    def backward(ctx, grad_y):
        act_codes, act_scale, weight_codes, scale = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        dtype = grad_y.dtype
        with torch.autocast(grad_y.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                if ctx.columns is None:
                    grad_x = ((grad_y @ weight_codes.to(dtype)) * scale.to(dtype)).to(ctx.x_dtype)
                else:
                    quantized = weight_codes * spread_scales(scale, weight_codes.shape[1], ctx.columns)
                    grad_x = (grad_y @ quantized.to(dtype)).to(
                        ctx.x_dtype
                    )  # exact in bf16 and fp16: scales are snapped
            if ctx.needs_input_grad[1]:
                if ctx.blocks:
                    scaled = grad_y.flatten(0, -2)
                    x = (act_codes * spread_scales(act_scale, act_codes.shape[-1], ACT_BLOCK)).to(dtype)
                else:
                    scaled = (grad_y.float() * act_scale).to(dtype).flatten(0, -2)
                    x = act_codes.to(dtype)
                grad_weight = (scaled.T @ x.flatten(0, -2)).to(ctx.weight_dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = grad_y.float().flatten(0, -2).sum(0).to(ctx.weight_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _scaled_product(
    act_codes: Tensor, act_scale: Tensor, weight_codes: Tensor, scale: Tensor, columns: int | None
) -> Tensor:
    """The product of `bit_linear` before its bias, fp32."""
    if columns is None:
        return _accumulate_fp32(act_codes, weight_codes).float() * (act_scale * scale)
    if scale.shape[1] == 1:
        return _accumulate_fp32(act_codes, weight_codes).float() * (act_scale * scale[:, 0])
    total = torch.zeros(*act_codes.shape[:-1], len(weight_codes), dtype=torch.float32, device=act_codes.device)
    groups = zip(act_codes.split(columns, dim=-1), weight_codes.split(columns, dim=1), scale.unbind(1), strict=True)
    for act_group, weight_group, scale_O in groups:
        total += _accumulate_fp32(act_group, weight_group) * scale_O
    return total * act_scale


def _blocked_product(
    act_codes: Tensor, act_scale: Tensor, weight_codes: Tensor, scale: Tensor, columns: int | None
) -> Tensor:
    """`_scaled_product` with a scale for each ACT_BLOCK columns of a token: ``act_scale`` (..., B)."""
    grouped = columns is not None and scale.shape[1] > 1
    total = torch.zeros(*act_codes.shape[:-1], len(weight_codes), dtype=torch.float32, device=act_codes.device)
    blocks = zip(act_codes.split(ACT_BLOCK, dim=-1), weight_codes.split(ACT_BLOCK, dim=1), strict=True)
    for block, (act_block, weight_block) in enumerate(blocks):
        by = act_scale[..., block : block + 1]
        if grouped:
            by = by * scale[:, block * ACT_BLOCK // columns]
        total += _accumulate_fp32(act_block, weight_block) * by
    return total if grouped else total * (scale if columns is None else scale[:, 0])


def bit_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    ternary: tuple[Tensor, Tensor] | None = None,
    columns: int | None = None,
    act_scale: str = "token",
) -> Tensor:
    """``y = (q(x) @ q(W).T) * (act_scale * weight_scale) + bias`` with the straight-through gradient.

    With scales for rows the same, row by row. With scales for groups of columns the integers of each group are scaled and
    added up in fp32, the first group first: ``y = sum_g(acc_g * weight_scale_g) * act_scale + bias``. A group has at most
    256 columns, so that its product with a snapped scale is exact, and only the sum rounds.

    With activations in blocks of 32 columns the integers of each block b are scaled and added up in fp32, the first block
    first: ``y = sum_b(acc_b * act_scale_b) * weight_scale + bias``, and where groups of columns have a scale
    ``y = sum_b(acc_b * (act_scale_b * weight_scale_g)) + bias``, g the group that block b lies in.

    Forward: integers exact, one fp32 scaling. Backward, with ``x~ = act_scale * act_codes`` and
    ``W~ = weight_scale * weight_codes``: ``dX = dY W~``, ``dW = dY^T x~``, ``db = sum(dY)``; matrix products in
    ``dY.dtype``.

    Args:
        x: (..., I) float, at least two dimensions. weight: (O, I), the fp32 master. bias: (O,) or None.
        ternary: another quantizer's (codes int8 (O, I), weight_scale fp32 ()) of `weight`; quantize_weight's by default.
        columns: of the groups, where ternary has scales fp32 (O, G) for them; I for one scale per row.
        act_scale: what has an activation scale of its own: "token", or "block" for each ACT_BLOCK columns of a token.

    Returns: (..., O) in ``x.dtype``, or in the autocast dtype under torch.autocast, as ``nn.Linear`` does.

    Raises:
        ValueError: the widths of x and weight differ.
    """
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"x: expected a last dimension of {weight.shape[-1]} (in_features); got {tuple(x.shape)}")
    device = x.device.type
    out_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return _BitLinear.apply(x, weight, bias, out_dtype, ternary, columns, act_scale == "block")


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * gain`` over the last dimension, in fp32, returned in ``x.dtype``: SubLN."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps) * gain.float()).to(x.dtype)
