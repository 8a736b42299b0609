"""Only one run at a time may use a run folder.

The lock is one of the operating system, on RUN/.lock. It belongs to the process and ends with it in every case, so no stale
lock can remain. The file itself only says who holds the lock.
"""

import errno
import json
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from bitdistill.errors import UserError

NAME = ".lock"
BUSY = (errno.EACCES, errno.EAGAIN)


def lock_folder(folder: Path) -> TextIO | None:
    """Takes a run folder for this process until it ends; the folder is made when it is absent.

    Returns: the open lock file, to be kept open; None on a system without such locks.

    Raises:
        UserError: another process has it (its number is said), or nothing can be written there.
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / NAME, "a+", encoding="utf-8")  # noqa: SIM115 -- open as long as the run lasts
    except OSError as error:
        do = "Choose another --output_dir, or make this one writable."
        raise UserError("output_dir", expected="a folder that can be written to", got=str(error), do=do) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in BUSY:
            file.close()
            return None
        file.seek(0)
        holder = _holder(file.read())
        file.close()
        raise UserError(
            "output_dir",
            expected="a run folder that no other run is using",
            got=f"{folder}, in use by {holder}",
            do="Wait until that run has ended or stop it, or give this run its own --output_dir.",
        ) from error
    file.truncate(0)
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}, file)
    file.flush()
    return file


def _holder(text: str) -> str:
    try:
        known = json.loads(text)
        return f"process {known['pid']} on {known['host']} since {known['since']}"
    except (ValueError, KeyError, TypeError):  # it has only just begun
        return "a process that has not said its number yet"
