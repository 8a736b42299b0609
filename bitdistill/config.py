"""The tree of settings: dataclasses with a description of every setting (which `--help` prints) and checks of their values.

A value comes from the first of these that gives one: the command line, `--config FILE`, the recipe (`--recipe`, a YAML file
of recipes/), the defaults here (command_line.py). Names are Hugging Face's where Hugging Face has one. Only entry files read
these objects.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from bitdistill.errors import UserError
from bitdistill.limits import check_limits
from bitdistill.names import DEPLOY_TARGETS, STAGES, TASK_CORPUS
from bitdistill.student import quantizers
from bitdistill.text_files import user_path

STAGE_CHOICES = Literal[("all", "check", *STAGES)]


@dataclass
class TrainingConfig:
    """Optimization of one training stage, under the names of transformers.TrainingArguments.

    Args:
        max_steps: optimizer steps; -1 derives them from num_train_epochs.
        num_train_epochs: passes over the data when max_steps is -1.
        per_device_train_batch_size: sequences per rank and micro-step.
        gradient_accumulation_steps: micro-steps per optimizer step.
        learning_rate: peak learning rate of AdamW.
        lr_scheduler_type: cosine, linear, constant_with_warmup, ...
        warmup_steps: steps of linear warm-up; below 1 a share of all steps.
        weight_decay: weight decay of AdamW, applied to matrices only.
        adam_beta1: decay rate of AdamW's running mean of the gradients.
        adam_beta2: decay rate of AdamW's running mean of the squared gradients.
        max_grad_norm: gradients are clipped to this global norm; 0 turns it off.
        gradient_checkpointing: recompute activations in the backward pass.
        train_sampling_strategy: random, or group_by_length, which puts rows of similar length into a batch and so saves padding
            (for task rows only).
        logging_steps: steps between lines of metrics.jsonl.
        save_steps: steps between checkpoints, from which an interrupted stage continues; 0 writes none.
        health_steps: steps between lines of health.jsonl; 0 writes none.
    """

    max_steps: int = -1
    num_train_epochs: float = 3.0
    per_device_train_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    learning_rate: float = 5e-5
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.05
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    train_sampling_strategy: Literal["random", "group_by_length"] = "random"
    logging_steps: int = 10
    save_steps: int = 500
    health_steps: int = 50


@dataclass
class TeacherConfig(TrainingConfig):
    """FP16-SFT: the full-precision model fine-tuned on the task. It teaches stage 3 and is the first setting compared.

    Args:
        model: a teacher's base model (folder or hub id); the run's own base model by default. A larger one may have other
            widths and head counts, but must share the vocabulary.
        finetuned: True if `model` has been fine-tuned on the task already and is to be used unchanged.
        dtype: the precision in which the teacher is stored, and in which it runs on a GPU.
    """

    model: str | None = None
    finetuned: bool = False
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"


@dataclass
class RefineConfig:
    """Stage 1, surgery.

    Args:
        norms: SubLN before o_proj and down_proj (two, the paper), before all seven projections (all, its authors' code), or
            none, for comparison and for other tools (docs/export.md).
        gain: initial SubLN gain: one, or calibrated to the RMS of the base model's own activations.
        subln_eps: eps of SubLN; the model's own rms_norm_eps when absent (the authors' code has 1e-8).
        calibration_blocks: blocks of the corpus that a calibrated gain is measured on.
        embedding: the format in which embedding and LM head are trained, also for the baseline: fp16 is full precision; int8,
            int4 and ternary are then stored in the packed file bit for bit (docs/method.md).
        weight_quantizer: how the linear layers become ternary (docs/method.md); the baseline always uses absmean. gptq and seq
            do not work with ZeRO-3. gptq and awq are calibrated on calibration_blocks, too. A student of awq can be exported to
            the packed file only.
        weight_scale: which weights share one scale: the whole tensor (the paper), each row, or each group of columns of a row
            (absmean, gptq and tequila). The baseline has one scale per tensor. Groups cost 16 / group_size bits per weight.
        group_size: columns of a group: 64, 128 or 256.
        act_scale: which activations share one int8 scale: those of a token (the paper), or each block of 32 columns of a token,
            as in llama.cpp. The baseline always uses token.
        vocabulary: full, or trimmed to the tokens that the training texts use and those that their merges need, for teacher
            and student alike (docs/method.md). The embedding becomes smaller, and other texts are cut into more tokens.
        vocabulary_threshold: a trimmed vocabulary keeps tokens that occur more often than this.
    """

    norms: Literal["two", "all", "none"] = "two"
    gain: Literal["one", "calibrated"] = "calibrated"
    subln_eps: float | None = None
    calibration_blocks: int = 16
    embedding: Literal["fp16", "int8", "int4", "ternary"] = "fp16"
    weight_quantizer: Literal[*quantizers.QUANTIZERS] = "absmean"
    weight_scale: Literal["tensor", "row", "group"] = "tensor"
    group_size: Literal[64, 128, 256] = 128
    act_scale: Literal["token", "block"] = "token"
    vocabulary: Literal["full", "trimmed"] = "full"
    vocabulary_threshold: int = 0

    def in_effect(self) -> dict[str, Any]:
        """All settings but those that have no effect, and those that older runs did not have."""
        without = {"tensor": {"weight_scale", "group_size"}, "row": {"group_size"}, "group": set()}[self.weight_scale]
        without = without | ({"act_scale"} if self.act_scale == "token" else set())
        return {name: value for name, value in asdict(self).items() if name not in without}


@dataclass
class PretrainConfig(TrainingConfig):
    """Stage 2, continued pre-training of the ternary student on a corpus: CE + lambda_logits * logits KL + lambda_hidden *
    distance of the hidden states.

    Args:
        enabled: False leaves stage 2 out: stage 3 starts from the refined base model.
        block_size: tokens per sequence.
        document_mask: a token attends to tokens of its own document only, positions begin again in each document, and the first
            token of a document is not predicted. False: a token attends to all tokens before it in the block.
        annealing: how the stage goes from full precision to ternary (docs/method.md): linear, softmax, or none, which is
            ternary from the first step on.
        annealing_start: share of the steps that are in full precision.
        annealing_end: share of the steps after which the model is ternary. If it equals annealing_start, there is no transition.
        lambda_logits: weight of the distillation from the full-precision base model, whose logits are cached on disk
            by a stage of their own (cache); 0, as in the paper, turns it off. If it is far above 1, the stage is
            little more than distillation.
        kd_temperature: its softmax temperature, for teacher and student. The KL is not multiplied by its square.
        kd_top_k: the number of words of each position whose logits are cached; all other words are counted as one. The
            cache takes 4 bytes per word and token (6 for vocabularies above 65,536 words), and 4 more per token: for 32
            words, 132 (196) bytes per token. Not used with lambda_hidden, where the KL is that of all words.
        lambda_hidden: weight of the distance between the hidden states of student and base model after each layer (this
            project's addition; docs/method.md). If it is above 0, the base model runs beside the student, and nothing is cached.
        teacher_forcing: share of the steps in which each layer of the student reads, in part, the base model's state in place
            of the student's own: wholly at the first step, then less and less (this project's addition; docs/method.md). It
            needs lambda_hidden above 0; 0 turns it off.
    """

    enabled: bool = True
    block_size: int = 512
    document_mask: bool = True
    annealing: Literal["none", "linear", "softmax"] = "none"
    annealing_start: float = 0.0
    annealing_end: float = 0.3
    lambda_logits: float = 0.0
    kd_temperature: float = 1.0
    kd_top_k: int = 32
    lambda_hidden: float = 0.0
    teacher_forcing: float = 0.0


@dataclass
class DistillConfig(TrainingConfig):
    """Stage 3, distillation fine-tuning: CE + lambda_logits * logits KL + gamma_attention * relation KL.

    Args:
        lambda_logits: weight of the logits distillation; 0 turns it off (paper: 10 for classification, 1 for summaries).
        kd_temperature: softmax temperature of the logits distillation (paper: 5).
        kd_tau_squared: multiply that loss by the temperature squared (the authors' code does, the paper does not).
        kd_tokens: distill on the tokens of the answer only, or on all tokens (the authors' code: all).
        relation: convention of the relation loss (docs/method.md), or none.
        relation_layers: decoder layers whose Q, K, V relations are matched; negative counts from the end.
        teacher_relation_layers: the teacher's layers, when it has another depth; the same by default.
        split_heads: heads that the relations are regrouped to; the model's own when absent.
        relation_temperature: softmax temperature of alg1 and attention_maps.
        relation_causal: relate a token only to itself and the tokens before it.
        gamma_attention: weight of the relation loss, or `balanced`: a running mean of gamma_rho * |gradient of the other
            losses| / |gradient of the relation loss|.
        gamma_rho: the gradient ratio that `balanced` aims at.
        gamma_every: steps between measurements of that ratio.
        lambda_hidden: weight of the distance between the hidden states of student and teacher after each layer (this
            project's addition; docs/method.md); 0, as in the paper, turns it off. Both must have the same hidden size.
        teacher_forcing: as in pretrain, with the teacher's states.
        teacher_cache: run the teacher once over all training rows, in a stage of its own (teacher_cache), save its outputs, and
            train from these files without the teacher in memory. The losses equal those with the live teacher up to rounding.
            This saves time from the second epoch on, when several trainings share one teacher, or when the teacher does not fit
            into memory beside the student (docs/scaling.md).
        cache_top_k: how many of the largest logits of each position that cache keeps; all other words are then counted as one,
            which makes the loss smaller, most of all at a high kd_temperature. When absent, it keeps the final hidden states
            and the teacher's LM head, from which all logits can be computed.
    """

    lambda_logits: float = 10.0
    kd_temperature: float = 5.0
    kd_tau_squared: bool = False
    kd_tokens: Literal["response", "all"] = "response"
    relation: Literal["eq12", "alg1", "pr382", "attention_maps", "none"] = "eq12"
    relation_layers: list[int] = field(default_factory=lambda: [-1])
    teacher_relation_layers: list[int] | None = None
    split_heads: int | None = None
    relation_temperature: float = 1.0
    relation_causal: bool = False
    gamma_attention: float | Literal["balanced"] = "balanced"
    gamma_rho: float = 1.0
    gamma_every: int = 10
    lambda_hidden: float = 0.0
    teacher_forcing: float = 0.0
    teacher_cache: bool = False
    cache_top_k: int | None = None


@dataclass
class BaselineConfig:
    """BitNet-SFT: the base model, ternary without SubLN, fine-tuned on the task with the steps of stage 3.

    Args:
        enabled: whether to train it. False leaves two models in the table.
        learning_rate: the baseline's learning rate; that of stage 3 when absent.
    """

    enabled: bool = True
    learning_rate: float | None = None


@dataclass
class EvaluateConfig:
    """Scoring of the settings on the task's validation rows.

    Args:
        enabled: False leaves the table out; the packed file then knows no scores.
        per_device_eval_batch_size: rows that are scored at a time.
        max_rows: validation rows scored of each split; all when absent.
        weight_only: also score the teacher with its linears in 4 bits (round to nearest, GPTQ), which needs no training.
    """

    enabled: bool = True
    per_device_eval_batch_size: int = 64
    max_rows: int | None = None
    weight_only: bool = True


@dataclass
class ExportConfig:
    """The packed file.

    Args:
        enabled: False packs nothing.
        packing: base3 (five ternary digits in a byte, 1.6 bits per weight) or 2bit.
        embedding: the format in which embedding and LM head are stored. When absent, it is the one in which they were trained
            (refine.embedding), or int8 if they were trained in full precision. Another one is possible only in that case.
        proof_rows: validation prompts on which the packed file must reproduce the student's logits.
        speed_tokens: tokens decoded per timing; 0 measures no speed.
    """

    enabled: bool = True
    packing: Literal["base3", "2bit"] = "base3"
    embedding: Literal["fp16", "int8", "int4", "ternary"] | None = None
    proof_rows: int = 8
    speed_tokens: int = 64


@dataclass
class RunConfig:
    """BitNet Distillation of one model on one task.

    Args:
        recipe: the preset that the other settings start from. The default is demo without --model; with one, standard on a
            GPU and laptop on a CPU.
        stage: what to run; a stage that is done and unchanged is skipped. check trains nothing: it looks for everything that
            could go wrong in a run of all stages, prints what it finds, and ends.
        output_dir: the run directory.
        deploy_target: the tool that the student is to run in (docs/export.md). It chooses norms, scales and activations that the
            tool supports, and says what is given up for it. What the tool cannot open is refused before anything is trained.
        model: base model, a local folder or a hub id; without one the embedded demo makes its own.
        student: the finished student of another run's stage 2 (RUN/pretrain), from which stage 3 starts; stages 1 and 2 are
            left out.
        task: demo, sst2, mnli, qnli, cnndm, or a YAML file of your own.
        train_file: a local JSONL, CSV, TSV or Parquet file in place of the hub's training rows.
        validation_file: the same for the validation rows.
        extra_validation_files: the same for further validation splits that the task names, as split: file
            (--extra_validation_files.validation_mismatched FILE for mnli).
        max_train_rows: use only so many training rows, chosen by seed.
        max_length: tokens of a task row; longer prompts are cut, answers never.
        corpus: text for stage 2: a hub dataset, or local .txt, .jsonl or .parquet files, a folder or a pattern; or `task`: the
            task's own training rows, each with its answer.
        corpus_column: its text column, when it is not `text`; without effect on `task`.
        seed: the seed of everything random.
        max_steps: the most steps that any stage may take, for test runs.
        resume: accepted for compatibility, without effect: an interrupted stage always continues from its last checkpoint.
        restart: run every wanted stage from its beginning and discard its checkpoints. A finished result stays until the new
            one is complete.
        precision: the precision of the matrix products: fp32, bf16, or auto. The master weights are fp32 in any case. auto is
            bf16 on a GPU. On a CPU that has instructions for bf16, auto is bf16 in the full-precision models and the LM heads,
            and fp32 elsewhere.
        bit_linear_backward: how the gradients of the ternary layers are computed: exact (products in the training precision),
            or fast (int8 products of rounded gradients, which take a half to a quarter of the time and add some noise; the
            rounding is random on a GPU and to the nearest on a CPU).
        kernels: the implementation of the ternary layers: auto (compiled kernels, if a check on this machine found them equal
            to PyTorch; `bitdistill env` shows it), or reference (plain PyTorch).
        zero: DeepSpeed ZeRO stage of the trained model. auto is 1, but one rank on a CPU trains in PyTorch alone, without
            DeepSpeed, unless something is offloaded.
        offload: where ZeRO keeps the optimizer state and, at stage 3, the parameters.
        teacher_offload: where the frozen teacher's parameters are kept instead of on the device.
        nvme_path: a folder on a fast disk, for nvme.
        rank_timeout: with several ranks, how many seconds training may make no progress before the rank that stands still is
            named and the run ends. It must be longer than it takes to write a checkpoint.
        report: write report.html and its figures at the end.
        report_to: experiment trackers, as in transformers: tensorboard, wandb, mlflow, ...
        base: training of the embedded demo's own base model.
        teacher: the FP16-SFT teacher.
        refine: stage 1.
        pretrain: stage 2.
        distill: stage 3.
        baseline: BitNet-SFT.
        evaluate: scoring.
        export: the packed file.
    """

    recipe: str = "demo"
    stage: STAGE_CHOICES = "all"
    output_dir: str = "runs/demo"
    deploy_target: Literal[*DEPLOY_TARGETS] | None = None
    model: str | None = None
    student: str | None = None
    task: str = "demo"
    train_file: str | None = None
    validation_file: str | None = None
    extra_validation_files: dict[str, str] = field(default_factory=dict)
    max_train_rows: int | None = None
    max_length: int = 512
    corpus: str | None = None
    corpus_column: str | None = None
    seed: int = 0
    max_steps: int | None = None
    resume: bool = True
    restart: bool = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    bit_linear_backward: Literal["exact", "fast"] = "exact"
    kernels: Literal["auto", "reference"] = "auto"
    zero: Literal["auto", 0, 1, 2, 3] = "auto"
    offload: Literal["none", "cpu", "nvme"] = "none"
    teacher_offload: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None
    rank_timeout: float = 1800.0
    report: bool = True
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    base: TrainingConfig = field(default_factory=TrainingConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def validate(self) -> None:
        """Raises UserError for a value or a combination that cannot run; called before anything is loaded."""
        check_limits(self)
        self._check_training()
        self._check_forcing()
        self._check_layers()
        self._check_model()
        self._check_folders()
        self._check_formats()

    def _check_training(self) -> None:
        for name in ("base", "pretrain"):
            strategy = getattr(self, name).train_sampling_strategy
            if strategy != "random":
                raise UserError(
                    f"{name}.train_sampling_strategy",
                    expected="random: blocks of a corpus are all of one length",
                    got=strategy,
                    do=f"Leave {name}.train_sampling_strategy out; teacher and distill can have group_by_length.",
                )
        start, end = self.pretrain.annealing_start, self.pretrain.annealing_end
        if start > end:
            raise UserError(
                "pretrain.annealing_start",
                expected=f"at most pretrain.annealing_end, {end}",
                got=str(start),
                do="Lower pretrain.annealing_start, or raise pretrain.annealing_end.",
            )

    def _check_forcing(self) -> None:
        for name in ("pretrain", "distill"):
            section = getattr(self, name)
            if section.teacher_forcing > 0 and not section.lambda_hidden > 0:
                raise UserError(
                    f"{name}.teacher_forcing",
                    expected=f"0 where {name}.lambda_hidden is 0: a layer that reads its teacher's states learns from them alone",
                    got=str(section.teacher_forcing),
                    do=f"Raise {name}.lambda_hidden, for example to 10, or set {name}.teacher_forcing to 0.",
                )

    def _check_layers(self) -> None:
        if self.distill.teacher_cache and self.distill.lambda_hidden > 0:
            raise UserError(
                "distill.teacher_cache",
                expected="false with distill.lambda_hidden, for the hidden states of all layers are not kept on disk",
                got="true",
                do="Leave teacher_cache out, or set distill.lambda_hidden to 0: some recipes have it above 0.",
            )
        ours, teachers = self.distill.relation_layers, self.distill.teacher_relation_layers
        if self.distill.relation == "none":
            return
        if not ours:
            do = "Name at least one layer, or set distill.relation to none."
            raise UserError("distill.relation_layers", expected="at least one layer", got="none", do=do)
        if teachers is not None and len(teachers) != len(ours):
            raise UserError(
                "distill.teacher_relation_layers",
                expected=f"as many layers as distill.relation_layers has, {len(ours)}",
                got=f"{teachers} beside {ours}",
                do="List a teacher's layer for each of the student's, or leave it out for the same layers.",
            )

    def _check_model(self) -> None:
        demo = self.model is None
        if demo and self.task != "demo":
            raise UserError("model", expected="a base model for a real task", got="none", do="Give --model.")
        if not demo and self.task == "demo":
            raise UserError(
                "task",
                expected="sst2, mnli, qnli, cnndm or a YAML file",
                got="demo, which is only for the embedded model",
                do="Give --task.",
            )
        stage_2 = self.student is None and self.pretrain.enabled
        if not demo and stage_2 and self.corpus is None and self.stage in ("all", "check", "cache", "pretrain"):
            raise UserError(
                "corpus",
                expected="text for stage 2",
                got="none",
                do="Give --corpus (a hub dataset, or local files; or task, for the task's own training rows), or --student with "
                "a finished stage 2.",
            )
        if demo and self.corpus == TASK_CORPUS:
            raise UserError(
                "corpus",
                expected="general text, from which the demo's base model learns",
                got=f"{TASK_CORPUS}, the task's training rows",
                do="Leave out --corpus: the demo has a corpus of its own.",
            )
        if self.student is not None and not (user_path(self.student, "student") / "model.safetensors").is_file():
            raise UserError(
                "student",
                expected="a finished stage 2 of another run (RUN/pretrain)",
                got=f"{self.student}, without a model.safetensors",
                do="Give the path of a folder `pretrain` of a run whose stage 2 is done.",
            )
        if self.teacher.finetuned and self.teacher.model is None:
            raise UserError(
                "teacher.finetuned", expected="teacher.model with it", got="none", do="Give --teacher.model."
            )

        if self.refine.vocabulary == "trimmed" and self.student is not None:
            raise UserError(
                "refine.vocabulary",
                expected="full with --student, whose vocabulary is what it was trained with",
                got="trimmed",
                do="Leave one of the two out.",
            )

    def _check_folders(self) -> None:
        """What the run reads does not lie where it writes, nor the other way round."""
        run, brought = Path(self.output_dir).resolve(), ("refine", "pretrain") if self.student else ()
        read = {
            "model": self.model,
            "teacher.model": self.teacher.model,
            "student": self.student,
            "corpus": None if self.corpus == TASK_CORPUS else self.corpus,
        }
        for name, source in read.items():
            folder = Path(source or "").resolve()
            if source is None or not folder.is_dir():
                continue
            if folder == run or folder in run.parents:
                raise UserError(
                    "output_dir",
                    expected=f"a folder of its own, outside {name}",
                    got=f"{self.output_dir}, which is or lies in {source}",
                    do="Give the run another --output_dir: it writes there, and would change what it reads.",
                )
            inside = folder.relative_to(run).parts[0] if run in folder.parents else None
            if inside in STAGES and inside not in brought:
                raise UserError(
                    name,
                    expected="a folder that this run does not write to",
                    got=f"{source}, the result of a stage in output_dir",
                    do="Give the run another --output_dir.",
                )

    def _check_formats(self) -> None:
        if self.refine.embedding != "fp16" and self.export.embedding not in (None, self.refine.embedding):
            raise UserError(
                "export.embedding",
                expected=f"{self.refine.embedding}, as refine.embedding trains it",
                got=str(self.export.embedding),
                do="Leave it out: only an embedding trained in full precision can be stored in another format.",
            )
        refine = self.refine
        quantizer = quantizers.quantizer_named(refine.weight_quantizer, refine.weight_scale, refine.group_size)
        if self.zero == 3:
            quantizers.refuse_partitions(quantizer)
        if self.pretrain.annealing == "softmax":
            quantizers.refuse_softmax(quantizer)
