"""`bitdistill export`: the student in another tool's format, proved by the tool, with its card, and uploaded when asked."""

import json
from pathlib import Path
from typing import Any, Literal

from bitdistill.commands.options import require_at_least
from bitdistill.errors import UserError
from bitdistill.reporting.shapes import INTERVAL, NUMBER, fits
from bitdistill.text_files import user_path

# What the card shows of evaluate/scores.json.
ROW = {"setting!": str, "score!": NUMBER, "interval!": INTERVAL, "examples!": int}
SCORES = {"task!": str, "metric!": str, "rows!": [ROW]}


def export(
    run: str,
    format: Literal["gguf", "transformers", "compressed-tensors", "mlx"] | None = None,
    output: str | None = None,
    type: str = "auto",
    embedding: Literal["f16", "q8_0", "q4_0"] = "q8_0",
    prove: bool = True,
    tool_python: str | None = None,
    threads: int | None = None,
    push_to_hub: str | None = None,
) -> None:
    """Writes a run's student in the format of another tool, and lets that tool prove it where it is installed.

    Args:
        run: a run directory with a finished student.
        format: gguf (llama.cpp, Ollama, LM Studio), transformers, compressed-tensors (transformers, vLLM), or mlx (mlx-lm);
            always needed.
        output: the file (gguf) or folder to write: by default RUN/export/student.gguf or RUN/export/student-FORMAT.
        type: the type of the ternary matrices in a gguf file: auto, tq2_0, tq1_0, q4_0, q2_k, q2_0 or f16.
        embedding: the type of the embedding and LM head in a gguf file.
        prove: False writes the file without a proof by the tool.
        tool_python: the python of another environment, in which the tool is installed; it need not have this project.
        threads: CPU threads of the tool; all by default.
        push_to_hub: USER/NAME of a repository on the Hugging Face hub, to which export and card are uploaded (private when it
            is new). Log in with `hf auth login` before.
    """
    from bitdistill.cpus import available_cpus
    from bitdistill.export.deliver import deliver, proof_texts

    if format is None:
        do = "Say --format gguf for llama.cpp and Ollama; `bitdistill check` shows which format opens where."
        raise UserError("format", expected="gguf, transformers, compressed-tensors or mlx", got="none", do=do)
    folder = user_path(run, "RUN")
    if not (folder / "distill" / "model.safetensors").is_file():
        do = "Train one first: deepspeed bitdistill/train.py --stage all."
        raise UserError("RUN", expected="a run directory with a finished student (RUN/distill)", got=run, do=do)
    options = {"linear_type": type, "embedding_type": embedding, "prove": prove, "python": tool_python}
    require_at_least("threads", threads, 1)
    options |= {"threads": threads or available_cpus(), "about": about_run(folder)}
    result = deliver(folder / "distill", format, output, proof_texts(folder), **options)
    _print_result(format, result)
    if push_to_hub is not None:
        from bitdistill.export.card import upload

        print(f"uploaded: {upload(push_to_hub, result['files'])}")


def about_run(run: Path) -> dict[str, Any]:
    """What the model card says of a run: its base model, task, corpus and scores.

    Args:
        run: the run directory.

    Raises:
        UserError: config.yaml or scores.json holds something else than a run writes.
    """
    from bitdistill.yaml_files import read_yaml

    path = run / "config.yaml"
    settings = read_yaml(path, "RUN") if path.is_file() else {}
    found = {name: settings.get(name) for name in ("model", "task", "corpus")}
    for name, value in found.items():
        if not isinstance(value, str | None):
            raise UserError(f"RUN {path}", expected=f"a text for {name}", got=repr(value)[:80], do="Mend the file.")
    return {"base": found.pop("model"), **found, "scores": _scores(run / "evaluate" / "scores.json")}


def _scores(path: Path) -> dict[str, Any]:
    """What a run's evaluation found; empty when there was none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        right = fits(content, SCORES)
    except (ValueError, RecursionError):
        right = False
    if not right:
        do = "Run --stage evaluate again, which writes it; or remove it: the card then says that nothing was measured."
        raise UserError("RUN", expected="scores as the evaluation writes them", got=str(path), do=do)
    return content


def _print_result(format: str, result: dict[str, Any]) -> None:
    """Sizes, what lies beside the file, and the proof."""
    print(f"{result['path']}: {result['file_bytes']:,} bytes, {result['bits_per_weight']:.2f} bits per ternary weight")
    if format == "gguf":
        types = ", ".join(f"{count} matrices {kind}" for kind, count in result["types"].items())
        print(f"architecture {result['architecture']}: {types}; embedding {result['embedding_type']}")
    print(f"model card: {result['files']['README.md']}")
    proof = result["proof"]
    if proof is None:
        print(f"The weights are read back bit for bit; unproven in the tool: {result['unproven']}.")
        return
    print(
        f"proved by {proof['tool']} on {proof['tokens']} tokens: mean KL {proof['mean_kl']:.2g}, same likeliest token "
        f"{100 * proof['same_top1']:.1f} %, perplexity x {proof['perplexity_ratio']:.4f}, greedy "
        f"{100 * proof['same_greedy']:.0f} % of {proof['greedy_tokens']} tokens"
    )
