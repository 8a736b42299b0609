"""Tiny GGUF files as llama.cpp's converter writes them: rows of Llama's q and k reordered, Gemma's norms plus one."""

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.convert_slow_tokenizer import bytes_to_unicode

from bitdistill.student.gguf_base import BLOCK, GEMMA_BLOCK, TOP
from tiny_students import Copies

LETTERS = [*bytes_to_unicode().values()]
MERGES = ["Ġ 1", "t h", "th e", "i n", "Ġ the", "1 2", "12 3"]
TOKENS = ["<|end|>", "<|start|>", *LETTERS, *(merge.replace(" ", "") for merge in MERGES), "<think>"]
COMMON = {
    "vocab_size": len(TOKENS) + 3,  # padded rows
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": None,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-6,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIGS = Copies(
    {
        "llama": LlamaConfig(**COMMON, head_dim=16, tie_word_embeddings=False),
        "llama with llama3 RoPE and biases": LlamaConfig(
            **COMMON, head_dim=16, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
        ),
        "qwen2": Qwen2Config(
            **COMMON, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
        ),
        "qwen2 with yarn": Qwen2Config(
            **COMMON,
            tie_word_embeddings=False,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ),
        "qwen3": Qwen3Config(**COMMON, head_dim=32, tie_word_embeddings=True),
        "gemma3": Gemma3TextConfig(
            **COMMON | {"num_hidden_layers": 6},
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=16,
            tie_word_embeddings=True,
            layer_types=[*["sliding_attention"] * 5, "full_attention"],
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        ),
    }
)


def model_of(name: str):
    """A random model in fp32, norms and biases random, too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("norm.weight", "bias")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def byte_level_tokens(writer: gguf.GGUFWriter, rule: str | None = "qwen2") -> None:
    """The metadata of a byte-level tokenizer of TOKENS."""
    writer.add_tokenizer_model("gpt2")
    if rule:
        writer.add_tokenizer_pre(rule)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, *[1] * (len(TOKENS) - 3), 4])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)


def write_gguf(path: Path, model, tokens=byte_level_tokens, kind: str = "F32", **extra) -> Path:
    """Writes a model.

    Args:
        tokens: called with the writer, to add the tokenizer. kind: type of the matrices that are stored row by row.
        extra: further keys of the architecture, dots written as two underscores: numbers or texts.
    """
    config, gemma = model.config, model.config.model_type == "gemma3_text"
    architecture = "gemma3" if gemma else config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    tokens(writer)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if model.config.model_type in ("qwen3", "gemma3_text"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    rope = config.rope_parameters["full_attention"] if gemma else config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        theta = rope["rope_theta"] ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
        writer.add_tensor("rope_freqs.weight", (theta / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32))
    if gemma:
        writer.add_sliding_window(config.sliding_window)
    for key, value in extra.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"{architecture}.{key.replace('__', '.')}", value)
    _write_tensors(writer, model, gguf.GGMLQuantizationType[kind], gemma)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_tensors(writer, model, kind, gemma: bool) -> None:
    names = {new: old for old, new in (GEMMA_BLOCK if gemma else BLOCK).items()}
    top = {new: old for old, new in TOP.items()}
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stem, _, which = name.rpartition(".")
        if stem in top:
            part, old = top[stem], top[stem]
        else:
            _, _, number, part = stem.split(".", 3)
            part = names[part]
            old = f"blk.{number}.{part}"
        value = value.numpy().copy()
        if model.config.model_type == "llama" and part in heads:  # as convert_hf_to_gguf.py permutes them
            halves = value.reshape(heads[part], 2, value.shape[0] // heads[part] // 2, *value.shape[1:])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        if gemma and part.endswith("norm"):
            value = value + 1
        if value.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(f"{old}.{which}", gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{old}.{which}", value)
