"""ENTRY: `bitdistill COMMAND`: what one does with a finished run or a packed file.

    bitdistill generate RUN_OR_FILE "prompt"   text from the packed student; on a CPU without torch and transformers
    bitdistill generate RUN_OR_FILE --prompts_file FILE    an answer for each line, as JSON lines
    bitdistill eval RUN_OR_FILE                scores the packed student on its task, or on another; or another setting
    bitdistill eval RUN_OR_FILE --perplexity FILE     perplexity of a text, of all settings of a run
    bitdistill eval RUN_OR_FILE --lm_eval sst2,qnli   scores by lm-evaluation-harness
    bitdistill export RUN --format gguf        the student for llama.cpp, transformers, vLLM or mlx, proved by the tool
    bitdistill check MODEL                     what a student of a base model can become, before it is trained
    bitdistill report RUN                      writes report.html again and prints the table
    bitdistill env                             versions, for bug reports

The main job is its own entry: `deepspeed bitdistill/train.py`, or `deepspeed --module bitdistill.train` without a checkout.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Literal

from bitdistill import console, folders, surroundings
from bitdistill.errors import UserError
from bitdistill.files import write_whole
from bitdistill.text_files import decode, user_path


def generate(
    run_or_file: str,
    prompt: str | None = None,
    prompts_file: str | None = None,
    slots: int = 8,
    max_new_tokens: int = 64,
    stop: list[str] | None = None,
    special_tokens: bool = False,
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
        slots, max_new_tokens, stop, special_tokens, threads, kv_cache, context, sampling: see `_generate_options`.
        device: "cpu", or a GPU: "cuda", "cuda:1".
        profile: also print where the time of a decoding step goes.

    Raises:
        UserError: no such file, no prompt or two, or a setting out of its range.
    """
    if (prompt is None) == (prompts_file is None):
        got = "neither" if prompt is None else "both"
        raise UserError("prompt", expected="a prompt or --prompts_file", got=got, do="Give one of them.")
    from bitdistill.runtime.loading import find_packed
    from bitdistill.runtime.sampling import Sampling

    path, sampling = find_packed(run_or_file), Sampling(**sampling)
    if device == "cpu":
        from bitdistill.runtime.cpu import Runtime

        runtime = Runtime(path, threads, kv_cache, context)
    else:
        if prompts_file is not None or profile or threads is not None:
            got = f"{device} with --prompts_file, --profile or --threads"
            raise UserError("device", expected="cpu for these options", got=got, do="Leave one of them out.")
        from bitdistill.runtime.cuda import CudaRuntime

        runtime = CudaRuntime(path, device, context, kv_cache)
    if prompts_file is not None:
        _generate_lines(runtime, prompts_file, slots, max_new_tokens, stop or (), sampling, special_tokens)
    else:
        ids = runtime.encode(prompt, special_tokens)
        print(prompt, end="", flush=True)
        for piece in runtime.generate(ids, max_new_tokens, sampling, stop or ()):
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


def _generate_lines(
    runtime, prompts_file: str, slots: int, max_new_tokens: int, stop, sampling, special_tokens: bool
) -> None:
    lines = _read_prompts(prompts_file).split("\n")
    prompts = [line.removesuffix("\r") for line in lines if line.strip()]
    blank = len(lines) - len(prompts) - (lines[-1] == "")  # nothing follows the last line end
    if not prompts:
        raise UserError("prompts_file", expected="at least one prompt", got="none", do="Write one prompt per line.")
    if blank:
        print(f"[{blank} blank lines left out]", file=sys.stderr)
    finished, following, escaped = {}, 0, not console.takes_unicode(sys.stdout)
    ids = [runtime.encode(prompt, special_tokens) for prompt in prompts]
    for answer in runtime.generate_batch(ids, max_new_tokens, sampling, stop, slots):
        finished[answer.index] = answer
        while following in finished:
            answer = finished.pop(following)
            line = {"index": answer.index, "prompt": prompts[answer.index], "text": answer.text}
            line |= {"prompt_tokens": answer.prompt_tokens, "cached_tokens": answer.cached_tokens}
            line |= {"new_tokens": len(answer.token_ids), "stopped_by": answer.stopped_by}
            print(json.dumps(line, ensure_ascii=escaped), flush=True)
            following += 1


def _read_prompts(prompts_file: str) -> str:
    """The text of a file of prompts, or of standard input for "-". Raises UserError when it cannot be read."""
    try:
        # The bytes of standard input: its own encoding is the console's, which may be ASCII.
        path = user_path(prompts_file, "prompts_file")
        data = sys.stdin.buffer.read() if prompts_file == "-" else path.read_bytes()
        return decode(data, "prompts_file", prompts_file)
    except OSError as error:
        got = f"{prompts_file} ({error.strerror})"
        raise UserError("prompts_file", expected="a readable text file", got=got, do="Check the path.") from error


def _generate_options(arguments: list[str]) -> dict:
    """The options of `generate`. By argparse: the other commands' jsonargparse takes a third of the time to a first token."""
    parser = _Parser(
        prog="bitdistill generate", description="Continues a prompt with a packed student, printing text as it comes."
    )
    parser.add_argument("run_or_file", help="a run directory, or a packed file")
    parser.add_argument("prompt", nargs="?", help="the text to continue")
    parser.add_argument("--prompts_file", help="continue each line of a file instead (- is standard input): JSON lines")
    parser.add_argument("--slots", type=int, default=8, help="so many lines at once, 1 to 16 (default: 8)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="at most so many tokens (default: 64)")
    parser.add_argument("--stop", action="append", help="a text that ends the answer; can be given several times")
    parser.add_argument(
        "--special_tokens",
        action="store_true",
        help="take <|im_start|> and the like in a prompt for the tokens they name",
    )
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
    setting: Literal["FP16-SFT", "BitNet-SFT", "BitDistill"] | None = None,
    task: str | None = None,
    validation_file: str | None = None,
    extra_validation_files: dict[str, str] | None = None,
    max_rows: int | None = None,
    max_length: int | None = None,
    perplexity: str | None = None,
    block_size: int = 512,
    lm_eval: str | None = None,
    threads: int | None = None,
    json_file: str | None = None,
) -> None:
    """Scores the packed student on the CPU through the same prompts as in training, or another setting of its run.

    Args:
        run_or_file: a run directory (whose task, rows and length are the defaults), or a packed file.
        setting: of a run: BitDistill by default; with --perplexity all that the run has.
        task: sst2, mnli, qnli, cnndm or a YAML file.
        validation_file: local rows in place of the hub's.
        extra_validation_files: local rows of further validation splits: --extra_validation_files.validation_mismatched FILE.
        max_rows: score only so many, chosen by seed 0.
        max_length: tokens of prompt and answer; 512 by default.
        perplexity: a text file (or .jsonl, .parquet, a folder), in place of a task: exp of the mean loss of its next tokens.
        block_size: tokens of a block of that text; max_rows limits the blocks.
        lm_eval: names, with commas between them: scored by lm-evaluation-harness instead, tasks of ours (sst2, a YAML file)
            with our prompt and with the harness's own, others on the harness's data.
        threads: CPU threads of the packed runtime; all by default.
        json_file: write the result there, too.
    """
    if perplexity and lm_eval:
        raise UserError(
            "perplexity", expected="--perplexity or --lm_eval", got="both", do="Run them one after the other."
        )
    run = Path(run_or_file).expanduser()
    if json_file:
        _require_writable("json_file", json_file)
    for option, number, least in (
        ("max_rows", max_rows, 1),
        ("max_length", max_length, 1),
        ("block_size", block_size, 2),
    ):
        _require_at_least(option, number, least)
    _require_at_least("threads", threads, 1)
    validation_file, perplexity = folders.local_path(validation_file), folders.local_path(perplexity)
    task = folders.local_path(task) if (task or "").endswith((".yaml", ".yml")) else task
    extra_validation_files = {s: folders.local_path(file) for s, file in (extra_validation_files or {}).items()}
    known = own = _run_defaults(run)
    given = {"task": task, "validation_file": validation_file, "max_length": max_length}
    if task is not None and task != known.get("task"):  # the run's rows are of its own task
        known = {"max_length": known.get("max_length")}
    options = {name: value or known.get(name) for name, value in given.items()}
    options["extra_validation_files"] = extra_validation_files or known.get("extra_validation_files") or {}
    options["max_length"] = options["max_length"] or 512
    if perplexity:
        result = _perplexity(run_or_file, setting, perplexity, block_size, max_rows, threads)
    elif lm_eval:
        files = {own.get("task"): own.get("validation_file")}  # the run's own rows, for its own task
        result = _lm_eval(
            run_or_file, setting, lm_eval, validation_file, files, options["max_length"], max_rows, threads
        )
    elif options["task"] is None:
        raise UserError("task", expected="a task for a bare file", got="none", do="Give --task.")
    else:
        result = _task_score(run_or_file, setting, options, max_rows, threads)
    if json_file:
        write_whole(Path(json_file).expanduser(), json.dumps(result, indent=1))


def _require_at_least(option: str, number: int | None, least: int) -> None:
    if number is not None and number < least:
        raise UserError(option, expected=f"{least} or more", got=str(number), do=f"Give --{option} {least} or more.")


def _require_writable(option: str, file: str) -> None:
    """Checks before any work that a result can be written to `file`; one that is there stays as it is until then.

    Raises:
        UserError: it is a folder, its folder is missing, or the system refuses.
    """
    path = Path(file).expanduser()
    existed, reason = path.exists(), None
    try:
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
    if reason is not None:
        do = "Create its folder first, or name another place."
        raise UserError(option, expected="a file that can be written", got=f"{file} ({reason})", do=do)


def _run_defaults(run: Path) -> dict:
    """Task, rows and length of a run directory, from its config.yaml; nothing for a file."""
    import yaml

    if not (run / "config.yaml").is_file():
        return {}
    try:
        settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        do = "Copy the file from a backup, or run the training command again, which writes it."
        raise UserError(f"{run / 'config.yaml'}", expected="the settings of a run", got=str(error), do=do) from error
    if not isinstance(settings, dict) or "max_length" not in settings:
        do = "Name a folder that bitdistill/train.py has written."
        raise UserError(f"{run / 'config.yaml'}", expected="the settings of a run", got="other content", do=do)
    if settings.get("model") is None:
        files = {"task": str(run / "demo" / "task.yaml"), "validation_file": str(run / "demo" / "validation.jsonl")}
        return files | {"max_length": settings["max_length"]}
    names = ("task", "validation_file", "extra_validation_files", "max_length")
    return {name: settings.get(name) for name in names}


def _subject(run_or_file: str, setting: str | None, threads: int | None):
    """(name, model, tokenizer) of a setting: a Runtime on a packed file, or the full-precision model in torch."""
    from bitdistill.runtime.cpu import Runtime
    from bitdistill.runtime.loading import find_packed
    from bitdistill.student.loading import load_language_model, load_tokenizer, packed_tokenizer

    run = Path(run_or_file).expanduser()
    if setting not in (None, "BitDistill"):
        if not run.is_dir():
            raise UserError(
                "setting", expected="a run directory for it", got=run_or_file, do="Name the run, or leave it."
            )
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

    task = load_task(options["task"])
    splits, left_out = load_validation(task, options["validation_file"], options["extra_validation_files"], max_rows)
    for split in left_out:
        print(f"[{split} is not scored; --extra_validation_files.{split} FILE adds it]", file=sys.stderr)
    name, model, tokenizer = _subject(run_or_file, setting, threads)
    started = time.perf_counter()
    rows_at_a_time = {"max_length": options["max_length"], "batch_size": 32}
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
    run_or_file: str, setting: str | None, text: str, block_size: int, max_blocks: int | None, threads: int | None
) -> dict:
    from bitdistill.data.corpus import token_blocks
    from bitdistill.evaluation.score import text_perplexity

    run, settings = Path(run_or_file).expanduser(), [setting]
    if setting is None and run.is_dir():
        there = {"FP16-SFT": "teacher/model.safetensors", "BitNet-SFT": "export/baseline.safetensors"}
        settings = [*(name for name, file in there.items() if (run / file).is_file()), "BitDistill"]
    results = {}
    for wanted in settings:
        name, model, tokenizer = _subject(run_or_file, wanted, threads)
        blocks = token_blocks(text, tokenizer, block_size, max_blocks)
        found = results[name] = text_perplexity(model, blocks, name)
        print(
            f"{Path(text).name}: {name} perplexity {found['perplexity']:.2f} [{found['low']:.2f}, {found['high']:.2f}] on "
            f"{found['tokens']:,} tokens in blocks of {block_size}"
        )
    return results


def _lm_eval(
    run_or_file: str,
    setting: str | None,
    names: str,
    file: str | None,
    files: dict[str, str],
    max_length: int,
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
            "lm_eval", expected="one task of ours for local rows", got=got, do="Score them one after the other."
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


def export(
    run: str,
    format: Literal["gguf", "transformers", "compressed-tensors", "mlx"],
    output: str | None = None,
    type: str = "auto",
    embedding: Literal["f16", "q8_0", "q4_0"] = "q8_0",
    prove: bool = True,
    threads: int | None = None,
) -> None:
    """Writes a run's student in the format of another tool, and lets that tool prove it where it is installed.

    Args:
        run: a run directory with a finished student.
        format: gguf (llama.cpp, Ollama, LM Studio), transformers, compressed-tensors (transformers, vLLM), or mlx (mlx-lm).
        output: the file (gguf) or folder to write; RUN/export/student.gguf or RUN/export/student-FORMAT by default.
        type: of the ternary matrices in a gguf file: auto, tq2_0, tq1_0, q4_0, q2_0 or f16.
        embedding: of the embedding and LM head in a gguf file.
        prove: False writes the file without asking the tool.
        threads: CPU threads of the tool; all by default.
    """
    from bitdistill.cpus import available_cpus
    from bitdistill.export.deliver import deliver, proof_texts

    folder = Path(run).expanduser()
    if not (folder / "distill" / "model.safetensors").is_file():
        do = "Train one first: deepspeed bitdistill/train.py --stage all."
        raise UserError("RUN", expected="a run directory with a finished student (RUN/distill)", got=run, do=do)
    options = {"linear_type": type, "embedding_type": embedding, "prove": prove}
    _require_at_least("threads", threads, 1)
    options["threads"] = threads or available_cpus()
    result = deliver(folder / "distill", format, output, proof_texts(folder), **options)
    print(f"{result['path']}: {result['file_bytes']:,} bytes, {result['bits_per_weight']:.2f} bits per ternary weight")
    if format == "gguf":
        types = ", ".join(f"{count} matrices {kind}" for kind, count in result["types"].items())
        print(f"architecture {result['architecture']}: {types}; embedding {result['embedding_type']}")
    proof = result["proof"]
    if proof is None:
        print(f"The weights are read back bit for bit; unproven in the tool: {result['unproven']}.")
        return
    print(
        f"proved by {proof['tool']} on {proof['tokens']} tokens: mean KL {proof['mean_kl']:.2g}, same likeliest token "
        f"{100 * proof['same_top1']:.1f} %, perplexity x {proof['perplexity_ratio']:.4f}"
    )


def check(model: str, norms: Literal["none", "two", "all"] = "two") -> None:
    """Prints into which formats a student of a base model can be exported, and why not into the others.

    Args:
        model: a base model, a local folder or a hub id; only its config.json is read.
        norms: refine.norms of the student.
    """
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoConfig

    from bitdistill.export.deliver import deployability
    from bitdistill.student.model_folder import check_family

    try:
        config = AutoConfig.from_pretrained(str(Path(model).expanduser()))
    except (OSError, ValueError) as error:
        got = f"{model} ({str(error).strip().splitlines()[0]})"
        do = "Give a local Hugging Face folder, or a hub id when the hub can be reached."
        raise UserError("model", expected="a folder or hub id with a config.json", got=got, do=do) from error
    check_family(config)
    table = Table(title=f"{model}, refine.norms {norms}")
    for column in ("format", "opens in", "possible", "type", "bits per weight", "why not"):
        table.add_column(column, overflow="fold")
    for row in deployability(config, norms):
        possible = "yes" if row["possible"] else "no"
        cells = [
            row["format"],
            row["opens_in"],
            possible,
            row["file_type"],
            f"{row['bits_per_weight']:.2f}",
            row["why"],
        ]
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def report(run: str) -> None:
    """Writes report.html of a run directory again and prints its table.

    Args:
        run: the run directory.
    """
    from bitdistill.reporting.report import show_report

    show_report(run)


def env() -> None:
    """Prints versions of this project, Python, the libraries and the machine, and which kernels are right here."""
    from bitdistill.reporting.versions import versions

    for name, version in versions().items():
        print(f"{name:<14} {version}")
    from bitdistill.student.backend import kernel_states

    for name, state in kernel_states().items():
        print(f"{name:<14} {state}")


COMMANDS = {
    "generate": generate,
    "eval": evaluate,
    "export": export,
    "check": check,
    "report": report,
    "env": env,
}


class _Parser(argparse.ArgumentParser):
    """argparse's, with a mistake as a UserError."""

    def error(self, message):
        raise UserError("command line", expected=f"options of {self.prog}", got=message, do=f"See {self.prog} --help.")


def _run_command(arguments: list[str]) -> None:
    if arguments[:1] and arguments[0] not in (*COMMANDS, "-h", "--help"):
        do = "See bitdistill --help."
        raise UserError("COMMAND", expected=f"one of {', '.join(COMMANDS)}", got=repr(arguments[0]), do=do)
    if arguments[:1] == ["generate"]:
        options = _generate_options(arguments[1:])
        for name, value in options.items():
            for text in value if isinstance(value, list) else [value]:
                console.require_utf8(name, text if isinstance(text, str) else None)
        if options["device"] == "cpu":
            # Numba would import it for linear algebra that nothing here uses: a fifth of the time to the first token.
            sys.modules.setdefault("scipy", None)
        generate(**options)
        return
    from jsonargparse import ArgumentError, auto_cli

    for argument in arguments:
        console.require_utf8("command line", argument)
    try:
        auto_cli(COMMANDS, args=arguments, as_positional=True, exit_on_error=False)
    except ArgumentError as error:
        command = " ".join(["bitdistill", *arguments[:1]])
        do = f"See {command} --help."
        raise UserError("command line", expected=f"options of {command}", got=str(error), do=do) from error


def main() -> int:
    """Runs a command. Returns the exit status of `console.run`; 2 as well when an optional library is not installed."""
    surroundings.prepare()
    surroundings.limit_threads()

    def body() -> None:
        try:
            _run_command(sys.argv[1:])
        except ModuleNotFoundError as error:
            if (error.name or "bitdistill").startswith("bitdistill"):
                raise
            extra = "eval" if error.name == "lm_eval" else "train"
            do = f"Install it: pip install 'bitdistill[{extra}]'."
            raise UserError("COMMAND", expected=f"the library {error.name}", got="none installed", do=do) from error

    return console.run(body)


if __name__ == "__main__":
    sys.exit(main())
