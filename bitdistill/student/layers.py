"""BitLinear, SubLN and GatedMLP: the modules that stage 1 puts into a model. The mathematics is in kernels/.

One `if` chooses the backend: the kernels on an NVIDIA GPU (backend.py), else the PyTorch reference. On the kernels what
stands before the quantiser, SubLN and the gate of an MLP, is one operation with it, and what can be shared is (sharing.py).
A layer that is being annealed, or has another weight quantizer than absmean, runs in PyTorch on every device
(quantizers.py).
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitdistill.distributed import launch
from bitdistill.errors import UserError
from bitdistill.kernels import reference
from bitdistill.student import quantizers
from bitdistill.student.backend import kernels_for
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
        weight_quantizer: a name of quantizers.py. What it keeps beside the master is saved with it: `gptq_factor`,
            `awq_scale` (buffers, to be filled from statistics of the inputs) or `seq_a` (learned).

    Attributes:
        backward: how the kernels compute gradients, "exact" or "fast" (kernels/gpu/matmul.py); `use_backward` sets it.
        siblings: the layers that are given the same tensor as this one, or None.
        held: this weight's codes while sharing.WeightCodes holds them.
        annealing: from 0, full precision, to 1, ternary weights and int8 activations: the ordinary layer, bit for bit.
        annealing_kind: what lies between, "linear" or "softmax" (quantizers.py).
    """

    def __init__(self, linear: nn.Linear, subln: SubLN | None = None, weight_quantizer: str = "absmean"):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.subln = subln
        self.backward = "exact"
        self.siblings: Siblings | None = None
        self.held: HeldCodes | None = None
        self.annealing, self.annealing_kind = 1.0, "linear"
        self.weight_quantizer = weight_quantizer
        self._refuse_partitions()
        like = {"dtype": torch.float32, "device": self.weight.device}
        if weight_quantizer == "gptq":
            self.register_buffer("gptq_factor", torch.eye(self.in_features, **like))
        elif weight_quantizer == "awq":
            self.register_buffer("awq_scale", torch.ones(self.in_features, **like))
        elif weight_quantizer == "seq":
            self.seq_a = nn.Parameter(quantizers.seq_start(self.weight))

    def forward(self, x: Tensor | Gated) -> Tensor:
        if self.on_reference():
            return self._on_reference(x)
        gated = x if isinstance(x, Gated) else None
        x = gated.gate if gated else x
        kernels = kernels_for(x.device)
        if kernels is None:
            return reference.bit_linear(x if self.subln is None else self.subln(x), self.weight, self.bias)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected a last dimension of {self.in_features} (in_features); got {tuple(x.shape)}")
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        sharing = not torch.compiler.is_compiling()
        gain, eps = (None, 0.0) if self.subln is None else (self.subln.weight, self.subln.eps)
        if gated:
            activation, x = kernels.gated_quantize_input(x, gated.up, gain, eps, gated.activation)
        elif sharing and self.siblings is not None:
            y = self.siblings.output(self, x, dtype)
            if y is not None:
                return y
            activation = self.siblings.input_codes(self, x)
        elif gain is None:
            activation = kernels.quantize_input(x)
        elif _hooked(self.subln):
            x = self.subln(x)
            activation = kernels.quantize_input(x)
        else:
            activation, x = kernels.norm_quantize_input(x, gain, eps)
        if sharing and self.held is not None and self.held.fit(self.weight):
            ternary = kernels.stacked([self.held.codes])
        else:
            ternary = kernels.ternarize([self.weight])
        biases = [] if self.bias is None else [self.bias]
        return kernels.ternary_linear(x, activation, [self.weight], biases, ternary, dtype, self.backward)

    def on_reference(self) -> bool:
        """Whether it runs in PyTorch even where there are kernels."""
        return self.annealing < 1 or self.weight_quantizer != "absmean"

    def _on_reference(self, x: Tensor) -> Tensor:
        self._refuse_partitions()
        if kernels_for(x.device) is not None:
            _say_once("annealing" if self.annealing < 1 else f"weight quantizer {self.weight_quantizer}")
        x = x if self.subln is None else self.subln(x)
        codes, scale = self._quantize()
        bias, weight = self._bias(codes), self.weight
        if self.annealing < 1 or self.weight_quantizer == "seq":
            if self.weight_quantizer == "seq":
                quantized = quantizers.seq_weight(weight, self.seq_a, (codes, scale))
            else:
                quantized = quantizers.straight_through(weight, codes * scale)
            if self.annealing < 1:
                return quantizers.annealed_linear(x, weight, quantized, bias, self.annealing_kind, self.annealing)
            weight = quantized
        if scale.dim():
            return quantizers.scaled_linear(x, weight, codes * scale, bias)
        return reference.bit_linear(x, weight, bias, (codes, scale))

    def _quantize(self) -> tuple[Tensor, Tensor]:
        """(codes int8 (O, I), scale fp32 (), (I,) or (O, I))."""
        if self.weight_quantizer == "block":
            return quantizers.block_codes(self.weight)
        if self.weight_quantizer == "gptq":
            if self.held is not None and self.held.fit(self.weight):
                return self.held.codes
            return quantizers.gptq_codes(self.weight, self.gptq_factor)
        if self.weight_quantizer == "awq":
            return quantizers.awq_codes(self.weight, self.awq_scale)
        if self.weight_quantizer == "seq":
            return quantizers.seq_codes(self.weight, self.seq_a)
        return reference.quantize_weight(self.weight)

    def _bias(self, codes: Tensor) -> Tensor | None:
        if self.weight_quantizer != "tequila":
            return self.bias
        extra = self.annealing * quantizers.tequila_bias(self.weight, codes)
        return extra if self.bias is None else self.bias + extra

    def _refuse_partitions(self) -> None:
        if self.weight_quantizer in quantizers.WHOLE and hasattr(self.weight, "ds_id"):
            raise UserError(
                "refine.weight_quantizer",
                expected="with ZeRO-3 one that needs its own weight alone: absmean, block, awq or tequila",
                got=self.weight_quantizer,
                do="Choose another, or --zero 2.",
            )

    def ternary(self) -> tuple[Tensor, Tensor]:
        """(codes int8 (O, I) in {-1, 0, 1}, weight_scale fp32 ()): what the layer multiplies by once it is ternary. Under
        ZeRO-3 gather its parameters first.

        Raises:
            UserError: its quantizer has more than one scale.
        """
        codes, scale = self._quantize()
        if scale.dim():
            raise UserError(
                "refine.weight_quantizer",
                expected="one with one scale a tensor, for a packed file: absmean, gptq, tequila or seq",
                got=f"{self.weight_quantizer}, which has one for each {'block' if scale.dim() == 2 else 'input channel'}",
                do="Leave the export out (--export.enabled false), or train with another.",
            )
        return codes, scale

    def ternary_bias(self) -> Tensor | None:
        """(O,) or None: the bias of the layer once it is ternary, that of its quantizer included."""
        return self._bias(self._quantize()[0]) if self.weight_quantizer == "tequila" else self.bias

    def watched(self) -> tuple[Tensor, Tensor]:
        """`ternary` for looking at: of several scales the mean, fp32 ()."""
        codes, scale = self._quantize()
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
    """Whether its call does more than its forward, as under ZeRO-3, where it gathers the parameters."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


@functools.cache
def _say_once(what: str) -> None:
    launch.say(f"{what}: the ternary layers run on plain PyTorch; the Triton kernels know absmean, and no annealing")


def bit_linears(model: nn.Module) -> dict[str, BitLinear]:
    """Every BitLinear of a model by its name, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BitLinear)}


def use_backward(model: nn.Module, backward: str) -> None:
    """Sets how the GPU kernels compute the gradients of every BitLinear: "exact" or "fast"."""
    assert backward in ("exact", "fast"), backward
    for layer in bit_linears(model).values():
        layer.backward = backward


def assert_fp32_masters(model: nn.Module) -> None:
    """Raises AssertionError naming the first BitLinear whose trainable weight is not fp32."""
    for name, layer in bit_linears(model).items():
        assert layer.weight.dtype == torch.float32, f"{name}: master weights must be fp32, found {layer.weight.dtype}"
