"""Opens a finished student: from its packed file, or from the run directory that holds one."""

from pathlib import Path

from bitdistill.errors import UserError
from bitdistill.runtime.cpu import Runtime
from bitdistill.text_files import user_path


def find_packed(run_or_file: str | Path) -> Path:
    """The packed student of a run directory, or the file itself.

    Args:
        run_or_file: a run directory with a finished export stage, or a packed file.

    Raises:
        UserError: neither is there.
    """
    path = user_path(run_or_file, "RUN_OR_FILE")
    if path.is_dir():
        path = path / "export" / "student.safetensors"
    if not path.is_file():
        raise UserError(
            "RUN_OR_FILE",
            expected="a run directory with a finished export stage, or a packed file",
            got=f"{run_or_file} (no {path})",
            do="Check the path. If the run is not finished, run its export stage: --stage export.",
        )
    return path


def load(
    run_or_file: str | Path,
    threads: int | None = None,
    kv_cache: str = "bf16",
    context: int | None = None,
    lookup: int = 0,
) -> Runtime:
    """Opens a packed student for inference on this CPU. Needs neither torch nor transformers.

    Args:
        run_or_file: a run directory with a finished export stage, or a packed file.
        threads: CPU threads; all cores that this process may use by default.
        kv_cache: how keys and values are stored: "bf16", "fp32" or "int8".
        context: the most positions that a prompt and its answer may have; the model's own limit by default.
        lookup: tokens that may be looked up in the prompt and the answer so far and computed at once; 0 for none. Answers are
            the same.

    Returns: the Runtime: `predict`, `generate`, `generate_batch`, `logits`, `classify`.

    Raises:
        UserError: there is no such file, it is damaged or foreign, or a setting is out of its range.
    """
    return Runtime(find_packed(run_or_file), threads, kv_cache, context, lookup)
