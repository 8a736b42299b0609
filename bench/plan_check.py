"""The planner against measured peaks: resident memory of training steps on this CPU beside what `bitdistill plan` counts.

    python bench/real_model.py DIR
    python bench/plan_check.py --model DIR [--json FILE]

Steps are the main job's own (bench/training_step.py), in a process each: stage 2 of the model with two sizes of micro-step
and with the teacher's states, stage 3 with a teacher, full-precision training, stage 2 of a Qwen3-shaped model with random
weights, and that on two ranks at every ZeRO stage. The exit status is 1 when the plan is more than 15 % off anywhere.
"""

from bitdistill.distributed import openmp

openmp.wait_briefly()  # before anything loads torch

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bitdistill.planning import Setting, Shape, Work, memory_parts, shape_of
from measure import cores, machine, table, write_json

ROOT = Path(__file__).resolve().parents[1]
BOUND = 0.15
BLOCK_SIZE, ROWS, LONGEST_ROW = 128, 32, 23  # of training_step.py
QWEN3 = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
QWEN3 |= {"num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 2048, "tie_word_embeddings": True}


def cases(model: Path, other: Path) -> dict[str, dict[str, Any]]:
    """{name: the specification of a step}."""
    stage_2 = {"model": str(model), "stage": "pretrain", "head": "bf16"}
    return {
        "stage 2, 8 x 128": stage_2 | {"blocks": 8},
        "stage 2, 2 x 128": stage_2 | {"blocks": 2},
        "stage 2, 8 x 128, states and teacher forcing": stage_2 | {"states": True},
        "stage 2, 8 x 128, Qwen3 shape": stage_2 | {"model": str(other)},
        "stage 3, 32 short rows": {"model": str(model), "stage": "distill", "head": "bf16"},
        "full precision, fp32, 8 x 128": stage_2 | {"ternary": False},
    } | {
        f"stage 2, 2 x 128, Qwen3 shape, two ranks, ZeRO {zero}": stage_2
        | {"model": str(other), "blocks": 2, "engine": "deepspeed", "zero": zero, "ranks": 2}
        for zero in (0, 1, 2, 3)
    }


def measured_bytes(spec: dict[str, Any], threads: int) -> int:
    """The most resident memory of a step, of the first rank."""
    spec = dict(spec)
    ranks = spec.pop("ranks", 1)
    start = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks > 1 else []
    command = [sys.executable, *start, str(ROOT / "bench" / "training_step.py"), json.dumps(spec)]
    surroundings = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    output = subprocess.run(command, env=surroundings, capture_output=True, text=True)
    if output.returncode:
        raise SystemExit(f"plan_check: {spec} failed:\n{output.stderr[-4000:]}")
    return json.loads(next(line for line in reversed(output.stdout.splitlines()) if line.startswith("{")))["peak_bytes"]


def planned_bytes(spec: dict[str, Any], shape: Shape) -> dict[str, float]:
    """The plan's parts for the step that is measured."""
    distills = spec["stage"] == "distill"
    tokens = ROWS * LONGEST_ROW if distills else spec.get("blocks", 8) * BLOCK_SIZE
    ternary = spec.get("ternary", True)
    states = spec.get("states", False)
    teacher = shape if distills or states else None
    work = Work(shape, 1.0, tokens, tokens, teacher, ternary, states=states, forced=states)
    return memory_parts(work, Setting(spec.get("zero", 0)), spec.get("ranks", 1), "cpu")[0]


def main() -> int:
    """Measures, prints the parts and says with its status whether the plan is off."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--model", type=Path, required=True, help="a Hugging Face folder: bench/real_model.py makes one"
    )
    parser.add_argument("--only", nargs="+", metavar="STEP")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

    rows, found, off = [["step", "measured MB", "planned MB", "off", "parts MB"]], {}, False
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "qwen3"
        shutil.copytree(arguments.model, other, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        vocabulary = AutoConfig.from_pretrained(arguments.model).vocab_size
        AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=vocabulary, **QWEN3)).save_pretrained(other)
        corpus = Path(folder) / "corpus.txt"
        corpus.write_text("\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))))
        wanted = cases(arguments.model.resolve(), other)
        if unknown := set(arguments.only or ()) - set(wanted):
            parser.error(
                f"--only: expected names of {', '.join(map(repr, wanted))}; got {', '.join(map(repr, unknown))}"
            )
        for name in arguments.only or wanted:
            spec = wanted[name]
            with tempfile.TemporaryDirectory(dir=folder) as run:
                spec |= {"folder": run, "corpus": str(corpus), "steps": 1}
                measured = measured_bytes(spec, arguments.threads)
            parts = planned_bytes(spec, shape_of(AutoConfig.from_pretrained(spec["model"])))
            planned = sum(parts.values())
            off |= abs(planned / measured - 1) > BOUND
            found[name] = {"measured_bytes": measured, "planned_bytes": planned, "parts": parts}
            by_part = ", ".join(f"{part} {size / 1e6:.0f}" for part, size in parts.items())
            numbers = [f"{measured / 1e6:,.0f}", f"{planned / 1e6:,.0f}", f"{100 * (planned / measured - 1):+.0f} %"]
            rows.append([name, *numbers, by_part])
            print(rows[-1], flush=True)
    print(table(rows, "<>>><"))
    if arguments.json:
        write_json(arguments.json, {"machine": machine(), "found": found})
    return int(off)


if __name__ == "__main__":
    sys.exit(main())
