"""Files that a page's user saves: name at the end of the address -> kind of file and what writes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict, Field

from hrsam.clicklog import make_log
from hrsam.demo.desk import View
from hrsam.export import CleanUp, clean, coco_document, write_cutout, write_mask
from hrsam.mask import Mask


@dataclass(frozen=True)
class Export:
    """What is saved: a desk as it is, the names of picture and model."""

    view: View
    picture: str
    model: str


class Options(BaseModel):
    """Of an address: the ``object``, or for ``coco.json`` all; cleaning up as in :class:`hrsam.export.CleanUp`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    object: int = 1
    fill: int = Field(default=0, ge=0, le=10**9)
    drop: int = Field(default=0, ge=0, le=10**9)
    tolerance: float = Field(default=0, ge=0, le=1000)
    polygons: bool = False
    whole: bool = False

    @property
    def how(self) -> CleanUp:
        return CleanUp(self.fill, self.drop, self.tolerance)


def _cleaned(what: Export, options: Options) -> tuple[Mask, int]:
    """The object's mask after cleaning up, and the pixels that made."""
    thing = what.view.objects.get(options.object)
    if thing is None:
        raise ValueError(f"object {options.object} is gone; it was removed or never there")
    mask = clean(thing.mask, options.how)
    return mask, mask.area - thing.mask.area


def _mask(file: BinaryIO, what: Export, options: Options) -> int:
    mask, change = _cleaned(what, options)
    write_mask(file, mask)
    return change


def _cutout(file: BinaryIO, what: Export, options: Options) -> int:
    mask, change = _cleaned(what, options)
    write_cutout(file, mask, what.view.pyramid, whole=options.whole)
    return change


def _coco(file: BinaryIO, what: Export, options: Options) -> float:
    pyramid, objects = what.view.pyramid, what.view.objects.values()
    size = pyramid.height, pyramid.width
    document = coco_document(objects, what.picture, *size, polygons=options.polygons, how=options.how)
    file.write(json.dumps(document).encode())
    return sum(annotation["attributes"]["area_change"] for annotation in document["annotations"])


def _log(file: BinaryIO, what: Export, options: Options) -> int:
    file.write(make_log(what.view.cutting, what.picture, what.model).text())
    return 0


EXPORTS: dict[str, tuple[str, Callable[[BinaryIO, Export, Options], float]]] = {
    "mask.png": ("image/png", _mask),
    "cutout.png": ("image/png", _cutout),
    "coco.json": ("application/json", _coco),
    "log.json": ("application/json", _log),
}  # each returns by how many pixels the objects grew while they were cleaned up
