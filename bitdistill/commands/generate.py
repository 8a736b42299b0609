"""`bitdistill generate`: continues a prompt, or each line of a file, with a packed student."""

import json
import sys
from typing import Any

from bitdistill import console
from bitdistill.commands.options import Parser, add_lookup_option, add_runtime_options, take_runtime_options
from bitdistill.errors import UserError
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
    profile: bool = False,
    **options: Any,
) -> None:
    """Continues a prompt with a packed student, printing text as it comes; or each line of a file, as JSON lines.

    Args:
        run_or_file: a run directory, or a packed file.
        prompt: the text to continue.
        prompts_file: a file with one prompt per line ("-" reads standard input), in its place. Answers come in that order, each
            {"index", "prompt", "text", "prompt_tokens", "cached_tokens", "new_tokens", "stopped_by"}.
        slots, max_new_tokens, stop, special_tokens: see `generate_options`.
        device: "cpu", or a GPU: "cuda", "cuda:1".
        profile: also print where the time of a decoding step goes.
        options: the others of `generate_options`: threads, kv_cache, context, lookup and those of sampling.

    Raises:
        UserError: no such file, no prompt or two, or a setting out of its range.
    """
    if (prompt is None) == (prompts_file is None):
        got = "neither" if prompt is None else "both"
        raise UserError("prompt", expected="a prompt or --prompts_file", got=got, do="Give one of them.")
    from bitdistill.runtime.loading import find_packed
    from bitdistill.runtime.sampling import Sampling

    path, runtime_options, sampling = find_packed(run_or_file), take_runtime_options(options), Sampling(**options)
    if device == "cpu":
        from bitdistill.runtime.cpu import Runtime

        runtime = Runtime(path, **runtime_options)
    else:
        threads, lookup = (runtime_options.pop(name, None) for name in ("threads", "lookup"))
        if prompts_file is not None or profile or threads is not None or lookup:
            got = f"{device} with --prompts_file, --profile, --threads or --lookup"
            raise UserError("device", expected="cpu for these options", got=got, do="Leave one of them out.")
        from bitdistill.runtime.cuda import CudaRuntime

        runtime = CudaRuntime(path, device, **runtime_options)
    if prompts_file is not None:
        _generate_lines(runtime, prompts_file, slots, max_new_tokens, stop or (), sampling, special_tokens)
    else:
        ids = runtime.encode(prompt, special_tokens)
        print(prompt, end="", flush=True)
        for piece in runtime.generate(ids, max_new_tokens, sampling, stop or ()):
            print(piece, end="", flush=True)
        print()
    _print_statistics(runtime)
    if profile:
        _print_profile(runtime)


def _print_statistics(runtime) -> None:
    stats = runtime.stats
    rate = f"{stats.tokens_per_second:.1f} tokens/s" if stats.decoded_tokens else "too short to time"
    cached = f", {stats.cached_tokens} of them known" if stats.cached_tokens else ""
    read = f", {stats.read_bytes_per_token / 1e6:.2f} MB read per token" if stats.decode_steps else ""
    print(
        f"[{stats.prompt_tokens} prompt tokens{cached}, in {stats.prompt_seconds:.2f} s; {stats.new_tokens} new ones, "
        f"{rate}{read}; KV cache {stats.kv_cache_bytes / 1e6:.2f} MB beside the file's {runtime.file_bytes / 1e6:.2f}; "
        f"stopped by {stats.stopped_by}]",
        file=sys.stderr,
    )


def _print_profile(runtime) -> None:
    stats = runtime.stats
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
    numbers = [number for number, line in enumerate(lines, start=1) if line.strip()]
    for number, tokens in zip(numbers, ids, strict=True):
        if len(tokens) > runtime.context:
            got, do = f"{len(tokens)} in line {number}", "Shorten the prompt, or leave it out."
            raise UserError("prompts_file", expected=f"at most {runtime.context} tokens a prompt", got=got, do=do)
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


def generate_options(arguments: list[str]) -> dict:
    """The options of `generate`. By argparse: the other commands' jsonargparse takes a third of the time to a first token."""
    parser = Parser(
        prog="bitdistill generate", description="Continues a prompt with a packed student, printing text as it comes."
    )
    parser.add_argument("run_or_file", help="a run directory, or a packed file")
    parser.add_argument("prompt", nargs="?", help="the text to continue")
    parser.add_argument(
        "--prompts_file", help="continue each line of this file instead (- is standard input), and print JSON lines"
    )
    parser.add_argument(
        "--slots", type=int, default=8, help="how many lines are continued at once, 1 to 16 (default: 8)"
    )
    parser.add_argument("--max_new_tokens", type=int, default=64, help="the most tokens of an answer (default: 64)")
    parser.add_argument("--stop", action="append", help="a text that ends the answer; may be given several times")
    parser.add_argument(
        "--special_tokens",
        action="store_true",
        help="let <|im_start|> and the like in a prompt stand for the tokens of these names",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token (default), above 0 draws at random"
    )
    parser.add_argument("--top_k", type=int, help="draw among the k likeliest tokens only")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="draw among the likeliest tokens that have the probability p together"
    )
    parser.add_argument(
        "--min_p",
        type=float,
        default=0.0,
        help="leave out tokens that are less than min_p times as likely as the likeliest",
    )
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 makes repetitions rarer")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random draws (default: 0)")
    parser.add_argument("--device", default="cpu", help="cpu (default), or a GPU: cuda, cuda:1")
    add_runtime_options(parser)
    add_lookup_option(parser)
    parser.add_argument("--profile", action="store_true", help="also print where the time of a decoding step goes")
    return vars(parser.parse_args(arguments))
