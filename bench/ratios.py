"""Runs every `track_` benchmark of bench/suite once and prints {name: {"value", "unit"}} as JSON.

    python bench/ratios.py [--only NAME ...]

Ratios (unit "x ...", above 1 is better) compare two things that are timed alternately in one process, which a noisy machine
affects little. The other figures are counts, exact or nearly so, where less is better. regressions.py compares both between
two commits.
"""

import argparse
import importlib
import inspect
import itertools
import json
import sys
from pathlib import Path

SUITE = Path(__file__).resolve().parent / "suite"


def benchmarks(only: list[str]) -> dict[str, type]:
    """`file.Class` -> the class, of every file of the suite, or of those named."""
    sys.path.insert(0, str(SUITE.parent))
    found = {}
    for path in sorted(SUITE.glob("*.py")):
        if path.stem == "__init__" or (only and path.stem not in only):
            continue
        module = importlib.import_module(f"suite.{path.stem}")
        for name, benchmark in inspect.getmembers(module, inspect.isclass):
            if benchmark.__module__ == module.__name__ and not name.startswith("_"):
                found[f"{path.stem}.{name}"] = benchmark
    return found


def combinations(benchmark: type) -> list[tuple]:
    """The parameters that asv would run a benchmark with."""
    parameters = getattr(benchmark, "params", ())
    axes = parameters if parameters and isinstance(parameters[0], tuple) else [parameters] if parameters else []
    return list(itertools.product(*axes))


def figures(only: list[str]) -> dict[str, dict]:
    """Name -> {"value", "unit"}; those that do not apply here are left out, and named on stderr."""
    found = {}
    for name, benchmark in benchmarks(only).items():
        methods = [method for method in dir(benchmark) if method.startswith("track_")]
        for values in combinations(benchmark) if methods else []:
            label = f"{name}({', '.join(map(str, values))})"
            one = benchmark()
            try:
                one.setup(*values)
            except NotImplementedError as reason:
                print(f"{label}: n/a, {reason}", file=sys.stderr)
                continue
            for method in methods:
                value = getattr(one, method)(*values)
                found[f"{label}.{method}"] = {"value": value, "unit": getattr(benchmark, method).unit}
            if hasattr(one, "teardown"):
                one.teardown(*values)
    return found


def main() -> int:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="files of bench/suite")
    print(json.dumps(figures(parser.parse_args().only)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
