"""What the commands share: a parser whose errors are UserErrors, and two checks of options before any work is done."""

import argparse
from typing import Any

from bitdistill.argument_errors import refused
from bitdistill.errors import UserError
from bitdistill.text_files import user_path


class Parser(argparse.ArgumentParser):
    """argparse's, with a mistake as a UserError."""

    def __init__(self, **settings):
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message):
        raise refused(message, [action.dest for action in self._actions], self.prog)


def add_runtime_options(parser: Parser, context: str = "the model's own limit") -> None:
    """Adds the options of every command that opens a packed file on the CPU. Args: context: its default, in words."""
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--kv_cache", default="bf16", help="how keys and values are kept: bf16 (default), fp32 or int8")
    parser.add_argument("--context", type=int, help=f"positions of the context, at most (default: {context})")


def add_lookup_option(parser: Parser) -> None:
    """Adds the option of commands whose answers may quote their prompts."""
    text = "compute up to so many tokens at once that followed the same words before; answers are the same (default: 0, none)"
    parser.add_argument("--lookup", type=int, default=0, help=text)


def take_runtime_options(options: dict[str, Any]) -> dict[str, Any]:
    """Takes out of a command's options those of the two functions above, which are a runtime's own arguments."""
    return {name: options.pop(name) for name in ("threads", "kv_cache", "context", "lookup") if name in options}


def require_at_least(option: str, number: int | None, least: int) -> None:
    """Raises UserError for an option below its smallest value; None is an option that was not given."""
    if number is not None and number < least:
        raise UserError(option, expected=f"{least} or more", got=str(number), do=f"Give --{option} {least} or more.")


def require_writable(option: str, file: str) -> None:
    """Checks before any work that a result can be written to `file`; one that is there stays as it is until then.

    Raises:
        UserError: it is a folder, its folder is missing, or the system refuses.
    """
    path = user_path(file, option)
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
