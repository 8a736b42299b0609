"""Compiles the decoder's step and all that it calls to object files, for library.py.

Numba compiles function by function: each is optimized together with all that it calls, then once more inside each of its
callers, and gets machine code and wrappers for Python of its own. Of a step of ninety functions only the outermost are called
from outside. So here Numba's work ends with LLVM's IR of each function; all of them are linked once, optimized once, and
become machine code once. What is exported takes and returns int64, by C's convention.

Parts are compiled side by side. "step" calls what the others export by its name; library.py links them.

This module changes Numba for the whole process (`write_part`), which therefore does nothing else.
"""

import inspect
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core.caching import NullCache
from numba.core.codegen import JITCodeLibrary, JITCPUCodegen
from numba.core.compiler_machinery import PassManager
from numba.core.cpu import CPUContext
from numba.core.dispatcher import Dispatcher
from numba.core.runtime import rtsys
from numba.core.typed_passes import InlineOverloads, NopythonRewrites
from numba.core.untyped_passes import InlineClosureLikes

from bitdistill.kernels.cpu import activations, attention, elementwise, floats, grouped, matmul, records, step, tables
from bitdistill.kernels.cpu.compilation import compile_quickly

# What decoder.py uses of the compiled code.
FUNCTIONS = (
    step.enter,
    elementwise.padded,
    activations.record_bytes,
    attention.attention_scratch_floats,
    attention.part_floats,
    attention.tile_rows,
    attention.key_rows,
)
NUMBERS = {
    "SCRATCH_BYTES": matmul.SCRATCH_BYTES,
    "CHUNK": attention.CHUNK,
    "SPAN": attention.SPAN,
    "LANES": floats.LANES,
}
# What the other parts export for "step": what it spends its time in.
EXPORTED = {
    "products": (
        matmul.gemm,
        tables.table_logits,
        attention.prepare,
        attention.attend_span,
        attention.merge_span,
        attention.finish_parts,
        attention.attend,
    ),
    "grouped": (grouped.grouped_gemm,),
}


def write_part(part: str, path: str) -> None:
    """Writes what a part exports (a line of JSON) and its object file.

    Args:
        part: one of library.PARTS, or library.GROUPED. path: of the file.
    """
    compile_quickly()
    _leave_out_passes()
    exported = EXPORTED.get(part, FUNCTIONS)
    JITCPUCodegen._library_class = _Lowered
    CPUContext.get_executable = lambda *_: [].append  # some built-in function: nothing is called in this process
    for function in _dispatchers(vars(module) for module in _modules()):
        function._cache = NullCache()
        function.targetoptions |= {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    facts = {"functions": {}, "numbers": {}}
    if part == "step":
        for function in itertools.chain(*EXPORTED.values()):
            name = function.__name__
            setattr(step, name, types.ExternalFunction(f"bitdistill_{name}", _signature(function)))
        facts = {"functions": {function.__name__: _count(function) for function in FUNCTIONS}, "numbers": NUMBERS}
    machine_code, facts["calls"] = _object(exported)
    Path(path).write_bytes(json.dumps(facts).encode() + b"\n" + machine_code)


def _leave_out_passes() -> None:
    """Numba leaves out passes that find nothing to rewrite in these kernels: closures, inlined overloads, whole arrays."""
    add = PassManager.add_pass

    def add_pass(manager, kind, description=""):
        if kind not in (InlineClosureLikes, InlineOverloads, NopythonRewrites):
            add(manager, kind, description)

    PassManager.add_pass = add_pass


def _modules() -> list:
    return [module for name, module in sys.modules.items() if name.startswith(f"{__package__}.")]


def _dispatchers(namespaces: Iterable[dict]) -> Iterator[Dispatcher]:
    for namespace in namespaces:
        for value in namespace.values():
            if isinstance(value, Dispatcher):
                yield value


def _count(function: Dispatcher) -> int:
    return len(inspect.signature(function.py_func).parameters)


def _signature(function: Dispatcher):
    return types.int64(*[types.int64] * _count(function))


class _Lowered(JITCodeLibrary):
    """Numba's library of a function, which stays LLVM's IR, not optimized yet."""

    def add_llvm_module(self, module):
        module.data_layout = self._codegen._data_layout
        self._final_module.link_in(module)

    def finalize(self):
        self._raise_if_finalized()
        self._finalized = True

    def get_pointer_to_function(self, name):
        return 0


# Numba counts the references to every array. Ours are views of memory that others own (native.view_of), so it always counts
# those to nothing; these take the place of its functions.
_NO_REFERENCES = """
define void @NRT_incref(ptr %owner) alwaysinline { ret void }
define void @NRT_decref(ptr %owner) alwaysinline { ret void }
"""
_OF_LLVM = (
    "memcpy",
    "memmove",
    "memset",
    "cos",
    "exp",
    "fma",
    "fmaf",
    "sin",
    "sincos",
)  # that it may call for an instruction
_OF_PYTHON = (
    "NRT_",
    "numba",
    "Py",
    "_Py",
)  # how names begin that only a process with Numba or Python's own headers knows


def _object(functions: tuple[Dispatcher, ...]) -> tuple[bytes, list[str]]:
    """One object file of functions and of all that they call; what it calls of the system's libraries."""
    whole, seen = None, set()
    for function in functions:
        arguments = (types.int64,) * _count(function)
        function.compile(arguments)
        result = function.overloads[arguments]
        codegen = result.library.codegen
        if whole is None:
            whole = llvmlite.binding.parse_assembly(str(codegen._create_empty_module("step")))
            whole.link_in(llvmlite.binding.parse_assembly(_NO_REFERENCES))
            seen.add(id(rtsys.library))
        for module in _ir_of(result.library, seen):
            whole.link_in(module, preserve=True)
        whole.link_in(llvmlite.binding.parse_assembly(str(_export(result, function.__name__))), preserve=True)
    for value in (*whole.functions, *whole.global_variables):
        if not value.is_declaration and not value.name.startswith("bitdistill_"):
            value.linkage = "internal"  # so that what nobody calls any more is left out
    whole.verify()
    passes, builder = codegen._module_pass_manager()
    passes.run(whole, builder)
    machine_code = codegen._tm.emit_object(whole)
    called = {function.name for function in whole.functions if function.is_declaration}
    called |= {name for name in _OF_LLVM if b"\0" + name.encode() + b"\0" in machine_code}
    called = {name for name in called if not name.startswith(("llvm.", "bitdistill_"))}
    assert not [name for name in called if name.startswith(_OF_PYTHON)], called
    return machine_code, sorted(called)


def _ir_of(library: _Lowered, seen: set[int]) -> Iterator:
    """The IR of a library and of all that it calls."""
    if id(library) not in seen:
        seen.add(id(library))
        yield library._final_module
        for called in library._linking_libraries:
            yield from _ir_of(called, seen)


def _export(result, name: str) -> ir.Module:
    """``int64 bitdistill_NAME(int64, ...)``: the result, 0 for a function without one, records.FAILED for an exception."""
    context, described, word = result.target_context, result.fndesc, ir.IntType(64)
    module = context.create_module(name)
    callee = context.call_conv.get_function_type(described.restype, described.argtypes)
    callee = ir.Function(module, callee, described.llvm_func_name)
    exported = ir.Function(module, ir.FunctionType(word, [word] * len(described.argtypes)), f"bitdistill_{name}")
    builder = ir.IRBuilder(exported.append_basic_block())
    status, value = context.call_conv.call_function(
        builder, callee, described.restype, described.argtypes, exported.args
    )
    assert described.restype in (types.int64, types.none), described
    value = value if described.restype == types.int64 else ir.Constant(word, 0)
    builder.ret(builder.select(status.is_ok, value, ir.Constant(word, records.FAILED)))
    return module
