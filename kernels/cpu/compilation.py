"""How Numba compiles the CPU kernels, and how it keeps what Python calls.

Numba notices when a function's own file changes, but not when the files of the functions that it calls do. So it keeps its
machine code below `instructions.cache_folder`, whose name depends on all of them.
"""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numba
from numba.core import event
from numba.core.types.functions import BaseFunction

from bitdistill.errors import UserError
from bitdistill.kernels.cpu.instructions import COMPILED, NAMED_CPU, NAMED_FEATURES, cache_folder

_decorating = threading.Lock()

_found = (numba.config.CPU_NAME, numba.config.CPU_FEATURES, not numba.config.DISABLE_JIT)
if _found != (NAMED_CPU, NAMED_FEATURES, COMPILED):
    raise UserError(
        "numba.config",
        expected="CPU_NAME, CPU_FEATURES and DISABLE_JIT as the environment has them",
        got=f"{_found}",
        do="Set NUMBA_CPU_NAME, NUMBA_CPU_FEATURES and NUMBA_DISABLE_JIT instead, before Python starts.",
    )


def jit(function: Callable, fastmath: set[str] | bool = False) -> Callable:
    """``numba.njit`` without the GIL, with IEEE division and the cache of this module; no bounds are checked.

    Numba's own settings are left alone for everybody else: its cache folder is changed for the decoration only.
    """
    if not COMPILED:
        return function
    options = {"nogil": True, "cache": True, "error_model": "numpy", "boundscheck": False, "fastmath": fastmath}
    with _decorating:
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(cache_folder())
        try:
            return numba.njit(**options)(function)
        finally:
            numba.config.CACHE_DIR = before


def jit_sums(function: Callable) -> Callable:
    """`jit` for a loop that sums floats in any order, which lets it become a vector loop."""
    return jit(function, {"reassoc"})


def compile_quickly() -> None:
    """For a process that does nothing but compile. Numba finds out once what a function returns for the same types, not at each
    of its calls, where it tries every overload of an operator and words an error for each that does not fit. And nobody looks
    through the growing heap again and again for objects to collect."""
    gc.disable()
    resolve, known = BaseFunction.get_call_type, {}

    def get_call_type(function, context, args, kws):
        key = function, args, tuple(kws.items())
        if key not in known:
            known[key] = resolve(function, context, args, kws)
        return known[key]

    BaseFunction.get_call_type = get_call_type


class _Listener(event.Listener):
    def __init__(self, started: Callable[[str], None]):
        self.started = started

    def on_start(self, event):
        self.started(event.data["dispatcher"].py_func.__name__)

    def on_end(self, event):
        pass


@contextmanager
def watch_compilation(started: Callable[[str], None]) -> Iterator[None]:
    """Calls `started` with a function's name whenever Numba begins to compile one; not when it comes from the cache."""
    listener = _Listener(started)
    event.register("numba:compile", listener)
    try:
        yield
    finally:
        event.unregister("numba:compile", listener)
