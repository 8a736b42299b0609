"""Single instructions and raw memory for compiled code, each with a Python body for NUMBA_DISABLE_JIT=1.

Arrays cross into compiled code as addresses (int64), so that one compilation serves every array, read-only or not; the
Python callers own the checks and keep the arrays alive.
"""

import ctypes
import inspect
from collections.abc import Callable

import numba
import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core.typing import Signature
from numba.extending import intrinsic

from bitdistill.kernels.cpu.compilation import jit


def native(signature: Signature, python: Callable) -> Callable:
    """Decorator: makes an instruction of a function that emits LLVM IR.

    Args:
        signature: ``types.result(types.argument, ...)``; arguments are cast to it.
        python: takes the place of the instruction when nothing is compiled.

    The decorated function gets the IR builder and the arguments as IR values, and returns the result as one.
    """

    def wrap(emit):
        if numba.config.DISABLE_JIT:
            return python

        def typed(typing_context, *arguments):
            def codegen(context, builder, signature, values):
                return emit(builder, *values)

            return signature, codegen

        names = list(inspect.signature(emit).parameters)[1:]
        positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
        typed.__signature__ = inspect.Signature([inspect.Parameter(n, positional) for n in ("typing_context", *names)])
        typed.__name__, typed.__doc__ = emit.__name__, emit.__doc__
        return intrinsic(typed)

    return wrap


@native(types.voidptr(types.int64), ctypes.c_void_p)
def _pointer(builder, address):
    return builder.inttoptr(address, ir.PointerType(ir.IntType(8)))


@jit
def float32s(address, count):
    """The float32 (count,) at an address."""
    return carray(_pointer(address), count, np.float32)


@jit
def float16s(address, count):
    """The float16 (count,) at an address, as uint16 bits."""
    return carray(_pointer(address), count, np.uint16)


@jit
def int64s(address, count):
    """The int64 (count,) at an address."""
    return carray(_pointer(address), count, np.int64)


@jit
def int32s(address, count):
    """The int32 (count,) at an address."""
    return carray(_pointer(address), count, np.int32)


@jit
def int8s(address, count):
    """The int8 (count,) at an address."""
    return carray(_pointer(address), count, np.int8)


@jit
def uint8s(address, count):
    """The uint8 (count,) at an address."""
    return carray(_pointer(address), count, np.uint8)
