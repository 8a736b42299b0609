"""Models of real shapes with random weights, for measurements of speed and memory: packed for us, as GGUF for other
programs.

Weights are ternary-valued, codes uniform in {-1, 0, 1} times a scale, so that every format of every program holds the same
function. One layer's matrices are made once and repeated in all layers: files have their true size, and no cache is large
enough for that to matter.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from bitdistill.kernels import packing as layout
from bitdistill.kernels.tables import quantize_table
from bitdistill.runtime.packed_file import TOKENIZER, Config, Linear
from bitdistill.runtime.packed_writer import write_tensors

WEIGHT_SCALE = 0.02
CONTEXT = 40_960


@dataclass(frozen=True)
class Shape:
    """A Qwen3 model. All have tied embeddings and 151,936 words."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    vocabulary: int = 151_936

    def linears(self) -> dict[str, tuple[int, int]]:
        """(O, I) of the seven projections of a layer, by their names within it."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, q),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def linear_weights(self) -> int:
        """Weights of all ternary linears."""
        return self.layers * sum(rows * columns for rows, columns in self.linears().values())


SHAPES = {
    "0.6B": Shape(28, 1024, 3072, 16, 8),
    "1.7B": Shape(28, 2048, 6144, 16, 8),
    "4B": Shape(36, 2560, 9728, 32, 8),
    "tiny": Shape(2, 256, 512, 4, 2, head_dim=64, vocabulary=1024),
}
_SUBLN = ("self_attn.o_proj", "mlp.down_proj")


def random_codes(rows: int, columns: int, seed: int) -> np.ndarray:
    """int8 (O, I), uniform in {-1, 0, 1}."""
    return np.random.default_rng(seed).integers(-1, 2, (rows, columns), dtype=np.int8)


def random_embedding(shape: Shape) -> np.ndarray:
    """float32 (V, hidden), normal with standard deviation WEIGHT_SCALE."""
    table = np.random.default_rng(99).standard_normal((shape.vocabulary, shape.hidden), np.float32)
    return np.multiply(table, np.float32(WEIGHT_SCALE), out=table)


def byte_tokenizer(vocabulary: int) -> bytes:
    """A tokenizer.json of so many tokens: one for each byte, and others that no text needs but a random model answers with."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = {token: number for number, token in enumerate(alphabet)}
    tokens |= {f"word{number}": number for number in range(len(alphabet), vocabulary)}
    tokenizer = Tokenizer(BPE(tokens, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return tokenizer.to_str().encode()


def write_packed_model(path: Path, shape: Shape, packing: str, embedding: str, tokenizer: bytes = b"") -> None:
    """A packed student with two SubLN norms per layer, with this tokenizer.json or none."""
    tensors, linears, norms = {}, {}, {"model.norm": shape.hidden}
    for number, (name, (rows, columns)) in enumerate(shape.linears().items()):
        packed = layout.pack(random_codes(rows, columns, number), packing)
        for layer in range(shape.layers):
            full = f"model.layers.{layer}.{name}"
            subln = name in _SUBLN
            linears[full] = Linear(rows, columns, False, 1e-6 if subln else None)
            tensors[f"{full}.weight_packed"] = packed
            tensors[f"{full}.weight_scale"] = np.array(WEIGHT_SCALE, np.float32)
            if subln:
                tensors[f"{full}.subln"] = np.ones(columns, np.float32)
    for layer in range(shape.layers):
        widths = {"input_layernorm": shape.hidden, "post_attention_layernorm": shape.hidden}
        widths |= {"self_attn.q_norm": shape.head_dim, "self_attn.k_norm": shape.head_dim}
        norms |= {f"model.layers.{layer}.{name}": width for name, width in widths.items()}
    for name, width in norms.items():
        tensors[f"{name}.gain"] = np.ones(width, np.float32)
    table = random_embedding(shape)
    if embedding == "fp16":
        tensors["model.embed_tokens.weight"] = table.astype(np.float16)
    else:
        codes, scale = (tensor.numpy() for tensor in quantize_table(torch.from_numpy(table), embedding))
        pack = {"int8": layout.pack_int8, "int4": layout.pack_int4}.get(embedding, lambda c: layout.pack(c, packing))
        tensors["model.embed_tokens.weight_packed"] = pack(codes)
        scale = layout.pack_scales(scale) if embedding == "int4" else scale
        tensors["model.embed_tokens.weight_scale"] = scale
    half = np.arange(0, shape.head_dim, 2, dtype=np.float32) / np.float32(shape.head_dim)
    tensors["rope.full_attention.inv_freq"] = (1 / np.float32(1e6) ** half).astype(np.float32)
    tensors["rope.full_attention.attention_scaling"] = np.array(1, np.float32)
    if tokenizer:
        tensors[TOKENIZER] = np.frombuffer(tokenizer, np.uint8)
    config = Config(
        model_type="qwen3",
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-6,
        activation="silu",
        attention_scale=shape.head_dim**-0.5,
        embedding_scale=1.0,
        tied=True,
        rope=["full_attention"] * shape.layers,
        window=[None] * shape.layers,
        eos_token_ids=[],
        packing=packing,
        embedding=embedding,
        tokenizer_bytes=len(tokenizer),
        linears=linears,
        norms=norms,
    )
    write_tensors(path, config, tensors, {"weights": "random"})


def write_gguf(path: Path, shape: Shape, linear_type: str, head_type: str) -> None:
    """The same model for llama.cpp and its forks, arch qwen3, without SubLN norms and without a vocabulary.

    Args:
        linear_type, head_type: names of gguf.GGMLQuantizationType that the gguf package can write: F16, BF16, Q4_0,
            TQ2_0, TQ1_0 ... K-quants and the forks' own types come from their `llama-quantize`.
    """
    import gguf
    from gguf import quants

    linear, head = gguf.GGMLQuantizationType[linear_type], gguf.GGMLQuantizationType[head_type]
    file_type = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q4_0": "MOSTLY_Q4_0"}
    writer = gguf.GGUFWriter(path, "qwen3", use_temp_file=False)
    writer.add_file_type(gguf.LlamaFileType[file_type.get(linear_type, f"MOSTLY_{linear_type}")])
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)

    def add(name: str, array: np.ndarray, kind) -> None:
        if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            writer.add_tensor(name, array.astype(np.float32 if kind == gguf.GGMLQuantizationType.F32 else np.float16))
        else:
            writer.add_tensor(name, quants.quantize(array, kind), raw_dtype=kind)

    names = dict(
        zip(
            shape.linears(),
            ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
            strict=True,
        )
    )
    matrices = {}
    for number, (name, (rows, columns)) in enumerate(shape.linears().items()):
        values = random_codes(rows, columns, number).astype(np.float32) * np.float32(WEIGHT_SCALE)
        matrices[name] = (
            values.astype(np.float16)
            if linear_type == "F16"
            else (values if linear_type == "F32" else quants.quantize(values, linear))
        )
    add("token_embd.weight", random_embedding(shape), head)
    add("output_norm.weight", np.ones(shape.hidden, np.float32), gguf.GGMLQuantizationType.F32)
    for layer in range(shape.layers):
        for name, matrix in matrices.items():
            raw = None if matrix.dtype in (np.float16, np.float32) else linear
            writer.add_tensor(f"blk.{layer}.{names[name]}.weight", matrix, raw_dtype=raw)
        for name, width in (
            ("attn_norm", shape.hidden),
            ("ffn_norm", shape.hidden),
            ("attn_q_norm", shape.head_dim),
            ("attn_k_norm", shape.head_dim),
        ):
            add(f"blk.{layer}.{name}.weight", np.ones(width, np.float32), gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
