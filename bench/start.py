"""How long the first token takes, as a whole process: with the kernels compiled already, and on a machine's first start.

    python bench/start.py FILE                      seven warm starts of `bitdistill generate FILE "The film" --max_new_tokens 1`
    python bench/start.py FILE --first 3            and before them three, each with an empty cache of kernels

Wall time, and processor time (user and system) with that of the processes that it starts. Medians, with the least and the most.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time


def start(file: str, environment: dict[str, str]) -> tuple[float, float]:
    """Wall and processor seconds of one process, and of those that it starts."""
    command = [sys.executable, "-m", "bitdistill.cli", "generate", file, "The film", "--max_new_tokens", "1"]
    command += ["--threads", "1"]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_start(file: str) -> tuple[float, float]:
    """The same on a machine that never ran it."""
    with tempfile.TemporaryDirectory() as empty:
        return start(file, os.environ | {"XDG_CACHE_HOME": empty})


def say(what: str, runs: list[tuple[float, float]]) -> None:
    """Prints medians with the least and the most."""
    texts = [f"{statistics.median(v):.2f} s [{min(v):.2f}, {max(v):.2f}]" for v in zip(*runs, strict=True)]
    print(f"{what}: {texts[0]} of wall time, {texts[1]} of processor time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a packed student")
    parser.add_argument("--runs", type=int, default=7, help="warm starts (default: 7)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="also N starts with an empty cache each")
    arguments = parser.parse_args()
    if arguments.first:
        say("first start", [first_start(arguments.file) for _ in range(arguments.first)])
    start(arguments.file, dict(os.environ))  # compiles where nothing is kept
    say("warm start", [start(arguments.file, dict(os.environ)) for _ in range(arguments.runs)])


if __name__ == "__main__":
    main()
