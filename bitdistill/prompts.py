"""A task, and the tokens of its prompts and answers, which are the same in training, scoring and use. Needs no torch.

`data/tasks.py` says how rows become examples, and pins the tokens. A tokenizer here is one of transformers, or whatever has
its `is_fast`, `backend_tokenizer`, `chat_template` and `apply_chat_template` (`runtime/chat_template.py`).
"""

import dataclasses
import string
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from bitdistill.errors import UserError
from bitdistill.text_tokens import TextTokens, check_unicode

# What a chat template may end with besides Jinja's own errors: it is a program, and Python's errors are its errors.
TEMPLATE_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True)
class Task:
    """One task. Checked when it is made.

    Args:
        name: how reports call it.
        kind: "classification" or "generation".
        prompt: template with {column} placeholders; a literal brace is doubled.
        truncate_column: the placeholder whose text is cut when a row is too long.
        label_column, labels: classification: the column, and its values (int or str) with the word that stands for
            each. Values may share a word.
        target_column: generation: the column with the text to be written.
        max_new_tokens: generation: the longest answer, in tokens.
        dataset, config, splits: where the hub has it; split name of ours -> split name there. Each whose name begins with
            "validation" is scored; the one called so alone is the main one.
        chat: put the prompt through the tokenizer's chat template, where it has one.

    Raises:
        UserError: a field is missing, or does not fit the others.
    """

    name: str
    kind: str
    prompt: str
    truncate_column: str
    label_column: str | None = None
    labels: dict[int | str, str] = dataclasses.field(default_factory=dict)
    target_column: str | None = None
    max_new_tokens: int = 128
    dataset: str | None = None
    config: str | None = None
    splits: dict[str, str] = dataclasses.field(default_factory=lambda: {"train": "train", "validation": "validation"})
    chat: bool = False

    def __post_init__(self):
        for field, expected, right, do in self._rules():
            if not right:
                got = repr(getattr(self, field))
                raise UserError(f"task {self.name}: {field}", expected=expected, got=got, do=do)

    def _rules(self):
        """(field, what is expected of it, whether it is so, what to do), one by one: each may rely on those before."""
        kinds = ("classification", "generation")
        yield "name", "a text", isinstance(self.name, str) and self.name.strip(), "Write one in quotes."
        yield "kind", " or ".join(kinds), self.kind in kinds, "Choose one."
        plain = isinstance(self.prompt, str) and _placeholders(self.prompt)
        yield (
            "prompt",
            "a text with placeholders like {sentence}",
            plain,
            "Name columns in braces; double other braces.",
        )
        bare = self.prompt == self.prompt.rstrip()
        yield "prompt", "no white space at its end: the answer brings its own", bare, "Remove the white space."
        known = _texts(self.truncate_column) and self.truncate_column in self.columns
        yield "truncate_column", f"one of the prompt's {self.columns}", known, "Name the column with the long text."
        named = isinstance(self.splits, dict) and _texts(*self.splits, *self.splits.values())
        yield "splits", "split: name on the hub", named, "Write {train: train}."
        hub = all(one is None or _texts(one) for one in (self.dataset, self.config))
        yield "dataset", "names of the hub, or none", hub, "Write them in quotes: dataset and config."
        yield "chat", "true or false", isinstance(self.chat, bool), "Write chat: true, or leave it out."
        if self.kind == "generation":
            yield "target_column", "a column", _texts(self.target_column), "Name the column to be written."
            positive = type(self.max_new_tokens) is int and self.max_new_tokens > 0
            yield "max_new_tokens", "a positive number", positive, "Say how long an answer may be."
            return
        yield "label_column", "a column", _texts(self.label_column), "Name the column of the labels."
        yield "labels", "value: word", isinstance(self.labels, dict), "Write {0: bad, 1: good}."
        words = all(isinstance(word, str) and word.strip() for word in self.labels.values())
        yield "labels", "a word for each value", words, 'Quote words that YAML takes for something else: "yes".'
        values = all(type(value) in (int, str) for value in self.labels)
        yield "labels", "values that are numbers or texts", values, "Write the values as they are in the data."
        texts = len({str(value) for value in self.labels}) == len(self.labels)
        yield "labels", "values that differ as texts", texts, "Write a value as a number or in quotes, not as both."
        yield "labels", "at least two different words", len(self.words) > 1, "Add the missing label."

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` makes the task of again. Labels are pairs, because keys of JSON are texts."""
        return dataclasses.asdict(self) | {"labels": [list(pair) for pair in self.labels.items()]}

    @classmethod
    def from_json(cls, values: Any) -> "Task":
        """The task of `to_json`'s values, which may have been edited since.

        Args:
            values: a JSON value.

        Raises:
            UserError: they describe no task.
        """
        do = "Export the student again."
        try:
            task = cls(**values | {"labels": dict(values["labels"])})
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserError("task", expected="the fields of a task", got=str(error), do=do) from None
        texts = (task.name, task.label_column or "", task.target_column or "")
        if not all(isinstance(text, str) for text in texts) or type(task.chat) is not bool:
            raise UserError("task", expected="texts as names, and a yes or no for chat", got=repr(texts), do=do)
        return task

    @property
    def columns(self) -> list[str]:
        """The columns of the prompt, in order of appearance."""
        return list(dict.fromkeys(_placeholders(self.prompt)))

    @property
    def text_columns(self) -> list[str]:
        """The columns that are used as texts."""
        return self.columns if self.target_column is None else list(dict.fromkeys([*self.columns, self.target_column]))

    @property
    def extra_validation(self) -> list[str]:
        """The splits that are scored besides "validation"."""
        return [split for split in self.splits if split.startswith("validation") and split != "validation"]

    @property
    def words(self) -> list[str]:
        """The different label words, stripped, in the order of ``labels``; a label's index is its place here."""
        return list(dict.fromkeys(word.strip() for word in self.labels.values()))


def label_tokens(task: Task, tokenizer) -> list[list[int]]:
    """The answer tokens of each of ``task.words``.

    Raises:
        UserError: the tokens of one word begin another's, so that their likelihoods could not be told apart fairly.
    """
    tokens = answer_tokens(task, tokenizer, task.words)
    for word, ids in zip(task.words, tokens, strict=True):
        for other, longer in zip(task.words, tokens, strict=True):
            if word != other and longer[: len(ids)] == ids:
                raise UserError(
                    f"task {task.name}: labels", expected="words of which none begins another as tokens",
                    got=f"{word!r} {ids} and {other!r} {longer}", do="Choose other words.",
                )  # fmt: skip
    return tokens


def _texts(*values) -> bool:
    """Whether all of them are texts, and none is blank."""
    return all(isinstance(value, str) and value.strip() for value in values)


def _placeholders(template: str) -> list[str]:
    """The column names in braces; none where the template is malformed or has more than names in its braces."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError:
        return []
    names = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    plain = all(name and not spec and not conversion and not set(name) & set(".[") for name, spec, conversion in names)
    return [name for name, _, _ in names] if plain else []


_TEXT_TOKENS: WeakKeyDictionary = WeakKeyDictionary()


def text_tokens(tokenizer) -> TextTokens:
    """The `TextTokens` of a transformers tokenizer, made once for each.

    Raises:
        UserError: a tokenizer without tokenizer.json, which neither rows that are cut nor the packed file can use.
    """
    if not tokenizer.is_fast:
        do = "Convert it: save_pretrained of AutoTokenizer writes tokenizer.json where it can."
        raise UserError("tokenizer", expected="a fast one, with tokenizer.json", got=type(tokenizer).__name__, do=do)
    template = str(tokenizer.chat_template or "")
    state = (len(tokenizer), template)
    known = _TEXT_TOKENS.get(tokenizer)
    if known is None or known[0] != state:
        known = _TEXT_TOKENS[tokenizer] = state, TextTokens(tokenizer.backend_tokenizer, template)
    return known[1]


def is_chat(task: Task, tokenizer) -> bool:
    """Whether the prompt goes through the tokenizer's chat template: the task asks for it, and there is one."""
    return task.chat and bool(tokenizer.chat_template)


def answer_tokens(task: Task, tokenizer, texts: list[str]) -> list[list[int]]:
    """The answer tokens of each text, without EOS."""
    texts = [text.strip() for text in texts]
    tokens = text_tokens(tokenizer)
    if is_chat(task, tokenizer):
        return tokens.encode(texts)
    colon, *after = tokens.encode([":", *(f": {text}" for text in texts)])
    alone = tokens.encode([f" {text}" for text in texts])  # where " text" merges with the colon
    return [a[len(colon) :] if a[: len(colon)] == colon else b for a, b in zip(after, alone, strict=True)]


class Unfit(Exception):
    """A value that a task cannot use: the parts of a UserError, but for the file and column where it stands."""

    def __init__(self, expected: str, got: str, do: str):
        self.expected, self.got, self.do = expected, got, do


def text_of(value: Any, where: str, blank: bool = True) -> str:
    """A value of a row as the text that it is.

    Args:
        value: a text, a number, true or false.
        where: the row, for messages. blank: it may be empty.

    Raises:
        Unfit: it is none of these, empty though it may not be, or no Unicode.
    """
    if isinstance(value, bool):
        value = str(value).lower()
    if value is None or not isinstance(value, str | int | float) or value != value:
        got = f"{value!r}"
        raise Unfit("a text", f"{got if len(got) < 60 else got[:57] + '...'} in {where}", "Fill or drop the row.")
    text = str(value)
    if not blank and not text.strip():
        raise Unfit("a text", f"{text!r} in {where}", "Fill or drop the row.")
    try:
        check_unicode(text, "text")
    except UserError as error:
        raise Unfit(error.expected, f"{error.got} in {where}", error.do) from None
    return text


def row_text(task: Task, batch, column: str, place: int, where: str) -> str:
    """The text of a column in one row.

    Args:
        task: tells the target's column, which may not be blank.
        batch: columns of values. place: of the row among them. where: the row in the data, for messages.
        column: its name.

    Raises:
        UserError: no text.
    """
    value = batch[column][place]
    if value is None or (column == task.target_column and not str(value).strip()):
        raise UserError(column, expected="a text", got=f"{value!r} in {where}", do="Fill or drop the row.")
    return str(value)


def fit_prompts(
    task: Task, batch, places: Sequence[str], tokenizer, room: list[int], max_length: int
) -> tuple[list[list[int]], list[bool]]:
    """Prompt tokens of a batch of columns, each no longer than its ``room``; and which were cut. ``places``: for messages."""
    rows = [{c: row_text(task, batch, c, i, where) for c in task.columns} for i, where in enumerate(places)]
    prompts = _render(task, rows, tokenizer)
    cut = [len(ids) > fits for ids, fits in zip(prompts, room, strict=True)]
    for i in (i for i, is_cut in enumerate(cut) if is_cut):
        prompts[i] = _cut(task, rows[i], tokenizer, prompts[i], room[i], places[i], max_length)
    return prompts, cut


def prompt_texts(task: Task, rows: Sequence[dict], tokenizer) -> list[str]:
    """The rendered prompts, uncut, without BOS; in a chat up to where the assistant starts, with what the template writes."""
    texts = _rendered(task, rows, tokenizer)
    return [text_tokens(tokenizer).unshield(text) for text in texts] if is_chat(task, tokenizer) else texts


def _rendered(task: Task, rows: Sequence[dict], tokenizer) -> list[str]:
    """`prompt_texts`; in a chat with the rows' texts shielded, so that none can open or close a turn."""
    texts = [task.prompt.format_map(row) for row in rows]
    if not is_chat(task, tokenizer):
        return texts
    from jinja2 import TemplateError

    turns = [[{"role": "user", "content": text_tokens(tokenizer).shield(text)}] for text in texts]
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    try:
        return [tokenizer.apply_chat_template(turn, **options) for turn in turns]
    except (TemplateError, *TEMPLATE_ERRORS) as error:
        raise UserError(
            "tokenizer_config.json: chat_template", expected="a template that takes one user turn", got=str(error)[:160],
            do="Correct the tokenizer's chat template, or set chat: false in the task.",
        ) from error  # fmt: skip


def _render(task: Task, rows: Sequence[dict], tokenizer) -> list[list[int]]:
    texts, tokens = _rendered(task, rows, tokenizer), text_tokens(tokenizer)
    # A chat template writes BOS itself.
    return tokens.encode_chat(texts) if is_chat(task, tokenizer) else tokens.encode_prompts(texts)


def _cut(task: Task, row: dict, tokenizer, prompt: list[int], room: int, where: str, max_length: int) -> list[int]:
    """Shorten ``truncate_column`` at token borders until the prompt fits: repeated, for borders move with the cut."""
    text = row[task.truncate_column]
    while (excess := len(prompt) - room) > 0:
        if not text:
            raise UserError(
                "max_length", expected=f"room for the template and the whole answer of {where}", got=str(max_length),
                do=f"Set it to at least {max_length + excess}, or drop the row.",
            )  # fmt: skip
        spans = text_tokens(tokenizer).spans(text)
        kept = len(spans) - excess
        text = text[: min(spans[kept][0], len(text) - 1)].rstrip() if kept > 0 else ""
        [prompt] = _render(task, [{**row, task.truncate_column: text}], tokenizer)
    return prompt
