"""ENTRY: `bitdistill COMMAND`: what one does with a finished run or a packed file.

    bitdistill generate RUN_OR_FILE "prompt"   text from the packed student, on the CPU; imports neither torch nor transformers
    bitdistill eval RUN_OR_FILE                scores the packed student on its task, or on another
    bitdistill report RUN                      writes report.html again and prints the table
    bitdistill env                             versions, for bug reports

The main job is its own entry: `deepspeed bitdistill/train.py`, or `deepspeed --module bitdistill.train` without a checkout.
"""

import json
import sys
import time
from pathlib import Path

from bitdistill.errors import UserError


def packed_file(run_or_file: str) -> Path:
    """The packed student of a run directory, or the file itself.

    Raises:
        UserError: neither is there.
    """
    path = Path(run_or_file).expanduser()
    if path.is_dir():
        path = path / "export" / "student.safetensors"
    if not path.is_file():
        raise UserError(
            "RUN_OR_FILE",
            expected="a run directory with a finished export stage, or a packed file",
            got=f"{run_or_file} (no {path})",
            do="Run --stage export first.",
        )
    return path


def generate(
    run_or_file: str,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    stop: list[str] | None = None,
    threads: int | None = None,
) -> None:
    """Continues a prompt with a packed student on the CPU, printing text as it comes.

    Args:
        run_or_file: a run directory, or a packed file.
        prompt: the text to continue.
        max_new_tokens: at most so many tokens.
        temperature: 0 takes the likeliest token, above 0 samples.
        top_k: sample among the k likeliest.
        seed: of the sampling.
        stop: texts that end the answer.
        threads: CPU threads; all by default.
    """
    from bitdistill.runtime import Runtime

    runtime = Runtime(packed_file(run_or_file), threads)
    print(prompt, end="", flush=True)
    for piece in runtime.generate(prompt, max_new_tokens, temperature, top_k, seed, stop or ()):
        print(piece, end="", flush=True)
    print()
    stats = runtime.stats
    decoded = max(stats["new_tokens"] - 1, 0)  # the first token comes out of the prompt's pass
    rate = f"{decoded / stats['decode_seconds']:.1f} tokens/s" if decoded else "too short to time"
    print(
        f"[{stats['prompt_tokens']} prompt tokens in {stats['prompt_seconds']:.2f} s; {stats['new_tokens']} new ones, "
        f"{rate}; stopped by {stats['stopped_by']}]",
        file=sys.stderr,
    )


def evaluate(
    run_or_file: str,
    task: str | None = None,
    validation_file: str | None = None,
    max_rows: int | None = None,
    max_length: int | None = None,
    threads: int | None = None,
    json_file: str | None = None,
) -> None:
    """Scores a packed student on the CPU, through the same prompts as in training.

    Args:
        run_or_file: a run directory (whose task, rows and length are the defaults), or a packed file.
        task: sst2, mnli, qnli, cnndm or a YAML file.
        validation_file: local rows in place of the hub's.
        max_rows: score only so many, chosen by seed 0.
        max_length: tokens of prompt and answer; 512 by default.
        threads: CPU threads; all by default.
        json_file: write the result there, too.
    """
    import yaml

    from bitdistill.evaluation import metric_of, score_rows
    from bitdistill.models import packed_tokenizer
    from bitdistill.runtime import Runtime
    from bitdistill.tasks import load_rows, load_task

    path, run = packed_file(run_or_file), Path(run_or_file).expanduser()
    if (run / "config.yaml").is_file():
        settings = yaml.safe_load((run / "config.yaml").read_text())
        if task is None:
            demo = settings["model"] is None
            task = str(run / "demo" / "task.yaml") if demo else settings["task"]
            local = run / "demo" / "validation.jsonl" if demo else settings["validation_file"]
            validation_file = validation_file or (str(local) if local else None)
        max_length = max_length or settings["max_length"]
    if task is None:
        raise UserError("task", expected="a task for a bare file", got="none", do="Give --task.")
    runtime = Runtime(path, threads)
    what = load_task(task)
    rows = load_rows(what, "validation", validation_file, max_rows)
    started = time.perf_counter()
    tokenizer = packed_tokenizer(runtime.model)
    score = score_rows(runtime, what, rows, tokenizer, max_length=max_length or 512, batch_size=1, name="packed")
    low, high = score.interval
    print(
        f"{what.name}: {metric_of(what)} {score.score:.2f} [{low:.2f}, {high:.2f}] on {score.examples:,} rows, "
        f"{time.perf_counter() - started:.1f} s"
    )
    for name, value in score.extra.items():
        print(f"  {name}: {value['score']:.2f} [{value['interval'][0]:.2f}, {value['interval'][1]:.2f}]")
    if json_file:
        result = {"task": what.name, "metric": metric_of(what), "score": score.score, "interval": [low, high]}
        result |= {"examples": score.examples, "extra": score.extra, "predictions": score.predictions}
        Path(json_file).write_text(json.dumps(result, indent=1))


def report(run: str) -> None:
    """Writes report.html of a run directory again and prints its table.

    Args:
        run: the run directory.
    """
    from bitdistill.report import show_report

    show_report(run)


def env() -> None:
    """Prints versions of this project, Python, the libraries and the machine, for bug reports."""
    from bitdistill.versions import versions

    for name, version in versions().items():
        print(f"{name:<14} {version}")


def main() -> int:
    """Runs a command; a user's mistake is one line and exit status 2."""
    arguments = sys.argv[1:]
    from jsonargparse import auto_cli

    commands = {"generate": generate, "eval": evaluate, "report": report, "env": env}
    if arguments[:1] and arguments[0] not in (*commands, "-h", "--help"):
        print(f"bitdistill: command: expected one of {', '.join(commands)}; got {arguments[0]!r}.", file=sys.stderr)
        return 2
    try:
        auto_cli(commands, args=arguments, as_positional=True)
    except UserError as error:
        print(f"bitdistill: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
