"""The LM head's products by tiles: integers exactly, whole losses beside PyTorch's own bf16 head, both against float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bitdistill.kernels import vocabulary
from bitdistill.kernels.cpu import vocabulary_tiles
from bitdistill.kernels.numerics import IGNORED
from bitdistill.kernels.vocabulary import linear_cross_entropy, linear_distillation, linear_distillation_top_k

pytestmark = pytest.mark.skipif(
    not vocabulary_tiles.serves(torch.bfloat16), reason="a processor with AMX, which the system lets a process use"
)
torch.set_num_threads(1)


def integers(*shape, seed=0):
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def check(N, H, V, weight_of=lambda weight: weight, at_once=None):
    """All three products in chunks of `at_once` rows, with NaN wherever memory is not written."""
    x, weight, dz = integers(N, H), integers(V, H, seed=1), integers(N, V, seed=2)
    at_once = at_once or N
    products = vocabulary_tiles.TileProducts(x, weight_of(weight), at_once)
    products.room.fill_(math.nan)
    dw = torch.full((V, H), math.nan)
    for begin in range(0, N, at_once):
        of = slice(begin, min(N, begin + at_once))
        z, dx = products.logits(of), torch.full((of.stop - begin, H), math.nan)
        assert torch.equal(z, (x[of] @ weight.T).bfloat16())
        z.copy_(dz[of])
        products.hidden_gradient(z, dx)
        assert torch.equal(dx, dz[of] @ weight)
        products.add_weight_gradient_(dw, z, begin == 0, 0.25)
    assert torch.equal(dw, dz.T @ x / 4)


@settings(max_examples=60, deadline=None)
@given(N=st.integers(1, 70), H=st.integers(1, 100), V=st.integers(1, 600), at_once=st.sampled_from([None, 1, 33]))
def test_any_shape(N, H, V, at_once):
    check(N, H, V, at_once=at_once)


def test_many_tokens_words_and_hidden_units():
    check(1200, 40, 1300)
    check(40, 700, 5000)


@pytest.mark.parametrize(
    "weight_of",
    [
        lambda weight: weight.bfloat16(),
        lambda weight: weight.half(),
        lambda weight: weight.T.contiguous().T,
        lambda weight: torch.cat([weight, weight], 1)[:, : weight.shape[1]],
        lambda weight: torch.cat([weight.bfloat16(), weight.bfloat16()], 1)[:, : weight.shape[1]],
    ],
)
def test_weights_as_they_lie(weight_of):
    check(37, 70, 333, weight_of)


def test_an_address_between_cache_lines():
    """dW that does not begin at a cache line, whose rows are not whole vectors."""
    x, dz = integers(9, 64), integers(9, 100, seed=2)
    products = vocabulary_tiles.TileProducts(x, integers(100, 64), 9)
    z = products.logits(slice(0, 9))
    z.copy_(dz)
    dw = torch.full((6401,), 7.0)[1:].view(100, 64)
    products.add_weight_gradient_(dw, z, True, 1.0)
    assert torch.equal(dw, dz.T @ x)


@pytest.mark.parametrize("kind", ["bf16", "mixed"])
def test_the_same_bits_with_any_number_of_threads(kind):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator) for shape in ((600, 96), (3000, 96)))
    weight = weight.bfloat16() if kind == "bf16" else weight
    targets = torch.randint(0, 3000, (600,), generator=generator)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        inputs = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(*inputs, targets)
        found.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def loss_of(kind, inputs, targets, teacher_x, teacher_weight, N):
    """The losses of a kind, of what `vocabulary` offers, with weights of a mean."""
    options = {"temperature": 2.0, "ce_weight": 1 / N, "kl_weight": 3 / N}
    if kind == "ce":
        return linear_cross_entropy(*inputs, targets, ce_weight=1 / N) / N
    if kind == "distillation":
        ce, kl = linear_distillation(*inputs, targets, teacher_x, teacher_weight, **options)
    else:
        values, indices = (teacher_x.float() @ teacher_weight.float().T).topk(8)
        ce, kl = linear_distillation_top_k(*inputs, targets, indices, values, None, **options)
    return ce / N + 3 * kl / N


def exact_loss(kind, inputs, targets, teacher_x, teacher_weight, N):
    """The same in float64 by autograd."""
    z = inputs[0] @ inputs[1].T
    loss = F.cross_entropy(z, targets, reduction="sum", ignore_index=IGNORED) / N
    if kind == "ce":
        return loss
    t, log_q = (teacher_x.double() @ teacher_weight.double().T) / 2, (z / 2).log_softmax(-1)
    if kind == "top k":
        values, indices = t.topk(8)
        log_p, log_q = values.log_softmax(-1), log_q.gather(1, indices)
    else:
        log_p = t.log_softmax(-1)
    return loss + 3 * (log_p.exp() * (log_p - log_q)).sum() / N


@pytest.mark.parametrize("kind", ["ce", "distillation", "top k"])
@pytest.mark.parametrize(("N", "H", "V"), [(150, 96, 1000), (33, 70, 759), (520, 64, 515)])
def test_within_twice_the_error_of_pytorchs_own_products(kind, N, H, V):
    """Loss and both gradients, one row in four without a label; what bf16 operands cost is the same for both."""
    generator = torch.Generator().manual_seed(N)
    x, weight, teacher_x = (torch.randn(shape, generator=generator) for shape in ((N, H), (V, H), (N, H)))
    weight = weight / 4
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[1::4] = IGNORED
    given = targets, (x + teacher_x / 8).bfloat16(), weight.bfloat16(), N
    exact = [tensor.double().requires_grad_() for tensor in (x, weight)]
    expected = exact_loss(kind, exact, *given)
    expected = [expected.detach(), *torch.autograd.grad(expected, exact)]
    errors = []
    for tiles in (True, False):
        vocabulary.use_compiled_rows(tiles)
        inputs = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(kind, inputs, *given)
        found = [loss.detach(), *torch.autograd.grad(loss, inputs)]
        errors.append([((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)])
    vocabulary.use_compiled_rows(True)
    for ours, plain in zip(*errors, strict=True):
        assert ours <= 2 * plain + 1e-6


def test_labels_that_are_all_ignored_and_no_rows():
    for N in (0, 5):
        inputs = [integers(N, 40).requires_grad_(), integers(100, 40).requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(*inputs, torch.full((N,), IGNORED))
        dx, dw = torch.autograd.grad(loss, inputs)
        assert loss.item() == 0
        assert dx.shape == (N, 40)
        assert (dx == 0).all()
        assert (dw == 0).all()


def test_gradients_accumulate():
    """Two backward passes into one .grad: the sum, and nothing of the first changed by the second."""
    inputs = [torch.randn(40, 64).requires_grad_(), torch.randn(300, 64).requires_grad_()]
    targets = torch.randint(0, 300, (40,))
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(*inputs, targets).backward()
        once = [tensor.grad.clone() for tensor in inputs]
        linear_cross_entropy(*inputs, targets).backward()
    for tensor, gradient in zip(inputs, once, strict=True):
        torch.testing.assert_close(tensor.grad, 2 * gradient)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_lost(bad):
    x, weight = torch.randn(40, 64), torch.randn(300, 64)
    x[3, 5] = bad
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(*inputs, torch.zeros(40, dtype=torch.int64))
    dx, dw = torch.autograd.grad(loss, inputs)
    assert not loss.isfinite()
    assert dx[3].isnan().all()
    assert dw.isnan().any()
    assert dx[torch.arange(40) != 3].isfinite().all()
