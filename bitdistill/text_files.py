"""Text files as people have them: compressed, with a byte order mark, in another encoding, under any name. Needs no torch.

A file is read correctly, or refused with the name of its encoding. UTF-8 is read with or without a byte order mark, UTF-16
and UTF-32 with one. Each may also be compressed with gzip, bzip2, xz or zstandard, which is recognized by the first bytes,
whatever the file's name says.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bitdistill.errors import UserError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # a second suffix: rows.jsonl.gz
_MARKS = {  # the longer ones first: UTF-32's begins with UTF-16's
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_POINTER = b"version https://git-lfs"
_OTHER_KINDS = {  # first bytes -> (what such a file is, what to do)
    b"PK\x03\x04": ("a zip archive or an office document", "Unpack or export it as text."),
    b"PAR1": ("a Parquet file", "Name it .parquet, or export it as text."),
    b"ARROW1": ("an Arrow file", "Export it as text, or as Parquet under a name in .parquet."),
    b"SQLite format 3": ("an SQLite database", "Export its table as text."),
    b"\xd0\xcf\x11\xe0": ("an office document in the old format", "Export it as text."),
    b"\x89HDF": ("an HDF5 file", "Export it as text."),
    b"\x04\x22\x4d\x18": ("a file compressed with LZ4", "Unpack it, or compress it with gzip or zstandard."),
    b"%PDF": ("a PDF", "Export it as text."),
    _POINTER: ("a Git LFS pointer in place of the file", "Fetch the file itself: git lfs pull."),
}
_WEB_PAGE = ("a web page in place of the file", "Download the file itself, not the page that shows it.")
_SAMPLE = 4096


def user_path(path: str | Path, field: str) -> Path:
    """A path as the user means it: ~ at its beginning is the home directory, also where no shell saw it.

    Raises:
        UserError: there is no such home directory.
    """
    if not str(path).startswith("~"):  # Path("./~") would have lost its "./"
        return Path(path)
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            field, expected="a path", got=f"{path} ({error})", do="Write the path without ~, or set HOME."
        ) from None


def kind_of(path: Path) -> str:
    """The suffix that tells what is in a file, in lower case: `rows.JSONL.gz` -> `.jsonl`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_lines(path: Path, field: str, newline: str | None = None) -> Iterator[str]:
    """The lines of a text file, decompressed and decoded, with their ends.

    Args:
        path: an existing file. field: what the user gave it as, for messages.
        newline: as of `open`: None turns every line end into a line feed, "" and "\\n" keep what is there.

    Raises:
        UserError: the file cannot be read, is damaged, no text, or text in another encoding.
    """
    try:
        with _open(path, field) as file:
            encoding = _encoding(file, path, field)
            text = io.TextIOWrapper(file, encoding, newline=newline)
            yield from text
    except UnicodeDecodeError as error:
        raise _wrong_encoding(path, field, error) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:  # gzip's BadGzipFile is an OSError
        raise UserError(
            f"{field} {path}",
            expected="a file that can be read",
            got=str(error),
            do="Create it again, or copy it again.",
        ) from error


def read_text(path: Path, field: str) -> str:
    """The whole of a text file, line ends as line feeds. Raises: as `read_lines`."""
    return "".join(read_lines(path, field))


def decode(data: bytes, field: str, name: str) -> str:
    """The same for bytes from elsewhere, such as standard input; `name` is what the user gave for `field`."""
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        return io.TextIOWrapper(io.BytesIO(data), encoding).read()
    except UnicodeDecodeError as error:
        do, line = "Convert it to UTF-8, for example with iconv.", data[: error.start].count(b"\n") + 1
        raise UserError(field, expected="text in UTF-8", got=f"{name} ({error}, line {line})", do=do) from None


def _open(path: Path, field: str) -> BinaryIO:
    """The file's bytes, decompressed, with `peek`."""
    start = _first_bytes(path)
    if start.startswith(b"\x1f\x8b"):
        return gzip.open(path)
    if start.startswith(b"BZh"):
        return io.BufferedReader(bz2.open(path))
    if start.startswith(b"\xfd7zXZ\x00"):
        return io.BufferedReader(lzma.open(path))
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        try:
            import pyarrow
        except ModuleNotFoundError as error:
            do = "Install it (pip install pyarrow), or unpack the file."
            raise UserError(f"{field} {path}", expected="the library pyarrow", got="none installed", do=do) from error
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    for mark, (kind, do) in _OTHER_KINDS.items():
        if start.startswith(mark):
            raise UserError(f"{field} {path}", expected="a text file", got=kind, do=do)
    return path.open("rb")


def download_gone_wrong(path: Path) -> tuple[str, str] | None:
    """(what lies in place of a file that cannot be read, what to do): a Git LFS pointer, a web page; else None."""
    start = _first_bytes(path)
    if start.startswith(_POINTER):
        return _OTHER_KINDS[_POINTER]
    return _WEB_PAGE if start.lstrip().lower().startswith((b"<!doctype html", b"<html")) else None


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(32)


def _encoding(file: BinaryIO, path: Path, field: str) -> str:
    sample = file.peek(_SAMPLE)[:_SAMPLE]
    for mark, name in _MARKS.items():
        if sample.startswith(mark):
            return name
    pairs = len(sample) // 2
    zeros = [sample[first : 2 * pairs : 2].count(0) for first in (0, 1)]
    if pairs and max(zeros) > 0.4 * pairs and min(zeros) < 0.1 * pairs:
        name = "UTF-16BE" if zeros[0] > zeros[1] else "UTF-16LE"
        raise UserError(
            f"{field} {path}",
            expected="text in UTF-8",
            got=f"{name} without a byte order mark",
            do=f"Convert it: iconv -f {name} -t UTF-8 FILE > NEW.",
        )
    return "utf-8"


def _wrong_encoding(path: Path, field: str, error: UnicodeDecodeError) -> UserError:
    """What and where: the decoder itself knows the place in its buffer only."""
    if error.encoding != "utf-8":
        return UserError(
            f"{field} {path}", expected=f"text in {error.encoding.upper()}, as its first bytes say", got=str(error),
            do="Make the file again, or convert it to UTF-8.",
        )  # fmt: skip
    got = str(error)
    with _open(path, field) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as first:
                near = line[max(first.start - 12, 0) : first.end + 12].decode("cp1252", errors="replace").strip()
                got = f"the byte {line[first.start]:#04x} in line {number} (in Windows-1252 it would read {near!r})"
                break
    return UserError(
        f"{field} {path}",
        expected="text in UTF-8",
        got=got,
        do="Convert it from the encoding it was written in, for example: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW.",
    )
