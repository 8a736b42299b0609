"""Settings: precedence, validation, and that the resolved file can be run again."""

import dataclasses
import math
from typing import get_args, get_origin, get_type_hints

import pytest
import torch
import yaml

from bitdistill.command_line import RECIPES, parse_config
from bitdistill.config import RunConfig
from bitdistill.errors import UserError
from bitdistill.limits import LIMITS, check_limits

REAL = ["--model", "m", "--task", "sst2", "--corpus", "c.txt"]


@pytest.mark.parametrize("recipe", ["demo", "laptop", "quick", "standard", "paper"])
def test_shipped_recipes_are_valid(recipe):
    config, text = parse_config(["--recipe", recipe, *(REAL if recipe != "demo" else [])])
    assert isinstance(config, RunConfig)
    assert config.recipe == recipe == yaml.safe_load(text)["recipe"]


def test_paper_recipe_is_the_papers():
    config, _ = parse_config(["--recipe", "paper", *REAL])
    d = config.distill
    assert (d.lambda_logits, d.gamma_attention, d.kd_temperature, d.kd_tau_squared) == (10, 1e5, 5, False)
    assert (d.relation, config.refine.norms, config.refine.gain) == ("eq12", "two", "one")
    assert (config.max_length, d.per_device_train_batch_size) == (512, 32)
    p = config.pretrain
    tokens = p.max_steps * p.block_size * p.per_device_train_batch_size * p.gradient_accumulation_steps
    assert tokens == pytest.approx(10e9, rel=1e-4)


def test_defaults_follow_the_model():
    assert parse_config([])[0].recipe == "demo"
    assert parse_config(REAL)[0].recipe == ("standard" if torch.cuda.is_available() else "laptop")


def test_a_gpu_decides_between_the_two_recipes_for_a_real_model(monkeypatch):
    for there, recipe in ((True, "standard"), (False, "laptop")):
        monkeypatch.setattr("torch.cuda.is_available", lambda there=there: there)
        assert parse_config(REAL)[0].recipe == recipe


def test_command_line_beats_file_beats_recipe(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 5\ndistill:\n  learning_rate: 0.25\n  lambda_logits: 3\n")
    config, _ = parse_config(["--config", str(file), "--distill.lambda_logits", "4"])
    assert (config.seed, config.distill.learning_rate, config.distill.lambda_logits) == (5, 0.25, 4)


def test_resolved_file_runs_again_as_it_is(tmp_path):
    arguments = [*REAL, "--distill.relation_layers", "[-2, -1]", "--distill.gamma_attention", "60", "--resume"]
    config, text = parse_config([*arguments, "--distill.split_heads=8", "--teacher.dtype=bfloat16"])
    file = tmp_path / "config.yaml"
    file.write_text(text)
    again, same_text = parse_config(["--config", str(file)])
    assert again == config
    assert same_text == text
    assert config.distill.relation_layers == [-2, -1]
    assert config.distill.gamma_attention == 60
    assert config.resume


def test_a_restart_is_not_written_down(tmp_path):
    config, text = parse_config(["--restart"])
    assert config.restart
    assert yaml.safe_load(text)["restart"] is False


@pytest.mark.parametrize("value", ["true", "false"])
def test_resume_of_older_command_lines_and_files_is_accepted(tmp_path, value):
    (tmp_path / "old.yaml").write_text(f"resume: {value}\n")
    parse_config(["--config", str(tmp_path / "old.yaml")])
    parse_config([f"--resume={value}"])


def test_a_null_overrides_a_recipes_value(tmp_path):
    _, text = parse_config([*REAL, "--recipe", "paper"])
    settings = yaml.safe_load(text) | {"corpus_column": None}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert parse_config(["--config", str(file), "--recipe", "paper"])[0].corpus_column is None


def test_a_section_without_settings_is_named(tmp_path):
    (tmp_path / "run.yaml").write_text("seed: 3\ndistill:\n")
    with pytest.raises(UserError, match=r"^config: expected settings below `distill:`; got nothing"):
        parse_config(["--config", str(tmp_path / "run.yaml")])


def test_print_config(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(["--print_config"])
    assert stop.value.code in (0, None)
    assert yaml.safe_load(capsys.readouterr().out)["distill"]["relation"] == "eq12"


def test_launcher_argument_is_ignored():
    assert parse_config(["--local_rank=1"])[0] == parse_config([])[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1"], "learning_rat"),
        (["--zero", "4"], "zero"),
        (["--distill.gamma_attention", "much"], "gamma_attention"),
        (["--recipe", "best"], "recipe: expected one of demo, laptop, paper, quick, standard; got 'best'"),
        (["--config", "/no/such/file.yaml"], "file.yaml"),
        (
            ["--distill.learning_rate", "0"],
            "distill.learning_rate: expected a number above 0; got 0.0. Give such a number",
        ),
        (["--distill.max_steps", "0"], "distill.max_steps"),
        (["--teacher.save_steps", "-1"], "teacher.save_steps"),
        (["--distill.relation_layers", "[]"], "distill.relation_layers: expected at least one layer"),
        (["--distill.teacher_relation_layers", "[1, 2]"], "distill.teacher_relation_layers: expected as many layers"),
        (["--pretrain.annealing_start", "0.9"], "pretrain.annealing_start: expected at most pretrain.annealing_end"),
        (["--base.train_sampling_strategy", "group_by_length"], "base.train_sampling_strategy: expected random"),
        (["--baseline.learning_rate", ".nan"], "baseline.learning_rate: expected a number above 0; got nan"),
        (["--evaluate.max_rows", "0"], "evaluate.max_rows: expected a whole number from 1 on; got 0"),
        (["--export.proof_rows", "-1"], "export.proof_rows"),
        (["--refine.subln_eps", ".inf"], "refine.subln_eps: expected a number above 0; got inf"),
        (["--seed", "4294967296"], "seed: expected a whole number from 0 to 4294967295"),
        (["--output_dir", ""], "output_dir: expected a text; got ''"),
        (["--max_steps", "-3"], "max_steps"),
        (["--task", "sst2"], "model: expected a base model"),
        (["--model", "m"], "task: expected sst2"),
        (["--model", "m", "--task", "sst2"], "corpus: expected text for stage 2"),
        (["--corpus", "task"], "corpus: expected general text, from which the demo's base model learns; got task"),
        ([*REAL, "--teacher.finetuned", "true"], "teacher.finetuned"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError) as error:
        parse_config(arguments)
    assert message in str(error.value)


def numbers_of(kind, where=""):
    """(dotted name, type) of every setting that takes a number, alone or in a list."""
    for name, type_ in get_type_hints(kind).items():
        if dataclasses.is_dataclass(type_):
            yield from numbers_of(type_, f"{name}.")
        elif {int, float} & {type_, *get_args(type_), *(one for part in get_args(type_) for one in get_args(part))}:
            yield f"{where}{name}", type_


def test_every_number_has_a_limit_and_keeps_it():
    """Beyond either end, and for floats NaN and infinity: refused by the setting's own name, with what to do."""
    for name, type_ in numbers_of(RunConfig):
        limit = LIMITS[name.rpartition(".")[2]]
        wrong = [limit.lowest - 3, math.nan, math.inf, -math.inf]  # -1 is a word for max_steps
        wrong += [limit.highest + 1] if math.isfinite(limit.highest) else []
        wrong += [limit.lowest] if limit.above else []
        wrong += [limit.highest] if limit.below else []
        several = list in (get_origin(part) for part in (type_, *get_args(type_)))
        for value in wrong:
            config = RunConfig()
            section, _, setting = name.rpartition(".")
            setattr(getattr(config, section) if section else config, setting, [value] if several else value)
            with pytest.raises(UserError) as error:
                check_limits(config)
            assert error.value.field == name
            assert error.value.do


def test_what_the_parser_refuses_is_said_under_the_setting():
    for value in ("true", "much", "[1]"):
        with pytest.raises(UserError) as error:
            parse_config([f"--distill.learning_rate={value}"])
        assert error.value.field == "distill.learning_rate"


def test_every_text_has_something_in_it():
    for arguments, field in (
        (["--train_file", " "], "train_file"),
        (["--extra_validation_files.x", ""], "extra_validation_files"),
        (["--report_to", '["tensorboard", ""]'], "report_to"),
        (["--teacher.model", ""], "teacher.model"),
    ):
        with pytest.raises(UserError) as error:
            parse_config(arguments)
        assert error.value.field == field


def test_every_setting_is_documented():
    """jsonargparse takes the help texts from the docstrings: a setting without one has no help."""

    def walk(kind):
        for field in dataclasses.fields(kind):
            assert f"{field.name}:" in "".join(k.__doc__ for k in kind.__mro__[:-1]), f"{kind.__name__}.{field.name}"
            nested = getattr(field.default_factory, "__dataclass_fields__", None)
            if nested:
                walk(field.default_factory)

    walk(RunConfig)


def test_recipes_have_no_unknown_keys():
    for path in RECIPES.glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["recipe"] == path.stem
