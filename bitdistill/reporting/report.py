"""The report of a run: one HTML page, its figures, and the table of the three settings.

It is made from the files of a run directory (docs/design.md, section 5) and from nothing else. So anybody who has the
folder can make it again at any time, also while the run is still going. There are three layers:

    read_run        files -> Run: what exists, and a list of remarks on what is missing, cut off or odd
    table_lines,    Run -> numbers: one line per setting and runner; the ratios that the summary states
    headline
    write_report    numbers -> table.txt, figures/*.png, report.html (plots.py draws, templates/report.html.j2 lays out)

The page loads nothing from the network and runs no script. Its Content-Security-Policy makes the browser enforce that. A
stage that was not run is shown as "not run", and a missing number as a dash, never as a zero.
"""

import json
import math
import re
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bitdistill.errors import UserError
from bitdistill.files import write_whole
from bitdistill.names import DISTILLED, FULL_PRECISION, SETTINGS, STAGES, TERNARY_BASELINE, WEIGHT_ONLY

PROOF = {  # what export/parity.py measured, in words
    "codes_equal": "codes and scales of the file, unpacked, are those of the trained student",
    "linears": "ternary layers whose codes and scales were compared, bit for bit",
    "tokens": "tokens whose logits were compared",
    "product_max_diff": "largest difference of a ternary product on the student's own activations, relative to their peak",
    "unrounded_max_diff": "largest difference with unrounded activations, in standard deviations of the logits",
    "max_abs_diff": "largest difference of a logit",
    "relative_rms": "root mean square of the differences, relative to that of the logits",
    "mean_kl": "KL(student || runtime), in nats per token",
    "same_top1": "share of tokens with the same most likely next token",
    "noise_mean_kl": "the same KL between the student with one attention kernel and the student with another: its own noise",
    "noise_same_top1": "the share of same next tokens between these two",
    "embedding_mean_kl": "KL that is due to the embedding being stored in few bits, in nats per token",
    "embedding_same_top1": "share of tokens whose most likely next token it does not change",
    "kv_bf16_mean_kl": "KL that is due to a KV cache in bf16, the runtime's default, in nats per token",
    "kv_int8_mean_kl": "KL that is due to a KV cache in int8, in nats per token",
}
NONE = "\N{EN DASH}"
NOT_RUN = "not run"


@dataclass
class Run:
    """The content of a run directory. What is missing is empty or None; `remarks` are sentences for the reader."""

    path: Path
    config: str | None = None
    versions: dict = field(default_factory=dict)
    metrics: dict[str, list[dict]] = field(default_factory=dict)  # stage -> lines in order of steps
    health: dict[str, list[dict]] = field(default_factory=dict)
    warnings: list[dict] = field(default_factory=list)  # lines of warnings.jsonl, by stage
    weights: dict[str, dict] = field(default_factory=dict)  # stage -> weights.json
    done: dict[str, dict] = field(default_factory=dict)  # stage -> done.json
    scores: dict = field(default_factory=dict)
    speed: dict = field(default_factory=dict)
    proof: dict = field(default_factory=dict)
    attention: dict[str, np.ndarray] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


# ----------------------------------------------------------------------------------------------------------- reading


def read_run(run_dir: str | Path) -> Run:
    """Reads every file of a run directory that the report uses.

    Args:
        run_dir: the run directory; any part of it may be missing.

    Returns:
        A Run whose `remarks` name each file that could not be read and each line that was left out.

    Raises:
        UserError: the folder does not exist.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise UserError("RUN", expected="an existing folder", got=str(path), do="Name the folder of a run.")
    run = Run(path)
    if (path / "config.yaml").is_file():
        run.config = (path / "config.yaml").read_text(encoding="utf-8", errors="replace")
    run.metrics, run.health = (_read_lines(run, name) for name in ("metrics.jsonl", "health.jsonl"))
    run.health = {stage: [line for line in lines if line.get("layers")] for stage, lines in run.health.items()}
    run.health = {stage: lines for stage, lines in run.health.items() if lines}
    run.warnings = _read_warnings(run)
    run.versions, run.scores, run.speed, run.proof = (
        _read_json(run, name) or {}
        for name in ("versions.json", "evaluate/scores.json", "export/speed.json", "export/proof.json")
    )
    run.done = {stage: done for stage in STAGES if (done := _read_json(run, f"{stage}/done.json")) is not None}
    run.weights = {
        stage: content
        for stage in ("refine", "pretrain", "distill")
        if (content := _read_json(run, f"{stage}/weights.json")) and content.get("layers")
    }
    if (path / "evaluate/attention.npz").is_file():
        try:
            with np.load(path / "evaluate/attention.npz", allow_pickle=False) as arrays:
                run.attention = {name: arrays[name] for name in ("teacher", "student", "tokens", "layer")}
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            run.remarks.append(f"evaluate/attention.npz cannot be read and is left out: {error}")
    for stage, lines in run.metrics.items():
        broken = sum(isinstance(loss := line.get("loss"), float) and not math.isfinite(loss) for line in lines)
        if broken:
            run.remarks.append(f"{stage}: the loss was not finite at {broken} of {len(lines)} logged steps.")
    return run


def _read_json(run: Run, name: str) -> dict | None:
    """The object in a JSON file; None and, if the file is there, a remark when it holds none."""
    if not (run.path / name).is_file():
        return None
    try:
        content = json.loads((run.path / name).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        run.remarks.append(f"{name} cannot be read and is left out: {error}")
        return None
    if not isinstance(content, dict):
        run.remarks.append(f"{name} holds no JSON object and is left out.")
        return None
    return content


def _read_lines(run: Run, name: str) -> dict[str, list[dict]]:
    """stage -> lines of a .jsonl file, in order of steps.

    A step that comes again means that the stage was resumed or restarted from there: what was logged from that step on
    belongs to a course that was given up, and the later line holds.
    """
    stages: dict[str, list[dict]] = {}
    corrupted = replaced = 0
    if (run.path / name).is_file():
        for text in (run.path / name).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
                stage, step = str(line["stage"]), int(line["step"])
                line["step"] = step
            except (ValueError, KeyError, TypeError):
                corrupted += bool(text.strip())
                continue
            lines = stages.setdefault(stage, [])
            while lines and lines[-1]["step"] >= step:
                lines.pop()
                replaced += 1
            lines.append(line)
    if corrupted:
        run.remarks.append(f"{name}: {corrupted} corrupted {_plural(corrupted, 'line')} left out.")
    if replaced:
        run.remarks.append(f"{name}: {replaced} {_plural(replaced, 'line')} replaced by a resumed or repeated stage.")
    order = [stage for stage in STAGES if stage in stages]
    return {stage: stages[stage] for stage in [*order, *(stage for stage in stages if stage not in STAGES)]}


def _read_warnings(run: Run) -> list[dict]:
    """Lines of warnings.jsonl that are whole, in the order of stages and of time."""
    path, kept, corrupted = run.path / "warnings.jsonl", [], 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
            line["step"], line["layers"] = int(line["step"]), [str(name) for name in line["layers"]]
            kept.append(line | {key: str(line[key]) for key in ("stage", "kind", "seen", "do")})
        except (ValueError, KeyError, TypeError):
            corrupted += bool(text.strip())
    if corrupted:
        run.remarks.append(f"warnings.jsonl: {corrupted} corrupted {_plural(corrupted, 'line')} left out.")
    order = list(STAGES)
    return sorted(kept, key=lambda line: order.index(line["stage"]) if line["stage"] in order else len(order))


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else noun + "s"


# ----------------------------------------------------------------------------------------------------------- numbers


def table_lines(run: Run) -> list[dict]:
    """One line per setting and runner: {"label", "setting", "first", "score", "speed"}.

    The three settings are always there, the 4-bit ones behind FP16-SFT, whose linears they round; others follow. `score` (a
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
            label = setting if len(rows) == 1 else f"{setting}, {speed.get('runner', NONE)}"
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


def summary(run: Run) -> list[str]:
    """The result in sentences. Each rests on numbers of the run, and caveats are stated as prominently as gains."""
    numbers, firsts = headline(run), {line["setting"]: line for line in table_lines(run) if line["first"]}
    score = {setting: line["score"]["score"] for setting, line in firsts.items() if line["score"]}
    full, ours = (firsts[setting]["speed"] for setting in (FULL_PRECISION, DISTILLED))
    metric, task, majority = _metric(run), run.scores.get("task", "the task"), _majority(run)
    said = ["BitDistill has not been evaluated yet."]
    if DISTILLED in score:
        said = [f"On {task}, the 1.58-bit BitDistill student scores {score['BitDistill']:.1f} ({metric})."]
    if numbers["retention"] is not None:
        said.append(
            f"FP16-SFT, the full-precision model that was fine-tuned on the same examples, scores "
            f"{score[FULL_PRECISION]:.1f}: the student keeps "
            f"{numbers['retention']:.1f} % of it{_paired(run, DISTILLED, FULL_PRECISION)}."
        )
    if numbers["gain"] is not None:
        said.append(
            f"It is {abs(numbers['gain']):.1f} points {'above' if numbers['gain'] >= 0 else 'below'} BitNet-SFT "
            f"({score[TERNARY_BASELINE]:.1f}), the ternary model that was only fine-tuned, without a teacher"
            f"{_paired(run, DISTILLED, TERNARY_BASELINE)}."
        )
    for setting, line in firsts.items():
        low, high = (line["score"] or {}).get("interval") or (math.inf, -math.inf)
        if majority is not None and low <= majority <= high:
            said.append(
                f"Caution: the interval of {setting} contains {majority:.1f}, "
                "the score of always answering the most frequent label."
            )
    if numbers["linear_ratio"] and numbers["model_ratio"]:
        said.append(
            f"Its ternary linear layers take {_bytes(ours['linear_bytes'])}, {numbers['linear_ratio']:.1f} times less than "
            f"in FP16; the whole file, embedding and head included, takes {_bytes(ours['model_bytes'])}, "
            f"{numbers['model_ratio']:.1f} times less."
        )
    rounded = next((name for name in reversed(list(WEIGHT_ONLY)) if name in score and firsts[name]["speed"]), None)
    if rounded and ours and DISTILLED in score:
        four_bits = firsts[rounded]["speed"]["linear_bytes"]
        said.append(
            f"For comparison, FP16-SFT with its weights rounded to 4 bits ({rounded}, no training) "
            f"scores {score[rounded]:.1f}; its linear layers take "
            f"{_bytes(four_bits)}, {four_bits / ours['linear_bytes']:.1f} times as much as the student's"
            f"{_paired(run, 'BitDistill', rounded)}."
        )
    if numbers["speed_ratio"]:
        said.append(
            f"It generates {_rate(ours['tokens_per_second'])} tokens per second ({ours.get('runner', NONE)}); FP16-SFT "
            f"generates {_rate(full['tokens_per_second'])} ({full.get('runner', NONE)}). That is {numbers['speed_ratio']:.2f} "
            "times the speed on the same machine."
        )
    if run.warnings:
        said.append(f"Caution: there {_were(run)} during training; see Health.")
    if run.proof.get("codes_equal", True) is False:
        said.append("Warning: the exported file does NOT hold the ternary codes that training used. Do not ship it.")
    elif run.proof:  # export raises, and writes none, where a code differs
        said.append("The exported file was unpacked again and holds exactly the ternary codes that training used.")
    return said


def health_verdict(run: Run) -> str | None:
    """One line on how the ternary layers fared while they trained; None when nothing was measured."""
    measured, stages = sum(map(len, run.health.values())), ", ".join(run.health)
    if run.warnings:
        kinds: dict[str, list[str]] = {}
        for line in run.warnings:
            kinds.setdefault(line["stage"], []).append(line["kind"])
        listed = "; ".join(f"{stage}: {', '.join(found)}" for stage, found in kinds.items())
        return f"There {_were(run)} during training ({listed}). The table below says what was seen and what to try."
    if not measured:
        return None
    if not _judged(run):
        return f"Measured {measured} times in {stages}, but by a version of bitdistill that did not look for warning signs."
    ends = [layer["zeros"] for lines in run.health.values() for layer in lines[-1]["layers"].values()]
    return (
        f"Healthy: no warning in {measured} measurements ({stages}). At the end of the stages, {min(ends):.0%} to "
        f"{max(ends):.0%} of a layer's codes are zero."
    )


def _judged(run: Run) -> bool:
    """Whether the measurements were looked at for warning signs while they were made."""
    return bool(run.health) and all("learning_rate" in line for lines in run.health.values() for line in lines)


def _warnings(run: Run) -> str:
    count = len(run.warnings)
    return f"{count} {_plural(count, 'warning')}" if count else "no warning"


def _were(run: Run) -> str:
    return f"{'was' if len(run.warnings) == 1 else 'were'} {_warnings(run)}"


def _paired(run: Run, a: str, b: str) -> str:
    """ " (paired difference a - b ...)" where evaluate measured it in either order, else nothing."""
    for row in run.scores.get("paired", []):
        if {row["a"], row["b"]} == {a, b}:
            sign = 1 if row["a"] == a else -1
            low, high = sorted(sign * bound for bound in row["interval"])
            verdict = "not significant" if low <= 0 <= high else "significant"
            points = f"paired difference {sign * row['difference']:+.1f} points"
            return f" ({points}, 95 % interval {low:+.1f} to {high:+.1f}: {verdict})"
    return ""


def _majority(run: Run) -> float | None:
    """Score, 0..100, of always answering the most frequent label."""
    return run.scores.get("majority")


def _metric(run: Run) -> str:
    return str(run.scores.get("metric", "score")).replace("_", " ")


def _bytes(count: float | None) -> str:
    """Decimal units, three digits: 1.19 GB, 266 MB."""
    if count is None:
        return NONE
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.{max(0, 2 - int(math.log10(count / size)))}f} {unit}"
    return f"{count:.0f} B"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


# ------------------------------------------------------------------------------------------------------------- table


def columns(run: Run) -> list[str]:
    """The head of the comparison table."""
    metric = _metric(run)
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
        return NONE
    interval = " [{:.1f}, {:.1f}]".format(*score["interval"]) if score.get("interval") else ""
    return f"{score['score']:.1f}{interval}"


def cells(run: Run, lines: list[dict]) -> list[list[str]]:
    """The comparison table as text, a list per line; sizes and speeds carry their ratio to the first FP16-SFT line."""
    full = next(line for line in lines if line["setting"] == FULL_PRECISION)
    reference, full_score = full["speed"] or {}, (full["score"] or {}).get("score")

    def number(value, form):
        return NONE if value is None else format(value, form)

    def size(speed, key):
        count = speed.get(key)
        return _bytes(count) + (f" ({reference[key] / count:.1f}x)" if count and reference.get(key) else "")

    table = []
    for line in lines:
        score, speed = line["score"], line["speed"]
        further = [_scored(score and score.get("splits", {}).get(split)) for split in _further(run)]
        if not line["first"]:
            left = ["", "", "", *("" for _ in further)]
        elif score is None:
            left = [line["setting"], NOT_RUN, NONE, *further]
        else:
            kept = f"{100 * score['score'] / full_score:.1f} %" if full_score else NONE
            left = [line["setting"], _scored(score), kept, *further]
        if speed is None:
            right = [NOT_RUN, NOT_RUN, NONE, NONE, NONE, NOT_RUN]
        else:
            rate, base_rate = speed.get("tokens_per_second"), reference.get("tokens_per_second")
            spread = " [{}, {}]".format(*map(_rate, speed["spread"])) if rate and speed.get("spread") else ""
            bits = [number(speed.get(key), ".2f") for key in ("bits_per_weight", "model_bits_per_parameter")]
            right = [size(speed, "linear_bytes"), size(speed, "model_bytes"), *bits, str(speed.get("runner", NONE))]
            right.append(
                (_rate(rate) if rate else NONE) + spread + (f" ({rate / base_rate:.2f}x)" if rate and base_rate else "")
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
    caption += [f"health: {_warnings(run)}"] if run.warnings or _judged(run) else []
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


# -------------------------------------------------------------------------------------------------------------- page


def write_report(run_dir: str | Path) -> Path:
    """Writes report.html, table.txt and figures/*.png into a run directory.

    Args:
        run_dir: the run directory; any part of it may be missing, and is then named "not run" on the page.

    Returns:
        The path of report.html: one file, no script, nothing fetched.

    Raises:
        UserError: the folder does not exist.
    """
    import jinja2

    run = read_run(run_dir)
    lines = table_lines(run)
    folder = Path(__file__).parent / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    numbers = headline(run)
    page = environment.get_template("report.html.j2").render(
        run=run,
        title=f"BitDistill on {run.scores['task']}" if run.scores.get("task") else "BitDistill run",
        summary=summary(run),
        verdict=health_verdict(run),
        weight_only=any(line["setting"] in WEIGHT_ONLY for line in lines),
        tiles=_tiles(numbers),
        columns=columns(run),
        table=list(zip(lines, cells(run, lines), strict=True)),
        split=lambda cell: re.split(r" (?=[\[(])", cell, maxsplit=1),
        paired=run.scores.get("paired", []),
        extra=_extra(run),
        stages=_stages(run),
        figures=_figures(run, lines),
        layer=run.attention["layer"] if run.attention else None,
        value=_value,
        proof_words=PROOF,
    )
    write_whole(run.path / "table.txt", table_text(run))
    target = run.path / "report.html"
    write_whole(target, page)
    return target


def _rate(tokens_per_second: float) -> str:
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 1000 else f"{tokens_per_second:.4g}"


def show_report(run_dir: str | Path) -> None:
    """Writes the page and prints the table, with the page's path below it."""
    page, console = write_report(run_dir), Console()
    console.print(comparison_table(run_dir))
    console.print(f"Report: {page}")


def _tiles(numbers: dict[str, float | None]) -> list[tuple[str, str]]:
    """The headline numbers as (number, words)."""
    forms = (
        ("retention", "{:.1f} %", "of FP16-SFT's score is kept"),
        ("gain", "{:+.1f}", "points compared with BitNet-SFT"),
        ("linear_ratio", "{:.1f}x", "smaller linear layers than in FP16"),
        ("model_ratio", "{:.1f}x", "smaller file of the whole model"),
        ("speed_ratio", "{:.2f}x", "the speed of FP16-SFT"),
    )
    return [(NOT_RUN if numbers[key] is None else form.format(numbers[key]), words) for key, form, words in forms]


def _extra(run: Run) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Further metrics, such as ROUGE and BLEU: names, and (setting, values) per row."""
    rows = [row for row in run.scores.get("rows", []) if row.get("extra")]
    names = list(dict.fromkeys(name for row in rows for name in row["extra"]))
    return names, [(row["setting"], [_value(row["extra"].get(name)) for name in names]) for row in rows]


def _value(value) -> str:
    """Any value of a JSON file as short text."""
    if value is None:
        return NONE
    if isinstance(value, dict) and "score" in value:
        interval = " [{:.2f}, {:.2f}]".format(*value["interval"]) if value.get("interval") else ""
        return f"{value['score']:.2f}{interval}"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _stages(run: Run) -> list[dict[str, str]]:
    """State, steps, time and speed of each stage."""
    finished = {"evaluate": bool(run.scores), "export": bool(run.speed or run.proof)}
    rows = []
    for stage, what in STAGES.items():
        done, logged = run.done.get(stage), run.metrics.get(stage, [])
        if stage in ("trim", "cache") and done is None:  # most runs have neither
            continue
        state = "done" if done is not None or finished.get(stage) else "unfinished" if logged else NOT_RUN
        rates = [line["tokens_per_second"] for line in logged if line.get("tokens_per_second")]
        steps = (done or {}).get("steps", logged[-1]["step"] if logged else None)
        last = logged[-1].get("loss") if logged else None
        rows.append(
            {
                "stage": stage,
                "what": what,
                "state": state,
                "steps": NONE if steps is None else f"{steps:,}",
                "time": _duration((done or {}).get("seconds")),
                "rate": f"{np.median(rates):,.0f}" if rates else NONE,
                "loss": _value(last),
            }
        )
    return rows


def _figures(run: Run, lines: list[dict]) -> dict[str, str]:
    """Draws what the run has data for: name -> inline SVG, and figures/name.png beside the page."""
    from markupsafe import Markup

    from bitdistill.reporting import plots

    wanted = {}
    if any(line["score"] or line["speed"] for line in lines):
        wanted["overview"] = (plots.overview, lines, _metric(run), _majority(run))
    curves = {stage: rows for stage, rows in run.metrics.items() if any("loss" in row for row in rows)}
    if curves:
        wanted["losses"] = (plots.losses, curves)
    if any("loss_attention" in row for row in run.metrics.get("distill", [])):
        wanted["balance"] = (plots.balance, run.metrics["distill"])
    if run.weights:
        wanted["weights"] = (plots.weights, run.weights)
    for stage in STAGES:
        if stage in run.health:
            wanted[f"health-{stage}"] = (plots.health, run.health[stage])
    if run.attention:
        maps = (run.attention[name].astype(float) for name in ("teacher", "student"))
        wanted["attention"] = (plots.attention, *maps, [str(token) for token in run.attention["tokens"]])
    folder, drawn = run.path / "figures", {}
    for old in folder.glob("*.png"):
        old.unlink()  # a figure of an earlier report that is not drawn now would be taken for a new one
    for name, (plot, *args) in wanted.items():
        folder.mkdir(exist_ok=True)
        svg, png = plots.draw(plot, *args)
        write_whole(folder / f"{name}.png", png)
        drawn[name] = Markup(svg)  # matplotlib has escaped the text in it
    return drawn
