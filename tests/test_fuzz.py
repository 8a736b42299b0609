"""A thousand damaged files: every reader gives a right result or one clear line (bench/fuzz.py has the long run)."""

import random

import pytest

import fuzz
from bitdistill.export.hugging_face import FORMATS


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return fuzz.make_targets(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.slow
def test_a_thousand_damaged_files(targets):
    results = fuzz.run(targets, fuzz.shares(targets, 1000), seed=0, say=lambda text: None)
    assert sum(sum(result.outcomes.values()) for result in results.values()) >= 950
    assert [fault for result in results.values() for fault in result.faults] == []
    for name, result in results.items():
        if name != "run: proof.json":  # which is left out, and `info` says so
            assert result.outcomes["refused"], f"{name}: nothing was refused"
    assert not any(result.outcomes["other"] for name, result in results.items() if name.startswith(FORMATS))
    assert not results["packed file"].outcomes["other"]


def test_a_reader_that_fails_is_seen(tmp_path):
    """What the test above would say of a traceback, of damage that is read, and of a good reader."""
    path = tmp_path / "x"
    path.write_bytes(b"1, 2, 3")

    def outcomes(read, exact=False):
        result = fuzz.run({"x": fuzz.Target(path, read, "text", exact=exact)}, {"x": 40}, 0, say=lambda text: None)["x"]
        return result.outcomes

    assert outcomes(lambda: sum(map(int, path.read_text(encoding="latin-1").split(","))))["FAULT"] > 10
    assert outcomes(path.read_bytes, exact=True)["FAULT"] > 10
    assert outcomes(path.read_bytes)["FAULT"] == 0
    assert path.read_bytes() == b"1, 2, 3"


def test_a_seed_gives_the_same_mutations():
    data = b'{"a": [1, 2, {"b": "c"}]}' * 3
    for kind in ("text", "json", "binary"):
        first = [fuzz.mutate(data, kind, random.Random(case)) for case in range(50)]
        assert first == [fuzz.mutate(data, kind, random.Random(case)) for case in range(50)]
        assert sum(one != data for one in first) > 40
