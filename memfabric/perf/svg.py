"""Diagrams and histograms as SVG, for pages that must show themselves without a network and without matplotlib."""

from __future__ import annotations

import math
from html import escape

from memfabric.perf.charts import Line, Panel
from memfabric.perf.histogram import Histogram, edges_ns
from memfabric.perf.plots import COLOURS

_WIDTH, _HEIGHT = 620, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 30, 44
_LEGEND_ROW = 16
_TEXT_WIDTH = 6.2


class _Scale:
    """A value's place between two ends of a line of pixels."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool) -> None:
        self._log = log
        self._low, self._high = (math.log(low), math.log(high)) if log else (low, high)
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        at = math.log(max(value, 1e-12)) if self._log else value
        span = self._high - self._low
        return self._start + (self._end - self._start) * ((at - self._low) / span if span else 0.5)


def diagram(panel: Panel) -> str:
    """A panel with its legend below."""
    height = _HEIGHT + len(panel.lines) * _LEGEND_ROW
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(panel.title, quote=True)}">',
        f'<text x="4" y="18" class="title">{escape(panel.title)}</text>',
    ]
    values = [value for line in panel.lines for value in (*line.ys, *line.lows, *line.highs) if value > 0]
    if values:
        parts += _axes_and_lines(panel, values)
    if panel.left_out:
        parts.append(f'<text x="{_WIDTH - 4}" y="18" class="note end">{panel.left_out} more in the table</text>')
    return "".join([*parts, *_legend(panel), "</svg>"])


def _axes_and_lines(panel: Panel, values: list[float]) -> list[str]:
    positions = [value for value, _ in panel.ticks]
    log_x = len(positions) > 1 and min(positions) > 0
    across = _Scale(min(positions), max(positions), _LEFT + 14, _WIDTH - _RIGHT - 14, log=log_x)
    log_y = max(values) / min(values) > 30
    marks = _marks(min(values), max(values), log=log_y)
    up = _Scale(marks[0], max(marks[-1], max(values)), _HEIGHT - _BOTTOM, _TOP, log=log_y)
    parts = []
    for mark in marks:
        y = up(mark)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" class="end">{mark:g}</text>')
    last = -math.inf
    for value, word in panel.ticks:
        x = across(value)
        if x - last < _TEXT_WIDTH * len(word) + 6:
            continue  # no room for its word
        last = x
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" class="middle">{escape(word)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 8}" class="middle">{escape(panel.across)}</text>')
    parts.append(f'<text transform="translate(14 {(_HEIGHT - _BOTTOM + _TOP) / 2}) rotate(-90)" class="middle">')
    parts.append(f"{escape(panel.up)}</text>")
    for line in panel.lines:
        parts += _draw_line(line, across, up)
    return parts


def _draw_line(line: Line, across: _Scale, up: _Scale) -> list[str]:
    colour = COLOURS[line.colour % len(COLOURS)]
    points = [(across(x), up(y)) for x, y in zip(line.xs, line.ys, strict=True)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    if line.limit:
        return [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-dasharray="5 4" opacity="0.8"/>']
    parts = []
    for (x, _), low, high in zip(points, line.lows, line.highs, strict=True):
        low_y, high_y = up(low), up(high)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low_y:.1f}" y2="{high_y:.1f}" stroke="{colour}" opacity="0.5"/>'
        )
    parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for (x, y), value in zip(points, line.ys, strict=True):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{colour}"><title>{value:.4g}</title></circle>')
    return parts


def _legend(panel: Panel) -> list[str]:
    parts = []
    for at, line in enumerate(panel.lines):
        y = _HEIGHT + at * _LEGEND_ROW + 4
        colour = COLOURS[line.colour % len(COLOURS)]
        dash = ' stroke-dasharray="5 4"' if line.limit else ' stroke-width="2"'
        parts.append(f'<line x1="{_LEFT}" x2="{_LEFT + 26}" y1="{y}" y2="{y}" stroke="{colour}"{dash}/>')
        parts.append(f'<text x="{_LEFT + 34}" y="{y + 4}">{escape(line.label)}</text>')
    return parts


def _marks(low: float, high: float, *, log: bool) -> list[float]:
    """Round numbers that enclose the values."""
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        return [10.0**power for power in range(first, max(last, first + 1) + 1)]
    rough = high / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough)
    return [round(step * number, 12) for number in range(math.ceil(high / step) + 1)]


def bars(histogram: Histogram, width: int = 220, height: int = 34) -> str:
    """A histogram over a logarithmic axis, least to greatest; heights are shares per width."""
    if not histogram.counts:
        return ""
    low = math.log2(max(1, histogram.least_ns))
    high = max(low + 1, math.log2(max(1, histogram.most_ns)) + 0.01)
    count = width // 4
    cells = [0.0] * count
    for bucket, times in histogram.counts.items():
        start, end = edges_ns(bucket)
        where = (math.log2(max(1.0, (start + end - 1) / 2)) - low) / (high - low)
        cells[min(count - 1, max(0, int(where * count)))] += times
    top = max(cells)
    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" class="bars">']
    for at, number in enumerate(cells):
        if number:
            tall = max(1.0, number / top * height)
            parts.append(f'<rect x="{at * 4}" y="{height - tall:.1f}" width="3" height="{tall:.1f}"/>')
    return "".join([*parts, "</svg>"])
