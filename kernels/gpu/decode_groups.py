"""Products with packed weights on a GPU where scales change along a row: groups of a weight's columns, blocks of a token's.

    y = sum_g(acc_g * weight_scale_g) * act_scale                       groups, one scale per token
    y = sum_b(acc_b * act_scale_b) * weight_scale                       blocks, one scale per tensor or row
    y = sum_b(acc_b * (act_scale_b * weight_scale_g))                   blocks and groups

The integers of a unit (a group, or a block of ACT_BLOCK columns) are exact; they are scaled and added up in fp32, the first unit
first, without fused multiply-adds: the bits of the reference. So a row is not split over programs, as decode.py splits it.

A run of 128 columns is 32 bytes. Byte j holds the columns j, j + 32, j + 64 and j + 96 of the run, in the fields of decode.py, so
that one load of 32 bytes per row gives four pieces of 32 columns in the order of the columns. A piece is what the tensor cores
take at once, and it lies in one block and one group. Bytes that are read together lie together: tiles of 64 rows by 32 bytes,
then the tile's next run.

Shape suffixes: N tokens, I in_features, O out_features, G groups of columns, P padded width.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitdistill.kernels.gpu.decode import DECODE_ROWS, PROGRAMS, _asm, _check_codes, _four_fields
from bitdistill.kernels.numerics import ACT_BLOCK

RUN = 4 * ACT_BLOCK  # columns in the four fields of 32 bytes
TILE_ROWS = 64  # rows of weights whose bytes of a run lie together


# --- layout -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupedMatrix:
    """A ternary (O, I) matrix on the device, with its scales.

    Args:
        rows, columns: O and I.
        data: int8 (tiles of rows, runs, 64, 32).
        scale: float16 (tiles of rows, groups, 64), or float32 (O,), where a row has one.
        group: columns of a group; 0 where a row has one scale.
    """

    rows: int
    columns: int
    data: Tensor
    scale: Tensor
    group: int

    @property
    def act_columns(self) -> int:
        """Columns of the activations that this matrix reads: I with its padding."""
        return RUN * self.data.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes on the device, those of the scales included."""
        return self.data.nbytes + self.scale.nbytes


def pack_groups(codes: Tensor, scale: Tensor, group: int) -> GroupedMatrix:
    """Ternary codes and their scales in the layout above.

    Args:
        codes: int8 (O, I) in {-1, 0, 1}, on any device; trusted to be so.
        scale: float32 (O, G), exact in fp16; or (O,), one for each row.
        group: columns of a group, 64, 128 or 256; 0 for one scale for each row.

    Returns: 2 bits per weight and 16 bits per group, where 128 (with groups of 256: 256) divides I and 64 divides O.

    Raises:
        ValueError: another dtype or dimension, no rows or columns, or shapes that do not fit.
    """
    _check_codes(codes, torch.int8)
    rows, columns = codes.shape
    expected = (rows, -(-columns // group)) if group else (rows,)
    if scale.shape != expected or scale.dtype != torch.float32 or group not in (0, 64, 128, 256):
        raise ValueError(
            f"scale: expected float32 {expected} for groups of 64, 128 or 256 columns (0: none); got {scale.dtype} "
            f"{tuple(scale.shape)} for {group}. Pass the scales of the packed file."
        )
    step = max(RUN, group)
    tiles, runs = -(-rows // TILE_ROWS), -(-columns // step) * step // RUN
    wide = codes.new_zeros(tiles * TILE_ROWS, runs * RUN)
    wide[:rows, :columns] = codes
    fields = wide.view(tiles * TILE_ROWS, runs, 4, ACT_BLOCK)
    packed = codes.new_zeros(tiles * TILE_ROWS, runs, ACT_BLOCK)
    for field in range(4):
        packed |= (fields[:, :, field] & 3) << (2 * field)
    data = packed.view(tiles, TILE_ROWS, runs, ACT_BLOCK).transpose(1, 2).contiguous()
    if not group:
        return GroupedMatrix(rows, columns, data, scale.contiguous(), 0)
    groups = runs * RUN // group
    wide_scale = scale.new_zeros(tiles * TILE_ROWS, groups, dtype=torch.float16)
    wide_scale[:rows, : scale.shape[1]] = scale
    wide_scale = wide_scale.view(tiles, TILE_ROWS, groups).transpose(1, 2).contiguous()
    return GroupedMatrix(rows, columns, data, wide_scale, group)


# --- the product ------------------------------------------------------------------------------------------------------


@triton.jit
def _add_piece(
    acc,  # int32 (BLOCK_N, BLOCK_O): 64 times the integers of the unit so far
    total,  # float32 (BLOCK_N, BLOCK_O)
    acts,
    act_scales,
    weight_scales,
    there,
    field,
    piece,
    ACT_BLOCKS: tl.constexpr,
    PIECES: tl.constexpr,
    ENDS: tl.constexpr,  # the unit ends here
    PIECE: tl.constexpr,
    TILE: tl.constexpr,
):
    """32 columns more; at the end of a unit its integers are scaled and added."""
    acc = tl.dot(tl.load(acts + piece * PIECE, mask=there[:, None], other=0), field.T, acc, out_dtype=tl.int32)
    if ENDS:
        y = (acc >> 6).to(tl.float32)
        if ACT_BLOCKS:
            by = tl.load(act_scales + piece, mask=there, other=0.0)[:, None]
            if PIECES > 0:
                by = by * tl.load(weight_scales + piece // PIECES * TILE).to(tl.float32)[None, :]
            total += y * by
        else:
            total += y * tl.load(weight_scales + piece // PIECES * TILE).to(tl.float32)[None, :]
        acc = tl.zeros_like(acc)
    return acc, total


@triton.jit
def _accumulate_groups_kernel(
    act_ptr,  # int8 (N, P)
    act_scale_ptr,  # float32 (N,), or (N, P / 32)
    weight_ptr,  # int8 (tiles, RUNS, 64, 32)
    weight_scale_ptr,  # float16 (tiles, G, 64), or float32 (O,)
    y_ptr,  # float32 (N, y_stride)
    N,
    O,
    P,
    G,
    y_stride,
    ASM: tl.constexpr,
    ACT_BLOCKS: tl.constexpr,  # an activation scale for every 32 columns, not one for the token
    PIECES: tl.constexpr,  # pieces of 32 columns in a group; 0: a row has one scale
    RUNS: tl.constexpr,  # of 128 columns that are taken in a step: those of a unit, or one
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    TILE: tl.constexpr,  # TILE_ROWS
    PIECE: tl.constexpr,  # ACT_BLOCK
):
    """One (BLOCK_N, BLOCK_O) tile of the products, over whole rows."""
    first = tl.program_id(0) * BLOCK_O
    o = first + tl.arange(0, BLOCK_O)
    tile, r = (first // TILE).to(tl.int64), first % TILE + tl.arange(0, BLOCK_O)
    n, j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, PIECE)
    there = n < N
    row = n.to(tl.int64)
    acts = act_ptr + row[:, None] * P + j[None, :]
    act_scales = act_scale_ptr + row * (P // PIECE)
    weights = weight_ptr + tile * (P // 4 * TILE) + r[:, None] * PIECE + j[None, :]
    weight_scales = weight_scale_ptr + tile * G * TILE + r
    UNIT: tl.constexpr = 1 if ACT_BLOCKS else PIECES
    acc = tl.zeros((BLOCK_N, BLOCK_O), tl.int32)
    total = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for step in range(0, P // (4 * PIECE), RUNS):
        for k in tl.static_range(RUNS):
            run = step + k
            fields = _four_fields(tl.load(weights + run * (TILE * PIECE)), ASM)
            for field in tl.static_range(4):
                acc, total = _add_piece(
                    acc, total, acts, act_scales, weight_scales, there, fields[field], 4 * run + field,
                    ACT_BLOCKS, PIECES, (4 * k + field + 1) % UNIT == 0, PIECE, TILE,
                )  # fmt: skip
    if not ACT_BLOCKS:
        total = total * tl.load(act_scale_ptr + n, mask=there, other=0.0)[:, None]
    elif PIECES == 0:
        total = total * tl.load(weight_scale_ptr + o, mask=o < O, other=0.0)[None, :]
    tl.store(y_ptr + row[:, None] * y_stride + o[None, :], total, mask=there[:, None] & (o < O)[None, :])


def group_tile(rows: int, out_features: int) -> tuple[int, int, int, int]:
    """(BLOCK_N, BLOCK_O, warps, stages): a warp for 16 columns of the product, and few columns where there are few, because
    rows are not split to occupy the device.

    Args:
        rows: N. out_features: O of the matrix.
    """
    if rows > DECODE_ROWS:
        # With 4 warps the sums of 64 rows do not fit into registers.
        return (32, 64, 4, 3) if rows <= 32 else (64, 64, 8, 3)
    return (16, 16, 1, 4) if triton.cdiv(out_features, 32) < PROGRAMS else (16, 32, 2, 4)


def accumulate_groups(
    act_codes: Tensor, act_scale: Tensor, matrix: GroupedMatrix, out: Tensor | None = None, column: int = 0
) -> Tensor:
    """The product of codes with all their scales: the sums at the top of this file.

    Args:
        act_codes: int8 (N, P), P = matrix.act_columns, contiguous, zero in the padding.
        act_scale: float32 (N,), or (N, P / 32) for blocks, contiguous. One per token needs a matrix with groups.
        matrix: the weights, on the same device.
        out: where several matrices write side by side: float32 (1, N, all columns).
        column: the first column of `out` that this matrix writes.

    Returns: float32 (1, N, O), or `out`.

    Raises:
        ValueError: no rows, or activations that do not fit the matrix.

    Numerics: integers exact, fp32 in the order of the reference: bit for bit `reference.bit_linear` without a bias.
    """
    columns, blocks = matrix.act_columns, act_scale.dim() == 2
    if act_codes.dim() != 2 or len(act_codes) == 0 or act_codes.shape[1] != columns or act_codes.dtype != torch.int8:
        raise ValueError(
            f"act: expected int8 (N >= 1, {columns}); got {act_codes.dtype} {tuple(act_codes.shape)}. "
            "Quantize the rows for this matrix."
        )
    rows = len(act_codes)
    shape = (rows, columns // ACT_BLOCK) if blocks else (rows,)
    if act_scale.shape != shape or not (blocks or matrix.group):
        raise ValueError(
            f"act_scale: expected ({rows}, {columns // ACT_BLOCK}), or, for a matrix with groups, ({rows},); got "
            f"{tuple(act_scale.shape)} for groups of {matrix.group}. Quantize the rows for this matrix."
        )
    if not act_codes.is_contiguous() or not act_scale.is_contiguous() or act_codes.device != matrix.data.device:
        raise ValueError(
            f"act: expected contiguous rows on {matrix.data.device}; got {act_codes.device}. Make a copy there."
        )
    if out is None:
        out = act_scale.new_empty(1, rows, matrix.rows)
    block_n, block_o, warps, stages = group_tile(rows, matrix.rows)
    _accumulate_groups_kernel[(triton.cdiv(matrix.rows, block_o), triton.cdiv(rows, block_n))](
        act_codes, act_scale, matrix.data, matrix.scale, out[0, :, column:],
        rows, matrix.rows, columns, matrix.scale.shape[1] if matrix.group else 0, out.shape[2],
        ASM=_asm(), ACT_BLOCKS=blocks, PIECES=matrix.group // ACT_BLOCK, RUNS=1 if blocks else max(1, matrix.group // RUN),
        BLOCK_N=block_n, BLOCK_O=block_o, TILE=TILE_ROWS, PIECE=ACT_BLOCK, num_warps=warps, num_stages=stages,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out
