"""How time and memory of the CPU runtime grow with context, model size and batch: fitted exponents and a picture.

    python bench/scaling.py [--packing base3] [--embedding int4] [--threads N] [--json FILE] [--plot FILE]

Each time is a median over rounds. Memory is the peak of the process's resident set (anonymous pages and pages of the mapped
file) beyond what it was before. For a context, this includes the prompt, its KV cache and a token; for a size, the model,
too; for a batch, its KV caches and 8 tokens each. An exponent p is the slope of log(cost) over log(size): 1 is linear
growth, 0 is none.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bitdistill.runtime.cpu import Runtime
from measure import cores, machine, peak_growth, summary, table, write_json
from random_models import SHAPES, Shape, write_packed_model

SIZES = {
    "26 M": Shape(8, 512, 1536, 8, 4, head_dim=64, vocabulary=32_000),
    "107 M": Shape(12, 768, 3072, 12, 4, head_dim=64, vocabulary=32_000),
    "0.6B": SHAPES["0.6B"],
    "1.7B": SHAPES["1.7B"],
}
CONTEXTS = (64, 256, 1024, 2048, 4096)
BATCHES = (1, 2, 4, 8, 16)


def exponent(sizes, costs) -> float:
    """Least-squares slope of log(cost) over log(size)."""
    return float(np.polyfit(np.log(np.asarray(sizes, float)), np.log(np.asarray(costs, float)), 1)[0])


def timed(work, rounds: int) -> dict[str, float]:
    """Seconds of a call, the first one left out."""
    work()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return summary(seconds)


def by_context(runtime: Runtime, rounds: int) -> list[dict]:
    """A decoded token after a context, and the bytes that the context costs."""
    points = []
    for context in CONTEXTS:

        def fill(context=context):
            cache = runtime.new_cache(context + 1)
            runtime.logits([(7 * i) % 1000 for i in range(context)], last_only=True, cache=cache)
            return cache

        grown, cache = peak_growth(fill), fill()

        def decode(cache=cache, context=context):
            cache.length = context
            runtime.logits([5], cache=cache)

        seconds = timed(decode, rounds)
        points.append({"size": context, "seconds": seconds, "bytes": grown, "cache_bytes": cache.nbytes})
        del cache, decode
    return points


def by_size(folder: Path, packing: str, embedding: str, threads: int, rounds: int) -> list[dict]:
    """A decoded token of models of several sizes; bytes of the file, and of the process beyond what it had."""
    points = []
    warm = next(iter(SIZES))  # once more in front: its first run also brings in the compiled code and the libraries
    for name, shape in [(warm, SIZES[warm]), *SIZES.items()]:
        path = folder / f"scaling-{name.replace(' ', '')}-{packing}-{embedding}.safetensors"
        if not path.is_file():
            write_packed_model(path, shape, packing, embedding)
        seconds = {}

        def run(path=path, seconds=seconds):
            runtime = Runtime(path, threads=threads)
            cache = runtime.new_cache(64)
            runtime.logits(range(1, 17), last_only=True, cache=cache)

            def decode():
                cache.length = 16
                runtime.logits([5], cache=cache)

            seconds |= timed(decode, rounds)
            runtime.close()

        grown = peak_growth(run)
        parameters = shape.linear_weights() + shape.vocabulary * shape.hidden
        size = path.stat().st_size
        points.append({"name": name, "size": parameters, "seconds": seconds, "bytes": grown, "file_bytes": size})
    return points[1:]


def by_batch(runtime: Runtime, rounds: int) -> list[dict]:
    """A decoding step of several sequences at once, and the bytes of their KV caches and scratch."""
    points = []
    for batch in BATCHES:
        prompts = [[1 + (7 * i + b) % 1000 for i in range(16)] for b in range(batch)]

        def decode(prompts=prompts, batch=batch):
            for _ in runtime.generate_batch(prompts, 8, slots=batch):
                pass

        runtime.forget()
        grown = peak_growth(decode)
        seconds = timed(decode, max(2, rounds // 3))
        points.append({"size": batch, "seconds": {key: value / 8 for key, value in seconds.items()}, "bytes": grown})
    return points


def draw(report: dict, path: str) -> None:
    """Time above, memory below, log-log, with the fitted powers: context, model size, batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = plt.subplots(2, 3, figsize=(12, 6.6), layout="constrained", sharex="col")
    labels = {"context": "context (tokens)", "size": "parameters (millions)", "batch": "sequences at once"}
    for column, (kind, label) in enumerate(labels.items()):
        points = report[kind]["points"]
        sizes = np.array([point["size"] for point in points], float)
        costs = {"time": [1e3 * point["seconds"]["median"] for point in points]}
        if "bytes" in points[0]:
            costs["memory"] = [point["bytes"] / 1e6 for point in points]
        units = {"time": ("milliseconds a step", "#1f6f8b"), "memory": ("megabytes resident, peak", "#b5651d")}
        x = sizes / 1e6 if kind == "size" else sizes
        for row, (what, (unit, color)) in enumerate(units.items()):
            axis = axes[row, column]
            if what not in costs:
                axis.set_visible(False)
                continue
            slope = report[kind][f"{what}_exponent"]
            middle = np.exp(np.mean(np.log(costs[what])) - slope * np.mean(np.log(x)))
            axis.plot(x, middle * x**slope, "--", color="#888", lw=1, label=f"fitted, exponent {slope:.2f}")
            axis.plot(x, costs[what], "o", color=color, label="measured")
            if what == "time":
                ends = [[1e3 * abs(point["seconds"][end] - point["seconds"]["median"]) for point in points]
                        for end in ("min", "max")]  # fmt: skip
                axis.errorbar(x, costs[what], yerr=ends, fmt="none", ecolor=color, capsize=3)
            axis.set(xscale="log", yscale="log")
            for side in (axis.xaxis, axis.yaxis):
                side.set_major_locator(LogLocator(subs=(1, 2, 5)))
                side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
                side.set_minor_formatter(NullFormatter())
            axis.set_xlabel(label if row == 1 or "memory" not in costs else "")
            axis.set_ylabel(unit if column == 0 else "")
            axis.margins(y=0.25)
            axis.legend(loc="upper left", fontsize=8, frameon=False)
            axis.grid(True, alpha=0.25)
    at = report["machine"]
    figure.suptitle(
        f"CPU runtime, {report['packing']}, {report['embedding']} embedding, {report['threads']} threads, "
        f"{at['processor']}, {at['date'][:10]}",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def main() -> int:
    """Measures, prints, draws, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--packing", choices=("base3", "2bit"), default="base3")
    parser.add_argument("--embedding", default="int4")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="keeps the model files here")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE")
    arguments = parser.parse_args()
    report = {
        "machine": machine(),
        "packing": arguments.packing,
        "embedding": arguments.embedding,
        "threads": arguments.threads,
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        sizes = by_size(folder, arguments.packing, arguments.embedding, arguments.threads, arguments.rounds)
        path = folder / f"scaling-0.6B-{arguments.packing}-{arguments.embedding}.safetensors"
        runtime = Runtime(path, threads=arguments.threads)
        contexts, batches = by_context(runtime, arguments.rounds), by_batch(runtime, arguments.rounds)
        runtime.close()
    for kind, points in (("context", contexts), ("size", sizes), ("batch", batches)):
        report[kind] = {"points": points}
        at = [point["size"] for point in points]
        report[kind]["time_exponent"] = exponent(at, [point["seconds"]["median"] for point in points])
        if "bytes" in points[0]:
            report[kind]["memory_exponent"] = exponent(at, [point["bytes"] for point in points])
    cells = [["grows with", "at", "ms a step", "MB resident", "exponent of time", "of memory"]]
    for kind in ("context", "size", "batch"):
        for index, point in enumerate(report[kind]["points"]):
            seconds = point["seconds"]
            cells.append([
                kind if index == 0 else "",
                point.get("name", f"{point['size']:,}"),
                f"{1e3 * seconds['median']:.2f} [{1e3 * seconds['min']:.2f}, {1e3 * seconds['max']:.2f}]",
                f"{point['bytes'] / 1e6:.1f}" if "bytes" in point else "-",
                f"{report[kind]['time_exponent']:.2f}" if index == 0 else "",
                f"{report[kind]['memory_exponent']:.2f}" if index == 0 and "memory_exponent" in report[kind] else "",
            ])  # fmt: skip
    print(table(cells, "<>>>>>"))
    if arguments.json:
        write_json(arguments.json, report)
    if arguments.plot:
        draw(report, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
