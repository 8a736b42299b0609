"""Annealing into ternary: how far a stage has gone from full precision (0) to quantized (1), as a function of its steps.

    annealing = clip((step / max_steps - start) / (end - start), 0, 1)          step: optimizer steps done before this one

student/annealed.py says what a value in between means for a layer. If `start` equals `end`, the value jumps from 0 to 1:
full precision for that share of the steps, quantized training for the rest. It depends on the step alone, so a resumed run
continues exactly.

Source: Hugging Face, "Fine-tuning LLMs to 1.58bit" (linear); ParetoQ, arXiv 2502.02631 (the jump, at 0.9); Hestia, arXiv
2601.20745 (softmax).
"""

from torch import nn
from transformers import TrainerCallback

from bitdistill.student.layers import bit_linears


def annealing_at(step: int, max_steps: int, start: float, end: float) -> float:
    """The schedule above.

    Args:
        step: optimizer steps done before this one. max_steps: of the stage.
        start, end: shares of max_steps, 0 <= start <= end < 1.

    Returns: 0 (full precision) to 1 (quantized).
    """
    share = step / max_steps
    if share >= end:
        return 1.0
    return max(0.0, (share - start) / (end - start)) if share > start else 0.0


def set_annealing(model: nn.Module, kind: str, value: float) -> None:
    """Sets how every BitLinear of a model computes: see `BitLinear.annealing`."""
    layers = bit_linears(model).values()
    assert layers, "annealing needs a refined model"
    for layer in layers:
        layer.annealing_kind, layer.annealing = kind, value


class Annealing(TrainerCallback):
    """Sets the value before each optimizer step, and 1 when training ends.

    Args:
        kind: "linear" or "softmax". start, end: as in `annealing_at`.

    Attributes:
        value: that of the step that runs, or of the last one that ran.
    """

    def __init__(self, kind: str, start: float, end: float):
        assert kind in ("linear", "softmax"), kind
        assert 0 <= start <= end < 1, (start, end)
        self.kind, self.start, self.end = kind, start, end
        self.value = 0.0

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.value = annealing_at(state.global_step, state.max_steps, self.start, self.end)
        set_annealing(model, self.kind, self.value)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        set_annealing(model, self.kind, 1.0)
