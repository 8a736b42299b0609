"""Losses over the vocabulary from hidden states, with their gradients, without the logits of all rows.

    z_n = W x_n        CE = sum_n -log softmax(z_n)[target_n]        KL = sum_n KL(softmax(t_n / tau) || softmax(z_n / tau))

The teacher's logits t_n come from a second head, ``t_n = W' x'_n``, or are known for its largest words only (a cache). The
logits of 8,192 rows of 151,936 words take 5 GB in fp32, and autograd would hold several such tensors. So the rows are
processed in chunks: a product gives the logits of a chunk, vocabulary_rows.py computes its losses and writes their gradient
over the logits, and two more products turn that into dx and, summed in fp32, into dW. Because the loss is the end of the
graph, all of this happens in the forward pass: four products altogether, nothing is recomputed, and the backward pass only
multiplies by the incoming scalar (on a CPU not even that where it is 1). At any time, memory holds ``chunk_bytes`` of
logits, and dW, which is a result. The vocabulary itself is never divided, because a row of it is below 1 MB.

For this, the weights of the two losses in what will be differentiated must be known in the forward pass (``ce_weight``,
``kl_weight``, up to a common factor such as a loss scale). A backward pass with other weights gets NaN, never a wrong
gradient.

It is one custom operator, so that torch.compile sees one node and not a graph break, and autocast cannot change what is
inside. The work on rows is done by Triton kernels on a GPU (gpu/vocabulary_kl.py), by compiled ones on a CPU
(cpu/vocabulary_rows.py), and by PyTorch elsewhere. The products are PyTorch's, but for those in bf16 on a CPU with AMX
(cpu/vocabulary_tiles.py).

Cached words. Let K be the words whose teacher logits are cached, and r the log of the sum of exp(t / tau) over all others.
For teacher and student alike, all other words together count as one further outcome:

    KL_K = sum_{i in K} p_i log(p_i / q_i) + p_rest log(p_rest / q_rest),   p_rest = 1 - sum_K p,  q_rest = 1 - sum_K q

This is a lower bound of the KL over all words, and equal to it when at most one word is left over. Without r, the teacher's
probabilities are renormalized over K (p_rest = 0), but the student's are not: probability that it gives to other words is
punished.

Shape suffixes: N rows, H student hidden, V vocabulary, K cached words, C a chunk of rows.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bitdistill.kernels.vocabulary_rows import dense_rows_, in_blocks, rest_rows_, top_k_rows_

# On a GPU 2,048 rows of 151,936 words in bf16, of student and teacher: 8,192 rows then read and write dW four times.
# On a CPU a tenth of that: 682 rows of 49,152 words in fp32; products of fewer than 512 are slower.
CHUNK_BYTES = {"cuda": 5 * 2**28, "cpu": 2**27}
SLICE_BYTES = {"cuda": 2**25, "cpu": 2**21}  # of dW while a product is added to it: stays in the L2 cache
LOGIT_WORDS = 256  # for each thread of a CPU, in fp32: a product with all words at once took up to 1.7 times as long
FEW_ROWS = 64  # up to which dW costs a CPU no more in fp32 than in bf16, whose product has to be copied
ROUNDINGS = 4 * torch.finfo(torch.float32).eps  # what the scalar of a backward pass went through: within them, it is 1


class _Chosen:
    """What `use_compiled_rows` chose."""

    compiled_rows = True


def use_compiled_rows(use: bool) -> None:
    """Chooses for this process whether the compiled kernels make and work on rows of logits on a CPU, or PyTorch does.

    Args:
        use: True by default. False where the kernels were found wrong on this machine, or are not wanted.
    """
    _Chosen.compiled_rows = use


def linear_cross_entropy(
    x_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, *, ce_weight: float = 1.0, chunk_bytes: int | None = None
) -> Tensor:
    """``sum_n -log softmax(W x_n)[target_n]`` over the rows that have a target.

    Args:
        x_NH: float; under autocast the products run in its dtype, else in the common dtype of x and W.
        weight_VH: float; fp32 masters or half precision, trained or frozen.
        targets_N: int64; -100 where a row has none (better not to pass such rows).
        ce_weight: > 0, of the sum in the loss that will be differentiated. Another weight is right too, at a pass over dW.
        chunk_bytes: what logits and their temporaries may take at a time, at least one row; None is the device's CHUNK_BYTES.

    Returns: fp32 scalar; 0 with a graph for N = 0.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Numerics: logits in the dtype of the products, everything over the vocabulary in fp32, dW summed in fp32.
    """
    return _losses(x_NH, weight_VH, targets_N, ce_weight=ce_weight, chunk_bytes=chunk_bytes)[0]


def linear_distillation(
    x_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    *,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``(CE, KL)`` summed over rows, of a student head and a teacher head on the same positions.

    Args:
        x_NH, weight_VH, targets_N, chunk_bytes: as in linear_cross_entropy. Every row counts for the KL.
        teacher_x: (N, its own hidden width). teacher_weight: (V, that width). Their products run in their common dtype,
            autocast or not; no gradient reaches them.
        temperature: tau. The KL is not multiplied by tau^2.
        ce_weight, kl_weight: >= 0, of the two sums in the loss that will be differentiated, up to a common factor.

    Returns: two fp32 scalars. They may be differentiated once together, weighted so: other weights give NaN gradients.

    Raises: ValueError as linear_cross_entropy. Numerics: as linear_cross_entropy; KL from terms that are never negative.
    """
    return _losses(
        x_NH,
        weight_VH,
        targets_N,
        teacher_x=teacher_x,
        teacher_weight=teacher_weight,
        temperature=temperature,
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        chunk_bytes=chunk_bytes,
    )


def linear_distillation_top_k(
    x_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    indices_NK: Tensor,
    values_NK: Tensor,
    log_rest_N: Tensor | None,
    *,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``(CE, KL_K)`` summed over rows, with the teacher's logits known at K words of each row.

    Args:
        x_NH, weight_VH, targets_N, temperature, ce_weight, kl_weight, chunk_bytes: as in linear_distillation.
        indices_NK: int32 or int64, the words; distinct within a row.
        values_NK: float, the teacher's logits there, up to one constant a row.
        log_rest_N: fp32, ``log sum exp(t_j / temperature)`` over all other words j, with the same constant in t;
            -inf for none. None renormalizes the teacher over its K words (the same as -inf throughout).

    Returns, Raises, Numerics: as linear_distillation.
    """
    if log_rest_N is None:
        log_rest_N = torch.full_like(targets_N, -math.inf, dtype=torch.float32)
    return _losses(
        x_NH,
        weight_VH,
        targets_N,
        indices=indices_NK,
        values=values_NK,
        log_rest=log_rest_N,
        temperature=temperature,
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        chunk_bytes=chunk_bytes,
    )


def linear_top_k(
    x_NH: Tensor, weight_VH: Tensor, k: int, *, temperature: float, chunk_bytes: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of the logits ``t = W x`` of each row, and the sum of all others: what linear_distillation_top_k needs.

    Args:
        x_NH, weight_VH: of the teacher, as in linear_cross_entropy. k: at most V. chunk_bytes: as there.
        temperature: tau of the rest.

    Returns: (words, int64 (N, k), the largest first; ``t - max t`` there, fp32 (N, k); ``log sum exp((t_j - max t) / tau)``
    over all other words j, fp32 (N,), -inf for none). No gradient.

    Raises: ValueError: k outside 1..V, or widths that do not fit.

    Numerics: products in the common dtype of x and W with an fp32 result (on a CPU in half precision: rounded to it once).
    """
    N, V = len(x_NH), len(weight_VH)
    if not 1 <= k <= V:
        raise ValueError(f"k: expected 1 to {V}, the words of the head; got {k}. Choose a smaller one.")
    if x_NH.dim() != 2 or x_NH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"x: expected rows (N, {weight_VH.shape[1]}); got {tuple(x_NH.shape)}. Flatten batch and positions."
        )
    device, dtype = x_NH.device, torch.promote_types(x_NH.dtype, weight_VH.dtype)
    indices_NK = torch.empty((N, k), dtype=torch.int64, device=device)
    values_NK = torch.empty((N, k), dtype=torch.float32, device=device)
    log_rest_N = torch.empty(N, dtype=torch.float32, device=device)
    # fp32 logits and two temporaries of a logsumexp
    at_once = _rows_at_once(N, V, 12, _chunk_bytes(chunk_bytes, device.type))
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        weight = weight_VH.to(dtype)
        for begin in range(0, N, at_once):
            of = slice(begin, min(begin + at_once, N))
            t = _product(x_NH[of].to(dtype), weight.T).float()
            values, indices = t.topk(k)
            peak = values[:, :1]
            values_NK[of], indices_NK[of] = values - peak, indices
            t = t.sub_(peak).mul_(1 / temperature).scatter_(1, indices, -math.inf)
            log_rest_N[of] = t.logsumexp(-1)
    return indices_NK, values_NK, log_rest_N


# ---------------------------------------------------------------------------------------------------- chunks


def _losses(
    x_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    teacher_x: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    indices: Tensor | None = None,
    values: Tensor | None = None,
    log_rest: Tensor | None = None,
    temperature: float = 1.0,
    ce_weight: float = 1.0,
    kl_weight: float = 0.0,
    chunk_bytes: int | None,
) -> tuple[Tensor, Tensor]:
    _check(x_NH, weight_VH, targets_N, teacher_x, teacher_weight, indices, values, log_rest, temperature)
    device = x_NH.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else torch.promote_types(x_NH.dtype, weight_VH.dtype)
    differentiate = torch.is_grad_enabled()
    losses, _, _ = _operator(
        x_NH,
        weight_VH,
        targets_N,
        teacher_x,
        teacher_weight,
        indices,
        values,
        log_rest,
        ce_weight,
        kl_weight,
        1 / temperature,
        dtype,
        differentiate and x_NH.requires_grad,
        differentiate and weight_VH.requires_grad,
        _chunk_bytes(chunk_bytes, device),
    )
    return losses[0], losses[1]


def _check(x, weight, targets, teacher_x, teacher_weight, indices, values, log_rest, temperature) -> None:
    floats = (torch.float32, torch.bfloat16, torch.float16)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x: expected rows (N, {weight.shape[-1]}), as wide as the head's weight; got {tuple(x.shape)}. "
            "Under ZeRO-3 gather the weight first."
        )
    if x.dtype not in floats or weight.dtype not in floats:
        raise ValueError(
            f"x: expected float32, bfloat16 or float16; got {x.dtype} and {weight.dtype}. Cast them first."
        )
    if targets.shape != x.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets: expected int64 ({len(x)},); got {targets.dtype} {tuple(targets.shape)}. Shift them."
        )
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0; got {temperature}. The paper takes 5.")
    expected = None if teacher_x is None else (len(x), teacher_weight.shape[1])
    if teacher_x is not None and (teacher_x.shape != expected or len(teacher_weight) != len(weight)):
        raise ValueError(
            f"teacher: expected rows {expected} and a head of {len(weight)} words; got rows {tuple(teacher_x.shape)} "
            f"and a head {tuple(teacher_weight.shape)}. Teacher and student need one vocabulary and one batch."
        )
    if indices is not None:
        if indices.shape != values.shape or indices.dim() != 2 or len(indices) != len(x) or not indices.shape[1]:
            raise ValueError(
                f"indices: expected ({len(x)}, K) like the values, K at least 1; got {tuple(indices.shape)} and "
                f"{tuple(values.shape)}. Take both from one cache."
            )
        if log_rest.shape != x.shape[:1]:
            raise ValueError(f"log_rest: expected ({len(x)},); got {tuple(log_rest.shape)}. One number per row.")


def _row_functions(device: torch.device, *dtypes: torch.dtype) -> tuple[Callable, Callable]:
    """``dense_rows_`` and ``rest_rows_`` for logits of these dtypes: the kernels of the device, else the specification."""
    if device.type == "cuda":
        from bitdistill.kernels.gpu import vocabulary_kl

        return vocabulary_kl.dense_rows_, vocabulary_kl.rest_rows_
    if device.type == "cpu" and _Chosen.compiled_rows:
        from bitdistill.kernels.cpu import vocabulary_rows

        if vocabulary_rows.serves(*dtypes):
            return vocabulary_rows.dense_rows_, vocabulary_rows.rest_rows_
    return in_blocks(dense_rows_), in_blocks(rest_rows_)


def _chunk_bytes(wanted: int | None, device_type: str) -> int:
    return CHUNK_BYTES[device_type] if wanted is None else wanted


def _rows_at_once(rows: int, vocabulary: int, bytes_a_logit: int, chunk_bytes: int) -> int:
    """Rows of a chunk within ``chunk_bytes``, all chunks about equally large."""
    most = max(1, chunk_bytes // (vocabulary * bytes_a_logit))
    return math.ceil(rows / math.ceil(rows / most)) if rows else 1


def _logit_rows(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for logits, its rows 16 elements apart or a multiple: whole vectors for loads and products, odd V too.

    On a CPU the multiple is odd. The same word of neighboring rows, which a product for dW reads one after the other, would
    else lie in one set of a cache where V is a multiple of 1,024: 49,152 words took a seventh longer.

    What pads a row is zero: oneDNN's half-precision products read whole tiles (AMX) and multiply the padding by zero, which
    is NaN where the memory happens to hold one.
    """
    blocks = -(-vocabulary // 16)
    if device.type == "cpu":
        blocks |= 1
    room = torch.empty((rows, blocks * 16), dtype=dtype, device=device)
    room[:, vocabulary:] = 0
    return room[:, :vocabulary]


class _PlainProducts:
    """The three products of a head with the logits of a chunk of rows: PyTorch's.

    Args:
        x, weight: hidden states (N, H) and head (V, H). dtype: of the products. at_once: rows of a chunk, at most.
    """

    def __init__(self, x: Tensor, weight: Tensor, dtype: torch.dtype, at_once: int):
        self.x, self.weight = x.to(dtype), weight.to(dtype)
        self.room = _logit_rows(at_once, len(weight), dtype, x.device)
        sliced = x.device.type == "cpu" and dtype == torch.float32
        self.words = LOGIT_WORDS * torch.get_num_threads() if sliced else max(1, len(weight))

    def logits(self, of: slice) -> Tensor:
        """``z = x W^T`` of these rows, good until the next call; what is written over it is meant below."""
        self.of = of
        x, z = self.x[of], self.room[: of.stop - of.start]
        for weight, out in zip(self.weight.split(self.words), z.split(self.words, dim=1), strict=True):
            torch.mm(x, weight.T, out=out)
        return z

    def hidden_gradient(self, z: Tensor, dx: Tensor) -> None:
        """``dx = z W``."""
        if dx.dtype == z.dtype == torch.float32:
            torch.mm(z, self.weight, out=dx)
        else:
            dx.copy_(_product(z, self.weight))

    def add_weight_gradient_(self, dw: Tensor, z: Tensor, first: bool, factor: float) -> None:
        """``dW = (0 if first else dW) + factor * z^T x``, fp32."""
        _add_product_(dw, z, self.x[self.of], first, factor)


def _products(x: Tensor, weight: Tensor, dtype: torch.dtype, at_once: int):
    """The products of these operands: by tiles on a CPU with AMX, else PyTorch's."""
    if x.device.type == "cpu" and _Chosen.compiled_rows:
        from bitdistill.kernels.cpu import vocabulary_tiles

        if vocabulary_tiles.serves(dtype):
            return vocabulary_tiles.TileProducts(x, weight, at_once)
    return _PlainProducts(x, weight, dtype, at_once)


def _add_product_(total_VH: Tensor, gradient_CV: Tensor, x_CH: Tensor, first: bool, factor: float) -> None:
    """``total = (0 if first else total) + factor * gradient^T x`` in fp32, a slice of the vocabulary at a time."""
    words = max(1, SLICE_BYTES[x_CH.device.type] // (4 * x_CH.shape[1]))
    whole = x_CH.dtype == torch.float32 or (x_CH.device.type == "cpu" and len(x_CH) <= FEW_ROWS)
    if whole:
        x_CH = x_CH.float()
    for total, gradient in zip(total_VH.split(words), gradient_CV.split(words, dim=1), strict=True):
        if whole:
            total.addmm_(gradient.T.float(), x_CH, beta=0.0 if first else 1.0, alpha=factor)
        elif first:
            total.copy_(_product(gradient.T, x_CH))
            if factor != 1.0:
                total.mul_(factor)
        else:
            total.add_(_product(gradient.T, x_CH), alpha=factor)


def _factor(x: Tensor, weight: Tensor, ce_weight: float, kl_weight: float) -> tuple[float, float]:
    """``(larger weight, what the operator multiplies its gradients by)``.

    Gradients over logits are of the weights less the larger of them, so that half precision holds them. On a CPU, fp32
    gradients are multiplied by it where they are summed, which costs nothing, and the backward pass finds them finished.
    """
    larger = max(ce_weight, kl_weight) or 1.0
    finished = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return larger, larger if finished else 1.0


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, on a GPU in fp32. On a CPU, a product in half precision is rounded to it once, as nn.Linear's gradient is."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def chunked_losses(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher_x: Tensor | None,
    teacher_weight: Tensor | None,
    indices: Tensor | None,
    values: Tensor | None,
    log_rest: Tensor | None,
    ce_weight: float,
    kl_weight: float,
    inverse_temperature: float,
    dtype: torch.dtype,
    grad_x: bool,
    grad_weight: bool,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's forward pass; the arguments are those of the functions above, with 1 / tau.

    Args:
        x, weight, targets: the student's hidden states (N, H), LM head (V, H), and next tokens (N,).
        teacher_x, teacher_weight: the teacher's, for a KL over all words.
        indices, values, log_rest: the teacher's top-k words, their logits and the rest, for a KL over those.
        ce_weight, kl_weight: multiply the two losses in what will be differentiated. inverse_temperature: 1 / temperature.
        dtype: of the student's products. grad_x, grad_weight: which gradients are wanted.
        chunk_bytes: memory for the logits of one chunk of rows.

    Returns: ((CE, KL) fp32 (2,), dx like x, dW like W), the gradients of ``ce_weight * CE + kl_weight * KL``, of which both
    weights may be divided by the larger one (`_factor`); one that is not wanted is empty, (0,).
    """
    N, V = len(x), len(weight)
    device = x.device
    gradient = grad_x or grad_weight
    teacher_dtype = None if teacher_x is None else torch.promote_types(teacher_x.dtype, teacher_weight.dtype)
    bytes_a_logit = dtype.itemsize + (teacher_dtype.itemsize if teacher_dtype else 0)  # rows are worked on in place
    dense_rows, rest_rows = _row_functions(device, dtype, teacher_dtype or dtype)
    larger, factor = _factor(x, weight, ce_weight, kl_weight)
    weights = (ce_weight / larger, kl_weight / larger * inverse_temperature, inverse_temperature, gradient)
    at_once = _rows_at_once(N, V, bytes_a_logit, chunk_bytes)
    total = torch.zeros(2, dtype=torch.float64, device=device)
    dx = torch.empty_like(x) if grad_x else x.new_empty(0)
    dw = torch.zeros if N == 0 else torch.empty
    dw = dw(weight.shape if grad_weight else 0, dtype=torch.float32, device=device)
    with torch.autocast(device.type, enabled=False):
        of_student = _products(x, weight, dtype, at_once)
        of_teacher = None if teacher_x is None else _products(teacher_x, teacher_weight, teacher_dtype, at_once)
        for begin in range(0, N, at_once):
            of = slice(begin, min(begin + at_once, N))
            z = of_student.logits(of)
            if indices is not None:
                ce_N, kl_N = top_k_rows_(rest_rows, z, indices[of], values[of], log_rest[of], targets[of], *weights)
            else:
                t = None if of_teacher is None else of_teacher.logits(of)
                ce_N, kl_N = dense_rows(z, t, targets[of], *weights)
            total += torch.stack([ce_N.sum(dtype=torch.float64), kl_N.sum(dtype=torch.float64)])
            if grad_x:
                of_student.hidden_gradient(z, dx[of])
            if grad_weight:
                of_student.add_weight_gradient_(dw, z, begin == 0, factor)
        if grad_x and factor != 1.0:
            dx.mul_(factor)
    return total.float(), dx, dw.to(weight.dtype)


_operator = torch.library.custom_op("bitdistill::vocabulary_losses", chunked_losses, mutates_args=())


@_operator.register_fake
def _shapes(x, weight, *others):
    grad_x, grad_weight = others[-3:-1]
    dx = torch.empty_like(x) if grad_x else x.new_empty(0)
    dw = weight.new_empty(weight.shape if grad_weight else 0)
    return x.new_empty(2, dtype=torch.float32), dx, dw


def _save_gradients(ctx, inputs, output) -> None:
    _, dx, dw = output
    ctx.mark_non_differentiable(dx, dw)
    ctx.set_materialize_grads(False)  # zeros as large as dW, for two outputs that nobody differentiates
    ctx.save_for_backward(dx, dw)
    larger, ctx.factor = _factor(*inputs[:2], *inputs[8:10])
    ctx.weights = [weight / larger for weight in inputs[8:10]]
    ctx.wanted, ctx.others = inputs[12:14], len(inputs) - 2


def _scale_gradients(ctx, grad_losses, *_):
    of_ce, of_kl = ctx.weights
    scale = (grad_losses[0] * of_ce + grad_losses[1] * of_kl) / (of_ce**2 + of_kl**2 or 1.0)
    apart = torch.maximum((grad_losses[0] - scale * of_ce).abs(), (grad_losses[1] - scale * of_kl).abs())
    scale = torch.where(apart <= 1e-3 * grad_losses.abs().amax(), scale, math.nan) / ctx.factor
    scale = torch.where((scale - 1).abs() <= ROUNDINGS, 1.0, scale)
    # On a GPU, or while a graph is traced, nobody waits for the number.
    finished = scale.device.type == "cpu" and type(scale) is Tensor and scale.item() == 1
    gradients = [
        (gradient if finished else (gradient * scale).to(gradient.dtype)) if wanted else None
        for gradient, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    ]
    return (*gradients, *[None] * ctx.others)


_operator.register_autograd(_scale_gradients, setup_context=_save_gradients)
