"""What goes over the WebSocket: text in, a JSON header and the outline of a mask out."""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hrsam.cutting import Thing
from hrsam.demo import outline
from hrsam.mask import Mask

_UP = 2  # PNG's filter: less the byte above
SHOWN = '{"event":"shown"}'  # the page's message that its picture is on the screen
MOST = 2**53 - 1  # largest whole number that JavaScript keeps exactly


class Request(BaseModel):
    """``seq``: the page's number, repeated in the answer.  ``revision``: the last one it saw.  ``command``: what to do."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    seq: int = Field(ge=0, le=MOST)
    revision: int = Field(ge=0, le=MOST)
    command: dict[str, Any]


def read_request(text: str) -> Request:
    """Parse a message; ``ValueError`` in one sentence."""
    try:
        return Request.model_validate_json(text)
    except ValidationError:
        raise ValueError('a message is {"seq": number, "revision": number, "command": {…}}') from None


def pack(header: Mapping[str, Any], payload: bytes = b"") -> bytes:
    """Length of the header as uint32, little-endian; the header, JSON; the payload."""
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    return struct.pack("<I", len(text)) + text + payload


def unpack(message: bytes) -> tuple[dict[str, Any], bytes]:
    """What :func:`pack` packed; for clients in Python."""
    (length,) = struct.unpack_from("<I", message)
    return json.loads(message[4 : 4 + length]), message[4 + length :]


def describe(thing: Thing, version: int) -> dict[str, Any]:
    """An object as the page knows it; ``version``: revision at which it last changed."""
    mask = thing.mask
    return {
        "id": thing.id,
        "name": thing.name,
        "colour": thing.colour,
        "clicks": [[click.x, click.y, click.positive] for click in thing.clicks],
        "box": None if thing.box is None else list(thing.box),
        "rounds": thing.rounds,
        "can_undo": thing.can_undo,
        "can_redo": thing.can_redo,
        "iou": None if math.isnan(thing.iou) else thing.iou,
        "area": mask.area,
        "bbox": None if mask.bbox is None else list(mask.bbox),
        "version": version,
    }


def draw(thing: Thing, version: int, longest: int, most: int) -> tuple[dict[str, Any], bytes]:
    """The mask's window as header and code of its :mod:`outline <hrsam.demo.outline>`, the mask itself wherever possible.

    ``longest``: most samples along a side of the picture; ``most``: most bytes of the code.  A mask beyond them is sampled:
    ``step``, a power of two, pixels from one sample to the next; ``x``, ``y``: the picture's pixel of the first; ``width``,
    ``height``: samples.  An empty mask has width 0 and no code.
    """
    mask, header = thing.mask, {"object": thing.id, "version": version}
    step = step_for(max(mask.width, mask.height), longest)
    if mask.bbox is None:
        return {**header, "x": 0, "y": 0, "step": step, "width": 0, "height": 0}, b""
    while (code := _code(mask, _box(mask.bbox, step), step, most)) is None:
        step *= 2
    x0, y0, x1, y1 = _box(mask.bbox, step)
    width, height = -((x0 - x1) // step), -((y0 - y1) // step)
    return {**header, "x": x0, "y": y0, "step": step, "width": width, "height": height}, code


def _box(bbox: tuple[int, int, int, int], step: int) -> tuple[int, int, int, int]:
    """``bbox`` from samples of every ``step``-th pixel on."""
    return bbox[0] - bbox[0] % step, bbox[1] - bbox[1] % step, bbox[2], bbox[3]


def _code(mask: Mask, box: tuple[int, int, int, int], step: int, most: int) -> bytes | None:
    """The code of a mask's samples in ``box``; None when it has more than ``most`` bytes, or more runs than they have bits."""
    if step > 1:
        mask = Mask.of(mask.window(*box, step))
        box = 0, 0, mask.width, mask.height
    if mask.starts.size > 2 * 8 * most:
        return None
    code = outline.encode(outline.runs_of(mask, box))
    return code if len(code) <= most else None


def step_for(side: int, longest: int) -> int:
    step = 1
    while side > step * longest:
        step *= 2
    return step


def mask_tile(mask: Mask, level: int, col: int, row: int, side: int) -> bytes:
    """Tile of a mask as 1-bit grey PNG, every 2^level-th pixel of it; ``ValueError`` outside of the picture."""
    reach = side << min(max(level, 0), 31)
    x0, y0 = col * reach, row * reach
    if not (0 <= level < 31 and 0 <= x0 < mask.width and 0 <= y0 < mask.height):
        raise ValueError("there is no such tile")
    return png(mask.window(x0, y0, min(x0 + reach, mask.width), min(y0 + reach, mask.height), 1 << level))


def png(samples: np.ndarray) -> bytes:
    """(h, w) bool as 1-bit grey PNG.

    Each row is stored as its bytes less those of the row above, mostly zeros, which run lengths pack ten times as fast as a
    general compressor, and into less.
    """
    height, width = samples.shape
    packed = np.packbits(samples, axis=1)
    rows = np.empty((height, 1 + packed.shape[1]), np.uint8)
    rows[:, 0] = _UP
    rows[0, 1:] = packed[0]
    np.subtract(packed[1:], packed[:-1], out=rows[1:, 1:])
    packer = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    data = packer.compress(rows.tobytes()) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
