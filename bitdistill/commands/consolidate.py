"""`bitdistill consolidate`: one Hugging Face folder from the checkpoint of a stage that is not finished, however many ranks wrote
it, without starting them."""

import re
import shutil
from pathlib import Path
from typing import Literal

from bitdistill.errors import UserError
from bitdistill.text_files import user_path

BESIDE = ("generation_config.json",)  # what a checkpoint has beside the weights, where the model has it
STAGES = ("distill", "pretrain", "refine", "teacher", "trim", "base")  # whose results have the run's tokenizer


def consolidate(source: str, output: str, dtype: Literal["float32", "bfloat16", "float16"] = "float32") -> None:
    """Puts the parts of a sharded checkpoint together: weights, configuration and tokenizer in one folder.

    A student's folder can be a run's --student, and loads with `bitdistill.load_student`; a full-precision model's is like any
    other. The masters of a student are fp32: round them to another dtype only for looking at.

    Args:
        source: a run directory, whose newest complete checkpoint is taken, or a folder checkpoint-N of it.
        output: the folder to write; it must not exist.
        dtype: of the floating-point weights.

    Raises:
        UserError: no complete and undamaged checkpoint, an output that is there, or no tokenizer in the run.
    """
    import torch
    from safetensors.torch import save_file

    from bitdistill.distributed.checkpoint import ranks_of, save_folder_atomically
    from bitdistill.distributed.saved_state import form_of, read_state
    from bitdistill.student.loading import load_tokenizer
    from bitdistill.student.model_weights import read_json

    checkpoint, target = _checkpoint_of(user_path(source, "source")), user_path(output, "output")
    if target.exists():
        do = "Name a folder that does not exist yet, or remove this one."
        raise UserError("output", expected="a new folder", got=output, do=do)
    tokenizer = load_tokenizer(_tokenizer_of(checkpoint))
    config = read_json(checkpoint / "config.json", "source")
    state = read_state(checkpoint)
    tensors = {
        name: tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        for name, tensor in state.masters()
        if not (name == "lm_head.weight" and config.get("tie_word_embeddings"))
    }
    with save_folder_atomically(target) as folder:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        for name in ("config.json", *(name for name in BESIDE if (checkpoint / name).is_file())):
            shutil.copyfile(checkpoint / name, folder / name)
        tokenizer.save_pretrained(folder)
    weights, ranks = sum(tensor.numel() for tensor in tensors.values()), ranks_of(checkpoint)
    kind = "a student" if "bitdistill" in config else "a full-precision model"
    wrote = f"{ranks} rank{'s' if ranks > 1 else ''} {form_of(checkpoint)}"
    print(f"{target}: {kind} of {weights:,} weights in {dtype}, from {checkpoint} (written on {wrote})")


def _checkpoint_of(path: Path) -> Path:
    """A complete checkpoint: the folder itself, or the newest of a run."""
    from bitdistill.distributed.checkpoint import problem_of

    if re.fullmatch(r"checkpoint-\d+", path.name):
        problem = "no such folder" if not path.is_dir() else problem_of(path)
        if problem is None:
            return path
        do = "Take the checkpoint before it, or let the run write another one."
        raise UserError("source", expected="a complete checkpoint", got=f"{path}, which is not: {problem}", do=do)
    found = [one for one in path.glob("checkpoints/*/checkpoint-*") if one.parent.name != "aside"]
    newest_first = sorted(
        found, key=lambda one: (one.parent.stat().st_mtime, int(one.name.split("-")[1])), reverse=True
    )
    for checkpoint in newest_first:
        problem = problem_of(checkpoint)
        if problem is None:
            return checkpoint
        print(f"{checkpoint}: skipped, {problem}")
    finished = [stage for stage in STAGES if (path / stage / "done.json").is_file()]
    got = f"{path} with none" if path.is_dir() else f"{path} (no such folder)"
    do = "Name the folder that a run was given as --output_dir, or one of its checkpoint-N."
    if finished:
        do = f"Take {path / finished[0]}, which is finished and one folder already."
    raise UserError("source", expected="a run with a complete checkpoint", got=got, do=do)


def _tokenizer_of(checkpoint: Path) -> str | Path:
    """Where the tokenizer of a checkpoint's run is: with the result of a stage before it, else where the settings say."""
    from bitdistill.yaml_files import read_yaml

    run = checkpoint.absolute().parents[2]
    for stage in STAGES:
        if any((run / stage / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            return run / stage
    path = run / "config.yaml"
    settings = read_yaml(path, "source") if path.is_file() else {}
    named = settings.get("student") or settings.get("model")
    if named is None and (run / "demo").is_dir():
        named = next((file.parent for file in (run / "demo").rglob("tokenizer.json")), None)
    if named is None:
        do = "Leave the checkpoint in its run's folder: RUN/checkpoints/STAGE/checkpoint-N."
        raise UserError("source", expected="a checkpoint of a run with a tokenizer", got=str(checkpoint), do=do)
    return named
