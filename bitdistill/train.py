"""ENTRY: the main job.

    deepspeed bitdistill/train.py --stage all                                    the embedded demo
    deepspeed bitdistill/train.py --model Qwen/Qwen3-0.6B --task sst2 --corpus ...  a real one

A run is a list of stages:

    base -> trim -> all others            (trim: base model and tokenizer with a smaller vocabulary, if wanted)
    base -> teacher -> teacher_cache -\\                               (teacher_cache: what the teacher says, if wanted)
    base -> refine -> pretrain -> distill -> evaluate -> export        (base: the embedded demo's own base model)
    base -> cache ----/              /                                 (cache: teacher logits for stage 2, if wanted)
    base -> baseline ----------------/

The table STAGES says for each of them what it depends on, when it is part of a run, which settings it reads, and which
function does it. These functions (stage_functions.py) hand plain arguments to the rooms that do the work; `Job` (job.py)
holds what they share. `run` walks through the table and skips what is done and unchanged (stages.py). All ranks walk the
same path; rank 0 prints and writes.
"""

from bitdistill import console, surroundings

if __name__ == "__main__":
    console.end_at_once()
surroundings.prepare()  # before anything loads torch
surroundings.require_libraries()

import sys
from pathlib import Path

from bitdistill.command_line import explicit_settings, parse_config
from bitdistill.config import RunConfig
from bitdistill.distributed import process_group, termination
from bitdistill.errors import UserError
from bitdistill.files import disk_errors_said
from bitdistill.job import Job
from bitdistill.reporting.report import show_report
from bitdistill.stage_functions import (
    cache_teacher_logits,
    cache_teacher_rows,
    distill_student,
    evaluate_settings,
    export_settings,
    pretrain_student,
    refine_base,
    train_base,
    train_baseline,
    train_teacher,
    trim_vocabulary,
)
from bitdistill.stages import Stage


def always(config: RunConfig) -> bool:
    """The stage is part of every run."""
    return True


def brings_no_student(config: RunConfig) -> bool:
    """The run makes its own student instead of taking another run's (--student)."""
    return config.student is None


def pretrains(config: RunConfig) -> bool:
    """The run has stage 2."""
    return brings_no_student(config) and config.pretrain.enabled


def caches_logits(config: RunConfig) -> bool:
    """Stage 2 distills from the base model's logits, and from nothing for which that model must run beside the student."""
    return pretrains(config) and config.pretrain.lambda_logits > 0 and not config.pretrain.lambda_hidden > 0


# fmt: off
TASK = ("task", "train rows")
# What a stage reads is named as in dependencies.known_settings: a section of the settings, or a group that several stages share.
STAGES = {  #      depends on                         is part of a run when
            #          reads                                                                          is done by
    "base":     Stage((),                                lambda config: config.model is None,
                      ("base", "training", "corpus", "blocks", "document mask"),                                 train_base),
    "trim":     Stage(("base",),                         lambda config: config.refine.vocabulary == "trimmed",
                      ("trimming", "seed", "model", "corpus", *TASK),                                  trim_vocabulary),
    "teacher":  Stage(("trim",),                         always,
                      ("teacher", "training", "model", *TASK, "teacher model"),                        train_teacher),
    "refine":   Stage(("trim",),                         brings_no_student,
                      ("refine", "model", "calibration"),                                              refine_base),
    "cache":    Stage(("trim",),                         caches_logits,
                      ("cache", "seed", "model", "corpus"),                                            cache_teacher_logits),
    "pretrain": Stage(("refine", "cache"),               pretrains,
                      ("pretrain", "training", "backward", "corpus"),                                  pretrain_student),
    "teacher_cache": Stage(("teacher",),                 lambda config: config.distill.teacher_cache,
                      ("teacher cache", *TASK, "student"),                                             cache_teacher_rows),
    "distill":  Stage(("pretrain", "teacher", "teacher_cache"), always,
                      ("distill", "training", "backward", *TASK, "student"),                           distill_student),
    "baseline": Stage(("trim",),                         lambda config: config.baseline.enabled,
                      ("baseline", "distill steps", "training", "backward", "model", *TASK, "embedding"), train_baseline),
    "evaluate": Stage(("teacher", "distill", "baseline"), lambda config: config.evaluate.enabled,
                      ("evaluate", "task", "validation rows", "GPTQ rows"),                            evaluate_settings),
    "export":   Stage(("distill", "baseline", "evaluate"), lambda config: config.export.enabled,
                      ("export",),                                                                     export_settings),
}
# fmt: on


def run(job: Job) -> None:
    """Runs the wanted stages in order, skips what is done and unchanged, writes the report."""
    there, wanted = job.directory.stages, job.config.stage
    if wanted not in ("all", *there):
        raise UserError(
            "stage",
            expected=f"one of {', '.join(there)} with these settings",
            got=wanted,
            do="`base` belongs to the demo, `refine` and `pretrain` to a run without --student. pretrain, baseline, evaluate "
            "and export must be enabled (--export.enabled true), and export needs evaluate.",
        )
    stages = there if wanted == "all" else (wanted,)
    if replaced := job.results_to_replace(stages):
        process_group.say(
            f"results that do not hold any more, each kept until its successor is complete: {', '.join(replaced)}"
        )
    with disk_errors_said(job.root):
        for stage in stages:
            job.directory.require_inputs(stage)
            reason = job.reason_to_run(stage)
            if reason is None:
                process_group.say(f"{stage}: done and unchanged, skipped")
                continue
            process_group.say(f"{stage}: runs ({reason})")
            STAGES[stage].do(job)
            process_group.barrier()
            termination.end_if_requested()
        if process_group.is_main() and job.config.report:
            show_report(job.root)


def main() -> int:
    """Parses and runs. Returns the exit status of `console.run`; 143 after SIGTERM and 130 after Ctrl-C, when a checkpoint
    was saved."""

    def body() -> None:
        termination.listen()
        config, text = parse_config()
        with disk_errors_said(Path(config.output_dir)):
            job = Job(config, text, STAGES, explicit_settings())
        if config.stage != "check":
            with termination.lost_ranks_said():
                run(job)
        process_group.shutdown()

    return console.run(body)


if __name__ == "__main__":
    sys.exit(main())
