"""The comparison of the settings: a line for each setting and runner, the ratios, and the table for terminal and page."""

import re
from io import StringIO
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bitdistill.names import FULL_PRECISION, SETTINGS, WEIGHT_ONLY
from bitdistill.reporting.run_files import Run, read_run
from bitdistill.reporting.texts import MISSING, NOT_RUN, plural, rate_text, size_text


def table_lines(run: Run) -> list[dict]:
    """One line per setting and runner: {"label", "setting", "first", "score", "speed"}.

    The three settings are always there, the 4-bit ones after FP16-SFT, whose linears they round; others follow. `score` (a
    row of scores.json) and `speed` (a row of speed.json) are None where they were not measured; `first` marks the first
    line of its setting.
    """
    scores = {row["setting"]: row for row in run.scores.get("rows", [])}
    speeds: dict[str, list[dict]] = {}
    for row in run.speed.get("rows", []):
        speeds.setdefault(row["setting"], []).append(row)
    lines = []
    rounded = [setting for setting in WEIGHT_ONLY if setting in scores or setting in speeds]
    for setting in dict.fromkeys([FULL_PRECISION, *rounded, *SETTINGS, *scores, *speeds]):
        rows = speeds.get(setting, [None])
        for index, speed in enumerate(rows):
            label = setting if len(rows) == 1 else f"{setting}, {speed.get('runner', MISSING)}"
            score = scores.get(setting) if index == 0 else None
            lines.append({"label": label, "setting": setting, "first": index == 0, "score": score, "speed": speed})
    return lines


def headline(run: Run) -> dict[str, float | None]:
    """The ratios that the page leads with; None where an input is missing.

    Returns:
        retention: score(BitDistill) / score(FP16-SFT), in percent.
        gain: score(BitDistill) - score(BitNet-SFT), in points of the 0-100 score.
        linear_ratio, model_ratio: bytes of FP16-SFT / bytes of BitDistill, for the linears and for the whole model.
        speed_ratio: tokens per second of BitDistill / those of FP16-SFT.
        The size and speed of a setting are those of its first row in speed.json.
    """
    firsts = {line["setting"]: line for line in table_lines(run) if line["first"]}
    full, plain, ours = (firsts[setting] for setting in SETTINGS)

    def ratio(above, below, key):
        above, below = (above or {}).get(key), (below or {}).get(key)
        return above / below if above is not None and below else None

    retention = ratio(ours["score"], full["score"], "score")
    return {
        "retention": None if retention is None else 100 * retention,
        "gain": ours["score"]["score"] - plain["score"]["score"] if ours["score"] and plain["score"] else None,
        "linear_ratio": ratio(full["speed"], ours["speed"], "linear_bytes"),
        "model_ratio": ratio(full["speed"], ours["speed"], "model_bytes"),
        "speed_ratio": ratio(ours["speed"], full["speed"], "tokens_per_second"),
    }


def metric_of(run: Run) -> str:
    """The name of the score: accuracy, rouge l."""
    return str(run.scores.get("metric", "score")).replace("_", " ")


def was_judged(run: Run) -> bool:
    """Whether the measurements were looked at for warning signs while they were made."""
    return bool(run.health) and all("learning_rate" in line for lines in run.health.values() for line in lines)


def warnings_text(run: Run) -> str:
    """How many warnings there were, in words."""
    count = len(run.warnings)
    return f"{count} {plural(count, 'warning')}" if count else "no warning"


def columns(run: Run) -> list[str]:
    """The head of the comparison table."""
    metric = metric_of(run)
    score = f"{metric[:1].upper()}{metric[1:]} [95 %]"
    further = [f"{split.removeprefix('validation_')} [95 %]" for split in _further(run)]
    sizes = ["Linears", "Whole model", "Bits/weight", "Bits/param."]
    return ["Setting", score, "of FP16", *further, *sizes, "Runner", "Tokens/s [spread]"]


def _further(run: Run) -> list[str]:
    """Validation splits besides the main one that some setting was scored on."""
    return list(dict.fromkeys(split for row in run.scores.get("rows", []) for split in row.get("splits", ())))


def _scored(score: dict | None) -> str:
    """Score and interval."""
    if score is None:
        return MISSING
    interval = " [{:.1f}, {:.1f}]".format(*score["interval"]) if score.get("interval") else ""
    return f"{score['score']:.1f}{interval}"


def cells(run: Run, lines: list[dict]) -> list[list[str]]:
    """The comparison table as text, a list per line; sizes and speeds carry their ratio to the first FP16-SFT line."""
    full = next(line for line in lines if line["setting"] == FULL_PRECISION)
    reference, full_score = full["speed"] or {}, (full["score"] or {}).get("score")

    def number(value, form):
        return MISSING if value is None else format(value, form)

    def size(speed, key):
        count = speed.get(key)
        return size_text(count) + (f" ({reference[key] / count:.1f}x)" if count and reference.get(key) else "")

    table = []
    for line in lines:
        score, speed = line["score"], line["speed"]
        further = [_scored(score and score.get("splits", {}).get(split)) for split in _further(run)]
        if not line["first"]:
            left = ["", "", "", *("" for _ in further)]
        elif score is None:
            left = [line["setting"], NOT_RUN, MISSING, *further]
        else:
            kept = f"{100 * score['score'] / full_score:.1f} %" if full_score else MISSING
            left = [line["setting"], _scored(score), kept, *further]
        if speed is None:
            right = [NOT_RUN, NOT_RUN, MISSING, MISSING, MISSING, NOT_RUN]
        else:
            rate, base_rate = speed.get("tokens_per_second"), reference.get("tokens_per_second")
            spread = " [{}, {}]".format(*map(rate_text, speed["spread"])) if rate and speed.get("spread") else ""
            bits = [number(speed.get(key), ".2f") for key in ("bits_per_weight", "model_bits_per_parameter")]
            right = [size(speed, "linear_bytes"), size(speed, "model_bytes"), *bits, str(speed.get("runner", MISSING))]
            right.append(
                (rate_text(rate) if rate else MISSING)
                + spread
                + (f" ({rate / base_rate:.2f}x)" if rate and base_rate else "")
            )
        table.append(left + right)
    return table


def comparison_table(run_dir: str | Path | Run) -> Table:
    """The table for the terminal, a column per setting; what was not measured is "not run". 80 characters hold three
    columns; with 4-bit ones besides, intervals and ratios go into lines of their own.

    Args:
        run_dir: the run directory, or what read_run made of it.

    Raises:
        UserError: the folder does not exist.
    """
    run = run_dir if isinstance(run_dir, Run) else read_run(run_dir)
    examples = sorted({row["examples"] for row in run.scores.get("rows", []) if row.get("examples")})
    machine = run.speed.get("machine")
    caption = [f"{' / '.join(map(str, examples))} examples scored"] if examples else []
    caption += [f"speed on {machine}"] if machine else []
    caption += [f"health: {warnings_text(run)}"] if run.warnings or was_judged(run) else []
    table = Table(
        title=Text(str(run.scores.get("task", "comparison"))),
        caption=Text("; ".join([*caption, "ratios to FP16-SFT"])),
        box=box.SIMPLE_HEAD,
    )
    lines = table_lines(run)
    narrow = any(line["setting"] in WEIGHT_ONLY for line in lines)
    if narrow:
        table.padding = (0, 1, 0, 0)
    table.add_column("")
    for line in lines:
        table.add_column(Text(line["setting"]))  # Text: a setting called "[red]" is not markup
    rows = list(zip(columns(run), *cells(run, lines), strict=True))[1:]
    if narrow:
        rows = [[re.sub(r"(?<=,) (?=\D)| (?=[\[(])", "\n", cell) for cell in row] for row in rows]
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def table_text(run_dir: str | Path | Run) -> str:
    """The comparison table as plain text, as it is saved in table.txt."""
    console = Console(file=StringIO(), width=200, color_system=None, force_terminal=False)
    console.print(comparison_table(run_dir))
    return "\n".join(line.rstrip() for line in console.file.getvalue().strip("\n").splitlines()) + "\n"
