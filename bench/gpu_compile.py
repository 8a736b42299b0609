"""Compiles every GPU kernel with its production tiles, for GPUs that need not be there, and prints what came out.

    python bench/gpu_compile.py [NAME ...] [--targets sm_90 gfx942] [--json FILE]

There is one row per kernel, shape and GPU: registers per thread, spilled bytes, shared memory of a block, the int8
tensor-core instruction. The exit status is 1 if a kernel spills, needs more shared memory than the GPU has, or does not use
the instruction.
"""

import argparse
import importlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

MODULES = sorted(
    path.stem
    for path in (Path(__file__).resolve().parent / "gpu_launches").glob("*.py")
    if path.stem not in ("__init__", "launch")
)


def main() -> int:
    """Compiles, prints, and says with its status whether all is well."""
    os.environ.pop("TRITON_INTERPRET", None)  # before the kernels are imported
    from gpu_launches.launch import TARGETS, compile_launch

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("modules", nargs="*", metavar="NAME", help=f"files of kernels/gpu: {', '.join(MODULES)}")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", metavar="FILE", help="write the table there, too")
    arguments = parser.parse_args()
    unknown = set(arguments.modules) - set(MODULES)
    if unknown:
        parser.error(f"expected names out of {', '.join(MODULES)}; got {', '.join(sorted(unknown))}")

    started, rows, failed = time.perf_counter(), [], 0
    print(f"{'kernel':<38}{'shape':<44}{'part':<8}{'regs':>5}{'spills':>7}{'shared':>9}  int8 instruction, problems")
    for name in arguments.modules or MODULES:
        module = importlib.import_module(f"gpu_launches.{name}")
        for launch in module.production_launches():
            for target in arguments.targets:
                if launch.only and target not in launch.only:
                    continue
                row = compile_launch(launch, target)
                rows.append({"module": name, **asdict(row)})
                failed += bool(row.problems)
                print(
                    f"{row.kernel:<38}{row.shape:<44}{target:<8}{row.registers:>5}{row.spills:>7}{row.shared_bytes:>9,}"
                    f"  {row.instruction}{'  <-- ' + '; '.join(row.problems) if row.problems else ''}",
                    flush=True,
                )
    print(f"{len(rows)} compiled in {time.perf_counter() - started:.0f} s, {failed} with a problem")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
