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
import sys
import threading
import time
import weakref
from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import types

from bitdistill.cpus import available_cpus
from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.native import native

LINE = 128  # bytes: two cache lines, which processors fetch in pairs
# Where the words of `state` lie, and how long it is.
SPIN_LIMIT, AWAKE, BEGUN, ENDED, ANNOUNCED, ARRIVED, EPOCH, TICKET, ABORTED, CLOSING, LINES = (
    LINE * i for i in range(11)
)
SPINS = 1000  # some 20 us
AWAKE_NANOSECONDS = 1_000_000

# --- what the processor and the system offer ---------------------------------------------------------------------------

_WORD = ir.IntType(64)
_one_at_a_time = threading.Lock()  # atomicity where nothing is compiled


def _pointer(builder, address):
    return builder.inttoptr(address, ir.PointerType(_WORD))


def _py_load(address):
    return ctypes.c_int64.from_address(address).value


def _py_store(address, value):
    ctypes.c_int64.from_address(address).value = value
    return 0


def _py_add(address, value):
    with _one_at_a_time:
        before = _py_load(address)
        _py_store(address, before + value)
    return before


def _py_pause():
    time.sleep(0)
    return 0


@native(types.int64(types.int64), _py_load)
def atomic_load(builder, address):
    """int64 at an address, before anything that follows (acquire)."""
    return builder.load_atomic(_pointer(builder, address), "acquire", 8)


@native(types.int64(types.int64, types.int64), _py_store)
def atomic_store(builder, address, value):
    """Writes an int64 after everything before it, and before any later atomic (sequentially consistent). Returns 0."""
    builder.store_atomic(value, _pointer(builder, address), "seq_cst", 8)
    return ir.Constant(_WORD, 0)


@native(types.int64(types.int64, types.int64), _py_add)
def atomic_add(builder, address, value):
    """Adds to an int64; the value before."""
    return builder.atomic_rmw("add", _pointer(builder, address), value, "seq_cst")


@native(types.int64(), _py_pause)
def pause(builder):
    """The processor's hint that this is a spin loop. Returns 0."""
    triple = builder.module.triple
    if triple.startswith(("x86_64", "i686")):
        _call(builder, "llvm.x86.sse2.pause", ir.VoidType())
    elif triple.startswith(("aarch64", "arm64")):
        _call(builder, "llvm.aarch64.hint", ir.VoidType(), _i32(1))  # yield
    return ir.Constant(_WORD, 0)


def _call(builder, name, returns, *arguments):
    signature = ir.FunctionType(returns, [argument.type for argument in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, signature, name)
    return builder.call(function, arguments)


@native(types.int64(), _py_pause)
def yield_processor(builder):
    """Lets another thread of this core run. Returns 0."""
    _call(builder, "SwitchToThread" if sys.platform == "win32" else "sched_yield", ir.IntType(32))
    return ir.Constant(_WORD, 0)


@native(types.int64(), time.perf_counter_ns)
def nanoseconds(builder):
    """A clock that never goes back."""
    with builder.goto_entry_block():
        words = builder.alloca(ir.ArrayType(_WORD, 2))
    if sys.platform == "win32":  # in units of 100 ns on every Windows of this century
        _call(builder, "QueryPerformanceCounter", ir.IntType(32), words)
        return builder.mul(builder.load(builder.gep(words, [_i32(0), _i32(0)])), ir.Constant(_WORD, 100))
    _call(builder, "clock_gettime", ir.IntType(32), _i32(time.CLOCK_MONOTONIC), words)
    seconds, rest = (builder.load(builder.gep(words, [_i32(0), _i32(word)])) for word in range(2))
    return builder.add(builder.mul(seconds, ir.Constant(_WORD, 10**9)), rest)


def _i32(value):
    return ir.Constant(ir.IntType(32), value)


# --- between the threads of one call -----------------------------------------------------------------------------------


@jit
def _relax(state, looks):
    """One turn of a spin loop that has looked `looks` times."""
    if looks < atomic_load(state + SPIN_LIMIT):
        pause()
    else:
        yield_processor()
    return looks + 1


@jit
def barrier(state, threads):
    """Returns when all threads of the call are here; what they wrote before is then visible to all.

    Args:
        state: address of the pool's shared words. threads: of the pool; 1 returns at once.

    Raises:
        RuntimeError: another thread failed.
    """
    if threads == 1:
        return
    epoch = atomic_load(state + EPOCH)
    if atomic_add(state + ARRIVED, 1) == threads - 1:
        atomic_store(state + ARRIVED, 0)
        atomic_store(state + TICKET, 0)
        atomic_store(state + EPOCH, epoch + 1)
        return
    looks = np.int64(0)
    while atomic_load(state + EPOCH) == epoch:
        if atomic_load(state + ABORTED) != 0:
            raise RuntimeError("another thread of this call failed")
        looks = _relax(state, looks)


@jit
def next_ticket(state):
    """0, 1, 2, ... in the order in which the threads ask; from 0 again after every barrier. Only with threads > 1."""
    return atomic_add(state + TICKET, 1)


@jit
def begin_call(state, thread, threads, seen):
    """Lets a thread into the call after number `seen`: thread 0 opens it, the others wait for it.

    Returns: True; False to a worker for which no call came in time, or whose pool closes: it should go to sleep.
    """
    if threads == 1:
        return True
    if thread == 0:
        atomic_store(state + BEGUN, seen + 1)
        return True
    looks = np.int64(0)
    start = nanoseconds()
    while atomic_load(state + BEGUN) == seen:
        if atomic_load(state + CLOSING) + atomic_load(state + ABORTED) != 0:
            return False
        if (
            looks % 64 == 63
            and atomic_load(state + ANNOUNCED) == seen
            and nanoseconds() - start > atomic_load(state + AWAKE)
        ):
            return False
        looks = _relax(state, looks)
    return True


@jit
def end_call(state, thread, threads, seen):
    """The last barrier of a call. Returns ``seen + 1``."""
    barrier(state, threads)
    if thread == 0 and threads > 1:
        atomic_store(state + ENDED, seen + 1)
    return seen + 1


# --- the pool ----------------------------------------------------------------------------------------------------------


class _Shared:
    """What the caller and the workers share. Workers hold this and not the Pool, so that the Pool can be collected."""

    def __init__(self, threads: int, enter: Callable, args: tuple, keep: object, awake: int, name: str):
        self.threads, self.enter, self.args, self.keep = threads, enter, args, keep
        self.process = os.getpid()
        self.words = np.zeros((LINES + LINE) // 8, np.int64)
        self.state = self.words.ctypes.data + -self.words.ctypes.data % LINE
        _py_store(self.state + SPIN_LIMIT, SPINS if threads <= available_cpus() else 0)
        _py_store(self.state + AWAKE, awake)
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
            _py_store(self.state + CLOSING, 1)
            self.condition.notify_all()
        for worker in self.workers:
            if worker is not threading.current_thread() and worker.is_alive():
                worker.join()


def _work(shared: _Shared, thread: int) -> None:
    seen = 0
    while True:
        with shared.condition:
            while _py_load(shared.state + ANNOUNCED) == seen and not _py_load(shared.state + CLOSING):
                shared.condition.wait()
        if _py_load(shared.state + CLOSING) or _py_load(shared.state + ABORTED):
            return
        try:
            seen = shared.enter(shared.state, thread, shared.threads, seen, *shared.args)
        except BaseException as error:  # handed to the caller, whatever it is
            shared.error = shared.error or error
            _py_store(shared.state + ABORTED, 1)
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
        seen = _py_load(shared.state + BEGUN)
        try:
            with shared.condition:
                _py_store(shared.state + ANNOUNCED, seen + 1)
                shared.condition.notify_all()
            shared.enter(shared.state, 0, shared.threads, seen, *shared.args)
        except BaseException as error:
            begun, ended = _py_load(shared.state + BEGUN), _py_load(shared.state + ENDED)
            if begun == ended:  # interrupted before its beginning or after its end
                _py_store(shared.state + ANNOUNCED, begun)
                raise
            shared.error = shared.error or error  # the first: others only say that another thread failed
            _py_store(shared.state + ABORTED, 1)
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
