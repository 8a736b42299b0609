"""Settings: precedence, validation, and that the resolved file can be run again."""

import pytest
import yaml

from bitdistill.config import RECIPES, RunConfig, parse_config
from bitdistill.errors import UserError

REAL = ["--model", "m", "--task", "sst2", "--corpus", "c.txt"]


@pytest.mark.parametrize("recipe", ["demo", "quick", "standard", "paper"])
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
    assert parse_config(REAL)[0].recipe == "standard"


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


def test_a_null_overrides_a_recipes_value(tmp_path):
    _, text = parse_config([*REAL, "--recipe", "paper"])
    settings = yaml.safe_load(text) | {"corpus_column": None}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert parse_config(["--config", str(file), "--recipe", "paper"])[0].corpus_column is None


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
        (["--recipe", "best"], "recipe: expected one of demo, paper, quick, standard; got 'best'"),
        (["--config", "/no/such/file.yaml"], "file.yaml"),
        (["--distill.learning_rate", "0"], "distill.learning_rate: expected a positive number"),
        (["--distill.max_steps", "0"], "distill.max_steps"),
        (["--teacher.save_steps", "-1"], "teacher.save_steps"),
        (["--distill.relation_layers", "[]"], "relation_layers"),
        (["--distill.teacher_relation_layers", "[1, 2]"], "relation_layers"),
        (["--max_steps", "-3"], "max_steps"),
        (["--task", "sst2"], "model: expected a base model"),
        (["--model", "m"], "task: expected sst2"),
        (["--model", "m", "--task", "sst2"], "corpus: expected text for stage 2"),
        ([*REAL, "--teacher.finetuned", "true"], "teacher.finetuned"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError) as error:
        parse_config(arguments)
    assert message in str(error.value)


def test_every_setting_is_documented():
    """jsonargparse takes the help texts from the docstrings: a setting without one has no help."""
    import dataclasses

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
