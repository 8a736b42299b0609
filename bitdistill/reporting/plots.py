"""The figures of the report, drawn from plain arrays with matplotlib (drawing.py). Nothing here reads a file."""

import itertools
import re

import numpy as np

from bitdistill.names import DISTILLED, FULL_PRECISION, PROJECTIONS, TERNARY_BASELINE
from bitdistill.reporting.drawing import (
    BLUE,
    GREEN,
    INK,
    ON_BARS,
    ORANGE,
    PURPLE,
    QUIET,
    draw_curve,
    finite_series,
    log_if_wide,
    new_axes,
    write_across,
)

KIND_COLORS = (BLUE, ORANGE, GREEN, PURPLE, "#b5483a", "#b79a1f", "#5b6bc0")
SETTING_COLORS = {
    FULL_PRECISION: BLUE,
    TERNARY_BASELINE: ORANGE,
    DISTILLED: GREEN,
    "int4 RTN": QUIET,
    "int4 GPTQ": PURPLE,
}
TERM_COLORS = {"loss": INK, "loss_ce": BLUE, "loss_logits": ORANGE, "loss_attention": PURPLE}
TERM_NAMES = {
    "loss": "total",
    "loss_ce": "cross-entropy",
    "loss_logits": "logits distillation",
    "loss_attention": "relations",
}
MAX_TOKENS = 40  # tokens in an attention map whose labels can still be read


def overview(lines: list[dict], metric: str, majority: float | None):
    """Score with interval, bytes and speed of each line of the comparison table, on one shared axis of settings.

    Args:
        lines: dicts with `label`, `setting`, `score` (row of scores.json or None), `speed` (row of speed.json or None).
        metric: name of the score. majority: score in 0..100 of always answering the most frequent label, or None.
    """
    figure, axes = new_axes(10.5, 1.15 + 0.34 * len(lines), 1, 3, sharey=True, width_ratios=(1.25, 1, 1))
    score_axis, size_axis, speed_axis = axes[0]
    has_size = has_speed = False
    for y, line in enumerate(lines):
        color, score, speed = SETTING_COLORS.get(line["setting"], INK), line["score"], line["speed"] or {}
        if score:
            low, high = score.get("interval") or (score["score"], score["score"])
            score_axis.plot([low, high], [y, y], color=color, linewidth=2.2, solid_capstyle="butt")
            score_axis.plot(score["score"], y, "o", color=color, markersize=6)
        if speed.get("model_bytes"):
            has_size = True
            linear = speed.get("linear_bytes") or 0
            size_axis.barh(y, linear / 1e6, 0.55, color=color)
            size_axis.barh(y, (speed["model_bytes"] - linear) / 1e6, 0.55, linear / 1e6, color=color, alpha=0.4)
        if speed.get("tokens_per_second"):
            has_speed = True
            speed_axis.barh(y, speed["tokens_per_second"], 0.55, color=color)
            speed_axis.plot(speed.get("spread") or [], [y, y] if speed.get("spread") else [], color=INK, linewidth=1.2)
    if majority is not None:
        score_axis.axvline(majority, color=INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.7)
        words = {"fontsize": 8, "va": "top", "alpha": 0.8, "xytext": (3, -2), "textcoords": "offset points"}
        score_axis.annotate("most frequent label", (majority, 1), xycoords=("data", "axes fraction"), **words)
    score_axis.set(title="Score, 95 % interval", xlabel=f"{metric} (0-100)")
    score_axis.set_yticks(range(len(lines)), [line["label"] for line in lines])
    score_axis.set_ylim(len(lines) - 0.5, -0.5)
    score_axis.margins(x=0.1)
    size_axis.set(title="File: linears (solid) + rest (light)", xlabel="MB")
    speed_axis.set(title="Speed; line: range of repetitions", xlabel="tokens per second")
    for axis, known in ((size_axis, has_size), (speed_axis, has_speed)):
        if not known:
            write_across(axis, "not run")
    for axis in axes[0]:
        axis.grid(visible=False, axis="y")
        axis.tick_params(axis="y", length=0)
    return figure


def losses(metrics: dict[str, list[dict]]):
    """Each loss term over the steps, one panel per stage. metrics: stage -> lines of metrics.jsonl."""
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    figure, axes = new_axes(10.5, 2.55 * rows + 0.3, rows, columns)
    shown = {}
    for axis, (stage, lines) in zip(axes.flat, metrics.items(), strict=False):
        curves = {term: finite_series(lines, term) for term in TERM_NAMES}
        if np.array_equal(curves["loss"][1], curves["loss_ce"][1]):
            del curves["loss_ce"]  # the only term: one curve says it
        for term, (steps, values) in curves.items():
            if len(values):
                draw_curve(axis, steps, values, TERM_COLORS[term], TERM_NAMES[term])
        log_if_wide(axis, *(values for _, values in curves.values()))
        axis.set(title=stage, xlabel="step")
        shown |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    for axis in axes.flat[len(metrics) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("loss (nats)")
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=4)
    return figure


def _quotient(lines: list[dict], above: tuple[str, ...], below: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the product of `above` over `below`, where all were logged and the quotient is finite."""
    rows = [row for row in lines if all(key in row for key in above) and row.get(below)]
    return finite_series(
        [{"step": row["step"], "q": np.prod([row[key] for key in above]) / row[below]} for row in rows], "q"
    )


def balance(lines: list[dict]):
    """What the balancing did: gamma, the pull of the relations against that of cross-entropy, the gradient norm."""
    norm = "grad_norm_"
    ratios = (
        ("of losses (over cross-entropy)", PURPLE, _quotient(lines, ("gamma_attention", "loss_attention"), "loss_ce")),
        (
            "of gradients (over the rest)",
            GREEN,
            _quotient(lines, ("gamma_attention", norm + "attention"), norm + "task"),
        ),
    )
    panels = (
        ("Gamma of the relation loss", "gamma", [(None, PURPLE, finite_series(lines, "gamma_attention"))]),
        ("Gamma x relations, against the task", "ratio", ratios),
        ("Norm of the whole gradient", "L2 norm, before clipping", [(None, BLUE, finite_series(lines, "grad_norm"))]),
    )
    figure, axes = new_axes(10.5, 2.6, 1, 3)
    for axis, (title, unit, curves) in zip(axes[0], panels, strict=True):
        known = [(label, color, series) for label, color, series in curves if len(series[1])]
        for label, color, series in known:
            draw_curve(axis, *series, color, label)
        log_if_wide(axis, *(values for _, _, (_, values) in known))
        if not known:
            write_across(axis, "not logged")
        if len(known) > 1:
            axis.legend()
        axis.set(title=title, xlabel="step", ylabel=unit)
    return figure


def kind_and_depth(name: str) -> tuple[str, int]:
    """`model.layers.3.self_attn.q_proj` -> ("q_proj", 3); without a layer number, depth 0."""
    depth = re.search(r"\.(\d+)\.", name)
    return name.rsplit(".", 1)[-1], int(depth.group(1)) if depth else 0


def _kinds(names) -> list[str]:
    """Types of projections in the order a token meets them; unknown ones after, as they come."""
    found = list(dict.fromkeys(kind_and_depth(name)[0] for name in names))
    return [kind for kind in PROJECTIONS if kind in found] + [kind for kind in found if kind not in PROJECTIONS]


def weights(histograms: dict[str, dict]):
    """Density of weight / absmean, all layers and by type of projection, with the rounding boundaries of absmean at +-0.5.

    Args:
        histograms: stage -> content of weights.json, in the order in which the stages ran.
    """
    colors = dict(zip(("refine", "pretrain", "distill"), (BLUE, ORANGE, GREEN), strict=True))
    kinds = _kinds(name for histogram in histograms.values() for name in histogram["layers"])
    panels = [None, *kinds]
    rows = -(-len(panels) // 4)
    figure, axes = new_axes(10.5, 2.25 * rows + 0.35, rows, min(4, len(panels)), sharex=True)
    for axis, kind in zip(axes.flat, panels, strict=False):
        for stage, histogram in histograms.items():
            edges = np.asarray(histogram["edges"], dtype=float)
            chosen = [
                np.asarray(layer["counts"], dtype=float)
                for name, layer in histogram["layers"].items()
                if kind in (None, kind_and_depth(name)[0])
            ]
            counts = np.sum(chosen, axis=0) if chosen else np.zeros(len(edges) - 1)
            density = counts / max(counts.sum(), 1) / np.diff(edges)
            color = colors.get(stage, INK)
            if stage == "refine":
                axis.stairs(density, edges, fill=True, color=color, alpha=0.3, label=f"after {stage}")
            else:
                axis.stairs(density, edges, color=color, linewidth=1.4, label=f"after {stage}")
        for boundary in (-0.5, 0.5):
            axis.axvline(boundary, color=INK, linewidth=0.9, linestyle=(0, (3, 2)), alpha=0.75)
        for code, place in (("-1", 0.2), ("0", 0.5), ("+1", 0.8)):
            axis.text(place, 1, code, transform=axis.transAxes, ha="center", va="top", fontsize=8, alpha=0.6)
        axis.set_title("all ternary layers" if kind is None else kind)
        axis.set_xlim(-3, 3)
        axis.set_xticks(range(-2, 3))
        axis.margins(y=0.16)
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
        axis.grid(visible=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("weight / weight_scale")
    for axis in axes[:, 0]:
        axis.set_ylabel("density")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def health(lines: list[dict]):
    """What the ternary layers did over one stage: heat maps layer x step of zeros and flips, the shares of the codes at the
    end, and by type of projection the drift of the scales, the outliers of the inputs and the gradients.

    Args:
        lines: those of health.jsonl of one stage. What they do not hold is named as not logged.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for line in lines for name in line["layers"]))
    kinds = _kinds(names)
    names.sort(key=lambda name: (kinds.index(kind_and_depth(name)[0]), kind_and_depth(name)[1]))
    figure = Figure(figsize=(10.5, 6.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.4, 1))
    zeros, flips, shares = above.subplots(1, 3, width_ratios=(1.1, 1.1, 1))
    _heat_map(above, zeros, lines, names, "zeros", "Zeros: share of the codes")
    _heat_map(above, flips, lines, names, "flips", "Flips: share of the codes, per step")
    _shares(shares, lines[-1], kinds)
    axes = dict(zip(("scale_drift", "peak_to_rms", "zero_activations", "grad_norm"), below.subplots(1, 4), strict=True))
    titles = ("Scale, start = 1", "Input: peak / RMS", "Input: int8 codes of 0", "Gradient, L2 norm")
    for (key, axis), title in zip(axes.items(), titles, strict=True):
        _by_kind(axis, lines, kinds, key)
        axis.set(title=title, xlabel="step")
    handles, labels = next((h for axis in axes.values() if (h := axis.get_legend_handles_labels())[0]), ([], []))
    if handles:
        below.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _heat_map(figure, axis, lines: list[dict], names: list[str], key: str, title: str) -> None:
    """A row per layer, grouped by projection with the first layer on top; a column per measurement."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    table = np.array([[line["layers"].get(name, {}).get(key, np.nan) for line in lines] for name in names], dtype=float)
    axis.set(title=title, xlabel="step")
    axis.grid(visible=False)
    if not np.isfinite(table).any():
        write_across(axis, "not logged")
        axis.set(xticks=[], yticks=[])
        return
    shades = colormaps["viridis"].with_extremes(bad=QUIET, under=QUIET)
    if key == "flips":
        positive = table[table > 0]
        low, high = (positive.min(), positive.max()) if positive.size else (1e-6, 1e-5)
        norm = LogNorm(low, max(high, 1.01 * low))
    else:  # of a sound stage the middle of the colors; a layer that collapses leaves them
        norm = Normalize(min(0.25, np.nanmin(table)), max(0.45, np.nanmax(table)))
    image = axis.imshow(table, aspect="auto", cmap=shades, norm=norm, interpolation="nearest")
    marks = range(0, len(lines), -(-len(lines) // 6))
    axis.set_xticks(marks, [f"{lines[mark]['step']:g}" for mark in marks])
    kinds = [kind_and_depth(name)[0] for name in names]
    groups = list(dict.fromkeys(kinds))
    starts = [kinds.index(kind) for kind in groups]
    middles = [start + (kinds.count(kind) - 1) / 2 for start, kind in zip(starts, groups, strict=True)]
    axis.set_yticks(middles, groups)
    axis.tick_params(axis="y", length=0)
    for start in starts[1:]:
        axis.axhline(start - 0.5, color="white", linewidth=1)
    bar = figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02, extend="min" if key == "flips" else "neither")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5)
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.ax.yaxis.set_minor_formatter("")


def _shares(axis, line: dict, kinds: list[str]) -> None:
    """Stacked shares of -1, 0 and +1, mean over the layers of a projection, at one measurement."""
    parts = (("minus", "-1", BLUE), ("zeros", "0", QUIET), ("plus", "+1", ORANGE))
    axis.set(title=f"Codes -1, 0, +1 at step {line['step']:,}", xlim=(0, 1))
    axis.grid(visible=False)
    for y, kind in enumerate(kinds):
        layers = [layer for name, layer in line["layers"].items() if kind_and_depth(name)[0] == kind]
        left = 0.0
        for key, label, color in parts:
            if not layers or any(key not in layer for layer in layers):
                axis.clear()
                axis.set(title="Codes -1, 0, +1", xticks=[], yticks=[])
                return write_across(axis, "not logged")
            share = float(np.mean([layer[key] for layer in layers]))
            axis.barh(y, share, 0.72, left, color=color)
            if share > 0.15:
                words = f"{label}: {100 * share:.0f} %" if y == 0 else f"{100 * share:.0f} %"
                axis.text(left + share / 2, y, words, ha="center", va="center", fontsize=7.5, color=ON_BARS)
            left += share
    axis.set_yticks(range(len(kinds)), kinds)
    axis.set_ylim(len(kinds) - 0.5, -0.5)
    axis.set_xticks([])
    axis.tick_params(axis="y", length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _by_kind(axis, lines: list[dict], kinds: list[str], key: str) -> None:
    """One line per projection, the median over its layers; a faint band from their lowest to their highest."""
    drawn = []
    for kind, color in zip(kinds, itertools.cycle(KIND_COLORS), strict=False):
        rows = [
            (line["step"], *np.percentile(values, (0, 50, 100)))
            for line in lines
            if (
                values := [v[key] for name, v in line["layers"].items() if kind_and_depth(name)[0] == kind and key in v]
            )
        ]
        if rows:
            steps, low, middle, high = np.array(rows, dtype=float).T
            dots = {"marker": "o", "markersize": 2.5} if len(rows) < 3 else {}
            axis.plot(steps, middle, color=color, linewidth=1.4, label=kind, **dots)
            axis.fill_between(steps, low, high, color=color, alpha=0.1, linewidth=0)
            drawn += [low, high]
    if drawn:
        log_if_wide(axis, *drawn)
    else:
        write_across(axis, "not logged")


def pick_heads(teacher: np.ndarray, student: np.ndarray) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(title, teacher map, student map) of the closest, the middling and the farthest head, by mean |difference|.

    Teacher and student may differ in head count; heads then have no partner, and the mean over heads is compared.
    """
    if teacher.shape != student.shape:
        return [("mean of all heads", teacher.mean(0), student.mean(0))]
    order = np.abs(teacher - student).mean((1, 2)).argsort(kind="stable")
    words = {int(order[0]): "closest", int(order[len(order) // 2]): "middling", int(order[-1]): "farthest"}
    return [(f"head {head} ({word})", teacher[head], student[head]) for head, word in words.items()]


def attention(teacher: np.ndarray, student: np.ndarray, tokens: list[str]):
    """Teacher, student and student - teacher, a row per chosen head; the last MAX_TOKENS tokens of the example."""
    from matplotlib.colors import PowerNorm, TwoSlopeNorm

    start = max(0, len(tokens) - MAX_TOKENS)
    labels = [_visible(token) for token in tokens[start:]]
    rows = [
        (title, *(np.where(np.tri(len(tokens), dtype=bool), a, np.nan)[start:, start:] for a in maps))
        for title, *maps in pick_heads(teacher, student)
    ]
    figure, axes = new_axes(10.5, 3.55 * len(rows) + 0.5, len(rows), 3)
    top = max(np.nanmax(maps) for _, *both in rows for maps in both)
    far = max(np.nanmax(np.abs(b - a)) for _, a, b in rows) or 1e-6
    for row, (title, a, b) in zip(axes, rows, strict=True):
        shades = PowerNorm(0.5, 0, max(top, 1e-6))
        left = row[0].imshow(a, cmap="viridis", norm=shades, interpolation="nearest")
        row[1].imshow(b, cmap="viridis", norm=shades, interpolation="nearest")
        right = row[2].imshow(b - a, cmap="PuOr_r", norm=TwoSlopeNorm(0, -far, far), interpolation="nearest")
        for axis, what in zip(row, ("teacher", "student", "student - teacher"), strict=True):
            axis.set_title(f"{title}: {what}")
            axis.grid(visible=False)
            axis.tick_params(length=0, pad=1)
            size = 7 if len(labels) <= 26 else 5.2
            axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=size)
            axis.set_yticks(*((range(len(labels)), labels) if axis is row[0] else ((), ())), fontsize=size)
            for spine in axis.spines.values():
                spine.set_visible(False)
        row[0].set_ylabel("query token")
    for axis in axes[-1]:
        axis.set_xlabel("key token")
    for mappable, where, label in (
        (left, axes[:, :2], "attention (square-root shades)"),
        (right, axes[:, 2], "change"),
    ):
        bar = figure.colorbar(mappable, ax=where, orientation="horizontal", fraction=0.03, pad=0.02, aspect=50)
        bar.set_label(label)
        bar.outline.set_visible(False)
    return figure


def _visible(token: str) -> str:
    """A token as a short label: spaces (also as tokenizers mark them) shown as a dot, nothing unprintable."""
    for mark in "Ġ▁ ":
        token = token.replace(mark, "·")
    token = token.replace("Ċ", "\n")
    token = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in token)
    return token if len(token) <= 12 else token[:11] + "…"
