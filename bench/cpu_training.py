"""Training on a CPU: steps of the main job compared with an older commit and with full-precision training, and with the
targets.

    python bench/real_model.py DIR
    python bench/cpu_training.py --model DIR [--rounds 2] [--steps 2] [--isa AVX512_CORE_BF16 AVX2] [--json FILE]
    python bench/cpu_training.py --model DIR --losses 200 --plot docs/cpu_training_losses.png

Every step is done by the main job's own functions, in a process of its own (bench/training_step.py). Variants take turns,
and a figure is the median over all steps of all rounds. "before" is commit BEFORE of this repository: ternary layers in
plain PyTorch, the head in fp32, DeepSpeed ZeRO-1 on the one rank. Instruction sets are forced for oneDNN, MKL, ATen and the
project's own kernels alike. The targets were set for a processor with AVX512-VNNI and AVX512-BF16. On a processor with AMX,
which is even faster at bf16, they are judged with AMX switched off, and the machine as it is ("native") is shown beside
them.

On a machine that others use as well, wall-clock time says little: `--clock cpu --threads 1` counts the processor's seconds.

The last lines are the table of the targets; the exit status is 1 if one is missed.
"""

from bitdistill.distributed import openmp

openmp.wait_briefly()  # before anything loads torch

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import cores, machine, table, write_json

ROOT = Path(__file__).resolve().parents[1]
BEFORE = "9c03513"
VNNI, AVX2, NATIVE = "AVX512_CORE_BF16", "AVX2", "native"
MASKS = {
    NATIVE: {},
    VNNI: {"ONEDNN_MAX_CPU_ISA": VNNI, "BITDISTILL_CPU_FEATURES": "avx512_vbmi"},
    "AVX512_CORE_VNNI": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "BITDISTILL_CPU_FEATURES": "avx512_vbmi"},
    AVX2: {
        "ONEDNN_MAX_CPU_ISA": AVX2,
        "MKL_ENABLE_INSTRUCTIONS": AVX2,
        "ATEN_CPU_CAPABILITY": "avx2",
        "BITDISTILL_CPU_FEATURES": "avx2",
        "NUMBA_CPU_NAME": "haswell",  # else the compiler takes whatever instructions this processor has
        "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c",
    },
}
CLOCKS = {"wall": "perf_counter", "cpu": "process_time"}
STEPS: dict[str, dict[str, Any]] = {
    "before": {"engine": "deepspeed", "kernels": "reference"},
    "exact": {"backward": "exact", "head": "auto"},
    "fast": {"backward": "fast", "head": "auto"},
    "full fp32": {
        "ternary": False,
        "head": "auto",
    },  # the better head is a part of the best full-precision training, too
    "full bf16": {"ternary": False, "precision": "bf16"},
    "task before": {"stage": "distill", "engine": "deepspeed", "kernels": "reference"},
    "task": {"stage": "distill", "backward": "fast", "head": "auto", "grouped": True},
    "task, random rows": {"stage": "distill", "backward": "fast", "head": "auto"},
}
# (instruction set, what, figure of which variant over which, at least)
TARGETS = [
    (VNNI, "stage-2 step, fast, against before", "seconds", "before", "fast", 4.0),
    (VNNI, "stage-2 step, exact, against before", "seconds", "before", "exact", 2.0),
    (VNNI, "stage-2 step, fast, against full precision fp32", "seconds", "full fp32", "fast", 2.5),
    (VNNI, "stage-2 step, fast, against full precision bf16", "seconds", "full bf16", "fast", 1.3),
    (VNNI, "task step, both terms of distillation, against before", "seconds", "task before", "task", 3.0),
    (VNNI, "BitLinear, exact, against nn.Linear fp32", "layer", "linear fp32", "exact", 1.5),
    (VNNI, "BitLinear, fast, against nn.Linear fp32", "layer", "linear fp32", "fast", 3.0),
    (AVX2, "BitLinear, exact, against nn.Linear fp32", "layer", "linear fp32", "exact", 1.2),
    (AVX2, "BitLinear, fast, against nn.Linear fp32", "layer", "linear fp32", "fast", 1.8),
    (AVX2, "stage-2 step, fast, against before", "seconds", "before", "fast", 2.0),
    (VNNI, "peak memory of a stage-2 step, below full precision fp32", "peak_bytes", "full fp32", "fast", 1.0),
]


def checkout_before(folder: Path) -> dict[str, str] | None:
    """The package as it was at BEFORE, in `folder`: the environment that imports it, None without the commit."""
    archive = subprocess.run(
        ["git", "archive", BEFORE, "bitdistill", "kernels", "distributed"], cwd=ROOT, capture_output=True
    )
    if archive.returncode:
        return None
    tree = folder / "before"
    tree.mkdir()
    subprocess.run(["tar", "x"], cwd=tree, input=archive.stdout, check=True)
    for name in ("kernels", "distributed"):
        link = tree / "bitdistill" / name
        if not link.exists():
            link.symlink_to(tree / name)
    return {"PYTHONPATH": str(tree)}


def child(script: str, spec: dict[str, Any], environment: dict[str, str], threads: int) -> dict[str, Any]:
    """What a script of this folder prints as its last line."""
    surroundings = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    output = subprocess.run(
        [sys.executable, str(ROOT / "bench" / script), json.dumps(spec)],
        env=os.environ | surroundings | environment,
        capture_output=True,
        text=True,
    )
    if output.returncode:
        raise SystemExit(f"cpu_training: {script} {spec} failed:\n{output.stderr[-4000:]}")
    return json.loads(output.stdout.splitlines()[-1])


class Measured:
    """All figures: {instruction set: {variant: [what each round's process said]}}.

    Args:
        arguments: the command line's.
        folder: for the older package and what runs write.
    """

    def __init__(self, arguments: argparse.Namespace, folder: Path):
        self.arguments, self.folder = arguments, folder
        self.corpus = folder / "corpus.txt"
        texts = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
        given = arguments.corpus
        self.corpus.write_text(given.read_text() if given else "\n".join(path.read_text() for path in sorted(texts)))
        self.before = checkout_before(folder)
        self.found: dict[str, dict[str, list]] = {}

    def step(self, isa: str, name: str, **changes: Any) -> dict[str, Any]:
        """One process of a variant."""
        spec = {"model": str(self.arguments.model.resolve()), "corpus": str(self.corpus), "steps": self.arguments.steps}
        spec |= STEPS[name] | changes
        environment = dict(MASKS[isa])
        if spec.get("engine") == "deepspeed" and self.before:
            environment |= self.before
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            return child("training_step.py", spec | {"folder": folder}, environment, self.arguments.threads)

    def rounds(self) -> None:
        """Every variant on every instruction set, in turn; full bf16 only where there are instructions for it."""
        for turn in range(self.arguments.rounds):
            for isa in self.arguments.isa:
                of = self.found.setdefault(isa, {})
                for name in self.arguments.variants:
                    if name == "full bf16" and isa in (AVX2, "AVX512_CORE_VNNI"):
                        continue
                    of.setdefault(name, []).append(self.step(isa, name))
                    last = of[name][-1]
                    spent = (
                        f"{wall:.2f} ({cpu:.2f} of CPU)"
                        for wall, cpu in zip(last["seconds"], last["cpu_seconds"], strict=True)
                    )
                    print(f"round {turn + 1}, {isa}, {name}: {', '.join(spent)} s", flush=True)
                layer = child(
                    "layer_step.py",
                    {"rounds": 7, "clock": CLOCKS[self.arguments.clock]},
                    MASKS[isa],
                    self.arguments.threads,
                )
                of.setdefault("layer", []).append(layer)

    def figure(self, isa: str, kind: str, variant: str) -> float | None:
        """Median of a variant's seconds or bytes, or of the layers' seconds."""
        of = self.found.get(isa, {})
        if kind == "layer":
            values = [value for one in of.get("layer", []) for value in one.get(variant, [])]
        elif kind == "seconds":
            seconds = "cpu_seconds" if self.arguments.clock == "cpu" else "seconds"
            values = [value for one in of.get(variant, []) for value in one[seconds]]
        else:
            values = [one[kind] for one in of.get(variant, [])]
        return statistics.median(values) if values else None

    def ratio(self, isa: str, kind: str, theirs: str, ours: str) -> float | None:
        """Above 1 ours is better."""
        a, b = self.figure(isa, kind, theirs), self.figure(isa, kind, ours)
        return None if a is None or b is None else a / b


def target_rows(measured: Measured) -> list[dict[str, Any]]:
    """A row a target: {"isa", "what", "target", "ratio", "native"}; ratio None where it was not measured."""
    rows = []
    for isa, what, kind, theirs, ours, target in TARGETS:
        ratio, native = (measured.ratio(where, kind, theirs, ours) for where in (isa, NATIVE))
        rows.append(
            {"isa": isa, "what": what, "target": target, "ratio": ratio, "native": native if isa == VNNI else None}
        )
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """The table of the targets."""

    def times(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f} x"

    lines = [["what", "instruction set", "target", "measured", "", "this machine as it is"]]
    for row in rows:
        verdict = "not measured" if row["ratio"] is None else "holds" if row["ratio"] >= row["target"] else "missed"
        target = f">= {row['target']:g} x"
        lines.append([row["what"], row["isa"], target, times(row["ratio"]), verdict, times(row["native"])])
    return table(lines, "<<>><>")


def show_medians(measured: Measured) -> str:
    """Seconds and resident memory of every variant, on every instruction set."""
    lines = [["step", "instruction set", "s", "tokens/s", "peak MB"]]
    for isa, of in measured.found.items():
        for name in of:
            if name != "layer":
                seconds, peak = measured.figure(isa, "seconds", name), measured.figure(isa, "peak_bytes", name)
                tokens = "" if name.startswith("task") else f"{1024 / seconds:.0f}"
                lines.append([name, isa, f"{seconds:.2f}", tokens, f"{peak / 1e6:,.0f}"])
        for name in ("linear fp32", "linear bf16", "exact", "fast"):
            seconds = measured.figure(isa, "layer", name)
            lines.append([f"layer, {name}", isa, "-" if seconds is None else f"{seconds:.4f}", "", ""])
    return table(lines, "<<>>>")


def show_parts(measured: Measured) -> str:
    """Seconds of each part of a stage-2 step, before and now."""
    found = {
        name: measured.step(NATIVE, name, profile=True, clock=CLOCKS[measured.arguments.clock])["parts"]
        for name in ("before", "exact", "fast")
    }
    names = sorted(
        {part for parts in found.values() for part in parts}, key=lambda part: -found["before"].get(part, 0.0)
    )
    lines = [["part of a stage-2 step, s", *found]]
    for name in [*names, "all"]:
        values = (sum(parts.values()) if name == "all" else parts.get(name, 0.0) for parts in found.values())
        lines.append([name, *(f"{value:.2f}" for value in values)])
    return table(lines, "<>>>")


def draw_losses(measured: Measured, steps: int, blocks: int, plot: Path) -> None:
    """Cross-entropy over the steps of stage 2 on the same blocks, exact against fast."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, style in (("exact", "-"), ("fast", "--")):
        losses = measured.step(NATIVE, name, steps=steps - 1, blocks=blocks)["losses"]
        axes.plot(range(1, len(losses) + 1), losses, style, label=f"bit_linear_backward {name}", linewidth=1.2)
    axes.set(xlabel=f"step of {blocks} x 128 tokens", ylabel="cross-entropy", title="SmolLM2-135M, stage 2 on a CPU")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(plot, dpi=120)


def main() -> int:
    """Measures, prints, and says with its status whether a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--model", type=Path, required=True, help="a Hugging Face folder: bench/real_model.py makes one"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each process, after a first one")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: for a busy machine, with --threads 1"
    )
    parser.add_argument("--isa", nargs="+", default=[VNNI, AVX2, NATIVE], choices=list(MASKS))
    parser.add_argument("--variants", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--corpus", type=Path, help="text for stage 2; this project's own documentation by default")
    parser.add_argument("--profile", action="store_true", help="also the seconds of each part, before and now")
    parser.add_argument("--losses", type=int, metavar="STEPS", help="draws losses instead, exact against fast")
    parser.add_argument("--blocks", type=int, default=8, help="of 128 tokens in a step whose losses are drawn")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "cpu_training_losses.png")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = Measured(arguments, Path(folder))
        if arguments.losses:
            draw_losses(measured, arguments.losses, arguments.blocks, arguments.plot)
            return 0
        load = os.getloadavg()[0]
        measured.rounds()
        parts = show_parts(measured) if arguments.profile else ""
    rows = target_rows(measured)
    print(
        f"{arguments.threads} threads, load before {load:.1f}; medians of {arguments.rounds} rounds of {arguments.steps} steps"
    )
    print("\n\n".join(filter(None, [show_medians(measured), parts, show(rows)])))
    if arguments.json:
        write_json(arguments.json, {"machine": machine(), "load": load, "targets": rows, "found": measured.found})
    return 1 if any(row["ratio"] is not None and row["ratio"] < row["target"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
