"""Two or more reports side by side, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hrsam.report import figures as fig
from hrsam.report.text import escaped, markdown_table, safe
from hrsam.report.values import (
    THRESHOLDS,
    Report,
    Table,
    after,
    clicks_to,
    duration,
    iou_table,
    mean_over_clicks,
    percent,
    plural,
    shown,
)
from hrsam.report.webpage import bullets, curve_axes, curve_frame, document, figure, html_table, last

MOST = 6
"""Reports compared at once; more lines in a figure cannot be told apart."""

RESAMPLES = 10_000
"""Bootstrap resamples of an interval."""

_LISTED = 12  # gains and losses listed, each


@dataclass(frozen=True)
class Difference:
    """A report minus the first one: ``mean`` over ``samples`` pairs, and its 95 % interval (NaN for fewer than two)."""

    mean: float
    low: float
    high: float
    samples: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def paired_difference(first: np.ndarray, other: np.ndarray, *, seed: int = 0) -> Difference:
    """Mean of ``other - first`` (n,) with its 95 % percentile bootstrap interval over the pairs; NaN pairs are left out.

    The samples are drawn anew :data:`RESAMPLES` times from a stream of their own, so that equal data give equal
    intervals.
    """
    deltas = np.asarray(other, np.float64) - np.asarray(first, np.float64)
    deltas = deltas[np.isfinite(deltas)]
    n = len(deltas)
    if n < 2:
        return Difference(float(deltas.mean()) if n else np.nan, np.nan, np.nan, n)
    rng = np.random.default_rng(seed)
    batch = max(1, 2_000_000 // n)
    sizes = [min(batch, RESAMPLES - start) for start in range(0, RESAMPLES, batch)]
    means = np.concatenate([deltas[rng.integers(0, n, (size, n))].mean(1) for size in sizes])
    low, high = np.percentile(means, (2.5, 97.5))
    return Difference(float(deltas.mean()), float(low), float(high), n)


@dataclass(frozen=True)
class _Side:
    """A report in a comparison: ``letter`` A, B, …, and of the samples common to all: names, IoUs (n, k)."""

    letter: str
    report: Report
    names: list[str]
    ious: np.ndarray

    @property
    def label(self) -> str:
        return f"{self.letter} · {self.report['method']['name']}"

    def clicks(self, threshold: int) -> np.ndarray:
        """Clicks a sample needs (n,), the protocol's most where it is never solved."""
        needed = clicks_to(self.ious, threshold)
        return np.where(np.isinf(needed), self.report["protocol"]["clicks"], needed)


def compare(reports: Sequence[Report], *, strict: bool = True) -> tuple[str, str]:
    """Compare reports with the first of them: Markdown and one HTML page, both whole documents.

    Refuses (``ValueError``) fewer than two or more than :data:`MOST` reports, and, while ``strict``, reports that differ
    in protocol (its sentences aside), data or samples.  With ``strict=False`` the differences stand at the top instead,
    and samples are paired by name as far as they occur in all reports.
    """
    if not 2 <= len(reports) <= MOST:
        raise ValueError(f"got {plural(len(reports), 'report')}; give 2 to {MOST} to compare")
    differences = _differences(reports)
    if differences and strict:
        raise ValueError(
            f"these reports cannot be compared: {'; '.join(differences)}; evaluate with the same protocol and data, "
            "or pass strict=False to see them side by side all the same"
        )
    sides = _sides(reports)
    heading = " against ".join(side.label for side in sides)
    verdicts = [line for side in sides[1:] for line in _verdicts(sides[0], side)]
    notes = [f"Not a fair comparison: {difference}." for difference in differences]
    tables: list[tuple[str, Table]] = [("Side by side", _side_by_side(sides)), ("Paired differences", _paired(sides))]
    for side in sides[1:]:
        for kind, table in zip(("gains", "losses"), _extremes(sides[0], side)):
            if table[1]:
                tables.append((f"Largest {kind} of {side.letter}", table))
    about = (
        f"Differences are {plural(len(sides[0].names), 'sample')} paired by name, against A; intervals hold 95 % of the "
        f"means of {RESAMPLES:,} seeded resamples of these pairs.  They say nothing about another training or other data."
    )
    blocks = [f"# {escaped(heading)}", *(f"> {escaped(text)}" for text in notes)]
    blocks.append("\n".join(f"- {escaped(text)}" for text in verdicts))
    for name, table in tables:
        blocks += [f"## {escaped(name)}", markdown_table(table)]
    blocks.append(escaped(about))
    body = [f"<header><h1>{safe(heading)}</h1>", *(f'<p class="note">{safe(text)}</p>' for text in notes)]
    body += [f'<div class="lead">{bullets(verdicts)}</div></header><section class="figures">', _curves(sides)]
    body += [_solved(sides), *(_waterfall(sides[0], side) for side in sides[1:]), "</section>"]
    (first, side_by_side), (second, paired), *extremes = tables
    body += ["<h2>Results</h2>", _tables((first, side_by_side), (second, paired))]
    body += [f'<p class="soft small">{safe(about)}</p>', "<h2>Sample by sample</h2>"]
    body += [_tables(*extremes) if extremes else "<p>No sample differs.</p>"]
    return "\n\n".join(block for block in blocks if block) + "\n", document(heading, body)


def _tables(*tables: tuple[str, Table]) -> str:
    return f'<div class="tables">{"".join(f"<div><h3>{safe(n)}</h3>{html_table(t)}</div>" for n, t in tables)}</div>'


def _differences(reports: Sequence[Report]) -> list[str]:
    """Why the reports are not comparable, one phrase each, every later report against the first."""
    first, found = reports[0], []
    for letter, other in zip("BCDEFG", reports[1:]):
        for key in ("name", "rule", "clicks", "threshold", "ties", "seed"):
            ours, theirs = first["protocol"].get(key), other["protocol"].get(key)
            if ours != theirs:
                found.append(f"the protocols differ, A has {key} {ours!r:.60} and {letter} has {theirs!r:.60}")
        ours, theirs = first["data"].get("sha256"), other["data"].get("sha256")
        if ours is None or theirs is None:
            found.append(f"whether the data of A and {letter} are the same is unknown, a sha256 is missing")
        elif ours != theirs:
            found.append(f"the data differ, A has sha256 {ours:.12}… and {letter} has {theirs:.12}…")
        if {s["name"] for s in first["samples"]} != {s["name"] for s in other["samples"]}:
            counts = len(first["samples"]), len(other["samples"])
            found.append(f"the samples differ, A has {counts[0]} and {letter} has {counts[1]}, not all the same ones")
    return found


def _sides(reports: Sequence[Report]) -> list[_Side]:
    by_name = [{sample["name"]: sample for sample in report["samples"]} for report in reports]
    common = [name for name in by_name[0] if all(name in samples for samples in by_name[1:])]
    return [
        _Side(letter, report, common, iou_table([samples[name] for name in common]))
        for letter, report, samples in zip("ABCDEF", reports, by_name)
    ]


def _clicks_difference(first: _Side, side: _Side, threshold: int) -> Difference:
    return paired_difference(first.clicks(threshold), side.clicks(threshold))


def _iou_difference(first: _Side, side: _Side) -> Difference:
    if not first.names:
        return paired_difference(np.empty(0), np.empty(0))
    few = _few([first, side])
    return paired_difference(100 * first.ious[:, few - 1], 100 * side.ious[:, few - 1])


def _few(sides: Sequence[_Side]) -> int:
    return min(5, *(side.report["protocol"]["clicks"] for side in sides))


def _verdicts(first: _Side, side: _Side) -> list[str]:
    few = _few([first, side])
    lines = []
    for got, measure, unit, digits, words in (
        (_clicks_difference(first, side, 90), "clicks to IoU 90 %", "", 2, ("fewer", "more")),
        (_iou_difference(first, side), f"IoU after {plural(few, 'click')}", " points", 1, ("lower", "higher")),
    ):
        if not got.samples:
            lines.append(f"{side.letter} and A have no sample with {measure} in common.")
            continue
        amount, word = shown(abs(got.mean), digits), words[got.mean > 0]
        interval = _interval(got, digits)
        if got.samples < 2:
            end = "one sample allows no conclusion"
        elif got.clear:
            end = f"95 % interval {interval}"
        else:
            end = f"95 % interval {interval} includes zero, so this is no clear difference"
        lines.append(f"{side.letter} against A, {measure}: {amount}{unit} {word} ({end}).")
    return lines


def _interval(got: Difference, digits: int) -> str:
    return f"{_signed(got.low, digits)} to {_signed(got.high, digits)}"


def _signed(value: float, digits: int) -> str:
    text = shown(value, digits)
    return f"+{text}" if value > 0 and text.strip("0.,") else text


def _side_by_side(sides: Sequence[_Side]) -> Table:
    few, rows = _few(sides), []

    def row(name: str, values: Sequence[str]) -> None:
        rows.append([name, *values])

    summaries = [side.report["summary"]["all"] for side in sides]
    row("samples", [shown(part["samples"]) for part in summaries])
    for t in THRESHOLDS:
        row(f"NoC@{t}", [shown(part["noc"].get(str(t)), 2) for part in summaries])
    for t in THRESHOLDS:
        row(f"never reach {t} %", [shown(part["never_reached"].get(str(t))) for part in summaries])
    for k in (1, few, 20):
        if k <= min(len(part["iou"]) for part in summaries):
            row(f"IoU@{k}, %", [percent(part["iou"][k - 1]) for part in summaries])
    row(f"boundary IoU@{few}, %", [percent(after(part, "boundary_iou", few)) for part in summaries])
    row(f"thin recall@{few}, %", [percent(after(part, "thin_recall", few)) for part in summaries])
    for name in ("encode", "decode"):
        row(f"seconds, {name}", [duration(side.report["seconds"].get(name)) for side in sides])
    row("longest side", [str(side.report["method"]["side"] or "–") for side in sides])
    row("device", [side.report["machine"]["device"] for side in sides])
    return ["", *(side.label for side in sides)], rows


def _paired(sides: Sequence[_Side]) -> Table:
    first, few, rows = sides[0], _few(sides), []
    for side in sides[1:]:
        measured = [(f"NoC@{t}", _clicks_difference(first, side, t), 2) for t in THRESHOLDS]
        measured.append((f"IoU@{few}, points", _iou_difference(first, side), 1))
        rows += [
            [f"{side.letter} − A, {name}", _signed(got.mean, digits), _interval(got, digits), shown(got.samples)]
            for name, got, digits in measured
        ]
    return ["", "mean", "95 % interval", "pairs"], rows


def _extremes(first: _Side, side: _Side) -> tuple[Table, Table]:
    """Samples whose mean IoU over the clicks rises and falls most, in per cent; changes that would
    be shown as 0.0 are left out."""
    before, now = mean_over_clicks(first.ious), mean_over_clicks(side.ious)
    delta = 100 * (now - before)
    order = [i for i in np.argsort(-delta, kind="stable") if np.isfinite(delta[i])]
    header = ["sample", "mean IoU of A", f"of {side.letter}", "difference"]

    def rows(chosen: Sequence[int]) -> list[list[str]]:
        return [[first.names[i], percent(before[i]), percent(now[i]), _signed(delta[i], 1)] for i in chosen]

    gains = [i for i in order if delta[i] > 0.05][:_LISTED]
    losses = [i for i in reversed(order) if delta[i] < -0.05][:_LISTED]
    return (header, rows(gains)), (header, rows(losses))


def _curves(sides: Sequence[_Side]) -> str:
    lines = [100 * np.array(side.report["summary"]["all"]["iou"], np.float64) for side in sides]
    axes, _ = curve_axes(max(map(len, lines)), np.concatenate(lines), "A")
    drawn = [curve_frame(axes, "mean IoU, %")]
    drawn += [fig.line(axes, range(1, len(ys) + 1), ys, f"c{i}") for i, ys in enumerate(lines)]
    drawn.append(fig.end_labels(axes, [(last(ys), s.letter, f"c{i}") for i, (s, ys) in enumerate(zip(sides, lines))]))
    names = "; ".join(side.label for side in sides)
    caption = "Mean IoU after each click"
    return figure(caption, names, fig.svg(axes, drawn, f"{caption} for {names}"))


def _solved(sides: Sequence[_Side]) -> str:
    most = max(side.report["protocol"]["clicks"] for side in sides)
    axes, _ = curve_axes(most, np.array([0.0]), "A")
    drawn, labels = [curve_frame(axes, "samples solved, %")], []
    for index, side in enumerate(sides):
        needed = clicks_to(iou_table(side.report["samples"]), 90)
        needed = needed[~np.isnan(needed)]
        xs = range(1, side.report["protocol"]["clicks"] + 1)
        share = [100 * float((needed <= k).mean()) if len(needed) else np.nan for k in xs]
        drawn.append(fig.line(axes, xs, share, f"c{index}"))
        labels.append((last(share), side.letter, f"c{index}"))
    drawn.append(fig.end_labels(axes, labels))
    caption = "Samples solved within k clicks"
    return figure(caption, "Share whose IoU has reached 90 % at least once.", fig.svg(axes, drawn, caption))


def _waterfall(first: _Side, side: _Side) -> str:
    delta = 100 * (mean_over_clicks(side.ious) - mean_over_clicks(first.ious))
    delta = np.sort(delta[np.isfinite(delta)])[::-1]
    reach = max(5.0, float(np.ceil(np.abs(delta).max() / 5) * 5)) if len(delta) else 5.0
    axes = fig.Axes((0, max(1, len(delta))), (-reach, reach), right=16)
    drawn = [fig.frame(axes, [], fig.ticks(-reach, reach, 6), "samples, sorted", "difference, points")]
    drawn += [
        fig.bar(axes, i + 0.5, d, "good" if d > 0 else "bad", width=0.8 if len(delta) < 120 else 1)
        for i, d in enumerate(delta)
    ]
    if not len(delta):
        drawn.append(fig.note(axes, "no sample in common"))
    up, down = int((delta > 0).sum()), int((delta < 0).sum())
    caption = f"Mean IoU of {side.letter} minus A, sample by sample"
    said = f"{plural(up, 'sample')} better, {shown(down)} worse, {shown(len(delta) - up - down)} equal."
    return figure(caption, said, fig.svg(axes, drawn, f"{caption}: {said}"))
