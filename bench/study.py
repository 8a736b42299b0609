"""A study: a grid of settings x seeds, each a run of the main job; one table with intervals and paired tests; plots.

    python bench/study.py bench/studies/STUDY.yaml [--workers 2] [--data FOLDER] [--only CELL ...]
    python bench/study.py --draw bench/results/studies/STUDY.json      the table and plots again, runs nothing
    python bench/study.py --page docs/results.md                       its tables again, from all results

A study's YAML (bench/studies/):

    name, about   its file name under bench/results/studies, and what it asks, in a sentence or two
    run           settings of the main job that all cells share (dotted names; $DATA stands for --data, $SEED for the seed)
    seeds         each cell runs once with each
    cells         name: {settings over those of `run`}; `score` picks what is scored, default distill:
                  teacher (FP16-SFT), baseline (BitNet-SFT), distill (BitDistill and its variations), or with
                  `perplexity` below base, refine, pretrain. Only the stages that it stands on are run
    grid          optional: {setting: [values]}: each cell once for each combination, their values in its name; a cell with
                  `grid: false` stays one
    references    cells that all others are compared with, on the same rows and seeds
    perplexity    optional, {file, blocks, block_size}: score by perplexity on a text in place of the task's rows
    x             optional: a setting that is the horizontal axis of the plot; cells that differ in it alone are one curve
    goal          optional, of losses over x: how much above the first reference is near enough; curves are drawn on to it

A cell whose results with the same settings are there is not run again, so a study can be stopped, resumed and extended. A
stage that two cells have in common (same settings, same seed) is run once and shared by hard links; the main job checks
what it is given, and runs a stage again if it does not fit. Cells run side by side, with one thread each. Checkpoints stay
in runs/studies/. Results are small: one bit for each row, right or wrong, so that every test can be repeated from the file.
"""

import argparse
import base64
import hashlib
import itertools
import json
import multiprocessing
import os
import runpy
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import study_report
from bitdistill.distributed import openmp
from measure import machine, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "studies"
# What the result of a stage does not depend on, by the beginning of a setting's name: cells that differ in nothing else
# share it. The main job has the last word.
OUTPUT = ("evaluate", "export", "report")
TASK = ("task", "train_file", "validation_file", "max_train_rows", "max_length")
AFTER_STAGE_2 = ("teacher", "distill", "baseline", "student")
IRRELEVANT = {
    "demo": (*OUTPUT, *TASK, "teacher", "refine", "pretrain", "distill", "baseline", "base"),
    "base": (*OUTPUT, *TASK, *AFTER_STAGE_2, "refine", "pretrain"),
    "teacher": (*OUTPUT, "validation_file", "corpus", "student", "refine", "pretrain", "distill", "baseline"),
    "refine": (*OUTPUT, *TASK, *AFTER_STAGE_2, "pretrain"),
    "cache": (
        *OUTPUT,
        *TASK,
        *AFTER_STAGE_2,
        "refine",
        "pretrain.max_steps",
        "pretrain.lambda",
        "pretrain.learning",
        "pretrain.annealing",
    ),
    "pretrain": (*OUTPUT, *TASK, *AFTER_STAGE_2),
    "baseline": (*OUTPUT, "validation_file", "corpus", "student", "refine", "pretrain", "teacher"),
    "distill": (*OUTPUT, "validation_file", "baseline"),
}


def load_study(path: Path, data: str | None) -> dict[str, Any]:
    """A study's YAML with its grid spelled out and $DATA filled in.

    Raises:
        ValueError: a key that a study does not have, no cells, a reference that is no cell, or no --data.
    """
    text = path.read_text()
    if "$DATA" in text:
        if data is None or not Path(data).is_dir():
            raise ValueError(f"--data: expected the folder that $DATA in {path} stands for; got {data}. Give --data.")
        text = text.replace("$DATA", str(Path(data).resolve()))
    try:
        study = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML; got {error}. Correct its syntax.") from None
    known = {"name", "about", "run", "seeds", "cells", "grid", "references", "perplexity", "x", "goal"}
    if isinstance(study, dict) and "about" in study:
        study["about"] = yaml.safe_load(path.read_text())["about"]  # a reader's $DATA is another folder
    if not isinstance(study, dict) or set(study) - known or not {"name", "run", "seeds"} <= set(study):
        raise ValueError(f"{path}: expected name, run, seeds and others of {sorted(known)}; got {study!r:.200}.")
    names, values = list(study.get("grid") or {}), list((study.get("grid") or {}).values())
    cells = {}
    for name, settings in (study.get("cells") or {"": {}}).items():
        settings = dict(settings or {})
        single = not settings.pop("grid", True) or not names
        for combination in [()] if single else itertools.product(*values):
            own = dict(zip(names, combination, strict=False))
            label = [f"{key.rpartition('.')[2]} {value}" for key, value in own.items()]
            cells[", ".join([str(name), *label] if name != "" else label)] = settings | own
    study["cells"] = cells
    missing = [name for name in study.setdefault("references", []) if name not in cells]
    if not any(cells) or missing:
        raise ValueError(f"{path}: expected cells, references among them; got {list(cells)} and {missing}.")
    return study


def share_key(stage: str, settings: dict[str, Any], seed: int) -> str:
    """The name under which a stage's result is shared: a hash of the settings that it can depend on."""
    kept = {name: value for name, value in settings.items() if not name.startswith(IRRELEVANT[stage])}
    text = json.dumps([stage, kept, seed], sort_keys=True, default=str)
    return f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def link_tree(source: Path, target: Path) -> None:
    """A folder or file again by hard links; its times, which the main job looks at, are those of the original."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=os.link)
    else:
        os.link(source, target)


def run_cell(job: dict[str, Any]) -> dict[str, Any]:
    """One run of the main job, in a process of its own. Returns its score, row by row, and what it cost."""
    started = time.time()
    folder, shared, settings, seed = Path(job["folder"]), Path(job["shared"]), job["settings"], job["seed"]
    folder.mkdir(parents=True, exist_ok=True)
    borrow(shared, folder, settings, seed)
    log = (folder / "log.txt").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    for stage in stages_to_run(job):  # each in a process of its own: DeepSpeed does not start twice in one
        process = multiprocessing.get_context("fork").Process(target=run_stage, args=(job, stage))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"stage {stage}: {(folder / 'log.txt').read_text().strip().splitlines()[-1]}")
    result = perplexity_of(folder, job) if job["perplexity"] else accuracy_of(folder, job)
    lend(shared, folder, settings, seed)
    done = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/done.json")}
    result["stages"] = {
        name: {key: facts[key] for key in ("seconds", "steps", "tokens", "rows") if key in facts}
        for name, facts in done.items()
    }
    return result | {"wall_seconds": round(time.time() - started, 1)}


def borrow(shared: Path, folder: Path, settings: dict[str, Any], seed: int) -> None:
    """Gives a cell the results of stages that other cells have lent: of two results of one stage, made side by side, the one
    that the later stages were made from."""
    needed: dict[str, str] = {}
    for stage in reversed(IRRELEVANT):
        own, lent = folder / stage, shared / share_key(stage, settings, seed)
        fitting = [one for one in sorted(lent.glob("[!.]*")) if one.name == needed.get(stage, one.name)]
        if fitting and not own.exists():
            link_tree(fitting[0], own)
            if stage == "demo":
                (own / "demo.json").rename(folder / "demo.json")
        if (own / "done.json").is_file():
            needed |= json.loads((own / "done.json").read_text())["inputs"]


def lend(shared: Path, folder: Path, settings: dict[str, Any], seed: int) -> None:
    """Puts the results of a cell's stages where others find them, each under the id that it got when it was finished."""
    for stage in IRRELEVANT:
        if not (folder / stage).is_dir():
            continue
        name = "demo" if stage == "demo" else json.loads((folder / stage / "done.json").read_text())["id"]
        target = shared / share_key(stage, settings, seed) / name
        if not target.exists():
            new = target.with_name(f".{name}.{os.getpid()}")
            link_tree(folder / stage, new)
            if stage == "demo":
                os.link(folder / "demo.json", new / "demo.json")
            try:
                new.rename(target)
            except OSError:  # somebody else was faster
                shutil.rmtree(new)


def run_stage(job: dict[str, Any], stage: str) -> None:
    """The main job with --stage, in this process."""
    sys.argv = ["train.py", *arguments_of(job, stage)]
    runpy.run_path(str(ROOT / "bitdistill" / "train.py"), run_name="__main__")


def arguments_of(job: dict[str, Any], stage: str) -> list[str]:
    """The main job's command line for a stage of a cell."""
    arguments = [f"--{name}={_text(value)}" for name, value in job["settings"].items()]
    arguments += [f"--seed={job['seed']}", f"--output_dir={job['folder']}", f"--stage={stage}"]
    training_alone = [f"--{name}.enabled=false" for name in ("baseline", "evaluate", "export")]
    return arguments + (training_alone if stage == "all" else [])


def stages_to_run(job: dict[str, Any]) -> list[str]:
    """What --stage is given, one after the other: the stages that a cell's score stands on."""
    settings, score = job["settings"], job["score"]
    if score == "distill":
        return ["all"]
    stages = [] if "model" in settings else ["base"]
    cached = settings.get("pretrain.lambda_logits", 0) > 0 and not settings.get("pretrain.lambda_hidden", 0) > 0
    return stages + [stage for stage in study_report.BEHIND[score] if stage != "cache" or cached]


def _text(value: Any) -> str:
    return "null" if value is None else json.dumps(value) if isinstance(value, list | bool | dict) else str(value)


def accuracy_of(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Right or wrong on each validation row, packed to bits."""
    from bitdistill.data.tasks import load_rows, load_task
    from bitdistill.evaluation.score import score_rows
    from bitdistill.student.loading import load_language_model, load_tokenizer
    from bitdistill.student.refine import load_student

    config = yaml.safe_load((folder / "config.yaml").read_text())
    if config["task"] == "demo":
        config |= {"task": str(folder / "demo/task.yaml"), "validation_file": str(folder / "demo/validation.jsonl")}
    task = load_task(config["task"])
    if task.kind != "classification":
        raise ValueError(
            f"task {task.name}: expected classification; got {task.kind}. Studies compare right and wrong."
        )
    limit = config["evaluate"]["max_rows"]
    rows = load_rows(task, "validation", config["validation_file"], limit, seed=0)  # the same rows for every seed
    source = folder / job["score"]
    model = load_language_model(source) if job["score"] == "teacher" else load_student(source)
    options = {"max_length": config["max_length"], "batch_size": config["evaluate"]["per_device_eval_batch_size"]}
    right = score_rows(model, task, rows, load_tokenizer(source), name=job["cell"], **options).values
    bits = base64.b64encode(np.packbits(right).tobytes()).decode()
    return {"metric": "accuracy", "score": 100 * float(np.mean(right)), "rows": len(right), "right": bits}


def perplexity_of(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Mean loss of each block of a text, and its perplexity."""
    from bitdistill.data.corpus import token_blocks
    from bitdistill.evaluation.scoring import block_losses
    from bitdistill.student.loading import load_language_model, load_tokenizer
    from bitdistill.student.refine import load_student

    wanted, stage = job["perplexity"], job["score"]
    if stage == "base":
        source = job["settings"]["model"]
        model = load_language_model(source)
    else:
        source = folder / stage
        model = load_student(source)
    blocks = token_blocks(wanted["file"], load_tokenizer(source), wanted["block_size"], wanted["blocks"])
    losses = block_losses(model, blocks)
    return {
        "metric": "perplexity",
        "score": float(np.exp(losses.mean())),
        "rows": len(losses),
        "losses": [round(float(loss), 5) for loss in losses],
    }


def jobs_of(study: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Every cell x seed as plain data. Runs that start together differ in their seed: they have no stage in common."""
    jobs = []
    for name, own in study["cells"].items():
        for seed in study["seeds"]:
            settings = {**study["run"], **own}
            settings = {key: _of_seed(value, seed) for key, value in settings.items()}
            score = settings.pop("score", "distill")
            digest = hashlib.sha256(name.encode()).hexdigest()[:8]
            jobs.append(
                {
                    "cell": name,
                    "seed": seed,
                    "score": score,
                    "settings": settings,
                    "perplexity": study.get("perplexity"),
                    "folder": str(folder / study["name"] / f"{digest}-{seed}"),
                    "shared": str(folder / "shared"),
                }
            )
    return jobs


def _of_seed(value: Any, seed: int) -> Any:
    return value.replace("$SEED", str(seed)) if isinstance(value, str) else value


def identity(job: dict[str, Any], data: str | None) -> str:
    """What a result is a result of. Not where the data lies: the same data elsewhere is the same study."""
    text = json.dumps([job["settings"], job["score"], job["perplexity"]], sort_keys=True)
    if data is not None:
        text = text.replace(str(Path(data).resolve()), "$DATA")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run(study: dict[str, Any], arguments: argparse.Namespace, path: Path) -> int:
    """Runs what is not in the results yet, and keeps the results file up to date. Returns the number of failures."""
    result = stored(path)
    jobs = [job for job in jobs_of(study, arguments.folder) if not arguments.only or job["cell"] in arguments.only]
    wanted = {f"{job['cell']} | {job['seed']}": job for job in jobs}

    def stands(name: str, job: dict[str, Any]) -> bool:
        return result["cells"].get(name, {}).get("identity") == identity(job, arguments.data)

    todo = {name: job for name, job in wanted.items() if not stands(name, job)}
    print(f"{study['name']}: {len(wanted)} runs, {len(wanted) - len(todo)} of them done already", flush=True)
    for job in todo.values():
        if Path(job["folder"]).exists() and not arguments.keep:
            shutil.rmtree(job["folder"])
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "deepspeed", "datasets", "bitdistill.training.trainer"])
    (arguments.folder / "shared").mkdir(parents=True, exist_ok=True)
    failures = 0
    with ProcessPoolExecutor(arguments.workers, mp_context=context, max_tasks_per_child=1) as pool:
        running = {pool.submit(run_cell, job): name for name, job in todo.items()}
        for future in as_completed(running):
            name, error = running[future], future.exception()
            job = wanted[name]
            if error is not None:  # the others go on
                failures += 1
                print(f"{name}: FAILED, see {job['folder']}/log.txt: {error!r}", flush=True)
                continue
            cell = future.result()
            print(f"{name}: {cell['metric']} {cell['score']:.2f} ({cell['wall_seconds']:.0f} s)", flush=True)
            result = stored(path)  # again: another run of this study may have added cells of its own
            own = {"cell": job["cell"], "seed": job["seed"], "identity": identity(job, arguments.data)}
            own |= {"processor": arguments.at["processor"], "commit": arguments.at["commit"]}
            result["cells"][name] = own | {"scored": job["score"]} | cell
            save(study, result, arguments.at, path)
            if not arguments.keep:
                shutil.rmtree(job["folder"], ignore_errors=True)
    save(study, stored(path), arguments.at, path)
    return failures


def stored(path: Path) -> dict[str, Any]:
    """The results so far."""
    return json.loads(path.read_text()) if path.is_file() else {"cells": {}}


def save(study: dict[str, Any], result: dict[str, Any], at: dict[str, Any], path: Path) -> None:
    """Results in the order of the study, without those of cells that it no longer has."""
    order = [f"{name} | {seed}" for name in study["cells"] for seed in study["seeds"]]
    result |= {key: study[key] for key in ("name", "about", "references", "x", "goal", "perplexity") if key in study}
    if "task" in study["run"]:
        result["task"] = study["run"]["task"]
    result["settings"] = {name: study["cells"][name] for name in study["cells"]}
    for cell in result["cells"].values():  # of the machine that all cells were of, when that was not kept with each
        cell.setdefault("processor", result.get("machine", at)["processor"])
    result["machine"] = at
    result["cells"] = {name: result["cells"][name] for name in order if name in result["cells"]}
    if "perplexity" in result:
        result["perplexity"] = {**result["perplexity"], "file": Path(result["perplexity"]["file"]).name}
    result |= study_report.differences(result)
    new = path.with_suffix(".new")
    write_json(new, result)
    new.replace(path)


def main() -> int:
    """Runs or redraws a study."""
    openmp.wait_briefly()
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "study", type=Path, nargs="?", help="a YAML of bench/studies, or with --draw a JSON of bench/results/studies"
    )
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--data", metavar="FOLDER", help="what $DATA stands for")
    parser.add_argument("--only", nargs="+", default=[], metavar="CELL")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "studies", help="run directories")
    parser.add_argument("--keep", action="store_true", help="keep the run directory of each cell")
    parser.add_argument("--draw", action="store_true", help="only the table and the plots")
    parser.add_argument("--page", type=Path, metavar="FILE", help="only puts the tables of studies into a page")
    arguments = parser.parse_args()
    arguments.folder = arguments.folder.resolve()
    failures = 0
    if (arguments.study is None) == (arguments.page is None):
        parser.error("give a study, or --page")
    try:
        if arguments.page:
            arguments.page.write_text(study_report.into_page(arguments.page.read_text(), RESULTS))
            return 0
        if arguments.draw:
            path = arguments.study
        else:
            study = load_study(arguments.study, arguments.data)
            path, arguments.at = RESULTS / f"{study['name']}.json", machine()
            failures = run(study, arguments, path)
    except ValueError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    print(study_report.write(path))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
