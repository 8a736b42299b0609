"""Teacher forcing by layer: its schedule, what a layer reads, where gradients go, and when it ends."""

import pytest
import torch
from test_capture import FAMILIES, batch, tiny

from bitdistill.command_line import parse_config
from bitdistill.distributed.teacher import Teacher
from bitdistill.errors import UserError
from bitdistill.student.refine import refine
from bitdistill.training.forcing import TeacherForcing, forcing_at
from bitdistill.training.hidden import HiddenStates
from bitdistill.training.pretrain import NextTokenAndStates
from bitdistill.training.trainer import Counts


def test_schedule_by_hand():
    assert [forcing_at(step / 10, 0.5) for step in range(10)] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0, 0])
    assert forcing_at(0.0, 0.0) == forcing_at(0.5, 0.0) == 0


def recorded(model, ids):
    watched = HiddenStates(model)
    with watched:
        model(ids)
    return watched.states


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_what_a_layer_reads(family, share):
    """The inputs of all layers but the first, in every family: the mixture of the states after the layer below."""
    student, teacher = tiny(family).train(), tiny(family, seed=5)
    ids, layers = batch(), student.get_decoder().layers
    with torch.no_grad():
        of_teacher = recorded(teacher, ids)
    forcing = TeacherForcing(student, 0.5)
    forcing.use(of_teacher, 0.5 * (1 - share))
    assert forcing.value == pytest.approx(share)
    read = {}
    for number, layer in enumerate(layers):  # after the hooks of `forcing`, which run first
        layer.register_forward_pre_hook(
            lambda _, given, options, number=number: read.update(
                {number: given[0] if given else options["hidden_states"]}
            ),
            with_kwargs=True,
        )
    states = recorded(student, ids)
    for number in range(1, len(layers)):
        expected = (1 - share) * states[number - 1] + share * of_teacher[number - 1]
        torch.testing.assert_close(read[number], expected)
    forcing.release()
    assert forcing.value == 0
    states = recorded(student, ids)
    for number in range(1, len(layers)):
        assert torch.equal(read[number], states[number - 1])


def stage_2(share=0.5, checkpointing=False):
    teacher, student = tiny("qwen3", seed=5).requires_grad_(False), tiny("qwen3")
    refine(student, norms="none")
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    weights = {"lambda_logits": 0.0, "temperature": 1.0, "lambda_hidden": 3.0}
    return student.train(), NextTokenAndStates(student, Teacher(teacher, teacher), teacher_forcing=share, **weights)


def terms_at(objective, student, progress):
    ids = batch()
    mask = torch.ones_like(ids)
    counts = Counts(int((ids[:, 1:] >= 0).sum()), int(mask.sum()), mask.numel(), 0, progress)
    return objective(student, {"input_ids": ids, "attention_mask": mask, "labels": ids}, counts)


def gradients(student, loss):
    student.zero_grad()
    loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in student.named_parameters()}


def test_a_forced_layer_learns_alone():
    """With f = 1 what is wrong in the first layer reaches no other one; with f = 0.5 it does."""
    student, objective = stage_2()
    before = terms_at(objective, student, 0.0)["hidden"][1].item()
    last = recorded(student, batch())[-1].detach()
    with torch.no_grad():
        student.get_decoder().layers[0].mlp.down_proj.weight.add_(0.3)
    after = terms_at(objective, student, 0.0)["hidden"][1].item()
    assert after != before
    torch.testing.assert_close(recorded(student, batch())[-1], last, rtol=0, atol=0)
    terms_at(objective, student, 0.25)
    assert not torch.equal(recorded(student, batch())[-1], last)

    ce = gradients(student, terms_at(objective, student, 0.0)["ce"][1])  # reaches the last layer only
    depth = len(student.get_decoder().layers)
    reached = {name.split(".")[2] for name, gradient in ce.items() if "layers." in name and gradient.abs().sum() > 0}
    assert reached == {str(depth - 1)}
    hidden = gradients(student, terms_at(objective, student, 0.0)["hidden"][1])
    assert all(gradient.abs().sum() > 0 for name, gradient in hidden.items() if "layers." in name and "proj" in name)


@pytest.mark.parametrize("progress", [0.0, 0.2])
def test_layers_that_are_computed_again_read_the_same(progress):
    found = []
    for checkpointing in (False, True):
        student, objective = stage_2(checkpointing=checkpointing)
        terms = terms_at(objective, student, progress)
        found.append(gradients(student, sum(weight * loss for weight, loss in terms.values())))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_after_its_share_the_student_is_by_itself():
    student, objective = stage_2()
    plain_student, plain = stage_2(share=0.0)
    assert plain.forcing is None
    assert plain.logged() == {}
    terms_at(objective, student, 0.2)
    assert objective.logged() == {"teacher_forcing": pytest.approx(0.6)}
    alone = terms_at(plain, plain_student, 0.5)
    for name, (weight, loss) in terms_at(objective, student, 0.5).items():
        assert (weight, loss.item()) == (alone[name][0], alone[name][1].item())
    assert objective.logged() == {"teacher_forcing": 0.0}


def test_a_student_at_its_teacher_notices_nothing():
    """Equal states: a mixture of them is the same, up to the rounding of the mixture."""
    teacher = tiny("qwen3").requires_grad_(False)
    student = tiny("qwen3").train()
    ids = batch()
    alone = recorded(student, ids)[-1].detach()
    TeacherForcing(student, 0.5).use(recorded(teacher, ids), 0.1)
    torch.testing.assert_close(recorded(student, ids)[-1], alone)


def test_refused_where_states_are_not_compared():
    with pytest.raises(UserError, match=r"pretrain.teacher_forcing: expected 0 where pretrain.lambda_hidden is 0"):
        parse_config(["--pretrain.teacher_forcing", "0.5"])
    with pytest.raises(UserError, match=r"distill.teacher_forcing: expected a number from 0 on and below 1; got 1.0"):
        parse_config(["--distill.teacher_forcing", "1.0", "--distill.lambda_hidden", "1"])
