"""The picture of the demonstration: time to first token, and where each prompt's KV came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memfabric.demo.report import DemoReport
from memfabric.units import MIB

_COLD, _POOL, _COMPUTED, _INK = "#9aa5b1", "#0b7a75", "#d98e04", "#22303c"


def draw(report: DemoReport, path: Path) -> None:
    """Write a PNG. `path`'s directory must exist; nothing else of matplotlib's state is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(11, 4.8), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.1, wspace=0.02))
    FigureCanvasAgg(figure)
    times, moved = figure.subplots(1, 2, width_ratios=[1.1, 1])
    _draw_times(times, report)
    _draw_tokens(moved, report)
    for axes in (times, moved):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#8895a0")
        axes.tick_params(colors=_INK, length=0)
    figure.suptitle(
        "KV blocks shared through the pool: the decode process starts where prefill ended",
        fontsize=13, fontweight="bold", color=_INK, x=0.01, ha="left",
    )  # fmt: skip
    verdict = "identical" if report.identical else "DIFFERENT"
    figure.supxlabel(
        f"{report.model}, {report.dtype}, one CPU thread a process, {report.nodes} memory nodes, "
        f"blocks of {report.block_tokens} tokens · medians · generated tokens with and without the pool: {verdict}",
        fontsize=8, color="#5a6772", x=0.01, ha="left",
    )  # fmt: skip
    figure.savefig(path, format="png", facecolor="white")


def _draw_times(axes: Any, report: DemoReport) -> None:
    width = 0.36
    top = max(request.cold_s for request in report.requests)
    for place, request in enumerate(report.requests):
        bars = ((-1, request.cold_s, _COLD, "without the pool"), (1, request.pool_s, _POOL, "with the pool"))
        for side, height, color, label in bars:
            x = place + side * width / 2
            axes.bar(x, height, width * 0.94, color=color, label=label if not place else None, zorder=2)
            at, alignment, text = x, "center", f"{height:.2f} s"
            if side > 0:  # from the bar's left edge on, so that it does not run into the taller bar
                at, alignment = x - width * 0.45, "left"
                text += f"\n{request.speedup_ratio:.{0 if request.speedup_ratio >= 10 else 1}f}x sooner"
            axes.annotate(
                text, (at, height), xytext=(0, 4), textcoords="offset points",
                ha=alignment, va="bottom", fontsize=9.5, color=_INK, fontweight="bold" if side > 0 else None,
            )  # fmt: skip
    labels = [
        f"{request.name}\n{request.reused_tokens:,} of {request.prompt_tokens:,} tokens reused"
        for request in report.requests
    ]
    axes.set_xticks(range(len(labels)), labels, fontsize=9.5)
    axes.set_ylim(0, top * 1.2)
    axes.set_xlim(-0.6, len(report.requests) - 0.4)
    axes.set_ylabel("time to first token (s)", color=_INK)
    axes.set_title("Time to first token", loc="left", fontsize=11, color=_INK)
    axes.grid(axis="y", color="#e4e8ec", zorder=0)
    axes.legend(frameon=False, fontsize=9, loc="upper right", ncols=2)


def _draw_tokens(axes: Any, report: DemoReport) -> None:
    """Per process, how much of the prompt's KV was read, and how much computed and written."""
    rows = [(f"prefill\n{report.prefill.name}", 0, report.prefill.bytes_written, report.prefill.blocks_written, 0)]
    for request in report.requests:
        row = (request.bytes_read, request.bytes_written, request.blocks_written, request.blocks_read)
        rows.append((f"decode\n{request.name}", *row))
    most = max(read + written for _, read, written, _, _ in rows) / MIB
    for place, (_, read, written, blocks_written, blocks_read) in enumerate(rows):
        start = 0.0
        parts = ((read, blocks_read, _POOL, "read"), (written, blocks_written, _COMPUTED, "written"))
        for size, blocks, color, word in parts:
            if not size:
                continue
            length = size / MIB
            axes.barh(place, length, 0.5, left=start, color=color, zorder=2)
            text = f"{length:.1f} MiB {word}\n{blocks} blocks"
            if length > most * 0.3:
                middle = start + length / 2
                axes.text(middle, place, text, ha="center", va="center", color="white", fontsize=9, zorder=3)
            else:
                axes.text(start + length + most * 0.015, place, text, va="center", color=_INK, fontsize=9)
            start += length
    axes.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=9.5)
    axes.invert_yaxis()
    axes.set_xlim(0, most * 1.3)
    axes.set_xlabel("KV bytes moved (MiB)", color=_INK)
    axes.set_title("KV blocks read from and written to the pool", loc="left", fontsize=11, color=_INK)
    axes.grid(axis="x", color="#e4e8ec", zorder=0)
