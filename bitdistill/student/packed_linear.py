"""Our compiled CPU products inside a model of transformers: a module on packed weights replaces each ternary projection.

`accelerate(model)` takes a student as it was trained, or one that transformers has loaded from an export
(`bitdistill export --format transformers`, or any other model whose projections hold one value, its negative and zero in each
tensor, row or group of columns). The rest of the model stays what it was, so `model.generate` and everything else of
transformers work on it. For the fastest decoding use the packed file and `bitdistill.load`, which compile the whole step.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bitdistill.errors import UserError
from bitdistill.kernels import packing
from bitdistill.kernels.cpu import matmul, step
from bitdistill.kernels.cpu.activations import quantize_activation, quantize_activation_blocks, record_bytes
from bitdistill.kernels.cpu.elementwise import padded
from bitdistill.kernels.cpu.grouped import write_group_sums
from bitdistill.kernels.cpu.rows import share_rows
from bitdistill.names import PROJECTIONS
from bitdistill.student.layers import BitLinear

GROUPS = (256, 128, 64)  # columns of a group, the coarsest first
CHUNK = 256  # columns that are looked at together


@dataclass(frozen=True)
class Ternary:
    """A ternary matrix: codes int8 (O, I), scale fp32 () or (O, G), columns of a group (None where the scale is ())."""

    codes: Tensor
    scale: Tensor
    columns: int | None


class PackedLinear(nn.Module):
    """``y = (q(x) @ codes.T) * (act_scale * scale) + bias`` on packed weights, on a CPU, without a gradient.

    Args:
        ternary: the weight. bias: (O,) or None. act_scale: "token" or "block", how activations are rounded.
        input_scale: (I,), by which the input is divided before that, or None. subln: what stands before all this, or None.
        kind: of packing, "base3" or "2bit".
    """

    def __init__(
        self,
        ternary: Ternary,
        bias: Tensor | None,
        act_scale: str,
        kind: str = "base3",
        input_scale: Tensor | None = None,
        subln: nn.Module | None = None,
    ):
        super().__init__()
        rows, columns = ternary.codes.shape
        self.out_features, self.in_features, self.act_scale, self.kind = rows, columns, act_scale, kind
        self.register_buffer("weight_packed", torch.from_numpy(packing.pack(ternary.codes.numpy(), kind)))
        scale = ternary.scale
        if ternary.columns is not None:
            scale = torch.from_numpy(packing.pack_scales(scale.half().numpy()))
        self.register_buffer("weight_scale", scale)
        self.group_size = 0 if ternary.columns is None or ternary.columns >= columns else ternary.columns
        wide = torch.zeros(padded(rows))
        if bias is not None:
            wide[:rows] = bias.detach().float()
        self.register_buffer("input_scale", input_scale)
        self.subln = subln
        self.register_buffer("bias", None if bias is None else wide)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O) in ``x.dtype``. Numerics: bit for bit `reference.bit_linear` without a gradient."""
        rows = (x if self.subln is None else self.subln(x)).reshape(-1, self.in_features).float()
        rows = (rows if self.input_scale is None else rows / self.input_scale).contiguous()
        tokens, groups = len(rows), packing.row_groups(self.out_features)
        stride = record_bytes(self.in_features)
        records, out = np.empty((tokens, stride), np.uint8), torch.empty(tokens, step.GROUP * groups)
        quantize = quantize_activation_blocks if self.act_scale == "block" else quantize_activation
        for n in range(tokens):
            record = records.ctypes.data + n * stride
            quantize(rows.data_ptr() + 4 * n * self.in_features, self.in_features, record)
            if self.group_size and self.act_scale == "token":
                write_group_sums(record, self.in_features, self.group_size)
        projection = self._record()

        def product(first: int, last: int) -> None:
            acc = np.empty(max(step.ACC_WORDS, step.GROUP * tokens), np.int32)
            scratch = np.empty(matmul.SCRATCH_BYTES, np.uint8)
            step.product(
                projection.ctypes.data, tokens, records.ctypes.data, stride, out.data_ptr(), out.shape[1], first, last,
                acc.ctypes.data, scratch.ctypes.data,
            )  # fmt: skip

        share_rows(product, groups, step.GROUP * self.in_features * max(1, tokens // 4), block=4)
        return out[:, : self.out_features].reshape(*x.shape[:-1], self.out_features).to(x.dtype)

    def takes_gated(self) -> bool:
        """False: this module does not compute the gate of an MLP; layers.GatedMLP asks for it."""
        return False

    def _record(self) -> np.ndarray:
        """The record that the kernels read, with current addresses, because a module may have been moved or copied."""
        record = np.zeros(1, step.PROJECTION)
        one_scale = self.weight_scale.dim() == 0
        record["weight"], record["packing"] = self.weight_packed.data_ptr(), packing.PACKINGS.index(self.kind)
        record["out_features"], record["in_features"] = self.out_features, self.in_features
        record["bias"] = 0 if self.bias is None else self.bias.data_ptr()
        record["scales"] = 0 if one_scale else self.weight_scale.data_ptr()
        record["group_size"], record["act_blocks"] = self.group_size, self.act_scale == "block"
        record["weight_scale"] = self.weight_scale.item() if one_scale else 0.0
        return record

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}, act_scale={self.act_scale}"
        )


def ternary_of(weight: Tensor) -> Ternary | None:
    """The codes and scales of a matrix that is ternary, or None for one that is not.

    One scale for the tensor, for each row, or for each group of 256, 128 or 64 columns of a row, whichever is the coarsest.

    Args:
        weight: (O, I) float.
    """
    weight = weight.detach().float().cpu()
    codes, magnitude = weight.sign().to(torch.int8), weight.abs()
    peak = magnitude.max()
    if bool(((magnitude == 0) | (magnitude == peak)).all()):
        return Ternary(codes, peak, None)
    for columns in (weight.shape[1], *GROUPS):
        parts = magnitude.split(columns, dim=1)
        scale = torch.stack([part.amax(1) for part in parts], 1)
        alike = ((part == 0) | (part == own[:, None]) for part, own in zip(parts, scale.unbind(1), strict=True))
        if all(bool(one.all()) for one in alike) and torch.equal(scale.half().float(), scale):
            return Ternary(codes, scale, columns)
    return None


@torch.no_grad()
def _matrix(module: nn.Module) -> Tensor:
    """(O, I): what a linear module of any library multiplies by, seen in its answers to unit vectors."""
    width, bias = module.in_features, getattr(module, "bias", None)
    dtype = next((p.dtype for p in (*module.parameters(), *module.buffers()) if p.is_floating_point()), torch.float32)
    parts = []
    if bias is not None:  # which would round the answers
        module.bias = None
    try:
        for start in range(0, width, CHUNK):
            count = min(CHUNK, width - start)
            unit = torch.zeros(count, width, dtype=dtype)
            unit[:, start : start + count].fill_diagonal_(1)
            parts.append(module(unit).float().T)
    finally:
        if bias is not None:
            module.bias = bias
    return torch.cat(parts, 1)


def accelerate(model: nn.Module, act_scale: str = "token", kind: str = "base3") -> int:
    """Puts our compiled CPU products in the place of every ternary projection, for inference.

    Args:
        model: a student as it was trained (load_student), or a causal language model that transformers loaded from an export,
            on a CPU; changed in place.
        act_scale: how activations are rounded to int8, one scale for a "token" or for each "block" of 32 columns; a student as
            it was trained keeps its own. A tool that did not round them computes a little differently afterwards.
        kind: of packing: "base3" (1.6 bits per weight) or "2bit".

    Returns: how many projections were replaced.

    Raises:
        UserError: no projection, one that is not ternary, or a model that is not on a CPU.
    """
    found = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in PROJECTIONS}
    if not found or any(tensor.device.type != "cpu" for tensor in (*model.parameters(), *model.buffers())):
        expected = "a causal language model on a CPU, with q_proj to down_proj"
        raise UserError("model", expected=expected, got=type(model).__name__, do="Load it with device_map cpu.")
    made: dict[str, nn.Module] = {}
    for name, module in found.items():
        if isinstance(module, BitLinear):
            codes, scale = module.ternary()
            ternary = Ternary(codes, scale, module.quantizer.columns(module))
            divisor = module.quantizer.input_scale(module)
            divisor, bias = module.quantizer.input_scale(module), module.ternary_bias()
            made[name] = PackedLinear(ternary, bias, module.act_scale, kind, divisor, module.subln)
            continue
        ternary = ternary_of(_matrix(module))
        if ternary is None:
            expected = "ternary projections: one value, its negative and zero in each tensor, row or group of columns"
            do = "Load an export of this project, or convert the model with `bitdistill.refine`."
            raise UserError("model", expected=expected, got=f"{name}, which has more values", do=do)
        made[name] = PackedLinear(ternary, getattr(module, "bias", None), act_scale, kind)
    for name, module in made.items():
        model.set_submodule(name, module)
    return len(made)
