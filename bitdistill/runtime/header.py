"""What a packed file says about its student, besides the tensors: its task, its base, and the settings for its use.

The header's `metadata` (docs/packed_format.md). Files of earlier versions have fewer entries and can still be opened.
"""

import dataclasses
from typing import Any

from bitdistill.errors import UserError
from bitdistill.prompts import Task
from bitdistill.runtime.sampling import Sampling

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True)
class Header:
    """Facts about a student; None or empty where the file does not have them.

    Attributes:
        setting: which of a run's settings it is, such as BitDistill. base: the name of its base model.
        task: what it was trained for. max_length: tokens of prompt and answer in training; longer prompts are cut.
        generation: sampling settings that the base's authors recommend (`Sampling`'s names).
        scores: {"metric", "setting": {"score", "interval", "examples"}} of the run's evaluation.
        tokenizer: special tokens and "chat_template".
    """

    setting: str | None = None
    base: str | None = None
    task: Task | None = None
    max_length: int | None = None
    generation: dict[str, float] = dataclasses.field(default_factory=dict)
    scores: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON values; what is not known is left out."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["task"] = None if self.task is None else self.task.to_json()
        return {name: value for name, value in values.items() if value not in (None, {})}

    def sampling(self, **given: Any) -> Sampling:
        """Sampling settings: those given, then those that the base's authors recommend, then greedy decoding.

        Args:
            given: settings of `Sampling`; None is not given.
        """
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("temperature") == 0:  # greedy was asked for: nothing of what is recommended goes with it
            return Sampling(**given)
        return Sampling(**{**self.generation, **given})


def read_header(metadata: Any) -> Header:
    """The header's `metadata`, checked.

    Args:
        metadata: a JSON value, of this version's writer or an earlier one's.

    Raises:
        UserError: values that this version does not write.
    """
    if not isinstance(metadata, dict):
        raise _unknown("metadata", metadata)
    known = {field.name for field in dataclasses.fields(Header)}
    values = {name: value for name, value in metadata.items() if name in known}
    if not isinstance(values.get("task"), dict):  # before, a name alone
        values.pop("task", None)
    else:
        values["task"] = Task.from_json(values["task"])
    for name in ("setting", "base"):
        if not isinstance(values.get(name, ""), str):
            raise _unknown(name, values[name])
    for name in ("generation", "scores", "tokenizer"):
        if not isinstance(values.get(name, {}), dict):
            raise _unknown(name, values[name])
    length = values.get("max_length", 1)
    if type(length) is not int or length < 1:
        raise _unknown("max_length", length)
    numbers = values.get("generation", {})
    if not all(name in SAMPLING and type(value) in (int, float) for name, value in numbers.items()):
        raise _unknown("generation", numbers)
    Sampling(**numbers)
    return Header(**values)


def _unknown(name: str, value: Any) -> UserError:
    got = f"{name} {value!r}"
    do = "Export the student again."
    return UserError("RUN_OR_FILE", expected="a header that this version writes", got=got[:120], do=do)
