"""Is the ternary student alive? Zeros, flips and scales of each BitLinear while it trains, and weight histograms.

zeros         share of codes that are 0 (about a third at a Gaussian start; towards 1 the layer is dying)
flips         share of codes that changed in one optimiser step (0 for long: masters are frozen)
weight_scale  absmean
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from bitdistill.kernels.reference import quantize_weight, weight_scale
from bitdistill.layers import bit_linears

HISTOGRAM_EDGES = torch.linspace(-4, 4, 161)


def _full_weights(model: nn.Module):
    """(name, whole fp32 weight) of every BitLinear, gathered one at a time under ZeRO-3."""
    for name, layer in bit_linears(model).items():
        if hasattr(layer.weight, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([layer.weight]):
                yield name, layer.weight.detach()
        else:
            yield name, layer.weight.detach()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """The int8 codes of every BitLinear, on the CPU."""
    return {name: quantize_weight(weight)[0].cpu() for name, weight in _full_weights(model)}


def measure(model: nn.Module, before: dict[str, Tensor] | None = None) -> dict[str, dict[str, float]]:
    """zeros, weight_scale and, against a snapshot of one step ago, flips, by layer name."""
    layers = {}
    for name, weight in _full_weights(model):
        codes, scale = quantize_weight(weight)
        layers[name] = {"zeros": (codes == 0).float().mean().item(), "weight_scale": scale.item()}
        if before is not None:
            layers[name]["flips"] = (codes.cpu() != before[name]).float().mean().item()
    return layers


def weight_histograms(state: dict[str, Tensor], names: list[str]) -> dict[str, Any]:
    """Histograms of ``W / weight_scale`` over [-4, 4] for the report: the ternary boundaries lie at -0.5 and 0.5.

    Args:
        state: full tensors by key. names: layer names whose `.weight` is wanted.

    Returns: {"edges": [...], "layers": {name: {"counts", "weight_scale", "zeros"}}}; values beyond 4 count in the last bin.
    """
    layers = {}
    for name in names:
        weight = state[f"{name}.weight"].detach().float().cpu()
        scale = weight_scale(weight)
        units = (weight / scale).flatten()
        counts = torch.histc(units.clamp(-3.9999, 3.9999), bins=len(HISTOGRAM_EDGES) - 1, min=-4, max=4)
        zeros = (torch.round(units) == 0).float().mean().item()
        layers[name] = {"counts": counts.int().tolist(), "weight_scale": scale.item(), "zeros": zeros}
    return {"edges": [round(edge, 6) for edge in HISTOGRAM_EDGES.tolist()], "layers": layers}


class HealthLog(TrainerCallback):
    """Appends a line to health.jsonl every `every` steps. All ranks measure (ZeRO-3 gathers), the main one writes."""

    def __init__(self, path: Path, stage: str, every: int):
        self.path, self.stage, self.every = path, stage, every
        self.before: dict[str, Tensor] | None = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        step = state.global_step
        if (step + 1) % self.every == 0:
            self.before = snapshot(model)
        elif step % self.every == 0:
            layers = measure(model, self.before)
            self.before = None
            if state.is_world_process_zero:
                with self.path.open("a") as file:
                    file.write(json.dumps({"stage": self.stage, "step": step, "layers": layers}) + "\n")
