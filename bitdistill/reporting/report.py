"""The report of a run: one HTML page, its figures, and the table of the three settings.

It is made from the files of a run directory (docs/design.md, section 5) and from nothing else. So anybody who has the
folder can make it again at any time, also while the run is still going:

    run_files.py    files -> Run: what exists, and a list of remarks on what is missing, cut off or odd
    table.py        Run -> numbers: one line per setting and runner, the ratios, the table
    summary.py      Run -> the result in sentences
    report.py       all of it -> table.txt, figures/*.png, report.html (plots.py draws, templates/report.html.j2 lays out)

The page loads nothing from the network and runs no script. Its Content-Security-Policy makes the browser enforce that. A
stage that was not run is shown as "not run", and a missing number as a dash, never as a zero.
"""

import re
from pathlib import Path

import numpy as np
from rich.console import Console

from bitdistill.files import write_whole
from bitdistill.names import STAGES, WEIGHT_ONLY
from bitdistill.reporting.run_files import Run, read_run
from bitdistill.reporting.summary import health_verdict, majority_of, summary
from bitdistill.reporting.table import cells, columns, comparison_table, headline, metric_of, table_lines, table_text
from bitdistill.reporting.texts import MISSING, NOT_RUN, duration_text, value_text

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
        value=value_text,
        proof_words=PROOF,
    )
    write_whole(run.path / "table.txt", table_text(run))
    target = run.path / "report.html"
    write_whole(target, page)
    return target


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
    return names, [(row["setting"], [value_text(row["extra"].get(name)) for name in names]) for row in rows]


def _stages(run: Run) -> list[dict[str, str]]:
    """State, steps, time and speed of each stage."""
    finished = {"evaluate": bool(run.scores), "export": bool(run.speed or run.proof)}
    rows = []
    for stage, what in STAGES.items():
        done, logged = run.done.get(stage), run.metrics.get(stage, [])
        if stage in ("trim", "cache", "teacher_cache") and done is None:  # most runs have none of them
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
                "steps": MISSING if steps is None else f"{steps:,}",
                "time": duration_text((done or {}).get("seconds")),
                "rate": f"{np.median(rates):,.0f}" if rates else MISSING,
                "loss": value_text(last),
            }
        )
    return rows


def _figures(run: Run, lines: list[dict]) -> dict[str, str]:
    """Draws what the run has data for: name -> inline SVG, and figures/name.png beside the page."""
    from markupsafe import Markup

    from bitdistill.reporting import drawing, plots

    wanted = {}
    if any(line["score"] or line["speed"] for line in lines):
        wanted["overview"] = (plots.overview, lines, metric_of(run), majority_of(run))
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
        svg, png = drawing.draw(plot, *args)
        write_whole(folder / f"{name}.png", png)
        drawn[name] = Markup(svg)  # matplotlib has escaped the text in it
    return drawn
