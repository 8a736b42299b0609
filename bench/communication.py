"""What two ranks send in an optimizer step: bytes by collective, counted, beside the formula of `bitdistill plan`; and scaling.

    python bench/communication.py [--json FILE]                 bytes of every ZeRO stage, with one and two micro-steps
    python bench/communication.py --scaling [--json FILE]       seconds per step on one rank and on two, weak and strong

The step is the main job's: a Qwen3-shaped student with random weights (6 million, of which 5 in ternary layers), fine-tuned
on random tokens. Every collective that reaches torch.distributed is counted. Its payload of B bytes determines what a rank
sends when N ranks pass parts around a ring, as nccl and gloo do:

    all-reduce 2 B (N-1)/N     reduce-scatter, all-gather B (N-1)/N     broadcast, reduce B         B the bytes of the whole

ZeRO 3 is counted as it is, where the codes of the ternary layers are gathered, and with fp32 weights, as DeepSpeed alone
gathers them: the losses of both must be equal, bit for bit. "large" stands for a model of more than a billion parameters,
for which DeepSpeed keeps nothing gathered between the forward and the backward pass.
"""

from bitdistill.distributed import openmp

openmp.wait_briefly()  # before anything loads torch

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bitdistill.distributed import presets, process_group
from measure import cores, machine, table, write_json

SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 5, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096, "tie_word_embeddings": True}
STEPS, WARM, LENGTH = 6, 3, 64  # steps, of which the first are not counted; tokens of a row
KINDS = {
    "all_reduce": "all-reduce",
    "all_gather_into_tensor": "all-gather",
    "_all_gather_base": "all-gather",
    "all_gather": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
    "_reduce_scatter_base": "reduce-scatter",
    "reduce_scatter": "reduce-scatter",
    "broadcast": "broadcast",
    "reduce": "reduce",
}


SHOWN = ("all-reduce", "reduce-scatter", "all-gather", "reduce", "broadcast")


class Count:
    """Wraps torch.distributed's collectives before DeepSpeed takes hold of them; `sent` is bytes by kind."""

    def __init__(self):
        from torch import distributed as dist

        self.sent: Counter[str] = Counter()
        self.inside = False
        for name in KINDS:
            if hasattr(dist, name):
                setattr(dist, name, self.counting(name, getattr(dist, name)))

    def counting(self, name: str, collective):
        """`collective`, counted unless another one calls it."""

        @functools.wraps(collective)
        def counted(*arguments, **named):
            if self.inside:
                return collective(*arguments, **named)
            self.inside = True
            try:
                self.add(KINDS[name], (*arguments, *named.values()))
                return collective(*arguments, **named)
            finally:
                self.inside = False

        return counted

    def add(self, kind: str, arguments: tuple) -> None:
        """Adds what a rank sends."""
        import torch

        tensors = []
        for argument in arguments:
            tensors += argument if isinstance(argument, list) else [argument]
        sizes = [t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor)]
        ranks = process_group.world_size()
        lists = any(isinstance(argument, list) for argument in arguments)
        whole = sum(sizes) - min(sizes) if lists else max(sizes)  # a list of parts, and this rank's own beside it
        share = {"all-reduce": 2 * (ranks - 1) / ranks, "broadcast": 1.0, "reduce": 1.0}.get(kind, (ranks - 1) / ranks)
        self.sent[kind] += whole * share


def student():
    """A student with random weights; every rank makes the same."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from bitdistill.student.refine import refine

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    refine(model)
    return model


def steps(
    folder: Path, zero: int | None, rows: int, micro_steps: int, divided: bool, count: Count | None, live: bool = True
) -> dict[str, Any]:
    """Takes STEPS steps on the present ranks. Returns bytes by kind and seconds, per step, and the losses.

    With `live` False DeepSpeed leaves no weight gathered between the passes, as in a model of more than a billion parameters.
    """
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    from bitdistill.student import sharing
    from bitdistill.training.distill import Answers
    from bitdistill.training.trainer import StageTrainer, release, training_arguments

    seen: list[tuple[float, Counter]] = []

    class See(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            seen.append((time.perf_counter(), Counter(count.sent) if count else Counter()))

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, SHAPE["vocab_size"], (256, LENGTH), generator=generator).tolist()
    data = Dataset.from_dict({"input_ids": tokens, "labels": tokens, "attention_mask": [[1] * LENGTH] * 256})
    section = None if zero is None else presets.deepspeed_config(zero, precision="fp32", device="cpu")
    if zero == 3:  # the matrices of this small student are divided, as those of a large one are by themselves
        section["zero_optimization"]["stage3_param_persistence_threshold"] = 4 * SHAPE["hidden_size"]
        if not live:
            section["zero_optimization"] |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    arguments = training_arguments(
        folder, deepspeed=section, seed=0, report_to=[], max_steps=STEPS, logging_steps=1, learning_rate=1e-3,
        per_device_train_batch_size=rows, gradient_accumulation_steps=micro_steps,
    )  # fmt: skip
    model = student()
    trainer = StageTrainer(
        objective=Answers(model), stage="distill", run_dir=folder, model=model, args=arguments, train_dataset=data,
        data_collator=lambda rows: {name: torch.tensor([row[name] for row in rows]) for name in rows[0]},
        callbacks=[See()],
    )  # fmt: skip
    trainer.weight_codes = sharing.WeightCodes(model, divided=divided)
    trainer.fit(resume=False)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    release(trainer)
    (first, before), (last, after) = seen[WARM - 1], seen[-1]
    counted = STEPS - WARM
    sent = {kind: (after[kind] - before[kind]) / counted for kind in sorted(after)}
    return {"sent": sent, "seconds": (last - first) / counted, "losses": losses}


def weights() -> tuple[int, int]:
    """(weights in ternary layers, all parameters) of the student."""
    from bitdistill.student.layers import bit_linears

    model = student()
    return sum(layer.weight.numel() for layer in bit_linears(model).values()), sum(
        p.numel() for p in model.parameters()
    )


def on_ranks(specification: dict[str, Any], findings: Path) -> None:
    """What each rank does."""
    count = Count() if process_group.ranks_started() > 1 else None
    process_group.initialize("cpu", alone=count is None)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for case in specification["cases"]:
            found.append(case | steps(Path(folder), count=count, **case))
    if process_group.is_main():
        findings.write_text(json.dumps(found), encoding="utf-8")
    process_group.barrier()
    process_group.shutdown()


def launch(ranks: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs the cases on so many ranks, one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        findings, specification = Path(folder) / "found.json", Path(folder) / "cases.json"
        specification.write_text(json.dumps({"cases": cases}), encoding="utf-8")
        start = [sys.executable]
        if ranks > 1:
            start = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)]
            start += ["--master_port", str(process_group.free_port())]
        command = [*start, __file__, "--specification", str(specification), "--findings", str(findings)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        return json.loads(findings.read_text(encoding="utf-8"))


def bytes_table() -> tuple[str, list[dict[str, Any]]]:
    """Every ZeRO stage, counted beside the formula."""
    from bitdistill.planning import sent_bytes

    stages = [(zero, micro, True, True) for zero in (0, 1, 2, 3) for micro in (1, 2)]
    stages += [(3, 1, True, False), (3, 1, False, True), (3, 2, False, True), (3, 1, False, False)]
    cases = [
        {"zero": zero, "rows": 4 // micro, "micro_steps": micro, "divided": how, "live": live}
        for zero, micro, how, live in stages
    ]
    found, (ternary, all_of_them) = launch(2, cases), weights()
    tied = SHAPE["vocab_size"] * SHAPE["hidden_size"]
    rows = []
    for case in found:
        codes = ternary if case["divided"] else 0
        live = {} if case["live"] else {"live": 0}
        formula = sent_bytes(all_of_them, codes, case["zero"], 2, case["micro_steps"], tied, **live)
        case["formula"], case["total"] = formula, sum(case["sent"].values())
        name = str(case["zero"]) + ("" if case["live"] else ", large") + ("" if case["divided"] else ", weights")
        kinds = [f"{case['sent'].get(kind, 0) / 1e6:.2f}" for kind in SHOWN]
        off = 100 * (case["total"] / formula - 1)
        sums = [f"{case['total'] / 1e6:.2f}", f"{formula / 1e6:.2f}", f"{off:+.1f} %"]
        rows.append([name, str(case["micro_steps"]), *kinds, *sums])
    headings = ["ZeRO", "micro-steps", *SHOWN, "MB in all", "formula", "off"]
    at_3 = [case for case in found if case["zero"] == 3]
    by_codes, by_weights = (sorted(case["losses"] for case in at_3 if case["divided"] is how) for how in (True, False))
    same = by_codes == by_weights
    assert same, "gathering codes has changed the losses"
    return table([headings, *rows], "<" + ">" * 9), found


def scaling_table() -> tuple[str, list[dict[str, Any]]]:
    """Weak: 8 rows per rank. Strong: 8 rows in all."""
    one = {"zero": None, "rows": 8, "micro_steps": 1, "divided": True}
    two = [one | {"zero": zero, "rows": rows} for zero in (1, 3) for rows in (8, 4)]
    alone, shared = launch(1, [one])[0], launch(2, two)
    rows = [["one rank without ZeRO", "8", f"{1e3 * alone['seconds']:.0f}", ""]]
    for case in shared:
        weak = case["rows"] == 8
        efficiency = alone["seconds"] / case["seconds"] / (1 if weak else 2)
        rows.append(
            [f"two ranks, ZeRO {case['zero']}, {'weak' if weak else 'strong'}", str(2 * case["rows"]),
             f"{1e3 * case['seconds']:.0f}", f"{100 * efficiency:.0f} %"]
        )  # fmt: skip
    headings = ["", "rows per step", "ms per step", "of ideal"]
    return table([headings, *rows], "<>>>"), [alone, *shared]


def main() -> int:
    """Returns 1 when what was sent is more than 5 % off the formula."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scaling", action="store_true", help="measure time instead of counting bytes")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--specification", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--findings", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(process_group.without_local_rank(sys.argv[1:]))
    if options.specification:
        on_ranks(json.loads(options.specification.read_text(encoding="utf-8")), options.findings)
        return 0
    text, found = scaling_table() if options.scaling else bytes_table()
    print(text)
    print(f"{machine()['date']}, {machine()['processor']}, {cores()} cores")
    if options.json:
        write_json(options.json, {"found": found})
    return int(any(abs(case["total"] / case["formula"] - 1) > 0.05 for case in found if "formula" in case))


if __name__ == "__main__":
    sys.exit(main())
