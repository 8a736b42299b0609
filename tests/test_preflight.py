"""What can be known before the first step is said before the first step, all of it at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_gguf import CONFIGS, model_of, write_gguf
from transformers import Qwen3Config

from bitdistill import preflight_checks
from bitdistill.command_line import explicit_settings
from bitdistill.errors import UserError
from bitdistill.problems import Problems, Report

REPOSITORY = Path(__file__).parent.parent


def test_a_report_collects_every_problem_and_says_them_together():
    report = Report()
    with report.part("first") as found:
        found += ["this", "that"]
    report.require()
    for number in (1, 2, 2):
        with report.part(f"part {number}"):
            raise UserError(f"setting_{number}", expected="a", got="b", do="c.")
    assert [state for _, state, _ in report.rows] == ["ok", "problem", "problem", "ok"]  # the same is said once
    with pytest.raises(Problems, match=r"2 problems: \(1\) setting_1: .* \(2\) setting_2: ") as error:
        report.require()
    assert "\n" not in str(error.value)
    assert "ok       first   this; that" in report.table()


def test_defaults_become_the_models_limit_and_wishes_beyond_it_are_refused():
    assert preflight_checks.fitted_length("max_length", 256, 256, explicit=True) == 256
    assert preflight_checks.fitted_length("max_length", 512, 256, explicit=False) == 256
    with pytest.raises(UserError, match=r"max_length: expected at most 256.* got 512"):
        preflight_checks.fitted_length("max_length", 512, 256, explicit=True)
    assert preflight_checks.fitted_dtype("gemma3_text", "float16", explicit=False) == "bfloat16"
    assert preflight_checks.fitted_dtype("qwen3", "float16", explicit=True) == "float16"
    with pytest.raises(UserError, match="65,504"):
        preflight_checks.fitted_dtype("gemma3_text", "float16", explicit=True)


def test_what_a_command_line_gives_is_told_from_defaults(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("teacher: {dtype: float32}\n")
    given = ["--model", "x", "--pretrain.block_size=32", "--config", str(file), "--resume"]
    assert {"model", "pretrain.block_size", "teacher.dtype", "resume"} <= explicit_settings(given)
    assert not {"max_length", "teacher.max_steps", "distill.lambda_logits"} & explicit_settings(given)
    assert "max_length" not in explicit_settings([])


@pytest.mark.parametrize("name", ["cosin", "", "warmup_stable_decay", "reduce_lr_on_plateau", "cosine_with_min_lr"])
def test_schedules_that_transformers_cannot_make_are_refused(name):
    with pytest.raises(UserError, match=r"distill\.lr_scheduler_type: expected one of linear, cosine,"):
        preflight_checks.check_schedule("distill.lr_scheduler_type", name)
    preflight_checks.check_schedule("distill.lr_scheduler_type", "constant_with_warmup")


def test_trackers_must_be_known_and_installed():
    preflight_checks.check_trackers([])
    preflight_checks.check_trackers(["none"])
    with pytest.raises(UserError, match="'tensorbord'"):
        preflight_checks.check_trackers(["tensorbord"])
    with pytest.raises(UserError, match=r"neptune, which is not"):
        preflight_checks.check_trackers(["neptune"])


def test_surgery_is_tried_without_numbers():
    usual = {"norms": "two", "subln_eps": None, "weight_quantizer": "absmean"}
    for config in CONFIGS.values():
        assert "SubLN added" in preflight_checks.check_surgery(config, embedding="int4", **usual)
    odd = Qwen3Config(**CONFIGS["qwen3"].to_dict() | {"hidden_size": 48})
    with pytest.raises(UserError, match="int4"):
        preflight_checks.check_surgery(odd, embedding="int4", **usual)


def test_relations_between_models_of_different_shape():
    one, other = CONFIGS["qwen3"], Qwen3Config(**CONFIGS["qwen3"].to_dict() | {"num_attention_heads": 6})
    preflight_checks.check_relations(one, one, layers=[-1, 0], teacher_layers=None, convention="eq12", split_heads=None)
    preflight_checks.check_relations(other, one, layers=[-1], teacher_layers=[1], convention="eq12", split_heads=4)
    for settings, word in (
        ({"layers": [2], "teacher_layers": None, "split_heads": None}, "relation_layers"),
        ({"layers": [0], "teacher_layers": [-3], "split_heads": None}, "relation_layers"),
        ({"layers": [0, -2], "teacher_layers": None, "split_heads": None}, "each named once"),
        ({"layers": [0], "teacher_layers": None, "split_heads": None}, "split_heads"),
        ({"layers": [0], "teacher_layers": None, "split_heads": 5}, "split_heads"),
    ):
        with pytest.raises(UserError, match=word):
            preflight_checks.check_relations(other, one, convention="eq12", **settings)


def test_memory_and_disk_are_compared_with_what_is_free(tmp_path):
    assert 0 < preflight_checks.free_memory() < 1 << 62
    needed = {"teacher": {"weights": 1e9}, "pretrain": {"weights": 1e9, "optimizer": 2e9}}
    assert preflight_checks.check_memory(needed, 4 * 10**9, 1, "of memory").startswith(
        "3 GB of memory for stage pretrain"
    )
    with pytest.raises(UserError, match=r"6 GB of memory for stage pretrain \(weights 2, optimizer 4\)"):
        preflight_checks.check_memory(needed, 4 * 10**9, 2, "of memory")  # two ranks share what is free
    # checkpoints are gone when the next stage begins; a replaced result is there until the new one is whole
    assert preflight_checks.peak_on_disk([(30, 10, 0), (0, 10, 0)]) == 40
    assert preflight_checks.peak_on_disk([(0, 10, 10), (5, 10, 0)]) == 15
    preflight_checks.check_disk(tmp_path, 0)
    with pytest.raises(UserError, match="output_dir"):
        preflight_checks.check_disk(tmp_path, 1 << 62)


def test_the_folder_of_the_run_must_take_files(tmp_path):
    preflight_checks.check_folder(tmp_path / "new" / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output_dir"):
        preflight_checks.check_folder(tmp_path / "file" / "run")


def run(*arguments: str) -> tuple[int, str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "bitdistill.train", *arguments],
        capture_output=True, text=True, timeout=500, env=environment, cwd=REPOSITORY,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def files(tmp_path) -> list[str]:
    """A tiny GGUF model, a task and its rows; the arguments that name them."""
    write_gguf(tmp_path / "tiny.gguf", model_of("qwen3"))
    task = {"kind": "classification", "prompt": "{text}\nIt was", "truncate_column": "text", "label_column": "label"}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task | {"labels": {0: "bad", 1: "good"}}))
    rows = [json.dumps({"text": f"the {i} things", "label": i % 2}) for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "corpus.txt").write_text("the thing in the thing\n" * 400)
    named = {"model": "tiny.gguf", "task": "task.yaml", "train_file": "rows.jsonl", "validation_file": "rows.jsonl"}
    named |= {"corpus": "corpus.txt", "output_dir": "run"}
    return [f"--{name}={tmp_path / value}" for name, value in named.items()]


def test_rows_become_tokens_once_for_all_stages(tmp_path, monkeypatch):
    """Preflight and three stages ask for the same tokens; another tokenizer, or many tokens, are encoded anew."""
    from test_loading import tokenizer
    from tiny_gguf import MERGES, TOKENS

    from bitdistill.data import sources

    (tmp_path / "rows.jsonl").write_text('{"text": "the thing", "label": 1}\n{"text": "in", "label": 0}\n')
    task = {"kind": "classification", "prompt": "{text}\nIt was", "truncate_column": "text", "label_column": "label"}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task | {"labels": {0: "bad", 1: "good"}}))
    calls, encode = [], sources.encode
    monkeypatch.setattr(sources, "encode", lambda *given: calls.append(given) or encode(*given))
    ours = sources.Sources(str(tmp_path / "task.yaml"), str(tmp_path / "rows.jsonl"))
    first = ours.encoded_rows(tokenizer(), 300)
    assert ours.encoded_rows(tokenizer(), 300) is first
    assert ours.training_tokens(tokenizer(), 300, tmp_path / "example.txt") is first[0]
    assert len(calls) == 1
    fewer = ours.encoded_rows(tokenizer(TOKENS, MERGES[:1]), 300)
    assert len(calls) == 2
    assert fewer[1]["tokens"] > first[1]["tokens"]
    monkeypatch.setattr(sources, "KEPT_TOKENS", 3)
    other = sources.Sources(str(tmp_path / "task.yaml"), str(tmp_path / "rows.jsonl"))
    assert other.encoded_rows(tokenizer(), 300)[0].to_list() == first[0].to_list()
    other.encoded_rows(tokenizer(), 300)
    assert len(calls) == 4


@pytest.mark.slow
def test_stage_check_prints_every_problem_and_trains_nothing(files, tmp_path):
    wrong = ["--stage=check", "--max_length=200", "--pretrain.lr_scheduler_type=cosin", "--report_to=[neptune]"]
    wrong += ["--distill.relation_layers=[7]", f"--corpus={tmp_path / 'nowhere.txt'}", "--recipe=quick"]
    status, said = run(*files, *wrong)
    assert status == 2
    assert "5 problems" in said
    for setting in ("max_length", "pretrain.lr_scheduler_type", "report_to", "relation_layers", "corpus"):
        assert f"{setting}: expected" in said, said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "teacher").exists()


@pytest.mark.slow
def test_a_gguf_file_is_trained_with_lengths_that_fit_it(files, tmp_path):
    """The default lengths of a recipe become the model's; the file is dequantized once, and said with its precision."""
    less = ["--recipe=standard", "--max_steps=1", "--report=false", "--report_to=[]", "--baseline.enabled=false"]
    less += ["--evaluate.weight_only=false", "--refine.gain=one", "--teacher.per_device_train_batch_size=2"]
    less += ["--pretrain.per_device_train_batch_size=1", "--pretrain.gradient_accumulation_steps=1"]
    less += ["--distill.per_device_train_batch_size=2", "--distill.gradient_accumulation_steps=1"]
    less += ["--distill.relation_layers=[-1]", "--export.speed_tokens=100"]
    status, said = run(*files, *less)
    assert status == 0, said
    assert "tiny.gguf" in said
    assert "(32.00 bits per weight)" in said
    assert "pretrain.block_size: 128, the model's positions" in said
    assert (tmp_path / "run" / "export" / "student.safetensors").is_file()
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["pretrain"]["block_size"] == 128
    status, said = run("--config", str(tmp_path / "run" / "config.yaml"))
    assert status == 0, said
    assert "teacher: done and unchanged" in said
    assert "bits per weight" not in said
