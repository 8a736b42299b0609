"""The hidden-state loss: against loops, against transformers' own hidden states, and in the objectives of stages 2 and 3."""

import copy

import pytest
import torch
from test_capture import FAMILIES, PADDINGS, batch, tiny

from bitdistill.distributed.teacher import Teacher
from bitdistill.errors import UserError
from bitdistill.student.refine import refine
from bitdistill.training.distill import Distillation
from bitdistill.training.hidden import HiddenStates, check_hidden_sizes, hidden_state_loss, teacher_layers
from bitdistill.training.losses import cross_entropy, logits_distillation, next_tokens
from bitdistill.training.pretrain import NextTokenAndStates
from bitdistill.training.trainer import Counts

MASK = PADDINGS["left"]


def states(seed, layers=3, width=5):
    torch.manual_seed(seed)
    return [torch.randn(2, 4, width) for _ in range(layers)]


def test_by_hand():
    teacher, student = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), torch.tensor([[[3.0, 3.0], [1.0, 2.0]]])
    mask = torch.tensor([[1, 1]])  # errors 1 / 25 and 4 / 1
    assert hidden_state_loss([teacher], [student], mask).item() == pytest.approx((0.04 + 4) / 2)
    assert hidden_state_loss([teacher], [student], torch.tensor([[1, 0]])).item() == pytest.approx(0.04)
    assert hidden_state_loss([teacher] * 2, [student, teacher], mask).item() == pytest.approx((0.04 + 4) / 4)
    assert hidden_state_loss([teacher], [torch.zeros_like(teacher)], mask).item() == 1


def test_against_loops_and_in_parts():
    teacher, student = states(0), states(1)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    by_hand = sum(
        float(((s[b, t] - h[b, t]) ** 2).sum() / (h[b, t] ** 2).sum()) / 3
        for h, s in zip(teacher, student, strict=True)
        for b, t in mask.nonzero().tolist()
    )
    assert hidden_state_loss(teacher, student, mask).item() == pytest.approx(by_hand / 5, rel=1e-5)
    parts = [
        hidden_state_loss([h[b : b + 1] for h in teacher], [s[b : b + 1] for s in student], mask[b : b + 1], 5)
        for b in range(2)
    ]
    assert sum(parts).item() == pytest.approx(by_hand / 5, rel=1e-5)


def test_padding_teacher_and_empty_batches():
    teacher, student = states(0), [one.requires_grad_() for one in states(1)]
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    expected = hidden_state_loss(teacher, student, mask)
    for one in teacher:
        one[0, 0] = torch.nan
        one.requires_grad_()
    loss = hidden_state_loss(teacher, student, mask)
    assert loss.item() == expected.item()
    loss.backward()
    assert all(one.grad is None for one in teacher)
    assert all(not one.grad[0, 0].any() and one.grad[0, 1].any() for one in student)
    nothing = hidden_state_loss(teacher, student, torch.zeros_like(mask), 5)
    nothing.backward()
    assert nothing.item() == 0
    assert hidden_state_loss([torch.zeros(1, 1, 2)], [torch.zeros(1, 1, 2)], torch.ones(1, 1)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [torch.ones(2, 4), torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])])
def test_gradient_against_float64(mask, dtype):
    teacher = [one.to(dtype) for one in states(0)]
    student = [one.to(dtype).requires_grad_() for one in states(1)]
    exact = [one.detach().double().requires_grad_() for one in student]
    errors = [
        (s - h.double()).square().sum(-1) / h.double().square().sum(-1) for h, s in zip(teacher, exact, strict=True)
    ]
    expected = sum((error * mask).sum() for error in errors) / (3 * mask.sum())
    loss = hidden_state_loss(teacher, student, mask)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (7 * loss).backward()
    (7 * expected).backward()
    for one, of in zip(student, exact, strict=True):
        assert one.grad.dtype == dtype
        torch.testing.assert_close(
            one.grad.double(), of.grad, rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=1e-12
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_transformers(family):
    model = tiny(family)
    recorded = HiddenStates(model)
    with recorded:
        output = model(batch(), attention_mask=MASK, output_hidden_states=True)
    *between, _last = output.hidden_states[1:]  # transformers gives the last one after the final norm
    assert len(recorded.states) == 4
    torch.testing.assert_close(recorded.states[:-1], list(between), rtol=0, atol=0)
    normed = model.get_decoder().norm(recorded.states[-1])
    torch.testing.assert_close(normed, output.hidden_states[-1], rtol=0, atol=0)
    before = recorded.states
    model(batch(2), attention_mask=MASK)  # outside the block it is an ordinary model
    assert recorded.states is before
    chosen = HiddenStates(model, [3, 1])
    with chosen:
        model(batch(), attention_mask=MASK)
    torch.testing.assert_close(chosen.states, [before[3], before[1]], rtol=0, atol=0)


def test_the_teachers_layer_for_each_of_the_student():
    assert teacher_layers(4, 4) == [0, 1, 2, 3]
    assert teacher_layers(2, 6) == [2, 5]
    assert teacher_layers(3, 4) == [0, 2, 3]
    assert teacher_layers(6, 3)[-1] == 2


def test_widths_must_agree():
    narrow = tiny("llama")
    wide = copy.deepcopy(narrow)
    wide.config.hidden_size = 64
    check_hidden_sizes(narrow.config, narrow.config)
    with pytest.raises(UserError, match=r"lambda_hidden.*32.*64"):
        check_hidden_sizes(wide.config, narrow.config)


def pair(family="qwen3"):
    teacher, student = tiny(family, seed=5), tiny(family)
    refine(student, norms="two")
    teacher.requires_grad_(False)
    return student.train(), Teacher(teacher, teacher)


def counted(mask, labels):
    return Counts(int((next_tokens(labels) != -100).sum()), int(mask.sum()), mask.numel(), 0)


@pytest.mark.parametrize("lambda_logits", [0.0, 2.0])
def test_stage_2_is_the_sum_of_its_terms(lambda_logits):
    student, teacher = pair()
    ids, mask = batch(), torch.ones(2, 12, dtype=torch.long)
    objective = NextTokenAndStates(student, teacher, lambda_logits=lambda_logits, temperature=2.0, lambda_hidden=3.0)
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    terms = objective(student, given, counted(mask, ids))
    watched, of_teacher = HiddenStates(student), HiddenStates(teacher.module)
    with watched, of_teacher:
        logits, target = student(ids).logits, teacher.module(ids).logits
    expected = {
        "ce": (1.0, cross_entropy(logits, next_tokens(ids))),
        "hidden": (3.0, hidden_state_loss(of_teacher.states, watched.states, mask)),
    }
    if lambda_logits:
        kl = logits_distillation(logits, target, mask.bool(), temperature=2.0)
        expected["logits"] = (lambda_logits, kl)
    assert terms.keys() == expected.keys()
    for name, (weight, value) in expected.items():
        assert terms[name][0] == weight
        torch.testing.assert_close(terms[name][1], value, rtol=1e-4, atol=1e-6)
    assert 0.1 < terms["hidden"][1].item() < 100


@pytest.mark.parametrize("checkpointing", [False, True])
def test_stage_3_adds_the_term_and_recomputing_changes_nothing(checkpointing):
    student, teacher = pair()
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    ids = batch().where(MASK.bool(), 0)
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    given = {"input_ids": ids, "attention_mask": MASK, "labels": labels}
    found = {}
    for weight in (0.0, 4.0):
        objective = Distillation(student, teacher, relation="eq12", gamma_attention=1.0, lambda_hidden=weight)
        student.zero_grad()
        terms = objective(student, given, counted(MASK, labels))
        sum(factor * loss for factor, loss in terms.values()).backward()
        found[weight] = terms, [p.grad.clone() for p in student.parameters()]
    without, with_term = found[0.0], found[4.0]
    assert with_term[0].keys() - without[0].keys() == {"hidden"}
    assert with_term[0]["hidden"][0] == 4.0
    student.zero_grad()
    watched, of_teacher = HiddenStates(student), HiddenStates(teacher.module)
    with watched, of_teacher:
        student(ids, attention_mask=MASK)
        teacher.module(ids, attention_mask=MASK)
    loss = hidden_state_loss(of_teacher.states, watched.states, MASK)
    torch.testing.assert_close(with_term[0]["hidden"][1], loss)
    loss.backward()
    for before, after, parameter in zip(without[1], with_term[1], student.parameters(), strict=True):
        own = torch.zeros_like(before) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(after, before + 4 * own, rtol=1e-3, atol=1e-5)


def test_a_teacher_of_another_depth():
    student, _ = pair()
    deep = tiny("qwen3", seed=5, layers=8).requires_grad_(False)
    ids = batch()
    mask = torch.ones_like(ids)
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    objective = Distillation(student, Teacher(deep, deep), relation="none", lambda_logits=0.0, lambda_hidden=1.0)
    terms = objective(student, given, counted(mask, ids))
    assert len(objective.said_by.states.states) == len(objective.student_states.states) == 4
    assert torch.isfinite(terms["hidden"][1])
