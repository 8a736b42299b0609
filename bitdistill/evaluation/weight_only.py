"""What the full-precision model takes and scores when its weights are rounded to 4 bits: what a skeptic would compare with.

Only weights become integers, and nothing is trained: the seven projections of every layer are rounded, activations and all
other parameters stay as they are. The format is the usual one: symmetric, groups of 128 along in_features (the last one of
a row is narrower where 128 does not divide it), one fp16 scale per group, no zero point:

    scale = max|w| over the group / 7.5                    rounded to fp16
    codes = clip(round(w / scale), -8, 7)                  4 bits;  w ~ scale * codes
    bits per weight = 4 + 16 / 128 = 4.125

* Round to nearest (RTN): each weight is rounded by itself.
* GPTQ: columns are rounded one after the other, in their order. The error of a column is spread over the columns not yet
  rounded, such that the layer's output ``X W^T`` on calibration inputs changes least (student/gptq.py).

  Layers are rounded in order, each on the inputs that the rounded layers before it give (the seven projections of a layer
in
  the same pass). The scale of a group is set when its first column is reached.

`quantize_model` puts the dequantized weights into the model, so that it is scored like any other. `weight_only_size` counts
what a file would hold. Our CPU runtime has no kernels for such linears, so their speed is not measured.

Source: Frantar et al., GPTQ, arXiv 2210.17323.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bitdistill.errors import UserError
from bitdistill.evaluation.scoring import evaluating
from bitdistill.names import PROJECTIONS, WEIGHT_ONLY
from bitdistill.runtime.packed_file import Config
from bitdistill.student.gptq import DAMPING, compensated_codes, inverse_factor

BITS, GROUP = 4, 128
CALIBRATION_TOKENS = 8192
BATCH_TOKENS = 4096
# The projection whose input is recorded for each group of projections that are given the same tensor.
SAME_INPUT = {"q_proj": ("q_proj", "k_proj", "v_proj"), "o_proj": ("o_proj",),
              "gate_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}  # fmt: skip


def _group_scale(weight: Tensor, bits: int) -> Tensor:
    """max|w| / (2^(bits-1) - 1/2) of each row, rounded to fp16, as fp32 (O, 1); 0 where fp16 has nothing that small."""
    return (weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 0.5)).half().float()


def _codes(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """clip(round(w / scale)), half to even; 0 where the scale is 0."""
    units = torch.where(scale > 0, weight / scale, torch.zeros_like(weight))
    return units.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _check(weight: Tensor, bits: int, group: int) -> None:
    assert weight.dim() == 2
    assert 2 <= bits <= 8
    assert group >= 1
    if not (weight.abs() < 65504 * (2 ** (bits - 1) - 0.5)).all():  # false for NaN, too
        do = "The model cannot be stored in this format; set evaluate.weight_only to false."
        raise UserError(
            "evaluate.weight_only", expected="finite weights whose scale fp16 can hold", got="others", do=do
        )


def round_to_nearest(weight: Tensor, bits: int = BITS, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """``codes = clip(round(w / scale), -2^(bits-1), 2^(bits-1) - 1)``, ``scale = max|w| / (2^(bits-1) - 1/2)`` by group.

    Args:
        weight: float (O, I). bits: 2 to 8. group: columns that share a scale; the last group of a row may be narrower.

    Returns: (codes int8 (O, I), scale float16 (O, ceil(I / group))); a group whose scale is 0 in fp16 has codes 0.

    Raises:
        UserError: a weight is not finite, or too large for an fp16 scale.

    Numerics: fp32; the scale is rounded to fp16 before it divides; half to even.
    """
    _check(weight, bits, group)
    codes, scales = [], []
    for part in weight.detach().float().split(group, dim=1):
        scale = _group_scale(part, bits)
        codes.append(_codes(part, scale, bits).to(torch.int8))
        scales.append(scale.half())
    return torch.cat(codes, dim=1), torch.cat(scales, dim=1)


def dequantize(codes: Tensor, scale: Tensor, group: int = GROUP) -> Tensor:
    """``w = scale * codes``: float32 (O, I) of int8 codes (O, I) and float16 scales (O, ceil(I / group))."""
    return codes.float() * scale.float().repeat_interleave(group, dim=1)[:, : codes.shape[1]]


def gptq(
    weight: Tensor, hessian: Tensor, bits: int = BITS, group: int = GROUP, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """Codes that keep ``|X (W - W_q)^T|`` small, column by column (student/gptq.py has the equations).

    Args:
        weight: float (O, I).
        hessian: float (I, I), X^T X over calibration inputs X (N, I); its scale does not matter. An input that never
            occurs (a zero on the diagonal) leaves its column rounded to nearest.
        damping: share of the mean diagonal that is added to the diagonal.
        bits: of a code. group: columns that share a scale.

    Returns: (codes int8 (O, I), scale float16 (O, ceil(I / group))), as `round_to_nearest`.

    Raises:
        UserError: the hessian is not finite, or a weight not quantizable.

    Numerics: the factor in float64, the sweep in fp32; columns of a group one by one, those after it by one product.

    Source: Frantar et al., arXiv 2210.17323, algorithm 1.
    """
    _check(weight, bits, group)
    if not hessian.isfinite().all():
        do = "Set evaluate.weight_only to false."
        raise UserError("evaluate.weight_only", expected="finite activations", got="infinite or NaN ones", do=do)
    codes, scales = compensated_codes(
        weight,
        inverse_factor(hessian, damping),
        group,
        lambda block: _group_scale(block, bits),
        lambda column, scale: _codes(column, scale, bits),
    )
    return codes, torch.cat([scale.half() for scale in scales], dim=1)


def linear_bytes(out_features: int, in_features: int, bits: int = BITS, group: int = GROUP) -> int:
    """Bytes of one matrix: ``ceil(O I bits / 8)`` of codes and two for the scale of each group of each row."""
    return math.ceil(out_features * in_features * bits / 8) + 2 * out_features * math.ceil(in_features / group)


@torch.no_grad()
def quantize_model(
    model: nn.Module, method: str, calibration: Sequence[Sequence[int]] = (), bits: int = BITS, group: int = GROUP
) -> dict[str, Any]:
    """Puts the dequantized weights of every projection into a model, in place.

    Args:
        model: a full-precision causal LM of models.FAMILIES, on any device.
        method: "rtn", or "gptq".
        calibration: gptq: prompts as token lists; all of them are used.
        bits: of a code. group: columns that share a scale.

    Returns: {"linear_bytes", "linear_weights", "bits_per_weight", "calibration_tokens"}, exact for the stored format.

    Raises:
        UserError: gptq without a prompt, or what `gptq` refuses.
    """
    assert method in WEIGHT_ONLY.values(), method
    layers = model.get_submodule("model.layers")
    facts = {"linear_bytes": 0, "linear_weights": 0, "calibration_tokens": sum(map(len, calibration))}

    def put(linear: nn.Linear, codes: Tensor, scale: Tensor) -> None:
        linear.weight.copy_(dequantize(codes, scale, group))
        facts["linear_bytes"] += linear_bytes(*linear.weight.shape, bits, group)
        facts["linear_weights"] += linear.weight.numel()

    if method == "rtn":
        for linear in (linear for layer in layers for linear in _projections(layer).values()):
            put(linear, *round_to_nearest(linear.weight, bits, group))
    else:
        if not any(map(len, calibration)):
            raise UserError("train_file", expected="prompts for GPTQ", got="none", do="Give a file with training rows.")
        calls, hidden, real = _layer_calls(model, calibration)
        with evaluating(model):
            for index, layer in enumerate(tqdm(layers, desc="GPTQ")):
                linears = _projections(layer)
                hessians = _hessians(layer, linears, calls[index], hidden, real)
                for source, names in SAME_INPUT.items():  # rows are independent: one sweep for all with the same input
                    together = [linears[name] for name in names]
                    codes, scale = gptq(torch.cat([one.weight for one in together]), hessians[source], bits, group)
                    sizes = [one.out_features for one in together]
                    for one, *quantized in zip(together, codes.split(sizes), scale.split(sizes), strict=True):
                        put(one, *quantized)
                hidden = [layer(x, **call) for x, call in zip(hidden, calls[index], strict=True)]
    facts["bits_per_weight"] = 8 * facts["linear_bytes"] / facts["linear_weights"]
    return facts


def _projections(layer: nn.Module) -> dict[str, nn.Linear]:
    found = {name.rpartition(".")[2]: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    assert set(found) == set(PROJECTIONS), f"expected the seven projections; got {sorted(found)}"
    return found


def _layer_calls(model: nn.Module, prompts: Sequence[Sequence[int]]):
    """What the decoder layers are called with on the prompts, in padded batches.

    Padding is on the right and attention causal, so that no real token sees it and no mask is needed.

    Returns: (per layer and batch the keyword arguments, per batch the input x_BTH of the first layer, per batch bool (B, T)
        of the real tokens).
    """
    layers = model.get_submodule("model.layers")
    device = next(model.parameters()).device
    calls: list[list[dict]] = [[] for _ in layers]
    hidden: list[Tensor] = []
    real: list[Tensor] = []

    def note(index):
        def hook(_module, args, kwargs):
            calls[index].append(kwargs)
            if index == 0:
                hidden.append(args[0])

        return hook

    hooks = [layer.register_forward_pre_hook(note(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        with evaluating(model):
            for rows in _batches(sorted((list(ids) for ids in prompts if ids), key=len)):
                length = len(rows[-1])
                ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)
                real.append(torch.arange(length)[None] < torch.tensor([len(row) for row in rows])[:, None])
                model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return calls, hidden, [mask.to(device) for mask in real]


def _batches(rows: list[list[int]]):
    """Neighbors in a list that is sorted by length, at most BATCH_TOKENS with padding, at least one row each."""
    batch: list[list[int]] = []
    for row in rows:
        if batch and (len(batch) + 1) * len(row) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _hessians(layer: nn.Module, linears: dict[str, nn.Linear], calls, hidden, real) -> dict[str, Tensor]:
    """X^T X, float64 (I, I), of the inputs of SAME_INPUT's projections over all real tokens."""
    found: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def note(name):
        def hook(_module, args):
            x_NI = args[0][mask].float()
            product = (x_NI.T @ x_NI).double()
            found[name] = found[name] + product if name in found else product

        return hook

    hooks = [linears[name].register_forward_pre_hook(note(name)) for name in SAME_INPUT]
    try:
        for x_BTH, call, mask in zip(hidden, calls, real, strict=True):  # noqa: B007 -- the hooks read mask
            layer(x_BTH, **call)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def weight_only_size(folder: str | Path, student: Config, bits: int = BITS, group: int = GROUP) -> dict[str, Any]:
    """Bytes of a saved full-precision model with its projections in this format and its tables in the student's.

    Everything else is as it is in the folder. The tables (embedding and, if it has one, LM head) are counted in the format
    of the packed student, so that the two files differ in their linears alone.

    Args:
        folder: a Hugging Face model. student: the config of the packed student.
        bits: of a code. group: columns that share a scale.

    Returns: {"linear_bytes", "model_bytes", "bits_per_weight", "model_bits_per_parameter"}.
    """
    from safetensors import safe_open

    linears = weights = model_bytes = parameters = 0
    for file in sorted(Path(folder).glob("*.safetensors")):
        model_bytes += file.stat().st_size
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 -- not a dict
                tensor = tensors.get_tensor(name)
                parameters += tensor.numel()
                owner = name.removesuffix(".weight")
                if owner.split(".")[-1] in PROJECTIONS and tensor.dim() == 2:
                    size = linear_bytes(*tensor.shape, bits, group)
                    linears, weights = linears + size, weights + tensor.numel()
                elif owner in ("model.embed_tokens", "lm_head"):
                    size = _table_bytes(*tensor.shape, student)
                else:
                    continue
                model_bytes += size - tensor.numel() * tensor.element_size()
    return {
        "linear_bytes": linears,
        "model_bytes": model_bytes,
        "bits_per_weight": 8 * linears / weights,
        "model_bits_per_parameter": 8 * model_bytes / parameters,
    }


def _table_bytes(rows: int, columns: int, student: Config) -> int:
    """Bytes of a (rows, columns) table in the student's embedding format."""
    like = dataclasses.replace(student, vocab_size=rows, hidden_size=columns, tied=True).expected_tensors()
    tensors = (shape for name, shape in like.items() if name.startswith("model.embed_tokens."))
    return sum(math.prod(shape) * dtype().itemsize for dtype, shape in tensors)
