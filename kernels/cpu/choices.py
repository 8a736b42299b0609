"""Which of several ways to compute the same is the fastest on this machine: timed once, then known.

The answers are kept in ``choices.json`` beside the compiled kernels, by a key that says what was timed, torch's version,
oneDNN's instruction set and the number of threads. So a run that goes on computes as it began.
"""

import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from bitdistill.kernels.cpu.instructions import cache_folder

if os.name == "posix":  # without it, two processes that choose at the same moment may lose one choice
    import fcntl

ISA = "ONEDNN_MAX_CPU_ISA"  # oneDNN, torch's library of products, obeys it; read once, when it is loaded
TRIALS = 7  # the least of so many is right on a busy machine, too
FINE = 1e-6  # seconds that a clock must tell apart


def fastest(what: str, ways: dict[str, Callable[[], object]]) -> str:
    """The name of the way that takes the least time.

    Args:
        what: was computed, with its shapes.
        ways: by name; each is called TRIALS + 1 times if the answer is not known yet.
    """
    key = f"{torch.__version__} {os.environ.get(ISA, '')} {torch.get_num_threads()} threads: {what}"
    if _known().get(key) not in ways:
        seconds, clock = dict.fromkeys(ways, float("inf")), _clock()
        for way in ways.values():  # compiles, and wakes the threads
            way()
        for _ in range(TRIALS):
            for name, way in ways.items():
                start = clock()
                way()
                seconds[name] = min(seconds[name], clock() - start)
        _known()[key] = _keep(key, min(seconds, key=seconds.get), ways)
    return _known()[key]


def _clock() -> Callable[[], float]:
    """Of one thread the processor's time, which other processes spoil less."""
    if torch.get_num_threads() == 1 and time.get_clock_info("thread_time").resolution <= FINE:
        return time.thread_time
    return time.perf_counter


def _file() -> Path:
    return cache_folder() / "choices.json"


@functools.cache
def _known() -> dict[str, str]:
    """Choices made on this machine before."""
    return _read()


def _read() -> dict[str, str]:
    try:
        return dict(json.loads(_file().read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _keep(key: str, name: str, possible: Collection[str]) -> str:
    """Adds a choice to the file and returns it: that of the first process, where several were asked side by side.

    None is lost, because a run that goes on without a choice that it began with would end with other weights.
    """
    with _file().with_suffix(".lock").open("ab") as lock:
        if os.name == "posix":
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        kept = _read()
        if kept.get(key) not in possible:
            kept[key] = name
            with tempfile.NamedTemporaryFile("w", dir=cache_folder(), delete=False) as written:
                json.dump(kept, written, indent=1)
            os.replace(written.name, _file())
    return kept[key]
