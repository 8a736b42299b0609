"""Files are whole or as they were; lines too; a full or locked disk is said in one line; one run at a time in a folder."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bitdistill.errors import UserError
from bitdistill.files import (
    append_line,
    checksum,
    disk_errors_said,
    make_once,
    remove_leftovers,
    whole_file,
    write_whole,
)
from bitdistill.lock import lock_folder


def test_a_file_is_replaced_at_once_and_nothing_else_is_left(tmp_path):
    for text in ("one", "zwei: ä"):
        write_whole(tmp_path / "x.json", text)
        assert (tmp_path / "x.json").read_text(encoding="utf-8") == text
    assert os.listdir(tmp_path) == ["x.json"]


def test_after_an_error_the_old_file_is_there(tmp_path):
    write_whole(tmp_path / "x", b"old")
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "x") as temporary:  # noqa: PT012
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    write_whole(tmp_path / "x", "text")
    assert [Path(event).suffix or Path(event).name for event in events] == [".tmp", "rename", tmp_path.name]


@pytest.mark.parametrize("marker", [None, b"", b"\xff", b'{"half', b"of ano"])
def test_what_is_made_once_is_made_again_where_its_marker_is_not_right(marker, tmp_path):
    made, said, calls = tmp_path / "made", tmp_path / "made.json", []

    def make():
        assert not said.exists(), "killed here, it would count as made"
        calls.append(made.write_text("x"))

    for _ in range(2):
        make_once(made, said, "of anö", make)
    assert len(calls) == 1
    said.unlink() if marker is None else said.write_bytes(marker)
    for _ in range(2):
        make_once(made, said, "of anö", make)
    assert len(calls) == 2
    made.unlink()
    make_once(made, said, "of anö", make)
    make_once(made, said, "of another", make)
    assert len(calls) == 4
    with pytest.raises(ZeroDivisionError):
        make_once(made, said, "of a third", lambda: 1 / 0)
    make_once(made, said, "of a third", make)
    assert len(calls) == 5


def test_files_of_libraries_get_the_rights_that_the_umask_leaves(tmp_path):
    code = """if True:
        import os, sys, pathlib
        os.umask(int(sys.argv[1], 8))
        import numpy as np
        from safetensors.numpy import save_file
        from bitdistill.distributed.checkpoint import save_folder_atomically
        from bitdistill.files import whole_file
        with whole_file("one.safetensors") as path:
            save_file({"x": np.ones(1)}, path)
        with save_folder_atomically("folder") as folder:
            save_file({"x": np.ones(1)}, folder / "two.safetensors")
        for path in ("one.safetensors", "folder/two.safetensors"):
            print(oct(pathlib.Path(path).stat().st_mode & 0o777))
    """
    for umask, mode in (("022", "0o644"), ("027", "0o640"), ("077", "0o600")):
        command = [sys.executable, "-c", code, umask]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [mode, mode]


def test_what_killed_processes_left_is_removed(tmp_path):
    (tmp_path / ".x.123.tmp").touch()
    (tmp_path / "kept.tmp").touch()
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["kept.tmp"]


@pytest.mark.parametrize("before", [b"", b'{"a": 1}\n', b'{"a": 1}\n{"half', b"half", b'{"a": 1}\n' + b"x" * 10_000])
def test_a_line_is_added_whole_after_the_last_whole_one(tmp_path, before):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(before)
    append_line(path, '{"b": 2}')
    whole = before[: before.rfind(b"\n") + 1]
    assert path.read_bytes() == whole + b'{"b": 2}\n'


def with_file_limit(code: str, folder: Path, limit: int) -> subprocess.CompletedProcess:
    """Runs Python code in a process whose files may not grow beyond so many bytes, which is what a full disk looks like."""

    def restrict():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, preexec_fn=restrict, timeout=120)


def test_a_full_disk_leaves_the_lines_and_files_as_they_were(tmp_path):
    (tmp_path / "lines.jsonl").write_text("first\n")
    (tmp_path / "x").write_text("old")
    code = (
        "from bitdistill.files import append_line, write_whole\n"
        "for write in (lambda: append_line('lines.jsonl', 'y' * 5000), lambda: write_whole('x', 'z' * 5000)):\n"
        "    try: write()\n"
        "    except OSError as error: print(error.errno)\n"
    )
    done = with_file_limit(code, tmp_path, 2000)
    assert done.stdout.split() == [str(errno.EFBIG)] * 2, done.stderr
    assert (tmp_path / "lines.jsonl").read_text() == "first\n"
    assert (tmp_path / "x").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["lines.jsonl", "x"]


def saved_by_torch(path):
    import torch

    torch.save(torch.zeros(100_000), path)


def saved_by_safetensors(path):
    import torch
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(100_000)}, path)


@pytest.mark.parametrize("save", [saved_by_torch, saved_by_safetensors])
def test_libraries_errors_of_a_full_disk_are_known(tmp_path, save):
    code = (
        "from pathlib import Path\nfrom test_files import *\n"
        f"with disk_errors_said(Path('.')):\n    {save.__name__}('x.bin')\n"
    )
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{code}"
    done = with_file_limit(code, tmp_path, 50_000)
    assert "UserError: output_dir: expected room for what is written in ." in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "room"), (errno.EDQUOT, "room"), (errno.EROFS, "right to write"), (errno.EACCES, "right to write")],
)
def test_the_systems_errors_are_said(tmp_path, code, words):
    with pytest.raises(UserError, match=words) as error, disk_errors_said(tmp_path):
        raise OSError(code, os.strerror(code), str(tmp_path / "x"))
    assert error.value.field == "output_dir"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOENT, "no"), RuntimeError("shape"), OSError(errno.EACCES, "no", "/etc/x")]
)
def test_other_errors_pass_as_they_are(tmp_path, error):
    with pytest.raises(type(error)) as seen, disk_errors_said(tmp_path):
        raise error
    assert seen.value is error


def test_checksums_tell_files_apart(tmp_path):
    write_whole(tmp_path / "a", b"1" * 100_000)
    write_whole(tmp_path / "b", b"1" * 99_999 + b"2")
    assert checksum(tmp_path / "a") != checksum(tmp_path / "b")
    assert len(checksum(tmp_path / "a")) == 64


HOLD = "import sys, time\nfrom pathlib import Path\nfrom bitdistill.lock import lock_folder\n"
HOLD += "lock = lock_folder(Path('run'))\nprint('held', flush=True)\ntime.sleep(60)\n"


def test_a_folder_in_use_is_refused_until_its_process_ends(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {holder.pid} on .+ since ") as error:
            lock_folder(tmp_path / "run")
        assert error.value.field == "output_dir"
    finally:
        holder.kill()
        holder.wait()
    assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == holder.pid  # stale, and in nobody's way
    assert lock_folder(tmp_path / "run") is not None
    assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getpid()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="output_dir: expected a folder that can be written to"):
        lock_folder(tmp_path / "file" / "run")
