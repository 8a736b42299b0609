"""Small random students of every family for the export and runtime tests. Every gain, bias and norm is random, so that
one that is dropped, misread or put in the wrong place shows."""

import copy

import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen3Config

from bitdistill.student.refine import refine

COMMON = {
    "vocab_size": 97,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
THETA = {"rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


class Copies(dict):
    """A copy for each look: surgery writes into a model's config, and other tests must not see it."""

    def __getitem__(self, name):
        return copy.deepcopy(super().__getitem__(name))

    def values(self):
        return [self[name] for name in self]


CONFIGS = Copies({
    # widths that neither 4 nor 5 divides, so that packed rows and the last base-3 byte have padding
    "llama": LlamaConfig(
        **COMMON, hidden_size=64, intermediate_size=90, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=False, rope_parameters={**THETA, **LLAMA3, "original_max_position_embeddings": 16},
    ),
    "llama_biases": LlamaConfig(
        **COMMON, hidden_size=32, intermediate_size=70, num_attention_heads=2, num_key_value_heads=2,
        tie_word_embeddings=True, attention_bias=True, mlp_bias=True,
        rope_parameters={**THETA, "rope_type": "linear", "factor": 2.0},
    ),
    "qwen2": Qwen2Config(
        **COMMON, hidden_size=64, intermediate_size=98, num_attention_heads=4, num_key_value_heads=1,
        tie_word_embeddings=True, use_sliding_window=True, sliding_window=6, max_window_layers=1,
        rope_parameters={**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ),
    "qwen3": Qwen3Config(
        **COMMON, hidden_size=64, intermediate_size=102, num_attention_heads=4, num_key_value_heads=2, head_dim=24,
        tie_word_embeddings=True,
    ),
    "gemma3": Gemma3TextConfig(
        **COMMON, hidden_size=64, intermediate_size=94, num_attention_heads=4, num_key_value_heads=1, head_dim=16,
        pad_token_id=0, query_pre_attn_scalar=40, sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
        },
    ),
})  # fmt: skip


def model(name: str, seed: int = 0):
    """A random model in full precision, with sdpa attention."""
    return of_config(CONFIGS[name], seed)


def of_config(config, seed: int = 0):
    """The same of a configuration of one's own."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def student(name: str, norms: str = "two", seed: int = 0):
    """A refined random model in eval mode."""
    refined = model(name, seed)
    refine(refined, norms=norms)
    return randomize(refined).eval()


def randomize(model):
    """Random gains and biases in place of the ones and zeros that a new model has."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("norm.weight", "subln.weight")):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif key.endswith("bias"):
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (length,), generator=generator).tolist()
