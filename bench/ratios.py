"""Runs every `track_..._ratio...` benchmark of bench/suite once and prints {name: value} as JSON.

    python bench/ratios.py [--only NAME ...]

These are ratios of two things timed alternately in one process, which survive a noisy machine; regressions.py compares
them between two commits.
"""

import argparse
import importlib
import inspect
import itertools
import json
import sys
from pathlib import Path

SUITE = Path(__file__).resolve().parent / "suite"


def ratios(only: list[str]) -> dict[str, float]:
    """Name -> ratio; those that do not apply here are left out, and named on stderr."""
    sys.path.insert(0, str(SUITE.parent))
    found = {}
    for path in sorted(SUITE.glob("*.py")):
        if path.stem in ("__init__", "side_by_side") or (only and path.stem not in only):
            continue
        module = importlib.import_module(f"suite.{path.stem}")
        for name, benchmark in inspect.getmembers(module, inspect.isclass):
            methods = [method for method in dir(benchmark) if method.startswith("track_") and "ratio" in method]
            if benchmark.__module__ != module.__name__ or not methods:
                continue
            parameters = getattr(benchmark, "params", ())
            axes = parameters if parameters and isinstance(parameters[0], tuple) else [parameters] if parameters else []
            for values in itertools.product(*axes):
                label = f"{path.stem}.{name}({', '.join(map(str, values))})"
                one = benchmark()
                try:
                    one.setup(*values)
                    for method in methods:
                        found[f"{label}.{method}"] = getattr(one, method)(*values)
                except (NotImplementedError, ImportError) as reason:
                    print(f"{label}: n/a, {reason}", file=sys.stderr)
    return found


def main() -> int:
    """Prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="files of bench/suite")
    print(json.dumps(ratios(parser.parse_args().only)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
