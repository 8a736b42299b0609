"""Two terms of ``L = L_CE + lambda * L_LD + gamma * L_AD``: cross-entropy and logits distillation, on whole logits.

Pure functions of tensors, fp32 inside, scalars out. They are the specification of what head.py computes in training without
whole logits. The third term is in relations.py, its weight gamma in gamma.py.

All three have one rule of averaging: a loss is the *sum* over the rows it counts, divided by ``num_items``. When
``num_items`` is left out, it is the number of rows in this call. When it is given (the number over all ranks and
accumulation steps), the results of the parts add up to the loss of the whole batch, however that was cut.

Source: arXiv 2510.13998, equations 8-9 and 13.
"""

from torch import Tensor
from torch.nn import functional as F

from bitdistill.errors import UserError
from bitdistill.kernels.numerics import IGNORED


def next_tokens(labels_BT: Tensor) -> Tensor:
    """What each position is to predict: the labels moved one to the left, -100 at the end. int64 (B, T)."""
    return F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor, num_items: float | Tensor | None = None) -> Tensor:
    """``sum_t -log softmax(logits_t)[target_t] / num_items`` over the positions that have a target.

    Args:
        logits_BTV: float, any dtype; of all positions, or of some chosen with ``logits_to_keep``.
        targets_BT: int64, what the same positions are to predict, *already shifted* (``next_tokens``); -100 where
            nothing is to be learned. Only the other positions are computed.
        num_items: targets over all ranks and accumulation steps; None counts those of this call.

    Returns: fp32 scalar. Without a target: 0, still connected to the logits (its gradient is zero), so that a rank
    with an empty batch takes part in the backward pass.

    Numerics: fp32, on whole logits: the specification of what head.py computes in training without them.
    """
    assert logits_BTV.shape[:2] == targets_BT.shape, "one target per position of the logits"
    rows_BT = targets_BT != IGNORED
    total = F.cross_entropy(logits_BTV[rows_BT].float(), targets_BT[rows_BT], reduction="sum")
    return divide_by_items(total, int(rows_BT.sum()), num_items)


def logits_distillation(
    student_logits_BTV: Tensor,
    teacher_logits_BTV: Tensor,
    rows_BT: Tensor,
    *,
    temperature: float = 5.0,
    tau_squared: bool = False,
    num_items: float | Tensor | None = None,
) -> Tensor:
    """``sum_t KL(softmax(teacher_t / tau) || softmax(student_t / tau)) / num_items``, times tau^2 if asked for.

    Args:
        student_logits_BTV, teacher_logits_BTV: float, any dtype; no gradient reaches the teacher.
        rows_BT: bool, the positions to distill on, the only ones computed. Ours: those that predict a token of the
            response, ``next_tokens(labels_BT) != -100``. The authors' code: every unpadded one, prompt included.
        temperature: tau. The paper: 5, and no tau^2. The authors' code: 5 and tau_squared.
        num_items: rows over all ranks and accumulation steps; None counts those of this call.
        tau_squared: multiply the loss by temperature squared.

    Returns: fp32 scalar; 0 with a graph where no row is chosen. Numerics: as cross_entropy.

    Raises:
        UserError: the vocabularies differ.

    Source: arXiv 2510.13998, equations 8-9.
    """
    if student_logits_BTV.shape[-1] != teacher_logits_BTV.shape[-1]:
        raise UserError(
            "teacher.model",
            expected=f"logits over the student's vocabulary of {student_logits_BTV.shape[-1]} tokens",
            got=f"{teacher_logits_BTV.shape[-1]} tokens",
            do="Choose a teacher with the tokenizer and the padding of the embedding that the student has.",
        )
    assert student_logits_BTV.shape == teacher_logits_BTV.shape, "teacher and student saw different batches"
    student_NV = F.log_softmax(student_logits_BTV[rows_BT].float() / temperature, dim=-1)
    teacher_NV = F.log_softmax(teacher_logits_BTV.detach()[rows_BT].float() / temperature, dim=-1)
    total = F.kl_div(student_NV, teacher_NV, reduction="sum", log_target=True)
    loss = divide_by_items(total, len(student_NV), num_items)
    return loss * temperature**2 if tau_squared else loss


def divide_by_items(total: Tensor, count: int | Tensor, num_items: float | Tensor | None) -> Tensor:
    """A sum over rows, divided by `num_items`, or by the rows of this call where that is None: the rule of averaging above."""
    items = count if num_items is None else num_items
    if items == 0:  # nothing to count: the total is an empty sum, 0 with a graph
        assert count == 0, "num_items counts all ranks: it cannot be 0 where this one has rows"
        return total
    return total / items
