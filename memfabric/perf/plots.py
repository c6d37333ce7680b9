"""A sweep as a picture: a PNG, drawn by matplotlib."""

from __future__ import annotations

import importlib.util
import io
from typing import TYPE_CHECKING, Any

from memfabric.errors import UsageError
from memfabric.perf.charts import Line, Panel, about, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#1b4f72", "#ca6f1e", "#1e8449", "#7d3c98", "#c0392b", "#148f77", "#7f8c8d", "#b7950b")
_INK = "#30343b"


def check() -> None:
    """Refuse before anything is measured.

    Raises:
        UsageError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "a PNG needs matplotlib, which is not installed: pip install 'memfabric[plot]' (HTML needs none)"
        )


def png(document: dict[str, Any]) -> bytes:
    """The picture.

    Raises:
        UsageError: matplotlib is missing, or nothing was measured.
    """
    check()
    rows = panels(document)
    if not rows:
        raise UsageError("nothing was measured, so there is nothing to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 0.9 + 4.1 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 2, squeeze=False)
    for row, pair in zip(axes, rows, strict=True):
        for place, panel in zip(row, pair, strict=True):
            _draw(place, panel)
    figure.supxlabel(about(document), x=0.01, ha="left", fontsize=8, color="#70767f")
    out = io.BytesIO()
    figure.savefig(out, dpi=120, format="png")
    return out.getvalue()


def _draw(place: Axes, panel: Panel) -> None:
    from matplotlib.ticker import NullFormatter

    for line in panel.lines:
        _draw_line(place, line)
    # Sweeps multiply; but 0 threads, which means as many as pay, has no logarithm.
    if len(panel.ticks) > 1 and all(value > 0 for value, _ in panel.ticks):
        place.set_xscale("log", base=2)
    place.set_xticks([value for value, _ in panel.ticks], [word for _, word in panel.ticks])
    place.minorticks_off()
    tops = [high for line in panel.lines for high in line.highs]
    lows = [low for line in panel.lines for low in line.lows if low > 0]
    if lows and max(tops) / min(lows) > 30:
        place.set_yscale("log")
        place.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        place.yaxis.set_minor_formatter(NullFormatter())
    else:
        place.set_ylim(bottom=0)
    place.set_title(panel.title, loc="left", fontweight="bold", fontsize=11, color=_INK)
    place.set_xlabel(panel.across, color=_INK)
    place.set_ylabel(panel.up, color=_INK)
    place.grid(color="#e6e8eb", linewidth=0.7)
    place.set_axisbelow(True)
    for side in ("top", "right"):
        place.spines[side].set_visible(False)
    if panel.lines:
        place.legend(frameon=False, fontsize=8)
    if panel.left_out:
        place.text(1, 1.01, f"{panel.left_out} more in the table", transform=place.transAxes, ha="right", fontsize=8)


def _draw_line(place: Axes, line: Line) -> None:
    colour = COLOURS[line.colour % len(COLOURS)]
    if line.limit:
        place.plot(line.xs, line.ys, "--", color=colour, linewidth=1.1, alpha=0.75, label=line.label)
        return
    place.plot(line.xs, line.ys, "o-", color=colour, linewidth=1.8, markersize=4, label=line.label)
    if len(line.xs) > 1:
        place.fill_between(line.xs, line.lows, line.highs, color=colour, alpha=0.13, linewidth=0)
    else:
        place.vlines(line.xs, line.lows, line.highs, color=colour, linewidth=1.2)
