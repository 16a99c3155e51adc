"""Accepted commands on disk before they are answered, so that a kill loses none.

A journal is a text file of lines ``checksum JSON``: a header, then one command a line in the order in which they were
accepted.  A line is on the disk before :meth:`Journal.append` returns.  What a kill left half-written was never answered
and is cut off on opening.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hrsam.checkpoint import write_atomically

FORMAT = 1


class JournalError(ValueError):
    """A journal that cannot be read or written; the message is one sentence without a path."""


class Journal:
    """One desk's file, open for appending.  ``header``: what it was made for."""

    def __init__(self, path: Path, header: dict[str, Any], size: int):
        self.header = header
        self._size = size
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 - closed by close()
        if not _lock(self._file.fileno()):
            self._file.close()
            raise JournalError("this piece of work is open in another server; close that one first")

    @classmethod
    def create(cls, path: Path, header: Mapping[str, Any]) -> Journal:
        """A new file; it is on the disk, with its name, when this returns."""
        whole = {"format": FORMAT, **header}
        line = _line(whole)
        try:
            write_atomically(path, lambda file: file.write(line))
        except OSError as error:
            raise JournalError(f"work cannot be saved ({error.strerror}); free some space and try again") from None
        return cls(path, whole, len(line))

    @classmethod
    def open(cls, path: Path) -> tuple[Journal, list[dict[str, Any]]]:
        """Read what was accepted, to go on after it.

        Raises ``FileNotFoundError`` when there is none, and :class:`JournalError` for a file whose header is not one of ours or
        that is damaged before its last line.
        """
        journal = cls(path, {}, 0)
        try:
            journal.header, commands, journal._size = read_journal(path)  # now that nobody else writes
            journal._file.truncate(journal._size)
        except BaseException:
            journal.close()
            raise
        return journal, commands

    def append(self, command: dict[str, Any], most: int) -> None:
        """Write one command through to the disk.

        On an error (a full disk, or a file that would be longer than ``most`` bytes) the file is as before and
        :class:`JournalError` is raised.
        """
        line = _line(command)
        if self._size + len(line) > most:
            raise JournalError("this piece of work is full; save it and begin a new one")
        try:
            self._file.seek(self._size)
            done = 0
            while done < len(line):
                done += self._file.write(line[done:])
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(self._size)
            raise JournalError(f"work cannot be saved ({error.strerror}); free some space and try again") from None
        self._size += len(line)

    def close(self) -> None:
        self._file.close()


def _lock(handle: int) -> bool:
    """Keep other processes from writing until the file is closed or this process ends; False when one does write."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def read_journal(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """Header, commands, and the length in bytes of what is whole; nothing is changed.  Errors as :meth:`Journal.open`."""
    lines = path.read_bytes().split(b"\n")
    values: list[dict[str, Any]] = []
    size = 0
    for place, line in enumerate(lines[:-1]):  # the last is what follows the last line's end
        value = _value(line)
        if value is None:
            if place < len(lines) - 2:
                raise JournalError(f"the saved work is damaged in line {place + 1}; begin anew")
            break
        values.append(value)
        size += len(line) + 1
    if not values or values[0].get("format") != FORMAT:
        raise JournalError("the saved work is damaged in its first line or of another version; begin anew")
    return values[0], values[1:], size


def _line(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _value(line: bytes) -> dict[str, Any] | None:
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
