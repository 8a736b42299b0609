"""Is the ternary student healthy? What each BitLinear did in one optimizer step, measured every `health_steps` steps.

of the codes    minus, zeros, plus   shares of -1, 0 and +1 (at a Gaussian start about a third each)
                flips                share of codes that the step changed
                weight_scale         of several scales the mean; scale_drift: over its value at the start of the stage
of the input    peak_to_rms          max|x| / RMS(x) of a token, of what the int8 quantizer gets (after SubLN): median over
                                     the tokens; peak_to_rms_max: the largest
                zero_activations     share of int8 codes that are 0
of the rest     output_rms           of the layer's output, bias included
                grad_norm            L2 norm of the gradient that reaches the fp32 master

A measurement is part of an ordinary step. It takes the codes before and after the step, and what hooks see during it on
rank 0's first micro-batch (at most SAMPLED_TOKENS of its unpadded tokens, evenly spaced), so that accumulation and
recomputed layers neither cost nor count twice. grad_norm is that of this micro-batch, not of the whole step: it serves to
compare layers, and where it is zero the gradient is zero. Hooks change nothing that the model computes: the input of
down_proj, which does not exist by itself on a GPU (layers.Gated), is computed a second time from the outputs of gate_proj
and up_proj.

Cost: on a CPU a fifth of a step with a micro-batch of 1,024 tokens (hooks 0.13, codes before and after 0.07), so 0.4 % of
the time at the usual 50 steps; rank 0 keeps the int8 codes of the model in its main memory for one step.

diagnosis.py judges these numbers; its warnings are printed and kept in RUN/warnings.jsonl.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from bitdistill.distributed import process_group
from bitdistill.files import append_line, write_whole
from bitdistill.kernels.reference import quantize_activation, rms_norm, weight_scale
from bitdistill.student.layers import BitLinear, GatedMLP, bit_linears
from bitdistill.training.diagnosis import Diagnosis, Finding

HISTOGRAM_EDGES = torch.linspace(-4, 4, 161)
SAMPLED_TOKENS = 4096
START_FILE = "health_start.json"


def _whole_layers(model: nn.Module) -> Iterator[tuple[str, BitLinear]]:
    """Every BitLinear by its name; under ZeRO-3 its weight and its SubLN's gain are whole while it is its turn."""
    for name, layer in bit_linears(model).items():
        if hasattr(layer.weight, "ds_id"):
            import deepspeed

            gain = [] if layer.subln is None else [layer.subln.weight]
            with deepspeed.zero.GatheredParameters([layer.weight, *gain]):
                yield name, layer
        else:
            yield name, layer


def take_part(model: nn.Module) -> None:
    """What the other ranks do while rank 0 measures: gather with it, where ZeRO-3 gathers."""
    for _ in _whole_layers(model):
        pass


@torch.no_grad()
def scales(model: nn.Module) -> dict[str, float]:
    """weight_scale of every BitLinear."""
    return {name: layer.watched()[1].item() for name, layer in _whole_layers(model)}


@torch.no_grad()
def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(int8 codes of every BitLinear, on the CPU; gains of every SubLN in front of one), by layer name."""
    codes, gains = {}, {}
    for name, layer in _whole_layers(model):
        codes[name] = layer.watched()[0].cpu()
        if layer.subln is not None:
            gains[name] = layer.subln.weight.detach().clone()
    return codes, gains


@torch.no_grad()
def measure(
    model: nn.Module, before: dict[str, Tensor] | None = None, start: dict[str, float] | None = None
) -> dict[str, dict[str, float]]:
    """What the weights say, by layer name.

    Args:
        model: refined; under ZeRO-3 every rank calls this.
        before: the codes of one step ago, for `flips`. start: `scales` at the start of the stage, for `scale_drift`.

    Returns: {name: {"minus", "zeros", "plus", "weight_scale", "flips", "scale_drift"}}.
    """
    layers = {}
    for name, layer in _whole_layers(model):
        codes, scale = layer.watched()
        counts = torch.stack([(codes == code).sum() for code in (-1, 0, 1)]).tolist()
        minus, zeros, plus = (count / codes.numel() for count in counts)
        layers[name] = {"minus": minus, "zeros": zeros, "plus": plus, "weight_scale": scale.item()}
        if before is not None:
            layers[name]["flips"] = (codes.cpu() != before[name]).float().mean().item()
        if start is not None:
            layers[name]["scale_drift"] = scale.item() / start[name]
    return layers


class Probe:
    """Watches the activations and the gradients of one step, from its making until `read`, on the rank that makes it.

    Args:
        model: the model inside whatever DeepSpeed wraps around it; called with attention_mask (B, T) by name, or without.
        gains: SubLN gains by layer name, whole (`snapshot`); they stand still until the optimizer moves.
    """

    def __init__(self, model: nn.Module, gains: dict[str, Tensor]):
        self._gains, self._mask = gains, None
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._handles: list[Any] = [model.register_forward_pre_hook(self._note_mask, with_kwargs=True)]
        gated = {id(mlp.down_proj): mlp for mlp in model.modules() if isinstance(mlp, GatedMLP)}
        for name, layer in bit_linears(model).items():
            if layer.weight.requires_grad:
                self._handles.append(layer.weight.register_hook(partial(self._note_gradient, name)))
            if id(layer) in gated:
                self._watch_gated(name, layer, gated[id(layer)])
            else:
                self._handles.append(layer.register_forward_hook(partial(self._note_layer, name)))

    def read(self) -> dict[str, dict[str, float]]:
        """Takes the hooks away. Returns what was seen by layer name; keys that were not seen (no token, no gradient) are
        absent."""
        for handle in self._handles:
            handle.remove()
        result: dict[str, dict[str, float]] = {}
        for keys, seen in (
            (("peak_to_rms", "peak_to_rms_max", "zero_activations"), self._inputs),
            (("output_rms",), self._outputs),
            (("grad_norm",), self._gradients),
        ):
            rows = torch.stack(list(seen.values())).tolist() if seen else []  # one wait for the device
            for name, row in zip(seen, rows, strict=True):
                result.setdefault(name, {}).update(zip(keys, row, strict=True))
        return result

    def _note_mask(self, _module, _args, kwargs) -> None:
        mask = kwargs.get("attention_mask")
        self._mask = None if mask is None else mask.bool()

    def _note_layer(self, name: str, layer: BitLinear, args: tuple, output: Tensor) -> None:
        if name not in self._outputs:
            self._note(name, layer, args[0], output)

    def _watch_gated(self, name: str, layer: BitLinear, mlp: GatedMLP) -> None:
        made: dict[str, Tensor] = {}

        def keep(which: str, _module, _args, output: Tensor) -> None:
            if name not in self._outputs:
                made[which] = output.detach()

        def note(_module, _args, output: Tensor) -> None:
            if name not in self._outputs:
                # .forward: its hooks are ZeRO-3's, which would take this call for a step of the model that other ranks lack
                self._note(name, layer, mlp.act_fn.forward(made.pop("gate")) * made.pop("up"), output)

        self._handles.append(mlp.gate_proj.register_forward_hook(partial(keep, "gate")))
        self._handles.append(mlp.up_proj.register_forward_hook(partial(keep, "up")))
        self._handles.append(mlp.register_forward_hook(note))

    @torch.no_grad()
    def _note(self, name: str, layer: BitLinear, x: Tensor, output: Tensor) -> None:
        x_NI, output_NO = (self._sampled(tensor) for tensor in (x, output))
        if layer.subln is not None:
            x_NI = rms_norm(x_NI, self._gains[name], layer.subln.eps)
        self._outputs[name] = output_NO.float().square().mean(dtype=torch.float64).sqrt()[None]
        if len(x_NI):
            self._inputs[name] = outliers(x_NI)

    def _sampled(self, x: Tensor) -> Tensor:
        """The rows of (B, T, ...) that are measured, (N, ...)."""
        rows = x.flatten(0, -2)
        if self._mask is not None:
            assert self._mask.shape == x.shape[:-1], (self._mask.shape, x.shape)
            rows = rows[self._mask.flatten()]
        return rows[:: max(1, -(-len(rows) // SAMPLED_TOKENS))]

    def _note_gradient(self, name: str, gradient: Tensor) -> None:
        if name not in self._gradients:
            self._gradients[name] = gradient.detach().float().square().sum(dtype=torch.float64).sqrt()[None]


def outliers(x_NI: Tensor) -> Tensor:
    """How much of the int8 range single channels take.

    Args:
        x_NI: what the int8 quantizer gets, N tokens, any float dtype.

    Returns: fp64 (3,): the median over the tokens of ``max|x| / sqrt(mean(x^2))`` (the lower one of an even number), its
        maximum, and the share of int8 codes that are 0. A token of zeros has a ratio of 0.
    """
    x_NI = x_NI.float()
    rms_N = x_NI.square().mean(dim=-1).sqrt()
    ratio_N = x_NI.abs().amax(dim=-1) / torch.where(rms_N > 0, rms_N, 1.0)
    zero = (quantize_activation(x_NI)[0] == 0).float().mean()
    return torch.stack([ratio_N.median(), ratio_N.max(), zero]).double()


def weight_histograms(state: dict[str, Tensor], names: list[str]) -> dict[str, Any]:
    """Histograms of ``W / absmean(W)`` over [-4, 4] for the report: absmean rounds at -0.5 and 0.5.

    Args:
        state: full tensors by key. names: layer names whose `.weight` is wanted.

    Returns: {"edges": [...], "layers": {name: {"counts", "weight_scale"}}}; values beyond 4 count in the last bin.
    """
    layers = {}
    for name in names:
        weight = state[f"{name}.weight"].detach().float().cpu()
        scale = weight_scale(weight)
        units = (weight / scale).flatten()
        counts = torch.histc(units.clamp(-3.9999, 3.9999), bins=len(HISTOGRAM_EDGES) - 1, min=-4, max=4)
        layers[name] = {"counts": counts.int().tolist(), "weight_scale": scale.item()}
    return {"edges": [round(edge, 6) for edge in HISTOGRAM_EDGES.tolist()], "layers": layers}


class HealthLog(TrainerCallback):
    """Appends a line to health.jsonl every `every` steps, and what is wrong to warnings.jsonl, the first time it is.

    All ranks take part where ZeRO-3 gathers; rank 0 alone hooks, judges and writes. After a resume the kept lines are
    judged again, silently, and the scales of the stage's start are read back from the checkpoints' folder.

    Args:
        path: RUN/health.jsonl; metrics.jsonl and warnings.jsonl lie beside it. stage: its name. every: steps.
        guessing: the cross-entropy of guessing, where labels are learned.
    """

    def __init__(self, path: Path, stage: str, every: int, guessing: float | None = None):
        self.path, self.stage, self.every, self.guessing = path, stage, every, guessing
        self.start: dict[str, float] = {}
        self.before: dict[str, Tensor] | None = None
        self.probe: Probe | None = None
        self.learning_rate = 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not state.is_world_process_zero:
            take_part(model)
            return
        self.start = scales(model)
        layers = bit_linears(model)
        self.diagnosis = Diagnosis(
            args.learning_rate,
            {name: layer.in_features * layer.out_features for name, layer in layers.items()},
            self.guessing,
        )
        start = Path(args.output_dir) / START_FILE
        if state.global_step == 0:
            start.parent.mkdir(parents=True, exist_ok=True)
            write_whole(start, json.dumps(self.start))
        elif start.is_file():
            self.start = json.loads(start.read_text(encoding="utf-8"))
        else:
            process_group.say(f"{self.stage}: {start.name} is gone; scale_drift counts from step {state.global_step}")
        for line in self._kept(self.path, state.global_step):
            self.diagnosis.measured(line)
        for line in self._kept(self.path.with_name("metrics.jsonl"), state.global_step):
            self.diagnosis.logged(line, progress=line["step"] / state.max_steps)

    def _kept(self, path: Path, last_step: int) -> list[dict]:
        """This stage's lines up to the step that a resumed run goes on from."""
        lines = []
        for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() and last_step else []:
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue  # the half-written last line of a killed run
        return [line for line in lines if line["stage"] == self.stage and line["step"] <= last_step]

    def on_step_begin(self, args, state, control, model=None, lr_scheduler=None, **kwargs):
        if (state.global_step + 1) % self.every:
            return
        if not state.is_world_process_zero:
            take_part(model)
            return
        self.before, gains = snapshot(model)
        self.probe = Probe(model, gains)
        self.learning_rate = lr_scheduler.get_last_lr()[0]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every:
            return
        if not state.is_world_process_zero:
            take_part(model)
            return
        layers = measure(model, self.before, self.start)
        for name, seen in self.probe.read().items():
            layers[name] |= seen
        self.before = self.probe = None
        line = {"stage": self.stage, "step": state.global_step, "learning_rate": self.learning_rate, "layers": layers}
        self._append(self.path, line)
        self._warn(self.diagnosis.measured(line))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs and "loss" in logs:
            line = {"step": state.global_step, **logs}
            self._warn(self.diagnosis.logged(line, progress=state.global_step / state.max_steps))

    def _warn(self, findings: list[Finding]) -> None:
        for finding in findings:
            line = finding.line(self.stage)
            process_group.say(
                f"{self.stage}: WARNING at step {finding.step:,}, {finding.kind}: {line['seen']}. {line['do']}"
            )
            self._append(self.path.with_name("warnings.jsonl"), line)

    @staticmethod
    def _append(path: Path, line: dict) -> None:
        append_line(path, json.dumps(line))
