"""The house: no import cycle between files or rooms, no arrow upward, nobody imports an entry file, kernels/ stays inert."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OF_TRAIN = {  # one entry in five files -> those that they import of each other
    "bitdistill.train": {"bitdistill.job", "bitdistill.stage_functions"},
    "bitdistill.stage_functions": {"bitdistill.job", "bitdistill.dependencies"},
    "bitdistill.job": {"bitdistill.preflight", "bitdistill.dependencies"},
    "bitdistill.dependencies": set(),
    "bitdistill.preflight": set(),
}
ENTRIES = {*OF_TRAIN, "bitdistill.cli"}  # read the settings
SETTINGS = {"bitdistill.config", "bitdistill.limits", "bitdistill.command_line"}


def module_files():
    files = {}
    for folder, package in (
        ("bitdistill", "bitdistill"),
        ("kernels", "bitdistill.kernels"),
        ("distributed", "bitdistill.distributed"),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            files[".".join((package, *parts))] = path
    return files


def imports(path, known):
    """Modules of this project that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        else:
            continue
        found |= {name for name in names if name in known}
    return {name for name in found if known[name].name != "__init__.py"}


FILES = module_files()
GRAPH = {name: imports(path, FILES) for name, path in FILES.items()}


# Room -> the rooms that its files may import, besides their own. The files on top of bitdistill/ that are no entries
# (errors, names, stages) are a room each.
# Rooms that import nothing of the project; every room may import them.
LEAVES = {"errors", "names", "cpus", "folders", "files", "lock"}
GROUND = LEAVES | {
    "problems",
    "argument_errors",
    "text_files",
    "yaml_files",
    "text_tokens",
    "trimmed_tokenizer",
    "prompts",
    "kernels",
    "distributed",
}
ALLOWED = {
    "kernels": LEAVES,
    "distributed": LEAVES,
    "errors": set(),
    "names": set(),
    "files": {"errors"},
    "lock": {"errors"},
    "identity": LEAVES,
    "cpus": set(),
    "folders": set(),
    "console": LEAVES,
    "surroundings": GROUND | {"console"},
    "argument_errors": {"errors"},
    "text_files": {"errors"},
    "yaml_files": {"errors", "text_files"},
    "text_tokens": {"errors"},
    "trimmed_tokenizer": {"errors"},
    "prompts": {"errors", "text_tokens"},
    "stages": GROUND,
    "problems": {"errors"},
    "preflight_checks": GROUND | {"student", "training"},
    "planning": {"errors", "kernels"},
    "student": GROUND,
    "data": GROUND,
    "runtime": GROUND,
    "training": GROUND | {"student", "data"},
    "export": GROUND | {"student", "runtime"},
    "evaluation": GROUND | {"student", "data", "runtime"},
    "reporting": GROUND,
    "serving": GROUND | {"runtime"},
    "commands": GROUND
    | {"console", "planning", "student", "data", "runtime", "export", "evaluation", "reporting", "serving"},
    "api": GROUND | {"student", "data", "runtime", "training", "export"},
}


def room_of(name):
    """bitdistill.training.losses -> training; a file on top of bitdistill/ is a room of its own."""
    return name.split(".")[1] if "." in name else "bitdistill"


def test_rooms_import_only_what_is_below_them():
    wrong = []
    for name, others in GRAPH.items():
        room = room_of(name)
        if name == "bitdistill" or name in ENTRIES | SETTINGS:
            continue
        for other in others:
            if room_of(other) not in ALLOWED[room] | {room}:
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_rooms_are_those_of_the_table():
    rooms = {room_of(name) for name in GRAPH if name != "bitdistill"}
    assert rooms == ALLOWED.keys() | {room_of(name) for name in ENTRIES | SETTINGS}


def test_there_is_something_to_walk():
    assert len(GRAPH) > 20
    assert "bitdistill.kernels.reference" in GRAPH["bitdistill.student.layers"]


IMPORT = re.compile(r"^\s*from (bitdistill[\w.]*) import (\([^)]*\)|[^\n(]*)", re.MULTILINE)
OLDER = {"bitdistill.distributed.launch"}  # names of older commits, which benchmarks also run on


def defined_names(path):
    """What a module binds at its top, also inside `if` and `try`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


DEFINED = {name: defined_names(path) for name, path in FILES.items()}


def test_imports_exist():
    """In the package, the tests and the benchmarks, also inside scripts that a test keeps in a string."""
    wrong = []
    scripts = [path for folder in ("tests", "bench") for path in (ROOT / folder).rglob("*.py")]
    for path in [*FILES.values(), *scripts]:
        for module, names in IMPORT.findall(path.read_text()):
            wanted = [
                name.split("#")[0].strip(" ()\\\"'")
                for line in names.split("\n")
                for name in line.split(";")[0].split(",")
            ]
            for name in (one.partition(" as ")[0] for one in wanted):
                if module == "bitdistill" or not name or module in OLDER:
                    continue
                if module not in FILES or not (f"{module}.{name}" in FILES or name in DEFINED[module]):
                    wrong.append(f"{path.relative_to(ROOT)}: from {module} import {name}")
    assert not wrong


def test_no_cycle():
    done, active = set(), []

    def visit(name):
        assert name not in active, " -> ".join([*active, name])
        if name in done:
            return
        active.append(name)
        for other in sorted(GRAPH[name]):
            visit(other)
        active.pop()
        done.add(name)

    for name in GRAPH:
        visit(name)


def test_kernels_and_distributed_import_leaves_alone():
    for name, others in GRAPH.items():
        for room in ("bitdistill.kernels", "bitdistill.distributed"):
            if name.startswith(room):
                assert all(other.startswith(room) or room_of(other) in LEAVES for other in others), (
                    f"{name} imports {others}"
                )


def test_nobody_imports_an_entry_file():
    for name, others in GRAPH.items():
        entries = others & (ENTRIES - OF_TRAIN.get(name, set()))
        assert not entries, f"{name} imports {entries}"


def test_only_entries_read_config():
    readers = {name for name, others in GRAPH.items() if "bitdistill.config" in others}
    assert readers <= ENTRIES | SETTINGS


def test_package_inits_are_inert():
    """Only bitdistill/__init__.py offers names, each imported when it is first used (tests/test_api.py)."""
    for name, path in FILES.items():
        if path.name != "__init__.py" or name == "bitdistill":
            continue
        for node in ast.parse(FILES[name].read_text()).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            version = isinstance(node, ast.Assign) and node.targets[0].id == "__version__"
            assert docstring or version, f"{name} does something: {ast.unparse(node)}"


def test_no_module_shadows_a_library():
    """`deepspeed bitdistill/train.py` puts bitdistill/ first on sys.path."""
    names = {path.stem for path in (ROOT / "bitdistill").glob("*.py")} - {"__init__"}
    names |= {path.name for path in (ROOT / "bitdistill").iterdir() if path.is_dir()}
    assert not names & set(sys.stdlib_module_names)
    script = (
        "import importlib.metadata as m, json;"
        "print(json.dumps(sorted({f.parts[0].removesuffix('.py') for d in m.distributions() "
        "if d.metadata['Name'] != 'bitdistill' for f in d.files or [] if len(f.parts) <= 2 and f.suffix == '.py'})))"
    )
    import json

    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert not names & set(json.loads(output.stdout))


def test_public_functions_have_docstrings():
    missing = []
    for name, path in FILES.items():
        for node in ast.parse(path.read_text()).body:
            public = isinstance(
                node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
            ) and not node.name.startswith("_")
            if public and ast.get_docstring(node) is None:
                missing.append(f"{name}.{node.name}")
    assert not missing
