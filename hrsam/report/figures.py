"""Figures as SVG text: axes with ticks, lines, bands and bars.  Colours come from the page's style sheet, by class.

A figure is drawn for 440 units of width with 13-unit type, so that it stays readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hrsam.report.text import safe


@dataclass(frozen=True)
class Axes:
    """A plot's frame: data ranges ``x`` and ``y`` (low, high), and where they lie in a picture of ``width`` × ``height``."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: int = 440
    height: int = 300
    left: int = 44
    right: int = 74
    top: int = 12
    bottom: int = 44

    def at_x(self, value: float) -> float:
        low, high = self.x
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def at_y(self, value: float) -> float:
        low, high = self.y
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom)


def svg(axes: Axes, parts: Sequence[str], label: str) -> str:
    """The whole figure; ``label`` says in words what it shows, for those who cannot see it."""
    return f'<svg viewBox="0 0 {axes.width} {axes.height}" role="img" aria-label="{safe(label)}">{"".join(parts)}</svg>'


def frame(axes: Axes, xticks: Sequence[float], yticks: Sequence[float], xlabel: str, ylabel: str) -> str:
    """Horizontal grid lines with their numbers, ticks below, and what the axes measure."""
    right, bottom = axes.width - axes.right, axes.height - axes.bottom
    out = []
    for value in yticks:
        y = axes.at_y(value)
        out.append(f'<line class="grid" x1="{axes.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(_text(axes.left - 7, y + 4.5, f"{value:g}".replace("-", "−"), "tick end"))
    for value in xticks:
        x = axes.at_x(value)
        out.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        out.append(_text(x, bottom + 18, f"{value:g}", "tick middle"))
    out.append(f'<line class="axis" x1="{axes.left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    out.append(_text((axes.left + right) / 2, axes.height - 7, xlabel, "tick middle"))
    middle = (axes.top + bottom) / 2
    rotated = f'transform="rotate(-90 12 {middle:.1f})"'
    out.append(f'<text class="tick middle" x="12" y="{middle:.1f}" {rotated}>{safe(ylabel)}</text>')
    return "".join(out)


def line(axes: Axes, xs: Sequence[float], ys: Sequence[float] | np.ndarray, style: str) -> str:
    """A line through the points that are numbers; it breaks where one is missing, and a lone point is a dot."""
    out = []
    for run in _runs(ys):
        points = [(axes.at_x(xs[i]), axes.at_y(ys[i])) for i in run]
        if len(points) == 1:
            out.append(f'<circle class="dot {style}" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3"/>')
        else:
            out.append(f'<polyline class="line {style}" points="{_points(points)}"/>')
    return "".join(out)


def band(axes: Axes, xs: Sequence[float], low: np.ndarray, high: np.ndarray, style: str) -> str:
    """The area between two lines."""
    out = []
    for run in _runs(np.add(low, high)):
        edge = [(axes.at_x(xs[i]), axes.at_y(high[i])) for i in run]
        edge += [(axes.at_x(xs[i]), axes.at_y(low[i])) for i in reversed(run)]
        out.append(f'<polygon class="band {style}" points="{_points(edge)}"/>')
    return "".join(out)


def bar(axes: Axes, x: float, value: float, style: str, width: float = 0.8, label: str = "") -> str:
    """A bar from 0 to ``value`` around ``x``, ``width`` in units of the x axis, with a label at its end."""
    left, right = axes.at_x(x - width / 2), axes.at_x(x + width / 2)
    top, base = sorted((axes.at_y(value), axes.at_y(0)))
    shape = (
        f'<rect class="bar {style}" x="{left:.2f}" y="{top:.2f}" width="{right - left:.2f}" height="{base - top:.2f}"/>'
    )
    return shape + (_text((left + right) / 2, top - 4, label, "tick middle") if label else "")


def end_labels(axes: Axes, labels: Sequence[tuple[float, str, str]], gap: float = 15) -> str:
    """Names beside the ends of lines, (value, text, style) each, moved apart where they would overlap."""
    known = sorted((axes.at_y(value), text, style) for value, text, style in labels if math.isfinite(value))
    places: list[float] = []
    for y, _, _ in known:
        places.append(max(y, places[-1] + gap) if places else y)
    lowest = axes.height - axes.bottom
    for index in reversed(range(len(places))):
        places[index] = min(places[index], lowest)
        lowest = places[index] - gap
    x = axes.width - axes.right + 8
    return "".join(_text(x, place + 4.5, text, f"name {style}") for place, (_, text, style) in zip(places, known))


def note(axes: Axes, text: str) -> str:
    """A word in the middle of an empty plot."""
    middle = (axes.left + axes.width - axes.right) / 2
    return _text(middle, (axes.top + axes.height - axes.bottom) / 2, text, "tick middle")


def sparkline(values: Sequence[float] | np.ndarray, style: str) -> str:
    """Values in [0, 1] as a line of 80 × 20 units, without axes; its meaning is in the table around it."""
    axes = Axes((0, max(1, len(values) - 1)), (0, 1), width=80, height=20, left=2, right=2, top=2, bottom=2)
    drawn = line(axes, range(len(values)), values, style)
    base = '<line class="grid" x1="2" x2="78" y1="18" y2="18"/>'
    return f'<svg class="spark" viewBox="0 0 80 20" aria-hidden="true">{base}{drawn}</svg>'


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that cover [low, high] from the inside: steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [round(n * step, 10) for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def click_ticks(most: int) -> list[float]:
    """Ticks for clicks 1 to ``most``, 1 among them."""
    step = 1 if most <= 8 else 5 if most <= 40 else 10 * math.ceil(most / 100)
    return [1, *(n for n in range(step, most + 1, step) if n > 1)]


def _runs(values: Sequence[float] | np.ndarray) -> list[list[int]]:
    runs: list[list[int]] = [[]]
    for index, value in enumerate(values):
        if math.isfinite(value):
            runs[-1].append(index)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{safe(text)}</text>'
