"""The relation loss ``L_AD``: how differently teacher and student relate the tokens of a text to each other.

It was published in several forms that share a name but not a scale, so gamma means nothing without its convention
(docs/method.md, section 4). In each of them, a token's row of the relation R is

    eq12            softmax(A A^T / sqrt(d)), d the head width after regrouping: the paper's equations 10-12
    alg1            max(softmax(A^ A^^T / temperature), 1e-8), A^ = A / |A| per token and head: the paper's Algorithm 1
    pr382           alg1 at temperature 1; the sum is divided by num_layers * split_heads once more: the authors' code
    attention_maps  softmax(Q K^T / (temperature sqrt(d))), one term for Q and K together, times temperature^2

Which tokens a row relates to: with eq12 and alg1 all that are not padding, or with ``causal`` those that do not come after
it; with attention_maps always the latter (a sliding window is not applied). pr382 masks nothing, not even padding, so its
value depends on how far a batch was padded. Rows of padding are not counted, except by pr382.

Value and gradient come from ``row_kl``, or on a GPU from kernels/gpu/relation_kl.py, which keeps no T x T matrix (where it
cannot be used, that is said once). Relations of a teacher and its student differ by little: a KL of 1e-5 under a log Z of
8. ``row_kl`` therefore works on the difference of the logits and never on the difference of two logarithms. The clamp of
alg1 and pr382 is kept exactly: both probabilities are raised to 1e-8 and not renormalized, and a student probability below
it gets no gradient. At temperature 1 a cosine relation never reaches the clamp (below 1e7 tokens). Where nothing is
clamped, the value is the plain KL, with the accuracy of the centered form.

Sources: arXiv 2510.13998, equations 10-12 and Algorithm 1; microsoft/BitNet pull request 382; the attention maps come from
a secondary description of the method.
"""

import functools
import importlib.util
import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bitdistill.errors import UserError
from bitdistill.training.losses import divide_by_items

RELATION_CONVENTIONS = ("eq12", "alg1", "pr382", "attention_maps")
PROBABILITY_FLOOR = 1e-8  # of alg1 and pr382
# Numbers of a relation that a CPU works on at a time: half a dozen temporaries of that size fit into its L2 cache.
BLOCK_NUMBERS = 2**16
PR382_SPLIT_HEADS = 32


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

    ``sum_{A in Q,K,V} weight_A * mean_{heads, tokens} KL(R_teacher || R_student)``, R as its convention says (above).

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

    Numerics: fp32 whatever the inputs and autocast say.
    """
    _check_settings(convention, split_heads, temperature, causal, num_layers, weights)
    assert teacher_qkv[0].shape[::2] == student_qkv[0].shape[::2], "teacher and student saw different batches"
    pairs, weights = _pairs(convention, teacher_qkv, student_qkv, weights)
    if convention != "attention_maps":
        split_heads = _choose_heads(convention, split_heads, [(t[0], s[0]) for t, s in pairs])
    causal = causal or convention == "attention_maps"
    scale = 1.0 if convention == "eq12" else 1 / temperature
    cosine = convention in ("alg1", "pr382")
    floor = PROBABILITY_FLOOR if cosine else 0.0
    valid_BT = _valid(None if convention == "pr382" else attention_mask_BT, student_qkv[1])

    with torch.autocast(valid_BT.device.type, enabled=False):
        total = torch.zeros((), device=valid_BT.device)
        for weight, (teacher, student) in zip(weights, pairs, strict=True):
            rows = _fused_rows if _fused(teacher[0], student[0], split_heads) else _eager_rows
            kl_BHT = rows(teacher, student, valid_BT, causal, split_heads, cosine, scale, floor)
            total = total + weight * kl_BHT.sum() / kl_BHT.shape[1]  # padded rows have a KL of 0
    loss = divide_by_items(total, valid_BT.sum(), num_items)
    if convention == "pr382":
        return loss / (num_layers * split_heads)
    return loss * temperature**2 if convention == "attention_maps" else loss


def common_split_heads(*widths: int) -> list[int]:
    """The head counts that all ``widths`` (heads * head width, of Q and of K/V, of both models) can be regrouped to."""
    common = math.gcd(*widths)
    return [heads for heads in range(1, common + 1) if common % heads == 0]


def _pairs(convention: str, teacher_qkv, student_qkv, weights) -> tuple[list, list[float]]:
    """What is related to what: ((a, b) of the teacher, (a, b) of the student) for each term, and the weights of the terms."""
    if convention != "attention_maps":
        terms = [(((t, t), (s, s)), w) for t, s, w in zip(teacher_qkv, student_qkv, weights, strict=True) if w]
        return [pair for pair, _ in terms], [weight for _, weight in terms]
    teacher, student = tuple(teacher_qkv[:2]), tuple(student_qkv[:2])
    if teacher[0].shape[1] != student[0].shape[1]:
        raise UserError(
            "distill.relation",
            expected=f"as many query heads in the teacher as in the student ({student[0].shape[1]}) for attention_maps",
            got=str(teacher[0].shape[1]),
            do="Set distill.relation to eq12 or alg1, and distill.split_heads, for models of different shape.",
        )
    return [(teacher, student)], [1.0]


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
