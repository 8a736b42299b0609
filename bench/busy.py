"""How well training shares a machine: the demo's training stages alone, and beside a process that never rests.

    python bench/busy.py [--max_steps 20] [--rounds 1] [--threads N] [--json FILE]

Each round runs the embedded demo twice, alone and beside one process that computes without pause. It adds up the seconds
that the training stages report themselves (done.json), so that imports and scoring do not change the ratio. On two cores,
beside one such process, a fair share is two thirds of the machine, so 1.5 times as long. The exit status is 1 if the ratio
is above LIMIT.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import cores, machine, table, write_json

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 2.5
STAGES = ("base", "teacher", "pretrain", "distill", "baseline")
NEVER_RESTS = [sys.executable, "-c", "while True: pass"]


def demo_seconds(folder: Path, max_steps: int, threads: int | None) -> dict[str, float]:
    """Seconds of each training stage of a demo of `max_steps` steps per stage."""
    options = ["--output_dir", str(folder), "--max_steps", str(max_steps), "--report", "false"]
    options += ["--evaluate.enabled", "false", "--export.enabled", "false"]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    environment.pop("OMP_NUM_THREADS", None)
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    command = [sys.executable, str(ROOT / "bitdistill" / "train.py"), *options]
    job = subprocess.run(command, env=environment, capture_output=True, text=True)
    if job.returncode:
        raise SystemExit(f"busy: the demo failed:\n{job.stderr[-4000:]}")
    return {stage: json.loads((folder / stage / "done.json").read_text())["seconds"] for stage in STAGES}


def one_round(max_steps: int, threads: int | None) -> dict[str, dict[str, float]]:
    """{"alone", "busy"}: seconds of each stage."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        found["alone"] = demo_seconds(Path(folder) / "alone", max_steps, threads)
        neighbor = subprocess.Popen(NEVER_RESTS)
        try:
            found["busy"] = demo_seconds(Path(folder) / "busy", max_steps, threads)
        finally:
            neighbor.kill()
            neighbor.wait()
    return found


def main() -> int:
    """Measures, prints, and says with its status whether the ratio is within LIMIT."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, help="of OpenMP; by default the main job decides")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    rounds = [one_round(arguments.max_steps, arguments.threads) for _ in range(arguments.rounds)]
    rows = [["stage", "alone, s", "busy, s", "ratio"]]
    for stage in (*STAGES, "all"):
        alone, busy = (
            statistics.median(sum(one[how].values()) if stage == "all" else one[how][stage] for one in rounds)
            for how in ("alone", "busy")
        )
        rows.append([stage, f"{alone:.1f}", f"{busy:.1f}", f"{busy / alone:.2f}"])
    ratio = busy / alone
    threads = arguments.threads or "as many as the main job takes"
    print(f"threads: {threads}; {cores()} cores, {arguments.max_steps} steps per stage, load before {load:.1f}")
    print(table(rows, "<>>>"))
    each = [sum(one["busy"].values()) / sum(one["alone"].values()) for one in rounds]
    print(f"ratio of each round: {', '.join(f'{one:.2f}' for one in each)}")
    print(f"limit {LIMIT}: {'holds' if ratio <= LIMIT else 'does not hold'}")
    if arguments.json:
        write_json(arguments.json, {"machine": machine(), "load": load, "rounds": rounds, "ratio": ratio})
    return 0 if ratio <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
