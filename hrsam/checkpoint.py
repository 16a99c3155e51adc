"""Files that are either whole or not there, and the checkpoints of a run, which prove by a checksum that they are whole."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

log = logging.getLogger("hrsam")

PART = ".part"  # ends the name of a file that is being written
DAMAGED = ".damaged"  # added to the name of a checkpoint that is not as it was written
_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{16})\.pt")


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object], mode: int = 0o644) -> Path:
    """Call ``write`` on a temporary file beside ``path``, then put it in place; on any error ``path`` is untouched.

    The file is flushed to the disk before it takes its name, the folder after.  ``mode``: its permissions, which nobody but
    the owner has before it is whole.
    """
    path = Path(path)
    return _write(path.parent, path.name, write, lambda: path, mode)


def _write(
    folder: Path, prefix: str, write: Callable[[BinaryIO], object], target: Callable[[], Path], mode: int = 0o644
) -> Path:
    """:func:`write_atomically` with a name that is known only when all is written."""
    handle, name = tempfile.mkstemp(dir=folder, prefix=f".{prefix}.", suffix=PART)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode)
        path = target()
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _flush(folder)
    return path


def _flush(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened for this
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep(folder: Path) -> None:
    """Remove what killed writers left in ``folder``; only for a folder in which nobody else writes."""
    for path in folder.glob(f".*{PART}"):
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------- checkpoints


class _Hashed:
    """A file whose bytes are hashed on their way.  An error is kept, since PyTorch's writer would turn it into another."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            self.digest.update(data)
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Done by who owns the file."""


def save_checkpoint(state: dict[str, Any], folder: Path, step: int, keep: int) -> Path:
    """Write ``state`` (tensors and plain values) as ``step-00000123-0123456789abcdef.pt``; only the last ``keep`` stay.

    The second number begins the sha256 of the file, as in the names of PyTorch's own weight files, so that one atomic
    replacement puts file and checksum in place.  On any error the earlier checkpoints are untouched.
    """
    written: list[_Hashed] = []

    def write(file: BinaryIO) -> None:
        written.append(_Hashed(file))
        torch.save(state, cast(BinaryIO, written[0]))
        if (error := written[0].error) is not None:
            raise error

    name = f"step-{step:08d}"
    path = _write(folder, name, write, lambda: folder / f"{name}-{written[0].digest.hexdigest()[:16]}.pt")
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in ``folder``, the oldest first; whether they are whole is not looked at."""
    found = [path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (step_of(path), path.name))


def step_of(path: Path) -> int:
    """Number of steps after which a checkpoint was written, by its name."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is as it was written; None when ``folder`` holds none at all.

    Newer ones that are not are named in a warning and set aside under another name.  Raises ``ValueError`` when there are
    checkpoints and none is right.
    """
    damaged = []
    for path in reversed(checkpoints(folder)):
        if _is_whole(path):
            for wrong in damaged:
                aside = wrong.rename(wrong.with_name(wrong.name + DAMAGED))
                log.warning("%s is damaged and set aside as %s; going on from %s", wrong, aside.name, path.name)
            return path
        damaged.append(path)
    if damaged:
        raise ValueError(
            f"all checkpoints in {folder} are damaged ({', '.join(path.name for path in damaged)}); bring back a copy of one, "
            "or start anew with another out"
        )
    return None


def load_state(path: str | Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote; only tensors and plain values are accepted."""
    return torch.load(path, map_location="cpu", weights_only=True)


def _is_whole(path: Path) -> bool:
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest().startswith(match[2])
