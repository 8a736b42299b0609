"""The files of a run directory, read for its report: what exists, and remarks on what is missing, cut off or odd."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from bitdistill.errors import UserError
from bitdistill.names import STAGES
from bitdistill.reporting.shapes import SHAPES, fits, fits_file
from bitdistill.reporting.texts import plural


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
    run.health = {
        stage: [line for line in lines if line.get("layers") and fits(line, SHAPES["health"])]
        for stage, lines in run.health.items()
    }
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
        if (content := _read_json(run, f"{stage}/weights.json")) and content["layers"]
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
    except (ValueError, OSError, RecursionError) as error:
        run.remarks.append(f"{name} cannot be read and is left out: {error}")
        return None
    if not isinstance(content, dict):
        run.remarks.append(f"{name} holds no JSON object and is left out.")
        return None
    if not fits_file(content, name):
        run.remarks.append(f"{name} holds something else than this version writes and is left out.")
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
        run.remarks.append(f"{name}: {corrupted} corrupted {plural(corrupted, 'line')} left out.")
    if replaced:
        run.remarks.append(f"{name}: {replaced} {plural(replaced, 'line')} replaced by a resumed or repeated stage.")
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
        run.remarks.append(f"warnings.jsonl: {corrupted} corrupted {plural(corrupted, 'line')} left out.")
    order = list(STAGES)
    return sorted(kept, key=lambda line: order.index(line["stage"]) if line["stage"] in order else len(order))
