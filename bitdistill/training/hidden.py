"""The hidden-state loss ``L_HS``: how far the student's residual stream is from the teacher's after each decoder layer.

    L_HS = 1/N sum_t 1/L sum_l |s_lt - h_lt|^2 / |h_lt|^2        s, h: student and teacher after layer l at token t

Every layer gets a target of its own, so a ternary layer is told directly what it should have computed, and not only through
all the layers above it. The error is relative to each token's own norm: the residual stream of a language model grows from
layer to layer, and by a factor of a hundred at its first token. A perfect copy has the loss 0, and a student whose states
are all 0 has the loss 1.

The method's paper does not have this term; it is 0 by default. Sources of the idea: TinyBERT, arXiv 1909.10351, section 3.1 (a
loss on each layer's hidden states); Patient Knowledge Distillation, arXiv 1908.09355 (normalized hidden states).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from bitdistill.errors import UserError
from bitdistill.training.losses import divide_by_items


def hidden_state_loss(
    teacher_states: Sequence[Tensor],
    student_states: Sequence[Tensor],
    mask_BT: Tensor,
    num_items: float | Tensor | None = None,
) -> Tensor:
    """``sum_t 1/L sum_l |s_lt - h_lt|^2 / |h_lt|^2 / num_items`` over the tokens of the mask.

    Args:
        teacher_states, student_states: L pairs of (B, T, H), any float dtype; no gradient reaches the teacher.
        mask_BT: bool or int, the tokens that count.
        num_items: tokens over all ranks and accumulation steps; None counts those of this call.

    Returns: fp32 scalar; 0 with a graph where no token counts.

    Numerics: fp32. A teacher's state of norm 0 is divided by the smallest normal number instead: its error is then huge rather
    than not a number.

    Source: as above.
    """
    assert len(teacher_states) == len(student_states) > 0, "as many states of the teacher as of the student"
    rows_BT, total = mask_BT.bool(), torch.zeros((), device=mask_BT.device)
    count = int(rows_BT.sum())
    left_out_BT = None if count == rows_BT.numel() else ~rows_BT
    for teacher_BTH, student_BTH in zip(teacher_states, student_states, strict=True):
        assert teacher_BTH.shape == student_BTH.shape, "states of one width, for the same tokens"
        total = total + _RelativeError.apply(teacher_BTH.detach(), student_BTH, left_out_BT)
    return divide_by_items(total / len(teacher_states), count, num_items)


class _RelativeError(torch.autograd.Function):
    """``sum_t |s_t - h_t|^2 / |h_t|^2`` in two passes over the states, and its gradient in one; nothing of their size is kept."""

    @staticmethod
    def forward(ctx, teacher_BTH, student_BTH, left_out_BT):
        target_BTH = teacher_BTH.float()
        norm_BT = torch.linalg.vector_norm(target_BTH, dim=-1).square_().clamp_min_(torch.finfo(torch.float32).tiny)
        error_BT = torch.linalg.vector_norm(student_BTH.float() - target_BTH, dim=-1).square_().div_(norm_BT)
        if left_out_BT is not None:
            error_BT.masked_fill_(left_out_BT, 0.0)
        ctx.save_for_backward(teacher_BTH, student_BTH, norm_BT, left_out_BT)
        return error_BT.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        teacher_BTH, student_BTH, norm_BT, left_out_BT = ctx.saved_tensors
        gradient_BTH = (student_BTH.float() - teacher_BTH.float()).mul_((2 * grad / norm_BT)[..., None])
        if left_out_BT is not None:
            gradient_BTH.masked_fill_(left_out_BT[..., None], 0.0)
        return None, gradient_BTH.to(student_BTH.dtype), None


def teacher_layers(student_depth: int, teacher_depth: int) -> list[int]:
    """The teacher's layer for each layer of the student: at the same share of the depth, the last for the last."""
    return [round((layer + 1) * teacher_depth / student_depth) - 1 for layer in range(student_depth)]


def check_hidden_sizes(teacher_config, student_config) -> None:
    """Raises UserError when the two residual streams differ in width, so that the loss has no meaning."""
    teacher, student = teacher_config.hidden_size, student_config.hidden_size
    if teacher != student:
        raise UserError(
            "distill.lambda_hidden",
            expected=f"a teacher of the student's hidden size, {student}",
            got=f"{teacher}",
            do="Set distill.lambda_hidden to 0; the relation loss works with teachers of other widths.",
        )


class HiddenStates:
    """Records what chosen decoder layers of a model put out, in the forward passes within a ``with`` block.

    Args:
        model: a Hugging Face causal language model, inside whatever DeepSpeed wraps around it.
        layers: decoder layers from 0; all by default.

    Attributes:
        states: (B, T, H) of each layer, in the order of `layers`, connected to the graph. A backward pass that computes
            checkpointed layers again records nothing.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int] | None = None):
        self._decoder: nn.Module = model.get_decoder()
        chosen = range(len(self._decoder.layers)) if layers is None else layers
        self._modules = [self._decoder.layers[layer] for layer in chosen]
        self._running, self._hooks = False, []
        self.states: list[Tensor] = []

    def __enter__(self):
        self._hooks = [
            self._decoder.register_forward_pre_hook(self._start),
            self._decoder.register_forward_hook(self._stop),
            *(module.register_forward_hook(self._note) for module in self._modules),
        ]
        return self

    def __exit__(self, *exception) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _start(self, *_) -> None:
        self.states, self._running, self._found = [], True, {}

    def _note(self, module: nn.Module, _inputs, output) -> None:
        if self._running:
            self._found[module] = output[0] if isinstance(output, tuple) else output

    def _stop(self, *_) -> None:
        self._running = False
        self.states = [self._found[module] for module in self._modules]
        self._found = {}
