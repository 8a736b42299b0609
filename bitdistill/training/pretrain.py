"""Stage 2, continued pre-training: next-token cross-entropy of the ternary student on a general corpus.

    L = L_CE + lambda_logits * KL(teacher || student) + lambda_hidden * L_HS

The paper has no distillation in this stage, and both lambdas are 0 by default. The teacher is the full-precision base model. For
the logits alone it is run beforehand, and they come from a file (teacher_cache.py); for the hidden states (hidden.py), which
are a hundred times larger, it runs beside the student. The same loop without a teacher also trains the embedded demo's own
base model from scratch.

Source: BitNet Distillation, arXiv 2510.13998, section 3.2.
"""

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainingArguments

from bitdistill.data.corpus import TokenStream
from bitdistill.data.token_shards import ShardedStream
from bitdistill.distributed.teacher import Teacher
from bitdistill.training.annealing import Annealing
from bitdistill.training.forcing import TeacherForcing
from bitdistill.training.head import (
    head_cross_entropy,
    head_distillation,
    head_distillation_top_k,
    instead_of_logits,
)
from bitdistill.training.health import HealthLog
from bitdistill.training.hidden import HiddenStates, hidden_state_loss
from bitdistill.training.losses import next_tokens
from bitdistill.training.teacher_cache import TeacherCache
from bitdistill.training.teachers import LiveTeacher
from bitdistill.training.trainer import Counts, Objective, StageTrainer, collate_blocks


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Any]:
    """What a model is called with. Documents that are apart are told by their positions, which begin again with each:
    transformers finds them where there is no attention mask."""
    apart = "position_ids" in batch
    name = "position_ids" if apart else "attention_mask"
    return {"input_ids": batch["input_ids"], name: batch[name], "use_cache": False}


class NextToken(Objective):
    """``L = CE`` over every position of every block that has a label.

    Args:
        student: the model inside whatever DeepSpeed wraps around it.
    """

    def __init__(self, student: nn.Module):
        self.student = student

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], counts: Counts) -> dict[str, tuple[float, Tensor]]:
        targets_BT = next_tokens(batch["labels"])
        compute = partial(head_cross_entropy, targets_BP=targets_BT, num_items=counts.answer_tokens)
        with instead_of_logits(self.student, compute):
            output = model(**model_inputs(batch))
        return {"ce": (1.0, output.logits)}


class NextTokenDistillation(Objective):
    """``L = CE + lambda_logits * KL(teacher || student)``, the teacher known by its k largest logits.

    The KL is averaged over every position of every block, the last included: no label is needed there.

    Args:
        student: the model inside whatever DeepSpeed wraps around it.
        cache: what the teacher said to the blocks of the stream; the temperature is the one it was made for.
        lambda_logits: weight of the KL.
    """

    def __init__(self, student: nn.Module, cache: TeacherCache, lambda_logits: float):
        self.student, self.cache, self.lambda_logits = student, cache, lambda_logits

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], counts: Counts) -> dict[str, tuple[float, Tensor]]:
        indices, values, log_rest = self.cache.read(batch["block"], batch["input_ids"])
        compute = partial(
            head_distillation_top_k,
            targets_BP=next_tokens(batch["labels"]),
            indices_BPK=indices,
            values_BPK=values,
            log_rest_BP=log_rest,
            lambda_logits=self.lambda_logits,
            temperature=self.cache.layout.temperature,
            ce_items=counts.answer_tokens,
            kl_items=counts.tokens,
        )
        with instead_of_logits(self.student, compute):
            ce, kl = model(**model_inputs(batch)).logits
        return {"ce": (1.0, ce), "logits": (self.lambda_logits, kl)}


class NextTokenAndStates(Objective):
    """``L = CE + lambda_logits * KL(teacher || student) + lambda_hidden * L_HS``, the teacher running beside the student.

    Both terms of the teacher are averaged over every position of every block. The KL is that of the whole vocabulary.

    Args:
        student: the model inside whatever DeepSpeed wraps around it.
        teacher: the base model, frozen.
        lambda_logits, temperature: weight of the KL, 0 without it, and its temperature.
        lambda_hidden: weight of the hidden-state loss, above 0.
        teacher_forcing: share of the steps in which layers read the teacher's states, in part (forcing.py); 0 for none.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        *,
        lambda_logits: float,
        temperature: float,
        lambda_hidden: float,
        teacher_forcing: float = 0.0,
    ):
        self.student, self.teacher, self.temperature = student, teacher, temperature
        self.lambda_logits, self.lambda_hidden = lambda_logits, lambda_hidden
        self.of_student, self.said_by = HiddenStates(student), LiveTeacher(teacher, (), student.config)
        self.forcing = TeacherForcing(student, teacher_forcing) if teacher_forcing > 0 else None

    def logged(self) -> dict[str, float]:
        return {"teacher_forcing": self.forcing.value} if self.forcing else {}

    def close(self) -> None:
        if self.forcing:
            self.forcing.release()

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], counts: Counts) -> dict[str, tuple[float, Tensor]]:
        targets_BT, mask_BT = next_tokens(batch["labels"]), batch["attention_mask"]
        inputs = model_inputs(batch)
        said = self.said_by.look(batch, mask_BT.bool(), inputs)

        def compute(hidden_BTH: Tensor, weight_VH: Tensor) -> tuple[Tensor, ...]:
            if not self.lambda_logits > 0:
                return (head_cross_entropy(hidden_BTH, weight_VH, targets_BT, counts.answer_tokens),)
            with self.said_by.head() as teacher_weight_VH:
                return head_distillation(
                    hidden_BTH,
                    weight_VH,
                    targets_BT,
                    mask_BT.bool(),
                    said.hidden,
                    teacher_weight_VH,
                    lambda_logits=self.lambda_logits,
                    temperature=self.temperature,
                    tau_squared=False,
                    ce_items=counts.answer_tokens,
                    kl_items=counts.tokens,
                )

        if self.forcing:
            self.forcing.use(said.states, counts.progress)
        with self.of_student, instead_of_logits(self.student, compute):
            ce, *kl = model(**inputs).logits
        hidden = hidden_state_loss(said.states, self.of_student.states, mask_BT, counts.tokens)
        terms = {"ce": (1.0, ce), "hidden": (self.lambda_hidden, hidden)}
        return terms | ({"logits": (self.lambda_logits, kl[0])} if kl else {})


def pretrain(
    model: nn.Module,
    stream: TokenStream | ShardedStream,
    arguments: TrainingArguments,
    *,
    stage: str,
    run_dir: Path,
    resume: bool,
    health_steps: int = 0,
    annealing: Annealing | None = None,
    objective: Objective | None = None,
) -> tuple[StageTrainer, dict[str, Any]]:
    """Trains on a token stream.

    Args:
        model: fp32 masters; ternary (stage 2) or full precision (the demo's base).
        stream: blocks of tokens; resumes at the exact block.
        arguments: from trainer.training_arguments, with max_steps set: a stream has no end.
        stage: its name in the logs. run_dir: RUN. resume: continue from the last complete checkpoint.
        health_steps: steps between measurements of zeros and flips; 0 for a model without BitLinear.
        annealing: goes from full precision to ternary in the course of the stage; ternary from the first step without.
        objective: what is minimized; the cross-entropy of every next token by default.

    Returns: the trainer, whose `model_wrapped` holds the result, and facts for done.json.
    """
    callbacks = [HealthLog(run_dir / "health.jsonl", stage, health_steps)] if health_steps else []
    trainer = StageTrainer(
        objective=objective or NextToken(model),
        stage=stage,
        run_dir=run_dir,
        stream=stream,
        model=model,
        args=arguments,
        train_dataset=stream,
        data_collator=collate_blocks,
        callbacks=callbacks,
        annealing=annealing,
    )
    facts = trainer.fit(resume)
    facts["tokens"] = facts["steps"] * trainer.step_rows() * stream.block_size
    facts["corpus_epochs"] = stream.epochs
    return trainer, facts
