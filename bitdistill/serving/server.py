"""Runs the application: opens a socket, starts uvicorn, and lets running answers finish before it ends."""

import asyncio
import logging
import signal
import socket
import sys

import uvicorn

from bitdistill.errors import UserError
from bitdistill.runtime.cpu import Runtime
from bitdistill.serving.app import create_app
from bitdistill.serving.engine import Engine
from bitdistill.serving.limits import Limits
from bitdistill.serving.service import Service

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SWITCH_SECONDS = 5e-4  # Python's own is 5e-3
LAST_SECONDS = 5  # for clients to read the end of answers that were ended


def run_server(
    runtime: Runtime, host: str, port: int, api_key: str | None, model_name: str | None, limits: Limits
) -> int:
    """Serves until SIGTERM or Ctrl-C.

    Args:
        runtime: a student whose file has a tokenizer.
        host, port: where to listen; port 0 takes a free one and prints it.
        api_key: what clients must send, or None.
        model_name: what clients call the model, or None for the base's and the task's name.
        limits: the largest sizes and longest times.

    Returns: 0; 1 when the decoder has failed.

    Raises:
        UserError: the file has no tokenizer, or the port is taken.
    """
    # Refuses a file without a tokenizer; and what is compiled once on a machine is compiled before the first client waits.
    runtime.logits(runtime.encode("a"), last_only=True)
    # The engine's thread needs the interpreter between two steps, and all clients wait for it: the event loop gives it up soon.
    sys.setswitchinterval(SWITCH_SECONDS)
    service = Service(runtime, model_name or default_name(runtime), limits)
    app = create_app(service, api_key, host in LOOPBACK)
    listening = _listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    print(f"bitdistill: {service.name} at http://{shown}:{listening.getsockname()[1]}/ (Ctrl-C ends)", file=sys.stderr)
    if host not in LOOPBACK and api_key is None:
        print("bitdistill: whoever reaches this address can use it: no API key is set", file=sys.stderr)
    # The event loop warns about each write to a connection that the client has reset, a line for each token.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=limits.shutdown_seconds + LAST_SECONDS,
        timeout_keep_alive=30,
        limit_concurrency=limits.slots + limits.max_queue + 64,  # connections
        h11_max_incomplete_event_size=1 << 16,
        http="h11",  # its bounds on what a client may send before the first line ends are known
        loop="auto",  # uvloop, where it is installed
        ws="none",
    )
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # uvicorn repeats it when all is done: a clean end, not a killed process
        signal.signal(number, lambda *_: None)
    server = _Server(config, service.engine, limits.shutdown_seconds)
    service.engine.on_failure = lambda: setattr(server, "should_exit", True)
    server.run(sockets=[listening])
    return 1 if service.engine.failed else 0


class _Server(uvicorn.Server):
    """Ends in two steps: after a first signal running answers may finish, for `seconds` or until a second signal; then they end
    where they are. uvicorn itself would cancel them, so that their clients got half an answer and the log two tracebacks."""

    def __init__(self, config: uvicorn.Config, engine: Engine, seconds: int):
        super().__init__(config)
        self.engine, self.seconds = engine, seconds

    def handle_exit(self, sig: int, frame) -> None:
        """A signal."""
        if not self.should_exit:
            super().handle_exit(sig, frame)
            return
        # Not in the handler itself: it may have interrupted the main thread while that holds the engine's lock.
        asyncio.get_running_loop().call_soon_threadsafe(self.engine.hurry)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more connections and waits for the answers."""
        if self.engine.running or self.engine.waiting:
            again = "another Ctrl-C ends them now"
            print(f"bitdistill: running answers have {self.seconds} s to finish; {again}", file=sys.stderr)
        timer = asyncio.get_running_loop().call_later(self.seconds, self.engine.hurry)
        await super().shutdown(sockets)
        timer.cancel()


def default_name(runtime: Runtime) -> str:
    """The base's name without its owner, and the task's."""
    header = runtime.header
    base = (header.base or "student").rsplit("/", 1)[-1]
    return f"{base}-{header.task.name}" if header.task is not None and header.task.name != base else base


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(1024)
    except (OSError, OverflowError) as error:
        do = "Give another --port (0 takes a free one) or --host."
        raise UserError("port", expected="an address that is free", got=f"{host}:{port} ({error})", do=do) from error
    return listening
