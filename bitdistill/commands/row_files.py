"""The rows of a task in a file, or from standard input: what `predict` and `trim` read."""

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from bitdistill.errors import UserError
from bitdistill.text_files import COMPRESSED, kind_of, read_lines, user_path

JSON_KINDS = (".jsonl", ".ndjson", ".json")  # each row has names of its own


class readable:
    """The path of the input; what comes from a pipe is kept in a temporary file, because a CSV file is read more than once.

    Args:
        given: a file, or "-". form: what it is, where its name does not say it.
    """

    def __init__(self, given: str, form: str | None):
        self._given, self._form, self._folder = given, form, None

    def __enter__(self) -> Path:
        from bitdistill.data.rows import READERS

        kinds = {kind.lstrip(".") for kind in (*READERS, ".txt")}
        if self._form is not None and self._form not in kinds:
            do = "Choose one of them."
            raise UserError("input_format", expected=f"one of {', '.join(sorted(kinds))}", got=self._form, do=do)
        pipe = user_path(self._given, "input").is_fifo()  # as `--input <(command)` gives
        if self._given == "-" or pipe or self._form is not None:
            self._folder = tempfile.mkdtemp(prefix="bitdistill-")
            path = Path(self._folder, f"rows.{self._form or 'jsonl'}")
            if self._given == "-" or pipe:
                given = user_path(self._given, "input").open("rb") if pipe else contextlib.nullcontext(sys.stdin.buffer)
                with given as source, path.open("wb") as file:
                    shutil.copyfileobj(source, file)
            else:
                path.symlink_to(_existing(self._given).resolve())
            return path
        path = _existing(self._given)
        if kind_of(path) not in (*READERS, ".txt"):
            expected = f"{' '.join(READERS)} .txt, compressed ({' '.join(COMPRESSED)}) or not"
            raise UserError("input", expected=expected, got=path.name, do="Convert the file, or give --input_format.")
        return path

    def __exit__(self, *exception) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder)


def _existing(given: str) -> Path:
    path = user_path(given, "input")
    if not path.is_file():
        raise UserError("input", expected="a file", got=str(path), do="Check the path.")
    return path


def task_rows(path: Path, source: str, task, columns: list[str]) -> Iterator[tuple[dict, str, dict, int]]:
    """(texts of the prompt's columns, where it stands, columns to copy, number) of each row, checked.

    Args:
        path: of `readable`. source: names the file in messages. task: whose columns are read. columns: further ones to copy.

    Raises:
        UserError: a row that cannot be read or used, named by its number.
    """
    from bitdistill.data.rows import Row, RowFile
    from bitdistill.runtime.predict import row_texts

    wanted = list(dict.fromkeys([*task.columns, *columns]))
    if kind_of(path) == ".txt":
        if len(wanted) > 1:
            got = f"text lines for {', '.join(wanted)}"
            raise UserError(source, expected="a file with columns", got=got, do="Give a .jsonl or .csv file.")
        lines = (line.rstrip("\r\n") for line in read_lines(path, "input", newline="\n"))
        rows = (Row({wanted[0]: line}, number, number) for number, line in enumerate(lines, start=1))
    else:
        rows = RowFile(path, "input", wanted)
    for row in _named(rows, path, source):
        where = f"{row.place} of {source.removeprefix('input ')}"
        if missing := [column for column in wanted if column not in row.values]:
            # Of a CSV or Parquet file a row has only what is wanted; the message names what there is.
            there = rows.names if isinstance(rows, RowFile) and kind_of(path) not in JSON_KINDS else row.values
            field, do = ("columns", "Name columns that the input has.")
            if missing[0] in task.columns:
                field, do = f"{source}: columns", f"Rename or add {missing[0]}."
            got = f"{', '.join(there) or 'none'} in {row.place}"
            raise UserError(field, expected=missing[0], got=got, do=do)
        yield row_texts(task, row.values, row.place, source), where, {c: row.values[c] for c in columns}, row.number


def _named(rows: Iterable, path: Path, source: str) -> Iterator:
    """The rows; errors name what the user gave, not the file that standard input was kept in."""
    try:
        yield from rows
    except UserError as error:
        field = error.field.replace(f"input {path}", source)
        raise UserError(field, expected=error.expected, got=error.got, do=error.do) from error
