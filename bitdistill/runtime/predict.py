"""A student's answers to rows of its task: a label with its probability, or a text. Needs no torch.

Prompts are made as in training and evaluation (`bitdistill/prompts.py`), so the answers equal those of the evaluation.
"""

import abc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np

from bitdistill.errors import UserError
from bitdistill.prompts import Task, Unfit, fit_prompts, label_tokens, text_of
from bitdistill.runtime.base import BaseRuntime, check_new_tokens

Row = str | Mapping[str, Any]


@dataclass(frozen=True)
class Prediction:
    """The answer to one row.

    Attributes:
        row: its number, from 1.
        label: classification: the likeliest label word. probability: that of the label; probabilities: those of all label words.
        text: generation: the answer. stopped_by: as in `Answer`.
        truncated: the prompt was cut to the length that the student was trained with.
    """

    row: int
    label: str | None = None
    probability: float | None = None
    probabilities: dict[str, float] | None = None
    text: str | None = None
    stopped_by: str | None = None
    truncated: bool = False

    def to_json(self) -> dict[str, Any]:
        """JSON values: the fields that the answer has; `truncated` only where it is true."""
        return {name: value for name, value in asdict(self).items() if value is not None and value is not False}


class Predictor(BaseRuntime, abc.ABC):
    """The part of a runtime that answers rows of the student's task."""

    @abc.abstractmethod
    def classify(
        self, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], progress: Callable = iter
    ) -> np.ndarray:
        """Log-likelihoods float64 (N, L) of L labels after each of N prompts (`cpu.Runtime.classify`)."""

    @abc.abstractmethod
    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: int = 128,
        sampling: Any = None,
        stop: str | Sequence[str] = (),
        slots: int = 8,
    ) -> Iterator[Any]:
        """Answers to prompts, as they are finished (`cpu.Runtime.generate_batch`)."""

    def predict(
        self, rows: Row | Iterable[Row], max_new_tokens: int | None = None, progress: Callable = iter
    ) -> list[Prediction]:
        """The student's answers to rows of its task: a label with its probability, or a text.

        Prompts, cuts and labels are those of the run's own evaluation.

        Args:
            rows: texts, for a task of one column, or values by column (further columns are ignored); one or many.
            max_new_tokens: of a task that generates: the longest answer; the task's by default.
            progress: wraps an iteration that takes a step for each row, such as tqdm.

        Returns: one `Prediction` for each row, in their order.

        Raises:
            UserError: the file does not know its task or has no tokenizer, a column is missing or no text, or a template
                is too long even without its text.
        """
        if max_new_tokens is not None:
            check_new_tokens(max_new_tokens)
        texts, places = checked_rows(needed_task(self), rows)
        return predict_texts(self, texts, places, max_new_tokens=max_new_tokens, progress=progress)


def needed_task(runtime: Predictor) -> Task:
    """The task of a packed file.

    Args:
        runtime: of the file.

    Raises:
        UserError: the file knows none.
    """
    if runtime.header.task is None:
        raise UserError(
            "RUN_OR_FILE",
            expected="a packed file that knows its task",
            got=f"{runtime.model.path}, which names no task (an earlier version wrote it, or none was given)",
            do="Export the run again (--stage export), or use `bitdistill generate` with the whole prompt.",
        )
    return runtime.header.task


def row_texts(task: Task, row: Row, where: str, source: str) -> dict[str, str]:
    """The texts of the prompt's columns in one row.

    Args:
        task: names the columns.
        row: a text, for a task of one column, or values by column; further columns are ignored.
        where: names the row in messages. source: names its origin in messages, such as a file.

    Raises:
        UserError: a column is missing, or its value is no text.
    """
    if isinstance(row, str):
        if len(task.columns) > 1:
            expected = f"the columns {', '.join(task.columns)} in {where}"
            raise UserError(source, expected=expected, got="one text", do="Give a value for each column.")
        row = {task.columns[0]: row}
    if not isinstance(row, Mapping):
        got = f"a {type(row).__name__} in {where}"
        raise UserError(source, expected="texts, or values by column", got=got, do="Give one of them for each row.")
    texts = {}
    for column in task.columns:
        if column not in row:
            got = f"{', '.join(map(str, row)) or 'none'} in {where}"
            do = f"Rename or add {column}."
            raise UserError(f"{source}: columns", expected=", ".join(task.columns), got=got, do=do)
        try:
            texts[column] = text_of(row[column], where)
        except Unfit as unfit:
            raise UserError(f"{source}: {column}", expected=unfit.expected, got=unfit.got, do=unfit.do) from None
    return texts


def task_prompts(
    runtime: Predictor, texts: Sequence[Mapping[str, str]], places: Sequence[str], max_new_tokens: int | None
) -> tuple[list[list[int]], list[bool]]:
    """The tokens of the prompts, as in training and evaluation, and which prompts were cut.

    Args:
        runtime: of a file that knows its task.
        texts: N rows, of `row_texts`. places: of the rows, for messages.
        max_new_tokens: generation: room for the answer; the task's by default.

    Raises:
        UserError: the template is too long even without its text, or the file has no tokenizer.
    """
    task, tokenizer = needed_task(runtime), runtime.packed_tokenizer
    length = min(runtime.header.max_length or runtime.context, runtime.context)
    reserved = max_new_tokens or task.max_new_tokens
    if task.kind == "classification":
        reserved = max(map(len, label_tokens(task, tokenizer)))
    batch = {column: [row[column] for row in texts] for column in task.columns}
    return fit_prompts(task, batch, places, tokenizer, [length - reserved] * len(texts), length)


def predict_texts(
    runtime: Predictor,
    texts: Sequence[Mapping[str, str]],
    places: Sequence[str],
    *,
    first_row: int = 1,
    max_new_tokens: int | None = None,
    progress: Callable = iter,
) -> list[Prediction]:
    """The answers to rows, in their order.

    Args:
        runtime: of a file that knows its task.
        texts: N rows, of `row_texts`. places: of the rows, for messages.
        first_row: the number of the first.
        max_new_tokens: generation: the longest answer; the task's by default.
        progress: wraps an iteration that takes a step for each row, such as tqdm.

    Raises:
        UserError: as `task_prompts`.
    """
    task = needed_task(runtime)
    prompts, cut = task_prompts(runtime, texts, places, max_new_tokens)
    if task.kind == "classification":
        likelihoods = runtime.classify(prompts, label_tokens(task, runtime.packed_tokenizer), progress)
        labeled = [label_prediction(task, row) for row in likelihoods]
        return [
            Prediction(first_row + i, **label, truncated=is_cut)
            for i, (label, is_cut) in enumerate(zip(labeled, cut, strict=True))
        ]
    answers = runtime.generate_batch(prompts, max_new_tokens or task.max_new_tokens, slots=min(len(prompts), 16) or 1)
    found = {answer.index: answer for answer, _ in zip(answers, progress(range(len(prompts))), strict=True)}
    return [
        Prediction(
            first_row + i,
            text=answer_text(runtime, found[i].token_ids),
            stopped_by=found[i].stopped_by,
            truncated=is_cut,
        )
        for i, is_cut in enumerate(cut)
    ]


def label_prediction(task: Task, likelihoods: np.ndarray) -> dict[str, Any]:
    """`label`, `probability` and `probabilities` of a row: ``softmax(log-likelihoods)`` over the task's words.

    Args:
        task: names the words. likelihoods: float64 (L,), of `Runtime.classify`.
    """
    weights = np.exp(likelihoods - likelihoods.max())
    shares = (weights / weights.sum()).tolist()
    best = int(likelihoods.argmax())
    probabilities = dict(zip(task.words, shares, strict=True))
    return {"label": task.words[best], "probability": shares[best], "probabilities": probabilities}


def answer_text(runtime: Predictor, token_ids: Sequence[int]) -> str:
    """A generated answer as the evaluation reads it: without special tokens and surrounding white space."""
    assert runtime.tokenizer is not None, "it made the prompt"
    return runtime.tokenizer.decode(token_ids, skip_special_tokens=True).strip()


def checked_rows(task: Task, rows: Row | Iterable[Row]) -> tuple[list[dict[str, str]], list[str]]:
    """(texts, places) of rows that a caller gives in Python: one row, or many.

    Raises:
        UserError: as `row_texts`, or rows of another kind.
    """
    if isinstance(rows, str | Mapping):
        return checked_rows(task, [cast(Row, rows)])
    if not isinstance(rows, Iterable):
        do = "Give a text, values by column, or a list of these."
        raise UserError("rows", expected="rows of the task", got=type(rows).__name__, do=do)
    texts = [row_texts(task, row, f"row {number}", "rows") for number, row in enumerate(rows, start=1)]
    return texts, [f"row {number}" for number in range(1, len(texts) + 1)]
