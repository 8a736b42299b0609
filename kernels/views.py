"""Tensors that lie side by side in memory, as one, without a copy."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def concatenate(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """``torch.cat(tensors, dim)``: a view where they are neighbors, in this order, in one contiguous tensor.

    Args:
        tensors: of one dtype and device; their shapes differ in `dim` at most. dim: 0 or above.
    """
    first, shape = tensors[0], list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    strides = tuple(math.prod(shape[after:]) for after in range(1, len(shape) + 1))  # of a contiguous tensor
    place = first.storage_offset()
    for tensor in tensors:
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or tensor.stride() != strides or tensor.storage_offset() != place or tensor.dtype != first.dtype:
            return torch.cat(list(tensors), dim)
        place += tensor.shape[dim] * strides[dim]
    return first.as_strided(shape, strides)
