"""Q, K and V of chosen decoder layers, without touching modeling code.

transformers lets a model's attention function be chosen by name. Ours, ``bitdistill_capture``, records q, k and v as they
arrive (after their norms and RoPE, k and v before they are repeated for GQA) and then calls the function named "sdpa", that of
transformers or the one of student/attention.py. Its mask function *is* the sdpa one: without it, transformers would pass no mask
at all to an attention function with an unknown name, and padding and Gemma's sliding window would be ignored silently.

    capture = AttentionCapture(student, [-8], require_grad=True)
    with capture:
        logits = student(...).logits
    q_BHTD, k_BGTD, v_BGTD = capture.qkv[-8]

Tensors are recorded only inside the ``with`` block *and* while the decoder's own forward pass runs. So a backward pass that
recomputes checkpointed layers inside the block records nothing, a teacher and a student can be captured in one step, and
outside the block the model is an ordinary sdpa model.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitdistill.errors import UserError

ATTENTION_NAME = "bitdistill_capture"
_SLOT = "_bitdistill_capture"  # attribute of an attention module while it is watched: (its AttentionCapture, its name)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    capture, layer = getattr(module, _SLOT, (None, None))
    if capture is not None:
        query, key, value = capture._note(layer, query, key, value)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


class AttentionCapture:
    """Watches some layers of one model. From now on the model attends through sdpa, bit for bit.

    Args:
        model: a Hugging Face causal language model of the families Llama, Qwen2, Qwen3 or Gemma3 (text). Under
            DeepSpeed: the model inside the engine; the engine may run it.
        layers: decoder layers, from 0; negative ones count from the last.
        require_grad: refuse tensors without a graph (the student), instead of training on a loss that does nothing.

    Attributes, of the latest forward inside a ``with`` block, until ``clear`` or the next block:
        qkv: {layer as given: (q_BHTD, k_BGTD, v_BGTD)} in the model's dtype, connected to the graph.
        downstream: the same tensors once more, as the model itself goes on with them. The graph forks here: a gradient that
            reaches ``qkv`` comes from the relations, one that reaches ``downstream`` from everything above.

    Raises:
        UserError: a layer that the model does not have or that is named twice; with ``require_grad``, in the forward
            pass, when q, k and v come without a graph.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int], require_grad: bool = False):
        assert isinstance(model, PreTrainedModel), "pass the Hugging Face model, not the engine around it"
        self._decoder = model.get_decoder()
        count = len(self._decoder.layers)
        for layer in layers:
            if not -count <= layer < count:
                raise UserError(
                    "distill.relation_layers",
                    expected=f"a layer from {-count} to {count - 1}; the model has {count}",
                    got=str(layer),
                    do="Count from 0, or backwards from -1, the last.",
                )
        self._layers = {layer: self._decoder.layers[layer] for layer in layers}
        if not layers or len({layer % count for layer in layers}) != len(layers):
            raise UserError(
                "distill.relation_layers",
                expected="one or more layers, each named once",
                got=str(list(layers)),
                do=f"Name each layer once: -1 and {count - 1} are the same.",
            )
        self._require_grad = require_grad
        self._running = False
        self._hooks = []
        self.clear()
        model.set_attn_implementation(ATTENTION_NAME)
        assert model.config._attn_implementation == ATTENTION_NAME, f"{type(model).__name__} fixes its own attention"

    def clear(self) -> None:
        """Lets go of the captured tensors."""
        self.qkv: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.downstream: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __enter__(self):
        assert not self._hooks, "already inside this capture"
        taken = [layer for layer, module in self._layers.items() if hasattr(module.self_attn, _SLOT)]
        assert not taken, f"layers {taken} are being captured already"
        for layer, module in self._layers.items():
            setattr(module.self_attn, _SLOT, (self, layer))
        self.clear()
        self._hooks = [
            self._decoder.register_forward_pre_hook(self._start),
            self._decoder.register_forward_hook(self._stop),
        ]
        return self

    def __exit__(self, *exception) -> None:
        self._running = False
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for module in self._layers.values():
            delattr(module.self_attn, _SLOT)

    def _start(self, *_) -> None:
        self.clear()
        self._running = True

    def _stop(self, *_) -> None:
        self._running = False
        assert self.qkv.keys() == self._layers.keys(), f"captured {list(self.qkv)}: were layers dropped or replaced?"

    def _note(self, layer: int, *qkv: Tensor) -> tuple[Tensor, ...]:
        if not self._running:
            return qkv
        if self._require_grad and not all(x.requires_grad for x in qkv):
            off = "" if torch.is_grad_enabled() else " (gradients are switched off)"
            raise ValueError(
                f"q, k and v of the student have no gradient{off}: gradient checkpointing needs use_reentrant=False, and the "
                "student must be neither frozen nor under torch.no_grad"
            )
        self.qkv[layer] = tuple(x.view_as(x) for x in qkv)
        self.downstream[layer] = tuple(x.view_as(x) for x in qkv)
        return self.downstream[layer]


@torch.no_grad()
def attention_maps(model: PreTrainedModel, input_ids: Sequence[int], layer: int) -> np.ndarray:
    """What each head of a layer attends to: ``softmax(Q K^T * scale)``, causal, keys repeated for GQA; for pictures.

    Args:
        model: left as it was. input_ids: T tokens of one text. layer: as in AttentionCapture. A sliding window is drawn
            as if the layer saw everything.

    Returns: float32 (H, T, T), rows sum to 1.
    """
    before, training = model.config._attn_implementation, model.training
    capture = AttentionCapture(model.eval(), [layer])
    with capture:
        model(input_ids=torch.tensor([list(input_ids)], device=model.device), use_cache=False)
    query, key, _ = (x[0].float() for x in capture.qkv[layer])
    key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
    scores = query @ key.transpose(1, 2) * model.get_decoder().layers[layer].self_attn.scaling
    causal = torch.ones_like(scores[0], dtype=torch.bool).tril()
    model.set_attn_implementation(before)
    model.train(training)
    return scores.masked_fill(~causal, -torch.inf).softmax(-1).cpu().numpy()
