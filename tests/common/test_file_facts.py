"""Facts of a file are remembered for exactly as long as it is unchanged."""

import hashlib
import os

import pytest

from common import file_facts
from common.errors import UserError
from common.file_facts import known, known_sha256


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_facts, "_SETTLED_NS", -(10**9))  # the files below were written just now
    path = tmp_path / "weights.pt"
    path.write_bytes(b"one" * 1000)
    return path


def test_a_file_is_hashed_once_until_it_changes(file, monkeypatch):
    reads = []
    monkeypatch.setattr(
        file_facts, "file_sha256", lambda path: reads.append(path) or hashlib.sha256(file.read_bytes()).hexdigest()
    )
    first = known_sha256(file)
    assert first == hashlib.sha256(b"one" * 1000).hexdigest() == known_sha256(file) == known_sha256(str(file))
    assert len(reads) == 1

    before = file.stat()
    with file.open("r+b") as opened:  # same inode and size, and the time of modification set back
        opened.write(b"two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert known_sha256(file) == hashlib.sha256(b"two" + b"one" * 999).hexdigest() != first
    assert len(reads) == 2

    other = file.with_name("other.pt")
    other.write_bytes(b"one" * 1000)
    other.replace(file)  # another file under the same name
    assert known_sha256(file) == first
    assert len(reads) == 3


def test_facts_are_kept_apart_and_failures_are_not_kept(file):
    assert known(file, "a", lambda: 1) == 1
    with pytest.raises(UserError):
        known(file, "b", lambda: (_ for _ in ()).throw(UserError("no")))
    assert known(file, "b", lambda: None) is None
    assert known(file, "b", lambda: 2) is None
    assert known(file, "a", lambda: 3) == 1


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"file": 1, "facts": 2}', b"[" * 100_000])
def test_a_broken_memory_is_no_memory(file, content):
    known(file, "a", lambda: 1)
    (memory,) = (file.parent / "cache").rglob("*.json")
    memory.write_bytes(content)
    assert known(file, "a", lambda: 2) == 2
    assert known(file, "a", lambda: 3) == 2


def test_a_file_written_just_now_is_not_remembered(file, monkeypatch):
    monkeypatch.setattr(file_facts, "_SETTLED_NS", 3_000_000_000)
    assert known(file, "a", lambda: 1) == 1
    assert known(file, "a", lambda: 2) == 2


def test_a_cache_that_cannot_be_written_is_no_error(file, tmp_path, monkeypatch):
    (tmp_path / "in_the_way").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "in_the_way"))
    assert known(file, "a", lambda: 1) == 1
    assert known(file, "a", lambda: 2) == 2
