"""SIGTERM, which a cluster sends before it takes a machine away, and Ctrl-C: trained work is saved, and the process ends in time.

While a stage trains, the signal is only noted: the trainer finishes its step, saves a checkpoint and ends the run. At any
other time the run ends at once, because only a stage that can be repeated in minutes is lost. In both cases the process
ends within `PATIENCE_SECONDS` of the signal, with 128 plus the signal's number as its exit status, as in shells (143, 130).
A second Ctrl-C ends it at once.

DeepSpeed's command (`deepspeed train.py`) does not pass the signal on: it ends, and its ranks would continue without it. So
each rank watches whether the command is still running, and treats its end like the signal. In a container, which ends
together with the command, start.py replaces it.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

PATIENCE_SECONDS = 25  # clusters kill after 30
WATCH_SECONDS = 1.0
CONTINUES = "The same command continues."


class Stopped(SystemExit):
    """The run ends because it was asked to; nothing is wrong.

    Args:
        where: what is saved, in words, for the message.
    """

    def __init__(self, where: str = ""):
        super().__init__(_status())
        if os.environ.get("RANK", "0") == "0":
            _say(f"stopped by {_name()}{where}. {CONTINUES}")


class _State:
    signal = 0  # the first that came
    deferred = False


def listen() -> None:
    """From now on SIGTERM and Ctrl-C end the run in good order. Call it once, in the main thread."""
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as in a background job
            signal.signal(number, lambda number, _frame: _request(number))
    launcher = _launcher()
    if launcher is not None:
        threading.Thread(target=_watch, args=(launcher,), daemon=True).start()


def requested() -> bool:
    """Whether this process has been asked to end."""
    return _State.signal > 0


def end_if_requested() -> None:
    """Raises Stopped when this process was asked to end while it could not."""
    if requested():
        raise Stopped


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, a signal is noted (`requested`) instead of ending the run."""
    _State.deferred = True
    try:
        yield
    finally:
        _State.deferred = False


@contextlib.contextmanager
def lost_ranks_said() -> Iterator[None]:
    """Inside, the loss of another rank, which a collective notices, ends this one in one line instead of a traceback.

    The launcher hands on the exit status of the rank that it sees end first: this one gives it the time to see the other's.
    """
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, torch.distributed.DistError):
            raise
        if not requested():
            _say(f"rank {os.environ.get('RANK')}: another rank has ended; what it said is above or below. {CONTINUES}")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(3 * WATCH_SECONDS)
        raise SystemExit(_status() if requested() else 1) from error


def give_up(text: str) -> None:
    """Says why, and ends this process at once, from whatever thread: status 1."""
    _say(f"{text}. {CONTINUES}")
    os._exit(1)


def _request(number: int) -> None:
    if _State.signal:
        if number == signal.SIGINT:
            _end("interrupted twice: ended at once; the last complete checkpoint is untouched")
        return
    _State.signal = number
    timer = threading.Timer(PATIENCE_SECONDS, _end, [f"{PATIENCE_SECONDS} s after {{}} no checkpoint was saved yet"])
    timer.daemon = True
    timer.start()
    if not _State.deferred:
        raise Stopped


def _end(text: str) -> None:
    _say(f"{text.format(_name())}. {CONTINUES}")
    os._exit(_status())


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"bitdistill: {text}\n".encode())


def _status() -> int:
    return 128 + (_State.signal or signal.SIGTERM)


def _name() -> str:
    return "Ctrl-C" if _State.signal == signal.SIGINT else "SIGTERM"


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
