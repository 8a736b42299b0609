"""Rows of local files, with every value as it is written there.

Nothing is inferred and nothing is cached: a library that guesses types makes numbers and dates of texts (007, 1e5,
2024-05-01, null), and one that caches by name and time gives the rows of the file that was there before.

* .csv, .tsv: every cell is a text. The delimiter of a .csv is the one under which the header has the wanted columns.
* .jsonl, .ndjson, .json: an object per line, or an array of objects. Numbers are `Literal`, the text that stands there.
* .parquet: the values of the columns' own types.

All but Parquet may be compressed (see `text_files.py`).
"""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitdistill.errors import UserError
from bitdistill.text_files import download_gone_wrong, kind_of, read_lines

READERS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"
}  # fmt: skip
_DELIMITERS = ",;\t|"
_BATCH = 1000  # rows of a Parquet file that are in memory together


class Literal(str):
    """A number of a JSON or Parquet file, or a cell of a CSV file: the text that stands there, of no type as yet."""

    def __repr__(self) -> str:
        return str(self) or "an empty cell"


@dataclass
class Row:
    """One row: its values by column, and where it stands in the file."""

    values: dict[str, Any]
    number: int  # from 1, blank lines not counted
    line: int | None = None

    @property
    def place(self) -> str:
        return f"row {self.number}" + (f" (line {self.line})" if self.line not in (None, self.number) else "")


@dataclass
class RowFile:
    """The rows of a file as they are read.

    Args:
        path: an existing file of a kind in READERS, compressed or not.
        option: what the user gave it as, for messages.
        columns: those that are wanted; further ones of a CSV or Parquet file are not read.
        names: every column that was seen so far, in order; filled by reading.

    Raises:
        UserError: on iteration: the file cannot be read as what its name says; the row is named.
    """

    path: Path
    option: str
    columns: Sequence[str]
    names: dict[str, None] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Row]:
        kind = READERS[kind_of(self.path)]
        return {"json": self._json, "csv": self._csv, "parquet": self._parquet}[kind]()

    def _bad(self, got: str, do: str) -> UserError:
        kind = READERS[kind_of(self.path)]
        return UserError(f"{self.option} {self.path}", expected=f"rows that can be read as {kind}", got=got, do=do)

    def _refuse_twice(self, names: Sequence[str]) -> None:
        for name in self.columns:
            if (count := list(names).count(name)) > 1:
                raise self._bad(f"the column {name!r} {count} times", "Rename or drop one of them.")

    # --- JSON ---------------------------------------------------------------------------------------------------------

    def _json(self) -> Iterator[Row]:
        numbers = dict.fromkeys(("parse_int", "parse_float"), Literal) | {"parse_constant": _constant}
        decoder = json.JSONDecoder(**numbers, object_pairs_hook=_pairs, strict=False)  # a raw tab in a text is meant
        lines, number = enumerate(read_lines(self.path, self.option, newline="\n"), start=1), 0
        for line, text in lines:
            if not text.strip():
                continue
            if number == 0 and text.lstrip().startswith("["):
                yield from self._json_array(decoder, "".join([text, *(rest for _, rest in lines)]))
                return
            number += 1
            yield self._json_row(decoder, text, number, line)

    def _json_row(self, decoder: json.JSONDecoder, text: str, number: int, line: int) -> Row:
        try:
            return self._object(decoder.decode(text), Row({}, number, line))
        except (ValueError, RecursionError) as error:
            where = Row({}, number, line).place
            do = "Write one object per line, or one array of objects."
            raise self._bad(f"{_reason(error, text)} in {where}", do) from None

    def _json_array(self, decoder: json.JSONDecoder, text: str) -> Iterator[Row]:
        try:
            values = decoder.decode(text)
        except (ValueError, RecursionError) as error:
            line = f" in line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise self._bad(f"{_reason(error, text)}{line}", "Write the file as one array of objects.") from None
        for number, value in enumerate(values, start=1):
            yield self._object(value, Row({}, number))

    def _object(self, value: Any, row: Row) -> Row:
        if not isinstance(value, dict):
            raise self._bad(f"{_short(value)} in {row.place}", "Write an object with the columns as keys for each row.")
        if (twice := value.pop(_TWICE, None)) in self.columns:
            raise self._bad(f"the key {twice!r} twice in {row.place}", "Keep one of them.")
        self.names |= dict.fromkeys(value)
        row.values = value
        return row

    # --- CSV ----------------------------------------------------------------------------------------------------------

    def _csv(self) -> Iterator[Row]:
        csv.field_size_limit(2**31 - 1)  # a cell may be a whole book
        dialect, header, skipped = self._dialect()
        self.names |= dict.fromkeys(header)
        self._refuse_twice(header)
        places = [(name, header.index(name)) for name in self.columns if name in header]
        reader, number = csv.reader(read_lines(self.path, self.option, newline=""), **dialect), 0
        try:
            for cells in reader:
                if reader.line_num <= skipped or not cells:
                    continue
                number += 1
                row = Row({}, number, reader.line_num)
                if len(cells) != len(header):
                    got = f"{len(cells)} cells in {row.place} under a header of {len(header)} columns"
                    raise self._bad(got, "Quote cells that hold the delimiter or a line end.")
                row.values = {name: Literal(cells[place]) for name, place in places}
                yield row
        except csv.Error as error:
            got = f"{error} in row {number + 1} (line {reader.line_num})"
            raise self._bad(got, 'Close every quote, and write " inside a quoted cell twice.') from None

    def _dialect(self) -> tuple[dict[str, Any], list[str], int]:
        """How the file is written, its header, and the lines before the first row: by what gives the wanted columns."""
        quoted, bare = {"strict": True}, {"quoting": csv.QUOTE_NONE}
        lines = read_lines(self.path, self.option, newline="")
        first, skip = next(lines, ""), 0
        if first.lower().startswith("sep=") and len(first.strip()) == 5:  # Excel's own mark
            choices, skip = [quoted | {"delimiter": first[4]}], 1
        elif kind_of(self.path) == ".tsv":
            choices = [bare | {"delimiter": "\t"}, quoted | {"delimiter": "\t"}]
        else:
            choices = [quoted | {"delimiter": delimiter} for delimiter in _DELIMITERS]
        found = []
        for choice in choices:
            reader = csv.reader(read_lines(self.path, self.option, newline=""), **choice)
            try:
                header = next((cells for cells in reader if cells and reader.line_num > skip), [])
            except csv.Error:
                continue
            found.append((choice, header, reader.line_num))
            if set(self.columns) <= set(header):
                return found[-1]
        if not found:
            raise self._bad("a header with an open quote", 'Close every quote, and write " inside a quoted cell twice.')
        return max(found, key=lambda one: len(set(one[1]) & set(self.columns)))

    # --- Parquet ------------------------------------------------------------------------------------------------------

    def _parquet(self) -> Iterator[Row]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ModuleNotFoundError as error:
            do = "Install it (pip install pyarrow), or give a .jsonl or .csv file."
            got = "none installed"
            raise UserError(f"{self.option} {self.path}", expected="the library pyarrow", got=got, do=do) from error
        try:
            file = pyarrow.parquet.ParquetFile(self.path)
            names = file.schema_arrow.names
            self.names |= dict.fromkeys(names)
            self._refuse_twice(names)
            number = 0
            for batch in file.iter_batches(_BATCH, columns=[name for name in self.columns if name in names]):
                for values in typed_rows(batch, self.columns):
                    number += 1
                    yield Row(values, number)
        except (pyarrow.ArrowException, OSError) as error:
            got, do = download_gone_wrong(self.path) or (str(error).splitlines()[0], "Make the file again.")
            raise self._bad(got, do) from None


def typed_rows(batch, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of an Arrow batch as Python values; numbers, dates, times and categories as their texts."""
    import pyarrow
    import pyarrow.types as kinds

    wanted = {}
    for name in columns:
        if name not in batch.schema.names:
            continue
        column = batch.column(name)
        if kinds.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        number = kinds.is_integer(column.type) or kinds.is_floating(column.type) or kinds.is_decimal(column.type)
        if number or kinds.is_temporal(column.type) or kinds.is_binary(column.type):
            column = column.cast(pyarrow.string())
        values = column.to_pylist()
        wanted[name] = [None if v in (None, "nan") else Literal(v) for v in values] if number else values
    return [dict(zip(wanted, values, strict=True)) for values in zip(*wanted.values(), strict=True)] or [
        {} for _ in range(batch.num_rows)
    ]


def _constant(name: str) -> Any:
    """NaN is what pandas writes where nothing stands; the infinities are as they are written."""
    return math.nan if name == "NaN" else Literal(name)


_TWICE = object()  # the key under which `_pairs` says which name came twice


def _pairs(pairs: list[tuple[str, Any]]) -> dict:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        result[_TWICE] = next(name for name in names if names.count(name) > 1)
    return result


def _reason(error: Exception, text: str) -> str:
    if isinstance(error, RecursionError):
        return "an object nested too deep"
    got = (
        f"{error.msg.removesuffix(' at')} at column {error.colno}"
        if isinstance(error, json.JSONDecodeError)
        else str(error)
    )
    return f"{got}: {_short(text.strip())}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
