"""Lets the RMSNorms of a Hugging Face model use the compiled kernel while the model trains on a CPU."""

import functools

import torch
from torch import Tensor, nn

from bitdistill.student.backend import kernels_for

# Classes of transformers that compute x / sqrt(mean(x^2) + variance_epsilon) * weight in float32. Gemma's has 1 + weight.
KNOWN = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


def fuse_norms(model: nn.Module) -> int:
    """Lets the RMSNorms of `model` run on the CPU's kernel wherever it can serve; the modules, their names and weights stay.

    A norm of another dtype than float32, on another device, partitioned or under torch.compile runs as transformers wrote it.

    Args:
        model: a causal LM, full precision or ternary.

    Returns: the number of norms; 0 where the processor has no kernels or the user wants none.
    """
    norms = [
        module for module in model.modules() if type(module).__name__ in KNOWN and hasattr(module, "variance_epsilon")
    ]
    if kernels_for(torch.device("cpu")) is None or any(norm.weight.device.type != "cpu" for norm in norms):
        return 0
    for norm in norms:
        norm.forward = functools.partial(_forward, norm)
    return len(norms)


def unfuse_norms(model: nn.Module) -> None:
    """Undoes `fuse_norms`."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), functools.partial) and vars(module)["forward"].func is _forward:
            del module.forward


def _forward(norm: nn.Module, x: Tensor) -> Tensor:
    whole = norm.weight.shape == x.shape[-1:] and not hasattr(norm.weight, "ds_id")
    served = whole and x.dtype == norm.weight.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0
    if not served or torch.compiler.is_compiling():
        return type(norm).forward(norm, x)
    from bitdistill.kernels.cpu.rms_norm import rms_norm

    return rms_norm(x, norm.weight, norm.variance_epsilon)
