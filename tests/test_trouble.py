"""Trouble in the middle of a run: two ranks end together, with one message, and nothing is lost; a signal ends a process in
good order, wherever it is."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset

import ranks
from bitdistill.distributed import process_group
from bitdistill.training.distill import fine_tune
from bitdistill.training.trainer import training_arguments

TWO_RANKS = """
import gc, json, sys, time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from safetensors.torch import load_file
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import ranks
from bitdistill.distributed import presets, process_group, termination
from bitdistill.distributed.checkpoint import full_state_dict, latest_checkpoint
from bitdistill.errors import UserError
from bitdistill.training.distill import fine_tune
from bitdistill.training.trainer import release, training_arguments

process_group.initialize("cpu")
termination.PATIENCE_SECONDS = 600
termination.listen()
tokens = [row["input_ids"].tolist() for row in ranks.tiny_data()]
rows = Dataset.from_dict({"input_ids": tokens, "labels": tokens})


def train(name, zero, at_third_step=None, resume=False):
    model, passes = ranks.tiny_model(), []

    def third(_module, _inputs, output):
        passes.append(1)
        return at_third_step(output) if at_third_step and len(passes) >= 3 else None

    model.model.layers[1].mlp.down_proj.register_forward_hook(third)
    arguments = training_arguments(
        Path(name), deepspeed=presets.deepspeed_config(zero, precision="fp32", device="cpu"), seed=0, report_to=[],
        max_steps=6, save_steps=2, logging_steps=1, per_device_train_batch_size=2, learning_rate=1e-2,
    )
    trainer, facts = fine_tune(
        model, rows, arguments, pad_token_id=0, stage="teacher", run_dir=Path(name), resume=resume
    )
    state = full_state_dict(trainer.model_wrapped)
    release(trainer)
    return state, facts


def forget():
    AcceleratorState._reset_state()
    unset_hf_deepspeed_config()
    gc.collect()


def infinite(output):
    return output * torch.inf if process_group.rank() == 1 else None


def infinite_gradient(output):
    if process_group.rank() == 1 and output.requires_grad:
        output.register_hook(lambda gradient: gradient * torch.inf)


def until_signal(_output):
    Path(f"ready-{process_group.rank()}").touch()
    while not termination.requested():
        time.sleep(0.01)


found = {}
for what, zero in ((infinite, 1), (infinite_gradient, 2), (infinite_gradient, 3), (infinite, 3)):
    name = f"{what.__name__} {zero}"
    try:
        train(name, zero, what)
    except UserError as error:
        said = process_group.gather(str(error))
    forget()
    kept = latest_checkpoint(name)
    good = all(value.isfinite().all() for value in load_file(kept / "model.safetensors").values())
    found[name] = {"said": said, "kept": kept.name, "good": good}

whole, _ = train("whole", 2)
try:
    train("cut", 2, until_signal)
except termination.Stopped as stopped:
    found["status"] = process_group.gather(stopped.code)
termination._State.signal = 0
forget()
resumed, facts = train("cut", 2, resume=True)
if process_group.is_main():
    found["equal"] = all(torch.equal(whole[name], resumed[name]) for name in whole)
    found["resumed_from"] = facts["resumed_from"]
    Path(sys.argv[-1]).write_text(json.dumps(found))
process_group.barrier()
sys.exit(found["status"][process_group.rank()])
"""


@pytest.mark.slow
def test_two_ranks_stop_together_and_lose_nothing(tmp_path):
    """Infinity on rank 1 at step 3, in a loss or a gradient, under ZeRO 1 to 3; then SIGTERM to the command that started
    the ranks."""

    def end_when_both_are_ready(process):
        while process.poll() is None and len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)

    launcher = ("-m", "bitdistill.distributed.start")
    outcome = ranks.run(tmp_path, TWO_RANKS, check=False, launcher=launcher, meanwhile=end_when_both_are_ready)
    found = outcome.found
    assert found is not None, [line for line in outcome.stderr.splitlines() if "%|" not in line][-60:]
    layer = "model.layers.1.mlp.down_proj"
    for name in ("infinite 1", "infinite_gradient 2", "infinite_gradient 3", "infinite 3"):
        first, second = found[name]["said"]
        assert first == second
        assert "in stage teacher at step 3 (training rows, from 0, " in first
        assert first.partition(". ")[0].endswith("on rank 1") or ", on rank 1" in first
        if "gradient" in name:
            assert first.startswith("metrics.jsonl: grad_norm")
            assert f"nearest to the loss {layer}.weight" in first
        else:
            assert first.startswith("metrics.jsonl: loss")
            assert "nan in loss_ce" in first
            assert f"from output of {layer} in float32 of the model" in first
        assert found[name]["kept"] == "checkpoint-2"
        assert found[name]["good"]
    assert found["status"] == [143, 143]
    assert found["resumed_from"] == "checkpoint-3"
    assert found["equal"]
    assert outcome.code == 143, outcome.stderr[-6000:]
    assert "stopped by SIGTERM; teacher: checkpoint-3 is saved." in outcome.stderr


def test_a_stage_that_was_killed_after_its_last_step_is_not_trained_further(tmp_path):
    """Its last checkpoint is there, its result is not: the next attempt takes the weights as they are."""
    process_group.initialize("cpu", alone=True)
    tokens = [row["input_ids"].tolist() for row in ranks.tiny_data()]
    rows = Dataset.from_dict({"input_ids": tokens, "labels": tokens})

    def attempt(resume):
        arguments = training_arguments(
            tmp_path / "checkpoints", deepspeed=None, seed=0, report_to=[], max_steps=4, save_steps=2, logging_steps=1,
            per_device_train_batch_size=2, learning_rate=1e-2, lr_scheduler_type="constant",
        )  # fmt: skip
        model, where = ranks.tiny_model(), {"stage": "teacher", "run_dir": tmp_path}
        _, facts = fine_tune(model, rows, arguments, pad_token_id=0, resume=resume, **where)
        return model.state_dict(), facts, (tmp_path / "metrics.jsonl").read_text()

    first, facts, lines = attempt(resume=False)
    assert (tmp_path / "checkpoints" / "checkpoint-4" / "complete.json").exists()
    second, facts_again, lines_again = attempt(resume=True)
    assert facts_again["resumed_from"] == "checkpoint-4"
    assert facts_again["steps"] == facts["steps"] == 4
    state = json.loads(
        (tmp_path / "checkpoints" / "checkpoint-4" / "bitdistill_state.json").read_text(encoding="utf-8")
    )
    assert 0 < state["seconds"] <= facts["seconds"] + 0.01
    assert facts_again["seconds"] >= state["seconds"] - 0.01  # the time of the first attempt counts, too
    assert lines_again == lines
    assert all(torch.equal(first[name], second[name]) for name in first)


STAGE = """
import contextlib, sys, time
from bitdistill import console
from bitdistill.distributed import termination
from bitdistill.stages import RunDirectory

def body():
    termination.listen()
    with RunDirectory("run", {"evaluate": ()}, ["evaluate"]).result("evaluate", {}, {}) as folder:
        (folder / "half").touch()
        with termination.deferred() if "--deferred" in sys.argv else contextlib.nullcontext():
            print("ready", flush=True)
            while not termination.requested():
                time.sleep(0.01)
            print("requested", flush=True)
            time.sleep(60)

sys.exit(console.run(body))
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stage_that_does_not_train_ends_at_once_and_leaves_nothing(tmp_path, number, status):
    process = started(tmp_path)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == status
    name = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[number]
    assert said == f"bitdistill: stopped by {name}. The same command continues.\n"
    assert list((tmp_path / "run").iterdir()) == []


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    process = started(tmp_path, "--deferred")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "requested\n"
    process.send_signal(signal.SIGTERM)  # a launcher's, after its own Ctrl-C: it changes nothing
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.startswith("bitdistill: interrupted twice: ended at once")


def started(folder: Path, *options: str) -> subprocess.Popen:
    """A process that is in the middle of a stage."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", STAGE, *options], cwd=folder, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process
