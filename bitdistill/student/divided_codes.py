"""Ternary codes of weights that ZeRO 3 has divided among the ranks: the codes travel, in two bits, and the weights stay.

DeepSpeed gathers every weight before a layer's forward pass and again before its backward pass, 4 bytes each time, in each
micro-step. A BitLinear multiplies with the codes alone. So once per optimizer step each rank

1. sums ``|W|`` over its part of every weight, and the ranks add these sums. This gives the scale of the whole weight, bit for
   bit: kernels/reference.py sums in fp64 and rounds once, so that the order does not matter;
2. makes the codes of its part, four to a byte, and the ranks gather them: a sixteenth of the bytes of fp32.

During a training step, DeepSpeed is told that these weights are already gathered: each is a tensor of the right shape
without memory (one number, expanded). The layer never reads it, autograd gives it its gradient, and DeepSpeed sums that and
divides it among the ranks as usual.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist

from bitdistill.kernels.numerics import EPSILON
from bitdistill.student.backend import kernels_for

PER_BYTE = 4


def can_travel(layer: nn.Module) -> bool:
    """Whether a BitLinear's weight is divided, in memory, and only its codes are needed."""
    weight = layer.weight
    if not hasattr(weight, "ds_tensor") or layer.on_reference() or kernels_for(_device_of(weight)) is None:
        return False
    if layer.quantizer.columns(layer) is not None:  # of rows or groups: DeepSpeed gathers the weight
        return False
    in_memory = weight.ds_tensor.status.name == "AVAILABLE"  # and not on an NVMe disk
    return in_memory and not weight.is_external_param and weight.ds_process_group is not None


def _device_of(weight: nn.Parameter) -> torch.device:
    return torch.device(weight.device)


@torch.no_grad()
def gather_codes(weights: Sequence[nn.Parameter]) -> list[tuple[Tensor, Tensor]]:
    """(codes int8 (O, I), scale fp32 ()) of each divided weight: `reference.quantize_weight` of the whole, bit for bit. The codes
    lie side by side in memory. Every rank calls it with the same weights.

    Args:
        weights: divided by DeepSpeed; each rank has an equal part of each, the last one padded.
    """
    group = weights[0].ds_process_group
    rank, ranks, device = dist.get_rank(group), dist.get_world_size(group), weights[0].device
    parts = [_own_part(weight, rank).to(device) for weight in weights]
    sums = torch.stack([part.abs().sum(dtype=torch.float64) for part in parts])
    dist.all_reduce(sums, group=group)
    sizes = torch.tensor([weight.ds_numel for weight in weights], dtype=torch.float64, device=device)
    scales = (sums / sizes).float().clamp_min(EPSILON)
    widths = [-(-weight.ds_tensor.ds_numel // PER_BYTE) for weight in weights]  # bytes of each weight from each rank
    mine = torch.zeros(sum(widths), dtype=torch.uint8, device=device)
    for part, scale, place in zip(parts, scales, mine.split(widths), strict=True):
        place.copy_(_packed(torch.round(part / scale).clamp_(-1, 1), len(place)))
    everyones = torch.empty(ranks * len(mine), dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(everyones, mine, group=group)
    codes = torch.empty(sum(weight.ds_numel for weight in weights), dtype=torch.int8, device=device)
    whole = codes.split([weight.ds_numel for weight in weights])
    for weight, target, columns in zip(weights, whole, everyones.view(ranks, -1).split(widths, dim=1), strict=True):
        size = weight.ds_tensor.ds_numel
        for number, packed in enumerate(columns):
            piece = target[number * size : (number + 1) * size]
            piece.copy_(_unpacked(packed)[: len(piece)])
    return [(t.view(weight.ds_shape), s) for t, weight, s in zip(whole, weights, scales, strict=True)]


def _own_part(weight: nn.Parameter, rank: int) -> Tensor:
    """This rank's part of a divided weight, flat, fp32, without the padding."""
    size = weight.ds_tensor.ds_numel
    return weight.ds_tensor.detach().reshape(-1)[: max(0, min(size, weight.ds_numel - rank * size))].float()


def _packed(codes: Tensor, size: int) -> Tensor:
    """{-1, 0, 1} -> uint8 (size,), four codes to a byte as 0, 1, 2; what is missing is 0."""
    digits = torch.zeros(size * PER_BYTE, dtype=torch.uint8, device=codes.device)
    digits[: len(codes)] = (codes + 1).to(torch.uint8)
    first, second, third, fourth = digits.view(-1, PER_BYTE).unbind(1)
    return first | second << 2 | third << 4 | fourth << 6


def _unpacked(packed: Tensor) -> Tensor:
    """The inverse of `_packed`: int8, four times as long."""
    digits = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=1)
    return digits.view(-1).to(torch.int8) - 1


@contextlib.contextmanager
def standing_in(weights: Sequence[nn.Parameter], stand_ins: Sequence[Tensor]) -> Iterator[None]:
    """Inside, DeepSpeed takes divided weights for gathered ones that stay so; afterwards they are as they were.

    Args:
        weights: divided. stand_ins: tensors of their shapes, from `stand_in`.
    """
    if not weights:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    before = [(weight.data, weight.ds_status, weight.ds_persist) for weight in weights]
    assert all(status == ZeroParamStatus.NOT_AVAILABLE for _, status, _ in before), "a weight is gathered already"
    for weight, shape in zip(weights, stand_ins, strict=True):
        weight.data, weight.ds_status, weight.ds_persist = shape, ZeroParamStatus.AVAILABLE, True
    try:
        yield
    finally:
        for weight, (data, status, persist) in zip(weights, before, strict=True):
            weight.data, weight.ds_status, weight.ds_persist = data, status, persist


def stand_in(weight: nn.Parameter) -> Tensor:
    """A tensor of a divided weight's shape, of one number in memory."""
    return torch.zeros(1, dtype=weight.dtype, device=weight.device).expand(weight.ds_shape)
