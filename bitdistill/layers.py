"""BitLinear and SubLN: the two modules that stage 1 puts into a model. The mathematics is in kernels/.

`bit_linear` below is the one door to a backend: today the PyTorch reference on every device; a faster backend takes over
behind one `if` here, and nothing else in the project changes.
"""

import torch
from torch import Tensor, nn

from bitdistill.kernels import reference


def bit_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The ternary product of kernels/reference.py, on the backend that suits ``x.device``."""
    return reference.bit_linear(x, weight, bias)


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


class BitLinear(nn.Module):
    """A linear layer with ternary weights and int8 activations, trained through fp32 master weights.

    Takes over the Parameter objects of the ``nn.Linear`` that it replaces, so that state-dict keys, ties and ZeRO-3
    partitions survive.

    Args:
        linear: the layer to replace; its weight (O, I) becomes the master and must be fp32 before training
            (`assert_fp32_masters`), because bf16 masters swallow most updates.
        subln: a SubLN of width I in front, or None.
    """

    def __init__(self, linear: nn.Linear, subln: SubLN | None = None):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.subln = subln

    def forward(self, x: Tensor) -> Tensor:
        return bit_linear(x if self.subln is None else self.subln(x), self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def bit_linears(model: nn.Module) -> dict[str, BitLinear]:
    """Every BitLinear of a model by its name, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BitLinear)}


def assert_fp32_masters(model: nn.Module) -> None:
    """Raises AssertionError naming the first BitLinear whose trainable weight is not fp32."""
    for name, layer in bit_linears(model).items():
        assert layer.weight.dtype == torch.float32, f"{name}: master weights must be fp32, found {layer.weight.dtype}"
