"""Stage 3, distillation fine-tuning: the ternary student learns the task from labels and from its teacher.

    L = L_CE + lambda * L_LD + gamma * L_AD

L_CE: cross-entropy on the answer's tokens. L_LD: KL of the teacher's to the student's next-word distribution. L_AD: KL
between the relations of Q, K and V in a chosen layer (losses.py). The teacher is the full-precision model fine-tuned on
the same task: `fine_tune` below makes it (FP16-SFT), and makes the ternary baseline (BitNet-SFT) by the same loop.

Source: BitNet Distillation, arXiv 2510.13998, section 3.3.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from bitdistill.capture import AttentionCapture
from bitdistill.distributed import launch
from bitdistill.distributed.teacher import Teacher
from bitdistill.health import HealthLog
from bitdistill.losses import BalancedGamma, cross_entropy, logits_distillation, next_tokens, relation_loss
from bitdistill.models import check_same_vocabulary
from bitdistill.tasks import collate
from bitdistill.trainer import Counts, StageTrainer, Terms


def answer_positions(labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Where logits are needed: positions that predict a label token in any row of the batch.

    Returns: (positions (P,), next tokens at these positions (B, P), -100 where a row has none there). The LM head is
    computed there alone: for classification a fraction of the prompt.
    """
    targets_BT = next_tokens(labels_BT)
    positions = (targets_BT != -100).any(dim=0).nonzero().squeeze(1)
    return positions, targets_BT[:, positions]


def answer_terms(model: nn.Module, batch: dict[str, Tensor], counts: Counts) -> dict[str, tuple[float, Tensor]]:
    """``L = CE`` over the answers' tokens: plain supervised fine-tuning."""
    positions, targets_BP = answer_positions(batch["labels"])
    output = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=positions, use_cache=False
    )
    return {"ce": (1.0, cross_entropy(output.logits, targets_BP, counts.answer_tokens))}


class Distillation:
    """The loss terms of stage 3.

    Args:
        student: the model inside whatever DeepSpeed wraps around it.
        teacher: frozen.
        lambda_logits, kd_temperature, kd_tau_squared, kd_tokens: logits distillation; lambda 0 turns it off.
        relation: convention, or "none". relation_layers: of the student; teacher_relation_layers: of the teacher.
        split_heads, relation_temperature, relation_causal: of the relations.
        gamma_attention: a number, or "balanced" with gamma_rho, measured every gamma_every micro-batches.
        autocast: dtype of the student's matrix products when they are not fp32, for the measurement of gamma.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        *,
        lambda_logits: float,
        kd_temperature: float,
        kd_tau_squared: bool,
        kd_tokens: str,
        relation: str,
        relation_layers: list[int],
        teacher_relation_layers: list[int] | None,
        split_heads: int | None,
        relation_temperature: float,
        relation_causal: bool,
        gamma_attention: float | str,
        gamma_rho: float,
        gamma_every: int,
        autocast: torch.dtype | None = None,
    ):
        check_same_vocabulary(teacher.module.config, student.config)
        self.student, self.teacher, self.autocast = student, teacher, autocast
        self.lambda_logits = lambda_logits
        self.everywhere = lambda_logits > 0 and kd_tokens == "all"
        self.logits_loss = partial(logits_distillation, temperature=kd_temperature, tau_squared=kd_tau_squared)
        self.student_logits: Tensor | None = None
        self.relation, self.gamma_every, self.calls = relation, gamma_every, 0
        self.student_capture = self.teacher_capture = None
        if relation == "none":
            self.gamma = 0.0
            return
        self.gamma = BalancedGamma(gamma_rho) if gamma_attention == "balanced" else gamma_attention
        self.student_layers = relation_layers
        self.teacher_layers = relation_layers if teacher_relation_layers is None else teacher_relation_layers
        self.student_capture = AttentionCapture(student, relation_layers, require_grad=True)
        self.teacher_capture = AttentionCapture(teacher.module, self.teacher_layers)
        options = {} if split_heads is None else {"split_heads": split_heads}
        if relation in ("alg1", "attention_maps"):
            options["temperature"] = relation_temperature
        if relation in ("eq12", "alg1"):
            options["causal"] = relation_causal
        if relation == "pr382":
            options["num_layers"] = len(relation_layers)
        self.relation_loss: Callable[..., Tensor] = partial(relation_loss, convention=relation, **options)

    def extra_state(self) -> dict[str, Any]:
        """What a resumed run needs besides weights and optimiser."""
        return {"gamma_attention": self} if isinstance(self.gamma, BalancedGamma) else {}

    def state_dict(self) -> dict[str, Any]:
        return {"gamma": self.gamma.state_dict(), "calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gamma.load_state_dict(state["gamma"])
        self.calls = state["calls"]

    def logged(self) -> dict[str, float]:
        """Beside each line of metrics.jsonl: the balanced gamma and the two gradient norms it comes from."""
        gamma = self.gamma
        return {"": gamma.gamma, "grad_norm_ce": gamma.ce_norm, "grad_norm_attention": gamma.attention_norm}

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], counts: Counts) -> dict[str, tuple[float, Tensor]]:
        positions, targets_BP = answer_positions(batch["labels"])
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        if not self.everywhere:
            inputs["logits_to_keep"] = positions
        with self.teacher_capture if self.teacher_capture else nullcontext():
            needed = self.lambda_logits > 0 or self.teacher_capture is not None
            teacher_logits = self.teacher(**inputs).logits if needed else None

        def losses(model: nn.Module) -> tuple[Tensor, Tensor | None]:
            with self.student_capture if self.student_capture else nullcontext():
                self.student_logits = model(**inputs).logits
            logits = self.student_logits[:, positions] if self.everywhere else self.student_logits
            ce = cross_entropy(logits, targets_BP, counts.answer_tokens)
            return ce, self._relations(batch["attention_mask"], counts) if self.student_capture else None

        if isinstance(self.gamma, BalancedGamma):
            if self.calls % self.gamma_every == 0:
                self._measure_gamma(losses)
            self.calls += 1
        ce, attention = losses(model)
        terms = {"ce": (1.0, ce)}
        if self.lambda_logits > 0:
            rows_BT = batch["attention_mask"].bool() if self.everywhere else targets_BP != -100
            items = counts.tokens if self.everywhere else counts.answer_tokens
            loss = self.logits_loss(self.student_logits, teacher_logits, rows_BT, num_items=items)
            terms["logits"] = (self.lambda_logits, loss)
        if attention is not None:
            gamma = self.gamma.gamma if isinstance(self.gamma, BalancedGamma) else self.gamma
            terms["attention"] = (gamma, attention)
        self.student_logits = None
        return terms

    def _relations(self, mask_BT: Tensor, counts: Counts) -> Tensor:
        items = counts.positions if self.relation == "pr382" else counts.tokens
        return sum(
            self.relation_loss(
                self.teacher_capture.qkv[of_teacher], self.student_capture.qkv[of_student], mask_BT, num_items=items
            )
            for of_teacher, of_student in zip(self.teacher_layers, self.student_layers, strict=True)
        )

    def _measure_gamma(self, losses: Callable[[nn.Module], tuple[Tensor, Tensor]]) -> None:
        """One more forward pass, of the bare model: DeepSpeed forbids a second backward pass through its engine."""
        device = next(self.student.parameters()).device.type
        with torch.autocast(device, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            ce, attention = losses(self.student)
        self.gamma.update(ce, attention, [self.student_capture.residual], all_reduce=launch.all_reduce_sum)


def fine_tune(
    model: nn.Module,
    rows,
    arguments: TrainingArguments,
    *,
    pad_token_id: int,
    stage: str,
    run_dir: Path,
    resume: bool,
    terms: Terms = answer_terms,
    extra_state: dict[str, Any] | None = None,
    health_steps: int = 0,
) -> tuple[StageTrainer, dict[str, Any]]:
    """Trains on encoded task rows; with `terms=Distillation(...)` this is stage 3, else plain fine-tuning.

    Args:
        model: fp32 masters, ternary or full precision.
        rows: from tasks.encode.
        arguments: from trainer.training_arguments.
        stage, run_dir, resume, health_steps: as in pretrain.pretrain.

    Returns: the trainer, whose `model_wrapped` holds the result, and facts for done.json.
    """
    callbacks = [HealthLog(run_dir / "health.jsonl", stage, health_steps)] if health_steps else []
    trainer = StageTrainer(
        terms=terms,
        stage=stage,
        run_dir=run_dir,
        extra_state=extra_state,
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=partial(collate, pad_token_id=pad_token_id),
        callbacks=callbacks,
    )
    facts = trainer.fit(resume)
    facts["rows"] = facts["steps"] * trainer.step_rows()
    return trainer, facts
