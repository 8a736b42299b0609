"""One setting on one task: its score with an interval, and what each row contributed, for paired comparison.

The same function scores a torch model and the packed CPU runtime; scoring.py has the arithmetic, tasks.py the prompts.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from bitdistill.distributed import launch
from bitdistill.runtime import MAX_SLOTS, Runtime
from bitdistill.scoring import (
    accuracy_interval,
    classify,
    generate_greedy,
    paired_difference,
    rouge,
    summarization_scores,
    torch_logits,
)
from bitdistill.tasks import Task, encode_prompts, label_indices, label_tokens, pad_token


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
        model: a Hugging Face model, or a Runtime on a packed file.
        rows: from tasks.load_rows. tokenizer: a Hugging Face tokenizer.
        max_length: tokens of prompt and answer; longer prompts are cut, and that is said.
        batch_size: rows at a time. A Runtime scores labels one row at a time and generates MAX_SLOTS at a time.
        name: on the progress bar.
    """
    prompts, cut = encode_prompts(task, rows, tokenizer, max_length)
    if cut:
        launch.say(f"{name}: {cut:,} of {len(prompts):,} prompts cut to {max_length} tokens")
    packed = isinstance(model, Runtime)
    if task.kind == "classification":
        words = label_tokens(task, tokenizer)
        if packed:
            predicted = model.classify(prompts, words, partial(tqdm, desc=f"{name:<11}")).argmax(axis=1)
        else:
            logits_of = torch_logits(model, pad_token(tokenizer))
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
        eos = tokenizer.eos_token_id
        answers = generate_greedy(
            model, prompts, task.max_new_tokens, eos, pad_token(tokenizer), batch_size, desc=f"{name:<11}"
        )
    texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
    references = rows[task.target_column][:]
    scores = summarization_scores(texts, references)
    total, low, high = scores["rougeLsum"]
    extra = {key: {"score": value[0], "interval": list(value[1:])} for key, value in scores.items()}
    return Score(total, (low, high), len(texts), rouge(texts, references)["rougeLsum"], texts, extra)


def scores_json(task: Task, rows, scores: dict[str, Score], notes: list[str]) -> dict[str, Any]:
    """The content of evaluate/scores.json: a row a setting, and paired differences on the same validation rows."""
    majority = None
    if task.kind == "classification":
        counts = np.bincount(label_indices(task, rows))
        majority = 100 * float(counts.max() / counts.sum())
    names = list(scores)
    scale = 100 if task.kind == "classification" else 1
    paired = []
    for i, a in enumerate(names):
        for b in names[:i]:
            difference, low, high = paired_difference(scores[a].values, scores[b].values)
            interval = [scale * low, scale * high]
            paired.append({"a": a, "b": b, "difference": scale * difference, "interval": interval})
    return {
        "task": task.name,
        "metric": metric_of(task),
        "majority": majority,
        "rows": [
            {
                "setting": name,
                "score": score.score,
                "interval": list(score.interval),
                "examples": score.examples,
                "extra": score.extra,
            }
            for name, score in scores.items()
        ],
        "paired": paired,
        "notes": notes,
    }
