"""Writes the packed student file: from a refined torch model to the bytes that runtime/packed_file.py reads.

Tensors have the names of the student's state dict. What the configs of the models leave implicit is resolved when the file
is written: gains are multipliers (Gemma's ``1 + w`` is stored as such), and RoPE frequencies are those of the model's own
buffers, so that a reader needs to know nothing about RoPE scaling.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitdistill.errors import UserError
from bitdistill.kernels import packing as layout
from bitdistill.kernels.packing import INT4_GROUP
from bitdistill.kernels.tables import quantize_table
from bitdistill.names import LAYER_NORMS
from bitdistill.runtime.packed_file import (
    EMBEDDINGS,
    TOKENIZER,
    Config,
    Linear,
)
from bitdistill.runtime.packed_writer import write_tensors
from bitdistill.text_tokens import tokenizer_of

# --- writing ----------------------------------------------------------------------------------------------------------


def write_packed(
    path: str | Path,
    model,
    *,
    packing: str = "base3",
    embedding: str | None = None,
    tokenizer_json: bytes | None = None,
    metadata: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes a refined student to one file, atomically.

    Args:
        path: the file; its folder must exist. An existing file is replaced once the new one is whole and on disk.
        model: a refined causal language model (torch) with fp32 master weights.
        packing: "base3" (1.6 bits per weight) or "2bit".
        embedding: "fp16", "int8" (a scale per row), "int4" (a scale for 32 columns) or "ternary" (a scale per row); an untied
            LM head likewise. None is as trained: the codes that training multiplied with, or fp16. Another one than was
            trained only rounds what was trained in full precision: the proof of parity shows what that costs.
        tokenizer_json: the bytes of tokenizer.json, or None for a file that only takes token ids.
        metadata: JSON values kept in the header for the reader's information. Of {"tokenizer": {"eos_token"}} the file also
            learns to stop where answers end in training; the model's own config and generation_config add their tokens.

    Returns: packing, embedding, linear_weights, linear_bytes (codes with padding, and scales), bits_per_weight (of
        these), embedding_bytes (with an untied LM head), other_bytes (norms, biases, tokenizer, header), file_bytes,
        parameters (ties counted once), model_bits_per_parameter. The three parts sum to file_bytes.

    Raises:
        UserError: not a refined student, weights that are not fp32 or not finite, another embedding than the quantized one
            that was trained, a RoPE scaling that depends on the length of the text, or another property that the runtime
            does not have.
    """
    path = Path(path)
    if packing not in layout.PACKINGS:
        raise UserError(
            "export.packing",
            expected=f"one of {', '.join(layout.PACKINGS)}",
            got=repr(packing),
            do="Choose one of these.",
        )
    if embedding is not None and embedding not in EMBEDDINGS:
        raise UserError(
            "export.embedding",
            expected=f"one of {', '.join(EMBEDDINGS)}",
            got=repr(embedding),
            do="Choose one of these.",
        )
    embedding = _embedding_to_store(model, embedding)
    if not path.parent.is_dir():
        raise UserError(
            "output_dir", expected="a file in an existing folder", got=str(path), do="Create the folder first."
        )
    config, tensors = _collect(model, packing, embedding, tokenizer_json, metadata)
    write_tensors(path, config, tensors, metadata)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"packing": packing, "embedding": embedding} | _sizes(config, tensors, path.stat().st_size, parameters)


def _sizes(config: Config, tensors: dict[str, np.ndarray], file_bytes: int, parameters: int) -> dict[str, Any]:
    linear_bytes = sum(
        tensors[f"{name}.weight_packed"].nbytes + tensors[f"{name}.weight_scale"].nbytes for name in config.linears
    )
    embedding_bytes = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(config.tables()))
    linear_weights = sum(linear.out_features * linear.in_features for linear in config.linears.values())
    return {
        "linear_weights": linear_weights,
        "linear_bytes": linear_bytes,
        "bits_per_weight": 8 * linear_bytes / linear_weights,
        "embedding_bytes": embedding_bytes,
        "other_bytes": file_bytes - linear_bytes - embedding_bytes,
        "file_bytes": file_bytes,
        "parameters": parameters,
        "model_bits_per_parameter": 8 * file_bytes / parameters,
    }


def _collect(
    model, packing: str, embedding: str, tokenizer_json: bytes | None, metadata: dict[str, Any] | None
) -> tuple[Config, dict[str, np.ndarray]]:
    """The config and the tensors of a student, ready to be written."""
    from bitdistill.student.layers import bit_linears
    from bitdistill.student.loading import end_token_ids

    layers = bit_linears(model)
    if not layers:
        raise UserError("model", expected="a refined student", got=type(model).__name__, do="Run --stage refine first.")
    _refuse_unsupported(model)
    quantizer = next(iter(layers.values())).quantizer
    assert len({str(layer.quantizer) for layer in layers.values()}) == 1, "linears with different quantizers"
    hf, decoder = model.config, model.model
    tied = model.lm_head.weight is decoder.embed_tokens.weight
    tables = {"model.embed_tokens": decoder.embed_tokens} | ({} if tied else {"lm_head": model.lm_head})
    norms = _norms(decoder)
    _check_complete(model, layers, tables, norms)

    tensors: dict[str, np.ndarray] = {}
    linears = {name: _add_linear(tensors, name, layer, packing) for name, layer in layers.items()}
    for name, table in tables.items():
        tensors |= _quantize_table(name, _float32(name, table.weight), embedding, packing)
    for name, norm in norms.items():
        gain = _float32(name, norm.weight)
        tensors[f"{name}.gain"] = gain + np.float32(1) if hf.model_type == "gemma3_text" else gain
    rope, window = _attention_kinds(model)
    head_dim = decoder.layers[0].self_attn.head_dim
    for kind in sorted(set(rope)):
        _add_rope(tensors, kind, decoder.rotary_emb, head_dim)
    if tokenizer_json:
        tensors[TOKENIZER] = np.frombuffer(tokenizer_json, np.uint8)

    config = Config(
        model_type=hf.model_type,
        vocab_size=decoder.embed_tokens.weight.shape[0],
        hidden_size=hf.hidden_size,
        num_hidden_layers=hf.num_hidden_layers,
        num_attention_heads=hf.num_attention_heads,
        num_key_value_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        max_position_embeddings=hf.max_position_embeddings,
        rms_norm_eps=hf.rms_norm_eps,
        activation=_activation(hf),
        attention_scale=float(decoder.layers[0].self_attn.scaling),
        embedding_scale=float(getattr(decoder.embed_tokens, "embed_scale", 1.0)),
        tied=tied,
        rope=rope,
        window=window,
        eos_token_ids=end_token_ids(model, _tokenizer_eos(tokenizer_json, metadata)),
        packing=packing,
        embedding=embedding,
        tokenizer_bytes=len(tokenizer_json or b""),
        linears=linears,
        weight_scale=quantizer.weight_scale,
        group_size=quantizer.group_size if quantizer.weight_scale == "group" else None,
        act_scale=next(iter(layers.values())).act_scale,
        norms={name: norm.weight.shape[0] for name, norm in norms.items()},
    )
    return config, tensors


def _add_linear(tensors: dict[str, np.ndarray], name: str, layer, packing: str) -> Linear:
    """Adds a BitLinear's codes, scale, bias and SubLN gain to `tensors`."""
    _check_master(name, layer.weight)
    codes, scale = layer.ternary()
    tensors[f"{name}.weight_packed"] = layout.pack(codes.cpu().numpy(), packing)
    tensors[f"{name}.weight_scale"] = _stored_scale(name, scale)
    bias = layer.ternary_bias()
    if bias is not None:
        tensors[f"{name}.bias"] = _float32(f"{name}.bias", bias)
    if layer.subln is not None:
        tensors[f"{name}.subln"] = _float32(f"{name}.subln", layer.subln.weight)
    rows, columns = layer.weight.shape
    divisor = layer.quantizer.input_scale(layer)
    if divisor is not None:
        tensors[f"{name}.input_scale"] = _float32(f"{name}.input_scale", divisor)
    eps = None if layer.subln is None else layer.subln.eps
    return Linear(rows, columns, bias is not None, eps, divisor is not None)


def _norms(decoder) -> dict[str, Any]:
    """The model's own norms (SubLN apart), by the names that they have in the file."""
    norms = {"model.norm": decoder.norm}
    for index, layer in enumerate(decoder.layers):
        for path in LAYER_NORMS:
            owner, _, last = path.rpartition(".")
            norm = getattr(layer.get_submodule(owner), last, None)
            if norm is not None:
                norms[f"model.layers.{index}.{path}"] = norm
    return norms


def _add_rope(tensors: dict[str, np.ndarray], kind: str, rotary, head_dim: int) -> None:
    """Adds one kind of attention's RoPE frequencies and scaling to `tensors`."""
    prefix = f"{kind}_" if isinstance(rotary.rope_type, dict) else ""
    inv_freq = getattr(rotary, f"{prefix}inv_freq")
    if str(inv_freq.dtype) != "torch.float32" or 2 * len(inv_freq) != head_dim:
        raise UserError(
            "model",
            expected=f"{head_dim // 2} RoPE frequencies in float32",
            got=f"{len(inv_freq)} in {inv_freq.dtype}",
            do="Load the student in float32; RoPE over a part of the head is not supported.",
        )
    tensors[f"rope.{kind}.inv_freq"] = _float32("rope", inv_freq)
    tensors[f"rope.{kind}.attention_scaling"] = np.array(getattr(rotary, f"{prefix}attention_scaling"), np.float32)


def _check_complete(model, layers: dict, tables: dict, norms: dict) -> None:
    """Every parameter of the model has its place in the file."""
    left_out = {id(parameter): name for name, parameter in model.named_parameters()}
    for layer in layers.values():
        for parameter in layer.parameters(recurse=False):  # weight, bias, learned scale
            left_out.pop(id(parameter), None)
        if layer.subln is not None:
            left_out.pop(id(layer.subln.weight), None)
    for module in (*tables.values(), *norms.values()):
        left_out.pop(id(module.weight), None)
    assert not left_out, f"parameters that the format has no place for: {sorted(left_out.values())}"


def _tokenizer_eos(tokenizer_json: bytes | None, metadata: dict[str, Any] | None) -> int | None:
    """The id of the tokenizer's EOS, in which the answers of a task end in training."""
    eos = ((metadata or {}).get("tokenizer") or {}).get("eos_token")
    if not tokenizer_json or eos is None:
        return None
    return tokenizer_of(tokenizer_json.decode("utf-8"), "tokenizer.json").token_to_id(eos)


def _embedding_to_store(model, wanted: str | None) -> str:
    """The format of the embedding: as trained, or as wanted where it was trained in full precision."""
    from bitdistill.student.embeddings import FULL_PRECISION, embedding_format

    trained = embedding_format(model)
    if wanted not in (None, trained) and trained != FULL_PRECISION:
        raise UserError(
            "export.embedding",
            expected=f"{trained}, in which the student's embedding was trained",
            got=wanted,
            do="Leave it out: only an embedding trained in full precision can be stored in another format.",
        )
    return wanted or trained


def _activation(hf) -> str:
    return getattr(hf, "hidden_activation", None) or hf.hidden_act


def _attention_kinds(model) -> tuple[list[str], list[int | None]]:
    """Per layer the name of its RoPE table and its sliding window."""
    hf = model.config
    kinds = getattr(hf, "layer_types", None) or ["full_attention"] * hf.num_hidden_layers
    one_rope = not isinstance(model.model.rotary_emb.rope_type, dict)
    window = [hf.sliding_window if kind == "sliding_attention" else None for kind in kinds]
    return ["full_attention" if one_rope else kind for kind in kinds], window


def _refuse_unsupported(model) -> None:
    """Raises UserError for what the runtime would get wrong."""
    from bitdistill.student.model_folder import runtime_problems

    for problem in runtime_problems(model.config):
        raise problem


def _check_master(name: str, weight) -> None:
    if str(weight.dtype) != "torch.float32":
        raise UserError(
            f"{name}.weight",
            expected="the float32 master weight (its bf16 copy has other codes)",
            got=str(weight.dtype),
            do="Load the student with bitdistill.student.refine.load_student.",
        )
    if not weight.isfinite().all():
        raise UserError(
            f"{name}.weight",
            expected="finite numbers",
            got="NaN or infinity",
            do="The training diverged: lower the learning rate.",
        )


def _stored_scale(name: str, scale) -> np.ndarray:
    """fp32 () as it is; (O, G) in fp16, in the order of the kernels."""
    if scale.dim() == 0:
        return scale.cpu().numpy()
    halves = scale.half()
    assert bool((halves.float() == scale).all()), f"{name}: a scale that fp16 does not hold"
    return layout.pack_scales(halves.cpu().numpy())


def _float32(name: str, tensor) -> np.ndarray:
    array = tensor.detach().float().cpu().contiguous().numpy()
    if not np.isfinite(array).all():
        raise UserError(
            name, expected="finite numbers", got="NaN or infinity", do="Lower the learning rate: the training diverged."
        )
    return array


def _quantize_table(name: str, table: np.ndarray, embedding: str, packing: str) -> dict[str, np.ndarray]:
    if embedding == "int4" and table.shape[1] % INT4_GROUP:
        raise UserError(
            "export.embedding",
            expected=f"a hidden size that {INT4_GROUP} divides, for int4",
            got=str(table.shape[1]),
            do="Use int8 or fp16.",
        )
    peak = np.abs(table).max()
    if embedding in ("fp16", "int4") and peak > np.finfo(np.float16).max:
        raise UserError(
            "export.embedding", expected="entries up to 65504, for fp16", got=f"{peak:g} in {name}", do="Use int8."
        )
    if embedding == "fp16":
        return {f"{name}.weight": table.astype(np.float16)}
    codes, scale = (tensor.numpy() for tensor in quantize_table(torch.from_numpy(table), embedding))
    if embedding == "int8":
        packed = layout.pack_int8(codes)
    elif embedding == "int4":
        packed, scale = layout.pack_int4(codes), layout.pack_scales(scale)
    else:
        packed = layout.pack(codes, packing)
    return {f"{name}.weight_packed": packed, f"{name}.weight_scale": scale}
