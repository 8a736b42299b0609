"""ENTRY: `bitdistill COMMAND`, for training in one process and for what one does with a finished run or a packed file.

    bitdistill train --model MODEL --task TASK   the main job (train.py), with its options
    bitdistill generate RUN_OR_FILE "prompt"   text from the packed student; on a CPU without torch and transformers
    bitdistill generate RUN_OR_FILE --prompts_file FILE    an answer for each line, as JSON lines
    bitdistill predict RUN_OR_FILE "text"      label and probability of a row of the task, or the text that it asks for
    bitdistill predict RUN_OR_FILE --input FILE --output FILE    of each row of a file
    bitdistill chat RUN_OR_FILE                a conversation in the terminal
    bitdistill serve RUN_OR_FILE               an HTTP server with OpenAI's interface, and a page for the browser
    bitdistill trim RUN_OR_FILE --input FILE --output FILE     a smaller file for the task: the words of these rows stay
    bitdistill info RUN_OR_FILE                what a packed file is, how large its parts are, and how to use it
    bitdistill eval RUN_OR_FILE                scores the packed student on its task, or on another; or another setting
    bitdistill eval RUN_OR_FILE --perplexity FILE     perplexity of a text, of all settings of a run
    bitdistill eval RUN_OR_FILE --lm_eval sst2,qnli   scores by lm-evaluation-harness
    bitdistill export RUN --format gguf        the student for llama.cpp, transformers, vLLM or mlx, proved by the tool
    bitdistill check MODEL                     in which tools a student of a base model opens, before it is trained
    bitdistill plan --model MODEL --gpus 8xH200 --tokens 10e9    memory, days and cost of training it, before anything starts
    bitdistill consolidate RUN OUTPUT          one Hugging Face folder from the checkpoint of a stage that is not finished
    bitdistill report RUN                      writes report.html again and prints the table
    bitdistill env                             versions, for bug reports

Each command is a function in commands/. On several GPUs the main job is started by `deepspeed bitdistill/train.py`, or by
`deepspeed --module bitdistill.train` without a checkout, with the same options.
"""

import inspect
import sys

from bitdistill import __version__, console, surroundings
from bitdistill.argument_errors import did_you_mean, refuse_long_numbers, refused
from bitdistill.commands.chat import chat, chat_options
from bitdistill.commands.check import check
from bitdistill.commands.consolidate import consolidate
from bitdistill.commands.evaluate import evaluate
from bitdistill.commands.export import export
from bitdistill.commands.generate import generate, generate_options
from bitdistill.commands.info import info, info_options
from bitdistill.commands.plan import plan
from bitdistill.commands.predict import predict, predict_options
from bitdistill.commands.report import env, report
from bitdistill.commands.serve import serve, serve_options
from bitdistill.commands.train import train
from bitdistill.commands.trim import trim, trim_options
from bitdistill.errors import UserError

COMMANDS = {
    "train": train,
    "predict": predict,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "trim": trim,
    "info": info,
    "eval": evaluate,
    "export": export,
    "check": check,
    "plan": plan,
    "consolidate": consolidate,
    "report": report,
    "env": env,
}
# Commands that answer at once have a parser of their own, by argparse: jsonargparse, which reads the other commands' options
# from their signatures, takes a third of the time to a first token.
PARSERS = {
    "generate": generate_options,
    "predict": predict_options,
    "trim": trim_options,
    "chat": chat_options,
    "info": info_options,
    "serve": serve_options,
}


def _run_command(arguments: list[str]) -> int | None:
    arguments = arguments or ["--help"]
    name = arguments[0]
    if name == "--version":
        print(f"bitdistill {__version__}")
        return None
    if name not in (*COMMANDS, "-h", "--help"):
        do = did_you_mean(name, COMMANDS) + "See bitdistill --help."
        raise UserError("COMMAND", expected=f"one of {', '.join(COMMANDS)}", got=repr(name), do=do)
    if name in PARSERS:
        return _run_quick(name, arguments[1:])
    from jsonargparse import ArgumentError, auto_cli

    for argument in arguments:
        console.require_utf8("command line", argument)
        console.refuse_secrets("command line", argument)
    refuse_long_numbers(arguments)
    try:
        auto_cli(
            COMMANDS, prog="bitdistill", args=arguments, as_positional=True, exit_on_error=False, allow_abbrev=False
        )
    except ArgumentError as error:
        names = inspect.signature(COMMANDS[name]).parameters if name in COMMANDS else COMMANDS
        raise refused(" ".join(str(error).split()), names, f"bitdistill {name}") from error
    return None


def _run_quick(name: str, arguments: list[str]) -> int | None:
    options = PARSERS[name](arguments)
    for option, value in options.items():
        for text in value if isinstance(value, list) else [value]:
            console.require_utf8(option, text if isinstance(text, str) else None)
    if options.get("device", "cpu") == "cpu":
        # Numba would import it for linear algebra that nothing here uses: a fifth of the time to the first token.
        sys.modules.setdefault("scipy", None)
    return COMMANDS[name](**options)


def main() -> int:
    """Runs a command. Returns the exit status of `console.run`; 2 as well when an optional library is not installed."""
    if sys.argv[1:2] == ["train"]:  # reads its own options and chooses its own threads
        sys.argv[:2] = ["bitdistill train"]
        train()
    surroundings.prepare(trains=not sys.argv[1:] or sys.argv[1] not in PARSERS)
    surroundings.limit_threads()

    def body() -> int | None:
        try:
            return _run_command(sys.argv[1:])
        except ModuleNotFoundError as error:
            if (error.name or "bitdistill").startswith("bitdistill"):
                raise
            extras = {"lm_eval": "[eval]"} | dict.fromkeys(("numba", "numpy", "safetensors", "tokenizers"), "")
            do = f"Install it: pip install 'bitdistill{extras.get(error.name, '[train]')}'."
            raise UserError("COMMAND", expected=f"the library {error.name}", got="none installed", do=do) from error

    return console.run(body)


if __name__ == "__main__":
    sys.exit(main())
