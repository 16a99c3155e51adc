"""The worst samples of a report, and how one is drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hrsam.overlay import ClickLike
from hrsam.report.values import Report, iou_table, mean_over_clicks

MISSED = (0, 114, 178)
"""RGB of missed object: blue, which with the orange of extra mask is told apart with every kind of colour vision."""

EXTRA = (240, 130, 0)
"""RGB of extra mask."""

_TINT = 0.72
_GREY = 0.6  # how much of the photo's colour is taken away, so that the two tints stand out
_RADIUS = 7.0


@dataclass(frozen=True)
class Case:
    """One picture of the page: ``title``, the sample as in the report, and the bytes of :func:`draw_case`."""

    title: str
    sample: Mapping[str, Any]
    jpeg: bytes


def worst(report: Report, n: int = 12) -> list[dict[str, Any]]:
    """The ``n`` samples with the lowest mean IoU over the clicks, lowest first, equal ones by name.

    Samples without any IoU cannot be ranked and come last.
    """
    samples = report["samples"]
    means = mean_over_clicks(iou_table(samples)) if samples else np.empty(0)
    order = sorted(range(len(samples)), key=lambda i: (np.isnan(means[i]), np.nan_to_num(means[i]), samples[i]["name"]))
    return [samples[i] for i in order[:n]]


def draw_case(
    pixels: np.ndarray,
    truth: np.ndarray,
    mask: np.ndarray,
    clicks: Sequence[ClickLike | Sequence[float] | None],
    long_side: int = 480,
    *,
    ignore: np.ndarray | None = None,
) -> bytes:
    """What is wrong with a mask, as a JPEG whose longest side is ``long_side`` pixels.

    ``pixels`` (H, W, 3) uint8 RGB; ``truth``, ``mask`` and ``ignore`` (pixels that do not count) (H, W) bool; ``clicks``
    in pixels of the picture, objects with x, y, positive or a report's [x, y, 1 or 0], None for a step without a click.
    The photo is greyed, missed object tinted :data:`MISSED`, extra mask :data:`EXTRA`, the truth outlined in white.
    Clicks are dots with their number: white with a plus for object, black with a minus for background.  Errors much
    thinner than a pixel of the drawing are drawn stronger than they are, so that they can be seen.
    """
    import cv2

    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(f"got pixels {pixels.dtype} {pixels.shape}; give (H, W, 3) uint8 RGB")
    for name, array in (("truth", truth), ("mask", mask), ("ignore", ignore)):
        if array is not None and (array.dtype != bool or array.shape != pixels.shape[:2]):
            raise ValueError(f"got {name} {array.dtype} {array.shape}; give bool {pixels.shape[:2]} for this picture")
    height, width = truth.shape
    scale = long_side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    to_drawing = np.array(size) / (width, height)

    def resized(array: np.ndarray) -> np.ndarray:
        return cv2.resize(array, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)

    photo = resized(pixels).astype(np.float32)
    photo += _GREY * (photo.mean(axis=2, keepdims=True) - photo)
    canvas = np.ascontiguousarray(np.rint(photo).astype(np.uint8))
    shift = 4  # fractional bits of OpenCV's coordinates
    contours, _ = cv2.findContours(truth.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    outline = [np.rint(((c + 0.5) * to_drawing - 0.5) * 2**shift).astype(np.int32) for c in contours]
    for colour, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):
        cv2.polylines(canvas, outline, True, colour, thickness, cv2.LINE_AA, shift)
    for wrong, colour in ((truth & ~mask, MISSED), (mask & ~truth, EXTRA)):
        counted = wrong if ignore is None else wrong & ~ignore
        cover = np.clip(3 * resized(counted.astype(np.float32)), 0, 1)[..., None] * _TINT
        canvas = np.rint(canvas + (np.array(colour, np.float32) - canvas) * cover).astype(np.uint8)

    numbered = [(number, *_place(click)) for number, click in enumerate(clicks, 1) if click is not None]
    places = [(number, (np.array((x, y)) + 0.5) * to_drawing - 0.5, positive) for number, x, y, positive in numbered]
    for _, place, positive in reversed(places):  # the first clicks on top
        _dot(canvas, place, positive)
    image = Image.fromarray(canvas)
    _number(image, [(str(number), place) for number, place, _ in places])
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85, optimize=True)
    return file.getvalue()


def _place(click: ClickLike | Sequence[float]) -> tuple[float, float, bool]:
    if isinstance(click, Sequence):
        return click[0], click[1], bool(click[2])
    return click.x, click.y, click.positive


def _dot(canvas: np.ndarray, place: np.ndarray, positive: bool) -> None:
    import cv2

    shift = 4
    fill, ink = ((255, 255, 255), (0, 0, 0)) if positive else ((0, 0, 0), (255, 255, 255))

    def fixed(*values: float) -> tuple[int, ...]:
        return tuple(round(v * 2**shift) for v in values)

    x, y = place
    for radius, colour in ((_RADIUS + 1, ink), (_RADIUS, fill)):
        cv2.circle(canvas, fixed(x, y), fixed(radius)[0], colour, -1, cv2.LINE_AA, shift)
    arm = _RADIUS * 0.55
    cv2.line(canvas, fixed(x - arm, y), fixed(x + arm, y), ink, 2, cv2.LINE_AA, shift)
    if positive:
        cv2.line(canvas, fixed(x, y - arm), fixed(x, y + arm), ink, 2, cv2.LINE_AA, shift)


def _number(image: Image.Image, labels: Sequence[tuple[str, np.ndarray]]) -> None:
    """Write each number at the upper right of its dot, or on another side where the picture ends."""
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=13)
    for text, (x, y) in reversed(labels):
        _, _, width, height = draw.textbbox((0, 0), text, font=font)
        left = x + _RADIUS if x + _RADIUS + width + 2 <= image.width else x - _RADIUS - width
        top = y - _RADIUS - height * 0.7 if y - _RADIUS - height * 0.7 >= 0 else y + _RADIUS * 0.4
        draw.text((left, top), text, font=font, fill="white", stroke_width=2, stroke_fill="black")
