"""Embeddings of a teacher, computed once and kept on the disk, for students that see every picture many times.

An embedding is found by a key made from the bytes of the picture's file, the SHA-256 of the teacher's weights, the side, the
dtypes and the version of the transform, so what was made for other pictures, weights or sizes is never taken for it.  They
lie in shards (:mod:`hrsam.targetfile`) in a folder for each kind.  A run that was killed goes on: shards are whole, and what
they hold is not computed again.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from hrsam.data.folders import SUFFIXES
from hrsam.data.workers import WorkerError, ahead
from hrsam.images import read_image
from hrsam.models.model import ModelConfig
from hrsam.playing import end_with_parent, rank, world
from hrsam.targetfile import (
    STORED,
    DamagedTargets,
    MissingTarget,
    TargetKind,
    check_shard,
    read_list,
    read_target,
    write_shard,
)
from hrsam.teachers import TRANSFORM, Teacher, check_side, embedding_shape, load_teacher, teacher_config
from hrsam.weightfile import sha256
from hrsam.weights import locate

__all__ = [
    "Built",
    "DamagedTargets",
    "MissingTarget",
    "TargetKind",
    "Targets",
    "build_targets",
    "find_pictures",
    "kind_of",
    "kind_of_file",
]

logger = logging.getLogger("hrsam")

SHARD_BYTES = 128 * 2**20  # 64 embeddings of a 1024-pixel side in 16 bits; what a killed run computes again at most
PATIENCE = 3600.0  # seconds for one picture in another process
READERS = 2  # threads that read pictures ahead of the teacher
ABANDONED = 3600.0  # seconds after which a temporary file is nobody's

Say = Callable[[str], None]
Given = TypeVar("Given")
Made = TypeVar("Made")
Computed = Generator[tuple[str, Tensor], None, None]  # keys and embeddings


@dataclass(frozen=True)
class Built:
    """What :func:`build_targets` did in this process: ``computed`` targets in ``shards`` files of ``bytes`` together, ``kept``
    that were there; ``set_aside``: damaged shards, where they are now."""

    computed: int
    kept: int
    shards: int
    bytes: int
    set_aside: tuple[Path, ...]


def kind_of(teacher: Teacher, side: int, stored: str = "bfloat16") -> TargetKind:
    """What this teacher's targets are of; ``ValueError`` for a side it does not take or another ``stored`` dtype."""
    return _kind(teacher.sha256, teacher.model.config, side, teacher.precision, stored)


def kind_of_file(
    name: str | Path, side: int, precision: torch.dtype = torch.float32, stored: str = "bfloat16"
) -> TargetKind:
    """:func:`kind_of` for ``load_teacher(name, precision=precision)``, which need not be loaded to read its targets."""
    path = locate(name)
    config = teacher_config(path)
    return _kind(sha256(path), config, side, precision, stored)


def _kind(teacher: str, config: ModelConfig, side: int, precision: torch.dtype, stored: str) -> TargetKind:
    check_side(config, side)
    if stored not in STORED:
        raise ValueError(f"targets are stored as {', '.join(STORED)}; got {stored!r}")
    computed = str(precision).removeprefix("torch.")
    return TargetKind(teacher, embedding_shape(config)[0], side, computed, stored, TRANSFORM)


def find_pictures(folders: Iterable[str | Path]) -> list[Path]:
    """The files in ``folders``, not below them, that are pictures by their names; each folder sorted.

    Raises ``ValueError`` for a folder that holds none or is not there.
    """
    found: list[Path] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}; give one that holds pictures")
        here = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        if not here:
            raise ValueError(
                f"there are no pictures ({', '.join(SUFFIXES)}) in {folder}; give a folder that holds some"
            )
        found += here
    return list(dict.fromkeys(found))


class Targets:
    """The targets of one kind in ``folder``; picklable, so that processes that load data may hold it.

    Raises :class:`MissingTarget` when there is none of that kind, and :class:`DamagedTargets`, here for a shard whose head is
    damaged and later for the rest of it.
    """

    def __init__(self, folder: str | Path, kind: TargetKind):
        self.folder, self.kind = Path(folder), kind
        self._home = self.folder / kind.folder
        self._places = _places(self._home, kind)
        if not self._places:
            others = sorted(path.name for path in self.folder.glob("*-v*") if path.is_dir() and path != self._home)
            raise MissingTarget(
                f"{self.folder} holds no targets {kind.folder} (teacher, side, dtypes, transform), but "
                f"{', '.join(others) or 'none at all'}; compute them first"
            )

    def __len__(self) -> int:
        return len(self._places)

    def get(self, picture: str | Path | bytes) -> Tensor:
        """The embedding (C, g, g) of a picture, a file or its bytes, in the dtype it is stored in, on the CPU; verified.

        Raises :class:`MissingTarget` when there is none: no other model's embedding ever takes its place.
        """
        key = self.kind.key(picture if isinstance(picture, bytes) else _bytes(picture))
        if key not in self._places:
            name = "a picture" if isinstance(picture, bytes) else picture
            raise MissingTarget(f"there is no target of {name} in {self._home}; compute it first")
        shard, checksum = self._places[key]
        return read_target(self._home / shard, key, checksum, self.kind)

    def missing(self, pictures: Iterable[str | Path]) -> list[Path]:
        """Those of ``pictures`` (files) without a target."""
        return [path for path, key in _keyed(list(map(Path, pictures)), self.kind) if key not in self._places]


def build_targets(
    pictures: Iterable[str | Path],
    teacher: Teacher,
    folder: str | Path,
    *,
    side: int,
    stored: str = "bfloat16",
    processes: int = 1,
    threads: int = 1,
    repair: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
    say: Say = lambda line: None,
) -> Built:
    """Compute the targets of ``pictures`` (files) that are not in ``folder`` yet, and write them shard by shard.

    ``stored``: float32, bfloat16 or float16.  ``processes`` that compute, each with ``threads``, which may change the last
    bits; the number of processes does not.  Under ``torchrun``/``accelerate launch`` every process takes each n-th picture:
    let all finish before reading.  ``repair``: read every shard first and set damaged ones aside into ``damaged/``, so that
    what they held is computed again; without it a damaged one is an error.  ``say`` gets the number of targets and the disk
    space they take before anything is computed.  ``progress``: show a bar.

    Raises ``ValueError`` for a picture that cannot be read, values that are not finite, a disk without the space, a process
    that died, and ``OSError`` when a file cannot be written.  Shards written before stay, and the same call goes on.
    """
    kind = kind_of(teacher, side, stored)
    home = Path(folder) / kind.folder
    home.mkdir(parents=True, exist_ok=True)
    if rank() == 0:
        _remove_abandoned(home)
    set_aside = tuple(_repaired(home, kind)) if repair else ()
    known = _places(home, kind)
    own = list(dict.fromkeys(map(Path, pictures)))[rank() :: world()]
    todo = {key: path for path, key in _keyed(own, kind) if key not in known}  # of equal files one
    _check_space(home, len(todo), len(own), kind.nbytes, say)
    count = 1 if world() > 1 else min(processes, len(todo))
    paths = list(todo.values())
    made = _in_processes(teacher, kind, paths, count, threads) if count > 1 else _here(teacher, kind, paths, threads)
    written: list[int] = []
    with closing(made), _bar(progress and rank() == 0, len(todo)) as step:
        computed = (step(pair) for pair in made)
        while shard := dict(islice(computed, max(1, shard_bytes // kind.nbytes))):
            try:
                written.append(write_shard(home, kind, shard).stat().st_size)
            except OSError as err:
                raise OSError(
                    err.errno,
                    f"{home} does not take another {_amount(len(shard) * kind.nbytes)} ({err.strerror}); what was written "
                    "before is kept: make room and run the same command again",
                ) from None
    return Built(len(todo), len(own) - len(todo), len(written), sum(written), set_aside)


def _places(home: Path, kind: TargetKind) -> dict[str, tuple[str, str]]:
    """Key -> name of the shard and SHA-256 of the embedding in it."""
    places: dict[str, tuple[str, str]] = {}
    for path in sorted(home.glob("*.safetensors")):
        places.update((key, (path.name, checksum)) for key, checksum in read_list(path, kind).items())
    return places


def _repaired(home: Path, kind: TargetKind) -> Iterator[Path]:
    """Read all shards and move the damaged ones away."""
    if world() > 1:
        raise ValueError("repair reads what other processes write; repair in one process, then start several")
    for path in sorted(home.glob("*.safetensors")):
        try:
            check_shard(path, kind)
        except DamagedTargets as err:
            (home / "damaged").mkdir(exist_ok=True)
            aside = path.replace(home / "damaged" / path.name)
            logger.warning("%s: now %s", err, aside)
            yield aside


def _remove_abandoned(home: Path) -> None:
    """Temporary files of runs that were killed; not those of a process that writes at this moment."""
    for path in home.glob(".*.part"):
        if path.stat().st_mtime < time.time() - ABANDONED:
            path.unlink(missing_ok=True)


def _check_space(home: Path, todo: int, among: int, size: int, say: Say) -> None:
    needed, free = todo * size * world(), shutil.disk_usage(home).free
    say(
        f"{todo} of {among} targets to compute, {_amount(needed)} in {home} ({_amount(free)} free there)"
        + (f", in {world()} processes" if world() > 1 else "")
    )
    if needed > free:
        raise ValueError(
            f"the targets need {_amount(needed)} and {home} has {_amount(free)} left; "
            "make room, name another folder, or let the teacher run in every step instead"
        )


def _amount(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def _keyed(paths: Sequence[Path], kind: TargetKind) -> list[tuple[Path, str]]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(zip(paths, pool.map(lambda path: kind.key(_bytes(path)), paths)))


def _bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as err:
        raise ValueError(f"{path} cannot be read ({err.strerror}); check the path and its permissions") from None


def _read(path: Path, kind: TargetKind) -> tuple[Path, str, np.ndarray]:
    data = _bytes(path)
    try:
        return path, kind.key(data), read_image(data).pixels
    except ValueError as err:
        raise ValueError(f"{path}: {str(err).removeprefix('picture: ')}") from None


def _teach(teacher: Teacher, kind: TargetKind, path: Path, pixels: np.ndarray) -> Tensor:
    target = teacher.targets([pixels], kind.side)[0].to("cpu", STORED[kind.stored][1])
    if not target.isfinite().all():
        raise ValueError(
            f"the teacher {teacher.path.name} gives NaN or infinity for {path} in {kind.computed}, stored as {kind.stored}; "
            "look at the picture, or compute in float32"
        )
    return target


def _here(teacher: Teacher, kind: TargetKind, paths: Sequence[Path], threads: int) -> Computed:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with ThreadPoolExecutor(READERS) as pool:
            for path, key, pixels in _ahead(pool, lambda path: _read(path, kind), paths, 2 * READERS):
                yield key, _teach(teacher, kind, path, pixels)
    finally:
        torch.set_num_threads(before)


def _in_processes(teacher: Teacher, kind: TargetKind, paths: Sequence[Path], count: int, threads: int) -> Computed:
    work = _Teaching(teacher.path, str(teacher.model.device), teacher.precision, kind, threads)
    results = ahead(work, paths, workers=count, most=2 * count, patience=PATIENCE, name=str)
    try:
        with closing(results):
            for key, raw in results:
                yield key, torch.from_numpy(raw).view(STORED[kind.stored][1])
    except WorkerError as err:
        raise ValueError(
            f"{err}, perhaps for lack of memory; run the same command again, with fewer processes"
        ) from None


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[Given], Made], items: Iterable[Given], most: int
) -> Iterator[Made]:
    """``map`` in order that is at most ``most`` items ahead of who asks, so that results do not pile up."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@dataclass(frozen=True)
class _Teaching:
    """What a process does with each picture; it loads the teacher with the first."""

    teacher: Path
    device: str
    precision: torch.dtype
    kind: TargetKind
    threads: int

    def __call__(self, path: Path) -> tuple[str, np.ndarray]:
        """Key and embedding as bytes, which any process can be sent without shared memory."""
        teacher = _loaded(self)
        if teacher.sha256 != self.kind.teacher:
            raise ValueError(f"{teacher.path} was replaced while its targets were computed; run the same command again")
        _, key, pixels = _read(path, self.kind)
        return key, _teach(teacher, self.kind, path, pixels).contiguous().view(torch.uint8).numpy()


@cache
def _loaded(work: _Teaching) -> Teacher:
    end_with_parent()
    torch.set_num_threads(work.threads)
    return load_teacher(work.teacher, work.device, work.precision)


@contextmanager
def _bar(wanted: bool, total: int) -> Iterator[Callable[[tuple[str, Tensor]], tuple[str, Tensor]]]:
    """What passes through the function moves a progress bar on."""
    if not wanted:
        yield lambda pair: pair
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("targets", total=total)

        def step(pair: tuple[str, Tensor]) -> tuple[str, Tensor]:
            bar.advance(task)
            return pair

        yield step
