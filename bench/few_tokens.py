"""Products of few tokens beside many: multiply-adds a second of the seven of a layer and of an LM head, by instruction set.

    python bench/few_tokens.py [--shape 0.6B] [--tokens 1 2 3 4 6 8 12 16 32 128] [--features native avx2] [--base CHECKOUT]
        [--formats 2bit base3 int8 int4]

A batch that decodes multiplies every matrix with as many tokens as it has sequences, and every matrix comes from memory. So do
the products here: of each shape there are copies of COLD_BYTES, used in turn. A process for each instruction set; all of them
are alive, and a round asks each in turn. One thread, its processor time: other work on the machine costs little but bandwidth.
A figure is the rate of all seven products, the fastest of the rounds for each shape, in Gmac/s; "x rows" is how many times as
long a product takes as with one token. `--base` is another checkout of this project, whose code is measured in the same
rounds. Accumulators are checked against numpy before anything is timed; logits of several tokens against those of one.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import workers
from measure import machine, table, write_json
from random_models import SHAPES
from regressions import importable

COLD_BYTES = 64 * 2**20
LEAST_SECONDS = 0.02  # of one timing
PACKINGS, HEADS = ("2bit", "base3"), ("int8", "int4")


def head(rows: int, columns: int, format: str, tokens: int):
    """A function that multiplies a random LM head with so many tokens, checked."""
    import numpy as np

    from bitdistill.kernels.cpu.tables import multiply_table
    from bitdistill.kernels.packing import packed_bytes, row_groups

    random = np.random.default_rng(0)
    weight = random.integers(0, 256, packed_bytes(rows, columns, format), np.uint8)
    if format == "int8":
        weight, scale = np.maximum(weight.view(np.int8), -127), random.random(rows, np.float32)
    else:
        scale = random.random((row_groups(rows), columns // 32, 16), np.float32).astype(np.float16)
    x = random.standard_normal((tokens, columns), np.float32)

    def run(count: int) -> np.ndarray:
        return multiply_table(x[:count], weight, format, rows, scale)

    every = run(tokens)
    assert all(
        np.array_equal(every[n], multiply_table(x[n : n + 1], weight, format, rows, scale)[0]) for n in range(tokens)
    )
    return run


def serve(shapes: list[list[int]], tokens: list[int], formats: list[str], vocabulary: int, hidden: int) -> None:
    """A worker: at each line of its input, seconds of a product for every format, number of tokens and shape."""
    import numpy as np
    from cpu_kernels import Product

    heads = [(name, head(vocabulary, hidden, name, max(tokens))) for name in formats if name in HEADS]
    products = []
    for packing in (name for name in formats if name in PACKINGS):
        for rows, columns in shapes:
            product = Product(rows, columns, packing, max(tokens), max(1, COLD_BYTES * 4 // (rows * columns)), seed=0)
            want = product.acc.copy()
            for product.tokens in tokens:
                product.run(1)
                assert np.array_equal(product.acc[: product.tokens], want[: product.tokens])
            products.append((packing, rows, columns, product))
    print("ready", flush=True)
    for _ in sys.stdin:
        found = []
        for packing, rows, columns, product in products:
            for count in tokens:
                product.tokens, done, started = count, 0, time.thread_time()
                while time.thread_time() - started < LEAST_SECONDS:
                    product.run(max(1, 64 // count))
                    done += max(1, 64 // count)
                found.append([packing, count, rows, columns, (time.thread_time() - started) / done])
        for name, run in heads:
            for count in tokens:
                started = time.thread_time()
                run(count)
                found.append([name, count, vocabulary, hidden, time.thread_time() - started])
        print(json.dumps(found), flush=True)


def environment(features: str, path: str | None = None) -> dict[str, str]:
    """Variables of a worker with an instruction set, on the code in a folder or on the installed one."""
    chosen = {} if features == "native" else {"BITDISTILL_CPU_FEATURES": features}
    return chosen if path is None else chosen | {"PYTHONPATH": path}


def main() -> int:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.6B")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 12, 16, 32, 128])
    parser.add_argument("--features", nargs="+", default=["native", "avx512_vbmi", "avx2"])
    parser.add_argument("--formats", nargs="+", choices=PACKINGS + HEADS, default=PACKINGS + HEADS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--base", type=Path, help="another checkout, to be measured beside this one")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    shapes = Counter(SHAPES[given.shape].linears().values())
    shape = SHAPES[given.shape]
    arguments = [list(map(list, shapes)), given.tokens, given.formats, shape.vocabulary, shape.hidden]
    asked = {name: workers.start(__file__, arguments, **environment(name)) for name in given.features}
    folder = tempfile.TemporaryDirectory()
    if given.base is not None:
        path = str(importable(given.base, Path(folder.name)))
        asked |= {
            f"{name}, base": workers.start(__file__, arguments, **environment(name, path)) for name in given.features
        }
    best: dict[tuple, float] = {}
    for _ in range(given.rounds):
        for name, worker in asked.items():
            for packing, count, rows, columns, seconds in workers.ask(worker, "again"):
                at = (name, packing, count, rows, columns)
                best[at] = min(seconds, best.get(at, seconds))
    for worker in asked.values():
        workers.end(worker)
    folder.cleanup()
    cells = [["instructions", "format", "", *map(str, given.tokens)]]
    for name in sorted(asked, key=lambda name: given.features.index(name.removesuffix(", base"))):
        for packing in given.formats:
            counted = {(shape.vocabulary, shape.hidden): 1} if packing in HEADS else shapes
            seconds = {count: sum(times * best[name, packing, count, rows, columns]
                                  for (rows, columns), times in counted.items()) for count in given.tokens}  # fmt: skip
            work = sum(times * rows * columns for (rows, columns), times in counted.items())
            rates = [f"{1e-9 * count * work / spent:.0f}" for count, spent in seconds.items()]
            cells.append([name, packing, "Gmac/s", *rates])
            cells.append(["", "", "x rows", *(f"{spent / seconds[given.tokens[0]]:.2f}" for spent in seconds.values())])
    print(table(cells, "<<<" + ">" * len(given.tokens)))
    if given.json:
        keys = ("features", "format", "tokens", "rows", "columns")
        results = [dict(zip(keys, at, strict=True)) | {"seconds": seconds} for at, seconds in best.items()]
        write_json(given.json, {"machine": machine(), "results": results})
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        sys.exit(serve(*json.loads(sys.argv[2])))
    sys.exit(main())
