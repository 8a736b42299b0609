"""ENTRY: the main job.

    deepspeed bitdistill/train.py --stage all                                    the embedded demo
    deepspeed bitdistill/train.py --model Qwen/Qwen3-0.6B --task sst2 --corpus ...  a real one

Reads the settings, decides which stages must run, gives each stage plain arguments, and keeps the run directory
(docs/design.md, section 5). All ranks walk the same path; rank 0 prints and writes.
"""

from bitdistill import surroundings

surroundings.prepare()  # before anything loads torch

import dataclasses
import gc
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitdistill import console
from bitdistill.config import RunConfig, TrainingConfig, parse_config
from bitdistill.data import demo
from bitdistill.data.corpus import TokenStream
from bitdistill.data.tasks import encode, encode_prompts, load_rows, load_task, load_validation, pad_token, show_example
from bitdistill.distributed import launch, presets
from bitdistill.distributed.checkpoint import full_state_dict
from bitdistill.distributed.teacher import load_teacher
from bitdistill.errors import UserError
from bitdistill.evaluation.score import score_splits, scores_json
from bitdistill.evaluation.speed import full_precision_size, full_precision_speed, machine, packed_speed
from bitdistill.evaluation.weight_only import CALIBRATION_TOKENS, METHODS, quantize_model, weight_only_size
from bitdistill.export.parity import prove_parity
from bitdistill.export.write import write_packed
from bitdistill.kernels.cpu.bf16 import has_bf16_products
from bitdistill.reporting.report import show_report
from bitdistill.reporting.versions import versions
from bitdistill.runtime.cpu import Runtime
from bitdistill.runtime.packed_file import read_packed
from bitdistill.stages import AFTER, RunDirectory, file_identity
from bitdistill.student.embeddings import FULL_PRECISION, embedding_format
from bitdistill.student.layers import bit_linears, use_backward
from bitdistill.student.loading import embedding_rows, load_language_model, load_tokenizer, tokenizer_settings
from bitdistill.student.quantizers import quantizer_named
from bitdistill.student.refine import (
    calibrate_gains,
    calibrate_inputs,
    load_student,
    refine,
    save_student,
    student_record,
    tied_keys,
)
from bitdistill.student.sharing import WeightCodes
from bitdistill.training.annealing import Annealing
from bitdistill.training.capture import attention_maps
from bitdistill.training.distill import Distillation, fine_tune
from bitdistill.training.health import weight_histograms
from bitdistill.training.pretrain import pretrain
from bitdistill.training.teacher_cache import Layout, TeacherCache, check_room, finish_cache, write_shards
from bitdistill.training.trainer import capped_steps, collate_blocks, release, training_arguments

SETTINGS = {"FP16-SFT": "teacher", "BitNet-SFT": "baseline", "BitDistill": "distill"}
FULL_PRECISION_STAGES = ("base", "teacher")
NOT_A_RESULT = ("logging_steps", "save_steps", "health_steps")  # settings that do not change what a stage produces
PRETRAIN_DISTILLATION = ("lambda_logits", "kd_temperature", "kd_top_k")


def optimisation(section: TrainingConfig) -> dict[str, Any]:
    """The part of a stage's settings that is about optimisation: what TrainingConfig itself has."""
    return {field.name: getattr(section, field.name) for field in dataclasses.fields(TrainingConfig)}


class Job:
    """One run of the main job.

    Args:
        config: validated settings. text: the same as YAML, for RUN/config.yaml.
    """

    def __init__(self, config: RunConfig, text: str):
        self.config = config
        self.embedded = config.model is None
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        left_out = set() if self.embedded else {"base"}
        left_out |= set() if config.baseline.enabled else {"baseline"}
        left_out |= {"refine", "pretrain"} if config.student else set()
        left_out |= set() if config.pretrain.enabled else {"pretrain"}
        left_out |= set() if "pretrain" not in left_out and config.pretrain.lambda_logits > 0 else {"cache"}
        left_out |= set() if config.export.enabled and config.evaluate.enabled else {"export"}
        left_out |= set() if config.evaluate.enabled else {"evaluate"}
        self.directory = RunDirectory(config.output_dir, tuple(stage for stage in AFTER if stage not in left_out))
        self.root = self.directory.root
        self.alone = self._trains_alone()
        launch.initialise(self.device, alone=self.alone)
        self._refuse_impossible()
        launch.say(self._engine())
        if launch.is_main():
            self.root.mkdir(parents=True, exist_ok=True)
            (self.root / "config.yaml").write_text(text)
            (self.root / "versions.json").write_text(json.dumps(versions(), indent=1))
        if self.embedded:
            self._make_demo()
        self.task = load_task(str(self.train_side("task")))
        if config.stage == "all":
            self._look_ahead()
        launch.barrier()

    # ------------------------------------------------------------------------------------------------ what is used

    def _trains_alone(self) -> bool:
        """One rank on a CPU has nothing to share and nothing to offload: PyTorch without DeepSpeed, unless asked for."""
        config = self.config
        offload = config.offload != "none" or config.teacher_offload != "none"
        return self.device == "cpu" and launch.ranks_started() == 1 and config.zero == "auto" and not offload

    def _refuse_impossible(self) -> None:
        """An impossible combination is refused before anything is trained."""
        config = self.config
        if config.teacher_offload != "none":
            device = {"device": self.device, "nvme_path": config.nvme_path}
            presets.teacher_config(config.teacher_offload, precision=self._teacher_precision(), **device)
        if "nvme" in (config.offload, config.teacher_offload):
            launch.require_nvme(config.nvme_path)
        self._numerics("pretrain")

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

    def _engine(self) -> str:
        """Who trains, and in which precision, in a sentence."""
        engine = "PyTorch alone: one rank on a CPU needs no ZeRO" if self.alone else "DeepSpeed"
        full, (ternary, head) = self._products("teacher")[0], self._products("pretrain")
        head = f", their LM head {head}" if head else ""
        return f"engine: {engine}; products of full-precision models {full}, around ternary layers {ternary}{head}"

    def _look_ahead(self) -> None:
        """Opens whatever a later stage will read: a wrong path is said now, and not after hours of training."""
        self.rows("train")
        self.validation()
        self._check_student()
        if "pretrain" in self.directory.stages:
            self.stream(self.config.pretrain.block_size)
            self._check_steps()
        if "cache" in self.directory.stages and self.directory.reason_to_run("cache", self.settings("cache")):
            check_room(self.root, self._cache_layout(len(load_tokenizer(self._tokenizer_folder()))))

    def _check_steps(self) -> None:
        if self.config.pretrain.max_steps == -1 and self.config.max_steps is None:
            raise UserError(
                "pretrain.max_steps", expected="a number of steps", got="-1", do="A token stream has no end: set it."
            )

    def _check_student(self) -> None:
        """A student of another run brings its quantizers with it: what these settings say must be true of it, too."""
        if self.config.student is None:
            return
        record = student_record(self.config.student)
        for name, usual in (("weight_quantizer", "absmean"), ("embedding", FULL_PRECISION)):
            trained, given = record.get(name, usual), getattr(self.config.refine, name)
            if trained != given:
                raise UserError(
                    f"refine.{name}",
                    expected=f"{trained}, with which {self.config.student} was trained",
                    got=given,
                    do=f"Give --refine.{name} {trained}.",
                )

    def _stage_2_blocks(self) -> int:
        """Blocks of the corpus that all steps of stage 2 see."""
        section = self.config.pretrain
        rows = section.per_device_train_batch_size * section.gradient_accumulation_steps * launch.world_size()
        return capped_steps(section.max_steps, self.config.max_steps) * rows

    def _cache_layout(self, vocabulary: int) -> Layout:
        """The teacher's logits that stage 2 needs."""
        section = self.config.pretrain
        return Layout(self._stage_2_blocks(), section.block_size, section.kd_top_k, section.kd_temperature, vocabulary)

    def _teacher_dtype(self) -> torch.dtype:
        """What the teacher computes in: its stored dtype on a GPU; fp32 on a CPU, where fp16 products are slow."""
        return getattr(torch, self.config.teacher.dtype) if self.device == "cuda" else torch.float32

    def _teacher_precision(self) -> str:
        return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[self._teacher_dtype()]

    def _make_demo(self) -> None:
        """Makes the demo's files, unless those of this seed and of this version of demo.py are there."""
        folder, marker = self.root / "demo", self.root / "demo.json"
        if launch.is_main():
            wanted = {"seed": self.config.seed, "source": hashlib.sha256(Path(demo.__file__).read_bytes()).hexdigest()}
            if not (marker.is_file() and json.loads(marker.read_text()) == wanted and folder.is_dir()):
                launch.say("demo: makes its own corpus, tokenizer and task")
                shutil.rmtree(folder, ignore_errors=True)
                demo.make_demo(folder, seed=self.config.seed)
                marker.write_text(json.dumps(wanted))
        launch.barrier()

    def train_side(self, what: str) -> str | Path | None:
        """A setting that the demo fills in itself: task, train_file, validation_file, corpus."""
        given = getattr(self.config, what)
        if not self.embedded:
            return given
        name = {
            "task": "task.yaml",
            "train_file": "train.jsonl",
            "validation_file": "validation.jsonl",
            "corpus": "corpus.txt",
        }[what]
        return given if given not in (None, "demo") else self.root / "demo" / name

    def base_folder(self) -> str | Path:
        """The base model: the demo's own, or --model."""
        return self.directory.folder("base") if self.embedded else self.config.model

    def student_folder(self) -> str | Path:
        """Where stage 3 starts."""
        return self.config.student or self.directory.folder("pretrain" if self.config.pretrain.enabled else "refine")

    def stream(self, block_size: int) -> TokenStream:
        """The corpus of stage 2."""
        corpus = self.train_side("corpus")
        if corpus is None:
            raise UserError(
                "corpus", expected="text for this stage", got="none", do="Give --corpus, or --refine.gain one."
            )
        stream = TokenStream(
            str(corpus),
            load_tokenizer(self._tokenizer_folder()),
            block_size,
            text_column=self.config.corpus_column,
            seed=self.config.seed,
        )
        if stream.left_out:
            named = ", ".join(stream.left_out[:3]) + (", ..." if len(stream.left_out) > 3 else "")
            launch.say(f"corpus: {len(stream.left_out)} files left out, hidden or of another kind: {named}")
        return stream

    def _tokenizer_folder(self) -> str | Path:
        return self.root / "demo" / "base" if self.embedded else self.config.model

    def rows(self, split: str):
        """The task's rows of a split, from local files or the hub."""
        limit = self.config.max_train_rows if split == "train" else self.config.evaluate.max_rows
        file = self.train_side(f"{split}_file")
        return load_rows(self.task, split, str(file) if file else None, limit, self.config.seed)

    def validation(self):
        """Split -> rows of every validation split, "validation" first; a split left out is said."""
        file = self.train_side("validation_file")
        rows, left_out = load_validation(
            self.task,
            str(file) if file else None,
            self.config.extra_validation_files,
            self.config.evaluate.max_rows,
            self.config.seed,
        )
        for split in left_out:
            launch.say(f"{self.task.name}: {split} is not scored; --extra_validation_files.{split} FILE adds it")
        return rows

    def encoded(self, tokenizer, model):
        """The task's training rows as tokens that the model has, counts said aloud, one example shown."""
        rows = self.rows("train")
        encoded, counts = encode(self.task, rows, tokenizer, self.config.max_length, embedding_rows(model))
        launch.say(
            f"{self.task.name}: {counts['rows']:,} training rows, {counts['tokens']:,} tokens, longest "
            f"{counts['longest_tokens']}; {counts['truncated']:,} prompts cut to {self.config.max_length} tokens"
        )
        if launch.is_main():
            (self.root / "example.txt").write_text(
                show_example(self.task, rows[0], tokenizer, self.config.max_length) + "\n"
            )
        return encoded

    # ------------------------------------------------------------------------------------------------ what it depends on

    def settings(self, stage: str) -> dict[str, Any]:
        """Everything that the result of a stage depends on, besides the results of earlier stages."""
        config = self.config

        def section(name: str, values: dict[str, Any] | None = None) -> dict[str, Any]:
            values = values or dataclasses.asdict(getattr(config, name))
            return {name: {key: value for key, value in values.items() if key not in NOT_A_RESULT}}

        training = {"seed": config.seed, "precision": config.precision, "max_steps_cap": config.max_steps}
        ternary = {"bit_linear_backward": config.bit_linear_backward}
        embedding = {"embedding": config.refine.embedding}
        calibrated = config.refine.gain == "calibrated" or quantizer_named(config.refine.weight_quantizer).calibrated
        model = {} if self.embedded else {"model": file_identity(config.model)}
        corpus = {"corpus": {"source": file_identity(self.train_side("corpus")), "column": config.corpus_column}}
        train = {"train": {"file": file_identity(self.train_side("train_file")), "max_rows": config.max_train_rows}}
        validation = {"validation_file": file_identity(self.train_side("validation_file"))}
        if config.extra_validation_files:
            files = config.extra_validation_files.items()
            validation["extra_validation_files"] = {split: file_identity(file) for split, file in files}
        calibration = train | {"seed": config.seed} if config.evaluate.weight_only else {}
        task = {"task": dataclasses.asdict(self.task), "max_length": config.max_length}
        task["task"]["labels"] = str(task["task"]["labels"])
        teacher = {"teacher_model": file_identity(config.teacher.model)}
        student = {"student": file_identity(config.student)} if config.student else {}
        steps = optimisation(config.distill)
        stage_2 = section("pretrain")
        if not config.pretrain.lambda_logits > 0:  # nothing of it is used
            stage_2["pretrain"] = {
                key: value for key, value in stage_2["pretrain"].items() if key not in PRETRAIN_DISTILLATION
            }
        of_cache = {"blocks": self._stage_2_blocks(), "block_size": config.pretrain.block_size}
        of_cache |= {"top_k": config.pretrain.kd_top_k, "temperature": config.pretrain.kd_temperature}
        return {
            "base": section("base") | training | corpus,
            "teacher": section("teacher") | training | model | task | train | teacher,
            "refine": section("refine") | model | (corpus if calibrated else {}),
            "cache": {"cache": of_cache, "seed": config.seed} | model | corpus,
            "pretrain": stage_2 | training | ternary | corpus,
            "distill": section("distill") | training | ternary | task | train | student,
            "baseline": section("baseline")
            | section("distill", steps)
            | training
            | ternary
            | model
            | task
            | train
            | embedding,
            "evaluate": section("evaluate") | task | validation | calibration,
            "export": section("export"),
        }[stage]

    # ------------------------------------------------------------------------------------------------ running

    def run(self) -> None:
        """Runs the wanted stages in order, skips what is done and unchanged, writes the report."""
        wanted = self.directory.stages if self.config.stage == "all" else (self.config.stage,)
        for stage in wanted:
            if stage not in self.directory.stages:
                raise UserError(
                    "stage",
                    expected=f"one of {', '.join(self.directory.stages)} with these settings",
                    got=stage,
                    do="`base` belongs to the demo, `refine` and `pretrain` to a run without --student, and `pretrain` "
                    "must be enabled.",
                )
            self.directory.require_inputs(stage)
            reason = self.directory.reason_to_run(stage, self.settings(stage))
            if reason is None:
                launch.say(f"{stage}: done and unchanged, skipped")
                continue
            launch.say(f"{stage}: runs ({reason})")
            getattr(self, stage)()
            launch.barrier()
        if launch.is_main() and self.config.report:
            show_report(self.root)

    def _train(
        self, stage: str, section: TrainingConfig, train: Callable[..., Any], save: Callable[..., None], **options: Any
    ) -> None:
        """What every training stage shares: arguments, checkpoints that belong to these settings, the atomic result."""
        checkpoints = self.directory.checkpoints(stage)
        resume = self._prepare_checkpoints(stage)
        arguments = training_arguments(
            checkpoints,
            **self._numerics(stage),
            seed=self.config.seed,
            report_to=self.config.report_to,
            steps_cap=self.config.max_steps,
            **optimisation(section),
        )
        trainer, facts = train(
            arguments=arguments,
            stage=stage,
            run_dir=self.root,
            resume=resume,
            health_steps=options.pop("health_steps", 0),
            **options,
        )
        model, state = trainer.model, full_state_dict(trainer.model_wrapped)
        if launch.is_main():
            with self.directory.result(stage, self.settings(stage), facts) as folder:
                save(folder, model, state)
        launch.barrier()
        release(trainer)
        if launch.is_main():
            shutil.rmtree(checkpoints, ignore_errors=True)
        gc.collect()

    def _prepare_checkpoints(self, stage: str) -> bool:
        """True when there are checkpoints of these very settings and --resume was given; others are removed, said."""
        folder = self.directory.checkpoints(stage)
        path = folder / "settings.json"
        inputs = {name: self.directory.done(name)["id"] for name in self.directory.inputs(stage)}
        engine = "torch" if self.alone else "deepspeed"  # neither reads the other's checkpoints
        now = json.loads(json.dumps({"settings": self.settings(stage), "inputs": inputs, "engine": engine}))
        known = json.loads(path.read_text()) if path.is_file() else None
        resume = self.config.resume and known == now
        launch.barrier()
        if not resume and folder.exists():
            why = "their settings differ from those of this run" if self.config.resume else "no --resume was given"
            if any(folder.glob("checkpoint-*")) or any(folder.glob("shard-*")):
                launch.say(f"{stage}: earlier checkpoints are removed, because {why}")
            if launch.is_main():
                shutil.rmtree(folder, ignore_errors=True)
        if launch.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(now))
        launch.barrier()
        return resume

    # ------------------------------------------------------------------------------------------------ stages

    def base(self) -> None:
        """The demo's own full-precision base model, from scratch."""
        tokenizer = load_tokenizer(self._tokenizer_folder())
        model = demo.demo_model(self._tokenizer_folder(), self.config.seed)

        def save(folder, model, state):
            model.save_pretrained(folder, state_dict=state)
            tokenizer.save_pretrained(folder)

        block_size = self.config.pretrain.block_size
        self._train("base", self.config.base, pretrain, save, model=model, stream=self.stream(block_size))

    def teacher(self) -> None:
        """FP16-SFT: the full-precision model fine-tuned on the task, stored in half precision."""
        source = self.config.teacher.model or self.base_folder()
        tokenizer = load_tokenizer(source)
        model = load_language_model(source)
        dtype = getattr(torch, self.config.teacher.dtype)

        def save(folder, model, state):
            kept = state.keys() - tied_keys(model)  # each in a dtype of its own, ties would be stored twice
            model.to(dtype).save_pretrained(folder, state_dict={key: state[key].to(dtype) for key in sorted(kept)})
            tokenizer.save_pretrained(folder)

        if self.config.teacher.finetuned:
            if launch.is_main():
                with self.directory.result("teacher", self.settings("teacher"), {"steps": 0}) as folder:
                    save(folder, model, model.state_dict())
            return
        self._train(
            "teacher",
            self.config.teacher,
            fine_tune,
            save,
            model=model,
            rows=self.encoded(tokenizer, model),
            pad_token_id=pad_token(tokenizer, embedding_rows(model)),
        )

    def refine(self) -> None:
        """Stage 1, surgery."""
        config = self.config.refine
        started = time.perf_counter()
        tokenizer = load_tokenizer(self.base_folder())
        model = load_language_model(self.base_folder())
        gains = inputs = None
        if config.gain == "calibrated" and config.norms != "none":
            gains = calibrate_gains(model, self._calibration_blocks(), config.norms)
        if quantizer_named(config.weight_quantizer).calibrated:
            inputs = calibrate_inputs(model, self._calibration_blocks(), config.norms, config.subln_eps)
        surgery = (config.norms, gains, config.subln_eps, config.embedding, config.weight_quantizer, inputs)
        result = refine(model, *surgery)
        launch.say(f"refine: {result}")
        if launch.is_main():
            facts = dataclasses.asdict(result) | {"seconds": round(time.perf_counter() - started, 2), "gains": gains}
            with self.directory.result("refine", self.settings("refine"), facts) as folder:
                self._save_ternary(tokenizer)(folder, model, model.state_dict())

    def _calibration_blocks(self) -> Iterator[dict[str, torch.Tensor]]:
        """The first blocks of stage 2's corpus, one at a time."""
        blocks = iter(self.stream(self.config.pretrain.block_size))
        return (collate_blocks([next(blocks)]) for _ in range(self.config.refine.calibration_blocks))

    def cache(self) -> None:
        """The base model's logits for the blocks of stage 2: in its stored dtype on a GPU, in fp32 on a CPU."""
        started, section = time.perf_counter(), self.config.pretrain
        self._check_steps()
        dtype = torch.float32 if self.device == "cpu" else "auto"
        model = load_language_model(self.base_folder(), dtype).eval().requires_grad_(False).to(self.device)
        layout = self._cache_layout(model.config.vocab_size)
        launch.say(f"cache: {layout}")
        self._prepare_checkpoints("cache")
        shards = self.directory.checkpoints("cache")
        if launch.is_main():
            check_room(shards, layout)
        stream = self.stream(section.block_size)
        write_shards(shards, model, stream, layout, batch_size=section.per_device_train_batch_size)
        del model
        gc.collect()
        launch.barrier()
        if launch.is_main():
            facts: dict[str, Any] = {"tokens": layout.blocks * layout.block_size}
            with self.directory.result("cache", self.settings("cache"), facts) as folder:
                facts["bytes"] = finish_cache(shards, folder, layout)
                facts["seconds"] = round(time.perf_counter() - started, 2)
            shutil.rmtree(shards)

    def _teacher_cache(self, vocabulary: int) -> TeacherCache | None:
        """What `cache` made, if stage 2 distils; refused when it was made for other blocks or another model."""
        if "cache" not in self.directory.stages:
            return None
        reason = self.directory.reason_to_run("cache", self.settings("cache"))
        if reason is not None:
            raise UserError(
                "stage",
                expected="teacher logits for these settings before `pretrain`",
                got=f"{self.directory.folder('cache')}, but {reason}",
                do="Run --stage cache first, or --stage all.",
            )
        return TeacherCache(
            self.directory.folder("cache"),
            blocks=self._stage_2_blocks(),
            block_size=self.config.pretrain.block_size,
            vocabulary=vocabulary,
        )

    def pretrain(self) -> None:
        """Stage 2, continued pre-training."""
        tokenizer = load_tokenizer(self.base_folder())
        model = load_student(self.directory.folder("refine"))
        use_backward(model, self.config.bit_linear_backward)
        section = self.config.pretrain
        self._check_steps()
        self._train(
            "pretrain",
            section,
            pretrain,
            self._save_ternary(tokenizer),
            model=model,
            stream=self.stream(section.block_size),
            health_steps=section.health_steps,
            annealing=None
            if section.annealing == "none"
            else Annealing(section.annealing, section.annealing_start, section.annealing_end),
            cache=self._teacher_cache(model.config.vocab_size),
            lambda_logits=section.lambda_logits,
        )

    def distill(self) -> None:
        """Stage 3, distillation fine-tuning."""
        section = self.config.distill
        self._check_student()
        tokenizer = load_tokenizer(self.student_folder())
        model = load_student(self.student_folder())
        use_backward(model, self.config.bit_linear_backward)
        teacher = load_teacher(
            self.directory.folder("teacher"),
            dtype=self._teacher_dtype(),
            device=self.device,
            offload=self.config.teacher_offload,
            nvme_path=self.config.nvme_path,
        )
        shared = optimisation(section)
        options = {name: value for name, value in dataclasses.asdict(section).items() if name not in shared}
        self._train(
            "distill",
            section,
            fine_tune,
            self._save_ternary(tokenizer),
            model=model,
            rows=self.encoded(tokenizer, model),
            pad_token_id=pad_token(tokenizer, embedding_rows(model)),
            objective=Distillation(model, teacher, **options),
            health_steps=section.health_steps,
        )

    def baseline(self) -> None:
        """BitNet-SFT: ternary without SubLN, fine-tuned on the task alone, with the steps of stage 3."""
        section = dataclasses.replace(self.config.distill)
        if self.config.baseline.learning_rate is not None:
            section.learning_rate = self.config.baseline.learning_rate
        tokenizer = load_tokenizer(self.base_folder())
        model = load_language_model(self.base_folder())
        refine(model, norms="none", embedding=self.config.refine.embedding)
        use_backward(model, self.config.bit_linear_backward)
        self._train(
            "baseline",
            section,
            fine_tune,
            self._save_ternary(tokenizer),
            model=model,
            rows=self.encoded(tokenizer, model),
            pad_token_id=pad_token(tokenizer, embedding_rows(model)),
            health_steps=section.health_steps,
        )

    @staticmethod
    def _save_ternary(tokenizer) -> Callable[..., None]:
        def save(folder, model, state):
            save_student(folder, model, tokenizer, state)
            histograms = weight_histograms(state, list(bit_linears(model)))
            (folder / "weights.json").write_text(json.dumps(histograms))

        return save

    def evaluate(self) -> None:
        """Scores the settings on the validation rows, and draws what teacher and student attend to. Rank 0 alone."""
        if not launch.is_main():
            return
        started = time.perf_counter()
        splits = self.validation()
        rows = splits["validation"]
        options = {"max_length": self.config.max_length, "batch_size": self.config.evaluate.per_device_eval_batch_size}
        scores, attention = {}, {}
        facts: dict[str, Any] = {}
        for setting, stage in SETTINGS.items():
            if stage not in self.directory.stages:
                continue
            folder = self.directory.folder(stage)
            model = load_language_model(folder) if stage == "teacher" else load_student(folder)
            model.to(self.device)
            tokenizer = load_tokenizer(folder)
            with WeightCodes(model).hold():
                scores[setting] = score_splits(model, self.task, splits, tokenizer, name=setting, **options)
            if stage == "teacher" and self.config.evaluate.weight_only:
                prompts = self._calibration(tokenizer)
                for name, method in METHODS.items():
                    rounded = load_language_model(folder).to(self.device)
                    facts[name] = quantize_model(rounded, method, prompts if method == "gptq" else ())
                    scores[name] = score_splits(rounded, self.task, splits, tokenizer, name=name, **options)
            if stage != "baseline":
                layers = self.config.distill.relation_layers
                if stage == "teacher":
                    layers = self.config.distill.teacher_relation_layers or layers
                prompt = encode_prompts(self.task, rows.select([0]), tokenizer, self.config.max_length)[0][0]
                attention["teacher" if stage == "teacher" else "student"] = attention_maps(model, prompt, layers[-1])
        notes = [] if self.device == "cpu" else ["scored on the GPU in fp32"]
        with self.directory.result("evaluate", self.settings("evaluate"), facts) as folder:
            result = scores_json(self.task, splits, scores, notes)
            (folder / "scores.json").write_text(json.dumps(result, indent=1))
            for split in splits:
                name = "predictions.jsonl" if split == "validation" else f"predictions-{split}.jsonl"
                with (folder / name).open("w") as file:
                    for i, row in enumerate(splits[split]):
                        predictions = {name: score[split].predictions[i] for name, score in scores.items()}
                        file.write(json.dumps({"row": i, **row, "predictions": predictions}) + "\n")
            np.savez_compressed(
                folder / "attention.npz",
                teacher=attention["teacher"],
                student=attention["student"],
                tokens=np.array([tokenizer.decode([token]) for token in prompt]),
                layer=layers[-1],
            )
            facts["seconds"] = round(time.perf_counter() - started, 2)

    def _calibration(self, tokenizer) -> list[list[int]]:
        """Training prompts for GPTQ, drawn by the seed, of CALIBRATION_TOKENS tokens together."""
        rows = self.rows("train")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.config.seed))
        chosen = rows.select(order[: CALIBRATION_TOKENS // 8].tolist())
        prompts, _ = encode_prompts(self.task, chosen, tokenizer, self.config.max_length)
        ends = np.cumsum([len(ids) for ids in prompts])
        return prompts[: int((ends < CALIBRATION_TOKENS).sum()) + 1]

    def export(self) -> None:
        """Packs the ternary settings, proves the student's file, and measures decoding on this CPU. Rank 0 alone."""
        if not launch.is_main():
            return
        config, started = self.config.export, time.perf_counter()
        rows = self.rows("validation")
        teacher = self.directory.folder("teacher")
        tokenizer = load_tokenizer(teacher)
        prompts, _ = encode_prompts(
            self.task, rows.select(range(min(config.proof_rows, len(rows)))), tokenizer, self.config.max_length
        )
        facts: dict[str, Any] = {}
        with self.directory.result("export", self.settings("export"), facts) as folder:
            speeds = [full_precision_size(teacher)]
            if config.speed_tokens:
                launch.say("export: measures decoding of FP16-SFT by transformers")
                speeds[0] |= full_precision_speed(teacher, prompts[0], config.speed_tokens)
            for setting, stage in SETTINGS.items():
                if stage == "teacher" or stage not in self.directory.stages:
                    continue
                path = folder / ("student.safetensors" if stage == "distill" else f"{stage}.safetensors")
                model = load_student(self.directory.folder(stage))
                trained = embedding_format(model)
                sizes = write_packed(
                    path,
                    model,
                    packing=config.packing,
                    embedding=config.embedding or ("int8" if trained == FULL_PRECISION else trained),
                    tokenizer_json=(self.directory.folder(stage) / "tokenizer.json").read_bytes(),
                    metadata={
                        "setting": setting,
                        "task": self.task.name,
                        "tokenizer": tokenizer_settings(load_tokenizer(self.directory.folder(stage))),
                    },
                )
                launch.say(
                    f"export: {path.name}, {sizes['file_bytes']:,} bytes, {sizes['bits_per_weight']:.3f} bits a weight"
                )
                if stage == "distill":
                    proof = prove_parity(path, model, prompts)
                    (folder / "proof.json").write_text(json.dumps(proof, indent=1))
                    launch.say(
                        f"export: proved on {proof['tokens']} tokens: codes of {proof['linears']} linears equal, mean KL "
                        f"{proof['mean_kl']:.1e}, same top-1 {100 * proof['same_top1']:.1f} %"
                    )
                row = {
                    "setting": setting,
                    "runner": "not measured",
                    "linear_bytes": sizes["linear_bytes"],
                    "model_bytes": sizes["file_bytes"],
                    "bits_per_weight": sizes["bits_per_weight"],
                    "model_bits_per_parameter": sizes["model_bits_per_parameter"],
                }
                if config.speed_tokens:
                    row |= packed_speed(Runtime(path, torch.get_num_threads()), prompts[0], config.speed_tokens)
                speeds.append(row)
            if self.config.evaluate.weight_only:
                size = weight_only_size(teacher, read_packed(folder / "student.safetensors").config)
                speeds[1:1] = [{"setting": name, "runner": "not measured", **size} for name in METHODS]
            (folder / "speed.json").write_text(json.dumps({"machine": machine(), "rows": speeds}, indent=1))
            facts["seconds"] = round(time.perf_counter() - started, 2)


def main() -> int:
    """Parses and runs. Returns the exit status of `console.run`."""

    def body() -> None:
        config, text = parse_config()
        Job(config, text).run()
        launch.shutdown()

    return console.run(body)


if __name__ == "__main__":
    sys.exit(main())
