"""Quantized tables (embedding, LM head) in plain PyTorch: the codes and scales that a packed file stores, and that training
multiplies with. Scales belong to a row, or to 32 columns of it, so any rows can be quantized separately.

    int8      scale = max|row| / 127               codes = round(row / scale)                fp32 scale per row
    ternary   scale = max(mean|row|, EPSILON)      codes = clip(round(row / scale), -1, 1)   fp32 scale per row
    int4      scale = fp16(v / -8)                 codes = clip(round(x / scale), -8, 7)     fp16 scale for 32 columns

Here v is the entry of largest magnitude among the 32, the first of equal ones. Because of its sign, it falls on -8, the
code without a positive counterpart. A row or group whose scale is 0 has codes 0. Rounding is half to even, divisions are
true divisions, and arithmetic is in fp32; the mean is summed in fp64 and rounded once. tests/test_tables.py computes the
same in numpy, equal bit for bit.

Shape suffixes: V rows, I columns, G groups of 32 columns.
"""

import torch
from torch import Tensor

from bitdistill.kernels.numerics import EPSILON
from bitdistill.kernels.packing import INT4_GROUP, TABLE_FORMATS

QUANTIZED_FORMATS = TABLE_FORMATS[1:]
CHUNK_ELEMENTS = 2**24  # of a table at a time: temporaries of some 64 MB each beside a table of any size


def quantize_table(weight: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of a table, or of some rows of one (equations above).

    Args:
        weight: (V, I), any float dtype; on a ZeRO-3 shard the result would be wrong, so an empty width is refused.
        format: "int8", "int4" (32 divides I) or "ternary".

    Returns: (codes int8 (V, I), scale): fp32 (V,), for int4 fp16 (V, I / 32).

    Raises:
        ValueError: an unknown format, or a shape that does not fit.
    """
    check_width(weight.shape, format)
    parts = [_quantize_rows(rows_VI, format) for rows_VI in weight.detach().split(_rows_at_once(weight.shape[1]))]
    codes, scales = zip(*parts, strict=True)
    return (codes[0], scales[0]) if len(parts) == 1 else (torch.cat(codes), torch.cat(scales))


def _quantize_rows(rows_VI: Tensor, format: str) -> tuple[Tensor, Tensor]:
    weight_VI = rows_VI.float()
    if format == "int4":
        groups_VG32 = weight_VI.unflatten(1, (-1, INT4_GROUP))
        place_VG1 = groups_VG32.abs().argmax(dim=2, keepdim=True)
        scale_VG1 = _divide(groups_VG32.gather(2, place_VG1), -8).half()
        codes = _round(groups_VG32, scale_VG1.float()).clamp_(-8, 7)
        return codes.to(torch.int8).flatten(1), scale_VG1.squeeze(2)
    if format == "int8":
        scale_V = _divide(weight_VI.abs().amax(dim=1), 127)
        return _round(weight_VI, scale_V[:, None]).clamp_(-127, 127).to(torch.int8), scale_V
    total_V = weight_VI.abs().sum(dim=1, dtype=torch.float64)
    scale_V = _divide(total_V, weight_VI.shape[1]).float().clamp_min(EPSILON)
    return _round(weight_VI, scale_V[:, None]).clamp_(-1, 1).to(torch.int8), scale_V


def dequantize_table(codes: Tensor, scale: Tensor) -> Tensor:
    """``codes * scale``: fp32 (V, I), one rounding an entry.

    Args:
        codes, scale: of `quantize_table`.
    """
    if scale.dim() == 1:
        return codes.float() * scale[:, None]
    return (codes.float().unflatten(1, (-1, INT4_GROUP)) * scale.float()[:, :, None]).flatten(1)


def fake_quantize_table(weight: Tensor, format: str) -> Tensor:
    """``dequantize_table(quantize_table(W))`` with the straight-through gradient: ``dW = dY``, clipped entries included.

    Args:
        weight: (..., I) float; every row of the last dimension is a row of a table. format: as in `quantize_table`.

    Returns: like weight. Numerics: bit for bit `dequantize_table`, rounded to weight's dtype; autocast does not reach inside.

    Raises:
        ValueError: as `quantize_table`.
    """
    return _FakeQuantize.apply(weight, format)


def check_width(shape: tuple[int, ...], format: str) -> None:
    """Raises ValueError for an unknown format, or a table that it cannot hold."""
    if format not in QUANTIZED_FORMATS:
        raise ValueError(f"format: expected one of {', '.join(QUANTIZED_FORMATS)}; got {format!r}.")
    if shape[-1] == 0 or (format == "int4" and shape[-1] % INT4_GROUP):
        expected = f"a multiple of {INT4_GROUP} columns for int4" if format == "int4" else "at least one column"
        raise ValueError(f"weight: expected {expected}; got {tuple(shape)}. Take another format, or gather it first.")


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, format):
        check_width(weight.shape, format)
        rows_VI = weight.reshape(-1, weight.shape[-1])
        result_VI = torch.empty_like(rows_VI)
        at_once = _rows_at_once(weight.shape[-1])
        with torch.autocast(weight.device.type, enabled=False):
            for rows, result in zip(rows_VI.split(at_once), result_VI.split(at_once), strict=True):
                result.copy_(dequantize_table(*quantize_table(rows, format)))
        return result_VI.view(weight.shape)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _rows_at_once(columns: int) -> int:
    return max(1, CHUNK_ELEMENTS // columns)


def _divide(x: Tensor, by: float) -> Tensor:
    """A true division: by a Python number, a GPU would multiply with the reciprocal."""
    return x / torch.full_like(x, by)


def _round(x: Tensor, scale: Tensor) -> Tensor:
    return torch.round(x / torch.where(scale == 0, torch.ones_like(scale), scale))
