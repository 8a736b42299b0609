"""Stage 3 with a teacher that runs beside the student, and with the teacher's outputs on disk: memory, seconds of a step, losses.

    python bench/real_model.py DIR
    python bench/cached_teacher.py --teacher DIR --layers 10 [--rows 64 --steps 3]

The student is the teacher's first layers, ternary: a smaller model of the same tokenizer. Rows are as long as those of SST-2
(training_step.py), 16 in a step. Each way runs in a process of its own; the step's seconds are the shortest after the first.
"""

from bitdistill.distributed import openmp

openmp.wait_briefly()  # before anything loads torch

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import table

BATCH, PAD = 16, 0


def student_of(folder: str, layers: int):
    """The first layers of a model, ternary."""
    from torch import nn

    from bitdistill.student.loading import load_language_model
    from bitdistill.student.refine import refine

    model = load_language_model(folder)
    decoder = model.get_decoder()
    decoder.layers = nn.ModuleList(list(decoder.layers)[:layers])
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:layers]
    refine(model, norms="two")
    return model


def one_way(way: str, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Writes the cache, or trains: live or cached."""
    import torch
    from transformers import AutoConfig, TrainerCallback, trainer

    from bitdistill.distributed import process_group
    from bitdistill.distributed.teacher import load_teacher
    from bitdistill.training.distill import Distillation, fine_tune
    from bitdistill.training.row_cache import CachedTeacher, finish_rows, write_rows
    from bitdistill.training.row_layout import TeacherNeeds, row_layout
    from bitdistill.training.trainer import training_arguments
    from training_step import resident_bytes, task_rows

    process_group.initialize("cpu", alone=True)
    rows = task_rows(given.rows)
    kept = {"lambda_logits": 10.0, "kd_tokens": "response", "kd_temperature": 5.0, "top_k": None, "relation": "eq12"}
    layout = row_layout(
        AutoConfig.from_pretrained(given.teacher), rows, TeacherNeeds(**kept, layers=[-1], split_heads=None)
    )
    load = lambda: load_teacher(given.teacher, dtype=torch.float32, device="cpu")  # noqa: E731
    started = time.perf_counter()
    if way == "write":
        for name in ("shards", "cache"):
            (folder / name).mkdir()
        write_rows(folder / "shards", load(), rows, layout, batch_size=BATCH, pad_token_id=PAD)
        finish_rows(folder / "shards", folder / "cache", layout)
        written = sum(path.stat().st_size for path in (folder / "cache").glob("shard-*"))
        seconds = time.perf_counter() - started
        return {"layout": str(layout), "bytes": written, "seconds": seconds}
    model = student_of(given.teacher, given.layers)
    read = lambda: CachedTeacher(folder / "cache", layout, dtype=torch.float32, device="cpu")  # noqa: E731
    teacher = {"live": load, "cached": read}[way]()
    ends = []

    class Watch(TrainerCallback):
        """The clock after each step; peak memory is counted from the end of the first, when nothing is loaded any more."""

        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())
            if len(ends) == 1:
                Path("/proc/self/clear_refs").write_text("5")

    trainer.DEFAULT_CALLBACKS.append(Watch)
    arguments = training_arguments(
        folder / way, deepspeed=None, seed=0, report_to=[], max_steps=given.steps + 1, per_device_train_batch_size=BATCH,
        learning_rate=1e-4, lr_scheduler_type="constant", logging_steps=1,
    )  # fmt: skip
    objective = Distillation(model, teacher, relation_layers=[-1], gamma_attention=1.0)
    how = {"stage": "distill", "run_dir": folder / way, "resume": False, "pad_token_id": PAD}
    (folder / way).mkdir()
    fine_tune(model, rows, arguments, objective=objective, **how)
    lines = [json.loads(line) for line in (folder / way / "metrics.jsonl").read_text().splitlines()]
    steps = [after - before for before, after in itertools.pairwise(ends)]
    first = {name: lines[0][f"loss_{name}"] for name in ("ce", "logits", "attention")}
    return {"seconds": min(steps), "peak": resident_bytes("VmHWM"), "losses": first}


def main() -> None:
    """Runs each way and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True)
    for name, value in (("layers", 10), ("rows", 64), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--way", choices=("write", "live", "cached"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(one_way(given.way, given, Path(given.folder))))
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in ("write", "live", "cached"):
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way, "--folder", folder]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{way} failed:\n{done.stderr[-4000:]}")
            found[way] = json.loads(done.stdout.splitlines()[-1])
    wrote = found.pop("write")
    print(
        f"cache: {wrote['layout']}; {wrote['bytes'] / given.rows:,.0f} bytes per row written in {wrote['seconds']:.1f} s"
    )
    cells = [["teacher", "s per step", "peak MB", "CE", "logits KL", "relation KL"]]
    for way, one in found.items():
        cells.append(
            [way, f"{one['seconds']:.2f}", f"{one['peak'] / 1e6:,.0f}", *(f"{x:.6g}" for x in one["losses"].values())]
        )
    print(table(cells, "<>>>>>"))


if __name__ == "__main__":
    main()
