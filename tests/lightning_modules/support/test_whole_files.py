"""Files that are there whole or not at all: what a kill, a full disk and another process leave."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_modules.support.files import read_csv, read_yaml, write_csv, write_yaml
from lightning_modules.support.whole_files import no_room, remove_left_overs, write_bytes, write_bytes_once, write_text

HEX = "0123456789abcdef" * 2


def test_a_file_reaches_the_disk_before_its_name_does(tmp_path, monkeypatch):
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: done.append("fsync") or fsync(number))
    monkeypatch.setattr(Path, "replace", lambda *paths: done.append("rename") or replace(*paths))
    write_text(tmp_path / "below" / "a.txt", "é")
    assert done == ["fsync", "rename", "fsync"]  # the file, its name, and the folder that holds the name
    assert (tmp_path / "below" / "a.txt").read_bytes() == b"\xc3\xa9"
    assert [path.name for path in (tmp_path / "below").iterdir()] == ["a.txt"]


@pytest.mark.parametrize("write", [write_bytes, write_bytes_once])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_leaves_what_was_there_and_is_named(tmp_path, monkeypatch, write, number):
    path = tmp_path / "a.csv"
    path.write_bytes(b"before")

    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        write(path, b"after")
    assert (caught.value.errno, caught.value.filename) == (number, str(path))
    assert no_room(caught.value) is caught.value
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.csv", b"before")]


def test_no_room_is_found_wherever_an_error_came_from():
    full = OSError(errno.ENOSPC, "No space left on device", "a")
    error = RuntimeError("a run")
    error.__cause__ = full
    assert no_room(error) is full
    assert no_room(FileNotFoundError(errno.ENOENT, "No such file", "a")) is None
    assert no_room(RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")).errno == 28


def test_of_several_writers_the_first_ones_file_stays(tmp_path):
    for content in (b"one", b"two"):
        write_bytes_once(tmp_path / "a", content)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"one")]


def test_left_overs_are_removed_and_nothing_else(tmp_path):
    (tmp_path / "runs").mkdir()
    for name in (f"results.csv.{HEX}.partial", f"runs/run.yaml.{HEX}.partial", "film.partial", "notes.zzz.partial"):
        (tmp_path / name).write_text("cut")
    remove_left_overs(tmp_path)
    assert {path.name for path in tmp_path.rglob("*.partial")} == {"film.partial", "notes.zzz.partial"}


@pytest.mark.skipif(os.name != "posix", reason="locks are of POSIX")
def test_what_a_living_process_writes_is_left_alone_and_what_a_killed_one_wrote_is_not(tmp_path):
    code = (
        "import os, sys, time; from pathlib import Path; from lightning_modules.support import whole_files\n"
        "def wait(number): print('writing', flush=True); time.sleep(600)\n"
        "os.fsync = wait; whole_files.write_bytes(Path(sys.argv[1]), b'x' * 100)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.csv")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        (partial,) = tmp_path.iterdir()
        remove_left_overs(tmp_path)
        assert partial.exists()
        process.kill()
    remove_left_overs(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a,b\r\n1,2\r\n3", "expected a line break at the end of"),
        (b"a,b\r\n1,2\r\n3\r\n", "expected 2 cells in each row of .*, got 1 in row 2, as of a file that is cut"),
        (b"a,b\r\n1,2,3\r\n", "got 3 in row 1"),
        (b"\x00\xff\xfe\n", "to be a table in CSV, got a file that is none"),
    ],
)
def test_a_table_that_is_cut_or_foreign_is_named(tmp_path, content, said):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        read_csv(tmp_path / "a.csv")
    assert str(tmp_path / "a.csv") in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"a: [1\n", b"\xff: 1\n", b"- 1\n", b"a: 1\nb: 0.12"])
def test_options_that_are_cut_or_foreign_are_named(tmp_path, content):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(ValueError, match="to hold options in YAML, got a file that is") as caught:
        read_yaml(tmp_path / "a.yaml")
    assert str(tmp_path / "a.yaml") in str(caught.value)


def test_what_is_written_is_read(tmp_path):
    rows = [{"name": 'é, "x"', "value": 0.5}, {"name": "two\nlines", "other": 3}]
    write_csv(tmp_path / "a.csv", rows)
    assert read_csv(tmp_path / "a.csv") == rows
    write_yaml(tmp_path / "a.yaml", {"name": "é", "values": [1, 0.5, None]})
    assert read_yaml(tmp_path / "a.yaml") == {"name": "é", "values": [1, 0.5, None]}
