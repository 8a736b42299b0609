"""Kills the main job at random moments, continues it, and compares the result with that of an undisturbed run.

    python bench/chaos.py [--kills 50] [--minutes M] [--signal SIGKILL] [--ranks 1] [--seed 0] [--folder FOLDER]

The embedded demo, scaled down to a few steps per stage, runs once undisturbed. Then the same command runs again and again,
and each time SIGKILL ends it. Every second kill falls at a random moment; the others are aimed at what is over so quickly
that a random moment seldom meets it, such as the saving of a checkpoint. The same command goes on. A run that reaches
its end is compared with the undisturbed one, bit for bit: the weights of every stage, the scores, the logged losses and the
packed files. The next run starts in a new folder, until all kills are spent.

With --signal SIGTERM or SIGINT the job must end within PATIENCE seconds, with 128 and the number of the signal as its status.

With --ranks above 1 the job runs under DeepSpeed's launcher, and SIGKILL goes to one rank, drawn at random: the launcher must
end the others within PATIENCE seconds, and leave no process behind. Other signals go to the command that started the ranks.

Prints where each kill fell and a table of them. The exit status is 1 when a run was not equal or did not end.
"""

import argparse
import contextlib
import glob
import hashlib
import json
import os
import queue
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import psutil

from bitdistill.distributed.checkpoint import MARKER
from bitdistill.distributed.process_group import free_port

ROOT = Path(__file__).resolve().parents[1]
TRAINED = ("base", "teacher", "pretrain", "distill", "baseline")
SETTINGS = shlex.split("--max_steps 6 --evaluate.max_rows 20 --evaluate.weight_only false --export.speed_tokens 0")
for name in TRAINED[:-1]:  # the baseline has the settings of `distill`
    SETTINGS += shlex.split(f"--{name}.save_steps 2 --{name}.logging_steps 1 --{name}.per_device_train_batch_size 4")
STAGES = ("base", "teacher", "refine", "pretrain", "distill", "baseline")
VARYING = ("time", "tokens_per_second")  # of a line of metrics.jsonl
AIMS = [(stage, phase) for stage in TRAINED for phase in ("saves a checkpoint", "saves its result")]
AIMS += [(stage, "works") for stage in ("start", "refine", "evaluate", "export", "report")]
PHASES = ("trains", "saves a checkpoint", "saves its result", "works")
LOOK_SECONDS = 0.002
PATIENCE = 30.0  # seconds; a busy machine may need more


class Run:
    """One start of the main job, and where it is: in which stage, and in which phase of it.

    Args:
        folder: of the run. ranks: processes that train together. signal_number: what `kill` will send.
    """

    def __init__(self, folder: Path, ranks: int, signal_number: signal.Signals = signal.SIGKILL):
        self.folder, self.ranks, self.signal = folder, ranks, signal_number
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "bitdistill.distributed.start"] if signal_number != signal.SIGKILL else []
            launcher = launcher if len(launcher) > 1 else [str(Path(sys.executable).with_name("deepspeed"))]
            launcher += ["--master_port", str(free_port()), "--num_gpus", str(ranks)]
        else:
            environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        command = [*launcher, str(ROOT / "bitdistill" / "train.py"), "--output_dir", str(folder), *SETTINGS]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.stage, self.lines, self.working = "start", [], threading.Event()
        self.ended: queue.Queue[int] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if ": runs (" in line:
                self.stage = line.partition(":")[0]
                self.working.set()
        self.working.set()
        self.ended.put(self.process.wait())

    def where(self) -> tuple[str, str]:
        """(stage, phase) at this moment, from what the job has said and from its files."""
        stage = self.stage
        writes_result = (self.folder / f".{stage}.unfinished").exists()
        if stage in TRAINED:
            if any(saved.exists() and not (saved / MARKER).exists() for saved in checkpoints(self.folder, stage)):
                return stage, "saves a checkpoint"
            return stage, "saves its result" if writes_result else "trains"
        if stage == "export" and not writes_result and (self.folder / stage / "done.json").exists():
            return "report", "works"
        return stage, "works"

    def until(self, aim: tuple[str, str]) -> int | None:
        """Waits until the job is there. Returns its exit status when it ended before, else None."""
        while self.where() != aim:
            if (status := self.wait(LOOK_SECONDS)) is not None:
                return status
        return None

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit status, or None when it still runs after so many seconds."""
        try:
            return self.ended.get(timeout=seconds)
        except queue.Empty:
            return None

    def kill(self, draw: random.Random) -> str | None:
        """Sends the signal to the job, or kills one of its ranks. Returns what is wrong with its end, if anything is."""
        one_rank = self.ranks > 1 and self.signal == signal.SIGKILL
        while True:
            try:
                started = psutil.Process(self.process.pid).children(recursive=True)
            except psutil.NoSuchProcess:  # it has ended by itself at this very moment
                return None
            victims = [process for process in started if self._is_rank(process)] if one_rank else [self.process]
            if victims:
                break
        victim = draw.choice(victims)
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(self.signal)
        status = self.wait(PATIENCE)
        if status is None:
            end_all(*started, self.process)
            self.wait()
            return f"still there {PATIENCE:.0f} s after {self.signal.name} to process {victim.pid}"
        left = psutil.wait_procs(started, timeout=5)[1]
        end_all(*left)
        if left:
            return f"left behind: {', '.join(str(process.pid) for process in left)}"
        expected = (0, 128 + self.signal) if self.signal != signal.SIGKILL else (status,)
        if self.stage == "start":  # Python itself may not have started yet: a shell shows the same number for it
            expected += (-self.signal,)
        return None if status in expected else f"ended with status {status}"

    @staticmethod
    def _is_rank(process: psutil.Process) -> bool:
        try:
            return any(word.startswith("--local_rank=") for word in process.cmdline())
        except psutil.Error:
            return False


def checkpoints(folder: Path, stage: str) -> list[Path]:
    """The checkpoints of a stage of a run that is going on, complete or not, the newest last."""
    # glob, not Path.glob: the job removes these folders meanwhile, which Path.glob does not bear.
    found = map(Path, glob.glob(f"{glob.escape(str(folder))}/checkpoints/{stage}/checkpoint-*"))
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def end_all(*processes: psutil.Process | subprocess.Popen) -> None:
    """Kills processes, of which some may end by themselves at this very moment."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def fingerprint(folder: Path) -> dict[str, str]:
    """What must be equal in two runs -> its sha256."""
    found = {}
    for stage in STAGES:
        found[f"{stage} weights"] = _sha(folder / stage / "model.safetensors")
    for path in sorted((folder / "export").glob("*.safetensors")):
        found[f"packed {path.name}"] = _sha(path)
    scores = (folder / "evaluate" / "scores.json").read_bytes()
    found["scores"] = hashlib.sha256(scores).hexdigest()
    lines = {}
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        lines[line["stage"], line["step"]] = {key: line[key] for key in sorted(line) if key not in VARYING}
    logged = json.dumps([lines[key] for key in sorted(lines)])
    found["logged losses"] = hashlib.sha256(logged.encode()).hexdigest()
    return found


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def undisturbed(folder: Path, ranks: int) -> tuple[dict[str, str], dict[tuple[str, str], float]] | None:
    """A run to its end: what it made, and the seconds that it spent in each (stage, phase). None when it failed.

    A folder that an earlier call used has one already.
    """
    known = folder.with_suffix(".json")
    if known.exists():
        return fingerprint(folder), {(stage, phase): seconds for stage, phase, seconds in json.loads(known.read_text())}
    run, spent, since = Run(folder, ranks), Counter(), time.perf_counter()
    while (status := run.wait(LOOK_SECONDS)) is None:
        now = time.perf_counter()
        spent[run.where()] += now - since
        since = now
    if status != 0:
        print("\n".join(run.lines[-20:]))
        return None
    known.write_text(json.dumps([[*place, seconds] for place, seconds in spent.items()]))
    return fingerprint(folder), dict(spent)


class Kills:
    """Where the kills shall fall, and where they fell.

    Args:
        number: how many. minutes: after which there are no more.
        spent: seconds that an undisturbed run spends in each (stage, phase). draw: of the moments.
    """

    def __init__(self, number: int, minutes: float, spent: dict[tuple[str, str], float], draw: random.Random):
        self.number, self.spent, self.draw = number, spent, draw
        self.last = time.monotonic() + 60 * minutes
        self.fell: Counter = Counter()

    @property
    def left(self) -> int:
        return self.number - self.fell.total() if time.monotonic() < self.last else 0

    def wait(self, run: Run) -> int | None:
        """Waits for the moment of the next kill. Returns the exit status of a run that ended before it."""
        if self.fell.total() % 2 == 0:
            run.working.wait()
            return run.wait(self.draw.uniform(0, sum(self.spent.values()) / 2))
        ahead = [aim for aim in AIMS if not (run.folder / aim[0] / "done.json").exists()]
        aim = min(ahead, key=lambda aim: (self.fell[aim], self.draw.random()))
        saves = 3 if "saves a checkpoint" in aim else 1
        status = run.until(aim)
        return run.wait(self.draw.uniform(0, self.spent.get(aim, 0) / saves)) if status is None else status

    def table(self) -> str:
        """Stages by phases, as Markdown."""
        rows = [f"| stage | {' | '.join(PHASES)} |", "|---|" + "---|" * len(PHASES)]
        for stage in dict.fromkeys(stage for stage, _ in (*self.spent, *self.fell)):
            known = [(stage, phase) in self.spent or self.fell[stage, phase] > 0 for phase in PHASES]
            cells = [str(self.fell[stage, phase]) if there else "" for phase, there in zip(PHASES, known, strict=True)]
            rows.append(f"| {stage} | {' | '.join(cells)} |")
        return "\n".join(rows)


def disturbed(folder: Path, ranks: int, signal_number: signal.Signals, kills: Kills) -> tuple[Run, int, list[str]]:
    """A run to its end, started again after each kill. Returns (its last start, exit status, what was wrong with kills)."""
    wrong: list[str] = []
    while True:
        run = Run(folder, ranks, signal_number)
        status = kills.wait(run) if kills.left > 0 else run.wait()
        if status is not None:
            return run, status, wrong
        place = run.where()
        if problem := run.kill(kills.draw):
            wrong.append(problem)
        kills.fell[place] += 1
        print(f"kill {kills.fell.total()}: {' '.join(place)}{f', {problem}' if problem else ''}", flush=True)


def main() -> int:
    """Returns 0 when every disturbed run ended as the undisturbed one."""
    # A shell's background job ignores Ctrl-C, and hands that on to what it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="how often a run is killed (default: 50)")
    parser.add_argument("--minutes", type=float, default=1e6, help="after which nothing is killed any more")
    parser.add_argument("--ranks", type=int, default=1, help="processes that train together (default: 1)")
    parser.add_argument(
        "--signal", default="SIGKILL", choices=("SIGKILL", "SIGTERM", "SIGINT"), help="(default: SIGKILL)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--folder", type=Path, help="where the runs lie; a temporary folder by default")
    options = parser.parse_args()
    root = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    root.mkdir(parents=True, exist_ok=True)

    found = undisturbed(root / "undisturbed", options.ranks)
    if found is None:
        return 1
    expected, spent = found
    kills = Kills(options.kills, options.minutes, spent, random.Random(options.seed))
    print(f"undisturbed: {sum(spent.values()):.0f} s", flush=True)

    runs, bad = 0, 0
    while kills.left > 0 or runs == 0:
        runs, before = runs + 1, kills.fell.total()
        folder, signal_number = root / f"disturbed-{options.seed}-{runs}", signal.Signals[options.signal]
        run, status, wrong = disturbed(folder, options.ranks, signal_number, kills)
        if status != 0:
            print("\n".join(run.lines[-20:]))
            print(f"run {runs}: ended with status {status}")
            return 1
        made = fingerprint(run.folder)
        apart = sorted(name for name in expected.keys() | made.keys() if expected.get(name) != made.get(name))
        bad += bool(apart or wrong)
        verdict = f"differs in {', '.join(apart)}" if apart else "equal"
        print(f"run {runs}: {kills.fell.total() - before} kills, {verdict}", flush=True)
    print(f"\n{kills.table()}\n")
    print(f"{runs - bad} of {runs} runs with {kills.fell.total()} kills in all ended as the undisturbed one")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
