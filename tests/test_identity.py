"""The identity of a source follows its content, and a file that has not changed is not read again."""

import os
import time

import pytest

from bitdistill import identity
from bitdistill.identity import Identities, digest_of


def replaced_in_place(path, content: bytes) -> None:
    """Other content of the same size under the same date, as `cp -p` and archives leave it."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.fixture
def reads(monkeypatch):
    """The files that were read."""
    found = []
    monkeypatch.setattr(
        identity, "digest_of", lambda file, pieces: (found.append(file.name), digest_of(file, pieces))[1]
    )
    return found


def test_what_is_no_file_stands_for_itself(tmp_path):
    assert Identities().of(None) is None
    assert Identities().of("some/hub-id") == "some/hub-id"


def test_content_counts_and_dates_do_not(tmp_path):
    file, known = tmp_path / "x.jsonl", Identities()
    file.write_bytes(b"one")
    first = known.of(file)
    assert first == [f"x.jsonl:3:{digest_of(file)}"]
    replaced_in_place(file, b"two")
    second = known.of(file)
    assert second != first
    os.utime(file, (1, 1))
    assert known.of(file) == second


def test_a_file_replaced_within_one_tick_is_noticed_however_often_it_was_looked_at(tmp_path):
    file, known = tmp_path / "x", Identities(tmp_path / "memory")
    found = []
    for i in range(50):
        file.write_bytes(b"%03d" % i)
        os.utime(file, (1, 1))
        found += known.of(file) + known.of(file)
    assert len(set(found)) == 50


def test_what_has_not_changed_is_read_once_even_by_the_next_process(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(identity, "FRESH_SECONDS", 0)
    (tmp_path / "model").mkdir()
    for name in ("a", "b"):
        (tmp_path / "model" / name).write_bytes(name.encode())
    time.sleep(0.05)
    memory = tmp_path / "memory.json"
    first = Identities(memory).of(tmp_path / "model")
    other = Identities(memory, keep=False)
    assert other.of(tmp_path / "model") == first
    assert reads == ["a", "b"]
    replaced_in_place(tmp_path / "model" / "b", b"c")
    time.sleep(0.05)
    assert other.of(tmp_path / "model") != first
    assert reads == ["a", "b", "b"]
    assert Identities(memory).of(tmp_path / "model") == other.of(tmp_path / "model")
    assert reads == ["a", "b", "b", "b"]  # the one that does not keep the memory left it as it was


@pytest.mark.parametrize("damaged", [b"", b"{", b"[1, 2]", b"\xff", b'{"x": 7}'])
def test_a_damaged_memory_is_no_memory(tmp_path, damaged):
    (tmp_path / "x").write_bytes(b"x")
    (tmp_path / "memory.json").write_bytes(damaged.replace(b'"x"', f'"{tmp_path / "x"}"'.encode()))
    assert Identities(tmp_path / "memory.json").of(tmp_path / "x") == Identities().of(tmp_path / "x")


def test_folders_count_places_and_no_hidden_files(tmp_path):
    for name in ("a/x", "b/x", ".cache/y", "a/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    found = Identities().of(tmp_path)
    assert [line.split(":")[0] for line in found] == ["a/x", "b/x"]
    (tmp_path / ".cache" / "y").write_bytes(b"another")
    assert Identities().of(tmp_path) == found
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "z")
    assert Identities().of(tmp_path) != found


def test_of_what_is_very_large_pieces_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(identity, "PIECE_BYTES", 10)
    content = bytearray(os.urandom(3000))
    for name in ("large", "small"):
        (tmp_path / name).write_bytes(content if name == "large" else b"small one")
    first = Identities().of(tmp_path)
    assert first[1] == f"small:9:{digest_of(tmp_path / 'small')}"
    for place, seen in ((0, True), (-1, True), (15, False)):
        changed = bytearray(content)
        changed[place] ^= 1
        (tmp_path / "large").write_bytes(changed)
        assert (Identities().of(tmp_path) != first) == seen
    (tmp_path / "large").write_bytes(os.urandom(3000))
    assert Identities().of(tmp_path) != first
