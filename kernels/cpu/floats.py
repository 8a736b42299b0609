"""Sixteen fp32 lanes as one value of compiled code: the vectors of elementwise.py and attention.py.

LLVM splits them into the registers that the processor has (one AVX512, two AVX2, four SSE or NEON registers). Nothing is
reordered or approximated: there is no fastmath, so NaN and infinity keep their meaning; sums across lanes have one fixed
tree; and `multiply_add` is fused wherever the target has the instruction and nowhere else. So a result depends on the
processor's feature set, but never on the number of threads or rows.

Memory is addressed by int64 and may be misaligned.
"""

import ctypes

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import models, register_model

from bitdistill.kernels.cpu.native import native

LANES = 16
ROUNDER = np.float32(12582912.0)  # 1.5 * 2**23: x + ROUNDER - ROUNDER is x rounded half to even for |x| < 2**22
_ROUNDER_BITS = 0x4B400000

_F32, _I32, _I16, _I8 = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(8)
_FLOATS, _INTS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)


class _Float32x16(types.Type):
    def __init__(self):
        super().__init__(name="float32x16")


@register_model(_Float32x16)
class _Float32x16Model(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, _FLOATS)


V, A, F, N = _Float32x16(), types.int64, types.float32, types.int64  # vector, address, float, integer (in signatures)


def _ints(value):
    return ir.Constant(_INTS, [value] * LANES)


def _constant(value):
    return ir.Constant(_FLOATS, [float(value)] * LANES)


def _iota():
    return ir.Constant(_INTS, list(range(LANES)))


def _at(builder, address, element):
    return builder.inttoptr(address, ir.PointerType(element))


def _load(builder, address, element):
    value = builder.load(_at(builder, address, ir.VectorType(element, LANES)))
    value.align = 1
    return value


def _store(builder, address, value):
    builder.store(value, _at(builder, address, value.type), align=1)
    return ir.Constant(ir.IntType(64), 0)


def _splat(builder, value, integer=False):
    kind = _INTS if integer else _FLOATS
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), ir.Constant(_INTS, [0] * LANES))


def _intrinsic(builder, name, returns, *values):
    signature = ir.FunctionType(returns, [value.type for value in values])
    function = builder.module.globals.get(name) or ir.Function(builder.module, signature, name)
    return builder.call(function, values)


def _py_array(address, count, dtype):
    return np.frombuffer((ctypes.c_byte * (count * np.dtype(dtype).itemsize)).from_address(int(address)), dtype)


def _py_store(address, values):
    _py_array(address, LANES, values.dtype)[:] = values
    return 0


# --- memory -----------------------------------------------------------------------------------------------------------


@native(V(A), lambda address: _py_array(address, LANES, np.float32).copy())
def load(builder, address):
    """16 floats."""
    return _load(builder, address, _F32)


@native(types.int64(A, V), _py_store)
def store(builder, address, value):
    """Writes 16 floats. Returns 0."""
    return _store(builder, address, value)


def stream_lanes(builder, address, value):
    """IR: `stream` of a vector of 64 bytes."""
    place = builder.store(value, _at(builder, address, value.type))
    place.align = 64
    place.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))
    return ir.Constant(ir.IntType(64), 0)


@native(types.int64(A, V), _py_store)
def stream(builder, address, value):
    """Writes 16 floats past the caches, to an address that 64 divides; `end_streams` before others may read. Returns 0."""
    return stream_lanes(builder, address, value)


@native(types.int64(), lambda: 0)
def end_streams(builder):
    """What this thread has streamed is in memory before anything that it writes later. Returns 0."""
    builder.fence("seq_cst")
    return ir.Constant(ir.IntType(64), 0)


@native(V(A), lambda address: (_py_array(address, LANES, np.uint16).astype(np.uint32) << 16).view(np.float32))
def load_bf16(builder, address):
    """16 bf16 as floats."""
    bits = builder.shl(builder.zext(_load(builder, address, _I16), _INTS), _ints(16))
    return builder.bitcast(bits, _FLOATS)


@native(
    V(A, N),
    lambda address, odd: (_py_array(address, 2 * LANES, np.uint16)[odd::2].astype(np.uint32) << 16).view(np.float32),
)
def load_bf16_half(builder, address, odd):
    """Of 16 pairs of bf16 the first ones as floats, or the second ones where odd is 1."""
    bits = _load(builder, address, _I32)
    left = builder.mul(builder.sub(ir.Constant(_I32, 1), builder.trunc(odd, _I32)), ir.Constant(_I32, 16))
    bits = builder.and_(builder.shl(bits, _splat(builder, left, True)), _ints(-65536))
    return builder.bitcast(bits, _FLOATS)


@native(V(A), lambda address: _py_array(address, LANES, np.int8).astype(np.float32))
def load_int8(builder, address):
    """16 int8 as floats."""
    return builder.sitofp(builder.sext(_load(builder, address, _I8), _INTS), _FLOATS)


@native(V(A), lambda address: _py_array(address, LANES, np.int32).astype(np.float32))
def load_int32(builder, address):
    """16 int32, rounded to float."""
    return builder.sitofp(_load(builder, address, _I32), _FLOATS)


def _py_bf16(value):
    bits = value.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(value), bits >> 16 | 64, rounded).astype(np.uint16)


def _bf16(builder, value):
    """Rounded half to even to bf16, as int16; NaN stays NaN."""
    bits = builder.bitcast(value, _INTS)
    high = builder.lshr(bits, _ints(16))
    rounded = builder.lshr(builder.add(builder.add(bits, _ints(0x7FFF)), builder.and_(high, _ints(1))), _ints(16))
    bits = builder.select(builder.fcmp_unordered("uno", value, value), builder.or_(high, _ints(64)), rounded)
    return builder.trunc(bits, ir.VectorType(_I16, LANES))


@native(types.int64(A, V), lambda address, value: _py_store(address, _py_bf16(value)))
def store_bf16(builder, address, value):
    """Writes 16 floats as bf16, rounded half to even; NaN stays NaN. Returns 0."""
    return _store(builder, address, _bf16(builder, value))


def _py_halves_at(address):
    return _py_array(address, LANES, np.uint16).astype(np.uint32)


def _py_store_pairs(address, a, b):
    return _py_store(address, _py_bf16(a) | _py_bf16(b).astype(np.uint32) << 16)


@native(types.int64(A, V, V), _py_store_pairs)
def store_pairs(builder, address, a, b):
    """Writes 16 pairs of bf16, of a and b in turn, rounded half to even; NaN stays NaN. Returns 0."""
    low, high = (builder.zext(_bf16(builder, value), _INTS) for value in (a, b))
    return _store(builder, address, builder.or_(low, builder.shl(high, _ints(16))))


@native(types.int64(A, A, A), lambda address, a, b: _py_store(address, _py_halves_at(a) | _py_halves_at(b) << 16))
def copy_pairs(builder, address, a, b):
    """Writes 16 pairs of bf16, which stand at the addresses a and b. Returns 0."""
    low, high = (builder.zext(_load(builder, at, _I16), _INTS) for at in (a, b))
    return _store(builder, address, builder.or_(low, builder.shl(high, _ints(16))))


@native(
    types.int64(A, V, V), lambda address, a, b: _py_store(address, _py_bf16(a)) + _py_store(address + 32, _py_bf16(b))
)
def stream_bf16(builder, address, a, b):
    """Writes 32 floats, 16 of a and 16 of b, as bf16 past the caches; otherwise as `stream`. Returns 0."""
    lanes = ir.Constant(ir.VectorType(_I32, 2 * LANES), list(range(2 * LANES)))
    value = builder.shuffle_vector(_bf16(builder, a), _bf16(builder, b), lanes)
    return stream_lanes(builder, address, value)


@native(V(V), lambda value: (_py_bf16(value).astype(np.uint32) << 16).view(np.float32))
def round_bf16(builder, value):
    """16 floats rounded to bf16 and back."""
    return builder.bitcast(builder.shl(builder.zext(_bf16(builder, value), _INTS), _ints(16)), _FLOATS)


@native(V(V), lambda value: (value.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))
def cut_to_bf16(builder, value):
    """16 floats without their last 16 bits, so that each is a bf16: rounded toward zero."""
    return builder.bitcast(builder.and_(builder.bitcast(value, _INTS), _ints(-65536)), _FLOATS)


@native(types.int64(A, V), lambda address, value: _py_store(address, (value.view(np.uint32) >> 16).astype(np.uint16)))
def store_cut_bf16(builder, address, value):
    """Writes 16 floats as bf16, rounded toward zero. Returns 0."""
    bits = builder.lshr(builder.bitcast(value, _INTS), _ints(16))
    return _store(builder, address, builder.trunc(bits, ir.VectorType(_I16, LANES)))


@native(V(V), lambda value: np.where(np.isfinite(value), np.float32(0), np.float32(np.nan)))
def nan_where_not_finite(builder, value):
    """NaN in the lanes of infinities and NaN, 0 in the others."""
    finite = builder.fcmp_ordered("ord", builder.fmul(value, _constant(0)), _constant(0))
    return builder.select(finite, _constant(0), _constant(np.nan))


def _first(builder, count):
    """Lanes 0 .. count - 1.

    The count goes through an empty piece of assembly, which hides its value: where LLVM 22 knows that one lane alone of 16 or
    8 bits is stored, it stores 32 bits (llvm-project #179489).
    """
    count = builder.asm(ir.FunctionType(count.type, [count.type]), "", "=r,0", [count], False)
    return builder.icmp_signed("<", _iota(), _splat(builder, builder.trunc(count, _I32), True))


def _load_first(builder, address, count, element):
    kind = ir.VectorType(element, LANES)
    name = f"llvm.masked.load.v{LANES}{'f32' if element is _F32 else 'i16'}.p0"
    pointer, one, rest = _at(builder, address, kind), ir.Constant(_I32, 1), ir.Constant(kind, None)
    return _intrinsic(builder, name, kind, pointer, one, _first(builder, count), rest)


def _store_first(builder, address, value, count):
    name = f"llvm.masked.store.v{LANES}{'f32' if value.type == _FLOATS else 'i16' if value.type.element == _I16 else 'i8'}.p0"
    pointer, one = _at(builder, address, value.type), ir.Constant(_I32, 1)
    _intrinsic(builder, name, ir.VoidType(), value, pointer, one, _first(builder, count))
    return ir.Constant(ir.IntType(64), 0)


def _py_load_first(address, count, dtype):
    return np.concatenate([_py_array(address, count, dtype), np.zeros(LANES - count, dtype)])


def _py_store_first(address, values, count):
    _py_array(address, count, values.dtype)[:] = values[:count]
    return 0


@native(V(A, N), lambda address, count: _py_load_first(address, count, np.float32))
def load_first(builder, address, count):
    """`count` < 16 floats, then zeros; reads no further."""
    return _load_first(builder, address, count, _F32)


@native(types.int64(A, V, N), _py_store_first)
def store_first(builder, address, value, count):
    """Writes the first `count` < 16 floats. Returns 0."""
    return _store_first(builder, address, value, count)


@native(
    V(A, N), lambda address, count: (_py_load_first(address, count, np.uint16).astype(np.uint32) << 16).view(np.float32)
)
def load_first_bf16(builder, address, count):
    """`count` < 16 bf16 as floats, then zeros; reads no further."""
    bits = builder.zext(_load_first(builder, address, count, _I16), _INTS)
    return builder.bitcast(builder.shl(bits, _ints(16)), _FLOATS)


@native(types.int64(A, V, N), lambda address, value, count: _py_store_first(address, _py_bf16(value), count))
def store_first_bf16(builder, address, value, count):
    """Writes the first `count` < 16 floats as bf16. Returns 0."""
    return _store_first(builder, address, _bf16(builder, value), count)


def _py_codes(value):
    return (value + ROUNDER).view(np.int32) - np.int32(_ROUNDER_BITS)


def _codes(builder, value):
    """Rounded half to even, as int32; |value| < 2**22. Of NaN it is some number."""
    bits = builder.bitcast(builder.fadd(value, _constant(ROUNDER)), _INTS)
    return builder.sub(bits, _ints(_ROUNDER_BITS))


def _py_store_codes(address, value):
    codes = _py_codes(value)
    _py_store(address, codes.astype(np.int8))
    return int(codes.astype(np.int8).sum(dtype=np.int64))


@native(types.int64(A, V), _py_store_codes)
def store_codes(builder, address, value):
    """Rounds half to even and writes 16 int8; |value| <= 127. Returns their sum."""
    codes = builder.trunc(_codes(builder, value), ir.VectorType(_I8, LANES))
    _store(builder, address, codes)
    total = _intrinsic(builder, f"llvm.vector.reduce.add.v{LANES}i32", _I32, builder.sext(codes, _INTS))
    return builder.sext(total, ir.IntType(64))


@native(
    types.int64(A, V, N),
    lambda address, value, count: _py_store_first(address, _py_codes(value).astype(np.int8), count),
)
def store_first_codes(builder, address, value, count):
    """Rounds half to even and writes the first `count` int8; |value| <= 127. Returns 0."""
    return _store_first(builder, address, builder.trunc(_codes(builder, value), ir.VectorType(_I8, LANES)), count)


@native(types.int64(A, V), lambda address, value: _py_store(address, _py_codes(value).astype(np.int8)))
def store_int8(builder, address, value):
    """Rounds half to even and writes 16 int8; |value| <= 127. Returns 0."""
    return _store(builder, address, builder.trunc(_codes(builder, value), ir.VectorType(_I8, LANES)))


def _py_store_four(address, *values):
    codes = np.stack([_py_codes(value).astype(np.int8) for value in values], axis=1)
    _py_array(address, 4 * LANES, np.int8)[:] = codes.ravel()
    return 0


@native(types.int64(A, V, V, V, V), _py_store_four)
def store_four_int8(builder, address, a, b, c, d):
    """Rounds half to even and writes 16 times four int8, of a, b, c and d; |value| <= 127. Returns 0."""
    word = None
    for place, value in enumerate((a, b, c, d)):
        code = builder.and_(_codes(builder, value), _ints(255))
        code = builder.shl(code, _ints(8 * place))
        word = code if word is None else builder.or_(word, code)
    return _store(builder, address, word)


# --- lane by lane -----------------------------------------------------------------------------------------------------


@native(V(F), lambda value: np.full(LANES, value, np.float32))
def splat(builder, value):
    """The same float in every lane."""
    return _splat(builder, value)


@native(V(A), lambda address: np.full(LANES, _py_array(address, 1, np.float32)[0], np.float32))
def repeat(builder, address):
    """The float at an address in every lane."""
    pointer = builder.inttoptr(address, ir.PointerType(ir.FloatType()))
    value = builder.load(pointer)
    value.align = 4
    return _splat(builder, value)


@native(V(V, V), lambda a, b: a + b)
def add(builder, a, b):
    """a + b"""
    return builder.fadd(a, b)


@native(V(V, V), lambda a, b: a - b)
def subtract(builder, a, b):
    """a - b"""
    return builder.fsub(a, b)


@native(V(V, V), lambda a, b: a * b)
def multiply(builder, a, b):
    """a * b"""
    return builder.fmul(a, b)


@native(V(V, V), lambda a, b: a / b)
def divide(builder, a, b):
    """a / b, correctly rounded"""
    return builder.fdiv(a, b)


@native(V(V, V, V), lambda a, b, c: a * b + c)
def multiply_add(builder, a, b, c):
    """a * b + c, with one rounding where the target has FMA, with two elsewhere"""
    return _intrinsic(builder, f"llvm.fmuladd.v{LANES}f32", _FLOATS, a, b, c)


@native(V(V, V), lambda a, b: np.where(a > b, a, b))
def maximum(builder, a, b):
    """a where a > b, else b"""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@native(V(V, V, V), lambda value, a, b: np.where(value >= 0, a, b))
def where_positive(builder, value, a, b):
    """a where value >= 0, else b"""
    return builder.select(builder.fcmp_ordered(">=", value, _constant(0)), a, b)


def _py_between(value, low, high):
    lanes = np.arange(LANES)
    return np.where((lanes >= low) & (lanes < high), value, np.float32(-np.inf))


@native(V(V, N, N), _py_between)
def between(builder, value, low, high):
    """The lanes low .. high - 1; -inf in the others"""
    low, high = (_splat(builder, builder.trunc(bound, _I32), True) for bound in (low, high))
    inside = builder.and_(builder.icmp_signed(">=", _iota(), low), builder.icmp_signed("<", _iota(), high))
    return builder.select(inside, value, _constant(-np.inf))


def _py_exp(x):
    with np.errstate(over="ignore"):
        return np.exp(x)


_LOG2E, _LN2_HIGH, _LN2_LOW = np.log2(np.e), 0.693145751953125, np.log(2) - 0.693145751953125
_TAYLOR = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)


@native(V(V), _py_exp)
def exp(builder, x):
    """e^x within 2 units in the last place; 0 below -87.3 (no subnormal results), inf above 88.7, NaN of NaN

    x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial of degree 7 in r, and 2^n by its exponent bits in two factors.
    """
    fma = f"llvm.fmuladd.v{LANES}f32"
    shifted = _intrinsic(builder, fma, _FLOATS, x, _constant(_LOG2E), _constant(ROUNDER))
    n = builder.fsub(shifted, _constant(ROUNDER))
    r = _intrinsic(builder, fma, _FLOATS, n, _constant(-_LN2_HIGH), x)
    r = _intrinsic(builder, fma, _FLOATS, n, _constant(-_LN2_LOW), r)
    value = _constant(_TAYLOR[0])
    for coefficient in _TAYLOR[1:]:
        value = _intrinsic(builder, fma, _FLOATS, value, r, _constant(coefficient))
    exponent = builder.sub(builder.bitcast(shifted, _INTS), _ints(_ROUNDER_BITS))
    half = builder.ashr(exponent, _ints(1))  # 2^128 has no float: two factors
    for part in (half, builder.sub(exponent, half)):
        power = builder.shl(builder.add(part, _ints(127)), _ints(23))
        value = builder.fmul(value, builder.bitcast(power, _FLOATS))
    value = builder.select(builder.fcmp_ordered("<", x, _constant(-87.3)), _constant(0), value)
    value = builder.select(builder.fcmp_ordered(">", x, _constant(88.72)), _constant(np.inf), value)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, value)


# --- across lanes -----------------------------------------------------------------------------------------------------


def _halves(builder, value, operation):
    """Folds the upper half of the lanes onto the lower one until one is left."""
    width = LANES
    while width > 1:
        width //= 2
        undefined = ir.Constant(value.type, ir.Undefined)
        low, high = (
            builder.shuffle_vector(
                value, undefined, ir.Constant(ir.VectorType(_I32, width), list(range(start, start + width)))
            )
            for start in (0, width)
        )
        value = operation(low, high)
    return builder.extract_element(value, ir.Constant(_I32, 0))


def _py_halves(value, operation):
    while len(value) > 1:
        value = operation(value[: len(value) // 2], value[len(value) // 2 :])
    return value[0]


@native(F(V), lambda value: _py_halves(value, np.add))
def total(builder, value):
    """The sum of the lanes, by halves"""
    return _halves(builder, value, builder.fadd)


@native(F(V), lambda value: _py_halves(value, lambda a, b: np.where(a > b, a, b)))
def largest(builder, value):
    """The maximum of the lanes"""
    return _halves(builder, value, lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))


@native(V(V, V), lambda peak, x: np.maximum(peak, np.abs(x)))
def maximum_magnitude(builder, peak, x):
    """max(peak, |x|) for peak >= 0; NaN where x or peak is NaN: magnitudes compare like integers, NaN above infinity"""
    bits = builder.and_(builder.bitcast(x, _INTS), _ints(0x7FFFFFFF))
    peak = builder.bitcast(peak, _INTS)
    return builder.bitcast(builder.select(builder.icmp_signed(">", bits, peak), bits, peak), _FLOATS)


@native(F(V), lambda value: np.maximum.reduce(value))
def largest_magnitude(builder, value):
    """The maximum of lanes that are >= 0 or NaN; NaN if there is one"""
    bits = _intrinsic(builder, f"llvm.vector.reduce.smax.v{LANES}i32", _I32, builder.bitcast(value, _INTS))
    return builder.bitcast(bits, _F32)
