"""Weight quantizers beside the ordinary one, and annealing into any of them. docs/method.md, sections 7 and 8.
Plain PyTorch: on an NVIDIA GPU only the ordinary one, `absmean`, has kernels.

    name      codes of                                          scale             stored beside the master
    absmean   W / s, rounded to {-1, 0, 1}: kernels/reference   one, mean|W|      -
    block     the same, in each row for 128 columns             one a block       -
    gptq      W, column by column, each error passed on to      one, mean|W|      Cholesky factor (I, I)
              the columns to come, for inputs like those of
              the calibration
    awq       W * c, c_j = mean|x_j|^alpha by input channel     one, divided by   channel scale (I,)
              of the calibration                                c again
    tequila   as absmean; the weights in the dead zone          one, mean|W|      -
              make a bias: lambda * their sum
    seq       1.5 * W / a, a learned                            one, a / 1.5      a (1,)

All are straight-through for the master weight, except that `seq` passes nothing to weights beyond 0.99 a.

**Annealing.** Between full precision (0) and quantized (1) a layer computes `annealed_linear`, on every device:

    linear    x_l = x + l * (q(x) - x)        w_l = w + l * (q(w) - w)        gradients as if both were the identity
    softmax   w_l = s * sum_k k * softmax_k(-(w / s - k)^2 / T), k = -1, 0, 1, s = absmean; its true gradient in w

softmax reaches full weight in the first fifth of the annealing (before that it is mixed with w, and the int8 codes with
x, as `linear` does), then T falls as a cosine from START_TEMPERATURE to END_TEMPERATURE.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bitdistill.errors import UserError
from bitdistill.kernels.numerics import EPSILON
from bitdistill.kernels.reference import quantize_activation, quantize_weight, weight_scale

QUANTIZERS = ("absmean", "block", "gptq", "awq", "tequila", "seq")
CALIBRATED = ("gptq", "awq")  # need statistics of the layer's inputs
MANY_SCALES = ("block", "awq")  # which a packed file has no place for
WHOLE = ("gptq", "seq")  # need more of the layer than ZeRO-3 gathers, or more often than it can afford
BLOCK_COLUMNS = 128
DAMPING = 0.01  # of the mean of the Hessian's diagonal, as in GPTQ
ALPHAS = 20  # steps of AWQ's search over alpha
TEQUILA_LAMBDA = 1e-3
SEQ_CLIP, SEQ_LEVELS = 0.99, 1.5  # both ParetoQ's, for three levels

# START minimises E[(soft(z) - z)^2] for Gaussian weights in units of their absmean: the softest start costs the least.
START_TEMPERATURE = 0.35
# At END a soft code differs from the hard one within 0.1 of a boundary, and its slope is at most 1 / (2 T) = 10.
END_TEMPERATURE = 0.05
COMPRESSION = 0.2  # the share of the annealing in which the mixture becomes soft codes alone


def check_quantizer(name: str) -> None:
    """Raises UserError for a weight quantizer that there is none of."""
    if name not in QUANTIZERS:
        raise UserError(
            "refine.weight_quantizer", expected=f"one of {', '.join(QUANTIZERS)}", got=repr(name), do="Correct it."
        )


def straight_through(weight: Tensor, quantized: Tensor) -> Tensor:
    """`quantized` (O, I), fp32, with the gradient of `weight`: ``W + (Q - W)``, the difference taken as a constant."""
    return _StraightThrough.apply(weight, quantized)


class _StraightThrough(torch.autograd.Function):  # the sum would round: Q itself must come out
    @staticmethod
    def forward(ctx, weight, quantized):
        ctx.dtype = weight.dtype
        return quantized.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None


# --- statistics of a layer's inputs -----------------------------------------------------------------------------------


@dataclass
class InputStatistics:
    """Sums over the tokens that a layer was given.

    Args:
        gram: fp32 (I, I), ``sum x x^T``. magnitude: fp32 (I,), ``sum |x|``. tokens: how many.
    """

    gram: Tensor
    magnitude: Tensor
    tokens: int

    @classmethod
    def of(cls, x_NI: Tensor) -> "InputStatistics":
        """Of tokens (N, I), any float dtype."""
        x_NI = x_NI.detach().float()
        return cls(x_NI.T @ x_NI, x_NI.abs().sum(0), len(x_NI))

    def add(self, other: "InputStatistics") -> None:
        """Takes further tokens in."""
        self.gram += other.gram
        self.magnitude += other.magnitude
        self.tokens += other.tokens


def output_error(weight: Tensor, quantized: Tensor, gram: Tensor) -> float:
    """``||X W^T - X Q^T||^2`` from ``gram = X^T X``: what gptq and awq make small.

    Args:
        weight, quantized: (O, I). gram: (I, I), on the same device.
    """
    difference = (quantized - weight).detach().double()
    return ((difference @ gram.double()) * difference).sum().item()


# --- block ------------------------------------------------------------------------------------------------------------


def block_codes(weight: Tensor, columns: int = BLOCK_COLUMNS) -> tuple[Tensor, Tensor]:
    """absmean for each row and block of columns: ``s = max(mean|block|, EPSILON)``, ``codes = clip(round(W / s), -1, 1)``.

    Args:
        weight: (O, I) float. columns: of a block; the last one of a row may be shorter.

    Returns: (codes int8 (O, I), scales fp32 (O, I), each block's repeated over its columns).

    Source: block-wise quantization of a tensor in memory order, Dettmers et al., arXiv 2110.02861; 128 is the usual group of
    GPTQ and AWQ.
    """
    weight = weight.detach().float()
    parts = weight.split(columns, dim=1)
    scales = [p.abs().mean(dim=1, keepdim=True, dtype=torch.float64).float().clamp_min(EPSILON) for p in parts]
    scales = torch.cat([s.expand_as(p) for s, p in zip(scales, parts, strict=True)], dim=1)
    return torch.round(weight / scales).clamp_(-1, 1).to(torch.int8), scales


# --- GPTQ -------------------------------------------------------------------------------------------------------------


def gptq_factor(gram: Tensor) -> Tensor:
    """``U`` with ``U^T U = H^-1``, upper triangular, ``H = 2 X^T X + DAMPING * mean(diag) * 1``.

    Args:
        gram: (I, I), ``X^T X`` of the calibration.

    Returns: fp32 (I, I); computed in fp64. A channel that was always 0 counts as one that was as the damping.

    Source: GPTQ, arXiv 2210.17323, section 3.
    """
    hessian = 2 * gram.double()
    diagonal = hessian.diagonal()
    diagonal += max(DAMPING * diagonal.mean().item(), EPSILON)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True).float()


def gptq_codes(weight: Tensor, factor: Tensor, columns: int = BLOCK_COLUMNS) -> tuple[Tensor, Tensor]:
    """Columns in order; what rounding a column costs is made up by those that follow, as the inverse Hessian says:

        codes_j = clip(round(W_j / s), -1, 1)        W_k -= (W_j - s codes_j) / U_jj * U_jk   for all k > j

    Args:
        weight: (O, I) float. factor: (I, I), from `gptq_factor`. columns: after how many the rest of the row is brought up
            to date, in one product; no influence on the result but rounding.

    Returns: (codes int8 (O, I), weight_scale fp32 () = absmean of the weight as it came). I sequential steps.

    Source: GPTQ, arXiv 2210.17323, algorithm 1.
    """
    scale = weight_scale(weight)
    rest = weight.detach().float().clone()
    codes = torch.empty_like(rest)
    for start in range(0, rest.shape[1], columns):
        part, block = rest[:, start : start + columns], factor[start : start + columns, start : start + columns]
        errors = torch.empty_like(part)
        for j in range(part.shape[1]):
            codes[:, start + j] = torch.round(part[:, j] / scale).clamp_(-1, 1)
            errors[:, j] = (part[:, j] - scale * codes[:, start + j]) / block[j, j]
            part[:, j + 1 :] -= torch.outer(errors[:, j], block[j, j + 1 :])
        rest[:, start + columns :] -= errors @ factor[start : start + columns, start + columns :]
    return codes.to(torch.int8), scale


# --- AWQ --------------------------------------------------------------------------------------------------------------


def awq_channel_scale(weight: Tensor, statistics: InputStatistics) -> tuple[Tensor, float]:
    """``c_j = (mean|x_j|)^alpha``, alpha among 0, 0.05, ... 1 with the least `output_error`.

    Args:
        weight: (O, I). statistics: of the layer's inputs, on the same device.

    Returns: (channel scale fp32 (I,) with geometric mean 1, alpha). alpha = 0 is absmean: never worse than that.

    Source: AWQ, arXiv 2306.00978, section 3.2.
    """
    magnitude = (statistics.magnitude / statistics.tokens).clamp_min(EPSILON)
    magnitude = magnitude / magnitude.log().mean().exp()

    def error(alpha: float) -> float:
        codes, scale = awq_codes(weight, magnitude**alpha)
        return output_error(weight, codes * scale, statistics.gram)

    alpha = min((step / ALPHAS for step in range(ALPHAS + 1)), key=error)
    return magnitude**alpha, alpha


def awq_codes(weight: Tensor, channel_scale: Tensor) -> tuple[Tensor, Tensor]:
    """absmean codes and scale s of ``W diag(c)``; the scale is then ``s / c``: (int8 (O, I), fp32 (I,)).

    Args:
        weight: (O, I) float. channel_scale: fp32 (I,), positive.
    """
    codes, scale = quantize_weight(weight.detach().float() * channel_scale)
    return codes, scale / channel_scale


# --- Tequila ----------------------------------------------------------------------------------------------------------


def tequila_bias(weight: Tensor, codes: Tensor) -> Tensor:
    """``lambda * sum of the weights whose code is 0``, by row: fp32 (O,), differentiable in the weight.

    Weights in the dead zone reach the output again, and their gradient gains a term without the noise of the input. The
    bias depends on no input: an exported student simply has it.

    Args:
        weight: (O, I), the master. codes: int8 (O, I).

    Source: Tequila, arXiv 2509.23809, section 4, with its constant lambda of 1e-3.
    """
    return TEQUILA_LAMBDA * (weight.float() * (codes == 0)).sum(1)


# --- SEQ --------------------------------------------------------------------------------------------------------------


def seq_start(weight: Tensor) -> Tensor:
    """Where the learned a begins: the mean over rows of ``max|row|``, fp32 (1,).

    ParetoQ has one a row, at ``max|row|``; the packed file has one scale a tensor.
    """
    return weight.detach().float().abs().amax(1).mean().clamp_min(EPSILON).reshape(1)


def seq_codes(weight: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """``codes = round(1.5 * clip(W / a, -0.99, 0.99))``, weight_scale ``a / 1.5``: (int8 (O, I), fp32 ()).

    The three levels -2/3 a, 0, 2/3 a divide [-a, a] into equal thirds.

    Args:
        weight: (O, I) float. a: (1,), positive; used as at least EPSILON.
    """
    a = a.detach().float().clamp_min(EPSILON)
    codes = torch.round((weight.detach().float() / a).clamp(-SEQ_CLIP, SEQ_CLIP) * SEQ_LEVELS).to(torch.int8)
    return codes, (a / SEQ_LEVELS).squeeze(0)


def seq_weight(weight: Tensor, a: Tensor, ternary: tuple[Tensor, Tensor]) -> Tensor:
    """``weight_scale * codes`` with the gradients of learned step size quantization: fp32 (O, I).

        d/dW = 1 within 0.99 a, else 0        d/da = codes / 1.5 - [W / a within 0.99 a], times 1 / sqrt(O I)

    Args:
        weight: (O, I), the master. a: (1,), learned. ternary: from `seq_codes`.

    Source: ParetoQ, arXiv 2502.02631, and its code for three levels, whose gradient in a is 1 beyond the clip where the
    level is 2/3: here it is 2/3. LSQ, arXiv 1902.08153, for the factor 1 / sqrt(O I).
    """
    return _Seq.apply(weight, a, *ternary)


class _Seq(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, a, codes, scale):
        ctx.save_for_backward(weight, a, codes)
        return codes * scale

    @staticmethod
    def backward(ctx, grad):
        weight, a, codes = ctx.saved_tensors
        units = weight.float() / a.float().clamp_min(EPSILON)
        within = units.abs() <= SEQ_CLIP
        slope = codes / SEQ_LEVELS - units * within
        grad_a = (grad * slope).sum().reshape(1) / math.sqrt(weight.numel())
        return (grad * within).to(weight.dtype), grad_a.to(a.dtype), None, None


# --- products ---------------------------------------------------------------------------------------------------------


def scaled_linear(x: Tensor, weight: Tensor, quantized: Tensor, bias: Tensor | None) -> Tensor:
    """int8 activations times a quantized weight with more than one scale, straight-through for both; fp32 products.

    Args:
        x: (..., I) float. weight: (O, I), the master. quantized: fp32 (O, I), codes times scales. bias: (O,) or None.

    Returns: (..., O) in ``x.dtype``, or in the autocast dtype under torch.autocast.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    codes, scale = quantize_activation(x)
    with torch.autocast(device, enabled=False):
        return F.linear(straight_through(x, codes * scale), straight_through(weight, quantized), bias).to(dtype)


# --- annealing ---------------------------------------------------------------------------------------------------------


def soft_ternary(weight: Tensor, temperature: float) -> Tensor:
    """``s * E[k]``, ``k ~ softmax(-(W / s - k)^2 / T)`` over {-1, 0, 1}: ternary codes before they have decided.

    Args:
        weight: (O, I) float. temperature: T > 0; towards 0 the result becomes ``s * clip(round(W / s), -1, 1)``.

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
    x: Tensor, weight: Tensor, quantized: Tensor, bias: Tensor | None, kind: str, annealing: float
) -> Tensor:
    """A linear layer on its way into ternary, as above.

    Args:
        x: (..., I) float. weight: (O, I), the fp32 master. bias: (O,) or None.
        quantized: (O, I), the quantized weight, differentiable in `weight`; `softmax` does not look at it.
        kind: "linear" or "softmax". annealing: l, 0 (full precision) to 1.

    Returns: (..., O), in the autocast dtype under torch.autocast, as ``nn.Linear`` does.

    Source: Hugging Face, "Fine-tuning LLMs to 1.58bit" (linear); Hestia, arXiv 2601.20745 (softmax).
    """
    if kind == "softmax":
        quantized = soft_ternary(weight, temperature_at(annealing))
        annealing = min(1.0, annealing / COMPRESSION)
    mixed = torch.lerp(weight.float(), quantized, annealing).to(weight.dtype)
    codes, scale = quantize_activation(x)
    x = x + (annealing * (codes * scale - x.float())).detach().to(x.dtype)
    return F.linear(x, mixed, bias)
