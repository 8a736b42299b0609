"""Every UserError names something that a user can find, and says what to do: all calls in the source are walked."""

import argparse
import ast
import contextlib
import dataclasses
import fnmatch
import functools
import inspect
import re
from pathlib import Path

import pytest

from bitdistill import cli
from bitdistill.config import RunConfig
from bitdistill.data.tasks import Task
from bitdistill.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("bitdistill", "distributed", "kernels")
TREES = {
    path: ast.parse(path.read_text(encoding="utf-8"))
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
}
WORDS = ("command line", "COMMAND", "RUN", "RUN_OR_FILE")  # of the commands' help
PARTS = (
    "rows",
    "rows: columns",
    "messages",
    "tokenizer",
    "memory",
    "disk",
    "text",
    "numba.config",
    "sys.executable",
)  # of a tokenizer, a request, the machine, Python
FILES = r"(.*/)?[\w.*-]+\.(json|jsonl|yaml|safetensors|gguf|model|jinja)"
VARIABLES = r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|SLURM_LOCALID)"
VERBS = "correct|fix|check|mend|repair|see|change|clear|convert|add|remove|lower|raise|choose"
# Fields that come from further away than this test can follow -> where from.
FAR = {
    "argument_errors.py: name": "the parser's message, which names a setting or an option",
    "argument_errors.py: option['name']": "the parser's message, which names a setting or an option",
    "config.py: name": "the settings, walked",
    "console.py: name": "the file that the system names",
    "console.py: field": "an option of the command that is run",
    "tasks.py: option": "--train_file, --validation_file or --extra_validation_files",
    "tasks.py: column": "a column of the rows",
    "prompts.py: column": "a column of the rows",
    "predict.py: f'{source}: {column}'": "a column of the rows",
    "predict.py: source": "--input, with the file as the user gave it",
    "row_files.py: source": "--input, with the file as the user gave it",
    "row_files.py: field": "what an error of rows.py names, with the file as the user gave it",
    "options.py: option": "what the command calls its option",
    "plan.py: option": "the numbers that `bitdistill plan` takes, as it calls them",
    "write.py: name": "a tensor",
    "limits.py: name": "the settings, walked",
    "text_files.py: field": "the setting or option that the file was given as",
    "instructions.py: VARIABLE": "a variable of the environment",
}
EMPTY = re.compile(rf"^({VERBS})( (it|them|this|that))?\.$", re.IGNORECASE)


def settings(kind=RunConfig, prefix=""):
    """Dotted names of the tree of settings, sections included."""
    names = set()
    for field in dataclasses.fields(kind):
        names.add(prefix + field.name)
        if dataclasses.is_dataclass(field.default_factory):
            names |= settings(field.default_factory, f"{prefix}{field.name}.")
    return names


def options(monkeypatch):
    """Names of the options of all commands."""
    found = {name for command in cli.COMMANDS.values() for name in inspect.signature(command).parameters}
    add = argparse._ActionsContainer.add_argument

    def noting(self, *names, **rest):
        found.update(name.lstrip("-") for name in names)
        return add(self, *names, **rest)

    monkeypatch.setattr(argparse._ActionsContainer, "add_argument", noting)
    for parser in cli.PARSERS.values():
        with contextlib.suppress(UserError):  # some take no text; their options are added all the same
            parser(["file", "text"])
    return found - {"sampling", "h", "help"}


@pytest.fixture
def known(monkeypatch):
    keys = {field.name for field in dataclasses.fields(Task)}
    return settings() | options(monkeypatch) | keys | {"config"}  # --config of the main job


def texts(node, tree, depth=0):
    """The texts that an expression can be, "*" for each part that is not known; None where it cannot be followed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        found = [""]
        for part in node.values:
            if isinstance(part, ast.Constant):
                found = [text + part.value for text in found]
            else:
                inner = texts(part.value, tree, depth + 1) or ["*"]
                found = [text + one for text in found for one in inner]
        return found
    if isinstance(node, ast.IfExp):
        branches = [texts(branch, tree, depth) for branch in (node.body, node.orelse)]
        return None if None in branches else branches[0] + branches[1]
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("str", "repr"):
        return ["*"] if isinstance(node.args[0], ast.Name | ast.Attribute) else texts(node.args[0], tree, depth)
    if isinstance(node, ast.Name) and depth < 4:
        return values_of(node.id, node, tree, depth + 1)
    return None


def values_of(name, node, tree, depth):
    """What a variable can be: its assignments and loops in the function around it, else what callers pass."""
    function = around(node, tree)
    found = []
    for inner in ast.walk(function if function is not None else tree):
        if isinstance(inner, ast.Assign):
            for target in inner.targets:
                if isinstance(target, ast.Name) and target.id == name:
                    found.append(texts(inner.value, tree, depth))
                elif isinstance(target, ast.Tuple) and isinstance(inner.value, ast.Tuple):
                    for one, value in zip(target.elts, inner.value.elts, strict=False):
                        if isinstance(one, ast.Name) and one.id == name:
                            found.append(texts(value, tree, depth))
        elif isinstance(inner, ast.For | ast.comprehension):
            found += looped(name, inner, tree, depth)
    if not found and function is not None:
        parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        if name in [parameter.arg for parameter in parameters]:
            return passed(name, function, depth)
    return flat(found)


def looped(name, loop, tree, depth):
    targets = loop.target.elts if isinstance(loop.target, ast.Tuple) else [loop.target]
    for place, target in enumerate(targets):
        if not (isinstance(target, ast.Name) and target.id == name):
            continue
        source = loop.iter
        if isinstance(source, ast.Call) and isinstance(source.func, ast.Attribute) and source.func.attr == "items":
            source = source.func.value
        source = assigned(source, tree)
        if isinstance(source, ast.Dict):
            return [texts(key, tree, depth) for key in source.keys]
        if isinstance(source, ast.Tuple | ast.List):
            several = isinstance(loop.target, ast.Tuple)
            return [texts(row.elts[place] if several else row, tree, depth) for row in source.elts]
        if isinstance(source, ast.Call):  # a generator of ours: what it yields
            called = getattr(source.func, "attr", getattr(source.func, "id", ""))
            yields = [
                inner.value
                for function in ast.walk(tree)
                if isinstance(function, ast.FunctionDef) and function.name == called
                for inner in ast.walk(function)
                if isinstance(inner, ast.Yield)
            ]
            return [texts(one.elts[place], tree, depth) for one in yields if isinstance(one, ast.Tuple)] or [None]
        return [None]
    return []


def assigned(node, tree):
    if isinstance(node, ast.Name):
        for inner in ast.walk(tree):
            if isinstance(inner, ast.Assign) and any(
                isinstance(t, ast.Name) and t.id == node.id for t in inner.targets
            ):
                return inner.value
    return node


def passed(name, function, depth):
    """What all callers in the project give for a parameter, and its default."""
    positional = [*function.args.posonlyargs, *function.args.args]
    names = [parameter.arg for parameter in positional]
    method = names[:1] in (["self"], ["cls"])
    defaults = dict(zip(names[len(names) - len(function.args.defaults) :], function.args.defaults, strict=True))
    keywords = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    defaults |= {parameter.arg: value for parameter, value in keywords if value is not None}
    found = [texts(defaults[name], ast.Module([], []), depth)] if isinstance(defaults.get(name), ast.Constant) else []
    found = [one for one in found if one]
    for tree in TREES.values():
        for call in calls_of(tree).get(function.name, ()):
            given = next((keyword.value for keyword in call.keywords if keyword.arg == name), None)
            place = names.index(name) - method if name in names else len(call.args)
            if given is None and 0 <= place < len(call.args):
                given = call.args[place]
            if given is not None:
                found.append(texts(given, tree, depth))
    return flat(found)


@functools.cache
def calls_of(tree):
    """Name of a function or method -> the calls of it in a file."""
    found = {}
    for call in ast.walk(tree):
        if isinstance(call, ast.Call):
            found.setdefault(getattr(call.func, "attr", getattr(call.func, "id", "")), []).append(call)
    return found


@functools.cache
def functions_of(tree):
    return sorted((f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)), key=lambda function: function.lineno)


def flat(found):
    return None if not found or None in found else [text for texts in found for text in texts]


def around(node, tree):
    """The innermost function around a node."""
    inside = [f for f in functions_of(tree) if f.lineno <= node.lineno <= f.end_lineno]
    return inside[-1] if inside else None


def is_real(field, known):
    """A setting, an option, a key of a task, a file, a variable of the environment; more about it may follow."""
    first = re.split(r": | ", field, maxsplit=1)[0].rstrip(":")
    if (
        field in WORDS
        or first in ("RUN", "RUN_OR_FILE", *PARTS)
        or re.fullmatch(VARIABLES, first)
        or re.match("OMPI_|MPI_|BITDISTILL_", first)
    ):
        return True
    if re.fullmatch(FILES, first) or re.fullmatch(r"\*(\.weight)?", first):
        return True  # a path, a column or a tensor, whose names are data
    return first in known or ("*" in first and bool(fnmatch.filter(known, first)))


def calls():
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError":
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node, tree


def test_every_field_is_real(known):
    wrong = []
    for place, call, tree in calls():
        found = texts(call.args[0], tree)
        if found is None:
            place = f"{Path(place.rpartition(':')[0]).name}: {ast.unparse(call.args[0])}"
            if place not in FAR:
                wrong.append(f"{place} cannot be followed")
        else:
            wrong += [f"{place}: {text!r}" for text in found if not is_real(text, known)]
    assert not wrong, "\n".join(wrong)


def test_every_advice_says_what_to_do():
    wrong = []
    for place, call, tree in calls():
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        assert given.keys() >= {"expected", "got", "do"}, place
        for text in texts(given["do"], tree) or ["*."]:
            sentence = text.rstrip().endswith((".", "*", "`")) and (text[:1].isupper() or text[:1] in "`*")
            if EMPTY.match(text) or not sentence:
                wrong.append(f"{place}: {text!r}")
    assert not wrong, "\n".join(wrong)


def test_there_is_something_to_walk():
    assert len(list(calls())) > 100


@pytest.mark.parametrize(
    "field",
    ["relation_convention", "relation_layer", "gradient_checkpointing_kwargs", "dataloader_num_workers", "calibration",
     "refine.norm", "evaluation", "loss", "weights"],
)  # fmt: skip
def test_words_of_ours_are_not_taken_for_settings(field, known):
    assert not is_real(field, known)


@pytest.mark.parametrize(
    "field",
    ["seed", "refine.norms", "*.max_steps", "refine.*", "corpus /a/b: text", "max_new_tokens", "config.json: hidden_act",
     "RUN_OR_FILE", "MASTER_PORT", "labels", "* 3", "/run/config.yaml"],
)  # fmt: skip
def test_real_ones_are(field, known):
    assert is_real(field, known)


def test_variables_are_followed():
    source = """
def check(field, low):
    for name, value in (("a", 1), ("b", 2)):
        UserError(name)
    other = "c" if low else "d"
    UserError(other)
    UserError(f"{field}.e")
    UserError(unknown)
check("f", 3)
"""
    tree = ast.parse(source)
    TREES[Path("x.py")] = tree
    try:
        names = [node.args[0] for node in ast.walk(tree) if isinstance(node, ast.Call) and node.func.id == "UserError"]
        found = {ast.unparse(name): texts(name, tree) for name in names}
    finally:
        del TREES[Path("x.py")]
    assert found == {"name": ["a", "b"], "other": ["c", "d"], "f'{field}.e'": ["f.e"], "unknown": None}


@pytest.mark.parametrize("text", ["Correct it.", "Fix it.", "Mend it.", "Check it."])
def test_empty_advice_is_seen(text):
    assert EMPTY.match(text)


def test_a_message_has_its_four_parts():
    error = UserError("seed", expected="a number", got="'x'", do="Give one.")
    assert str(error) == "seed: expected a number; got 'x'. Give one."
    assert (error.field, error.expected, error.got, error.do) == ("seed", "a number", "'x'", "Give one.")
