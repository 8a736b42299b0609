"""The performance history as one page that opens without a network: every ratio and count of `asv run`, over commits.

    python bench/history.py [--output bench/results/history.html]

Reads bench/results/asv. Ratios and counts are drawn; absolute seconds, which say more about the machine than about the
project, are in the table below them. One colour a machine.
"""

import argparse
import base64
import html
import io
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "asv"
PAGE = """<!doctype html><meta charset="utf-8"><title>BitDistill: performance history</title>
<style>
body {{ font: 14px system-ui; margin: 2em; max-width: 1300px }}
td, th {{ padding: 2px 8px; text-align: right; font-size: 12px; border-bottom: 1px solid #ddd }}
td:first-child {{ text-align: left }}
img {{ max-width: 100% }}
</style>
<h1>Performance history</h1>
<p>Ratios compare two things timed alternately in one process; above 1, ours is faster. Counts are exact.
Made by <code>python bench/history.py</code> from the results of <code>asv run</code>.</p>
{image}
<h2>All figures</h2>
<p>time_ in seconds.</p>
<table><tr><th></th>{head}</tr>{body}</table>
"""


def read(folder: Path) -> list[dict]:
    """Every result file of asv: {"machine", "commit", "date", "values": {name: number}}, oldest commit first."""
    found = []
    for path in sorted(folder.glob("*/*.json")):
        if path.name == "machine.json":
            continue
        content = json.loads(path.read_text())
        columns, values = content["result_columns"], {}
        for name, row in content["results"].items():
            fields = dict(zip(columns, row, strict=False))
            results, parameters = fields.get("result"), fields.get("params") or []
            if results is None:
                continue
            combinations = _combinations(parameters)
            for combination, value in zip(combinations, results, strict=False):
                if isinstance(value, int | float) and value == value:
                    label = f"({', '.join(part.strip(chr(39)) for part in combination)})" if combination else ""
                    values[f"{name}{label}"] = value
        found.append(
            {
                "machine": path.parent.name,
                "commit": content["commit_hash"][:8],
                "date": content["date"],
                "values": values,
            }
        )
    return sorted(found, key=lambda one: one["date"])


def _combinations(parameters: list[list[str]]) -> list[tuple[str, ...]]:
    combinations: list[tuple[str, ...]] = [()]
    for values in parameters:
        combinations = [(*before, value) for before in combinations for value in values]
    return combinations


def picture(history: list[dict], names: list[str]) -> str:
    """A small panel for each name, as a PNG in base64."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = 3
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(13, 2.1 * rows), layout="constrained", squeeze=False)
    commits = list(dict.fromkeys(one["commit"] for one in history))
    machines = sorted({one["machine"] for one in history})
    for axis, name in zip(axes.flat, names, strict=False):
        for number, machine in enumerate(machines):
            points = [
                (commits.index(one["commit"]), one["values"][name])
                for one in history
                if one["machine"] == machine and name in one["values"]
            ]
            axis.plot(*zip(*points, strict=True), "o-", color=f"C{number}", markersize=4) if points else None
        axis.set_title(name, fontsize=7)
        axis.set_xticks(range(len(commits)), commits, fontsize=6, rotation=30)
        axis.tick_params(axis="y", labelsize=7)
        axis.set_xlim(-0.5, len(commits) - 0.5)
        axis.set_ylim(bottom=0)
        axis.grid(True, alpha=0.2)
    for axis in list(axes.flat)[len(names) :]:
        axis.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=95)
    return base64.b64encode(buffer.getvalue()).decode()


def page(history: list[dict]) -> str:
    """The whole page."""
    names = sorted({name for one in history for name in one["values"]})
    tracked = [name for name in names if ".track_" in name]
    ordered = subprocess.run(
        ["git", "log", "--format=%h %ad %s", "--date=short"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    subjects = {line.split(" ", 1)[0][:7]: line.split(" ", 1)[1] for line in ordered.splitlines() if " " in line}
    head = "".join(
        f"<th title='{html.escape(subjects.get(one['commit'][:7], ''))}'>{one['commit']}<br>{html.escape(one['machine'])}</th>"
        for one in history
    )
    body = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(
            f"<td>{one['values'].get(name, float('nan')):.4g}</td>" if name in one["values"] else "<td>n/a</td>"
            for one in history
        )
        + "</tr>"
        for name in names
    )
    image = (
        f"<img src='data:image/png;base64,{picture(history, tracked)}' alt='ratios and counts over commits'>"
        if tracked
        else ""
    )
    return PAGE.format(image=image, head=head, body=body)


def main() -> int:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "history.html")
    arguments = parser.parse_args()
    history = read(RESULTS)
    if not history:
        print(
            f"bench/results/asv: expected results of asv; got none in {RESULTS}. Run `asv run` first.", file=sys.stderr
        )
        return 2
    arguments.output.write_text(page(history))
    print(
        f"{arguments.output}: {len(history)} commits and machines, {len({n for one in history for n in one['values']})} figures"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
