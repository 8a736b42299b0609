"""Stops NaN and infinity before the optimizer's step, and names the layer and the rows where they came from.

A loss is checked before its backward pass (trainer.py), gradients before the step, and weights before a checkpoint counts
as complete. So the last complete checkpoint is always a good one.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import TrainerCallback

from bitdistill.errors import UserError

DO = (
    "Lower the learning rate, lengthen the warm-up, or try --precision fp32; the same command goes on from the "
    "last checkpoint, which is good."
)


def where_not_finite(model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> str | None:
    """The first place in a forward pass that is not finite: a weight, or what a layer makes of finite inputs.

    Args:
        model: a causal language model. input_ids, attention_mask: int64 (B, T).

    Returns: in words, for a message; None when everything is finite.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter.detach()).all():
            return f"weight {name}"
    found: list[str] = []

    def hook_of(name: str):
        def hook(_module, _inputs, output):
            first = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(first, torch.Tensor) and not torch.isfinite(first).all():
                found.append(f"output of {name} in {str(first.dtype).removeprefix('torch.')}")

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def gradients_not_finite(model: nn.Module) -> list[str]:
    """Names of the parameters whose gradients are not finite, the nearest to the loss first. Partitioned ones are not seen."""
    named = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]
    named = [(name, gradient) for name, gradient in named if gradient.numel()]
    if not named or torch.stack(torch._foreach_norm([gradient for _, gradient in named])).isfinite().all():
        return []
    return [name for name, gradient in reversed(named) if not torch.isfinite(gradient).all()]


def weights_not_finite(model: nn.Module) -> list[str]:
    """Names of the parameters that are not finite."""
    return [name for name, parameter in model.named_parameters() if not torch.isfinite(parameter.detach()).all()]


class FiniteSteps(TrainerCallback):
    """Stops a stage before a step on gradients that are not finite, and before a checkpoint of such weights is complete.

    Args:
        stage: for messages. rows: gives the numbers of the rows, or blocks of the corpus, of the current step, in words.
        norm: gives the norm of all gradients of the step, or None where it is not known: a finite one says all.
    """

    def __init__(self, stage: str, rows: Callable[[], str], norm: Callable[[], float | None] = lambda: None):
        self.stage, self.rows, self.norm = stage, rows, norm

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        norm = self.norm()
        wrong = [] if norm is not None and math.isfinite(norm) else gradients_not_finite(model)
        if wrong:
            got = f"NaN or infinity in {len(wrong)} of its parameters, nearest to the loss {wrong[0]}"
            got += f", in stage {self.stage} at step {state.global_step + 1} ({self.rows()})"
            raise UserError("metrics.jsonl: grad_norm", expected="finite numbers", got=got, do=DO)

    def on_save(self, args, state, control, model=None, **kwargs):
        wrong = weights_not_finite(model)
        if wrong:
            got = f"NaN or infinity in {len(wrong)} parameters, the first {wrong[0]}"
            got += f", in stage {self.stage} after step {state.global_step}"
            raise UserError("model.safetensors", expected="finite numbers", got=got, do=DO)
