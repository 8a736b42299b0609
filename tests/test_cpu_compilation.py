"""The cache of compiled kernels: its key, its place, its warmth, and that nobody else's Numba is changed."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

from bitdistill.kernels.cpu import compilation, instructions
from bitdistill.kernels.cpu.native import float32s, keep

# A kernel of its own: `watch_compilation` must see it being compiled, or not.
SCRIPT = """
import sys, warnings
from bitdistill.kernels.cpu import compilation, instructions
from bitdistill.kernels.cpu.activations import record_bytes
warm, names = any(instructions.cache_folder().rglob("*.nbc")), []
with compilation.watch_compilation(names.append):
    assert record_bytes(100) == 64 + 128 + 64 + 64
print(warm, "record_bytes" in names, instructions.cache_folder())
"""


def start(**environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "BITDISTILL_"))}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env=kept | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process):
    out, err = process.communicate()
    assert process.returncode == 0, err
    warm, compiled, folder = out.strip().split(maxsplit=2)
    return warm == "True", compiled == "True", Path(folder), err


@pytest.mark.slow
def test_second_process_finds_what_the_first_compiled(tmp_path):
    warm, compiled, folder, _ = result(start(XDG_CACHE_HOME=str(tmp_path)))
    assert (warm, compiled) == (False, True)
    assert folder.parent == tmp_path / "bitdistill"
    warm, compiled, again, err = result(start(XDG_CACHE_HOME=str(tmp_path)))
    assert (warm, compiled, again) == (True, False, folder)
    assert not err
    forced = "avx2" if instructions.FEATURES == "portable" else "portable"
    if forced == "portable" or instructions.FEATURE_SETS["avx2"] <= instructions.CPU_FEATURES:
        warm, compiled, other, _ = result(start(XDG_CACHE_HOME=str(tmp_path), BITDISTILL_CPU_FEATURES=forced))
        assert (warm, compiled) == (False, True)
        assert other != folder


@pytest.mark.slow
def test_processes_side_by_side(tmp_path):
    processes = [start(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    for process in processes:
        result(process)
    assert result(start(XDG_CACHE_HOME=str(tmp_path)))[:2] == (True, False)


def test_a_home_that_cannot_be_written_to_is_said_and_replaced(tmp_path):
    file, temporary = tmp_path / "file", tmp_path / "temporary"
    file.write_text("")
    temporary.mkdir()
    _, _, folder, err = result(start(XDG_CACHE_HOME=str(file), TMPDIR=str(temporary)))
    assert folder.is_relative_to(temporary)
    assert err.count("cannot be written to") == 1
    assert "Set XDG_CACHE_HOME" in err
    if hasattr(os, "getuid"):
        assert folder.parent == temporary / f"bitdistill-{os.getuid()}"
        assert not folder.parent.stat().st_mode & 0o077
        # A folder that others may write to is not trusted: what lies in it is executed.
        folder.parent.chmod(0o777)
        _, _, other, _ = result(start(XDG_CACHE_HOME=str(file), TMPDIR=str(temporary)))
        assert other.is_relative_to(temporary)
        assert other.parent != folder.parent


def test_key_follows_sources_versions_and_target(monkeypatch):
    key = instructions.cache_key()
    assert instructions.cache_key() == key
    for module, name, value in (
        (instructions, "FEATURES", "other"),
        (instructions, "CPU_NAME", "other"),
        (instructions, "CPU_FEATURES", frozenset({"other"})),
        (instructions.importlib.metadata, "version", lambda name: "other"),
        (Path, "read_bytes", lambda path: b"other"),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(module, name, value)
            assert instructions.cache_key() != key, name
    assert instructions.cache_key() == key


def test_numba_of_others_is_left_alone():
    before = numba.config.CACHE_DIR
    kernel = compilation.jit(lambda x: x + 1)
    assert kernel(1) == 2
    assert before == numba.config.CACHE_DIR
    other = numba.njit(cache=True)(result)
    assert not Path(other.stats.cache_path).is_relative_to(instructions.cache_folder())


def test_division_is_ieee_and_bounds_are_not_checked():
    @compilation.jit
    def quotient(a, b):
        return a / b

    assert quotient(1.0, 0.0) == float("inf")
    assert quotient.targetoptions["nogil"]
    assert not quotient.targetoptions["boundscheck"]


def test_wrong_choice_is_refused_at_import():
    process = start(BITDISTILL_CPU_FEATURES="mmx")
    _, err = process.communicate()
    assert process.returncode
    assert "BITDISTILL_CPU_FEATURES: expected one of" in err
    assert "got 'mmx'" in err


def test_an_array_is_there_until_it_is_kept():
    @compilation.jit
    def total(count):
        room = np.empty(count, np.float32)  # so large that it is unmapped when it is freed
        address = room.ctypes.data
        float32s(address, count)[:] = 1
        summed = float32s(address, count).sum()
        keep(room)
        return summed

    assert total(1 << 23) == 1 << 23


def _kept_addresses(source):
    """(function, array) of each array of a compiled function whose address is given a name, and of those that are kept."""
    named, kept = set(), set()
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef) or "jit" not in map(ast.unparse, function.decorator_list):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                addresses = [
                    part.value
                    for part in ast.walk(node.value)
                    if isinstance(part, ast.Attribute) and part.attr == "ctypes"
                ]
                named |= {(function.name, ast.unparse(array)) for array in addresses}
        for last in reversed(function.body):
            if not (isinstance(last, ast.Expr) and ast.unparse(last).startswith("keep(")):
                break
            kept.add((function.name, ast.unparse(last.value.args[0])))
    return named, kept


def test_every_named_address_is_of_an_array_that_is_kept():
    wrong = (
        "@jit\ndef f(n):\n    room = np.empty(n)\n    at = room.ctypes.data\n    for i in range(n):\n        g(at)\n"
    )
    assert _kept_addresses(wrong) == ({("f", "room")}, set())
    assert _kept_addresses(wrong + "    keep(room)\n") == ({("f", "room")}, {("f", "room")})
    files = sorted(Path(compilation.__file__).parent.glob("*.py"))
    found = {path.name: _kept_addresses(path.read_text()) for path in files}
    assert sum(len(named) for named, _ in found.values()) > 4
    assert {name: named - kept for name, (named, kept) in found.items() if named - kept} == {}
