"""Local files of rows: what stands there is what the task gets, or one line says which row of which file is wrong."""

import bz2
import gzip
import json
import lzma
import os

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitdistill.data.tasks import MAX_PROBLEMS, Task, load_rows, load_task
from bitdistill.errors import UserError
from bitdistill.problems import Problems, Report

REVIEW = {
    "name": "review", "kind": "classification", "prompt": "{text}\nIt was", "truncate_column": "text",
    "label_column": "label", "labels": {0: "bad", 1: "good"},
}  # fmt: skip
TASK = Task(**REVIEW)
SUMMARY = Task("sum", "generation", "{text}\nSummary:", "text", target_column="summary")
WRITTEN = [
    *("007", "1.10", "1e5", "0123456789", "2024-05-01", "2024-05-01T10:00:00Z", "true", "False", "null", "n/a", "NaN"),
    *("None", "-0", "+1", "1_000", "1,5", "-", "12:30", "", " spaced ", 'a "quote"', "inf", "0x10", "\u2028", "a\tb"),
]


def save(path, content: str | bytes):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def texts(path, task=TASK) -> list[str]:
    return load_rows(task, file=path)["text"][:]


def quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"'


# --- texts stay as they are written -----------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_cells_are_texts(tmp_path, delimiter):
    lines = [f"text{delimiter}label"] + [f"{quoted(text)}{delimiter}{i % 2}" for i, text in enumerate(WRITTEN)]
    rows = load_rows(TASK, file=save(tmp_path / "a.csv", "\n".join(lines)))
    assert rows["text"][:] == WRITTEN
    assert rows["label"][:] == [i % 2 for i in range(len(WRITTEN))]


def test_bare_csv_cells_are_texts_too(tmp_path):
    path = save(tmp_path / "a.csv", "text,label\n007,0\n1.10,1\n1e5,0\n2024-05-01,1\ntrue,0\nnull,1\n,0\n")
    assert texts(path) == ["007", "1.10", "1e5", "2024-05-01", "true", "null", ""]


def test_tsv_has_tabs_and_no_quotes_unless_its_header_is_quoted(tmp_path):
    assert texts(save(tmp_path / "a.tsv", 'text\tlabel\n"007\t0\nhe said "no"\t1\n')) == ['"007', 'he said "no"']
    assert texts(save(tmp_path / "b.tsv", '"text"\t"label"\n"a\tb"\t"0"\n')) == ["a\tb"]


@pytest.mark.parametrize("shape", ["lines", "array", "pretty"])
def test_json_numbers_and_dates_are_as_written(tmp_path, shape):
    values = ['"007"', "1.10", "1e5", '"2024-05-01"', "true", "-0", "12345678901234567890123", '"null"', '"\\u0000"']
    objects = [f'{{"text": {value}, "label": {i % 2}}}' for i, value in enumerate(values)]
    content = {
        "lines": "\n\n".join(objects),
        "array": f"[{','.join(objects)}]",
        "pretty": "[\n" + ",\n".join(objects) + "\n]",
    }
    assert texts(save(tmp_path / "a.json", content[shape])) == [
        "007", "1.10", "1e5", "2024-05-01", "true", "-0", "12345678901234567890123", "null", "\0"
    ]  # fmt: skip


def test_parquet_columns_of_other_types_are_texts(tmp_path):
    import datetime
    import decimal

    day = datetime.date(2024, 5, 1)
    columns = {
        "day": pyarrow.array([day, day]), "share": pyarrow.array([1.1, 2.5], pyarrow.float32()),
        "price": pyarrow.array([decimal.Decimal("1.10"), decimal.Decimal("2.00")]), "number": pyarrow.array([7, 10**12]),
        "kind": pyarrow.array(["a", "b"]).dictionary_encode(), "data": pyarrow.array([b"x", b"y"]),
        "label": pyarrow.array([1.0, 0.0]), "other": pyarrow.array([{"a": 1}, None]),
    }  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    task = Task(**REVIEW | {"prompt": "{day} {share} {price} {number} {kind} {data}", "truncate_column": "kind"})
    rows = load_rows(task, file=str(tmp_path / "a.parquet"))
    assert rows[0] == {
        "day": "2024-05-01", "share": "1.1", "price": "1.10", "number": "7", "kind": "a", "data": "x", "label": 1
    }  # fmt: skip
    assert rows["label"][:] == [1, 0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(max_size=20), min_size=1, max_size=5), st.sampled_from(["jsonl", "json", "csv", "csv;", "parquet"])
)
def test_any_text_comes_back(tmp_path_factory, values, kind):
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"text": value, "label": 0} for value in values]
    path = folder / f"a.{kind.strip(';')}"
    if kind == "jsonl":
        save(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    elif kind == "json":
        save(path, json.dumps(rows))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        mark = ";" if kind == "csv;" else ","
        save(path, "\r\n".join([f"text{mark}label", *(f"{quoted(value)}{mark}0" for value in values)]) + "\r\n")
    assert texts(str(path)) == values


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "written", "read"),
    [
        ({0: "bad", 1: "good"}, ["0", " 1", "1.0"], [0, 1, 1]),
        ({"007": "bad", "7": "good"}, ["007", "7"], ["007", "7"]),
        ({"true": "good", "false": "bad"}, ["true", "false"], ["true", "false"]),
        ({"yes": "good", "no": "bad"}, ["no", "yes"], ["no", "yes"]),
        ({"null": "good", "NA": "bad"}, ["NA", "null"], ["NA", "null"]),
        ({1: "good", "none": "bad"}, ["1", "none"], ["1", "none"]),
    ],
)
def test_labels_of_a_csv(tmp_path, labels, written, read):
    path = save(tmp_path / "a.csv", "text,label\n" + "".join(f"x,{label}\n" for label in written))
    assert load_rows(Task(**REVIEW | {"labels": labels}), file=path)["label"][:] == read


@pytest.mark.parametrize("label", ["2", "01", "1.5", "True", "", "one", "1 1"])
def test_labels_that_a_csv_may_not_have(tmp_path, label):
    path = save(tmp_path / "a.csv", f"text,label\nx,0\nx,{label}\n")
    with pytest.raises(UserError, match=r"a\.csv: label: expected one of \[0, 1\]; got .* in row 2 \(line 3\)"):
        load_rows(TASK, file=path)


def test_json_labels(tmp_path):
    rows = '{"text": "a", "label": 1}\n{"text": "b", "label": 0.0}\n{"text": "c", "label": true}\n'
    assert load_rows(TASK, file=save(tmp_path / "a.jsonl", rows))["label"][:] == [1, 0, 1]
    for wrong in ('"1"', "null", "[1]", "{}", "1.5", "NaN"):
        with pytest.raises(UserError, match=r"label: expected one of .* in row 1"):
            load_rows(TASK, file=save(tmp_path / "b.jsonl", f'{{"text": "a", "label": {wrong}}}'))


def test_values_that_differ_only_in_type_are_refused():
    with pytest.raises(UserError, match="differ as texts"):
        Task(**REVIEW | {"labels": {1: "good", "1": "bad"}})


# --- encodings, compression, names ------------------------------------------------------------------------------------

ROWS = "text,label\r\ncafé,0\r\n日本,1\r\n"
UTF_16 = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", *UTF_16])
def test_encodings_that_are_told_by_their_first_bytes(tmp_path, encoding):
    mark = "\ufeff" if encoding in UTF_16 else ""
    assert texts(save(tmp_path / "a.csv", (mark + ROWS).encode(encoding))) == ["café", "日本"]
    lines = mark + '{"text": "café", "label": 1}\r\n'
    assert texts(save(tmp_path / "a.jsonl", lines.encode(encoding))) == ["café"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "text,label\nfine,0\ncafé noir,1\n".encode("latin-1"),
            r"byte 0xe9 in line 3 .*'café noir,1'.*iconv -f WINDOWS-1252",
        ),
        ("text,label\nfine and long,0\n".encode("utf-16-le"), r"got UTF-16LE without .*iconv -f UTF-16LE"),
        ("text,label\nfine and long,0\n".encode("utf-16-be"), r"got UTF-16BE without"),
        (b"\xff\xfet\x00e", "UTF-16-LE, as its first bytes say"),
        (b"PK\x03\x04anything", "a zip archive or an office document"),
        (b"PAR1 and more", "a Parquet file"),
        (b"\x1f\x8b\x08broken", "a file that can be read"),
        (gzip.compress(ROWS.encode(), mtime=0)[:30], "a file that can be read"),
        (lzma.compress(ROWS.encode())[:50], "a file that can be read"),
    ],
)
def test_other_encodings_are_named(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as error:
        load_rows(TASK, file=save(tmp_path / "a.csv", content))
    assert "--train_file" in str(error.value)
    assert "a.csv" in str(error.value)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst", ""])
def test_compressed_files(tmp_path, suffix):
    packers = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, "": gzip.compress}
    for name, content in (("a.csv", ROWS), ("a.jsonl", '{"text": "café", "label": 1}\n')):
        path = tmp_path / (name + suffix)
        if suffix == ".zst":
            with pyarrow.output_stream(str(path), compression="zstd") as file:
                file.write(content.encode())
        else:
            path.write_bytes(packers[suffix](content.encode()))
        assert texts(str(path))[0] == "café"


@pytest.mark.parametrize(
    "name", ["[v2] data", "a*b?", "with space", "ünïcödé", "#1 100%", "~not home", "{x}", "-x", "a:b"]
)
def test_any_path_is_a_path(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    save(tmp_path / name / "rows.csv", ROWS)
    assert texts(str(tmp_path / name / "rows.csv")) == ["café", "日本"]
    monkeypatch.chdir(tmp_path)
    assert texts(f"./{name}/rows.csv") == ["café", "日本"]


def test_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "rows.csv", ROWS)
    (tmp_path / "task.yaml").write_text('﻿name: t\nkind: classification\nprompt: "{text}"\ntruncate_column: text\n'
                                        "label_column: label\nlabels: {0: bad, 1: good}\n", encoding="utf-8")  # fmt: skip
    assert len(load_rows(load_task("~/task.yaml"), file="~/rows.csv")) == 2
    with pytest.raises(UserError, match="--train_file: expected a path"):
        load_rows(TASK, file="~no_such_user_here/rows.csv")


@pytest.mark.parametrize("name", ["ROWS.CSV", "rows.Csv", "rows.v2.csv"])
def test_names_in_capitals(tmp_path, name):
    assert len(texts(save(tmp_path / name, ROWS))) == 2


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    path = tmp_path / "a.jsonl"
    for text in ("old", "new"):  # of one size and one time
        save(path, json.dumps({"text": text, "label": 1}))
        os.utime(path, (1_700_000_000, 1_700_000_000))
        assert texts(str(path)) == [text]


# --- what is wrong, and where -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\na,0\nb\n", r"1 cells in row 2 \(line 3\) under a header of 2 columns"),
        ("a.csv", "text,label\na,0\nb, c,1\n", r"3 cells in row 2 \(line 3\)"),
        ("a.csv", "text,label\na,0,\nb,1,\n", r"3 cells in row 1 \(line 2\)"),
        ("a.csv", 'text,label\n"two\nlines",0\n"open,1\n', r"unexpected end of data in row 2"),
        ("a.csv", 'text,label\n"a" b,0\n', r"expected after .* in row 1 \(line 2\)"),
        ("a.csv", "text,text,label\na,b,0\n", r"the column 'text' 2 times"),
        ("a.csv", "", "at least one row; got none"),
        ("a.csv", "\n\n", "at least one row; got none"),
        ("a.csv", "text,label\n", "a header and no data"),
        ("a.csv", "good film,1\nbad film,0\n", r"columns: expected text, label; got good film, 1"),
        ("a.csv", "Text,label\na,0\n", r"columns: expected text, label; got Text, label.*Rename text"),
        ("a.jsonl", '{"text": "a", "label": 0}\n{"text": "b", "label"\n', r"row 2: |in row 2"),
        (
            "a.jsonl",
            '{"text": "a", "label": 0}\n\n{"text": null, "label": 0}\n',
            r"text: .*got None in row 2 \(line 3\)",
        ),
        ("a.jsonl", '{"text": ["a"], "label": 0}\n', r"got \['a'\] in row 1"),
        ("a.jsonl", '{"text": "x\\ud83d", "label": 0}\n', r"the lone surrogate \\ud83d after 1 characters in row 1"),
        ("a.jsonl", '{"text": "a", "text": "b", "label": 0}\n', r"the key 'text' twice in row 1"),
        ("a.jsonl", '["a", 0]\n', r"\"?a\"? in row 1|a in row 1"),
        ("a.jsonl", '"text"\n', r"text in row 1"),
        ("a.jsonl", "text,label\n", r"in row 1.*one object per line"),
        ("a.jsonl", '{"text": "a", "label": 0} {"text": "b", "label": 0}\n', r"Extra data.* in row 1"),
        ("a.jsonl", "\0\0\0\0", r"in row 1"),
        ("a.jsonl", '{"text": "a", "label": 0}\n' + "\0" * 40, r"in row 2"),
        ("a.json", '[{"text": "a", "label": 0},\n{"text"', r"in line 2"),
        ("a.json", '{"data": [{"text": "a", "label": 0}]}', r"columns: expected text, label; got data"),
        ("a.jsonl", '{"text": ' + "[" * 100_000, r"nested too deep|in row 1"),
        ("a.json", "[]", "at least one row; got none"),
        ("a.parquet", "x", r"read as parquet"),
        ("a.parquet", b"PAR1" + b"\0" * 30 + b"PAR1", r"read as parquet"),
        ("a.xlsx", "x", r"expected .*\.csv.*got a\.xlsx"),
        ("a.csv.zip", "x", r"expected .*\.csv"),
        ("a", "x", r"expected .*\.csv"),
    ],
)
def test_wrong_files(tmp_path, name, content, message):
    path = save(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as error:
        load_rows(TASK, file=path)
    assert name in str(error.value)
    assert len(str(error.value)) < 700


def test_a_blank_target_is_named_in_the_files_own_count(tmp_path):
    rows = [{"text": "a", "summary": "b"}] * 5 + [{"text": "a", "summary": " "}]
    path = save(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"a\.jsonl: summary: expected a text; got ' ' in row 6"):
        load_rows(SUMMARY, file=path, limit=2)


def test_all_problems_of_a_file_at_once(tmp_path):
    rows = ['{"text": "a", "label": 0}', '{"text": null, "label": 7}', '{"label": 0}']
    with pytest.raises(Problems) as error:
        load_rows(TASK, file=save(tmp_path / "a.jsonl", "\n".join(rows)))
    problems = error.value.problems
    assert [problem.field.rpartition(": ")[2] for problem in problems] == ["text", "label", "text"]
    assert ["row 2" in problem.got for problem in problems] == [True, True, False]
    with pytest.raises(Problems) as error:
        load_rows(TASK, file=save(tmp_path / "c.jsonl", "\n".join([rows[1]] * 50)))
    assert len(error.value.problems) == MAX_PROBLEMS
    report = Report()
    with report.part("training rows"):
        load_rows(TASK, file=save(tmp_path / "c.jsonl", "\n".join([rows[1]] * 50)))
    assert len(report.problems) == MAX_PROBLEMS  # a line of the table for each


def test_columns_that_no_prompt_uses_are_left_alone(tmp_path):
    rows = (
        '{"text": "a", "label": 1, "date": "2024-05-01", "mixed": 5}\n{"text": "b", "label": 0, "mixed": {"x": [1]}}\n'
    )
    assert load_rows(TASK, file=save(tmp_path / "a.jsonl", rows)).to_list() == [
        {"text": "a", "label": 1}, {"text": "b", "label": 0}
    ]  # fmt: skip


def test_very_long_rows_and_many_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("bitdistill.data.tasks._CHUNK_ROWS", 7)
    long = "x" * 3_000_000
    assert texts(save(tmp_path / "a.csv", f"text,label\n{long},0\n")) == [long]
    assert texts(save(tmp_path / "a.jsonl", json.dumps({"text": long, "label": 0}))) == [long]
    values = [str(i) for i in range(50)]
    assert texts(save(tmp_path / "b.csv", "text,label\n" + "".join(f"{v},0\n" for v in values))) == values


def test_excels_own_delimiter_mark_and_nul_bytes(tmp_path):
    assert texts(save(tmp_path / "a.csv", "sep=;\r\ntext;label\r\n1,5;0\r\n")) == ["1,5"]
    assert texts(save(tmp_path / "b.csv", "text,label\na\0b,0\n")) == ["a\0b"]
    assert texts(save(tmp_path / "c.jsonl", '{"text": "a\tb", "label": 0}\n')) == ["a\tb"]


def test_a_file_that_may_not_be_read(tmp_path):
    path = tmp_path / "a.csv"
    save(path, ROWS)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(UserError, match=r"a\.csv: expected a file that can be read; got .*Permission denied"):
        load_rows(TASK, file=str(path))
