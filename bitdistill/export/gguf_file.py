"""A ternary student as one GGUF file for llama.cpp and the programs that use it (Ollama, LM Studio, llamafile).

We write the codes ourselves (gguf_blocks.py), so the file holds exactly the weights that training multiplied by, apart from
the rounding of the scales to fp16. Students without SubLN keep their own architecture (llama, qwen2, qwen3, gemma3).
Students with two norms have a place only in llama.cpp's `bitnet`: these must be like Llama, with a tied head, no bias and
plain RoPE. What llama.cpp would compute differently is refused with the reason; `gguf_obstacles` says so before anything is
trained.

Only activations differ from the student's: llama.cpp rounds them to int8 in blocks of 32 columns (256 for TQ types) and not
per token. export/agreement.py measures what difference that makes.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from bitdistill.errors import UserError
from bitdistill.export.gguf_blocks import AUTO, TYPES, decode_bytes, encode_codes
from bitdistill.export.gguf_metadata import tokenizer_metadata
from bitdistill.files import whole_file
from bitdistill.student.layers import bit_linears

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SUBLN = {"self_attn.o_proj": "attn_sub_norm", "mlp.down_proj": "ffn_sub_norm"}
NORMS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
FFN_NORMS = {"post_attention_layernorm": "ffn_norm"}
GEMMA_FFN_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
FILE_TYPES = {"f16": 1, "q4_0": 2, "q2_k": 10, "tq1_0": 36, "tq2_0": 37, "q2_0": 41}  # llama.cpp's `general.file_type`
EMBEDDINGS = ("f16", "q8_0", "q4_0")


def gguf_obstacles(config, norms: str, subln_eps: float | None = None) -> list[str]:
    """Why a student of this base model and these norms cannot be a GGUF file; an empty list means that it can.

    Args:
        config: the Hugging Face config of the base model.
        norms: refine.norms: none, two or all.
        subln_eps: refine.subln_eps; the model's own rms_norm_eps when absent.
    """
    found = []
    if config.model_type not in ARCHITECTURES:
        return [f"llama.cpp files are written for {', '.join(ARCHITECTURES)} only, not for {config.model_type}"]
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if norms == "all":
        found.append("no llama.cpp architecture has a norm before each of the seven projections; use refine.norms none")
    if norms == "two":
        found += _bitnet_obstacles(config, kind, subln_eps)
    if kind not in ("default", "linear", "llama3") or (kind == "llama3" and config.model_type != "llama"):
        found.append(f"RoPE scaling of kind {kind} is not written for {config.model_type}")
    if getattr(config, "use_sliding_window", False):
        found.append("llama.cpp ignores the sliding window of Qwen models")
    if config.model_type == "gemma3_text":
        found += _gemma_obstacles(config)
    elif config.hidden_act != "silu":
        found.append(f"llama.cpp's {config.model_type} computes SiLU, not {config.hidden_act}")
    return found


def _bitnet_obstacles(config, rope_kind: str, subln_eps: float | None) -> list[str]:
    """Why a student with SubLN does not fit llama.cpp's `bitnet`, the only architecture there that has it."""
    if config.model_type != "llama":
        return [f"no llama.cpp architecture has SubLN for {config.model_type}; use refine.norms none"]
    found = []
    if not config.tie_word_embeddings:
        found.append("llama.cpp's bitnet architecture ties the LM head to the embedding; use refine.norms none")
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        found.append("llama.cpp's bitnet architecture has no biases; use refine.norms none")
    if rope_kind != "default":
        found.append(f"llama.cpp's bitnet architecture has no RoPE scaling ({rope_kind}); use refine.norms none")
    if subln_eps not in (None, config.rms_norm_eps):
        found.append(f"llama.cpp has one eps for all norms ({config.rms_norm_eps}), not refine.subln_eps {subln_eps}")
    return found


def _gemma_obstacles(config) -> list[str]:
    """What llama.cpp's gemma3 takes for granted and this model does otherwise."""
    found = []
    if config.query_pre_attn_scalar != config.head_dim:
        found.append(f"query_pre_attn_scalar {config.query_pre_attn_scalar} differs from head_dim {config.head_dim}")
    pattern = [
        "full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != pattern:
        found.append("layer_types differ from Gemma3's pattern of five sliding layers and a full one")
    local = config.rope_parameters.get("sliding_attention", {})
    if local.get("rope_theta") != 10000.0 or local.get("rope_type", "default") != "default":
        found.append("the RoPE of the sliding layers is not Gemma3's (theta 10,000)")
    return found


def write_gguf(
    path: str | Path,
    model: nn.Module,
    tokenizer,
    *,
    linear_type: str = "auto",
    embedding_type: str = "q8_0",
    name: str = "",
) -> dict[str, Any]:
    """Writes a refined student as a GGUF file, reads it back, and compares every ternary matrix bit for bit.

    Args:
        path: the file; replaced once the new one is whole.
        model: a refined causal language model (torch) with fp32 master weights.
        tokenizer: its transformers tokenizer.
        linear_type: a name of gguf_blocks.TYPES for the ternary matrices, or auto.
        embedding_type: f16, q8_0 or q4_0 for the embedding and an untied LM head.
        name: the model's name in the file.

    Returns: architecture, types (matrices by type), file_bytes, linear_bytes, bits_per_weight, embedding_type.

    Raises:
        UserError: llama.cpp cannot compute what this student computes, or a type does not fit a matrix.
    """
    path = Path(path)
    layers = bit_linears(model)
    subln = {layer.subln is not None for path_, layer in layers.items() if path_.endswith(("o_proj", "down_proj"))}
    every = any(layer.subln is not None for path_, layer in layers.items() if path_.endswith("q_proj"))
    norms = "all" if every else "two" if subln == {True} else "none"
    eps = next((layer.subln.eps for layer in layers.values() if layer.subln is not None), None)
    obstacles = gguf_obstacles(model.config, norms, eps)
    if obstacles:
        raise UserError(
            "format",
            expected="a student that llama.cpp can compute",
            got="; ".join(obstacles),
            do="Train with these settings, or export the packed format.",
        )
    architecture = "bitnet" if norms == "two" else ARCHITECTURES[model.config.model_type]
    matrices, vectors = _tensors(model, layers, architecture, linear_type)
    with whole_file(path) as temporary:
        _write(temporary, model, tokenizer, architecture, matrices, vectors, embedding_type, name or path.stem)
        _compare(temporary, matrices)
    linear_bytes = sum(data.nbytes for data, _, _, _ in matrices.values())
    weights = sum(codes.size for _, _, codes, _ in matrices.values())
    types = [kind for _, kind, _, _ in matrices.values()]
    return {
        "architecture": architecture,
        "types": {kind: types.count(kind) for kind in dict.fromkeys(types)},
        "embedding_type": embedding_type,
        "file_bytes": path.stat().st_size,
        "linear_bytes": linear_bytes,
        "bits_per_weight": 8 * linear_bytes / weights,
    }


def _tensors(model, layers, architecture: str, linear_type: str):
    """(name -> (bytes, type, codes, scale) of the matrices, name -> float32 array of everything one-dimensional)."""
    config = model.config
    matrices, vectors = {}, {}
    for path, layer in layers.items():
        _, _, index, projection = path.split(".", 3)
        name = f"blk.{index}.{LINEARS[projection]}"
        codes, scale = (tensor.cpu().numpy() for tensor in layer.whole_groups())
        scale = scale.reshape(scale.shape if scale.ndim == 2 else (-1, 1)).astype(np.float32)
        bias = layer.ternary_bias()
        bias = None if bias is None else bias.detach().float().cpu().numpy()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(LINEARS[projection])
        if architecture == "llama" and heads is not None:  # ggml rotates neighboring rows of a head, not its two halves
            codes, bias = _permute(codes, heads), bias if bias is None else _permute(bias, heads)
            scale = scale if len(scale) == 1 else _permute(scale, heads)
        kind = _type_of(name, codes.shape[1], codes.shape[1] // scale.shape[1], linear_type)
        matrices[f"{name}.weight"] = (encode_codes(codes, scale, kind), kind, codes, scale)
        if bias is not None:
            vectors[f"{name}.bias"] = bias
        if layer.subln is not None:
            vectors[f"blk.{index}.{SUBLN[projection]}.weight"] = layer.subln.weight.detach().float().cpu().numpy()
    gemma = architecture == "gemma3"
    norms = NORMS | (GEMMA_FFN_NORMS if gemma else FFN_NORMS)
    owners = {"output_norm.weight": model.model.norm}
    for index, block in enumerate(model.model.layers):
        for path, name in norms.items():
            owner, _, last = path.rpartition(".")
            norm = getattr(block.get_submodule(owner), last, None)
            if norm is not None:
                owners[f"blk.{index}.{name}.weight"] = norm
    for name, norm in owners.items():
        gain = norm.weight.detach().float().cpu().numpy()
        vectors[name] = gain + np.float32(1) if gemma else gain
    if _rope(config).get("rope_type") == "llama3":
        vectors["rope_freqs.weight"] = _rope_factors(model)
    return matrices, vectors


def _permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in ggml's order: the two halves of a head interleaved."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _type_of(name: str, columns: int, group_columns: int, wanted: str) -> str:
    """The type of one matrix: as wanted, or the first of AUTO whose block divides its rows and groups."""

    def fits(kind: str) -> bool:
        return columns % TYPES[kind].columns == 0 and group_columns % TYPES[kind].columns == 0

    if wanted == "auto":
        return next(kind for kind in AUTO if kind == "f16" or fits(kind))
    if wanted not in TYPES:
        raise UserError("type", expected=f"auto or one of {', '.join(TYPES)}", got=wanted, do="Choose one of these.")
    if wanted != "f16" and not fits(wanted):
        possible = ", ".join(kind for kind in TYPES if kind == "f16" or fits(kind))
        raise UserError(
            "type",
            expected=f"one whose block divides the {columns} columns of {name} and its groups of {group_columns}: {possible}",
            got=f"{wanted}, with blocks of {TYPES[wanted].columns}",
            do="Choose one of these, or auto, which chooses for each matrix.",
        )
    return wanted


def _rope(config) -> dict[str, Any]:
    """The RoPE parameters of the layers that see the whole text."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("full_attention", parameters)


def _rope_factors(model) -> np.ndarray:
    """float32 (head_dim / 2): by what llama.cpp divides each plain frequency to get this model's own."""
    inv_freq = model.model.rotary_emb.inv_freq.detach().double().cpu().numpy()
    half = np.arange(len(inv_freq)) / len(inv_freq)
    return ((_rope(model.config)["rope_theta"] ** -half) / inv_freq).astype(np.float32)


def _write(path: Path, model, tokenizer, architecture: str, matrices, vectors, embedding_type: str, name: str) -> None:
    """The file itself, through the gguf package's writer."""
    import gguf
    from gguf import quants

    if embedding_type not in EMBEDDINGS:
        raise UserError("embedding", expected=f"one of {', '.join(EMBEDDINGS)}", got=embedding_type, do="Choose one.")
    writer = gguf.GGUFWriter(path, architecture)
    types = [kind for _, kind, _, _ in matrices.values()]
    writer.add_file_type(FILE_TYPES[max(TYPES, key=types.count)])
    _write_config(writer, model.config, name)
    tables = {"token_embd.weight": model.model.embed_tokens.weight}
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        tables["output.weight"] = model.lm_head.weight
    _write_tokenizer(writer, tokenizer, len(model.model.embed_tokens.weight))
    for table_name, weight in tables.items():
        table = weight.detach().float().cpu().numpy()
        if embedding_type == "f16" or table.shape[1] % 32:
            writer.add_tensor(table_name, table.astype(np.float16))
        else:
            kind = gguf.GGMLQuantizationType[embedding_type.upper()]
            writer.add_tensor(table_name, quants.quantize(table, kind), raw_dtype=kind)
    for tensor_name, vector in vectors.items():
        writer.add_tensor(tensor_name, vector.astype(np.float32))
    for tensor_name, (data, kind, _, _) in matrices.items():
        if kind == "f16":
            writer.add_tensor(tensor_name, data)
        else:
            writer.add_tensor(tensor_name, data, raw_dtype=_ggml_type(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _ggml_type(kind: str):
    """gguf's member for a type; Q2_0 is younger than the package and is added to it."""
    import gguf

    number = TYPES[kind].number
    if number not in gguf.GGMLQuantizationType._value2member_map_:
        member = int.__new__(gguf.GGMLQuantizationType, number)
        member._name_, member._value_ = kind.upper(), number
        gguf.GGMLQuantizationType._value2member_map_[number] = member
        gguf.GGMLQuantizationType._member_map_[kind.upper()] = member
        gguf.GGML_QUANT_SIZES[member] = (TYPES[kind].columns, TYPES[kind].block_bytes)
    return gguf.GGMLQuantizationType(number)


def _write_config(writer, config, name: str) -> None:
    """The hyper-parameters, under llama.cpp's keys."""
    rope = _rope(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)


def _write_tokenizer(writer, tokenizer, vocabulary: int) -> None:
    """Tokens, merges or scores, special ids and the chat template."""
    found = tokenizer_metadata(tokenizer, vocabulary)
    writer.add_tokenizer_model(found["model"])
    writer.add_tokenizer_pre(found["pre"])
    writer.add_token_list(found["tokens"])
    writer.add_token_types(found["types"])
    if "merges" in found:
        writer.add_token_merges(found["merges"])
    else:
        writer.add_token_scores(found["scores"])
    writer.add_add_bos_token(found["add_bos"])
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(found["add_space_prefix"])
    for key in ("bos", "eos", "pad", "unk"):
        if f"{key}_id" in found:
            getattr(writer, f"add_{key}_token_id")(found[f"{key}_id"])
    if tokenizer.chat_template:
        template = tokenizer.chat_template
        writer.add_chat_template(template if isinstance(template, str) else json.dumps(template))


def _compare(path: Path, matrices) -> None:
    """Reads the file back and compares each matrix with codes times fp16 scale, bit for bit."""
    import gguf

    for _, kind, _, _ in matrices.values():
        _ggml_type(kind)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, (_, kind, codes, scale) in matrices.items():
        held = decode_bytes(np.array(stored[name].data), codes.shape, kind)
        group_columns = codes.shape[1] // scale.shape[1]
        expected = codes * np.repeat(scale.astype(np.float16).astype(np.float32), group_columns, axis=1)
        assert np.array_equal(held, expected), f"{name} does not hold what was trained"
