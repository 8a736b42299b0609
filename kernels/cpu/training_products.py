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


@dataclass(frozen=True, eq=False)
class Ternary:
    """One or more linears, stacked: ``W_s ~ weight_scale[s] * weight_codes[rows of s]``.

    Args:
        weight_codes: int8 (O, I), contiguous. weight_scale: fp32 (S,).
        sizes: rows of each.
        kept: what was made of them, by name.
    """

    weight_codes: Tensor
    weight_scale: Tensor
    sizes: tuple[int, ...]
    kept: dict[str, Tensor] = field(default_factory=dict)

    def of_columns(self) -> Tensor:
        """fp32 (O,): the weight_scale of every row."""
        if "columns" not in self.kept:
            sizes = torch.tensor(self.sizes)
            self.kept["columns"] = self.weight_scale.repeat_interleave(sizes, output_size=len(self.weight_codes))
        return self.kept["columns"]

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
    """Never multiplies by these METHODS again in this process: they are not right on this machine."""
    _left_out.update(names)


def has_products() -> bool:
    """Whether the method is left that takes every shape."""
    return "onednn" not in _left_out


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
    METHODS[name](kind, codes, Ternary(ternary.weight_codes, ternary.weight_scale, ternary.sizes), out)


def _fastest(kind: str, codes: Tensor, ternary: Ternary, out: Tensor) -> str:
    names = possible(codes, out.shape[1])
    if len(names) == 1:
        return names[0]
    (N, K), work = codes.shape, (kind, codes, ternary, out)
    ways = {name: functools.partial(_with_layout, name, *work) for name in names}
    return fastest(f"{kind} {K}x{out.shape[1]}, {N.bit_length()} bits", ways)
