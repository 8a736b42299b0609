"""Threads that run one compiled step together: a pool, a spin barrier and a shared counter.

A step of a small model takes a few milliseconds and has more than a hundred barriers, so a barrier must cost well under a
microsecond: no OpenMP, no prange, no Python between two of them. All threads run the *same* nogil compiled function with
the same arguments; thread 0 is the caller. What they share is `state`, int64 words one cache line apart, touched only by
atomic instructions.

    caller (thread 0)                       worker, a Python thread
    Pool.run: announce, wake the sleepers   sleeps on a condition until a call is announced
      enter(state, 0, threads, seen, ...)     enter(state, thread, threads, seen, ...)
        begin_call: opens it                    begin_call: waits until it is open
        the work, with barriers                 the work, with barriers
        end_call: the last barrier              end_call; then the next begin_call, for AWAKE_NANOSECONDS

A waiting thread spins with the processor's pause instruction. After SPINS of these it yields to the scheduler each time it
looks, so that more threads than free cores are slow but never stuck. With more threads than cores it yields at once;
otherwise each barrier would wait for spinning threads (measured with 4 threads on 2 cores: 64 us, and 5 us with yielding).

A call is opened inside compiled code, where no signal handler runs: after Ctrl-C it has either not begun or is finished. A
worker that fails aborts the call: every barrier raises an error, the caller gets the worker's exception, and the threads
end; the next call starts new ones. The same happens in the first call in a forked child, which has none of its parent's
threads. With one thread there is no pool, and nothing is atomic.
"""

import ctypes
import os
import threading
import weakref
from collections.abc import Callable

import numpy as np

from bitdistill.cpus import available_cpus

LINE = 128  # bytes: two cache lines, which processors fetch in pairs
# Where the words of `state` lie, and how long it is.
SPIN_LIMIT, AWAKE, BEGUN, ENDED, ANNOUNCED, ARRIVED, EPOCH, TICKET, ABORTED, CLOSING, LINES = (
    LINE * i for i in range(11)
)
SPINS = 1000  # some 20 us
AWAKE_NANOSECONDS = 1_000_000


def load_word(address: int) -> int:
    """The int64 at an address."""
    return ctypes.c_int64.from_address(address).value


def store_word(address: int, value: int) -> int:
    """Writes an int64 at an address. Returns 0."""
    ctypes.c_int64.from_address(address).value = value
    return 0


class _Shared:
    """What the caller and the workers share. Workers hold this and not the Pool, so that the Pool can be collected."""

    def __init__(self, threads: int, enter: Callable, args: tuple, keep: object, awake: int, name: str):
        self.threads, self.enter, self.args, self.keep = threads, enter, args, keep
        self.process = os.getpid()
        self.words = np.zeros((LINES + LINE) // 8, np.int64)
        self.state = self.words.ctypes.data + -self.words.ctypes.data % LINE
        store_word(self.state + SPIN_LIMIT, SPINS if threads <= available_cpus() else 0)
        store_word(self.state + AWAKE, awake)
        self.condition = threading.Condition()
        self.error: BaseException | None = None
        self.workers = [
            threading.Thread(target=_work, args=(self, thread), name=f"{name}-{thread}", daemon=True)
            for thread in range(1, threads)
        ]

    def stop(self) -> None:
        if self.process != os.getpid():  # a forked child has the words but not the threads
            return
        with self.condition:
            store_word(self.state + CLOSING, 1)
            self.condition.notify_all()
        for worker in self.workers:
            if worker is not threading.current_thread() and worker.is_alive():
                worker.join()


def _work(shared: _Shared, thread: int) -> None:
    seen = 0
    while True:
        with shared.condition:
            while load_word(shared.state + ANNOUNCED) == seen and not load_word(shared.state + CLOSING):
                shared.condition.wait()
        if load_word(shared.state + CLOSING) or load_word(shared.state + ABORTED):
            return
        try:
            seen = shared.enter(shared.state, thread, shared.threads, seen, *shared.args)
        except BaseException as error:  # handed to the caller, whatever it is
            shared.error = shared.error or error
            store_word(shared.state + ABORTED, 1)
            return


class Pool:
    """Threads that enter one compiled function together, again and again.

    Args:
        threads: 2 or more, the caller included.
        enter: compiled with nogil: ``enter(state, thread, threads, seen, *args) -> seen``, of this form::

                while begin_call(state, thread, threads, seen):
                    ...                                           what this thread does, with `barrier`s
                    seen = end_call(state, thread, threads, seen)
                    if thread == 0:
                        break
                return seen

        args: numbers, the same for all calls: what changes is written into memory whose address they are.
        keep: whatever owns that memory; it lives as long as the threads.
        awake: nanoseconds that a worker spins before it sleeps. name: what its name begins with.
    """

    def __init__(
        self,
        threads: int,
        enter: Callable,
        args: tuple,
        keep: object = None,
        awake: int = AWAKE_NANOSECONDS,
        name: str = "bitdistill",
    ):
        assert threads > 1, threads
        self._make = (threads, enter, args, keep, awake, name)
        self._shared: _Shared | None = None

    def run(self) -> None:
        """One call, to its end, in all threads. One caller at a time.

        Raises: whatever a worker raised; the threads have ended then, and the next call starts new ones.
        """
        shared = self._started()
        seen = load_word(shared.state + BEGUN)
        try:
            with shared.condition:
                store_word(shared.state + ANNOUNCED, seen + 1)
                shared.condition.notify_all()
            shared.enter(shared.state, 0, shared.threads, seen, *shared.args)
        except BaseException as error:
            begun, ended = load_word(shared.state + BEGUN), load_word(shared.state + ENDED)
            if begun == ended:  # interrupted before its beginning or after its end
                store_word(shared.state + ANNOUNCED, begun)
                raise
            shared.error = shared.error or error  # the first: others only say that another thread failed
            store_word(shared.state + ABORTED, 1)
            self.close()
            raise shared.error from None

    def _started(self) -> _Shared:
        if self._shared is None or self._shared.process != os.getpid():
            self._shared = _Shared(*self._make)
            self._end = weakref.finalize(self, self._shared.stop)
            for worker in self._shared.workers:
                worker.start()
        return self._shared

    def close(self) -> None:
        """Ends the threads. `run` would start new ones."""
        if self._shared is not None:
            self._end()
            self._shared = None
