"""bench/peers.py: what is measured again after a run that was broken off, best flags, and what is refused."""

import argparse
import json
import os

import pytest

import measure
import peers


class Fake:
    """A peer that answers with given seconds for each of its flags."""

    version, file_bytes, pids = "1.0", 100, ()

    def __init__(self, name: str, seconds: dict, fails_at: int | None = None):
        self.name, self.weights, self.seconds, self.fails_at, self.asked = name, "F16", seconds, fails_at, []
        self.ways = list(seconds)

    def warm(self, **request) -> None:
        self.asked.append("warm")

    def ask(self, way, **request) -> dict:
        if len(self.asked) == self.fails_at:
            raise peers.Skipped(f"{self.name} broke")
        self.asked.append(way)
        return {"seconds": self.seconds[way], "joules": None}


class Stream:
    def gigabytes_per_second(self) -> float:
        return 10.0


@pytest.fixture(autouse=True)
def idle(monkeypatch):
    monkeypatch.setattr(peers, "undisturbed", lambda peer, way, request, cpus: (peer.ask(way, **request), 0.0, 1.0))


def columns(result, found, saved=None, **changes):
    arguments = argparse.Namespace(threads=1, rounds=3, tokens=32, seconds=0.0)
    arguments.__dict__.update(changes)
    save = (lambda: saved.append(json.loads(json.dumps(result)))) if saved is not None else lambda: None
    return peers.Columns(result, found, arguments, [0], save)


def test_the_first_round_tries_all_flags_and_the_others_keep_the_fastest():
    slow, fast = ("-fa", "0"), ("-fa", "1")
    peer, result = Fake("a", {slow: 2.0, fast: 1.0}), {"shape": "0.6B"}
    columns(result, [peer]).column("prefill 8", {"prefill": 8}, 8, Stream())
    assert peer.asked == ["warm", slow, fast, fast, fast]
    cell = result["rows"][0]["prefill 8"]
    assert cell["ways"] == {"-fa 0": [4.0], "-fa 1": [8.0, 8.0, 8.0]}
    assert (cell["median"], cell["flags"]) == (8.0, "-fa 1")
    assert result["columns"]["prefill 8"]["stream"] == [10.0] * 3


@pytest.mark.parametrize("kept", range(1, 7))
def test_a_run_that_is_broken_off_goes_on_where_it_stopped(kept):
    saved, request = [], {"decode": [16, 32]}
    columns({"shape": "0.6B"}, [Fake("a", {(): 1.0}), Fake("b", {(): 2.0})], saved).column(
        "decode 16", request, 32, Stream()
    )
    whole = saved[-1]
    assert len(saved) == 6
    again, rest = [Fake("a", {(): 1.0}), Fake("b", {(): 2.0})], saved[kept - 1]
    columns(rest, again).column("decode 16", request, 32, Stream())
    assert sum(len([way for way in peer.asked if way != "warm"]) for peer in again) == 6 - kept
    for row, want in zip(rest["rows"], whole["rows"], strict=True):
        assert row["decode 16"]["ways"] == want["decode 16"]["ways"]
        assert row["decode 16 bytes"] == want["decode 16 bytes"]


def test_other_settings_are_measured_anew_and_other_rows_stay():
    result, peer = {"shape": "0.6B"}, Fake("a", {(): 1.0})
    columns(result, [peer]).column("prefill 8", {"prefill": 8}, 8, Stream())
    other = Fake("b", {(): 1.0})
    columns(result, [other]).column("prefill 8", {"prefill": 8}, 8, Stream())
    assert [row["name"] for row in result["rows"]] == ["b", "a"]
    assert all(len(row["prefill 8"]["ways"][""]) == 3 for row in result["rows"])
    columns(result, [other], tokens=16).column("prefill 8", {"prefill": 8}, 8, Stream())
    assert [("prefill 8" in row) for row in result["rows"]] == [True, False]


def test_a_peer_that_breaks_is_named_and_the_time_is_kept():
    result = {"shape": "0.6B"}
    columns(result, [Fake("a", {(): 1.0}, fails_at=2), Fake("b", {(): 1.0})]).column("x", {"prefill": 8}, 8, Stream())
    assert result["columns"]["x"]["skipped"] == ["a broke"]
    assert [len(row["x"]["ways"][""]) for row in result["rows"]] == [1, 3]
    with pytest.raises(peers.Enough):
        columns(result, [Fake("c", {(): 1.0})], seconds=1e-9).column("x", {"prefill": 8}, 8, Stream())


def test_a_shared_core_is_refused(monkeypatch):
    monkeypatch.undo()
    used = iter([(0.5, 0.0), (0.4, 0.0), (0.1, 0.9), (0.3, 0.0), (0.2, 1.0), (0.4, 0.0)])

    class Shared:
        def __init__(self, *pids, cpus):
            assert cpus == [1]

        def cores(self):
            return next(used)

    monkeypatch.setattr(peers, "Neighbors", Shared)
    peer = Fake("a", {(): 1.0})
    assert peers.undisturbed(peer, (), {}, [1]) == ({"seconds": 1.0, "joules": None}, 0.1, 0.9)
    assert peers.undisturbed(peer, (), {}, [1]) == (None, 0.2, 1.0)
    assert len(peer.asked) == 6


def test_pinned_to_the_cores_that_are_used_least():
    before = os.sched_getaffinity(0)
    try:
        assert measure.pin(len(before)) == sorted(before) == sorted(os.sched_getaffinity(0))
        assert set(measure.pin(1)) == os.sched_getaffinity(0) <= before
    finally:
        for task in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(task), before)


def test_neighbors_count_a_busy_core_once():
    neighbors = measure.Neighbors(cpus=sorted(os.sched_getaffinity(0)))
    sum(range(3_000_000))  # this process is no neighbor
    here, elsewhere = neighbors.cores()
    assert 0 <= here <= os.cpu_count() + 0.5
    assert elsewhere >= 0


@pytest.mark.parametrize("channel", [1, 2])
def test_a_batchs_table_is_found_in_the_answer_or_in_the_log(tmp_path, channel):
    """llama.cpp prints it, ik_llama.cpp logs it."""
    table = "|    PP |     TG |    B |   T_TG s |\n|-------|--------|------|----------|\n|    16 |      4 |    3 |    0.250 |\n"
    for name, words in (("llama-bench", "usage"), ("llama-batched-bench", table)):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\nprintf '{words}' >&{channel}\n")
        path.chmod(0o755)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    peer = peers.LlamaBench("peer", "TQ2_0", str(tmp_path / "llama-bench"), tmp_path / "model.gguf", 1)
    assert peer.ask((), batch=(3, 4))["seconds"] == 0.25
    with pytest.raises(peers.Skipped, match="without figures"):
        peer.ask((), batch=(5, 4))
