"""Stage 2, continued pre-training: next-token cross-entropy of the ternary student on a general corpus.

The same loop trains the embedded demo's own full-precision base model from scratch. No distillation here: the paper has
none in this stage.

Source: BitNet Distillation, arXiv 2510.13998, section 3.2.
"""

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainingArguments

from bitdistill.corpus import TokenStream
from bitdistill.head import head_cross_entropy, instead_of_logits
from bitdistill.health import HealthLog
from bitdistill.losses import next_tokens
from bitdistill.trainer import Counts, Objective, StageTrainer, collate_blocks


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


def pretrain(
    model: nn.Module,
    stream: TokenStream,
    arguments: TrainingArguments,
    *,
    stage: str,
    run_dir: Path,
    resume: bool,
    health_steps: int = 0,
) -> tuple[StageTrainer, dict[str, Any]]:
    """Trains on a token stream.

    Args:
        model: fp32 masters; ternary (stage 2) or full precision (the demo's base).
        stream: blocks of tokens; resumes at the exact block.
        arguments: from trainer.training_arguments, with max_steps set: a stream has no end.
        stage: its name in the logs. run_dir: RUN. resume: continue from the last complete checkpoint.
        health_steps: steps between measurements of zeros and flips; 0 for a model without BitLinear.

    Returns: the trainer, whose `model_wrapped` holds the result, and facts for done.json.
    """
    callbacks = [HealthLog(run_dir / "health.jsonl", stage, health_steps)] if health_steps else []
    trainer = StageTrainer(
        objective=NextToken(model),
        stage=stage,
        run_dir=run_dir,
        stream=stream,
        model=model,
        args=arguments,
        train_dataset=stream,
        data_collator=collate_blocks,
        callbacks=callbacks,
    )
    facts = trainer.fit(resume)
    facts["tokens"] = facts["steps"] * trainer.step_rows() * stream.block_size
    facts["corpus_epochs"] = stream.epochs
    return trainer, facts
