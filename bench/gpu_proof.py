"""One command on a machine with an NVIDIA GPU: are the kernels right, and are they as fast as they should be?

    python bench/gpu_proof.py [--quick] [--json FILE] [--tests run|skip|only] [--minutes 9]
    python bench/gpu_proof.py --dry_run       without a GPU: every measurement once, tiny, interpreted, not timed

First the GPU tests run on the device, distributed over several processes; if one fails, no speed is reported. Then every
section of gpu_sections.py is measured and compared with its floor and its target (gpu_timing.py says how). The result is
one table, and bench/results/gpu/DATE.json with date, GPU, driver, versions and commit. What could not run, or had no time
left, is named.

Needs torch, triton, transformers, numpy and pytest, but no installation of this project. torchao and onebitllms are
measured if they are installed; pytest-xdist, pytest-timeout and hypothesis may be absent. The whole is limited to nine
minutes, and what had no time is named. `--tests only` and then `--tests skip` give each half the whole time.

Exit status: 0 if everything ran, whatever the speeds; 1 if a test failed or a measurement broke; 2 without a GPU.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEST_SECONDS = 200.0
REPORT_SECONDS = 5.0  # kept for writing at the end
LIBRARIES = ("torch", "triton", "transformers", "numpy", "pytest", "deepspeed", "torchao", "onebitllms")
# Stands in for hypothesis: its tests are skipped, and say why; the others of the file run.
HYPOTHESIS = '''"""Not hypothesis: a stand-in that skips its tests."""
import pytest

def given(*_, **__):
    return pytest.mark.skip(reason="hypothesis is not installed")

class settings:
    def __init__(self, *_, **__): pass
    def __call__(self, test): return test
    def __getattr__(self, name): return lambda *_, **__: None
    register_profile = load_profile = staticmethod(lambda *_, **__: None)

class _Anything:
    def __getattr__(self, name): return self
    def __call__(self, *_, **__): return self
    def __iter__(self): return iter(())

HealthCheck = strategies = _Anything()
assume = example = note = _Anything()
'''


def make_importable(folder: Path) -> dict[str, str]:
    """Makes `bitdistill` importable where it is not installed, by links in a folder, and stands in for hypothesis.

    Returns: the environment for other processes, whose PYTHONPATH begins with that folder.
    """
    if importlib.util.find_spec("bitdistill") is None or importlib.util.find_spec("bitdistill.kernels") is None:
        package = folder / "bitdistill"
        package.mkdir()
        for path in (ROOT / "bitdistill").iterdir():
            (package / path.name).symlink_to(path)
        for name in ("kernels", "distributed"):
            (package / name).symlink_to(ROOT / name)
        for name in [name for name in sys.modules if name.partition(".")[0] == "bitdistill"]:
            del sys.modules[name]
        importlib.invalidate_caches()
    if importlib.util.find_spec("hypothesis") is None:
        (folder / "hypothesis").mkdir()
        (folder / "hypothesis" / "__init__.py").write_text(HYPOTHESIS)
        (folder / "hypothesis" / "strategies.py").write_text(
            "from hypothesis import _Anything\n__getattr__ = _Anything().__getattr__\n"
        )
    sys.path.insert(0, str(folder))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}


# ---------------------------------------------------------------------------------------------------- tests


@dataclass(frozen=True)
class Tested:
    """What became of the tests.

    Args:
        counts: by pytest's words. skipped: why, a line each. problems: what failed, or did not finish; empty is green.
    """

    counts: dict[str, int]
    skipped: tuple[str, ...]
    problems: tuple[str, ...]


def read_counts(output: str) -> dict[str, int]:
    """{"passed": 12, "skipped": 1, ...} from pytest's last line."""
    last = next((line for line in reversed(output.splitlines()) if re.search(r"\d+ \w+.* in [\d.]+s", line)), "")
    words = re.findall(r"(\d+) (passed|failed|error|skipped|xfailed)", last)
    return {word: int(count) for count, word in words}


def _pytest(*arguments: str) -> list[str]:
    """pytest without the plugins that the project's settings ask for, and without the repository's root on sys.path."""
    options = ["-q", "-rs", "-p", "no:cacheprovider", "-o", "addopts=", "--continue-on-collection-errors"]
    return [sys.executable, "-P", "-m", "pytest", *options, *arguments]


def read_collection(output: str) -> tuple[list[str], list[str], list[str]]:
    """Of ``pytest --collect-only -q``: (tests, files that lack a library, other problems)."""
    tests = [line for line in output.splitlines() if re.match(r"\S+\.py::", line)]
    reasons: dict[str, str] = {}
    file = ""
    for line in output.splitlines():
        if header := re.search(r"ERROR collecting (\S+)", line):
            file = header[1]
            reasons[file] = ""
        elif file and line.startswith("E  "):
            reasons[file] = line[1:].strip()
    excused, problems = [], []
    for file, reason in reasons.items():
        missing = re.search(r"No module named '([\w.]+)'", reason)
        if missing and importlib.util.find_spec(missing[1].partition(".")[0]) is None:
            excused.append(f"{file}: {missing[1]} is not installed")
        else:
            problems.append(f"{file}: {reason}")
    return tests, excused, problems


def run_tests(root: Path, files: Sequence[Path], environment: dict[str, str], seconds: float, processes: int) -> Tested:
    """All tests of some files below `root` on the device, dealt out to so many processes, within so many seconds.

    Kernels are compiled for every shape of a test, which takes much longer than running them: hence the processes.
    """
    started = time.monotonic()
    where = f"--rootdir={root}"  # names of tests are relative to it
    command = _pytest(where, "--collect-only", *map(str, files))
    collected = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False).stdout
    tests, excused, problems = read_collection(collected)
    if not tests and not problems:
        problems = ["no tests were found:", *collected.splitlines()[-5:]]
    hands = [tests[first::processes] for first in range(processes)]
    running = []
    for hand in filter(None, hands):
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- read below
        process = subprocess.Popen(
            _pytest(where, *hand), cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True
        )
        running.append((process, log))
    counts: dict[str, int] = {}
    skipped = set(excused)
    for process, log in running:
        try:
            code = process.wait(max(0.0, seconds - (time.monotonic() - started)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
        log.seek(0)
        output = log.read()
        log.close()
        for word, count in read_counts(output).items():
            counts[word] = counts.get(word, 0) + count
        skipped |= {line.removeprefix("SKIPPED ") for line in output.splitlines() if line.startswith("SKIPPED")}
        if code is None:
            problems.append(f"a process had not finished after {seconds:.0f} s: {' '.join(output.split()[-3:])}")
        elif code != 0:
            problems += output.splitlines()[-30:]
    return Tested(counts, tuple(sorted(skipped)), tuple(problems))


# ---------------------------------------------------------------------------------------------------- measuring


def broken() -> tuple[type[BaseException], ...]:
    """What a kernel that does not work raises; anything else is a mistake of ours and ends the run."""
    from triton.errors import TritonError

    from bitdistill.errors import UserError

    return RuntimeError, ValueError, TypeError, AttributeError, AssertionError, ImportError, TritonError, UserError


def run_sections(bench, sections, failures: tuple[type[BaseException], ...], say: Callable[[str], None]) -> list[str]:
    """Runs sections within their time. What had no time is added to bench.skipped.

    Returns: what broke, a line each.
    """
    import torch

    from gpu_timing import OutOfTime

    problems = []
    for section, seconds in sections:
        say(f"  {section.__name__} ...")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        started = time.monotonic()
        try:
            bench.deadline.begin(seconds)
            section(bench)
        except OutOfTime as reason:
            bench.skipped.append(f"{section.__name__}: {reason}")
        except failures as error:
            text = str(error).strip().splitlines() or [""]
            problems.append(f"{section.__name__}: {type(error).__name__}: {text[0]}")
            say(f"    broke: {problems[-1]}")
        else:
            say(f"    {time.monotonic() - started:.1f} s")
    return problems


def device_facts() -> dict[str, object]:
    """The GPU, its driver, and the versions of what is installed."""
    import torch

    facts: dict[str, object] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": sys.version.split()[0],
    }
    facts["versions"] = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts["versions"][name] = importlib.metadata.version(name)
    from measure import commit

    facts["commit"] = commit()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": driver(),
        }
    return facts


def driver() -> str:
    """The driver's version as nvidia-smi has it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown: no nvidia-smi"
    return result.stdout.strip() or "unknown"


def main(argv: Sequence[str] | None = None) -> int:
    """Tests, measures, prints one table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="0.6B alone, few rounds, no other projects' layers")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write there instead of bench/results/gpu/DATE.json")
    parser.add_argument("--tests", choices=("run", "skip", "only"), default="run")
    parser.add_argument("--minutes", type=float, default=9.0, help="the whole run ends within them")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="of: ceilings, linears, quantizers, ...")
    parser.add_argument("--dry_run", action="store_true", help="tiny, untimed, interpreted where there is no GPU")
    arguments = parser.parse_args(argv)
    started = time.monotonic()

    import torch

    if not torch.cuda.is_available():
        if not arguments.dry_run:
            print("gpu_proof: no NVIDIA GPU is usable by torch here; nothing was measured.", file=sys.stderr)
            return 2
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports a kernel
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as folder:
        environment = make_importable(Path(folder))
        return _prove(arguments, environment, started)


def all_sections() -> list[tuple[Callable, float]]:
    """(section, seconds that it may use), in the order of their worth."""
    import gpu_models as models
    import gpu_sections as kernels

    return [
        (kernels.ceilings, 10),
        (kernels.linears, 90),
        (kernels.quantizers, 60),
        (kernels.vectors, 40),
        (kernels.grouped_vectors, 40),
        (models.decoding, 110),
        (kernels.relations, 30),
        (kernels.vocabulary, 30),
        (models.training, 60),
        (kernels.weights, 30),
        (kernels.products, 30),
    ]


def _prove(arguments, environment: dict[str, str], started: float) -> int:
    from gpu_sections import Bench
    from gpu_timing import CudaTimer, Deadline, DryTimer, show
    from measure import write_json
    from random_models import SHAPES

    sections = all_sections()
    known = [section.__name__ for section, _ in sections]
    unknown = set(arguments.only or ()) - set(known)
    if unknown:
        print(f"--only: expected names out of {', '.join(known)}; got {', '.join(sorted(unknown))}.", file=sys.stderr)
        return 1
    dry = arguments.dry_run
    seconds = 60 * arguments.minutes - REPORT_SECONDS
    tested = None
    if arguments.tests != "skip" and not dry:
        limit = seconds if arguments.tests == "only" else min(TEST_SECONDS, seconds / 2)
        files = sorted((ROOT / "tests").glob("test_gpu_*.py"))
        files = [file for file in files if file.name not in ("test_gpu_compile.py", "test_gpu_proof.py")]  # need no GPU
        from bitdistill.cpus import available_cpus

        processes = max(1, min(14, available_cpus() - 2))
        print(f"{len(files)} test files on the device, {processes} processes, {limit:.0f} s at most", flush=True)
        tested = run_tests(ROOT, files, environment, limit, processes)
        print("  " + (", ".join(f"{count} {word}" for word, count in tested.counts.items()) or "nothing ran"))
        for line in tested.skipped:
            print(f"  skipped: {line}")
        if tested.problems:
            print("\n".join(["Not green: no speed is measured.", *tested.problems]))
            return 1
        if arguments.tests == "only":
            return 0
    names = ["tiny"] if dry else ["0.6B"] if arguments.quick else ["0.6B", "4B", "1.7B"]
    import torch

    torch.manual_seed(0)
    deadline = Deadline(1e9 if dry else seconds - (time.monotonic() - started))
    bench = Bench(
        timer=DryTimer() if dry else CudaTimer(rounds=7 if arguments.quick else 15),
        deadline=deadline,
        device="cuda" if torch.cuda.is_available() else "cpu",
        tokens=32 if dry else 16_384,
        shapes={name: SHAPES[name] for name in names},
        quick=arguments.quick,
    )
    chosen = [
        (section, share) for section, share in sections if section.__name__ in {"ceilings", *(arguments.only or known)}
    ]
    problems = run_sections(bench, chosen, broken(), lambda line: print(line, flush=True))
    if not dry:
        print("\n" + show(bench.rows))
    for line in bench.skipped:
        print(f"not run: {line}")
    for line in problems:
        print(f"BROKE: {line}")
    if dry:
        print(f"dry run: {len(bench.rows)} rows in {time.monotonic() - started:.0f} s, {len(problems)} sections broke")
        return 1 if problems else 0
    counted = [row for row in bench.rows if row.met is not None]
    print(f"{sum(row.met for row in counted)} of {len(counted)} targets met, {time.monotonic() - started:.0f} s")
    path = arguments.json or ROOT / "bench/results/gpu" / f"{datetime.now(UTC):%Y-%m-%d_%H%M}.json"
    write_json(path, result(bench, tested, problems, time.monotonic() - started))
    print(f"written: {path}")
    return 1 if problems else 0


def result(bench, tested: Tested | None, problems: list[str], seconds: float) -> dict[str, object]:
    """All that is known after a run, as plain values."""
    return {
        **device_facts(),
        "copy_gigabytes_per_second": bench.copy_bandwidth / 1e9,
        "bf16_teraflops": bench.matrix_rate / 1e12,
        "seconds": seconds,
        "tests": "skipped by --tests skip" if tested is None else vars(tested),
        "rows": [row.json() for row in bench.rows],
        "not_run": bench.skipped,
        "broke": problems,
    }


if __name__ == "__main__":
    sys.exit(main())
