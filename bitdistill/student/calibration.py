"""Sums over the inputs of a layer, for the weight quantizers that depend on these inputs, and the error that they minimize."""

from dataclasses import dataclass

from torch import Tensor


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
