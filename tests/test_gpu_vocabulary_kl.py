"""The vocabulary kernels against the specification, kernels/vocabulary_rows.py, and both against float64: interpreted on CPU
tensors, or on the GPU where there is one. What a kernel must write is poisoned beforehand."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

pytest.importorskip("triton")

from bitdistill.kernels import vocabulary, vocabulary_rows
from bitdistill.kernels.gpu import vocabulary_kl
from bitdistill.kernels.numerics import IGNORED
from gpu_launches.vocabulary_kl import production_launches

torch.set_num_threads(1)
PER_TAU, CE, KL = 0.2, 0.5, 0.7


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 64 and 128 words, so that small vocabularies take several; and what is allocated is poisoned."""
    monkeypatch.setattr(vocabulary_kl, "TILE", (64, 1))
    monkeypatch.setattr(vocabulary_kl, "TILE_FEW", (128, 1))
    monkeypatch.setattr(vocabulary_kl, "MANY_ROWS", 5)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(math.nan))


def logits(N, V, scale, device, dtype=torch.float32, seed=0):
    """Student, teacher, targets; rows at strides of whole vectors, NaN between them."""
    torch.manual_seed(seed)
    both = []
    for _ in range(2):
        room = vocabulary._logit_rows(N, V, dtype, torch.device(device))
        both.append(room.copy_(torch.randn(N, V) * scale))
    targets = torch.randint(0, V, (N,), device=device)
    targets[1::3] = IGNORED
    return *both, targets


def exact(z, t, targets, dtype=torch.float64):
    """CE, KL and the weighted gradient by autograd."""
    z, t = z.detach().to(dtype).requires_grad_(), t.to(dtype)
    ce = F.cross_entropy(z, targets, reduction="none")
    q, p = F.log_softmax(z * PER_TAU, -1), F.log_softmax(t * PER_TAU, -1)
    kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    total = CE * ce.sum() + KL * kl.sum()
    return ce.detach(), kl.detach(), torch.autograd.grad(total, z)[0]


def assert_close(found, plain, expected):
    for a, b, c in zip(found, plain, expected, strict=True):
        rounding = 8 * torch.finfo(torch.float32).eps * c.abs().amax()
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + rounding


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(N=st.integers(1, 7), V=st.integers(1, 300), scale=st.sampled_from([0.01, 1.0, 30.0, 1e4]), distill=st.booleans())
def test_dense_rows(device, N, V, scale, distill):
    z, t, targets = logits(N, V, scale, device)
    ce_exact, kl_exact, gradient = exact(z, t if distill else z, targets)
    plain = exact(z, t if distill else z, targets, torch.float32)
    before = z.clone()
    for write in (False, True):
        ce, kl = vocabulary_kl.dense_rows_(
            z, t if distill else None, targets, CE, KL * PER_TAU, PER_TAU, gradient=write
        )
        assert_close((ce, kl), plain[:2], (ce_exact, kl_exact if distill else 0 * kl_exact))
        assert (ce[targets == IGNORED] == 0).all()
        assert write or torch.equal(z, before)
    assert_close((z,), plain[2:], (gradient,))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    N=st.integers(1, 7), V=st.integers(1, 200), K=st.integers(1, 200), scale=st.sampled_from([0.01, 1.0, 30.0, 3000.0])
)
def test_rest_rows_inside_top_k(device, N, V, K, scale):
    K = min(K, V)
    z, t, targets = logits(N, V, scale, device)
    values, indices = t.topk(K)
    others = torch.ones_like(t, dtype=torch.bool).scatter(1, indices, False)
    log_rest = (t * PER_TAU).masked_fill(~others, -math.inf).logsumexp(-1)
    arguments = (indices, values, log_rest, targets, CE, KL * PER_TAU, PER_TAU)
    theirs = z.clone()
    expected = vocabulary_rows.top_k_rows_(vocabulary_rows.rest_rows_, theirs, *arguments, True)
    found = vocabulary_rows.top_k_rows_(vocabulary_kl.rest_rows_, z.clone(), *arguments, False)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    found = vocabulary_rows.top_k_rows_(vocabulary_kl.rest_rows_, z, *arguments, True)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(z, theirs, rtol=2e-6, atol=1e-6)


def test_equal_logits_are_at_zero_exactly(device):
    z, _, targets = logits(3, 200, 5.0, device)
    targets[:] = IGNORED
    ce, kl = vocabulary_kl.dense_rows_(z, z.clone(), targets, 1.0, 1.0, PER_TAU, True)
    assert (ce == 0).all()
    assert (kl == 0).all()
    assert (z == 0).all()


def test_a_kl_far_below_one_rounding_of_log_z(device):
    torch.manual_seed(0)
    t = torch.randn(4, 1000, device=device)
    z = t + 1e-4 * torch.randn(4, 1000, device=device)
    targets = torch.full((4,), IGNORED, device=device)
    _, expected, _ = exact(z, t, targets)
    _, kl = vocabulary_kl.dense_rows_(z, t, targets, 1.0, 1.0, PER_TAU, False)
    assert ((kl - expected) / expected).abs().max() < 1e-2


@pytest.mark.parametrize("d", [1e-6, 1e-3, 0.1, 0.49, 0.51, 3.0])
def test_both_sides_of_the_series(device, d):
    """One word moved by d: KL and gradient in closed form, where expm1(d) - d has its series and where not."""
    t = torch.zeros(1, 2, device=device)
    z = torch.tensor([[d, 0.0]], device=device)
    targets = torch.full((1,), IGNORED, device=device)
    _, expected, _ = exact(z / PER_TAU, t, targets)
    z = z / PER_TAU
    q = torch.tensor([[d, 0.0]], dtype=torch.float64).softmax(-1)
    _, kl = vocabulary_kl.dense_rows_(z, t, targets, 0.0, 1.0, PER_TAU, True)
    assert kl.item() == pytest.approx(math.log(math.cosh(d / 2)), rel=1e-5)
    torch.testing.assert_close(z.cpu().double(), q - 0.5, rtol=1e-6, atol=2**-25)  # a rounding of log Z
    assert expected.item() == pytest.approx(math.log(math.cosh(d / 2)), rel=1e-5, abs=1e-15)


def test_half_precision_logits(device):
    """Values are those of the same logits in fp32; gradients differ by one rounding (the interpreter truncates)."""
    z, t, targets = logits(4, 150, 3.0, device, torch.bfloat16)
    wide = z.float()
    expected = vocabulary_kl.dense_rows_(wide, t.float(), targets, CE, KL * PER_TAU, PER_TAU, True)
    found = vocabulary_kl.dense_rows_(z, t, targets, CE, KL * PER_TAU, PER_TAU, True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert z.dtype == torch.bfloat16
    torch.testing.assert_close(z.float(), wide, rtol=2**-7, atol=1e-30)


def test_a_nan_reaches_the_loss(device):
    z, t, targets = logits(2, 100, 1.0, device)
    targets[:] = 3
    z[0, 70] = math.nan
    ce, kl = vocabulary_kl.dense_rows_(z, t, targets, CE, KL, PER_TAU, True)
    assert ce[0].isnan()
    assert kl[0].isnan()
    assert z[0].isnan().all()
    assert ce[1].isfinite()


def test_a_target_that_is_no_word_makes_the_loss_nan(device):
    z, t, targets = logits(4, 100, 1.0, device)
    targets[:] = torch.tensor([100, -1, 99, IGNORED])
    ce, _ = vocabulary_kl.dense_rows_(z, t, targets, CE, KL, PER_TAU, False)
    assert ce.isnan().tolist() == [True, True, False, False]


def test_bytes(device, moved_bytes):
    """Twice student and teacher in bf16, and the gradient once: 10 bytes per logit, and some 30 a row."""
    z, t, targets = logits(6, 250, 1.0, device, torch.bfloat16)
    with moved_bytes() as moved:
        vocabulary_kl.dense_rows_(z, t, targets, CE, KL, PER_TAU, True)
    assert 6 * 250 * 8 <= moved.loaded <= 6 * (250 * 8 + 10)
    assert 6 * 250 * 2 <= moved.stored <= 6 * (250 * 2 + 8)
    with moved_bytes() as moved:
        vocabulary_kl.dense_rows_(z, None, targets, CE, KL, PER_TAU, False)
    assert 6 * 250 * 2 <= moved.loaded <= 6 * (250 * 2 + 10)
    assert moved.stored <= 6 * 8
    rows = torch.zeros(6, device=device)
    with moved_bytes() as moved:
        vocabulary_kl.rest_rows_(z, targets, rows, rows, rows, rows, CE, KL, PER_TAU, True)
    assert 6 * 250 * 4 <= moved.loaded <= 6 * (250 * 4 + 24)
    assert 6 * 250 * 2 <= moved.stored <= 6 * (250 * 2 + 16)


def test_the_whole_operator_on_the_kernels(device, monkeypatch):
    """Chunks, products and kernels together equal the same with the PyTorch row functions."""
    torch.manual_seed(0)
    x, weight, teacher_x, teacher_weight = (
        torch.randn(*shape, device=device) for shape in ((9, 8), (90, 8), (9, 5), (90, 5))
    )
    targets = torch.randint(0, 90, (9,), device=device)
    values, indices = (teacher_x @ teacher_weight.T).topk(4)
    weights = (1.0, 0.5, PER_TAU, torch.float32, True, True, 3000)
    kernels = (vocabulary_kl.dense_rows_, vocabulary_kl.rest_rows_)
    references = (vocabulary_rows.dense_rows_, vocabulary_rows.rest_rows_)
    for teacher in (
        (None,) * 5,
        (teacher_x, teacher_weight, None, None, None),
        (None, None, indices, values, torch.zeros(9, device=device)),
    ):
        both = []
        for functions in (kernels, references):
            monkeypatch.setattr(vocabulary, "_row_functions", lambda *_, chosen=functions: chosen)
            with torch.no_grad():
                both.append(vocabulary.chunked_losses(x, weight, targets, *teacher, *weights))
        torch.testing.assert_close(*both, rtol=1e-5, atol=2e-6)


def test_production_launches_are_what_runs(monkeypatch):
    monkeypatch.undo()
    launches = production_launches()
    assert {(launch.constexprs["BLOCK"], launch.num_warps) for launch in launches} == {(2048, 8), (4096, 16)}
    for launch in launches:
        assert set(launch.kernel.arg_names) == set(launch.signature) | set(launch.constexprs)
