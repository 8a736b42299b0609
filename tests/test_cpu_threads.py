"""The pool and its barrier: nobody passes early, nobody is lost, and a failure or an interruption leaves it usable."""

import gc
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.native import int64s
from bitdistill.kernels.cpu.pool import Pool
from bitdistill.kernels.cpu.threads import barrier, begin_call, end_call, nanoseconds, next_ticket

ROUNDS, UNITS = 50, 20


@jit
def _work(state, thread, threads, board, failing, units):
    """Rounds of: write my number, meet, check everybody's, meet; then tickets. board: one int64 a thread, then errors."""
    numbers, owners = int64s(board, threads + 1), int64s(units, UNITS)
    for turn in range(ROUNDS):
        numbers[thread] += 1
        barrier(state, threads)
        for other in range(threads):
            if numbers[other] != numbers[thread]:
                numbers[threads] += 1
        if int64s(failing, 1)[0] == thread and turn == 3:
            raise ZeroDivisionError("a defect in one thread")
        barrier(state, threads)
    unit = next_ticket(state)
    while unit < UNITS:
        owners[unit] += 1
        unit = next_ticket(state)


@jit
def enter(state, thread, threads, seen, board, failing, units):
    while begin_call(state, thread, threads, seen):
        _work(state, thread, threads, board, failing, units)
        seen = end_call(state, thread, threads, seen)
        if thread == 0:
            break
    return seen


class Board:
    def __init__(self, threads, function=enter):
        self.threads = threads
        self.numbers, self.failing = np.zeros(threads + 1, np.int64), np.full(1, -1)
        self.owners = np.zeros(UNITS, np.int64)
        self.pool = Pool(threads, function, tuple(a.ctypes.data for a in (self.numbers, self.failing, self.owners)))

    def check(self, calls):
        assert self.numbers[:-1].tolist() == [calls * ROUNDS] * self.threads
        assert self.numbers[-1] == 0, "a thread passed a barrier early"
        assert self.owners.tolist() == [calls] * UNITS, "a ticket was given twice or never"


def workers():
    """The pool's threads; those that training's kernels keep (kernels/cpu/rows.py) live as long as the process."""
    names = ("bitdistill-rows",)
    return [
        thread
        for thread in threading.enumerate()
        if thread.name.startswith("bitdistill-") and not thread.name.startswith(names)
    ]


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_everybody_meets_in_every_barrier_of_every_call(threads):
    board = Board(threads)
    for _ in range(4):
        board.pool.run()
    time.sleep(0.02)  # the workers sleep by now
    board.pool.run()
    board.check(5)
    board.pool.close()
    assert not workers()
    board.pool.run()  # starts new threads
    board.check(6)
    board.pool.close()


def test_workers_sleep_when_nothing_comes():
    board = Board(2)
    board.pool.run()
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.1
    board.pool.close()


@pytest.mark.parametrize("thread", [0, 1, 2])
def test_a_failing_thread_reaches_the_caller_and_the_pool_recovers(thread):
    board = Board(3)
    board.pool.run()
    board.failing[0] = thread
    with pytest.raises(ZeroDivisionError, match="a defect"):
        board.pool.run()
    assert not workers()
    board.failing[0] = -1
    board.numbers[:] = board.owners[:] = 0
    board.pool.run()
    board.check(1)
    board.pool.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupted_call_leaves_the_pool_usable(when):
    interrupt = [True]

    def interrupted(state, thread, *rest):
        if thread != 0 or not interrupt[0]:
            return enter(state, thread, *rest)
        if when == "after":
            enter(state, thread, *rest)
        interrupt[0] = False
        raise KeyboardInterrupt

    board = Board(2, interrupted)
    with pytest.raises(KeyboardInterrupt):
        board.pool.run()
    board.numbers[:] = board.owners[:] = 0
    board.pool.run()
    board.check(1)
    board.pool.close()


def test_garbage_collection_ends_the_threads():
    board = Board(3)
    board.pool.run()
    assert len(workers()) == 2
    del board
    gc.collect()
    assert not workers()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_a_forked_child_starts_threads_of_its_own():
    board = Board(2)
    board.pool.run()
    child = os.fork()
    if child == 0:
        board.pool.run()
        os._exit(0 if board.numbers[:-1].tolist() == [2 * ROUNDS] * 2 else 1)
    deadline = time.monotonic() + 60
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(done[1]) == 0
    board.pool.run()
    board.check(2)
    board.pool.close()


def test_the_interpreter_ends_while_a_pool_is_open():
    script = "import test_cpu_threads as t; b = t.Board(2); b.pool.run(); print(len(t.workers()))"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=os.path.dirname(__file__), capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "1"


def test_the_clock_runs_in_nanoseconds():
    @jit
    def twice():
        return nanoseconds()

    start = twice()
    time.sleep(0.02)
    assert 0.015e9 < twice() - start < 20e9
