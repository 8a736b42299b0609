"""Products with packed weights on a GPU, for the few rows of a decoding step and the many rows of a prompt.

    acc[n, o] = sum over i of act_codes[n, i] * weight_codes[o, i]        exact, int32

A decoding step reads every weight once, so what counts are the bytes and the integer operations per weight. A row of
ternary codes has W bytes; byte j holds the columns j, j + W, j + 2W and j + 3W (from the four quarters of the padded row).
One tile of bytes is so multiplied with four contiguous tiles of activations, and no weight is ever unpacked in memory::

        bit      7   6 | 5   4 | 3   2 | 1   0
        column  j + 3W | j + 2W|  j + W|   j        fields are the codes in two's complement: 00, 01, 11

One shift and one mask, on four bytes in a 32-bit register, bring a field to the top of its byte, where it is the int8
number 64 * code: seven operations for sixteen weights, signs included, and no bias to subtract. The tensor cores sum 64 *
acc (within int32 up to 264,000 columns), and a final shift by 6 gives acc. int4 works in the same way with 16 * code; int8
and fp16 tables are multiplied as they are.

Rows of activations are padded inside the kernel to the 16 of the tensor cores. Small matrices are split along I over
several programs. Each writes its own integers, and the kernels that read them (decode_rows.py, decode_attention.py) add the
splits up while they scale: no atomics, and the same bits in any order.

Shape suffixes: N rows (tokens), I in_features, O out_features, S splits, W bytes of a packed row.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitdistill.kernels.packing import INT4_GROUP

ROW_ALIGN = 16  # rows of weights begin at multiples of 16 bytes: one vector load
INT4_ROWS = 64  # rows of an int4 tile: (64, 32) bytes that lie together
DECODE_ROWS = 16  # up to so many rows take the decoding tiles
PROGRAMS = 264  # two for each of the 132 multiprocessors of an H200: split I until there are about as many


# --- layout -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedMatrix:
    """An (O, I) matrix on the device.

    Args:
        bits: 2 (ternary), 4 (int4, a scale for 32 columns), 8 (int8) or 16 (float16).
        rows, columns: O and I.
        data: int8 (O, W) for 2 and 8 bits, float16 (O, W) for 16, int8 (tiles of rows, pairs of groups, 64, 32) for 4.
        group_scale: float16 (tiles of rows, groups, 64) for 4 bits, otherwise None.
    """

    bits: int
    rows: int
    columns: int
    data: Tensor
    group_scale: Tensor | None = None

    @property
    def act_columns(self) -> int:
        """Columns of the activations that this matrix reads: I with its padding."""
        if self.bits == 4:
            return 2 * INT4_GROUP * self.data.shape[1]
        return self.data.shape[1] * (4 if self.bits == 2 else 1)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.data.nbytes + (0 if self.group_scale is None else self.group_scale.nbytes)


def pack_2bit(codes: Tensor) -> PackedMatrix:
    """Ternary codes, four a byte along the quarters of the row (layout above).

    Args:
        codes: int8 (O, I) in {-1, 0, 1}, on any device; trusted to be so.

    Returns: 2 bits per weight where 64 divides I; the last bytes of a row are padding otherwise.

    Raises:
        ValueError: another dtype or dimension, or no rows or columns.
    """
    _check_codes(codes, torch.int8)
    rows, columns = codes.shape
    width = -(-columns // (4 * ROW_ALIGN)) * ROW_ALIGN
    quarters = codes.new_zeros(rows, 4 * width)
    quarters[:, :columns] = codes
    packed = codes.new_zeros(rows, width)
    for field in range(4):
        packed |= (quarters[:, field * width : (field + 1) * width] & 3) << (2 * field)
    return PackedMatrix(2, rows, columns, packed)


def pack_rows(table: Tensor) -> PackedMatrix:
    """An int8 or float16 table as it is, rows padded to 16 bytes.

    Args:
        table: int8 or float16 (O, I).

    Raises:
        ValueError: another dtype or dimension, or no rows or columns.
    """
    _check_codes(table, torch.int8, torch.float16)
    rows, columns = table.shape
    align = ROW_ALIGN // table.element_size()
    data = table.new_zeros(rows, -(-columns // align) * align)
    data[:, :columns] = table
    return PackedMatrix(8 * table.element_size(), rows, columns, data)


def pack_int4(codes: Tensor, scale: Tensor) -> PackedMatrix:
    """int4 codes in tiles of 64 rows by 32 bytes; a byte holds column j of group g (low) and of group g + G/2 (high).

    Args:
        codes: int8 (O, I) in -8..7, I a multiple of 32. scale: float16 (O, I / 32).

    Raises:
        ValueError: another dtype or dimension, or shapes that do not fit.
    """
    _check_codes(codes, torch.int8)
    rows, columns = codes.shape
    if columns % INT4_GROUP or scale.shape != (rows, columns // INT4_GROUP) or scale.dtype != torch.float16:
        raise ValueError(
            f"scale: expected float16 ({rows}, {columns} / {INT4_GROUP}); got {scale.dtype} {tuple(scale.shape)}. "
            "Pass the scales of the packed file."
        )
    groups, tiles = columns // INT4_GROUP, -(-rows // INT4_ROWS)
    pairs = -(-groups // 2)
    padded = codes.new_zeros(tiles * INT4_ROWS, 2 * pairs, INT4_GROUP)
    padded[:rows, :groups] = codes.view(rows, groups, INT4_GROUP)
    packed = (padded[:, :pairs] & 15) | (padded[:, pairs:] << 4)
    data = packed.view(tiles, INT4_ROWS, pairs, INT4_GROUP).transpose(1, 2).contiguous()
    group_scale = scale.new_zeros(tiles * INT4_ROWS, 2 * pairs)
    group_scale[:rows, :groups] = scale
    group_scale = group_scale.view(tiles, INT4_ROWS, 2 * pairs).transpose(1, 2).contiguous()
    return PackedMatrix(4, rows, columns, data, group_scale)


def _check_codes(codes: Tensor, *dtypes: torch.dtype) -> None:
    if codes.dtype not in dtypes or codes.dim() != 2 or codes.numel() == 0:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"codes: expected {wanted} (O, I) with at least one element; got {codes.dtype} {tuple(codes.shape)}. "
            "Pass the codes of one matrix."
        )


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _four_fields(packed, ASM: tl.constexpr):
    """The 2-bit fields of int8 bytes as 64 * code, lowest first. ASM works on four bytes at once."""
    if ASM:
        f0, f1, f2, f3 = tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            shl.b32 t, $4, 6;
            and.b32 $0, t, 0xC0C0C0C0;
            shl.b32 t, $4, 4;
            and.b32 $1, t, 0xC0C0C0C0;
            shl.b32 t, $4, 2;
            and.b32 $2, t, 0xC0C0C0C0;
            and.b32 $3, $4, 0xC0C0C0C0;
            }""",
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        f0 = (packed << 6) & -64
        f1 = (packed << 4) & -64
        f2 = (packed << 2) & -64
        f3 = packed & -64
    return f0, f1, f2, f3


@triton.jit
def _two_fields(packed, ASM: tl.constexpr):
    """The 4-bit fields of int8 bytes as 16 * code, lowest first."""
    if ASM:
        f0, f1 = tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            shl.b32 t, $2, 4;
            and.b32 $0, t, 0xF0F0F0F0;
            and.b32 $1, $2, 0xF0F0F0F0;
            }""",
            "=r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        f0 = (packed << 4) & -16
        f1 = packed & -16
    return f0, f1


@triton.jit
def _accumulate_kernel(
    act_ptr,  # int8, or float16 for BITS 16: (N, act_stride)
    weight_ptr,  # (O, W)
    acc_ptr,  # int32, or float32 for BITS 16: (S, N, acc_stride)
    N,
    O,
    W,
    act_stride,
    acc_stride,
    BITS: tl.constexpr,
    ASM: tl.constexpr,
    STEPS: tl.constexpr,  # tiles of BLOCK_W along the row that one program takes
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One (BLOCK_N, BLOCK_O) tile of the products over one split of the row."""
    split = tl.program_id(2)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    w = split * STEPS * BLOCK_W + tl.arange(0, BLOCK_W)
    acts = act_ptr + n[:, None].to(tl.int64) * act_stride + w[None, :]
    weights = weight_ptr + o[:, None].to(tl.int64) * W + w[None, :]
    kind: tl.constexpr = tl.float32 if BITS == 16 else tl.int32
    acc = tl.zeros((BLOCK_N, BLOCK_O), kind)
    for step in range(STEPS):
        inside = (w + step * BLOCK_W < W)[None, :]
        packed = tl.load(weights + step * BLOCK_W, mask=(o < O)[:, None] & inside, other=0)
        act = acts + step * BLOCK_W
        there = (n < N)[:, None] & inside
        if BITS == 2:
            f0, f1, f2, f3 = _four_fields(packed, ASM)
            acc = tl.dot(tl.load(act, mask=there, other=0), f0.T, acc, out_dtype=kind)
            acc = tl.dot(tl.load(act + W, mask=there, other=0), f1.T, acc, out_dtype=kind)
            acc = tl.dot(tl.load(act + 2 * W, mask=there, other=0), f2.T, acc, out_dtype=kind)
            acc = tl.dot(tl.load(act + 3 * W, mask=there, other=0), f3.T, acc, out_dtype=kind)
        else:
            acc = tl.dot(tl.load(act, mask=there, other=0), packed.T, acc, out_dtype=kind)
    if BITS == 2:
        acc = acc >> 6
    out = acc_ptr + (split * N + n[:, None]).to(tl.int64) * acc_stride + o[None, :]
    tl.store(out, acc, mask=(n < N)[:, None] & (o < O)[None, :])


@triton.jit
def _accumulate_int4_kernel(
    act_ptr,  # int8 (N, act_stride)
    weight_ptr,  # int8 (tiles, PAIRS, 64, 32)
    group_scale_ptr,  # float16 (tiles, 2 * PAIRS, 64)
    acc_ptr,  # float32 (N, O)
    N,
    O,
    act_stride,
    ASM: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,  # INT4_ROWS
    GROUP: tl.constexpr,  # INT4_GROUP
):
    """One (BLOCK_N, 64) tile: an exact integer product for each group of columns, scaled and summed in fp32."""
    tile = tl.program_id(1)
    r, j = tl.arange(0, BLOCK_O), tl.arange(0, GROUP)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acts = act_ptr + n[:, None].to(tl.int64) * act_stride + j[None, :]
    weights = weight_ptr + tile.to(tl.int64) * (PAIRS * BLOCK_O * GROUP) + r[:, None] * GROUP + j[None, :]
    scales = group_scale_ptr + tile.to(tl.int64) * (2 * PAIRS * BLOCK_O) + r
    there = (n < N)[:, None]
    zero = tl.zeros((BLOCK_N, BLOCK_O), tl.int32)
    total = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for pair in range(PAIRS):
        low, high = _two_fields(tl.load(weights + pair * (BLOCK_O * GROUP)), ASM)
        low_scale = tl.load(scales + pair * BLOCK_O).to(tl.float32)
        high_scale = tl.load(scales + (pair + PAIRS) * BLOCK_O).to(tl.float32)
        acc = tl.dot(tl.load(acts + pair * GROUP, mask=there, other=0), low.T, zero, out_dtype=tl.int32)
        total += acc.to(tl.float32) * low_scale[None, :]
        acc = tl.dot(tl.load(acts + (pair + PAIRS) * GROUP, mask=there, other=0), high.T, zero, out_dtype=tl.int32)
        total += acc.to(tl.float32) * high_scale[None, :]
    o = tile * BLOCK_O + r
    out = acc_ptr + n[:, None].to(tl.int64) * O + o[None, :]
    tl.store(out, total * 0.0625, mask=there & (o < O)[None, :])


# --- launch -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tile:
    block_n: int
    block_o: int
    block_w: int
    num_warps: int
    num_stages: int


def _tile(rows: int, out_features: int, width: int, bits: int) -> _Tile:
    """The tile table. A warp takes 16 columns of the product, so that it reads the activations, which every warp of a
    program reads whole, for 16 rows of weights: at 8 shared memory would be the limit. Small matrices take small tiles
    to occupy more multiprocessors. Prompts (Hopper: wgmma) reuse an unpacked weight for 64 rows."""
    block_w = 64 if bits == 16 else 128
    if rows > DECODE_ROWS:
        return _Tile(32 if rows <= 32 else 64, 64, 64, 4, 3)
    if out_features * width < 2**22:
        return _Tile(16, 32, block_w, 2, 4)
    return _Tile(16, 64, block_w, 4, 4)


def splits_of(rows: int, out_features: int, width: int, bits: int = 2) -> int:
    """Parts along I that `accumulate` cuts a product into, so that small matrices occupy the whole device.

    Args:
        rows: N. out_features: O, of all matrices that share the accumulators. width: W. bits: of the weights.
    """
    tile = _tile(rows, out_features, width, bits)
    steps = triton.cdiv(width, tile.block_w)
    if rows > DECODE_ROWS or bits == 16:
        return 1
    splits = max(1, min(steps, PROGRAMS // triton.cdiv(out_features, tile.block_o)))
    return triton.cdiv(steps, triton.cdiv(steps, splits))  # the number that are not empty


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1), as the tests do without a GPU."""
    return not isinstance(_accumulate_kernel, triton.runtime.JITFunction)


def _asm() -> bool:
    return not interpreted() and torch.version.hip is None


def accumulate(act: Tensor, matrix: PackedMatrix, out: Tensor | None = None, column: int = 0) -> Tensor:
    """``act @ codes.T`` from the packed weights, in splits along I that the reader adds up.

    Args:
        act: int8 (float16 for a 16-bit matrix) (N, matrix.act_columns), contiguous, zero in the padding.
        matrix: the weights, on the same device.
        out: where several matrices share the accumulators: int32 (S, N, all columns), S from `splits_of`.
        column: the first column of `out` that this matrix writes.

    Returns: int32 (S, N, O), summed over S the exact product; for 16 and 4 bits float32 (1, N, O), for 4 bits with the
    group scales applied.

    Raises:
        ValueError: no rows, or activations that do not fit the matrix.

    Numerics: 2 and 8 bits exact; 4 bits exact within a group, fp32 across; 16 bits fp32 sums of exact products.
    """
    dtype = torch.float16 if matrix.bits == 16 else torch.int8
    if act.dim() != 2 or act.shape[0] == 0 or act.shape[1] != matrix.act_columns or act.dtype != dtype:
        raise ValueError(
            f"act: expected {dtype} (N >= 1, {matrix.act_columns}); got {act.dtype} {tuple(act.shape)}. "
            "Quantize the rows for this matrix."
        )
    if not act.is_contiguous() or act.device != matrix.data.device:
        raise ValueError(f"act: expected contiguous rows on {matrix.data.device}; got {act.device}. Make a copy there.")
    rows, width = act.shape[0], matrix.data.shape[1]
    if matrix.bits == 4:
        acc = act.new_empty(1, rows, matrix.rows, dtype=torch.float32)
        grid = (triton.cdiv(rows, DECODE_ROWS), matrix.data.shape[0])  # programs that share weights are neighbors
        _accumulate_int4_kernel[grid](
            act, matrix.data, matrix.group_scale, acc, rows, matrix.rows, act.shape[1],
            ASM=_asm(), PAIRS=width, BLOCK_N=DECODE_ROWS, BLOCK_O=INT4_ROWS, GROUP=INT4_GROUP, num_warps=4, num_stages=4,
            enable_fp_fusion=True,
        )  # fmt: skip
        return acc
    if out is None:
        splits = splits_of(rows, matrix.rows, width, matrix.bits)
        kind = torch.float32 if matrix.bits == 16 else torch.int32
        out = act.new_empty(splits, rows, matrix.rows, dtype=kind)
    splits, _, columns = out.shape
    tile = _tile(rows, columns, width, matrix.bits)
    steps = triton.cdiv(width, tile.block_w)
    grid = (triton.cdiv(matrix.rows, tile.block_o), triton.cdiv(rows, tile.block_n), splits)
    _accumulate_kernel[grid](
        act, matrix.data, out[:, :, column:], rows, matrix.rows, width, act.shape[1], columns,
        BITS=matrix.bits, ASM=_asm(), STEPS=triton.cdiv(steps, splits),
        BLOCK_N=tile.block_n, BLOCK_O=tile.block_o, BLOCK_W=tile.block_w,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out
