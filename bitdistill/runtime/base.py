"""What the CPU runtime and the GPU runtime share: from text to tokens, checks of a prompt, and an answer as pieces of text."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import cached_property

import numpy as np
from tokenizers import Tokenizer

from bitdistill import prompts
from bitdistill.errors import UserError
from bitdistill.prompts import Task
from bitdistill.runtime.batching import Stats
from bitdistill.runtime.chat_template import PackedTokenizer
from bitdistill.runtime.header import Header, read_header
from bitdistill.runtime.packed_file import PackedModel
from bitdistill.runtime.sampling import Sampling
from bitdistill.runtime.text_stream import TextStream
from bitdistill.text_tokens import TextTokens, tokenizer_of

# Positions of a KV cache at least. With few sizes, growing copies seldom, and a GPU captures few graphs.
MIN_CAPACITY = 256


class BaseRuntime:
    """The part of a runtime that does not depend on where it computes.

    Attributes:
        model: the open file. context: the most positions of a sequence.
        stats: what the last call that generated did.
    """

    model: PackedModel
    context: int
    stats: Stats

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """`tokenizers.Tokenizer`, or None when the file has none. Read when it is first asked for.

        Raises:
            UserError: the file's tokenizer cannot be read.
        """
        text = self.model.tokenizer_json()
        return tokenizer_of(text, str(self.model.path)) if text else None

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

    def generate_ids(
        self, prompt_ids: Sequence[int], max_new_tokens: int = 128, sampling: Sampling | None = None
    ) -> Generator[int, None, None]:
        """Continues a prompt, token by token; an end-of-text token ends it and is not yielded.

        Args:
            prompt_ids: token ids.
            max_new_tokens: upper bound; the context is another (then `stats.stopped_by` is "context").
            sampling: how tokens are chosen; greedy by default.

        Raises:
            UserError: a prompt longer than the context, or settings out of range.
        """
        raise NotImplementedError

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """As `generate_ids`, in pieces of text: whole characters, nothing of a stop string (see text_stream.py).

        Args:
            prompt: text (`encode`d as in training) or token ids.
            stop: a string, or several, that end the answer; they are not part of it.
            max_new_tokens, sampling: as in `generate_ids`.

        Raises:
            UserError: as `generate_ids`, or the file has no tokenizer.
        """
        tokenizer, ids = self._needed_tokenizer(), self._encoded(prompt)
        stream = TextStream(tokenizer, ids, stop_strings(stop))
        stats = None
        with closing(self.generate_ids(ids, max_new_tokens, sampling)) as tokens:
            for token in tokens:
                stats = stats or self.stats  # this call's own: another may begin before this one has ended
                if piece := stream.feed(token):
                    yield piece
                if stream.stopped:
                    break
        if stream.stopped and stats is not None:
            stats.stopped_by = "stop"
        if piece := stream.finish():
            yield piece

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


def cache_capacity(positions: int, context: int) -> int:
    """Positions that a KV cache gets room for: a power of two of MIN_CAPACITY or more, but no more than the context."""
    return min(context, max(MIN_CAPACITY, 1 << (positions - 1).bit_length()))


def check_new_tokens(max_new_tokens: int) -> None:
    """Raises UserError for less than one new token."""
    if max_new_tokens < 1:
        raise UserError("max_new_tokens", expected="at least 1", got=str(max_new_tokens), do="Give 1 or more.")


def stop_strings(stop: str | Sequence[str]) -> list[str]:
    """One string, or several, as a list."""
    return [stop] if isinstance(stop, str) else list(stop)
