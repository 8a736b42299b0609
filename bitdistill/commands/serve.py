"""`bitdistill serve`: an HTTP server for one packed student (bitdistill/serving, extra `serve`)."""

import os
from typing import Any

from bitdistill.commands.options import (
    Parser,
    add_lookup_option,
    add_runtime_options,
    require_at_least,
    take_runtime_options,
)
from bitdistill.errors import UserError
from bitdistill.text_files import read_text, user_path

DEFAULT_CONTEXT = 4096


def serve(
    run_or_file: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: str | None = None,
    model_name: str | None = None,
    **options: Any,
) -> int:
    """Serves a packed student until SIGTERM or Ctrl-C.

    Args:
        run_or_file: a run directory, or a packed file.
        host, port: where to listen; only this machine by default.
        api_key_file: its first line is what clients must send; the variable BITDISTILL_API_KEY does the same.
        model_name: what /v1/models calls it; by default the base's name and the task's.
        options: the others of `serve_options`: threads, kv_cache, context, lookup, and the limits.

    Returns: the exit status.

    Raises:
        UserError: an option out of its range, a port that is taken, or the extra `serve` is not installed.
    """
    runtime_options, limits = take_runtime_options(options), options
    for option, number in limits.items():
        require_at_least(option, number, 1)
    if not 0 <= port <= 65535:
        raise UserError("port", expected="0 to 65535", got=str(port), do="Give a free port, such as 8000.")
    key = os.environ.get("BITDISTILL_API_KEY") or None
    if api_key_file is not None:
        path = user_path(api_key_file, "api_key_file")
        if not path.is_file():
            raise UserError("api_key_file", expected="a file with a key", got=str(path), do="Check the path.")
        key = read_text(path, "api_key_file").split("\n")[0].strip()
        if not key:
            raise UserError("api_key_file", expected="a key in its first line", got="none", do="Write one there.")
    try:
        from bitdistill.serving.server import run_server
    except ModuleNotFoundError as error:
        do = "Install it: pip install 'bitdistill[serve]'."
        raise UserError("COMMAND", expected=f"the library {error.name}", got="none installed", do=do) from error
    from bitdistill.runtime.cpu import Runtime
    from bitdistill.runtime.loading import find_packed
    from bitdistill.runtime.packed_file import read_packed
    from bitdistill.serving.limits import Limits

    path = find_packed(run_or_file)
    if runtime_options.get("context") is None:  # a KV cache for every slot: a long context would take all memory
        runtime_options["context"] = min(read_packed(path).config.max_position_embeddings, DEFAULT_CONTEXT)
    runtime = Runtime(path, **runtime_options)
    return run_server(runtime, host, port, key, model_name, Limits(**limits))


def serve_options(arguments: list[str]) -> dict[str, Any]:
    """The options of `serve`. Args: arguments: of the command line, after the command."""
    parser = Parser(
        prog="bitdistill serve", description="Serves a packed student: OpenAI's interface, /predict, and a page."
    )
    parser.add_argument("run_or_file", help="a run directory, or a packed file")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="the port (default: 8000; 0 takes a free one)")
    parser.add_argument("--api_key_file", help="a file whose first line clients must send as their API key")
    parser.add_argument("--model_name", help="the name of the model in /v1/models")
    parser.add_argument("--slots", type=int, default=16, help="answers computed at once, 1 to 16 (default: 16)")
    parser.add_argument("--max_queue", type=int, default=64, help="requests that may wait for a slot (default: 64)")
    parser.add_argument("--max_new_tokens", type=int, default=2048, help="tokens of the longest answer (default: 2048)")
    parser.add_argument(
        "--max_rows", type=int, default=256, help="rows of one call of /predict, at most (default: 256)"
    )
    parser.add_argument(
        "--max_body_bytes", type=int, default=1 << 20, help="size of the largest request (default: 1 MiB)"
    )
    parser.add_argument(
        "--request_seconds", type=int, default=300, help="longest time of a request, waiting included (default: 300)"
    )
    parser.add_argument(
        "--shutdown_seconds",
        type=int,
        default=30,
        help="time for running answers to finish when the server ends (default: 30)",
    )
    add_runtime_options(parser, context=f"the model's own limit, at most {DEFAULT_CONTEXT:,}")
    add_lookup_option(parser)
    return vars(parser.parse_args(arguments))
