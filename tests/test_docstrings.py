"""Docstrings: the `Args:` of every public function and class name exactly its parameters."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = re.compile(r"(?:^|(?<=[.;] ))\*{0,2}([a-zA-Z_]\w*(?:, \*{0,2}[a-zA-Z_]\w*)*):(?= |$)")


def parameters(function):
    """The parameters of a function or of a class's `__init__`, or the fields of a dataclass; without self and private ones."""
    if isinstance(function, ast.ClassDef):
        inits = [node for node in function.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
        if inits:
            return parameters(inits[0])
        return [n.target.id for n in function.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    a = function.args
    every = [*a.posonlyargs, *a.args, *([a.vararg] if a.vararg else []), *a.kwonlyargs, *([a.kwarg] if a.kwarg else [])]
    return [argument.arg for argument in every if argument.arg not in ("self", "cls") and argument.arg[0] != "_"]


def documented(docstring):
    """(every name that the section `Args:` explains, those at the start of a line), or None without the section.

    An entry is `name: text` or `first, second: text`, at the section's indentation, or after the end of a sentence. There a
    word before a colon may also be a value that is explained ("int4: ..."), so that only the former must be parameters.
    """
    match = re.search(r"^Args:[ ]*\n((?:[ ]+\S.*\n?|[ ]*\n)*)", docstring, flags=re.M)
    if match is None:
        return None
    lines = [line for line in match.group(1).splitlines() if line.strip()]
    indentation = min(len(line) - len(line.lstrip()) for line in lines)
    entries = []
    for line in lines:
        if len(line) - len(line.lstrip()) == indentation:
            entries.append(line.strip())
        else:
            entries[-1] += " " + line.strip()
    found = [[group.replace("*", "").split(", ") for group in NAMES.findall(entry)] for entry in entries]
    return [name for groups in found for group in groups for name in group], [n for g in found if g for n in g[0]]


def public_functions():
    """(where, node) of every public function, class and method of a public class."""
    for folder in ("bitdistill", "kernels", "distributed"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            where = path.relative_to(ROOT).as_posix()
            for node in ast.parse(path.read_text()).body:
                if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                    continue
                yield f"{where}: {node.name}", node
                for method in node.body if isinstance(node, ast.ClassDef) else []:
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                        yield f"{where}: {node.name}.{method.name}", method


def problems(node):
    """How the documented names differ from the parameters; nothing for a docstring without `Args:`."""
    found = documented(ast.get_docstring(node) or "")
    if found is None:
        return []
    (names, first), known = found, parameters(node)
    missing, unknown = [n for n in known if n not in names], [n for n in first if n not in known]
    return [f"does not explain {n}" for n in missing] + [f"explains {n}, no parameter" for n in unknown]


def test_args_name_exactly_the_parameters():
    assert not [f"{where} {problem}" for where, node in public_functions() for problem in problems(node)]


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        (
            "F.\n\nArgs:\n    a: one. b: two.\n    c, d: more\n        lines: no entry.\n\nReturns: e: x.",
            ("abcd", "acd"),
        ),
        ("F.\n\nArgs:\n    *a: some.\n    **b: others, such as: x.", ("ab", "ab")),
        ("F.\n\nReturns: nothing.", None),
    ],
)
def test_the_section_is_read(docstring, expected):
    assert documented(docstring) == (expected and tuple(map(list, expected)))


def test_a_wrong_name_is_found():
    node = ast.parse('def f(a, *, b=1):\n    """F.\n\n    Args:\n        a: one.\n        c: other.\n    """').body[0]
    assert problems(node) == ["does not explain b", "explains c, no parameter"]
    assert not problems(ast.parse('def f(a):\n    """F.\n\n    Args:\n        a: one.\n    """').body[0])
