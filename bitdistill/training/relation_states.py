"""What the relation loss needs of a teacher's Q, K and V for one row, in few numbers: for the cache of stage 3.

A relation is made of the products of a head's tokens with each other alone, A A^T (of Q with K in the convention
attention_maps). It stays as it is when A (T tokens, D wide) is rotated. With A^T = Q R, the lower triangle R^T of T x T has
the same products as A. So a row no longer than a head is wide is kept as T (T + 1) / 2 numbers of each head, which is less
than half of T D. A longer row is kept as it is. For attention_maps, R^T of each key head is kept, and Q in the directions
of these keys.

Numbers are kept in fp16, with a power of two per tensor and row as a common factor, so that none is too large. In a long
row, what a teacher computed in fp16 or bf16 is then kept exactly, except numbers below 2^-14 of the largest. A number of a
short row, or of a teacher in fp32, is changed by at most 2^-12 of itself or 2^-25 of the largest.

Shape suffixes: H heads, T tokens, D head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bitdistill.training.relations import PR382_SPLIT_HEADS


@dataclass(frozen=True)
class StateShape:
    """The tensors that are kept of one layer.

    Args:
        heads, widths: of Q, K and V, after they were regrouped; of Q and K alone if they are `paired`.
        paired: Q is related to K (attention_maps) and not each tensor to itself.
    """

    heads: tuple[int, ...]
    widths: tuple[int, ...]
    paired: bool = False

    def numbers(self, lengths: np.ndarray | int) -> list[np.ndarray | int]:
        """How many numbers each tensor has in rows of these lengths."""
        sizes = []
        for i, (heads, width) in enumerate(zip(self.heads, self.widths, strict=True)):
            short = lengths * lengths if self.paired and i == 0 else lengths * (lengths + 1) // 2
            sizes.append(heads * np.where(lengths <= width, short, lengths * width))
        return sizes


def state_shape(relation: str, heads: int, groups: int, width: int, split_heads: int | None) -> StateShape | None:
    """What a relation convention needs of a layer; None for "none".

    Args:
        relation: a convention, or "none". heads, groups: query heads, key and value heads of the teacher.
        width: of one of its heads. split_heads: as in relations.relation_loss.
    """
    if relation == "none":
        return None
    if relation == "attention_maps":
        return StateShape((heads, groups), (width, width), paired=True)
    split = PR382_SPLIT_HEADS if relation == "pr382" and split_heads is None else split_heads
    if split is None:
        return StateShape((heads, groups, groups), (width,) * 3)
    return StateShape((split,) * 3, tuple(count * width // split for count in (heads, groups, groups)))


def compressed(qkv: Sequence[Tensor], shape: StateShape) -> list[Tensor]:
    """The tensors of a layer and row as vectors of `shape.numbers(T)` fp32 numbers.

    Args:
        qkv: Q, K and V of one row, (H, T, D) float, as the capture has them. shape: of what is kept.
    """
    tensors = [
        _regrouped(x_HTD.detach().to("cpu", torch.float32), heads)
        for x_HTD, heads in zip(qkv, shape.heads, strict=False)
    ]
    length = tensors[0].shape[1]
    if shape.paired and length <= shape.widths[0]:
        query_HTD, key_GTD = tensors
        directions_GDT, upper_GTT = torch.linalg.qr(key_GTD.mT)
        directions_HDT = directions_GDT.repeat_interleave(len(query_HTD) // len(key_GTD), dim=0)
        return [(query_HTD @ directions_HDT).flatten(), _triangle(upper_GTT.mT)]
    return [
        _triangle(torch.linalg.qr(x_HTD.mT, mode="r").R.mT) if length <= x_HTD.shape[2] else x_HTD.flatten()
        for x_HTD in tensors
    ]


def expanded(vectors: Sequence[Tensor], length: int, shape: StateShape) -> list[Tensor]:
    """Tensors (H, T, D) with the products of those that were `compressed`; what a short row does not need of D is 0.

    Args:
        vectors: as `compressed` returns them. length: T. shape: as there.
    """
    found = []
    for i, (x, heads, width) in enumerate(zip(vectors, shape.heads, shape.widths, strict=True)):
        if length > width:
            found.append(x.view(heads, length, width))
            continue
        full_HTD = x.new_zeros(heads, length, width)
        if shape.paired and i == 0:
            full_HTD[:, :, :length] = x.view(heads, length, length)
        else:
            rows, columns = torch.tril_indices(length, length)
            full_HTD[:, rows, columns] = x.view(heads, -1)
        found.append(full_HTD)
    return found


def _regrouped(x_HTD: Tensor, heads: int) -> Tensor:
    """(H, T, D) -> (heads, T, H * D / heads), as the relation loss regroups."""
    if x_HTD.shape[0] == heads:
        return x_HTD
    return x_HTD.transpose(0, 1).flatten(1).unflatten(1, (heads, -1)).transpose(0, 1)


def _triangle(lower_HTT: Tensor) -> Tensor:
    rows, columns = torch.tril_indices(*lower_HTT.shape[1:])
    return lower_HTT[:, rows, columns].flatten()


def halved(x: Tensor) -> tuple[np.ndarray, int]:
    """(fp16 numbers, exponent) with ``x ~ numbers * 2^exponent``.

    Args:
        x: float, any shape, finite.
    """
    x = x.float()
    largest = float(x.abs().max()) if x.numel() else 0.0
    exponent = int(np.frexp(largest)[1])
    return torch.ldexp(x, torch.tensor(-exponent)).half().cpu().numpy(), exponent


def doubled(numbers: np.ndarray, exponent: int) -> Tensor:
    """What `halved` was given, in fp32."""
    return torch.ldexp(torch.from_numpy(numbers.astype(np.float32)), torch.tensor(int(exponent)))
