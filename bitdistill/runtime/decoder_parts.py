"""What both decoders (kernels/cpu, kernels/gpu) take from a packed file under the same names: the norms of a layer, and the
numbers of a model."""

from typing import Any

import numpy as np

from bitdistill.names import LAYER_NORMS
from bitdistill.runtime.packed_file import Config, PackedModel


def layer_norms(packed: PackedModel, index: int) -> dict[str, np.ndarray | None]:
    """The gains of a decoder layer's norms, under the decoders' names; None for those that the family does not have.

    Gemma has two more norms than the other families, one after attention and one after the MLP. Its norm before the MLP
    therefore has another name in the file.
    """
    gain = {norm: packed.tensors.get(f"model.layers.{index}.{norm}.gain") for norm in LAYER_NORMS}
    gemma = packed.config.model_type == "gemma3_text"
    return {
        "input_norm": gain["input_layernorm"],
        "q_norm": gain["self_attn.q_norm"],
        "k_norm": gain["self_attn.k_norm"],
        "post_attention_norm": gain["post_attention_layernorm"] if gemma else None,
        "pre_mlp_norm": gain["pre_feedforward_layernorm" if gemma else "post_attention_layernorm"],
        "post_mlp_norm": gain["post_feedforward_layernorm"] if gemma else None,
    }


def model_numbers(config: Config) -> dict[str, Any]:
    """The fields of the decoders' Model that are neither tensors nor layers."""
    names = (
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "activation",
        "attention_scale",
        "embedding_scale",
    )
    return {"eps": config.rms_norm_eps} | {name: getattr(config, name) for name in names}
