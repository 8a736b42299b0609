"""What all figures of the report share: colors, style, one drawing as SVG and PNG, curves that keep their spikes.

One drawing serves the light page, the dark page and the PNG file. All text and axes are drawn in INK on a transparent
background; in the SVG, INK becomes `currentColor`, so that the page's own text color applies. The colors of data can be told
apart by color-blind readers (after Okabe and Ito) and are visible both on white and on near-black. Text stays text in the SVG
(small, searchable), and a `$` in a token is never taken for mathematics.
"""

import io
import re
import warnings

import numpy as np

INK = "#23272f"
BLUE, ORANGE, GREEN, PURPLE = "#3d88c7", "#dd7b1e", "#12946f", "#b567a8"
QUIET = "#9aa1ae"
ON_BARS = "#16181d"  # nearly INK, but not: it stays dark on the dark page
MAX_POINTS = 400  # bins of a raw curve; each gives its lowest and its highest value, so that spikes survive

STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Segoe UI", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "bitdistill",
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
}


def draw(plot, *args) -> tuple[str, bytes]:
    """Draws `plot(*args)` once, and returns it as inline SVG (scaling with the page) and as PNG bytes on white."""
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # Tokens may be in any script: the SVG leaves the glyphs to the browser, the PNG shows a box. Fonts of the list
        # that are not installed are passed over.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = plot(*args)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.set_layout_engine("none")  # the places are found; finding them again takes longer than drawing
        figure.savefig(png, format="png", dpi=140, facecolor="white")
    text = svg.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r' (width|height)="[^"]*pt"', "", text, count=2)  # the viewBox stays: the page sets the size
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL), png.getvalue()


def new_axes(width: float, height: float, rows: int = 1, columns: int = 1, **grid):
    """A figure of width x height inches and its (rows, columns) array of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **grid)


def finite_series(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one key, in order of steps."""
    pairs = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
    keep = np.isfinite(values)
    return steps[keep], values[keep]


def smooth(values: np.ndarray) -> np.ndarray:
    """Centered mean over a window of a thirtieth of the curve; at the ends, over the part of the window that exists."""
    window = np.ones(min(len(values), 2 * (len(values) // 60) + 1))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most 2 * MAX_POINTS points: the lowest and the highest of each bin, so that no spike is lost."""
    if len(values) <= 2 * MAX_POINTS:
        return steps, values
    bins = np.array_split(np.arange(len(values)), MAX_POINTS)
    picked = sorted({index for part in bins for index in (part[values[part].argmin()], part[values[part].argmax()])})
    return steps[picked], values[picked]


def draw_curve(axis, steps, values, color: str, label: str | None) -> None:
    """Raw values light, their smoothed course on top."""
    raw = thin(steps, values)
    axis.plot(*raw, color=color, alpha=0.28, linewidth=0.7)
    course = smooth(values)
    stride = max(1, len(course) // MAX_POINTS)
    dots = {"marker": "o", "markersize": 3} if len(values) < 3 else {}
    axis.plot(steps[::stride], course[::stride], color=color, linewidth=1.6, label=label, **dots)


def write_across(axis, words: str) -> None:
    """Words in the middle of an empty panel."""
    axis.text(0.5, 0.5, words, transform=axis.transAxes, ha="center", va="center", alpha=0.6)


def log_if_wide(axis, *arrays) -> None:
    """A logarithmic axis where positive values span more than a factor of thirty."""
    values = np.concatenate([*arrays, np.empty(0)])
    if values.size and values.min() > 0 and values.max() / values.min() > 30:
        axis.set_yscale("log")
        plain_ticks(axis)


def plain_ticks(axis) -> None:
    """0.001 instead of the mathematics that STYLE switches off for the sake of tokens with a dollar sign."""
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
