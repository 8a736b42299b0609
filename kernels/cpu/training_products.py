"""The int8 products of training on a CPU: those of oneDNN, through torch, or our own, whichever is faster on this machine.

    forward     act_codes (N, I) @ weight_codes (O, I).T         -> int32 (N, O)
    backward    row_codes (N, O) @ weight_codes (O, I)           -> int32 (N, I)
    dense       column_codes (N, O).T @ act_codes (N, I)         -> int32 (O, I), where int8 times int8 is exact

**Exactness.** Without VNNI, oneDNN multiplies by instructions whose sums saturate at 16 bits. With a ternary operand they
never get that large, but with +-127 on both sides they do. So `dense` products are used only on machines where
`dense_products_are_exact` has found them to be exact.

**Choice.** METHODS are timed on the first product of a kind, width and number of tokens (rounded to a power of two), with
the given operands, and the fastest is known from then on (choices.py). All methods give the same integers, so the choice
affects time only.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitdistill.kernels.cpu import training_blocks
from bitdistill.kernels.cpu.choices import fastest
from bitdistill.kernels.cpu.rows import share_rows
from bitdistill.kernels.reference import spread_scales


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
            sizes = torch.tensor(self.sizes)
            self.kept["columns"] = self.weight_scale.repeat_interleave(sizes, output_size=len(self.weight_codes))
        return self.kept["columns"]

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """``weight_scale * weight_codes`` (O, I) in a float dtype, made anew. Exact for scales of rows and groups, which are
        snapped, in every dtype; rounded once for one scale per linear."""
        (O, I), weight = self.weight_codes.shape, self.weight_codes.to(dtype)
        if not self.grouped():
            return weight.mul_(self.of_columns().view(-1, 1))
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

    def blocks(self, kind: str) -> Tensor:
        """The codes as training_blocks.py reads them, for `kind` "forward" or "backward"; made once."""
        if kind not in self.kept:
            (O, I), codes = self.weight_codes.shape, self.weight_codes
            blocks = torch.empty(O * I, dtype=torch.int8)
            if kind == "forward":
                work = (codes.data_ptr(), I, blocks.data_ptr())
                share_rows(training_blocks.lay_out_rows, O // 16, 16 * I, *work, block=1)
            else:
                work = (codes.data_ptr(), O, I, blocks.data_ptr())
                share_rows(training_blocks.lay_out_columns, I // 16, 16 * O, *work, block=1)
            self.kept[kind] = blocks
        return self.kept[kind]


# --- the ways to multiply ------------------------------------------------------------------------------------------------


def _plain(matrix: Tensor) -> Tensor:
    """With the strides of its shape where a dimension is 1: `_int_mm` takes (1, n) with strides (1, 1) for something else."""
    return matrix.contiguous().flatten().view(matrix.shape) if 1 in matrix.shape else matrix


def _onednn(kind: str, codes: Tensor, ternary: Ternary, out: Tensor) -> None:
    """oneDNN through torch."""
    weight = ternary.weight_codes.t() if kind == "forward" else ternary.weight_codes
    torch._int_mm(_plain(codes), _plain(weight), out=out)


def _own(kind: str, codes: Tensor, ternary: Ternary, out: Tensor) -> None:
    """training_blocks.py."""
    (N, K), width = codes.shape, out.shape[1]
    work = (ternary.blocks(kind).data_ptr(), codes.data_ptr(), K, N, out.data_ptr(), width)
    share_rows(training_blocks.multiply_blocks, width // 16, 16 * K * N, *work, block=1)


METHODS: dict[str, Callable] = {"onednn": _onednn, "own": _own}


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


def possible(codes: Tensor, width: int) -> list[str]:
    """Names of METHODS for codes (N, K) and a result of `width` columns."""
    names = ["onednn"]
    if width % 16 == 0 and codes.shape[1] % 4 == 0:
        names.append("own")
    return [name for name in names if name not in _left_out]


def ternary_product(kind: str, codes: Tensor, ternary: Ternary, method: str | None = None) -> Tensor:
    """``codes @ weight_codes.T`` ("forward") or ``codes @ weight_codes`` ("backward").

    Args:
        kind: "forward" or "backward".
        codes: int8 (N, K), contiguous, within +-127; K is I, or O backward. ternary: the weight.
        method: of METHODS; the fastest by default.

    Returns: int32 (N, O), or (N, I) backward. Numerics: exact.
    """
    O, I = ternary.weight_codes.shape
    width = O if kind == "forward" else I
    out = torch.empty((len(codes), width), dtype=torch.int32)
    if out.numel():
        name = method or _fastest(kind, codes, ternary, out)
        METHODS[name](kind, codes, ternary, out)
    return out


def dense_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of int8 matrices within +-127, any strides, int32; where `dense_products_are_exact`."""
    return torch._int_mm(_plain(a), _plain(b))


@functools.cache
def dense_products_are_exact() -> bool:
    """Whether +-127 times +-127 is summed without saturation on this machine, found out by trying."""
    for N, O, I in ((64, 32, 48), (129, 17, 70), (256, 64, 576)):
        full = torch.full((N, O), 127, dtype=torch.int8)
        signs = torch.where(torch.arange(N * I).view(N, I) % 7 < 5, 127, -127).to(torch.int8)
        expected = full.t().long() @ signs.long()
        if not torch.equal(dense_product(full.t(), signs).long(), expected):
            return False
    return True


# --- which one -----------------------------------------------------------------------------------------------------------


def _with_layout(name: str, kind: str, codes: Tensor, ternary: Ternary, out: Tensor) -> None:
    """A product that lays out the weight itself: that is a part of its time."""
    fresh = Ternary(ternary.weight_codes, ternary.weight_scale, ternary.sizes, ternary.columns)
    METHODS[name](kind, codes, fresh, out)


def _fastest(kind: str, codes: Tensor, ternary: Ternary, out: Tensor) -> str:
    names = possible(codes, out.shape[1])
    if len(names) == 1:
        return names[0]
    (N, K), work = codes.shape, (kind, codes, ternary, out)
    ways = {name: functools.partial(_with_layout, name, *work) for name in names}
    return fastest(f"{kind} {K}x{out.shape[1]}, {N.bit_length()} bits", ways)
