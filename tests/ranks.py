"""Runs a small script on some ranks on the CPU (gloo) and brings back what it found; and the tiny model and Trainer that such
scripts share.

The ranks are forked with the libraries loaded (forked.py), or started by a launcher the way a user would. The launcher gets
a process group of its own, which is killed afterwards whatever happened: SIGTERM to `deepspeed` alone orphans its ranks. Each
run has a free port, so that runs may overlap.

The script's last argument is the path to which rank 0 writes its findings as JSON.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import forked
from bitdistill.distributed.process_group import free_port

DEEPSPEED = (str(Path(sys.executable).with_name("deepspeed")),)


@dataclass
class Outcome:
    """What a run wrote. `found` is the JSON that rank 0 wrote, None if it wrote none."""

    code: int
    found: dict | None
    stdout: str
    stderr: str
    seconds: float


def run(
    folder: Path,
    script: str,
    *arguments: str,
    ranks: int | None = 2,
    limit_seconds: float = 200,
    env: dict[str, str] | None = None,
    threads: int | None = 1,
    check: bool = True,
    launcher: Sequence[str] | None = None,
    fresh: bool = False,
    meanwhile: Callable[[subprocess.Popen], None] = lambda process: None,
) -> Outcome:
    """Runs `script` (source text) on `ranks` ranks; None means one process without a launcher's variables.

    Args:
        folder: an empty folder, the working directory; the script is written to it.
        arguments: given to the script, before the path for its findings.
        limit_seconds: then the whole group is killed and the test fails.
        env: additions to the environment.
        threads: of each rank; None leaves them to the script. Fixed because the machine may be shared, and because
            sums must not depend on how many cores it has.
        check: fail unless the exit code is 0.
        launcher: the command that starts the ranks; by default they are forked with the libraries loaded.
        fresh: start plain `python` where there is no launcher, for a test of what is imported or read at the start.
        meanwhile: called with the started process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source, findings = folder / "script.py", folder / "found.json"
    source.write_text(script)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    environment |= {"PYTHONPATH": str(Path(__file__).parent)} | (env or {})  # so that scripts can import this module
    started = time.monotonic()
    command = [str(source), *arguments, str(findings)]
    if launcher is None and not fresh:
        done = forked.run(command, folder, ranks, environment, limit_seconds)
        code, stdout, stderr = done.code, done.stdout, done.stderr
    else:
        if ranks is not None:
            command = [*(launcher or DEEPSPEED), "--num_gpus", str(ranks), "--master_port", str(free_port()), *command]
        code, stdout, stderr = _started([sys.executable, *command], folder, environment, limit_seconds, meanwhile)
    outcome = Outcome(
        code=code,
        found=json.loads(findings.read_text()) if findings.exists() else None,
        stdout=stdout,
        stderr=stderr,
        seconds=time.monotonic() - started,
    )
    assert not check or outcome.code == 0, f"exit code {outcome.code}\n{stdout[-4000:]}\n{stderr[-8000:]}"
    return outcome


def _started(command, folder, environment, limit_seconds, meanwhile) -> tuple[int, str, str]:
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        meanwhile(process)
        stdout, stderr = process.communicate(timeout=limit_seconds)
    finally:
        kill_group(process)
    return process.returncode, stdout, stderr


def kill_group(process: subprocess.Popen) -> None:
    """Ends the process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all gone already
    process.wait()


STEPS, GLOBAL_BATCH = 4, 4


def tiny_model(seed: int = 0):
    """A Qwen3 of 2 layers with tied embeddings; all ranks and processes make the same one."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=64, tie_word_embeddings=True, **sizes, **heads))


def tiny_data():
    """32 rows of 12 tokens, read in this order."""
    import torch

    tokens_BT = torch.randint(0, 64, (32, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens_BT]


def tiny_arguments(folder: Path, config: dict, **changes):
    """StageArguments for STEPS steps of GLOBAL_BATCH rows, however many ranks share them."""
    from bitdistill.distributed import process_group
    from bitdistill.training.trainer import StageArguments

    settings = {
        "output_dir": str(folder),
        "deepspeed": config,
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": GLOBAL_BATCH // process_group.world_size(),
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return StageArguments(**settings | changes)


def tiny_trainer(arguments, callbacks=()):
    """A Trainer over tiny_model and tiny_data that does not shuffle."""
    import torch
    from transformers import Trainer

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return InOrder(model=tiny_model(), args=arguments, train_dataset=tiny_data(), callbacks=list(callbacks))


def losses(trainer) -> list[float]:
    """The logged loss of every step."""
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def plain_training():
    """What all of it must equal: one process, torch alone, no Trainer. Returns (loss of each step, state dict)."""
    import torch

    model, data, history = tiny_model(), tiny_data(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)  # the Trainer's defaults
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / STEPS)
        rows = data[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]
        tokens_BT = torch.stack([row["input_ids"] for row in rows])
        logits_BTV = model(input_ids=tokens_BT).logits
        loss = torch.nn.functional.cross_entropy(logits_BTV[:, :-1].reshape(-1, 64), tokens_BT[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return history, model.state_dict()
