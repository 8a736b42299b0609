"""Checks the config of a packed file before a runtime uses it: types, ranges, and whether its parts fit together.

The checksums detect what was damaged. These checks detect what was written by something else, or edited and given new
checksums.
"""

import math
from typing import Any

from bitdistill.kernels import packing as layout
from bitdistill.names import LAYER_NORMS

LARGEST = 2**31  # of any count or width
COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
NUMBERS = ("rms_norm_eps", "attention_scale", "embedding_scale")
CHOICES = {
    "model_type": ("llama", "qwen2", "qwen3", "gemma3_text"),
    "activation": ("silu", "gelu_pytorch_tanh"),
    "packing": tuple(layout.PACKINGS),
    "embedding": tuple(layout.TABLE_FORMATS),
}


def config_problem(fields: Any) -> str | None:
    """What is wrong with the JSON object of a config, or None.

    Args:
        fields: as json.loads gives it; may be anything.
    """
    if not isinstance(fields, dict):
        return "a config that is no object"
    for name in COUNTS:
        if not _is_count(fields.get(name), 1):
            return f"{name} {_short(fields.get(name))}"
    for name in NUMBERS:
        value = fields.get(name)
        if type(value) not in (int, float) or not math.isfinite(value):
            return f"{name} {_short(value)}"
    for name, choices in CHOICES.items():
        if fields.get(name) not in choices:
            return f"{name} {_short(fields.get(name))}"
    if not _has_known_scales(fields):
        return f"weight_scale {_short(fields.get('weight_scale'))}, group_size {_short(fields.get('group_size'))}"
    if fields.get("act_scale", "token") not in ("token", "block"):
        return f"act_scale {_short(fields['act_scale'])}"
    if type(fields.get("tied")) is not bool or not _is_count(fields.get("tokenizer_bytes"), 0):
        return "tied or tokenizer_bytes of another type"
    return _layers_problem(fields) or _linears_problem(fields) or _norms_problem(fields)


def _has_known_scales(fields: dict) -> bool:
    kind, size = fields.get("weight_scale", "tensor"), fields.get("group_size")
    return _is_count(size, 1) if kind == "group" else kind in ("tensor", "row") and size is None


def _layers_problem(fields: dict) -> str | None:
    layers, rope, window, ends = (fields.get(n) for n in ("num_hidden_layers", "rope", "window", "eos_token_ids"))
    if fields["num_attention_heads"] % fields["num_key_value_heads"] or fields["head_dim"] % 2:
        return "heads that cannot share keys, or an odd head_dim"
    if not isinstance(rope, list) or len(rope) != layers or not all(isinstance(kind, str) for kind in rope):
        return f"rope {_short(rope)} for {layers} layers"
    if not isinstance(window, list) or len(window) != layers or not all(w is None or _is_count(w, 1) for w in window):
        return f"window {_short(window)} for {layers} layers"
    if not isinstance(ends, list) or not all(_is_count(end, 0) for end in ends):
        return f"eos_token_ids {_short(ends)}"
    return None


def _linears_problem(fields: dict) -> str | None:
    linears = fields.get("linears")
    if not isinstance(linears, dict) or not all(isinstance(linear, dict) for linear in linears.values()):
        return "linears that are no objects"
    hidden, head = fields["hidden_size"], fields["head_dim"]
    queries, keys = fields["num_attention_heads"] * head, fields["num_key_value_heads"] * head
    gate = linears.get("model.layers.0.mlp.gate_proj", {})
    wide = gate.get("out_features")
    shapes = {"self_attn.q": (queries, hidden), "self_attn.k": (keys, hidden), "self_attn.v": (keys, hidden)}
    shapes |= {"self_attn.o": (hidden, queries), "mlp.gate": (wide, hidden), "mlp.up": (wide, hidden)}
    shapes |= {"mlp.down": (hidden, wide)}
    if not _is_count(wide, 1):
        return f"an MLP of width {_short(wide)}"
    if len(linears) != len(shapes) * fields["num_hidden_layers"]:
        return f"{len(linears)} linears for {fields['num_hidden_layers']} layers"
    for index in range(fields["num_hidden_layers"]):
        for part, shape in shapes.items():
            linear = linears.get(f"model.layers.{index}.{part}_proj", {})
            eps = linear.get("subln_eps")
            right = (linear.get("out_features"), linear.get("in_features")) == shape
            right = right and {type(linear.get("bias")), type(linear.get("input_scale", False))} == {bool}
            if not right or not (eps is None or (type(eps) in (int, float) and math.isfinite(eps))):
                return f"model.layers.{index}.{part}_proj {_short(linear)}"
    return None


def _norms_problem(fields: dict) -> str | None:
    norms, layers = fields.get("norms"), fields["num_hidden_layers"]
    gemma = fields["model_type"] == "gemma3_text"
    needed = LAYER_NORMS[:4] if gemma else LAYER_NORMS[:2]
    names = {f"model.layers.{index}.{norm}" for index in range(layers) for norm in needed} | {"model.norm"}
    heads = {f"model.layers.{index}.{norm}" for index in range(layers) for norm in LAYER_NORMS[4:]}
    if not isinstance(norms, dict) or not names <= norms.keys() <= names | heads:
        return "norms of another model"
    wrong = [name for name, width in norms.items() if width != fields["head_dim" if name in heads else "hidden_size"]]
    return f"{wrong[0]} of width {_short(norms[wrong[0]])}" if wrong else None


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < LARGEST


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
