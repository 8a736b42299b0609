"""The LM head inside the loss: hidden states and the head's weight go in, loss terms come out, and all logits never exist
at once.

The loss needs the head's weight, and under ZeRO-3 that is whole only while the head's own forward pass runs. So during one
call the head computes something else: ``instead_of_logits`` replaces its forward function, and the result of the
replacement arrives as ``model(...).logits``. The modeling code, ties, state-dict keys and DeepSpeed's hooks are not
affected.

    with instead_of_logits(student, lambda hidden, weight: head_cross_entropy(hidden, weight, targets, num_items)):
        ce = engine(**inputs).logits

A teacher returns its hidden states in the same way (``hidden_states``), and its head's weight separately. A quantized head
(embeddings.py) provides its quantized weight, which is made once per forward pass and whose gradient reaches the master.

The terms equal those of losses.py on whole logits, with the same rule of averaging; the mathematics is in
kernels/vocabulary.py. Only rows that a term counts are computed: for classification, the few positions that predict the
label word.

Shape suffixes: B sequences, P positions, H student hidden, G teacher hidden, V vocabulary, N rows that count.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from bitdistill.errors import UserError
from bitdistill.kernels.numerics import IGNORED
from bitdistill.kernels.vocabulary import linear_cross_entropy, linear_distillation, linear_distillation_top_k
from bitdistill.student.backend import kernels_for
from bitdistill.student.embeddings import multiplied_weight

_PRODUCTS: ContextVar[torch.dtype | None] = ContextVar("dtype of the head's products", default=None)


@contextmanager
def head_products(dtype: torch.dtype) -> Iterator[None]:
    """Inside, the heads of ``instead_of_logits`` multiply in `dtype`, whatever the rest of the model does.

    For the head alone, by far the largest product of a small model, of which everything else stays in fp32.
    """
    token = _PRODUCTS.set(dtype)
    try:
        yield
    finally:
        _PRODUCTS.reset(token)


@contextmanager
def instead_of_logits(model: nn.Module, compute: Callable[[Tensor, Tensor], Any]) -> Iterator[None]:
    """Inside, ``model(...).logits`` is ``compute(hidden_BPH, weight_VH)``.

    Args:
        model: the Hugging Face causal LM; under DeepSpeed the one inside the engine, and the engine may run it.
        compute: gets the final hidden states at the positions of ``logits_to_keep`` and the weight that the head multiplies
            with, whole.

    Raises:
        UserError: a head that is more than a product with its weight.
    """
    head = model.get_output_embeddings()
    if head.bias is not None or getattr(model.config, "final_logit_softcapping", None) is not None:
        raise UserError(
            "model",
            expected="logits that are a product of hidden states and the head's weight",
            got="a head with a bias" if head.bias is not None else "final_logit_softcapping in its config",
            do="Take another model: this one's loss cannot be computed without all of its logits.",
        )
    assert "forward" not in vars(head), "the head's forward was replaced already"
    if head.weight.device.type == "cpu":
        kernels_for(head.weight.device)  # finds out, once, whether the kernels that work on logits are right and wanted

    def forward(hidden_BPH: Tensor) -> Any:
        dtype = _PRODUCTS.get()
        autocast = nullcontext() if dtype is None else torch.autocast(hidden_BPH.device.type, dtype)
        with autocast:
            return compute(hidden_BPH, multiplied_weight(head))

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def hidden_states(hidden_BPH: Tensor, weight_VH: Tensor) -> Tensor:
    """For ``instead_of_logits``: no logits at all, just what the head would have got."""
    return hidden_BPH


@contextmanager
def head_weight(model: nn.Module) -> Iterator[Tensor]:
    """What the head multiplies with (V, H), whole also where it is partitioned: then collective, every rank comes here."""
    head = model.get_output_embeddings()
    if not hasattr(head.weight, "ds_id"):
        yield multiplied_weight(head)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([head.weight]):
        yield multiplied_weight(head)


def head_cross_entropy(hidden_BPH: Tensor, weight_VH: Tensor, targets_BP: Tensor, num_items: int) -> Tensor:
    """``losses.cross_entropy(hidden W^T, targets, num_items)``: fp32 scalar.

    Args:
        hidden_BPH: what the head gets. weight_VH: its weight.
        targets_BP: int64, what these positions are to predict, shifted already; -100 where nothing.
        num_items: targets over all ranks and accumulation steps.
    """
    x_NH, targets_N = _chosen(targets_BP != IGNORED, hidden_BPH, targets_BP)
    items = _count(num_items, len(x_NH))
    return linear_cross_entropy(x_NH, weight_VH, targets_N, ce_weight=1 / items) / items


def head_distillation(
    hidden_BPH: Tensor,
    weight_VH: Tensor,
    targets_BP: Tensor,
    rows_BP: Tensor,
    teacher_hidden_BPG: Tensor,
    teacher_weight_VG: Tensor,
    *,
    lambda_logits: float,
    temperature: float,
    tau_squared: bool,
    ce_items: int,
    kl_items: int,
) -> tuple[Tensor, Tensor]:
    """``(losses.cross_entropy, losses.logits_distillation)`` of the same logits, for ``CE + lambda_logits * KL``.

    Args:
        hidden_BPH, weight_VH, targets_BP: as in head_cross_entropy. A target outside ``rows_BP`` is an error.
        rows_BP: bool, the positions to distill on.
        teacher_hidden_BPG, teacher_weight_VG: of the teacher, at the same positions.
        lambda_logits: the weight of the second term beside the first in what will be differentiated. Both gradients are
            one tensor already when this returns; a backward pass with other weights gets NaN.
        temperature, tau_squared: as in losses.logits_distillation.
        ce_items, kl_items: targets, and rows to distill on, over all ranks and accumulation steps.

    Returns: two fp32 scalars, each with its own place in the graph.
    """
    assert bool((targets_BP[~rows_BP] == IGNORED).all()), "a target outside the rows that are distilled on"
    x_NH, targets_N, teacher_NG = _chosen(rows_BP, hidden_BPH, targets_BP, teacher_hidden_BPG)
    ce_items, kl_items = max(ce_items, 1), _count(kl_items, len(x_NH))
    factor = temperature**2 if tau_squared else 1.0
    ce, kl = linear_distillation(
        x_NH,
        weight_VH,
        targets_N,
        teacher_NG,
        teacher_weight_VG,
        temperature=temperature,
        ce_weight=1 / ce_items,
        kl_weight=lambda_logits * factor / kl_items,
    )
    return ce / ce_items, kl * (factor / kl_items)


def head_distillation_top_k(
    hidden_BPH: Tensor,
    weight_VH: Tensor,
    targets_BP: Tensor,
    indices_BPK: Tensor,
    values_BPK: Tensor,
    log_rest_BP: Tensor,
    *,
    lambda_logits: float,
    temperature: float,
    tau_squared: bool = False,
    rows_BP: Tensor | None = None,
    ce_items: int,
    kl_items: int,
) -> tuple[Tensor, Tensor]:
    """``(cross-entropy, KL_K of the teacher to the student)``, for ``CE + lambda_logits * KL_K``.

    Args:
        hidden_BPH, weight_VH, targets_BP: as in head_cross_entropy.
        indices_BPK, values_BPK, log_rest_BP: the teacher's K largest logits and the rest, as in
            vocabulary.linear_distillation_top_k. With ``rows_BP``, of the chosen rows alone: (N, K) and (N,).
        lambda_logits: as in head_distillation: a backward pass with another weight gets NaN.
        temperature, tau_squared: as in losses.logits_distillation.
        rows_BP: bool, the positions to distill on; every one when None. A target outside is an error.
        ce_items, kl_items: targets, and rows to distill on, over all ranks and accumulation steps.

    Returns: two fp32 scalars, each with its own place in the graph.
    """
    if rows_BP is None:
        x_NH, targets_N = hidden_BPH.flatten(0, 1), targets_BP.flatten()
        indices_BPK, values_BPK, log_rest_BP = (x.flatten(0, 1) for x in (indices_BPK, values_BPK, log_rest_BP))
    else:
        assert bool((targets_BP[~rows_BP] == IGNORED).all()), "a target outside the rows that are distilled on"
        x_NH, targets_N = _chosen(rows_BP, hidden_BPH, targets_BP)
    ce_items, kl_items = max(ce_items, 1), _count(kl_items, len(x_NH))
    factor = temperature**2 if tau_squared else 1.0
    ce, kl = linear_distillation_top_k(
        x_NH,
        weight_VH,
        targets_N,
        indices_BPK,
        values_BPK,
        log_rest_BP,
        temperature=temperature,
        ce_weight=1 / ce_items,
        kl_weight=lambda_logits * factor / kl_items,
    )
    return ce / ce_items, kl * (factor / kl_items)


def _chosen(rows_BP: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The chosen rows of each (B, P, ...)."""
    chosen_N = rows_BP.flatten().nonzero().squeeze(1)
    return [x.flatten(0, 1).index_select(0, chosen_N) for x in tensors]


def _count(num_items: int, rows: int) -> int:
    """What a sum over rows is divided by; an empty sum by anything."""
    assert num_items or not rows, "num_items counts all ranks: it cannot be 0 where this one has rows"
    return max(num_items, 1)
