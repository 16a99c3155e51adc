"""One picture, a few clicks, files out: what ``hrsam predict`` does."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hrsam import rle
from hrsam.checkpoint import write_atomically
from hrsam.clicklog import ClickLog, replay
from hrsam.clicks import Click
from hrsam.export import write_mask
from hrsam.images import read_image, write_png
from hrsam.models.model import HRSAM
from hrsam.overlay import overlay
from hrsam.pyramid import open_pyramid
from hrsam.session import Box, Session


@dataclass(frozen=True)
class Cut:
    """The last mask (H, W) bool, and the report that goes into the JSON file."""

    mask: np.ndarray
    report: dict[str, Any]


def cut_out(model: HRSAM, pixels: np.ndarray, clicks: Sequence[Click], box: Box | None = None, side: int = 1024) -> Cut:
    """Play ``box`` first, then the clicks one by one, as a person would.

    The report holds for each round the prompt, the mask as COCO run lengths, the predicted IoU and milliseconds.
    Raises ``ValueError`` when there is neither a click nor a box, or one lies outside the picture.
    """
    if not clicks and box is None:
        raise ValueError("there is nothing to go by; give at least one --click X,Y or a --box X0,Y0,X1,Y1")
    session = Session(model, side)
    picture = session.set_image(pixels)
    rounds = []

    def note(prompt: dict[str, Any]) -> None:
        last = session.rounds[-1].prediction
        rounds.append(
            {
                **prompt,
                "mask": rle.encode(last.mask),
                "area": int(last.mask.sum()),
                "predicted_iou": round(last.iou, 4),
                "decode_ms": round(1000 * last.seconds, 2),
            }
        )

    if box is not None:
        session.box(*box)
        note({"box": list(box)})
    for click in clicks:
        session.click(click.x, click.y, click.positive)
        note({"click": [click.x, click.y], "positive": click.positive})
    report = {
        "model": model.config.preset,
        "side": side,
        "width": pixels.shape[1],
        "height": pixels.shape[0],
        "device": str(model.device),
        "encode_ms": round(1000 * picture.seconds, 2),
        "rounds": rounds,
    }
    return Cut(session.mask, report)


def predict_file(
    photo: Path,
    clicks: Sequence[Click],
    box: Box | None,
    model: HRSAM,
    *,
    side: int = 1024,
    out: Path | None = None,
    overlay_out: Path | None = None,
    json_out: Path | None = None,
) -> Cut:
    """Read ``photo``, cut, and write what was asked for: a 0/255 PNG mask, an overlay picture, a JSON report.

    All names are checked first; files are written after the last round succeeded, each whole or not at all.
    """
    _check_targets((photo,), out, overlay_out, json_out)
    picture = read_image(photo)
    cut = cut_out(model, picture.pixels, clicks, box, side)
    report = {"photo": photo.name, "notes": list(picture.notes), **cut.report}
    if out is not None:
        write_png(out, cut.mask)
    if overlay_out is not None:
        write_png(overlay_out, overlay(picture.pixels, cut.mask, clicks))
    if json_out is not None:
        write_atomically(json_out, lambda file: file.write(json.dumps(report, indent=1).encode()))
    return Cut(cut.mask, report)


def replay_file(
    photo: Path,
    log: ClickLog,
    log_file: Path,
    model: HRSAM,
    *,
    out: Path,
    overlay_out: Path | None = None,
    json_out: Path | None = None,
) -> dict[Path, int]:
    """Do again what ``log``, read from ``log_file``, says of ``photo``; returns the masks written and their areas.

    Every object gets a 0/255 PNG whose name ends in its number: ``mask.png`` becomes ``mask-1.png``, ``mask-2.png``, ….
    The overlay shows all of them, the JSON report lists them.  Names are checked first, files are written last.
    """
    _check_targets((photo, log_file), out, overlay_out, json_out)
    pyramid = open_pyramid(photo)
    try:
        if overlay_out is not None and pyramid.pixels is None:
            raise ValueError(f"{photo} is too large for an overlay; leave out --overlay")
        cutting = replay(log, model, pyramid)
        things = list(cutting.objects.values())
        names = {thing.id: out.with_name(f"{out.stem}-{thing.id}{out.suffix}") for thing in things}
        for name in names.values():
            _check_targets((photo, log_file, *filter(None, (overlay_out, json_out))), name, None, None)
        for thing in things:
            write_atomically(names[thing.id], lambda file, mask=thing.mask: write_mask(file, mask))
        if overlay_out is not None:
            assert pyramid.pixels is not None
            drawn = pyramid.pixels
            for thing in things:
                red, green, blue = bytes.fromhex(thing.colour[1:])
                drawn = overlay(drawn, thing.mask.array(), thing.clicks, colour=(red, green, blue))
            write_png(overlay_out, drawn)
        if json_out is not None:
            report = {
                "photo": photo.name,
                "notes": list(pyramid.notes),
                "model": model.config.preset,
                "side": log.side,
                "width": pyramid.width,
                "height": pyramid.height,
                "device": str(model.device),
                "objects": [
                    {
                        "id": thing.id,
                        "name": thing.name,
                        "mask": thing.mask.rle(),
                        "area": thing.mask.area,
                        "predicted_iou": None if thing.iou != thing.iou else round(thing.iou, 4),
                    }
                    for thing in things
                ],
            }
            write_atomically(json_out, lambda file: file.write(json.dumps(report, indent=1).encode()))
        return {names[thing.id]: thing.mask.area for thing in things}
    finally:
        pyramid.close()


def _check_targets(sources: Sequence[Path], out: Path | None, overlay_out: Path | None, json_out: Path | None) -> None:
    taken = [source.resolve() for source in sources]
    for path in (out, overlay_out, json_out):
        if path is None:
            continue
        if path is not json_out and path.suffix.lower() != ".png":
            raise ValueError(f"cannot write {path}: masks and overlays are PNG files, end the name in .png")
        if not path.parent.is_dir():
            raise ValueError(f"cannot write {path}: there is no folder {path.parent}; make it first")
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(f"cannot write {path}: it is a folder or lies in one that is read-only; give another name")
        if path.resolve() in taken:
            raise ValueError(f"cannot write {path}: it is the photo or another result; give each a name of its own")
        taken.append(path.resolve())
