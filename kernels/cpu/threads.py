"""What threads of a pool (pool.py) do together inside compiled code: a spin barrier, a shared counter, the beginning and the
end of a call. Atomic instructions on the pool's words, each with a Python body for NUMBA_DISABLE_JIT=1.
"""

import sys
import threading
import time

import numpy as np
from llvmlite import ir
from numba import types

from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.native import native
from bitdistill.kernels.cpu.pool import (
    ABORTED,
    ANNOUNCED,
    ARRIVED,
    AWAKE,
    BEGUN,
    CLOSING,
    ENDED,
    EPOCH,
    SPIN_LIMIT,
    TICKET,
    load_word,
    store_word,
)

# --- what the processor and the system offer ---------------------------------------------------------------------------

_WORD = ir.IntType(64)
_one_at_a_time = threading.Lock()  # atomicity where nothing is compiled


def _pointer(builder, address):
    return builder.inttoptr(address, ir.PointerType(_WORD))


def _py_add(address, value):
    with _one_at_a_time:
        before = load_word(address)
        store_word(address, before + value)
    return before


def _py_pause():
    time.sleep(0)
    return 0


@native(types.int64(types.int64), load_word)
def atomic_load(builder, address):
    """int64 at an address, before anything that follows (acquire)."""
    return builder.load_atomic(_pointer(builder, address), "acquire", 8)


@native(types.int64(types.int64, types.int64), store_word)
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
def last_to_arrive(counter, expected):
    """Whether the other ``expected - 1`` threads have been here; what they wrote before is then visible. Begins anew after it.

    Args:
        counter: address of an int64, 0 at first. expected: how many come.
    """
    if atomic_add(counter, 1) != expected - 1:
        return False
    atomic_store(counter, 0)
    return True


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
