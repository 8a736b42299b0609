"""The performance history as one page that opens without a network: every figure of `asv run`, over the measured commits.

    python bench/history.py [--output bench/results/history.html]

Reads bench/results/asv. The page has one section per machine (machines are not compared), and one part for each area of the
suite. Ratios are drawn on a logarithmic axis with a line at 1. A table lists them with the counts: every commit, the latest
figure, and its change against the commit before. Absolute times, which say more about the machine than about the project,
are folded away.
"""

import argparse
import html
import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

from measure import figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "asv"
AREAS = {
    "cpu_kernels": "CPU: packed products", "runtime": "CPU: whole model", "startup": "Start", "files": "Packed files",
    "packing": "Packing", "training": "Training steps", "losses": "Losses", "linear": "BitLinear and quantizers",
    "teacher_cache": "Cached teacher logits", "gpu": "GPU",
}  # fmt: skip
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>BitDistill: performance history</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2.5em auto; max-width: 1160px; padding: 0 1em; color: #1d2733 }}
h1 {{ margin-bottom: 0 }} h2 {{ margin-top: 2em; border-bottom: 2px solid #1f6f8b }} h3 {{ margin: 2em 0 .3em }}
table {{ border-collapse: collapse; width: 100%; margin: .6em 0 }}
td, th {{ padding: 3px 9px; text-align: right; font-size: 13px; border-bottom: 1px solid #e3e7eb; white-space: nowrap }}
td:first-child, th:first-child, td:nth-child(2) {{ text-align: left }} td:first-child {{ white-space: normal }}
th {{ color: #5b6875; font-weight: 600; vertical-align: bottom }} td.latest {{ font-weight: 600 }}
.better {{ color: #1d7a3a }} .worse {{ color: #b3261e }} .none {{ color: #a3adb7 }}
svg {{ max-width: 100%; height: auto }} summary {{ cursor: pointer; color: #5b6875 }} code {{ font-size: 13px }}
</style>
<h1>Performance history</h1>
<p>A ratio compares two things timed alternately in one process, or the memory of both: above 1, ours is better. Counts are
exact. Made by <code>python bench/history.py</code> from what <code>asv run</code> left in <code>bench/results/asv</code>.</p>
{body}</html>
"""


def read(folder: Path) -> list[dict]:
    """Every result file of asv: {"machine", "commit", "date", "values": {name(parameters): number}}, oldest first."""
    found = []
    for path in sorted(folder.glob("*/*.json")):
        if path.name == "machine.json":
            continue
        content = json.loads(path.read_text())
        columns, values = content["result_columns"], {}
        for name, row in content["results"].items():
            fields = dict(zip(columns, row, strict=False))
            results, parameters = fields.get("result"), fields.get("params") or []
            for combination, value in zip(itertools.product(*parameters), results or [], strict=False):
                if isinstance(value, int | float) and value == value:
                    label = f"({', '.join(part.strip(chr(39)) for part in combination)})" if combination else ""
                    values[f"{name}{label}"] = value
        machine = path.parent.name
        found.append({"machine": machine, "commit": content["commit_hash"], "date": content["date"], "values": values})
    return sorted(found, key=lambda one: one["date"])


def split(label: str) -> tuple[str, str]:
    """`file.Class.method(parameters)` -> (`file.Class.method`, `parameters`)."""
    name, _, parameters = label.partition("(")
    return name, parameters.removesuffix(")")


def setting_of(label: str, about: dict[str, dict]) -> str:
    """The parameters as they are shown: a bare number gets its parameter's name."""
    name, parameters = split(label)
    names = about.get(name, {}).get("param_names", [])
    parts = parameters.split(", ")
    if len(parts) != len(names):
        return parameters
    return ", ".join(f"{part} {kind}" if part.isdigit() else part for part, kind in zip(parts, names, strict=True))


def change(unit: str, values: list[float | None]) -> tuple[str, str]:
    """The latest figure against the one before it: (text, CSS class). A ratio that moved by less than 10 % is noise."""
    known = [value for value in values if value is not None]
    if len(known) < 2 or values[-1] is None:
        return "", "none"
    before, now = known[-2:]
    if before == now:
        return "same", "none"
    ratio = unit.startswith("x")
    text = f"{100 * (now / before - 1):+.0f} %" if before else f"+{figure(now)}"
    if ratio and abs(now / before - 1) < 0.1:
        return text, "none"
    return text, "better" if (now > before) == ratio else "worse"


def drawing(commits: list[str], panels: dict[str, dict[str, list[float | None]]], units: dict[str, str]) -> str:
    """A small panel for each ratio, a line for each setting, as SVG. panels: title -> setting -> a value a commit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    plt.rcParams["svg.fonttype"] = "none"
    rows = -(-len(panels) // 2)
    size = (11, 2.7 * rows)
    drawn, axes = plt.subplots(rows, 2, figsize=size, layout="constrained", squeeze=False)
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        ends = [value for values in lines.values() for value in values if value]
        for number, (setting, values) in enumerate(lines.items()):
            points = [(place, value) for place, value in enumerate(values) if value]
            style = {"color": f"C{number % 10}", "linestyle": ("-", "--")[number // 10 % 2]}
            axis.plot(*zip(*points, strict=True), "o", markersize=4, label=setting or None, lw=1.4, **style)
        axis.axhline(1, color="#444", lw=0.9)
        axis.set(yscale="log", ylim=(min(0.8, min(ends) / 1.4), max(1.25, max(ends) * 1.4)))
        axis.set(xlim=(-0.3, len(commits) - 0.7), ylabel=units[title])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_title(title, fontsize=9, loc="left", fontweight="bold")
        axis.yaxis.label.set_fontsize(8)
        axis.set_xticks(range(len(commits)), [commit[:7] for commit in commits])
        axis.tick_params(labelsize=8)
        axis.grid(True, axis="y", alpha=0.25)
        if any(lines):
            columns = 1 if len(lines) <= 8 else 2
            axis.legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1, 0.5), ncols=columns, frameon=False)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    text = io.StringIO()
    drawn.savefig(text, format="svg")
    plt.close(drawn)
    return text.getvalue()[text.getvalue().index("<svg") :]


def rows_of(labels: list[str], results: list[dict], about: dict[str, dict]) -> str:
    """The rows of a table: what, setting, a figure a commit, the change."""
    rows, last = [], None
    for label in labels:
        name, setting = split(label)[0], setting_of(label, about)
        unit = about.get(name, {}).get("unit", "")
        values = [one["values"].get(label) for one in results]
        shown = [f"<td{' class=latest' if one is results[-1] else ''}>{'-' if value is None else figure(value)}</td>"
                 for one, value in zip(results, values, strict=True)]  # fmt: skip
        text, kind = change(unit, values)
        title = (
            "" if name == last else f"{html.escape(title_of(name, about))} <span class=none>{html.escape(unit)}</span>"
        )
        cells = f"<td>{title}</td><td>{html.escape(setting)}</td>{''.join(shown)}"
        rows.append(f"<tr>{cells}<td class={kind}>{text}</td></tr>")
        last = name
    return "".join(rows)


def title_of(name: str, about: dict[str, dict]) -> str:
    """How a benchmark is called: its pretty name, else its method's in words."""
    method = name.rpartition(".")[2]
    return about.get(name, {}).get("pretty_name") or method.partition("_")[2].replace("_", " ") or method


def section(machine: str, results: list[dict], about: dict[str, dict], subjects: dict[str, str]) -> str:
    """All areas of one machine."""
    specs = RESULTS / machine / "machine.json"
    known = json.loads(specs.read_text()) if specs.is_file() else {}
    facts = ", ".join(f"{key} {known[key]}" for key in ("cpu", "num_cpu", "os") if known.get(key))
    parts = [f"<h2>{html.escape(machine)}</h2><p>{html.escape(facts)}</p>"]
    commits = [one["commit"] for one in results]
    listed = "".join(
        f"<li><code>{commit[:7]}</code> {html.escape(subjects.get(commit, ''))}</li>" for commit in commits
    )
    parts.append(f"<ol>{listed}</ol>")
    head = "".join(f"<th>{commit[:7]}</th>" for commit in commits)
    labels = sorted({label for one in results for label in one["values"]})
    modules = sorted({label.partition(".")[0] for label in labels}, key=lambda one: (*AREAS, one).index(one))
    for module in modules:
        here = [label for label in labels if label.partition(".")[0] == module]
        tracked = [label for label in here if ".track_" in label]
        panels: dict[str, dict[str, list]] = {}
        units = {}
        for label in tracked:
            name, setting = split(label)[0], setting_of(label, about)
            if about.get(name, {}).get("unit", "").startswith("x"):
                title = title_of(name, about)
                panels.setdefault(title, {})[setting] = [one["values"].get(label) for one in results]
                units[title] = about[name]["unit"]
        parts.append(f"<h3>{html.escape(AREAS.get(module, module))}</h3>")
        parts.append(drawing(commits, panels, units) if panels else "")
        table = f"<table><tr><th>figure</th><th></th>{head}<th>change</th></tr>"
        parts.append(f"{table}{rows_of(tracked, results, about)}</table>" if tracked else "")
        timed = [label for label in here if ".time_" in label]
        if timed:
            rows = rows_of(timed, results, about)
            parts.append(f"<details><summary>absolute times, seconds</summary>{table}{rows}</table></details>")
    return "".join(parts)


def page(history: list[dict], about: dict[str, dict] | None = None) -> str:
    """The whole page. about: the benchmarks of asv's benchmarks.json: their names, units and types."""
    log = subprocess.run(
        ["git", "log", "--all", "--format=%H %ad %s", "--date=short"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout  # fmt: skip
    subjects = dict(line.split(" ", 1) for line in log.splitlines() if " " in line)
    machines = sorted({one["machine"] for one in history})
    sections = [
        section(machine, [one for one in history if one["machine"] == machine], about or {}, subjects)
        for machine in machines
    ]
    return PAGE.format(body="".join(sections))


def main() -> int:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "history.html")
    arguments = parser.parse_args()
    history = read(RESULTS)
    if not history:
        print(f"bench/results/asv: expected results of asv; got none in {RESULTS}. Run `asv run`.", file=sys.stderr)
        return 2
    about = json.loads((RESULTS / "benchmarks.json").read_text())
    arguments.output.write_text(page(history, {name: one for name, one in about.items() if isinstance(one, dict)}))
    figures = len({name for one in history for name in one["values"]})
    print(f"{arguments.output}: {len(history)} results (commits and machines), {figures} figures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
