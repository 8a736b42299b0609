"""The terms of ``L = L_CE + lambda * L_LD + gamma * L_AD``: pure functions of tensors, fp32 inside, scalars out.

Three terms, one rule of averaging: a loss is the *sum* over the rows it counts, divided by ``num_items``. Left out,
``num_items`` is the number of rows in this call. Given (the number over all ranks and accumulation steps), the results
of the parts add up to the loss of the whole batch, however it was cut.

The relation loss exists in several published forms that share a name and not a scale, so gamma means nothing without
its convention (docs/method.md, section 4):

    eq12            the paper's equations 10-12: softmax(A A^T / sqrt(d)), mean KL over heads and tokens
    alg1            the paper's Algorithm 1: heads regrouped, cosine / temperature, probabilities clamped at 1e-8
    pr382           the authors' code: alg1 at temperature 1, summed over padding too, divided by the heads again
    attention_maps  softmax(Q K^T / (temperature sqrt(d))), causal, times temperature^2

Relations of a teacher and its student differ by little: a KL of 1e-5 under a log Z of 8. ``row_kl`` therefore works on
the difference of the logits and never on the difference of two logarithms.

Sources: arXiv 2510.13998 (equations 8-13, Algorithm 1); microsoft/BitNet pull request 382.
"""

import functools
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bitdistill.errors import UserError
from bitdistill.kernels.numerics import IGNORED

RELATION_CONVENTIONS = ("eq12", "alg1", "pr382", "attention_maps")
PROBABILITY_FLOOR = 1e-8  # of alg1 and pr382
BLOCK_NUMBERS = (
    2**16
)  # of a relation that a CPU works on at a time: half a dozen temporaries then fit into its L2 cache
PR382_SPLIT_HEADS = 32


# ---------------------------------------------------------------------------------------------------- logits


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
    return _divide(total, int(rows_BT.sum()), num_items)


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
        rows_BT: bool, the positions to distil on, the only ones computed. Ours: those that predict a token of the
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
    loss = _divide(total, len(student_NV), num_items)
    return loss * temperature**2 if tau_squared else loss


def _divide(total: Tensor, count: int | Tensor, num_items: float | Tensor | None) -> Tensor:
    items = count if num_items is None else num_items
    if items == 0:  # nothing to count: the total is an empty sum, 0 with a graph
        assert count == 0, "num_items counts all ranks: it cannot be 0 where this one has rows"
        return total
    return total / items


# ---------------------------------------------------------------------------------------------------- relations


def relation_loss(
    teacher_qkv: Sequence[Tensor],
    student_qkv: Sequence[Tensor],
    attention_mask_BT: Tensor | None,
    *,
    convention: str = "eq12",
    split_heads: int | None = None,
    temperature: float = 1.0,
    causal: bool = False,
    num_layers: int = 1,
    weights: Sequence[float] = (1.0, 1.0, 1.0),
    num_items: float | Tensor | None = None,
) -> Tensor:
    """How differently teacher and student relate the tokens of a text to each other, in one layer.

    ``sum_{A in Q,K,V} weight_A * mean_{heads, tokens} KL(R_teacher || R_student)``, a token's row of ``R`` being

        eq12            softmax(A A^T / sqrt(d)), d the head width after regrouping
        alg1            max(softmax(A^ A^^T / temperature), 1e-8), A^ = A / |A| per token and head
        pr382           alg1 at temperature 1; the sum is divided by num_layers * split_heads once more
        attention_maps  softmax(Q K^T / (temperature sqrt(d))), one term for Q and K together, times temperature^2

    Keys: eq12 and alg1 relate a token to all unpadded tokens, or to those not after it with ``causal``; attention_maps
    is always causal (a sliding window is not applied); pr382 masks nothing, padding included, and so depends on how
    far a batch was padded. Padded rows are not counted, except by pr382.

    Args:
        teacher_qkv, student_qkv: (q_BHTD, k_BGTD, v_BGTD) float, any dtype: q and k after their norms and RoPE, v raw,
            k and v before the GQA repeat. Widths and head counts of the two models may differ. No gradient reaches the
            teacher.
        attention_mask_BT: 1 on tokens, 0 on padding; None for no padding.
        convention: one of RELATION_CONVENTIONS.
        split_heads: heads that H * D (and G * D) are regrouped to; must divide all widths. None: the models' own heads
            for eq12 and alg1, which then must agree, 32 for pr382. Not for attention_maps.
        temperature: of alg1 and attention_maps. causal: of eq12 and alg1.
        num_layers: of pr382, the number of layers that are distilled.
        weights: of the Q, K and V terms; a term of weight 0 is not computed. Not for attention_maps.
        num_items: the tokens counted over all ranks and accumulation steps: unpadded ones; for pr382 every position.

    Returns: fp32 scalar; 0 with a graph where no token is counted.

    Raises:
        UserError: an unknown convention, a setting that the convention does not have, or heads that do not divide.

    Numerics: fp32 whatever the inputs and autocast say; the value and its gradient come from ``row_kl``, or on a GPU from
    kernels/gpu/relation_kl.py, which keeps no T x T matrix (where it cannot serve, that is said once). The clamp of
    alg1 and pr382 is kept exactly: both probabilities are raised to 1e-8, not renormalized, and a student probability
    below it gets no gradient. At temperature 1 a cosine relation never reaches it (below 1e7 tokens); where it
    does not bite the value is the plain KL, with the accuracy of the centered form.

    Source: arXiv 2510.13998, equations 10-12 and Algorithm 1; microsoft/BitNet pull request 382; the attention maps
    come from a secondary description of the method.
    """
    _check_settings(convention, split_heads, temperature, causal, num_layers, weights)
    q, k = student_qkv[:2]
    assert teacher_qkv[0].shape[::2] == q.shape[::2], "teacher and student saw different batches"
    valid_BT = _valid(None if convention == "pr382" else attention_mask_BT, k)
    if convention == "attention_maps":
        pairs, weights = [((teacher_qkv[0], teacher_qkv[1]), (q, k))], (1.0,)
        if teacher_qkv[0].shape[1] != q.shape[1]:
            raise UserError(
                "distill.relation",
                expected=f"as many query heads in the teacher as in the student ({q.shape[1]}) for attention_maps",
                got=str(teacher_qkv[0].shape[1]),
                do="Set distill.relation to eq12 or alg1, and distill.split_heads, for models of different shape.",
            )
        causal, scale, floor = True, 1 / temperature, 0.0
    else:
        pairs = [((t, t), (s, s)) for t, s, w in zip(teacher_qkv, student_qkv, weights, strict=True) if w]
        weights = [w for w in weights if w]
        split_heads = _choose_heads(convention, split_heads, [(t[0], s[0]) for t, s in pairs])
        scale, floor = (1.0, 0.0) if convention == "eq12" else (1 / temperature, PROBABILITY_FLOOR)

    cosine = convention in ("alg1", "pr382")
    with torch.autocast(q.device.type, enabled=False):
        total = torch.zeros((), device=q.device)
        for weight, (teacher, student) in zip(weights, pairs, strict=True):
            fused = _fused(teacher[0], student[0], split_heads)
            rows = _fused_rows if fused else _eager_rows
            kl_BHT = rows(teacher, student, valid_BT, causal, split_heads, cosine, scale, floor)
            total = total + weight * kl_BHT.sum() / kl_BHT.shape[1]  # padded rows have a KL of 0
    loss = _divide(total, valid_BT.sum(), num_items)
    if convention == "pr382":
        return loss / (num_layers * split_heads)
    return loss * temperature**2 if convention == "attention_maps" else loss


def common_split_heads(*widths: int) -> list[int]:
    """The head counts that all ``widths`` (heads * head width, of Q and of K/V, of both models) can be regrouped to."""
    common = math.gcd(*widths)
    return [heads for heads in range(1, common + 1) if common % heads == 0]


def _check_settings(convention, split_heads, temperature, causal, num_layers, weights):
    """A setting that a convention does not have must be left alone: it would change nothing, silently."""
    if convention not in RELATION_CONVENTIONS:
        raise UserError(
            "distill.relation",
            expected=f"one of {RELATION_CONVENTIONS}",
            got=repr(convention),
            do="Choose one of these.",
        )
    if (num_layers != 1 and convention != "pr382") or (
        tuple(weights) != (1.0, 1.0, 1.0) and convention == "attention_maps"
    ):
        raise ValueError(f"relation convention {convention} has no num_layers {num_layers} or weights {weights}")
    foreign = {
        "distill.split_heads": (split_heads, split_heads is not None and convention == "attention_maps"),
        "distill.relation_temperature": (temperature, temperature != 1.0 and convention in ("eq12", "pr382")),
        "distill.relation_causal": (causal, causal and convention == "pr382"),
    }
    for setting, (value, is_set) in foreign.items():
        if is_set:
            raise UserError(
                setting,
                expected=f"its default, because distill.relation {convention} has no such setting",
                got=repr(value),
                do="Leave it out, or choose another distill.relation.",
            )


def _choose_heads(convention: str, split_heads: int | None, pairs: list[tuple[Tensor, Tensor]]) -> int | None:
    """The heads to regroup to; None keeps each model's own."""
    widths = sorted({x.shape[1] * x.shape[3] for pair in pairs for x in pair})
    if split_heads is None and convention == "pr382":
        split_heads = PR382_SPLIT_HEADS
    if split_heads is None:
        for teacher, student in pairs:
            if teacher.shape[1] != student.shape[1]:
                raise UserError(
                    "distill.split_heads",
                    expected=f"a number of heads to regroup both models to: one of {common_split_heads(*widths)}",
                    got=f"none, and {teacher.shape[1]} heads in the teacher but {student.shape[1]} in the student",
                    do="Set distill.split_heads to one of these.",
                )
        return None
    if split_heads < 1 or any(width % split_heads for width in widths):
        raise UserError(
            "distill.split_heads",
            expected=f"a divisor of the widths {widths} of Q, K and V in both models: "
            f"one of {common_split_heads(*widths)}",
            got=str(split_heads),
            do="Set distill.split_heads to one of these.",
        )
    return split_heads


def _valid(attention_mask_BT: Tensor | None, like_BHTD: Tensor) -> Tensor:
    if attention_mask_BT is None:
        return torch.ones(like_BHTD.shape[::2], dtype=torch.bool, device=like_BHTD.device)
    return attention_mask_BT.bool()


def _allowed(valid_BT: Tensor, causal: bool) -> Tensor:
    """Which keys a row may see, bool (B, 1, T, T). A padded row, never counted, sees all: a softmax needs a key."""
    allowed_BTT = valid_BT[:, None, :]
    if causal:
        size = valid_BT.shape[1]
        allowed_BTT = allowed_BTT & torch.ones(size, size, dtype=torch.bool, device=valid_BT.device).tril()
    return (allowed_BTT | ~valid_BT[:, :, None])[:, None]


def _fused(teacher: Tensor, student: Tensor, split_heads: int | None) -> bool:
    """Whether the Triton kernel computes this relation."""
    if not student.is_cuda:
        return False
    if importlib.util.find_spec("triton") is None:
        _say_eager("there is no triton here")
        return False
    from bitdistill.kernels.gpu.relation_kl import unsupported

    reason = unsupported(teacher, student, split_heads)
    if reason:
        _say_eager(f"the Triton kernel does not take {reason}")
    return not reason


@functools.cache
def _say_eager(reason: str) -> None:
    print(f"bitdistill: the relation loss holds whole T x T matrices, because {reason}", file=sys.stderr, flush=True)


def _fused_rows(teacher, student, valid_BT, causal, split_heads, cosine, scale, floor) -> Tensor:
    """As ``_eager_rows``, never with a T x T matrix."""
    from bitdistill.kernels.gpu.relation_kl import relation_kl_rows

    (teacher_a, teacher_b), (student_a, student_b) = teacher, student
    alone = student_b is student_a
    scales = [scale / math.sqrt(1 if cosine else _width(x, split_heads)) for x in (teacher_a, student_a)]
    return relation_kl_rows(
        teacher_a,
        None if alone else teacher_b,
        student_a,
        None if alone else student_b,
        valid_BT,
        causal=causal,
        scale_teacher=scales[0],
        scale_student=scales[1],
        cosine=cosine,
        split_heads=split_heads,
        floor=floor,
    )


def _width(x_BHTD: Tensor, split_heads: int | None) -> int:
    return x_BHTD.shape[3] if split_heads is None else x_BHTD.shape[1] * x_BHTD.shape[3] // split_heads


def _eager_rows(teacher, student, valid_BT, causal, split_heads, cosine, scale, floor) -> Tensor:
    """``row_kl`` of one relation, fp32 (B, H, T): two pairs (a_BHTD, b_BGTD) of which the students' carry the graph."""
    with torch.no_grad():
        teacher_BHTT = _relation_logits(*teacher, valid_BT, split_heads, cosine, scale)
    student_BHTT = _relation_logits(*student, valid_BT, split_heads, cosine, scale)
    return row_kl(teacher_BHTT, student_BHTT, _allowed(valid_BT, causal), floor)


def _relation_logits(a_BHTD, b_BGTD, valid_BT, split_heads, cosine, scale) -> Tensor:
    """``scale * A B^T`` (B, H, T, T) in fp32: cosines, or products over sqrt(d). Padded tokens count as zero vectors,
    so that whatever they hold, NaN included, touches neither the value nor the gradient."""
    sides = []
    for x_BHTD in (a_BHTD, b_BGTD) if b_BGTD is not a_BHTD else (a_BHTD,):
        x_BHTD = x_BHTD.float().masked_fill(~valid_BT[:, None, :, None], 0.0)
        if split_heads is not None:
            x_BHTD = x_BHTD.transpose(1, 2).flatten(2).unflatten(2, (split_heads, -1)).transpose(1, 2)
        sides.append(F.normalize(x_BHTD, dim=-1) if cosine else x_BHTD)
    a_BHTD, b_BGTD = sides[0], sides[-1]
    b_BHTD = b_BGTD.repeat_interleave(a_BHTD.shape[1] // b_BGTD.shape[1], dim=1)
    return a_BHTD @ b_BHTD.mT * (scale if cosine else scale / math.sqrt(a_BHTD.shape[-1]))


def row_kl(teacher: Tensor, student: Tensor, allowed: Tensor, floor: float = 0.0) -> Tensor:
    """``sum_j p'_j (log p'_j - log q'_j)`` per row, ``p' = max(softmax(teacher), floor)``, q' likewise.

    Args:
        teacher, student: (..., T) fp32 logits. allowed: bool, broadcastable to them, at least one True per row;
            other entries have probability 0 in both. floor: lower clamp of both probabilities; 0 for none.

    Returns: (...) fp32. The gradient flows to ``student`` alone and cannot be differentiated again.

    Numerics: with ``d = log q - log p``, taken as the difference of the logits less that of the two log Z,
    ``KL = sum_j p_j (expm1(d_j) - d_j)``: every term is >= 0, the terms that cancel in ``-sum_j p_j d_j`` are gone, and
    an error in log Z enters squared only. It equals ``log1p(P + D) - D`` with ``P = E_p[expm1(D_) - D_]``, where D_
    is the difference of the logits and D its mean, but survives logits that are far apart. The gradient
    ``q - p = p expm1(d)`` is formed in the same way. One tensor of the size of ``student`` is kept for the backward.
    """
    return _RowKL.apply(teacher, student, allowed, floor)


def _log_ratio_terms(p: Tensor, q: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """``(q - p, q - p - p d)`` for ``d = log(q / p)``, without cancellation where d is small."""
    near = d.abs() < 1
    growth = torch.expm1(d)
    return torch.where(near, p * growth, q - p), torch.where(near, p * (growth - d), q - p - p * d)


def _row_kl(teacher: Tensor, student: Tensor, allowed: Tensor | None, floor: float) -> tuple[Tensor, Tensor]:
    """``(q - p, KL)`` of rows (R, T). allowed: bool (R, T), None for everywhere."""
    d = student - teacher
    if allowed is not None:
        teacher = teacher.masked_fill(~allowed, -math.inf)
        d = d.masked_fill_(~allowed, 0.0)
    p = teacher.softmax(-1)
    centered = d - (p * d).sum(-1, keepdim=True)
    if float(centered.abs().amax()) < 1 and not (floor and float(p.amin()) < 3 * floor):
        return _row_kl_near(p, centered)
    if allowed is not None:
        student = student.masked_fill(~allowed, -math.inf)
    q = student.softmax(-1)
    d = d - (student.logsumexp(-1, keepdim=True) - teacher.logsumexp(-1, keepdim=True))
    d = d - torch.log1p(_log_ratio_terms(p, q, d)[0].sum(-1, keepdim=True))  # one Newton step: now sum(q) is sum(p)
    change, terms = _log_ratio_terms(p, q, d)
    if floor:
        p_raised, q_raised = p.clamp_min(floor), q.clamp_min(floor)
        d = torch.where((p < floor) | (q < floor), q_raised.log() - p_raised.log(), d)
        terms = _log_ratio_terms(p_raised, q_raised, d)[1] - ((q_raised - q) - (p_raised - p))
        seen = torch.where(q < floor, 0.0, p_raised) - p  # what the clamps change in the gradient's weights
        change = change - seen + q * seen.sum(-1, keepdim=True)
    return change, terms.sum(-1)


def _row_kl_near(p: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """`_row_kl` where no two logits moved apart by more than 2, as in relations that are being learned: p alone is needed.

    Args:
        p: the teacher's probabilities. d: student - teacher less any constant of the row; overwritten.

    Numerics: ``log E_p[exp d] = log1p(E_p[expm1 d])`` is the difference of the two log Z, exact and small.
    """
    shift = torch.log1p((p * torch.expm1(d)).sum(-1, keepdim=True))
    d = d.sub_(shift)
    growth = torch.expm1(d)
    change = p * growth
    return change, growth.sub_(d).mul_(p).sum(-1)


class _RowKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, teacher, student, allowed, floor):
        mask = None if bool(allowed.all()) else allowed.expand(student.shape).flatten(0, -2)
        teacher_RT, student_RT = (x.flatten(0, -2) if x.dim() > 1 else x[None] for x in (teacher, student))
        change_RT, kl_R = torch.empty_like(student_RT), torch.empty_like(student_RT[:, 0])
        at_once = max(1, BLOCK_NUMBERS // student_RT.shape[1]) if student.device.type == "cpu" else len(student_RT)
        for begin in range(0, len(student_RT), at_once):  # a CPU's temporaries stay in its cache
            of = slice(begin, begin + at_once)
            change_RT[of], kl_R[of] = _row_kl(teacher_RT[of], student_RT[of], None if mask is None else mask[of], floor)
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(change_RT.view(student.shape))
        return kl_R.view(student.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (change,) = ctx.saved_tensors
        return None, grad.unsqueeze(-1) * change, None, None


# ---------------------------------------------------------------------------------------------------- gamma


class BalancedGamma:
    """``gamma = rho * |grad task| / |grad L_AD|``, as a running mean: one rho for every convention and model.

    Both gradients are those that arrive at the student's Q, K and V of the highest distilled layer, where capture.py
    forks the graph: from the relations on one side, and on the other from the rest of the loss, ``L_CE + lambda *
    L_LD``. The second is read off the ordinary backward pass as it goes by. A backward pass of its own would be plainer,
    but DeepSpeed allows one per forward: its hooks reduce or release what the next one needs, at every ZeRO stage.

    A step:  gamma.watch(...) for each micro-batch -> backward with ``gamma.gamma`` -> gamma.finish_step(all_reduce).

    The mean is exponential with ``decay``, corrected for its start at zero. A step where a norm is zero or not finite
    (teacher and student still equal, no labels, an overflow) leaves it as it is and is counted in ``skipped``. Before
    the first good step gamma is 0.
    """

    def __init__(self, rho: float, decay: float = 0.99):
        if not rho > 0:
            raise UserError(
                "distill.gamma_rho", expected="a number above 0", got=str(rho), do="Set it to 1, which balances them."
            )
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected 0 <= decay < 1; got {decay}")
        self.rho, self.decay = rho, decay
        self.mean, self.updates, self.skipped = 0.0, 0, 0
        self.task_norm = self.attention_norm = 0.0  # of the step that was finished last, for the log
        self._squares: Tensor | None = None  # what was watched since: |grad task|^2 and |grad L_AD|^2, fp64

    @property
    def gamma(self) -> float:
        return self.rho * self.mean / (1 - self.decay**self.updates) if self.updates else 0.0

    def watch(self, ce: Tensor, attention: Tensor, relations: Sequence[Tensor], downstream: Sequence[Tensor]) -> None:
        """Looks at one micro-batch, before its backward pass.

        Args:
            ce: the cross-entropy, which must enter the loss with weight 1: whatever the loss is multiplied with after
                that (ranks, accumulation, loss scale) is read off it and divided out.
            attention: the relation loss, unweighted.
            relations, downstream: ``AttentionCapture.qkv`` and ``.downstream`` of the highest distilled layer.
        """
        assert all(x.requires_grad for x in (*relations, *downstream)), "Q, K and V of the student have no gradient"
        gradients = torch.autograd.grad(
            attention, list(relations), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        if self._squares is None:
            self._squares = torch.zeros(2, dtype=torch.float64, device=ce.device)
        squares, scale = self._squares, []
        squares[1] += sum(gradient.double().square().sum() for gradient in gradients)

        def read_scale(gradient: Tensor) -> None:
            scale[:] = [gradient.double()]

        def add_square(gradient: Tensor) -> None:
            squares[0] += (gradient.double() / scale[0]).square().sum()

        ce.register_hook(read_scale)
        for x in downstream:
            x.register_hook(add_square)

    def finish_step(self, all_reduce: Callable[[Tensor], Tensor] | None = None) -> float:
        """Takes what was watched into the mean, after the step's last backward pass; nothing watched, nothing done.

        Args:
            all_reduce: returns the sum of a tensor over all ranks. All ranks then hold the same gamma, and all must call.

        Returns: the new gamma.
        """
        if self._squares is not None:
            if all_reduce is not None:
                self._squares = all_reduce(self._squares)
            self.task_norm, self.attention_norm = self._squares.sqrt().tolist()
            self._squares = None
            if all(0 < norm < math.inf for norm in (self.task_norm, self.attention_norm)):
                self.mean = self.decay * self.mean + (1 - self.decay) * self.task_norm / self.attention_norm
                self.updates += 1
            else:
                self.skipped += 1
        return self.gamma

    def state_dict(self) -> dict:
        """What a resumed run needs to go on exactly; rho and decay are settings and come from the config."""
        assert self._squares is None, "finish the step before saving it"
        norms = {"task_norm": self.task_norm, "attention_norm": self.attention_norm}
        return {"mean": self.mean, "updates": self.updates, "skipped": self.skipped, **norms}

    def load_state_dict(self, state: dict) -> None:
        self.mean, self.updates, self.skipped = state["mean"], state["updates"], state["skipped"]
        self.task_norm, self.attention_norm = state["task_norm"], state["attention_norm"]
