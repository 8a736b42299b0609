"""Stage 2, continued pre-training: next-token cross-entropy of the ternary student on a general corpus.

    L = L_CE + lambda * KL(teacher || student)

The paper has no distillation in this stage, and lambda is 0 by default. The teacher is the full-precision base model. It is
run beforehand, and its logits come from a file (teacher_cache.py). The same loop without them also trains the embedded
demo's own base model from scratch.

Source: BitNet Distillation, arXiv 2510.13998, section 3.2.
"""

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainingArguments

from bitdistill.data.corpus import TokenStream
from bitdistill.training.annealing import Annealing
from bitdistill.training.head import head_cross_entropy, head_distillation_top_k, instead_of_logits
from bitdistill.training.health import HealthLog
from bitdistill.training.losses import next_tokens
from bitdistill.training.teacher_cache import TeacherCache
from bitdistill.training.trainer import Counts, Objective, StageTrainer, collate_blocks


class NextToken(Objective):
    """``L = CE`` over every position of every block.

    Args:
        student: the model inside whatever DeepSpeed wraps around it.
    """

    def __init__(self, student: nn.Module):
        self.student = student

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], counts: Counts) -> dict[str, tuple[float, Tensor]]:
        targets_BT = next_tokens(batch["labels"])
        compute = partial(head_cross_entropy, targets_BP=targets_BT, num_items=counts.answer_tokens)
        with instead_of_logits(self.student, compute):
            output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
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
            ce, kl = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        return {"ce": (1.0, ce), "logits": (self.lambda_logits, kl)}


def pretrain(
    model: nn.Module,
    stream: TokenStream,
    arguments: TrainingArguments,
    *,
    stage: str,
    run_dir: Path,
    resume: bool,
    health_steps: int = 0,
    annealing: Annealing | None = None,
    cache: TeacherCache | None = None,
    lambda_logits: float = 0.0,
) -> tuple[StageTrainer, dict[str, Any]]:
    """Trains on a token stream.

    Args:
        model: fp32 masters; ternary (stage 2) or full precision (the demo's base).
        stream: blocks of tokens; resumes at the exact block.
        arguments: from trainer.training_arguments, with max_steps set: a stream has no end.
        stage: its name in the logs. run_dir: RUN. resume: continue from the last complete checkpoint.
        health_steps: steps between measurements of zeros and flips; 0 for a model without BitLinear.
        annealing: goes from full precision to ternary in the course of the stage; ternary from the first step without.
        cache: the teacher's logits for every block up to the last step; None trains on cross-entropy alone.
        lambda_logits: as in NextTokenDistillation.

    Returns: the trainer, whose `model_wrapped` holds the result, and facts for done.json.
    """
    callbacks = [HealthLog(run_dir / "health.jsonl", stage, health_steps)] if health_steps else []
    trainer = StageTrainer(
        objective=NextToken(model) if cache is None else NextTokenDistillation(model, cache, lambda_logits),
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
