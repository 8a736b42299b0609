"""The decoder's compiled step as files of machine code: loaded in milliseconds, without Numba.

    cache folder/PART.bin    SHA-256 of the rest, in hex, and a line end
                             a line of JSON: {"functions": {name: arguments}, "numbers": {name: number},
                             "calls": [what they call of the system's libraries]}
                             the object file (ELF on Linux)

LLVM's linker for code in memory (MCJIT) loads the objects; ctypes calls their functions, which take and return int64 and let
go of the GIL. They need nothing of Python or Numba: a step touches only memory whose addresses it is given.

Who finds no file, or a damaged one, makes it: linking.py compiles each part in a process of its own, so that two cores are at
work and this process never imports Numba. Few models have scales of groups, so the products with them are a part that is
compiled when it is asked for. Processes that start at the same time wait for the first of them. With NUMBA_DISABLE_JIT=1
there is no file, and the functions are those of step.py in plain Python.
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
from collections.abc import Callable, Iterator, Sequence
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

PARTS, GROUPED = ("step", "products"), "grouped"  # of linking.py
LATER = "bitdistill_grouped_gemm"  # what the other parts call of GROUPED
_loading = threading.Lock()


def load(compiling: Callable[[], None] = lambda: None, grouped: bool = False) -> SimpleNamespace:
    """What decoder.py uses of the compiled code: the functions of linking.FUNCTIONS and the numbers of linking.NUMBERS, by name.

    Args:
        compiling: called when it has to be compiled, which takes some seconds.
        grouped: whether a product may have scales of groups of columns, of weights or activations; without it, a step that
            meets one ends the process.

    Raises:
        RuntimeError: the compiler failed; its output is in the message.
    """
    with _loading:
        kept = _kept()
        if not kept.get(True, kept.get(grouped)):
            parts = (*PARTS, GROUPED) if grouped else PARTS
            kept[grouped] = _from_files(parts, compiling) if COMPILED else _from_sources()
        return kept.get(True, kept.get(grouped))


@functools.cache
def _kept() -> dict[bool, SimpleNamespace]:
    return {}


def _from_sources() -> SimpleNamespace:
    from bitdistill.kernels.cpu import linking

    return SimpleNamespace(**{function.__name__: function for function in linking.FUNCTIONS}, **linking.NUMBERS)


def _from_files(parts: Sequence[str], compiling: Callable[[], None]) -> SimpleNamespace:
    folder = cache_folder()
    contents = {part: _read(folder / f"{part}.bin") for part in parts}
    if None in contents.values():
        with _alone(folder / "step.lock"):
            contents = {part: content or _read(folder / f"{part}.bin") for part, content in contents.items()}
            missing = [part for part, content in contents.items() if content is None]
            if missing:
                compiling()
                for part, content in zip(missing, _compiled(missing, folder), strict=True):
                    write_whole(folder / f"{part}.bin", hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
                    contents[part] = content
    return _linked(contents)


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


def _compiled(parts: Sequence[str], folder: Path) -> list[bytes]:
    """What the files of these parts hold, compiled side by side."""
    if not sys.executable:
        do = "Run `bitdistill generate` once with a Python of its own: the machine code is kept."
        raise UserError(
            "sys.executable", expected="a Python interpreter, which compiles", got=repr(sys.executable), do=do
        )
    # Errors are tried and thrown away by the thousand when types are inferred: no colors for them.
    environment = os.environ | {"NUMBA_DISABLE_ERROR_MESSAGE_HIGHLIGHTING": "1"}
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        compilers, paths = [], [Path(temporary, part) for part in parts]
        try:
            for part, path in zip(parts, paths, strict=True):
                command = [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), part, str(path)]
                compilers.append(
                    subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
                )
            for part, compiler in zip(parts, compilers, strict=True):
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
        return [path.read_bytes() for path in paths]


# --- loading -----------------------------------------------------------------------------------------------------------------

_engines = []  # own the machine code


def _linked(contents: dict[str, bytes]) -> SimpleNamespace:
    """The functions and numbers of parts that are linked with each other."""
    llvmlite.binding.initialize_native_target()
    llvmlite.binding.initialize_native_asmprinter()
    machine = llvmlite.binding.Target.from_default_triple().create_target_machine()
    engine = llvmlite.binding.create_mcjit_compiler(llvmlite.binding.parse_assembly(""), machine)
    _engines.append(engine)
    # What is found where GROUPED is not among the parts; a missing name would be the address 0.
    llvmlite.binding.add_symbol(LATER, llvmlite.binding.address_of_symbol("abort"))
    functions, numbers, machine_codes = {}, {}, []
    for content in contents.values():
        facts, _, machine_code = content.partition(b"\n")
        machine_codes.append(machine_code)  # the engine reads it when it is finalized
        header = json.loads(facts)
        missing = [name for name in header["calls"] if not llvmlite.binding.address_of_symbol(name)]
        if missing:  # the linker would put 0 for them
            raise RuntimeError(f"compiled kernels call {', '.join(missing)}, which no library of this process has")
        engine.add_object_file(llvmlite.binding.ObjectFileRef.from_data(machine_code))
        functions |= header["functions"]
        numbers |= header["numbers"]
    engine.finalize_object()
    return SimpleNamespace(
        **{name: _function(engine, name, arguments) for name, arguments in functions.items()}, **numbers
    )


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
