"""The decoder's compiled step as one file of machine code: loaded in milliseconds, without Numba.

    cache folder/step.bin    SHA-256 of the rest, in hex, and a line end
                             a line of JSON: {"functions": {name: arguments}, "numbers": {name: number},
                             "calls": [what they call of the system's libraries], "objects": [bytes of each]}
                             the object files, one after the other (ELF on Linux)

LLVM's linker for code in memory (MCJIT) loads the objects; ctypes calls their functions, which take and return int64 and let
go of the GIL. They need nothing of Python or Numba: a step touches only memory whose addresses it is given.

Who finds no file, or a damaged one, makes it: linking.py compiles each of its PARTS in a process of its own, so that two cores
are at work and this process never imports Numba. Processes that start at the same time wait for the first of them. With
NUMBA_DISABLE_JIT=1 there is no file, and the functions are those of step.py in plain Python.
"""

import ctypes
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import llvmlite.binding

from bitdistill.errors import UserError
from bitdistill.files import write_whole
from bitdistill.kernels.cpu.instructions import COMPILED, cache_folder
from bitdistill.kernels.cpu.records import FAILED

if os.name == "posix":  # without it, processes that start at the same time all compile
    import fcntl

PARTS = ("step", "products")  # of linking.py
_loading = threading.Lock()


def load(compiling: Callable[[], None] = lambda: None) -> SimpleNamespace:
    """What decoder.py uses of the compiled code: the functions of linking.FUNCTIONS and the numbers of linking.NUMBERS, by name.

    Args:
        compiling: called when it has to be compiled, which takes some seconds.

    Raises:
        RuntimeError: the compiler failed; its output is in the message.
    """
    with _loading:
        return _loaded(compiling)


@functools.cache
def _kept() -> list[SimpleNamespace]:
    return []


def _loaded(compiling: Callable[[], None]) -> SimpleNamespace:
    if not _kept():
        _kept().append(_from_file(compiling) if COMPILED else _from_sources())
    return _kept()[0]


def _from_sources() -> SimpleNamespace:
    from bitdistill.kernels.cpu import linking

    return SimpleNamespace(**{function.__name__: function for function in linking.FUNCTIONS}, **linking.NUMBERS)


def _from_file(compiling: Callable[[], None]) -> SimpleNamespace:
    path = cache_folder() / "step.bin"
    content = _read(path)
    if content is None:
        with _alone(path.with_suffix(".lock")):
            content = _read(path)
            if content is None:
                compiling()
                content = _compiled(path.parent)
                write_whole(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    return _linked(content)


def _read(path: Path) -> bytes | None:
    """What the file holds behind its digest; None where there is no whole file."""
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if digest != hashlib.sha256(content).hexdigest().encode():
        warnings.warn(f"{path} is damaged: the kernels are compiled again.", RuntimeWarning, stacklevel=2)
        return None
    return content


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    with path.open("ab") as lock:
        if os.name == "posix":
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        yield


# --- compiling ---------------------------------------------------------------------------------------------------------------

_PROGRAM = """
import json, sys
sys.modules["scipy"] = None  # Numba would import it for linear algebra that no kernel uses
sys.path[:] = json.loads(sys.argv[1])
from bitdistill.kernels.cpu import linking
linking.write_part(*sys.argv[2:])
"""


def _compiled(folder: Path) -> bytes:
    """The header and the objects of all parts, compiled side by side."""
    if not sys.executable:
        do = "Run `bitdistill generate` once with a Python of its own: the machine code is kept."
        raise UserError(
            "sys.executable", expected="a Python interpreter, which compiles", got=repr(sys.executable), do=do
        )
    # Errors are tried and thrown away by the thousand when types are inferred: no colors for them.
    environment = os.environ | {"NUMBA_DISABLE_ERROR_MESSAGE_HIGHLIGHTING": "1"}
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        compilers, paths = [], [Path(temporary, part) for part in PARTS]
        try:
            for part, path in zip(PARTS, paths, strict=True):
                command = [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), part, str(path)]
                compilers.append(
                    subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
                )
            for part, compiler in zip(PARTS, compilers, strict=True):
                _, errors = compiler.communicate()
                if compiler.returncode:
                    raise RuntimeError(
                        f"compiling {part} ended with {compiler.returncode}:\n{errors.decode(errors='replace')}"
                    )
        finally:
            for compiler in compilers:
                if compiler.poll() is None:
                    compiler.kill()
                    compiler.communicate()
        header, objects = {"calls": [], "objects": []}, b""
        for path in paths:
            facts, _, machine_code = path.read_bytes().partition(b"\n")
            facts = json.loads(facts)
            header["calls"] += facts.pop("calls")
            header |= facts
            header["objects"].append(len(machine_code))
            objects += machine_code
    return json.dumps(header).encode() + b"\n" + objects


# --- loading -----------------------------------------------------------------------------------------------------------------

_engines = []  # own the machine code


def _linked(content: bytes) -> SimpleNamespace:
    facts, _, objects = content.partition(b"\n")
    header = json.loads(facts)
    llvmlite.binding.initialize_native_target()
    llvmlite.binding.initialize_native_asmprinter()
    machine = llvmlite.binding.Target.from_default_triple().create_target_machine()
    engine = llvmlite.binding.create_mcjit_compiler(llvmlite.binding.parse_assembly(""), machine)
    _engines.append(engine)
    missing = [name for name in header["calls"] if not llvmlite.binding.address_of_symbol(name)]
    if missing:  # the linker would put 0 for them
        raise RuntimeError(f"compiled kernels call {', '.join(missing)}, which no library of this process has")
    for size in header["objects"]:
        engine.add_object_file(llvmlite.binding.ObjectFileRef.from_data(objects[:size]))
        objects = objects[size:]
    engine.finalize_object()
    functions = {name: _function(engine, name, arguments) for name, arguments in header["functions"].items()}
    return SimpleNamespace(**functions, **header["numbers"])


def _function(engine, name: str, arguments: int) -> Callable[..., int]:
    address = engine.get_function_address(f"bitdistill_{name}")
    native = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * arguments)(address)

    def call(*numbers: int) -> int:
        result = native(*numbers)
        if result == FAILED:
            raise RuntimeError(
                "another thread of this call failed"
            )  # the only error that compiled code raises: threads.py
        return result

    return call
