"""What remains after a crash: one full state dict from any ZeRO stage, folders that are complete or absent, and the newest
complete checkpoint.

A Trainer's `checkpoint-N` is written file by file by all ranks (DeepSpeed's `global_stepN/` has one part per rank), so
the presence of any of them proves nothing. Here a checkpoint is complete when it holds `complete.json`, which rank 0
writes last, after every rank has arrived and every file is on the disk:

    {"world_size": 2, "files": {"model.safetensors": {"bytes": 4711, "sha256": "9f86..."}, ...}}

Files that are missing, were cut short or changed later (a failing disk, an interrupted copy) are noticed before they are
loaded. The checkpoint before is used then.
"""

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from bitdistill.distributed import process_group
from bitdistill.errors import UserError
from bitdistill.files import checksum, flush, flush_tree, write_whole

MARKER = "complete.json"


def full_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """The whole model, fp32 on CPU, from any ZeRO stage. Every rank must call it: gathering is collective.

    Args:
        model: a Hugging Face model, or the DeepSpeed engine around it (`trainer.model_wrapped`; `trainer.model` does as
            well). Its floating-point parameters must be the fp32 masters, as with every preset; a frozen bf16 model
            without an engine is widened, which is exact.

    Returns: on rank 0 `{name: tensor}` with the names of `model.state_dict()`; floating-point tensors fp32, contiguous,
        on CPU, not shared with the model. Tied weights appear under each name and share memory. None on other ranks.

    Raises:
        UserError: an engine in DeepSpeed's own bf16 or fp16 mode, whose fp32 masters are not in the module.

    Numerics: exact, bit for bit.
    """
    engine_half = getattr(model, "bfloat16_enabled", bool)() or getattr(model, "fp16_enabled", bool)()
    if engine_half and any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "model",
            expected="fp32 parameters",
            got="an engine in DeepSpeed's bf16 or fp16 mode",
            do="Use presets.deepspeed_config, which keeps fp32 masters in the module.",
        )
    module = getattr(model, "module", model)  # the engine's, or the model itself
    names: dict[int, str] = {}  # id of a parameter -> its first name: ties stay ties, and each is gathered once
    state: dict[str, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        first = names.setdefault(id(tensor), name)
        if first == name:
            with _whole(tensor):  # on every rank, the same ones in the same order
                if process_group.is_main():
                    state[name] = _copy(name, tensor)
        elif process_group.is_main():
            state[name] = state[first]
    return state if process_group.is_main() else None


def _whole(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Inside, a ZeRO-3-partitioned parameter has its full shape and values; others have them anyway."""
    if not hasattr(tensor, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor])


def _copy(name: str, tensor: Tensor) -> Tensor:
    expected = getattr(tensor, "ds_shape", tensor.shape)
    assert tensor.shape == expected, f"{name}: {tuple(tensor.shape)} instead of {tuple(expected)}: not gathered"
    assert not tensor.is_meta, f"{name}: has no values"
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()


@contextlib.contextmanager
def save_folder_atomically(path: str | Path) -> Iterator[Path]:
    """A folder that appears under its name only when it is whole. One process (rank 0) may use it per path.

        with save_folder_atomically(run / "distill") as folder:
            model.save_pretrained(folder)

    Yields: an empty folder beside `path` (`.NAME.unfinished`, same file system). At the end its files are flushed to
    disk and it is renamed. A folder that was at `path` before is exchanged in one system call where the file system can
    (Linux renameat2), so that at any moment either the old or the new one is there; elsewhere it is moved to
    `.NAME.old` first. After an exception nothing is left and `path` is as it was; what a killed process left is removed
    by the next one.
    """
    path = Path(path)
    unfinished, old = path.with_name(f".{path.name}.unfinished"), path.with_name(f".{path.name}.old")
    path.parent.mkdir(parents=True, exist_ok=True)
    if old.exists() and not path.exists():  # killed between the two renames of the slow way: the old one is whole
        old.rename(path)
    for leftover in (unfinished, old):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        flush_tree(unfinished)
        if not path.exists():
            unfinished.rename(path)
        elif _exchange(unfinished, path):
            unfinished.rename(old)
        else:
            path.rename(old)
            unfinished.rename(path)
        flush(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two folders in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc >= 2.28
    if renameat2 is None:
        return False
    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code), str(a), None, str(b))


def mark_complete(folder: str | Path) -> None:
    """Declares a checkpoint folder complete. Every rank calls it, after its own part is written.

    From a Trainer, in a callback: `on_save(args, state, ...)` runs on every rank after the rank's part was saved:
    `mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")`. Keep `save_total_limit` at 2 or more,
    because the Trainer deletes old checkpoints before the new one is marked.
    """
    folder = Path(folder)
    process_group.barrier()
    if process_group.is_main():
        flush_tree(folder)
        there = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARKER]
        files = {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": checksum(path)} for path in there
        }
        write_whole(folder / MARKER, json.dumps({"world_size": process_group.world_size(), "files": files}, indent=1))
    process_group.barrier()


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete and undamaged `checkpoint-N` in `folder`, for `trainer.train(resume_from_checkpoint=...)`.

    Every rank calls it. Newer ones that cannot be used are said, and put out of the way: an unfinished one is removed, a
    damaged one becomes `damaged-checkpoint-N`. Left where they are, they would count as the newest when the Trainer deletes
    old ones, in the place of one that is good.

    Returns: its path, or None when there is none (or no folder). `ranks_of` says how many ranks wrote it.
    """
    found = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for checkpoint in sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        problem, marker = _completeness(checkpoint)
        if problem is None:
            return checkpoint
        process_group.say(f"{checkpoint}: skipped, {problem}")
        process_group.barrier()  # every rank has looked at it
        if process_group.is_main():
            _put_away(checkpoint, damaged=bool(marker))
    return None


def ranks_of(checkpoint: Path) -> int:
    """How many ranks wrote a complete checkpoint."""
    return int(json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["world_size"])


def problem_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's folder, in words; None when it is complete and undamaged. Nothing is changed."""
    return _completeness(checkpoint)[0]


def _put_away(checkpoint: Path, damaged: bool) -> None:
    if damaged:
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
    else:
        shutil.rmtree(checkpoint)


def _completeness(checkpoint: Path) -> tuple[str | None, dict]:
    """(what is wrong or None, the marker, empty when there is none that can be read)."""
    try:
        marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        files = {name: (known["bytes"], known["sha256"]) for name, known in marker["files"].items()}
        int(marker["world_size"])
    except FileNotFoundError:
        return f"unfinished: it has no {MARKER}", {}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MARKER} is damaged", {"damaged": True}
    for name, (size, digest) in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing", marker
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}", marker
        if checksum(file) != digest:
            return f"{name} is damaged: its checksum is not the one that was written down", marker
    return None, marker
