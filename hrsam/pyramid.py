"""A picture at every scale: tiles to look at, native pixels of any place, and the whole at the model's side.

Everyday pictures are read whole by Pillow.  Beyond ``images.MAX_PIXELS`` pyvips (the extra ``huge``) turns the file once
into tiles on the disk, and memory holds only what is being looked at.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hrsam.frame import Frame
from hrsam.images import MAX_PIXELS, PictureError, probe, read_image

TILE = 512
"""Side of a tile in pixels."""
MAX_SIDE = 30_000
"""Longest side in pixels of a picture that does not fit memory."""

_BAND = 1 << 22  # pixels halved at a time
_PART = ".part.tif"  # ends the name of tiles that are being written
_LOADERS = {"JPEG": "jpegload", "PNG": "pngload", "TIFF": "tiffload"}  # of the formats that can be so large


class Pyramid(ABC):
    """Level 0 is the picture in full size, level k has ⌈n / 2^k⌉ pixels where it has n, the last fits one tile.

    ``width``, ``height`` in pixels; ``sha256`` of the file's bytes; ``notes``: what was done to the picture, as
    :func:`hrsam.images.read_image` says it.  ``pixels``: the whole as (H, W, 3) uint8 RGB, read-only, or None when it is not
    in memory.  Reading is safe from several threads.
    """

    pixels: np.ndarray | None = None

    def __init__(self, height: int, width: int, sha256: str, notes: tuple[str, ...] = ()):
        self.height, self.width = height, width
        self.sha256, self.notes = sha256, notes

    @property
    def levels(self) -> int:
        return 1 + (-(-max(self.width, self.height) // TILE) - 1).bit_length()

    def level_size(self, level: int) -> tuple[int, int]:
        """Width and height of a level; ``ValueError`` when there is none of that number."""
        if not 0 <= level < self.levels:
            raise ValueError(f"there is no level {level}; this picture has the levels 0 to {self.levels - 1}")
        return _halved(self.width, level), _halved(self.height, level)

    def tile(self, level: int, col: int, row: int) -> np.ndarray:
        """(h, w, 3) uint8 RGB, h and w ``TILE`` or less at the right and the bottom; ``ValueError`` outside."""
        width, height = self.level_size(level)
        left, top = TILE * col, TILE * row
        if not (0 <= left < width and 0 <= top < height):
            raise ValueError(
                f"there is no tile {col}, {row} on level {level}; "
                f"it has {-(-width // TILE)} columns and {-(-height // TILE)} rows"
            )
        return self._read(level, left, top, min(left + TILE, width), min(top + TILE, height))

    def region(self, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        """Native pixels of a window, (y1 − y0, x1 − x0, 3) uint8 RGB; ``ValueError`` unless it lies in the picture."""
        if not (0 <= x0 < x1 <= self.width and 0 <= y0 < y1 <= self.height):
            raise ValueError(
                f"got the region {x0}, {y0}, {x1}, {y1}; it must lie in the picture of {self.width}x{self.height} pixels"
            )
        return self._read(0, x0, y0, x1, y1)

    @abstractmethod
    def overview(self, side: int) -> np.ndarray | None:
        """The whole at :attr:`Frame.resized` for a longest side of ``side``; None when it is in memory, in ``pixels``."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the pixels; nothing can be read afterwards."""

    @abstractmethod
    def _read(self, level: int, x0: int, y0: int, x1: int, y1: int) -> np.ndarray: ...


class InMemory(Pyramid):
    """Of ``pixels`` (H, W, 3) uint8 RGB, which are not copied and become read-only."""

    def __init__(self, pixels: np.ndarray, sha256: str = "", notes: tuple[str, ...] = ()):
        super().__init__(pixels.shape[0], pixels.shape[1], sha256, notes)
        pixels.setflags(write=False)
        self.pixels = pixels
        self._levels = [pixels]
        self._lock = threading.Lock()

    def overview(self, side: int) -> None:
        return None

    def close(self) -> None:
        self.pixels, self._levels = None, []

    def _read(self, level: int, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        with self._lock:
            while len(self._levels) <= level:
                self._levels.append(_half(self._levels[-1]))
            return self._levels[level][y0:y1, x0:x1]


class OnDisk(Pyramid):
    """Of a tiled TIFF whose page k is level k, as :func:`open_pyramid` writes it; ``own``: a folder that goes with it."""

    def __init__(self, path: Path, own: Path | None, height: int, width: int, sha256: str, notes: tuple[str, ...]):
        super().__init__(height, width, sha256, notes)
        vips = _vips()
        self._pages = [vips.Image.tiffload(str(path), page=level) for level in range(self.levels)]
        self._own = own

    def overview(self, side: int) -> np.ndarray:
        import cv2

        height, width = Frame(self.height, self.width, side).resized
        level = 0
        while level + 1 < self.levels and _halved(max(self.height, self.width), level + 1) >= max(height, width):
            level += 1
        whole = self._read(level, 0, 0, *self.level_size(level))
        return cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)

    def close(self) -> None:
        self._pages = []
        if self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)

    def _read(self, level: int, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        try:
            return self._pages[level].crop(x0, y0, x1 - x0, y1 - y0).numpy()
        except _vips().Error as err:
            raise PictureError(f"the tiles of this picture cannot be read ({_reason(err)}); open it again") from None


def open_pyramid(source: str | Path | bytes, *, scratch: Path | None = None) -> Pyramid:
    """Open a picture: path or encoded bytes, JPEG, PNG, WebP, TIFF or BMP by content.

    Up to ``images.MAX_PIXELS`` pixels it is read whole, as :func:`read_image` does.  Larger ones, up to ``MAX_SIDE`` a side,
    8- or 16-bit grey or RGB in JPEG, PNG or TIFF, are cut into tiles on the disk, without loss and with the same rules for
    EXIF, 16 bits and alpha.  The tiles lie in ``scratch`` and are found there the next time; without it in a temporary
    folder that :meth:`Pyramid.close` removes.  They take up to four bytes a pixel.
    Raises :class:`PictureError` as :func:`read_image`, and when pyvips is needed and missing.
    """
    kind, width, height = probe(source)
    if width * height <= MAX_PIXELS:
        picture = read_image(source)
        return InMemory(picture.pixels, _sha256(source), picture.notes)
    name = "picture" if isinstance(source, bytes) else str(source)
    if max(width, height) > MAX_SIDE:
        raise PictureError(
            f"{name}: got {width}x{height} pixels; the longest side may have {MAX_SIDE}: shrink the picture"
        )
    if kind not in _LOADERS:
        raise PictureError(
            f"{name}: a {kind} picture of {width}x{height} pixels cannot be opened; save it as TIFF or PNG"
        )
    try:
        return _open_huge(source, kind, scratch)
    except PictureError as err:
        raise PictureError(f"{name}: {err}") from None


def _open_huge(source: str | Path | bytes, kind: str, scratch: Path | None) -> OnDisk:
    vips, sha256 = _vips(), _sha256(source)
    own = None
    try:
        image, notes = _eight_bit_rgb(_load(source, kind))
        height, width = image.height, image.width
        folder = scratch
        if folder is None:
            folder = own = Path(tempfile.mkdtemp(prefix="hrsam-"))
        path = folder / f"{sha256}.tiles.tif"
        if not path.exists():
            _write_tiles(image, path)
        return OnDisk(path, own, height, width, sha256, notes)
    except BaseException as err:
        if own is not None:
            shutil.rmtree(own, ignore_errors=True)
        if isinstance(err, vips.Error):
            raise PictureError(f"cannot be read ({_reason(err)}); the file is damaged or of a rare kind") from None
        raise


def _vips() -> Any:
    try:
        import pyvips
    except (ImportError, OSError):  # OSError: the package without its library
        raise PictureError(
            f"a picture of more than {MAX_PIXELS / 1e6:.0f} megapixels needs pyvips; run: pip install 'hrsam[huge]'"
        ) from None
    return pyvips


def _load(source: str | Path | bytes, kind: str) -> Any:
    """The picture as a recipe, nothing decoded; only the loader of its format sees the file."""
    vips, name = _vips(), _LOADERS[kind]

    def load(access: str) -> Any:
        if isinstance(source, bytes):
            return getattr(vips.Image, f"{name}_buffer")(source, access=access, fail_on="error")
        return getattr(vips.Image, name)(str(source), access=access, fail_on="error")

    image = load("sequential")
    # Turning needs the last rows first, and so the whole picture on the disk.
    return image if _orientation(image) == 1 else load("random")


def _orientation(image: Any) -> int:
    return image.get("orientation") if image.get_typeof("orientation") else 1


def _eight_bit_rgb(image: Any) -> tuple[Any, tuple[str, ...]]:
    """By the rules of :func:`read_image`, with notes of what was done."""
    notes = []
    if image.interpretation not in ("srgb", "b-w", "rgb16", "grey16") or image.format not in ("uchar", "ushort"):
        raise PictureError(
            f"pictures of this size must be 8- or 16-bit grey or RGB, got {image.interpretation} {image.format}; convert it"
        )
    if (orientation := _orientation(image)) != 1:
        image = image.autorot()
        notes.append(f"EXIF orientation {orientation} applied")
    if image.hasalpha():
        white = 255 if image.format == "uchar" else 65535
        image = image.flatten(background=white)
        notes.append("alpha composited on white")
    if image.format == "ushort" and image.bands == 1:
        image = (image * (255 / 65535)).rint().cast("uchar")
        notes.append("16-bit grey scaled by 255/65535")
    elif image.format == "ushort":
        image = (image >> 8).cast("uchar")
        notes.append("16-bit colour cut to its high bytes")
    if image.bands == 1:
        image = image.bandjoin([image, image])
    return image.copy(interpretation="srgb"), tuple(notes)


def _write_tiles(image: Any, path: Path) -> None:
    """Write ``image`` as a pyramid of tiles, whole or not at all; what killed writers left an hour ago is removed."""
    for old in path.parent.glob(f".*{_PART}"):
        if time.time() - old.stat().st_mtime > 3600:
            old.unlink(missing_ok=True)
    need, free = 4 * image.width * image.height, shutil.disk_usage(path.parent).free
    if free < need:
        raise PictureError(
            f"its tiles may need {need / 1e9:.1f} GB in {path.parent}, which has {free / 1e9:.1f} GB left; make room there"
        )
    # So that each level has exactly half the pixels of the one before: the last row and column are repeated.
    unit = 1 << (-(-max(image.width, image.height) // TILE) - 1).bit_length()
    width, height = (unit * -(-n // unit) for n in (image.width, image.height))
    padded = image.embed(0, 0, width, height, extend="copy")
    part = path.with_name(f".{path.name}.{os.getpid()}{_PART}")
    try:
        padded.tiffsave(  # not compressed: a third of the time, and it is opened once and read often
            str(part),
            tile=True,
            tile_width=TILE,
            tile_height=TILE,
            pyramid=True,
            bigtiff=True,
            region_shrink="mean",
            keep="none",
        )
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _sha256(source: str | Path | bytes) -> str:
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    digest = hashlib.sha256()
    with open(source, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _reason(err: BaseException) -> str:
    """The first thing that libvips says went wrong."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return (lines[1:] or lines or ["no reason given"])[0]


def _halved(pixels: int, level: int) -> int:
    return -(-pixels // (1 << level))


def _half(pixels: np.ndarray) -> np.ndarray:
    """Area mean of 2 x 2 pixels; at an odd right or bottom edge of those that are there."""
    height, width = pixels.shape[:2]
    out = np.empty((_halved(height, 1), _halved(width, 1), 3), np.uint8)
    rows = 2 * max(1, _BAND // width // 2)
    for top in range(0, height, rows):
        band = Image.fromarray(np.ascontiguousarray(pixels[top : top + rows]))
        out[top // 2 : (top + rows) // 2] = np.asarray(band.reduce(2))
    return out
