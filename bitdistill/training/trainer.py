"""The transformers.Trainer that every training stage uses: named loss terms, averages that do not depend on how a batch is
divided, one JSON line per step.

A stage has an `Objective`: named loss terms with weights. Each loss is a *sum over this rank's rows divided by the count of
the whole optimizer step* (all micro-batches, all ranks), so that one rank with 32 rows, two ranks with 16, and four
micro-batches of 8 give the same number. DeepSpeed averages gradients over ranks; the multiplication by world size below
undoes that.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from bitdistill.distributed import process_group, stall, termination
from bitdistill.distributed.adopt import Adopted, adopt
from bitdistill.distributed.checkpoint import latest_checkpoint, mark_complete
from bitdistill.distributed.restore import restore
from bitdistill.files import append_line, write_whole
from bitdistill.kernels.numerics import IGNORED
from bitdistill.student.attention import fuse_attention, unfuse_attention
from bitdistill.student.layers import assert_fp32_masters
from bitdistill.student.lookup import fuse_lookup, unfuse_lookup
from bitdistill.student.norms import fuse_norms, unfuse_norms
from bitdistill.student.rotary import fuse_rotary, unfuse_rotary
from bitdistill.student.sharing import WeightCodes
from bitdistill.training.annealing import Annealing
from bitdistill.training.finite import FiniteSteps
from bitdistill.training.head import head_products
from bitdistill.training.progress_bar import ProgressBar
from bitdistill.training.row_order import NO_ROW, FilledRows, RowOrder

EXTRA_STATE, STEP_ROWS = "bitdistill_state.json", "step_rows"
TOTAL = "all"  # the name under which the weighted sum of the loss terms is counted


@dataclass
class StageArguments(TrainingArguments):
    """TrainingArguments, and what this project's stages need besides.

    Args:
        autocast_dtype: in which matrix products run where DeepSpeed does not decide it; None leaves them in fp32.
        head_dtype: in which the products of the LM head run, where the rest stays in fp32; None as the rest.
        rank_timeout: seconds without progress after which a rank that stands still is named, and the run ends; None waits.
    """

    autocast_dtype: str | None = None
    head_dtype: str | None = None
    rank_timeout: float | None = None


@dataclass(frozen=True)
class Counts:
    """What an optimizer step holds over all of its micro-batches and ranks."""

    answer_tokens: int  # labels that are predicted: shifted, not -100
    tokens: int  # unpadded positions
    positions: int  # all positions, padding included
    step: int  # the optimizer steps done before this one
    progress: float = 0.0  # these over those of the stage


class Objective:
    """What a stage minimizes: ``sum(weight * loss)`` over named terms."""

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], counts: Counts) -> dict[str, tuple[float, Tensor]]:
        """The terms of one micro-batch, by name: (weight, loss). `model` is what DeepSpeed wrapped around the model."""
        raise NotImplementedError

    def finish_step(self) -> None:
        """Called on every rank after the last backward pass of an optimizer step."""

    def logged(self) -> dict[str, float]:
        """Further numbers for each line of metrics.jsonl."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides weights and optimizer, for JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a `state_dict` back."""

    def close(self) -> None:
        """Called when training ends, also with an exception: what the objective put into the model is taken out."""


def capped_steps(max_steps: int, cap: int | None) -> int:
    """Optimizer steps of a stage whose own number may be -1 (not given), under a cap that may be None."""
    return max_steps if cap is None else min(max_steps, cap) if max_steps > 0 else cap


def training_arguments(
    folder: Path,
    *,
    deepspeed: dict[str, Any] | None,
    seed: int,
    report_to: list[str],
    steps_cap: int | None = None,
    autocast_dtype: str | None = None,
    head_dtype: str | None = None,
    rank_timeout: float | None = None,
    health_steps: int = 0,  # read by the caller; accepted so that a whole section of settings can be passed
    save_steps: int = 0,
    max_steps: int = -1,
    gradient_checkpointing: bool = False,
    **hugging_face: Any,
) -> StageArguments:
    """The arguments of a stage's trainer.

    Args:
        folder: for checkpoints.
        deepspeed: from distributed.presets; None trains in PyTorch alone, on one rank.
        autocast_dtype, head_dtype, rank_timeout: as in StageArguments; with DeepSpeed the first is part of its section.
        steps_cap: upper bound on max_steps, for smoke runs.
        hugging_face: learning_rate, per_device_train_batch_size, ... verbatim.
        seed: of weights, data order and dropout. report_to: trackers, as in transformers.
        gradient_checkpointing: recompute activations in the backward pass.
        max_steps: optimizer steps; -1 derives them from num_train_epochs. save_steps: between checkpoints; 0 writes none.
        health_steps: not used here; accepted so that a whole section of settings can be passed.
    """
    if gradient_checkpointing:  # the reentrant kind would hand out q, k and v without a gradient
        hugging_face |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    assert deepspeed is None or autocast_dtype is None, "two who decide about one precision"
    return StageArguments(
        output_dir=str(folder),
        deepspeed=deepspeed,
        seed=seed,
        data_seed=seed,
        report_to=report_to or "none",
        max_steps=capped_steps(max_steps, steps_cap),
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,
        save_total_limit=2,
        logging_strategy="steps",
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"dispatch_batches": False, "split_batches": False},
        optim="adamw_torch" if torch.cuda.is_available() else "adamw_torch_fused",
        autocast_dtype=autocast_dtype,
        head_dtype=head_dtype,
        rank_timeout=rank_timeout,
        **hugging_face,
    )


class StageTrainer(Trainer):
    """One training stage.

    Args:
        objective: what the stage minimizes.
        stage: its name in metrics.jsonl and on the progress bar.
        run_dir: where metrics.jsonl and tensorboard/ are.
        stream: a corpus.TokenStream when the data is one: it resumes without replay.
        annealing: the callback that takes a ternary model from full precision to ternary, or None.
        kwargs: of transformers.Trainer.
    """

    def __init__(
        self,
        *,
        objective: Objective,
        stage: str,
        run_dir: Path,
        stream=None,
        annealing: Annealing | None = None,
        **kwargs,
    ):
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run_dir / "tensorboard" / stage)
        super().__init__(**kwargs)
        assert_fp32_masters(self.model)
        self.objective, self.stage, self.stream, self.annealing = objective, stage, stream, annealing
        self.weight_codes = WeightCodes(self.model)
        self._adopted: Adopted | None = None
        if self.args.device.type == "cpu" and self.zero is None:
            for parameter in self.model.parameters():  # out of the mapping of the file that they were read from
                parameter.data = parameter.data.clone()
        self.model_accepts_loss_kwargs = True  # the loss is normalized over the whole step: no division by micro-steps
        if hasattr(self, "loss_is_scaled_for_ga"):
            self.loss_is_scaled_for_ga = True
        self._counts = Counts(0, 0, 0, 0)
        self._rows: list[int] = []
        # Of each loss term, and of all of them together, since the last line was logged.
        self._sums: dict[str, float] = {}
        self._steps_summed, self._tokens_summed, self._since = 0, 0, time.perf_counter()
        # When `fit` began, and how long the earlier ones took that led to the checkpoint it went on from.
        self._started, self._earlier_seconds = time.perf_counter(), 0.0
        self.stop_wanted = False  # some rank was asked to end: after this step, on every rank
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        if annealing is not None:
            self.add_callback(annealing)
        self._finite = FiniteSteps(stage, self._rows_in_words, self._models)
        self.add_callback(self._finite)  # before _Files, which completes a checkpoint
        self.add_callback(_Files(self, run_dir / "metrics.jsonl"))
        if process_group.is_main():
            self.add_callback(ProgressBar(stage))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay on matrices only: never on norms (SubLN included) or biases. ds_shape: ZeRO-3's true shape."""
        return [name for name, p in model.named_parameters() if len(getattr(p, "ds_shape", p.shape)) >= 2]

    def _get_train_sampler(self, train_dataset=None):
        if not isinstance(self.train_dataset, FilledRows):
            return super()._get_train_sampler(train_dataset)
        rows, seed = self.train_dataset.rows, self.args.data_seed if self.args.data_seed is not None else self.args.seed
        grouped = self.args.train_sampling_strategy == "group_by_length"
        lengths = rows["length"][:] if grouped else None
        every_rank = self.args.per_device_train_batch_size * process_group.world_size()
        return RowOrder(len(rows), every_rank, seed, lengths, self.step_rows())

    def get_batch_samples(self, epoch_iterator, num_batches, device=None):
        if self.state.global_step >= self.state.max_steps:  # resumed at the end: the Trainer would take one step more
            self.control.should_training_stop = True
            return [], 0
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        answers = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in batches)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        positions = sum(batch["labels"].numel() for batch in batches)
        self._rows_are = "blocks of the corpus" if batches and "block" in batches[0] else "training rows, from 0,"
        self._rows = [
            i for batch in batches for i in batch.get("block", batch.get("row", torch.empty(0))).tolist() if i != NO_ROW
        ]
        here = torch.tensor([answers, tokens, positions], device=self.args.device)
        step, steps = self.state.global_step, self.state.max_steps
        self._counts = Counts(*process_group.all_reduce_sum(here).tolist(), step=step, progress=step / steps)
        self._steps_summed += 1
        self._tokens_summed += self._counts.tokens
        return batches, self._counts.answer_tokens

    def training_step(self, *args, **kwargs):
        with self.weight_codes.hold(step=self.state.global_step):
            return super().training_step(*args, **kwargs)

    def _clip_grad_norm(self, model):
        """The norm of all gradients, which are clipped. Where PyTorch alone trains on a CPU, the norm is known from when they
        arrived, and its fused AdamW divides by what clipping would multiply with: two passes over all gradients less."""
        optimizer = getattr(self.optimizer, "optimizer", None)
        if self.zero is not None or self.args.device.type != "cpu" or not optimizer.defaults.get("fused"):
            return super()._clip_grad_norm(model)
        norm = self._finite.gradient_norm()
        excess = None if norm is None else (norm + 1e-6) / self.args.max_grad_norm
        optimizer.grad_scale = excess if excess is not None and excess > 1 else None
        return super()._clip_grad_norm(model) if norm is None else norm

    def compute_loss_context_manager(self):
        dtype, head_dtype = self.args.autocast_dtype, self.args.head_dtype
        contexts = contextlib.ExitStack()
        if dtype is not None:
            contexts.enter_context(torch.autocast(self.args.device.type, getattr(torch, dtype)))
        if head_dtype is not None:
            contexts.enter_context(head_products(getattr(torch, head_dtype)))
        return contexts

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert not return_outputs
        total = 0.0
        for name, (weight, loss) in self.objective(model, inputs, self._counts).items():
            value = loss.item()
            self._finite.see_loss(name, value, inputs)
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._sums[TOTAL] = self._sums.get(TOTAL, 0.0) + float(weight) * value
            total = total + weight * loss
        return total * process_group.world_size()

    def _models(self) -> dict[str, nn.Module]:
        """The models that the losses are computed from, by what a message calls them."""
        teacher = getattr(getattr(self.objective, "teacher", None), "module", None)
        return {"model": self.model} if teacher is None else {"student": self.model, "teacher": teacher}

    def _rows_in_words(self) -> str:
        """The rows of the current optimizer step on this rank, or its blocks of the corpus."""
        shown = ", ".join(map(str, self._rows[:64])) + (", ..." if len(self._rows) > 64 else "")
        return f"{self._rows_are} {shown}" if self._rows else "rows without numbers"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._steps_summed:
            seconds = time.perf_counter() - self._since
            sums = self._sums_of_all_ranks()
            # The Trainer's own mean forgets the steps before a checkpoint that a run went on from.
            logs["loss"] = sums.pop(TOTAL) / self._steps_summed
            logs |= {f"loss_{name}": value / self._steps_summed for name, value in sums.items()}
            logs |= self.objective.logged()
            if self.annealing is not None:
                logs["annealing"] = self.annealing.value
            logs["tokens_per_second"] = self._tokens_summed / seconds
            self._sums, self._steps_summed, self._tokens_summed = {}, 0, 0
            self._since = time.perf_counter()
        super().log(logs, start_time)

    def _sums_of_all_ranks(self) -> dict[str, float]:
        names = sorted(self._sums)
        here = torch.tensor([self._sums[name] for name in names], dtype=torch.float64, device=self.args.device)
        return dict(zip(names, process_group.all_reduce_sum(here).tolist(), strict=True))

    def extra_state(self) -> dict[str, Any]:
        """What a resumed run needs besides the Trainer's own state, for JSON. Every rank calls it; rank 0's counts."""
        since = {"sums": self._sums_of_all_ranks(), "steps": self._steps_summed, "tokens": self._tokens_summed}
        state = {"objective": self.objective.state_dict(), "since_last_line": since, STEP_ROWS: self.step_rows()}
        state["seconds"] = self._seconds()
        if self.stream is not None:
            state["stream"] = self.stream.state_for(self.state.global_step * self.step_rows())
        return state

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        self.objective.load_state_dict(state["objective"])
        self._earlier_seconds = state.get("seconds", 0.0)
        since, share = state["since_last_line"], float(process_group.is_main())  # the sum over the ranks is what it was
        self._sums = {name: share * value for name, value in since["sums"].items()}
        self._steps_summed, self._tokens_summed = since["steps"], since["tokens"]
        if self.stream is not None:
            self.stream.load_state(state["stream"])
            self.args.ignore_data_skip = True

    def _seconds(self) -> float:
        return self._earlier_seconds + time.perf_counter() - self._started

    def fit(self, resume: bool) -> dict[str, Any]:
        """Trains, from the last complete checkpoint when `resume` is set and there is one. A checkpoint is saved when the
        run is asked to end (distributed/termination.py).

        Returns: facts for done.json: seconds (with those of earlier attempts, up to the checkpoint), steps, step_rows, engine,
            resumed_from.
        """
        folder = Path(self.args.output_dir)
        checkpoint = latest_checkpoint(folder) if resume else None
        if checkpoint is not None:
            self._load_extra_state(json.loads((checkpoint / EXTRA_STATE).read_text(encoding="utf-8")))
            self._adopted = adopt(checkpoint, zero=self.zero, micro_batch=self.args.per_device_train_batch_size)
            how = f", {self._adopted}; {self.step_rows()} rows per step as before" if self._adopted else ""
            process_group.say(f"{self.stage}: continues at {checkpoint.name}{how}")
        elif resume:
            process_group.say(f"{self.stage}: no complete checkpoint to continue from, starts at step 0")
        if self.args.device.type == "cpu":
            process_group.fit_threads(max(model.config.hidden_size for model in self._models().values()))
        self._started = time.perf_counter()
        with termination.deferred(), self._watched(), self._fused():
            start = self._adopted.folder if self._adopted else checkpoint
            self.train(resume_from_checkpoint=str(start) if start else None)
        if self.stop_wanted and self.state.global_step < self.state.max_steps:
            raise termination.Stopped(f"; {self.stage}: checkpoint-{self.state.global_step} is saved")
        return {
            "seconds": round(self._seconds(), 2),
            "steps": self.state.global_step,
            STEP_ROWS: self.step_rows(),
            "engine": "deepspeed" if self.is_deepspeed_enabled else "torch",
            "resumed_from": checkpoint.name if checkpoint else None,
        }

    @property
    def zero(self) -> int | None:
        """The ZeRO stage; None where PyTorch trains alone."""
        return self.args.deepspeed["zero_optimization"]["stage"] if self.args.deepspeed else None

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self._adopted is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """The Trainer's; a checkpoint that neither it nor DeepSpeed can read is put in its place afterwards."""
        own = None if self._adopted else resume_from_checkpoint
        prepared = super()._prepare_for_training(max_steps, train_dataloader, own)
        if self._adopted:
            decayed = self.get_decay_parameter_names(self.model)
            trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
            order = [*(n for n in trained if n in decayed), *(n for n in trained if n not in decayed)]
            inner = self.optimizer.optimizer if self.zero is None else self.deepspeed.optimizer
            restore(self._adopted.state(order), order, self.model, inner, self.zero)
            self._adopted.load_schedule(self.lr_scheduler)
            if self.zero is not None:
                self.deepspeed.global_steps = self._adopted.step
        return prepared

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Inside, a rank that stands still ends the run."""
        if process_group.world_size() == 1 or self.args.rank_timeout is None:
            yield
            return
        watch = stall.watch(self.args.rank_timeout, termination.give_up)
        self._finite.beat = watch.beat
        try:
            yield
        finally:
            watch.stop()

    @contextlib.contextmanager
    def _fused(self) -> Iterator[None]:
        """Inside, what stands between the model's products on a CPU runs by the compiled kernels."""
        try:
            if self.args.device.type == "cpu":
                fuse_norms(self.model)
                fuse_rotary(self.model)
                fuse_attention()
                if self.zero is None:
                    fuse_lookup(self.model)
            yield
        finally:
            unfuse_norms(self.model)
            unfuse_rotary(self.model)
            unfuse_attention()
            unfuse_lookup(self.model)
            self.objective.close()

    def step_rows(self) -> int:
        """Rows that one optimizer step consumes over all ranks."""
        per_rank = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return per_rank * process_group.world_size()


class _Files(TrainerCallback):
    """Settles the objective once a step; metrics.jsonl; what our own objects need beside each checkpoint."""

    def __init__(self, trainer: StageTrainer, path: Path):
        self.trainer, self.path = trainer, path

    def on_train_begin(self, args, state, control, **kwargs):
        if process_group.is_main():  # lines of an earlier attempt beyond the point we start from would be drawn twice
            for name in ("metrics.jsonl", "health.jsonl", "warnings.jsonl"):
                drop_lines(self.path.with_name(name), self.trainer.stage, after_step=state.global_step)
        self.trainer._since = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.objective.finish_step()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if process_group.is_main() and logs and "loss" in logs:
            line = {"stage": self.trainer.stage, "step": state.global_step, "time": time.time(), **logs}
            if self.trainer.stream is not None:
                line.pop("epoch", None)  # of a stream the Trainer knows nothing; done.json has corpus_epochs
            append_line(self.path, json.dumps(line))

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.stop_wanted = process_group.all_reduce_sum(float(termination.requested())) > 0
        if self.trainer.stop_wanted:
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        extra = self.trainer.extra_state()
        if process_group.is_main():
            (folder / EXTRA_STATE).write_text(json.dumps(extra), encoding="utf-8")
        mark_complete(folder)


def drop_lines(path: Path, stage: str, after_step: int) -> None:
    """Removes a stage's lines beyond a step from a .jsonl file, atomically; other stages' lines stay."""
    if not path.is_file():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the half-written last line of a killed run
        if line["stage"] != stage or line["step"] <= after_step:
            kept.append(text)
    write_whole(path, "".join(f"{text}\n" for text in kept))


def collate_blocks(features: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
    """Equal-length blocks of a corpus to input_ids, labels and an all-ones attention_mask, each int64 (B, T).

    Blocks that know their number (corpus.TokenStream's) bring it along: block, int64 (B,). So do those that know their documents
    (token_shards.ShardedStream's): position_ids, int64 (B, T).
    """
    features = list(features)
    ids = torch.stack([torch.as_tensor(feature["input_ids"]) for feature in features])
    labels = torch.stack([torch.as_tensor(feature.get("labels", feature["input_ids"])) for feature in features])
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    if "position_ids" in features[0]:
        batch["position_ids"] = torch.stack([feature["position_ids"] for feature in features])
    if "block" in features[0]:
        batch["block"] = torch.tensor([feature["block"] for feature in features])
    return batch


def release(trainer: StageTrainer) -> None:
    """Frees what a finished Trainer keeps alive, so that the next stage of the process starts clean.

    Accelerate holds the first DeepSpeed configuration of a process in a singleton, and transformers would partition the
    next model while loading it as long as the last ZeRO-3 configuration is known.
    """
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    engine = trainer.model_wrapped
    if hasattr(engine, "destroy"):
        engine.destroy()
    trainer.weight_codes = None
    trainer.model = trainer.model_wrapped = trainer.deepspeed = trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    AcceleratorState._reset_state()
    unset_hf_deepspeed_config()
