"""Pictures and masks from files, and masks back into files.

Every picture enters through :func:`read_image`, every mask through :func:`read_mask`: format by content, memory budget
before decoding, one typed error.  Only JPEG, PNG, WebP, TIFF and BMP are opened; rare decoders are where the holes are.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from hrsam.checkpoint import write_atomically

MAX_PIXELS = 400_000_000
"""Largest picture read by default, in pixels; reading one takes about 8 bytes of memory a pixel."""

Source = str | Path | bytes | BinaryIO

_ORIENTATION, _BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 274, 258, 262, 339  # TIFF and EXIF tags
_BAND = 1 << 22  # pixels converted at a time, so that temporary arrays stay small
_PILLOW_LIMIT = 80_000_000  # below the 89 megapixels at which Pillow's own check begins to warn
_pillow_limit_lock = threading.Lock()


class PictureError(ValueError):
    """A picture or mask that cannot be read as asked; the message is one sentence for the user."""


@dataclass(frozen=True, eq=False)
class Picture:
    """``pixels``: (H, W, 3) uint8 RGB, upright.  ``size``: (H, W) in the file, upright.  ``notes``: what was changed to get
    there, one phrase each."""

    pixels: np.ndarray
    size: tuple[int, int]
    notes: tuple[str, ...] = ()


@dataclass
class _Decoded:
    image: Image.Image
    size: tuple[int, int] = (0, 0)  # (H, W) upright, before it was reduced
    bits: int = 8  # per channel, in the file
    unsigned: bool = True
    white_is_zero: bool = False
    notes: list[str] = field(default_factory=list)


def read_image(source: Source, *, max_pixels: int = MAX_PIXELS, long_side: int | None = None) -> Picture:
    """Read any everyday picture as upright 8-bit RGB.

    ``source``: path, encoded bytes, or a binary file (read from where it stands to its end).  JPEG, PNG, WebP, TIFF and
    BMP are recognised by content.  What happens to pictures that are not 8-bit RGB, each time with a note:

    - EXIF orientation is applied, in every format that carries it.
    - 16-bit grey: full range, ``round(v / 257)``, even if the brightest value is small (12-bit TIFF: full range too).
      16-bit colour: the high byte, which is what Pillow decodes (at most one level below ``round(v / 257)``).
    - 32-bit integers and signed 16-bit: smallest value → 0, largest → 255, linear.  Floats: the same, but values that
      all lie in [0, 1] are multiplied by 255.  NaN and infinity are refused.
    - Alpha, transparent palette entries and transparent key colours are composited on white.
    - CMYK (Adobe's inverted JPEG included) and YCbCr are converted without a colour profile; ICC profiles are ignored.
    - Animations and multi-page files: the first frame.

    ``long_side``: that many pixels are enough, so a JPEG that is 2, 4 or 8 times as long comes smaller by that factor, made
    of its low frequencies, with a note; its sides are rounded to whole pixels.

    Raises :class:`PictureError` for everything that cannot be read: missing, empty, truncated, of another format, or
    more than ``max_pixels`` pixels (known from the header, before anything is decoded).
    """
    with _decoded(source, max_pixels, long_side) as decoded:
        return Picture(_rgb8(decoded), decoded.size, tuple(decoded.notes))


def probe(source: str | Path | bytes) -> tuple[str, int, int]:
    """Kind ("JPEG", "PNG", "WEBP", "TIFF" or "BMP"), width and height as stored, from the header; nothing is decoded.

    Raises :class:`PictureError` as :func:`read_image`, for what the header shows.
    """
    with _reading(source), _binary(source) as file:
        image = _plugin(file.read(32))
        file.seek(0)
        opened = image(file)
        return str(opened.format), *opened.size


def read_labels(source: Source, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a label picture: (H, W) values as stored, upright.

    1-bit gives 0 and 1; 8-bit grey, palette (the index), 16-bit, 32-bit and float give their values (2- and 4-bit grey
    is spread over 0…255 by Pillow); colour gives the maximum over its channels, and 0 where alpha is 0.  16-bit colour
    is refused: Pillow drops its low bytes, in which labels live.  Errors and ``source`` as in :func:`read_image`.
    """
    with _decoded(source, max_pixels) as decoded:
        image = decoded.image
        if image.mode in ("1", "P"):
            return np.array(image, dtype=np.uint8)
        if image.mode.startswith("I") or image.mode == "F":
            return _numbers(decoded, image).copy()
        if image.mode not in ("L", "LA", "PA", "RGB", "RGBA"):
            raise PictureError(f"a mask cannot be {image.mode}; save it as 8-bit grey PNG")
        if decoded.bits > 8:
            raise PictureError("a mask with 16-bit colour loses its low bytes on reading; save it as 16-bit grey PNG")
        values = np.array(image)
        if image.mode in ("L", "RGB"):
            return values if image.mode == "L" else values.max(axis=2)
        return values[..., :-1].max(axis=2) * (values[..., -1] > 0)


def read_mask(source: Source, *, threshold: float | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read an object mask: (H, W) bool from the values of :func:`read_labels`.

    ``threshold=None``: every value but 0 is object.  Otherwise values **above** ``threshold``, in the file's own unit
    (give 127 for a mask saved as JPEG, whose background is not exactly 0).
    """
    labels = read_labels(source, max_pixels=max_pixels)
    return labels != 0 if threshold is None else labels > threshold


@contextmanager
def _decoded(source: Source, max_pixels: int, long_side: int | None = None) -> Iterator[_Decoded]:
    """The first frame of ``source``, upright."""
    with _reading(source), _binary(source) as file:
        yield _decode(file, max_pixels, long_side)


@contextmanager
def _reading(source: Source) -> Iterator[None]:
    """Whatever goes wrong inside leaves as PictureError."""
    name = str(source) if isinstance(source, (str, Path)) else "picture"
    try:
        yield
    except PictureError as error:
        raise PictureError(f"{name}: {error}") from error.__cause__
    except Exception as error:  # decoders fail in many ways: OSError, SyntaxError, struct.error, MemoryError, …
        reason = str(error) or type(error).__name__
        raise PictureError(f"{name}: cannot be read ({reason}); the file is damaged or of a rare kind") from error


def _binary(source: Source) -> BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, (str, Path)):
        path = Path(source)
        try:
            if not path.exists():
                raise PictureError("there is no such file; check the path")
            if not path.is_file():  # a named pipe would block for ever
                raise PictureError("not a file but a folder or a device; give the path of a picture")
            return path.open("rb")
        except OSError as error:
            raise PictureError(f"cannot be opened ({error.strerror})") from error
    data = source.read() if hasattr(source, "read") else None
    if not isinstance(data, bytes):
        raise PictureError(f"got {type(source).__name__}; give a path, bytes or a file opened in binary mode")
    return io.BytesIO(data)


def _decode(file: BinaryIO, max_pixels: int, long_side: int | None) -> _Decoded:
    header = file.read(32)
    file.seek(0)
    # Plugin classes and not Image.open: its pixel limit is one number for the whole process, ours is an argument.
    image = _plugin(header)(file)
    width, height = image.size
    if width * height > max_pixels:
        raise PictureError(
            f"{width}x{height} is {width * height / 1e6:.0f} megapixels, the limit is {max_pixels / 1e6:.0f}; "
            "shrink the picture or raise max_pixels"
        )
    decoded = _Decoded(image)
    scale = 1
    if long_side is not None and isinstance(image, JpegImageFile):
        scale = _reduce(image, long_side)
    orientation = 1
    if isinstance(image, TiffImageFile):
        tags = image.tag_v2
        orientation = tags.get(_ORIENTATION, 1)  # Pillow turns a TIFF while loading and forgets the tag
        decoded.bits = max(tags.get(_BITS, (1,)))
        decoded.unsigned = tags.get(_SAMPLE_FORMAT, (1,))[0] == 1
        decoded.white_is_zero = tags.get(_PHOTOMETRIC) == 0
    elif isinstance(image, PngImageFile):
        decoded.bits = header[24]
    if getattr(image, "is_animated", False):  # not n_frames: counting hostile TIFF pages takes quadratic time
        decoded.notes.append("first of several frames")
    _load(image)
    if scale > 1:
        decoded.image = image.crop((0, 0, int(width / scale + 0.5), int(height / scale + 0.5)))
        decoded.notes.append(f"decoded at 1/{scale} of its size")
    turned = _orient(decoded, orientation) in range(5, 9)
    decoded.size = decoded.image.height, decoded.image.width
    if scale > 1:
        decoded.size = (width, height) if turned else (height, width)
    return decoded


def _plugin(header: bytes) -> type[ImageFile.ImageFile]:
    if not header:
        raise PictureError("the file is empty")
    if header.startswith(b"\xff\xd8\xff"):
        return JpegImageFile
    if header.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile
    if header[:4] == b"RIFF" and header[8:12] == b"WEBP":
        return WebPImageFile
    if header[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return TiffImageFile
    if header.startswith(b"BM"):
        return BmpImageFile
    raise PictureError(f"not a JPEG, PNG, WebP, TIFF or BMP picture (begins with {header[:8]!r}); convert it to one")


def _reduce(image: JpegImageFile, long_side: int) -> int:
    """Choose the scale 1/2, 1/4 or 1/8 at which libjpeg decodes, sides rounded up; returns its denominator, 1 for none."""
    for scale in (8, 4, 2):
        if min(image.size) >= scale and max(image.size) >= scale * long_side:
            image.draft(None, (image.width // scale, image.height // scale))
            return scale
    return 1


def _load(image: ImageFile.ImageFile) -> None:
    if image.width * image.height <= _PILLOW_LIMIT:
        image.load()
        return
    with _pillow_limit_lock:  # TIFF asks Pillow's global limit again here; ours has been checked
        kept, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image.load()
        finally:
            Image.MAX_IMAGE_PIXELS = kept


def _orient(decoded: _Decoded, orientation: int) -> int:
    """Turn the loaded picture upright; ``orientation`` is what Pillow has already applied.  Returns what has been applied."""
    try:
        left = decoded.image.getexif().get(_ORIENTATION, 1)
    except Exception:
        decoded.notes.append("unreadable EXIF, orientation unknown")
        return orientation
    if left in range(2, 9):
        decoded.image = ImageOps.exif_transpose(decoded.image)
        orientation = left
    if orientation in range(2, 9):
        decoded.notes.append(f"EXIF orientation {orientation} applied")
    return orientation


def _numbers(decoded: _Decoded, image: Image.Image) -> np.ndarray:
    """Values of a 16-bit, 32-bit or float image or of a band of it: (h, w) uint16, int32, uint32 or float32."""
    values = np.asarray(image)
    if image.mode == "F":
        if not np.isfinite(values).all():
            raise PictureError("has NaN or infinite values; replace them before saving")
        return values
    if decoded.bits <= 16 and decoded.unsigned:
        values = values.astype(np.uint16)
        return (1 << decoded.bits) - 1 - values if decoded.white_is_zero else values
    return values.view(np.uint32) if decoded.unsigned else values


def _bands(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    rows = max(1, _BAND // image.width)
    if rows >= image.height:
        yield slice(0, image.height), image
        return
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        yield slice(top, bottom), image.crop((0, top, image.width, bottom))


def _rgb8(decoded: _Decoded) -> np.ndarray:
    image, notes = decoded.image, decoded.notes
    out = np.empty((image.height, image.width, 3), np.uint8)
    if image.mode.startswith("I") or image.mode == "F":
        _scale(decoded, out)
        return out
    if decoded.bits > 8:
        notes.append(f"{decoded.bits}-bit colour cut to its high bytes")
        if image.info.pop("transparency", None) is not None:
            notes.append("transparent 16-bit key colour ignored")
    elif decoded.bits in (2, 4) and image.mode == "L" and "transparency" in image.info:
        image.info["transparency"] *= 255 // ((1 << decoded.bits) - 1)  # Pillow spreads the pixels, not the key
    if image.mode in ("CMYK", "YCbCr"):
        notes.append(f"{image.mode} converted without a colour profile")
    see_through = image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info
    composited = False
    for rows, band in _bands(image):
        if see_through:
            band = band.convert("RGBA")
            alpha = band.getchannel("A")
            composited |= alpha.getextrema() != (255, 255)
            white = Image.new("RGB", band.size, "white")
            white.paste(band, mask=alpha)
            band = white
        out[rows] = np.asarray(band if band.mode == "RGB" else band.convert("RGB"))
    if composited:
        notes.append("alpha composited on white")
    return out


def _scale(decoded: _Decoded, out: np.ndarray) -> None:
    """Fill ``out`` (H, W, 3) with the grey levels of a 16-bit, 32-bit or float picture."""
    image = decoded.image
    extremes = [(v.min(), v.max()) for v in (_numbers(decoded, band) for _, band in _bands(image))]
    low, high = float(min(e[0] for e in extremes)), float(max(e[1] for e in extremes))
    if image.mode != "F" and decoded.bits <= 16 and decoded.unsigned:
        full = (1 << decoded.bits) - 1
        decoded.notes.append(f"{decoded.bits}-bit grey scaled by 255/{full}, brightest value {high:.0f}")
        low, high = 0.0, float(full)
    elif image.mode == "F" and low >= 0 and high <= 1:
        decoded.notes.append("float values in [0, 1] scaled by 255")
        low, high = 0.0, 1.0
    else:
        decoded.notes.append(f"values from {low:.6g} to {high:.6g} stretched to 0…255")
    key = image.info.get("transparency")
    for rows, band in _bands(image):
        values = _numbers(decoded, band)
        grey = (values.astype(np.float64) - low) * (255 / (high - low) if high > low else 0)
        grey = np.rint(grey, out=grey).astype(np.uint8)
        if key is not None:
            grey[values == key] = 255
        out[rows] = grey[..., None]
    if key is not None:
        decoded.notes.append("alpha composited on white")


def write_png(path: str | Path, array: np.ndarray) -> None:
    """Write a PNG so that ``path`` holds either its old content or the whole new picture, whatever happens.

    ``array``: (H, W) bool, written as 8-bit grey 0 and 255; (H, W), (H, W, 3) or (H, W, 4) uint8, written as grey, RGB
    and RGBA.  Raises ``ValueError`` for other arrays and for names that do not end in ``.png``, ``OSError`` when the
    folder is missing, read-only or full.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"got the name {path.name!r}; masks and overlays are PNG files, end it in .png")
    array = np.asarray(array)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    channels = array.shape[2:]
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in ((), (3,), (4,)) or not array.size:
        raise ValueError(f"got {array.dtype} {array.shape}; give (H, W) bool or (H, W[, 3 or 4]) uint8, not empty")
    write_atomically(path, lambda file: Image.fromarray(np.ascontiguousarray(array)).save(file, "PNG"))
