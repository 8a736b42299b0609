"""ENTRY: `bitdistill COMMAND`: what one does with a finished run or a packed file.

    bitdistill generate RUN_OR_FILE "prompt"   text from the packed student; on a CPU without torch and transformers
    bitdistill generate RUN_OR_FILE --prompts_file FILE    an answer for each line, as JSON lines
    bitdistill eval RUN_OR_FILE                scores the packed student on its task, or on another
    bitdistill report RUN                      writes report.html again and prints the table
    bitdistill env                             versions, for bug reports

The main job is its own entry: `deepspeed bitdistill/train.py`, or `deepspeed --module bitdistill.train` without a checkout.
"""

import argparse
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
    prompt: str | None = None,
    prompts_file: str | None = None,
    slots: int = 8,
    max_new_tokens: int = 64,
    stop: list[str] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    kv_cache: str = "bf16",
    context: int | None = None,
    profile: bool = False,
    **sampling,
) -> None:
    """Continues a prompt with a packed student, printing text as it comes; or each line of a file, as JSON lines.

    Args:
        run_or_file: a run directory, or a packed file.
        prompt: the text to continue.
        prompts_file: a prompt a line ("-" reads standard input) in its place: answers in the order of the lines, each
            {"index", "prompt", "text", "prompt_tokens", "cached_tokens", "new_tokens", "stopped_by"}.
        slots, max_new_tokens, stop, threads, kv_cache, context, sampling: see `_generate_options`.
        device: "cpu", or a GPU: "cuda", "cuda:1".
        profile: also print where the time of a decoding step goes.

    Raises:
        UserError: no such file, no prompt or two, or a setting out of its range.
    """
    if (prompt is None) == (prompts_file is None):
        got = "neither" if prompt is None else "both"
        raise UserError("prompt", expected="a prompt or --prompts_file", got=got, do="Give one of them.")
    from bitdistill.sampling import Sampling

    path, sampling = packed_file(run_or_file), Sampling(**sampling)
    if device == "cpu":
        from bitdistill.runtime import Runtime

        runtime = Runtime(path, threads, kv_cache, context)
    else:
        if prompts_file is not None or profile or threads is not None:
            got = f"{device} with --prompts_file, --profile or --threads"
            raise UserError("device", expected="cpu for these options", got=got, do="Leave one of them out.")
        from bitdistill.runtime_cuda import CudaRuntime

        runtime = CudaRuntime(path, device, context, kv_cache)
    if prompts_file is not None:
        _generate_lines(runtime, prompts_file, slots, max_new_tokens, stop or (), sampling)
    else:
        print(prompt, end="", flush=True)
        for piece in runtime.generate(prompt, max_new_tokens, sampling, stop or ()):
            print(piece, end="", flush=True)
        print()
    stats = runtime.stats
    rate = f"{stats.tokens_per_second:.1f} tokens/s" if stats.decoded_tokens else "too short to time"
    cached = f", {stats.cached_tokens} of them known" if stats.cached_tokens else ""
    read = f", {stats.read_bytes_per_token / 1e6:.2f} MB read a token" if stats.decode_steps else ""
    print(
        f"[{stats.prompt_tokens} prompt tokens{cached}, in {stats.prompt_seconds:.2f} s; {stats.new_tokens} new ones, "
        f"{rate}{read}; KV cache {stats.kv_cache_bytes / 1e6:.2f} MB beside the file's {runtime.file_bytes / 1e6:.2f}; "
        f"stopped by {stats.stopped_by}]",
        file=sys.stderr,
    )
    if profile:
        parts = runtime.profile(min(stats.prompt_tokens + stats.new_tokens, runtime.context - 1))
        total = sum(parts.values())
        for name, seconds in sorted(parts.items(), key=lambda part: -part[1]):
            print(f"  {name:<24} {1e6 * seconds:>9.0f} us  {100 * seconds / total:>5.1f} %", file=sys.stderr)
        print(f"  {'a step':<24} {1e6 * total:>9.0f} us", file=sys.stderr)


def _generate_lines(runtime, prompts_file: str, slots: int, max_new_tokens: int, stop, sampling) -> None:
    if prompts_file != "-" and not Path(prompts_file).is_file():
        raise UserError("prompts_file", expected="a text file", got=f"{prompts_file} (no such file)", do="Correct it.")
    try:
        text = sys.stdin.read() if prompts_file == "-" else Path(prompts_file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError("prompts_file", expected="text in UTF-8", got=f"{error}", do="Convert it.") from error
    lines = text.split("\n")
    prompts = [line.removesuffix("\r") for line in lines if line.strip()]
    blank = len(lines) - len(prompts) - (lines[-1] == "")  # nothing follows the last line end
    if not prompts:
        raise UserError("prompts_file", expected="at least one prompt", got="none", do="Write one a line.")
    if blank:
        print(f"[{blank} blank lines left out]", file=sys.stderr)
    finished, following = {}, 0
    for answer in runtime.generate_batch(prompts, max_new_tokens, sampling, stop, slots):
        finished[answer.index] = answer
        while following in finished:
            answer = finished.pop(following)
            line = {"index": answer.index, "prompt": prompts[answer.index], "text": answer.text}
            line |= {"prompt_tokens": answer.prompt_tokens, "cached_tokens": answer.cached_tokens}
            line |= {"new_tokens": len(answer.token_ids), "stopped_by": answer.stopped_by}
            print(json.dumps(line, ensure_ascii=False), flush=True)
            following += 1


def _generate_options(arguments: list[str]) -> dict:
    """The options of `generate`. By argparse: the other commands' jsonargparse takes a third of the time to a first token."""
    parser = argparse.ArgumentParser(
        prog="bitdistill generate", description="Continues a prompt with a packed student, printing text as it comes."
    )
    parser.add_argument("run_or_file", help="a run directory, or a packed file")
    parser.add_argument("prompt", nargs="?", help="the text to continue")
    parser.add_argument("--prompts_file", help="continue each line of a file instead (- is standard input): JSON lines")
    parser.add_argument("--slots", type=int, default=8, help="so many lines at once, 1 to 16 (default: 8)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="at most so many tokens (default: 64)")
    parser.add_argument("--stop", action="append", help="a text that ends the answer; can be given several times")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token, above 0 samples")
    parser.add_argument("--top_k", type=int, help="sample among the k likeliest")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample among the likeliest that make up p together")
    parser.add_argument(
        "--min_p", type=float, default=0.0, help="leave out what is less than min_p times the likeliest"
    )
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 makes repetitions rarer")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--device", default="cpu", help="cpu (default), or a GPU: cuda, cuda:1")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--kv_cache", default="bf16", help="how keys and values are kept: bf16 (default), fp32 or int8")
    parser.add_argument("--context", type=int, help="at most so many positions (default: the model's own limit)")
    parser.add_argument("--profile", action="store_true", help="print where the time of a step goes")
    return vars(parser.parse_args(arguments))


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
    commands = {"generate": generate, "eval": evaluate, "report": report, "env": env}
    if arguments[:1] and arguments[0] not in (*commands, "-h", "--help"):
        print(f"bitdistill: command: expected one of {', '.join(commands)}; got {arguments[0]!r}.", file=sys.stderr)
        return 2
    try:
        if arguments[:1] == ["generate"]:
            options = _generate_options(arguments[1:])
            if options["device"] == "cpu":
                # Numba would import it for linear algebra that nothing here uses: a fifth of the time to the first token.
                sys.modules.setdefault("scipy", None)
            generate(**options)
        else:
            from jsonargparse import auto_cli

            auto_cli(commands, args=arguments, as_positional=True)
    except UserError as error:
        print(f"bitdistill: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "bitdistill").startswith("bitdistill"):
            raise
        print(f"bitdistill: expected the library {error.name}; it is not installed. "
              "Training and evaluation need: pip install 'bitdistill[train]'", file=sys.stderr)  # fmt: skip
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
