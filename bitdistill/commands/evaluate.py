"""`bitdistill eval`: scores a setting of a run on a task, on a text (perplexity), or by lm-evaluation-harness."""

import json
import sys
import time
from pathlib import Path
from typing import Literal

from bitdistill import folders
from bitdistill.commands.options import require_at_least, require_writable
from bitdistill.errors import UserError
from bitdistill.files import write_whole
from bitdistill.prompts import Task
from bitdistill.text_files import user_path

DEFAULT_TOKENS = 512  # of a prompt with its answer, or of a block of text, where neither the user nor a run says


def evaluate(
    run_or_file: str,
    setting: Literal["FP16-SFT", "BitNet-SFT", "BitDistill"] | None = None,
    task: str | None = None,
    validation_file: str | None = None,
    extra_validation_files: dict[str, str] | None = None,
    max_rows: int | None = None,
    max_length: int | None = None,
    perplexity: str | None = None,
    block_size: int | None = None,
    lm_eval: str | None = None,
    threads: int | None = None,
    json_file: str | None = None,
) -> None:
    """Scores the packed student on the CPU through the same prompts as in training, or another setting of its run.

    Args:
        run_or_file: a run directory (whose task, rows and length are the defaults), or a packed file (whose task and length are).
        setting: which setting of a run is scored: BitDistill by default; with --perplexity, all that the run has.
        task: sst2, mnli, qnli, cnndm or a YAML file.
        validation_file: a file of rows in place of the hub's.
        extra_validation_files: files of further validation splits: --extra_validation_files.validation_mismatched FILE.
        max_rows: the most rows that are scored, chosen by seed 0; all by default.
        max_length: the most tokens of prompt and answer; by default the run's, or 512, or the model's positions.
        perplexity: a text file (or .jsonl, .parquet, a folder) that is scored in place of a task: the exponential of the mean
            loss of its next tokens.
        block_size: tokens of a block of that text, 512 or the model's positions by default; max_rows limits the number of
            blocks.
        lm_eval: names of tasks, separated by commas, that lm-evaluation-harness scores instead: tasks of ours (sst2, a YAML
            file) with our prompt and with the harness's own, others on the harness's data.
        threads: CPU threads of the packed runtime; all by default.
        json_file: a file to which the result is written as well.
    """
    if perplexity and lm_eval:
        raise UserError(
            "perplexity", expected="--perplexity or --lm_eval", got="both", do="Run the command once with each."
        )
    if json_file:
        require_writable("json_file", json_file)
    least = {
        "max_rows": (max_rows, 1),
        "max_length": (max_length, 1),
        "block_size": (block_size, 2),
        "threads": (threads, 1),
    }
    for option, (number, smallest) in least.items():
        require_at_least(option, number, smallest)
    path = user_path(run_or_file, "RUN_OR_FILE")
    own = _file_defaults(path) if path.is_file() else _run_defaults(path)
    validation_file = folders.local_path(validation_file)
    options = _task_options(own, task, validation_file, extra_validation_files, max_length)
    if perplexity:
        text = folders.local_path(perplexity)
        result = _perplexity(run_or_file, setting, text, block_size, max_rows, threads)
    elif lm_eval:
        # the run's own rows, for its own task
        files = {own["task"]: own["validation_file"]} if own.get("validation_file") else {}
        result = _lm_eval(
            run_or_file, setting, lm_eval, validation_file, files, options["max_length"], max_rows, threads
        )
    elif options["task"] is None:
        got = f"none, and {run_or_file} does not know its own"
        raise UserError("task", expected="a task to score it on", got=got, do="Give --task.")
    else:
        result = _task_score(run_or_file, setting, options, max_rows, threads)
    if json_file:
        write_whole(user_path(json_file, "json_file"), json.dumps(result, indent=1))


def _task_options(
    known: dict, task: str | None, file: str | None, extra_files: dict[str, str] | None, max_length: int | None
) -> dict:
    """Task, rows and length: those that were given, and what the run's own settings say about the others."""
    task = folders.local_path(task) if (task or "").endswith((".yaml", ".yml")) else task
    if task is not None and task != known.get("task"):  # the run's rows are of its own task
        known = {"max_length": known.get("max_length")}
    extra_files = {split: folders.local_path(path) for split, path in (extra_files or {}).items()}
    return {
        "task": task or known.get("task"),
        "validation_file": file or known.get("validation_file"),
        "extra_validation_files": extra_files or known.get("extra_validation_files") or {},
        "max_length": max_length or known.get("max_length"),
    }


def _file_defaults(path: Path) -> dict:
    """Task and length of a packed file that knows them."""
    from bitdistill.runtime.header import read_header
    from bitdistill.runtime.packed_file import read_packed

    header = read_header(read_packed(path).metadata)
    return {"task": header.task, "max_length": header.max_length}


def _run_defaults(run: Path) -> dict:
    """Task, rows and length of a run directory, from its config.yaml; nothing for a file."""
    file = run / "config.yaml"
    if not file.is_file():
        return {}
    from bitdistill.yaml_files import read_yaml

    settings = read_yaml(file, "RUN_OR_FILE")
    names = {"task": str, "validation_file": str | None, "extra_validation_files": dict | None, "max_length": int}
    wrong = [name for name, kind in names.items() if not isinstance(settings.get(name), kind)]
    if wrong and ("max_length" in wrong or settings.get("model") is not None):
        got = f"{wrong[0]} {settings.get(wrong[0])!r:.60}"
        do = "Name a folder that bitdistill/train.py has written; the training command, given again, writes the file anew."
        raise UserError(f"{file}", expected="the settings of a run", got=got, do=do)
    if settings.get("model") is None:
        files = {"task": str(run / "demo" / "task.yaml"), "validation_file": str(run / "demo" / "validation.jsonl")}
        return files | {"max_length": settings["max_length"]}
    return {name: settings.get(name) for name in names}


def _fitted(option: str, tokens: int | None, model) -> int:
    """A number of tokens that a model, or a runtime, has positions for; 512 by default, where there are as many.

    Raises:
        UserError: more are wanted than there are.
    """
    most = model.context if hasattr(model, "context") else model.config.max_position_embeddings
    if tokens is not None and tokens > most:
        do = f"Give --{option} {most} or less."
        raise UserError(option, expected=f"at most {most}, the model's positions", got=str(tokens), do=do)
    return tokens or min(DEFAULT_TOKENS, most)


def _subject(run_or_file: str, setting: str | None, threads: int | None):
    """(name, model, tokenizer) of a setting: a Runtime on a packed file, or the full-precision model in torch."""
    from bitdistill.runtime.cpu import Runtime
    from bitdistill.runtime.loading import find_packed
    from bitdistill.student.loading import load_language_model, load_tokenizer, packed_tokenizer

    run = user_path(run_or_file, "RUN_OR_FILE")
    if setting not in (None, "BitDistill"):
        if not run.is_dir():
            do = "Give the run directory, or leave --setting out."
            raise UserError("setting", expected="a run directory for it", got=run_or_file, do=do)
        trained = "teacher/model.safetensors" if setting == "FP16-SFT" else "export/baseline.safetensors"
        if not (run / trained).is_file():
            do = "Score another setting, or train this one: --stage all."
            raise UserError("setting", expected=f"a run that has {setting}", got=f"{run} without {trained}", do=do)
        if setting == "FP16-SFT":
            return setting, load_language_model(run / "teacher"), load_tokenizer(run / "teacher")
        run_or_file = str(run / "export" / "baseline.safetensors")
    runtime = Runtime(find_packed(run_or_file), threads)
    return setting or runtime.model.metadata.get("setting", "packed"), runtime, packed_tokenizer(runtime.model)


def _task_score(
    run_or_file: str, setting: str | None, options: dict, max_rows: int | None, threads: int | None
) -> dict:
    from bitdistill.data.tasks import load_task, load_validation
    from bitdistill.evaluation.score import metric_of, score_splits

    task = options["task"] if isinstance(options["task"], Task) else load_task(options["task"])
    splits, left_out = load_validation(task, options["validation_file"], options["extra_validation_files"], max_rows)
    for split in left_out:
        print(f"[{split} is not scored; --extra_validation_files.{split} FILE adds it]", file=sys.stderr)
    name, model, tokenizer = _subject(run_or_file, setting, threads)
    started = time.perf_counter()
    rows_at_a_time = {"max_length": _fitted("max_length", options["max_length"], model), "batch_size": 32}
    scores = score_splits(model, task, splits, tokenizer, name=name, **rows_at_a_time)
    result = {"task": task.name, "setting": name, "metric": metric_of(task)}
    for split, score in scores.items():
        low, high = score.interval
        what = task.name if split == "validation" else f"{task.name}, {split}"
        print(f"{what}: {name} {metric_of(task)} {score.score:.2f} [{low:.2f}, {high:.2f}] on {score.examples:,} rows")
        for metric, value in score.extra.items():
            print(f"  {metric}: {value['score']:.2f} [{value['interval'][0]:.2f}, {value['interval'][1]:.2f}]")
        figures = {"score": score.score, "interval": [low, high], "examples": score.examples, "extra": score.extra}
        figures["predictions"] = score.predictions
        result |= figures if split == "validation" else {split: figures}
    print(f"{time.perf_counter() - started:.1f} s")
    return result


def _perplexity(
    run_or_file: str,
    setting: str | None,
    text: str,
    block_size: int | None,
    max_blocks: int | None,
    threads: int | None,
) -> dict:
    from bitdistill.data.corpus import token_blocks
    from bitdistill.evaluation.score import text_perplexity

    run, settings = user_path(run_or_file, "RUN_OR_FILE"), [setting]
    if setting is None and run.is_dir():
        there = {"FP16-SFT": "teacher/model.safetensors", "BitNet-SFT": "export/baseline.safetensors"}
        settings = [*(name for name, file in there.items() if (run / file).is_file()), "BitDistill"]
    results = {}
    for wanted in settings:
        name, model, tokenizer = _subject(run_or_file, wanted, threads)
        size = _fitted("block_size", block_size, model)
        blocks = token_blocks(text, tokenizer, size, max_blocks)
        found = results[name] = text_perplexity(model, blocks, name)
        print(
            f"{Path(text).name}: {name} perplexity {found['perplexity']:.2f} [{found['low']:.2f}, {found['high']:.2f}] on "
            f"{found['tokens']:,} tokens in blocks of {size}"
        )
    return results


def _lm_eval(
    run_or_file: str,
    setting: str | None,
    names: str,
    file: str | None,
    files: dict[str, str],
    max_length: int | None,
    max_rows: int | None,
    threads: int | None,
) -> dict:
    from bitdistill.data.tasks import BUILT_IN, encode_prompts, load_rows, load_task
    from bitdistill.evaluation.harness import harness_task, run_harness, stock_task

    names = [name.strip() for name in names.split(",") if name.strip()]
    ours = [name for name in names if (BUILT_IN / f"{name}.yaml").is_file() or Path(name).is_file()]
    if file is not None and len(ours) > 1:
        got = f"one file and {', '.join(ours)}"
        raise UserError(
            "lm_eval", expected="one task of ours for local rows", got=got, do="Score them in one command each."
        )
    name, model, tokenizer = _subject(run_or_file, setting, threads)
    lines = []
    for wanted in names:
        if wanted not in ours:
            found = stock_task(wanted)
            if found is None:
                do = "See `lm_eval ls tasks`."
                raise UserError(
                    "lm_eval", expected="a task of ours, a YAML file or one of lm_eval's", got=wanted, do=do
                )
            lines += run_harness(model, tokenizer, found, max_rows)
            continue
        task = load_task(wanted)
        rows = load_rows(task, "validation", file or files.get(wanted), max_rows)
        max_length = _fitted("max_length", max_length, model)
        _, cut = encode_prompts(task, rows, tokenizer, max_length)
        if cut:
            print(f"[{cut:,} prompts exceed {max_length} tokens; the harness does not cut them]", file=sys.stderr)
        lines += run_harness(model, tokenizer, [harness_task(task, rows, tokenizer)])
        if found := stock_task(task.name, rows):
            stock = run_harness(model, tokenizer, found)
            lines += [line | {"task": f"{line['task']} (the harness's prompt)"} for line in stock]
    for line in lines:
        spread = "" if line["stderr"] is None else f" +- {line['stderr']:.4f}"
        print(f"lm_eval {line['task']}: {name} {line['metric']} {line['value']:.4f}{spread} on {line['rows']:,} rows")
    return {"setting": name, "lm_eval": lines}
