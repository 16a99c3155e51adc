"""Pictures from strangers are decoded in a process of their own, with an end to its memory and its time."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import uuid
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from hrsam import rle
from hrsam.demo.limits import LIMITS, Limits
from hrsam.images import read_mask
from hrsam.pyramid import InMemory, Pyramid, open_pyramid

_TOO_MUCH = "it cannot be decoded within the memory and time that a picture may take; make it smaller"
_turn = threading.Semaphore(2)  # decoders at once: each may take the memory of a large picture


def start() -> None:
    """Make ready what decoders are forked from, so that the first does not wait for it."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        from multiprocessing import forkserver

        multiprocessing.set_forkserver_preload([__name__])
        forkserver.ensure_running()


def decode_picture(source: Path, scratch: Path, limits: Limits = LIMITS) -> Pyramid:
    """The picture in the file ``source``.  Raises ``ValueError`` with one sentence, without a path, for what is not one.

    ``scratch``: folder for what is handed over and, with huge pictures, for their tiles.
    """
    handed = scratch / f"{uuid.uuid4().hex}.pixels"
    try:
        found = _apart(source, scratch, handed, limits)
        if not handed.exists():
            return open_pyramid(source, scratch=scratch)  # its tiles lie in scratch now
        pixels = np.fromfile(handed, np.uint8).reshape(found["height"], found["width"], 3)
    finally:
        handed.unlink(missing_ok=True)
    return InMemory(pixels, found["sha256"], found["notes"])


def decode_mask(source: Path, scratch: Path, limits: Limits = LIMITS) -> dict[str, Any]:
    """The mask in the file ``source`` as COCO run lengths; errors as :func:`decode_picture`."""
    return _apart(source, scratch, None, limits)["rle"]


def _apart(source: Path, scratch: Path, handed: Path | None, limits: Limits) -> dict[str, Any]:
    """Decode in another process: a picture, its pixels written to ``handed``, or a mask."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    with _turn:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_decode, args=(there, source, scratch, handed, limits), daemon=True)
        process.start()
        there.close()
        try:
            found = here.recv() if here.poll(limits.decode_seconds) else {"error": _TOO_MUCH}
        except EOFError:  # it died: its memory or its processor time came to an end, or the decoder crashed
            found = {"error": _TOO_MUCH}
        finally:
            here.close()
            process.join(0.5)  # it has nothing left to do
            process.kill()
            process.join()
    if "error" in found:
        raise ValueError(found["error"])
    return found


def _decode(out: Connection, source: Path, scratch: Path, handed: Path | None, limits: Limits) -> None:
    """What the other process does."""
    _confine(limits)
    try:
        out.send(_decoded(source, scratch, handed))
    except (MemoryError, ValueError) as error:
        exhausted = isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError)
        text = str(error).removeprefix(f"{source}: ")  # pictures name their file first
        out.send({"error": _TOO_MUCH if exhausted else text})


def _decoded(source: Path, scratch: Path, handed: Path | None) -> dict[str, Any]:
    if handed is None:
        return {"rle": rle.encode(read_mask(source))}
    pyramid = open_pyramid(source, scratch=scratch)
    if pyramid.pixels is not None:
        pyramid.pixels.tofile(handed)
    return {"width": pyramid.width, "height": pyramid.height, "notes": pyramid.notes, "sha256": pyramid.sha256}


def _confine(limits: Limits) -> None:
    """Less memory and processor time for this process; where the system has no such limits, the clock alone counts."""
    if sys.platform == "win32":
        return
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    seconds = int(limits.decode_seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])  # libraries that are mapped already count too
        most = pages * os.sysconf("SC_PAGE_SIZE") + limits.decode_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
