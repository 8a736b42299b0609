"""What clients get: completions in OpenAI's form, whole or streamed in pieces."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from bitdistill.runtime.text_stream import token_bytes
from bitdistill.serving.engine import End, Job, Piece, TokenLogprobs

FINISHED = {"eos": "stop", "stop": "stop", "length": "length", "context": "length", "time": "length"}


def usage(jobs: Sequence[Job], prompts: int) -> dict[str, Any]:
    """How many tokens a request had and got, in OpenAI's form.

    Args:
        jobs: its sequences. prompts: how many different prompts they have; a prompt with several answers counts once.
    """
    once = jobs[:: max(len(jobs) // prompts, 1)]
    read, written = sum(job.request.prompt_tokens for job in once), sum(job.request.new_tokens for job in jobs)
    cached = sum(job.request.cached_tokens for job in once)
    details = {"prompt_tokens_details": {"cached_tokens": cached}}
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written} | details


@dataclass
class Chat:
    """Builds the answers of /v1/chat/completions.

    Args:
        model: its name. tokenizer: gives the texts of tokens for log-probabilities.
        kind, prefix: the type of the answer, and how its id begins. created, id: when it was begun, and its own name.
    """

    model: str
    tokenizer: Tokenizer
    kind: str = "chat.completion"
    prefix: str = "chatcmpl"
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def head(self, streamed: bool) -> dict[str, Any]:
        """The fields that every answer and every piece has in common."""
        kind = f"{self.kind}.chunk" if streamed and self.prefix == "chatcmpl" else self.kind
        return {"id": f"{self.prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def first(self, index: int) -> dict[str, Any] | None:
        """The `choices` entry of the piece that comes before the first token."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def pieces(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The `choices` entry of pieces that are sent together."""
        delta = {"content": "".join(piece.text for piece in pieces)}
        return {"index": index, "delta": delta, "logprobs": self.logprobs(index, pieces), "finish_reason": None}

    def last(self, index: int, end: End) -> dict[str, Any]:
        """The `choices` entry of the last piece."""
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": FINISHED[end.stopped_by]}

    def whole(self, index: int, pieces: Sequence[Piece], end: End) -> dict[str, Any]:
        """The `choices` entry of a whole answer."""
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
        reason = FINISHED[end.stopped_by]
        return {"index": index, "message": message, "logprobs": self.logprobs(index, pieces), "finish_reason": reason}

    def logprobs(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        """Log-probabilities of the tokens of some pieces; None where none were asked for."""
        known = [piece.logprobs for piece in pieces if piece.logprobs is not None]
        if not known:
            return None
        return {"content": [self._entry(one) for one in known], "refusal": None}

    def _entry(self, one: TokenLogprobs) -> dict[str, Any]:
        top = [self._token(token, logprob) for token, logprob in one.top]
        return self._token(one.token, one.logprob) | {"top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(self.tokenizer, token)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}


@dataclass
class Text(Chat):
    """Builds the answers of /v1/completions.

    Args:
        kind, prefix: as in `Chat`. offsets: characters of each answer so far.
    """

    kind: str = "text_completion"
    prefix: str = "cmpl"
    offsets: dict[int, int] = field(default_factory=dict)

    def first(self, index: int) -> dict[str, Any] | None:
        """None: text completions have no piece before the first token."""
        return None

    def pieces(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The `choices` entry of pieces that are sent together."""
        text = "".join(piece.text for piece in pieces)
        return {"index": index, "text": text, "logprobs": self.logprobs(index, pieces), "finish_reason": None}

    def last(self, index: int, end: End) -> dict[str, Any]:
        """The `choices` entry of the last piece."""
        return {"index": index, "text": "", "logprobs": None, "finish_reason": FINISHED[end.stopped_by]}

    def whole(self, index: int, pieces: Sequence[Piece], end: End) -> dict[str, Any]:
        """The `choices` entry of a whole answer."""
        text = "".join(piece.text for piece in pieces)
        reason = FINISHED[end.stopped_by]
        return {"index": index, "text": text, "logprobs": self.logprobs(index, pieces), "finish_reason": reason}

    def logprobs(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        """Log-probabilities of the tokens of some pieces; None where none were asked for."""
        known = [piece.logprobs for piece in pieces if piece.logprobs is not None]
        if not known:
            return None
        tops = [{self._name(token): logprob for token, logprob in one.top} for one in known]
        offsets, at = [], self.offsets.get(index, 0)
        for piece in pieces:
            if piece.logprobs is not None:
                offsets.append(at)
            at += len(piece.text)
        self.offsets[index] = at
        tokens = [self._name(one.token) for one in known]
        values = [one.logprob for one in known]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _name(self, token: int) -> str:
        return token_bytes(self.tokenizer, token).decode(errors="replace")
