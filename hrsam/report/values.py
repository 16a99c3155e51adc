"""What the pages of a report say, as text without markup: numbers rounded for people, the verdict, the tables.

Shares (IoU, recall) are shown in per cent, times in seconds or milliseconds, whatever is missing (None, NaN) as "–".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

THRESHOLDS = (80, 85, 90, 95)
"""IoUs in per cent at which clicks are counted."""

IOU_AT = (1, 3, 5, 10, 20)
"""Clicks after which the mean IoU is shown."""

NOTHING = "–"

Report = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]  # header, rows; the first column is the row's name


def shown(value: Any, digits: int = 0, factor: float = 1) -> str:
    """``value * factor`` with ``digits`` decimals and thousands separated, "–" for None and NaN."""
    if value is None or not math.isfinite(value):
        return NOTHING
    text = f"{value * factor:,.{digits}f}"
    return text.replace("-", "−" if any(digit in text for digit in "123456789") else "")


def percent(share: Any) -> str:
    """A share in [0, 1] in per cent, one decimal, without the sign."""
    return shown(share, 1, 100)


def duration(seconds: Any) -> str:
    """1.25 -> "1.25 s", 0.0314 -> "31 ms", 0.0042 -> "4.2 ms"."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds >= 1:
        return f"{shown(seconds, 2)} s"
    return f"{shown(seconds, 1 if seconds < 0.01 else 0, 1000)} ms"


def plural(count: Any, noun: str) -> str:
    return f"{shown(count)} {noun}{'' if count == 1 else 's'}"


def iou_table(samples: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """(n, k) float64, column j the IoU after click j + 1, NaN where there is none; (0, 1) without samples."""
    return np.array([sample["ious"] for sample in samples], dtype=np.float64) if samples else np.empty((0, 1))


def clicks_to(ious: np.ndarray, threshold: int) -> np.ndarray:
    """Clicks (n,) until the IoU (n, k) is ``threshold`` per cent: inf if it never is, NaN for rows with missing IoUs.

    The mean of this, with inf as k, is NoC@threshold.
    """
    reached = ious >= threshold / 100
    clicks = np.where(reached.any(1), reached.argmax(1) + 1.0, np.inf)
    return np.where(np.isnan(ious).any(1), np.nan, clicks)


def mean_over_clicks(ious: np.ndarray) -> np.ndarray:
    """Mean IoU of each row (n, k) over its clicks, (n,); NaN for rows without any."""
    counted = (~np.isnan(ious)).sum(1)
    return np.where(counted > 0, np.nansum(ious, axis=1) / np.maximum(counted, 1), np.nan)


def after(part: Mapping[str, Any], measure: str, clicks: int) -> Any:
    """A summary's ``measure`` ("boundary_iou", "thin_recall") after ``clicks``, None where it was not measured."""
    return (part.get(measure) or {}).get(str(clicks))


def title(report: Report) -> str:
    return f"{report['method']['name']} on {report['data']['name']}"


def verdict(report: Report) -> str:
    """The result in one sentence."""
    part, most = report["summary"]["all"], report["protocol"]["clicks"]
    fifth = min(5, most)
    return (
        f"{shown(part['noc'].get('90'), 2)} clicks on average to an IoU of 90 % "
        f"(at most {most}; {shown(part['never_reached'].get('90'))} of {plural(part['samples'], 'sample')} never reach "
        f"it), mean IoU {percent(part['iou'][fifth - 1])} % after {plural(fifth, 'click')}."
    )


def warnings(report: Report) -> list[str]:
    """What a reader must know before comparing the numbers with others."""
    found = []
    data, samples = report["data"], report["summary"]["all"]["samples"]
    if data["expected"] is not None and samples != data["expected"]:
        found.append(
            f"{shown(samples)} of the {shown(data['expected'])} samples of {data['name']} were evaluated, "
            "so the numbers are not comparable with those of the whole set."
        )
    if data["problems"]:
        found.append(f"The data set has {plural(len(data['problems']), 'problem')}, listed below.")
    return found


def overlap_table(report: Report) -> Table:
    """Mean IoU, boundary IoU and recall of thin parts for all samples and each group, in per cent."""
    most = report["protocol"]["clicks"]
    at, few = [k for k in IOU_AT if k <= most], min(5, most)
    header = ["", *(f"IoU@{k}" for k in at), f"boundary IoU@{few}", f"thin recall@{few}"]
    rows = [
        [name, *(percent(part["iou"][k - 1]) for k in at)]
        + [percent(after(part, measure, few)) for measure in ("boundary_iou", "thin_recall")]
        for name, part in parts(report)
    ]
    return header, rows


def clicks_table(report: Report) -> Table:
    """Clicks needed and samples never solved, for all samples and each group."""
    header = ["", "samples", *(f"NoC@{t}" for t in THRESHOLDS), *(f"never@{t}" for t in THRESHOLDS)]
    rows = [
        [name, shown(part["samples"])]
        + [shown(part["noc"].get(str(t)), 2) for t in THRESHOLDS]
        + [shown(part["never_reached"].get(str(t))) for t in THRESHOLDS]
        for name, part in parts(report)
    ]
    return header, rows


def parts(report: Report) -> list[tuple[str, Mapping[str, Any]]]:
    return [("all", report["summary"]["all"]), *report["summary"]["groups"].items()]


def measures(report: Report) -> list[str]:
    """What the columns of the tables mean, one sentence each."""
    most = report["protocol"]["clicks"]
    lines = [
        f"NoC@t: clicks until the IoU is at least t %, on average; a sample that never is counts as {most}.",
        "never@t: samples whose IoU is below t % after every click.",
        "IoU@k, boundary IoU@k: mean after click k, in per cent; thin recall@k: how much of the object's thin parts is "
        "found, in per cent.",
    ]
    equals = report["summary"]["all"].get("equals_max") or {}
    counts = ", ".join(f"{shown(equals[str(t)])} at {t} %" for t in THRESHOLDS if str(t) in equals)
    if counts:
        lines.append(f"Papers that count a success at click {most} as a failure too (NoF) would report {counts}.")
    return lines


SECONDS = {
    "encode": "encode, per picture",
    "decode": "decode, per click",
    "user": "simulated user, per click",
    "metric": "measures, per click",
    "click": "everything, per click",
}


def seconds_table(report: Report) -> Table:
    seconds = report["seconds"]
    names = [name for name in SECONDS if name in seconds] + [name for name in seconds if name not in SECONDS]
    return ["", "mean"], [[SECONDS.get(name, name), duration(seconds[name])] for name in names]


def tie_table(report: Report) -> Table | None:
    """Lowest, mean and highest result over the seeds that break ties of the simulated user; None if not measured."""
    spread = report.get("tie_spread")
    if not spread:
        return None
    rows = []
    for name, values, digits, factor in [
        *((f"NoC@{t}", spread["noc"].get(str(t)), 2, 1) for t in THRESHOLDS),
        ("IoU@5, %", spread.get("iou@5"), 1, 100),
    ]:
        known = [v for v in values or () if v is not None]
        if known:
            low, high, mean = min(known), max(known), sum(known) / len(known)
            rows.append([name, *(shown(v, digits, factor) for v in (low, mean, high))])
    return [plural(len(spread["seeds"]), "seed"), "lowest", "mean", "highest"], rows


def facts(report: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    """How the report was made: (heading, [(name, value), …]) for everything that is known."""
    method, protocol, data, machine = (report[name] for name in ("method", "protocol", "data", "machine"))
    ran_on = " · ".join(dict.fromkeys(v for v in (machine["device"], machine["device_name"], machine["dtype"]) if v))
    sections = {
        "Method": {
            "name": method["name"],
            "kind": method["kind"],
            "preset": method["preset"],
            "longest side": method["side"],
            "weights sha256": method["weights_sha256"],
        },
        "Protocol": {key: protocol[key] for key in ("name", "rule", "clicks", "threshold", "ties", "seed")},
        "Data": {
            "name": data["name"],
            "samples": f"{shown(data['samples'])} of {shown(data['expected'])}"
            if data["expected"]
            else data["samples"],
            "note": data["note"],
            "sha256": data["sha256"],
        },
        "Machine": {
            "device": ran_on,
            "processes": machine["processes"],
            "threads": machine["threads"],
            "versions": ", ".join(f"{name} {version}" for name, version in (machine["versions"] or {}).items()),
        },
        "Report": {"made": report["made"], "command": report["command"], "trace sha256": report["trace_sha256"]},
    }
    return [
        (heading, [(name, str(value)) for name, value in entries.items() if value not in (None, "")])
        for heading, entries in sections.items()
    ]
