"""A wider base model for the embedded demo: twice the width, heads and MLP, the same tokenizer, corpus and steps.

    python bench/wide_demo.py --seed 0 [--output runs/wide]

Makes OUTPUT/SEED/base with the main job. A study uses it as `teacher.model`, to see what a larger teacher with another
width and number of heads is worth.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOUBLED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def main() -> int:
    """Lets the main job make the demo's files, widens the configuration in them, and lets it train that."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "wide")
    arguments = parser.parse_args()
    folder = arguments.output / str(arguments.seed)
    job = [sys.executable, str(ROOT / "bitdistill" / "train.py"), "--recipe=demo", "--stage=base", "--report=false"]
    job += [f"--output_dir={folder}", f"--seed={arguments.seed}"]
    subprocess.run([*job, "--max_steps=1"], check=True)
    path = folder / "demo" / "base" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {name: 2 * config[name] for name in DOUBLED}, indent=1))
    subprocess.run(job, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
