"""Kills the main job at random moments, continues it, and compares the result with that of an undisturbed run.

    python bench/chaos.py [--kills 50] [--seed 0] [--folder FOLDER]

The embedded demo, scaled down to a few steps per stage, runs once undisturbed. Then the same command runs again and again:
each time, SIGKILL ends it at a random moment after it has begun to work, in whatever stage that is, and the same command
continues. When a run reaches its end, it is compared with the undisturbed one, bit for bit: the weights of every stage, the
scores, the logged losses and the packed files. The next run starts in a new folder, until all kills are used up. The last
line says how many runs were equal; the exit status is 1 if one was not.
"""

import argparse
import hashlib
import json
import os
import queue
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRAINED = ("base", "teacher", "pretrain", "distill")
SETTINGS = [
    "--max_steps",
    "6",
    "--evaluate.max_rows",
    "40",
    "--evaluate.weight_only",
    "false",
    "--export.speed_tokens",
    "0",
]
for name in TRAINED:
    SETTINGS += [f"--{name}.save_steps", "2", f"--{name}.logging_steps", "1"]
STAGES = ("base", "teacher", "refine", "pretrain", "distill", "baseline")
VARYING = ("time", "tokens_per_second")  # of a line of metrics.jsonl


class Run:
    """One process of the main job in a process group of its own, with the stage that it is in."""

    def __init__(self, folder: Path):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        command = [sys.executable, str(ROOT / "bitdistill" / "train.py"), "--output_dir", str(folder), *SETTINGS]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=environment,
        )
        self.stage, self.lines, self.working = "start", [], threading.Event()
        self.ended: queue.Queue[int] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if ": runs (" in line:
                self.stage = line.partition(":")[0]
                self.working.set()
            elif line.startswith("Report: "):
                self.stage = "end"
        self.working.set()
        self.ended.put(self.process.wait())

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit status, or None when it still runs after so many seconds."""
        try:
            return self.ended.get(timeout=seconds)
        except queue.Empty:
            return None

    def kill(self) -> None:
        """SIGKILL to the process and its children, and its end."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.wait()


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


def main() -> int:
    """Returns 0 when every disturbed run ended as the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="how often a run is killed (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--folder", type=Path, help="where the runs lie; a temporary folder by default")
    options = parser.parse_args()
    root = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    root.mkdir(parents=True, exist_ok=True)
    draw = random.Random(options.seed)

    started = time.perf_counter()
    undisturbed = Run(root / "undisturbed")
    undisturbed.working.wait()
    began = time.perf_counter()
    if undisturbed.wait() != 0:
        print("\n".join(undisturbed.lines[-20:]))
        return 1
    length = time.perf_counter() - began
    expected = fingerprint(root / "undisturbed")
    print(f"undisturbed: {length:.0f} s of work, {time.perf_counter() - started:.0f} s in all", flush=True)

    kills, runs, unequal, fell = 0, 0, 0, Counter()
    while kills < options.kills or runs == 0:
        runs += 1
        folder, here = root / f"disturbed-{runs}", []
        while True:
            run = Run(folder)
            if kills < options.kills:
                run.working.wait()
                status = run.wait(draw.uniform(0, length / 2))
                if status is None:
                    run.kill()
                    kills += 1
                    fell[run.stage] += 1
                    here.append(run.stage)
                    print(f"kill {kills}: in {run.stage}", flush=True)
                    continue
            else:
                status = run.wait()
            break
        if status != 0:
            print("\n".join(run.lines[-20:]))
            print(f"run {runs}: ended with status {status} after kills in {', '.join(here)}")
            return 1
        found = fingerprint(folder)
        apart = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        unequal += bool(apart)
        print(
            f"run {runs}: {len(here)} kills, {'equal' if not apart else 'differs in ' + ', '.join(apart)}", flush=True
        )
    print("\nkills by stage: " + ", ".join(f"{stage} {count}" for stage, count in fell.most_common()))
    print(f"{runs - unequal} of {runs} runs with {kills} kills in all ended as the undisturbed one")
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
