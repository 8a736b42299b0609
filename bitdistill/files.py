"""Writing files such that each is either complete or as it was before; appending to files; messages when the disk is full.

A file is written under a temporary name beside its own, flushed to the disk (fsync), and renamed. Whoever reads it, even
after a crash or a power cut, therefore finds the old content or the new one, never a part. Temporary names begin with a dot
and end in ".tmp". `remove_leftovers` removes those that a killed process has left.

Safetensors and the tempfile module create files that only their owner may read. `apply_umask` gives them the mode that `open`
would have given them, so that a student can be served under another account.
"""

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from bitdistill.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOCKED = (errno.EROFS, errno.EACCES, errno.EPERM)
# What libraries that keep no errno say instead: PyTorch of a file that could not be written to its end, Rust of any.
FULL_WORDS = (
    "No space left on device",
    "File too large",
    "Disk quota exceeded",
    "PytorchStreamWriter failed writing",
    "inline_container.cc",
    "iostream error",
)
LOCKED_WORDS = ("Read-only file system", "Permission denied")

# The umask can only be read by setting it, for all threads: once, before there are any.
_UMASK = os.umask(0o077)
os.umask(_UMASK)


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes the name `path` when the block ends well; removed after an error."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        apply_umask(temporary)
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Writes a file, whole or not at all; text in UTF-8."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def is_made(made: Path, marker: Path, of: str) -> bool:
    """Whether a file or folder exists, and its marker says that it was made of this."""
    return made.exists() and marker.is_file() and marker.read_bytes() == of.encode()


def make_once(made: Path, marker: Path, of: str, make: Callable[[], object]) -> None:
    """Calls `make`, which makes a file or folder, unless `is_made`.

    The marker goes before and comes after, so that what a killed process left half made is made again.

    Args:
        made: what `make` makes. marker: a file beside it. of: text that says of what: settings, identities, a version.
        make: of one process; the others wait for it.
    """
    if not is_made(made, marker, of):
        marker.unlink(missing_ok=True)
        make()
        write_whole(marker, of)


def append_line(path: str | Path, text: str) -> None:
    """Adds a line to a text file, whole or not at all, and flushes it to the disk.

    A part of a line at the end of the file, which a killed process left, is removed first. When the disk is full, what was
    written of the new line is taken away again.
    """
    with open(path, "ab+", buffering=0) as file:  # a buffer would be written once more when the file is closed
        end, rest = _end_of_last_line(file), f"{text}\n".encode()
        file.truncate(end)
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def _end_of_last_line(file) -> int:
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - 4096)
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def flush(path: Path) -> None:
    """fsync of a file or of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def apply_umask(*paths: Path) -> None:
    """Gives files of ours at least the rights that the umask leaves to new ones."""
    for path in paths:
        path.chmod(path.stat().st_mode | (0o666 & ~_UMASK))


def flush_tree(folder: Path) -> None:
    """fsync of every file and folder below `folder`, and of itself; the files get the rights that the umask leaves."""
    for root, _, files in os.walk(folder):
        for name in files:
            apply_umask(Path(root, name))
            flush(Path(root, name))
        flush(Path(root))


def checksum(path: Path) -> str:
    """SHA-256 of a file, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files that killed processes left in a folder; for whoever alone writes to it."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors_said(folder: Path) -> Iterator[None]:
    """Inside, a disk that is full or may not be written to is a UserError about the setting output_dir.

    Args:
        folder: where the block writes, for the message.
    """
    try:
        yield
    except (OSError, RuntimeError, *_library_errors()) as error:
        expected = _what_is_missing(error, folder)
        if expected is None:
            raise
        raise UserError(
            "output_dir",
            expected=f"{expected} in {folder}",
            got=" ".join(str(error).split())[:300],
            do="Resolve that, then give the same command again: it continues from the last complete checkpoint. "
            "What was there before is unchanged.",
        ) from error


def _library_errors() -> tuple[type[Exception], ...]:
    from safetensors import SafetensorError

    return (SafetensorError,)


def _what_is_missing(error: BaseException | None, folder: Path) -> str | None:
    """What to say of an error, or of those that it came from; None when none of them is the disk's that has `folder`."""
    while error is not None:
        name = getattr(error, "filename", None)
        if isinstance(name, str) and not Path(name).resolve().is_relative_to(folder.resolve()):
            return None
        code, text = getattr(error, "errno", None), str(error)
        if code in FULL or any(word in text for word in FULL_WORDS):
            return "room for what is written"
        if code in LOCKED or any(word in text for word in LOCKED_WORDS):
            return "the right to write"
        error = error.__cause__ or error.__context__
    return None
