"""The pictures a page may see: those of one opened folder or named files, and what this browser uploaded.

A picture is known by a random-looking id; its path never leaves the server.  Files are opened relative to their folder,
without following links, and only when they are ordinary files.
"""

from __future__ import annotations

import json
import os
import re
import stat
import threading
import time
import unicodedata
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hrsam.checkpoint import write_atomically
from hrsam.demo import decoder
from hrsam.demo.guard import keyed
from hrsam.demo.limits import LIMITS, Limits
from hrsam.pyramid import Pyramid, open_pyramid

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
UPLOAD = "upload"  # ends the name of an uploaded file; nothing is ever served from one


@dataclass(frozen=True)
class Entry:
    """A picture that can be opened.  ``name``: base name for people.  ``owner``: who uploaded it, None for one of ours."""

    id: str
    name: str
    file: str
    folder: Path
    owner: str | None = None


class Gallery:
    """``sources``: picture files, or one folder.  ``state``: folder for uploads.  ``secret``: what ids are made with.
    ``scratch``: folder for files that live for one request, and for tiles of huge pictures.

    Raises ``ValueError`` for sources that are not there.  Safe from several threads.
    """

    def __init__(self, sources: Sequence[Path], state: Path, secret: bytes, limits: Limits = LIMITS):
        self._secret, self._limits = secret, limits
        self._folder, self._named = _sources(sources)
        self._uploads, self.scratch = state / "uploads", state / "scratch"
        for folder in (self._uploads, self.scratch):
            folder.mkdir(mode=0o700, exist_ok=True)
        sweep_old(self.scratch, limits.scratch_seconds)
        self._open: OrderedDict[str, Pyramid] = OrderedDict()
        self._lock = threading.Lock()
        self._opening: dict[str, threading.Lock] = {}
        self._known: dict[str, Entry] = {}

    def entries(self, owner: str) -> list[Entry]:
        """What ``owner`` may see: the opened pictures by name, then their own uploads, oldest first."""
        named = self._named if self._folder is None else [(self._folder, name) for name in self._listed(self._folder)]
        ours = (self._entry(folder, name) for folder, name in named)
        found = [entry for entry in ours if entry is not None] + [e for e in self._uploaded() if e.owner == owner]
        with self._lock:
            self._known = {id: entry for id, entry in self._known.items() if entry.owner not in (None, owner)}
            self._known.update((entry.id, entry) for entry in found)
        return found

    def find(self, id: str, owner: str) -> Entry | None:
        """The picture of that id, None when ``owner`` may see none."""
        entry = self._known.get(id) or next((entry for entry in self.entries(owner) if entry.id == id), None)
        return entry if entry is not None and entry.owner in (None, owner) else None

    def open(self, entry: Entry) -> Pyramid:
        """Decode it, or take it from those kept open.  Raises ``ValueError`` with one sentence, without a path."""
        with self._lock:
            turn = self._opening.setdefault(entry.id, threading.Lock())
        with turn:  # asked for by many, decoded once
            with self._lock:
                if entry.id in self._open:
                    self._open.move_to_end(entry.id)
                    return self._open[entry.id]
            pyramid = self._decoded(entry)
            with self._lock:
                self._open[entry.id] = pyramid
                self._opening.pop(entry.id, None)
                while len(self._open) > 1 and sum(map(size, self._open.values())) > self._limits.open_pictures_bytes:
                    self._open.popitem(last=False)
        return pyramid

    def drop(self) -> None:
        """Let go of all pictures; who uses one keeps it."""
        with self._lock:
            self._open.clear()

    def upload(self, file: Path, name: str, owner: str) -> Entry:
        """Take over an uploaded file, once it was decoded; ``ValueError`` for what is no picture."""
        pyramid = decoder.decode_picture(file, self.scratch, self._limits)
        id = keyed(self._secret, "upload", f"{owner} {pyramid.sha256}")[:16]
        about = {"name": plain_name(name), "owner": owner}
        write_atomically(self._uploads / f"{id}.json", lambda out: out.write(json.dumps(about).encode()))
        file.replace(self._uploads / f"{id}.{UPLOAD}")
        with self._lock:
            self._open[id] = pyramid
        self._tidy()
        return Entry(id, about["name"], f"{id}.{UPLOAD}", self._uploads, owner)

    def _listed(self, folder: Path) -> list[str]:
        with os.scandir(folder) as found:
            names = [
                entry.name
                for entry in found
                if not entry.name.startswith(".")
                and entry.name.lower().endswith(SUFFIXES)
                and entry.is_file(follow_symlinks=False)
            ]
        return sorted(names, key=_natural)[: self._limits.pictures]

    def _entry(self, folder: Path, name: str) -> Entry | None:
        try:
            about = os.stat(folder / name, follow_symlinks=False)
        except OSError:  # gone since it was listed
            return None
        version = f"{folder}\0{name}\0{about.st_size}\0{about.st_mtime_ns}"  # a changed file is another picture
        return Entry(keyed(self._secret, "picture", version)[:16], plain_name(name), name, folder)

    def _uploaded(self) -> list[Entry]:
        found = []
        for path in sorted(self._uploads.glob(f"*.{UPLOAD}"), key=_age):
            try:
                about = json.loads(path.with_suffix(".json").read_bytes())
                found.append(Entry(path.stem, str(about["name"]), path.name, self._uploads, str(about["owner"])))
            except (OSError, ValueError, KeyError):  # killed between the two writes, or removed meanwhile
                continue
        return found

    def _decoded(self, entry: Entry) -> Pyramid:
        if entry.owner is not None:
            return decoder.decode_picture(entry.folder / entry.file, self.scratch, self._limits)
        data = read_plain(entry.folder, entry.file, self._limits.folder_bytes)
        try:
            return open_pyramid(data, scratch=self.scratch)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("picture: ")) from None

    def _tidy(self) -> None:
        """Keep the newest uploads within their number and their bytes, and the newest tiles of huge pictures."""
        for path in _beyond(self._uploads.glob(f"*.{UPLOAD}"), self._limits.uploads, self._limits.uploads_bytes):
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)
        for path in _beyond(self.scratch.glob("*.tif"), self._limits.uploads, self._limits.tiles_bytes):
            path.unlink(missing_ok=True)


def _beyond(files: Iterable[Path], count: int, most: int) -> Iterator[Path]:
    """Those that are too many or too much, the newest kept and one at least."""
    kept, total = 0, 0
    for path in sorted(files, key=_age, reverse=True):
        kept, total = kept + 1, total + _bytes(path)
        if kept > 1 and (kept > count or total > most):
            yield path


def read_plain(folder: Path, name: str, most: int) -> bytes:
    """Bytes of the ordinary file ``name`` in ``folder``, both opened without following a link at the end.

    Raises ``ValueError`` without a path for a link, a device, a pipe, a folder, a hidden, missing or too large file.
    """
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe must not keep us waiting
    if name.startswith(".") or name != os.path.basename(name):
        raise ValueError("this is not a picture of the opened folder")
    try:
        if os.open in os.supports_dir_fd:
            directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                handle = os.open(name, flags, dir_fd=directory)
            finally:
                os.close(directory)
        else:
            handle = os.open(folder / name, flags)
    except OSError:
        raise ValueError("the picture cannot be opened; it was moved, is a link, or may not be read") from None
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("this is not an ordinary file; links, folders, devices and pipes are not opened")
        if about.st_size > most:
            raise ValueError(f"the file has {about.st_size >> 20} MiB, the limit is {most >> 20} MiB; make it smaller")
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(handle)


def sweep_old(folder: Path, seconds: float) -> None:
    """Delete files of ``folder`` that nobody wrote to for so long: what killed servers left, and tiles not in use."""
    for path in folder.iterdir():
        if path.is_file() and time.time() - _age(path) > seconds:
            path.unlink(missing_ok=True)


def size(pyramid: Pyramid) -> int:
    """Memory that an open picture takes, about: its pixels and the halved ones, or the caches of one that lies on the disk."""
    return 4 * pyramid.width * pyramid.height if pyramid.pixels is not None else 64 << 20


def plain_name(name: str) -> str:
    """The last part of a name that may be a path of any system, printable, at most 100 characters."""
    base = re.split(r"[/\\]", name)[-1]
    base = "".join(c for c in base if unicodedata.category(c)[0] != "C").strip()
    return base[-100:] or "picture"


def _sources(sources: Sequence[Path]) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The opened folder, or the files that were named, each with its folder; links that a person named are followed here."""
    real = []
    for path in sources:
        if not path.exists():
            raise ValueError(f"there is no {path}; give picture files or one folder of them")
        real.append(path.resolve())
    folders = [path for path in real if path.is_dir()]
    if folders and len(real) > 1:
        raise ValueError(f"got the folder {folders[0]} and more; give picture files or one folder of them")
    if folders:
        return folders[0], []
    for path in real:
        if not path.is_file():
            raise ValueError(f"{path} is a device or a pipe; give picture files or one folder of them")
    return None, [(path.parent, path.name) for path in dict.fromkeys(real)]


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Order in which 2 comes before 10."""
    parts = re.split(r"(\d+)", name.casefold())
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
