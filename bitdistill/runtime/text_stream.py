"""Token ids -> pieces of text, as they come: no torn characters, no part of a stop string.

A piece ends with a whole character: bytes of a character that is not complete yet are held back, and so is text that may
turn out to be the beginning of a stop string. `finish` gives what was held back at the end; bytes that never became a
character read as U+FFFD there.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one answer.

    Args:
        tokenizer: of the ids.
        prompt_ids: what the answer continues: some tokenizers write a token differently at the beginning of a text.
        stop: strings that end the answer; they are not part of it.

    Attributes:
        stopped: a stop string came; nothing more is to be fed.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()):
        self.stopped = False
        self._tokenizer, self._prompt_ids = tokenizer, list(prompt_ids)
        self._stop = [word for word in stop if word]
        self._decoder = DecodeStream(ids=self._prompt_ids, skip_special_tokens=True)
        self._new_ids: list[int] = []
        self._text, self._emitted = "", 0  # the answer so far, and how many of its characters went out

    def feed(self, token: int) -> str:
        """The text that is certain now; often none."""
        assert not self.stopped
        self._new_ids.append(token)
        self._text += self._decoder.step(self._tokenizer, token) or ""
        # A stop string that began earlier would have held its beginning back.
        found = [place for word in self._stop if (place := self._text.find(word, self._emitted)) >= 0]
        if found:
            self.stopped = True
            self._text = self._text[: min(found)]
        return self._emit(len(self._text) - (0 if found else self._may_begin_stop()))

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        if not self.stopped:
            decode = self._tokenizer.decode
            whole = decode(self._prompt_ids + self._new_ids)[len(decode(self._prompt_ids)) :]
            self._text = whole if whole.startswith(self._text) else self._text
        return self._emit(len(self._text))

    def _emit(self, end: int) -> str:
        piece = self._text[self._emitted : end]
        self._emitted += len(piece)
        return piece

    def _may_begin_stop(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        lengths = [size for word in self._stop for size in range(1, len(word)) if self._text.endswith(word[:size])]
        return max(lengths, default=0)
