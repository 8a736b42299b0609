"""A ternary student as a Hugging Face folder that other tools open without this project. We write every code ourselves.

    format               opens in                                            weights            scales
    transformers         transformers alone (quant_method gemma, 2 bits)      code + 2, 4 a byte  tensor, row
    compressed-tensors   transformers with compressed-tensors; vLLM           code + 2, 16 a word tensor, row, group
    mlx                  mlx-lm                                               code + 1, 16 a word tensor, row, group

All three dequantize to exactly codes * scale, in the dtype of the scales. None has a place for SubLN, so the student must
have been trained with refine.norms none. None rounds activations, so predictions change a little (the proof says how much).
"""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitdistill.errors import UserError
from bitdistill.files import apply_umask
from bitdistill.student.layers import bit_linears

FORMATS = ("transformers", "compressed-tensors", "mlx")
MLX_GROUPS = (128, 64, 32)


def hugging_face_obstacles(config, norms: str, format: str) -> list[str]:
    """Why a student of this base model and these norms cannot be written in a format; an empty list means that it can.

    Args:
        config: the Hugging Face config of the base model.
        norms: refine.norms: none, two or all.
        format: a name of FORMATS.
    """
    found = []
    if norms != "none":
        found.append(
            f"{format} has no place for SubLN, which refine.norms {norms} puts in; train with --refine.norms none"
        )
    return found + (_mlx_obstacles(config) if format == "mlx" else [])


def _mlx_obstacles(config) -> list[str]:
    """What mlx-lm's models take for granted and this model does otherwise."""
    found = []
    gemma, rope = config.model_type == "gemma3_text", _rope(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.model_type == "qwen2" and head_dim * config.num_attention_heads != config.hidden_size:
        found.append(f"mlx-lm's qwen2 has heads of hidden_size / num_attention_heads, not of {head_dim}")
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        found.append(f"RoPE scaling of kind {rope['rope_type']} is not written for mlx-lm")
    if getattr(config, "use_sliding_window", False):
        found.append("mlx-lm ignores the sliding window of Qwen models")
    if not gemma and config.hidden_act != "silu":
        found.append(f"mlx-lm's {config.model_type} computes SiLU, not {config.hidden_act}")
    if gemma and _sliding_pattern(config) is None:
        found.append("layer_types are no regular pattern of sliding layers and a full one, with a full one at least")
    if gemma and config.rope_parameters["sliding_attention"].get("rope_type", "default") != "default":
        found.append("mlx-lm has no RoPE scaling in the sliding layers")
    return found


def _rope(config) -> dict[str, Any]:
    """The RoPE parameters of the layers that see the whole text."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("full_attention", parameters)


def _sliding_pattern(config) -> int | None:
    """n where every n-th layer of Gemma3 is a full one and the others slide; None where no n fits, or no layer is full."""
    full = [kind == "full_attention" for kind in config.layer_types]
    pattern = full.index(True) + 1 if True in full else 0
    regular = pattern and full == [(layer + 1) % pattern == 0 for layer in range(len(full))]
    return pattern if regular else None


def write_hugging_face(folder: str | Path, model: nn.Module, tokenizer, format: str) -> dict[str, Any]:
    """Writes config.json, model.safetensors and the tokenizer, and compares what the file holds with what was trained.

    Args:
        folder: created; must not exist or be empty.
        model: a refined causal language model (torch) with fp32 master weights and without SubLN.
        tokenizer: its transformers tokenizer.
        format: a name of FORMATS.

    Returns: format, linear_bytes, bits_per_weight, file_bytes.

    Raises:
        UserError: an unknown format, a student with SubLN, or scales that the format has no place for.
    """
    from safetensors.torch import load_file, save_file

    folder = Path(folder)
    if format not in FORMATS:
        raise UserError("format", expected=f"one of {', '.join(FORMATS)}", got=format, do="Choose one of these.")
    layers = bit_linears(model)
    norms = "two" if any(layer.subln is not None for layer in layers.values()) else "none"
    obstacles = hugging_face_obstacles(model.config, norms, format)
    if obstacles:
        raise UserError(
            "format",
            expected="a student that the tool can compute",
            got="; ".join(obstacles),
            do="Train with these settings, or use gguf or the packed format.",
        )
    if folder.exists() and any(folder.iterdir()):
        raise UserError("output", expected="a new or empty folder", got=str(folder), do="Give another --output.")
    if format == "compressed-tensors":
        _refuse_mixed(layers)
    dtype = torch.bfloat16 if model.config.model_type == "gemma3_text" else torch.float16  # Gemma overflows fp16
    tensors, codes_of, linear_bytes = {}, {}, 0
    for name, layer in layers.items():
        codes, scale = layer.whole_groups()
        scale_OG = (scale if scale.dim() == 2 else scale.reshape(-1, 1)).float().expand(codes.shape[0], -1)
        encoded = _ENCODERS[format](codes, scale_OG, dtype)
        codes_of[name] = (codes.cpu(), encoded["scale_OG"].cpu())
        del encoded["scale_OG"]
        for key, tensor in encoded.items():
            tensors[f"{name}.{key}"] = tensor.cpu().contiguous()
            linear_bytes += tensor.nbytes if tensor.numel() > 2 else 0
        bias = layer.ternary_bias()
        if bias is not None:
            tensors[f"{name}.bias"] = bias.detach().to(dtype).cpu()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    for key, tensor in model.state_dict().items():
        if key.rpartition(".")[0] not in layers and key not in tied:
            tensors[key] = tensor.to(dtype).cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx" if format == "mlx" else "pt"})
        _write_config(folder, model, format, dtype, _groups(codes_of))
        tokenizer.save_pretrained(folder)
        apply_umask(folder / "model.safetensors")
        held = load_file(folder / "model.safetensors")
        for name, (codes, scale_OG) in codes_of.items():
            expected = codes * scale_OG.repeat_interleave(codes.shape[1] // scale_OG.shape[1], dim=1)
            assert torch.equal(_DECODERS[format](held, name, codes.shape), expected), (
                f"{name} differs from what was trained"
            )
    except BaseException:
        shutil.rmtree(folder)
        raise
    weights = sum(codes.numel() for codes, _ in codes_of.values())
    return {
        "format": format,
        "linear_bytes": linear_bytes,
        "bits_per_weight": 8 * linear_bytes / weights,
        "file_bytes": (folder / "model.safetensors").stat().st_size,
    }


# --- encoders: codes int8 (O, I), scale fp32 (O, G) -> tensors by the last part of their names; scale_OG is what is stored


def _transformers(codes: Tensor, scale_OG: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """uint8 (O, ceil(I / 4)): code + 2 of column 4 b + j in bits 2 j of byte b; fp32 scale per row."""
    if scale_OG.shape[1] != 1:
        raise UserError(
            "format",
            expected="one scale for a tensor or row, in the transformers format",
            got=f"{scale_OG.shape[1]} groups in a row",
            do="Use compressed-tensors, mlx, gguf or the packed format.",
        )
    zero = torch.zeros(())
    packed = _pack(codes + 2, 4, torch.uint8)
    scale = scale_OG.contiguous()
    return {
        "weight": packed,
        "weight_scale": scale,
        "input_activation_scale": zero,
        "output_activation_scale": zero.clone(),
        "scale_OG": scale,
    }


def _compressed_tensors(codes: Tensor, scale_OG: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """int32 (O, ceil(I / 16)): code + 2 of column 16 w + j in bits 2 j of word w; scale (O, G) in `dtype`."""
    scale = scale_OG.to(dtype)
    packed = _pack(codes + 2, 16, torch.int32)
    shape = torch.tensor(codes.shape, dtype=torch.int64)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": shape, "scale_OG": scale.float()}


def _mlx(codes: Tensor, scale_OG: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """uint32 (O, I / 16): code + 1 of column 16 w + j in bits 2 j of word w; scale s and bias -s of each group."""
    columns = codes.shape[1]
    group = _mlx_group(columns, columns // scale_OG.shape[1])
    scale = scale_OG.to(dtype).repeat_interleave(columns // group // scale_OG.shape[1], dim=1)
    packed = _pack(codes + 1, 16, torch.int32).view(torch.uint32)
    return {"weight": packed, "scales": scale, "biases": -scale, "scale_OG": scale.float()}


def _mlx_group(columns: int, group_columns: int) -> int:
    """The largest group of mlx that divides a row and lies in one of training's groups."""
    for group in MLX_GROUPS:
        if columns % group == 0 and group_columns % group == 0:
            return group
    raise UserError(
        "format",
        expected=f"rows of a multiple of {MLX_GROUPS[-1]} columns, in the mlx format",
        got=f"{columns} columns, in groups of {group_columns}",
        do="Use gguf, compressed-tensors or the packed format.",
    )


def _pack(unsigned: Tensor, per_word: int, dtype: torch.dtype) -> Tensor:
    """(O, I) values of 2 bits, `per_word` to a word, the first in the lowest bits; a short row is padded with zeros."""
    rows, columns = unsigned.shape
    words = -(-columns // per_word)
    padded = torch.zeros(rows, words * per_word, dtype=torch.int64)
    padded[:, :columns] = unsigned.cpu()
    shifts = 2 * torch.arange(per_word)
    total = (padded.view(rows, words, per_word) << shifts).sum(-1)
    return (total - (total >= 2**31) * 2**32).to(dtype) if dtype == torch.int32 else total.to(dtype)


def _unpack(words: Tensor, columns: int, per_word: int) -> Tensor:
    """What `_pack` was given."""
    wide = words.view(torch.int32).to(torch.int64) if words.dtype == torch.uint32 else words.to(torch.int64)
    values = (wide[..., None] >> (2 * torch.arange(per_word))) & 3
    return values.reshape(words.shape[0], -1)[:, :columns]


def _decode_transformers(held: dict[str, Tensor], name: str, shape) -> Tensor:
    return (_unpack(held[f"{name}.weight"], shape[1], 4) - 2) * held[f"{name}.weight_scale"]


def _decode_compressed_tensors(held: dict[str, Tensor], name: str, shape) -> Tensor:
    scale = held[f"{name}.weight_scale"].float()
    codes = _unpack(held[f"{name}.weight_packed"], shape[1], 16) - 2
    return codes * scale.repeat_interleave(shape[1] // scale.shape[1], dim=1)


def _decode_mlx(held: dict[str, Tensor], name: str, shape) -> Tensor:
    group = shape[1] // held[f"{name}.scales"].shape[1]
    scale, bias = (held[f"{name}.{key}"].float().repeat_interleave(group, dim=1) for key in ("scales", "biases"))
    return _unpack(held[f"{name}.weight"], shape[1], 16) * scale + bias


_ENCODERS = {"transformers": _transformers, "compressed-tensors": _compressed_tensors, "mlx": _mlx}
_DECODERS = {
    "transformers": _decode_transformers,
    "compressed-tensors": _decode_compressed_tensors,
    "mlx": _decode_mlx,
}


def _groups(codes_of: dict[str, tuple[Tensor, Tensor]]) -> dict[str, int]:
    """Columns of a group of each layer, as stored."""
    return {name: codes.shape[1] // scale.shape[1] for name, (codes, scale) in codes_of.items()}


def _write_config(folder: Path, model, format: str, dtype: torch.dtype, groups: dict[str, int]) -> None:
    """config.json of the stock architecture with the tool's own section on quantization, and generation_config.json."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "bitdistill"):
        del config.bitdistill
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    settings = json.loads(config.to_json_string(use_diff=False) if format == "mlx" else config.to_json_string())
    if format == "transformers":
        settings["quantization_config"] = {
            "quant_method": "gemma",
            "num_bits": 2,
            "modules_to_not_convert": ["lm_head"],
        }
    elif format == "compressed-tensors":
        settings["quantization_config"] = _compressed_tensors_section(groups, model)
    else:
        usual = max(set(groups.values()), key=list(groups.values()).count)
        section: dict[str, Any] = {"group_size": usual, "bits": 2, "mode": "affine"}
        section |= {name: {"group_size": group, "bits": 2} for name, group in groups.items() if group != usual}
        settings["quantization"] = settings["quantization_config"] = section
        settings |= _older_names(model.config)
    (folder / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _older_names(config) -> dict[str, Any]:
    """RoPE and sliding layers under the names that mlx-lm's models read."""
    rope = _rope(config)
    found: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if rope.get("rope_type", "default") != "default":
        found["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if config.model_type == "gemma3_text":
        found["rope_local_base_freq"] = config.rope_parameters["sliding_attention"]["rope_theta"]
        found["sliding_window_pattern"] = _sliding_pattern(config)
    return found


def _refuse_mixed(layers) -> None:
    """Raises UserError for groups of columns in some matrices and rows narrower than a group in others."""
    narrow = [layer for layer in layers.values() if layer.in_features < (layer.quantizer.columns(layer) or 0)]
    if narrow and any(layer.in_features > layer.quantizer.columns(layer) for layer in layers.values()):
        size, width = narrow[0].quantizer.columns(narrow[0]), narrow[0].in_features
        raise UserError(
            "refine.group_size",
            expected=f"at most {width}, the columns of the narrowest matrix, for compressed-tensors has one kind of scale",
            got=str(size),
            do="Train with a smaller --refine.group_size, or export another format.",
        )


def _compressed_tensors_section(groups: dict[str, int], model) -> dict[str, Any]:
    """compressed-tensors' description: symmetric 2-bit weights, a scale for a row or for a group of columns."""
    columns = {name: layer.weight.shape[1] for name, layer in bit_linears(model).items()}
    sizes = {group for name, group in groups.items() if group != columns[name]}
    weights: dict[str, Any] = {"num_bits": 2, "type": "int", "symmetric": True, "dynamic": False}
    weights |= {"strategy": "group", "group_size": sizes.pop()} if sizes else {"strategy": "channel"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
