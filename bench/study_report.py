"""The results of a study, from its results file alone: means with intervals, paired tests, a table in Markdown, and plots.

Statistics, over S seeds and N rows (the same rows in every cell):

    mean        of all S * N scores
    interval    95 %, bootstrap that draws seeds and, within them, the same rows for all seeds (10,000 times)
    difference  to a reference cell, on the same rows and seeds; its interval likewise
    p           two-sided sign-flip test over rows of the differences averaged over seeds, Holm-corrected within the study

Three seeds say little about the spread between seeds: a bootstrap of three draws is too narrow for it, so each seed's own
score is listed too.
"""

import base64
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

RESAMPLES = 10_000
BEHIND = {  # the stages that the score of a stage stands on, besides the demo's own base model
    "teacher": ("teacher",),
    "baseline": ("baseline",),
    "distill": ("teacher", "refine", "cache", "pretrain", "distill"),
    "pretrain": ("refine", "cache", "pretrain"),
    "refine": ("refine",),
    "base": (),
}


def scores_of(cell: dict[str, Any]) -> np.ndarray:
    """One number per row: 1 right, 0 wrong; or the mean loss of a block in nats."""
    if cell["metric"] == "perplexity":
        return np.array(cell["losses"])
    return np.unpackbits(np.frombuffer(base64.b64decode(cell["right"]), np.uint8))[: cell["rows"]].astype(float)


def by_cell(result: dict[str, Any]) -> dict[str, dict[int, np.ndarray]]:
    """{cell: {seed: scores (N,)}}."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for one in result["cells"].values():
        found.setdefault(one["cell"], {})[one["seed"]] = scores_of(one)
    return found


def interval(values_SN: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean, over seeds and rows at once."""
    return _ends(_resampled_means(values_SN, seed))


def ratio_interval(a_SN: np.ndarray, b_SN: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The same of ``mean(a) / mean(b)``, both drawn with the same seeds and rows: what is retained."""
    return _ends(_resampled_means(a_SN, seed) / _resampled_means(b_SN, seed))


def _ends(means_R: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(means_R, [2.5, 97.5])
    return float(low), float(high)


def _resampled_means(values_SN: np.ndarray, seed: int) -> np.ndarray:
    """Means of RESAMPLES draws; the same draws for every array of one shape."""
    weights_RS, counts_RN = _draws(*values_SN.shape, seed)
    sums_RS = np.concatenate([part_RN @ values_SN.T for part_RN in np.split(counts_RN, RESAMPLES // 500)])
    return (weights_RS * sums_RS).sum(axis=1) / values_SN.shape[1]


@functools.lru_cache(maxsize=4)  # the cells of a study have one shape, and drawing is the slow part
def _draws(seeds: int, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How much each seed weighs (RESAMPLES, S), and how often each row is drawn (RESAMPLES, N)."""
    generator = np.random.default_rng(seed)
    weights_RS = generator.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    return weights_RS, generator.multinomial(rows, np.full(rows, 1 / rows), RESAMPLES).astype(np.uint8)


def sign_flip_p(differences_N: np.ndarray, seed: int = 0) -> float:
    """Two-sided p of a mean difference of 0, by flipping the sign of each row's difference at random."""
    generator = np.random.default_rng(seed)
    nonzero = differences_N[differences_N != 0]
    if not len(nonzero):
        return 1.0
    total, extreme = nonzero.sum(), 0
    for _ in range(RESAMPLES // 500):
        bits = np.frombuffer(generator.bytes(-(-500 * len(nonzero) // 8)), np.uint8)
        kept = np.unpackbits(bits, count=500 * len(nonzero))
        flipped = 2 * (kept.reshape(500, -1) @ nonzero) - total
        extreme += int((np.abs(flipped) >= abs(total) - 1e-12).sum())
    return (extreme + 1) / (RESAMPLES + 1)


def holm(ps: list[float]) -> list[float]:
    """Holm's correction of several p values, in their order."""
    order, adjusted, largest = np.argsort(ps), [0.0] * len(ps), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


def paired(a: dict[int, np.ndarray], b: dict[int, np.ndarray]) -> np.ndarray | None:
    """Differences a - b (S, N) over the seeds that both have; None when there are none."""
    seeds = sorted(set(a) & set(b))
    return np.stack([a[seed] - b[seed] for seed in seeds]) if seeds else None


def summaries(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each cell: mean, interval, each seed's score, cost, and the comparison with each reference."""
    cells, rows = by_cell(result), []
    metric = next(iter(result["cells"].values()))["metric"] if result["cells"] else "accuracy"
    percent = 100.0 if metric == "accuracy" else 1.0
    for name in result["settings"]:
        if name not in cells:
            continue
        of_seeds = cells[name]
        values_SN = np.stack([of_seeds[seed] for seed in sorted(of_seeds)])
        runs = [one for one in result["cells"].values() if one["cell"] == name]
        against = {}
        for reference in result.get("references", []):
            difference_SN = paired(of_seeds, cells.get(reference, {})) if reference != name else None
            if difference_SN is not None:
                against[reference] = {
                    "difference": percent * float(difference_SN.mean()),
                    "interval": [percent * end for end in interval(difference_SN)],
                    "p": sign_flip_p(difference_SN.mean(axis=0)),
                    "ratio": retained(of_seeds, cells[reference]),
                }
        used = [stages_behind(one) for one in runs]
        rows.append(
            {
                "cell": name,
                "seeds": sorted(of_seeds),
                "metric": metric,
                "mean": percent * float(values_SN.mean()),
                "interval": [percent * end for end in interval(values_SN)],
                "each": [percent * float(of_seeds[seed].mean()) for seed in sorted(of_seeds)],
                "against": against,
                "training_seconds": float(np.median([sum(s["seconds"] for s in u.values()) for u in used])),
                "stage2_tokens": max((u["pretrain"].get("tokens", 0) for u in used if "pretrain" in u), default=0),
            }
        )
    for reference in result.get("references", []):
        compared = [row for row in rows if reference in row["against"]]
        corrected = holm([row["against"][reference]["p"] for row in compared])
        for row, p in zip(compared, corrected, strict=True):
            row["against"][reference]["p_holm"] = p
    return rows


def retained(a: dict[int, np.ndarray], b: dict[int, np.ndarray]) -> tuple[float, float, float]:
    """(mean of a / mean of b, low, high) over the seeds that both have."""
    seeds = sorted(set(a) & set(b))
    a_SN, b_SN = np.stack([a[seed] for seed in seeds]), np.stack([b[seed] for seed in seeds])
    return float(a_SN.mean() / b_SN.mean()), *ratio_interval(a_SN, b_SN)


def stages_behind(cell: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The training stages that a cell's score stands on, the base model's own training left out."""
    chain = BEHIND[cell["scored"]]
    return {name: facts for name, facts in cell["stages"].items() if name in chain}


def differences(result: dict[str, Any]) -> dict[str, Any]:
    """For bench/claims.py: BitDistill against FP16-SFT in points, where a study has both."""
    cells = by_cell(result)
    if "task" not in result or not {"BitDistill", "FP16-SFT"} <= set(cells):
        return {}
    difference_SN = paired(cells["BitDistill"], cells["FP16-SFT"])
    if difference_SN is None:
        return {}
    points, ends = 100 * float(difference_SN.mean()), [100 * end for end in interval(difference_SN)]
    return {
        "difference_to_fp16_sft": {result["task"]: {"points": points, "interval": ends, "seeds": len(difference_SN)}}
    }


def markdown(result: dict[str, Any]) -> str:
    """The table."""
    references = result.get("references", [])
    rows = summaries(result)
    accuracy = not rows or rows[0]["metric"] == "accuracy"
    unit = "accuracy, %" if accuracy else "loss, nats per token"
    digits = 1 if accuracy else 3
    head = ["setting", f"{unit} [95 %]", "each seed", *[f"against {name} [95 %], p" for name in references]]
    head += ["training, s", "stage-2 tokens"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        low, high = row["interval"]
        cells = [row["cell"], f"{row['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"]
        cells.append(" ".join(f"{one:.{digits}f}" for one in row["each"]))
        for name in references:
            one = row["against"].get(name)
            if one is None:
                cells.append("")
                continue
            low, high = one["interval"]
            text = f"{one['difference']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}], p {one['p_holm']:.2g}"
            if name == "FP16-SFT":
                share, low, high = (100 * value for value in one["ratio"])
                text += f"; {share:.1f} % [{low:.1f}, {high:.1f}] of it"
            cells.append(text)
        tokens = f"{row['stage2_tokens']:,}" if row["stage2_tokens"] else ""
        lines.append(f"| {' | '.join([*cells, format(row['training_seconds'], '.0f'), tokens])} |")
    at = result["machine"]
    count = next(iter(result["cells"].values()))["rows"] if result["cells"] else 0
    what = "rows" if accuracy else "blocks"
    processor, *others = _processors(result)
    foot = f"{count:,} {what} per seed; {processor[0]}, one thread per run, {at['date'][:10]}; p: Holm-corrected."
    foot += "".join(f" On {name}: {'; '.join(names)}." for name, names in others)
    for name, (_, exponent, end) in reach(result, rows).items():
        over = X_NAMES.get(result["x"], result["x"])
        foot += f" What is missing to {references[0]} falls with the power {exponent:.2f} of {over}"
        foot += "" if name == "default" else f" ({name})"
        foot += f"; going on like this, {result['goal']:g} are left at about {float(f'{end:.2g}'):,.0f}."
    return "\n".join([f"### {result['name']}", "", str(result.get("about", "")).strip(), "", *lines, "", foot])


def _processors(result: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Processors with the cells that ran there; the one of most cells first."""
    here, cells_of = result["machine"]["processor"], {}
    for cell in result["cells"].values():
        cells_of.setdefault(cell.get("processor", here), {})[cell["cell"]] = None
    found = [(name, list(cells)) for name, cells in cells_of.items()]
    return sorted(found, key=lambda one: -len(one[1])) or [(here, [])]


def draw(result: dict[str, Any], path: Path) -> None:
    """Cells with their intervals and seeds; or, with `x`, curves over that setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from bitdistill.reporting.drawing import STYLE

    rows = summaries(result)
    label = "accuracy, %" if rows[0]["metric"] == "accuracy" else "loss, nats per token"
    with plt.rc_context({**STYLE, "figure.facecolor": "white"}):
        if result.get("x"):
            figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
            lines = curves(result, rows)
            colors = dict(zip(lines, itertools.cycle(COLORS), strict=False))
            for name, points in lines.items():
                color = colors[name]
                x = [point[0] for point in points]
                mean = np.array([point[1]["mean"] for point in points])
                ends = np.array([point[1]["interval"] for point in points]).T
                axes.plot(x, mean, "o-", ms=4, lw=1.6, color=color, label=name)
                axes.fill_between(x, *ends, color=color, alpha=0.15, lw=0)
            reached = reach(result, rows)
            for name, (factor, exponent, end) in reached.items():
                color = colors[name]
                base = _first_reference(result, rows)
                x = np.geomspace(min(point[0] for point in lines[name]), end)
                axes.plot(x, base + factor * x**exponent, ":", lw=1.2, color=color, label="if it went on like this")
                axes.plot(end, base + result["goal"], "x", ms=7, color=color)
            for row, color in zip(
                (one for one in rows if one["cell"] in result.get("references", [])), GREYS, strict=False
            ):
                axes.axhline(row["mean"], color=color, lw=1, ls="--", label=row["cell"])
            ticks = {point[0] for points in lines.values() for point in points}
            ticks = sorted(ticks | {end for _, _, end in reached.values()})
            axes.set_xscale("log")
            axes.set_xticks(ticks, [_short(tick) for tick in ticks])
            axes.minorticks_off()
            axes.set(xlabel=X_NAMES.get(result["x"], result["x"]), ylabel=label)
            axes.legend()
        else:
            figure, axes = plt.subplots(figsize=(7.5, 0.34 * len(rows) + 1), layout="constrained")
            for y, row in enumerate(rows):
                color = COLORS[1] if row["cell"] in result.get("references", []) else COLORS[0]
                axes.plot(row["interval"], [y, y], color=color, lw=5, alpha=0.3, solid_capstyle="round")
                axes.plot(row["each"], [y] * len(row["each"]), "|", color=color, ms=9)
                axes.plot(row["mean"], y, "o", color=color, ms=5.5)
            axes.set_yticks(range(len(rows)), [row["cell"] for row in rows])
            axes.invert_yaxis()
            # Under the whole picture: with long names the axes are narrower than this.
            figure.supxlabel(f"{label}; dot: mean, band: 95 %, strokes: seeds", fontsize="medium")
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _short(number: float) -> str:
    """Three digits of a number, for a tick: 82 k, 0.25."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if number >= size:
            return f"{number / (1000 if letter == ' k' else size):.3g}{letter}"
    return f"{number:,.0f}" if number >= 1 else f"{number:g}"


COLORS = ("#3d88c7", "#dd7b1e", "#12946f", "#b567a8", "#8c6d31", "#c7516a", "#5b6ee1", "#7f7f7f")
GREYS = ("#23272f", "#7a828f", "#aab0ba")
X_NAMES = {"pretrain.max_steps": "stage-2 tokens"}


def curves(result: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, dict[str, Any]]]]:
    """Cells that differ in the `x` setting alone, as {name: [(x, row), ...]} by rising x."""
    found: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for row in rows:
        settings = result["settings"][row["cell"]]
        if result["x"] not in settings:
            continue
        name = row["cell"].rpartition(",")[0] or "default"
        x = row["stage2_tokens"] if result["x"] == "pretrain.max_steps" else settings[result["x"]]
        found.setdefault(name, []).append((x, row))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in found.items()}


def _first_reference(result: dict[str, Any], rows: list[dict[str, Any]]) -> float:
    return next(row["mean"] for row in rows if row["cell"] == result["references"][0])


def reach(result: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """How far each curve of losses would have to go until it is `goal` above the first reference, if it went on as it does.

    Fits ``loss - reference = factor * x^exponent`` by least squares of the logarithms.

    Returns: {curve: (factor, exponent, x at the goal)}, of curves with three points and more that fall.
    """
    if "goal" not in result:
        return {}
    base = _first_reference(result, rows)
    found = {}
    for name, points in curves(result, rows).items():
        x, loss = np.array([(x, row["mean"]) for x, row in points]).T
        if len(x) >= 3 and (loss > base).all():
            exponent, shift = np.polyfit(np.log(x), np.log(loss - base), 1)
            if exponent < 0:
                found[name] = (
                    float(np.exp(shift)),
                    float(exponent),
                    float((result["goal"] / np.exp(shift)) ** (1 / exponent)),
                )
    return found


def into_page(text: str, folder: Path) -> str:
    """A page with the table of every study that it names between its two markers, from the results in `folder`.

    The tables are those that `write` left beside the results. A study's place is a line ``<!-- study: NAME -->``,
    whatever is there now, and a line ``<!-- end of study -->``.

    Raises:
        ValueError: a marker without its end.
    """
    pieces = text.split("<!-- study: ")
    for index, piece in enumerate(pieces[1:], start=1):
        name, _, rest = piece.partition(" -->")
        _, end, after = rest.partition("<!-- end of study -->")
        if not end:
            raise ValueError(f"page: expected an end of study {name}; got none. Add <!-- end of study --> after it.")
        path = folder / f"{name}.md"
        table = path.read_text().strip() if path.is_file() else "Not run yet."
        picture = f"\n\n![{name}](../bench/results/studies/{name}.png)" if path.is_file() else ""
        pieces[index] = f"{name} -->\n{table}{picture}\n{end}{after}"
    return "<!-- study: ".join(pieces)


def write(path: Path) -> str:
    """The table, also written beside the results as .md, and the plot as .png.

    Raises:
        ValueError: no results there.
    """
    if not path.is_file():
        raise ValueError(f"{path}: expected a study's results (JSON); got no such file. Run the study first.")
    result = json.loads(path.read_text())
    if not result.get("cells"):
        raise ValueError(f"{path}: expected results of at least one run; got none. See the errors above.")
    text = markdown(result)
    path.with_suffix(".md").write_text(text + "\n")
    draw(result, path.with_suffix(".png"))
    return text
