"""The int8 products of training on a CPU: those of oneDNN, through torch, or our own, whichever is faster on this machine.

    forward     act_codes (N, I) @ weight_codes (O, I).T         -> (N, O)
    backward    row_codes (N, O) @ weight_codes (O, I)           -> (N, I)
    dense       column_codes (N, O).T @ act_codes (N, I)         -> (O, I), where int8 times int8 is exact

The first two are there as int32, and scaled, ``acc * (row_scale * column_scale) + bias`` in floats. Tiles scale the sums
as they come out of the registers; the others write them first. With tiles the gradients need no other product than
`multiply_tiles` (training_gradients.py).

**Exactness.** Without VNNI, oneDNN multiplies by instructions whose sums saturate at 16 bits. With a ternary operand they
never get that large, but with +-127 on both sides they do. So `dense` products are used only on machines where
`dense_products_are_exact` has found them to be exact. Tiles always are.

**Choice.** With AMX, and with AVX2 alone, tiles are taken: they were at least as fast as oneDNN on every shape that was tried,
and need no timing, which a busy machine can spoil. Elsewhere both METHODS are timed once, on one shape, and the faster is known
from then on (choices.py): it was the same on all shapes. Both give the same integers, so the choice affects time only.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from bitdistill.kernels.cpu import byte_tiles, training_quantize, training_tiles
from bitdistill.kernels.cpu.byte_tiles import OFFSET, TERNARY_OFFSET
from bitdistill.kernels.cpu.choices import fastest
from bitdistill.kernels.cpu.instructions import FEATURES
from bitdistill.kernels.cpu.rows import COMPILED, share_rows
from bitdistill.kernels.cpu.tiles import TILES
from bitdistill.kernels.reference import spread_scales

SHAPE = (1024, 576, 1536)  # N, I and O of what is timed


@dataclass(frozen=True, eq=False)
class Ternary:
    """One or more linears, stacked: ``W_s ~ weight_scale[s] * weight_codes[rows of s]``.

    Args:
        weight_codes: int8 (O, I), contiguous.
        weight_scale: fp32 (S,), or with `columns` (O, G), one for each row and group of columns.
        sizes: rows of each.
        columns: of a group; in_features or more for one scale per row; None for one scale per linear.
        kept: what was made of them, by name.
    """

    weight_codes: Tensor
    weight_scale: Tensor
    sizes: tuple[int, ...]
    columns: int | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)

    def grouped(self) -> bool:
        """Whether scales change inside a row."""
        return self.columns is not None and self.weight_scale.shape[1] > 1

    def of_columns(self) -> Tensor:
        """fp32 (O,): the weight_scale of every row; where they do not change inside a row."""
        if self.columns is not None:
            return self.weight_scale.view(-1)
        if "columns" not in self.kept:
            scales = self.weight_scale.split(1)
            self.kept["columns"] = torch.cat(
                [scale.expand(size) for scale, size in zip(scales, self.sizes, strict=True)]
            )
        return self.kept["columns"]

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """``weight_scale * weight_codes`` (O, I) in a float dtype, made anew. Exact for scales of rows and groups, which are
        snapped, in every dtype; rounded once for one scale per linear."""
        if not self.grouped():
            return dequantized(self.weight_codes, self.of_columns(), dtype)
        (O, I), weight = self.weight_codes.shape, self.weight_codes.to(dtype)
        if I % self.columns:
            return weight.mul_(spread_scales(self.weight_scale, I, self.columns))
        weight.view(O, I // self.columns, self.columns).mul_(self.weight_scale.unsqueeze(2))
        return weight

    def half_scales(self) -> Tensor:
        """fp16 (O / 16, G, 16), as grouped.py reads them; made once. Exact: the scales are snapped."""
        if "halves" not in self.kept:
            groups = self.weight_scale.shape[1]
            self.kept["halves"] = self.weight_scale.half().view(-1, 16, groups).transpose(1, 2).contiguous()
        return self.kept["halves"]

    def tiles(self, kind: str) -> Tensor:
        """The codes as training_tiles.py reads them, for `kind` "forward" or "backward"; made once."""
        name = f"tiles {kind}"
        if name not in self.kept:
            if kind == "forward":
                codes = padded(self.weight_codes, 16, 64)
                (O, I), tiles = codes.shape, torch.empty(codes.numel(), dtype=torch.int8)
                work = (codes.data_ptr(), I, TERNARY_OFFSET, tiles.data_ptr())
                share_rows(training_tiles.lay_out_rows, O // 16, 16 * I, *work, block=1)
            else:
                tiles = tiles_of_columns(self.weight_codes, True)
            self.kept[name] = tiles
        return self.kept[name]


def dequantized(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes * scale`` in a float dtype: int8 (N, W), contiguous, and fp32 (N,) or (N, 1). Rounded once."""
    out = torch.empty(codes.shape, dtype=dtype if dtype in COMPILED else torch.float32)
    work = (codes.data_ptr(), codes.shape[1], scale.data_ptr(), out.data_ptr(), out.dtype == torch.bfloat16)
    share_rows(training_quantize.dequantize_rows, *codes.shape, *work)
    return out.to(dtype)


def padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """x (R, C) with zeros below and to its right, up to multiples of `rows` and `columns`; itself where it has them."""
    below, right = -x.shape[0] % rows, -x.shape[1] % columns
    return F.pad(x, (0, right, 0, below)) if below or right else x


# --- the ways to multiply ------------------------------------------------------------------------------------------------


def _plain(matrix: Tensor) -> Tensor:
    """With the strides of its shape where a dimension is 1: `_int_mm` takes (1, n) with strides (1, 1) for something else."""
    return matrix.contiguous().flatten().view(matrix.shape) if 1 in matrix.shape else matrix


def _onednn(kind: str, codes: Tensor, ternary: Ternary, out: Tensor) -> None:
    """oneDNN through torch."""
    weight = ternary.weight_codes.t() if kind == "forward" else ternary.weight_codes
    torch._int_mm(_plain(codes), _plain(weight), out=out)


def _tiles(kind: str, codes: Tensor, ternary: Ternary, out: Tensor) -> None:
    """training_tiles.py."""
    multiply_tiles(codes, codes.shape, ternary.tiles(kind), out, True)


METHODS: dict[str, Callable] = {"onednn": _onednn, "tiles": _tiles}


def multiply_tiles(
    left: Tensor, shape: tuple[int, int], right: Tensor, out: Tensor, ternary: bool, row_scale: Tensor | None = None,
    column_scale: Tensor | None = None, bias: Tensor | None = None, tiled: bool = False, planes: int = 1,
) -> Tensor:  # fmt: skip
    """``left @ right`` by AMX or in vector registers, scaled where out is of floats.

    Args:
        left: int8 rows, or tiles of `planes` planes where `tiled`. shape: (M, K) of a plane; in tiles K is a multiple of 64.
        right: laid out in tiles, with TERNARY_OFFSET where `ternary`, else with OFFSET; zeros where K or N is padded.
        out: (M, N), int32, float32 or bf16, overwritten. ternary: whether right has no other codes than -1, 0 and 1.
        row_scale, column_scale, bias, tiled, planes: as in training_tiles.py.

    Returns: out.
    """
    (M, K), width = shape, out.shape[1]
    if width % 16:
        wide = torch.empty((M, width + -width % 16), dtype=out.dtype)
        column_scale, bias = (None if x is None else F.pad(x, (0, -width % 16)) for x in (column_scale, bias))
        multiply_tiles(left, shape, right, wide, ternary, row_scale, column_scale, bias, tiled, planes)
        return out.copy_(wide[:, :width])
    if not tiled:
        left = padded(left, 1, 64)
        K = left.shape[1]
    kinds = {
        torch.int32: training_tiles.INT32,
        torch.float32: training_tiles.FLOAT32,
        torch.bfloat16: training_tiles.BF16,
    }
    offset = TERNARY_OFFSET if ternary else OFFSET
    starts = None if TILES else torch.zeros(planes * -(-M // 16) * 16, dtype=torch.int32)
    matrix = (left.data_ptr(), M, tiled, planes)
    if offset:
        work = (K // 64, offset, starts.data_ptr())
        share_rows(byte_tiles.row_starts, -(-M // 16), 16 * K * planes, *matrix, *work, block=1)
    if not TILES and out.dtype != torch.int32:
        row_scale = torch.ones(M) if row_scale is None else row_scale
        column_scale = torch.ones(width) if column_scale is None else column_scale
        bias = torch.full((width,), -0.0) if bias is None else bias  # of all numbers the one that changes no sum
    scales = (0 if values is None else values.data_ptr() for values in (starts, row_scale, column_scale, bias))
    work = (right.data_ptr(), K // 64, width, ternary, *scales, out.data_ptr(), kinds[out.dtype])
    share_rows(training_tiles.multiply_tiles, -(-width // 32), 32 * K * M * planes, *matrix, *work, block=1)
    return out


def tiles_of_columns(codes: Tensor, ternary: bool) -> Tensor:
    """int8 (K, N) as a right operand of `multiply_tiles`, `ternary` or not, padded with zeros to multiples of 64 and 16."""
    codes = padded(codes, 1, 16)
    (K, N), depth = codes.shape, -(-len(codes) // 64)
    tiles = torch.empty(64 * depth * N, dtype=torch.int8)
    work = (codes.data_ptr(), K, N, TERNARY_OFFSET if ternary else OFFSET, tiles.data_ptr())
    share_rows(training_tiles.lay_out_columns, N // 16, 16 * 64 * depth, *work, block=1)
    return tiles


_left_out: set[str] = set()


def leave_out_products(names: Sequence[str]) -> None:
    """Never multiplies by these METHODS, or WAYS of training_groups.py, again in this process: they are not right here."""
    _left_out.update(names)


def is_left_out(name: str) -> bool:
    """Whether a product was left out."""
    return name in _left_out


def has_products() -> bool:
    """Whether the methods are left that take every shape; "floats" is that of training_groups.py."""
    return not _left_out & {"onednn", "floats"}


def possible() -> list[str]:
    """Names of METHODS that are not left out; each takes every shape."""
    return [name for name in METHODS if name not in _left_out]


def ternary_product(kind: str, codes: Tensor, ternary: Ternary, method: str | None = None) -> Tensor:
    """``codes @ weight_codes.T`` ("forward") or ``codes @ weight_codes`` ("backward").

    Args:
        kind: "forward" or "backward".
        codes: int8 (N, K), contiguous, within +-127; K is I, or O backward. ternary: the weight.
        method: of METHODS; by default the fastest.

    Returns: int32 (N, O), or (N, I) backward. Numerics: exact.
    """
    name = method or _method()
    out = torch.empty((len(codes), _width(kind, ternary)), dtype=torch.int32)
    if out.numel():
        METHODS[name](kind, codes, ternary, out)
    return out


def _width(kind: str, ternary: Ternary) -> int:
    return ternary.weight_codes.shape[0 if kind == "forward" else 1]


def scaled_product(
    kind: str, codes: Tensor, ternary: Ternary, row_scale: Tensor | None, column_scale: Tensor | None,
    bias: Tensor | None, dtype: torch.dtype, method: str | None = None,
) -> Tensor:  # fmt: skip
    """`ternary_product`, `scaled`.

    Args:
        kind, codes, ternary, method: as in `ternary_product`. row_scale, column_scale, bias, dtype: as in `scaled`.

    Returns: (N, O), or (N, I) backward, in dtype.
    """
    work = (row_scale, column_scale, bias, dtype)
    name = method or _method()
    if name != "tiles":
        return scaled(ternary_product(kind, codes, ternary, name), *work)
    out = torch.empty((len(codes), _width(kind, ternary)), dtype=dtype if dtype in COMPILED else torch.float32)
    return multiply_tiles(codes, codes.shape, ternary.tiles(kind), out, True, row_scale, column_scale, bias).to(dtype)


def scaled(
    acc: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``acc * (row_scale * column_scale) + bias``.

    Args:
        acc: int32 or float32 (N, W), overwritten. row_scale: fp32 (N,). column_scale, bias: fp32 (W,). Any may be None.
        dtype: of the result.
    """
    half, integers = dtype == torch.bfloat16, acc.dtype == torch.int32
    out = torch.empty(acc.shape, dtype=torch.bfloat16) if half else acc.view(torch.float32)
    row, *rest = [0 if values is None else values.data_ptr() for values in (row_scale, column_scale, bias)]
    work = (acc.data_ptr(), integers, acc.shape[1], row, *rest, out.data_ptr(), half)
    share_rows(training_quantize.scale_rows, *acc.shape, *work)
    return out if dtype in COMPILED else out.to(dtype)


def dense_product(column_codes: Tensor, act_codes: Tensor) -> Tensor:
    """``column_codes.T @ act_codes`` int32 (P, I) by oneDNN, where `dense_products_are_exact`.

    Args:
        column_codes: int8 (N, P), contiguous, within +-127. act_codes: int8 (N, I), contiguous, within +-127.
    """
    if not len(act_codes):
        return torch.zeros((column_codes.shape[1], act_codes.shape[1]), dtype=torch.int32)
    return torch._int_mm(_plain(column_codes.t()), _plain(act_codes))


@functools.cache
def dense_products_are_exact() -> bool:
    """Whether +-127 times +-127 is summed without saturation on this machine, found out by trying."""
    for N, O, I in ((64, 32, 48), (129, 17, 70), (256, 64, 576)):
        full = torch.full((N, O), 127, dtype=torch.int8)
        signs = torch.where(torch.arange(N * I).view(N, I) % 7 < 5, 127, -127).to(torch.int8)
        expected = full.t().long() @ signs.long()
        if not torch.equal(dense_product(full, signs).long(), expected):
            return False
    return True


# --- which one -----------------------------------------------------------------------------------------------------------


def _method() -> str:
    names = possible()
    return "tiles" if "tiles" in names and (len(names) == 1 or tiles_are_fastest()) else names[0]


@functools.cache
def tiles_are_fastest() -> bool:
    """Whether tiles are taken: known for AMX and for AVX2, by measurement elsewhere."""
    if FEATURES in ("amx", "avx2"):
        return True
    N, K, O = SHAPE
    codes, scales = torch.ones((N, K), dtype=torch.int8), torch.ones(max(N, O))
    ternary = Ternary(torch.ones((O, K), dtype=torch.int8), scales[:1], (O,))
    work = ("forward", codes, ternary, scales[:N], scales[:O], None, torch.float32)  # tiles save a pass for the scales
    ways = {name: functools.partial(scaled_product, *work, name) for name in METHODS}
    return fastest(f"scaled int8 product {N}x{K}x{O}", ways) == "tiles"
