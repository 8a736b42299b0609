"""Losses over the vocabulary from hidden states: against plain float64 autograd on whole logits, at every cut."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bitdistill.kernels import vocabulary, vocabulary_rows
from bitdistill.kernels.numerics import IGNORED
from bitdistill.kernels.vocabulary import linear_cross_entropy, linear_distillation, linear_distillation_top_k

torch.set_num_threads(1)


@pytest.fixture(params=["compiled", "specification"], scope="module", autouse=True)
def kind_of_rows(request):
    """Every test runs on the compiled kernels and on what they have to compute."""
    vocabulary.use_compiled_rows(request.param == "compiled")
    yield request.param
    vocabulary.use_compiled_rows(True)


def rows(N=7, H=6, V=37, G=5, scale=1.0, seed=0):
    """x, weight, targets (one row without), teacher_x, teacher_weight. With a power of two for scale all logits are exact
    in fp32, so that no order of summation moves them."""
    torch.manual_seed(seed)
    x, weight, teacher_x, teacher_weight = (
        torch.randint(-8, 9, shape) / 4 for shape in ((N, H), (V, H), (N, G), (V, G))
    )
    targets = torch.randint(0, V, (N,))
    targets[1::4] = IGNORED
    return x, weight * scale, targets, teacher_x, teacher_weight * scale


def dense(x, weight, targets, teacher_logits, tau):
    """The same sums in plain PyTorch, in the dtype of its arguments."""
    logits = x @ weight.T
    ce = F.cross_entropy(logits, targets, reduction="sum")
    student, teacher = F.log_softmax(logits / tau, -1), F.log_softmax(teacher_logits / tau, -1)
    return ce, F.kl_div(student, teacher, reduction="sum", log_target=True)


def leaves(*tensors, dtype=None):
    return [x.detach().to(dtype).requires_grad_() for x in tensors]


def assert_close(ours, plain, exact, x, weight, gradient):
    """Within twice plain PyTorch's own error in fp32, both against float64, and some roundings of what is summed: losses of
    order 1 a row, and logit gradients of at most ``gradient`` a row times the weight or x."""
    terms = (len(x), len(x), gradient * weight.abs().max(), gradient * x.abs().sum(0).max())
    for a, b, c, of_terms in zip(ours, plain, exact, terms, strict=True):
        rounding = 16 * torch.finfo(torch.float32).eps * (c.abs().max() + of_terms)
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + rounding


def of(losses, weights, inputs):
    """(CE, KL, and the gradients of their weighted sum)."""
    total = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
    return [loss.detach() for loss in losses] + list(torch.autograd.grad(total, inputs))


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(1, 9),
    H=st.integers(1, 7),
    V=st.integers(1, 70),
    chunk_bytes=st.sampled_from([1, 3000, 10**9]),
    tau=st.sampled_from([0.5, 1.0, 5.0]),
    weights=st.sampled_from([(1.0, 10.0), (0.25, 1e-3), (1.0, 0.0), (0.0, 2.0)]),
    scale=st.sampled_from([1 / 16, 1.0, 32.0, 4096.0]),
)
def test_distillation_against_float64(N, H, V, chunk_bytes, tau, weights, scale):
    x, weight, targets, teacher_x, teacher_weight = rows(N, H, V, scale=scale)
    ours = leaves(x, weight, dtype=torch.float32)
    losses = linear_distillation(
        *ours,
        targets,
        teacher_x,
        teacher_weight.requires_grad_(),
        temperature=tau,
        ce_weight=weights[0],
        kl_weight=weights[1],
        chunk_bytes=chunk_bytes,
    )
    assert all(loss.dtype == torch.float32 and loss.shape == () for loss in losses)
    found = of(losses, [7 * weight for weight in weights], ours)  # whatever the loss is scaled with afterwards
    references = []
    for dtype in (torch.float32, torch.float64):
        inputs = leaves(x, weight, dtype=dtype)
        teacher = teacher_x.to(dtype) @ teacher_weight.detach().to(dtype).T
        references.append(of(dense(*inputs, targets, teacher, tau), [7 * weight for weight in weights], inputs))
    assert_close(found, *references, x, weight, 14 * (weights[0] + weights[1] / tau))
    assert teacher_weight.grad is None


@settings(max_examples=60, deadline=None)
@example(N=3, V=22, K=21, chunk_bytes=1, rest=True, scale=32.0)  # exp of what is left over is 0 beside the largest
@given(
    N=st.integers(1, 9),
    V=st.integers(2, 70),
    K=st.integers(1, 70),
    chunk_bytes=st.sampled_from([1, 3000, 10**9]),
    rest=st.booleans(),
    scale=st.sampled_from([1 / 16, 1.0, 32.0, 4096.0]),
)
def test_top_k_against_float64(N, V, K, chunk_bytes, rest, scale):
    x, weight, targets, teacher_x, teacher_weight = rows(N, V=V, scale=scale)
    K, tau, weights = min(K, V), 3.0, (1.0, 4.0)
    teacher = teacher_x @ teacher_weight.T
    values, indices = teacher.topk(K)
    others = torch.ones_like(teacher, dtype=torch.bool).scatter(1, indices, False)
    log_rest = (teacher / tau).masked_fill(~others, -math.inf).logsumexp(-1) if rest else None
    ours = leaves(x, weight, dtype=torch.float32)
    losses = linear_distillation_top_k(
        *ours,
        targets,
        indices.int(),
        values,
        log_rest,
        temperature=tau,
        ce_weight=weights[0],
        kl_weight=weights[1],
        chunk_bytes=chunk_bytes,
    )
    found = of(losses, weights, ours)
    references = []
    for dtype in (torch.float32, torch.float64):
        inputs = leaves(x, weight, dtype=dtype)
        log_q = F.log_softmax((inputs[0] @ inputs[1].T) / tau, -1)
        log_p = F.log_softmax((teacher if rest else values).to(dtype) / tau, -1)
        if rest and K < V:  # what is not cached is one more word
            log_p, log_q = (
                torch.cat([x.gather(1, indices), x.masked_fill(~others, -math.inf).logsumexp(-1, keepdim=True)], 1)
                for x in (log_p, log_q)
            )
        else:
            log_p, log_q = log_p.gather(1, indices) if rest else log_p, log_q.gather(1, indices)
        p = log_p.exp()
        kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum()
        ce = F.cross_entropy(inputs[0] @ inputs[1].T, targets, reduction="sum")
        references.append(of((ce, kl), weights, inputs))
    assert_close(found, *references, x, weight, 2 * (weights[0] + weights[1] / tau))


@pytest.mark.parametrize("rest", [True, False])
def test_all_words_cached_is_the_dense_form(rest):
    x, weight, targets, teacher_x, teacher_weight = rows()
    x.requires_grad_()
    options = {"temperature": 2.0, "ce_weight": 1.0, "kl_weight": 1.0}
    values, indices = (teacher_x @ teacher_weight.T).sort(dim=-1)
    log_rest = torch.full((7,), -math.inf) if rest else None
    whole = linear_distillation(x, weight, targets, teacher_x, teacher_weight, **options)
    cached = linear_distillation_top_k(x, weight, targets, indices, values + 11, log_rest, **options)
    torch.testing.assert_close(cached, whole, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(sum(loss), x)[0] for loss in (cached, whole)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("words", [1, 5, 36, 37, 100])
def test_logits_of_some_words_at_a_time_are_the_same(words, monkeypatch):
    """For student and teacher, in chunks of rows; a slice may end with the vocabulary, or have one word."""
    x, weight, targets, teacher_x, teacher_weight = rows()

    def found():
        inputs = leaves(x, weight, dtype=torch.float32)
        options = {"temperature": 2.0, "ce_weight": 1.0, "kl_weight": 10.0, "chunk_bytes": 3 * 37 * 8}
        return of(linear_distillation(*inputs, targets, teacher_x, teacher_weight, **options), (1.0, 10.0), inputs)

    whole = found()
    monkeypatch.setattr(vocabulary, "LOGIT_WORDS", words)
    assert all(torch.equal(a, b) for a, b in zip(found(), whole, strict=True))


def test_fewer_cached_words_know_less():
    """Merging words can only lower a KL: K = 1, 3, V - 1, V rise to the whole one."""
    x, weight, targets, teacher_x, teacher_weight = rows()
    teacher = teacher_x @ teacher_weight.T
    found = []
    for K in (1, 3, 36, 37):
        values, indices = teacher.topk(K)
        rest = torch.ones_like(teacher, dtype=torch.bool).scatter(1, indices, False)
        log_rest = (teacher / 2).masked_fill(~rest, -math.inf).logsumexp(-1)
        options = {"temperature": 2.0, "ce_weight": 1.0, "kl_weight": 1.0}
        found.append(linear_distillation_top_k(x, weight, targets, indices, values, log_rest, **options)[1].item())
    assert found[0] < found[1] < found[2]
    assert found[2] == pytest.approx(found[3], rel=1e-5)


def test_cross_entropy_equals_the_ce_of_distillation():
    x, weight, targets, teacher_x, teacher_weight = rows()
    alone = linear_cross_entropy(x, weight, targets)
    options = {"temperature": 1.0, "ce_weight": 1.0, "kl_weight": 0.0}
    assert alone == linear_distillation(x, weight, targets, teacher_x, teacher_weight, **options)[0]
    assert alone.item() == pytest.approx(F.cross_entropy(x @ weight.T, targets, reduction="sum").item(), rel=1e-6)


def test_equal_models_are_at_zero_exactly():
    x, weight, _, _, _ = rows(scale=16.0)
    none = torch.full((7,), IGNORED)
    ours = leaves(x, weight)
    ce, kl = linear_distillation(*ours, none, x, weight, temperature=5.0, ce_weight=1.0, kl_weight=1.0)
    assert (ce.item(), kl.item()) == (0.0, 0.0)
    assert all((g == 0).all() for g in torch.autograd.grad(ce + kl, ours))


def test_a_kl_far_below_one_rounding_of_log_z():
    """Student 1e-4 from its teacher: the KL is 1e-10, log Z 10. A difference of logarithms would be noise."""
    torch.manual_seed(0)
    teacher = torch.randn(4, 5000, dtype=torch.float64) * 3
    logits = (teacher + 1e-4 * torch.randn(4, 5000)).float().double()
    teacher = teacher.float().double()
    p, q = teacher.log_softmax(-1), logits.log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1)
    none = torch.full((4,), IGNORED)
    dense_rows, _ = vocabulary._row_functions(none.device, torch.float32)
    _, ours = dense_rows(logits.float(), teacher.float(), none, 1.0, 1.0, 1.0, False)
    p, q = teacher.float().log_softmax(-1), logits.float().log_softmax(-1)
    naive = (p.exp() * (p - q)).sum(-1)
    assert ((ours - exact) / exact).abs().max() < 0.02
    assert ((naive - exact) / exact).abs().max() > 1


@pytest.mark.parametrize("scale", [2.0**13, 2.0**100])
def test_huge_logits(scale):
    x, weight, targets, teacher_x, teacher_weight = rows()
    ours, exact = leaves(x, weight * scale), leaves(x, weight * scale, dtype=torch.float64)
    losses = linear_distillation(
        *ours, targets, teacher_x, teacher_weight * scale, temperature=5.0, ce_weight=1.0, kl_weight=1.0
    )
    teacher = teacher_x.double() @ (teacher_weight * scale).double().T
    found, expected = of(losses, (1, 1), ours), of(dense(*exact, targets, teacher, 5.0), (1, 1), exact)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def test_no_row_is_zero_with_a_graph():
    x, weight, _, teacher_x, teacher_weight = rows(N=0)
    targets = torch.zeros(0, dtype=torch.int64)
    ours = leaves(x, weight)
    options = {"temperature": 5.0, "ce_weight": 1.0, "kl_weight": 1.0}
    indices, values, log_rest = torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3), torch.zeros(0)
    for losses in (
        [linear_cross_entropy(*ours, targets)],
        linear_distillation(*ours, targets, teacher_x, teacher_weight, **options),
        linear_distillation_top_k(*ours, targets, indices, values, log_rest, **options),
    ):
        assert sum(losses).item() == 0
        dx, dw = torch.autograd.grad(sum(losses), ours)
        assert dx.shape == x.shape
        assert (dw == 0).all()


def test_other_weights_than_declared_give_nan_not_a_wrong_gradient():
    x, weight, targets, teacher_x, teacher_weight = rows()
    x.requires_grad_()

    def losses():
        return linear_distillation(
            x, weight, targets, teacher_x, teacher_weight, temperature=2.0, ce_weight=0.5, kl_weight=3.0
        )

    ce, kl = losses()
    good = torch.autograd.grad(1e-3 * (0.5 * ce + 3 * kl), x, retain_graph=True)[0]
    again = torch.autograd.grad(1e-3 * (0.5 * ce + 3 * kl), x, retain_graph=True)[0]
    assert torch.equal(good, again)
    assert good.isfinite().all()
    for wrong in (ce, kl, ce + kl, 0.5 * ce - 3 * kl):
        assert torch.autograd.grad(wrong, x, retain_graph=True)[0].isnan().all()
    assert (torch.autograd.grad(0 * ce + 0 * kl, x)[0] == 0).all()


def test_a_gradient_that_is_finished_is_handed_over_and_stays_right():
    """With the declared weights the backward pass multiplies nothing, and still owes nobody a tensor that others change."""
    x, weight, targets, teacher_x, teacher_weight = rows()
    declared = {"temperature": 2.0, "ce_weight": 1 / 7, "kl_weight": 3 / 7}
    ours = leaves(x, weight)

    def loss():
        ce, kl = linear_distillation(*ours, targets, teacher_x, teacher_weight, **declared)
        return ce / 7 + kl * (3 / 7)

    expected = torch.autograd.grad(1024 * loss(), ours)  # as another weight: multiplied in the backward pass
    kept = loss()
    for times in (1, 2, 3):
        kept.backward(retain_graph=times < 3)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a.grad, times * b / 1024, rtol=1e-6, atol=1e-7)
    for tensor in ours:
        tensor.grad.zero_()
    loss().backward()
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.grad, b / 1024, rtol=1e-6, atol=1e-7)
    with pytest.raises(RuntimeError, match="second time"):
        kept.backward()


def test_cross_entropy_of_a_declared_weight():
    x, weight, targets, *_ = rows()
    ours = leaves(x, weight)
    plain = torch.autograd.grad(linear_cross_entropy(*ours, targets) / 7, ours)
    found = torch.autograd.grad(linear_cross_entropy(*ours, targets, ce_weight=1 / 7) / 7, ours)
    twice = torch.autograd.grad(2 * linear_cross_entropy(*ours, targets, ce_weight=1 / 7), ours)
    for a, b, c in zip(found, plain, twice, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(c, 14 * b, rtol=1e-6, atol=1e-6)


def test_only_the_wanted_gradients():
    x, weight, targets, *_ = rows()
    frozen = linear_cross_entropy(x.requires_grad_(), weight, targets)
    head_only = linear_cross_entropy(x.detach(), weight.requires_grad_(), targets)
    both = linear_cross_entropy(x, weight, targets)
    dx, dw = torch.autograd.grad(both, (x, weight))
    assert torch.equal(torch.autograd.grad(frozen, x)[0], dx)
    assert torch.equal(torch.autograd.grad(head_only, weight)[0], dw)
    with torch.no_grad():
        without = linear_cross_entropy(x, weight, targets)
    assert not without.requires_grad
    assert torch.equal(without, both)


@pytest.mark.parametrize("chunk_bytes", [3000, 10**9])
def test_autocast_is_the_products_in_bf16_and_fp32_beyond(chunk_bytes):
    """As nn.Linear and an fp32 loss under autocast; dW of fp32 masters is better, being summed over chunks in fp32."""
    x, weight, targets, teacher_x, teacher_weight = rows(N=9, H=32, V=65)
    teacher_x, teacher_weight = teacher_x.half(), teacher_weight.half()
    ours, theirs = leaves(x, weight), leaves(x, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = linear_distillation(
            *ours,
            targets,
            teacher_x,
            teacher_weight,
            temperature=5.0,
            ce_weight=1.0,
            kl_weight=1.0,
            chunk_bytes=chunk_bytes,
        )
        logits = F.linear(*theirs)
    assert logits.dtype == torch.bfloat16
    ce = F.cross_entropy(logits.float(), targets, reduction="sum")
    teacher = F.log_softmax(F.linear(teacher_x, teacher_weight).float() / 5, -1)
    kl = F.kl_div(F.log_softmax(logits.float() / 5, -1), teacher, reduction="sum", log_target=True)
    found, expected = of(losses, (1, 1), ours), of((ce, kl), (1, 1), theirs)
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-5, atol=1e-5)
    for a, b in zip(found[2:], expected[2:], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=0.02 * b.abs().max().item())


@pytest.mark.parametrize("V", [7, 100, 759])
def test_memory_that_holds_nan_reaches_no_gradient(V, monkeypatch):
    """Rows of logits are padded, and half-precision products read the padding."""
    empty = torch.empty

    def poisoned(*shape, **options):
        room = empty(*shape, **options)
        return room.fill_(math.nan) if room.is_floating_point() else room

    monkeypatch.setattr(torch, "empty", poisoned)
    x, weight = (torch.randn(rows, 64, requires_grad=True) for rows in (33, V))
    teacher_x, teacher_weight = torch.randn(33, 64), torch.randn(V, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ce, kl = linear_distillation(
            x,
            weight,
            torch.randint(0, V, (33,)),
            teacher_x,
            teacher_weight,
            temperature=5.0,
            ce_weight=1.0,
            kl_weight=10.0,
        )
    (ce + 10 * kl).backward()
    for tensor in (ce, kl, x.grad, weight.grad):
        assert tensor.isfinite().all()


def test_half_precision_head_gets_a_half_precision_gradient():
    x, weight, targets, *_ = rows(H=32, V=65)
    ours, exact = leaves(x, weight, dtype=torch.bfloat16), leaves(x.bfloat16(), weight.bfloat16(), dtype=torch.float64)
    found = torch.autograd.grad(linear_cross_entropy(*ours, targets), ours)
    expected = torch.autograd.grad(F.cross_entropy(exact[0] @ exact[1].T, targets, reduction="sum"), exact)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=0, atol=0.02 * b.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_teacher", ["all words", "none", "rest"])
def test_rows_in_blocks_are_the_same_rows(monkeypatch, of_teacher, dtype):
    """What a row gives does not depend on the rows beside it: blocks of 3 of 10 rows, bit for bit, the gradient included."""
    monkeypatch.setattr(vocabulary_rows, "BLOCK_BYTES", 3 * 4 * 50)
    generator = torch.Generator().manual_seed(0)
    z, t = (torch.randn(10, 50, generator=generator).to(dtype) for _ in range(2))
    targets = torch.randint(0, 50, (10,), generator=generator)
    targets[4] = -100
    if of_teacher == "rest":
        kept = z.float().amax(-1), torch.full((10,), 1.5), torch.full((10,), 2.5), torch.full((10,), 0.3)
        function, others = vocabulary_rows.rest_rows_, (targets, *kept, 0.7, 0.2, 0.5, True)
    else:
        function, others = vocabulary_rows.dense_rows_, (t if of_teacher == "all words" else None, targets)
        others += (0.7, 0.2, 0.5, True)
    whole, blocks = z.clone(), z.clone()
    expected, found = function(whole, *others), vocabulary_rows.in_blocks(function)(blocks, *others)
    assert torch.equal(blocks, whole)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("N", "chunk_bytes"), [(9, 10**9), (150, 10**9), (150, 2 * 80 * 70)])
def test_dw_of_products_in_half_precision(N, chunk_bytes):
    """Few rows, whose dW is a product in fp32; many, of one chunk, and of two that are added up; with a declared weight."""
    x, weight, targets, *_ = rows(N=N, H=32, V=65, scale=1 / 16)
    ours, exact = leaves(x, weight), leaves(x, weight, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(*ours, targets, ce_weight=1 / N, chunk_bytes=chunk_bytes) / N
    found = torch.autograd.grad(loss, ours)
    expected = torch.autograd.grad(F.cross_entropy(exact[0] @ exact[1].T, targets, reduction="sum") / N, exact)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=0, atol=0.02 * b.abs().max().item())


class Largest(TorchDispatchMode):
    """The largest tensor that any operation made."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(getattr(self, "numel", 0), tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


@pytest.mark.parametrize("cached", [False, True])
def test_the_logits_of_all_rows_never_exist(cached):
    """192 rows of 1,000 words: 192,000 logits. No tensor beyond a chunk, but the inputs' like (weight: 8,000)."""
    x, weight, targets, teacher_x, teacher_weight = rows(192, 8, 1000)
    teacher = (None, None, *reversed((teacher_x @ teacher_weight.T).topk(4)), torch.zeros(192))
    if not cached:
        teacher = (teacher_x, teacher_weight, None, None, None)
    settings = (1.0, 1.0, 0.2, torch.float32, True, True)
    chunk_bytes = 16 * 1008 * 4 * (1 if cached else 2)  # the student's logits, or both models'
    with torch.no_grad():
        with Largest() as largest:
            small = vocabulary.chunked_losses(x, weight, targets, *teacher, *settings, chunk_bytes)
        assert 8000 <= largest.numel <= 16 * 1008
        with Largest() as largest:
            whole = vocabulary.chunked_losses(x, weight, targets, *teacher, *settings, 10**9)
        assert largest.numel >= 192_000  # the test can see such a tensor
    torch.testing.assert_close(small, whole, rtol=1e-5, atol=1e-5)


def test_chunks_fit_their_bytes():
    """The production shape: 8,192 rows of 151,936 words in bf16, of student and teacher, in 1.25 GiB at a time."""
    rows_at_once = vocabulary._rows_at_once
    assert rows_at_once(8192, 151_936, 4, vocabulary.CHUNK_BYTES["cuda"]) == 2048
    assert rows_at_once(32, 151_936, 4, vocabulary.CHUNK_BYTES["cuda"]) == 32
    assert rows_at_once(32, 151_936, 4, 1) == 1
    assert rows_at_once(0, 151_936, 4, 1) == 1
    for rows, chunk_bytes in ((100, 41 * 40), (7, 10**9), (1000, 999 * 40)):
        assert rows_at_once(rows, 10, 4, chunk_bytes) * 40 <= chunk_bytes
    cpu = torch.device("cpu")
    assert vocabulary._logit_rows(3, 37, torch.float32, cpu).stride() == (48, 1)
    assert vocabulary._logit_rows(3, 49_152, torch.float32, cpu).stride() == (49_168, 1), "not a multiple of 4 KiB"


def test_same_bits_in_every_run():
    x, weight, targets, teacher_x, teacher_weight = rows(N=40, V=211)
    settings = (1.0, 1.0, 0.2, torch.float32, True, True, 10_000)
    one, two = (
        vocabulary.chunked_losses(x, weight, targets, teacher_x, teacher_weight, None, None, None, *settings)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_compiled_without_a_graph_break_and_recomputed_by_checkpointing():
    x, weight, targets, teacher_x, teacher_weight = rows()

    def loss(x, weight):
        ce, kl = linear_distillation(
            x * 2, weight, targets, teacher_x, teacher_weight, temperature=5.0, ce_weight=1.0, kl_weight=3.0
        )
        return ce + 3 * kl

    found = []
    for call in (
        loss,
        torch.compile(loss, fullgraph=True, backend="aot_eager"),
        lambda *inputs: checkpoint(loss, *inputs, use_reentrant=False),
    ):
        inputs = leaves(x, weight)
        value = call(*inputs)
        found.append((value.detach(), *torch.autograd.grad(value, inputs)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    arguments = (x.requires_grad_(), weight, targets, *[None] * 5, 1.0, 1.0, 1.0, torch.float32, True, False, 10**9)
    torch.library.opcheck(torch.ops.bitdistill.vocabulary_losses.default, arguments)


def test_a_target_that_is_no_word_is_an_error():
    x, weight, targets, *_ = rows()
    for wrong in (-1, 37):
        targets[0] = wrong
        with pytest.raises(RuntimeError, match="out of bounds"):
            linear_cross_entropy(x, weight, targets)


def test_views_and_read_only_inputs():
    x, weight, targets, *_ = rows()
    expected = linear_cross_entropy(x, weight, targets)
    wide, tall = torch.zeros(7, 12), weight.T.contiguous().T
    wide[:, ::2] = x
    before = tall.clone()
    assert torch.allclose(linear_cross_entropy(wide[:, ::2], tall, targets), expected)
    assert torch.equal(tall, before)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"x": torch.zeros(7, 5)}, "x"),
        ({"x": torch.zeros(7, 6, dtype=torch.float64)}, "x"),
        ({"weight": torch.zeros(0)}, "x"),
        ({"targets": torch.zeros(6, dtype=torch.int64)}, "targets"),
        ({"targets": torch.zeros(7)}, "targets"),
        ({"teacher_x": torch.zeros(6, 5)}, "teacher"),
        ({"teacher_weight": torch.zeros(36, 5)}, "teacher"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_mistakes_are_named(change, field):
    names = ("x", "weight", "targets", "teacher_x", "teacher_weight")
    arguments = dict(zip(names, rows(), strict=True)) | {"temperature": 1.0} | change
    temperature = arguments.pop("temperature")
    with pytest.raises(ValueError, match=rf"^{field}: expected .+; got .+\. .+\."):
        linear_distillation(*arguments.values(), temperature=temperature, ce_weight=1.0, kl_weight=1.0)


def test_mistakes_in_a_cache_are_named():
    x, weight, targets, *_ = rows()
    options = {"temperature": 1.0, "ce_weight": 1.0, "kl_weight": 1.0}
    indices, values = torch.zeros(7, 3, dtype=torch.int64), torch.zeros(7, 3)
    for arguments, field in (
        ((indices[:, :2], values, None), "indices"),
        ((indices[:, :0], values[:, :0], None), "indices"),
        ((indices, values, torch.zeros(6)), "log_rest"),
    ):
        with pytest.raises(ValueError, match=rf"^{field}: expected .+; got .+\. .+\."):
            linear_distillation_top_k(x, weight, targets, *arguments, **options)
