"""What both runtimes ask of a prompt: from text to tokens, and checks before anything is computed."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from tokenizers import Tokenizer

from bitdistill import prompts
from bitdistill.errors import UserError
from bitdistill.prompts import Task
from bitdistill.runtime.chat_template import PackedTokenizer
from bitdistill.runtime.header import Header, read_header
from bitdistill.runtime.packed_file import PackedModel
from bitdistill.text_tokens import TextTokens


class Prompts:
    """The part of a runtime that reads prompts.

    Attributes:
        model: the open file. context: the most positions of a sequence.
    """

    model: PackedModel
    context: int

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """`tokenizers.Tokenizer`, or None when the file has none. Read when it is first asked for."""
        text = self.model.tokenizer_json()
        return Tokenizer.from_str(text) if text else None

    @cached_property
    def header(self) -> Header:
        """What the file says of its student: task, base, sampling settings.

        Raises:
            UserError: values that this version does not write.
        """
        return read_header(self.model.metadata)

    @property
    def task(self) -> Task | None:
        """What the student was trained for; None in files of earlier versions, and where nobody said so."""
        return self.header.task

    @cached_property
    def packed_tokenizer(self) -> PackedTokenizer:
        """The tokenizer with its chat template.

        Raises:
            UserError: the file has no tokenizer.
        """
        return PackedTokenizer(self._needed_tokenizer(), self.header.tokenizer)

    @property
    def text_tokens(self) -> TextTokens:
        """How texts become tokens, in training as here.

        Raises:
            UserError: the file has no tokenizer.
        """
        return prompts.text_tokens(self.packed_tokenizer)

    def encode(self, prompt: str, special_tokens: bool = False) -> list[int]:
        """The tokens of a prompt: `TextTokens.encode_prompt`.

        Raises:
            UserError: the text is no Unicode, or the file has no tokenizer.
        """
        return self.text_tokens.encode_prompt(prompt, special_tokens)

    def _encoded(self, prompt: str | Sequence[int]) -> Sequence[int]:
        return self.encode(prompt) if isinstance(prompt, str) else prompt

    def _needed_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError(
                "RUN_OR_FILE",
                expected="a packed file with a tokenizer",
                got=f"{self.model.path} without one",
                do="Use generate_ids, or export it again with the tokenizer.",
            )
        return self.tokenizer

    def _checked_ids(self, input_ids: Sequence[int], field: str = "prompt", limit: int | None = None) -> list[int]:
        """Token ids of the vocabulary, at least one and at most `limit`, as a list."""
        ids = np.asarray(input_ids, np.int64).reshape(-1)
        vocabulary = self.model.config.vocab_size
        if len(ids) == 0:
            raise UserError(field, expected="at least one token", got="none", do="Give a text.")
        bad = ids[(ids < 0) | (ids >= vocabulary)]
        if len(bad):
            do = "Use this student's tokenizer."
            raise UserError(field, expected=f"token ids below {vocabulary}", got=str(bad[0]), do=do)
        if limit is not None and len(ids) > limit:
            raise UserError(field, expected=f"at most {limit} tokens", got=str(len(ids)), do="Shorten the text.")
        return ids.tolist()


def check_new_tokens(max_new_tokens: int) -> None:
    """Raises UserError for less than one new token."""
    if max_new_tokens < 1:
        raise UserError("max_new_tokens", expected="at least 1", got=str(max_new_tokens), do="Give 1 or more.")


def stop_strings(stop: str | Sequence[str]) -> list[str]:
    """One string, or several, as a list."""
    return [stop] if isinstance(stop, str) else list(stop)
