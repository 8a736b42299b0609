"""How far a student's hidden states are from its teacher's, by layer, and what it would cost to have some of the teacher's.

    python bench/state_errors.py STUDENT TEACHER --text FILE [--blocks 8] [--positions 128]

STUDENT is a folder with a ternary student (RUN/pretrain or RUN/distill), TEACHER one with the full-precision model. The first
table is |s - h|^2 / |h|^2 after each layer, at the first position, where many models keep a state of enormous size, and at the
others. The second one is the loss on the same text when each layer reads (1 - f) s + f h in place of s (training/forcing.py),
at some positions. f = 0.04 sounds like little, but over 30 layers it leaves a third of the student's own state.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bitdistill.student.loading import load_language_model, load_tokenizer
from bitdistill.student.refine import load_student
from bitdistill.text_files import read_text
from bitdistill.training.forcing import TeacherForcing
from bitdistill.training.hidden import HiddenStates
from measure import table

FORCED = {"the student by itself": (0.0, 0.0), "0.04 everywhere": (0.04, 0.04), "0.04 but for the first position": (0.0, 0.04),
          "the first position": (1.0, 0.0)}  # f at the first position and at the others  # fmt: skip


def states_of(model: nn.Module, ids_BT: Tensor) -> list[Tensor]:
    """(B, T, H) after each layer."""
    watched = HiddenStates(model)
    with watched, torch.no_grad():
        model(ids_BT)
    return watched.states


def loss_with(student: nn.Module, ids_BT: Tensor, teachers: list[Tensor], first: float, others: float) -> float:
    """Nats per token when layers read the teacher's states in part."""
    share_T1 = torch.full((ids_BT.shape[1], 1), others)
    share_T1[0] = first

    forcing = TeacherForcing(student, 1.0)
    forcing.use(teachers, 0.0)
    forcing.value = share_T1
    with torch.no_grad():
        logits_BTV = student(ids_BT).logits[:, :-1].float()
    forcing.release()
    return cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten()).item()


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("student", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--positions", type=int, default=128)
    given = parser.parse_args()
    student, teacher = load_student(given.student).eval(), load_language_model(given.teacher).eval()
    ids = load_tokenizer(given.teacher)(read_text(given.text, "text")[: 20 * given.blocks * given.positions])[
        "input_ids"
    ]
    count = given.blocks * given.positions
    assert len(ids) >= count, f"{given.text}: expected {count} tokens for {given.blocks} blocks; got {len(ids)}"
    ids_BT = torch.tensor(ids[:count]).view(given.blocks, given.positions)
    of_student, of_teacher = states_of(student, ids_BT), states_of(teacher, ids_BT)
    rows = [["after layer", "error, first position", "others", "norm, first position", "others"]]
    for layer, (student_BTH, teacher_BTH) in enumerate(zip(of_student, of_teacher, strict=True)):
        norms_BT = teacher_BTH.norm(dim=-1)
        errors_BT = ((student_BTH - teacher_BTH).norm(dim=-1) / norms_BT) ** 2
        parts = (errors_BT[:, 0], errors_BT[:, 1:], norms_BT[:, 0], norms_BT[:, 1:])
        rows.append([str(layer), *(f"{part.mean():.3g}" for part in parts)])
    print(table(rows, ">>>>>"))
    with torch.no_grad():
        alone = cross_entropy(teacher(ids_BT).logits[:, :-1].float().flatten(0, 1), ids_BT[:, 1:].flatten()).item()
    rows = [["f of the teacher's states", "loss, nats"], ["(the teacher)", f"{alone:.3f}"]]
    rows += [[name, f"{loss_with(student, ids_BT, of_teacher, *shares):.3f}"] for name, shares in FORCED.items()]
    print(table(rows, "<>"))


if __name__ == "__main__":
    main()
