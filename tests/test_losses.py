"""Every loss against a loop over rows and heads in float64, written from the formulas alone; gradients by autograd."""

import json
import math
from itertools import pairwise

import mpmath
import pytest
import torch
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from bitdistill.errors import UserError
from bitdistill.training import relations
from bitdistill.training.gamma import BalancedGamma
from bitdistill.training.losses import cross_entropy, logits_distillation, next_tokens
from bitdistill.training.relations import common_split_heads, relation_loss, row_kl

torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------- hand-written versions


def kl(p, q):
    return sum(p[j] * (torch.log(p[j]) - torch.log(q[j])) for j in range(len(p)))


def regroup_by_hand(x_BHTD, split_heads):
    """(B, H, T, D) -> (B, split_heads, T, H * D / split_heads), element by element: channel c = h * D + d."""
    B, H, T, D = x_BHTD.shape
    width = H * D // split_heads
    rows = [
        x_BHTD[b, c // D, t, c % D]
        for b in range(B)
        for s in range(split_heads)
        for t in range(T)
        for c in range(s * width, (s + 1) * width)
    ]
    return torch.stack(rows).reshape(B, split_heads, T, width)


def relation_by_hand(teacher_qkv, student_qkv, mask, convention, split_heads=None, temperature=1.0, causal=False):
    """The sum over Q, K and V, in float64."""
    total = 0.0
    for teacher, student in zip(teacher_qkv, student_qkv, strict=True):
        teacher, student = teacher.double(), student.double()
        if split_heads:
            teacher, student = regroup_by_hand(teacher, split_heads), regroup_by_hand(student, split_heads)
        B, H, T, _ = student.shape
        rows, term = 0, 0.0
        for b in range(B):
            for i in range(T):
                if convention != "pr382" and not mask[b, i]:
                    continue
                rows += 1
                keys = range(T) if convention == "pr382" else [j for j in range(T) if mask[b, j]]
                if causal:
                    keys = [j for j in keys if j <= i]
                for h in range(H):
                    probabilities = []
                    for x in (teacher[b, h], student[b, h]):
                        if convention == "eq12":
                            logits = [x[i] @ x[j] / math.sqrt(x.shape[1]) for j in keys]
                        else:
                            unit = [row / max(row.norm(), 1e-12) for row in x]
                            logits = [unit[i] @ unit[j] / temperature for j in keys]
                        p = torch.stack(logits).softmax(0)
                        probabilities.append(p if convention == "eq12" else p.clamp(min=1e-8))
                    term = term + kl(*probabilities)
        total = total + term / (rows * H)
    return total / split_heads if convention == "pr382" else total


def attention_maps_by_hand(teacher_qkv, student_qkv, mask, temperature):
    total, rows = 0.0, 0
    B, H, T, _ = student_qkv[0].shape
    for b in range(B):
        for i in range(T):
            if not mask[b, i]:
                continue
            rows += 1
            for h in range(H):
                probabilities = []
                for q, k, _ in (teacher_qkv, student_qkv):
                    q, k = q.double(), k.double()
                    k = k[b, h // (H // k.shape[1])]
                    keys = [j for j in range(i + 1) if mask[b, j]]
                    logits = [q[b, h, i] @ k[j] / (temperature * math.sqrt(q.shape[3])) for j in keys]
                    probabilities.append(torch.stack(logits).softmax(0))
                total = total + kl(*probabilities)
    return total / (rows * H) * temperature**2


def qkv(seed, B=2, T=6, heads=4, kv_heads=2, D=8, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, h, T, D, generator=generator) * scale for h in (heads, kv_heads, kv_heads)]


def leaves(tensors):
    return [x.clone().requires_grad_() for x in tensors]


def gradients(loss, tensors):
    return torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)


def assert_same(loss, by_hand, ours, theirs, rtol=2e-5):
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(loss.double(), torch.as_tensor(by_hand), rtol=rtol, atol=0)
    for a, b in zip(gradients(loss, ours), gradients(by_hand, theirs), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=rtol * b.abs().max().item())


# Left padding, right padding, a hole; the last row of a batch whole.
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 0]])


# ------------------------------------------------------------------------------------------- relations


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("convention", "split_heads", "temperature"),
    [
        ("eq12", None, 1.0),
        ("eq12", 2, 1.0),
        ("eq12", 8, 1.0),
        ("alg1", None, 1.0),
        ("alg1", 4, 0.5),
        ("alg1", 1, 0.07),
    ],
)
def test_relation_against_loops(convention, split_heads, temperature, causal):
    teacher, student = qkv(0), qkv(1)
    ours, theirs = leaves(student), leaves(student)
    loss = relation_loss(
        teacher, ours, MASK, convention=convention, split_heads=split_heads, temperature=temperature, causal=causal
    )
    by_hand = relation_by_hand(teacher, theirs, MASK, convention, split_heads, temperature, causal)
    assert_same(loss, by_hand, ours, theirs)


def test_pr382_counts_padding_and_divides_by_the_heads_again():
    teacher, student = ([x[:1, :, :3] for x in qkv(seed, heads=4, kv_heads=4, D=24)] for seed in (0, 1))
    mask = torch.tensor([[0, 1, 1]])
    ours, theirs = leaves(student), leaves(student)
    loss = relation_loss(teacher, ours, mask, convention="pr382")  # 32 heads of three channels
    assert_same(loss, relation_by_hand(teacher, theirs, mask, "pr382", 32), ours, theirs)
    ours, theirs = leaves(student), leaves(student)
    loss = relation_loss(teacher, ours, mask, convention="pr382", split_heads=4, num_layers=3)
    assert_same(loss, relation_by_hand(teacher, theirs, mask, "pr382", 4) / 3, ours, theirs)


def test_pr382_is_alg1_without_a_mask_over_split_heads():
    teacher, student = qkv(0), qkv(1)
    alg1 = relation_loss(teacher, student, None, convention="alg1", split_heads=4)
    pr382 = relation_loss(teacher, student, MASK, convention="pr382", split_heads=4)
    torch.testing.assert_close(pr382, alg1 / 4)


def test_alg1_against_torch_kl_div():
    """The authors' recipe in torch's own words: normalize, matmul, softmax, clamp, kl_div "batchmean"."""
    teacher, student = qkv(0, D=16), qkv(1, D=16)
    for temperature in (1.0, 0.02):  # at 0.02 most probabilities are below the clamp
        ours, theirs = leaves(student), leaves(student)
        expected = 0.0
        for t, s in zip(teacher, theirs, strict=True):
            p, q = (
                F.softmax((unit @ unit.mT).reshape(-1, 6) / temperature, dim=-1).clamp(min=1e-8)
                for unit in (F.normalize(regroup_by_hand(x.double(), 8), dim=-1) for x in (t, s))
            )
            if temperature == 0.02:
                assert (p == 1e-8).double().mean() > 0.3
            expected = expected + F.kl_div(q.log(), p, reduction="batchmean")
        loss = relation_loss(teacher, ours, None, convention="alg1", split_heads=8, temperature=temperature)
        assert_same(loss, expected, ours, theirs)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_attention_maps_against_loops(temperature):
    teacher, student = qkv(0, kv_heads=1, D=4), qkv(1)  # another width, other key heads, as many query heads
    ours, theirs = leaves(student), leaves(student)
    loss = relation_loss(teacher, ours, MASK, convention="attention_maps", temperature=temperature)
    assert_same(loss, attention_maps_by_hand(teacher, theirs, MASK, temperature), ours, theirs)


@pytest.mark.parametrize("convention", ["eq12", "alg1", "pr382"])
def test_models_of_different_shape(convention):
    teacher, student = qkv(0, heads=6, kv_heads=3, D=16), qkv(1, heads=4, kv_heads=2, D=12)
    ours, theirs = leaves(student), leaves(student)
    loss = relation_loss(teacher, ours, MASK, convention=convention, split_heads=12)
    assert_same(loss, relation_by_hand(teacher, theirs, MASK, convention, 12), ours, theirs)


@pytest.mark.parametrize("convention", relations.RELATION_CONVENTIONS)
def test_equal_models_are_at_zero_exactly(convention):
    teacher = qkv(0, scale=3.0)
    student = leaves(teacher)
    split_heads = None if convention == "attention_maps" else 4
    loss = relation_loss(teacher, student, MASK, convention=convention, split_heads=split_heads)
    assert loss.item() == 0
    assert all((g == 0).all() for g in gradients(loss, student))


@pytest.mark.parametrize("convention", relations.RELATION_CONVENTIONS)
def test_one_token_and_all_padding(convention):
    split_heads = None if convention == "attention_maps" else 4
    one, teacher = leaves(qkv(1, T=1)), qkv(0, T=1)
    loss = relation_loss(teacher, one, None, convention=convention, split_heads=split_heads)
    assert loss.item() == 0  # a token is related to itself with probability 1
    assert all((g == 0).all() for g in gradients(loss, one))

    student, teacher = leaves(qkv(1)), qkv(0)
    nothing = torch.zeros(2, 6, dtype=torch.long)
    loss = relation_loss(teacher, student, nothing, convention=convention, split_heads=split_heads)
    assert loss.requires_grad
    if convention == "pr382":
        assert loss.item() > 0
    else:
        assert loss.item() == 0
        assert all((g == 0).all() for g in gradients(loss, student))
        empty_sample = relation_loss(
            teacher, student, torch.tensor([[1] * 6, [0] * 6]), convention=convention, split_heads=split_heads
        )
        alone = relation_loss(
            [x[:1] for x in teacher],
            [x[:1] for x in student],
            None,
            convention=convention,
            split_heads=split_heads,
        )
        torch.testing.assert_close(empty_sample, alone)


@pytest.mark.parametrize("convention", ["eq12", "alg1", "attention_maps"])
def test_what_padding_holds_does_not_matter(convention):
    teacher, student = qkv(0), qkv(1)
    loss = relation_loss(teacher, clean := leaves(student), MASK, convention=convention)
    padded = (MASK == 0)[:, None, :, None]
    teacher = [x.masked_fill(padded, math.nan) for x in teacher]
    dirty = leaves([x.masked_fill(padded, math.inf) for x in student])
    same = relation_loss(teacher, dirty, MASK, convention=convention)
    assert torch.equal(loss, same)
    for a, b in zip(gradients(loss, clean), gradients(same, dirty), strict=True):
        assert torch.equal(a, b)
        assert (a[padded.expand_as(a)] == 0).all()


@pytest.mark.parametrize("convention", relations.RELATION_CONVENTIONS)
def test_relation_parts_add_up_to_the_whole(convention):
    """Two ranks with unlike numbers of tokens, each divided by the global count: their sum is the one-rank loss."""
    teacher, student = qkv(0), qkv(1)
    settings = {"convention": convention, "split_heads": None if convention == "attention_maps" else 4}
    whole = relation_loss(teacher, student, MASK, **settings)
    count = MASK.numel() if convention == "pr382" else int(MASK.sum())
    for num_items in (count, torch.tensor(count)):
        parts = [
            relation_loss([x[b] for x in teacher], [x[b] for x in student], MASK[b], num_items=num_items, **settings)
            for b in (slice(0, 1), slice(1, 2))
        ]
        torch.testing.assert_close(sum(parts), whole)


def test_weights_choose_and_scale_the_terms():
    teacher, student = qkv(0), qkv(1)
    terms = [relation_loss(teacher, student, MASK, weights=w) for w in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len({term.item() for term in terms}) == 3
    torch.testing.assert_close(relation_loss(teacher, student, MASK), sum(terms))
    torch.testing.assert_close(
        relation_loss(teacher, student, MASK, weights=(0.5, 2, 0)), 0.5 * terms[0] + 2 * terms[1]
    )
    # V alone needs only V's heads to agree
    wide = [qkv(0, heads=8)[0], *teacher[1:]]
    torch.testing.assert_close(relation_loss(wide, student, MASK, weights=(0, 0, 1)), terms[2])


def test_autocast_and_bf16_inputs_do_not_lower_the_precision():
    teacher, student = ([x.bfloat16() for x in qkv(seed)] for seed in (0, 1))
    expected = relation_loss([x.float() for x in teacher], [x.float() for x in student], MASK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(relation_loss(teacher, student, MASK), expected)


def test_no_gradient_reaches_the_teacher():
    teacher, student = leaves(qkv(0)), leaves(qkv(1))
    loss = relation_loss(teacher, student, MASK)
    assert all((g == 0).all() for g in gradients(loss, teacher))


@pytest.mark.parametrize(
    ("settings", "field", "said"),
    [
        ({"convention": "eq13"}, "distill.relation", "eq12"),
        ({"split_heads": 5}, "distill.split_heads", "[1, 2, 4, 8, 16]"),
        ({"split_heads": 0}, "distill.split_heads", "[1, 2, 4, 8, 16]"),
        ({"convention": "pr382"}, "distill.split_heads", "[1, 2, 4, 8, 16]"),
        ({"convention": "eq12", "temperature": 2.0}, "distill.relation_temperature", "eq12"),
        ({"convention": "pr382", "split_heads": 2, "causal": True}, "distill.relation_causal", "pr382"),
        ({"convention": "attention_maps", "split_heads": 4}, "distill.split_heads", "attention_maps"),
    ],
)
def test_mistakes_in_the_settings_are_named(settings, field, said):
    with pytest.raises(UserError) as error:
        relation_loss(qkv(0), qkv(1), MASK, **settings)
    assert error.value.field == field
    assert said in str(error.value)


def test_arguments_that_a_convention_does_not_have():
    for arguments in ({"convention": "alg1", "num_layers": 2}, {"convention": "attention_maps", "weights": (1, 1, 0)}):
        with pytest.raises(ValueError, match=arguments["convention"]):
            relation_loss(qkv(0), qkv(1), MASK, **arguments)


def test_unlike_heads_need_split_heads():
    for convention in ("eq12", "alg1"):
        with pytest.raises(UserError, match=r"split_heads: .*one of \[1, 2, 4, 8, 16\]"):
            relation_loss(qkv(0, heads=8), qkv(1), MASK, convention=convention)
    with pytest.raises(UserError, match="query heads"):
        relation_loss(qkv(0, heads=8), qkv(1), MASK, convention="attention_maps")


def test_common_split_heads():
    assert common_split_heads(1024, 2048) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert common_split_heads(896, 128) == [1, 2, 4, 8, 16, 32, 64, 128]
    assert common_split_heads(15, 9) == [1, 3]
    assert common_split_heads(7) == [1, 7]


# ------------------------------------------------------------------------------------------- the row KL


def kl_of_40_digits(teacher, student, floor):
    with mpmath.workdps(40):
        rows = []
        for a, b in zip(teacher.tolist(), student.tolist(), strict=True):
            p, q = ([mpmath.exp(x) for x in map(mpmath.mpf, logits)] for logits in (a, b))
            p, q = ([max(x / mpmath.fsum(weights), floor) for x in weights] for weights in (p, q))
            rows.append(mpmath.fsum(x * mpmath.log(x / y) for x, y in zip(p, q, strict=True)))
        return torch.tensor([float(row) for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("floor", [0.0, 1e-8])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("distance", [1e-4, 1e-2, 1.0, 30.0])
def test_row_kl_from_tiny_to_far_apart(scale, distance, floor):
    """From cosine relations (KL 5e-9 under log Z = 5) to products of unnormalized keys (one-hot rows, logits of 1e4).

    The reference has 40 digits: float64 logarithms are too coarse for some of these."""
    torch.manual_seed(0)
    teacher = torch.randn(8, 65) * scale
    student = (teacher + torch.randn(8, 65) * distance).requires_grad_()
    loss = row_kl(teacher, student, torch.tensor(True), floor)
    expected = kl_of_40_digits(teacher, student, floor)
    error = (loss.double() - expected).abs().max()
    assert error <= (5e-8 / distance + 5e-6) * expected.max() + (1e-14 if floor else 0)

    reference = student.detach().double().requires_grad_()
    p, log_q = teacher.double().softmax(-1), reference.log_softmax(-1)
    if floor:
        p, log_q = p.clamp(min=floor), log_q.exp().clamp(min=floor).log()
    expected = torch.autograd.grad(-(p * log_q).sum(), reference)[0]
    error = torch.autograd.grad(loss.sum(), student)[0].double() - expected
    assert error.norm() <= 1e-5 * expected.norm() + 1e-12


def test_row_kl_beats_log_softmax_where_relations_live():
    """Cosine relations of a good student: KL 1e-7 under log Z = 6. A difference of logarithms loses it."""
    torch.manual_seed(0)
    teacher = torch.rand(64, 512) * 2 - 1
    student = teacher + 5e-4 * torch.randn(64, 512)
    p, q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)
    error = (row_kl(teacher, student, torch.tensor(True)).double() / expected - 1).abs().max()
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    naive = ((p.exp() * (p - q)).sum(-1).double() / expected - 1).abs().max()
    assert error < 5e-5
    assert naive > 20 * error


def test_row_kl_with_excluded_keys_equals_the_row_without_them():
    torch.manual_seed(0)
    teacher, student = torch.randn(3, 9), torch.randn(3, 9)
    allowed = torch.rand(3, 9) < 0.6
    allowed[:, 0] = True
    teacher_with_junk = teacher.masked_fill(~allowed, 80.0)
    for floor in (0.0, 1e-8, 0.05):
        all_rows = row_kl(teacher_with_junk, student, allowed, floor)
        for i in range(3):
            keys = allowed[i]
            alone = row_kl(teacher[i, keys], student[i, keys], torch.tensor(True), floor)
            torch.testing.assert_close(all_rows[i], alone)


# ------------------------------------------------------------------------------------------- logits

LABELS = torch.tensor([[-100, -100, 3, 0, -100, 7], [5, -100, -100, -100, 6, -100]])  # a first label predicts nothing
TARGETS = next_tokens(LABELS)
ROWS = [(0, 1), (0, 2), (0, 4), (1, 3)]


def test_next_tokens():
    assert TARGETS.tolist() == [[-100, 3, 0, -100, 7, -100], [-100, -100, -100, 6, -100, -100]]
    assert next_tokens(torch.tensor([[4]])).tolist() == [[-100]]


def test_cross_entropy_against_transformers_and_by_hand():
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 11)
    ours, theirs, loops = leaves([logits] * 3)
    loss = cross_entropy(ours, TARGETS)
    expected = ForCausalLMLoss(theirs, LABELS, vocab_size=11)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(a, b)[0] for a, b in ((loss, ours), (expected, theirs))))
    by_hand = -sum(loops[b, t].double().log_softmax(0)[LABELS[b, t + 1]] for b, t in ROWS) / 4
    assert_same(cross_entropy(ours, TARGETS), by_hand, [ours], [loops])


def test_cross_entropy_of_chosen_positions():
    """As with logits_to_keep: positions that no row of the batch needs are never computed."""
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 11)
    kept = torch.tensor([1, 2, 3, 4])
    assert torch.equal(cross_entropy(logits[:, kept], TARGETS[:, kept]), cross_entropy(logits, TARGETS))


def test_cross_entropy_of_bf16_logits_is_computed_in_fp32():
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 11).bfloat16()
    assert torch.equal(cross_entropy(logits, TARGETS), cross_entropy(logits.float(), TARGETS))


def test_cross_entropy_with_a_global_count():
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 11)
    whole = cross_entropy(logits, TARGETS)
    for num_items in (4, torch.tensor(4)):
        parts = [cross_entropy(logits[b : b + 1], TARGETS[b : b + 1], num_items=num_items) for b in range(2)]
        torch.testing.assert_close(sum(parts), whole)
    expected = ForCausalLMLoss(logits, LABELS, 11, num_items_in_batch=9)
    torch.testing.assert_close(cross_entropy(logits, TARGETS, 9), expected)


@pytest.mark.parametrize("num_items", [None, 5, 0])
def test_without_a_row_the_losses_are_zero_with_a_graph(num_items):
    logits = torch.full((2, 6, 11), math.inf).requires_grad_()  # whatever the rows hold that nobody asked for
    targets, none = torch.full((2, 6), -100), torch.zeros(2, 6, dtype=torch.bool)
    for loss in (
        cross_entropy(logits, targets, num_items=num_items),
        cross_entropy(logits[:, :0], targets[:, :0], num_items=num_items),
        logits_distillation(logits, torch.randn(2, 6, 11), none, num_items=num_items),
    ):
        assert loss.item() == 0
        assert (torch.autograd.grad(loss, logits)[0] == 0).all()


@pytest.mark.parametrize("tau_squared", [False, True])
@pytest.mark.parametrize("rows_BT", [TARGETS != -100, MASK.bool()], ids=["response", "all"])
def test_logits_distillation_by_hand_and_by_torch(rows_BT, tau_squared):
    torch.manual_seed(0)
    teacher = torch.randn(2, 6, 11) * 4
    logits = torch.randn(2, 6, 11) * 4
    ours, loops = leaves([logits, logits])
    loss = logits_distillation(ours, teacher, rows_BT, temperature=3.0, tau_squared=tau_squared)
    rows = [(b, t) for b in range(2) for t in range(6) if rows_BT[b, t]]
    by_hand = sum(kl(*((x[b, t].double() / 3).softmax(0) for x in (teacher, loops))) for b, t in rows) / len(rows)
    assert_same(loss, by_hand * (9 if tau_squared else 1), [ours], [loops])
    index = tuple(torch.tensor(rows).T)
    expected = F.kl_div((logits[index] / 3).log_softmax(-1), (teacher[index] / 3).softmax(-1), reduction="batchmean")
    torch.testing.assert_close(loss, expected * (9 if tau_squared else 1))


def test_logits_distillation_parts_equal_whole_and_equal_models_are_at_zero():
    torch.manual_seed(0)
    student, teacher, rows_BT = torch.randn(2, 6, 11), torch.randn(2, 6, 11), TARGETS != -100
    whole = logits_distillation(student, teacher, rows_BT)
    parts = [
        logits_distillation(student[b : b + 1], teacher[b : b + 1], rows_BT[b : b + 1], num_items=4) for b in range(2)
    ]
    torch.testing.assert_close(sum(parts), whole)
    same = teacher.clone().requires_grad_()
    loss = logits_distillation(same, teacher, rows_BT)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, same)[0].abs().max() < 1e-7
    graded = teacher.clone().requires_grad_()
    loss = logits_distillation(same, graded, rows_BT)
    assert (gradients(loss, [graded])[0] == 0).all()


def test_vocabularies_must_agree():
    with pytest.raises(UserError, match="vocabulary of 5 tokens; got 6 tokens"):
        logits_distillation(torch.zeros(1, 2, 5), torch.zeros(1, 2, 6), torch.ones(1, 2, dtype=torch.bool))


# ------------------------------------------------------------------------------------------- gamma


def task_step(gamma, x, a, b, scale=1.0, weight=None):
    """One micro-batch over x: CE a * sum(x), relations b * sum(x^2), the graph forked as the capture forks it."""
    relations, downstream = x.view_as(x), x.view_as(x)
    ce, attention = a * downstream.sum(), b * relations.square().sum()
    gamma.watch(ce, attention, [relations], [downstream])
    loss = scale * (ce + (gamma.gamma if weight is None else weight) * attention)
    return torch.autograd.grad(loss, x)[0]


def test_balanced_gamma_by_hand():
    gamma, mean = BalancedGamma(rho=0.5, decay=0.9), 0.0
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    assert gamma.gamma == 0.0
    for step, (a, b, scale) in enumerate([(3.0, 1.0, 1.0), (2.0, 4.0, 8.0), (-0.1, 7.0, 0.25)], start=1):
        before = gamma.gamma
        gradient = task_step(gamma, x, a, b, scale)
        torch.testing.assert_close(gradient, scale * (a + before * b * 2 * x.detach()))  # watching changes nothing
        assert gamma.gamma == before
        value = gamma.finish_step()
        ce_norm, attention_norm = math.sqrt(2) * abs(a), b * math.sqrt(4 + 16)  # whatever the loss was scaled with
        mean = 0.9 * mean + 0.1 * ce_norm / attention_norm
        assert value == gamma.gamma == pytest.approx(0.5 * mean / (1 - 0.9**step), rel=1e-6)
        assert gamma.task_norm == pytest.approx(ce_norm, rel=1e-6)
        assert gamma.attention_norm == pytest.approx(attention_norm, rel=1e-6)
    assert (gamma.updates, gamma.skipped) == (3, 0)
    assert gamma.finish_step() == value  # nothing was watched
    assert (gamma.updates, gamma.skipped) == (3, 0)


def test_balanced_gamma_counts_all_but_the_relations_as_the_task():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    relations, downstream = x.view_as(x), x.view_as(x)
    gamma = BalancedGamma(rho=1.0)
    ce, logits, attention = downstream[0] * 3, downstream[1] * 0.4, relations.square().sum()
    gamma.watch(ce, attention, [relations, x.view_as(x)], [downstream])  # the second relation tensor is in no loss
    (ce + 10 * logits + 1e6 * attention).backward()
    gamma.finish_step()
    assert gamma.task_norm == pytest.approx(5.0)
    assert gamma.attention_norm == pytest.approx(math.sqrt(20))


def test_balanced_gamma_balances():
    """gamma * |grad AD| = rho * |grad task|, whatever the scale of the relation loss."""
    x = torch.randn(2, 3, 4, requires_grad=True)
    for scale in (1e-6, 1.0, 1e5):
        gamma = BalancedGamma(rho=2.0)
        task_step(gamma, x, 1.0, scale)
        assert gamma.finish_step() * gamma.attention_norm == pytest.approx(2 * gamma.task_norm)


def test_balanced_gamma_skips_and_counts():
    x = torch.ones(3, requires_grad=True)
    gamma = BalancedGamma(rho=1.0)
    task_step(gamma, x, 1.0, 0.0)
    assert gamma.finish_step() == 0.0  # before the first good step
    task_step(gamma, x, 1.0, 2.0)
    good = gamma.finish_step()
    assert good == pytest.approx(0.25)
    for a, b in ((0.0, 1.0), (math.inf, 1.0), (1.0, math.nan)):
        task_step(gamma, x, a, b, weight=0.0)
        assert gamma.finish_step() == good
    assert (gamma.updates, gamma.skipped) == (1, 4)


def test_balanced_gamma_resumes_exactly():
    x = torch.randn(5, requires_grad=True)

    def steps(gamma, seed):
        generator = torch.Generator().manual_seed(seed)
        for a, b in torch.rand(4, 2, generator=generator).tolist():
            task_step(gamma, x, a, b)
            yield gamma.finish_step()

    whole = BalancedGamma(1.0)
    list(steps(whole, 0))
    resumed = BalancedGamma(1.0)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert list(steps(resumed, 1)) == list(steps(whole, 1))
    assert resumed.state_dict() == whole.state_dict()
    task_step(whole, x, 1.0, 1.0)
    with pytest.raises(AssertionError, match="finish the step"):
        whole.state_dict()


def test_balanced_gamma_over_micro_batches_and_ranks_equals_one_batch():
    x = torch.randn(4, 3, requires_grad=True)
    halves = [x[:2].detach().requires_grad_(), x[2:].detach().requires_grad_()]
    one, micro = BalancedGamma(1.0), BalancedGamma(1.0)
    task_step(one, x, 1.5, 0.3)
    for half in halves:
        task_step(micro, half, 1.5, 0.3)
    assert micro.finish_step() == pytest.approx(one.finish_step())

    ranks, sums = [BalancedGamma(1.0), BalancedGamma(1.0)], torch.zeros(2, dtype=torch.float64)
    for rank, half in zip(ranks, halves, strict=True):
        task_step(rank, half, 1.5, 0.3, scale=2.0)  # the loss of each of two ranks is doubled, then averaged
        sums += rank._squares
    for rank in ranks:
        assert rank.finish_step(all_reduce=lambda tensor: sums) == pytest.approx(one.gamma)


def test_balanced_gamma_settings():
    for settings in ({"rho": 0.0}, {"rho": -1.0}, {"rho": math.nan}, {"rho": 1.0, "decay": 1.0}):
        with pytest.raises(ValueError, match="expected"):
            BalancedGamma(**settings)


def test_conventions_differ_in_scale():
    """Why gamma needs a convention: the same tensors, four losses, each far from the next."""
    teacher, student = qkv(0, heads=4, kv_heads=4), qkv(1, heads=4, kv_heads=4)
    values = sorted(relation_loss(teacher, student, None, convention=c).item() for c in relations.RELATION_CONVENTIONS)
    assert all(b > 1.5 * a for a, b in pairwise(values))
