"""One thread that runs the decoder for all clients: their sequences share its steps, as in `runtime/batching.py`.

Coroutines submit jobs to it and receive events: lists of `Piece`, one for each token, then an `End`. The event loop runs on the
cores that the decoder needs, and while it writes to a client all threads of the decoder wait at their next barrier. So all
events of a step are passed to it in one call; streams get what came in the last STREAM_SECONDS together, all of them after the
same step; and an answer that is not streamed is passed on as a whole.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from bitdistill.runtime.batching import Batch, Chooser, Request
from bitdistill.runtime.cpu import Runtime
from bitdistill.runtime.sampling import log_softmax
from bitdistill.runtime.text_stream import TextStream

STREAM_SECONDS = 1 / 30  # nobody reads faster than this; the first token and the end do not wait


class QueueFull(Exception):
    """More sequences wait than the server allows."""


class EngineStopped(Exception):
    """The server is shutting down, or its decoder has failed."""


@dataclass(frozen=True)
class TokenLogprobs:
    """A chosen token's log-probability before sampling settings, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """What one token adds to an answer: text, which may be empty, and log-probabilities where they were asked for."""

    text: str
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class End:
    """The last event of a job: why it ended, and what was still held back.

    Args:
        stopped_by: as in `Answer`, or "scored", "time", "cancelled". pieces: they come before the end.
    """

    stopped_by: str
    pieces: Sequence[Piece] = ()


@dataclass(eq=False)
class Job:
    """One sequence that a client asked for, or one prompt whose labels are compared.

    Args:
        requests: the first begins; the others, if there are any, continue it when it has ended.
        stream: turns its tokens into text; None for labels.
        recorder: keeps its log-probabilities, or None.
        streamed: whether somebody reads its pieces before its end.
        deadline: the value of `time.monotonic` at which it is ended.
        events: what the engine reports, until `pieces` takes it.
        held: what it reports next.
        started: when its first token came, for the metrics.
        ended: whether it has ended. left: how many of its requests have not ended.
    """

    requests: list[Request]
    deadline: float
    stream: TextStream | None = None
    recorder: "Recorder | None" = None
    streamed: bool = False
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    held: list[Piece] = field(default_factory=list)
    started: float | None = None  # of its first token, for the metrics
    ended: bool = False
    left: int = 0  # requests that have not ended

    @property
    def request(self) -> Request:
        return self.requests[0]

    def take(self) -> list[Piece]:
        """What was held back; nothing is then."""
        held, self.held = self.held, []
        return held

    async def pieces(self) -> AsyncIterator[list[Piece] | End]:
        """The events of the job; the last one is its `End`.

        Raises:
            EngineStopped: the decoder has failed.
        """
        while True:
            event = await self.events.get()
            if event is None:
                raise EngineStopped
            yield event
            if isinstance(event, End):
                return


class Recorder:
    """A sampler that also keeps the log-probabilities of the tokens that it chose: of several in a step, where drafts are used.

    Args:
        sampler: chooses the tokens. top: how many of the likeliest tokens to record for each.
    """

    def __init__(self, sampler: Chooser, top: int):
        self._sampler, self._top = sampler, top
        self._found: deque[TokenLogprobs] = deque()

    def choose(self, logits: np.ndarray) -> int | None:
        """The token that its sampler chooses."""
        log_p = log_softmax(logits)
        token = self._sampler.choose(logits)
        if token is None:
            return None
        best = np.argpartition(-log_p, min(self._top, len(log_p) - 1))[: self._top]
        best = best[np.argsort(-log_p[best], kind="stable")]
        self._found.append(TokenLogprobs(token, float(log_p[token]), [(int(i), float(log_p[i])) for i in best]))
        return token

    def take(self) -> TokenLogprobs:
        """Those of the first token that was not taken yet."""
        return self._found.popleft()


class Engine:
    """The thread that owns the decoder.

    Args:
        runtime: from now on only this thread uses it.
        slots: how many sequences are computed at once. max_queue: how many may wait.

    Attributes:
        stats: counts of everything done so far (`batching.Stats`).
        on_failure: called by the thread when it ends because of a defect.
        on_end: called in the event loop with each job that ends, also with one whose client has left, and why it ended.
    """

    def __init__(self, runtime: Runtime, slots: int, max_queue: int):
        self.runtime, self.slots, self.max_queue = runtime, slots, max_queue
        self._batch: Batch = runtime.new_batch(slots)
        self.stats = self._batch.stats
        self._change = threading.Condition()
        self._incoming: list[Job] = []
        self._cancelled: list[Job] = []
        self._jobs: dict[Request, Job] = {}
        self._stopping = self._failed = self._hurried = False
        self.on_failure: Callable[[], None] = lambda: None
        self.on_end: Callable[[Job, str], None] = lambda job, why: None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._due = 0.0  # from then on the next step passes on what streams hold
        self._thread = threading.Thread(target=self._run, name="bitdistill-engine", daemon=True)

    # --- for coroutines -----------------------------------------------------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the thread. Args: loop: the event loop of the coroutines that wait for events."""
        self._loop = loop
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine still accepts jobs."""
        return self._thread.is_alive() and not (self._stopping or self._hurried)

    @property
    def failed(self) -> bool:
        """Whether the thread has ended because of a defect, which it has printed."""
        return self._failed

    @property
    def running(self) -> int:
        """Sequences in slots."""
        return len(self._batch.active)

    @property
    def waiting(self) -> int:
        """Sequences that wait for a slot."""
        return len(self._batch.waiting) + len(self._incoming)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Puts all of these jobs into the queue, or none of them.

        Raises:
            QueueFull: there is no room for all of them. EngineStopped: the engine accepts no more jobs.
        """
        with self._change:
            if not self.alive:
                raise EngineStopped
            free = self.slots - self.running
            if self.waiting + len(jobs) > self.max_queue + free:
                raise QueueFull
            self._incoming += jobs
            self._change.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Ends jobs whose client has left; nothing happens to jobs that have already ended."""
        with self._change:
            self._cancelled += [job for job in jobs if not job.ended]
            self._change.notify()

    def hurry(self) -> None:
        """Accepts no more jobs, and ends all others as if their time were over: their clients get what there is."""
        with self._change:
            self._hurried = True
            self._change.notify()

    def stop(self) -> None:
        """Accepts no more jobs, ends the running ones, and waits for the thread to end."""
        with self._change:
            self._stopping = True
            self._change.notify()
        if self._thread.ident is not None:
            self._thread.join()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take():
                events = self._overdue(time.monotonic())
                found = [self._event(request, token) for request, token in self._batch.step()]
                self._hand_over(
                    events + [event for event in found if event is not None] + self._streams(time.monotonic())
                )
        finally:  # also when the decoder fails: nobody shall wait for ever
            self._failed = not self._stopping
            self._stopping = True
            self._batch.close()
            with self._change:
                left = {*self._jobs.values(), *self._incoming}
                self._jobs.clear()
                self._incoming.clear()
            self._hand_over([(job, None) for job in left])
            if self._failed:
                self.on_failure()

    def _take(self) -> bool:
        """Waits for jobs and moves them into the batch. Returns False when the thread is to stop."""
        with self._change:
            while not (self._incoming or self._cancelled or self._batch or self._stopping):
                self._change.wait()
            if self._stopping:
                return False
            incoming, self._incoming = self._incoming, []
            cancelled, self._cancelled = self._cancelled, []
            for job in incoming:
                job.left = len(job.requests)
                self._jobs[job.request] = job
                self._batch.waiting.append(job.request)
        self._hand_over([event for job in cancelled for event in self._end(job, "cancelled")])
        return True

    def _overdue(self, now: float) -> list:
        late = {job for job in self._jobs.values() if self._hurried or now > job.deadline}
        return [event for job in late for event in self._end(job, "time")]

    def _end(self, job: Job, why: str) -> list:
        """Ends a job early: at once if it is waiting, else at the next step."""
        if job.ended:
            return []
        job.left = 0
        running = False
        for request in [request for request, owner in self._jobs.items() if owner is job]:
            if request in self._batch.active:
                request.stopped_by, running = why, True
            else:
                if request in self._batch.waiting:
                    self._batch.waiting.remove(request)
                del self._jobs[request]
        if running:
            return []
        job.ended = True
        return [(job, End(why))]

    def _event(self, request: Request, token: int | None) -> tuple[Job, list[Piece] | End] | None:
        """What is to be passed on now after a token, or after the end of a request."""
        job = self._jobs[request]
        if token is None:
            end = self._request_ended(job, request)
            return None if end is None else (job, end)
        text = job.stream.feed(token) if job.stream else ""
        if job.stream and job.stream.stopped:
            request.stopped_by = "stop"
        job.held.append(Piece(text, job.recorder.take() if job.recorder else None))
        if job.started is not None:
            return None
        job.started = time.monotonic()
        return (job, job.take()) if job.streamed else None

    def _streams(self, now: float) -> list[tuple[Job, list[Piece]]]:
        """What all streams hold, if it is time."""
        if now < self._due:
            return []
        self._due = now + STREAM_SECONDS
        return [(job, job.take()) for job in self._jobs.values() if job.streamed and job.held]

    def _request_ended(self, job: Job, request: Request) -> End | None:
        del self._jobs[request]
        if request is job.request and request.stopped_by == "scored":
            for following in reversed(job.requests[1:]):
                self._jobs[following] = job
                self._batch.waiting.appendleft(following)
        job.left -= 1
        if job.left > 0:
            return None
        job.ended = True
        return End(request.stopped_by)

    def _hand_over(self, events: list) -> None:
        loop = self._loop
        if not events or loop is None or loop.is_closed():
            return
        loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: list) -> None:
        for job, event in events:
            if isinstance(event, End):
                self.on_end(job, event.stopped_by)
                last = job.take()
                if job.stream is not None and (rest := job.stream.finish()):
                    last.append(Piece(rest))
                event = End(event.stopped_by, last)
            job.events.put_nowait(event)
