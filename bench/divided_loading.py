"""How much memory a rank needs while it loads a student: whole, and divided among two ranks as at ZeRO 3.

    python bench/divided_loading.py [--layers 12] [--json FILE]

A Qwen3-shaped student with random weights is saved, and loaded on two ranks in both ways, in processes of their own. It counts
how much a rank's own memory grows at most during `load_student`. The pages of the file, which is mapped into memory and which
the system drops when it needs the room, are no part of it.
"""

from bitdistill.distributed import openmp

openmp.wait_briefly()  # before anything loads torch

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bitdistill.distributed import presets, process_group
from measure import machine, peak_anonymous_growth, table, write_json

SHAPE = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
SHAPE |= {"head_dim": 64, "vocab_size": 8192, "tie_word_embeddings": True}


def save(folder: Path, layers: int) -> int:
    """Writes a student with random weights. Returns its bytes."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from bitdistill.student.refine import refine, save_student

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, num_hidden_layers=layers))
    refine(model)
    save_student(folder, model)
    return sum(4 * parameter.numel() for parameter in model.parameters())


def on_ranks(student: Path, divided: bool, findings: Path) -> None:
    """What each rank does: rank 0 writes the bytes that each grew by at most."""
    process_group.initialize("cpu")
    from bitdistill.student.refine import load_student

    section = presets.deepspeed_config(3, precision="fp32", device="cpu")["zero_optimization"] if divided else None
    kept = []
    grew = peak_anonymous_growth(lambda: kept.append(load_student(student, section)))
    found = process_group.gather(grew)
    if process_group.is_main():
        findings.write_text(json.dumps(found), encoding="utf-8")
    process_group.barrier()
    process_group.shutdown()


def launch(student: Path, divided: bool) -> list[int]:
    """Loads the student on two ranks. Returns the bytes of each."""
    with tempfile.TemporaryDirectory() as folder:
        findings = Path(folder) / "found.json"
        command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"]
        command += ["--master_port", str(process_group.free_port()), __file__]
        command += ["--student", str(student), "--findings", str(findings), *(["--divided"] if divided else [])]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        return json.loads(findings.read_text(encoding="utf-8"))


def main() -> int:
    """Returns 1 when a rank that loads its part needs more than three quarters of the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12, help="of the student (default: 12)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    for name in ("--student", "--findings"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--divided", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(process_group.without_local_rank(sys.argv[1:]))
    if options.student:
        on_ranks(options.student, options.divided, options.findings)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        size = save(Path(folder) / "student", options.layers)
        found = {divided: launch(Path(folder) / "student", divided) for divided in (False, True)}
    rows = [["loaded", "rank 0, MB", "rank 1, MB", "of the model"]]
    for divided, grew in found.items():
        name = "divided among two ranks" if divided else "whole on each rank"
        rows.append([name, *(f"{one / 1e6:,.0f}" for one in grew), f"{100 * max(grew) / size:.0f} %"])
    print(table(rows, "<>>>"))
    print(f"the model: {size / 1e6:,.0f} MB in fp32; {machine()}")
    if options.json:
        write_json(options.json, {"bytes": size, "whole": found[False], "divided": found[True]})
    return int(max(found[True]) > 0.75 * size)


if __name__ == "__main__":
    sys.exit(main())
