"""A report as one HTML file that needs nothing from outside: no scripts, no fonts, pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hrsam.report import figures as fig
from hrsam.report.cases import EXTRA, MISSED, Case, worst
from hrsam.report.style import STYLE
from hrsam.report.text import clip, problems, safe
from hrsam.report.values import (
    NOTHING,
    THRESHOLDS,
    Report,
    Table,
    clicks_table,
    clicks_to,
    facts,
    iou_table,
    mean_over_clicks,
    measures,
    overlap_table,
    percent,
    plural,
    seconds_table,
    shown,
    tie_table,
    title,
    verdict,
    warnings,
)

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""The page's content security policy: it loads nothing and runs nothing."""

_COLOURS = 6  # groups that get a line of their own colour and a name
_NAME = 12  # characters of a name beside a figure
_TURNED = 6  # up to so many groups are columns, more are rows


def document(heading: str, body: Sequence[str]) -> str:
    """A whole page; ``body``: its parts as HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{safe(heading)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def html_table(table: Table) -> str:
    """A table that scrolls sideways by itself when the screen is narrow; first column left, the others right."""
    header, rows = table
    head = "".join(f'<th scope="col">{safe(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{safe(row[0])}</th>{"".join(f"<td>{safe(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(caption: str, explained: str, drawing: str) -> str:
    return f"<figure><figcaption><b>{safe(caption)}</b><span>{safe(explained)}</span></figcaption>{drawing}</figure>"


def bullets(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{safe(line)}</li>' for line in lines)}</ul>"


def page(report: Report, worst: Sequence[Case]) -> str:
    """The report with figures, pictures of its worst samples and the list of all samples.

    ``worst``: the pictures to show, in this order; made from :func:`hrsam.report.worst` and :func:`draw_case`.
    """
    body = [_header(report), '<section class="figures">', _iou_curves(report), _solved(report), _histogram(report)]
    body += ["</section><h2>Results</h2>"]
    body += [f'<div class="tables">{_turned(clicks_table(report))}{_turned(overlap_table(report))}</div>']
    body += [f'<div class="soft small">{bullets(measures(report))}</div>']
    if ties := tie_table(report):
        body += ["<h3>With ties of the simulated user broken by chance</h3>", html_table(ties)]
    if worst:
        body += ["<h2>Worst samples</h2>", _key(), f'<div class="cases">{"".join(map(_case, worst))}</div>']
    body += ["<h2>Protocol</h2>", bullets(report["protocol"]["text"]) or "<p>Not described.</p>"]
    body += ["<h2>How it was made</h2>", f'<div class="facts">{_facts(report)}</div>']
    body += ["<h2>Problems of the data set</h2>"]
    body += [bullets(problems(report)) if report["data"]["problems"] else "<p>None.</p>"]
    body += ["<h2>All samples</h2>", _samples(report)]
    return document(title(report), body)


def _header(report: Report) -> str:
    part, most = report["summary"]["all"], report["protocol"]["clicks"]
    few = min(5, most)
    tiles = [
        (shown(part["noc"].get("90"), 2), "clicks to IoU 90 % (NoC@90)"),
        (shown(part["noc"].get("95"), 2), "clicks to IoU 95 % (NoC@95)"),
        (f"{percent(part['iou'][few - 1])} %", f"mean IoU after {plural(few, 'click')}"),
        (f"{shown(part['never_reached'].get('90'))} of {shown(part['samples'])}", "samples never reach IoU 90 %"),
    ]
    return (
        f"<header><h1>{safe(title(report))}</h1>"
        f'<p class="soft small">{safe(report["made"])} · protocol {safe(report["protocol"]["name"])} · '
        f"{safe(plural(part['samples'], 'sample'))} · {safe(report['machine']['device'])}</p>"
        f'<p class="lead">{safe(verdict(report))}</p>'
        + "".join(f'<p class="note">{safe(warning)}</p>' for warning in warnings(report))
        + f'<div class="tiles">{"".join(f"<div class=tile><b>{safe(n)}</b><span>{safe(t)}</span></div>" for n, t in tiles)}'
        "</div></header>"
    )


def _iou_curves(report: Report) -> str:
    part, groups = report["summary"]["all"], report["summary"]["groups"]
    ious = 100 * iou_table(report["samples"])
    known = ious[~np.isnan(ious).any(1)]
    quartiles = np.percentile(known, (25, 75), axis=0) if len(known) else np.full((2, len(part["iou"])), np.nan)
    lines = [(name, _hundred(group["iou"]), style) for name, group, style in _styled(groups)]
    lines.append(("all", _hundred(part["iou"]), "main"))
    spread = np.concatenate([quartiles.ravel(), *(ys for _, ys, _ in lines)])
    axes, xs = curve_axes(len(part["iou"]), spread, [name for name, _, style in lines if style != "many"])
    drawn = [curve_frame(axes, "mean IoU, %"), fig.band(axes, xs, quartiles[0], quartiles[1], "main")]
    drawn += [fig.line(axes, xs, ys, style) for _, ys, style in lines]
    drawn.append(
        fig.end_labels(axes, [(last(ys), clip(name, _NAME), style) for name, ys, style in lines if style != "many"])
    )
    if np.isnan(spread).all():
        drawn.append(fig.note(axes, "no IoU in this report"))
    caption = "Mean IoU after each click"
    return figure(
        caption,
        "Shaded: the middle half of all samples (first to third quartile).",
        fig.svg(axes, drawn, f"{caption}: {percent(part['iou'][0])} % to {percent(part['iou'][-1])} %"),
    )


def _solved(report: Report) -> str:
    ious, most = iou_table(report["samples"]), report["protocol"]["clicks"]
    axes, xs = curve_axes(most, np.array([0.0]), ["≥ 90"])
    drawn, labels, said = [curve_frame(axes, "samples solved, %")], [], []
    for index, threshold in enumerate(THRESHOLDS):
        needed = clicks_to(ious, threshold)
        needed = needed[~np.isnan(needed)]
        share = [100 * float((needed <= k).mean()) if len(needed) else np.nan for k in xs]
        drawn.append(fig.line(axes, xs, share, f"t{index}"))
        labels.append((share[-1], f"≥ {threshold}", f"t{index}"))
        said.append(f"{shown(share[-1])} % at IoU {threshold} %")
    if all(np.isnan(value) for value, _, _ in labels):
        drawn.append(fig.note(axes, "no IoU in this report"))
    drawn.append(fig.end_labels(axes, labels))
    caption = "Samples solved within k clicks"
    drawing = fig.svg(axes, drawn, f"{caption}, in the end {', '.join(said)}")
    return figure(caption, "Share whose IoU has reached 80, 85, 90 and 95 % at least once.", drawing)


def _histogram(report: Report) -> str:
    most = report["protocol"]["clicks"]
    needed = clicks_to(iou_table(report["samples"]), 90)
    counts = [int((needed == k).sum()) for k in range(1, most + 1)]
    never = int(np.isinf(needed).sum())
    top, place = max(1, never, *counts), most + max(2.0, 0.08 * most)
    axes = fig.Axes((0.2, place + 1), (0, top * 1.12), right=16)
    steps = [t for t in fig.ticks(0, top, min(5, top)) if t == int(t)]
    drawn = [fig.frame(axes, fig.click_ticks(most), steps, "clicks needed", "samples")]
    drawn += [fig.bar(axes, k, n, "good", label=str(n) if most <= 20 else "") for k, n in enumerate(counts, 1) if n]
    drawn.append(fig.bar(axes, place, never, "bad", label=str(never)))
    drawn.append(f'<text class="name bad end" x="{axes.width - 8}" y="{axes.height - 26}">never</text>')
    caption = "Clicks needed to IoU 90 %"
    explained = "Samples that never reach it stand apart."
    return figure(caption, explained, fig.svg(axes, drawn, f"{caption}; {plural(never, 'sample')} never"))


def curve_axes(most: int, values: np.ndarray, names: Iterable[str] = ()) -> tuple[fig.Axes, list[float]]:
    """Axes over clicks 1 to ``most`` and up to 100 %, from a round number below ``values``, with room for the names of
    lines at their right; and the clicks."""
    known = values[np.isfinite(values)]
    low = 10 * np.floor(known.min() / 10) if len(known) else 0
    right = 16 + 8 * max((len(clip(name, _NAME)) for name in names), default=0)
    axes = fig.Axes((1, max(2, most)), (float(min(low, 90)), 100.0), right=max(24, right))
    return axes, list(map(float, range(1, most + 1)))


def curve_frame(axes: fig.Axes, ylabel: str) -> str:
    return fig.frame(axes, fig.click_ticks(int(axes.x[1])), fig.ticks(*axes.y), "clicks", ylabel)


def last(values: Sequence[float] | np.ndarray) -> float:
    """The last number of a line, where its name stands."""
    known = [v for v in values if np.isfinite(v)]
    return float(known[-1]) if known else np.nan


def _hundred(shares: Sequence[Any]) -> np.ndarray:
    return 100 * np.array(shares, np.float64)


def _styled(groups: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    """Groups with their line style; none where a group would only repeat the whole."""
    if len(groups) < 2:
        return []
    style = [f"c{index}" for index in range(_COLOURS)] if len(groups) <= _COLOURS else ["many"] * len(groups)
    return [(name, group, style[index]) for index, (name, group) in enumerate(groups.items())]


def _turned(table: Table) -> str:
    """Few groups as columns, which fits a phone; many as rows."""
    header, rows = table
    if len(rows) > _TURNED + 1:
        return html_table(table)
    return html_table(
        ([header[0], *(row[0] for row in rows)], [list(line) for line in zip(header[1:], *[r[1:] for r in rows])])
    )


def _key() -> str:
    rgb = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in (MISSED, EXTRA)]
    return (
        f'<ul class="key"><li><i style="background:{rgb[0]}"></i>object missed</li>'
        f'<li><i style="background:{rgb[1]}"></i>mask too large</li><li><i class="outline"></i>outline of the truth</li>'
        '<li><i class="plus">+</i>click on the object</li><li><i class="minus">−</i>click on the background</li></ul>'
    )


def _case(case: Case) -> str:
    ious = case.sample["ious"]
    at = [k for k in (1, 5, 20) if k <= len(ious)]
    values = ", ".join(f"{percent(ious[k - 1])} % after {plural(k, 'click')}" for k in at)
    picture = base64.b64encode(case.jpeg).decode("ascii")
    return (
        f'<figure><div class="photo"><img alt="{safe(case.title)}, its errors and clicks" '
        f'src="data:image/jpeg;base64,{picture}"></div>'
        f"<figcaption><b>{safe(case.title)}</b><span>IoU {safe(values)}</span></figcaption></figure>"
    )


def _facts(report: Report) -> str:
    out = [f"<div><h3>Seconds</h3>{_pairs(seconds_table(report)[1])}</div>"]
    out += [f"<div><h3>{safe(heading)}</h3>{_pairs(entries)}</div>" for heading, entries in facts(report)]
    return "".join(out)


def _pairs(entries: Sequence[Sequence[str]]) -> str:
    return f"<dl>{''.join(f'<dt>{safe(name)}</dt><dd>{safe(value)}</dd>' for name, value in entries)}</dl>"


def _samples(report: Report) -> str:
    samples = worst(report, len(report["samples"]))
    if not samples:
        return "<p>None.</p>"
    ious, most = iou_table(samples), report["protocol"]["clicks"]
    at = [k for k in (1, 5, 20) if k <= most]
    columns = ["sample", "group", "size", "object, %", "IoU over clicks", "mean IoU"]
    columns += [f"IoU@{k}" for k in at] + [f"clicks to {t}" for t in THRESHOLDS]
    head = "".join(f'<th scope="col">{safe(column)}</th>' for column in columns)
    needed = [clicks_to(ious, t) for t in THRESHOLDS]
    rows = []
    for index, (sample, mean) in enumerate(zip(samples, mean_over_clicks(ious))):
        height, width = sample["size"]
        share = sample["object"] / (height * width) if sample["object"] is not None and height * width else None
        cells = [sample["group"] or NOTHING, f"{width} × {height}", percent(share)]
        rest = [percent(mean), *(percent(ious[index, k - 1]) for k in at)]
        rest += ["never" if np.isinf(n[index]) else shown(n[index]) for n in needed]
        rows.append(
            f'<tr><th scope="row">{safe(sample["name"])}</th>{_cells(cells)}'
            f'<td class="spark">{fig.sparkline(ious[index], "c0")}</td>{_cells(rest)}</tr>'
        )
    return (
        '<p class="soft small">Lowest mean IoU over the clicks first; IoU in per cent, the line from 0 to 100.</p>'
        f'<div class="wide list" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cells(texts: Sequence[str]) -> str:
    return "".join(f"<td>{safe(text)}</td>" for text in texts)
