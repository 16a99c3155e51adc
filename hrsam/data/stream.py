"""Training pictures of data sets that do not fit into memory, step by step.

What a step holds is a function of the settings, the seed, the step, the rank and the number of ranks, and of nothing that
happened before: a run goes on where it stopped when it knows its step.  An epoch is a permutation of all pictures; steps
follow one another through the epochs without a gap.  The pictures of a step are the same for any number of ranks.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import AfterValidator, Field, PositiveInt, model_validator

from hrsam.config import Settings
from hrsam.data.bank import Entry, PhotoBank, make_entry
from hrsam.data.datasets import open_dataset
from hrsam.data.index import Item
from hrsam.data.packing import best_fit, longest_first
from hrsam.data.resize import resized
from hrsam.data.shot import CANDIDATES, PATCH, Photo, Shot, Unusable, load_shot
from hrsam.data.steps import Epochs, load_steps
from hrsam.data.transforms import Chance
from hrsam.data.workers import one_ahead

logger = logging.getLogger("hrsam")

Measure = Callable[[int, int], tuple[int, float]]
"""Height and width of a picture in pixels -> (tokens in the packed sequence, cost in any unit)."""


def _whole_order(sides: tuple[int, int]) -> tuple[int, int]:
    if not PATCH <= sides[0] <= sides[1]:
        raise ValueError(f"give two sides of at least {PATCH} pixels, the smaller one first")
    return sides


def _eighths(sides: tuple[int, ...]) -> tuple[int, ...]:
    if not sides or any(side < 8 or side % 8 for side in sides):
        raise ValueError("give sides that are positive multiples of 8")
    return sides


class Source(Settings):
    """A data set: its ``name`` in ``DATASETS`` and its ``root``, folder or annotation file."""

    name: str
    root: str


class Packed(Settings):
    """Whole pictures with their own aspect ratio: the long side drawn from ``sides``, mirrored and recoloured by chance; packs
    of at most ``tokens`` tokens, the anchor map's included."""

    sides: Annotated[tuple[int, int], AfterValidator(_whole_order)] = (640, 2048)
    tokens: PositiveInt = 16384
    mirror: Chance = 0.5
    colour: Chance = 0.5


class Canvases(Settings):
    """Photos for :func:`hrsam.data.transforms.make_batch`: a step's canvases have one of the ``sides``; photos are kept with a
    long side of at most ``photo_side``."""

    sides: Annotated[tuple[int, ...], AfterValidator(_eighths)] = (1024,)
    photo_side: int = Field(default=1024, ge=8, multiple_of=8)


class StreamSettings(Settings):
    """``data``: sets, taken together, so that each counts by its pictures.  ``batch``: pictures a step on all devices together.
    ``packed`` or ``canvases``: the form of a step.  ``objects`` of a picture at most.

    ``on_error``: what is wrong with a file stops the run, or the picture is left out, counted and said.  ``workers``:
    processes that load, 0 for none; ``prefetch``: steps they are ahead; ``patience``: seconds after which a silent one stands
    still.
    """

    data: tuple[Source, ...]
    batch: PositiveInt
    packed: Packed | None = None
    canvases: Canvases | None = None
    objects: PositiveInt = 2
    seed: int = Field(default=0, ge=0)
    on_error: Literal["stop", "skip"] = "stop"
    workers: int = Field(default=2, ge=0)
    prefetch: PositiveInt = 2
    patience: float = Field(default=25.0, gt=0)

    @model_validator(mode="after")
    def _one_form(self) -> StreamSettings:
        if (self.packed is None) == (self.canvases is None):
            raise ValueError("give the form of a step: either packed or canvases, for instance packed={}")
        return self


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A rank's share of a step in ``packs`` for the encoder, none where no picture could be used."""

    step: int
    rank: int
    packs: tuple[tuple[Photo, ...], ...]


@dataclass(frozen=True, eq=False)
class CanvasBatch:
    """A rank's photos of a step, on the CPU, for canvases of ``side`` pixels."""

    step: int
    rank: int
    bank: PhotoBank
    side: int


def patches(height: int, width: int) -> tuple[int, float]:
    """The measure without a model: one token a patch, and as much cost."""
    count = -(-height // PATCH) * -(-width // PATCH)
    return count, float(count)


class Stream:
    """Batches of a ``world`` of ranks.  ``measure``: what a picture costs the encoder, for packs and equal work on all ranks.
    ``pictures``: those of another stream of the same sets, which then need not be read again.  ``pin``: canvases' photos in
    page-locked memory, for CUDA.

    ``skipped``: pictures left out so far.  Raises ``ValueError`` for sets that cannot be read, fewer pictures a step than
    ranks, and canvases that cannot be shared equally.
    """

    def __init__(
        self,
        settings: StreamSettings,
        *,
        world: int = 1,
        measure: Measure = patches,
        pictures: Sequence[tuple[Path, tuple[Item, ...]]] | None = None,
        pin: bool = False,
    ):
        if settings.batch < world or (settings.canvases and settings.batch % world):
            need = f"a multiple of {world}" if settings.canvases else f"at least {world}"
            raise ValueError(f"got {settings.batch} pictures a step for {world} devices; give {need}")
        self.settings, self.world, self.measure, self.pin = settings, world, measure, pin
        self.pictures = _pictures(settings) if pictures is None else pictures
        self.skipped = 0
        self._long_said = False
        self._epochs = Epochs(len(self.pictures), settings.seed)

    def __len__(self) -> int:
        """Pictures of an epoch."""
        return len(self.pictures)

    @property
    def content(self) -> str:
        """16 letters that change with the pictures' names and sizes in bytes and their number of objects."""
        lines = (f"{p.parent.name}/{p.name} {p.stat().st_size} {len(items)}" for p, items in self.pictures)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def shots(self, step: int, rank: int = 0) -> list[Shot]:
        """What a rank loads for a step; nothing is decoded.

        Packed pictures are dealt by cost, the costliest first, by the size in the head of their file.
        """
        shots = [
            self._shot(position) for position in range(step * self.settings.batch, (step + 1) * self.settings.batch)
        ]
        if self.settings.canvases or self.world == 1:
            return shots[rank :: self.world]
        costs = [self.measure(*resized(*_size(shot), shot.side, shot.enlarge))[1] for shot in shots]
        return [shots[index] for index in longest_first(costs, self.world)[rank]]

    def batch(self, step: int, rank: int = 0) -> PackedBatch | CanvasBatch:
        """A rank's batch of a step, loaded here and now."""
        return self._batch(step, rank, [self._load(shot) for shot in self.shots(step, rank)])

    def batches(self, first: int = 0, ranks: Sequence[int] = (0,)) -> Generator[PackedBatch | CanvasBatch, None, None]:
        """:meth:`batch` of ``first`` and all steps after it, for each of the ``ranks``; close it to end what loads them.

        With processes they are loaded ahead, and a thread puts the next batch together while the caller works on one.

        Raises ``ValueError`` that names a file, and :class:`hrsam.data.workers.WorkerError` that names the file of a process
        which died or stands still.
        """
        broken: Future[None] = Future()
        made = self._made(first, ranks, broken)
        return one_ahead(made, broken) if self.settings.workers else made

    def _made(
        self, first: int, ranks: Sequence[int], broken: Future[None]
    ) -> Generator[PackedBatch | CanvasBatch, None, None]:
        settings = self.settings
        steps = load_steps(
            self._load, self.shots, ranks, first, workers=settings.workers,
            most=settings.prefetch * len(ranks) * -(-settings.batch // self.world), patience=settings.patience,
            name=lambda shot: str(shot.picture), broken=broken,
        )  # fmt: skip
        with closing(steps):
            for step, rank, loaded in steps:
                yield self._batch(step, rank, loaded)

    @property
    def _load(self) -> Callable[[Shot], Photo | Entry | Unusable]:
        return load_shot if self.settings.canvases is None else load_entry

    def _shot(self, position: int) -> Shot:
        """``position``: number of pictures of all ranks before this one since the first step."""
        picture, items = self.pictures[self._epochs.at(position)]
        rng = self._rng(1, position)
        order = np.argsort(rng.random(len(items)), kind="stable")[:CANDIDATES]
        objects, packed, canvases = self.settings.objects, self.settings.packed, self.settings.canvases
        side, mirror, colour = 0, 0.0, 0.0  # canvases are mirrored and recoloured when they are made
        if packed is not None:
            side, mirror, colour = int(rng.integers(packed.sides[0], packed.sides[1] + 1)), packed.mirror, packed.colour
        elif canvases is not None:
            side = canvases.photo_side
        chosen, seed = tuple(items[i] for i in order), int(rng.integers(2**63))
        return Shot(picture, chosen, objects, side, packed is not None, mirror, colour, seed)

    def _rng(self, what: int, *place: int) -> np.random.Generator:
        """``what`` is drawn: 1 what happens to a picture, 2 a step's side; 0 is the order of an epoch."""
        return np.random.default_rng([what, self.settings.seed, *place])

    def _batch(self, step: int, rank: int, loaded: Sequence[Photo | Entry | Unusable]) -> PackedBatch | CanvasBatch:
        usable: list[Photo | Entry] = []
        for photo in loaded:
            if not isinstance(photo, Unusable):
                usable.append(photo)
            elif self.settings.on_error == "stop":
                raise ValueError(f"{photo.why}; or leave such pictures out with on_error=skip")
            else:
                self.skipped += 1
                logger.warning("step %d: left out, %s (%d so far)", step, photo.why, self.skipped)
        if self.settings.canvases is not None:
            sides = self.settings.canvases.sides
            if not usable:
                raise ValueError(
                    f"none of the {len(loaded)} pictures of step {step} can be used; see the warnings above"
                )
            side = sides[self._rng(2, step).integers(len(sides))]
            entries = [entry for entry in usable if isinstance(entry, Entry)]
            return CanvasBatch(step, rank, PhotoBank.of(entries, self.settings.canvases.photo_side, pin=self.pin), side)
        assert self.settings.packed is not None
        photos = [photo for photo in usable if isinstance(photo, Photo)]
        tokens, most = [self.measure(*photo.pixels.shape[:2])[0] for photo in photos], self.settings.packed.tokens
        if max(tokens, default=0) > most and not self._long_said:
            self._long_said = True
            logger.warning("%d tokens of a picture are more than a pack of %d; such are packs alone", max(tokens), most)
        return PackedBatch(step, rank, tuple(tuple(photos[i] for i in pack) for pack in best_fit(tokens, most)))


def load_entry(shot: Shot) -> Entry | Unusable:
    """:func:`hrsam.data.shot.load_shot` for a bank of photos."""
    photo = load_shot(shot)
    return photo if isinstance(photo, Unusable) else make_entry(photo.pixels, photo.masks, photo.name)


def _pictures(settings: StreamSettings) -> list[tuple[Path, tuple[Item, ...]]]:
    """All pictures with their objects, in the order of the sets."""
    found: dict[tuple[int, Path], list[Item]] = {}
    for number, source in enumerate(settings.data):
        dataset = open_dataset(source.name, source.root)
        if dataset.problems:
            first = dataset.problems[0]
            said = f"{source.name} in {source.root}: {first.where} {first.text} ({len(dataset.problems)} such problems)"
            if settings.on_error == "stop":
                raise ValueError(f"{said}; repair the set, or leave them out with on_error=skip")
            logger.warning("left out: %s", said)
        for item in dataset.items:
            found.setdefault((number, item.picture), []).append(item)
    if not found:
        raise ValueError("the data sets hold no picture with an object; give at least one in data")
    return [(picture, tuple(items)) for (_, picture), items in found.items()]


@lru_cache(maxsize=1 << 20)
def _head(path: Path) -> tuple[int, int] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pictures that are large
            with Image.open(path, formats=("JPEG", "PNG", "WEBP", "TIFF", "BMP")) as image:
                return image.height, image.width
    except Exception:  # decoders fail in many ways; what is wrong is told when the picture is read
        return None


def _size(shot: Shot) -> tuple[int, int]:
    """Height and width, the sides perhaps exchanged; a square where the file does not say."""
    return _head(shot.picture) or (shot.side, shot.side)
