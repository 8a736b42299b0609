"""Weight quantizers: how the fp32 master weight of a BitLinear becomes ternary. docs/method.md, section 7.
Plain PyTorch: on an NVIDIA GPU only the ordinary one, `absmean`, has kernels.

    name      codes of                                          scale             stored beside the master
    absmean   W / s, rounded to {-1, 0, 1}: kernels/reference   one, mean|W|      -
    block     the same, in each row for 128 columns             one per group     -
    gptq      W, column by column, each error passed on to      one, mean|W|      Cholesky factor (I, I)
              the columns to come, for inputs like those of
              the calibration
    awq       W * c, c_j = mean|x_j|^alpha by input channel     one; the input    channel scale (I,)
              of the calibration                                is divided by c
    tequila   as absmean; the weights in the dead zone          one, mean|W|      -
              make a bias: lambda * their sum
    seq       1.5 * W / a, a learned                            one, a / 1.5      a (1,)

All are straight-through for the master weight, except that `seq` passes nothing to weights beyond 0.99 a.

absmean, gptq and tequila can have a scale for each row, or for each group of 64, 128 or 256 columns of a row, instead: the
absmean of what it scales, snapped to numbers that fp16 and bf16 both hold (`kernels.reference.snapped_scale`).

Each is one class, and `QUANTIZERS` at the end of this file is the only list of them: the settings, the layers and the
surgery know them by what the class says. To add one, write its class here and name it there.
"""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from bitdistill.errors import UserError
from bitdistill.kernels.numerics import EPSILON
from bitdistill.kernels.reference import quantize_weight, quantize_weight_groups, spread_scales
from bitdistill.student.calibration import InputStatistics, output_error
from bitdistill.student.gptq import gptq_codes, gptq_factor, gptq_group_codes

WEIGHT_SCALES = ("tensor", "row", "group")
ACT_SCALES = ("token", "block")
GROUP_SIZES = (64, 128, 256)
BLOCK_COLUMNS = 128
ALPHAS = 20  # steps of AWQ's search over alpha
TEQUILA_LAMBDA = 1e-3
SEQ_CLIP, SEQ_LEVELS = 0.99, 1.5  # both ParetoQ's, for three levels


class WeightQuantizer:
    """How a weight becomes ternary. It keeps nothing itself: what it stores beside the master lies in the BitLinear that
    its methods are given.

    Args:
        weight_scale: what has a scale of its own: "tensor", "row" or "group".
        group_size: columns of a group: 64, 128 or 256; the last group of a row may be narrower.

    Raises:
        UserError: another granularity, or one that this quantizer does not have.

    Attributes:
        name: in the settings and in a student's config.json.
        granular: whether its scales can be those of rows or of groups of columns.
        own_weight_suffices: whether it can work under ZeRO-3, which gathers the weight of a layer and nothing beside it.
        calibrated: whether it needs statistics of the layer's inputs before training.
        has_kernels: whether the kernels of a device compute it; otherwise the layer runs in plain PyTorch.
        soft: whether softmax annealing ends in its codes.
        slow: whether its codes are worth keeping while the weight does not change.
        learned: whether it has parameters, which the gradient reaches through `straight_through`.
    """

    name: ClassVar[str]
    granular: ClassVar[bool] = False
    own_weight_suffices: ClassVar[bool] = True
    calibrated: ClassVar[bool] = False
    has_kernels: ClassVar[bool] = False
    soft: ClassVar[bool] = False
    slow: ClassVar[bool] = False
    learned: ClassVar[bool] = False

    def __init__(self, weight_scale: str = "tensor", group_size: int = 128):
        self.weight_scale, self.group_size = weight_scale, group_size
        _check_scales(self)

    def __str__(self) -> str:
        scales = {"tensor": "", "row": ", one scale per row", "group": f", one scale per {self.group_size} columns"}
        return f"weight quantizer {self.name}{scales[self.weight_scale]}"

    def columns(self, layer: nn.Module) -> int | None:
        """Columns of a row that share a scale of (O, G); None where the scale broadcasts to (O, I)."""
        return {"tensor": None, "row": layer.in_features, "group": self.group_size}[self.weight_scale]

    def attach(self, layer: nn.Module) -> None:
        """Gives a new layer the buffers or parameters that are stored beside its weight."""

    def calibrate(self, layer: nn.Module, inputs: InputStatistics) -> None:
        """Fills those buffers from statistics of the layer's inputs."""

    def codes(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """(codes int8 (O, I) in {-1, 0, 1}, scale fp32), without a gradient: see `columns` for the scale's shape."""
        raise NotImplementedError

    def input_scale(self, layer: nn.Module) -> Tensor | None:
        """fp32 (I,), by which the layer's input is divided before it is rounded; None where it is taken as it is."""
        return None

    def dequantized(self, layer: nn.Module, codes: Tensor, scale: Tensor) -> Tensor:
        """fp32 (O, I): what the layer's own input is multiplied by, up to the rounding of that."""
        quantized = codes * spread_scales(scale, layer.in_features, self.columns(layer))
        divisor = self.input_scale(layer)
        return quantized if divisor is None else quantized / divisor

    def straight_through(self, layer: nn.Module, codes: Tensor, scale: Tensor) -> Tensor:
        """`dequantized`, with a gradient in the master and in what is learned beside it."""
        return straight_through(layer.weight, self.dequantized(layer, codes, scale))

    def bias(self, layer: nn.Module, codes: Tensor) -> Tensor | None:
        """(O,) or None: the bias of the quantized layer."""
        return layer.bias


class AbsMean(WeightQuantizer):
    """The paper's: `kernels.reference.quantize_weight`."""

    name, granular, has_kernels, soft = "absmean", True, True, True

    def codes(self, layer):
        columns = self.columns(layer)
        return quantize_weight(layer.weight) if columns is None else quantize_weight_groups(layer.weight, columns)


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


# --- block -------------------------------------------------------------------------------------------------------------


class Block(AbsMean):
    """absmean for each row and block of 128 columns: absmean with `weight_scale` group, under the name it had before that.

    Source: block-wise quantization of a tensor in memory order, Dettmers et al., arXiv 2110.02861; 128 is the usual group of
    GPTQ and AWQ.
    """

    name, granular, soft = "block", False, False

    def __init__(self, weight_scale: str = "tensor", group_size: int = BLOCK_COLUMNS):
        super().__init__(weight_scale, group_size)
        self.weight_scale, self.group_size = "group", BLOCK_COLUMNS


# --- GPTQ --------------------------------------------------------------------------------------------------------------


class Gptq(WeightQuantizer):
    """Errors of a column are made up for by the columns to come: gptq.py. The factor is saved with the layer."""

    name, granular, own_weight_suffices, calibrated, slow = "gptq", True, False, True, True

    def attach(self, layer):
        factor = torch.eye(layer.in_features, dtype=torch.float32, device=layer.weight.device)
        layer.register_buffer("gptq_factor", factor)

    def calibrate(self, layer, inputs):
        layer.gptq_factor.copy_(gptq_factor(inputs.gram))

    def codes(self, layer):
        columns = self.columns(layer)
        if columns is None:
            return gptq_codes(layer.weight, layer.gptq_factor)
        return gptq_group_codes(layer.weight, layer.gptq_factor, columns)


# --- AWQ ---------------------------------------------------------------------------------------------------------------


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


class Awq(WeightQuantizer):
    """Input channels that are large count more: codes and scale of ``W diag(c)``, and the input is divided by c before it is
    rounded, so that the product stays one of integers. c is saved with the layer."""

    name, calibrated = "awq", True

    def attach(self, layer):
        scale = torch.ones(layer.in_features, dtype=torch.float32, device=layer.weight.device)
        layer.register_buffer("awq_scale", scale)

    def calibrate(self, layer, inputs):
        layer.awq_scale.copy_(awq_channel_scale(layer.weight, inputs)[0])

    def codes(self, layer):
        return quantize_weight(layer.weight.detach().float() * layer.awq_scale)

    def input_scale(self, layer):
        return layer.awq_scale


# --- Tequila -----------------------------------------------------------------------------------------------------------


def tequila_bias(weight: Tensor, codes: Tensor) -> Tensor:
    """``lambda * sum of the weights whose code is 0``, by row: fp32 (O,), differentiable in the weight.

    Weights in the dead zone reach the output again, and their gradient gains a term without the noise of the input. The
    bias depends on no input: an exported student simply has it.

    Args:
        weight: (O, I), the master. codes: int8 (O, I).

    Source: Tequila, arXiv 2509.23809, section 4, with its constant lambda of 1e-3.
    """
    return TEQUILA_LAMBDA * (weight.float() * (codes == 0)).sum(1)


class Tequila(AbsMean):
    """absmean, and the weights whose code is 0 make a bias, which grows with the annealing: `tequila_bias`."""

    name, has_kernels, soft = "tequila", False, False

    def bias(self, layer, codes):
        extra = layer.annealing * tequila_bias(layer.weight, codes)
        return extra if layer.bias is None else layer.bias + extra


# --- SEQ ---------------------------------------------------------------------------------------------------------------


def seq_start(weight: Tensor) -> Tensor:
    """Where the learned a begins: the mean over rows of ``max|row|``, fp32 (1,).

    ParetoQ has one per row, at ``max|row|``; the packed file has one scale per tensor.
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


class Seq(WeightQuantizer):
    """Three levels at -2/3 a, 0, 2/3 a, a learned: `seq_codes`."""

    name, own_weight_suffices, learned = "seq", False, True

    def attach(self, layer):
        layer.seq_a = nn.Parameter(seq_start(layer.weight))

    def codes(self, layer):
        return seq_codes(layer.weight, layer.seq_a)

    def straight_through(self, layer, codes, scale):
        return seq_weight(layer.weight, layer.seq_a, (codes, scale))


# --- the list ----------------------------------------------------------------------------------------------------------

QUANTIZERS: dict[str, type[WeightQuantizer]] = {q.name: q for q in (AbsMean, Block, Gptq, Awq, Tequila, Seq)}


def quantizer_named(name: str, weight_scale: str = "tensor", group_size: int = 128) -> WeightQuantizer:
    """The quantizer of that name.

    Args:
        name: in QUANTIZERS. weight_scale, group_size: as in `WeightQuantizer`.

    Raises:
        UserError: there is none, or it has no such scales.
    """
    if name not in QUANTIZERS:
        raise UserError(
            "refine.weight_quantizer",
            expected=f"one of {', '.join(QUANTIZERS)}",
            got=repr(name),
            do="Choose one of them.",
        )
    return QUANTIZERS[name](weight_scale, group_size)


def _check_scales(quantizer: WeightQuantizer) -> None:
    weight_scale, group_size = quantizer.weight_scale, quantizer.group_size
    for field, value, allowed in (
        ("weight_scale", weight_scale, WEIGHT_SCALES),
        ("group_size", group_size, GROUP_SIZES),
    ):
        if value not in allowed:
            expected = f"one of {', '.join(map(str, allowed))}"
            raise UserError(f"refine.{field}", expected=expected, got=repr(value), do="Choose one of them.")
    if weight_scale != "tensor" and not quantizer.granular:
        raise UserError(
            "refine.weight_scale",
            expected=f"tensor with the weight quantizer {quantizer.name}",
            got=weight_scale,
            do=f"Set --refine.weight_scale tensor, or --refine.weight_quantizer {_names(lambda other: other.granular)}.",
        )


def refuse_partitions(quantizer: WeightQuantizer) -> None:
    """Raises UserError where a quantizer cannot work under ZeRO-3."""
    if not quantizer.own_weight_suffices:
        alternatives = _names(lambda other: other.own_weight_suffices)
        raise UserError(
            "refine.weight_quantizer",
            expected=f"with ZeRO-3 one that needs its own weight alone: {alternatives}",
            got=quantizer.name,
            do="Choose one of these, or --zero 2.",
        )


def refuse_softmax(quantizer: WeightQuantizer) -> None:
    """Raises UserError where softmax annealing would end in other codes than those of a quantizer."""
    if quantizer.weight_scale != "tensor":
        raise UserError(
            "refine.weight_scale",
            expected="tensor with pretrain.annealing softmax, whose soft codes have one scale per tensor",
            got=quantizer.weight_scale,
            do="Set --refine.weight_scale tensor, or --pretrain.annealing linear.",
        )
    if not quantizer.soft:
        raise UserError(
            "refine.weight_quantizer",
            expected="absmean with pretrain.annealing softmax, whose soft codes are those of absmean",
            got=quantizer.name,
            do="Set --refine.weight_quantizer absmean, or --pretrain.annealing linear.",
        )


def _names(able: Callable[[type[WeightQuantizer]], bool]) -> str:
    *names, last = [name for name, quantizer in QUANTIZERS.items() if able(quantizer)]
    return f"{', '.join(names)} or {last}" if names else last


ABSMEAN = AbsMean()  # the default of a layer
