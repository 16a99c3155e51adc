"""Accepted commands on disk: written before they are answered, read after any kill."""

import errno
import os
import subprocess
import sys
import time

import pytest

from hrsam.demo import journal
from hrsam.demo.journal import Journal, JournalError, read_journal

COMMANDS = [{"do": "click", "object": 1, "x": 0.1 + i, "y": 1e-17, "positive": i % 2 == 0} for i in range(5)]
MOST = 1 << 20


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.journal"


def filled(path, commands=COMMANDS):
    made = Journal.create(path, {"owner": "o", "side": 64})
    for command in commands:
        made.append(command, MOST)
    made.close()
    return path.read_bytes()


def test_what_was_appended_is_read_again(path):
    filled(path)
    opened, commands = Journal.open(path)
    assert opened.header == {"format": 1, "owner": "o", "side": 64}
    assert commands == COMMANDS
    opened.append({"do": "undo", "object": 1}, MOST)
    opened.close()
    assert read_journal(path)[1] == [*COMMANDS, {"do": "undo", "object": 1}]


def test_cut_anywhere_it_opens_with_the_lines_that_are_whole(path):
    data = filled(path)
    ends = [place + 1 for place, byte in enumerate(data) if byte == 10]
    for cut in range(ends[0], len(data) + 1):
        path.write_bytes(data[:cut])
        opened, commands = Journal.open(path)
        whole = sum(end <= cut for end in ends) - 1
        assert commands == COMMANDS[:whole]
        opened.append({"do": "clear", "object": 1}, MOST)
        opened.close()
        assert read_journal(path)[1] == [*COMMANDS[:whole], {"do": "clear", "object": 1}]


def test_a_last_line_that_is_not_as_it_was_written_is_cut_off(path):
    data = filled(path)
    path.write_bytes(data[:-3] + b"?}\n")
    opened, commands = Journal.open(path)
    opened.close()
    assert commands == COMMANDS[:-1]
    assert path.read_bytes() == data[: data[:-1].rindex(b"\n") + 1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.replace(b"1.1", b"1.2"), "damaged in line 3"),
        (lambda data: b"", "damaged in its first line"),
        (lambda data: data[:20], "damaged in its first line"),
        (lambda data: data[data.index(b"\n") + 1 :], "first line or of another version"),
        (lambda data: b"no journal\n" * 3, "damaged in line 1"),
    ],
)
def test_a_damaged_journal_is_refused_in_one_sentence_and_left_alone(path, damage, message):
    data = damage(filled(path))
    path.write_bytes(data)
    with pytest.raises(JournalError, match=message) as caught:
        Journal.open(path)
    assert str(path.parent) not in str(caught.value)
    assert path.read_bytes() == data


def test_there_is_none(path):
    with pytest.raises(FileNotFoundError):
        Journal.open(path)


def test_one_process_writes_at_a_time(path):
    filled(path)
    opened, _ = Journal.open(path)
    with pytest.raises(JournalError, match="open in another server"):
        Journal.open(path)
    opened.close()
    Journal.open(path)[0].close()


@pytest.mark.parametrize("written", [0, 7])
def test_a_full_disk_refuses_the_command_and_keeps_the_file(path, monkeypatch, written):
    data = filled(path)
    opened, _ = Journal.open(path)

    class Full:
        """Takes some bytes, then none."""

        def __init__(self, file):
            self.file, self.calls = file, 0

        def write(self, line):
            self.calls += 1
            if self.calls > 1 or not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(line[:written])

        def __getattr__(self, name):
            return getattr(self.file, name)

    whole, opened._file = opened._file, Full(opened._file)
    with pytest.raises(JournalError, match=r"cannot be saved .No space left"):
        opened.append({"do": "undo", "object": 1}, MOST)
    assert path.read_bytes() == data
    opened._file = whole
    opened.append({"do": "redo", "object": 1}, MOST)
    opened.close()
    assert read_journal(path)[1] == [*COMMANDS, {"do": "redo", "object": 1}]


def test_what_could_not_be_flushed_is_not_kept(path, monkeypatch):
    data = filled(path)
    opened, _ = Journal.open(path)

    def broken(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(journal.os, "fsync", broken)
    with pytest.raises(JournalError, match="cannot be saved"):
        opened.append({"do": "undo", "object": 1}, MOST)
    assert path.read_bytes() == data


def test_a_line_is_flushed_before_append_returns(path, monkeypatch):
    filled(path)
    opened, _ = Journal.open(path)
    seen = []
    monkeypatch.setattr(journal.os, "fsync", lambda handle: seen.append(os.fstat(handle).st_size))
    opened.append(COMMANDS[0], MOST)
    assert seen == [path.stat().st_size]


def test_a_journal_has_a_largest_size(path):
    data = filled(path)
    opened, _ = Journal.open(path)
    with pytest.raises(JournalError, match="is full"):
        opened.append(COMMANDS[0], len(data) + 10)
    assert path.read_bytes() == data
    with pytest.raises(ValueError, match="Out of range"):
        opened.append({"x": float("nan")}, MOST)


WRITER = """
import sys
from pathlib import Path
from hrsam.demo.journal import Journal
journal = Journal.create(Path(sys.argv[1]), {})
for number in range(10**9):
    journal.append({"number": number}, 1 << 30)
    print(number, flush=True)
"""


def test_kill_9_in_a_tight_loop_loses_nothing_that_was_said(tmp_path):
    path = tmp_path / "a.journal"
    process = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True)
    said = [int(process.stdout.readline())]
    time.sleep(0.011)
    process.kill()
    said += [int(line) for line in process.stdout.read().splitlines()]
    process.wait()
    numbers = [command["number"] for command in read_journal(path)[1]]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) >= len(said)
