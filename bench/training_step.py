"""Steps of a training stage as the main job takes them, in a process of its own: what bench/cpu_training.py starts.

    python bench/training_step.py '{"model": "DIR", "stage": "pretrain", "folder": "/tmp/x", ...}'

It runs pretrain() or fine_tune() themselves, with the arguments that train.py gives them, and prints JSON: the seconds of
each step (from the end of one to the end of the next, so that everything between them counts; of the clock, and of the
processor over all threads), the loss of each, the most resident memory of a step, and with "profile" the seconds of each
part. It also runs on older commits, whose package then comes first on PYTHONPATH.
"""

import importlib

try:  # isort: skip -- an older commit has no openmp.py
    from bitdistill.distributed.process_group import initialize, is_main
except ImportError:  # an older commit's names
    _launch = importlib.import_module("bitdistill.distributed.launch")
    initialize, is_main = _launch.initialise, _launch.is_main

import functools
import inspect
import itertools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
BLOCKS, BLOCK_SIZE = 8, 128  # of a step of stage 2
ROWS, SHORTEST, LONGEST, ANSWERS = 32, 8, 22, (100, 200)  # of a step of fine-tuning: 480 tokens, the last one an answer


@dataclass(frozen=True)
class Spec:
    """One kind of step.

    Args:
        model: a Hugging Face folder with a tokenizer. folder: for what the run writes.
        stage: "pretrain", or "distill" with both terms of distillation and the model itself as its teacher.
        ternary: the refined model, or the full-precision one as it is.
        backward: of the ternary layers, "exact" or "fast". kernels: "auto" or "reference".
        engine: "torch", or "deepspeed" at a ZeRO stage, on the ranks that this is started on.
        zero: the ZeRO stage. precision: "fp32" or "bf16" of all products.
        head: of the LM head's, or "auto", the faster one; a teacher's products are as the head's.
        steps: timed ones, after one that is not. blocks: of a step of stage 2. corpus: text for stage 2.
        states: whether stage 2 has the teacher's logits and hidden states, and teacher forcing, as in the recipe laptop.
        grouped: whether a fine-tuning step takes rows of like length, as every recipe does; an older commit cannot.
        profile: seconds of each part as well, by the clock "perf_counter" or "process_time".
    """

    model: str
    folder: str
    stage: str = "pretrain"
    ternary: bool = True
    backward: str = "fast"
    kernels: str = "auto"
    engine: str = "torch"
    zero: int = 1
    precision: str = "fp32"
    head: str | None = None
    steps: int = 3
    blocks: int = BLOCKS
    states: bool = False
    corpus: str | None = None
    grouped: bool = False
    profile: bool = False
    clock: str = "perf_counter"


class Parts:
    """Seconds of each part of a step, the parts inside it taken out.

    Args:
        clock: time.perf_counter, or time.process_time.
    """

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[float] = []

    def of(self, name: str, function: Callable) -> Callable:
        """`function`, whose time counts as that of the part `name`."""

        @functools.wraps(function)
        def timed(*args, **kwargs):
            started = self.clock()
            self._open.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                spent = self.clock() - started
                inside = self._open.pop()
                self.seconds[name] += spent - inside
                if self._open:
                    self._open[-1] += spent

        return timed

    def watch(self, where: Any, attribute: str, name: str) -> None:
        """Puts the timed function in the place of the one that is there, if there is one."""
        if hasattr(where, attribute):
            setattr(where, attribute, self.of(name, getattr(where, attribute)))


def watched_parts(clock: Callable[[], float]) -> Parts:
    """The parts of a step as they are called in every version of the project, timed by a clock."""
    import accelerate
    import transformers

    from bitdistill.distributed.teacher import Teacher
    from bitdistill.student.layers import BitLinear
    from bitdistill.student.sharing import WeightCodes
    from bitdistill.training import distill, pretrain
    from bitdistill.training.trainer import StageTrainer

    parts = Parts(clock)
    parts.watch(BitLinear, "forward", "ternary layers, forward")
    parts.watch(pretrain, "head_cross_entropy", "LM head and loss, with its gradients")
    parts.watch(distill, "head_distillation", "LM head and loss, with its gradients")
    parts.watch(distill.Distillation, "_relations", "relation loss, forward")
    parts.watch(Teacher, "__call__", "teacher")
    parts.watch(WeightCodes, "_quantize", "ternary codes of the weights")
    parts.watch(StageTrainer, "compute_loss", "attention, norms, the rest of forward")
    parts.watch(accelerate.Accelerator, "backward", "backward")
    parts.watch(transformers.Trainer, "_clip_grad_norm", "gradient clipping")
    parts.watch(torch.optim.AdamW, "step", "AdamW")
    return parts


def head_of(spec: Spec) -> str | None:
    """The precision of the LM head's products; older commits leave it to `precision`."""
    if spec.head != "auto":
        return spec.head
    from bitdistill.kernels.cpu.bf16 import has_bf16_products

    return "bf16" if has_bf16_products() else None


def arguments_of(spec: Spec):
    """The stage's arguments as train.py makes them; an older commit knows neither autocast_dtype nor head_dtype."""
    from bitdistill.distributed import presets
    from bitdistill.training.trainer import training_arguments

    names = {"bf16": "bfloat16", "fp32": None, None: None}
    numerics: dict[str, Any] = {"deepspeed": None}
    if spec.engine == "deepspeed":
        numerics["deepspeed"] = presets.deepspeed_config(spec.zero, precision=spec.precision, device="cpu")
    elif names[spec.precision] is not None:
        numerics["autocast_dtype"] = names[spec.precision]
    if names[head_of(spec)] is not None:
        numerics["head_dtype"] = names[head_of(spec)]
    if spec.grouped:
        numerics["train_sampling_strategy"] = "group_by_length"
    return training_arguments(
        Path(spec.folder) / "checkpoints",
        seed=0,
        report_to=[],
        max_steps=spec.steps + 1,
        per_device_train_batch_size=spec.blocks if spec.stage == "pretrain" else ROWS,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=1,
        **numerics,
    )


def task_rows(count: int):
    """Rows of a classification task: random words, lengths as those of SST-2, a label of one word at the end. The first ROWS of
    them are as long as any: grouped by length, rows of this length are the first step, which is not timed, and the lengths of
    all steps after it are random ones."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=generator)
    lengths[:ROWS] = LONGEST
    rows = []
    for length in lengths.tolist():
        ids = torch.randint(1000, 10_000, (length,), generator=generator).tolist()
        ids.append(ANSWERS[int(torch.randint(2, (1,), generator=generator))])
        rows.append({"input_ids": ids, "labels": [-100] * length + ids[-1:], "length": length + 1})
    return Dataset.from_list(rows)


def prepared(spec: Spec) -> Callable[[], object]:
    """Loads and refines the model; what is returned trains it."""
    from bitdistill.data.corpus import TokenStream
    from bitdistill.distributed.teacher import load_teacher
    from bitdistill.student import backend
    from bitdistill.student.layers import use_backward
    from bitdistill.student.loading import load_language_model, load_tokenizer
    from bitdistill.student.refine import refine
    from bitdistill.training.distill import Distillation, fine_tune
    from bitdistill.training.pretrain import pretrain

    alone = {"alone": True} if "alone" in inspect.signature(initialize).parameters else {}
    initialize("cpu", **(alone if spec.engine == "torch" else {}))
    if hasattr(backend, "choose_kernels"):
        backend.choose_kernels(spec.kernels)
    model, tokenizer = load_language_model(spec.model), load_tokenizer(spec.model)
    if spec.ternary:
        refine(model, norms="two")
        use_backward(model, spec.backward)
    shared = {"arguments": arguments_of(spec), "stage": spec.stage, "run_dir": Path(spec.folder), "resume": False}
    if spec.stage == "pretrain" and not spec.states:
        stream = TokenStream(spec.corpus, tokenizer, BLOCK_SIZE)
        return functools.partial(pretrain, model, stream, **shared)
    dtype = (
        torch.bfloat16 if head_of(spec) == "bf16" and "products" in inspect.signature(load_teacher).parameters else None
    )
    teacher = load_teacher(spec.model, dtype=torch.float32, device="cpu", **({"products": dtype} if dtype else {}))
    if spec.stage == "pretrain":
        from bitdistill.training.pretrain import NextTokenAndStates  # an older commit has none

        objective = NextTokenAndStates(
            model, teacher, lambda_logits=1.0, temperature=1.0, lambda_hidden=100.0, teacher_forcing=1.0
        )
        stream = TokenStream(spec.corpus, tokenizer, BLOCK_SIZE)
        return functools.partial(pretrain, model, stream, objective=objective, **shared)
    objective = Distillation(
        model, teacher, lambda_logits=10.0, kd_temperature=5.0, kd_tau_squared=False, kd_tokens="response",
        relation="eq12", relation_layers=[-1], teacher_relation_layers=None, split_heads=None, relation_temperature=1.0,
        relation_causal=False, gamma_attention="balanced", gamma_rho=1.0, gamma_every=10,
    )  # fmt: skip
    rows = task_rows(ROWS * (spec.steps + 1))
    return functools.partial(fine_tune, model, rows, objective=objective, pad_token_id=tokenizer.pad_token_id, **shared)


def resident_bytes(name: str) -> int:
    """VmHWM, the most since it was reset, or VmRSS."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def run(spec: Spec) -> dict[str, Any]:
    """Trains, and reads metrics.jsonl."""
    import transformers

    train = prepared(spec)
    parts = watched_parts(getattr(time, spec.clock)) if spec.profile else None
    before: dict[str, float] = {}

    ends: list[tuple[float, float]] = []

    class Watch(transformers.TrainerCallback):
        """The clocks after each step; after the first the caches are warm: peak memory and parts are counted from there."""

        def on_step_end(self, args, state, control, **kwargs):
            ends.append((time.perf_counter(), time.process_time()))
            if state.global_step == 1:
                Path("/proc/self/clear_refs").write_text("5")
                before.update(parts.seconds if parts else {})

    transformers.trainer.DEFAULT_CALLBACKS.append(Watch)
    train()
    lines = [json.loads(line) for line in (Path(spec.folder) / "metrics.jsonl").read_text().splitlines()]
    wall, cpu = zip(*ends, strict=True)
    found = {
        "seconds": [after - earlier for earlier, after in itertools.pairwise(wall)],
        "cpu_seconds": [after - earlier for earlier, after in itertools.pairwise(cpu)],
        "losses": [line["loss_ce"] for line in lines],
        "peak_bytes": resident_bytes("VmHWM"),
    }
    if parts:
        spent = {name: (seconds - before.get(name, 0.0)) / spec.steps for name, seconds in parts.seconds.items()}
        whole = found["cpu_seconds" if spec.clock == "process_time" else "seconds"]
        spent["Trainer, engine, data"] = sum(whole) / spec.steps - sum(spent.values())
        found["parts"] = spent
    return found


if __name__ == "__main__":
    found = run(Spec(**json.loads(sys.argv[1])))
    if is_main():
        print(json.dumps(found))
