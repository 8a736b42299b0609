"""Continuous batching: many sequences, one step of the decoder at a time.

A step computes the last token of every sequence that is being continued, and then pieces of prompts, up to ROWS_PER_STEP
rows. When a sequence ends, the next one in the queue takes its slot. A single sequence goes through the same loop.

A prompt whose next token is only looked at (`labels.py`) is a request like any other: its `Chooser` chooses nothing.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from bitdistill.runtime.drafts import Drafts
from bitdistill.runtime.slots import Slots, common_prefix

ROWS_PER_STEP = 256  # a prompt's piece: large enough for full speed, small enough that others need not wait long
DRAFT_ROWS = 16  # of a step, drafts included: so many cost little more than half as many (docs/log.md)
WORTH_WAITING = 16  # shared tokens for which a prompt waits until another, being computed now, can lend them


class Chooser(Protocol):
    """What a request does with logits, such as `sampling.Sampler`."""

    def choose(self, logits: np.ndarray) -> int | None:
        """The next token after float32 (V,), which the next step overwrites; None ends the request as "scored"."""
        ...


@dataclass(eq=False)
class Request:
    """A sequence on its way. `ids` is the prompt and the answer so far."""

    index: int
    ids: list[int]
    max_new_tokens: int
    sampler: Chooser
    prompt_tokens: int = 0
    cached_tokens: int = 0
    slot: int = -1
    stopped_by: str = ""
    drafts: Drafts | None = None  # what it looks up beside its newest token
    drafted: list[int] = field(default_factory=list)  # what the step now being done computes of that

    @property
    def new_tokens(self) -> int:
        return len(self.ids) - self.prompt_tokens


@dataclass
class Stats:
    """What a call that generated or classified did. A step that computes tokens of a prompt counts as prompt time."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompts, found in the KV cache
    new_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0  # of the other steps, choosing of tokens included
    decode_steps: int = 0
    decoded_tokens: int = 0  # that these steps gave: the first token of an answer comes out of its prompt
    kv_read_bytes: int = 0  # keys and values that these steps attended to
    kv_cache_bytes: int = 0  # memory of the KV cache, for all slots and their whole capacity
    weight_bytes: int = 0  # that a step reads, however many sequences share it
    resident_bytes: int = 0  # `Runtime.resident_bytes` at the end
    stopped_by: str = ""  # as in Answer, or "cancelled"; of several answers, the last one's

    @property
    def tokens_per_second(self) -> float:
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        return (self.prompt_tokens - self.cached_tokens) / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def read_bytes_per_token(self) -> float:
        return (self.weight_bytes * self.decode_steps + self.kv_read_bytes) / max(self.decoded_tokens, 1)


class Batch:
    """The requests that share the decoder's steps.

    Args:
        forward: ``(ids, slots, positions, cache, wanted) -> float32 (len(wanted), V)``, as `Decoder.forward`.
        slots: with room for all that run at once.
        together: so many at once.
        context: positions that a sequence may have.
        eos_token_ids: tokens that end a sequence and are not part of it.
        stats: counts what is done.

    Attributes:
        waiting: requests in the order in which they begin; the caller adds to it whenever it wants.
        active: those that have a slot.
    """

    def __init__(
        self,
        forward: Callable,
        slots: Slots,
        together: int,
        context: int,
        eos_token_ids: Sequence[int],
        stats: Stats,
    ):
        self.waiting: deque[Request] = deque()
        self.active: list[Request] = []
        self.stats = stats
        self._forward, self._slots, self._together = forward, slots, together
        self._context, self._eos = context, frozenset(eos_token_ids)

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.active)

    def step(self) -> Iterator[tuple[Request, int | None]]:
        """One step of the decoder: every new token as (request, token), and (request, None) when a request has ended; its
        `stopped_by` says why. Whoever iterates ends a request early by setting its `stopped_by`."""
        for request in [request for request in self.active if request.stopped_by]:
            yield self._leave(request)
        started = time.perf_counter()
        _admit(self.waiting, self.active, self._slots, self._together, self.stats)
        if not self.active:
            return
        prompt_rows, ready = _step(self._forward, self.active, self._slots, self._context)
        chosen = [(request, token) for request, rows in ready for token in _choose(request, rows, self._slots)]
        _count(self.stats, self._slots, prompt_rows, ready, len(chosen), time.perf_counter() - started)
        for request, token in chosen:
            if request.stopped_by:
                continue  # an earlier token of this step was the last one
            if token is None:
                request.stopped_by = "scored"
            elif token in self._eos:
                request.stopped_by = "eos"
            else:
                request.ids.append(token)
                self.stats.new_tokens += 1
                yield request, token
                if not request.stopped_by and request.new_tokens == request.max_new_tokens:
                    request.stopped_by = "length"
                if not request.stopped_by and len(request.ids) > self._context:
                    request.stopped_by = "context"
            if request.stopped_by:
                yield self._leave(request)

    def _leave(self, request: Request) -> tuple[Request, None]:
        self.active.remove(request)
        self._slots.give_back(request.slot)
        self.stats.stopped_by = request.stopped_by
        return request, None

    def close(self) -> None:
        """Gives up what has not ended; its slots are free then."""
        for request in self.active:
            self._slots.give_back(request.slot)
            self.stats.stopped_by = "cancelled"
        self.active.clear()
        self.waiting.clear()


def _admit(waiting: deque[Request], active: list[Request], slots: Slots, together: int, stats: Stats) -> None:
    """Moves requests from the queue into slots. One that shares its beginning with a prompt that is being computed waits
    until that is done, and copies it."""
    while waiting and len(active) < together:
        request = waiting[0]
        known = slots.shared(request.ids)
        if any(common_prefix(other.ids, request.ids) > known + WORTH_WAITING for other in active):
            return
        request.slot, request.cached_tokens = slots.take(request.ids), known
        stats.prompt_tokens += request.prompt_tokens
        stats.cached_tokens += known
        active.append(waiting.popleft())


def _step(
    forward: Callable, active: list[Request], slots: Slots, context: int
) -> tuple[int, list[tuple[Request, np.ndarray]]]:
    """One call of the decoder.

    Returns: how many rows were pieces of prompts; (request, logits (1 + drafted, V)) of those whose next token can be chosen
        now.
    """
    pending = [len(request.ids) - len(slots.ids[request.slot]) for request in active]
    room = max(ROWS_PER_STEP - pending.count(1), 1)
    longest_draft = DRAFT_ROWS // len(active) - 1
    ids, places, positions, pieces, ready, wanted = [], [], [], [], [], []
    for request, count in zip(active, pending, strict=True):
        first = len(slots.ids[request.slot])
        taken = 1 if count == 1 else min(count, room)
        room -= taken if count > 1 else 0
        pieces.append(request.ids[first : first + taken])
        request.drafted = []
        if request.drafts and count == 1 and request.new_tokens > 0:
            left = min(request.max_new_tokens - request.new_tokens - 1, context - len(request.ids), room)
            request.drafted = request.drafts.draft(request.ids, min(left, longest_draft))
            room -= len(request.drafted)
        rows = taken + len(request.drafted)
        ids += pieces[-1] + request.drafted
        places += [request.slot] * rows
        positions += range(first, first + rows)
        if taken == count:
            ready.append(request)
            wanted += range(len(ids) - len(request.drafted) - 1, len(ids))
    slots.reserve(max(positions) + 1)
    logits = forward(ids, places, positions, slots.cache, wanted)
    prompt_rows = 0
    for request, piece in zip(active, pieces, strict=True):
        slots.ids[request.slot] += piece
        prompt_rows += len(piece) if request.new_tokens == 0 else 0
    parts, row = [], 0
    for request in ready:
        parts.append((request, logits[row : row + 1 + len(request.drafted)]))
        row += 1 + len(request.drafted)
    return prompt_rows, parts


def _choose(request: Request, rows: np.ndarray, slots: Slots) -> list[int | None]:
    """The next token, and those after it as long as they are what was drafted: only then are the next rows theirs."""
    tokens = [request.sampler.choose(rows[0])]
    for drafted, logits in zip(request.drafted, rows[1:], strict=True):
        if tokens[-1] != drafted:
            break
        slots.ids[request.slot].append(drafted)
        tokens.append(request.sampler.choose(logits))
    return tokens


def _count(stats: Stats, slots: Slots, prompt_rows: int, ready: list, chosen: int, seconds: float) -> None:
    if prompt_rows:
        stats.prompt_seconds += seconds
    else:
        stats.decode_seconds += seconds
        stats.decode_steps += 1
        stats.decoded_tokens += chosen
        stats.kv_read_bytes += sum(slots.read_bytes(request.slot) for request, _ in ready)
    stats.kv_cache_bytes = slots.cache.nbytes
