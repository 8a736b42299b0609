"""Stage 3, distillation fine-tuning: the ternary student learns the task from labels and from its teacher.

    L = L_CE + lambda * L_LD + gamma * L_AD (+ lambda_hidden * L_HS)

L_CE is the cross-entropy on the answer's tokens. L_LD is the KL of the student's next-word distribution from the teacher's.
L_AD is the KL between the relations of Q, K and V in a chosen layer (relations.py). L_HS, which the paper does not have, is
the distance of the hidden states of all layers (hidden.py). The teacher is the full-precision model
fine-tuned on the same task. `fine_tune` below makes it (FP16-SFT), and it makes the ternary baseline (BitNet-SFT) with the
same loop.

Source: BitNet Distillation, arXiv 2510.13998, section 3.3.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from bitdistill.data.tasks import attended, collate
from bitdistill.distributed import process_group
from bitdistill.distributed.teacher import Teacher
from bitdistill.kernels.numerics import IGNORED
from bitdistill.student.loading import check_same_vocabulary
from bitdistill.training.capture import AttentionCapture
from bitdistill.training.diagnosis import guessing_loss
from bitdistill.training.forcing import TeacherForcing
from bitdistill.training.gamma import BalancedGamma
from bitdistill.training.head import (
    head_cross_entropy,
    head_distillation,
    head_distillation_top_k,
    instead_of_logits,
)
from bitdistill.training.health import HealthLog
from bitdistill.training.hidden import HiddenStates, hidden_state_loss
from bitdistill.training.losses import next_tokens
from bitdistill.training.relations import relation_loss
from bitdistill.training.row_cache import CachedTeacher
from bitdistill.training.row_order import NO_ROW, FilledRows
from bitdistill.training.teachers import LiveTeacher, Said
from bitdistill.training.trainer import Counts, Objective, StageTrainer

ANSWERS_LOOKED_AT = 10_000  # for how often each occurs


def answer_positions(labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Where the head is needed: positions that predict a label token in any row of the batch.

    Returns: (positions (P,), next tokens at these positions (B, P), -100 where a row has none there). Hidden states
    leave the model there alone: for classification a fraction of the prompt.
    """
    targets_BT = next_tokens(labels_BT)
    positions = (targets_BT != IGNORED).any(dim=0).nonzero().squeeze(1)
    return positions, targets_BT[:, positions]


class Answers(Objective):
    """``L = CE`` over the answers' tokens: plain supervised fine-tuning.

    Args:
        student: the model inside whatever DeepSpeed wraps around it.
    """

    def __init__(self, student: nn.Module):
        self.student = student

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], counts: Counts) -> dict[str, tuple[float, Tensor]]:
        positions, targets_BP = answer_positions(batch["labels"])
        compute = partial(head_cross_entropy, targets_BP=targets_BP, num_items=counts.answer_tokens)
        with instead_of_logits(self.student, compute):
            output = model(
                input_ids=batch["input_ids"],
                attention_mask=attended(batch["attention_mask"]),
                logits_to_keep=positions,
                use_cache=False,
            )
        return {"ce": (1.0, output.logits)}


class Distillation(Objective):
    """The loss terms of stage 3.

    Args:
        student: the model inside whatever DeepSpeed wraps around it.
        teacher: frozen; or its outputs for every row, read from disk.
        lambda_logits, kd_temperature, kd_tau_squared, kd_tokens: logits distillation; lambda 0 turns it off.
        relation: convention, or "none". relation_layers: of the student; teacher_relation_layers: of the teacher.
        split_heads, relation_temperature, relation_causal: of the relations.
        gamma_attention: a number, or "balanced" with gamma_rho. Either way the gradients of the relations and of the rest
            are measured every gamma_every steps; balanced follows them.
        gamma_rho: the gradient ratio that "balanced" aims at. gamma_every: optimizer steps between measurements.
        lambda_hidden: weight of the hidden-state loss over all layers; 0 turns it off.
        teacher_forcing: share of the steps in which layers read the teacher's states, in part (forcing.py), with lambda_hidden
            above 0; 0 for none.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | CachedTeacher,
        *,
        lambda_logits: float = 10.0,
        kd_temperature: float = 5.0,
        kd_tau_squared: bool = False,
        kd_tokens: str = "response",
        relation: str = "eq12",
        relation_layers: Sequence[int] = (-1,),
        teacher_relation_layers: Sequence[int] | None = None,
        split_heads: int | None = None,
        relation_temperature: float = 1.0,
        relation_causal: bool = False,
        gamma_attention: float | str = "balanced",
        gamma_rho: float = 1.0,
        gamma_every: int = 10,
        lambda_hidden: float = 0.0,
        teacher_forcing: float = 0.0,
    ):
        self.student, self.teacher, self.depth = student, teacher, student.config.num_hidden_layers
        self.student_layers = relation_layers if relation != "none" else ()
        given = relation_layers if teacher_relation_layers is None else teacher_relation_layers
        self.teacher_layers = given if relation != "none" else ()
        if isinstance(teacher, CachedTeacher):
            assert not lambda_hidden > 0, "a cache keeps no hidden states of layers"
            self.said_by = teacher
        else:
            states_of = student.config if lambda_hidden > 0 else None
            self.said_by = LiveTeacher(teacher, self.teacher_layers, states_of)
        check_same_vocabulary(self.said_by, student.config)
        self.lambda_logits = lambda_logits
        self.everywhere = lambda_logits > 0 and kd_tokens == "all"
        self.kd_settings = {"temperature": kd_temperature, "tau_squared": kd_tau_squared}
        self.relation, self.gamma_every = relation, gamma_every
        self.lambda_hidden = lambda_hidden
        self.student_states = HiddenStates(student) if lambda_hidden > 0 else None
        assert lambda_hidden > 0 or not teacher_forcing > 0, "states of a teacher that nothing is compared with"
        self.forcing = TeacherForcing(student, teacher_forcing) if teacher_forcing > 0 else None
        self.student_capture = None
        if relation == "none":
            self.gamma = 0.0
            return
        balanced = gamma_attention == "balanced"
        self.measured = BalancedGamma(gamma_rho if balanced else 1.0)
        self.gamma = self.measured if balanced else gamma_attention
        self.gamma_used = 0.0  # in the step that is being logged; the balanced one has moved on by then
        self.student_capture = AttentionCapture(student, relation_layers, require_grad=True)
        options = {} if split_heads is None else {"split_heads": split_heads}
        if relation in ("alg1", "attention_maps"):
            options["temperature"] = relation_temperature
        if relation in ("eq12", "alg1"):
            options["causal"] = relation_causal
        if relation == "pr382":
            options["num_layers"] = len(relation_layers)
        self.relation_loss: Callable[..., Tensor] = partial(relation_loss, convention=relation, **options)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides weights and optimizer."""
        return {} if self.relation == "none" else self.measured.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.relation != "none":
            self.measured.load_state_dict(state)

    def finish_step(self) -> None:
        """After the last backward pass of an optimizer step, on every rank: takes in what was watched."""
        if self.relation != "none":
            self.measured.finish_step(process_group.all_reduce_sum)

    def logged(self) -> dict[str, float]:
        """Beside each line of metrics.jsonl: gamma, and the gradient norms of the relations and of the rest."""
        forcing = {"teacher_forcing": self.forcing.value} if self.forcing else {}
        if self.relation == "none":
            return forcing
        norms = {"grad_norm_task": self.measured.task_norm, "grad_norm_attention": self.measured.attention_norm}
        return {"gamma_attention": self.gamma_used, **norms, **forcing}

    def close(self) -> None:
        if self.forcing:
            self.forcing.release()

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], counts: Counts) -> dict[str, tuple[float, Tensor]]:
        mask_BT = batch["attention_mask"]
        inputs = {"input_ids": batch["input_ids"], "attention_mask": attended(mask_BT), "use_cache": False}
        if self.everywhere:
            targets_BP, rows_BP, items = next_tokens(batch["labels"]), mask_BT.bool(), counts.tokens
        else:
            inputs["logits_to_keep"], targets_BP = answer_positions(batch["labels"])
            rows_BP, items = targets_BP != IGNORED, counts.answer_tokens
        said = None
        if self.lambda_logits > 0 or self.student_capture is not None or self.student_states is not None:
            said = self.said_by.look(batch, rows_BP, inputs)
        weights = {"lambda_logits": self.lambda_logits, "ce_items": counts.answer_tokens, "kl_items": items}

        def compute(hidden_BPH: Tensor, weight_VH: Tensor) -> tuple[Tensor, ...]:
            if not self.lambda_logits > 0:
                return (head_cross_entropy(hidden_BPH, weight_VH, targets_BP, counts.answer_tokens),)
            ours, options = (hidden_BPH, weight_VH, targets_BP), weights | self.kd_settings
            if said.top_k is not None:
                return head_distillation_top_k(*ours, *said.top_k, rows_BP=rows_BP, **options)
            with self.said_by.head() as teacher_weight_VG:
                return head_distillation(*ours, rows_BP, said.hidden, teacher_weight_VG, **options)

        if self.forcing:
            self.forcing.use(said.states, counts.progress)
        states = self.student_states or nullcontext()
        with self.student_capture or nullcontext(), states, instead_of_logits(self.student, compute):
            ce, *logits = model(**inputs).logits
        terms = {"ce": (1.0, ce)}
        if logits:
            terms["logits"] = (self.lambda_logits, logits[0])
        if self.student_states:
            loss = hidden_state_loss(said.states, self.student_states.states, mask_BT, counts.tokens)
            terms["hidden"] = (self.lambda_hidden, loss)
        if self.student_capture:
            terms["attention"] = self._relations(ce, said, mask_BT, counts)
        return terms

    def _relations(self, ce: Tensor, said: Said, mask_BT: Tensor, counts: Counts) -> tuple[float, Tensor]:
        items = counts.positions if self.relation == "pr382" else counts.tokens
        attention = sum(
            self.relation_loss(said.qkv[of_teacher], self.student_capture.qkv[of_student], mask_BT, num_items=items)
            for of_teacher, of_student in zip(self.teacher_layers, self.student_layers, strict=True)
        )
        if counts.step % self.gamma_every == 0:
            highest = max(self.student_layers, key=lambda layer: layer % self.depth)
            capture = self.student_capture
            self.measured.watch(ce, attention, capture.qkv[highest], capture.downstream[highest])
        self.gamma_used = self.gamma.gamma if isinstance(self.gamma, BalancedGamma) else self.gamma
        return self.gamma_used, attention


def _collate_numbered(features: list[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """`collate`, and the number of each row: int64 (B,); one that is none (row_order.py) is masked whole."""
    batch = collate(features, pad_token_id)
    row_B = torch.tensor([feature["row"] for feature in features])
    batch["attention_mask"][row_B == NO_ROW] = 0
    return batch | {"row": row_B}


def _some_answers(rows) -> Iterator[list[int]]:
    """The answers of up to ANSWERS_LOOKED_AT rows, spread over all of them."""
    for row in rows.select(range(0, len(rows), -(-len(rows) // ANSWERS_LOOKED_AT))).select_columns("labels"):
        yield [token for token in row["labels"] if token != IGNORED]


def fine_tune(
    model: nn.Module,
    rows,
    arguments: TrainingArguments,
    *,
    pad_token_id: int,
    stage: str,
    run_dir: Path,
    resume: bool,
    objective: Objective | None = None,
    health_steps: int = 0,
) -> tuple[StageTrainer, dict[str, Any]]:
    """Trains on encoded task rows; with `objective=Distillation(...)` this is stage 3, else plain fine-tuning.

    Args:
        model: fp32 masters, ternary or full precision.
        rows: from tasks.encode.
        arguments: from trainer.training_arguments.
        stage, run_dir, resume, health_steps: as in pretrain.pretrain.
        pad_token_id: fills rows up to one length.
        objective: what is minimized; the cross-entropy of the answers by default.

    Returns: the trainer, whose `model_wrapped` holds the result, and facts for done.json.
    """
    health = (run_dir / "health.jsonl", stage, health_steps)
    callbacks = [HealthLog(*health, guessing_loss(_some_answers(rows)))] if health_steps else []
    trainer = StageTrainer(
        objective=objective or Answers(model),
        stage=stage,
        run_dir=run_dir,
        model=model,
        args=arguments,
        train_dataset=FilledRows(rows, pad_token_id),
        data_collator=partial(_collate_numbered, pad_token_id=pad_token_id),
        callbacks=callbacks,
    )
    facts = trainer.fit(resume)
    facts["rows"] = facts["steps"] * trainer.step_rows()
    return trainer, facts
