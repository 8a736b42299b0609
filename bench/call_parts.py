"""Where the time of a call with many rows goes: a prompt, and a step of a batch, with each of some instruction sets.

    python bench/call_parts.py [--shape 0.6B] [--packing 2bit] [--embedding int8] [--features amx avx512_vbmi] [--threads 1 2]
        [--base CHECKOUT]

A process for each instruction set; all of them are alive, and a round asks each in turn. `--base` is another checkout of this
project, whose code is measured in the same rounds. Times are the fastest of some rounds,
in milliseconds, with their parts (`Decoder.profile`: "waiting" is time at barriers). Logits are wanted of a prompt's last token,
and of every sequence of the batch, whose caches hold CONTEXT tokens.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import workers
from measure import cores, machine, table, write_json
from random_models import SHAPES, write_packed_model
from regressions import importable

CONTEXT = 64
CALLS = {
    "prompt of 128": 128,
    "prompt of 512": 512,
    "batch of 4": -4,
    "batch of 16": -16,
}  # tokens, or minus the sequences
PARTS = ("qkv", "o", "gate_up", "down", "attention", "norms", "head", "waiting")


def serve(path: str, threads: int) -> None:
    """A worker: reads a number of CALLS per line, answers with seconds by part."""
    from bitdistill.runtime.cpu import Runtime

    runtime = Runtime(path, threads=threads)
    decoder = runtime._decoder
    caches = {size: runtime._keys_values(max(1, -size), CONTEXT + max(1, size)) for size in CALLS.values()}
    print("ready", flush=True)
    for line in sys.stdin:
        size = int(line)
        if size > 0:
            call = [list(range(11, 11 + size)), [0] * size, list(range(size)), caches[size], [size - 1]]
        else:
            slots = list(range(-size))
            call = [[11 + slot for slot in slots], slots, [CONTEXT] * -size, caches[size], None]
        print(json.dumps(decoder.profile(*call)), flush=True)


def main() -> int:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.6B")
    parser.add_argument("--packing", default="2bit")
    parser.add_argument("--embedding", default="int8")
    parser.add_argument("--features", nargs="+", default=["amx", "avx512_vbmi"])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, cores()}))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--file", help="a packed model in place of a random one of the shape")
    parser.add_argument("--base", type=Path, help="another checkout, to be measured beside this one")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    results, cells = [], [["call", "threads", "instructions", "ms", "tokens/s", *PARTS]]
    with tempfile.TemporaryDirectory() as folder:
        path = given.file
        if path is None:
            path = str(Path(folder, "model.safetensors"))
            write_packed_model(path, SHAPES[given.shape], given.packing, given.embedding)
        for threads in given.threads:
            asked = {
                name: workers.start(__file__, [path, threads], BITDISTILL_CPU_FEATURES=name) for name in given.features
            }
            for name in given.features if given.base else ():
                code = str(importable(given.base, Path(folder, f"base-{name}-{threads}")))
                asked[f"{name}, base"] = workers.start(
                    __file__, [path, threads], BITDISTILL_CPU_FEATURES=name, PYTHONPATH=code
                )
            for label, size in CALLS.items():
                best = {}
                for _ in range(given.rounds + 1):  # the first one compiles
                    for name, worker in asked.items():
                        parts = workers.ask(worker, size)
                        if name not in best or sum(parts.values()) < sum(best[name].values()):
                            best[name] = parts
                for name, parts in best.items():
                    total = sum(parts.values())
                    results.append(
                        {"call": label, "threads": threads, "features": name, "seconds": total, "parts": parts}
                    )
                    cells.append(
                        [label, str(threads), name, f"{1e3 * total:.1f}", f"{abs(size) / total:,.0f}"]
                        + [f"{1e3 * parts[part]:.1f}" for part in PARTS]
                    )
            for worker in asked.values():
                workers.end(worker)
    print(table(cells, "<><" + ">" * (len(cells[0]) - 3)))
    if given.json:
        write_json(given.json, {"machine": machine(), "results": results})
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        sys.exit(serve(*json.loads(sys.argv[2])))
    sys.exit(main())
