"""What can be checked before the first training step: a function for each thing that can be wrong, on plain arguments.

`preflight.py` calls them with the settings of a run.
"""

import shutil
from pathlib import Path
from typing import Any

import torch

from bitdistill.cpus import control_groups, read_lines
from bitdistill.distributed import process_group
from bitdistill.errors import UserError
from bitdistill.folders import why_not_writable
from bitdistill.student.loading import check_same_tokenizer, check_same_vocabulary
from bitdistill.student.model_weights import not_finite
from bitdistill.student.refine import refine
from bitdistill.training.capture import AttentionCapture
from bitdistill.training.relations import relation_loss

OVERFLOW_FLOAT16 = ("gemma3_text",)  # families whose activations exceed float16's largest number, 65,504


def fitted_length(setting: str, value: int, positions: int, explicit: bool) -> int:
    """A number of tokens that the model has positions for: a default is lowered to the model's limit, a wish is refused."""
    if value <= positions:
        return value
    if explicit:
        do = f"Give at most {positions}, or leave {setting} out: its default becomes the model's limit."
        raise UserError(setting, expected=f"at most {positions}, the model's positions", got=str(value), do=do)
    return positions


def fitted_dtype(model_type: str, dtype: str, explicit: bool) -> str:
    """A teacher's dtype that its activations fit in: a default of float16 becomes bfloat16 for Gemma3, a wish is refused."""
    if dtype != "float16" or model_type not in OVERFLOW_FLOAT16:
        return dtype
    if explicit:
        expected = f"bfloat16 or float32 for {model_type}, whose activations exceed float16's largest number, 65,504"
        raise UserError("teacher.dtype", expected=expected, got=dtype, do="Give --teacher.dtype bfloat16.")
    return "bfloat16"


def check_schedule(setting: str, name: str) -> None:
    """Raises UserError for a learning-rate schedule that transformers lacks, or cannot make from warm-up and steps alone."""
    from transformers import SchedulerType, get_scheduler

    def usable(kind: str) -> bool:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        try:
            get_scheduler(kind, optimizer, num_warmup_steps=1, num_training_steps=10)
        except (ValueError, TypeError):
            return False
        return kind not in ("reduce_lr_on_plateau", "greedy")  # which want a metric that training does not have

    if name not in {kind.value for kind in SchedulerType} or not usable(name):
        known = ", ".join(kind.value for kind in SchedulerType if usable(kind.value))
        do = "Choose one of these; `cosine` is the recipes'."
        raise UserError(setting, expected=f"one of {known}", got=repr(name), do=do)


def check_trackers(names: list[str]) -> None:
    """Raises UserError for a tracker that transformers does not know, or whose package is not installed."""
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in names:
        if name in ("all", "none"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            raise UserError(
                "report_to", expected=f"trackers among {known}", got=repr(name), do="Or give --report_to []."
            )
        if name not in get_available_reporting_integrations():
            do = f"Install it (pip install {name.replace('_', '-')}), or leave it out of report_to."
            raise UserError("report_to", expected="trackers that are installed", got=f"{name}, which is not", do=do)


def empty_model(config):
    """The model that a configuration describes, without numbers: for checks of shapes."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def check_surgery(config, **surgery: Any) -> str:
    """The surgery, tried on a model without numbers. Returns what it will do; raises what `refine` refuses.

    Args:
        config: of the base model. surgery: settings of `refine`.
    """
    return str(refine(empty_model(config), **surgery))


def check_relations(teacher, student, *, layers: list[int], teacher_layers: list[int] | None, **settings: Any) -> None:
    """Raises UserError for relation layers that the models lack, and for heads that cannot be regrouped.

    Args:
        teacher, student: configurations. layers, teacher_layers: as in distill.relation_layers.
        settings: of `relations.relation_loss`: convention, split_heads, temperature, causal.
    """
    AttentionCapture(empty_model(student), layers)
    AttentionCapture(empty_model(teacher), teacher_layers or layers)
    several = {"num_layers": len(layers)} if settings["convention"] == "pr382" else {}
    relation_loss(_relation_tensors(teacher), _relation_tensors(student), None, **settings, **several)


def _relation_tensors(config) -> tuple[torch.Tensor, ...]:
    """Q, K and V of two tokens."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return tuple(torch.ones(1, count, 2, width) for count in (heads, groups, groups))


def check_teacher(teacher: str | Path, config, student: str | Path, student_config) -> None:
    """Raises UserError when a teacher's logits cannot be compared with the student's token by token."""
    check_same_tokenizer(teacher, student)
    check_same_vocabulary(config, student_config)


def check_numbers(setting: str, folder, dtype: torch.dtype) -> str:
    """Raises UserError for weights that are not finite in the dtype that they will be loaded in. All ranks share the reading.

    Args:
        setting: what the user calls the model. folder: its ModelFolder. dtype: of the loaded model.
    """
    part, parts = process_group.rank(), process_group.world_size()
    wrong = next(filter(None, process_group.gather(not_finite(folder.tensors, dtype, part, parts))), None)
    if wrong:
        do = "Take another copy of the model, or another dtype where these numbers overflow."
        raise UserError(setting, expected="finite weights", got=f"{folder.path}, where {wrong}", do=do)
    return f"{folder.parameters:,} numbers, all finite"


def check_memory(needed: dict[str, dict[str, float]], free: int, ranks: int, where: str) -> str:
    """Raises UserError when a stage cannot fit into the memory that is free.

    Args:
        needed: {stage: {part: bytes}} of one rank, as `planning.memory_parts` counts them. free: bytes.
        ranks: that share the free memory. where: "on the GPU" or "of memory", for the message.

    Returns: the largest stage, in words.
    """
    totals = {stage: ranks * sum(parts.values()) for stage, parts in needed.items()}
    stage = max(totals, key=lambda one: totals[one])
    words = f"{totals[stage] / 1e9:.3g} GB {where} for stage {stage}"
    if totals[stage] > free:
        parts = ", ".join(f"{part} {ranks * size / 1e9:.2g}" for part, size in needed[stage].items() if size > 1e7)
        do = "Take a smaller model or batch, more ranks with --zero 3, or --offload cpu beside a GPU; see bitdistill plan."
        raise UserError("memory", expected=f"{words} ({parts})", got=f"{free / 1e9:.3g} GB free", do=do)
    return f"{words} at least, of {free / 1e9:.3g} GB free"


# Files of a control group in versions 2 and 1: its limit, what is used of it, and the name of what the system can take back
# in memory.stat: copies of files, which count as used.
MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory() -> int:
    """Bytes that this process can have: of the GPU where there is one, else of the machine and its control groups."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    lines = read_lines(Path("/proc/meminfo"))
    found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    for group in control_groups("memory"):
        for limit, used, copies in MEMORY_FILES:
            most, now = (" ".join(read_lines(group / name)).strip() for name in (limit, used))
            if most.isdigit() and now.isdigit():
                statistics = dict(line.split(" ", 1) for line in read_lines(group / "memory.stat") if " " in line)
                found.append(max(0, int(most) - int(now) + int(statistics.get(copies, 0))))
    return min(found, default=1 << 62)


def peak_on_disk(stages: list[tuple[int, int, int]]) -> int:
    """The most that a run adds to its disk.

    Args:
        stages: (bytes of its checkpoints, bytes of its result, bytes of an earlier result that it replaces), in order.
    """
    peak = kept = 0
    for checkpoints, result, replaced in stages:
        peak = max(peak, kept + checkpoints + result)
        kept += result - replaced
    return peak


def check_disk(folder: Path, needed: int) -> str:
    """Raises UserError when the results and checkpoints of a run do not fit on the disk of its folder."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        expected = f"{needed / 1e9:.3g} GB free for the results and checkpoints of this run"
        do = "Make room, give --output_dir on another disk, or set save_steps of the stages to 0."
        raise UserError("output_dir", expected=expected, got=f"{free / 1e9:.3g} GB in {folder}", do=do)
    return f"{needed / 1e9:.3g} GB of {free / 1e9:.3g} GB free"


def check_folder(folder: Path) -> None:
    """Raises UserError when nothing can be written to a run's folder."""
    reason = why_not_writable(folder)
    if reason is not None:
        do = "Give --output_dir on a disk that can be written to."
        raise UserError("output_dir", expected="a folder that can be written to", got=f"{folder}: {reason}", do=do)
