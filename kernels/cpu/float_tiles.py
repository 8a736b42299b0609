"""Products of small float32 matrices for compiled code, a tile of sums in registers at a time.

    out[m, n] = sum over k of left[m, k] * right[k, n]          ROWS x COLUMNS sums

A number of the left operand is repeated in all lanes, a row of the right one fills two vectors; so the left operand may lie in
any order (a transposed one has other strides), and the right one has neighboring columns. Each product is added to its sum in
the order of k, fused where the processor has FMA; `add_tile` then adds the whole sum, so that a long sum is one of short ones.

Eight rows of two vectors are what hides the latency of a multiplication on 32 wide registers. On 16 registers of half that width
there is room for two.
"""

import ctypes

import numpy as np
from llvmlite import ir
from numba import types

from bitdistill.kernels.cpu.floats import LANES
from bitdistill.kernels.cpu.native import native
from bitdistill.kernels.cpu.vector import AVX512

ROWS = 8 if AVX512 else 2
COLUMNS = 2 * LANES

_I64, _F32 = ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)
_TILE = types.int64(*[types.int64] * 8)


def _py_tile(more):
    def tile(left, left_row, left_step, right, right_step, count, out, out_row):
        def floats(address, number):
            return np.frombuffer((ctypes.c_float * number).from_address(int(address)), np.float32)

        for m in range(ROWS):
            sums, place = np.zeros(COLUMNS, np.float32), floats(out + m * out_row, COLUMNS)
            for k in range(count):
                sums += floats(left + m * left_row + k * left_step, 1) * floats(right + k * right_step, COLUMNS)
            place[:] = place + sums if more else sums
        return 0

    return tile


def _tile(builder, more, left, left_row, left_step, right, right_step, count, out, out_row):
    """The loop over k, with all sums as values that it carries."""
    fma_type = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    name = f"llvm.fmuladd.v{LANES}f32"
    fma = builder.module.globals.get(name) or ir.Function(builder.module, fma_type, name)
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)

    def vector(address):
        value = builder.load(builder.inttoptr(address, ir.PointerType(_VECTOR)))
        value.align = 4
        return value

    def moved(address, by):
        return builder.add(address, ir.Constant(_I64, by) if isinstance(by, int) else by)

    rows, places = [left], [out]
    for _ in range(ROWS - 1):
        rows.append(moved(rows[-1], left_row))
        places.append(moved(places[-1], out_row))
    places = [moved(place, 4 * LANES * half) for place in places for half in range(2)]
    none = ir.Constant(_VECTOR, [0.0] * LANES)

    before, loop, after = builder.block, builder.append_basic_block("tile"), builder.append_basic_block("tile.end")
    builder.cbranch(builder.icmp_signed(">", count, ir.Constant(_I64, 0)), loop, after)
    builder.position_at_end(loop)
    k, at, skip = (builder.phi(_I64) for _ in range(3))
    sums = [builder.phi(_VECTOR) for _ in places]
    columns = [vector(moved(at, 4 * LANES * half)) for half in range(2)]
    results = []
    for m, row in enumerate(rows):
        number = builder.load(builder.inttoptr(builder.add(row, skip), ir.PointerType(_F32)))
        number.align = 4
        first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
        lanes = builder.shuffle_vector(first, ir.Constant(_VECTOR, ir.Undefined), zeros)
        results += [builder.call(fma, [lanes, columns[half], sums[2 * m + half]]) for half in range(2)]
    following = moved(k, 1), moved(at, right_step), moved(skip, left_step)
    builder.cbranch(builder.icmp_signed("<", following[0], count), loop, after)
    for value, first, later in zip(
        (k, at, skip, *sums),
        (ir.Constant(_I64, 0), right, ir.Constant(_I64, 0), *[none] * len(sums)),
        (*following, *results),
        strict=True,
    ):
        value.add_incoming(first, before)
        value.add_incoming(later, loop)
    builder.position_at_end(after)
    ends = [builder.phi(_VECTOR) for _ in places]
    for end, result, place in zip(ends, results, places, strict=True):
        end.add_incoming(none, before)
        end.add_incoming(result, loop)
        total = builder.fadd(vector(place), end) if more else end
        builder.store(total, builder.inttoptr(place, ir.PointerType(_VECTOR)), align=4)
    return ir.Constant(_I64, 0)


@native(_TILE, _py_tile(more=False))
def multiply_tile(builder, left, left_row, left_step, right, right_step, count, out, out_row):
    """``out = left @ right``. Returns 0.

    left is the address of a number: the next row lies left_row bytes on, the next column left_step. right and out are addresses
    of rows of COLUMNS numbers: the next rows lie right_step and out_row bytes on; out has ROWS of them. count is the number of
    columns of the left operand; 0 makes zeros.
    """
    return _tile(builder, False, left, left_row, left_step, right, right_step, count, out, out_row)


@native(_TILE, _py_tile(more=True))
def add_tile(builder, left, left_row, left_step, right, right_step, count, out, out_row):
    """``out += left @ right``; everything as in `multiply_tile`. Returns 0."""
    return _tile(builder, True, left, left_row, left_step, right, right_step, count, out, out_row)
