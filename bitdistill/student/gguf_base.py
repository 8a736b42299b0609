"""A GGUF file as a base model: it is dequantized once into a Hugging Face folder, which everything else then reads.

Everything is mapped explicitly and nothing is guessed. Each metadata key of the architecture is either used or known not to
matter; each tensor of the file is a tensor of the model, and the reverse; otherwise the file is refused. (The `gguf_file=`
of transformers is exact for Llama and Qwen2, fails where Qwen3's heads * head_dim is not the hidden size, and reads Gemma3
with an error of 5 %.) What the conversion to GGUF did to the weights is undone: llama.cpp stores the rows of Llama's q and
k in another order, and one plus the weights of Gemma's norms.

The weights of a quantized file stay the rounded ones. `Conversion` says to how many bits they were rounded.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitdistill.distributed.checkpoint import save_folder_atomically
from bitdistill.errors import UserError
from bitdistill.student.gguf_tokenizer import check_chat_template, gguf_tokenizer
from bitdistill.student.model_folder import NOT_A_CONFIG
from bitdistill.text_files import user_path

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
SAFETENSORS = "Take the safetensors repository of the model."
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_BLOCK = BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's divisors of the RoPE frequencies: part of the config, not a weight
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
WITHOUT_EFFECT = ("vocab_size", "tensor_data_layout", "pooling_type", "attention.value_length")  # or checked by shapes


@dataclass(frozen=True)
class Conversion:
    """What the conversion of a file did: facts to be printed."""

    file: str
    architecture: str
    name: str
    types: dict[str, int]  # tensors of each type
    parameters: int
    bits_per_weight: float
    notes: tuple[str, ...]

    def __str__(self) -> str:
        types = ", ".join(f"{count} {kind}" for kind, count in self.types.items())
        notes = "".join(f"; {note}" for note in self.notes)
        return (
            f"{self.file}: {self.name or 'a model without a name'}, {self.architecture}, {self.parameters:,} parameters, "
            f"dequantized from {types} tensors ({self.bits_per_weight:.2f} bits per weight){notes}"
        )


def is_gguf(source: str | Path | None) -> bool:
    """Whether a model is given as a GGUF file."""
    return source is not None and str(source).lower().endswith(".gguf") and not user_path(source, "model").is_dir()


def convert_gguf(file: str | Path, folder: str | Path) -> Conversion:
    """Writes a Hugging Face folder (config, weights, tokenizer, chat template) from a GGUF file, atomically.

    Args:
        file: a .gguf of one of ARCHITECTURES. folder: replaced when it exists. F16 tensors stay so, all others become float32.

    Returns: what was found.

    Raises:
        UserError: no such file, a broken or split one, another architecture, properties or tensors that are not known, or a
            tokenizer that cannot be rebuilt.

    Numerics: the values that the gguf package's dequantizers give, unrounded.
    """
    from safetensors.numpy import save_file

    file = user_path(file, "model")
    reader, metadata = _read(file)
    architecture = str(metadata.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        expected = f"a GGUF file of an architecture among {', '.join(ARCHITECTURES)}"
        raise UserError("model", expected=expected, got=f"{file} with {architecture!r}", do="Take another model.")
    _check_types(metadata, architecture, str(file))
    if metadata.get("split.count", 0) > 1:
        got = f"{file}, one of {metadata['split.count']} parts"
        raise UserError("model", expected="a whole GGUF file", got=got, do="Join them with llama-gguf-split --merge.")
    tokenizer = gguf_tokenizer(metadata, architecture, str(file))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(metadata, architecture, tensors, str(file))
    weights = _weights(tensors, architecture, config, str(file))
    notes = _finish(config, weights, tokenizer, metadata, str(file))
    with save_folder_atomically(folder) as unfinished:
        save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        ends = [metadata[key] for key in _END_KEYS if key in metadata]
        generation = {"bos_token_id": config.bos_token_id, "eos_token_id": sorted(set(ends), key=ends.index)}
        (unfinished / "generation_config.json").write_text(json.dumps(generation, indent=1), encoding="utf-8")
    stored = [tensor for name, tensor in tensors.items() if name != ROPE_FACTORS]
    parameters = sum(int(tensor.n_elements) for tensor in stored)
    return Conversion(
        file=file.name,
        architecture=architecture,
        name=str(metadata.get("general.name", "")),
        types=dict(Counter(tensor.tensor_type.name for tensor in stored).most_common()),
        parameters=parameters,
        bits_per_weight=8 * sum(int(tensor.n_bytes) for tensor in stored) / parameters,
        notes=tuple(notes),
    )


_END_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def _read(file: Path):
    """The gguf package's reader of a file, and its metadata; a file that ends early or lies about itself is refused."""
    from gguf import GGUFReader

    class Bounded(GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data):,}, and more was announced")
            return super()._get(offset, dtype, count, override_order)

    if not file.is_file():
        raise UserError("model", expected="an existing GGUF file", got=str(file), do="Check the path.")
    try:
        reader = Bounded(file)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, RecursionError) as error:
        got = f"{file} ({' '.join(str(error).split())[:160]})"
        raise UserError("model", expected="a whole GGUF file", got=got, do="Download it again.") from error
    return reader, metadata


# Keys without their architecture -> what their values are, where the code takes it for granted; (a kind,) is a list of it.
_TYPES = {
    "split.count": int,
    "tokenizer.ggml.tokens": (str,),
    "tokenizer.ggml.merges": (str,),
    "tokenizer.ggml.scores": (float,),
    "tokenizer.ggml.token_type": (int,),
    "tokenizer.ggml.pre": str,
    "tokenizer.chat_template": str,
    "attention.layer_norm_rms_epsilon": float,
    "attention.sliding_window": int,
    "rope.freq_base": float,
    "rope.freq_base_swa": float,
    "rope.scaling.factor": float,
    "rope.scaling.original_context_length": int,
}
_FOR_EACH_TOKEN = ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")


def _is(value: Any, kind: Any) -> bool:
    if isinstance(kind, tuple):
        return isinstance(value, list) and all(_is(one, kind[0]) for one in value)
    if kind is str:
        return isinstance(value, str)
    return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)


def _check_types(metadata: dict[str, Any], architecture: str, file: str) -> None:
    """Raises UserError for a value of another kind than its key has, and for lists that do not fit the tokens."""
    for key, value in metadata.items():
        own = key.removeprefix(f"{architecture}.")
        kind = int if key.endswith("_token_id") else _TYPES.get(own)
        positive = key != own and kind in (int, float)  # a property of the model
        if kind is not None and not (_is(value, kind) and (not positive or 0 < value < np.inf)):
            got = f"{file} with {key} {str(value)[:60]!r}"
            raise UserError("model", expected="a GGUF file with values of the right kind", got=got, do=SAFETENSORS)
    tokens = len(metadata.get("tokenizer.ggml.tokens") or [])
    for key in _FOR_EACH_TOKEN:
        if key in metadata and len(metadata[key]) != tokens:
            got = f"{file} with {len(metadata[key])} for {tokens} tokens"
            raise UserError("model", expected=f"{key} for each token", got=got, do=SAFETENSORS)


def _config(metadata: dict[str, Any], architecture: str, tensors: dict[str, Any], file: str):
    """The Hugging Face config of a file's metadata. Every key of the architecture is asked for; one left over is refused."""
    from transformers import AutoConfig

    values = {
        key.removeprefix(f"{architecture}."): v for key, v in metadata.items() if key.startswith(f"{architecture}.")
    }
    for key in WITHOUT_EFFECT:
        values.pop(key, None)

    def take(key: str, default: Any = None) -> Any:
        value = values.pop(key, default)
        if value is None:
            got = f"{file} without {architecture}.{key}"
            raise UserError("model", expected="a GGUF file that describes its model", got=got, do=SAFETENSORS)
        return value

    heads, hidden = take("attention.head_count"), take("embedding_length")
    whole = isinstance(heads, int) and isinstance(hidden, int) and heads > 0
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": take("feed_forward_length"),
        "num_hidden_layers": take("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": take("attention.head_count_kv", heads),
        "head_dim": take("attention.key_length", hidden // heads if whole else 0),
        "max_position_embeddings": take("context_length"),
    }
    head_dim, blocks = sizes["head_dim"], {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    turned = take("rope.dimension_count", head_dim)
    bad = {key: value for key, value in sizes.items() if not isinstance(value, int) or value < 1}
    bad |= {} if turned == head_dim else {"a partial RoPE of": turned}
    bad |= {} if len(blocks) == sizes["num_hidden_layers"] else {"tensors of layers": len(blocks)}
    if bad:
        got = f"{file} with {', '.join(f'{key} {value}'[:60] for key, value in bad.items())}"
        raise UserError("model", expected="one width and head count for all its layers", got=got, do=SAFETENSORS)
    settings = sizes | {
        "rms_norm_eps": take("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]) if "token_embd.weight" in tensors else 1,
    }
    rope = _rope(values, float(take("rope.freq_base", 10000.0)), sizes["max_position_embeddings"], file)
    if ROPE_FACTORS in tensors:
        rope |= _llama3_rope(_values(tensors[ROPE_FACTORS], file), rope["rope_theta"], head_dim, file)
    if architecture == "gemma3":
        settings |= _gemma_settings(values, rope, settings)
    else:
        settings["rope_parameters"] = rope
    if architecture == "llama":
        settings["attention_bias"] = "blk.0.attn_q.bias" in tensors
        settings["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    if values:
        got = f"{file} with {', '.join(sorted(values)[:3])}"
        raise UserError("model", expected=f"only known properties of {architecture}", got=got, do=SAFETENSORS)
    model_type = {"gemma3": "gemma3_text"}.get(architecture, architecture)
    with _a_model_is_described(file):
        return AutoConfig.for_model(model_type, dtype="float32", **settings)


@contextlib.contextmanager
def _a_model_is_described(file: str) -> Iterator[None]:
    """Turns what transformers says of sizes that do not go together into a UserError."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (*NOT_A_CONFIG, StrictDataclassError) as error:
        got = f"{file} ({type(error).__name__}: {' '.join(str(error).split())[-160:]})"
        raise UserError("model", expected="a GGUF file that describes its model", got=got, do=SAFETENSORS) from error


def _rope(values: dict[str, Any], theta: float, context: int, file: str) -> dict[str, Any]:
    """rope_parameters of the keys rope.scaling.*, which are taken out of `values`."""
    scaling = {key: values.pop(key) for key in list(values) if key.startswith("rope.scaling.")}
    kind = scaling.pop("rope.scaling.type", "none")
    scaling.pop("rope.scaling.finetuned", None)
    factor = scaling.pop("rope.scaling.factor", 1.0)
    original = scaling.pop("rope.scaling.original_context_length", context)
    rope: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    elif kind != "none":
        scaling[f"rope.scaling.type {kind}"] = None
    if scaling:
        got = f"{file} with {', '.join(sorted(scaling))}"
        raise UserError("model", expected="RoPE scaling none, linear, yarn or llama3", got=got, do=SAFETENSORS)
    return rope


def _llama3_rope(divisors: np.ndarray, theta: float, head_dim: int, file: str) -> dict[str, Any]:
    """Llama 3's settings that give these divisors of the RoPE frequencies; refused when the published ones do not."""
    expected, factor = "Llama 3's scaling of RoPE from 8,192 positions", float(divisors.max())
    if divisors.shape != (head_dim // 2,):
        got = f"{file} with {ROPE_FACTORS} of shape {list(divisors.shape)} for heads of {head_dim}"
        raise UserError("model", expected=expected, got=got, do=SAFETENSORS)
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    rotations = LLAMA3_ROPE["original_max_position_embeddings"] / wavelength
    smooth = np.clip((rotations - low) / (high - low), 0, 1)
    if not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-5):
        got = f"{file} with a {ROPE_FACTORS} of other settings"
        raise UserError("model", expected=expected, got=got, do=SAFETENSORS)
    return {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}


def _gemma_settings(values: dict[str, Any], rope: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Gemma3: five layers of six look back over a window only, and turn by RoPE of their own, which is never scaled."""
    layers, pattern = settings["num_hidden_layers"], values.pop("attention.sliding_window_pattern", 6)
    if not (len(pattern) == layers if isinstance(pattern, list) else _is(pattern, int) and pattern > 0):
        got = f"attention.sliding_window_pattern {str(pattern)[:60]}"
        raise UserError("model", expected=f"a pattern of {layers} layers", got=got, do=SAFETENSORS)
    if isinstance(pattern, list):
        sliding = [bool(one) for one in pattern]
    else:
        sliding = [(index + 1) % pattern != 0 for index in range(layers)]
    local = float(values.pop("rope.freq_base_swa", 10000.0))
    # Gemma3-27B alone divides by its hidden size per head, the others by the head width
    of_27b = layers == 62
    heads = settings["num_attention_heads"]
    return {
        "sliding_window": values.pop("attention.sliding_window", 1024),
        "layer_types": ["sliding_attention" if one else "full_attention" for one in sliding],
        "query_pre_attn_scalar": settings["hidden_size"] // heads if of_27b else settings["head_dim"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
            "full_attention": rope,
        },
    }


def _values(tensor, file: str) -> np.ndarray:
    """A tensor of the file, dequantized: float16 where it is F16, else float32. Shape as in PyTorch."""
    from gguf import GGMLQuantizationType, dequantize

    shape = tuple(int(size) for size in reversed(tensor.shape))
    kind = tensor.tensor_type
    try:
        if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            return np.array(tensor.data).reshape(shape)
        return dequantize(tensor.data, kind).reshape(shape)
    except (NotImplementedError, ValueError) as error:
        got = f"{file}, where {tensor.name} is {kind.name} ({error})"
        raise UserError("model", expected="tensor types that can be dequantized", got=got, do=SAFETENSORS) from error


def _weights(tensors: dict[str, Any], architecture: str, config, file: str) -> dict[str, np.ndarray]:
    """name in the model -> values."""
    block = GEMMA_BLOCK if architecture == "gemma3" else BLOCK
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights, unknown = {}, []
    for name, tensor in tensors.items():
        if name == ROPE_FACTORS:
            continue
        stem, _, kind = name.rpartition(".")
        if stem.startswith("blk."):
            _, number, part = stem.split(".", 2)
            new = f"model.layers.{number}.{block[part]}" if part in block else None
        else:
            part, new = stem, TOP.get(stem)
        if new is None or kind not in ("weight", "bias"):
            unknown.append(name)
            continue
        values = _values(tensor, file)
        if architecture == "llama" and part in heads:
            values = _neighbors_apart(values, heads[part])
        if architecture == "gemma3" and part.endswith("norm"):
            values = values - np.float32(1)
        weights[f"{new}.{kind}"] = np.ascontiguousarray(values)
    if unknown:
        got = f"{file} with {len(unknown)} others: {', '.join(unknown[:3])}"
        raise UserError("model", expected=f"only the tensors of {architecture}", got=got, do=SAFETENSORS)
    return weights


def _neighbors_apart(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head from llama.cpp's order (a pair turned by RoPE side by side) to transformers' (half a head apart)."""
    if rows.shape[0] % (2 * heads):
        return rows  # the check of shapes refuses it
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _finish(config, weights: dict[str, np.ndarray], tokenizer, metadata: dict[str, Any], file: str) -> list[str]:
    """Checks that model, weights and tokenizer fit, drops a head that only repeats the embedding; what there is to say."""
    from transformers import AutoModelForCausalLM

    notes = []
    head, embedding = weights.get("lm_head.weight"), weights.get("model.embed_tokens.weight")
    if head is not None and embedding is not None and np.array_equal(head, embedding):
        del weights["lm_head.weight"]
        config.tie_word_embeddings = True
        notes.append("its head only repeats the embedding, they are tied")
    with (
        _a_model_is_described(file),
        torch.device("meta"),
    ):  # init_empty_weights would make each tensor first
        empty = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(empty).__name__]
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    wanted = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items() if name not in tied}
    got = {name: values.shape for name, values in weights.items()}
    if wanted != got:
        wrong = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
        shown = f"{wrong[0]} is {got.get(wrong[0], 'absent')}, and {wanted.get(wrong[0], 'absent')} in the model"
        expected = f"the {len(wanted)} tensors of the model that the file describes"
        raise UserError("model", expected=expected, got=f"{file} with {len(wrong)} others: {shown}", do=SAFETENSORS)
    if len(tokenizer) > config.vocab_size:
        got = f"{file} with {len(tokenizer)} tokens"
        raise UserError("model", expected=f"tokens for {config.vocab_size} embedding rows", got=got, do=SAFETENSORS)
    broken = check_chat_template(tokenizer)
    if broken:
        tokenizer.chat_template = None
        notes.append(f"its chat template does not work ({broken}) and is left out")
    elif tokenizer.chat_template is None:
        notes.append("it has no chat template")
    return notes
