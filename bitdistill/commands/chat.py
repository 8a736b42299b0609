"""`bitdistill chat`: a conversation in the terminal with a student whose base has a chat template."""

import sys
from typing import Any

from bitdistill.commands.options import (
    Parser,
    add_lookup_option,
    add_runtime_options,
    require_at_least,
    take_runtime_options,
)
from bitdistill.errors import UserError

HELP = "/reset begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def chat(
    run_or_file: str,
    system: str | None = None,
    max_new_tokens: int = 512,
    **options: Any,
) -> None:
    """Answers line by line, with the whole conversation before it; says so when the oldest turns no longer fit.

    Args:
        run_or_file: a run directory, or a packed file.
        system: a message to begin with.
        max_new_tokens: tokens of an answer, at most.
        options: the others of `chat_options`: threads, kv_cache, context, lookup and those of sampling; of the latter, what is
            not given is the base's own recommendation.

    Raises:
        UserError: the file has no chat template, or a setting is out of its range.
    """
    require_at_least("max_new_tokens", max_new_tokens, 1)
    from bitdistill.runtime.conversation import require_chat
    from bitdistill.runtime.loading import load

    runtime = load(run_or_file, **take_runtime_options(options))
    require_chat(runtime)
    chosen = runtime.header.sampling(**options)
    begin = [] if system is None else [{"role": "system", "content": system}]
    shown = sys.stdin.isatty()
    if shown:
        import readline  # noqa: F401 -- editing and history of what is typed
    if runtime.task is not None:
        print(f"[trained for the task {runtime.task.name}: `bitdistill predict` asks for that]", file=sys.stderr)
    print(f"[{HELP}]", file=sys.stderr)
    messages = list(begin)
    while True:
        try:
            line = input("> " if shown else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:  # at the prompt: what was typed is dropped
            print()
            continue
        if line == "/exit":
            break
        if line == "/reset":
            messages = list(begin)
            print("[a new conversation]", file=sys.stderr)
        elif line.startswith("/"):
            print(f"[{HELP}]", file=sys.stderr)
        elif line:
            messages = _answer(runtime, [*messages, {"role": "user", "content": line}], max_new_tokens, chosen)


def _answer(runtime, messages: list[dict[str, str]], max_new_tokens: int, sampling) -> list[dict[str, str]]:
    """Prints the answer as it comes. Returns: the conversation with it, as far as it fits."""
    from bitdistill.runtime.conversation import fitting

    try:
        kept, ids = fitting(runtime, messages, min(max_new_tokens, runtime.context // 2))
    except UserError as error:
        print(f"[{error}]", file=sys.stderr)
        return messages[:-1]
    if len(kept) < len(messages):
        left_out = len(messages) - len(kept)
        print(f"[the oldest {left_out} messages no longer fit into {runtime.context} tokens]", file=sys.stderr)
    pieces: list[str] = []
    answer = runtime.generate(ids, max_new_tokens, sampling)
    try:
        for piece in answer:
            pieces.append(piece)
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        answer.close()
        print("\n[stopped]", file=sys.stderr)
    else:
        if runtime.stats.stopped_by in ("length", "context"):
            limit = f"{max_new_tokens} tokens" if runtime.stats.stopped_by == "length" else "the context"
            print(f"[ended by the limit of {limit}]", file=sys.stderr)
    return [*kept, {"role": "assistant", "content": "".join(pieces).strip()}]


def chat_options(arguments: list[str]) -> dict[str, Any]:
    """The options of `chat`. Args: arguments: of the command line, after the command."""
    parser = Parser(prog="bitdistill chat", description=f"A conversation with a packed student: {HELP}.")
    parser.add_argument("run_or_file", help="a run directory, or a packed file")
    parser.add_argument("--system", help="a system message to begin with")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="tokens of an answer, at most (default: 512)")
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token; larger values sample")
    parser.add_argument("--top_k", type=int, help="sample among the k likeliest tokens")
    parser.add_argument("--top_p", type=float, help="sample among the likeliest tokens whose probabilities sum to p")
    parser.add_argument("--min_p", type=float, help="leave out tokens less likely than min_p times the likeliest")
    parser.add_argument("--repetition_penalty", type=float, help="a value above 1 makes repetitions rarer")
    parser.add_argument("--seed", type=int, help="seed of the sampling")
    add_runtime_options(parser)
    add_lookup_option(parser)
    return vars(parser.parse_args(arguments))
