"""Tile products of AMX for compiled code: 16 tokens x 64 columns times 64 columns x 16 rows of a weight, in one instruction.

    sums[n, o] += sum over k of acts[n, k] * codes[o, k]        16 x 16 int32, k over 64 columns

The registers are fixed, so that an operation names no register:

    four tiles of sums        one of 16 tokens x 16 rows each
    two tiles of activations  16 tokens x 64 int8 codes, read as they lie in records (activations.py), any stride
    two tiles of codes        16 blocks of packing.py that follow each other: 16 rows x 64 columns in 1024 bytes

    `multiply_2x2`  sums 0, 1: tokens 0 .. 15 with the first and the second codes; sums 2, 3: tokens 16 .. 31 with them
    `multiply_1x4`  sums 0, 1, 2, 3: tokens 0 .. 15 with four times 16 rows of codes
    `multiply_halves`  sums 0, 1, 2, 3: tokens 0 .. 15 with four times 32 columns of the same 16 rows

Four tiles of sums are what hides the latency of a product, which is three times what it occupies the multiplier. `configure`
sets the number of tokens, from 1 to 32: memory of rows that are not there is not touched. `configure_halves` does so for
products of 32 columns, half a tile: 16 tokens of 32 bytes, and eight blocks of codes.

Codes are unsigned bytes (u = code + 1), or int8 in the operations named `_signed`. Sums wrap at 32 bits. In the
operation named `_bf16` a tile is of 32 bf16 columns, those of the weight in pairs, and the sums are float32. Between `configure`
and `release` a thread owns tiles; without `release` every later switch of threads would save 8 KB. Where TILES is false,
only the numpy functions beside the instructions exist. All addresses are int64, and no alignment is needed.
"""

import ctypes
import threading

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types

from bitdistill.kernels.cpu.instructions import FEATURES
from bitdistill.kernels.cpu.native import native

TILES = FEATURES == "amx"
TILE_ROWS = 16  # tokens of a tile of activations, rows of the weight of a tile of codes
TILE_COLUMNS = 64
TILE_BLOCKS = TILE_COLUMNS // 4  # blocks of a tile of codes
TILE_BYTES = TILE_ROWS * TILE_COLUMNS
HALF_COLUMNS, HALF_BYTES = TILE_COLUMNS // 2, TILE_BYTES // 2
_SUMS, _ACTS, _CODES = (0, 1, 2, 3), (4, 5), (6, 7)  # numbers of the registers
_LINE = 64  # bytes from one row of a tile of codes to the next

if TILES and not numba.config.DISABLE_JIT:
    llvmlite.binding.initialize_native_asmparser()

# --- IR ---------------------------------------------------------------------------------------------------------------

_I64 = ir.IntType(64)


def _assembly(builder, lines, *values):
    """Instructions that read and write memory and tiles, with `values` in registers $0, $1, ..."""
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    constraints = ",".join([*["r"] * len(values), "~{memory}"])
    builder.asm(kind, "\n".join(lines), constraints, values, side_effect=True)
    return ir.Constant(_I64, 0)


def _configuration(tokens, columns):
    """The 64 bytes of `ldtilecfg` for so many tokens and columns: palette 1, then bytes per row and rows of each register."""
    rows = _rows(tokens)
    content = np.zeros(64, np.uint8)
    content[0] = 1
    for tile in (*_SUMS, *_ACTS, *_CODES):
        content[16 + 2 * tile] = columns if tile in _ACTS else 64
        content[48 + tile] = columns // 4 if tile in _CODES else rows[tile % 2 if tile in _ACTS else tile // 2]
    return content


def _rows(tokens):
    """Rows of the first and the second tile of activations. One tile alone goes with all four tiles of sums."""
    return min(tokens, TILE_ROWS), tokens - TILE_ROWS if tokens > TILE_ROWS else tokens


# --- numpy ------------------------------------------------------------------------------------------------------------

_thread = threading.local()  # its `rows` of two tiles of activations, and `sums`: what the registers hold


def _py_configure(columns):
    def configure(tokens):
        _thread.rows, _thread.columns = _rows(tokens), columns
        return _py_zero()

    return configure


def _py_release():
    _thread.rows = _thread.sums = None
    return 0


def _py_zero():
    first, second = _thread.rows
    _thread.sums = [np.zeros((rows, TILE_ROWS), np.int32) for rows in (first, first, second, second)]
    return 0


def _py_read(address, stride, rows, dtype, row_bytes=64):
    """`rows` rows of `row_bytes` bytes at an address."""
    lines = [(ctypes.c_char * row_bytes).from_address(int(address + row * stride)) for row in range(rows)]
    return np.stack([np.frombuffer(line, dtype) for line in lines])


def _py_multiply(tile, acts, stride, codes, dtype):
    """Adds one product to a tile of sums."""
    sums = _thread.sums[tile]
    if dtype == np.uint16:
        return _py_multiply_bf16(tile, acts, stride, codes, _LINE)
    columns = _thread.columns
    left = _py_read(acts, stride, len(sums), np.int8, columns).astype(np.int32)
    right = _py_read(codes, _LINE, columns // 4, dtype).reshape(columns // 4, TILE_ROWS, 4)
    sums += left @ right.transpose(0, 2, 1).reshape(columns, TILE_ROWS).astype(np.int32)


def _py_multiply_2x2(dtype):
    def multiply(acts, more_acts, stride, codes, more_codes):
        for tile in _SUMS:
            _py_multiply(tile, (acts, more_acts)[tile // 2], stride, (codes, more_codes)[tile % 2], dtype)
        return 0

    return multiply


def _py_multiply_1x4(dtype):
    def multiply(acts, stride, codes, step):
        for tile in _SUMS:
            _py_multiply(tile, acts, stride, codes + tile * step, dtype)
        return 0

    return multiply


def _py_multiply_halves(acts, stride, codes, more):
    for tile in _SUMS:
        half = min(tile, more)
        _py_multiply(tile, acts + half * HALF_COLUMNS, stride, codes + half * HALF_BYTES, np.uint8)
    return 0


# --- operations -------------------------------------------------------------------------------------------------------


_NAME = "bitdistill.tile_configurations"
_CONFIGURATIONS = np.concatenate(
    [_configuration(tokens, columns) for columns in (TILE_COLUMNS, HALF_COLUMNS) for tokens in range(2 * TILE_ROWS + 1)]
)
_TABLE = ir.ArrayType(ir.IntType(8), len(_CONFIGURATIONS))


def _take(builder, tokens, first):
    """IR: the configuration for so many tokens of those from number `first` on."""
    table = builder.module.globals.get(_NAME)
    if table is None:
        table = ir.GlobalVariable(builder.module, _TABLE, _NAME)
        table.initializer, table.global_constant = ir.Constant(_TABLE, _CONFIGURATIONS.tolist()), True
        table.linkage = "internal"
    place = builder.mul(builder.add(tokens, ir.Constant(_I64, first)), ir.Constant(_I64, 64))
    return _assembly(builder, ["ldtilecfg ($0)"], builder.add(builder.ptrtoint(table, _I64), place))


@native(types.int64(types.int64), _py_configure(TILE_COLUMNS))
def configure(builder, tokens):
    """Takes the tiles for this thread, for 1 to 32 tokens; the sums become zero. Returns 0."""
    return _take(builder, tokens, 0)


@native(types.int64(types.int64), _py_configure(HALF_COLUMNS))
def configure_halves(builder, tokens):
    """`configure` for `multiply_halves`. Returns 0."""
    return _take(builder, tokens, 2 * TILE_ROWS + 1)


@native(types.int64(), _py_release)
def release(builder):
    """Gives the tiles back. Returns 0."""
    return _assembly(builder, ["tilerelease"])


@native(types.int64(), _py_zero)
def zero_sums(builder):
    """All four tiles of sums become zero. Returns 0."""
    return _assembly(builder, [f"tilezero %tmm{tile}" for tile in _SUMS])


def _load_sums(tile):
    def python(address, stride):
        _thread.sums[tile] = _py_read(address, stride, len(_thread.sums[tile]), np.int32).copy()
        return 0

    @native(types.int64(types.int64, types.int64), python)
    def load(builder, address, stride):
        """A tile of sums from rows of 16 int32, `stride` bytes apart. Returns 0."""
        return _assembly(builder, [f"tileloadd ($0,$1,1), %tmm{tile}"], address, stride)

    return load


def _store_sums(tile):
    def python(address, stride):
        for row, sums in enumerate(_thread.sums[tile]):
            ctypes.memmove(int(address + row * stride), sums.ctypes.data, sums.nbytes)
        return 0

    @native(types.int64(types.int64, types.int64), python)
    def store(builder, address, stride):
        """A tile of sums to rows of 16 int32, `stride` bytes apart. Returns 0."""
        return _assembly(builder, [f"tilestored %tmm{tile}, ($0,$1,1)"], address, stride)

    return store


load_sums_0, load_sums_1, load_sums_2, load_sums_3 = (_load_sums(tile) for tile in _SUMS)
store_sums_0, store_sums_1, store_sums_2, store_sums_3 = (_store_sums(tile) for tile in _SUMS)


def _multiply_2x2(instruction, dtype):
    @native(types.int64(*[types.int64] * 5), _py_multiply_2x2(dtype))
    def multiply(builder, acts, more_acts, stride, codes, more_codes):
        """Two tiles of activations, `stride` bytes from token to token, with two tiles of codes. Returns 0."""
        lines = [  # products with the same codes follow each other: changing them each time costs 70 % more time
            "tileloadd ($0,$2,1), %tmm4",
            "tileloadd ($1,$2,1), %tmm5",
            "tileloadd ($3,$5,1), %tmm6",
            f"{instruction} %tmm6, %tmm4, %tmm0",
            f"{instruction} %tmm6, %tmm5, %tmm2",
            "tileloadd ($4,$5,1), %tmm7",
            f"{instruction} %tmm7, %tmm4, %tmm1",
            f"{instruction} %tmm7, %tmm5, %tmm3",
        ]
        line = ir.Constant(_I64, _LINE)
        return _assembly(builder, lines, acts, more_acts, stride, codes, more_codes, line)

    return multiply


def _multiply_1x4(instruction, dtype):
    @native(types.int64(*[types.int64] * 4), _py_multiply_1x4(dtype))
    def multiply(builder, acts, stride, codes, step):
        """One tile of activations with four tiles of codes, `step` bytes apart. Returns 0."""
        lines = ["tileloadd ($0,$1,1), %tmm4"]
        for tile in _SUMS:
            register = _CODES[tile % 2]
            lines += [
                f"tileloadd (${2 + tile},$6,1), %tmm{register}",
                f"{instruction} %tmm{register}, %tmm4, %tmm{tile}",
            ]
        places = [builder.add(codes, builder.mul(step, ir.Constant(_I64, tile))) for tile in _SUMS]
        return _assembly(builder, lines, acts, stride, *places, ir.Constant(_I64, _LINE))

    return multiply


@native(types.int64(*[types.int64] * 4), _py_multiply_halves)
def multiply_halves(builder, acts, stride, codes, more):
    """Four times 32 columns of activations with their codes, HALF_BYTES each; after the first one there are only `more` of them,
    and the last one takes the place of those that are missing. Returns 0."""
    lines, places = [], []
    for tile in _SUMS:
        side = tile % 2
        lines += [
            f"tileloadd (${tile},$8,1), %tmm{_ACTS[side]}",
            f"tileloadd (${4 + tile},$9,1), %tmm{_CODES[side]}",
            f"tdpbsud %tmm{_CODES[side]}, %tmm{_ACTS[side]}, %tmm{tile}",
        ]
    halves = [_at_most(builder, tile, more) for tile in _SUMS]
    for address, step in ((acts, HALF_COLUMNS), (codes, HALF_BYTES)):
        places += [builder.add(address, builder.mul(half, ir.Constant(_I64, step))) for half in halves]
    return _assembly(builder, lines, *places, stride, ir.Constant(_I64, _LINE))


def _at_most(builder, number, most):
    """IR: the smaller of a constant and a value."""
    number = ir.Constant(_I64, number)
    return builder.select(builder.icmp_signed(">", number, most), most, number)


# --- bf16 -------------------------------------------------------------------------------------------------------------
# sums[m, n] += sum over k of a[m, k] * b[k, n]        16 x 16 float32, k over 32 bf16
# b lies in pairs: b[2p, n] and b[2p + 1, n] are neighbors, 16 of these pairs are a row of 64 bytes. A float32 matrix a comes
# in three PARTS whose sum it is (floats.cut_to_bf16), as a bf16 matrix each. One product adds, in this order and with one
# rounding each (no subnormal numbers): fma over the even k, fma over the odd k, their sum, sums + that.


def _py_multiply_bf16(tile, a, stride, b, b_stride):
    sums = _thread.sums[tile].view(np.float32)
    left = (_py_read(a, stride, len(sums), np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    right = (_py_read(b, b_stride, TILE_ROWS, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    halves = np.zeros((2, *sums.shape), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for pair in range(TILE_ROWS):
            for odd in range(2):
                product = left[:, 2 * pair + odd, None] * right[None, pair, odd::2]  # exact
                halves[odd] = (halves[odd] + product).astype(np.float32)
        sums += halves[0] + halves[1]


def _py_multiply_keys(parts, part_bytes, stride, keys, more_keys):
    for side, place in enumerate((keys, more_keys)):
        for part in (0, 1, 2) if side == 0 else (2, 1, 0):
            tile = 2 * side + (part > 0)
            _py_multiply_bf16(tile, parts + part * part_bytes, stride, place, _LINE)
    return 0


@native(types.int64(*[types.int64] * 5), _py_multiply_keys)
def multiply_keys(builder, parts, part_bytes, stride, keys, more_keys):
    """32 columns of three parts, `part_bytes` apart, with two tiles of pairs: of the first one, sums 0 get the first part's
    products, sums 1 those of the others; sums 2 and 3 likewise of the second one. Returns 0."""
    lines = [
        "tileloadd ($0,$3,1), %tmm4",
        "tileloadd ($4,$6,1), %tmm6",
        "tdpbf16ps %tmm6, %tmm4, %tmm0",
        "tileloadd ($1,$3,1), %tmm5",
        "tdpbf16ps %tmm6, %tmm5, %tmm1",
        "tileloadd ($2,$3,1), %tmm4",
        "tdpbf16ps %tmm6, %tmm4, %tmm1",
        "tileloadd ($5,$6,1), %tmm7",
        "tdpbf16ps %tmm7, %tmm4, %tmm3",
        "tdpbf16ps %tmm7, %tmm5, %tmm3",
        "tileloadd ($0,$3,1), %tmm4",
        "tdpbf16ps %tmm7, %tmm4, %tmm2",
    ]
    second = builder.add(parts, part_bytes)
    third = builder.add(second, part_bytes)
    line = ir.Constant(_I64, _LINE)
    return _assembly(builder, lines, parts, second, third, stride, keys, more_keys, line)


def _py_multiply_values(parts, part_bytes, stride, values, values_stride, more):
    for tile in _SUMS:
        place = values + min(tile, more) * _LINE
        for part in (0, 1, 2) if tile % 2 == 0 else (2, 1, 0):
            _py_multiply_bf16(tile, parts + part * part_bytes, stride, place, values_stride)
    return 0


@native(types.int64(*[types.int64] * 6), _py_multiply_values)
def multiply_values(builder, parts, part_bytes, stride, values, values_stride, more):
    """32 columns of three parts, `part_bytes` apart, with four tiles of pairs, a line apart; after the first one there are
    only `more` of them, and the last one takes the place of those that are missing. Returns 0."""
    lines = ["tileloadd ($0,$3,1), %tmm4", "tileloadd ($1,$3,1), %tmm5"]
    for tile in _SUMS:
        codes = _CODES[tile % 2]
        lines.append(f"tileloadd (${5 + tile},$4,1), %tmm{codes}")
        last = 2 if tile % 2 == 0 else 0  # of the parts: tmm5 holds the second one, tmm4 the first and the last in turn
        lines += [
            f"tdpbf16ps %tmm{codes}, %tmm4, %tmm{tile}",
            f"tdpbf16ps %tmm{codes}, %tmm5, %tmm{tile}",
            f"tileloadd (${last},$3,1), %tmm4",
            f"tdpbf16ps %tmm{codes}, %tmm4, %tmm{tile}",
        ]
    second = builder.add(parts, part_bytes)
    third = builder.add(second, part_bytes)
    places = []
    for tile in _SUMS:
        places.append(builder.add(values, builder.mul(_at_most(builder, tile, more), ir.Constant(_I64, _LINE))))
    return _assembly(builder, lines, parts, second, third, stride, values_stride, *places)


multiply_2x2_bf16 = _multiply_2x2("tdpbf16ps", np.uint16)
multiply_2x2 = _multiply_2x2("tdpbsud", np.uint8)
multiply_2x2_signed = _multiply_2x2("tdpbssd", np.int8)
multiply_1x4 = _multiply_1x4("tdpbsud", np.uint8)
multiply_1x4_signed = _multiply_1x4("tdpbssd", np.int8)
