"""Rotary position embeddings of Hugging Face models by the compiled kernel, while they train on a CPU.

Attention calls a function of its modeling file. This function is replaced, for every model that uses the file; the kernel
gives the same bits.
"""

import functools
import sys
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

from bitdistill.student.backend import kernels_for

NAME = "apply_rotary_pos_emb"
# Attention of transformers whose embedding is x * cos + rotate_half(x) * sin over whole heads.
KNOWN = ("LlamaAttention", "Qwen2Attention", "Qwen3Attention", "Gemma3Attention")


def _files(model: nn.Module) -> set[ModuleType]:
    found = {type(module).__module__ for module in model.modules() if type(module).__name__ in KNOWN}
    return {sys.modules[name] for name in found if hasattr(sys.modules[name], NAME)}


def fuse_rotary(model: nn.Module) -> bool:
    """Lets the attention of `model` rotate queries and keys by the CPU's kernel wherever it can serve.

    Args:
        model: a causal LM, full precision or ternary.

    Returns: whether its attention is known, and the processor has kernels that the user wants.
    """
    files = _files(model)
    if kernels_for(torch.device("cpu")) is None:
        return False
    for file in files:
        original = getattr(file, NAME)
        if not _is_ours(original):
            setattr(file, NAME, functools.partial(_apply, original))
    return bool(files)


def unfuse_rotary(model: nn.Module) -> None:
    """Undoes `fuse_rotary`."""
    for file in _files(model):
        ours = getattr(file, NAME)
        if _is_ours(ours):
            setattr(file, NAME, ours.args[0])


def _is_ours(function: Callable) -> bool:
    return isinstance(function, functools.partial) and function.func is _apply


def _apply(
    original: Callable, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others, **named
) -> tuple[Tensor, Tensor]:
    if q.dtype == k.dtype == torch.bfloat16 and cos.dtype == sin.dtype == torch.float32:  # where products are bf16
        q, k = q.float(), k.float()  # as the multiplication with cos and sin would do
    tensors = (q, k, cos, sin)
    served = all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors) and not (others or named)
    served = served and q.dim() == k.dim() == 4 and cos.dim() == 3 and q.shape[-1] == k.shape[-1] == cos.shape[-1]
    if not served or not q.numel() or torch.compiler.is_compiling():
        return original(q, k, cos, sin, *others, **named)
    from bitdistill.kernels.cpu.rotary import rotary

    return rotary(q, k, cos, sin)
