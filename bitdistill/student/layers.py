"""BitLinear, SubLN and GatedMLP: the modules that stage 1 puts into a model. The mathematics is in kernels/.

One `if` chooses the backend: the kernels of a GPU or of a CPU (backend.py), or else the PyTorch reference. On the kernels,
the operation before the quantizer (SubLN, or the gate of an MLP) is fused with it, and what several layers need is computed
once (sharing.py). A layer that is being annealed, or has another weight quantizer than absmean, runs in PyTorch on every
device (quantizers.py).
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitdistill.distributed import process_group
from bitdistill.errors import UserError
from bitdistill.kernels import reference
from bitdistill.student import quantizers
from bitdistill.student.annealed import annealed_linear
from bitdistill.student.backend import kernels_for
from bitdistill.student.quantizers import ABSMEAN, WeightQuantizer
from bitdistill.student.sharing import HeldCodes, Siblings


class SubLN(nn.Module):
    """RMSNorm in front of a BitLinear: ``x / sqrt(mean(x^2) + eps) * weight`` in fp32, gain ``weight`` (I,)."""

    def __init__(self, in_features: int, eps: float, device=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(in_features, dtype=torch.float32, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return reference.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class Gated(NamedTuple):
    """``act(gate) * up``, not yet computed: the BitLinear that is given it computes it with its SubLN and int8 codes."""

    gate: Tensor
    up: Tensor
    activation: str


class BitLinear(nn.Module):
    """A linear layer with ternary weights and int8 activations, trained through fp32 master weights.

    Takes over the Parameter objects of the ``nn.Linear`` that it replaces, so that state-dict keys, ties and ZeRO-3
    partitions survive.

    Args:
        linear: the layer to replace; its weight (O, I) becomes the master and must be fp32 before training
            (`assert_fp32_masters`), because bf16 masters swallow most updates.
        subln: a SubLN of width I in front, or None.
        quantizer: how the weight becomes ternary, from `quantizers.quantizer_named`. What it stores beside the master is
            saved with the layer.
        act_scale: what has an activation scale of its own: "token", or "block" for each 32 columns of a token.

    Attributes:
        backward: how the kernels compute gradients, "exact" or "fast" (kernels/*/bit_linear.py); `use_backward` sets it.
        siblings: the layers that are given the same tensor as this one, or None.
        held: this weight's codes while sharing.WeightCodes holds them.
        annealing: from 0, full precision, to 1, ternary weights and int8 activations: the ordinary layer, bit for bit.
        annealing_kind: what lies between, "linear" or "softmax" (annealed.py).
    """

    def __init__(
        self,
        linear: nn.Linear,
        subln: SubLN | None = None,
        quantizer: WeightQuantizer = ABSMEAN,
        act_scale: str = "token",
    ):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.subln = subln
        self.backward = "exact"
        self.siblings: Siblings | None = None
        self.held: HeldCodes | None = None
        self.annealing, self.annealing_kind = 1.0, "linear"
        self.quantizer, self.act_scale = quantizer, act_scale
        self._refuse_partitions()
        quantizer.attach(self)

    def forward(self, x: Tensor | Gated) -> Tensor:
        if self.on_reference():
            return self._on_reference(x)
        gated = x if isinstance(x, Gated) else None
        x = gated.gate if gated else x
        kernels = kernels_for(x.device)
        if kernels is None:
            return self._on_reference(x)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected a last dimension of {self.in_features} (in_features); got {tuple(x.shape)}")
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        sharing = not torch.compiler.is_compiling()
        gain, eps = (None, 0.0) if self.subln is None else (self.subln.weight, self.subln.eps)
        columns, act_scale = self.quantizer.columns(self), self.act_scale
        if gated:
            activation, x = kernels.gated_quantize_input(x, gated.up, gain, eps, gated.activation, act_scale)
        elif sharing and self.siblings is not None:
            y = self.siblings.output(self, x, dtype)
            if y is not None:
                return y
            activation = self.siblings.input_codes(self, x)
        elif gain is None:
            activation = kernels.quantize_input(x, act_scale)
        elif _hooked(self.subln):
            x = self.subln(x)
            activation = kernels.quantize_input(x, act_scale)
        else:
            activation, x = kernels.norm_quantize_input(x, gain, eps, act_scale)
        if sharing and self.held is not None and self.held.belong_to(self.weight):
            ternary = kernels.stacked([self.held.codes])
        else:
            ternary = kernels.ternarize([self.weight], columns)
        biases = [] if self.bias is None else [self.bias]
        return kernels.ternary_linear(x, activation, [self.weight], biases, ternary, dtype, self.backward)

    def on_reference(self) -> bool:
        """Whether it runs in PyTorch even where there are kernels."""
        return self.annealing < 1 or not self.quantizer.has_kernels

    def _on_reference(self, x: Tensor) -> Tensor:
        self._refuse_partitions()
        if kernels_for(x.device) is not None:
            _say_once("annealing" if self.annealing < 1 else str(self.quantizer))
        x = x if self.subln is None else self.subln(x)
        codes, scale = self.codes()
        bias, weight = self.quantizer.bias(self, codes), self.weight
        divisor = self.quantizer.input_scale(self)
        if self.annealing < 1:
            quantized = self.quantizer.straight_through(self, codes, scale)
            kind, way = self.annealing_kind, self.annealing
            return annealed_linear(x, weight, quantized, bias, kind, way, self.act_scale, divisor)
        if self.quantizer.learned:
            weight = self.quantizer.straight_through(self, codes, scale)
        if divisor is not None:
            x, weight = (x / divisor).to(x.dtype), weight * divisor
        return reference.bit_linear(x, weight, bias, (codes, scale), self.quantizer.columns(self), self.act_scale)

    def _refuse_partitions(self) -> None:
        if hasattr(self.weight, "ds_id"):
            quantizers.refuse_partitions(self.quantizer)

    def codes(self) -> tuple[Tensor, Tensor]:
        """(codes int8 (O, I) in {-1, 0, 1}, scale fp32): what the layer multiplies by once it is ternary. The scale is (O, G)
        for groups of `quantizer.columns`, else it broadcasts to (O, I). Under ZeRO-3 gather its parameters first."""
        if self.quantizer.slow and self.held is not None and self.held.belong_to(self.weight):
            return self.held.codes
        return self.quantizer.codes(self)

    def ternary(self) -> tuple[Tensor, Tensor]:
        """`codes` for a packed file: (codes int8 (O, I) in {-1, 0, 1}, weight_scale fp32 () or (O, G))."""
        return self.codes()

    def whole_groups(self) -> tuple[Tensor, Tensor]:
        """`ternary` for formats in which every group of columns has the same size, and inputs have no scales.

        Raises:
            UserError: the last group of a row is narrower than the others, or the quantizer scales the input.
        """
        if self.quantizer.input_scale(self) is not None:
            raise UserError(
                "refine.weight_quantizer",
                expected="one without scales of the input channels, for which this format has no place",
                got=self.quantizer.name,
                do="Train with another --refine.weight_quantizer, or export the packed format.",
            )
        columns = self.quantizer.columns(self)
        if columns is not None and self.in_features % columns and self.in_features > columns:
            raise UserError(
                "refine.group_size",
                expected=f"a divisor of {self.in_features} (in_features), because this format has groups of one size",
                got=str(columns),
                do="Train with another --refine.group_size, or export the packed format.",
            )
        return self.ternary()

    def quantized_weight(self) -> Tensor:
        """fp32 (O, I), codes times scales, without a gradient."""
        return self.quantizer.dequantized(self, *self.codes())

    def ternary_bias(self) -> Tensor | None:
        """(O,) or None: the bias of the layer once it is ternary, that of its quantizer included."""
        return self.quantizer.bias(self, self.codes()[0])

    def watched(self) -> tuple[Tensor, Tensor]:
        """`codes` for looking at: of several scales the mean, fp32 ()."""
        codes, scale = self.codes()
        return codes, scale.mean()

    def takes_gated(self) -> bool:
        """Whether it may be given a `Gated`: on the kernels, unless someone wants to see its input or its SubLN's."""
        kernels = None if self.on_reference() else kernels_for(self.weight.device)
        return kernels is not None and not _hooked(self) and (self.subln is None or not _hooked(self.subln))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class GatedMLP(nn.Module):
    """``down_proj(act(gate_proj(x)) * up_proj(x))``: the MLP of every family, under the names it had.

    Args:
        mlp: the block to replace, with gate_proj, up_proj, down_proj (BitLinears) and act_fn.
        activation: its name in the model's config; the kernels know "silu" and "gelu_pytorch_tanh".
    """

    def __init__(self, mlp: nn.Module, activation: str):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.activation in ("silu", "gelu_pytorch_tanh") and self.down_proj.takes_gated():
            return self.down_proj(Gated(gate, up, self.activation))
        return self.down_proj(self.act_fn(gate) * up)


def _hooked(module: nn.Module) -> bool:
    """Whether its call does more than its class's forward, as under ZeRO-3, where it gathers the parameters, or another."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


@functools.cache
def _say_once(what: str) -> None:
    process_group.say(f"{what}: the ternary layers run on plain PyTorch; the kernels know absmean and no annealing")


def bit_linears(model: nn.Module) -> dict[str, BitLinear]:
    """Every BitLinear of a model by its name, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BitLinear)}


def use_backward(model: nn.Module, backward: str) -> None:
    """Sets how the kernels compute the gradients of every BitLinear: "exact" or "fast"."""
    assert backward in ("exact", "fast"), backward
    for layer in bit_linears(model).values():
        layer.backward = backward


def assert_fp32_masters(model: nn.Module) -> None:
    """Raises AssertionError naming the first BitLinear whose trainable weight is not fp32."""
    for name, layer in bit_linears(model).items():
        assert layer.weight.dtype == torch.float32, f"{name}: master weights must be fp32, found {layer.weight.dtype}"
