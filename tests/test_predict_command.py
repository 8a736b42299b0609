"""`bitdistill predict`, `chat` and `info`: files of every kind, interrupted runs, conversations, what a file says of itself."""

import csv
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from serving_students import PAIRS, talking_student
from test_predict import SUMMARY

import bitdistill
from bitdistill import cli
from bitdistill.commands import predict as command
from bitdistill.commands.serve import serve_options
from bitdistill.errors import UserError
from bitdistill.prompts import Task

ROWS = [{"id": str(i), "text": 'ab, "c"\nd'[: 1 + i % 9] * (1 + i % 4)} for i in range(150)]

PLAIN = [{"id": row["id"], "text": "".join(char for char in row["text"] if char not in '"\n')} for row in ROWS]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return talking_student(tmp_path_factory.mktemp("command") / "student.safetensors")


@pytest.fixture(scope="module")
def want(file):
    return [one.to_json() for one in bitdistill.load(file, 1).predict(ROWS)]


def run(monkeypatch, *arguments, name="predict"):
    monkeypatch.setattr(sys, "argv", ["bitdistill", name, *map(str, arguments), "--threads", "1"])
    return cli.main()


def write_rows(folder, kind):
    path = folder / f"rows.{kind}"
    rows = PLAIN if kind == "tsv" else ROWS  # quotes in a .tsv file are quotes
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="") as out:
            writer = csv.DictWriter(out, ["id", "text"], delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_one_row(file, monkeypatch, capsys):
    [found] = bitdistill.load(file, 1).predict("a film")
    assert run(monkeypatch, file, "a film") == 0
    assert capsys.readouterr().out.startswith(f"{found.label}  {found.probability:.1%}   (")
    assert run(monkeypatch, file, "a film", "--json") == 0
    assert json.loads(capsys.readouterr().out) == found.to_json()


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_rows_of_every_kind_of_file(file, want, tmp_path, monkeypatch, kind):
    out = tmp_path / "out.jsonl"
    assert run(monkeypatch, file, "--input", write_rows(tmp_path, kind), "--output", out, "--columns", "id") == 0
    if kind == "tsv":
        want = [one.to_json() for one in bitdistill.load(file, 1).predict(PLAIN)]
    got = [json.loads(line) for line in out.read_text().splitlines()]
    assert [one.pop("id") for one in got] == [row["id"] for row in ROWS]
    assert got == want
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", f"rows.{kind}"]


def test_csv_out(file, want, tmp_path, monkeypatch):
    out = tmp_path / "out.csv"
    assert run(monkeypatch, file, "--input", write_rows(tmp_path, "csv"), "--output", out, "--columns", "id,text") == 0
    with out.open(newline="") as lines:
        got = list(csv.DictReader(lines))
    assert [(one["id"], one["text"]) for one in got] == [(row["id"], row["text"]) for row in ROWS]
    assert [one["label"] for one in got] == [one["label"] for one in want]
    assert [float(one["probability"]) for one in got] == [one["probability"] for one in want]


def test_a_copied_column_with_another_name(file, want, tmp_path, monkeypatch, capsys):
    """The true label beside the answer's: both columns would be called label."""
    (tmp_path / "rows.csv").write_text("text,label\na film,1\n")
    options = ["--input", tmp_path / "rows.csv", "--columns"]
    assert run(monkeypatch, file, *options, "label=gold") == 0
    assert json.loads(capsys.readouterr().out)["gold"] == "1"
    for columns, says in (("label", "label, which the output has already. Give it another name: label=NAME."),
                          ("text=a,label=a", "a, which the output has already")):  # fmt: skip
        assert run(monkeypatch, file, *options, columns) == 2
        assert says in capsys.readouterr().err


def test_the_columns_of_the_file_are_named(file, tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.csv").write_text("id,review\n1,a\n")
    for columns, says in (("id", "columns: expected text; got id, review in row 1"), ("no", "expected text; got id")):
        assert run(monkeypatch, file, "--input", tmp_path / "rows.csv", "--columns", columns) == 2
        assert says in capsys.readouterr().err


def test_standard_input(file, want, tmp_path):
    options = ["predict", str(file), "--input", "-", "--threads", "1"]
    call = [sys.executable, "-m", "bitdistill.cli", *options]
    got = subprocess.run(call, input=write_rows(tmp_path, "jsonl").read_bytes(), capture_output=True, check=True)
    assert [json.loads(line) for line in got.stdout.splitlines()] == want
    got = subprocess.run([*call, "--input_format", "txt"], input=b"a film\nb\n", capture_output=True, check=True)
    assert [json.loads(line)["row"] for line in got.stdout.splitlines()] == [1, 2]
    got = subprocess.run(call, input=b'{"text": "a"}\n{"text": \n', capture_output=True, check=False)
    assert got.returncode == 2
    assert got.stderr.startswith(b"bitdistill: input -: expected")
    assert b"row 2" in got.stderr


def test_a_pipe_in_place_of_a_file(file, want, tmp_path, monkeypatch, capsys):
    """As the shell gives for `--input <(command)`."""
    pipe = tmp_path / "63"
    for kind in ("jsonl", "csv"):
        content = write_rows(tmp_path, kind).read_bytes()
        os.mkfifo(pipe)
        threading.Thread(target=pipe.write_bytes, args=(content,), daemon=True).start()
        assert run(monkeypatch, file, "--input", pipe, "--input_format", kind) == 0
        assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == want
        pipe.unlink()


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("cut", [0, 3, 900, 1501, 4000])
def test_interrupted_runs_go_on(file, tmp_path, monkeypatch, capsys, kind, cut):
    """The output is cut anywhere, as a kill would leave it; the same command makes the same file of it."""
    rows, whole, out = write_rows(tmp_path, "csv"), tmp_path / f"whole.{kind}", tmp_path / f"out.{kind}"
    options = ["--input", rows, "--columns", "id,text"]
    assert run(monkeypatch, file, *options, "--output", whole) == 0
    monkeypatch.setattr(command._Output, "finish", lambda self: None)
    assert run(monkeypatch, file, *options, "--output", out) == 0
    monkeypatch.undo()
    out.write_bytes(out.read_bytes()[:cut])
    assert run(monkeypatch, file, *options, "--output", out) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert not (tmp_path / f"out.{kind}.unfinished").exists()
    assert ("answered already" in capsys.readouterr().err) == (cut > 500)


def test_outputs_that_are_there_stay(file, tmp_path, monkeypatch, capsys):
    rows, out = write_rows(tmp_path, "jsonl"), tmp_path / "out.jsonl"
    options = ["--input", rows, "--output", out]
    out.write_text("mine\n")
    assert run(monkeypatch, file, *options) == 2
    assert "which is there" in capsys.readouterr().err
    assert out.read_text() == "mine\n"
    assert run(monkeypatch, file, *options, "--overwrite") == 0
    out.with_name("out.jsonl.unfinished").write_text("{}")
    assert run(monkeypatch, file, *options) == 2
    assert "of another input, model or setting" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    file = talking_student(tmp_path / "s", task=SUMMARY)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "ab"[i % 2] * (i % 30)}) + "\n" for i in range(4000)))
    options = [str(file), "--input", str(rows), "--output", str(tmp_path / "out.jsonl"), "--threads", "1"]
    process = subprocess.Popen([sys.executable, "-m", "bitdistill.cli", "predict", *options])
    out = tmp_path / "out.jsonl"
    while not out.exists() or out.stat().st_size < 5000:
        assert process.poll() is None, "it was too quick to be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(out.read_text().splitlines())
    assert 0 < done < 4000
    assert run(monkeypatch, *options[:-2]) == 0
    assert [json.loads(line)["row"] for line in out.read_text().splitlines()] == list(range(1, 4001))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ('{"text": "a"}\n{"sentence": "b"}\n', ["columns", "row 2"]),
        ('{"text": "a"}\n\n{"text": null}\n', ["rows.jsonl: text", "row 2 (line 3)"]),
        ('{"text": "a"}\n{"text"}\n', ["rows.jsonl", "row 2"]),
        ("", ["at least one row"]),
    ],
)
def test_errors_name_file_and_row(file, tmp_path, monkeypatch, capsys, rows, says):
    (tmp_path / "rows.jsonl").write_text(rows)
    out = tmp_path / "out.jsonl"
    assert run(monkeypatch, file, "--input", tmp_path / "rows.jsonl", "--output", out) == 2
    error = capsys.readouterr().err
    assert all(text in error for text in ["rows.jsonl", *says]), error
    assert not out.exists()  # every row is read before the first is answered


def test_refusals(file, tmp_path, monkeypatch, capsys):
    rows = write_rows(tmp_path, "jsonl")
    pairs = talking_student(tmp_path / "pairs", task=PAIRS)
    for arguments, says in (
        ([file], "input: expected the texts of a row"),
        ([file, "x", "--input", rows], "input: expected"),
        ([file, "x", "y"], "text: expected 1 text: text"),
        ([pairs, "x"], "text: expected 2 texts: a, b"),
        ([file, "--input", tmp_path / "no.csv"], "input: expected a file"),
        ([file, "--input", file], "input: expected"),
        ([file, "--input", rows, "--output", tmp_path / "x.xlsx"], "output: expected"),
        ([file, "--input", rows, "--columns", "nothing"], "columns: expected nothing"),
        ([file, "--input", rows, "--columns", "label"], "columns: expected"),
        ([file, "--input", rows, "--max_new_tokens", "0"], "max_new_tokens: expected"),
        ([tmp_path / "no", "x"], "RUN_OR_FILE: expected"),
    ):
        assert run(monkeypatch, *arguments) == 2, arguments
        assert f"bitdistill: {says}" in capsys.readouterr().err


def test_a_missing_pyarrow_is_said(file, tmp_path, monkeypatch, capsys):
    rows = write_rows(tmp_path, "parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run(monkeypatch, file, "--input", rows) == 2
    assert "pip install pyarrow" in capsys.readouterr().err


# --- info -------------------------------------------------------------------------------------------------------------


def test_info(file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bitdistill", "info", str(file)])
    assert cli.main() == 0
    text = capsys.readouterr().out
    for part in (
        "qwen3",
        "reviews (classification)",
        "bad (0), good (1)",
        "ternary linears",
        "bitdistill chat",
        "no proof",
    ):
        assert part in text
    monkeypatch.setattr(sys, "argv", ["bitdistill", "info", str(file), "--json"])
    assert cli.main() == 0
    facts = json.loads(capsys.readouterr().out)
    assert sum(facts["parts_bytes"].values()) == facts["file_bytes"] == file.stat().st_size
    assert Task.from_json(facts["task"]).labels == {0: "bad", 1: "good", 2: "fine"}


def test_info_of_a_proved_file(file, tmp_path, monkeypatch, capsys):
    from bitdistill.runtime.packed_file import sealed_as

    proof = {"tokens": 9, "mean_kl": 1e-5, "same_top1": 1.0, "data_sha256": sealed_as(file)}
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "student.safetensors").write_bytes(file.read_bytes())
    for seal, says in ((proof["data_sha256"], "on 9 tokens"), ("other", "no proof")):
        (tmp_path / "export" / "proof.json").write_text(json.dumps(proof | {"data_sha256": seal}))
        monkeypatch.setattr(sys, "argv", ["bitdistill", "info", str(tmp_path)])
        assert cli.main() == 0
        assert says in capsys.readouterr().out
    for damaged in ("[" * 100_000, json.dumps({"data_sha256": sealed_as(file)})):
        (tmp_path / "export" / "proof.json").write_text(damaged)
        assert cli.main() == 0
        assert "no proof" in capsys.readouterr().out


# --- chat -------------------------------------------------------------------------------------------------------------


def converse(file, text, *options):
    call = [sys.executable, "-m", "bitdistill.cli", "chat", str(file), "--threads", "1", *options]
    return subprocess.run(call, input=text, capture_output=True, text=True, check=False)


def test_a_conversation(file):
    """The second answer knows the first; /reset forgets it."""
    got = converse(file, "ab\nab\n/reset\nab\n/help\n/exit\nnever\n", "--max_new_tokens", "6")
    assert got.returncode == 0, got.stderr
    first, second, third = got.stdout.splitlines()
    assert first == third != second
    runtime = bitdistill.load(file, 1)
    from bitdistill.runtime.conversation import conversation_ids

    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": first.strip()}]
    assert second == "".join(runtime.generate(conversation_ids(runtime, [*turns, turns[0]]), 6))
    assert "a new conversation" in got.stderr
    assert "bitdistill predict" in got.stderr


def test_long_conversations_lose_their_beginning(file):
    got = converse(file, "ab\n" * 9 + "a" * 80 + "\n", "--max_new_tokens", "9", "--context", "64", "--system", "b")
    assert got.returncode == 0, got.stderr
    assert "no longer fit into 64 tokens" in got.stderr
    assert "Shorten the message" in got.stderr
    assert len(got.stdout.splitlines()) == 9


def test_chat_needs_a_template(tmp_path):
    got = converse(talking_student(tmp_path / "s", chat_template=None), "x\n")
    assert got.returncode == 2
    assert "chat template" in got.stderr


@pytest.mark.slow
def test_ctrl_c_stops_an_answer(tmp_path):
    """In a real terminal: the answer stops, the conversation goes on."""
    file = talking_student(tmp_path / "s", context=40_000)
    leader, follower = pty.openpty()
    call = [sys.executable, "-m", "bitdistill.cli", "chat", str(file), "--threads", "1", "--max_new_tokens", "30000"]
    process = subprocess.Popen(
        call, stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(follower)

    seen = b""

    def until(text, seconds=60):
        """Reads the terminal up to `text`, and forgets that."""
        nonlocal seen
        end = time.monotonic() + seconds
        while text not in seen:
            left = end - time.monotonic()
            assert left > 0, seen[-500:]
            assert select.select([leader], [], [], left)[0], seen[-500:]
            seen = seen[-4096:] + os.read(leader, 4096)
        seen = seen.partition(text)[2]

    until(b"> ")
    os.write(leader, b"ab\n")
    until(b"ab\r\n")
    while len(seen) < 5:  # the answer has begun
        seen += os.read(leader, 4096)
    os.write(leader, b"\x03")
    until(b"[stopped]")
    until(b"> ")
    os.write(leader, b"/exit\n")
    assert process.wait(20) == 0
    os.close(leader)


def test_the_deployed_commands_have_options_that_exist():
    folder = Path(__file__).resolve().parents[1] / "deploy"
    [unit] = re.findall(r"^ExecStart=\S+/bitdistill serve (.*)$", (folder / "bitdistill.service").read_text(), re.M)
    [image] = re.findall(r"^CMD (\[.*\])$", (folder / "Dockerfile").read_text(), re.M)
    for arguments in (shlex.split(unit), json.loads(image)):
        options = serve_options(arguments)
        assert options["run_or_file"].endswith("student.safetensors")
        assert options["port"] == 8000


def test_the_image_makes_its_volume_for_the_user_who_writes_it():
    image = (Path(__file__).resolve().parents[1] / "deploy" / "Dockerfile").read_text()
    [volume], [user] = re.findall(r"^VOLUME (\S+)$", image, re.M), re.findall(r"useradd .* (\S+) \\$", image, re.M)
    [made] = re.findall(r"^ && install --directory (.*)$", image, re.M)  # Docker makes a folder that is missing as root
    assert shlex.split(made) == ["--owner", user, "--group", user, volume]


def test_whole_lines():
    for content, delimiter, ends in (
        (b'{"a": 1}\n{"b"', None, [9]),
        (b"", None, []),
        (b'a,b\n1,"x\ny"\n2,"z\n', ",", [4, 12]),
        (b"a,b\n1,2", ",", [4]),
    ):
        assert list(command._whole_lines(content, delimiter)) == ends


def test_unknown_errors_are_no_user_errors():
    with pytest.raises(UserError):
        command.predict_options(["file", "--frobnicate"])
