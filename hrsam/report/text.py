"""A report as Markdown, and as the short table that the command line prints."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Iterable

from hrsam.report.values import (
    THRESHOLDS,
    Report,
    Table,
    after,
    clicks_table,
    duration,
    facts,
    measures,
    overlap_table,
    parts,
    percent,
    seconds_table,
    shown,
    tie_table,
    title,
    verdict,
    warnings,
)

COLUMNS = 100
"""Widest line of :func:`table`."""

MAX_PROBLEMS = 50
"""Problems of the data set that are written out; the report itself has them all."""


def escaped(text: str) -> str:
    """Any text as one line of Markdown that shows it as it is: no markup, HTML, links, table cells or line breaks."""
    return re.sub(r"([\\`*{}\[\]<>#|~&!$]|\b_|_\b|(?<=_)_)", r"\\\1", plain(text))


def safe(text: object) -> str:
    """Any text as HTML that shows it as it is, in elements and in quoted attributes."""
    return html.escape(plain(text))


def plain(text: object) -> str:
    """One line without control characters and half surrogate pairs, which terminals and files cannot take."""
    text = re.sub(r"\s+", " ", str(text)).strip()
    return re.sub("[\0-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)


def clip(text: str, length: int) -> str:
    """One line of at most ``length`` characters."""
    text = plain(text)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def markdown_table(table: Table) -> str:
    """First column left, the others right."""
    header, rows = table
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    shown_lines = ([c if line is lines[1] else escaped(c) for c in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in shown_lines)


def markdown(report: Report) -> str:
    """The report for a README, an issue or a file beside it: the result, the protocol in words, tables, sources."""
    blocks = [f"# {escaped(title(report))}", f"**{escaped(verdict(report))}**"]
    blocks += [f"> {escaped(warning)}" for warning in warnings(report)]
    blocks += ["## Results", markdown_table(clicks_table(report)), markdown_table(overlap_table(report))]
    blocks += [_list(measures(report))]
    if ties := tie_table(report):
        blocks += ["### With ties of the simulated user broken by chance", markdown_table(ties)]
    blocks += ["## Protocol", _list(report["protocol"]["text"]) or "Not described."]
    blocks += ["## Seconds", markdown_table(seconds_table(report))]
    blocks += ["## How it was made"]
    blocks += [_list(f"{heading}: {' · '.join(f'{n} {v}' for n, v in entries)}" for heading, entries in facts(report))]
    blocks += ["## Problems of the data set", _list(problems(report)) or "None."]
    return "\n\n".join(block for block in blocks if block) + "\n"


def table(report: Report) -> str:
    """The result as plain text of at most :data:`COLUMNS` columns: verdict, one row a group, seconds."""
    few = min(5, report["protocol"]["clicks"])
    at = [k for k in (1, 5, 20) if k <= report["protocol"]["clicks"]]
    header = ["", "n", *(f"NoC@{t}" for t in THRESHOLDS), "never@90", *(f"IoU@{k}" for k in at)]
    header += [f"bIoU@{few}", f"thin@{few}"]
    rows = [
        [plain(name), shown(part["samples"]), *(shown(part["noc"].get(str(t)), 2) for t in THRESHOLDS)]
        + [shown(part["never_reached"].get("90")), *(percent(part["iou"][k - 1]) for k in at)]
        + [percent(after(part, measure, few)) for measure in ("boundary_iou", "thin_recall")]
        for name, part in parts(report)
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    widths[0] = min(widths[0], max(4, COLUMNS - sum(2 + width for width in widths[1:])))
    lines = [plain(title(report)), verdict(report), *warnings(report)]
    lines = [piece for text in lines for piece in textwrap.wrap(plain(text), COLUMNS)]
    lines.append("")
    for row in (header, *rows):
        cells = [clip(cell, w).ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    seconds = ", ".join(f"{plain(name)} {duration(value)}" for name, value in report["seconds"].items())
    source = f"IoU in %, n: samples.  {seconds or 'No times'}.  On {plain(report['machine']['device'])}."
    return "\n".join([*lines, "", *textwrap.wrap(source, COLUMNS)]) + "\n"


def problems(report: Report) -> list[str]:
    """Problems of the data set, one line each, at most :data:`MAX_PROBLEMS` and how many more there are."""
    found = [f"{problem['where']}: {problem['text']}" for problem in report["data"]["problems"] or ()]
    more = len(found) - MAX_PROBLEMS
    return found if more <= 0 else [*found[:MAX_PROBLEMS], f"and {more} more; report.json lists all of them"]


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escaped(line)}" for line in lines)
