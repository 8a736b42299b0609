"""One setting on one task: its score with an interval, and what each row contributed, for paired comparison.

A task may have several validation splits (MNLI: matched and mismatched); the first is the main one. The same functions
score a torch model and the packed CPU runtime; scoring.py has the arithmetic, tasks.py the prompts.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from bitdistill.data.tasks import encode_prompts, label_indices, pad_token
from bitdistill.distributed import process_group
from bitdistill.evaluation.scoring import (
    accuracy_interval,
    classify,
    generate_greedy,
    paired_difference,
    perplexity,
    rouge,
    summarization_scores,
    summarize_losses,
    torch_logits,
)
from bitdistill.prompts import Task, label_tokens
from bitdistill.runtime.cpu import MAX_SLOTS, Runtime
from bitdistill.runtime.sampling import log_softmax
from bitdistill.student.loading import embedding_rows, end_token_ids

LOGIT_ROWS = 64  # a packed student's logits of a text are made for so many positions at a time


@dataclass
class Score:
    """Percentages. `values`: per row, right or wrong (classification) or ROUGE-Lsum (generation)."""

    score: float
    interval: tuple[float, float]
    examples: int
    values: np.ndarray
    predictions: list[str]
    extra: dict[str, Any] = field(default_factory=dict)


def metric_of(task: Task) -> str:
    """What `Score.score` is for a task."""
    return "accuracy" if task.kind == "classification" else "ROUGE-Lsum"


def score_rows(model, task: Task, rows, tokenizer, *, max_length: int, batch_size: int, name: str) -> Score:
    """Scores a model on a task's rows.

    Args:
        task: gives prompts and answers.
        model: a Hugging Face model, or a Runtime on a packed file.
        rows: from tasks.load_rows. tokenizer: a Hugging Face tokenizer.
        max_length: tokens of prompt and answer; longer prompts are cut, and that is said.
        batch_size: rows at a time. A Runtime scores labels one row at a time and generates MAX_SLOTS at a time.
        name: on the progress bar.
    """
    prompts, cut = encode_prompts(task, rows, tokenizer, max_length)
    if cut:
        process_group.say(f"{name}: {cut:,} of {len(prompts):,} prompts cut to {max_length} tokens")
    packed = isinstance(model, Runtime)
    if task.kind == "classification":
        words = label_tokens(task, tokenizer)
        if packed:
            predicted = model.classify(prompts, words, partial(tqdm, desc=f"{name:<11}")).argmax(axis=1)
        else:
            logits_of = torch_logits(model, pad_token(tokenizer, embedding_rows(model)))
            predicted, _ = classify(logits_of, prompts, words, batch_size, desc=f"{name:<11}")
        correct = predicted == np.array(label_indices(task, rows))
        share, low, high = accuracy_interval(correct)
        return Score(
            100 * share, (100 * low, 100 * high), len(correct), correct, [task.words[i] for i in predicted.tolist()]
        )
    if packed:
        finished = model.generate_batch(prompts, task.max_new_tokens, slots=MAX_SLOTS)
        by_index = {answer.index: answer for answer in tqdm(finished, total=len(prompts), desc=f"{name:<11}")}
        answers = [by_index[index].token_ids for index in range(len(prompts))]
    else:
        ends, padding = end_token_ids(model, tokenizer.eos_token_id), pad_token(tokenizer, embedding_rows(model))
        answers = generate_greedy(model, prompts, task.max_new_tokens, ends, padding, batch_size, desc=f"{name:<11}")
    texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
    references = rows[task.target_column][:]
    scores = summarization_scores(texts, references)
    total, low, high = scores["rougeLsum"]
    extra = {key: {"score": value[0], "interval": list(value[1:])} for key, value in scores.items()}
    return Score(total, (low, high), len(texts), rouge(texts, references)["rougeLsum"], texts, extra)


def score_splits(model, task: Task, splits: dict[str, Any], tokenizer, *, name: str, **options) -> dict[str, Score]:
    """`score_rows` of every split: {split: Score}. Args: splits: {split: rows}; the rest as there."""
    names = {split: name if len(splits) == 1 else f"{name}, {split}" for split in splits}
    return {
        split: score_rows(model, task, rows, tokenizer, name=names[split], **options) for split, rows in splits.items()
    }


def text_perplexity(model, blocks: Tensor, name: str) -> dict[str, float]:
    """`scoring.perplexity` of a torch model or a Runtime.

    Args:
        model: a Hugging Face model, or a Runtime on a packed file.
        blocks: int64 (N, T), from corpus.token_blocks. name: on the progress bar.

    Raises:
        UserError: blocks longer than the Runtime's context, or fewer than two blocks.

    Numerics: of a Runtime, log-softmax in float64 of its fp32 logits.
    """
    if not isinstance(model, Runtime):
        return perplexity(model, blocks, desc=f"{name:<11}")
    losses = []
    for ids in tqdm(blocks.tolist(), desc=f"{name:<11}"):
        cache, total = model.new_cache(len(ids)), 0.0
        for begin in range(0, len(ids) - 1, LOGIT_ROWS):
            fed = ids[begin : min(begin + LOGIT_ROWS, len(ids) - 1)]
            following = ids[begin + 1 : begin + 1 + len(fed)]
            total -= log_softmax(model.logits(fed, cache=cache))[np.arange(len(fed)), following].sum()
        losses.append(total / (len(ids) - 1))
    return summarize_losses(np.array(losses), blocks.numel() - len(blocks))


def scores_json(
    task: Task, splits: dict[str, Any], scores: dict[str, dict[str, Score]], notes: list[str]
) -> dict[str, Any]:
    """The content of evaluate/scores.json: a row per setting, and paired differences on the same validation rows.

    Args:
        task: what was scored.
        splits: {split: rows}, the main one first. scores: {setting: `score_splits`}.
        notes: sentences for the reader of the report.

    Returns: the main split's figures; each row and `majorities` have the further splits' beside them, and a paired
        difference of a further split names it under "split".
    """
    main, *further = splits
    scale = 100 if task.kind == "classification" else 1
    paired = []
    for split in splits:
        for i, a in enumerate(scores):
            for b in list(scores)[:i]:
                difference, low, high = paired_difference(scores[a][split].values, scores[b][split].values)
                row = {"a": a, "b": b, "difference": scale * difference, "interval": [scale * low, scale * high]}
                paired.append(row if split == main else row | {"split": split})
    result = {
        "task": task.name,
        "metric": metric_of(task),
        "majority": _majority(task, splits[main]),
        "rows": [
            {"setting": name, **_figures(score[main]), "extra": score[main].extra} for name, score in scores.items()
        ],
        "paired": paired,
        "notes": notes,
    }
    if further:
        result["majorities"] = {split: _majority(task, splits[split]) for split in further}
        for row in result["rows"]:
            row["splits"] = {split: _figures(scores[row["setting"]][split]) for split in further}
    return result


def _figures(score: Score) -> dict[str, Any]:
    return {"score": score.score, "interval": list(score.interval), "examples": score.examples}


def _majority(task: Task, rows) -> float | None:
    """Percent of rows with the most frequent label; None for generation."""
    if task.kind != "classification":
        return None
    counts = np.bincount(label_indices(task, rows))
    return 100 * float(counts.max() / counts.sum())
