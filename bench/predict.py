"""Rows per second of `predict`: a packed student on the CPU beside transformers with the same base in bf16 and fp32.

    python bench/predict.py --model FOLDER --rows FILE [--task sst2] [--max_rows 200] [--threads 2] [--student FILE] [--json FILE]

The student is the base after stage 1, untrained: its speed is that of a trained one. Both see the same prompts, cut to the
same length. transformers answers batches of 1, 8 and 32 rows of similar length, and its best is taken. Both are warmed up by
the first rows. `predict` is timed as a user has it, from rows to labels; transformers from tokens to labels.

`--isa AVX512_CORE_VNNI` hides the newer instructions from both (`MASKS` of cpu_training.py). Where there are none for bf16,
oneDNN computes it so slowly that `--their_rows 16` may be all one can wait for. On a machine that others use as well, wall-clock
time says little: `--clock cpu --threads 1` counts the processor's seconds.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

import bitdistill
from bitdistill.data.tasks import encode_prompts
from bitdistill.evaluation.scoring import classify
from bitdistill.prompts import label_tokens
from cpu_training import CLOCKS, MASKS, NATIVE
from measure import machine, table, write_json

BATCHES = (1, 8, 32)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WARM_UP = 16


def pack(model_folder: str, task, path: Path, max_length: int) -> None:
    """Writes the base model after stage 1 as a packed file."""
    model, tokenizer = bitdistill.load_language_model(model_folder), bitdistill.load_tokenizer(model_folder)
    bitdistill.refine(model)
    bitdistill.write(path, model, tokenizer, task=task, max_length=max_length)


def ours(path: Path, rows, threads: int, clock) -> dict[str, float]:
    """Rows per second of `Runtime.predict`."""
    runtime = bitdistill.load(path, threads=threads)
    runtime.predict(rows[:WARM_UP])
    runtime.forget()
    started = clock()
    found = runtime.predict(rows)
    seconds = clock() - started
    stats = runtime.stats
    computed = stats.prompt_tokens - stats.cached_tokens
    runtime.close()
    return {"rows_per_second": len(found) / seconds, "seconds": seconds, "tokens_computed": computed}


def last_logits(model):
    """`scoring.torch_logits` of right-padded rows, with the LM head at the wanted positions alone, as a fair peer has it."""

    @torch.inference_mode()
    def logits_of(rows, count):
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        places = torch.tensor([range(len(row) - count, len(row)) for row in rows])
        return model.lm_head(hidden[torch.arange(len(rows))[:, None], places]).float().numpy()

    return logits_of


def theirs(model_folder: str, dtype: str, task, dataset, max_length: int, clock) -> dict[str, float]:
    """Rows per second of transformers, by the name of the runner."""
    model = bitdistill.load_language_model(model_folder, DTYPES[dtype]).eval()
    tokenizer = bitdistill.load_tokenizer(model_folder)
    prompts, _ = encode_prompts(task, dataset, tokenizer, max_length)
    logits, words = last_logits(model), label_tokens(task, tokenizer)
    classify(logits, prompts[:WARM_UP], words, WARM_UP)
    rates = {}
    for batch_size in BATCHES:
        started = clock()
        classify(logits, prompts, words, batch_size)
        rates[f"transformers {dtype}, batch {batch_size}"] = len(prompts) / (clock() - started)
    return rates


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--rows", required=True, help="rows of the task")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--max_rows", type=int, default=200)
    parser.add_argument("--their_rows", type=int, help="only so many of the rows for transformers")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--student", help="a packed file, in place of the untrained student")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES), help="of transformers")
    parser.add_argument("--isa", default=NATIVE, choices=list(MASKS), help="hides newer instructions from both")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: for a busy machine, with --threads 1"
    )
    parser.add_argument("--json")
    options = parser.parse_args()
    if mask := {name: value for name, value in MASKS[options.isa].items() if os.environ.get(name) != value}:
        os.execve(
            sys.executable, [sys.executable, *sys.argv], os.environ | mask
        )  # libraries read it when they are loaded
    clock = getattr(time, CLOCKS[options.clock])
    torch.set_num_threads(options.threads)
    task = bitdistill.load_task(options.task)
    dataset = bitdistill.load_rows(task, "validation", options.rows, limit=options.max_rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.student or Path(folder, "student.safetensors"))
        if options.student is None:
            pack(options.model, task, path, options.max_length)
        mine = ours(path, list(dataset), options.threads, clock)
    few, rates = dataset.select(range(min(options.their_rows or len(dataset), len(dataset)))), {}
    for dtype in options.dtypes:
        rates |= theirs(options.model, dtype, task, few, options.max_length, clock)
    rate = mine["rows_per_second"]
    rows = [["runner", "rows/s", "bitdistill is"], ["bitdistill predict", f"{rate:.1f}", ""]]
    rows += [[name, f"{their:.2f}", f"{rate / their:.2f}x"] for name, their in rates.items()]
    print(f"{options.isa}, {options.threads} threads, {options.clock} clock")
    print(table(rows, "<>>"))
    if options.json:
        about = {"rows": len(dataset), "their_rows": len(few), "threads": options.threads, "task": task.name}
        about |= {"isa": options.isa, "clock": options.clock, "model": Path(options.model).name}
        write_json(options.json, {"machine": machine(), **about, "bitdistill": mine, "transformers": rates})


if __name__ == "__main__":
    main()
