"""Students in the tools that people have: written in every format and type, and compared with what was trained.

    python bench/foreign_tools.py [--llama_cpp PYTHON] [--mlx PYTHON] [--transformers PYTHON] [--student FOLDER] [--rows FILE]
                                  [--only NAME ...] [--json FILE]

PYTHON is the interpreter of an environment that has the tool and need not have this project:

    python -m venv llama && llama/bin/pip install llama-cpp-python numpy          compiles for some minutes
    python -m venv mlx && mlx/bin/pip install "mlx[cpu]" mlx-lm numpy
    python -m venv hf && hf/bin/pip install torch transformers compressed-tensors numpy

Students: random ones of the four families with biases, head norms and sliding windows, for each file type and each kind of
scales; and --student, a folder as stage 1, 2 or 3 leaves it (RUN/distill), or a base model's, which becomes ternary without any
training (bench/trained_families.py trains tiny ones of all four). Compared on texts, or on the first rows of --rows: mean
KL(student || tool), same likeliest token, perplexity of the tool over the student's, and greedy continuations; and whether
the proof's bar is met, as in `bitdistill export`. "rounding" is the student against itself with activations rounded in the
other way (in blocks of 32 where it has them per token, per token where it has blocks): how much the rounding of activations
alone changes.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from bitdistill import surroundings

surroundings.prepare()

import torch
import transformers

from bitdistill.data import demo
from bitdistill.errors import UserError
from bitdistill.export.agreement import NEW_TOKENS, compare_answers, meets_bar, tool_elsewhere
from bitdistill.export.gguf_file import write_gguf
from bitdistill.export.hugging_face import write_hugging_face
from bitdistill.export.tools import tool_answers, tool_version, torch_answers
from bitdistill.student.layers import bit_linears
from bitdistill.student.loading import load_language_model, load_tokenizer
from bitdistill.student.refine import load_student, refine

TEXTS = [
    "The old harbor was quiet in the morning. Two boats lay at the pier, and nobody had come to fetch the nets.",
    "Review: a charming film, 12 of 34 viewers liked it. Verdict: good",
    "def area(width, height):\n    return width * height\n\nprint(area(3, 4))",
    "Water boils at 100 degrees Celsius at sea level; on a high mountain it boils sooner, because the air is thinner.",
]
SHAPE = {
    "vocab_size": 768,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 256, "initializer_range": 0.05}
GGUF_TYPES = ("f16", "q4_0", "q2_0", "q2_k", "tq2_0", "tq1_0")
SCALES = {"tensor": ("tensor", 128), "row": ("row", 128), "group 64": ("group", 64), "group 256": ("group", 256)}


def tiny_students(tokenizer) -> dict[str, Any]:
    """family, kind of scales -> a random student whose norms, biases and gains are random, too."""
    gemma = {
        "layer_types": [*["sliding_attention"] * 5, "full_attention"],
        "num_hidden_layers": 6,
        "sliding_window": 16,
    }
    gemma |= {"query_pre_attn_scalar": 64, "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }}  # fmt: skip
    families = {
        "llama": transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False),
        "qwen2": transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True),
        "qwen3": transformers.Qwen3Config(**(SHAPE | {"head_dim": 96}), tie_word_embeddings=True),
        "gemma3": transformers.Gemma3TextConfig(**(SHAPE | gemma)),
    }
    found = {}
    for family, config in families.items():
        config.bos_token_id, config.eos_token_id = None, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        for scales, (weight_scale, group_size) in SCALES.items():
            found[f"{family}, {scales}"] = _tiny(config, weight_scale, group_size)
    found["llama SubLN, tensor"] = _tiny(
        transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id), norms="two"
    )
    return found


def _tiny(config, weight_scale: str = "tensor", group_size: int = 128, norms: str = "none"):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    refine(model, norms=norms, weight_scale=weight_scale, group_size=group_size, act_scale="block")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "subln.weight")):
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return model.eval()


def given_student(folder: Path):
    """(model, tokenizer) of a student's folder, or of a base model's, made ternary without training."""
    if "bitdistill" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        return load_student(folder).eval(), load_tokenizer(folder)
    model = load_language_model(folder)
    refine(model, norms="none", weight_scale="group", group_size=64, act_scale="block")
    return model.eval(), load_tokenizer(folder)


def rounding(model, prompts: list[list[int]], ours) -> dict[str, Any]:
    """The student against itself with its activations rounded in the other way."""
    layers = bit_linears(model).values()
    try:
        for layer in layers:
            layer.act_scale = "block" if layer.act_scale == "token" else "token"
        return compare_answers(ours, torch_answers(model, prompts, NEW_TOKENS), prompts)
    finally:
        for layer in layers:
            layer.act_scale = "block" if layer.act_scale == "token" else "token"


def texts_of(rows: Path | None, count: int) -> list[str]:
    """The texts that are compared: TEXTS, or the first of a file of reviews, as the demo's task asks about them."""
    if rows is None:
        return TEXTS
    lines = rows.read_text(encoding="utf-8").splitlines()[:count]
    return [f"Review: {json.loads(line)['text']}\nVerdict:" for line in lines]


def examine(name: str, model, tokenizer, pythons: dict[str, str | None], texts: list[str]) -> list[dict[str, Any]]:
    """All formats and types of one student, a row each.

    Args:
        name: for the rows. model, tokenizer: the student. pythons: format -> interpreter, None for this one.
        texts: what is compared.
    """
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    ours = torch_answers(model, prompts, NEW_TOKENS)
    rows = [_row(name, "student", "other rounding", "", rounding(model, prompts, ours))]
    cases = [("gguf", kind) for kind in ("auto", *GGUF_TYPES)]
    cases += [(format, "") for format in ("transformers", "compressed-tensors", "mlx")]
    for format, kind in cases:
        if format not in pythons:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / ("student.gguf" if format == "gguf" else "student")
            try:
                if format == "gguf":
                    sizes = write_gguf(path, model, tokenizer, linear_type=kind)
                else:
                    sizes = write_hugging_face(path, model, tokenizer, format)
            except UserError as error:
                print(f"{name}, {format} {kind}: not written: {error}"[:200], file=sys.stderr)
                continue
            python = pythons[format]
            try:
                if python is None:
                    theirs, tool = tool_answers(format, path, prompts, NEW_TOKENS), tool_version(format)
                else:
                    theirs, tool = tool_elsewhere(python, format, path, prompts, NEW_TOKENS, 1)
            except UserError as error:
                rows.append({"student": name, "format": format, "type": kind, "tool": "", "refused": error.got})
                print(_line(rows[-1]), flush=True)
                continue
            types = "/".join(sizes.get("types", {kind: 0}))
            found = compare_answers(ours, theirs, prompts)
            rows.append(_row(name, format, types, tool, found) | {"bytes": sizes["file_bytes"]})
            print(_line(rows[-1]), flush=True)
    return rows


def _row(name: str, format: str, kind: str, tool: str, found: dict[str, Any]) -> dict[str, Any]:
    return {"student": name, "format": format, "type": kind, "tool": tool, **found}


def _line(row: dict[str, Any]) -> str:
    """A row of a Markdown table."""
    if "refused" in row:
        return f"| {row['student']} | {row['format']} {row['type']} | refused: {row['refused']} | | | | |"
    cells = [f"{row['mean_kl']:.1e}", f"{100 * row['same_top1']:.1f} %", f"{row['perplexity_ratio']:.4f}"]
    greedy = f"{100 * row['same_greedy']:.0f} % of {row['greedy_tokens']}"
    proven = "yes" if meets_bar(row) else "NO"
    return " | ".join([f"| {row['student']}", f"{row['format']} {row['type']}".strip(), *cells, greedy, proven]) + " |"


def main() -> None:
    """Writes, asks, compares and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--llama_cpp", metavar="PYTHON", help="interpreter of an environment with llama-cpp-python")
    parser.add_argument("--mlx", metavar="PYTHON", help="interpreter of an environment with mlx-lm")
    parser.add_argument("--transformers", metavar="PYTHON", help="one with torch, transformers and compressed-tensors")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="a JSONL file of reviews, a `text` in each line")
    parser.add_argument("--count", type=int, default=4, help="how many rows of it")
    parser.add_argument(
        "--student", type=Path, metavar="FOLDER", help="this student alone, in place of the random ones"
    )
    parser.add_argument("--only", nargs="*", default=[], help="students whose names begin so")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    arguments = parser.parse_args()
    pythons = {"gguf": arguments.llama_cpp, "mlx": arguments.mlx}
    pythons |= dict.fromkeys(("transformers", "compressed-tensors"), arguments.transformers)
    pythons = {format: python for format, python in pythons.items() if python or tool_version(format)}
    if arguments.student:
        students = {"/".join(arguments.student.resolve().parts[-2:]): given_student(arguments.student)}
    else:
        tokenizer = demo.train_tokenizer(TEXTS * 20)
        students = {name: (model, tokenizer) for name, model in tiny_students(tokenizer).items()}
    print(
        "| student | format | mean KL | same likeliest token | perplexity | greedy | bar met |\n|---|---|---|---|---|---|---|"
    )
    rows = []
    for name, (model, tokenizer) in students.items():
        if not arguments.only or name.startswith(tuple(arguments.only)):
            rows += examine(name, model, tokenizer, pythons, texts_of(arguments.rows, arguments.count))
            print(_line(next(row for row in rows if row["student"] == name)), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
