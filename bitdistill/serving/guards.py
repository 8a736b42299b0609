"""Checks of every request before it is read: its key, its size, and how long the client takes to send it."""

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from bitdistill.serving.limits import Limits
from bitdistill.serving.protocol import ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
OPEN = ("/", "/health", "/metrics")  # without a key: nothing there tells what clients ask


class Guard:
    """An ASGI application that checks requests and passes them on to another one.

    Args:
        app: the application behind it. api_key: what clients must send as a bearer token, or None.
        limits: sizes and times. counted: called with the path and the status of every answer.
    """

    def __init__(self, app: Callable, api_key: str | None, limits: Limits, counted: Callable[[str, int], None]):
        self._app, self._key, self._limits, self._counted = app, api_key, limits, counted

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._counted(scope["path"], message["status"])
            await send(message)

        try:
            self._check_key(scope)
            body = await asyncio.wait_for(self._body(scope, receive), self._limits.body_seconds)
        except ApiError as error:
            await _refuse(error, counting)
            return
        except TimeoutError:
            await _refuse(ApiError(408, "The request took too long to arrive.", "timeout"), counting)
            return
        if body is None:  # the client has left already
            return
        await self._app(scope, _after(body, receive), counting)

    def _check_key(self, scope: Message) -> None:
        if self._key is None or scope["path"] in OPEN:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not secrets.compare_digest(given, f"Bearer {self._key}".encode()):
            raise ApiError(401, "Send the API key: Authorization: Bearer KEY.", "invalid_api_key")

    async def _body(self, scope: Message, receive: Receive) -> bytes | None:
        largest = self._limits.max_body_bytes
        refusal = ApiError(413, f"A request has at most {largest:,} bytes.", "request_too_large")
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > largest:
            raise refusal
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > largest:
                raise refusal
        return bytes(body)


def _after(body: bytes, receive: Receive) -> Receive:
    """Gives the application the body as one message, and after it the message that the client has left."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return pending.pop() if pending else await receive()

    return again


async def _refuse(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))  # what is left of an oversized request is not read
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
