"""The run directory: when a stage runs again, why, and that a result is whole or absent."""

import pytest

from bitdistill.errors import UserError
from bitdistill.stages import AFTER, RunDirectory, file_identity, flatten

STAGES = ("teacher", "refine", "pretrain", "distill")


def finish(directory, stage, settings):
    with directory.result(stage, settings, {"seconds": 1.0}) as folder:
        (folder / "weights").write_text(stage)


@pytest.fixture
def directory(tmp_path):
    directory = RunDirectory(tmp_path / "run", STAGES)
    for stage in STAGES:
        finish(directory, stage, {stage: {"learning_rate": 1e-3}})
    return directory


def test_everything_stands(directory):
    for stage in STAGES:
        assert directory.reason_to_run(stage, {stage: {"learning_rate": 1e-3}}) is None
    assert directory.done("distill")["inputs"].keys() == {"pretrain", "teacher"}


def test_changed_setting_is_named_and_what_follows_reruns(directory):
    changed = {"pretrain": {"learning_rate": 2e-3}}
    assert directory.reason_to_run("pretrain", changed) == "pretrain.learning_rate changed from 0.001 to 0.002"
    finish(directory, "pretrain", changed)
    assert directory.reason_to_run("distill", {"distill": {"learning_rate": 1e-3}}) == "pretrain was run again"
    assert directory.reason_to_run("teacher", {"teacher": {"learning_rate": 1e-3}}) is None


def test_new_and_removed_settings_count(directory):
    reason = directory.reason_to_run("refine", {"refine": {"learning_rate": 1e-3, "gain": "one"}})
    assert reason == "refine.gain changed from None to one"
    assert "and 1 more" in directory.reason_to_run("refine", {"refine": {"a": 1}})


def test_an_error_leaves_the_old_result(directory):
    before = directory.done("refine")["id"]

    def half_way():
        with directory.result("refine", {}, {}) as folder:
            (folder / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half_way()
    assert directory.done("refine")["id"] == before
    assert (directory.folder("refine") / "weights").read_text() == "refine"


def test_missing_input(tmp_path):
    directory = RunDirectory(tmp_path, STAGES)
    with pytest.raises(UserError, match=r"finished `refine` before `pretrain`.*--stage refine"):
        directory.require_inputs("pretrain")
    directory.require_inputs("refine")  # stands on nothing: the base stage is not part of this run
    assert directory.reason_to_run("refine", {}) == "not run yet"


def test_order_is_a_topological_one():
    seen = set()
    for stage, after in AFTER.items():
        assert seen.issuperset(after)
        seen.add(stage)


def test_flatten_and_identity(tmp_path):
    assert flatten({"a": {"b": 1, "c": {"d": [1]}}, "e": None}) == {"a.b": 1, "a.c.d": [1], "e": None}
    assert file_identity(None) is None
    assert file_identity("some/hub-id") == "some/hub-id"
    file = tmp_path / "x.jsonl"
    file.write_text("1")
    one = file_identity(file)
    file.write_text("22")
    assert file_identity(file) != one
    assert len(file_identity(tmp_path)) == 1
