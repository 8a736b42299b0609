"""A student in the format of another tool: written, proved by that tool if it is installed, and removed if the proof fails.

bitdistill export RUN --format gguf | transformers | compressed-tensors | mlx

A model card is written beside it, and an Ollama Modelfile beside a GGUF file.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from bitdistill.errors import UserError
from bitdistill.export.agreement import NEW_TOKENS, prove_agreement
from bitdistill.export.card import proof_of_tool, write_card, write_modelfile
from bitdistill.export.gguf_file import write_gguf
from bitdistill.export.hugging_face import write_hugging_face
from bitdistill.export.tools import TOOLS, tool_version
from bitdistill.files import write_whole
from bitdistill.text_files import user_path

PROOF_TEXTS, PROOF_TOKENS = 8, 128
BESIDE = ("README.md", "Modelfile", "proof.json")  # of a GGUF file, under its name


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
    python: str | None = None,
    about: dict[str, Any] | None = None,
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
        python: the interpreter of the environment that has the tool; this one by default.
        about: for the card: base, task, corpus and scores, as `card.write_card` takes them.

    Returns: what was written (path, sizes), "files" (name in a repository -> file) and "proof": its figures, or None with
        "unproven" saying why.

    Raises:
        UserError: the format has no place for this student, the output exists, or the proof failed.
    """
    from bitdistill.student.loading import load_tokenizer
    from bitdistill.student.refine import load_student

    if format not in TOOLS:
        raise UserError("format", expected=f"one of {', '.join(TOOLS)}", got=format, do="Choose one of these.")
    folder = Path(student_folder)
    default = folder.parent / "export" / ("student.gguf" if format == "gguf" else f"student-{format}")
    path = user_path(output, "output") if output else default
    if not output:
        path.parent.mkdir(exist_ok=True)  # the run's own, which its export stage makes
    if not path.parent.is_dir():
        raise UserError("output", expected="a path in an existing folder", got=str(path), do="Create its folder first.")
    model, tokenizer = load_student(folder).eval(), load_tokenizer(folder)
    if format == "gguf":
        written = write_gguf(path, model, tokenizer, linear_type=linear_type, embedding_type=embedding_type)
    else:
        written = write_hugging_face(path, model, tokenizer, format)
    result = {"path": str(path), **written, "proof": None}
    prompts = _prompts(tokenizer, texts, model.config.max_position_embeddings)
    installed = python is not None or tool_version(format) is not None
    if not prove:
        result["unproven"] = "--prove false"
    elif not prompts:
        result["unproven"] = "no text to compare on"
    elif not installed:
        result["unproven"] = f"{TOOLS[format][1]} is not installed"
    else:
        try:
            result["proof"] = prove_agreement(format, path, model, prompts, threads, python)
        except UserError:
            if path.is_dir():
                shutil.rmtree(path)
            else:  # and what an earlier file under this name left beside it
                for file in (path, *(path.with_name(f"{path.name}.{name}") for name in BESIDE)):
                    file.unlink(missing_ok=True)
            raise
    return result | {"files": _write_beside(path, format, result, model, tokenizer, about or {})}


def _prompts(tokenizer, texts: list[str], positions: int) -> list[list[int]]:
    """Token ids of the first texts, with room for their continuations."""
    longest = max(2, min(PROOF_TOKENS, positions - NEW_TOKENS))
    encoded = tokenizer(texts[:PROOF_TEXTS])["input_ids"] if texts else []
    return [ids[:longest] for ids in encoded if len(ids) > 1]


def _write_beside(
    path: Path, format: str, result: dict[str, Any], model, tokenizer, about: dict[str, Any]
) -> dict[str, Path]:
    """Card, proof and Modelfile: in a folder, or named after a file. Returns name in a repository -> file."""
    inside = path.is_dir()

    def place(name: str) -> Path:
        return path / name if inside else path.with_name(f"{path.name}.{name}")

    if result["proof"] is None:
        place("proof.json").unlink(missing_ok=True)  # of an earlier file under this name
    else:
        write_whole(place("proof.json"), json.dumps(result["proof"], indent=1))
    text = proof_of_tool(format, result["proof"], result.get("unproven", ""))
    surgery = {key: value for key, value in model.config.bitdistill.items() if key != "format_version"}
    empty = {"base": None, "task": None, "corpus": None, "scores": {}}
    write_card(
        place("README.md"),
        format=format,
        file=path.name,
        written=result,
        surgery=surgery,
        proof=text,
        **(empty | about),
    )
    if format == "gguf":
        write_modelfile(place("Modelfile"), path.name, tokenizer)
    if inside:
        return {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
    beside = {name: place(name) for name in BESIDE}
    return {path.name: path} | {name: file for name, file in beside.items() if file.is_file()}


def proof_texts(run: str | Path) -> list[str]:
    """Texts of a run's validation rows, one of each row, as its evaluation kept them; none when there was no evaluation."""
    path = Path(run) / "evaluate" / "predictions.jsonl"
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8") as file:
            rows = [json.loads(line) for _, line in zip(range(PROOF_TEXTS), file, strict=False)]
        return ["\n".join(value for value in row.values() if isinstance(value, str)) for row in rows]
    except (ValueError, AttributeError, RecursionError) as error:  # AttributeError: a row that is no object
        do = "Run --stage evaluate again, which writes it; or remove it: the file is unproven then."
        got = " ".join(str(error).split())[:160]
        raise UserError(f"{path}", expected="a JSON object a line", got=got, do=do) from error
