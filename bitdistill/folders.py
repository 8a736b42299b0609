"""Folders that may be missing or read-only: the user's home and its caches. Also a private folder among the temporary
files."""

import glob
import os
import stat
import tempfile
from pathlib import Path


def home() -> Path | None:
    """The user's home, or None where HOME is not set and the user has no passwd entry (docker --user, cron)."""
    try:
        return Path.home()
    except (RuntimeError, KeyError):
        return None


def local_path(name: str | None) -> str | None:
    """A path in full, ~ included, when files are there or it begins with ~; a name of something else (a hub id) as it is."""
    if not name:
        return name
    path = os.path.expanduser(name)
    there = os.path.exists(path) or (glob.has_magic(path) and bool(glob.glob(path, recursive=True)))
    return str(Path(path).absolute()) if there or name.startswith("~") else name


def why_not_writable(folder: Path) -> str | None:
    """None when a file can be made in `folder`, which is made with its parents first; else the system's reason.

    A file is really made: access rights alone say nothing about file systems that are mounted read-only, quotas or root.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def private_folder() -> Path:
    """A folder of this user's own among the temporary files, the same for all processes; nobody else can write to it."""
    user = getattr(os, "getuid", int)()
    folder = Path(tempfile.gettempdir()) / f"bitdistill-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        # What lies here may be executed (compiled kernels), so a folder that another user has made is not taken.
        own = not hasattr(os, "getuid") or (found.st_uid == user and not found.st_mode & 0o022)
        private = stat.S_ISDIR(found.st_mode) and own and os.access(folder, os.W_OK)
    except OSError:
        private = False
    return folder if private else Path(tempfile.mkdtemp(prefix="bitdistill-"))
