"""ENTRY (the part of train.py that all stages share): settings, folders, sources of data, DeepSpeed's configuration, and
how a stage trains.

`Job` is given train.py's table of stages.
"""

import dataclasses
import gc
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import Qwen3Config

from bitdistill import preflight, preflight_checks
from bitdistill.config import RunConfig, TrainingConfig
from bitdistill.data.demo import demo_of_run
from bitdistill.data.sources import Sources
from bitdistill.data.tasks import pad_token
from bitdistill.data.token_shards import ShardedStream
from bitdistill.dependencies import known_settings, optimization, teacher_needs
from bitdistill.distributed import presets, process_group
from bitdistill.distributed.checkpoint import full_state_dict
from bitdistill.errors import UserError
from bitdistill.files import make_once, remove_leftovers, write_whole
from bitdistill.identity import Identities
from bitdistill.kernels.cpu.bf16 import has_bf16_products
from bitdistill.lock import lock_folder
from bitdistill.names import SETTINGS, TASK_CORPUS
from bitdistill.problems import Report
from bitdistill.reporting.versions import versions
from bitdistill.runtime.header import Header
from bitdistill.stages import NOT_RUN, RunDirectory, Stage
from bitdistill.student.backend import choose_kernels
from bitdistill.student.gguf_base import convert_gguf, is_gguf
from bitdistill.student.quantizers import quantizer_named
from bitdistill.student.refine import require_quantizers
from bitdistill.text_files import user_path
from bitdistill.training.row_layout import RowLayout, row_layout
from bitdistill.training.teacher_cache import Layout
from bitdistill.training.trainer import capped_steps, release, training_arguments

PER_RANK = ("per_device_train_batch_size", "gradient_accumulation_steps")  # their product: rows of a rank's step
FULL_PRECISION_STAGES = ("base", "teacher")
# What is worth saying.
FITTED = (
    "model",
    "teacher.model",
    "tokenizer",
    "max_length",
    "pretrain.block_size",
    "teacher.dtype",
    "deploy_target",
)  # worth saying
OF_TARGETS = ("norms", "weight_scale", "group_size", "act_scale")  # what deploy_target may set


class Job:
    """What the stages of a run share: settings, folders, sources of data, the DeepSpeed configuration.

    Args:
        config: validated settings. text: the same as YAML, for RUN/config.yaml.
        stages: every stage that there is, in the order in which they run.
        explicit: dotted names of the settings that the user gave; others are defaults, which may be fitted to the model.

    Raises:
        UserError: what preflight.py finds wrong with the run, all of it at once.
    """

    def __init__(self, config: RunConfig, text: str, stages: dict[str, Stage], explicit: Collection[str] = ()):
        self.config = config
        self.embedded = config.model is None
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.stages = stages
        part_of_run = [name for name, stage in stages.items() if stage.part_of_run(config)]
        depends_on = {name: stage.depends_on for name, stage in stages.items()}
        self.directory = RunDirectory(config.output_dir, depends_on, part_of_run)
        self.root = self.directory.root
        if os.environ.get("RANK", "0") == "0":  # known before the process group is: a refusal comes at once
            self.lock = lock_folder(self.root)
        self.alone = self._trains_alone()
        process_group.initialize(self.device, alone=self.alone)
        choose_kernels(config.kernels)
        self._refuse_impossible()
        process_group.say(self._engine())
        preflight_checks.check_folder(self.root)
        self.identities = Identities(self.root / ".digests.json", keep=process_group.is_main())
        self.report = Report()
        self.model, self.teacher = (self._as_folder(source) for source in (config.model, config.teacher.model))
        self.full_tokenizer_folder = self.model
        self.sources = self._sources()
        text = self._fit_to_models(text, set(explicit))
        self.sources = dataclasses.replace(self.sources, max_length=config.max_length)
        with self.report.part("task"):
            self.task = self.sources.loaded_task
        if not hasattr(self, "task"):
            self.report.require()
        self._look_ahead()
        if process_group.is_main():
            remove_leftovers(self.root)
            write_whole(self.root / "config.yaml", text)
            write_whole(self.root / "versions.json", json.dumps(versions(), indent=1))
        process_group.barrier()

    def _trains_alone(self) -> bool:
        """One rank on a CPU has nothing to share and nothing to offload: PyTorch without DeepSpeed, unless asked for."""
        config = self.config
        offload = config.offload != "none" or config.teacher_offload != "none"
        return self.device == "cpu" and process_group.ranks_started() == 1 and config.zero == "auto" and not offload

    def _refuse_impossible(self) -> None:
        """An impossible combination is refused before anything is trained."""
        config = self.config
        if config.teacher_offload != "none":
            device = {"device": self.device, "nvme_path": config.nvme_path}
            precision = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[self.teacher_dtype]
            presets.teacher_config(config.teacher_offload, precision=precision, **device)
        self._numerics("pretrain")
        if "nvme" in (config.offload, config.teacher_offload):
            process_group.require_nvme(config.nvme_path)

    def _products(self, stage: str) -> tuple[str, str | None]:
        """The precision of a stage's products, and that of its LM head where it differs."""
        ternary = stage not in FULL_PRECISION_STAGES
        return presets.products(self.config.precision, self.device, ternary=ternary, has_bf16=has_bf16_products())

    def _numerics(self, stage: str) -> dict[str, Any]:
        """What training_arguments needs to know of engine and precision."""
        precision, head = self._products(stage)
        found = {"deepspeed": None, "head_dtype": presets.AUTOCAST.get(head)}
        if self.alone:
            return found | {"autocast_dtype": presets.AUTOCAST.get(precision)}
        zero = presets.DEFAULT_ZERO if self.config.zero == "auto" else self.config.zero
        device = {"device": self.device, "nvme_path": self.config.nvme_path}
        section = presets.deepspeed_config(zero, self.config.offload, precision=precision, **device)
        return found | {"deepspeed": section}

    @property
    def dividing(self) -> dict[str, Any] | None:
        """DeepSpeed's section that divides a student among the ranks while it is loaded: at ZeRO 3, else None."""
        section = None if self.alone else self._numerics("pretrain")["deepspeed"]["zero_optimization"]
        return section if section and section["stage"] == 3 else None

    def _engine(self) -> str:
        """Who trains, and in which precision, in a sentence."""
        engine = "PyTorch alone: one rank on a CPU needs no ZeRO" if self.alone else "DeepSpeed"
        full, (ternary, head) = self._products("teacher")[0], self._products("pretrain")
        head = f", their LM head {head}" if head else ""
        return f"engine: {engine}; products of full-precision models {full}, around ternary layers {ternary}{head}"

    def _sources(self) -> Sources:
        """The settings' task, rows and corpus; what they leave out of the embedded demo's, the demo makes."""
        config = self.config
        names = ("task", "train_file", "validation_file", "corpus")
        given = {name: getattr(config, name) for name in names}
        if self.embedded:
            demo = demo_of_run(self.root, config.seed)
            own = dict(zip(names, (demo.task, demo.train, demo.validation, demo.corpus), strict=True))
            given = {name: own[name] if given[name] in (None, "demo") else given[name] for name in names}
            self.full_tokenizer_folder = demo.base
        from_rows = given["corpus"] == TASK_CORPUS
        if from_rows:
            given["corpus"] = self.root / "task_corpus.jsonl"
        sources = Sources(
            **{name: None if value is None else str(value) for name, value in given.items()},
            extra_validation_files=config.extra_validation_files,
            corpus_column=None if from_rows else config.corpus_column,
            max_length=config.max_length,
            max_train_rows=config.max_train_rows,
            max_validation_rows=config.evaluate.max_rows,
            seed=config.seed,
        )
        if from_rows:
            sources.write_task_corpus(Path(sources.corpus), self.identities.of(sources.train_file))
        return sources

    def _as_folder(self, source: str | None) -> str | Path | None:
        """A model's source as it can be loaded: a GGUF file becomes a folder below RUN/gguf, once."""
        if not is_gguf(source):
            return source
        path = user_path(source, "model").resolve()
        folder = self.root / "gguf" / f"{path.stem}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
        marker, identity = folder.with_name(f"{folder.name}.json"), json.dumps(self.identities.of(source))
        if process_group.is_main():
            make_once(folder, marker, identity, lambda: process_group.say(str(convert_gguf(source, folder))))
        process_group.barrier()
        return folder

    def _fit_to_models(self, text: str, explicit: set[str]) -> str:
        """Reads the models' folders, fits default settings to them, and returns the text with what was changed."""
        self.models = preflight.read_models(self.model, self.teacher, self.report)
        known = [found.config for found in self.models.values()] or [
            config for config in [self.demo_config()] if config
        ]
        if known:
            positions = min(config.max_position_embeddings for config in known)
            preflight.fit_to_model(self.config, positions, known[-1].model_type, explicit, self.report)
        base = self.models["model"].config if "model" in self.models else self.demo_config()
        if base is not None:
            preflight.fit_to_target(self.config, base, explicit, self.report)
        settings = yaml.safe_load(text)
        settings["refine"] |= {name: getattr(self.config.refine, name) for name in OF_TARGETS}
        settings["max_length"] = self.config.max_length
        settings["pretrain"]["block_size"] = self.config.pretrain.block_size
        settings["teacher"]["dtype"] = self.config.teacher.dtype
        return yaml.safe_dump(settings, sort_keys=False)

    def demo_config(self):
        """The configuration of the embedded demo's base model; None for a run with a model of its own."""
        return Qwen3Config.from_pretrained(self.full_tokenizer_folder) if self.embedded else None

    def _look_ahead(self) -> None:
        """Everything that can be known before the first step: said where it is worth it, refused where it is wrong."""
        report = preflight.check_run(self)
        if self.config.stage == "check":
            process_group.say(report.table())
        else:
            for subject, state, found in report.rows:
                if subject in FITTED and state == "ok" and found:
                    process_group.say(f"{subject}: {found}")
        report.require()

    def check_trimmed(self) -> None:
        """After the stage `trim`: raises UserError where a row does not fit any more."""
        preflight.check_trimmed(self)

    def stages_to_run(self) -> list[str]:
        """The stages that this run will not skip: those with a reason to run, and those that depend on them."""
        wanted = self.config.stage
        found: list[str] = []
        for stage in self.directory.stages if wanted in ("all", "check") else [wanted]:
            depends_on = self.directory.inputs(stage) if stage in self.directory.stages else ()
            if stage in self.directory.stages and (set(depends_on) & set(found) or self.reason_to_run(stage)):
                found.append(stage)
        return found

    @property
    def calibrates(self) -> bool:
        """Whether stage 1 looks at the corpus."""
        section = self.config.refine
        gains = section.gain == "calibrated" and section.norms != "none"
        return gains or quantizer_named(section.weight_quantizer).calibrated

    def require_steps(self) -> None:
        """Raises UserError when nothing says how long stage 2 is."""
        if self.config.pretrain.max_steps == -1 and self.config.max_steps is None:
            do = "Set pretrain.max_steps: a token stream has no end."
            raise UserError("pretrain.max_steps", expected="a number of steps", got="-1", do=do)

    def require_same_student(self) -> None:
        """A student of another run brings its quantizers with it: what these settings say must be true of it, too."""
        if self.config.student is not None:
            section = self.config.refine
            scales = (section.weight_scale, section.group_size, section.act_scale)
            require_quantizers(self.config.student, section.weight_quantizer, section.embedding, *scales)

    @property
    def base_folder(self) -> str | Path:
        """What teacher and student are made of: the base model, with a trimmed vocabulary where that is wanted."""
        return self.directory.folder("trim") if "trim" in self.directory.stages else self.full_base_folder

    @property
    def tokenizer_folder(self) -> str | Path:
        """The tokenizer of every stage after `trim`; the base model's own before that."""
        trimmed = "trim" in self.directory.stages and self.directory.done("trim") is not None
        return self.directory.folder("trim") if trimmed else self.full_tokenizer_folder

    @property
    def student_tokenizer_folder(self) -> str | Path:
        """The tokenizer of stage 3, before its student is there."""
        return self.config.student or self.tokenizer_folder

    @property
    def full_base_folder(self) -> str | Path:
        """The base model as it came: the demo's own, or --model."""
        return self.directory.folder("base") if self.embedded else self.model

    @property
    def student_folder(self) -> str | Path:
        """Where stage 3 starts."""
        return self.config.student or self.directory.folder("pretrain" if self.config.pretrain.enabled else "refine")

    @property
    def trained(self) -> dict[str, Path]:
        """Setting -> the folder of its trained model, for those that this run has."""
        return {name: self.directory.folder(of) for name, of in SETTINGS.items() if of in self.directory.stages}

    @property
    def teacher_dtype(self) -> torch.dtype:
        """What the teacher computes in: its stored dtype on a GPU; fp32 on a CPU, where fp16 products are slow."""
        return getattr(torch, self.config.teacher.dtype) if self.device == "cuda" else torch.float32

    @property
    def inference_products(self) -> torch.dtype | None:
        """Of the products of full-precision models that are run and not trained, on a CPU; None leaves them as they are."""
        halved = self.config.precision == "auto" and self.device == "cpu" and has_bf16_products()
        return torch.bfloat16 if halved else None

    @property
    def stage_2_blocks(self) -> int:
        """Blocks of the corpus that all steps of stage 2 see."""
        section = self.config.pretrain
        return capped_steps(section.max_steps, self.config.max_steps) * self.step_rows("pretrain", section)

    def step_rows(self, stage: str, section: TrainingConfig) -> int:
        """Rows of an optimizer step on all ranks: of the settings; of a stage that was begun on other ranks, as it was begun."""
        per_rank = math.prod(getattr(section, name) for name in PER_RANK)
        begun = None if self.config.restart else self.directory.step_rows(stage, self.settings(stage), per_rank)
        return per_rank * process_group.world_size() if begun is None else begun

    def shared_batch(self, stage: str, section: TrainingConfig) -> dict[str, int]:
        """Micro-batch and accumulation with which the present ranks take the step's rows: the settings' own, unless the stage
        was begun on other ranks.

        Raises:
            UserError: the rows cannot be divided among the ranks.
        """
        rows, ranks = self.step_rows(stage, section), process_group.world_size()
        own, most = rows // ranks, getattr(section, PER_RANK[0])
        if rows % ranks:
            raise UserError(
                f"{stage}.per_device_train_batch_size",
                expected=f"a number of ranks that divides the {rows} rows of a step, with which the stage was begun",
                got=f"{ranks} ranks",
                do="Start with another number of ranks, or give --restart to begin this stage again.",
            )
        micro = max(size for size in range(1, most + 1) if own % size == 0)
        return dict(zip(PER_RANK, (micro, own // micro), strict=True))

    def blocks_fetched(self, steps: int, section: TrainingConfig) -> int:
        """How many blocks of the corpus so many steps of a stage see, and a step's more, which is fetched ahead."""
        rows = section.per_device_train_batch_size * section.gradient_accumulation_steps * process_group.world_size()
        return (max(steps, 0) + 1) * rows

    def corpus_blocks(self, tokenizer, steps: int, section: TrainingConfig) -> ShardedStream:
        """The blocks of the corpus for so many steps of a stage."""
        return self.sources.corpus_blocks(
            tokenizer,
            self.config.pretrain.block_size,
            self.blocks_fetched(steps, section),
            folder=self.root / "tokens",
            content=self.identities.of(self.sources.corpus),
            document_mask=self.config.pretrain.document_mask,
        )

    @property
    def trimming_blocks(self) -> int:
        """Blocks of the corpus whose tokens a trimmed vocabulary must have: those of stage 2, where the run has it."""
        return self.stage_2_blocks if "pretrain" in self.directory.stages else 0

    def cache_layout(self, vocabulary: int) -> Layout:
        """The teacher's logits that stage 2 needs."""
        section = self.config.pretrain
        return Layout(self.stage_2_blocks, section.block_size, section.kd_top_k, section.kd_temperature, vocabulary)

    def row_layout(self, teacher, rows) -> RowLayout:
        """What the cache of a teacher with this configuration holds of the training rows."""
        return row_layout(teacher, rows, teacher_needs(self.config.distill))

    def task_rows(self, tokenizer, vocabulary: int) -> dict[str, Any]:
        """The training rows as tokens below `vocabulary`, the model's, and what they are padded with, for `fine_tune`.

        One of the rows is shown in RUN/example.txt.
        """
        rows = self.sources.training_tokens(tokenizer, vocabulary, self.root / "example.txt")
        return {"rows": rows, "pad_token_id": pad_token(tokenizer, vocabulary)}

    def scores(self) -> dict[str, Any]:
        """What `evaluate` found; nothing in a run without it."""
        if "evaluate" not in self.directory.stages:
            return {}
        return json.loads((self.directory.folder("evaluate") / "scores.json").read_text(encoding="utf-8"))

    def header(self) -> Header:
        """What the packed files of this run say of it, besides what their own students know."""
        config = self.config
        base = "demo" if self.embedded else str(config.model)
        if user_path(base, "model").exists():  # a folder's place on this machine is nobody else's business
            base = user_path(base, "model").resolve().name
        scored, scores = self.scores(), {}
        if scored:
            scores["metric"] = scored["metric"]
            for row in scored["rows"]:
                if row["setting"] in SETTINGS:
                    scores[row["setting"]] = {key: row[key] for key in ("score", "interval", "examples")}
        return Header(task=self.task, max_length=config.max_length, base=base, scores=scores)

    def settings(self, stage: str) -> dict[str, Any]:
        """Everything that the result of a stage depends on, besides the results of the stages it depends on."""
        reads = self.stages[stage].reads
        counted = {"cache", "trimming"} & set(reads)  # the others do not ask how long stage 2 is
        blocks = {name: getattr(self, name) if counted else 0 for name in ("stage_2_blocks", "trimming_blocks")}
        known = known_settings(self.config, self.sources, self.task, self.identities.of, **blocks)
        return {name: value for group in reads for name, value in known[group].items()}

    def reason_to_run(self, stage: str) -> str | None:
        """Why a stage must run, or None when its result still stands."""
        reason = self.directory.reason_to_run(stage, self.settings(stage))
        return "--restart was given" if self.config.restart and reason != NOT_RUN else reason

    def results_to_replace(self, stages: tuple[str, ...]) -> list[str]:
        """Those of `stages` that have a result and will run nevertheless, with the reason."""
        found = {}
        for stage in stages:
            if self.directory.done(stage) is not None:
                after = [name for name in self.directory.inputs(stage) if name in found]
                reason = self.reason_to_run(stage) or (f"after {after[0]}" if after else None)
                found |= {stage: f"{stage} ({reason})"} if reason else {}
        return list(found.values())

    def result(self, stage: str, facts: dict[str, Any]):
        """A temporary folder that becomes the stage's result; rank 0 alone may write one."""
        return self.directory.result(stage, self.settings(stage), facts)

    def train(self, stage: str, section: TrainingConfig, fit: Callable[..., Any], save: Callable[..., None], **options):
        """What every training stage shares: arguments, checkpoints that belong to these settings, the atomic result."""
        checkpoints = self.directory.checkpoints(stage)
        resume = self.prepare_checkpoints(stage)
        batch = self.shared_batch(stage, section)
        arguments = training_arguments(
            checkpoints,
            **self._numerics(stage),
            rank_timeout=self.config.rank_timeout,
            seed=self.config.seed,
            report_to=self.config.report_to,
            steps_cap=self.config.max_steps,
            **optimization(section) | batch,
        )
        trainer, facts = fit(arguments=arguments, stage=stage, run_dir=self.root, resume=resume, **options)
        model, state = trainer.model, full_state_dict(trainer.model_wrapped)
        if process_group.is_main():
            with self.result(stage, facts) as folder:
                save(folder, model, state)
        process_group.barrier()
        release(trainer)
        if process_group.is_main():
            shutil.rmtree(checkpoints, ignore_errors=True)
        gc.collect()

    def prepare_checkpoints(self, stage: str) -> bool:
        """True when there is unfinished work of these very settings to go on with; what becomes of other work is said."""
        inputs = {name: self.directory.done(name)["id"] for name in self.directory.inputs(stage)}
        belongs_to = {"settings": self.settings(stage), "inputs": inputs}
        process_group.barrier()
        if process_group.is_main():
            said = self.directory.open_checkpoints(stage, belongs_to, self.config.restart)
            if said:
                process_group.say(f"{stage}: {said}")
        process_group.barrier()
        return self.directory.has_checkpoints(stage)
