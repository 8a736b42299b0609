"""Is this checkout worse than a commit? Compares paired ratios over several rounds of both, considering the measured noise,
and counts.

    python bench/regressions.py BASE [--rounds 3] [--only linear cpu_kernels] [--json FILE]

BASE is checked out into a temporary folder, and the benchmarks of *this* checkout run on the code of both commits in turn,
in fresh processes. A ratio (of times or of memory) has become worse when its median over rounds fell by more than both
sides' spread together and by more than 5 %. A count (bytes, bits) has become worse when it rose by as much, and a mismatch
when there is one at all. Among many ratios, some seem worse by chance: their files are then measured as many times once
more, and all rounds are judged together. The exit status is 1 if one has become worse. Figures that only one side has are
listed.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import figure, table, write_json

ROOT = Path(__file__).resolve().parents[1]
LEAST = 0.05  # a smaller change is not called one, however quiet the machine


def importable(checkout: Path, folder: Path) -> Path:
    """A folder for PYTHONPATH in which `bitdistill` is the checkout's code, laid out as it is installed."""
    package = folder / "bitdistill"
    package.mkdir(parents=True)
    for entry in (checkout / "bitdistill").iterdir():
        if entry.name not in ("kernels", "distributed", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    for name in ("kernels", "distributed"):
        (package / name).symlink_to(checkout / name)
    return folder


def measure(path: Path, only: list[str]) -> dict[str, dict]:
    """One round of bench/ratios.py of this checkout against the code in `path`."""
    command = [sys.executable, str(ROOT / "bench" / "ratios.py"), *(["--only", *only] if only else [])]
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=path)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        raise SystemExit(f"a benchmark failed with the code in {path}")
    return json.loads(done.stdout.splitlines()[-1])


def judge(before: list[float], after: list[float], unit: str = "x") -> dict:
    """Whether a figure has become worse, beyond the noise of both sides.

    Args:
        unit: "x ...", a ratio, higher is better; anything else counts, lower is better; "mismatches" must be 0.

    Returns: {"before", "after": medians, "unit", "change": relative, "noise": relative, "worse": bool}.
    """
    old, new = statistics.median(before), statistics.median(after)
    if unit == "mismatches":
        return {"before": old, "after": new, "unit": unit, "change": 0.0, "noise": 0.0, "worse": new > 0}
    noise = ((max(before) - min(before)) + (max(after) - min(after))) / old
    change = new / old - 1
    worse = (-change if unit.startswith("x") else change) > max(noise, LEAST)
    return {"before": old, "after": new, "unit": unit, "change": change, "noise": noise, "worse": worse}


def measured(sides: dict[str, Path], rounds: int, only: list[str]) -> dict[str, dict[str, dict]]:
    """Both sides in turn. Returns: side -> name -> {"values": one per round, "unit"}, of figures that every round has."""
    results: dict[str, list[dict]] = {side: [] for side in sides}
    for turn in range(rounds):
        for side in sides if turn % 2 else reversed(sides):
            results[side].append(measure(sides[side], only))
        print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    return {
        side: {
            name: {"values": [one[name]["value"] for one in found], "unit": found[0][name]["unit"]}
            for name in sorted(set.intersection(*(set(one) for one in found)))
        }
        for side, found in results.items()
    }


def judged(figures: dict[str, dict[str, dict]]) -> dict[str, dict]:
    """`judge` of each figure that both sides have."""
    before, after = figures["before"], figures["after"]
    return {
        name: judge(before[name]["values"], after[name]["values"], after[name]["unit"])
        for name in sorted(before.keys() & after.keys())
    }


def main() -> int:
    """Measures both sides, prints the table, and fails on a ratio that became worse."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("base", metavar="BASE", help="a commit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="files of bench/suite")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    known = subprocess.run(
        ["git", "rev-parse", "--verify", f"{arguments.base}^{{commit}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if known.returncode:
        parser.error(f"BASE: expected a commit; got {arguments.base!r}")
    if arguments.rounds < 2:
        parser.error(f"--rounds: expected at least 2, to know the noise; got {arguments.rounds}")
    commit = known.stdout.strip()
    with tempfile.TemporaryDirectory() as temporary:
        checkout = Path(temporary) / "checkout"
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(checkout), commit], cwd=ROOT, capture_output=True, check=True
        )
        try:
            sides = {
                "before": importable(checkout, Path(temporary) / "before"),
                "after": importable(ROOT, Path(temporary) / "after"),
            }
            figures = measured(sides, arguments.rounds, arguments.only)
            suspects = {name for name, one in judged(figures).items() if one["worse"]}
            if suspects:
                again = measured(sides, arguments.rounds, sorted({name.partition(".")[0] for name in suspects}))
                for side, name in itertools.product(sides, suspects):
                    figures[side][name]["values"] += again[side][name]["values"]
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(checkout)], cwd=ROOT, check=True)
    report = judged(figures)
    cells = [["figure", "before", "after", "unit", "change", "noise", ""]]
    for name, one in report.items():
        cells.append([
            name, figure(one["before"]), figure(one["after"]), one["unit"], f"{100 * one['change']:+.0f} %",
            f"{100 * one['noise']:.0f} %", "WORSE" if one["worse"] else "",
        ])  # fmt: skip
    print(table(cells, "<>><>><"))
    for side in sides:
        for name in sorted(figures[side].keys() - figures["after" if side == "before" else "before"].keys()):
            print(f"only {side}: {name}")
    if arguments.json:
        write_json(arguments.json, {"base": commit, "rounds": arguments.rounds, "figures": report})
    return 1 if any(one["worse"] for one in report.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
