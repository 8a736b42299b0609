"""Two pieces of work timed alternately in one process, so that what the machine does meanwhile hits both."""

import statistics
import time
from collections.abc import Callable


def ratio(ours: Callable[[], object], theirs: Callable[[], object], rounds: int = 9, seconds: float = 0.02) -> float:
    """Median over rounds of time(theirs) / time(ours): above 1, ours is faster.

    Args:
        rounds: each times both, in alternating order. seconds: at least so long a timing, by repeating the call.
    """
    repeats = [max(1, int(seconds / _once(work))) for work in (ours, theirs)]
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
