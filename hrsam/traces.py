"""Click traces: every click, IoU and mask hash of an evaluation, one line of JSON a sample.

The first line of a file is its head, which says what was played; lines of two files with equal heads may be put together.
A trace can be played again with another model, and scored by anybody without a model: it holds the last mask too.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hrsam import rle
from hrsam.checkpoint import write_atomically
from hrsam.clicks import Click

FORMAT = 1
MAX_LINE = 64 * 2**20
"""Longest line read, in bytes."""


@dataclass(frozen=True)
class Trace:
    """One sample played.

    ``size`` (H, W); ``object``: pixels of the true object.  ``clicks``, ``ious``, ``masks`` have one entry a step:
    [x, y, 1 or 0] in pixels of the picture or None when nothing was wrong, the IoU then, :func:`mask_hash` of the mask.
    ``boundary_ious`` and ``thin_recall`` after some of the steps, by their number; thin recall is None where nothing is
    thin.  ``final``: the last mask as COCO's RLE.  ``seconds``: encode, and decode, user and metric of all steps.
    """

    name: str
    group: str
    size: tuple[int, int]
    object: int
    clicks: tuple[tuple[float, float, int] | None, ...]
    ious: tuple[float, ...]
    masks: tuple[str, ...]
    boundary_ious: dict[str, float] = field(default_factory=dict)
    thin_recall: dict[str, float | None] = field(default_factory=dict)
    final: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def line(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False)

    def click_at(self, step: int) -> Click | None:
        click = self.clicks[step]
        return None if click is None else Click(click[0], click[1], bool(click[2]))


def mask_hash(mask: np.ndarray) -> str:
    """First 16 hexadecimal digits of the SHA-256 of size and bits of a mask (H, W) bool."""
    return hashlib.sha256(f"{mask.shape[0]}x{mask.shape[1]}:".encode() + np.packbits(mask).tobytes()).hexdigest()[:16]


def traces_hash(traces: Iterable[Trace]) -> str:
    """SHA-256 of what was clicked and answered, whatever the order of the samples and the time it took."""
    whole = hashlib.sha256()
    for trace in sorted(traces, key=lambda trace: trace.name):
        said = [trace.name, trace.size, trace.clicks, trace.ious, trace.masks]
        whole.update(json.dumps(said, separators=(",", ":")).encode() + b"\n")
    return whole.hexdigest()


def write_traces(path: Path, head: dict[str, Any], traces: Iterable[Trace]) -> None:
    """Write a whole file, atomically."""
    lines = [head_line(head), *(trace.line() for trace in traces)]
    write_atomically(path, lambda file: file.write(("\n".join(lines) + "\n").encode()))


def head_line(head: dict[str, Any]) -> str:
    return json.dumps({"format": FORMAT, **head}, separators=(",", ":"), sort_keys=True)


def read_traces(path: str | Path, *, torn: bool = False) -> tuple[dict[str, Any], list[Trace]]:
    """(head, traces) of a file.  ``torn``: a last line that was cut off is left out instead of refused.

    Raises ``ValueError``, one sentence naming the file and the line, for everything that is not a trace file of this
    format.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give the traces.jsonl that hrsam evaluate wrote")
    head: dict[str, Any] | None = None
    traces: list[Trace] = []
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE):
            number += 1
            if not raw.endswith(b"\n") and torn:
                break
            try:
                value = json.loads(raw)
                if head is None:
                    head = _head(value)
                else:
                    traces.append(_trace(value))
            except (ValueError, RecursionError, OverflowError) as error:
                raise ValueError(f"{path}, line {number} is not a trace ({str(error)[:200]})") from None
    if head is None:
        if torn:
            return {}, []
        raise ValueError(f"{path} is empty; give the traces.jsonl that hrsam evaluate wrote")
    if len({trace.name for trace in traces}) != len(traces):
        raise ValueError(f"{path} holds a sample twice; it was put together by hand")
    return head, traces


def _head(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(f"the first line must be a head of format {FORMAT}")
    return {key: entry for key, entry in value.items() if key != "format"}


def _trace(value: Any) -> Trace:
    if not isinstance(value, dict) or value.keys() != Trace.__dataclass_fields__.keys():
        raise ValueError(f"expected the keys {', '.join(Trace.__dataclass_fields__)}")
    name, group, size, clicks, ious, masks = (
        value[key] for key in ("name", "group", "size", "clicks", "ious", "masks")
    )
    if not (isinstance(name, str) and isinstance(group, str) and _numbers(size, 2) and min(size) >= 1):
        raise ValueError("name and group must be text and size [height, width]")
    if not (isinstance(clicks, list) and all(click is None or _numbers(click, 3) for click in clicks)):
        raise ValueError("clicks must be [x, y, 1 or 0] or null")
    if not (_numbers(ious, len(clicks)) and all(0 <= v <= 1 for v in ious)):
        raise ValueError("there must be an IoU from 0 to 1 for each click")
    if not (isinstance(masks, list) and len(masks) == len(clicks) and all(isinstance(m, str) for m in masks)):
        raise ValueError("there must be a mask hash for each click")
    tables = [value[key] for key in ("boundary_ious", "thin_recall", "final", "seconds")]
    if not all(isinstance(table, dict) for table in tables) or type(value["object"]) is not int:
        raise ValueError("boundary_ious, thin_recall, final and seconds must be tables, object a whole number")
    if tables[2]:
        rle.decode(tables[2])
    steps = tuple(None if click is None else (click[0], click[1], int(click[2])) for click in clicks)
    return Trace(name, group, (size[0], size[1]), value["object"], steps, tuple(ious), tuple(masks), *tables)


def _numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in value)
    )


def in_order(traces: Sequence[Trace], names: Sequence[str]) -> list[Trace]:
    """The traces of ``names``, in their order."""
    known = {trace.name: trace for trace in traces}
    return [known[name] for name in names if name in known]
