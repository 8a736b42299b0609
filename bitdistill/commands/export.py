"""`bitdistill export` writes the student in another tool's format; `bitdistill check` says which formats are possible."""

import sys
from pathlib import Path
from typing import Literal

from bitdistill.commands.options import require_at_least
from bitdistill.errors import UserError


def export(
    run: str,
    format: Literal["gguf", "transformers", "compressed-tensors", "mlx"],
    output: str | None = None,
    type: str = "auto",
    embedding: Literal["f16", "q8_0", "q4_0"] = "q8_0",
    prove: bool = True,
    threads: int | None = None,
) -> None:
    """Writes a run's student in the format of another tool, and lets that tool prove it where it is installed.

    Args:
        run: a run directory with a finished student.
        format: gguf (llama.cpp, Ollama, LM Studio), transformers, compressed-tensors (transformers, vLLM), or mlx (mlx-lm).
        output: the file (gguf) or folder to write: by default RUN/export/student.gguf or RUN/export/student-FORMAT.
        type: the type of the ternary matrices in a gguf file: auto, tq2_0, tq1_0, q4_0, q2_0 or f16.
        embedding: the type of the embedding and LM head in a gguf file.
        prove: False writes the file without a proof by the tool.
        threads: CPU threads of the tool; all by default.
    """
    from bitdistill.cpus import available_cpus
    from bitdistill.export.deliver import deliver, proof_texts

    folder = Path(run).expanduser()
    if not (folder / "distill" / "model.safetensors").is_file():
        do = "Train one first: deepspeed bitdistill/train.py --stage all."
        raise UserError("RUN", expected="a run directory with a finished student (RUN/distill)", got=run, do=do)
    options = {"linear_type": type, "embedding_type": embedding, "prove": prove}
    require_at_least("threads", threads, 1)
    options["threads"] = threads or available_cpus()
    result = deliver(folder / "distill", format, output, proof_texts(folder), **options)
    print(f"{result['path']}: {result['file_bytes']:,} bytes, {result['bits_per_weight']:.2f} bits per ternary weight")
    if format == "gguf":
        types = ", ".join(f"{count} matrices {kind}" for kind, count in result["types"].items())
        print(f"architecture {result['architecture']}: {types}; embedding {result['embedding_type']}")
    proof = result["proof"]
    if proof is None:
        print(f"The weights are read back bit for bit; unproven in the tool: {result['unproven']}.")
        return
    print(
        f"proved by {proof['tool']} on {proof['tokens']} tokens: mean KL {proof['mean_kl']:.2g}, same likeliest token "
        f"{100 * proof['same_top1']:.1f} %, perplexity x {proof['perplexity_ratio']:.4f}"
    )


def check(model: str, norms: Literal["none", "two", "all"] = "two") -> None:
    """Prints into which formats a student of a base model can be exported, and why not into the others.

    Args:
        model: a base model, as a local folder or a hub id; only its config.json is read.
        norms: the student's refine.norms.
    """
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoConfig

    from bitdistill.export.deliver import deployability
    from bitdistill.student.model_folder import check_family

    try:
        config = AutoConfig.from_pretrained(str(Path(model).expanduser()))
    except (OSError, ValueError) as error:
        got = f"{model} ({str(error).strip().splitlines()[0]})"
        do = "Give a local Hugging Face folder, or a hub id when the hub can be reached."
        raise UserError("model", expected="a folder or hub id with a config.json", got=got, do=do) from error
    check_family(config)
    table = Table(title=f"{model}, refine.norms {norms}")
    for column in ("format", "opens in", "possible", "type", "bits per weight", "why not"):
        table.add_column(column, overflow="fold")
    for row in deployability(config, norms):
        possible = "yes" if row["possible"] else "no"
        cells = [
            row["format"],
            row["opens_in"],
            possible,
            row["file_type"],
            f"{row['bits_per_weight']:.2f}",
            row["why"],
        ]
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
