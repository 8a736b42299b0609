"""How close decode comes to the memory's limit and prefill to the arithmetic's: a picture from bench/peers.py's JSON.

    python bench/roofline.py PEERS.json [--kernels KERNELS.json] [--shape 0.6B] --output docs/roofline_cpu.png

Left: tokens/s over the bytes that a token reads; the line is the read bandwidth measured in the same run, which no one can
pass. Right: multiply-adds of the linears in prefill, twice counted as operations a second; the line is the best GEMM of
bench/cpu_kernels.py's JSON on as many threads.
"""

import argparse
import json
import sys
from pathlib import Path

from random_models import SHAPES

COLOURS = {"bitdistill": "#c0392b", "transformers": "#7f8c8d"}
OTHERS = ("#1f6f8b", "#8e6c3a", "#2e7d32")


def draw(result: dict, kernels: dict | None, machine: dict, output: str) -> None:
    """Both panels of one shape."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    labels = [
        key
        for row in result["rows"]
        for key in row
        if key.startswith("decode") and "byte" not in key and "joule" not in key
    ]
    decode = min(set(labels), key=lambda label: int(label.split()[1]))
    names = sorted({row["name"] for row in result["rows"]} - set(COLOURS))
    colours = COLOURS | dict(zip(names, OTHERS, strict=False))
    above, right_of, left_of = (
        {"xytext": xy, "ha": ha} for xy, ha in (((4, 5), "left"), ((6, -3), "left"), ((-6, -3), "right"))
    )
    places = dict.fromkeys(colours, right_of) | {"bitdistill": above} | dict.fromkeys(names[::2], left_of)
    points = [row for row in result["rows"] if decode in row]
    reads = np.array([row[f"{decode} bytes"] for row in points]) / 1e6
    line = np.geomspace(reads.min() / 1.5, reads.max() * 1.5, 50)
    stream = result["stream"]
    left.plot(
        line, stream["median"] * 1e3 / line, color="black", lw=1.2, label=f"read bandwidth, {stream['median']:.0f} GB/s"
    )
    left.fill_between(line, stream["min"] * 1e3 / line, stream["max"] * 1e3 / line, color="black", alpha=0.12)
    for row, read in zip(points, reads, strict=True):
        rate = row[decode]
        spread = [[rate["median"] - rate["min"]], [rate["max"] - rate["median"]]]
        left.errorbar(read, rate["median"], yerr=spread, fmt="o", color=colours[row["name"]], capsize=2, markersize=5)
        left.annotate(
            row["weights"], (read, rate["median"]), fontsize=7, **places[row["name"]], textcoords="offset points"
        )
    for name, colour in colours.items():
        if any(row["name"] == name for row in points):
            left.plot([], [], "o", color=colour, label=name)
    left.set(
        xscale="log",
        yscale="log",
        xlabel="megabytes read for a token",
        ylabel="tokens/s",
        title=f"{decode.replace('decode', 'decode, context')}",
    )
    left.legend(fontsize=8, loc="lower left")
    left.grid(True, which="both", alpha=0.2)

    prefill = max(
        (key for row in result["rows"] for key in row if key.startswith("prefill") and "joule" not in key),
        key=lambda label: int(label.split()[1]),
    )
    weights = SHAPES[result["shape"]].linear_weights()
    bars = [row for row in result["rows"] if prefill in row]
    rates = [2 * weights * row[prefill]["median"] / 1e9 for row in bars]
    places = range(len(bars))
    right.barh(places, rates, color=[colours[row["name"]] for row in bars])
    for place, rate, row in zip(places, rates, bars, strict=True):
        right.annotate(
            f" {rate:,.0f}  ({row[prefill]['median']:,.0f} tokens/s)", (rate, place), va="center", fontsize=7
        )
    right.set_yticks(places, [f"{row['name']}, {row['weights']}" for row in bars], fontsize=7)
    right.invert_yaxis()
    if kernels:
        best = max(
            (
                one
                for one in kernels["results"]
                if "GEMM" in one["what"] and one["threads"] == result["threads"] and "torch" not in one["what"]
            ),
            key=lambda one: one["rate"]["median"],
        )
        peak = 2 * best["rate"]["median"] / 1e9
        right.axvline(peak, color="black", lw=1.2, label=f"{best['what']}, alone: {peak:,.0f}")
        right.legend(fontsize=8, loc="lower right")
    right.set(
        xlabel="operations of the linears a second, in thousand millions",
        title=prefill.replace("prefill", "prefill, tokens:"),
    )
    right.margins(x=0.25)
    figure.suptitle(
        f"Qwen3-{result['shape']} shape, {machine['processor']}, {result['threads']} threads, {machine['date'][:10]}",
        fontsize=10,
    )
    figure.savefig(output, dpi=110)


def main() -> int:
    """Draws."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("peers", metavar="PEERS.json")
    parser.add_argument("--kernels", metavar="KERNELS.json")
    parser.add_argument("--shape", default="0.6B", choices=SHAPES)
    parser.add_argument("--output", required=True, metavar="FILE")
    arguments = parser.parse_args()
    report = json.loads(Path(arguments.peers).read_text())
    result = next((one for one in report["results"] if one["shape"] == arguments.shape), None)
    if result is None:
        parser.error(f"--shape: expected one of {[one['shape'] for one in report['results']]}; got {arguments.shape}")
    kernels = json.loads(Path(arguments.kernels).read_text()) if arguments.kernels else None
    draw(result, kernels, report["machine"], arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
