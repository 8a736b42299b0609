"""What more threads than this machine has would make of a step: counted from the code's own partition, timed on one thread.

    python bench/many_threads.py [--shape 0.6B] [--packing 2bit] [--embedding int4] [--file FILE] [--bandwidth 300]
                                 [--barrier_ns 250 50] [--json FILE] [--plot FILE]

For 1 to 64 threads, the functions that share the work in kernels/cpu/step.py say what the busiest thread does of each part of a
step. A part then takes its seconds on one thread (`Decoder.profile`, the fastest of some, here) times the busiest thread's share,
but no less than its bytes at the memory bandwidth of the machine that is imagined (GB/s), and a barrier takes A + B x threads
nanoseconds (`--barrier_ns A B`: all threads add to one counter). Both are assumptions, and so this is a prediction: it shows
where the partition or the barriers, and not the memory, would make a knee. "even" is the same with shares of exactly 1 / threads.
With one row every thread makes the norms for itself, so their share is 1.
"""

import argparse
import heapq
import sys
import tempfile
from pathlib import Path

import numpy as np

from bitdistill.kernels.cpu import attention, step
from bitdistill.kernels.cpu.decoder import ROWS_PER_BLOCK
from bitdistill.kernels.cpu.records import SPREAD
from bitdistill.runtime.cpu import Runtime
from measure import machine, table, write_json
from random_models import SHAPES, write_packed_model

CALLS = {  # name -> sequences, rows of each, and the position of the first
    "decode at 16": (1, 1, 16),
    "decode at 2,048": (1, 1, 2047),
    "batch of 16 at 64": (16, 1, 64),
    "prompt of 128": (1, 128, 0),
}
THREADS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64)
SHOWN = (1, 2, 4, 8, 16, 32, 48, 64)
REPEATS = 15


def busiest(counts: list[int], threads: int) -> float:
    """The largest share of a thread of products whose row groups are shared as one range, or each as a range of its own."""
    total = sum(counts)
    return max(np.diff(step._own_share(total, thread, threads))[0] for thread in range(threads)) / total


def busiest_attention(decoder, call: tuple[int, int, int], threads: int) -> float:
    """The same for attention: units of (tile, head, span) go to whichever thread is free, in their order."""
    sequences, rows, position = call
    model = decoder.model
    group = model.num_attention_heads // model.num_key_value_heads
    at_once = attention.tile_rows(group)
    tiles = [(first, min(at_once, rows - first)) for _ in range(sequences) for first in range(0, rows, at_once)]
    spread = threads > 1 and len(tiles) * model.num_key_value_heads < SPREAD * threads
    units = []
    for first, count in tiles:
        seen = position + first + count  # positions, of which the newest span may have a few
        for _ in range(model.num_key_value_heads):
            cuts = [*range(0, seen, attention.SPAN), seen] if spread else [0, seen]
            units += [count * size for size in np.diff(cuts)]
    busy = [0] * threads
    for unit in units:
        heapq.heapreplace(busy, busy[0] + unit)
    return max(busy) / sum(units)


def shares(decoder, call: tuple[int, int, int], threads: int) -> dict[str, float]:
    """part -> the busiest thread's share of it."""
    model, (sequences, rows, _) = decoder.model, call
    layer = model.layers[0]

    def groups(*names):
        return [step._groups(getattr(layer, name).out_features) for name in names]

    count = sequences * rows
    wanted = sequences  # of a prompt, logits of the last row
    own = 1.0 if count == 1 else busiest([count], threads)
    return {
        "embedding": own,
        "norms": own,
        "qkv": busiest(groups("q", "k", "v"), threads),
        "attention": busiest_attention(decoder, call, threads),
        "o": busiest(groups("o"), threads),
        "gate_up": busiest(groups("gate"), threads),
        "down": busiest(groups("down"), threads),
        "head": busiest([step._groups(model.head.rows)], threads) if wanted else 1.0,
    }


def part_bytes(decoder, call: tuple[int, int, int], cache) -> dict[str, int]:
    """part -> bytes of weights and of the cache that a call reads from memory."""
    model, (sequences, rows, position) = decoder.model, call
    found = dict.fromkeys(("qkv", "o", "gate_up", "down"), 0)
    for layer in model.layers:
        for part, names in (("qkv", ("q", "k", "v")), ("o", ("o",)), ("gate_up", ("gate", "up")), ("down", ("down",))):
            found[part] += sum(getattr(layer, name).weight.nbytes for name in names)
    found["attention"] = cache.nbytes * sequences * (position + rows) // (cache.slots * cache.capacity)
    found["head"] = model.head.weight.nbytes
    return found


def barriers(decoder, call: tuple[int, int, int]) -> int:
    """How often all threads of a call wait for each other (step.py)."""
    layers = len(decoder.model.layers)
    return 5 * layers + 1 if call[0] * call[1] == 1 else 10 * layers + 3


def measured(runtime: Runtime, call: tuple[int, int, int]) -> tuple[dict[str, float], object]:
    """Seconds by part on one thread, and the cache."""
    sequences, rows, position = call
    assert sequences * rows <= ROWS_PER_BLOCK, "a call is one block"
    cache = runtime._keys_values(sequences, position + rows)
    slots = [slot for slot in range(sequences) for _ in range(rows)]
    positions = [position + row for _ in range(sequences) for row in range(rows)]
    ids = [11 + index for index in range(len(slots))]
    wanted = [len(slots) - 1] if sequences == 1 else None
    found = [runtime._decoder.profile(ids, slots, positions, cache, wanted) for _ in range(REPEATS)]
    return min(found, key=lambda parts: sum(parts.values())), cache


def predicted(seconds: dict, share: dict, bytes_: dict, crossings: int, threads: int, given) -> float:
    """Seconds of a call on so many threads."""
    parts = [max(seconds[part] * share[part], bytes_.get(part, 0) / (1e9 * given.bandwidth)) for part in share]
    fixed, each = given.barrier_ns
    return sum(parts) + (crossings * 1e-9 * (fixed + each * threads) if threads > 1 else 0)


def draw(report: dict, path: str) -> None:
    """Speed-ups over threads, and what limits them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(report["calls"]), figsize=(3.4 * len(report["calls"]), 3.6), layout="constrained"
    )
    for axis, (name, call) in zip(axes, report["calls"].items(), strict=True):
        first = call["threads"][0]["seconds"]
        counts = [point["threads"] for point in call["threads"]]
        for key, style, label in (("seconds", "o-", "as it is shared"), ("even", "--", "shared evenly"),
                                  ("free", ":", "evenly, barriers free")):  # fmt: skip
            axis.plot(counts, [first / point[key] for point in call["threads"]], style, ms=3, label=label)
        axis.plot(counts, counts, color="#bbb", lw=0.8, label="linear")
        axis.set(xscale="log", yscale="log", title=name, xlabel="threads")
        axis.set_xticks([1, 2, 4, 8, 16, 32, 64], labels=[1, 2, 4, 8, 16, 32, 64])
        axis.set_yticks([1, 2, 4, 8, 16, 32, 64], labels=[1, 2, 4, 8, 16, 32, 64])
        axis.minorticks_off()
        axis.grid(True, alpha=0.25)
    axes[0].set_ylabel("times as fast as one thread (predicted)")
    axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Counts, predicts, prints a table, draws, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.6B")
    parser.add_argument("--packing", choices=("2bit", "base3"), default="2bit")
    parser.add_argument("--embedding", default="int4")
    parser.add_argument("--file", help="a packed model in place of a random one of the shape")
    parser.add_argument("--bandwidth", type=float, default=300, help="of the imagined machine, GB/s")
    parser.add_argument("--barrier_ns", type=float, nargs=2, default=(250, 50), metavar=("A", "B"))
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE")
    given = parser.parse_args()
    report = {"machine": machine(), "bandwidth": given.bandwidth, "barrier_ns": list(given.barrier_ns), "calls": {}}
    cells = [["call", "", *(str(count) for count in SHOWN)]]
    with tempfile.TemporaryDirectory() as folder:
        path = given.file or str(Path(folder, "model.safetensors"))
        if given.file is None:
            write_packed_model(Path(path), SHAPES[given.shape], given.packing, given.embedding)
        runtime = Runtime(path, threads=1)
        decoder = runtime._decoder
        for name, call in CALLS.items():
            seconds, cache = measured(runtime, call)
            bytes_, crossings = part_bytes(decoder, call, cache), barriers(decoder, call)
            points = []
            for threads in THREADS:
                share = shares(decoder, call, threads)
                exact = {part: 1.0 if part in ("norms", "embedding") and share[part] == 1 else 1 / threads
                         for part in share}  # fmt: skip
                points.append({
                    "threads": threads, "shares": share,
                    "seconds": predicted(seconds, share, bytes_, crossings, threads, given),
                    "even": predicted(seconds, exact, bytes_, crossings, threads, given),
                    "free": predicted(seconds, exact, bytes_, 0, threads, given),
                })  # fmt: skip
            report["calls"][name] = {"one_thread": seconds, "bytes": bytes_, "barriers": crossings, "threads": points}
            at = {point["threads"]: point for point in points}
            for label, key in (("x one thread", "seconds"), ("x, even", "even"), ("x, barriers free", "free")):
                ratios = [f"{points[0]['seconds'] / at[count][key]:.1f}" for count in SHOWN]
                cells.append([name if key == "seconds" else "", label, *ratios])
            worst = [max(at[count]["shares"].items(), key=lambda item: item[1] * (item[0] not in ("norms", "embedding")))
                     for count in SHOWN]  # fmt: skip
            cells.append(["", "least even", *(f"{part} {share * count:.2f}"
                                              for (part, share), count in zip(worst, SHOWN, strict=True))])  # fmt: skip
        runtime.close()
    print(table(cells, "<<" + ">" * len(SHOWN)))
    if given.json:
        write_json(given.json, report)
    if given.plot:
        draw(report, given.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
