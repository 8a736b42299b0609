"""The run directory: when a stage runs again, why, and that a result is whole or absent."""

import pytest

from bitdistill import names, train
from bitdistill.command_line import parse_config
from bitdistill.errors import UserError
from bitdistill.stages import RunDirectory, flatten

STAGES = ("teacher", "refine", "pretrain", "distill")
DEPENDS_ON = {name: stage.depends_on for name, stage in train.STAGES.items()}


def finish(directory, stage, settings):
    with directory.result(stage, settings, {"seconds": 1.0}) as folder:
        (folder / "weights").write_text(stage)


@pytest.fixture
def directory(tmp_path):
    directory = RunDirectory(tmp_path / "run", DEPENDS_ON, STAGES)
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


def test_settings_that_earlier_versions_did_not_write_down_rerun_nothing(directory):
    now = {"refine": {"learning_rate": 1e-3}, "corpus blocks": {"block_size": 64, "seed": 0}}
    assert directory.reason_to_run("refine", now) is None
    finish(directory, "refine", now)
    now["corpus blocks"]["block_size"] = 32
    assert directory.reason_to_run("refine", now) == "corpus blocks.block_size changed from 64 to 32"


def test_stages_that_read_the_corpus_depend_on_its_blocks():
    """What stage 1 is calibrated on and what the demo's base model is trained on changes with the length of a block."""
    for stage, reads in ((name, stage.reads) for name, stage in train.STAGES.items()):
        takes_blocks = "corpus" in reads or "calibration" in reads
        assert not takes_blocks or {"blocks", "calibration", "pretrain", "cache", "trimming"} & set(reads), stage


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
    directory = RunDirectory(tmp_path, DEPENDS_ON, STAGES)
    with pytest.raises(UserError, match=r"finished `refine` before `pretrain`.*--stage refine"):
        directory.require_inputs("pretrain")
    directory.require_inputs("refine")  # needs nothing: the base stage is not part of this run
    assert directory.reason_to_run("refine", {}) == "not run yet"


def test_the_table_of_stages_is_in_an_order_that_works():
    seen = set()
    for stage, needed in DEPENDS_ON.items():
        assert seen.issuperset(needed)
        seen.add(stage)
    assert list(train.STAGES) == list(names.STAGES)
    assert set(names.SETTINGS.values()) <= seen


def test_a_stage_that_a_run_does_not_have_is_replaced_by_what_it_needs():
    """Without stage 2 the third starts from the refined model; a run without teacher logits misses nothing."""
    run = RunDirectory("run", DEPENDS_ON, {"base", "teacher", "refine", "distill"})
    assert run.inputs("distill") == ("refine", "teacher")
    run = RunDirectory("run", DEPENDS_ON, {"base", "refine", "pretrain"})
    assert run.inputs("pretrain") == ("refine",)


@pytest.mark.parametrize(
    ("arguments", "stages"),
    [
        ([], "base teacher refine pretrain distill baseline evaluate export"),
        (["--pretrain.lambda_logits", "1"], "base teacher refine cache pretrain distill baseline evaluate export"),
        (
            ["--pretrain.enabled", "false", "--pretrain.lambda_logits", "1"],
            "base teacher refine distill baseline evaluate export",
        ),
        (["--evaluate.enabled", "false"], "base teacher refine pretrain distill baseline export"),
        (["--baseline.enabled", "false", "--export.enabled", "false"], "base teacher refine pretrain distill evaluate"),
        (
            ["--model", "m", "--task", "sst2", "--corpus", "c"],
            "teacher refine pretrain distill baseline evaluate export",
        ),
        (["--model", "m", "--task", "sst2", "--student", "STUDENT"], "teacher distill baseline evaluate export"),
    ],
)
def test_which_stages_a_run_has(tmp_path, arguments, stages):
    (tmp_path / "model.safetensors").touch()
    config, _ = parse_config([str(tmp_path) if word == "STUDENT" else word for word in arguments])
    assert [name for name, stage in train.STAGES.items() if stage.part_of_run(config)] == stages.split()


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": [1]}}, "e": None}) == {"a.b": 1, "a.c.d": [1], "e": None}


def unfinished(directory, stage, settings, name="checkpoint-4"):
    said = directory.open_checkpoints(stage, settings)
    (directory.checkpoints(stage) / name).mkdir(exist_ok=True)
    return said


def test_unfinished_work_of_the_same_settings_is_gone_on_with(tmp_path):
    directory = RunDirectory(tmp_path, DEPENDS_ON, STAGES)
    assert unfinished(directory, "teacher", {"settings": {"seed": 0}}) is None
    assert directory.open_checkpoints("teacher", {"settings": {"seed": 0}}) is None
    assert directory.has_checkpoints("teacher")


def test_unfinished_work_of_other_settings_is_kept_aside_and_found_again(tmp_path):
    directory = RunDirectory(tmp_path, DEPENDS_ON, STAGES)
    unfinished(directory, "teacher", {"settings": {"seed": 0}}, "checkpoint-8")
    said = unfinished(directory, "teacher", {"settings": {"seed": 1}}, "checkpoint-2")
    aside = tmp_path / "checkpoints" / "aside"
    assert said == f"earlier checkpoints belong to other settings (seed was 0 and is 1): kept in {aside / 'teacher-1'}"
    assert (aside / "teacher-1" / "checkpoint-8").is_dir()
    said = directory.open_checkpoints("teacher", {"settings": {"seed": 0}})
    assert said.endswith(f"checkpoints of these settings were found in {aside / 'teacher-1'}")
    assert (directory.checkpoints("teacher") / "checkpoint-8").is_dir()
    assert [path.name for path in aside.glob("*/checkpoint-*")] == ["checkpoint-2"]


def test_a_damaged_record_of_what_checkpoints_belong_to_loses_nothing(tmp_path):
    directory = RunDirectory(tmp_path, DEPENDS_ON, STAGES)
    unfinished(directory, "teacher", {"settings": {"seed": 0}})
    (directory.checkpoints("teacher") / "settings.json").write_text('{"settings": {"se')
    assert "kept in" in directory.open_checkpoints("teacher", {"settings": {"seed": 0}})
    assert len(list(tmp_path.glob("checkpoints/aside/teacher-1/checkpoint-4"))) == 1


def test_only_restart_discards(tmp_path):
    directory = RunDirectory(tmp_path, DEPENDS_ON, STAGES)
    for seed in (0, 1):
        unfinished(directory, "teacher", {"settings": {"seed": seed}})
    said = directory.open_checkpoints("teacher", {"settings": {"seed": 1}}, restart=True)
    assert said.startswith("--restart discards ")
    assert "aside/teacher-1" in said
    assert not directory.has_checkpoints("teacher")
    assert not list(tmp_path.glob("checkpoints/aside/*"))


def test_a_damaged_result_is_named(directory):
    (directory.folder("teacher") / "done.json").write_text("{")
    with pytest.raises(UserError, match=r"teacher/done.json: expected the record of a finished stage"):
        directory.reason_to_run("teacher", {})
