"""Files that are either whole or not there: temporary file, flush to disk, atomic replace, flush the folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> Path:
    """Call ``write`` on a temporary file beside ``path``, then put it in place; on any error ``path`` is untouched."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened for this
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return path


def save_state(state: dict[str, Any], path: str | Path) -> Path:
    """Write a training state (tensors and plain values)."""
    return write_atomically(path, lambda file: torch.save(state, file))


def load_state(path: str | Path) -> dict[str, Any]:
    """Read a training state written by :func:`save_state`; only tensors and plain values are accepted."""
    return torch.load(path, map_location="cpu", weights_only=True)
