"""What a layer computes between full precision (annealing 0) and quantized (1), on every device. docs/method.md, section 8.

    linear    x_l = x + l * (q(x) - x)        w_l = w + l * (q(w) - w)        gradients as if both were the identity
    softmax   w_l = s * sum_k k * softmax_k(-(w / s - k)^2 / T), k = -1, 0, 1, s = absmean; its true gradient in w

softmax reaches full weight in the first fifth of the annealing (before that it is mixed with w, and the int8 codes with
x, as `linear` does), then T falls as a cosine from START_TEMPERATURE to END_TEMPERATURE.

The schedule, how far a stage has gone at which step, is training/annealing.py.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from bitdistill.kernels.reference import rounded_activation, weight_scale

# START minimizes E[(soft(z) - z)^2] for Gaussian weights in units of their absmean: the softest start costs the least.
START_TEMPERATURE = 0.35
# At END a soft code differs from the hard one within 0.1 of a boundary, and its slope is at most 1 / (2 T) = 10.
END_TEMPERATURE = 0.05
COMPRESSION = 0.2  # the share of the annealing in which the mixture becomes soft codes alone


def soft_ternary(weight: Tensor, temperature: float) -> Tensor:
    """``s * E[k]``, ``k ~ softmax(-(W / s - k)^2 / T)`` over {-1, 0, 1}: ternary codes before they have decided.

    Args:
        weight: (O, I) float. temperature: T > 0; toward 0 the result becomes ``s * clip(round(W / s), -1, 1)``.

    Returns: fp32 (O, I), with the true gradient ``d/dW = (2 / T) * Var[k]``, the scale s (absmean) taken as a constant.

    Source: Hestia, arXiv 2601.20745, section 3, without its temperatures by layer.
    """
    scale = weight_scale(weight)
    with torch.no_grad():
        units = weight.float() / scale
        distances = torch.stack([(units - code).square() for code in (-1, 0, 1)])
        below, _, above = torch.softmax(-distances / temperature, dim=0)
        code = above - below
        slope = (above + below - code.square()) * (2 / temperature)
    return scale * code + slope * (weight.float() - weight.detach().float())


def temperature_at(annealing: float) -> float:
    """Of the softmax: START_TEMPERATURE up to COMPRESSION, then a cosine to END_TEMPERATURE at 1."""
    share = max(0.0, (annealing - COMPRESSION) / (1 - COMPRESSION))
    return END_TEMPERATURE + (START_TEMPERATURE - END_TEMPERATURE) * (1 + math.cos(math.pi * share)) / 2


def annealed_linear(
    x: Tensor,
    weight: Tensor,
    quantized: Tensor,
    bias: Tensor | None,
    kind: str,
    annealing: float,
    act_scale: str = "token",
    input_scale: Tensor | None = None,
) -> Tensor:
    """A linear layer on its way into ternary, as above.

    Args:
        x: (..., I) float. weight: (O, I), the fp32 master. bias: (O,) or None.
        quantized: (O, I), the quantized weight, differentiable in `weight`; `softmax` does not look at it.
        kind: "linear" or "softmax". annealing: l, 0 (full precision) to 1.
        act_scale: what has an activation scale of its own, "token" or "block".
        input_scale: (I,), by which x is divided before it is rounded, or None.

    Returns: (..., O), in the autocast dtype under torch.autocast, as ``nn.Linear`` does.

    Source: Hugging Face, "Fine-tuning LLMs to 1.58bit" (linear); Hestia, arXiv 2601.20745 (softmax).
    """
    if kind == "softmax":
        quantized = soft_ternary(weight, temperature_at(annealing))
        annealing = min(1.0, annealing / COMPRESSION)
    mixed = torch.lerp(weight.float(), quantized, annealing).to(weight.dtype)
    if input_scale is None:
        rounded = rounded_activation(x, act_scale)
    else:
        rounded = rounded_activation(x / input_scale, act_scale) * input_scale
    x = x + (annealing * (rounded - x.float())).detach().to(x.dtype)
    return F.linear(x, mixed, bias)
