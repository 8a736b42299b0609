"""From token ids to pieces of text, as they come: no incomplete characters, no part of a stop string, never an exception.

A piece ends with a complete character. The bytes of a character that is not complete yet are held back, and so is text that
may turn out to be the beginning of a stop string; `finish` returns what is still held back at the end. Bytes that do not
make a character are shown as U+FFFD, one for each ill-formed sequence, as soon as that is certain; what came before them
stays.

How a token becomes text:

* a token of a byte-level tokenizer, or a byte token ``<0xE2>`` of one with byte fallback, is bytes, which go to a UTF-8
  decoder one after the other;
* any other token is the text that it has after another token, because sentencepiece tokenizers write a token differently at
  the beginning of a text.
"""

import codecs
import json
from collections.abc import Sequence

from tokenizers import Tokenizer

from bitdistill.text_tokens import BYTE_TOKEN


class TextStream:
    """The text of one answer.

    Args:
        tokenizer: of the ids.
        prompt_ids: what the answer continues.
        stop: strings that end the answer; they are not part of it.

    Attributes:
        stopped: a stop string came; nothing more is to be fed.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()):
        self.stopped = False
        self._tokenizer = tokenizer
        decoders = _decoders(tokenizer)
        self._byte_level, self._byte_fallback = "ByteLevel" in decoders, "ByteFallback" in decoders
        special = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._special = {i for i, text in special.items() if not (self._byte_fallback and BYTE_TOKEN.fullmatch(text))}
        self._stop = [word for word in stop if word]
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # The last token that is no special one: the next one is read after it.
        self._before = next((token for token in reversed(prompt_ids) if token not in self._special), None)
        self._text, self._emitted = "", 0  # the answer so far, and how many of its characters went out

    def feed(self, token: int) -> str:
        """The text that is certain now; often none."""
        assert not self.stopped
        self._add(self._read(token))
        return self._emit(len(self._text) - (0 if self.stopped else self._may_begin_stop()))

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        if not self.stopped:
            self._add(self._utf8.decode(b"", final=True))
        return self._emit(len(self._text))

    def _add(self, text: str) -> None:
        self._text += text
        # A stop string that began earlier would have held its beginning back.
        found = [place for word in self._stop if (place := self._text.find(word, self._emitted)) >= 0]
        if found:
            self.stopped = True
            self._text = self._text[: min(found)]

    def _read(self, token: int) -> str:
        """The characters that a token completes."""
        if token in self._special:
            return ""
        name = self._tokenizer.id_to_token(token)
        if name is None:  # a row of the embedding that the tokenizer has no token for
            return ""
        if self._byte_level:
            return self._utf8.decode(_byte_level(name))
        byte = BYTE_TOKEN.fullmatch(name) if self._byte_fallback else None
        if byte:
            text = self._utf8.decode(bytes.fromhex(byte[1]))
        else:
            text = self._utf8.decode(b"", final=True)  # what is incomplete will not be completed
            self._utf8.reset()
            text += self._after_another(token)
        self._before = token
        return text

    def _after_another(self, token: int) -> str:
        decode = self._tokenizer.decode
        if self._before is None:
            return decode([token])
        return decode([self._before, token])[len(decode([self._before])) :]

    def _emit(self, end: int) -> str:
        piece = self._text[self._emitted : end]
        self._emitted += len(piece)
        return piece

    def _may_begin_stop(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        lengths = [size for word in self._stop for size in range(1, len(word)) if self._text.endswith(word[:size])]
        return max(lengths, default=0)


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes that a token stands for; those of a byte-level or byte token may be a part of a character.

    Args:
        tokenizer: of the id. token: the id.
    """
    name = tokenizer.id_to_token(token)
    if name is None:
        return b""
    if "ByteLevel" in _decoders(tokenizer):
        return _byte_level(name)
    if byte := BYTE_TOKEN.fullmatch(name):
        return bytes.fromhex(byte[1])
    return name.replace("\u2581", " ").encode()


def _decoders(tokenizer: Tokenizer) -> set[str]:
    """The kinds of decoder that a tokenizer goes through."""
    if tokenizer.decoder is None:
        return set()
    content = json.loads(tokenizer.decoder.__getstate__())
    return {part["type"] for part in content.get("decoders", [content])}


def _byte_level(name: str) -> bytes:
    """The bytes that a byte-level token's visible letters stand for; a token of other letters is its own text."""
    try:
        return bytes(map(_LETTERS.__getitem__, name))
    except KeyError:
        return name.encode("utf-8")


def _letters() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 letters stand for themselves, other bytes for the letters from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


_LETTERS = _letters()
