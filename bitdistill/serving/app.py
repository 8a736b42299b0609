"""The routes of the server:

POST /v1/chat/completions  /v1/completions     OpenAI's, also streamed
GET  /v1/models                                the one model
POST /predict                                  rows of the student's task: labels with probabilities, or texts
GET  /info  /health  /metrics  /               facts for the page; whether the server works; numbers for Prometheus; the page
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from bitdistill.errors import UserError
from bitdistill.runtime.conversation import require_chat
from bitdistill.serving.answers import Chat, Text, usage
from bitdistill.serving.engine import End, Job, Piece
from bitdistill.serving.guards import Guard
from bitdistill.serving.protocol import ApiError, ChatRequest, PredictRequest, TextRequest
from bitdistill.serving.service import Service, as_api_error, unless_gone

PAGE = Path(__file__).parent / "page.html"
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'"
)
SHORT_BODY_BYTES = 1 << 13
CLIENT_LEFT = 499  # nobody reads it; the counters do


def create_app(service: Service, api_key: str | None, loopback: bool) -> FastAPI:
    """The application.

    Args:
        service: the student. api_key: what clients must send, or None.
        loopback: the server listens on this machine only. Requests must then name this machine as their host, so that a
            web page whose own name points to 127.0.0.1 cannot use the server.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.engine.start(asyncio.get_running_loop())
        try:
            yield
        finally:
            await asyncio.to_thread(service.engine.stop)

    app = FastAPI(title="BitDistill", docs_url=None, redoc_url=None, lifespan=lifespan)
    _add_completions(app, service)
    _add_facts(app, service)
    _add_errors(app)

    routes = {route.path for route in app.routes}  # type: ignore[attr-defined]

    def counted(path: str, status: int) -> None:
        service.metrics.requests.labels(path if path in routes else "other", str(status)).inc()

    app.add_middleware(Guard, api_key=api_key, limits=service.limits, counted=counted)  # type: ignore[arg-type]
    if loopback:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", "::1"])
    return app


def _add_completions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        require_chat(service.runtime)
        jobs = await _prepared(service.chat_jobs, body, request)
        return await _answered(service, request, body, jobs, Chat(service.name, _tokenizer(service)), 1)

    @app.post("/v1/completions")
    async def completions(body: TextRequest, request: Request) -> Response:
        jobs = await _prepared(service.text_jobs, body, request)
        return await _answered(
            service, request, body, jobs, Text(service.name, _tokenizer(service)), len(jobs) // body.n
        )

    @app.post("/predict")
    async def predict(body: PredictRequest, request: Request) -> Response:
        found = await unless_gone(service.predict(body), lambda: _gone(request.receive))
        if found is None:
            service.metrics.cancelled.inc()
            return Response(status_code=CLIENT_LEFT)
        return JSONResponse({"model": service.name, "predictions": [one.to_json() for one in found]})


async def _prepared(make: Callable[[Any], list[Job]], body: ChatRequest | TextRequest, request: Request) -> list[Job]:
    """The jobs of a request. Long texts are tokenized in a thread, so that nobody else waits; short ones before it had begun."""
    if len(await request.body()) <= SHORT_BODY_BYTES:
        return make(body)
    return await asyncio.to_thread(make, body)


def _tokenizer(service: Service):
    tokenizer = service.runtime.tokenizer
    assert tokenizer is not None, "checked when the server starts"
    return tokenizer


async def _gone(receive: Callable[[], Awaitable[MutableMapping[str, Any]]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answered(
    service: Service, request: Request, body: ChatRequest | TextRequest, jobs: list[Job], shape: Chat, prompts: int
) -> Response:
    service.begin(jobs)
    if body.stream:
        counted = body.stream_options is not None and body.stream_options.include_usage
        return _Stream(service, jobs, _streamed(service, jobs, shape, prompts if counted else 0))
    try:
        everything = asyncio.gather(*(service.whole(job) for job in jobs))
        found = await unless_gone(everything, lambda: _gone(request.receive))
    finally:
        service.engine.cancel(jobs)
    if found is None:
        service.metrics.cancelled.inc()
        return Response(status_code=CLIENT_LEFT)
    choices = [shape.whole(index, pieces, end) for index, (pieces, end) in enumerate(found)]
    return JSONResponse(shape.head(False) | {"choices": choices, "usage": usage(jobs, prompts)})


class _Stream(Response):
    """Server-sent events of jobs that are cancelled when the response ends, even if it never got to its first event: a client may
    leave before that, and a generator that was not begun has no end.

    What Starlette's StreamingResponse does in more tasks and writes. The head is sent together with the first event and the end
    together with the last: each write costs the event loop and the client about as much as all the rest of an event.
    """

    def __init__(self, service: Service, jobs: Sequence[Job], events: AsyncIterator[tuple[str, bool]]):
        self.service, self.jobs, self.events = service, jobs, events
        self.status_code, self.background = 200, None
        self.init_headers({"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"})

    async def __call__(self, scope, receive, send) -> None:
        try:
            await unless_gone(self._write(send), lambda: _gone(receive))
        finally:
            if any(not job.ended for job in self.jobs):
                self.service.metrics.cancelled.inc()
            self.service.engine.cancel(self.jobs)

    async def _write(self, send) -> None:
        begun = False
        async with contextlib.aclosing(self.events) as events:
            async for text, last in events:
                if not begun:
                    begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": text.encode(), "more_body": not last})


async def _streamed(
    service: Service, jobs: Sequence[Job], shape: Chat, prompts: int
) -> AsyncIterator[tuple[str, bool]]:
    """The server-sent events of some jobs, in the order in which they occur, and whether they are the last ones; with these the
    usage, if `prompts` is not 0."""
    head, running = shape.head(True), len(jobs)

    def chunk(choice: dict[str, Any]) -> str:
        return _event(head | {"choices": [choice]})

    for index in range(len(jobs)):
        if first := shape.first(index):
            yield chunk(first), False
    try:
        async with contextlib.aclosing(_merged(service, jobs)) as events:
            async for index, event in events:
                pieces, ended = (event.pieces, True) if isinstance(event, End) else (event, False)
                text = ""
                if any(piece.text or piece.logprobs is not None for piece in pieces):
                    text = chunk(shape.pieces(index, pieces))
                if ended:
                    text += chunk(shape.last(index, event))
                    running -= 1
                if running == 0:
                    if prompts:
                        text += _event(head | {"choices": [], "usage": usage(jobs, prompts)})
                    yield text + "data: [DONE]\n\n", True
                    return
                if text:
                    yield text, False
    except ApiError as error:
        yield _event(error.body()), True


async def _merged(service: Service, jobs: Sequence[Job]) -> AsyncIterator[tuple[int, list[Piece] | End]]:
    """Events of jobs with the job's number. Of one job they come directly: a task in between would cost as much as the event.

    Raises: ApiError: as `Service.events`.
    """
    if len(jobs) == 1:
        async for event in service.events(jobs[0]):
            yield 0, event
        return
    merged: asyncio.Queue = asyncio.Queue()
    readers = [asyncio.ensure_future(_read(service, index, job, merged)) for index, job in enumerate(jobs)]
    try:
        while True:
            index, event = await merged.get()
            if isinstance(event, ApiError):
                raise event
            yield index, event
    finally:
        for reader in readers:
            reader.cancel()


async def _read(service: Service, index: int, job: Job, merged: asyncio.Queue) -> None:
    try:
        async for event in service.events(job):
            merged.put_nowait((index, event))
    except ApiError as error:
        merged.put_nowait((index, error))


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def _event(values: dict[str, Any]) -> str:
    return f"data: {_ENCODER.encode(values)}\n\n"


def _add_facts(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise ApiError(404, f"The model here is {service.name!r}.", "model_not_found", "model")
        return _model(service)

    @app.get("/info")
    async def info() -> dict[str, Any]:
        return service.facts()

    @app.get("/health")
    async def health() -> JSONResponse:
        alive, engine = service.engine.alive, service.engine
        state = {"status": "ok" if alive else "stopping", "running": engine.running, "waiting": engine.waiting}
        return JSONResponse(state, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/")
    async def page() -> HTMLResponse:
        headers = {
            "content-security-policy": POLICY,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        }
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=headers)


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "bitdistill"}


def _add_errors(app: FastAPI) -> None:
    def respond(error: ApiError) -> JSONResponse:
        headers = {"retry-after": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body(), error.status, headers=headers)

    async def known(_request: Request, error: Exception) -> JSONResponse:
        found = as_api_error(error)
        if found is None:
            raise error
        return respond(found)

    for kind in (ApiError, UserError, ExceptionGroup):
        app.add_exception_handler(kind, known)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        return respond(_malformed(error, request.headers.get("content-type", "")))

    @app.exception_handler(HTTPException)
    async def other(_request: Request, error: HTTPException) -> JSONResponse:
        return respond(ApiError(error.status_code, str(error.detail), "http_error"))


def _malformed(error: RequestValidationError, content_type: str) -> ApiError:
    """What is wrong with a body, as the client sent it: a value that may be one of several kinds has an error for each."""
    errors = error.errors()
    if errors[0]["type"] == "json_invalid":
        reason, place = errors[0].get("ctx", {}).get("error", errors[0]["msg"]), errors[0]["loc"][-1]
        return ApiError(400, f"The body is no JSON: {reason} at character {place}.", "invalid_json")
    if not isinstance(error.body, dict):
        expected = "an object in JSON, with the header content-type: application/json"
        got = f"{type(error.body).__name__} as {content_type or 'no type'}"
        return ApiError(400, f"body: expected {expected}; got {got}.", "invalid_value")
    where = _sent(errors[0], error.body)
    says = dict.fromkeys(_says(one) for one in errors if _sent(one, error.body) == where)
    return ApiError(400, f"{where}: {', or '.join(says)}", "invalid_value", where)


def _says(error: dict[str, Any]) -> str:
    nothing = error["type"] == "too_long" and error["ctx"]["max_length"] == 0
    return "not supported here" if nothing or error["type"] == "extra_forbidden" else error["msg"]


def _sent(error: dict[str, Any], body: Any) -> str:
    """The path to a value as it is in the body, without pydantic's names for the kinds that it may be."""
    path: list[str] = []
    for part in error["loc"][1:]:
        if not (isinstance(part, int) if isinstance(body, list) else isinstance(body, dict) and part in body):
            path += [str(part)] if error["type"] == "missing" else []
            break
        path.append(str(part))
        body = body[part]
    return ".".join(path)
