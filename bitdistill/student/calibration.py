"""What the projections of a full-precision model receive on texts: for SubLN gains, and for the weight quantizers that need it.

`calibrate_gains` and `calibrate_inputs` run the model before it is refined; `InputStatistics` are the sums that they keep, and
`output_error` is what gptq and awq minimize with them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitdistill.errors import UserError
from bitdistill.names import PROJECTIONS, SIBLINGS, SUBLN_BEFORE


@dataclass
class InputStatistics:
    """Sums over the tokens that a layer was given.

    Args:
        gram: fp32 (I, I), ``sum x x^T``. magnitude: fp32 (I,), ``sum |x|``. tokens: how many.
    """

    gram: Tensor
    magnitude: Tensor
    tokens: int

    @classmethod
    def of(cls, x_NI: Tensor) -> "InputStatistics":
        """Of tokens (N, I), any float dtype."""
        x_NI = x_NI.detach().float()
        return cls(x_NI.T @ x_NI, x_NI.abs().sum(0), len(x_NI))

    def add(self, other: "InputStatistics") -> None:
        """Takes further tokens in."""
        self.gram += other.gram
        self.magnitude += other.magnitude
        self.tokens += other.tokens


def output_error(weight: Tensor, quantized: Tensor, gram: Tensor) -> float:
    """``||X W^T - X Q^T||^2`` from ``gram = X^T X``: what gptq and awq make small.

    Args:
        weight, quantized: (O, I). gram: (I, I), on the same device.
    """
    difference = (quantized - weight).detach().double()
    return ((difference @ gram.double()) * difference).sum().item()


@torch.no_grad()
def calibrate_gains(model: nn.Module, batches: Iterable[dict[str, Tensor]], norms: str = "two") -> dict[str, float]:
    """SubLN gains that start the student near its base: the RMS of what each projection receives.

    ``gain = sqrt(mean(x^2))`` over all unpadded tokens and channels, one number per layer: SubLN divides by the RMS of
    each token, the gain puts the average back. (Per-token int8 quantization does not depend on this scale; the size of
    the layer's output does.)

    Args:
        model: the full-precision model, before `refine`.
        batches: dicts with input_ids (B, T) and optionally attention_mask (B, T).
        norms: as in `refine.refine`.

    Returns: layer name -> gain.
    """
    sums: dict[str, list[float]] = {}

    def record(name: str, x_NI: Tensor) -> None:
        total = sums.setdefault(name, [0.0, 0])
        total[0] += x_NI.square().sum(dtype=torch.float64).item()
        total[1] += x_NI.numel()

    wanted = _watch_inputs(model, batches, SUBLN_BEFORE[norms], record)
    if wanted and not sums:
        raise UserError(
            "corpus", expected="at least one block", got="none", do="Give a longer --corpus, or set --refine.gain one."
        )
    return {name: max((total / count) ** 0.5, 1e-8) for name, (total, count) in sums.items()}


@torch.no_grad()
def calibrate_inputs(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], norms: str = "two", subln_eps: float | None = None
) -> dict[str, InputStatistics]:
    """What each projection will be given, for the quantizers that look at their inputs: all unpadded tokens.

    Where a SubLN will stand in front, tokens are divided by their RMS first. (Its gain is one number: it changes nothing.)

    Args:
        model: the full-precision model, before `refine`. batches, norms, subln_eps: as in `calibrate_gains` and `refine`.

    Returns: layer name -> statistics; layers that are given the same tensor share one. I^2 numbers for each of them.

    Raises:
        UserError: no batches.
    """
    eps = model.config.rms_norm_eps if subln_eps is None else subln_eps
    found: dict[str, InputStatistics] = {}
    first_of = {name: group[0] if norms != "all" else name for group in SIBLINGS for name in group}

    def record(name: str, x_NI: Tensor) -> None:
        if name.rpartition(".")[2] in SUBLN_BEFORE[norms]:
            x_NI = x_NI * torch.rsqrt(x_NI.square().mean(dim=-1, keepdim=True) + eps)
        statistics = InputStatistics.of(x_NI)
        if name in found:
            found[name].add(statistics)
        else:
            found[name] = statistics

    watched = [name for name in PROJECTIONS if first_of.get(name, name) == name]
    _watch_inputs(model, batches, watched, record)
    if not found:
        raise UserError("corpus", expected="at least one block", got="none", do="Give a longer --corpus.")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    result = {}
    for name in names:
        parent, dot, projection = name.rpartition(".")
        if projection in PROJECTIONS:
            result[name] = found[f"{parent}{dot}{first_of.get(projection, projection)}"]
    return result


def _watch_inputs(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    projections: Iterable[str],
    record: Callable[[str, Tensor], None],
) -> list[str]:
    """Runs the model, and hands each projection's unpadded inputs, fp32 (..., I), to `record` with the layer's name."""
    mask_now: list[Tensor | None] = [None]

    def hook_of(name):
        def hook(_module, args):
            x = args[0].float()
            record(name, x[mask_now[0].bool()] if mask_now[0] is not None else x.flatten(0, -2))

        return hook

    wanted = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in projections
    }
    handles = [module.register_forward_pre_hook(hook_of(name)) for name, module in wanted.items()]
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    for batch in batches:
        batch = {key: value.to(device) for key, value in batch.items() if key in ("input_ids", "attention_mask")}
        mask_now[0] = batch.get("attention_mask")
        model(**batch)
    model.train(training)
    for handle in handles:
        handle.remove()
    return list(wanted)
