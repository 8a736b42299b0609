"""What the BitLinears of a model compute once and use several times, on the kernels: three caches, which are never stale.

**Ternary codes of the weights** are kept as long as the weights do not change: for all micro-steps of an optimizer step,
for the recomputation of checkpointed layers, and for a whole evaluation. The caller who knows that they do not change says
so:

    codes = WeightCodes(model)
    with codes.hold(step): ...          # every weight is quantized once, all in one launch

A layer uses held codes only inside such a block. At every use it checks whether they still belong to its weight:

    written in place, load_state_dict          the tensor's version counter has moved
    `.data` replaced, moved, ZeRO-3 released   the storage or shape is another; the old storage is kept alive by the held
                                               codes, so that its address cannot be handed out again meanwhile
    an optimizer step                          torch calls a hook before every step of every optimizer, which ends the
                                               life of all held codes; DeepSpeed's copies into `.data`, which no version
                                               counter sees, follow such a step
    another `step`                             quantized again

What this cannot notice is code that writes into `.data` without an optimizer, inside the block or between two blocks with
the same step. The trainer opens the block around its training step, with the number of finished optimizer steps. For
parameters that ZeRO-3 has divided, the ranks gather the codes, once per optimizer step (divided_codes.py). Codes that do
not belong to the weight are not an error: the layer quantizes its weight itself. Each step has buffers of its own, so a
graph that is still alive keeps the codes it was made with.

**int8 codes of an input** that several layers read (q, k, v; gate, up). They are stored with the storage of that input, so
that they cannot outlive it, and are released when the last sibling has taken them. They are valid for the same view of the
same storage at the same version. Under ZeRO-3 each layer receives an alias of the input; the storage is what the aliases
have in common.

**The outputs of siblings**: q, k and v come from one product, inside a block as above (never under ZeRO-3, where each layer is
given an alias of the input, on which the other's outputs would not be found). The first
sibling that is called computes all of them, and stores the others' as an attribute of the input tensor, with which they are
freed.

torch.compile sees none of this: a compiled layer quantizes for itself, and equal operations are merged by the compiler.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bitdistill.kernels.views import concatenate
from bitdistill.student.backend import kernels_for
from bitdistill.student.divided_codes import can_travel, gather_codes, stand_in, standing_in

_ATTRIBUTE = "_bitdistill_shares"


class _Steps:
    """Optimizer steps that this process has begun."""

    begun = 0


@functools.cache
def _count_steps() -> None:
    def count(*_):
        _Steps.begun += 1

    register_optimizer_step_pre_hook(count)


@dataclass(frozen=True, eq=False)
class HeldCodes:
    """The ternary codes of one weight, and what the weight was when they were made."""

    codes: tuple[Tensor, ...]  # the kernels' own, from `ternarize_each`; (codes, scale) of a layer that runs in PyTorch
    weight: Tensor  # an alias of it, which keeps its storage alive
    version: int
    steps: int

    def belong_to(self, weight: Tensor) -> bool:
        """Whether they are still the codes of this weight."""
        return (
            self.steps == _Steps.begun
            and self.version == weight._version
            and self.weight.data_ptr() == weight.data_ptr()
            and self.weight.shape == weight.shape
            and self.weight.stride() == weight.stride()
        )


class WeightCodes:
    """The ternary codes of a model's BitLinears.

    Args:
        model: any module; its BitLinears are found by their attribute `held`.
        divided: whether the codes of weights that ZeRO 3 has divided are gathered; else DeepSpeed gathers the weights.
    """

    def __init__(self, model: nn.Module, divided: bool = True):
        _count_steps()
        self.divided = divided
        self._stand_ins: dict[nn.Parameter, Tensor] = {}
        self._layers = [module for module in model.modules() if hasattr(module, "held")]
        self._held: list[HeldCodes | None] = []
        self._step: object = None

    @contextlib.contextmanager
    def hold(self, step: object = None) -> Iterator[None]:
        """Inside, the weights do not change, or by an optimizer only; see above.

        Args:
            step: blocks with an equal one share their codes; None is equal to nothing.
        """
        current = self._held and self._held_steps() == _Steps.begun
        if step is None or step != self._step or not current:
            self._held = []  # free the old codes before the new ones are made
            self._held = self._quantize()
            self._step = step
        before = [layer.held for layer in self._layers]
        for layer, held in zip(self._layers, self._held, strict=True):
            layer.held = held
        try:
            with standing_in(list(self._stand_ins), list(self._stand_ins.values())):
                yield
        finally:
            for layer, held in zip(self._layers, before, strict=True):
                layer.held = held
            if step is None:
                self._held = []

    def _held_steps(self) -> int:
        return next((held.steps for held in self._held if held is not None), _Steps.begun)

    def _quantize(self) -> list[HeldCodes | None]:
        """Of every layer whose weight is whole and on a device with kernels; in the order of the model, so that siblings
        lie side by side. Of a layer that runs in PyTorch only where its quantizer is slow."""
        result = self._gathered() if self.divided else [None] * len(self._layers)
        kinds: dict[tuple, list[int]] = {}
        for place, layer in enumerate(self._layers):
            weight = layer.weight
            whole = not hasattr(weight, "ds_id") and weight.numel() > 0 and weight.is_contiguous()
            if layer.on_reference():
                if layer.quantizer.slow and whole and not weight.is_inference():
                    result[place] = HeldCodes(layer.codes(), weight.detach(), weight._version, _Steps.begun)
                continue
            if kernels_for(weight.device) is not None and whole and not weight.is_inference():
                kinds.setdefault((weight.device, weight.dtype, layer.quantizer.columns(layer)), []).append(place)
        for (device, _, columns), places in kinds.items():
            weights = [self._layers[place].weight.detach() for place in places]
            ternary = kernels_for(device).ternarize_each(weights, columns)
            for place, weight, codes in zip(places, weights, ternary, strict=True):
                result[place] = HeldCodes(codes, weight, weight._version, _Steps.begun)
        return result

    def _gathered(self) -> list[HeldCodes | None]:
        """Of every layer whose weight is divided among the ranks."""
        result: list[HeldCodes | None] = [None] * len(self._layers)
        places = [place for place, layer in enumerate(self._layers) if can_travel(layer)]
        weights = [self._layers[place].weight for place in places]
        if self._stand_ins.keys() != set(weights):
            self._stand_ins = {weight: stand_in(weight) for weight in weights}
        if places:
            kernels = kernels_for(weights[0].device)
            for place, weight, codes in zip(places, weights, gather_codes(weights), strict=True):
                shape = self._stand_ins[weight]
                result[place] = HeldCodes(kernels.as_ternary(*codes), shape, weight._version, _Steps.begun)
        return result


class _Split(torch.autograd.Function):
    """``y.split(sizes, dim=-1)``, whose backward copies nothing where the gradients lie side by side already."""

    @staticmethod
    def forward(ctx, y, sizes):
        return y.split(sizes, dim=-1)

    @staticmethod
    def backward(ctx, *gradients):
        return concatenate(gradients, gradients[0].dim() - 1), None


@dataclass
class _Shares:
    """Outputs left on an input tensor."""

    key: tuple
    outputs: dict[int, Tensor]


class Siblings:
    """Layers without SubLN that are given the same tensor.

    Args:
        layers: 2 or 3 BitLinears of one in_features and one act_scale, all with a bias or all without.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        assert 2 <= len(layers) <= 3
        assert all(layer.subln is None for layer in layers)
        assert len({(layer.in_features, layer.bias is None, layer.act_scale) for layer in layers}) == 1
        self.layers = tuple(layers)

    def output(self, layer: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """`layer`'s output for x out of one product of all siblings; None where they cannot have one."""
        held = [sibling.held for sibling in self.layers]
        if hasattr(layer.weight, "ds_id"):
            return None
        fit = all(h is not None and h.belong_to(s.weight) for h, s in zip(held, self.layers, strict=True))
        if not fit or x.is_inference():
            return None
        place = self.layers.index(layer)
        key = (self, x._version, dtype, torch.is_grad_enabled(), layer.backward, *held)
        shares = getattr(x, _ATTRIBUTE, None)
        if shares is None or shares.key != key or place not in shares.outputs:
            kernels = kernels_for(x.device)
            biases = [sibling.bias for sibling in self.layers if sibling.bias is not None]
            weights = [sibling.weight for sibling in self.layers]
            codes = kernels.stacked([h.codes for h in held])
            activation = kernels.quantize_input(x, layer.act_scale)
            y = kernels.ternary_linear(x, activation, weights, biases, codes, dtype, layer.backward)
            outputs = _Split.apply(y, [sibling.out_features for sibling in self.layers])
            shares = _Shares(key, dict(enumerate(outputs)))
            setattr(x, _ATTRIBUTE, shares)
        output = shares.outputs.pop(place)
        if not shares.outputs:
            delattr(x, _ATTRIBUTE)
        return output

    def input_codes(self, layer: nn.Module, x: Tensor):
        """The int8 codes of x, made for the sibling that is called first and kept until the last has taken them."""
        kernels = kernels_for(x.device)
        if x.is_inference():
            return kernels.quantize_input(x, layer.act_scale)
        storage = x.untyped_storage()
        key = (self, x.dtype, x.storage_offset(), x.shape, x.stride(), x._version)
        kept = getattr(storage, _ATTRIBUTE, None)
        if kept is None or kept[0] != key or layer not in kept[2]:
            kept = (key, kernels.quantize_input(x, layer.act_scale), set(self.layers))
            setattr(storage, _ATTRIBUTE, kept)
        kept[2].discard(layer)
        if not kept[2]:
            delattr(storage, _ATTRIBUTE)
        return kept[1]
