"""How close the kernels come to the limits of the memory and of the arithmetic, as pictures.

    python bench/roofline.py PEERS.json [--kernels KERNELS.json] [--shape 0.6B] --output docs/roofline_cpu.png
    python bench/roofline.py --gpu [GPU.json] --output docs/roofline_gpu.png

For a CPU, from bench/peers.py's JSON. Left: tokens/s over the bytes that a token reads; the line is the read bandwidth
measured in the same run, which nothing can exceed. Right: operations per second of the linears in prefill (two for each
multiply-add); the line is the best GEMM of bench/cpu_kernels.py's JSON on as many threads.

For a GPU, from bench/gpu_proof.py's JSON, by default the latest in bench/results/gpu: operations per second over operations
per byte, under the copy bandwidth and the bf16 rate that the same run measured (int8 has twice that rate). Without such a
file the picture shows the data sheet of an H200 and where the products would be, and says that nothing was measured.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

from random_models import SHAPES

ROOT = Path(__file__).resolve().parents[1]
H200 = {"bytes": 4.8e12, "bf16": 989e12, "int8": 1979e12}  # a second, dense; NVIDIA's data sheet
TOKENS = 16_384  # of a training step, gpu_sections.py
COLORS = {"bitdistill": "#c0392b", "transformers": "#7f8c8d"}
# From a name to its point.
LEADER = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
OTHERS = ("#1f6f8b", "#8e6c3a", "#2e7d32")


def product_intensity(tokens: int, rows: int, columns: int) -> float:
    """Operations a byte of an int8 product: codes of the activations, 2-bit weights, a result in bf16."""
    return 2 * tokens * rows * columns / (tokens * columns + rows * columns / 4 + 2 * tokens * rows)


def gpu_points(report: dict) -> list[tuple[str, float, float]]:
    """(label, operations per byte, operations per second) of every product that a run measured."""
    points = []
    for row in report["rows"]:
        seconds = (row["timing"] or {}).get("median")
        sizes = [int(number) for number in re.findall(r"\d+", row["what"].rpartition(":")[2])]
        if not seconds or len(sizes) != 2:
            continue
        if row["section"].startswith("decoding product"):
            rows, columns = sizes
            points.append((f"decode {rows} x {columns}", 8.0, 2 * rows * columns / seconds))
        elif row["section"].startswith("int8 product"):
            columns, rows = sizes
            operations = row["floor"] * 2e12 * report["bf16_teraflops"]
            tokens = operations / (2 * rows * columns)
            points.append(
                (f"train {columns} -> {rows}", product_intensity(tokens, rows, columns), operations / seconds)
            )
    return points


def draw_gpu(report: dict | None, output: str) -> None:
    """The roofs, and under them what was measured; without a run where each product would stand, on the axis alone."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    limits = H200
    if report:
        rate = 1e12 * report["bf16_teraflops"]
        limits = {"bytes": 1e9 * report["copy_gigabytes_per_second"], "bf16": rate, "int8": 2 * rate}
    figure, axis = plt.subplots(figsize=(9, 5.4), layout="constrained")
    x = np.geomspace(0.3, 20_000, 200)
    for kind, color in (("bf16", "#7f8c8d"), ("int8", "#c0392b")):
        roof = np.minimum(x * limits["bytes"], limits[kind]) / 1e12
        axis.plot(x, roof, color=color, lw=1.4, label=f"{kind}: {limits[kind] / 1e12:,.0f} Top/s")
    marks = [("decode, bf16 weights", 1.0), ("decode, 2-bit weights", 8.0)]
    for name, shape in list(SHAPES.items())[:3]:
        intensity = product_intensity(TOKENS, 2 * shape.intermediate, shape.hidden)
        marks.append((f"training, {name}: {shape.hidden} -> {2 * shape.intermediate}", intensity))
    for label, intensity in marks:
        axis.axvline(intensity, color="#1f6f8b", lw=0.8, ls=":")
        axis.annotate(f" {label}", (intensity, 0.35), rotation=90, fontsize=7, va="bottom", ha="right", color="#1f6f8b")
    for label, intensity, rate in gpu_points(report) if report else ():
        axis.plot(intensity, rate / 1e12, "o", color="#c0392b", markersize=4)
        axis.annotate(label, (intensity, rate / 1e12), fontsize=6, xytext=(5, -3), textcoords="offset points")
    axis.set(xscale="log", yscale="log", ylim=(0.3, 4_000), xlabel="operations per byte", ylabel="Top/s")
    memory = f"memory: {limits['bytes'] / 1e12:.1f} TB/s"
    if report:
        axis.set_title(
            f"{report.get('gpu', 'GPU')}, {report.get('date', '')[:10]}; limits measured in the same run, {memory}"
        )
    else:
        axis.set_title(f"Not measured: the model alone. Limits from the data sheet of an H200, {memory}", fontsize=10)
    axis.legend(loc="upper left", fontsize=8)
    axis.grid(True, which="major", alpha=0.25)
    figure.savefig(output, dpi=110)


def draw(result: dict, kernels: dict | None, machine: dict, output: str) -> None:
    """Both panels of one shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    names = sorted({row["name"] for row in result["rows"]} - set(COLORS))
    colors = COLORS | dict(zip(names, OTHERS, strict=False))
    _draw_decode(left, result, colors)
    _draw_prefill(right, result, kernels, colors)
    figure.suptitle(
        f"Qwen3-{result['shape']} shape, {machine['processor']}, {result['threads']} threads, {machine['date'][:10]}",
        fontsize=10,
    )
    figure.savefig(output, dpi=110)


def apart(heights: list[float], gap: float) -> list[float]:
    """Heights that are at least `gap` apart, in the order of those given, and as low as that allows below the highest one."""
    places, above = [0.0] * len(heights), float("inf")
    for number in sorted(range(len(heights)), key=lambda one: -heights[one]):
        places[number] = above = min(heights[number], above - gap)
    return places


def _label_points(axis, points: list[tuple[float, float, str]]) -> None:
    """Names beside points of a plot with logarithmic axes: a column right of each group of points, none over another."""
    groups = []
    for point in sorted(points):
        if groups and point[0] < 1.9 * groups[-1][-1][0]:
            groups[-1].append(point)
        else:
            groups.append([point])
    for close in groups:
        for (x, y, label), place in zip(close, apart([math.log10(y) for _, y, _ in close], 0.055), strict=True):
            axis.annotate(
                label,
                (x, y),
                (1.25 * close[-1][0], 10**place),
                fontsize=7,
                va="center",
                arrowprops=LEADER,
                color="#333333",
            )


def _draw_decode(left, result: dict, colors: dict[str, str]) -> None:
    """Tokens per second over the bytes that a token reads, under the read bandwidth."""
    import numpy as np

    labels = [
        key
        for row in result["rows"]
        for key in row
        if key.startswith("decode") and "byte" not in key and "joule" not in key
    ]
    decode = min(set(labels), key=lambda label: int(label.split()[1]))
    points = [row for row in result["rows"] if decode in row]
    reads = np.array([row[f"{decode} bytes"] for row in points]) / 1e6
    line = np.geomspace(reads.min() / 1.5, reads.max() * 3, 50)
    stream = result["stream"]
    left.plot(
        line, stream["median"] * 1e3 / line, color="black", lw=1.2, label=f"read bandwidth, {stream['median']:.0f} GB/s"
    )
    left.fill_between(line, stream["min"] * 1e3 / line, stream["max"] * 1e3 / line, color="black", alpha=0.12)
    for row, read in zip(points, reads, strict=True):
        rate = row[decode]
        spread = [[rate["median"] - rate["min"]], [rate["max"] - rate["median"]]]
        left.errorbar(read, rate["median"], yerr=spread, fmt="o", color=colors[row["name"]], capsize=2, markersize=5)
    _label_points(
        left, [(read, row[decode]["median"], row["weights"]) for row, read in zip(points, reads, strict=True)]
    )
    for name, color in colors.items():
        if any(row["name"] == name for row in points):
            left.plot([], [], "o", color=color, label=name)
    left.set(
        xscale="log",
        yscale="log",
        xlabel="megabytes read per token",
        ylabel="tokens/s",
        title=f"{decode.replace('decode', 'decode, context')}",
    )
    left.legend(fontsize=8, loc="lower left")
    left.grid(True, which="both", alpha=0.2)


def _draw_prefill(right, result: dict, kernels: dict | None, colors: dict[str, str]) -> None:
    """Operations per second of the linears in prefill, under those of the best product alone."""
    prefill = max(
        (key for row in result["rows"] for key in row if key.startswith("prefill") and "joule" not in key),
        key=lambda label: int(label.split()[1]),
    )
    weights = SHAPES[result["shape"]].linear_weights()
    bars = [row for row in result["rows"] if prefill in row]
    rates = [2 * weights * row[prefill]["median"] / 1e9 for row in bars]
    places = range(len(bars))
    right.barh(places, rates, color=[colors[row["name"]] for row in bars])
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
        xlabel="operations of the linears, Gop/s",
        title=prefill.replace("prefill", "prefill, tokens:"),
    )
    right.margins(x=0.25)


def main() -> int:
    """Draws."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("peers", metavar="PEERS.json", nargs="?")
    parser.add_argument("--gpu", metavar="GPU.json", nargs="?", const="latest")
    parser.add_argument("--kernels", metavar="KERNELS.json")
    parser.add_argument("--shape", default="0.6B", choices=SHAPES)
    parser.add_argument("--output", required=True, metavar="FILE")
    arguments = parser.parse_args()
    if (arguments.gpu is None) == (arguments.peers is None):
        parser.error("expected PEERS.json or --gpu, one of the two")
    if arguments.gpu is not None:
        files = sorted((ROOT / "bench" / "results" / "gpu").glob("*.json"))
        files = files[-1:] if arguments.gpu == "latest" else [Path(arguments.gpu)]
        draw_gpu(json.loads(files[0].read_text()) if files else None, arguments.output)
        print(f"{arguments.output}: {files[0] if files else 'not measured, the model alone'}")
        return 0
    report = json.loads(Path(arguments.peers).read_text())
    result = next((one for one in report["results"] if one["shape"] == arguments.shape), None)
    if result is None:
        parser.error(f"--shape: expected one of {[one['shape'] for one in report['results']]}; got {arguments.shape}")
    kernels = json.loads(Path(arguments.kernels).read_text()) if arguments.kernels else None
    draw(result, kernels, report["machine"], arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
