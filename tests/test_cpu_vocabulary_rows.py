"""The compiled kernels on rows of logits beside their specification, kernels/vocabulary_rows.py, and both against float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bitdistill.kernels import vocabulary, vocabulary_rows
from bitdistill.kernels.cpu import rows
from bitdistill.kernels.cpu import vocabulary_rows as compiled
from bitdistill.kernels.numerics import IGNORED

torch.set_num_threads(1)
PER_TAU, CE, KL = 0.2, 0.5, 0.7
WEIGHTS = (CE, KL * PER_TAU, PER_TAU)


def padded(values, dtype=torch.float32):
    """Rows at strides of whole vectors, NaN between them."""
    N, V = values.shape
    room = torch.full((N, -(-V // 16) * 16 + 16), math.nan, dtype=dtype)
    room[:, :V] = values
    return room[:, :V]


def logits(N, V, scale, dtype=torch.float32, seed=0):
    """Student, teacher, targets."""
    generator = torch.Generator().manual_seed(seed)
    z, t = (padded(torch.randn((N, V), generator=generator) * scale, dtype) for _ in range(2))
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[1::3] = IGNORED
    return z, t, targets


def exact(z, t, targets, dtype=torch.float64):
    """CE, KL and the weighted gradient by autograd."""
    z, t = z.detach().to(dtype).requires_grad_(), t.to(dtype)
    ce = F.cross_entropy(z, targets, reduction="none")
    q, p = F.log_softmax(z * PER_TAU, -1), F.log_softmax(t * PER_TAU, -1)
    kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    return ce.detach(), kl.detach(), torch.autograd.grad(CE * ce.sum() + KL * kl.sum(), z)[0]


def assert_close(found, plain, expected):
    for a, b, c in zip(found, plain, expected, strict=True):
        rounding = 8 * torch.finfo(torch.float32).eps * c.abs().amax()
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + rounding


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(1, 7),
    V=st.one_of(st.integers(1, 300), st.sampled_from([1024, 1025, 5000])),
    scale=st.sampled_from([0.01, 1.0, 30.0, 1e4, 1e30]),
    distill=st.booleans(),
)
def test_dense_rows(N, V, scale, distill):
    z, t, targets = logits(N, V, scale)
    ce_exact, kl_exact, gradient = exact(z, t if distill else z, targets)
    plain = exact(z, t if distill else z, targets, torch.float32)
    room, before = z._base.clone(), z.clone()
    for write in (False, True):
        ce, kl = compiled.dense_rows_(z, t if distill else None, targets, *WEIGHTS, write)
        assert_close((ce, kl), plain[:2], (ce_exact, kl_exact if distill else 0 * kl_exact))
        assert (ce[targets == IGNORED] == 0).all()
        assert (kl >= 0).all()
        assert write or torch.equal(z, before)
    assert_close((z,), plain[2:], (gradient,))
    assert z._base[:, V:].isnan().all()  # nothing beyond a row is written
    assert room[:, V:].isnan().all()


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(1, 7), V=st.integers(1, 200), K=st.integers(1, 200), scale=st.sampled_from([0.01, 1.0, 30.0, 3000.0])
)
def test_rest_rows_inside_top_k(N, V, K, scale):
    K = min(K, V)
    z, t, targets = logits(N, V, scale)
    values, indices = t.topk(K)
    others = torch.ones_like(t, dtype=torch.bool).scatter(1, indices, False)
    log_rest = (t * PER_TAU).masked_fill(~others, -math.inf).logsumexp(-1)
    arguments = (indices, values, log_rest, targets, *WEIGHTS)
    theirs = z.clone()
    expected = vocabulary_rows.top_k_rows_(vocabulary_rows.rest_rows_, theirs, *arguments, True)
    found = vocabulary_rows.top_k_rows_(compiled.rest_rows_, z.clone(), *arguments, False)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    found = vocabulary_rows.top_k_rows_(compiled.rest_rows_, z, *arguments, True)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(z, theirs, rtol=2e-6, atol=1e-6)
    assert z._base[:, V:].isnan().all()


def test_words_that_are_taken_out():
    """-inf in either model: no share of any sum and no gradient; where the student alone rules a word out, the KL is infinite."""
    z, t, targets = logits(4, 70, 2.0)
    targets[:] = 5
    z[0, 40:] = t[0, 40:] = -math.inf
    t[1, 3] = -math.inf
    z[2, 3] = -math.inf
    short = [x[:1, :40].clone() for x in (z, t)]
    theirs = z.clone()
    expected = vocabulary_rows.dense_rows_(theirs, t, targets, *WEIGHTS, True)
    found = compiled.dense_rows_(z, t, targets, *WEIGHTS, True)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(z, theirs, rtol=2e-6, atol=1e-6)
    assert found[1].isinf().tolist() == [False, False, True, False]
    alone = compiled.dense_rows_(*short, targets[:1], *WEIGHTS, True)
    torch.testing.assert_close([x[:1] for x in found], list(alone), rtol=1e-6, atol=0)
    torch.testing.assert_close(z[:1, :40], short[0], rtol=1e-6, atol=1e-9)
    assert (z[0, 40:] == 0).all()


def test_nothing_outside_the_cached_words():
    """All words are cached: the rest is empty, its logarithm -inf, and nothing is NaN."""
    z, _, targets = logits(2, 20, 1.0)
    z[:] = -math.inf
    kept = (torch.tensor([3.0, -1e30]), torch.tensor([1.5, 1.0]), torch.tensor([1.2, 1.0]), torch.zeros(2))
    stats = compiled.rest_rows_(z, targets, *kept, *WEIGHTS, True)
    torch.testing.assert_close(
        stats, torch.tensor([[3.0, math.log(1.5), math.log(1.2), -math.inf], [-1e30, 0.0, 0.0, -math.inf]])
    )
    hot = torch.zeros(2, 20)
    hot[0, targets[0]] = -CE
    assert torch.equal(z, hot)


def test_equal_logits_are_at_zero_exactly():
    z, _, targets = logits(3, 200, 5.0)
    z[2] = 7.0
    targets[:] = IGNORED
    ce, kl = compiled.dense_rows_(z, z.clone(), targets, 1.0, 1.0, PER_TAU, True)
    assert (ce == 0).all()
    assert (kl == 0).all()
    assert (z == 0).all()


@pytest.mark.parametrize("d", [1e-6, 1e-3, 0.1, 0.49, 0.51, 3.0])
def test_both_sides_of_the_series(d):
    """One word moved by d: KL and gradient in closed form, where expm1(d) - d has its series and where not."""
    t = torch.zeros(1, 2)
    z = torch.tensor([[d, 0.0]]) / PER_TAU
    q = torch.tensor([[d, 0.0]], dtype=torch.float64).softmax(-1)
    _, kl = compiled.dense_rows_(z, t, torch.tensor([IGNORED]), 0.0, 1.0, PER_TAU, True)
    assert kl.item() == pytest.approx(math.log(math.cosh(d / 2)), rel=1e-5)
    torch.testing.assert_close(z.double(), q - 0.5, rtol=1e-6, atol=2**-25)  # a rounding of log Z


@pytest.mark.parametrize("V", [37, 1500])
def test_half_precision_logits(V):
    """Values are those of the same logits in fp32; the gradient is rounded once."""
    z, t, targets = logits(4, V, 3.0, torch.bfloat16)
    wide = padded(z.float())
    expected = compiled.dense_rows_(wide, padded(t.float()), targets, *WEIGHTS, True)
    found = compiled.dense_rows_(z, t, targets, *WEIGHTS, True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(z, wide.bfloat16())
    mixed, _, _ = logits(4, V, 3.0, torch.bfloat16)
    found = compiled.dense_rows_(mixed, padded(t.float()), targets, *WEIGHTS, True)  # a teacher in another precision
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(mixed, z)
    alone, _, _ = logits(4, V, 3.0, torch.bfloat16)
    expected, _ = compiled.dense_rows_(padded(alone.float()), None, targets, *WEIGHTS, True)
    assert torch.equal(compiled.dense_rows_(alone, None, targets, *WEIGHTS, True)[0], expected)


def test_fp16_is_left_to_the_specification():
    assert vocabulary._row_functions(torch.device("cpu"), torch.bfloat16, torch.float32)[0] is compiled.dense_rows_
    for dtypes in ((torch.float16, torch.float32), (torch.float32, torch.float16)):
        assert vocabulary._row_functions(torch.device("cpu"), *dtypes)[0] is not compiled.dense_rows_


def test_a_nan_reaches_the_loss():
    for distill in (True, False):
        z, t, targets = logits(2, 100, 1.0)
        targets[:] = 3
        z[0, 70] = math.nan
        ce, kl = compiled.dense_rows_(z, t if distill else None, targets, *WEIGHTS, True)
        assert ce[0].isnan()
        assert kl[0].isnan() or not distill
        assert z[0].isnan().all()
        assert z[1].isfinite().all()
        assert ce[1].isfinite()
    z, t, targets = logits(1, 100, 1.0)
    t[0, 99] = math.nan
    _, kl = compiled.dense_rows_(z, t, targets, *WEIGHTS, True)
    assert kl.isnan().all()
    assert z.isnan().all()


def test_a_target_that_is_no_word_is_an_error():
    for wrong in (-1, 100):
        z, t, targets = logits(4, 100, 1.0)
        targets[2] = wrong
        with pytest.raises(RuntimeError, match="out of bounds"):
            compiled.dense_rows_(z, t, targets, *WEIGHTS, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads_and_rows_beside(monkeypatch, dtype):
    monkeypatch.setattr(rows, "LEAST", 1)
    z, t, targets = logits(11, 301, 2.0, dtype)
    kept = (torch.ones(11), torch.full((11,), 1.5), torch.full((11,), 2.5), torch.full((11,), 0.3))

    def results(of):
        dense, rest = z[of].clone(), z[of].clone()
        losses = compiled.dense_rows_(dense, t[of], targets[of], *WEIGHTS, True)
        return *losses, dense, compiled.rest_rows_(rest, targets[of], *(x[of] for x in kept), *WEIGHTS, True), rest

    one = results(slice(None))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert all(torch.equal(a, b) for a, b in zip(results(slice(None)), one, strict=True))
    assert all(torch.equal(a, b[4:7]) for a, b in zip(results(slice(4, 7)), one, strict=True))


def test_no_row():
    z, t, targets = logits(0, 10, 1.0)
    ce, kl = compiled.dense_rows_(z, t, targets, *WEIGHTS, True)
    assert ce.shape == kl.shape == (0,)
    assert compiled.rest_rows_(z, targets, *[torch.zeros(0)] * 4, *WEIGHTS, True).shape == (0, 4)
