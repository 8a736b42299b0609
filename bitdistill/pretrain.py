"""Stage 2, continued pre-training: next-token cross-entropy of the ternary student on a general corpus.

The same loop trains the embedded demo's own full-precision base model from scratch. No distillation here: the paper has
none in this stage.

Source: BitNet Distillation, arXiv 2510.13998, section 3.2.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainingArguments

from bitdistill.corpus import TokenStream
from bitdistill.health import HealthLog
from bitdistill.losses import cross_entropy, next_tokens
from bitdistill.trainer import Counts, Objective, StageTrainer, collate_blocks


class NextToken(Objective):
    """``L = CE`` over every position of every block."""

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], counts: Counts) -> dict[str, tuple[float, Tensor]]:
        logits_BTV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        return {"ce": (1.0, cross_entropy(logits_BTV, next_tokens(batch["labels"]), counts.answer_tokens))}


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
        objective=NextToken(),
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
