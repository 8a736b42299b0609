"""Two pieces of work measured in one process: their times in turn, so that whatever else the machine does affects both, and
the most memory that each has allocated."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


def ratio(ours: Callable[[], object], theirs: Callable[[], object], rounds: int = 9, seconds: float = 0.02) -> float:
    """Median over rounds of time(theirs) / time(ours): above 1, ours is faster.

    Args:
        rounds: each times both, in alternating order.
        seconds: at least so long a timing, by repeating the call; 0 for long work, once per round and not warmed.

    With ASV_QUICK_RATIOS set in the environment it is one round of one call each: to see that everything runs (`asv run
    --quick` cannot tell a benchmark that it is in a hurry).
    """
    if os.environ.get("ASV_QUICK_RATIOS"):
        rounds, seconds = 1, 0
    repeats = [max(1, int(seconds / _once(work))) if seconds else 1 for work in (ours, theirs)]
    quotients = []
    for turn in range(rounds):
        order = (0, 1) if turn % 2 else (1, 0)
        spent = [0.0, 0.0]
        for which in order:
            work = (ours, theirs)[which]
            started = time.perf_counter()
            for _ in range(repeats[which]):
                work()
            spent[which] = (time.perf_counter() - started) / repeats[which]
        quotients.append(spent[1] / spent[0])
    return statistics.median(quotients)


def _once(work: Callable[[], object]) -> float:
    work()  # warm: compiles, fills caches
    started = time.perf_counter()
    work()
    return max(time.perf_counter() - started, 1e-7)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator has alive during a call beyond those before it; exact, no sampling."""
    from torch.profiler import ProfilerActivity, profile

    work()  # warm: what stays, gradients and optimizer states, is there now
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    alive = highest = 0
    for event in sorted(events, key=lambda event: event["args"]["Ev Idx"]):
        alive += event["args"]["Bytes"]
        highest = max(highest, alive)
    return highest


def memory_ratio(ours: Callable[[], object], theirs: Callable[[], object]) -> float:
    """``peak_bytes`` of theirs over ours: above 1, ours needs less."""
    return peak_bytes(theirs) / peak_bytes(ours)
