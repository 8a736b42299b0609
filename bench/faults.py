"""Faults on two ranks: a full disk, a checkpoint's shard that is cut short, a rank that stands still.

    sudo python bench/faults.py [--zero 2] [--only standing_still] [--folder FOLDER]

The embedded demo's base model is trained on two ranks, once undisturbed, and once for each fault, which falls after the first
checkpoint:

* full disk: the run lies on a file system of its own in memory, which is filled up (needs root for the mount);
* cut shard: both ranks are killed, and the newest checkpoint's optimizer state of rank 1 loses its second half;
* standing still: rank 1 is stopped with SIGSTOP, and must be named within the time-out.

Each time all processes must end by themselves with a message of one line. Once the cause is gone, the same command must reach
the weights of the undisturbed run, bit for bit. The exit status is 1 where it does not.
"""

import argparse
import hashlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from chaos import MARKER, checkpoints, end_all

from bitdistill.distributed.process_group import free_port

ROOT = Path(__file__).resolve().parents[1]
RANK_TIMEOUT, PATIENCE, MEGABYTES = 20, 90, 120
SETTINGS = shlex.split(
    "--stage base --max_steps 40 --base.save_steps 4 --base.logging_steps 1 --base.per_device_train_batch_size 4 "
    f"--report false --rank_timeout {RANK_TIMEOUT}"
)


class Job:
    """One start of the job on two ranks. Args: folder: of the run. zero: the ZeRO stage."""

    def __init__(self, folder: Path, zero: int):
        self.folder, self.log = folder, folder.parent / f"{folder.name}.log"
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        command = [
            deepspeed,
            "--num_gpus",
            "2",
            "--master_port",
            str(free_port()),
            str(ROOT / "bitdistill" / "train.py"),
        ]
        command += ["--output_dir", str(folder), "--zero", str(zero), *SETTINGS]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self.begins = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("a", encoding="utf-8") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)

    def checkpoints(self) -> list[Path]:
        """The complete ones, the newest last."""
        return [path for path in checkpoints(self.folder, "base") if (path / MARKER).exists()]

    def until_checkpoint(self, number: int = 1) -> None:
        """Waits for so many complete checkpoints."""
        while len(self.checkpoints()) < number:
            if self.process.poll() is not None:
                raise RuntimeError(f"ended before its first checkpoint: see {self.log}")
            time.sleep(0.02)

    def ranks(self) -> list[psutil.Process]:
        """Its ranks, in order."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        found = [(word, child) for child in children for word in child.cmdline() if word.startswith("--local_rank=")]
        return [child for _, child in sorted(found, key=lambda pair: pair[0])]

    def end(self) -> list[str]:
        """Waits for its own end. Returns what was wrong with it."""
        started, began = psutil.Process(self.process.pid).children(recursive=True), time.monotonic()
        try:
            status = self.process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            end_all(*started, self.process)
            return [f"still there after {PATIENCE} s"]
        left = psutil.wait_procs(started, timeout=5)[1]
        end_all(*left)
        print(f"  ended after {time.monotonic() - began:.0f} s with status {status}")
        return [f"left behind: {process.pid}" for process in left] + ([] if status else ["status 0"])

    def said(self) -> list[str]:
        """What this start said of its trouble."""
        with self.log.open(encoding="utf-8", errors="replace") as file:
            file.seek(self.begins)
            lines = [line.rpartition("\r")[2].strip() for line in file.read().splitlines()]
        words = ("bitdistill: ", "expected", "skipped", "continues at", "stood still", "Traceback")
        return [f"  {line[:220]}" for line in lines if any(word in line for word in words)]

    def weights(self) -> str:
        """The fingerprint of its result."""
        return hashlib.sha256((self.folder / "base" / "model.safetensors").read_bytes()).hexdigest()


def full_disk(job: Job) -> list[str]:
    """Fills the file system of the run."""
    job.until_checkpoint()
    with (job.folder.parent / "filler").open("wb") as file:
        try:
            while True:
                file.write(b"\0" * 2**16)
        except OSError:
            pass
    return job.end()


def cut_shard(job: Job) -> list[str]:
    """Kills the ranks and cuts a part of the newest checkpoint."""
    job.until_checkpoint(2)
    end_all(*job.ranks())
    wrong = job.end()
    shard = next(job.checkpoints()[-1].glob("global_step*/*rank_1_*optim_states.pt"))
    os.truncate(shard, shard.stat().st_size // 2)
    return wrong


def standing_still(job: Job) -> list[str]:
    """Stops rank 1."""
    job.until_checkpoint()
    stopped = job.ranks()[1]
    stopped.send_signal(signal.SIGSTOP)
    wrong = job.end()
    named = any("rank 1 of 2 stood still" in line for line in job.said())
    return wrong if named else [*wrong, "rank 1 was not named"]


FAULTS = (full_disk, cut_shard, standing_still)


def disturbed(root: Path, zero: int, fault, expected: str) -> list[str]:
    """A run with one fault, and what follows. Returns what was wrong."""
    root.mkdir()
    on_its_own = fault is full_disk
    if on_its_own:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}M", "tmpfs", str(root)], check=True)
    try:
        job = Job(root / "run", zero)
        wrong = fault(job)
        print("\n".join(job.said()))
        (root / "filler").unlink(missing_ok=True)
        again = Job(root / "run", zero)
        if again.process.wait(timeout=600) != 0:
            wrong.append("did not go on")
        elif again.weights() != expected:
            wrong.append("other weights")
        print("\n".join(again.said()))
        if "Traceback" in "".join(job.said() + again.said()):
            wrong.append("a traceback")
    finally:
        if on_its_own:
            subprocess.run(["umount", "-l", str(root)], check=True)
    return wrong


def main() -> int:
    """Returns 0 when each fault ended cleanly and lost nothing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zero", type=int, default=2, choices=(0, 1, 2, 3), help="the ZeRO stage (default: 2)")
    parser.add_argument("--folder", type=Path, help="a new folder for the runs; a temporary one by default")
    parser.add_argument("--only", choices=[fault.__name__ for fault in FAULTS], help="one of the faults")
    options = parser.parse_args()
    root = (options.folder or Path(tempfile.mkdtemp(prefix="faults-"))).absolute()
    root.mkdir(parents=True, exist_ok=True)
    undisturbed = Job(root / "undisturbed", options.zero)
    if undisturbed.process.wait(timeout=600) != 0:
        print(f"the undisturbed run failed: see {undisturbed.log}")
        return 1
    bad = 0
    for fault in FAULTS:
        if options.only not in (None, fault.__name__):
            continue
        name = fault.__name__.replace("_", " ")
        print(f"{name}:", flush=True)
        wrong = disturbed(root / fault.__name__, options.zero, fault, undisturbed.weights())
        bad += bool(wrong)
        print(f"  {', '.join(wrong) or 'ended clean, went on, and reached the same weights'}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
