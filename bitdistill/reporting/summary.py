"""The report in sentences: the result, and how healthy the ternary layers were in training."""

import math

from bitdistill.names import DISTILLED, FULL_PRECISION, TERNARY_BASELINE, WEIGHT_ONLY
from bitdistill.reporting.run_files import Run
from bitdistill.reporting.table import headline, metric_of, table_lines, warnings_text, was_judged
from bitdistill.reporting.texts import MISSING, rate_text, size_text


def summary(run: Run) -> list[str]:
    """The result in sentences. Each rests on numbers of the run, and caveats are stated as prominently as gains."""
    numbers, firsts = headline(run), {line["setting"]: line for line in table_lines(run) if line["first"]}
    score = {setting: line["score"]["score"] for setting, line in firsts.items() if line["score"]}
    full, ours = (firsts[setting]["speed"] for setting in (FULL_PRECISION, DISTILLED))
    metric, task, majority = metric_of(run), run.scores.get("task", "the task"), majority_of(run)
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
            f"Its ternary linear layers take {size_text(ours['linear_bytes'])}, {numbers['linear_ratio']:.1f} times less than "
            f"in FP16; the whole file, embedding and head included, takes {size_text(ours['model_bytes'])}, "
            f"{numbers['model_ratio']:.1f} times less."
        )
    rounded = next((name for name in reversed(list(WEIGHT_ONLY)) if name in score and firsts[name]["speed"]), None)
    if rounded and ours and DISTILLED in score:
        four_bits = firsts[rounded]["speed"]["linear_bytes"]
        said.append(
            f"For comparison, FP16-SFT with its weights rounded to 4 bits ({rounded}, no training) "
            f"scores {score[rounded]:.1f}; its linear layers take "
            f"{size_text(four_bits)}, {four_bits / ours['linear_bytes']:.1f} times as much as the student's"
            f"{_paired(run, 'BitDistill', rounded)}."
        )
    if numbers["speed_ratio"]:
        said.append(
            f"It generates {rate_text(ours['tokens_per_second'])} tokens per second ({ours.get('runner', MISSING)}); FP16-SFT "
            f"generates {rate_text(full['tokens_per_second'])} ({full.get('runner', MISSING)}). That is "
            f"{numbers['speed_ratio']:.2f} times the speed on the same machine."
        )
    if run.warnings:
        said.append(f"Caution: there {_were(run)} during training; see Health.")
    if run.proof.get("codes_equal", True) is False:
        said.append("Warning: the exported file does NOT hold the ternary codes that training used. Do not ship it.")
    elif run.proof:  # export raises, and writes none, where a code differs
        said.append("The exported file was unpacked again and holds exactly the ternary codes that training used.")
    return said


def health_verdict(run: Run) -> str | None:
    """One line on the health of the ternary layers in training; None when nothing was measured."""
    measured, stages = sum(map(len, run.health.values())), ", ".join(run.health)
    if run.warnings:
        kinds: dict[str, list[str]] = {}
        for line in run.warnings:
            kinds.setdefault(line["stage"], []).append(line["kind"])
        listed = "; ".join(f"{stage}: {', '.join(found)}" for stage, found in kinds.items())
        return f"There {_were(run)} during training ({listed}). The table below says what was seen and what to try."
    if not measured:
        return None
    if not was_judged(run):
        return f"Measured {measured} times in {stages}, but by a version of bitdistill that did not look for warning signs."
    ends = [layer["zeros"] for lines in run.health.values() for layer in lines[-1]["layers"].values()]
    return (
        f"Healthy: no warning in {measured} measurements ({stages}). At the end of the stages, {min(ends):.0%} to "
        f"{max(ends):.0%} of a layer's codes are zero."
    )


def _were(run: Run) -> str:
    return f"{'was' if len(run.warnings) == 1 else 'were'} {warnings_text(run)}"


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


def majority_of(run: Run) -> float | None:
    """Score, 0..100, of always answering the most frequent label."""
    return run.scores.get("majority")
