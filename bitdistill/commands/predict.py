"""`bitdistill predict`: what a student says to one row of its task, or to each row of a file.

Answers are appended to the output line by line. `OUTPUT.unfinished` says beside it what they are answers to; while it is
there, the same command goes on after the last whole line, and a command about anything else is refused.
"""

import csv
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from bitdistill import console
from bitdistill.commands.options import Parser, add_lookup_option, add_runtime_options, require_at_least
from bitdistill.commands.row_files import readable, task_rows
from bitdistill.errors import UserError
from bitdistill.files import checksum, write_whole
from bitdistill.text_files import COMPRESSED, kind_of, user_path

ROWS_TOGETHER = 64  # read, answered and written together: a second or two of work
DELIMITERS = {".csv": ",", ".tsv": "\t"}


def predict(
    run_or_file: str,
    texts: list[str],
    input: str | None = None,
    output: str = "-",
    input_format: str | None = None,
    columns: list[str] | None = None,
    overwrite: bool = False,
    max_new_tokens: int | None = None,
    json: bool = False,
    **runtime_options: Any,
) -> None:
    """Prints the answer to one row, or writes the answers to the rows of a file.

    Args:
        run_or_file: a run directory, or a packed file.
        texts: the row, one text for each column of the prompt, in its order.
        input, output, input_format, columns, overwrite, max_new_tokens, json: see `predict_options`.
        runtime_options: threads, kv_cache, context and lookup, as `runtime.loading.load` takes them.

    Raises:
        UserError: the file does not know its task; neither a row nor a file is given; a row that cannot be read or used,
            named by its number; an output that belongs to something else.
    """
    for option, number in (("max_new_tokens", max_new_tokens), ("threads", runtime_options.get("threads"))):
        require_at_least(option, number, 1)
    if bool(texts) == (input is not None):
        got = "both" if texts else "neither"
        raise UserError("input", expected="the texts of a row, or --input FILE", got=got, do="Give one of them.")
    from bitdistill.runtime.loading import load
    from bitdistill.runtime.predict import needed_task

    runtime = load(run_or_file, **runtime_options)
    task = needed_task(runtime)
    if texts:
        _predict_one(runtime, task, texts, max_new_tokens, json)
    elif input is not None:
        with readable(input, input_format) as path:
            _predict_file(runtime, task, path, input, output, columns or [], overwrite, max_new_tokens)


def _predict_one(runtime, task, texts: list[str], max_new_tokens: int | None, as_json: bool) -> None:
    if len(texts) != len(task.columns):
        expected = f"{len(task.columns)} text{'s' * (len(task.columns) > 1)}: {', '.join(task.columns)}"
        raise UserError("text", expected=expected, got=str(len(texts)), do="Give one text for each, in this order.")
    [found] = runtime.predict(dict(zip(task.columns, texts, strict=True)), max_new_tokens)
    if as_json:
        print(json.dumps(found.to_json(), ensure_ascii=not console.takes_unicode(sys.stdout)))
    elif found.label is None:
        print(found.text)
    else:
        others = [f"{word} {share:.1%}" for word, share in found.probabilities.items() if word != found.label]
        print(f"{found.label}  {found.probability:.1%}   ({', '.join(others)})")
    if found.truncated and not as_json:
        print(f"[{task.truncate_column} was cut to fit the length of training]", file=sys.stderr)


# --- the rows of a file -------------------------------------------------------------------------------------------------


def _predict_file(
    runtime, task, path: Path, given: str, output: str, columns: list[str], overwrite: bool, max_new_tokens: int | None
) -> None:
    from tqdm import tqdm

    source, names = f"input {given}", _names(columns)
    total = sum(
        1 for _ in task_rows(path, source, task, list(names))
    )  # every row is checked before the first is answered
    if total == 0:
        raise UserError(source, expected="at least one row", got="none", do="Give a file with rows.")
    about = {"input_sha256": checksum(path), "model_sha256": checksum(runtime.model.path), "rows": total}
    about |= {"columns": columns, "max_new_tokens": max_new_tokens, "context": runtime.context}
    with _Output(output, _fields(task, names), about, overwrite) as lines:
        if lines.written:
            print(f"[{lines.written:,} of {total:,} rows are answered already; going on]", file=sys.stderr)
        rows = itertools.islice(task_rows(path, source, task, list(names)), lines.written, None)
        shown = sys.stderr.isatty()
        with tqdm(total=total, initial=lines.written, unit="row", desc=task.name, disable=not shown) as bar:
            cut = 0
            for found, kept in _answers(runtime, rows, max_new_tokens, bar):
                lines.write({"row": found.row} | {names[column]: kept[column] for column in kept} | _line(found))
                cut += found.truncated
        lines.finish()
    if cut:
        length = min(runtime.header.max_length or runtime.context, runtime.context)
        print(f"[{cut:,} rows were cut to {length} tokens, as in training]", file=sys.stderr)


def _answers(runtime, rows: Iterable, max_new_tokens: int | None, bar) -> Iterator[tuple[Any, dict]]:
    from bitdistill.runtime.predict import predict_texts

    def progress(order):
        for one in order:
            yield one
            bar.update()

    while chunk := list(itertools.islice(rows, ROWS_TOGETHER)):
        texts, places, kept, numbers = zip(*chunk, strict=True)
        options = {"first_row": numbers[0], "max_new_tokens": max_new_tokens, "progress": progress}
        yield from zip(predict_texts(runtime, texts, places, **options), kept, strict=True)


# --- the output ---------------------------------------------------------------------------------------------------------


def _names(columns: list[str]) -> dict[str, str]:
    """The names that copied columns have in the output, by those of the input: of "label=gold" the column label as gold."""
    pairs = (one.partition("=") for one in columns)
    return {column: name or column for column, _, name in pairs}


def _fields(task, names: dict[str, str]) -> list[str]:
    """The columns of a CSV output. Args: names: of `_names`."""
    answer = ["label", "probability"] if task.kind == "classification" else ["text", "stopped_by"]
    taken = {"row", *answer, "probabilities", "truncated"}
    for column, name in names.items():
        if name in taken:
            got, do = f"{name}, which the output has already", f"Give it another name: {column}=NAME."
            raise UserError("columns", expected="names of their own for copied columns", got=got, do=do)
        taken.add(name)
    return ["row", *names.values(), *answer, "truncated"]


def _line(found) -> dict[str, Any]:
    values = dataclasses.asdict(found)
    del values["row"]
    return {name: value for name, value in values.items() if value is not None}


class _Output:
    """The answers' file, or standard output.

    Args:
        given: the file, or "-". fields: of a CSV file.
        about: what the answers are to; two runs with equal values give equal lines.
        overwrite: begin anew whatever is there.

    Attributes:
        written: rows that an interrupted run has answered.
    """

    def __init__(self, given: str, fields: list[str], about: dict[str, Any], overwrite: bool):
        self.written = 0
        self._path = None if given == "-" else user_path(given, "output")
        self._delimiter = None if self._path is None else DELIMITERS.get(kind_of(self._path))
        self._fields = fields
        if self._path is None:
            self._file: IO[str] = sys.stdout
            return
        if kind_of(self._path) not in (*DELIMITERS, ".jsonl") or self._path.suffix in COMPRESSED:
            raise UserError("output", expected="a .jsonl, .csv or .tsv file", got=given, do="Give it such a name.")
        self._marker = self._path.with_name(f"{self._path.name}.unfinished")
        text = json.dumps(about | {"fields": fields}, indent=1)
        begin = 0
        if self._path.exists() and not overwrite:
            begin = self._resumed(self._path, text)
        write_whole(self._marker, text)
        self._file = self._path.open("r+" if begin else "w", encoding="utf-8", newline="")
        self._file.truncate(begin)
        self._file.seek(begin)
        if self._delimiter and not begin:
            self._row(fields)

    def _resumed(self, path: Path, about: str) -> int:
        """Bytes of the output that stand: its whole lines, if an interrupted run of the same kind has written it."""
        do = "Name another file, or give --overwrite."
        if not self._marker.exists():
            raise UserError("output", expected="a new file", got=f"{path}, which is there", do=do)
        if self._marker.read_text(encoding="utf-8") != about:
            got = f"{path}, unfinished, of another input, model or setting"
            raise UserError("output", expected="the answers to this input by this model", got=got, do=do)
        content = path.read_bytes()
        ends = list(_whole_lines(content, self._delimiter))
        if self._delimiter and not ends:
            return 0
        self.written = len(ends) - (1 if self._delimiter else 0)
        return ends[-1] if ends else 0

    def write(self, values: dict[str, Any]) -> None:
        """Appends a row's answer, and hands it to the system."""
        if self._delimiter:
            self._row([values.get(name, "") for name in self._fields])
        else:
            if values.get("truncated") is False:
                del values["truncated"]
            escaped = self._path is None and not console.takes_unicode(sys.stdout)
            self._file.write(json.dumps(values, ensure_ascii=escaped) + "\n")
        self._file.flush()

    def _row(self, cells: list[Any]) -> None:
        csv.writer(self._file, delimiter=self._delimiter or ",", lineterminator="\n").writerow(cells)

    def finish(self) -> None:
        """All rows are answered."""
        if self._path is not None:
            os.fsync(self._file.fileno())
            self._marker.unlink()

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, *exception) -> None:
        if self._path is not None:
            self._file.close()


def _whole_lines(content: bytes, delimiter: str | None) -> Iterator[int]:
    """Where each whole line of JSON, or row of CSV, ends."""
    end = 0
    if delimiter is None:
        for line in content.splitlines(keepends=True):
            end += len(line)
            if line.endswith(b"\n"):
                yield end
        return
    lines = content.split(b"\n")
    texts = (line.decode("utf-8", errors="replace") + "\n" for line in lines[:-1])
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    done = 0
    try:
        for _ in reader:
            end += sum(len(line) + 1 for line in lines[done : reader.line_num])
            done = reader.line_num
            yield end
    except csv.Error:  # the last row ends inside a quoted cell
        return


def predict_options(arguments: list[str]) -> dict[str, Any]:
    """The options of `predict`. Args: arguments: of the command line, after the command."""
    parser = Parser(
        prog="bitdistill predict",
        description="Says what a packed student answers to rows of its task: a label with its probability, or a text.",
    )
    parser.add_argument("run_or_file", help="a run directory, or a packed file")
    parser.add_argument("texts", nargs="*", metavar="text", help="one row: a text for each column of the prompt")
    parser.add_argument(
        "--input",
        help="rows: .csv, .tsv, .jsonl, .json, .parquet or .txt; - is standard input (JSON lines without --input_format)",
    )
    parser.add_argument("--output", default="-", help="a .jsonl, .csv or .tsv file (default: JSON lines on the screen)")
    parser.add_argument(
        "--input_format", help="what the input is, where its name does not say it (default of -: jsonl)"
    )
    parser.add_argument(
        "--columns",
        type=lambda text: text.split(","),
        help="columns of the input to copy into the output: id,sentence; label=gold copies label under the name gold",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument(
        "--max_new_tokens", type=int, help="tokens of a generated answer, at most (default: the task's own)"
    )
    parser.add_argument("--json", action="store_true", help="print the answer to one row as JSON")
    add_runtime_options(parser)
    add_lookup_option(parser)
    return vars(parser.parse_args(arguments))
