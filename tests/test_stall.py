"""A rank that stands still is named by the others, whether it is behind or gone, and a run that goes on is left alone."""

import threading
import time

import pytest
from torch import distributed as dist

from bitdistill.distributed.stall import Watch

PATIENCE = 0.4


@pytest.fixture
def three():
    """Three ranks with a store, and what each said when it gave up."""
    store, said = dist.HashStore(), {}
    watches = [
        Watch(store, rank, 3, PATIENCE, lambda text, rank=rank: said.setdefault(rank, text)) for rank in range(3)
    ]
    for watch in watches:
        watch.start()
    yield watches, said
    for watch in watches:
        watch.stop()


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_a_rank_that_is_behind_is_named_by_all(three):
    watches, said = three
    for _ in range(5):
        for watch in watches:
            watch.beat()
    for watch in (watches[0], watches[2]):  # they go on, to where they wait for rank 1
        watch.beat()
    until(lambda: len(said) == 3)
    assert set(said.values()) == {"rank 1 of 3 stood still for 0 s while training"}


def test_a_rank_that_is_gone_is_named_even_if_it_was_ahead(three):
    watches, said = three
    for _ in range(5):
        watches[2].beat()
    time.sleep(PATIENCE / 4)
    watches[2].stop()  # as a process that SIGSTOP has stopped: its threads stand still, too
    until(lambda: len(said) == 2)
    assert set(said.values()) == {"rank 2 of 3 stood still for 0 s while training"}


def test_a_network_that_is_cut_does_not_keep_a_rank_waiting():
    """The store neither answers nor fails, as long as TCP waits: rank 0, which serves it, is named."""

    class Cut:
        answers = threading.Event()

        def set(self, *_):
            """Sent, and never arrived."""

        def get(self, *_):
            self.answers.wait()
            raise RuntimeError("the connection was reset")

    store, said = Cut(), []
    watch = Watch(store, 1, 2, PATIENCE, said.append)
    watch.start()
    until(lambda: said)
    store.answers.set()
    watch.stop()
    assert said == ["rank 0 of 2 stood still for 0 s while training"]


def test_slow_is_not_still(three):
    watches, said = three
    deadline = time.monotonic() + 4 * PATIENCE
    while time.monotonic() < deadline:
        watches[1].beat()
        time.sleep(PATIENCE / 5)
    assert not said


def test_a_store_that_does_not_answer_is_rank_0():
    said, store = [], dist.HashStore()
    watch = Watch(store, 1, 2, PATIENCE, said.append)

    class Silent:
        def set(self, key, value):
            pass

        def get(self, key):
            raise dist.DistStoreError("wait timeout after 400ms")

    watch.start()
    watch.store = Silent()
    until(lambda: said)
    assert said == ["rank 0 of 2 stood still for 0 s while training"]
    watch.stop()
