"""A student in the format of another tool: written, proved by that tool if it is installed, and removed if the proof fails.

bitdistill export RUN --format gguf | transformers | compressed-tensors | mlx
bitdistill check MODEL            what a student of a base model can become, before anything is trained
"""

import json
import shutil
from pathlib import Path
from typing import Any

from bitdistill.errors import UserError
from bitdistill.export.agreement import TOOLS, prove_agreement, tool_version
from bitdistill.export.gguf_blocks import TYPES
from bitdistill.export.gguf_file import AUTO, gguf_obstacles, write_gguf
from bitdistill.export.hugging_face import FORMATS, hugging_face_obstacles, write_hugging_face
from bitdistill.files import write_whole

PROOF_TEXTS, PROOF_TOKENS = 8, 128
NORMS = ("none", "two", "all")


def deliver(
    student_folder: str | Path,
    format: str,
    output: str | Path | None,
    texts: list[str],
    *,
    linear_type: str = "auto",
    embedding_type: str = "q8_0",
    prove: bool = True,
    threads: int = 1,
) -> dict[str, Any]:
    """Writes a finished student in a format and proves it.

    Args:
        student_folder: RUN/distill, RUN/pretrain or another stage's student.
        format: gguf, transformers, compressed-tensors or mlx.
        output: the file (gguf) or folder; beside the student's folder, under the format's name, when absent.
        texts: real texts for the proof.
        linear_type: for gguf: auto or a name of gguf_blocks.TYPES.
        embedding_type: for gguf: f16, q8_0 or q4_0.
        prove: let the tool answer the texts, when it is installed.
        threads: CPU threads of the tool.

    Returns: what was written (path, sizes) and "proof": its figures, or None with "unproven" saying why.

    Raises:
        UserError: the format has no place for this student, the output exists, or the proof failed.
    """
    from bitdistill.student.loading import load_tokenizer
    from bitdistill.student.refine import load_student

    if format not in TOOLS:
        raise UserError("format", expected=f"one of {', '.join(TOOLS)}", got=format, do="Choose one of these.")
    folder = Path(student_folder)
    default = folder.parent / "export" / ("student.gguf" if format == "gguf" else f"student-{format}")
    path = Path(output).expanduser() if output else default
    if not path.parent.is_dir():
        raise UserError("output", expected="a path in an existing folder", got=str(path), do="Create its folder first.")
    model, tokenizer = load_student(folder).eval(), load_tokenizer(folder)
    if format == "gguf":
        written = write_gguf(path, model, tokenizer, linear_type=linear_type, embedding_type=embedding_type)
    else:
        written = write_hugging_face(path, model, tokenizer, format)
    result = {"path": str(path), **written, "proof": None}
    prompts = (
        [ids[:PROOF_TOKENS] for ids in tokenizer(texts[:PROOF_TEXTS])["input_ids"] if len(ids) > 1] if texts else []
    )
    if not prove or tool_version(format) is None or not prompts:
        why = (
            "--prove false"
            if not prove
            else "no text to compare on"
            if not prompts
            else f"{TOOLS[format][1]} is not installed"
        )
        return result | {"unproven": why}
    try:
        result["proof"] = prove_agreement(format, path, model, prompts, threads)
    except UserError:
        path.unlink() if path.is_file() else shutil.rmtree(path)
        raise
    proof_path = path.with_name(f"{path.name}.proof.json") if path.is_file() else path / "proof.json"
    write_whole(proof_path, json.dumps(result["proof"], indent=1))
    return result


def proof_texts(run: str | Path) -> list[str]:
    """Texts of a run's validation rows, one of each row, as its evaluation kept them; none when there was no evaluation."""
    path = Path(run) / "evaluate" / "predictions.jsonl"
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(PROOF_TEXTS), file, strict=False)]
    return ["\n".join(value for value in row.values() if isinstance(value, str)) for row in rows]


def deployability(config, norms: str) -> list[dict[str, Any]]:
    """What a student of a base model can become, format by format.

    Args:
        config: the Hugging Face config of the base model.
        norms: refine.norms: none, two or all.

    Returns: one row for each format, the packed one first: format, opens_in, possible, why (reasons against, or ""),
        bits_per_weight of the ternary matrices, file_type.
    """
    columns = (config.hidden_size, config.intermediate_size)
    auto = [next(kind for kind in AUTO if kind == "f16" or width % TYPES[kind].columns == 0) for width in columns]
    opens = {
        "gguf": "llama.cpp, Ollama (Q4_0), LM Studio",
        "transformers": "transformers",
        "compressed-tensors": "transformers, vLLM",
        "mlx": "mlx-lm",
    }
    rows = [{"format": "packed", "opens_in": "bitdistill", "possible": True, "why": ""}]
    rows[0] |= {"file_type": "base3", "bits_per_weight": 1.6}
    for format in ("gguf", *FORMATS):
        against = gguf_obstacles(config, norms) if format == "gguf" else hugging_face_obstacles(norms, format)
        bits = (
            max(TYPES[kind].bits_per_weight for kind in auto) if format == "gguf" else 2.25 if format == "mlx" else 2.0
        )
        rows.append(
            {
                "format": format,
                "opens_in": opens[format],
                "possible": not against,
                "why": "; ".join(against),
                "file_type": "/".join(dict.fromkeys(auto)) if format == "gguf" else "2 bits",
                "bits_per_weight": bits,
            }
        )
    return rows
