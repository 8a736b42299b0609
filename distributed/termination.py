"""SIGTERM, which a cluster sends before it takes a machine away: trained work is saved, and the process ends in time.

While a stage trains, the signal is only noted: the trainer finishes its step, saves a checkpoint and ends the run. Anywhere
else the run ends at once, for only a stage that can be repeated in minutes is lost. Either way the exit status is
`STATUS`, at the latest `PATIENCE_SECONDS` after the signal.

DeepSpeed's command (`deepspeed train.py`) does not hand the signal on: it dies, and its ranks would go on without it. So each
rank watches whether the command is still there, and takes its end for the signal.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

STATUS = 143  # 128 + SIGTERM's number, as shells have it
PATIENCE_SECONDS = 25  # clusters kill after 30
WATCH_SECONDS = 1.0


class Stopped(SystemExit):
    """The run ends because it was asked to; nothing is wrong."""

    def __init__(self, text: str):
        super().__init__(STATUS)
        print(f"bitdistill: {text} The same command continues.", file=sys.stderr, flush=True)


class _State:
    requested = False
    deferred = False


def listen() -> None:
    """From now on SIGTERM ends the run in good order. Call it once, in the main thread."""
    signal.signal(signal.SIGTERM, lambda *_: _request())
    launcher = _launcher()
    if launcher is not None:
        threading.Thread(target=_watch, args=(launcher,), daemon=True).start()


def requested() -> bool:
    """Whether this process has been asked to end."""
    return _State.requested


def end_if_requested() -> None:
    """Raises Stopped when this process was asked to end while it could not."""
    if _State.requested:
        raise Stopped("stopped by SIGTERM.")


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, SIGTERM is noted (`requested`) instead of ending the run."""
    _State.deferred = True
    try:
        yield
    finally:
        _State.deferred = False


def _request() -> None:
    if _State.requested:
        return
    _State.requested = True
    timer = threading.Timer(PATIENCE_SECONDS, _give_up)
    timer.daemon = True
    timer.start()
    if not _State.deferred:
        raise Stopped("stopped by SIGTERM.")


def _give_up() -> None:
    text = f"stopped by SIGTERM {PATIENCE_SECONDS} s ago, before a checkpoint was saved; the one before it is complete."
    os.write(2, f"bitdistill: {text} The same command continues.\n".encode())
    os._exit(STATUS)


def _launcher() -> tuple[int, int] | None:
    """(process of DeepSpeed's launcher on this machine, process of the `deepspeed` command that started it)."""
    parent = os.getppid()
    try:
        if b"deepspeed.launcher.launch" not in Path(f"/proc/{parent}/cmdline").read_bytes():
            return None
    except OSError:
        return None
    return parent, _parent_of(parent)


def _parent_of(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _watch(launcher: tuple[int, int]) -> None:
    while (os.getppid(), _parent_of(launcher[0])) == launcher:
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
