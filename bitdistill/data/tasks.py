"""Tasks: from a row of data to prompt, answer, tokens, labels and mask.

A task is causal language modeling on a short answer, with the prompt masked; there is no classification head. It is
described by a small YAML file (recipes/tasks/*.yaml, or the user's own): a prompt template with {column} placeholders,
and either label words (classification) or a target column (generation).

Tokens are pinned here, so that training and scoring see the same ones:

    input_ids = prompt_tokens + answer_tokens        labels = -100 for the prompt, answer_tokens for the answer

* prompt_tokens: BOS where the tokenizer puts one before a text, then the rendered template. With ``chat: true`` and a
  tokenizer that has a chat template, the rendered template is the user's turn, up to where the assistant starts.
* answer_tokens: the tokens of " answer" as they are after a colon. Prompt and answer are tokenized apart and joined, so
  no merge crosses the border; the colon keeps sentencepiece tokenizers from adding a second space. In a chat the answer
  opens its turn and has no leading space.
* Classification: the answer is the label word alone, without EOS. Scoring compares the likelihoods of the words; an EOS
  would take half of the loss for a token that says nothing about the row. No word's tokens may begin another's.
* Generation: the answer is the target and EOS.
* Text of a row stays text, whatever it spells (`text_tokens.py`): only the template of a chat and the end of an answer
  are control tokens.

Values are read as they are written (`rows.py`): a column that the prompt or the answer uses is text, and a label is
compared with the task's values by what stands there.

A row that is too long loses the end of ``truncate_column``'s text; the template around it and the answer stay whole. In
classification the room for the answer is that of the longest word, so that the cut cannot give the label away.
"""

import dataclasses
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import torch
from datasets import Dataset
from huggingface_hub.errors import HTTPError
from torch import Tensor

from bitdistill.argument_errors import did_you_mean
from bitdistill.data.rows import READERS, Literal, Row, RowFile
from bitdistill.errors import UserError
from bitdistill.kernels.numerics import IGNORED
from bitdistill.problems import raise_all
from bitdistill.prompts import Task, Unfit, answer_tokens, fit_prompts, label_tokens, row_text, text_of
from bitdistill.text_files import COMPRESSED, kind_of, user_path
from bitdistill.yaml_files import read_yaml

BUILT_IN = Path(__file__).parent.parent / "recipes" / "tasks"
MAX_PROBLEMS = 10  # of one file's rows that are named; the rest are of the same kind
_CHUNK_ROWS, _CHUNK_CHARACTERS = 10_000, 1 << 26  # of the table in memory


def load_task(name_or_path: str) -> Task:
    """A built-in task (sst2, mnli, qnli, cnndm) or the user's YAML file with the fields of ``Task``.

    Raises:
        UserError: no such task or file, no YAML mapping in it, unknown or missing keys, or what ``Task`` refuses.
    """
    path = BUILT_IN / f"{name_or_path}.yaml"
    if not path.is_file():
        path = user_path(name_or_path, "task")
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in BUILT_IN.glob("*.yaml")))
        do = f"{did_you_mean(name_or_path, [p.stem for p in BUILT_IN.glob('*.yaml')])}Check the name or path."
        raise UserError("task", expected=f"one of {known}, or a YAML file", got=name_or_path, do=do)
    settings = read_yaml(path, "task")
    settings.setdefault("name", path.stem)
    fields = {field.name: field for field in dataclasses.fields(Task)}
    if unknown := [str(key) for key in settings if key not in fields]:
        raise UserError(
            f"task file {path}",
            expected=f"keys among {', '.join(fields)}",
            got=", ".join(unknown),
            do=f"{did_you_mean(unknown[0], fields)}Remove or rename it.",
        )
    needed = [f.name for f in fields.values() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [key for key in needed if key not in settings]:
        raise UserError(
            f"task file {path}",
            expected=", ".join(needed),
            got=f"no {', '.join(missing)}",
            do="Add the missing keys; recipes/tasks has examples.",
        )
    return Task(**settings)


def load_hub(dataset: str, config: str | None, split: str, *, streaming: bool, do: str):
    """``datasets.load_dataset``, with what a user can get wrong said as a ``UserError`` that ends in ``do``.

    Offline, the library itself gives up after five tries and about twenty seconds; a cached copy is used then.
    """
    try:
        return datasets.load_dataset(dataset, config, split=split, streaming=streaming)
    except (ConnectionError, FileNotFoundError, HTTPError) as error:
        raise UserError(f"dataset {dataset}", expected="a dataset of the hub", got=str(error), do=do) from error
    except ValueError as error:  # an unknown config or split: the message lists those that exist
        raise UserError(
            f"dataset {dataset}", expected=f"config {config}, split {split}", got=str(error), do=do
        ) from error


def load_rows(
    task: Task, split: str = "train", file: str | None = None, limit: int | None = None, seed: int = 0
) -> Dataset:
    """The columns of one split that the task needs, every text a text, every label one of the task's values.

    Args:
        task: names the columns, the labels and the data set.
        split: one of ``task.splits``; "train" and "validation" for every task.
        file: a local file (`rows.py`: .jsonl, .json, .csv, .tsv, .parquet) instead of the hub.
        limit: keep so many rows, drawn with ``seed`` and left in their order; all when there are fewer.
        seed: of that draw.

    Raises:
        UserError: hub out of reach, unreadable or empty file, missing column, a value that is no text, unknown label; a
            `Problems` with the first MAX_PROBLEMS of them where there are several.
    """
    if limit is not None and limit < 1:
        raise UserError("max_rows", expected="at least 1", got=str(limit), do="Leave it out for all rows.")
    rows, problems = _read(task, split, file)
    raise_all(problems)
    if limit is not None and limit < len(rows):
        generator = torch.Generator().manual_seed(seed)
        rows = rows.select(sorted(torch.randperm(len(rows), generator=generator)[:limit].tolist()))
    return rows


def _read(task: Task, split: str, file: str | None) -> tuple[Dataset | None, list[UserError]]:
    option = f"--extra_validation_files.{split}" if split in task.extra_validation else "--validation_file"
    option = "--train_file" if split == "train" else option
    if file is not None:
        return _read_file(task, user_path(file, option), option)
    if task.dataset is None:
        raise UserError(
            f"task {task.name}", expected="a local file", got="no dataset", do=f"Give a file with {option} FILE."
        )
    if split not in task.splits:
        raise UserError(
            f"task {task.name}: splits",
            expected=f"a split {split}",
            got=", ".join(task.splits),
            do="Name it in the task file.",
        )
    do = f"Or give a local file with {option} FILE (columns: {', '.join(_needed(task))})."
    rows = load_hub(task.dataset, task.config, task.splits[split], streaming=False, do=do)
    return _checked_hub(task, rows, f"{task.dataset} {task.config or ''} {task.splits[split]}")


def load_validation(
    task: Task, file: str | None, extra_files: dict[str, str], limit: int | None = None, seed: int = 0
) -> tuple[dict[str, Dataset], list[str]]:
    """The rows of every validation split, "validation" first.

    Args:
        task: names the splits.
        file: local rows of "validation"; then a further split is read from its own file or not at all: a hub that has the
            one may be out of reach for a reason.
        extra_files: local rows of further splits that the task names: {split: file}.
        limit, seed: as in `load_rows`, for each split.

    Returns: ({split: rows}, names of the splits that are left out for want of a file).

    Raises:
        UserError: a split that the task does not name, or what `load_rows` refuses.
    """
    extra = task.extra_validation
    for split in extra_files:
        if split not in extra:
            raise UserError(
                "extra_validation_files", expected=f"a split among {', '.join(extra)}" if extra else "none for this task",
                got=split, do=f"Correct the name, or add it to the splits of the task {task.name}.",
            )  # fmt: skip
    left_out = [split for split in extra if file is not None and split not in extra_files]
    wanted = {"validation": file} | {split: extra_files.get(split) for split in extra if split not in left_out}
    return {split: load_rows(task, split, path, limit, seed) for split, path in wanted.items()}, left_out


def _needed(task: Task) -> list[str]:
    answer = task.label_column if task.kind == "classification" else task.target_column
    return list(dict.fromkeys([*task.columns, answer]))


def _read_file(task: Task, path: Path, option: str) -> tuple[Dataset | None, list[UserError]]:
    """A local file as a Dataset in memory, or what is wrong with it."""
    if not path.is_file():
        raise UserError(option, expected="a file", got=str(path), do="Check the path.")
    if kind_of(path) not in READERS:
        kinds = f"{' '.join(READERS)}, compressed ({' '.join(COMPRESSED)}) or not"
        raise UserError(option, expected=kinds, got=path.name, do="Convert the file.")
    source = RowFile(path, option, _needed(task))
    chunks, problems, columns, characters = [], [], {name: [] for name in source.columns}, 0
    for row in source:
        values = _values(task, row, str(path), problems)
        if len(problems) >= MAX_PROBLEMS:
            break
        for name, value in values.items() if not problems else ():
            columns[name].append(value)
            characters += len(value) if isinstance(value, str) else 0
        if len(columns[source.columns[0]]) == _CHUNK_ROWS or characters > _CHUNK_CHARACTERS:
            chunks.append(_table(task, columns))
            columns, characters = {name: [] for name in source.columns}, 0
    if source.names and (problem := _missing(source.columns, list(source.names), str(path))):
        return None, [problem]
    if problems:
        return None, problems
    chunks.append(_table(task, columns))
    table = pyarrow.concat_tables(chunks)
    if not len(table):
        got = "none: a header and no data" if source.names else "none"
        raise UserError(f"{option} {path}", expected="at least one row", got=got, do="Give a file with rows.")
    # A fingerprint of its own: hashing the table would take as long as reading it.
    return Dataset(datasets.table.InMemoryTable(table), fingerprint=uuid.uuid4().hex), []


def _checked_hub(task: Task, rows: Dataset, source: str) -> tuple[Dataset | None, list[UserError]]:
    """Rows of the hub, on disk as the library keeps them; columns of other types than text as text."""
    if problem := _missing(_needed(task), rows.column_names, source):
        return None, [problem]
    if len(rows) == 0:
        raise UserError(source, expected="at least one row", got="none", do="Take another split.")
    rows, problems = rows.select_columns(_needed(task)), []
    for column in task.text_columns:
        kind = rows.features[column]
        if not (isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string")):
            rows = rows.cast_column(column, datasets.Value("string"))
    for number, values in enumerate(rows, start=1):
        _values(task, Row(values, number), source, problems)
        if len(problems) >= MAX_PROBLEMS:
            break
    return rows, problems


def _missing(columns: Sequence[str], names: list[str], source: str) -> UserError | None:
    missing = [column for column in columns if column not in names]
    if not missing:
        return None
    return UserError(
        f"{source}: columns", expected=", ".join(columns), got=", ".join(names),
        do=f"Rename {', '.join(missing)} in the data, or the columns in the task file.",
    )  # fmt: skip


def _table(task: Task, columns: dict[str, list]) -> pyarrow.Table:
    numbers = all(type(value) is int for value in task.labels)
    kinds = {task.label_column: pyarrow.int64()} if numbers else {}
    return pyarrow.table(
        {name: pyarrow.array(values, kinds.get(name, pyarrow.string())) for name, values in columns.items()}
    )


def _values(task: Task, row: Row, source: str, problems: list[UserError]) -> dict[str, Any]:
    """The row's values as the task means them: texts, and the label as one of ``task.labels``; adds to ``problems``."""
    values = {}
    for column in _needed(task):
        value = row.values.get(column)
        try:
            if column == task.label_column:
                values[column] = _label(task, value, row.place)
            else:
                values[column] = text_of(value, row.place, blank=column != task.target_column)
        except Unfit as unfit:
            problems.append(UserError(f"{source}: {column}", expected=unfit.expected, got=unfit.got, do=unfit.do))
    return values


def _label(task: Task, value: Any, place: str) -> int | str:
    """The one of ``task.labels`` that stands in a row; a text where the task has numbers and texts."""
    if isinstance(value, Literal):
        text = value.strip()
        whole = text.split(".")[0] if re.fullmatch(r"-?\d+\.0+", text) else text  # 1.0: a column that had gaps once
        found = [label for label in task.labels if str(label) == text or (type(label) is int and str(label) == whole)]
    else:
        found = [label for label in task.labels if label == value and isinstance(label, str) == isinstance(value, str)]
    if not found:
        do = "Correct the row, or add the value to the task's labels."
        raise Unfit(f"one of {list(task.labels)}", f"{value!r} in {place}", do)
    return found[0] if all(type(label) is int for label in task.labels) else str(found[0])


def label_indices(task: Task, rows: Dataset) -> list[int]:
    """The gold label of each row, as an index into ``task.words``."""
    places = {value: task.words.index(word.strip()) for value, word in task.labels.items()}
    index = {str(value): place for value, place in places.items()} | places
    return [index[value] for value in rows[task.label_column]]


def row_documents(task: Task, rows: Dataset) -> Iterator[str]:
    """Each row as a text: the prompt without a chat template, a space, and the answer, neither of them cut.

    Args:
        task: gives the prompt and the answers. rows: from ``load_rows``.
    """
    if task.kind == "classification":
        answers = (task.words[index] for index in label_indices(task, rows))
    else:
        answers = (text.strip() for text in rows[task.target_column])
    for row, answer in zip(rows, answers, strict=True):
        yield f"{task.prompt.format_map(row)} {answer}"


def pad_token(tokenizer, vocab_size: int | None = None) -> int:
    """A token to fill up with: the tokenizer's own, or EOS, or 0. Padding is masked, so any that the model has will do.

    Args:
        tokenizer: a transformers tokenizer.
        vocab_size: rows of the model's embedding; a padding token that was added to the tokenizer alone has none there.
    """
    choices = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in choices if i is not None and i >= 0 and (vocab_size is None or i < vocab_size))


def encode(
    task: Task, rows: Dataset, tokenizer, max_length: int, vocab_size: int | None = None
) -> tuple[Dataset, dict]:
    """Rows for training: ``input_ids`` and ``labels``, as the module's docstring pins them.

    Args:
        task: gives the prompt and the answers.
        rows: from ``load_rows``, N of them.
        tokenizer: a fast tokenizer.
        max_length: the longest row, in tokens.
        vocab_size: rows of the model's embedding; None does not check the ids against it.

    Returns: (Dataset with int32 lists ``input_ids`` and ``labels`` and their ``length``, in the order of ``rows``,
        {"rows", "truncated", "longest_tokens", "tokens", "answer_tokens"}), for the caller to say.

    Raises:
        UserError: a missing text; an answer, or the template without its text, longer than ``max_length``; a token that
            the model's embedding has no row for.
    """
    ids = datasets.List(datasets.Value("int32"))
    features = {"input_ids": ids, "labels": ids, "truncated": datasets.Value("bool")}
    features |= {"tokens": datasets.Value("int32"), "answer_tokens": datasets.Value("int32")}
    encoded = rows.map(
        lambda batch, numbers: _encode_batch(task, batch, numbers, tokenizer, max_length),
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=datasets.Features(features),
        keep_in_memory=True,  # 8 bytes per token; a cache would not see changes in this file, and ranks would race for it
        new_fingerprint=uuid.uuid4().hex,  # saves hashing the tokenizer, seconds for a large one
        desc=f"{task.name}: tokens",
    )
    encoded = encoded.rename_column("tokens", "length")  # the name by which transformers groups rows of like length
    if vocab_size is not None:
        _check_ids(encoded["input_ids"], tokenizer, vocab_size)
    tokens = encoded["length"][:]
    counts = {
        "rows": len(encoded),
        "truncated": sum(encoded["truncated"]),
        "longest_tokens": max(tokens),
        "tokens": sum(tokens),
        "answer_tokens": sum(encoded["answer_tokens"]),
    }
    return encoded.select_columns(["input_ids", "labels", "length"]), counts


def encode_prompts(task: Task, rows: Dataset, tokenizer, max_length: int) -> tuple[list[list[int]], int]:
    """The prompts alone, for scoring: equal to ``encode``'s in classification.

    In generation the room left for the answer is ``max_new_tokens``: the target's length is not known then.

    Returns: (N token lists, how many were truncated).
    """
    classify = task.kind == "classification"
    reserved = max(map(len, label_tokens(task, tokenizer))) if classify else task.max_new_tokens
    batch = {column: rows[column][:] for column in task.columns}
    room = [max_length - reserved] * len(rows)
    places = [f"row {number}" for number in range(1, len(rows) + 1)]
    prompts, cut = fit_prompts(task, batch, places, tokenizer, room, max_length)
    return prompts, sum(cut)


def collate(features: Sequence[dict], pad_token_id: int) -> dict[str, Tensor]:
    """Right padding to the longest row.

    Args:
        features: B rows with lists ``input_ids`` and ``labels``; other keys are left out.
        pad_token_id: fills up ``input_ids``; its positions are masked.

    Returns: int64 (B, T): ``input_ids`` (padded with ``pad_token_id``), ``attention_mask`` (1 real, 0 padding),
        ``labels`` (padded with -100).
    """
    length = max(len(row["input_ids"]) for row in features)

    def pad(lists, value):
        return torch.tensor([[*ids, *[value] * (length - len(ids))] for ids in lists], dtype=torch.int64)

    return {
        "input_ids": pad([row["input_ids"] for row in features], pad_token_id),
        "attention_mask": pad([[1] * len(row["input_ids"]) for row in features], 0),
        "labels": pad([row["labels"] for row in features], IGNORED),
    }


def attended(mask_BT: Tensor) -> Tensor:
    """The attention mask that a model gets: as counted, but that a row which is none (all padding) sees its first token."""
    mask_BT = mask_BT.clone()
    mask_BT[~mask_BT.bool().any(dim=1), 0] = 1
    return mask_BT


def show_example(task: Task, row: dict, tokenizer, max_length: int) -> str:
    """What the model sees of one row: every token with its id, its label and whether it is learned."""
    columns = _encode_batch(task, {key: [value] for key, value in row.items()}, [0], tokenizer, max_length)
    row = {key: values[0] for key, values in columns.items()}
    lines = [
        f"task {task.name}: {row['tokens']} tokens, {row['answer_tokens']} of them learned"
        + (f"; {task.truncate_column} was cut to fit {max_length}" if row["truncated"] else ""),
        f"{'position':>8} {'input_id':>8} {'label':>8}  token",
    ]
    for i, (token, label) in enumerate(zip(row["input_ids"], row["labels"], strict=True)):
        mask = "masked" if label == IGNORED else str(label)
        lines.append(f"{i:>8} {token:>8} {mask:>8}  {tokenizer.decode([token])!r}")
    return "\n".join(lines)


def _encode_batch(task: Task, batch: dict[str, list], numbers: Sequence[int], tokenizer, max_length: int) -> dict:
    """Columns of rows -> columns of encoded rows; ``numbers`` are their places in the data, from 0, for messages."""
    places = [f"row {number + 1}" for number in numbers]
    if task.kind == "classification":
        words, gold = label_tokens(task, tokenizer), label_indices(task, batch)
        answers, reserved = [words[g] for g in gold], [max(map(len, words))] * len(gold)
    else:
        targets = [row_text(task, batch, task.target_column, i, where) for i, where in enumerate(places)]
        answers = [[*ids, _eos(tokenizer)] for ids in answer_tokens(task, tokenizer, targets)]
        reserved = [len(ids) for ids in answers]
    prompts, cut = fit_prompts(task, batch, places, tokenizer, [max_length - r for r in reserved], max_length)
    return {
        "input_ids": [p + a for p, a in zip(prompts, answers, strict=True)],
        "labels": [[IGNORED] * len(p) + a for p, a in zip(prompts, answers, strict=True)],
        "truncated": cut,
        "tokens": [len(p) + len(a) for p, a in zip(prompts, answers, strict=True)],
        "answer_tokens": [len(a) for a in answers],
    }


def _check_ids(rows: Iterable[Sequence[int]], tokenizer, vocab_size: int) -> None:
    for number, ids in enumerate(rows, start=1):
        if (highest := max(ids, default=0)) >= vocab_size:
            token = tokenizer.convert_ids_to_tokens(int(highest))
            raise UserError(
                "tokenizer", expected=f"token ids below {vocab_size}, the rows of the model's embedding",
                got=f"{highest} ({token!r}) in row {number}",
                do="Take the tokenizer that belongs to the model, or resize the model's embedding first.",
            )  # fmt: skip


def _eos(tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError("tokenizer", expected="an EOS token (the answer must end)", got="none", do="Set eos_token.")
    return tokenizer.eos_token_id
