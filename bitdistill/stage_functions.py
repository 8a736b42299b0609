"""ENTRY (the part of train.py that does the stages): one function for each stage.

Each function passes plain arguments to the modules that do the work, and lets `Job` write the result. The table in train.py
says which function belongs to which stage.
"""

import dataclasses
import gc
import json
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from bitdistill.data.demo import demo_model
from bitdistill.dependencies import OF_TEACHER_CACHE, OF_TRIMMING, optimization
from bitdistill.distributed import process_group
from bitdistill.distributed.teacher import Teacher, load_teacher
from bitdistill.errors import UserError
from bitdistill.evaluation.compare import compare_settings
from bitdistill.evaluation.speed import sizes_and_speeds
from bitdistill.evaluation.weight_only import CALIBRATION_TOKENS
from bitdistill.export.card import proof_of_packed, write_card
from bitdistill.export.pack import STUDENT, pack_settings
from bitdistill.job import Job
from bitdistill.names import DISTILLED, FULL_PRECISION
from bitdistill.student.layers import bit_linears, use_backward
from bitdistill.student.loading import embedding_rows, load_language_model, load_tokenizer, save_language_model
from bitdistill.student.refine import load_student, refine, refine_on_corpus, save_student, student_record
from bitdistill.student.vocabulary import trim_folder, trim_like
from bitdistill.training.annealing import Annealing
from bitdistill.training.capture import attention_maps
from bitdistill.training.distill import Distillation, fine_tune
from bitdistill.training.health import weight_histograms
from bitdistill.training.pretrain import NextTokenAndStates, NextTokenDistillation, pretrain
from bitdistill.training.row_cache import CachedTeacher, finish_rows, write_rows
from bitdistill.training.row_layout import check_room as check_room_for_rows
from bitdistill.training.teacher_cache import TeacherCache, check_room, finish_cache, write_shards
from bitdistill.training.trainer import Objective, capped_steps


def train_base(job: Job) -> None:
    """The demo's own full-precision base model, from scratch."""
    tokenizer, model = load_tokenizer(job.full_tokenizer_folder), demo_model(job.full_tokenizer_folder, job.config.seed)
    stream = job.corpus_blocks(
        tokenizer, capped_steps(job.config.base.max_steps, job.config.max_steps), job.config.base
    )
    save = partial(save_language_model, tokenizer=tokenizer, dtype=torch.float32)
    job.train("base", job.config.base, pretrain, save, model=model, stream=stream)


def trim_vocabulary(job: Job) -> None:
    """The base model and its tokenizer with the tokens that the training texts use. Rank 0 alone."""
    if not process_group.is_main():
        return
    section, started = job.config.refine, time.perf_counter()
    tokenizer, model = load_tokenizer(job.full_tokenizer_folder), load_language_model(job.full_base_folder)
    texts = job.sources.training_texts(tokenizer, job.trimming_blocks, job.config.pretrain.block_size)
    facts: dict[str, Any] = {}
    with job.result("trim", facts) as folder:
        done = trim_folder(model, tokenizer, texts, folder, section.vocabulary_threshold)
        facts |= {name: value for name, value in vars(done).items() if name != "kept"}
        facts["seconds"] = round(time.perf_counter() - started, 2)
    process_group.say(f"trim: {done}")
    job.check_trimmed()


def train_teacher(job: Job) -> None:
    """FP16-SFT: the full-precision model fine-tuned on the task, stored in half precision."""
    source, trims = job.teacher or job.base_folder, "trim" in job.directory.stages
    tokenizer, model = load_tokenizer(source), load_language_model(source)
    if job.config.teacher.model and trims:
        tokenizer = trim_like(model, tokenizer, job.full_tokenizer_folder, job.directory.folder("trim"))
    save = partial(save_language_model, tokenizer=tokenizer, dtype=getattr(torch, job.config.teacher.dtype))
    if job.config.teacher.finetuned:
        if process_group.is_main():
            with job.result("teacher", {"steps": 0}) as folder:
                save(folder, model, model.state_dict())
        return
    job.train(
        "teacher", job.config.teacher, fine_tune, save, model=model, **job.task_rows(tokenizer, embedding_rows(model))
    )


def refine_base(job: Job) -> None:
    """Stage 1, surgery."""
    section, started = job.config.refine, time.perf_counter()
    tokenizer, model = load_tokenizer(job.base_folder), load_language_model(job.base_folder)
    blocks = partial(job.sources.first_blocks, tokenizer, job.config.pretrain.block_size, section.calibration_blocks)
    surgery = {name: value for name, value in vars(section).items() if name not in ("calibration_blocks", *OF_TRIMMING)}
    done, gains = refine_on_corpus(model, blocks, **surgery)
    process_group.say(f"refine: {done}")
    if process_group.is_main():
        facts = dataclasses.asdict(done) | {"seconds": round(time.perf_counter() - started, 2), "gains": gains}
        with job.result("refine", facts) as folder:
            save_ternary(folder, model, model.state_dict(), tokenizer=tokenizer)


def cache_teacher_logits(job: Job) -> None:
    """The base model's logits for the blocks of stage 2: in its stored dtype on a GPU, in fp32 on a CPU."""
    started, section = time.perf_counter(), job.config.pretrain
    job.require_steps()
    dtype = torch.float32 if job.device == "cpu" else "auto"
    model = load_language_model(job.base_folder, dtype).eval().requires_grad_(False).to(job.device)
    layout = job.cache_layout(model.config.vocab_size)
    process_group.say(f"cache: {layout}")
    job.prepare_checkpoints("cache")
    shards = job.directory.checkpoints("cache")
    if process_group.is_main():
        check_room(shards, layout)
    steps = capped_steps(section.max_steps, job.config.max_steps)
    stream = job.corpus_blocks(load_tokenizer(job.tokenizer_folder), steps, section)
    options = {"batch_size": section.per_device_train_batch_size, "products": job.inference_products}
    write_shards(shards, model, stream, layout, **options)
    del model
    gc.collect()
    process_group.barrier()
    if process_group.is_main():
        facts: dict[str, Any] = {"tokens": layout.blocks * layout.block_size}
        with job.result("cache", facts) as folder:
            facts["bytes"] = finish_cache(shards, folder, layout)
            facts["seconds"] = round(time.perf_counter() - started, 2)
        shutil.rmtree(shards)


def pretrain_student(job: Job) -> None:
    """Stage 2, continued pre-training."""
    section = job.config.pretrain
    job.require_steps()
    steps = capped_steps(section.max_steps, job.config.max_steps)
    tokenizer, model = load_tokenizer(job.base_folder), load_student(job.directory.folder("refine"), job.dividing)
    use_backward(model, job.config.bit_linear_backward)
    annealing = None
    if section.annealing != "none":
        annealing = Annealing(section.annealing, section.annealing_start, section.annealing_end)
    job.train(
        "pretrain",
        section,
        pretrain,
        partial(save_ternary, tokenizer=tokenizer),
        model=model,
        stream=job.corpus_blocks(load_tokenizer(job.tokenizer_folder), steps, section),
        health_steps=section.health_steps,
        annealing=annealing,
        objective=_stage_2_objective(job, model),
    )


def _stage_2_objective(job: Job, model: nn.Module) -> Objective | None:
    """What stage 2 minimizes beside or instead of the cross-entropy, if it has a teacher."""
    section = job.config.pretrain
    if section.lambda_hidden > 0:
        teacher = _load_teacher(job, job.base_folder)
        return NextTokenAndStates(
            model,
            teacher,
            temperature=section.kd_temperature,
            lambda_logits=section.lambda_logits,
            lambda_hidden=section.lambda_hidden,
            teacher_forcing=section.teacher_forcing,
        )
    cache = _teacher_cache(job, model.config.vocab_size)
    return cache and NextTokenDistillation(model, cache, section.lambda_logits)


def _load_teacher(job: Job, folder: Path) -> Teacher:
    """A frozen model beside the student, as the run's settings say."""
    where = {"device": job.device, "offload": job.config.teacher_offload, "nvme_path": job.config.nvme_path}
    products = job.inference_products if job.config.teacher_offload == "none" else None
    return load_teacher(folder, dtype=job.teacher_dtype, products=products, **where)


def _result_that_stands(job: Job, stage: str, expected: str) -> Path:
    """The folder of a stage's result; refused, in words of `expected`, when the stage would have to run again."""
    folder, reason = job.directory.folder(stage), job.reason_to_run(stage)
    if reason is not None:
        do = f"Run --stage {stage} first, or --stage all."
        raise UserError("stage", expected=expected, got=f"{folder}, but {reason}", do=do)
    return folder


def _teacher_cache(job: Job, vocabulary: int) -> TeacherCache | None:
    """What the stage `cache` made, if stage 2 distills; refused when it was made for other blocks or another model."""
    if "cache" not in job.directory.stages:
        return None
    folder = _result_that_stands(job, "cache", "teacher logits for these settings before `pretrain`")
    block_size = job.config.pretrain.block_size
    return TeacherCache(folder, blocks=job.stage_2_blocks, block_size=block_size, vocabulary=vocabulary)


def cache_teacher_rows(job: Job) -> None:
    """What the teacher of stage 3 says to every training row, on disk."""
    started, section = time.perf_counter(), job.config.distill
    config = AutoConfig.from_pretrained(job.directory.folder("teacher"), trust_remote_code=False, local_files_only=True)
    task_rows = job.task_rows(load_tokenizer(job.student_tokenizer_folder), config.vocab_size)
    layout = job.row_layout(config, task_rows["rows"])
    process_group.say(f"teacher_cache: {layout}")
    job.prepare_checkpoints("teacher_cache")
    shards = job.directory.checkpoints("teacher_cache")
    if process_group.is_main():
        check_room_for_rows(shards, layout)
    teacher = _load_teacher(job, job.directory.folder("teacher"))
    write_rows(shards, teacher, layout=layout, batch_size=section.per_device_train_batch_size, **task_rows)
    if hasattr(teacher.forward, "destroy"):
        teacher.forward.destroy()
    del teacher
    gc.collect()
    process_group.barrier()
    if process_group.is_main():
        facts: dict[str, Any] = {"rows": layout.rows}
        with job.result("teacher_cache", facts) as folder:
            facts["bytes"] = finish_rows(shards, folder, layout)
            facts["seconds"] = round(time.perf_counter() - started, 2)
        process_group.say(f"teacher_cache: {facts['bytes'] / 1e9:.3g} GB on disk")
        shutil.rmtree(shards)


def _cached_teacher(job: Job, rows) -> CachedTeacher:
    """What the stage `teacher_cache` made; refused when it was made for other rows, settings or another teacher."""
    expected = "what the teacher says, for these settings, before `distill`"
    folder = _result_that_stands(job, "teacher_cache", expected)
    config = AutoConfig.from_pretrained(job.directory.folder("teacher"), trust_remote_code=False, local_files_only=True)
    return CachedTeacher(folder, job.row_layout(config, rows), dtype=job.teacher_dtype, device=job.device)


def distill_student(job: Job) -> None:
    """Stage 3, distillation fine-tuning."""
    section = job.config.distill
    job.require_same_student()
    tokenizer, model = load_tokenizer(job.student_folder), load_student(job.student_folder, job.dividing)
    use_backward(model, job.config.bit_linear_backward)
    without = (*optimization(section), *OF_TEACHER_CACHE)
    losses = {name: value for name, value in dataclasses.asdict(section).items() if name not in without}
    task_rows = job.task_rows(tokenizer, embedding_rows(model))
    if section.teacher_cache:
        teacher = _cached_teacher(job, task_rows["rows"])
    else:
        teacher = _load_teacher(job, job.directory.folder("teacher"))
    job.train(
        "distill",
        section,
        fine_tune,
        partial(save_ternary, tokenizer=tokenizer),
        model=model,
        **task_rows,
        objective=Distillation(model, teacher, **losses),
        health_steps=section.health_steps,
    )


def train_baseline(job: Job) -> None:
    """BitNet-SFT: ternary without SubLN, fine-tuned on the task alone, with the steps of stage 3."""
    section = dataclasses.replace(job.config.distill)
    if job.config.baseline.learning_rate is not None:
        section.learning_rate = job.config.baseline.learning_rate
    tokenizer, model = load_tokenizer(job.base_folder), load_language_model(job.base_folder)
    refine(model, norms="none", embedding=job.config.refine.embedding)
    use_backward(model, job.config.bit_linear_backward)
    job.train(
        "baseline",
        section,
        fine_tune,
        partial(save_ternary, tokenizer=tokenizer),
        model=model,
        **job.task_rows(tokenizer, embedding_rows(model)),
        health_steps=section.health_steps,
    )


def save_ternary(folder: Path, model: nn.Module, state: dict[str, Tensor], *, tokenizer) -> None:
    """A ternary student as a Hugging Face folder, with histograms of its weights for the report."""
    save_student(folder, model, tokenizer, state)
    (folder / "weights.json").write_text(
        json.dumps(weight_histograms(state, list(bit_linears(model)))), encoding="utf-8"
    )


def evaluate_settings(job: Job) -> None:
    """Scores the settings on the validation rows, and draws what teacher and student attend to. Rank 0 alone."""
    if not process_group.is_main():
        return
    section, student_layers = job.config.evaluate, job.config.distill.relation_layers
    teacher_layers = job.config.distill.teacher_relation_layers or student_layers
    facts: dict[str, Any] = {}
    with job.result("evaluate", facts) as folder:
        facts |= compare_settings(
            folder,
            job.trained,
            job.task,
            job.sources.validation_rows(),
            max_length=job.config.max_length,
            batch_size=section.per_device_eval_batch_size,
            device=job.device,
            products=job.inference_products,
            calibration=partial(job.sources.training_prompts, tokens=CALIBRATION_TOKENS)
            if section.weight_only
            else None,
            attention_maps=attention_maps,
            attention_layers={FULL_PRECISION: teacher_layers[-1], DISTILLED: student_layers[-1]},
        )


def export_settings(job: Job) -> None:
    """Packs the ternary settings, proves the student's file, and measures decoding on this CPU. Rank 0 alone."""
    if not process_group.is_main():
        return
    section, started, models = job.config.export, time.perf_counter(), job.trained
    teacher = models.pop(FULL_PRECISION)
    prompts = job.sources.validation_prompts(load_tokenizer(teacher), section.proof_rows)
    facts: dict[str, Any] = {}
    with job.result("export", facts) as folder:
        formats = {"packing": section.packing, "embedding": section.embedding}
        packed = pack_settings(folder, models, prompts, about=job.header(), **formats)
        weight_only = job.config.evaluate.weight_only
        speeds = sizes_and_speeds(
            teacher, packed, prompts[0], section.speed_tokens, weight_only=weight_only, say=process_group.say
        )
        (folder / "speed.json").write_text(json.dumps(speeds, indent=1), encoding="utf-8")
        _write_card(job, folder, packed[DISTILLED][1])
        facts["seconds"] = round(time.perf_counter() - started, 2)


def _write_card(job: Job, folder: Path, sizes: dict[str, Any]) -> None:
    """The packed student's model card."""
    surgery = student_record(job.trained[DISTILLED])
    write_card(
        folder / "README.md",
        format="packed",
        file=STUDENT,
        written=sizes,
        base=job.config.model,
        task=job.task.name,
        corpus=job.config.corpus,
        surgery={name: value for name, value in surgery.items() if name != "format_version"},
        scores=job.scores(),
        proof=proof_of_packed(json.loads((folder / "proof.json").read_text(encoding="utf-8"))),
    )
