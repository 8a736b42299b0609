"""The team: every part is done once, whoever comes late, by any number of threads, callers and in a forked child."""

import os
import threading

import numpy as np
import pytest
import torch

from bitdistill.kernels.cpu import rows
from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.native import float32s, int64s
from bitdistill.kernels.cpu.rows import share_rows
from bitdistill.kernels.cpu.team import CALL_BYTES, Team

pytestmark = pytest.mark.skipif(os.environ.get("NUMBA_DISABLE_JIT") == "1", reason="a team runs compiled code only")


@jit
def count_rows(first, last, counts, starts, block, by):
    """Counts each row, and the parts that do not begin at a block."""
    if first % block:
        int64s(starts, 1)[0] += 1
    for row in range(first, last):
        int64s(counts + 8 * row, 1)[0] += np.int64(by)


@jit
def write_numbers(first, last, target, number, flag):
    """``target = number`` as float32, negative where flag."""
    values = float32s(target, last)
    for row in range(first, last):
        values[row] = -number if flag else number


def counted(team: Team, n: int, block: int, calls: int) -> tuple[np.ndarray, int]:
    counts, starts = np.zeros(max(n, 1), np.int64), np.zeros(1, np.int64)
    for _ in range(calls):
        team.share(count_rows, n, block, (counts.ctypes.data, starts.ctypes.data, block, np.float32(1)))
    return counts[:n], int(starts[0])


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize(("n", "block"), [(1, 1), (7, 1), (64, 64), (65, 64), (1000, 64), (1000, 3), (8, 100)])
def test_every_row_is_done_once(threads, n, block):
    counts, misplaced = counted(Team(threads), n, block, calls=200)
    assert (counts == 200).all()
    assert misplaced == 0


def test_floats_and_flags_arrive_as_they_are(monkeypatch):
    monkeypatch.setattr(rows, "LEAST", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for flag in (False, True):
        target = np.zeros(200, np.float32)
        share_rows(write_numbers, 200, 1, target.ctypes.data, np.float32(0.1), flag)
        np.testing.assert_array_equal(target, np.float32(-0.1 if flag else 0.1))


def test_callers_at_the_same_time_do_not_disturb_each_other():
    team, found = Team(3), []
    callers = [threading.Thread(target=lambda: found.append(counted(team, 500, 8, calls=300))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 4
    for counts, misplaced in found:
        assert (counts == 300).all()
        assert misplaced == 0


def test_a_helper_that_does_not_come_is_not_waited_for():
    """Helpers sleep, and cannot wake up as long as the caller holds their lock: it does all parts itself."""
    team = Team(4)
    with team._pool._started().condition:
        counts, misplaced = counted(team, 100, 1, calls=3)
    assert (counts == 3).all()
    assert misplaced == 0


def test_a_forked_child_has_a_team_of_its_own(monkeypatch):
    monkeypatch.setattr(rows, "LEAST", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def works() -> bool:
        target = np.zeros(300, np.float32)
        share_rows(write_numbers, 300, 1, target.ctypes.data, np.float32(2), False)
        return bool((target == 2).all())

    assert works()
    child = os.fork()
    if child == 0:
        os._exit(0 if works() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert works()


def test_too_many_arguments_are_refused():
    @jit
    def many(first, last, *numbers):
        pass

    with pytest.raises(AssertionError, match="too many"):
        Team(2).share(many, 10, 1, tuple(range(CALL_BYTES // 8)))
