"""Reading ``report.json``, which may come from anywhere: bounded, checked, and refused in one sentence."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
"""The version of the report that this package writes and reads."""

MAX_BYTES = 64 * 2**20
"""Largest report read by default; one of 10,000 samples takes about 12 MiB."""

_MAX_NUMBER = 1e15


@dataclass(frozen=True)
class _Maybe:
    """Null, or ``of``; a key that is only maybe there counts as null."""

    of: Any


@dataclass(frozen=True)
class _List:
    of: Any


@dataclass(frozen=True)
class _Table:
    """Names chosen by the writer -> ``of``; ``numbers``: the names are whole numbers, as in ``{"90": …}``."""

    of: Any
    numbers: bool = False


@dataclass(frozen=True)
class _Number:
    low: float = -_MAX_NUMBER
    high: float = _MAX_NUMBER
    whole: bool = False


_COUNT = _Number(0, whole=True)
_SHARE = _Maybe(_Number(0, 1))
_SECONDS = _Maybe(_Number(0))
_BY_CLICK = _Table(_SHARE, numbers=True)
_SUMMARY = {
    "samples": _COUNT,
    "iou": _List(_SHARE),
    "noc": _Table(_Maybe(_Number(0)), numbers=True),
    "never_reached": _Table(_Maybe(_COUNT), numbers=True),
    "equals_max": _Maybe(_Table(_Maybe(_COUNT), numbers=True)),
    "boundary_iou": _Maybe(_BY_CLICK),
    "thin_recall": _Maybe(_BY_CLICK),
}
_REPORT = {
    "format": _COUNT,
    "made": str,
    "command": _Maybe(str),
    "method": {
        "name": str,
        "kind": _Maybe(str),
        "preset": _Maybe(str),
        "weights_sha256": _Maybe(str),
        "side": _Maybe(_COUNT),
    },
    "protocol": {
        "name": str,
        "rule": str,
        "clicks": _Number(1, 1000, whole=True),
        "threshold": _Maybe(_Number()),
        "ties": _Maybe(str),
        "seed": _Maybe(_Number(whole=True)),
        "text": _List(str),
    },
    "data": {
        "name": str,
        "samples": _COUNT,
        "expected": _Maybe(_COUNT),
        "note": _Maybe(str),
        "sha256": _Maybe(str),
        "problems": _Maybe(_List({"where": str, "text": str})),
    },
    "machine": {
        "device": str,
        "device_name": _Maybe(str),
        "dtype": _Maybe(str),
        "processes": _Maybe(_COUNT),
        "threads": _Maybe(_COUNT),
        "versions": _Maybe(_Table(_Maybe(str))),
    },
    "summary": {"all": _SUMMARY, "groups": _Table(_SUMMARY)},
    "seconds": _Table(_SECONDS),
    "tie_spread": _Maybe(
        {
            "seeds": _List(_Number(whole=True)),
            "noc": _Table(_List(_Maybe(_Number(0))), numbers=True),
            "iou@5": _Maybe(_List(_SHARE)),
        }
    ),
    "trace_sha256": _Maybe(str),
    "samples": _List(
        {
            "name": str,
            "group": _Maybe(str),
            "size": _List(_COUNT),
            "object": _Maybe(_COUNT),
            "clicks": _List(_Maybe(_List(_Number()))),
            "ious": _List(_SHARE),
            "boundary_ious": _Maybe(_BY_CLICK),
            "thin_recall": _Maybe(_BY_CLICK),
        }
    ),
}


def read_report(path: str | Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Read and check the ``report.json`` of an evaluation.

    The result has every key of format 1: what a report may leave out is filled in as ``None``, and so is JSON's ``NaN``
    and ``Infinity``.  Keys that format 1 does not know are kept.  Shares (IoU, recall) lie in [0, 1], each sample has one
    IoU a click of the protocol, clicks are [x, y, 1 or 0] in pixels of the picture, names of samples are unique.
    Raises ``ValueError`` naming the file and the first thing that is wrong.
    """
    path = Path(path)
    try:
        report = _parse(path, max_bytes)
        version = report.get("format")
        if type(version) is not int or version != FORMAT:
            raise ValueError(
                f"the report has format {_cut(version)}, this version reads format {FORMAT}; "
                "evaluate again or use the version that wrote it"
            )
        report = _checked(report, _REPORT, "the report")
        _agrees(report)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return report


def _parse(path: Path, max_bytes: int) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise ValueError("there is no such file; give the report.json that hrsam evaluate wrote")
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror}); check the path and its permissions") from None
    if len(raw) > max_bytes:
        raise ValueError(f"the file is larger than {max_bytes} bytes, too large for a report; raise max_bytes")
    try:
        report = json.loads(raw, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({_cut(str(error))}); give the report.json that hrsam evaluate wrote") from None
    if not isinstance(report, dict):
        raise ValueError(f"holds {_kind(report)}, expected a report; give the report.json that hrsam evaluate wrote")
    return report


def _checked(value: Any, spec: Any, where: str) -> Any:
    """``value`` with missing keys filled in; ``where`` names it in the error."""
    if isinstance(spec, _Maybe):
        return None if value is None else _checked(value, spec.of, where)
    if isinstance(spec, _Number):
        whole = isinstance(value, int) and not isinstance(value, bool)
        fits = whole or (isinstance(value, float) and math.isfinite(value) and not spec.whole)
        if not fits or not spec.low <= value <= spec.high:
            kind = "a whole number" if spec.whole else "a number"
            raise _wrong(where, value, f"{kind} from {spec.low:g} to {spec.high:g}")
        return value
    if spec is str:
        if not isinstance(value, str):
            raise _wrong(where, value, "text")
        return value
    if isinstance(spec, _List):
        if not isinstance(value, list):
            raise _wrong(where, value, "a list")
        return [_checked(item, spec.of, f"{where}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, Mapping):
        raise _wrong(where, value, "a table of names and values")
    if isinstance(spec, _Table):
        for name in value:
            if spec.numbers and not re.fullmatch("[1-9][0-9]{0,3}", name):
                raise ValueError(f"{where} has the name {_cut(name)}, expected whole numbers like 90; it is damaged")
        return {name: _checked(item, spec.of, f"{where}.{name:.40}") for name, item in value.items()}
    missing = [name for name, of in spec.items() if name not in value and not isinstance(of, _Maybe)]
    if missing:
        raise ValueError(f"{where} has no {missing[0]!r}; it is cut off or not a report of hrsam evaluate")
    prefix = "" if where == "the report" else f"{where}."
    return {**value, **{name: _checked(value.get(name), of, prefix + name) for name, of in spec.items()}}


def _agrees(report: dict[str, Any]) -> None:
    """What the parts of a report say of each other."""
    most, samples = report["protocol"]["clicks"], report["samples"]
    summaries = {"summary.all": report["summary"]["all"]}
    summaries |= {f"summary.groups.{name:.40}": part for name, part in report["summary"]["groups"].items()}
    for where, part in summaries.items():
        if len(part["iou"]) != most:
            raise ValueError(f"{where}.iou has {len(part['iou'])} means for {most} clicks; the report is damaged")
    if report["summary"]["all"]["samples"] != len(samples):
        counted = report["summary"]["all"]["samples"]
        raise ValueError(f"the summary counts {counted} samples, {len(samples)} are listed; the report is damaged")
    if len({sample["name"] for sample in samples}) != len(samples):
        raise ValueError("two samples have the same name; the report is damaged or was put together by hand")
    for index, sample in enumerate(samples):
        where = f"samples[{index}]"
        if len(sample["ious"]) != most or len(sample["clicks"]) > most:
            raise ValueError(
                f"{where} has {len(sample['ious'])} IoUs and {len(sample['clicks'])} clicks for a protocol of "
                f"{most} clicks; the report is damaged"
            )
        if len(sample["size"]) != 2:
            raise _wrong(f"{where}.size", sample["size"], "[height, width]")
        for click in sample["clicks"]:
            if click is not None and (len(click) != 3 or click[2] not in (0, 1)):
                raise _wrong(f"a click of {where}", click, "[x, y, 1] or [x, y, 0]")


def _wrong(where: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{where} is {_cut(value)}, expected {expected}; the report is damaged or edited by hand")


def _cut(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return _kind(value)
    if isinstance(value, int) and abs(value) > _MAX_NUMBER:
        return "a huge number"
    return f"{value!r:.60}"


def _kind(value: Any) -> str:
    return {dict: "a table", list: "a list"}.get(type(value), f"{value!r:.60}")
