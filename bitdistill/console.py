"""How an entry uses the terminal: it prints text that every encoding can show, reports a user's mistake in one line, and
ends quietly when a pipe is closed."""

import errno
import os
import re
import select
import signal
import sys
from collections.abc import Callable

from bitdistill.errors import UserError

USER_ERROR, INTERRUPTED, PIPE_CLOSED = 2, 130, 141  # exit statuses; 128 + the number of the signal, as shells have it
LONGEST_MESSAGE = 4000  # characters
# Tokens of the hub, and passwords in addresses.
SECRET = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^/\s@'\"]+(?=@)")
# What the system says about files, disks and rights. A file that is not there is not among them: whoever opens one says more.
SYSTEM = {
    errno.ENOSPC: "Free some space, or name a folder on another disk.",
    errno.EDQUOT: "Free some space, or name a folder on another disk.",
    errno.EFBIG: "Raise the limit of file sizes (ulimit -f).",
    errno.EACCES: "Change the rights of the file or folder, or name another one.",
    errno.EPERM: "Change the rights of the file or folder, or name another one.",
    errno.EROFS: "Name a folder that can be written to.",
    errno.ENAMETOOLONG: "Give a shorter name.",
    errno.EISDIR: "Name a file.",
    errno.ENOTDIR: "Name a folder.",
    errno.ELOOP: "Remove the symbolic link that points to itself.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
}


def end_at_once() -> None:
    """Before `run` begins and after it, Ctrl-C and SIGTERM end the process without a word: libraries are loaded or closed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _end_at_once)


def _end_at_once(number: int, _frame: object) -> None:
    os._exit(128 + number)


def run(body: Callable[[], int | None]) -> int:
    """Runs an entry and turns what a user can cause into an exit status and at most one line on stderr.

    Args:
        body: the entry. What it returns is the exit status; None is 0.

    Returns: the body's status; 2 after a UserError or when the system refuses (a full disk, missing rights, no memory);
        130 after Ctrl-C; 141 when whoever read the output has gone (`| head`).
    """
    open_streams()
    at_once = signal.getsignal(signal.SIGINT) is _end_at_once
    if at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        status = body() or 0
        sys.stdout.flush()
    except UserError as error:
        return complain(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        if not any(_reader_is_gone(stream) for stream in (sys.stdout, sys.stderr)):
            raise  # another pipe or connection than the terminal's
        return _leave_quietly()
    except OSError as error:
        if error.errno not in SYSTEM:
            raise
        return complain(system_error(error))
    except MemoryError as error:
        do = "Lower the batch size or the context, or use a machine with more memory."
        return complain(UserError("memory", expected="enough for this command", got=str(error) or "too little", do=do))
    finally:
        if at_once:
            end_at_once()
    return status


def system_error(error: OSError) -> UserError:
    """What the system said, as a UserError about the file that it was said of."""
    name = error.filename2 or error.filename  # of two names that of the file that was to be
    name = os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else "disk"
    return UserError(name, expected="a system that allows it", got=str(error.strerror), do=SYSTEM[error.errno])


def complain(error: UserError) -> int:
    """Prints a user's mistake as one line on stderr. Returns the exit status 2."""
    try:
        print(f"bitdistill: {one_line(str(error))}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        _leave_quietly()
    return USER_ERROR


def one_line(text: str) -> str:
    """`text` without line ends, control characters and secrets, cut in the middle where it is absurdly long."""
    text = SECRET.sub("***", " ".join(text.split()))
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    if len(text) > LONGEST_MESSAGE:
        text = f"{text[: LONGEST_MESSAGE // 2]} ... {text[-LONGEST_MESSAGE // 2 :]}"
    return text


def open_streams() -> None:
    """Makes stdout and stderr take every character, escaped where their encoding has no place for it, and opens closed ones.

    A closed stream (`>&-`) is replaced by the null device: else the next file that is opened gets its number, and what a
    library prints ends up in that file.
    """
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 -- for the life of the process
        elif name != "stdin" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def takes_unicode(stream) -> bool:
    """Whether every character can be written to a text stream without being escaped."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")


def require_utf8(field: str, value: str | None) -> None:
    """Checks a text from the command line, where Python keeps bytes that are not UTF-8 as lone surrogates.

    Raises:
        UserError: it has such bytes.
    """
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        shown = os.fsencode(value).decode("utf-8", errors="backslashreplace")
        do = "Convert it, or set the terminal to UTF-8."
        raise UserError(field, expected="text in UTF-8", got=shown, do=do) from None


def refuse_secrets(field: str, value: str) -> None:
    """Checks a setting, which is written into config.yaml and the report.

    Raises:
        UserError: it holds a token of the hub, or a password in an address; it is not repeated.
    """
    if SECRET.search(value):
        do = "Take it out; a token of the hub is read from the variable HF_TOKEN, or from `hf auth login`."
        got = f"one in {SECRET.sub('***', value)}"
        raise UserError(field, expected="no token or password in a setting", got=got, do=do)


def _reader_is_gone(stream) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll on this system, or no file behind the stream
        return True


def _leave_quietly() -> int:
    """Python writes what is left once more when it ends: to the null device now, so that this is not an error, too."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if _reader_is_gone(stream):
            os.dup2(null, stream.fileno())
    return PIPE_CLOSED
