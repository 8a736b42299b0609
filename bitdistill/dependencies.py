"""ENTRY (the part of train.py that knows what results depend on): the settings and files behind each column of its table.

A stage runs again when one of those that it reads has changed (stages.py compares them).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from bitdistill.config import DistillConfig, RunConfig, TrainingConfig
from bitdistill.data.sources import Sources
from bitdistill.data.tasks import Task
from bitdistill.student.quantizers import quantizer_named
from bitdistill.training.row_layout import TeacherNeeds

DOES_NOT_CHANGE_THE_RESULT = ("logging_steps", "save_steps", "health_steps")
OF_TRIMMING = ("vocabulary", "vocabulary_threshold")  # a stage of their own, not part of stage 1
OF_STAGE_2_LOGITS = ("lambda_logits", "kd_temperature", "kd_top_k")  # read only where lambda_logits is above 0
OF_TEACHER_CACHE = ("teacher_cache", "cache_top_k")  # read only where there is one


def optimization(section: TrainingConfig) -> dict[str, Any]:
    """The part of a stage's settings that is about optimization: what TrainingConfig itself has."""
    return {field.name: getattr(section, field.name) for field in dataclasses.fields(TrainingConfig)}


def teacher_needs(section: DistillConfig) -> TeacherNeeds:
    """Which outputs of the teacher stage 3 needs, by its settings."""
    names = ("lambda_logits", "kd_tokens", "kd_temperature", "relation", "split_heads")
    given = section.relation_layers if section.teacher_relation_layers is None else section.teacher_relation_layers
    taken = {name: getattr(section, name) for name in names}
    return TeacherNeeds(**taken, top_k=section.cache_top_k, layers=list(given))


def sections_in_effect(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The sections of the settings, without those that have no effect in this run."""
    names = ("base", "teacher", "refine", "pretrain", "distill", "baseline", "evaluate", "export")
    sections = {name: dataclasses.asdict(getattr(config, name)) for name in names}
    if not config.pretrain.lambda_logits > 0:
        for name in OF_STAGE_2_LOGITS:
            del sections["pretrain"][name]
    for name in ("pretrain", "distill"):
        for setting in ("lambda_hidden", "teacher_forcing"):
            if not sections[name][setting] > 0:  # results of earlier versions do not name it
                del sections[name][setting]
    if not config.distill.teacher_cache:
        for name in OF_TEACHER_CACHE:
            del sections["distill"][name]
    sections["refine"] = config.refine.in_effect()
    return sections


def known_settings(
    config: RunConfig,
    sources: Sources,
    task: Task,
    identity: Callable[[str | None], Any],
    *,
    stage_2_blocks: int,
    trimming_blocks: int,
) -> dict[str, dict[str, Any]]:
    """The groups of settings that the table's column `reads` names, as done.json keeps them.

    Args:
        config: the run's settings. sources: its files. task: what config.task names.
        identity: a short description of what a local file or folder holds (identity.py).
        stage_2_blocks: blocks of the corpus that stage 2 sees. trimming_blocks: those that a trimmed vocabulary is made for.
    """
    sections = sections_in_effect(config)
    trimming = {name: sections["refine"].pop(name) for name in OF_TRIMMING}
    sections["distill steps"] = optimization(config.distill)
    groups = {
        name: {name.split()[0]: {key: one for key, one in values.items() if key not in DOES_NOT_CHANGE_THE_RESULT}}
        for name, values in sections.items()
    }
    kept = {"blocks": stage_2_blocks, "block_size": config.pretrain.block_size}
    kept |= {"top_k": config.pretrain.kd_top_k, "temperature": config.pretrain.kd_temperature}
    if config.pretrain.document_mask:
        kept["document_mask"] = True
    corpus = {"corpus": {"source": identity(sources.corpus), "column": config.corpus_column}}
    rows = {"train": {"file": identity(sources.train_file), "max_rows": config.max_train_rows}}
    validation = {"validation_file": identity(sources.validation_file)}
    if extra := config.extra_validation_files:
        validation["extra_validation_files"] = {split: identity(file) for split, file in extra.items()}
    task_settings = dataclasses.asdict(task)
    calibrated = config.refine.gain == "calibrated" or quantizer_named(config.refine.weight_quantizer).calibrated
    blocks = {"corpus blocks": {"block_size": config.pretrain.block_size, "seed": config.seed}}
    return groups | {
        "training": {"seed": config.seed, "precision": config.precision, "max_steps_cap": config.max_steps},
        "seed": {"seed": config.seed},
        "backward": {"bit_linear_backward": config.bit_linear_backward},
        "embedding": {"embedding": config.refine.embedding},
        "cache": {"cache": kept},
        "teacher cache": {
            "teacher_cache": teacher_needs(config.distill).what_is_kept() | {"precision": config.precision}
        },
        "corpus": corpus,
        "blocks": blocks,
        "document mask": {"document_mask": config.pretrain.document_mask},
        "calibration": corpus | blocks if calibrated else {},
        "trimming": {"refine": trimming, "blocks": trimming_blocks, "block_size": config.pretrain.block_size},
        "model": {} if config.model is None else {"model": identity(config.model)},
        "teacher model": {"teacher_model": identity(config.teacher.model)},
        "student": {"student": identity(config.student)} if config.student else {},
        "task": {"task": task_settings | {"labels": str(task_settings["labels"])}, "max_length": config.max_length},
        "train rows": rows,
        "validation rows": validation,
        "GPTQ rows": rows | {"seed": config.seed} if config.evaluate.weight_only else {},
    }
