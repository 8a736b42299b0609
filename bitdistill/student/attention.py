"""Attention of Hugging Face models by the compiled kernel, while they train on a CPU.

transformers finds a model's attention function by name. For the time of training, ours stands under the name "sdpa": it calls the
kernel wherever that can serve, and transformers' function elsewhere.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bitdistill.student.backend import attention_is_right

NAME = "sdpa"
OTHERS = ("softcap", "position_bias", "s_aux", "output_attentions", "cu_seq_lens_q")  # what the kernel knows nothing of


def fuse_attention() -> bool:
    """Lets the sdpa attention of all models run on the CPU's kernel wherever it can serve.

    Returns: whether the processor has kernels that are right and that the user wants.
    """
    right = attention_is_right()
    if right:
        AttentionInterface.register(NAME, _attention)
    return right


def unfuse_attention() -> None:
    """Undoes `fuse_attention`."""
    AttentionInterface.register(NAME, sdpa_attention_forward)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, **others,
) -> tuple[Tensor, None]:  # fmt: skip
    if torch.is_autocast_enabled("cpu"):  # as PyTorch's own attention does
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    known = not dropout and not any(others.get(name) is not None for name in OTHERS)
    if not known or not _serves(query, key, value, attention_mask, causal) or torch.compiler.is_compiling():
        settings = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal} | others
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    from bitdistill.kernels.cpu.training_attention import attention

    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return attention(query, key, value, attention_mask, scale).transpose(1, 2), None


def _serves(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Whether the kernel takes these: (B, H, T, D) and twice (B, G, T, D), causal or with a mask of booleans for all heads.

    In bf16 PyTorch is faster as long as there is no backward pass.
    """
    from bitdistill.kernels.cpu.training_attention import LARGEST

    tensors = (query, key, value)
    if any(x.device.type != "cpu" or x.dim() != 4 or x.dtype != query.dtype for x in tensors):
        return False
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    B, H, T, D = query.shape
    if query.dtype != torch.float32 and not (query.dtype == torch.bfloat16 and trains):
        return False
    if key.shape != value.shape or key.shape != (B, key.shape[1], T, D) or not query.numel() or T * D > LARGEST:
        return False
    if mask is None:
        return H % key.shape[1] == 0 and (causal or T == 1)
    return H % key.shape[1] == 0 and mask.dtype == torch.bool and mask.shape in ((B, 1, T, T), (1, 1, T, T))
