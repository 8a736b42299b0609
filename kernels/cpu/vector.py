"""64-byte vectors for compiled code: types, and the operations that the products are written in.

Numba has no vector types, and plain loops never become the four-way int8 dot products that processors have (they are ten
times slower). So each operation here emits LLVM IR on vectors of 64 bytes, whatever the processor's own width: LLVM divides
them into two ymm or four xmm or q registers. Only `dot`, `dot_signed`, `widen` and the table lookups name an instruction of
a processor, chosen by `instructions.FEATURES`; everything else is plain IR.

    BYTES   64 bytes: packed codes, unsigned codes, or four activation codes repeated 16 times
    INTS    16 int32; sixteen floats are in floats.py
    SUMS    what `dot` adds to:  16 int32 where the processor adds four products to an int32 (WIDE),
                                 32 int16 elsewhere, which wrap: `widen` them before they can overflow

A lane is 32 bits: four neighboring columns of one row (packing.py). When nothing is compiled (NUMBA_DISABLE_JIT=1), each
operation is the numpy function written beside it, for any of the feature sets, so that every processor's algorithm can be
checked on any machine. An int16 sum that overflows is an AssertionError there.
"""

import ctypes

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import models, register_model

from bitdistill.kernels.cpu.floats import V
from bitdistill.kernels.cpu.instructions import FEATURES
from bitdistill.kernels.cpu.native import native

AVX512 = FEATURES in ("amx", "avx512_vbmi", "avx512_vnni")
VBMI = FEATURES in ("amx", "avx512_vbmi")
WIDE = FEATURES not in ("avx2", "portable")
NEON = FEATURES == "neon_dot"
SIGNED_OFFSET = 128 if WIDE and not NEON else 0  # what `dot_signed` adds to every code
SHUFFLES = FEATURES != "portable"  # has `lookup16`; also, converts float16


class VectorType(types.Type):
    """64 bytes as integers of `bits` bits."""

    def __init__(self, bits: int):
        self.bits = bits
        super().__init__(name=f"int{bits}x{512 // bits}")


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, ir.VectorType(ir.IntType(vector.bits), 512 // vector.bits))


BYTES, INTS = VectorType(8), VectorType(32)
SUMS = INTS if WIDE else VectorType(16)
_I8, _I16, _I32, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
_BYTES, _WORDS, _INTS, _FLOATS = (ir.VectorType(t, n) for t, n in ((_I8, 64), (_I16, 32), (_I32, 16), (_F32, 16)))
_SUMS = _INTS if WIDE else _WORDS


# --- IR ---------------------------------------------------------------------------------------------------------------


def _pointer(builder, address, to):
    return builder.inttoptr(address, ir.PointerType(to))


def _load(builder, address, kind):
    value = builder.load(_pointer(builder, address, kind))
    value.align = 1
    return value


def repeat_lanes(builder, value, vector):
    """IR: one number in all lanes of a vector type."""
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, vector.count), [0] * vector.count))


def _every(vector, value):
    """A constant in all lanes."""
    return ir.Constant(vector, [value] * vector.count)


def _lanes_from(builder, value, start, count):
    mask = ir.Constant(ir.VectorType(_I32, count), list(range(start, start + count)))
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), mask)


def _call(builder, name, returns, *arguments):
    kind = ir.FunctionType(returns, [argument.type for argument in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, arguments)


def _in_parts(builder, parts, name, *arguments):
    """An instruction on narrower vectors: cut, call, join. The result is as wide as the first argument's parts."""
    if parts == 1:
        return _call(builder, name, arguments[0].type, *arguments)
    results = []
    for part in range(parts):
        cut = [_lanes_from(builder, a, part * a.type.count // parts, a.type.count // parts) for a in arguments]
        results.append(_call(builder, name, cut[0].type, *cut))
    return _joined(builder, results)


def _joined(builder, parts):
    while len(parts) > 1:
        count = 2 * parts[0].type.count
        mask = ir.Constant(ir.VectorType(_I32, count), list(range(count)))
        parts = [builder.shuffle_vector(a, b, mask) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


# --- numpy ------------------------------------------------------------------------------------------------------------


def _read(dtype, count):
    size = np.dtype(dtype).itemsize * count
    return lambda address: np.frombuffer((ctypes.c_char * size).from_address(int(address)), dtype).copy()


def _write(address, vector):
    ctypes.memmove(int(address), np.ascontiguousarray(vector).ctypes.data, vector.nbytes)
    return 0


def _quads(vector):
    return vector.reshape(16, 4).astype(np.int32)


def _py_dot(sums, unsigned, act):
    products = _quads(unsigned) * _quads(act.view(np.int8))
    if WIDE:
        return sums + products.sum(axis=1, dtype=np.int32)
    wide = sums.astype(np.int32) + products.reshape(32, 2).sum(axis=1)
    assert (wide == wide.astype(np.int16)).all(), "an int16 sum overflows"
    return wide.astype(np.int16)


def _py_dot_signed(ints, codes, act):
    products = (_quads(codes.view(np.int8)) + SIGNED_OFFSET) * _quads(act.view(np.int8))
    assert WIDE or np.abs(products.reshape(32, 2).sum(axis=1)).max() <= 32767, "an int16 sum overflows"
    return ints + products.sum(axis=1, dtype=np.int32)


# --- memory -----------------------------------------------------------------------------------------------------------


@native(BYTES(types.int64), _read(np.uint8, 64))
def load_bytes(builder, address):
    """64 bytes at an address."""
    return _load(builder, address, _BYTES)


@native(types.int64(types.int64, BYTES), _write)
def store_bytes(builder, address, value):
    """Writes 64 bytes. Returns 0."""
    builder.store(value, _pointer(builder, address, _BYTES), align=1)
    return ir.Constant(ir.IntType(64), 0)


@native(INTS(types.int64), _read(np.int32, 16))
def load_ints(builder, address):
    """16 int32 at an address."""
    return _load(builder, address, _INTS)


@native(types.int64(types.int64, INTS), _write)
def store_ints(builder, address, value):
    """Writes 16 int32. Returns 0."""
    builder.store(value, _pointer(builder, address, _INTS), align=1)
    return ir.Constant(ir.IntType(64), 0)


@native(V(types.int64), lambda address: _read(np.float16, 16)(address).astype(np.float32))
def load_halves(builder, address):
    """16 float16 at an address, as float32; exact."""
    words = ir.VectorType(_I16, 16)
    bits = _load(builder, address, words)
    if SHUFFLES:
        return builder.fpext(builder.bitcast(bits, ir.VectorType(ir.HalfType(), 16)), _FLOATS)
    # Without an instruction for it: shift the 15 bits into place and multiply by 2**112, which also handles subnormals;
    # what was infinite or NaN comes out at 2**16 or above, and gets the largest exponent.
    bits = builder.zext(bits, _INTS)
    magnitude = builder.shl(builder.and_(bits, _every(_INTS, 0x7FFF)), _every(_INTS, 13))
    scaled = builder.fmul(builder.bitcast(magnitude, _FLOATS), _every(_FLOATS, 2.0**112))
    special = builder.fcmp_ordered(">=", scaled, _every(_FLOATS, 65536.0))
    result = builder.bitcast(scaled, _INTS)
    result = builder.select(special, builder.or_(result, _every(_INTS, 0x7F800000)), result)
    sign = builder.shl(builder.and_(bits, _every(_INTS, 0x8000)), _every(_INTS, 16))
    return builder.bitcast(builder.or_(result, sign), _FLOATS)


@native(types.int64(types.int64), lambda address: 0)
def prefetch(builder, address):
    """Asks for the cache line at an address, which need not be mapped. Returns 0."""
    hint = ir.FunctionType(ir.VoidType(), [ir.PointerType(_I8), _I32, _I32, _I32])
    name = "llvm.prefetch.p0i8"
    function = builder.module.globals.get(name) or ir.Function(builder.module, hint, name)
    builder.call(function, [_pointer(builder, address, _I8), _I32(0), _I32(3), _I32(1)])
    return ir.Constant(ir.IntType(64), 0)


@native(BYTES(types.int64), lambda address: np.tile(_read(np.uint8, 4)(address), 16))
def repeat_quad(builder, address):
    """The four bytes at an address in every lane."""
    quad = _load(builder, address, _I32)
    return builder.bitcast(repeat_lanes(builder, quad, _INTS), _BYTES)


# --- bytes ------------------------------------------------------------------------------------------------------------


@native(BYTES(types.int64), lambda value: np.full(64, value & 255, np.uint8))
def repeat_byte(builder, value):
    """One byte 64 times."""
    return repeat_lanes(builder, builder.trunc(value, _I8), _BYTES)


@native(BYTES(BYTES, BYTES), np.bitwise_and)
def and_bytes(builder, a, b):
    """a & b"""
    return builder.and_(a, b)


@native(BYTES(BYTES, BYTES), np.add)
def add_bytes(builder, a, b):
    """a + b modulo 256"""
    return builder.add(a, b)


@native(BYTES(BYTES, BYTES), np.subtract)
def sub_bytes(builder, a, b):
    """a - b modulo 256"""
    return builder.sub(a, b)


@native(BYTES(BYTES, BYTES), np.minimum)
def min_bytes(builder, a, b):
    """The smaller of unsigned bytes."""
    return builder.select(builder.icmp_unsigned("<", a, b), a, b)


@native(BYTES(BYTES, types.int64), lambda a, bits: (a.view(np.uint16) >> np.uint16(bits)).view(np.uint8))
def shift_words(builder, a, bits):
    """Every pair of bytes, as a little-endian word, shifted right: bits of the upper byte come down into the lower one."""
    amount = repeat_lanes(builder, builder.trunc(bits, _I16), _WORDS)
    return builder.bitcast(builder.lshr(builder.bitcast(a, _WORDS), amount), _BYTES)


@native(BYTES(BYTES), lambda a: a // np.uint8(3))
def third(builder, a):
    """a // 3 of unsigned bytes, by a multiplication of words."""
    return builder.udiv(a, _every(_BYTES, 3))


def table(*values: int):
    """An operation without arguments: a table for `lookup16` (up to 16 values) or 64 constant bytes."""
    content = np.array([*values, *[0] * (-len(values) % 16)], np.uint8)
    content = np.tile(content, 64 // len(content))

    @native(BYTES(), lambda: content)
    def constant(builder):
        return ir.Constant(_BYTES, content.tolist())

    return constant


@native(BYTES(BYTES, BYTES), lambda entries, index: entries[index & 15])
def lookup16(builder, entries, index):
    """entries[index & 15] of a `table`, for an index below 128. Where SHUFFLES."""
    if NEON:
        low = builder.and_(index, _every(_BYTES, 15))
        return _in_parts(builder, 4, "llvm.aarch64.neon.tbl1.v16i8", entries, low)
    if AVX512:
        return _in_parts(builder, 1, "llvm.x86.avx512.pshuf.b.512", entries, index)
    assert SHUFFLES, "no instruction for it"
    return _in_parts(builder, 2, "llvm.x86.avx2.pshuf.b", entries, index)


@native(BYTES(BYTES, BYTES, BYTES), lambda low, high, index: np.concatenate([low, high])[index & 127])
def lookup128(builder, low, high, index):
    """Entry `index` modulo 128 of two vectors that follow each other. Where VBMI."""
    return _call(builder, "llvm.x86.avx512.vpermi2var.qi.512", _BYTES, low, index, high)


# --- dot products -----------------------------------------------------------------------------------------------------


def _even_odd(builder, value, signed):
    """The lower and the upper byte of each word, as words."""
    words, eight = builder.bitcast(value, _WORDS), _every(_WORDS, 8)
    if not signed:
        return builder.and_(words, _every(_WORDS, 255)), builder.lshr(words, eight)
    return builder.ashr(builder.shl(words, eight), eight), builder.ashr(words, eight)


def _pairs(builder, a, b, a_signed):
    """a * b of bytes, products of neighbors added, as words: vpmaddubsw from plain operations."""
    (a_even, a_odd), (b_even, b_odd) = _even_odd(builder, a, a_signed), _even_odd(builder, b, True)
    return builder.add(builder.mul(a_even, b_even), builder.mul(a_odd, b_odd))


def widen_words(builder, words):
    """IR: neighboring int16 added, as int32."""
    if FEATURES == "avx2":
        ones = _every(ir.VectorType(_I16, 16), 1)
        halves = [_lanes_from(builder, words, start, 16) for start in (0, 16)]
        wide = ir.VectorType(_I32, 8)
        return _joined(builder, [_call(builder, "llvm.x86.avx2.pmadd.wd", wide, half, ones) for half in halves])
    lanes, sixteen = builder.bitcast(words, _INTS), _every(_INTS, 16)
    return builder.add(builder.ashr(builder.shl(lanes, sixteen), sixteen), builder.ashr(lanes, sixteen))


def pair_products(builder, a, b):
    """IR: a * b of unsigned and signed bytes, products of neighbors added, as words: vpmaddubsw, or plain operations."""
    if FEATURES != "avx2":
        return _pairs(builder, a, b, a_signed=False)
    halves = [[_lanes_from(builder, value, start, 32) for value in (a, b)] for start in (0, 32)]
    words = ir.VectorType(_I16, 16)
    return _joined(builder, [_call(builder, "llvm.x86.avx2.pmadd.ub.sw", words, *half) for half in halves])


def _four_way(builder, ints, a, b):
    """int32 + four products of bytes, by the one instruction that does it."""
    if NEON:
        quarters = [
            [_lanes_from(builder, v, part * v.type.count // 4, v.type.count // 4) for v in (ints, a, b)]
            for part in range(4)
        ]
        return _joined(builder, [_call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", q[0].type, *q) for q in quarters])
    arguments = [ints, builder.bitcast(a, _INTS), builder.bitcast(b, _INTS)]
    if AVX512:
        return _in_parts(builder, 1, "llvm.x86.avx512.vpdpbusd.512", *arguments)
    return _in_parts(builder, 2, "llvm.x86.avx512.vpdpbusd.256", *arguments)


@native(SUMS(), lambda: np.zeros(16, np.int32) if WIDE else np.zeros(32, np.int16))
def no_sums(builder):
    """Zeros for `dot` to add to."""
    return _every(_SUMS, 0)


@native(SUMS(SUMS, BYTES, BYTES), _py_dot)
def dot(builder, sums, unsigned, act):
    """sums + unsigned * act, four columns per lane: unsigned codes up to 127, int8 activation codes within +-127.

    Where not WIDE an int16 takes two columns, so that with codes up to u it holds 32767 // (254 u) calls.
    """
    if WIDE:
        return _four_way(builder, sums, unsigned, act)
    return builder.add(sums, pair_products(builder, unsigned, act))


@native(SUMS(SUMS, SUMS), np.add)
def add_sums(builder, a, b):
    """a + b"""
    return builder.add(a, b)


@native(INTS(SUMS), lambda sums: sums.reshape(16, -1).sum(axis=1, dtype=np.int32))
def widen(builder, sums):
    """The sums of `dot` as int32, one per row."""
    return sums if WIDE else widen_words(builder, sums)


@native(INTS(INTS, BYTES, BYTES), _py_dot_signed)
def dot_signed(builder, ints, codes, act):
    """ints + (codes + SIGNED_OFFSET) * act, four columns per lane: both int8 within +-127."""
    if SIGNED_OFFSET:  # with the top bit flipped, int8 codes are codes + 128
        codes = builder.xor(codes, _every(_BYTES, SIGNED_OFFSET))
    return dot_bytes(builder, ints, codes, act)


def dot_bytes(builder, ints, codes, act):
    """IR: `dot_signed` of codes that have SIGNED_OFFSET added already."""
    if WIDE:
        return _four_way(builder, ints, codes, act)
    if FEATURES == "avx2":  # |codes| * (act with the sign of codes): a pair is below 2 * 127**2, so nothing saturates
        positive = builder.icmp_signed(">=", codes, _every(_BYTES, 0))
        size = builder.select(positive, codes, builder.neg(codes))
        act = _in_parts(builder, 2, "llvm.x86.avx2.psign.b", act, codes)
        return builder.add(ints, widen_words(builder, pair_products(builder, size, act)))
    return builder.add(ints, widen_words(builder, _pairs(builder, codes, act, a_signed=True)))


# --- 16 integers and 16 floats ----------------------------------------------------------------------------------------


@native(INTS(types.int32), lambda value: np.full(16, value, np.int32))
def repeat_int(builder, value):
    """One int32 16 times."""
    return repeat_lanes(builder, value, _INTS)


@native(INTS(INTS, INTS), np.add)
def add_ints(builder, a, b):
    """a + b modulo 2**32"""
    return builder.add(a, b)


@native(INTS(INTS, INTS), np.subtract)
def sub_ints(builder, a, b):
    """a - b modulo 2**32"""
    return builder.sub(a, b)


@native(INTS(INTS, INTS), np.multiply)
def mul_ints(builder, a, b):
    """a * b modulo 2**32"""
    return builder.mul(a, b)


@native(INTS(INTS, types.int64), lambda a, bits: a >> np.int32(bits))
def shift_ints(builder, a, bits):
    """a >> bits, arithmetic"""
    return builder.ashr(a, repeat_lanes(builder, builder.trunc(bits, _I32), _INTS))


@native(V(INTS), lambda a: a.astype(np.float32))
def floats_of(builder, a):
    """int32 to the nearest float32, ties to even"""
    return builder.sitofp(a, _FLOATS)
