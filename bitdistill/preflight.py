"""ENTRY (the part of train.py that looks ahead): everything that can be checked before the first training step is checked
here, for the stages that are going to run.

The checks themselves are functions on plain arguments, in `preflight_checks.py`. This file reads the settings and calls them;
`problems.py` collects what they find. `--stage check` prints the table and stops there. If such a fault appears only after
training has begun, that is a bug of this file.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from bitdistill.data.corpus import WINDOW
from bitdistill.data.tasks import encode_prompts, label_tokens
from bitdistill.data.token_shards import blocks_to_make, token_bytes
from bitdistill.distributed import presets, process_group
from bitdistill.errors import UserError
from bitdistill.export.targets import TARGETS, Choice, settings_for, verdicts
from bitdistill.planning import CHECKPOINTS_ON_DISK, Setting, Shape, Work, memory_parts, shape_of
from bitdistill.preflight_checks import (
    check_disk,
    check_memory,
    check_numbers,
    check_relations,
    check_schedule,
    check_surgery,
    check_teacher,
    check_trackers,
    fitted_dtype,
    fitted_length,
    free_memory,
    peak_on_disk,
)
from bitdistill.problems import Report
from bitdistill.student import quantizers
from bitdistill.student.loading import load_tokenizer, tokens_beyond
from bitdistill.student.model_folder import read_model
from bitdistill.student.refine import student_record
from bitdistill.training.hidden import check_hidden_sizes
from bitdistill.training.row_layout import check_room as check_room_for_rows
from bitdistill.training.teacher_cache import check_room
from bitdistill.training.trainer import capped_steps

MASTER, ADAM = 4, 8  # bytes of a parameter in a checkpoint: fp32, and AdamW's two moments
FINISHED_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def fit_to_model(config, positions: int, teacher_type: str, explicit: set[str], report: Report) -> None:
    """Lowers the default lengths of a run's settings to the model's positions and chooses the teacher's dtype, said.

    Args:
        config: the run's settings, changed. positions: of the model, or of the shortest of model and teacher.
        teacher_type: the teacher's model_type. explicit: dotted names of the settings that the user gave.
        report: takes in what was changed.
    """
    lengths = ((config, "max_length", "max_length"), (config.pretrain, "block_size", "pretrain.block_size"))
    for section, name, setting in lengths:
        with report.part(setting) as found:
            fits = fitted_length(setting, getattr(section, name), positions, setting in explicit)
            if fits != getattr(section, name):
                found.append(f"{fits}, the model's positions, in place of the default {getattr(section, name)}")
                setattr(section, name, fits)
    with report.part("teacher.dtype") as found:
        fits = fitted_dtype(teacher_type, config.teacher.dtype, "teacher.dtype" in explicit)
        if fits != config.teacher.dtype:
            found.append(f"{fits} in place of {config.teacher.dtype}, in which {teacher_type} overflows")
            config.teacher.dtype = fits


def fit_to_target(config, base, explicit: set[str], report: Report) -> None:
    """Gives stage 1 the settings that the deploy target can express, says what they give up, and where the student opens.

    Args:
        config: the run's settings, changed; with --student, which is made already, only looked at.
        base: configuration of the base model.
        explicit: dotted names of the settings that the user gave, which are not changed: they may refuse the target.
        report: takes in what was set, and a contradiction.
    """
    refine, name = config.refine, config.deploy_target
    with report.part("deploy_target") as found:
        if name is not None and config.student is None:
            wanted = settings_for(name, base)
            if not quantizers.QUANTIZERS[refine.weight_quantizer].granular:
                wanted = {key: value for key, value in wanted.items() if key not in ("weight_scale", "group_size")}
            for key, value in wanted.items():
                if f"refine.{key}" not in explicit:
                    setattr(refine, key, value)
            config.validate()
            set_ = ", ".join(f"refine.{key} {getattr(refine, key)}" for key in wanted)
            found.append(f"{TARGETS[name].title}: {set_ or 'no settings of its own'}")
            found += [f"given up: {what}" for what in TARGETS[name].gives_up]
        made = vars(refine) if config.student is None else student_record(config.student)
        fields = {field.name for field in dataclasses.fields(Choice)}
        choice = Choice(**{key: value for key, value in made.items() if key in fields})
        rows = {row["target"]: row for row in verdicts(base, choice)}
        opens = [row["title"] for row in rows.values() if row["possible"]]
        if name is not None and not rows[name]["possible"]:
            do = "Change these settings, or choose another target; `bitdistill check MODEL` shows all of them."
            expected = f"a student that {rows[name]['title']} opens"
            raise UserError("deploy_target", expected=expected, got=rows[name]["why"], do=do)
        found.append(f"the student will open in {', '.join(opens)}")


def read_models(model: str | Path | None, teacher: str | Path | None, report: Report) -> dict[str, Any]:
    """{"model": ModelFolder, "teacher": ModelFolder}, less what could not be read; the problems go into the report."""
    found = {}
    for name, source, setting in (("model", model, "model"), ("teacher", teacher, "teacher.model")):
        if source is None:
            continue
        folder, problems = read_model(source, setting)
        said = ""
        if folder is not None:
            said = f"{folder.config.model_type}, {folder.parameters:,} parameters, {folder.bytes / 1e9:.3g} GB"
            said = "; ".join([said, *folder.notes])
            if not problems:
                found[name] = folder
        report.add(setting, problems, said)
    return found


def check_run(job) -> Report:
    """All checks of a run for the stages that it is going to run, into the report that the job began.

    Args:
        job: job.Job, whose sources, folders and models (job.models) are there.
    """
    config, report, stages = job.config, job.report, set(job.stages_to_run())
    tokenizer, model = None, job.models.get("model")
    trimmed = "trim" in job.directory.stages and "trim" not in stages  # what the next stages will see
    folder = job.directory.folder("trim") if trimmed else job.full_tokenizer_folder
    if job.embedded or model is not None:
        with report.part("tokenizer") as found:
            tokenizer = load_tokenizer(folder)
            found.append(f"{len(tokenizer):,} tokens" + ", as trimmed" * trimmed)
            if beyond := tokens_beyond(folder):
                found.append(f"taken out, for the model has no row for them: {', '.join(beyond[:5])}")
    student = model.config if model is not None else job.demo_config()
    teacher = job.models["teacher"].config if "teacher" in job.models else student
    if student is not None:
        _check_shapes(job, report, stages, student, teacher)
    _check_numbers(job, report, stages)
    _check_settings(config, report, stages)
    _check_rows(job, report, stages, tokenizer, len(tokenizer) if trimmed else student and student.vocab_size)
    _check_corpus(job, report, stages, tokenizer)
    if student is not None:
        _check_room(job, report, stages, student, teacher, tokenizer, trimmed)
    return report


def _check_shapes(job, report: Report, stages: set[str], student, teacher) -> None:
    """Surgery, teacher and relations, tried on models without numbers."""
    config = job.config
    if "refine" in stages:
        names = ("norms", "subln_eps", "embedding", "weight_quantizer", "weight_scale", "group_size", "act_scale")
        section = {name: getattr(config.refine, name) for name in names}
        with report.part("refine") as found:
            found.append(check_surgery(student, **section))
    if config.student is not None:
        with report.part("student"):
            job.require_same_student()
    if "teacher" in job.models and "teacher" in stages:
        with report.part("teacher.model"):
            check_teacher(job.models["teacher"].path, teacher, job.full_tokenizer_folder, student)
    if "distill" in stages and config.distill.lambda_hidden > 0:
        with report.part("distill.lambda_hidden"):
            check_hidden_sizes(teacher, student)
    if "distill" in stages and config.distill.relation != "none":
        section = config.distill
        settings = {"convention": section.relation, "split_heads": section.split_heads}
        settings |= {"temperature": section.relation_temperature, "causal": section.relation_causal}
        if section.relation not in ("alg1", "attention_maps"):  # which alone have a temperature (Distillation)
            del settings["temperature"]
        if section.relation not in ("eq12", "alg1"):
            del settings["causal"]
        with report.part("distill.relation_layers") as found:
            layers = {"layers": section.relation_layers, "teacher_layers": section.teacher_relation_layers}
            check_relations(teacher, student, **layers, **settings)
            found.append(f"{section.relation} of {section.relation_layers}, {student.num_hidden_layers} layers")


def _check_numbers(job, report: Report, stages: set[str]) -> None:
    """Weights of the models that the stages load, the teacher's in its own dtype."""
    teacher = "teacher" if "teacher" in job.models else "model"
    if "model" in job.models and stages & {"trim", "refine", "cache"}:
        with report.part("weights of model") as found:
            found.append(check_numbers("model", job.models["model"], torch.float32))
    if teacher in job.models and stages & {"teacher", "teacher_cache"}:
        dtype = getattr(torch, job.config.teacher.dtype)
        setting = "teacher.model" if teacher == "teacher" else "model"
        with report.part("weights of the teacher") as found:
            found.append(check_numbers(setting, job.models[teacher], dtype))


def _check_settings(config, report: Report, stages: set[str]) -> None:
    """What transformers would look at when a stage begins."""
    used = {"base": "base", "teacher": "teacher", "pretrain": "pretrain", "distill": "distill", "baseline": "distill"}
    for section in dict.fromkeys(used[stage] for stage in used if stage in stages):
        setting = f"{section}.lr_scheduler_type"
        with report.part(setting) as found:
            check_schedule(setting, getattr(config, section).lr_scheduler_type)
            found.append(getattr(config, section).lr_scheduler_type)
    if stages & used.keys():
        with report.part("report_to") as found:
            check_trackers(config.report_to)
            found.append(", ".join(config.report_to) or "none")


def check_trimmed(job) -> None:
    """The rows once more, as tokens of the vocabulary that `trim` has just made: more and smaller pieces than before it.

    Raises:
        UserError: all that does not fit now, before anything is trained.
    """
    report, tokenizer = Report(), load_tokenizer(job.directory.folder("trim"))
    _check_rows(job, report, set(job.directory.stages), tokenizer, len(tokenizer))
    report.require()


def _check_rows(job, report: Report, stages: set[str], tokenizer, vocabulary: int | None) -> None:
    """Rows of every split as they will be read, and as tokens."""
    sources, config = job.sources, job.config
    if stages & {"teacher", "teacher_cache", "distill", "baseline"}:
        with report.part("training rows") as found:
            if tokenizer is None:
                found.append(f"{len(sources.train_rows()):,} train")
            else:
                _check_labels(job.task, tokenizer)
                counts = sources.encoded_rows(tokenizer, vocabulary)[1]
                found.append(f"{counts['rows']:,} train")
                found.append(f"{counts['tokens']:,} tokens, {counts['truncated']:,} cut to {config.max_length}")
    if stages & {"evaluate", "export"}:
        with report.part("validation rows") as found:
            rows = sources.validation_rows()
            found.append(", ".join(f"{len(one):,} {split}" for split, one in rows.items()))
            if tokenizer is not None:
                _check_labels(job.task, tokenizer)
                for one in rows.values():
                    encode_prompts(job.task, one, tokenizer, config.max_length)


def _check_labels(task, tokenizer) -> None:
    if task.kind == "classification":
        label_tokens(task, tokenizer)


def _check_corpus(job, report: Report, stages: set[str], tokenizer) -> None:
    """Blocks of the corpus, then its local files to their ends, and how much of it stage 2 reads."""
    sources, config = job.sources, job.config
    calibrated = "refine" in stages and job.calibrates
    if tokenizer is not None and (stages & {"base", "cache", "pretrain"} or calibrated):
        with report.part("corpus") as found:
            next(iter(sources.corpus_stream(tokenizer, config.pretrain.block_size)))
            found.append(f"{sources.corpus}, blocks of {config.pretrain.block_size}")
            found += filter(None, [sources.check_corpus()])
    if "pretrain" in stages:
        with report.part("pretrain.max_steps") as found:
            job.require_steps()
            found.append(f"{capped_steps(config.pretrain.max_steps, config.max_steps)}")


def _memory_of_stages(job, stages: set[str], student: Shape, teacher: Shape) -> dict[str, dict[str, float]]:
    """{stage: {part: bytes}} of one rank, no more than each stage certainly needs.

    How long the rows of a task are is not known yet, so that their activations are left out; so is a vocabulary that is still to
    be trimmed. What this process holds already is not counted again.
    """
    config = job.config
    zero = 0 if job.alone else presets.DEFAULT_ZERO if config.zero == "auto" else config.zero
    if config.refine.vocabulary == "trimmed":
        without = {"parameters": student.parameters - student.vocabulary * student.hidden, "vocabulary": 0}
        student = teacher = dataclasses.replace(student, **without)
    beside = {"distill": teacher} | ({"pretrain": student} if config.pretrain.lambda_hidden > 0 else {})
    found = {}
    for stage in sorted(stages & {"base", "teacher", "pretrain", "distill", "baseline"}):
        section = getattr(config, "distill" if stage == "baseline" else stage)
        tokens = section.per_device_train_batch_size * (config.pretrain.block_size if stage == "pretrain" else 1)
        work = Work(
            teacher if stage == "teacher" else student,
            total_tokens=1.0,
            tokens_per_micro_step=tokens,
            tokens_per_step=tokens,
            teacher=beside.get(stage),
            teacher_cached=stage == "distill" and config.distill.teacher_cache,
            states=stage in beside and section.lambda_hidden > 0,
            forced=stage in beside and section.teacher_forcing > 0,
            ternary=stage not in ("base", "teacher"),
        )
        setting = Setting(
            zero, config.offload != "none", config.teacher_offload != "none", section.gradient_checkpointing
        )
        parts, host = memory_parts(work, setting, process_group.world_size(), job.device)
        del parts["process"]
        if job.device == "cpu":
            parts["offloaded"] = host
        found[stage] = parts
    return found


def _check_room(job, report: Report, stages: set[str], student, teacher, tokenizer, trimmed: bool) -> None:
    """Memory and disk."""
    config = job.config
    shapes = [shape_of(one) for one in (student, teacher)]
    parameters, of_teacher = (shape.parameters for shape in shapes)
    needed = _memory_of_stages(job, stages, *shapes)
    if needed:
        with report.part("memory") as found:
            where, ranks = (
                ("on the GPU", 1)
                if job.device == "cuda"
                else ("of memory", min(process_group.local_world_size(), process_group.world_size()))
            )
            found.append(check_memory(needed, free_memory(), ranks, where))
    numbers = {name: parameters * MASTER for name in ("base", "refine", "pretrain", "distill", "baseline")}
    numbers |= {"teacher": of_teacher * FINISHED_BYTES[config.teacher.dtype], "export": parameters}
    planned = []
    for stage in job.directory.stages:
        if stage in stages and stage in numbers:
            section = getattr(config, "distill" if stage == "baseline" else stage)
            steps = capped_steps(getattr(section, "max_steps", 0), config.max_steps)
            every = getattr(section, "save_steps", 0)
            count = 0
            if every:
                count = CHECKPOINTS_ON_DISK if steps < 0 else min(CHECKPOINTS_ON_DISK, math.floor(steps / every))
            trained = of_teacher if stage == "teacher" else parameters
            replaced = sum(file.stat().st_size for file in job.directory.folder(stage).rglob("*") if file.is_file())
            planned.append((count * trained * (MASTER + ADAM), numbers[stage], replaced))
    if reading := stages & {"base", "pretrain"}:
        sections = {stage: getattr(config, stage) for stage in reading}
        steps = {stage: capped_steps(section.max_steps, config.max_steps) for stage, section in sections.items()}
        blocks = max(job.blocks_fetched(steps[stage], section) for stage, section in sections.items())
        tokens = blocks_to_make(blocks, WINDOW) * config.pretrain.block_size
        planned.insert(0, (0, token_bytes(job.sources.corpus, tokens, student.vocab_size), 0))
    with report.part("disk") as found:
        found.append(check_disk(job.root, peak_on_disk(planned)))
    if "teacher_cache" in stages and tokenizer is not None:
        with report.part("teacher_cache") as found:
            vocabulary = len(tokenizer) if trimmed else student.vocab_size
            layout = job.row_layout(teacher, job.sources.encoded_rows(tokenizer, vocabulary)[0])
            check_room_for_rows(job.root, layout)
            found.append(str(layout))
    if "cache" in stages:
        with report.part("cache") as found:
            layout = job.cache_layout(student.vocab_size)
            check_room(job.root, layout)
            found.append(str(layout))
