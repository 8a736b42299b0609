"""Converting a model from Python: what `import bitdistill` offers to a script or a notebook besides inference.

    model = bitdistill.load_language_model("Qwen/Qwen3-0.6B")        full precision, fp32
    bitdistill.refine(model)                                         stage 1, in place
    bitdistill.fit(model, bitdistill.TokenStream(...), ...)          stage 2, in place
    bitdistill.fit(model, rows, objective=bitdistill.Distillation(model, teacher), ...)     stage 3, in place
    bitdistill.write("student.safetensors", model, tokenizer)        the packed file
    bitdistill.prove("student.safetensors", model, tokenizer, texts) that it equals the model

This is one process on one device, without DeepSpeed. The main job (train.py) runs the same functions on any number of
GPUs, and adds stages that are skipped when they are done, checkpoints, and the comparison with the two baselines.
"""

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel

from bitdistill.data.tasks import collate, pad_token
from bitdistill.distributed.teacher import Teacher
from bitdistill.errors import UserError
from bitdistill.export.pack import student_header
from bitdistill.export.parity import prove_parity
from bitdistill.export.write import write_packed
from bitdistill.prompts import Task
from bitdistill.runtime.header import Header
from bitdistill.student.embeddings import FULL_PRECISION, embedding_format
from bitdistill.training.distill import Answers
from bitdistill.training.pretrain import NextToken
from bitdistill.training.trainer import Objective, StageTrainer, collate_blocks, release, training_arguments


def freeze(model: PreTrainedModel) -> Teacher:
    """A full-precision model as the teacher of `Distillation`: in eval mode, without gradients, on the training device.

    Args:
        model: a causal language model with the student's vocabulary; changed in place.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = nn.Module.to(model.eval().requires_grad_(False), device)
    return Teacher(module=module, forward=module)


def fit(
    model: PreTrainedModel,
    data: Any,
    objective: Objective | None = None,
    *,
    tokenizer: Any = None,
    max_steps: int = -1,
    num_train_epochs: float = 3.0,
    learning_rate: float = 5e-5,
    per_device_train_batch_size: int = 8,
    seed: int = 0,
    output_dir: str | Path | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Trains a model in place, on a GPU where there is one, else on the CPU.

    Args:
        model: fp32, full precision or refined; afterwards it is in eval mode.
        data: a `TokenStream` (stage 2), or task rows from `encode` (stage 3, or plain fine-tuning).
        objective: what is minimized. By default the cross-entropy of the next token for a stream, and of the answers'
            tokens for rows. `Distillation(model, teacher)` is stage 3.
        tokenizer: for its padding token; only rows need it.
        max_steps: optimizer steps. A stream has no end and needs it; for rows -1 derives it from num_train_epochs.
        num_train_epochs: passes over the rows when max_steps is -1.
        learning_rate: the peak learning rate of AdamW.
        per_device_train_batch_size: sequences per step.
        seed: of everything random.
        output_dir: a folder for metrics.jsonl, and for checkpoints if save_steps is among the arguments; a temporary
            folder by default.
        arguments: further fields of transformers.TrainingArguments, such as warmup_steps or bf16.

    Returns: seconds, steps and resumed_from (always None), as in a run's done.json.

    Raises:
        UserError: a stream without max_steps, rows without a tokenizer, a tokenizer with more tokens than the model, or
            a loss that is not finite.
    """
    arguments = {"logging_steps": 10} | arguments
    stream = data if isinstance(data, IterableDataset) else None
    _check_data(model, stream, tokenizer, max_steps)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(output_dir) if output_dir is not None else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        trainer = StageTrainer(
            objective=objective or (Answers(model) if stream is None else NextToken(model)),
            stage="train",
            run_dir=folder,
            stream=stream,
            model=model,
            args=training_arguments(
                folder / "checkpoints",
                deepspeed=None,
                seed=seed,
                report_to=[],
                max_steps=max_steps,
                num_train_epochs=num_train_epochs,
                learning_rate=learning_rate,
                per_device_train_batch_size=per_device_train_batch_size,
                **arguments,
            ),
            train_dataset=data,
            data_collator=collate_blocks if stream is not None else partial(collate, pad_token_id=pad_token(tokenizer)),
        )
        facts = trainer.fit(resume=False)
        release(trainer)
    model.eval()
    return facts


def _check_data(model: PreTrainedModel, stream: IterableDataset | None, tokenizer: Any, max_steps: int) -> None:
    """Raises UserError for what `fit` needs to know of a stream or of rows and was not given."""
    if stream is not None and max_steps < 1:
        raise UserError(
            "max_steps", expected="a number of steps, for a token stream has no end", got=str(max_steps), do="Set it."
        )
    if stream is None and tokenizer is None:
        raise UserError("tokenizer", expected="the tokenizer, to pad rows", got="none", do="Pass tokenizer=tokenizer.")
    if tokenizer is not None and len(tokenizer) > model.config.vocab_size:
        raise UserError(
            "tokenizer",
            expected=f"at most {model.config.vocab_size:,} tokens, the rows of the model's embedding",
            got=f"{len(tokenizer):,}",
            do="Use the model's own tokenizer, or call model.resize_token_embeddings before refine.",
        )


def write(
    path: str | Path,
    model: PreTrainedModel,
    tokenizer: Any = None,
    *,
    packing: str = "base3",
    embedding: str | None = None,
    task: Task | None = None,
    max_length: int | None = None,
    metadata: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes a refined model to one packed file, which `bitdistill.load` opens without torch.

    Args:
        path: the file; its folder must exist.
        model: refined, fp32.
        tokenizer: a fast tokenizer, stored in the file. Without one the file takes and gives token ids only.
        packing: "base3" (1.6 bits per weight) or "2bit".
        embedding: "fp16", "int8", "int4" or "ternary". By default the format in which it was trained, and int8 if that
            is full precision.
        task: what the model was trained for; with it and a tokenizer the file can `predict`.
        max_length: tokens of prompt and answer in training; longer prompts are cut where the file predicts.
        metadata: further JSON values to keep in the file's header.

    Returns: sizes in bytes and bits per weight (see export.write.write_packed).

    Raises:
        UserError: the model is not refined, not fp32 or not finite, or has a property that the runtime lacks.
    """
    trained = embedding_format(model)
    about = student_header(Header(task=task, max_length=max_length), model, tokenizer).to_json()
    return write_packed(
        path,
        model,
        packing=packing,
        embedding=embedding or ("int8" if trained == FULL_PRECISION else trained),
        tokenizer_json=None if tokenizer is None else tokenizer.backend_tokenizer.to_str().encode(),
        metadata=about | (metadata or {}),
    )


def prove(
    path: str | Path, model: PreTrainedModel, tokenizer: Any, texts: Sequence[str | Sequence[int]]
) -> dict[str, float | int]:
    """Proves that a packed file equals the model it was written from; raises where it does not.

    Args:
        path: a file of `write`.
        model: the same model.
        tokenizer: encodes the texts; may be None where all of them are token ids.
        texts: at least one text, or list of token ids, of the kind that the model was trained on.

    Returns: what was compared and how far apart it was (see export.parity.prove_parity).

    Raises:
        UserError: no texts, or one longer than the model's context.
        RuntimeError: the file holds another function than the model.
    """
    return prove_parity(
        path, model, [tokenizer(text)["input_ids"] if isinstance(text, str) else text for text in texts]
    )
