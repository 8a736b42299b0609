"""Decoding one sequence at long contexts, by threads and key/value heads: how much of the attention the threads share.

    python bench/decode_attention.py [--kv_heads 1 3 8] [--contexts 256 2048 8192] [--threads 1 2] [--base CHECKOUT] [--json FILE]

A model of LAYERS layers with 16 query heads of 128 (15 where 3 share them), a bf16 cache and a small LM head. Each figure is the
time of a step and, from `Decoder.profile`, its attention and its waiting at barriers, in milliseconds: medians over rounds that
ask all of them in turn. `--base` is another checkout of this project, whose code is measured in the same rounds.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import workers
from measure import cores, machine, table, write_json
from random_models import Shape, write_packed_model
from regressions import importable

LAYERS = 8
STEPS = 5  # of which the fastest one counts, for each round


def shape(kv_heads: int) -> Shape:
    """A model with this many key/value heads."""
    return Shape(LAYERS, 1024, 3072, 16 // kv_heads * kv_heads, kv_heads, vocabulary=2000)


def serve(folder: str, kv_heads: list[int], contexts: list[int], threads: list[int]) -> None:
    """A worker: reads [kv_heads, context, threads] per line, answers with seconds by part."""
    from bitdistill.runtime.cpu import Runtime

    runtimes = {(kv, count): Runtime(Path(folder, f"{kv}.safetensors"), threads=count)
                for kv in kv_heads for count in threads}  # fmt: skip
    caches = {kv: runtimes[kv, threads[0]]._keys_values(1, max(contexts)) for kv in kv_heads}
    print("ready", flush=True)
    for line in sys.stdin:
        kv, context, count = json.loads(line)
        decoder = runtimes[kv, count]._decoder
        steps = [decoder.profile([5], [0], [context - 1], caches[kv]) for _ in range(STEPS)]
        print(json.dumps(min(steps, key=lambda parts: sum(parts.values()))), flush=True)


def main() -> int:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kv_heads", type=int, nargs="+", default=[1, 3, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 2048, 8192])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, cores()}))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--base", type=Path, help="another checkout, to be measured beside this one")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for kv in given.kv_heads:
            write_packed_model(Path(folder, f"{kv}.safetensors"), shape(kv), "2bit", "int8")
        arguments = [folder, given.kv_heads, given.contexts, given.threads]
        asked = {"this": workers.start(__file__, arguments)}
        if given.base is not None:
            path = str(importable(given.base, Path(folder, "base")))
            asked["base"] = workers.start(__file__, arguments, PYTHONPATH=path)
        found = {}
        for turn in range(given.rounds + 1):
            for kv in given.kv_heads:
                for context in given.contexts:
                    for threads in given.threads:
                        for name, worker in asked.items():
                            parts = workers.ask(worker, [kv, context, threads])
                            if turn:  # the first one warms up
                                found.setdefault((kv, context, threads, name), []).append(parts)
        for worker in asked.values():
            workers.end(worker)
    results, cells = [], [["kv heads", "context", "threads", "code", "ms", "attention", "waiting"]]
    for (kv, context, threads, name), rounds in found.items():
        totals = [1e3 * sum(parts.values()) for parts in rounds]
        middle = [1e3 * statistics.median(parts[part] for parts in rounds) for part in ("attention", "waiting")]
        results.append({"kv_heads": kv, "context": context, "threads": threads, "code": name, "rounds": rounds})
        cells.append([str(kv), f"{context:,}", str(threads), name,
                      f"{statistics.median(totals):.2f} [{min(totals):.2f}, {max(totals):.2f}]",
                      *(f"{value:.2f}" for value in middle)])  # fmt: skip
    print(table(cells, ">>><>>>"))
    if given.json:
        write_json(given.json, {"machine": machine(), "layers": LAYERS, "results": results})
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        sys.exit(serve(*json.loads(sys.argv[2])))
    sys.exit(main())
