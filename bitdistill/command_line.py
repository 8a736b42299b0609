"""From the main job's command line to its settings: recipes, --config files, options, and errors in the settings' own names."""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from bitdistill import console, folders
from bitdistill.argument_errors import refuse_long_numbers, refused
from bitdistill.config import RunConfig
from bitdistill.distributed import process_group
from bitdistill.errors import UserError
from bitdistill.names import TASK_CORPUS
from bitdistill.text_files import user_path
from bitdistill.yaml_files import read_yaml

RECIPES = Path(__file__).parent / "recipes"


def settings_named(kind: type = RunConfig, prefix: str = "") -> list[str]:
    """Dotted names of all settings and sections."""
    names = []
    for setting in dataclasses.fields(kind):
        name, section = f"{prefix}{setting.name}", setting.default_factory
        names += [name, *(settings_named(section, f"{name}.") if dataclasses.is_dataclass(section) else [])]
    return names


def _chosen_recipe(arguments: Sequence[str]) -> str:
    """The recipe's name must be known before the parser is built, because it provides the parser's defaults."""
    for index, argument in enumerate(arguments):
        if argument == "--recipe" and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith("--recipe="):
            return argument.partition("=")[2]
    has_model = any(argument == "--model" or argument.startswith("--model=") for argument in arguments)
    if not has_model:
        return "demo"
    import torch

    return "standard" if torch.cuda.is_available() else "laptop"


def _files_of_settings(arguments: Sequence[str]) -> list[str]:
    """What --config names."""
    after = [value for name, value in pairwise(arguments) if name == "--config"]
    return after + [argument.partition("=")[2] for argument in arguments if argument.startswith("--config=")]


@functools.cache
def build_parser(recipe: str):
    """A jsonargparse parser whose defaults are those of a recipe, made once: it takes longer than to parse."""
    from jsonargparse import ActionConfigFile, ArgumentParser

    path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise UserError(
            "recipe", expected=f"one of {known}", got=repr(recipe), do="Or give your own with --config FILE."
        )
    parser = ArgumentParser(
        prog=sys.argv[0] if sys.argv[0] == "bitdistill train" else "deepspeed bitdistill/train.py",
        description="BitNet Distillation: makes a 1.58-bit student of a full-precision model for a task.",
        default_config_files=[str(path)],
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="A YAML file of settings, such as RUN/config.yaml.")
    parser.add_class_arguments(RunConfig, as_group=False)
    return parser


def _settle_paths(namespace) -> None:
    """Writes local files and folders out in full, ~ included: config.yaml means the same wherever it is read again."""
    for name in ("model", "student", "teacher.model", "train_file", "validation_file", "corpus", "nvme_path"):
        if (name, namespace[name]) != ("corpus", TASK_CORPUS):
            namespace[name] = folders.local_path(namespace[name])
    if namespace.task.endswith((".yaml", ".yml")):  # other names are those of the tasks that are built in
        namespace.task = folders.local_path(namespace.task)
    files = namespace.extra_validation_files or {}
    namespace.extra_validation_files = {split: folders.local_path(file) for split, file in files.items()}
    if namespace.output_dir:
        namespace.output_dir = str(user_path(namespace.output_dir, "output_dir").absolute())


def _shown(section: Any) -> str:
    return "nothing" if section is None else f"{section!r:.60}"


def explicit_settings(arguments: Sequence[str] | None = None) -> set[str]:
    """Dotted names of the settings that a valid command line gives, in a --config file too: all others are defaults.

    Args:
        arguments: sys.argv[1:] by default.
    """
    arguments = process_group.without_local_rank(list(sys.argv[1:] if arguments is None else arguments))
    arguments = ["--resume=true" if argument == "--resume" else argument for argument in arguments]
    given = build_parser(_chosen_recipe(arguments)).parse_args(arguments, defaults=False)
    return {name for name, value in given.items() if value is not None}


def parse_config(arguments: Sequence[str] | None = None) -> tuple[RunConfig, str]:
    """Settings from a command line.

    Args:
        arguments: sys.argv[1:] by default.

    Returns: (the validated settings, the same as a YAML text that can be run again with --config).

    Raises:
        UserError: a value or a name is wrong.
    """
    from jsonargparse import ArgumentError

    arguments = process_group.without_local_rank(list(sys.argv[1:] if arguments is None else arguments))
    for argument in arguments:
        console.require_utf8("command line", argument)
        console.refuse_secrets("command line", argument)
    refuse_long_numbers(arguments)
    switches = ("--resume", "--restart")
    arguments = [f"{argument}=true" if argument in switches else argument for argument in arguments]
    parser = build_parser(_chosen_recipe(arguments))
    for file in _files_of_settings(arguments):  # says more than the parser does of a file that is wrong as a whole
        read_yaml(user_path(file, "config"), "config")
    try:
        namespace = parser.parse_args(arguments)
    except ArgumentError as error:
        raise refused(" ".join(str(error).split()), settings_named(), "train.py") from error
    namespace.pop("config", None)
    namespace.pop("__default_config__", None)
    for section in dataclasses.fields(RunConfig):
        if dataclasses.is_dataclass(section.default_factory) and not hasattr(namespace.get(section.name), "items"):
            do = "Write settings there, or leave the name out."
            raise UserError(
                "config", expected=f"settings below `{section.name}:`", got=_shown(namespace.get(section.name)), do=do
            )
    for name, value in namespace.items():
        console.refuse_secrets(name, str(value))
    _settle_paths(namespace)
    config = parser.instantiate_classes(namespace)
    namespace.restart = False  # the file says what the run is; run again, it goes on
    text = parser.dump(namespace, skip_validation=True, skip_none=False)
    run = RunConfig(**{name: config[name] for name in RunConfig.__dataclass_fields__})
    run.validate()
    return run, text
