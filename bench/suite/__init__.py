"""The benchmarks of which `asv run` keeps a history: one file for each area of the project, one class for each thing that
is timed.

Machines differ and are noisy. What is compared over time are therefore ratios of two things that are measured side by side
in one process (unit "x ..."; above 1 ours is better), and exact counts (bytes, bits, mismatches). Absolute times are kept
beside them. The project is imported in `setup`, inside `newer_than_some_commits`, so that an older commit without something
is "n/a" there and not an error. Inputs are only ever added: a parameter that changed would be another benchmark under an
old name.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # distributed/openmp.py's, also for commits that are older
os.environ.setdefault("KMP_BLOCKTIME", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # measure.py, random_models.py
# asv's forkserver imports this once and forks for each benchmark: libraries are loaded here, the project never is.
for name in ("numba", "transformers.models.qwen3.modeling_qwen3"):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)


@contextlib.contextmanager
def newer_than_some_commits() -> Iterator[None]:
    """An import that fails inside makes a benchmark "n/a": this commit does not have it yet.

    tests/test_bench.py walks these imports, so at the commit that the suite belongs to none can fail.
    """
    try:
        yield
    except ImportError as reason:
        raise NotImplementedError(str(reason)) from None


def shown(name: str, unit: str | None = None) -> Callable:
    """Gives a benchmark the name by which bench/history.py shows it, and the unit of its figure."""

    def mark(function: Callable) -> Callable:
        function.pretty_name = name
        if unit is not None:
            function.unit = unit
        return function

    return mark
