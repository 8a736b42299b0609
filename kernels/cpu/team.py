"""A team of threads that take the parts of a kernel's work, one after the other, until none is left.

Training calls compiled kernels between torch's own operations, a few thousand times a step, for 20 microseconds to some
milliseconds each. So helpers must begin at once, and nobody may wait for one that has no core to run on.

    share      writes down a call (kernel, parts, arguments), opens it, takes parts itself
    a helper   enters an open call, takes parts, leaves; it spins for AWAKE_NANOSECONDS after a call, then sleeps (pool.py)
    the end    when no part is left, the caller closes the call and waits for the helpers that are inside. Who comes later
               finds it closed: on a busy machine the caller does all parts itself

A helper counts itself in INSIDE before it looks at OPEN; the caller clears OPEN before it looks at INSIDE. All four happen in
one order for all threads, so a helper that found the call open is waited for.

Each kernel has a list of arguments of its own. They stand behind the call's other words, and an *entry*, a few instructions made
here for each list of types, reads them and calls the kernel by the address that Numba gives a function for C.
"""

import ctypes
import functools
import os
import struct
import threading
from collections.abc import Callable

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types

from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.native import int64s, native
from bitdistill.kernels.cpu.pool import BEGUN, ENDED, LINE, SPINS, Pool
from bitdistill.kernels.cpu.threads import (
    atomic_add,
    atomic_load,
    atomic_store,
    begin_call,
    pause,
    yield_processor,
)

AWAKE_NANOSECONDS = 500_000  # a helper is done one part before the others, and the next kernel often comes in a moment
PARTS = 4  # for each thread: who is done early takes more
# Bytes from the beginning of a call. What all threads write has cache lines of its own.
TICKET, INSIDE, OPEN = 0, LINE, 2 * LINE
ENTRY, KERNEL, ROWS, BLOCK, COUNT, ARGUMENTS = range(3 * LINE, 3 * LINE + 48, 8)
CALL_BYTES = 1024

_I64 = ir.IntType(64)
_KINDS = {int: ("q", types.int64, _I64), np.float32: ("f4x", types.float32, ir.FloatType())}  # in memory, Numba, LLVM


# --- inside a call ---------------------------------------------------------------------------------------------------------


def _python_work(entry, call, first, last):
    raise AssertionError("an entry is machine code")


@native(types.int64(types.int64, types.int64, types.int64, types.int64), _python_work)
def _work(builder, entry, call, first, last):
    """``entry(call, first, last)``. Returns 0."""
    signature = ir.FunctionType(ir.VoidType(), [_I64] * 3)
    builder.call(builder.inttoptr(entry, ir.PointerType(signature)), [call, first, last])
    return ir.Constant(_I64, 0)


@jit
def take_parts(call):
    """Parts of a call until none is left.

    Args:
        call: address of its words.
    """
    words = int64s(call + ENTRY, 6)
    entry, rows, block, count = words[0], words[2], words[3], words[4]
    blocks = (rows + block - 1) // block
    part = atomic_add(call + TICKET, 1)
    while part < count:
        first, last = blocks * part // count * block, blocks * (part + 1) // count * block
        _work(entry, call, first, min(rows, last))
        part = atomic_add(call + TICKET, 1)


@jit
def _enter(state, thread, threads, seen, call):
    """What all threads of the pool run; see Pool."""
    if thread == 0:
        atomic_add(call + OPEN, 1)  # before the others are let in
    while begin_call(state, thread, threads, seen):
        if thread == 0:
            take_parts(call)
            atomic_add(call + OPEN, -1)
            looks = 0
            while atomic_add(call + INSIDE, 0) != 0:
                if looks < SPINS:
                    pause()
                else:
                    yield_processor()
                looks += 1
            atomic_store(state + ENDED, seen + 1)
            return seen + 1
        seen = atomic_load(state + BEGUN)
        atomic_add(call + INSIDE, 1)
        if atomic_add(call + OPEN, 0) != 0:
            take_parts(call)
        atomic_add(call + INSIDE, -1)
    return seen


# --- kernels as C calls them -------------------------------------------------------------------------------------------------

_engines = []  # own the machine code of entries


@functools.cache
def _entry(kinds: tuple[type, ...]) -> int:
    """Address of ``void entry(call, first, last)`` for arguments of these kinds."""
    module = ir.Module("entry")
    module.triple = llvmlite.binding.get_process_triple()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_I64] * 3), "entry")
    call, first, last = function.args
    builder = ir.IRBuilder(function.append_basic_block())

    def word(place: int, kind: ir.Type = _I64):
        return builder.load(builder.inttoptr(builder.add(call, _I64(place)), ir.PointerType(kind)))

    arguments = [word(ARGUMENTS + 8 * place, _KINDS[kind][2]) for place, kind in enumerate(kinds)]
    signature = ir.FunctionType(ir.VoidType(), [_I64, _I64, *(argument.type for argument in arguments)])
    builder.call(builder.inttoptr(word(KERNEL), ir.PointerType(signature)), [first, last, *arguments])
    builder.ret_void()
    machine = llvmlite.binding.Target.from_default_triple().create_target_machine()
    engine = llvmlite.binding.create_mcjit_compiler(llvmlite.binding.parse_assembly(str(module)), machine)
    engine.finalize_object()
    _engines.append(engine)
    return engine.get_function_address("entry")


@functools.cache
def _for_c(kernel: Callable, kinds: tuple[type, ...]) -> tuple[int, int, struct.Struct]:
    """Addresses of the entry and of the kernel compiled for arguments of these kinds; how a call's numbers lie in memory."""
    layout = struct.Struct("=5q" + "".join(_KINDS[kind][0] for kind in kinds))
    assert ENTRY + layout.size <= CALL_BYTES, f"{kernel.__name__}: {len(kinds)} arguments are too many"
    signature = (types.int64, types.int64, *(_KINDS[kind][1] for kind in kinds))
    kernel.compile(signature)
    result = kernel.overloads[signature]
    address = result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name)
    return _entry(kinds), address, layout


# --- the team ----------------------------------------------------------------------------------------------------------------


class Team:
    """Threads that share the work of kernels.

    Args:
        threads: 2 or more, the caller included.
    """

    def __init__(self, threads: int):
        self.threads = threads
        self._memory = bytearray(CALL_BYTES + LINE)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._start = -begin % LINE
        self._pool = Pool(threads, _enter, (begin + self._start,), self._memory, AWAKE_NANOSECONDS, "bitdistill-rows")
        self._one_caller = threading.Lock()

    def share(self, kernel: Callable, rows: int, block: int, arguments: tuple) -> None:
        """``kernel(first, last, *arguments)`` over rows 0 .. rows - 1. A second caller meanwhile works alone.

        Args:
            kernel: compiled with `jit`; raises nothing, and writes nothing that another block's rows write.
            rows, block: `first` is a multiple of `block`, and `last` too except at the end.
            arguments: int or np.float32 each.
        """
        if not self._one_caller.acquire(blocking=False):
            return kernel(0, rows, *arguments)
        try:
            entry, address, layout = _for_c(kernel, tuple(map(type, arguments)))
            count = min(-(-rows // block), PARTS * self.threads)
            struct.pack_into("=q", self._memory, self._start + TICKET, 0)
            layout.pack_into(self._memory, self._start + ENTRY, entry, address, rows, block, count, *arguments)
            self._pool.run()
        finally:
            self._one_caller.release()


@functools.lru_cache(maxsize=1)
def team(threads: int) -> Team:
    """The process's team of so many threads."""
    return Team(threads)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=team.cache_clear)  # a forked child has none of its parent's threads
