"""Single instructions and raw memory for compiled code, each with a Python body for NUMBA_DISABLE_JIT=1.

Arrays are passed to compiled code as addresses (int64), so that one compilation serves every array, read-only or not. The
Python callers check the arrays and keep them alive.
"""

import ctypes
import inspect
from collections.abc import Callable

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.typing import Signature
from numba.extending import intrinsic, register_jitable
from numba.np import arrayobj


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


@register_jitable
def keep(array):
    """The last line of compiled code that has worked with the address of an array of its own.

    Numba frees an array after the last line that names it, whoever still has its address.
    """
    return array.size


def view_of(number: type | np.dtype, name: str) -> Callable:
    """Makes ``name(address, count)``: the numbers or records at an address as a one-dimensional array that owns nothing."""
    dtype = np.dtype(number)
    if numba.config.DISABLE_JIT:

        def view(address, count):
            return np.frombuffer((ctypes.c_char * (int(count) * dtype.itemsize)).from_address(int(address)), dtype)

    else:
        array = types.Array(numba.from_dtype(dtype), 1, "C")

        def view(typing_context, address, count):
            def codegen(context, builder, signature, values):
                result = context.make_array(array)(context, builder)
                pointer = builder.inttoptr(values[0], result.data.type)
                size = ir.Constant(ir.IntType(64), dtype.itemsize)
                arrayobj.populate_array(result, pointer, [values[1]], [size], size, None)
                return result._getvalue()

            return array(types.int64, types.int64), codegen

    view.__name__ = view.__qualname__ = name
    view.__doc__ = f"The {dtype.name} (count,) at an address."
    return view if numba.config.DISABLE_JIT else intrinsic(view)


float32s = view_of(np.float32, "float32s")
float64s = view_of(np.float64, "float64s")
float16s = view_of(np.uint16, "float16s")  # as bits: Numba computes in no float16
uint16s = view_of(np.uint16, "uint16s")
int64s = view_of(np.int64, "int64s")
int32s = view_of(np.int32, "int32s")
int8s = view_of(np.int8, "int8s")
uint8s = view_of(np.uint8, "uint8s")
