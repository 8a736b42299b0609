"""Turns a checked request into jobs of the engine, and their events into an answer."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from bitdistill.errors import UserError
from bitdistill.prompts import label_tokens
from bitdistill.runtime.conversation import conversation_ids
from bitdistill.runtime.cpu import Runtime
from bitdistill.runtime.labels import label_requests, label_tree
from bitdistill.runtime.predict import Prediction, answer_text, label_prediction, needed_task, row_texts, task_prompts
from bitdistill.runtime.sampling import Sampling
from bitdistill.runtime.text_stream import TextStream
from bitdistill.serving.engine import End, Engine, EngineStopped, Job, Piece, QueueFull, Recorder
from bitdistill.serving.limits import Limits
from bitdistill.serving.metrics import Metrics
from bitdistill.serving.protocol import ApiError, ChatRequest, PredictRequest, TextRequest


class Service:
    """What the server does with its one student.

    Args:
        runtime: the student. name: the name by which clients ask for it.
        limits: the limits of the server.
    """

    def __init__(self, runtime: Runtime, name: str, limits: Limits):
        self.runtime, self.name, self.limits = runtime, name, limits
        self.engine = Engine(runtime, limits.slots, limits.max_queue)
        self.metrics = Metrics(lambda: self.engine.running, lambda: self.engine.waiting)
        self.engine.on_end = self._count
        self.created = int(time.time())

    def facts(self) -> dict[str, Any]:
        """What the page needs to know."""
        task, header = self.runtime.task, self.runtime.header
        about = None
        if task is not None:
            about = {"name": task.name, "kind": task.kind, "columns": task.columns, "labels": task.words}
        chat = bool(header.tokenizer.get("chat_template"))
        return {"model": self.name, "base": header.base, "task": about, "chat": chat, "context": self.runtime.context}

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def chat_jobs(self, request: ChatRequest) -> list[Job]:
        """The sequences of a chat completion."""
        ids = conversation_ids(self.runtime, [message.plain() for message in request.messages])
        wanted = request.max_completion_tokens or request.max_tokens
        return self._jobs([ids], request, wanted or min(self.limits.max_new_tokens, max(self._room(ids), 1)))

    def text_jobs(self, request: TextRequest) -> list[Job]:
        """The sequences of a text completion."""
        prompts = [self.runtime.encode(one) if isinstance(one, str) else one for one in request.prompts()]
        if not prompts:
            raise ApiError(400, "Give at least one prompt.", "invalid_value", "prompt")
        return self._jobs(prompts, request, request.max_tokens or 16)

    def _room(self, ids: Sequence[int]) -> int:
        return self.runtime.context - len(ids)

    def _jobs(self, prompts: list, request: ChatRequest | TextRequest, max_new_tokens: int) -> list[Job]:
        if request.model not in (None, self.name):
            raise ApiError(404, f"The model here is {self.name!r}.", "model_not_found", "model")
        if max_new_tokens > self.limits.max_new_tokens:
            message = f"An answer here has at most {self.limits.max_new_tokens:,} tokens."
            raise ApiError(400, message, "invalid_value", "max_tokens")
        for ids in prompts:
            if self._room(ids) < 1:
                message = f"The context here is {self.runtime.context:,} tokens; the prompt has {len(ids):,}."
                param = "messages" if isinstance(request, ChatRequest) else "prompt"
                raise ApiError(400, message, "context_length_exceeded", param)
        sampling = self._sampling(request)
        count = len(prompts) * request.n
        if count > self.limits.slots + self.limits.max_queue:
            raise ApiError(400, f"{count} answers in one request are too many here.", "invalid_value", "n")
        top, deadline, jobs = request.recorded(), self._deadline(), []
        for ids in prompts:
            for _ in range(request.n):
                jobs.append(self._job(ids, max_new_tokens, sampling, request.stops(), top, deadline))
                jobs[-1].streamed = request.stream
                sampling = Sampling(**{**vars(sampling), "seed": sampling.seed + 1})
        return jobs

    def _sampling(self, request: ChatRequest | TextRequest) -> Sampling:
        given: dict[str, Any] = request.sampling()
        seed = secrets.randbits(32) if request.seed is None else request.seed % (1 << 63)
        drawn = {"top_k", "top_p", "min_p"} & given.keys()
        if drawn and "temperature" not in {**self.runtime.header.generation, **given}:
            given["temperature"] = 1.0  # OpenAI's default, which these settings are meant for
        return self.runtime.header.sampling(**given, seed=seed)

    def _job(self, ids, max_new_tokens: int, sampling: Sampling, stop, top: int | None, deadline: float) -> Job:
        request = self.runtime.new_request(ids, max_new_tokens, sampling)
        recorder = None
        if top is not None:
            recorder = Recorder(request.sampler, top)
            request.sampler = recorder
        assert self.runtime.tokenizer is not None, "checked when the server starts"
        stream = TextStream(self.runtime.tokenizer, request.ids, stop)
        return Job([request], deadline, stream, recorder)

    def _deadline(self) -> float:
        return time.monotonic() + self.limits.request_seconds

    # --- answers ------------------------------------------------------------------------------------------------------

    def begin(self, jobs: Sequence[Job]) -> None:
        """Puts jobs into the queue. Raises: ApiError: it is full (429), or the server shuts down (503)."""
        try:
            self.engine.submit(jobs)
        except QueueFull:
            raise ApiError(429, "Too many requests wait here. Try again in a moment.", "queue_full") from None
        except EngineStopped:
            raise ApiError(503, "The server is shutting down.", "shutting_down") from None

    async def whole(self, job: Job) -> tuple[list[Piece], End]:
        """All pieces of a job, and its `End`."""
        pieces: list[Piece] = []
        async for event in self.events(job):
            if isinstance(event, End):
                return [*pieces, *event.pieces], event
            pieces += event
        raise AssertionError("a job ends with its end")

    async def events(self, job: Job) -> AsyncIterator[list[Piece] | End]:
        """A job's events. Raises: ApiError: the decoder has failed (503)."""
        try:
            async for event in job.pieces():
                yield event
        except EngineStopped:
            raise ApiError(503, "The server has stopped.", "stopped") from None

    def _count(self, job: Job, why: str) -> None:
        """What a job has cost, also when nobody waits for its answer any more; times are those of whole answers."""
        request, metrics, asked = job.request, self.metrics, job.deadline - self.limits.request_seconds
        metrics.prompt_tokens.inc(request.prompt_tokens)
        metrics.cached_tokens.inc(request.cached_tokens)
        metrics.new_tokens.inc(request.new_tokens)
        if why == "cancelled":
            return
        metrics.seconds.observe(time.monotonic() - asked)
        if job.started is not None:
            metrics.first_token.observe(job.started - asked)

    async def predict(self, request: PredictRequest) -> list[Prediction]:
        """The answers to rows of the task.

        Raises:
            ApiError: there are too many rows, or the time is over.
            UserError: as `Runtime.predict`.
        """
        if len(request.rows) > self.limits.max_rows:
            raise ApiError(400, f"A request has at most {self.limits.max_rows} rows.", "invalid_value", "rows")
        task = needed_task(self.runtime)
        if request.max_new_tokens is not None and request.max_new_tokens > self.limits.max_new_tokens:
            message = f"An answer here has at most {self.limits.max_new_tokens:,} tokens."
            raise ApiError(400, message, "invalid_value", "max_new_tokens")
        places = [f"row {number}" for number in range(1, len(request.rows) + 1)]
        texts = [row_texts(task, row, place, "rows") for row, place in zip(request.rows, places, strict=True)]
        prompts, cut = await asyncio.to_thread(task_prompts, self.runtime, texts, places, request.max_new_tokens)
        deadline, found = self._deadline(), []
        # No more at a time than have slots, so that one long request leaves the queue to others.
        together = asyncio.Semaphore(self.limits.slots)

        async def one(row: int) -> Prediction:
            async with together:
                if task.kind == "classification":
                    return await self._label(row, prompts[row], cut[row], deadline)
                wanted = request.max_new_tokens or task.max_new_tokens
                return await self._text(row, prompts[row], cut[row], wanted, deadline)

        async with asyncio.TaskGroup() as group:
            found = [group.create_task(one(row)) for row in range(len(prompts))]
        self.metrics.predicted_rows.inc(len(found))
        return [task.result() for task in found]

    async def _label(self, row: int, ids: list[int], cut: bool, deadline: float) -> Prediction:
        task = needed_task(self.runtime)
        labels = label_tokens(task, self.runtime.packed_tokenizer)
        likelihoods = np.zeros(len(labels))
        job = Job(label_requests(row, ids, label_tree(labels), likelihoods), deadline)
        await self._finished(job)
        return Prediction(row + 1, **label_prediction(task, likelihoods), truncated=cut)

    async def _text(self, row: int, ids: list[int], cut: bool, wanted: int, deadline: float) -> Prediction:
        job = self._job(ids, wanted, Sampling(), (), None, deadline)
        end = await self._finished(job)
        request = job.request
        text = answer_text(self.runtime, request.ids[request.prompt_tokens :])
        return Prediction(row + 1, text=text, stopped_by=end.stopped_by, truncated=cut)

    async def _finished(self, job: Job) -> End:
        self.begin([job])
        try:
            _, end = await self.whole(job)
        finally:
            self.engine.cancel([job])
        if end.stopped_by == "time":
            raise ApiError(504, "The time of the request is over.", "timeout")
        return end


async def unless_gone(work: Awaitable[Any], gone: Callable[[], Awaitable[None]]) -> Any | None:
    """The result of `work`, or None when the client leaves before it is there; `work` is then cancelled.

    Args:
        work: computes the answer. gone: returns when the client has left.
    """
    answer, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
        return await answer if answer.done() else None
    finally:
        for task in (answer, leaving):
            task.cancel()
        await asyncio.gather(answer, leaving, return_exceptions=True)


def as_api_error(error: BaseException) -> ApiError | None:
    """The answer to a mistake of the client; None for a defect of the server."""
    if isinstance(error, ExceptionGroup):
        return as_api_error(error.exceptions[0])
    if isinstance(error, UserError):
        return ApiError(400, str(error), "invalid_value", error.field)
    return error if isinstance(error, ApiError) else None
