"""Stops NaN and infinity before the optimizer's step, and names the layer and the rows where they came from.

Losses are looked at when they are computed, gradients when they arrive at their parameters, weights before a checkpoint counts
as complete: so the last complete checkpoint is always a good one. All ranks stop together and say the same.

A gradient is seen by a hook on its parameter, on each rank its own, before an engine averages or partitions it, and before
clipping spreads a single NaN over all parameters. The ranks agree when the optimizer is asked to step. DeepSpeed does that
inside the backward call, so the Trainer's `on_pre_optimizer_step` would come too late; and with ZeRO it would skip such a
step silently and continue.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from bitdistill.data.tasks import attended
from bitdistill.distributed import process_group
from bitdistill.errors import UserError

DO = (
    "Lower the learning rate, lengthen the warm-up, or try --precision fp32; the same command goes on from the "
    "last checkpoint, which is good."
)


def where_not_finite(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> str | None:
    """The first place in a forward pass that is not finite: a weight, or what a layer makes of finite inputs.

    Every rank calls it: under ZeRO-3 the layers gather their weights.

    Args:
        model: a causal language model. input_ids, attention_mask: int64 (B, T).

    Returns: in words, for a message; None when everything is finite.
    """
    found = [f"weight {name}" for name in weights_not_finite(model)]

    def hook_of(name: str):
        def hook(_module, _inputs, output):
            first = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(first, Tensor) and not torch.isfinite(first).all():
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


def weights_not_finite(model: nn.Module) -> list[str]:
    """Names of the parameters that are not finite; of partitioned ones (ZeRO-3) this rank's part is looked at."""
    parts = [(name, getattr(parameter, "ds_tensor", parameter)) for name, parameter in model.named_parameters()]
    return [name for name, part in parts if not torch.isfinite(part.detach()).all()]


class FiniteSteps(TrainerCallback):
    """Stops a stage before a step on a loss or a gradient that is not finite, and before a checkpoint of such weights is
    complete.

    Args:
        stage: for messages.
        rows: gives the numbers of the rows, or blocks of the corpus, of the current step on this rank, in words.
        models: gives the models that a loss is computed from, by what they are called in a message.
    """

    def __init__(self, stage: str, rows: Callable[[], str], models: Callable[[], dict[str, nn.Module]]):
        self.stage, self.rows, self.models = stage, rows, models
        self.beat: Callable[[], None] = lambda: None  # called whenever a loss or a gradient is there
        self._hooks: list = []
        self._forget()

    def _forget(self, step: int = 0) -> None:
        self._step_number = step
        self._batch: dict[str, Tensor] | None = None
        self._loss: tuple[str, float] | None = None
        self._norms: dict[str, list[Tensor]] = {}  # of the gradients of each parameter, from the loss downward

    def see_loss(self, name: str, value: float, batch: dict[str, Tensor]) -> None:
        """Takes note of a term of the loss of a micro-batch, with the batch when it is not finite."""
        self.beat()
        if self._loss is None:
            self._batch = batch
            if not math.isfinite(value):
                self._loss = (name, value)

    def _see_gradient(self, name: str, gradient: Tensor | None) -> None:
        self.beat()
        if gradient is None:  # of a weight that the loss does not depend on
            return
        rows = torch.linalg.vector_norm(gradient.detach(), dim=-1, dtype=torch.float32)  # which PyTorch's threads share
        norm = torch.linalg.vector_norm(rows)
        self._norms.setdefault(name, []).append(norm)

    def gradients_not_finite(self) -> list[str]:
        """Names of parameters whose gradients of this step have no finite norm on this rank, nearest to the loss first."""
        norms = [torch.stack(norms).sum() for norms in self._norms.values()]
        finite = torch.stack(norms).isfinite().tolist() if norms else []
        return [name for name, good in zip(self._norms, finite, strict=True) if not good]

    def gradient_norm(self) -> Tensor | None:
        """The norm of all gradients of this step on this rank, float32 (); None where they came in parts, as with micro-batches,
        so that the norm of their sum is not known."""
        if not self._norms or any(len(norms) > 1 for norms in self._norms.values()):
            return None
        return torch.linalg.vector_norm(torch.stack([norm for (norm,) in self._norms.values()]))

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._hooks = [parameter.register_hook(partial(self._see_gradient, name)) for name, parameter in named]
        self._optimizer = optimizer.optimizer  # PyTorch's or DeepSpeed's, within accelerate's wrapper
        self._step_alone = self._optimizer.step
        self._optimizer.step = self._checked_step

    def _checked_step(self, *args, **kwargs):
        self.require_finite()
        return self._step_alone(*args, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        for hook in self._hooks:
            hook.remove()
        self._optimizer.step = self._step_alone

    def on_step_begin(self, args, state, control, **kwargs):
        self._forget(state.global_step + 1)

    def require_finite(self) -> None:
        """Raises UserError on every rank when losses or gradients of this step are not finite on any. Every rank calls it."""
        gradients = self.gradients_not_finite()
        losses_anywhere, gradients_anywhere = process_group.all_reduce_sum(
            torch.tensor([self._loss is not None, len(gradients)], device=process_group.device())
        ).tolist()
        if losses_anywhere:
            got = self._first(self._loss and f"{self._loss[1]} in loss_{self._loss[0]}", self._place())
            raise UserError("metrics.jsonl: loss", expected="finite numbers", got=got, do=DO)
        if gradients_anywhere:
            count = f"NaN or infinity in the norms of the gradients of {len(gradients)} parameters"
            got = self._first(gradients and f"{count}, nearest to the loss {gradients[0]}")
            raise UserError("metrics.jsonl: grad_norm", expected="finite numbers", got=got, do=DO)

    def _place(self) -> str:
        """Where in a forward pass the first number is that is not finite, in words; empty when nowhere. Every rank calls it."""
        ids, mask = self._batch["input_ids"], attended(self._batch["attention_mask"])
        places = {who: where_not_finite(model, ids, mask) for who, model in self.models().items()}
        return next((f", from {place} of the {who}" for who, place in places.items() if place), "")

    def _first(self, here: object, place: str = "") -> str:
        """What the first rank says that has something to say, with stage, step and rows, the same on every rank."""
        text = None
        if here:
            text = f"{here}, in stage {self.stage} at step {self._step_number} ({self.rows()}){place}"
            text += f", on rank {process_group.rank()}" if process_group.world_size() > 1 else ""
        return next(said for said in process_group.gather(text) if said is not None)

    def on_save(self, args, state, control, model=None, **kwargs):
        wrong = weights_not_finite(model)
        if process_group.all_reduce_sum(float(len(wrong))):
            got = self._first(wrong and f"NaN or infinity in {len(wrong)} parameters, the first {wrong[0]}")
            raise UserError("model.safetensors", expected="finite numbers", got=got, do=DO)
