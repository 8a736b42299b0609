"""Names a rank that stands still and ends the run; otherwise the other ranks would wait for it for hours.

While the ranks train they do the same things in the same order, so a rank that waits for another one has done at least as
much as that one. Each rank counts what it does (`beat`), and one of its threads tells the others this count and that the
rank is alive. When no rank has made progress for `patience` seconds, the rank that is no longer alive (a stopped process, a
machine that is gone) is named, or else the rank that is behind (a hanging file system, an endless loop).

The ranks tell each other through a store that rank 0 serves. When the network is cut, a request to the store waits until
TCP gives up, whatever time-out was set; so a second thread checks that the first one still gets its answers.
"""

import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch import distributed as dist

LOOKS = 20  # in the time of patience


class Watch:
    """Watches the ranks of a group from one of them.

    Args:
        store: what the ranks share; its own connection, because a rank that stands still may be the one that serves it.
        rank: of this process. ranks: how many there are.
        patience: seconds without any progress of any rank after which one has stalled.
        end: is given the message, and ends this process.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: int, patience: float, end: Callable[[str], None]):
        self.store, self.rank, self.ranks, self.patience, self.end = store, rank, ranks, patience, end
        self.done = 0
        self._stop = threading.Event()
        self._answered = time.monotonic()
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._look, self._guard)]

    def start(self) -> None:
        """Begins to watch. Every rank calls it."""
        self.store.set(f"stall/{self.rank}", "0 0")
        self._answered = time.monotonic()
        for thread in self._threads:
            thread.start()

    def beat(self) -> None:
        """This rank has done something more."""
        self.done += 1

    def stop(self) -> None:
        """Ends the watch."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _guard(self) -> None:
        """Ends this process when the other thread has waited for the store for the time of patience."""
        late = self.patience * (1 + 2 / LOOKS)  # the store's own time-out comes first
        while self._threads[0].is_alive() and not self._stop.wait(self.patience / LOOKS):
            if time.monotonic() - self._answered > late:
                return self.end(self._message([0]))
        return None

    def _look(self) -> None:
        seen: dict[int, list[str]] = {}
        since = {(rank, what): time.monotonic() for rank in range(self.ranks) for what in (0, 1)}
        looks = 0
        while not self._stop.wait(self.patience / LOOKS):
            looks += 1
            try:
                self.store.set(f"stall/{self.rank}", f"{looks} {self.done}")
                now = {rank: self.store.get(f"stall/{rank}").decode().split() for rank in range(self.ranks)}
            except dist.DistStoreError:  # rank 0 serves the store, and does not answer
                return None if self._stop.is_set() else self.end(self._message([0]))
            except RuntimeError:  # it has ended, which the collectives notice by themselves
                return None
            moment = self._answered = time.monotonic()
            for rank, what in since:
                if now[rank][what] != seen.get(rank, [None, None])[what]:
                    since[rank, what] = moment
            seen = now
            if moment - max(since[rank, 1] for rank in now) > self.patience:
                dead = [rank for rank in now if moment - since[rank, 0] > self.patience / 2]
                least = min(int(done) for _, done in now.values())
                return self.end(self._message(dead or [rank for rank, (_, done) in now.items() if int(done) == least]))
        return None

    def _message(self, stalled: list[int]) -> str:
        name = "rank " if len(stalled) == 1 else "ranks "
        return (
            f"{name}{', '.join(map(str, stalled))} of {self.ranks} stood still for {self.patience:.0f} s while training"
        )


def watch(patience: float, end: Callable[[str], None]) -> Watch:
    """Watches the ranks of the process group. Every rank calls it; it begins at once.

    Args:
        patience: seconds without any progress. end: is given the message, and ends this process.

    Returns: the watch; call its `beat` with every piece of work, and its `stop` at the end.
    """
    store = dist.distributed_c10d._get_default_store().clone()
    store.set_timeout(timedelta(seconds=patience))
    found = Watch(store, dist.get_rank(), dist.get_world_size(), patience, end)
    found.start()
    return found
