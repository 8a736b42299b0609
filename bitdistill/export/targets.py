"""Where a student can run: one row for each common tool, decided before any training from the configuration alone.

`--deploy_target NAME` chooses settings with which the student opens in that tool (`settings_for`); `verdicts` says for every tool
whether a student with given settings opens there, as what, and how large it is. The facts: docs/export.md.
"""

from dataclasses import dataclass
from typing import Any

from bitdistill.export.gguf_blocks import AUTO, TYPES
from bitdistill.export.gguf_file import gguf_obstacles
from bitdistill.export.hugging_face import MLX_GROUPS, hugging_face_obstacles
from bitdistill.names import PROJECTIONS

TABLE_BITS = {"packed": 8.0, "gguf": 8.5}  # of embedding and LM head by default: int8, Q8_0; everything else keeps 16
# Gigabytes of weights that decoding reads per second, by file type: Qwen3-0.6B on two cores of an AMD EPYC with AVX2 and
# 29.6 GB/s of memory bandwidth (docs/performance.md, bench/peers.py). Types that are not here were not measured.
DECODE_GIGABYTES = {"base3": 25.5, "f16": 30.5, "q4_0": 23.2, "tq2_0": 19.6, "tq1_0": 12.3}
SMALLEST_READ = 32e6  # bytes of a token from which on reading them takes most of the time; less may stay in the cache


@dataclass(frozen=True)
class Target:
    """A tool. `format` is that of `bitdistill export`, None where this project writes nothing for it; `types` are the GGUF
    types that it reads, the smallest first; `gives_up` is what a student trained for it does without."""

    name: str
    title: str
    format: str | None
    types: tuple[str, ...] = ()
    gives_up: tuple[str, ...] = ()


NO_SUBLN = "SubLN before o_proj and down_proj: the paper's stage 1"
_SHARED = (NO_SUBLN,)
TARGETS = {
    target.name: target
    for target in (
        Target("bitdistill", "this project's runtime", "packed"),
        Target("llama.cpp", "llama.cpp", "gguf", AUTO, _SHARED),
        Target(
            "ollama", "Ollama, llamafile", "gguf", ("q2_k", "q4_0", "f16"), (*_SHARED, "the 2-bit types of llama.cpp")
        ),
        Target("transformers", "transformers", "transformers", (), (*_SHARED, "scales of groups of columns")),
        Target("vllm", "vLLM", "compressed-tensors", (), _SHARED),
        Target("mlx", "MLX", "mlx", (), _SHARED),
        Target("onnx-genai", "ONNX Runtime GenAI", None, (), _SHARED),
    )
}


@dataclass(frozen=True)
class Choice:
    """The settings of stage 1 that decide where a student opens, named as in `refine`."""

    norms: str = "two"
    weight_scale: str = "tensor"
    group_size: int = 128
    act_scale: str = "token"
    subln_eps: float | None = None


def row_widths(config) -> tuple[int, ...]:
    """in_features of the seven projections, each width once.

    Args:
        config: the Hugging Face config of the base model.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return tuple(sorted({config.hidden_size, config.intermediate_size, head_dim * config.num_attention_heads}))


def settings_for(name: str, config) -> dict[str, Any]:
    """The settings of `refine` that a tool can express and that lose the least.

    Args:
        name: of TARGETS. config: the Hugging Face config of the base model.

    Returns: settings by name; none for this project's own runtime, which opens every student.
    """
    if name == "bitdistill":
        return {}
    widths = row_widths(config)

    def divides(size: int) -> bool:
        return all(width % size == 0 for width in widths)

    found: dict[str, Any] = {"norms": "none", "act_scale": "block"}
    if name == "transformers":
        return found | {"weight_scale": "row"}
    # llama.cpp's small types have blocks of 256; where these do not fit, Q4_0 has room for groups of any size at no cost.
    wanted = (256, 64) if name in ("llama.cpp", "ollama") else (128, 64)
    size = next((size for size in wanted if divides(size)), None)
    return found | ({"weight_scale": "row"} if size is None else {"weight_scale": "group", "group_size": size})


def obstacles(target: Target, config, choice: Choice) -> list[str]:
    """Why a student with these settings does not open in a tool; an empty list means that it does.

    Args:
        target: of TARGETS. config: the Hugging Face config of the base model. choice: the settings of stage 1.
    """
    if target.name == "bitdistill":
        return []
    if target.format is None:
        return ["this project writes no file for it"]
    widths, size = row_widths(config), choice.group_size
    uneven = [width for width in widths if choice.weight_scale == "group" and width > size and width % size]
    found = [f"groups of {size} columns do not divide rows of {uneven[0]}"] if uneven else []
    if target.format == "gguf":
        found += gguf_obstacles(config, choice.norms, choice.subln_eps)
        if target.name == "ollama" and choice.norms != "none" and not found:
            found.append("that Ollama opens llama.cpp's bitnet architecture was never seen; use refine.norms none")
        return found
    found += hugging_face_obstacles(config, choice.norms, target.format)
    if choice.weight_scale == "group" and target.format == "transformers" and widths[-1] > size:
        found.append(
            "transformers alone reads scales of the tensor or of rows, not of groups; use refine.weight_scale row"
        )
    if choice.weight_scale == "group" and target.format == "compressed-tensors" and widths[0] < size < widths[-1]:
        found.append(f"groups of {size} columns for some matrices and whole rows for others")
    if target.format == "mlx" and any(width % MLX_GROUPS[-1] for width in widths):
        found.append(f"rows that are no multiple of {MLX_GROUPS[-1]} columns")
    return found


def matrix_types(target: Target, config, choice: Choice) -> dict[int, tuple[str, float]]:
    """The file type of the matrices of each row width, and its bits per weight.

    Args:
        target: of TARGETS, without obstacles. config: the Hugging Face config of the base model. choice: of stage 1.
    """
    found = {}
    for width in row_widths(config):
        group = min(width, choice.group_size) if choice.weight_scale == "group" else width
        if target.format == "packed":
            scales = {"tensor": 0.0, "row": 16 / width, "group": 16 / group}[choice.weight_scale]
            found[width] = ("base3", 1.6 + scales)
        elif target.format == "gguf":
            fitting = (t for t in target.types if width % TYPES[t].columns == 0 and group % TYPES[t].columns == 0)
            kind = next(fitting, "f16")
            found[width] = (kind, TYPES[kind].bits_per_weight)
        elif target.format == "mlx":
            stored = next(size for size in MLX_GROUPS if width % size == 0 and group % size == 0)
            found[width] = ("2 bits affine", 2 + 32 / stored)
        else:
            found[width] = ("2 bits", 2 + (32 if target.format == "transformers" else 16) / group)
    return found


def matrix_sizes(config) -> dict[int, int]:
    """Row width -> weights of all ternary matrices with such rows.

    Args:
        config: the Hugging Face config of the base model.
    """
    hidden, middle = config.hidden_size, config.intermediate_size
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    mixed, kept = head_dim * config.num_attention_heads, head_dim * config.num_key_value_heads
    assert len(PROJECTIONS) == 7
    found = dict.fromkeys(row_widths(config), 0)
    for rows, width in (
        (mixed, hidden),
        (kept, hidden),
        (kept, hidden),
        (hidden, mixed),
        (middle, hidden),
        (middle, hidden),
    ):
        found[width] += rows * width
    found[middle] += hidden * middle
    return {width: weights * config.num_hidden_layers for width, weights in found.items()}


def verdicts(config, choice: Choice) -> list[dict[str, Any]]:
    """Every tool, and what a student of a base model with these settings is there.

    Args:
        config: the Hugging Face config of the base model. choice: the settings of stage 1.

    Returns: one row for each of TARGETS: target, title, format, possible, why (reasons against, or ""), and where it is
        possible file_type, bits_per_weight of the ternary matrices, file_bytes (about), tokens_per_second (of decoding, on
        the machine of DECODE_GIGABYTES; None where the type was not measured, and below SMALLEST_READ).
    """
    sizes = matrix_sizes(config)
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    rows = []
    for target in TARGETS.values():
        against = obstacles(target, config, choice)
        row = {"target": target.name, "title": target.title, "format": target.format}
        row |= {"possible": not against, "why": "; ".join(against)}
        if not against:
            types = matrix_types(target, config, choice)
            bits = {width: types[width][1] * weights for width, weights in sizes.items()}
            row["file_type"] = "/".join(dict.fromkeys(kind for kind, _ in types.values()))
            row["bits_per_weight"] = sum(bits.values()) / sum(sizes.values())
            table_bits = TABLE_BITS.get(target.format, 16.0)
            row["file_bytes"] = int((sum(bits.values()) + tables * table_bits) / 8)
            head = config.vocab_size * config.hidden_size * table_bits
            row["tokens_per_second"] = _speed(types, bits, head)
        rows.append(row)
    return rows


def _speed(types: dict[int, tuple[str, float]], bits: dict[int, float], head_bits: float) -> float | None:
    """Tokens per second on the machine of DECODE_GIGABYTES, or None. The head is read as fast as the matrices of the commonest
    type."""
    kinds = {width: kind for width, (kind, _) in types.items()}
    if (
        any(kind not in DECODE_GIGABYTES for kind in kinds.values())
        or sum(bits.values()) + head_bits < 8 * SMALLEST_READ
    ):
        return None
    seconds = sum(bits[width] / 8e9 / DECODE_GIGABYTES[kinds[width]] for width in bits)
    return 1 / (seconds + head_bits / 8e9 / DECODE_GIGABYTES[kinds[max(bits, key=lambda width: bits[width])]])
