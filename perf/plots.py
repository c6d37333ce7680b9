"""A run's results as pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from perf.plan import size_text
from perf.targets import GET_P50_US, RATIO_FROM_BYTES, UNVERIFIED_RATIO, VERIFIED_RATIO

COLOURS = ("#b7bcc4", "#7fb3d5", "#2e86c1", "#1b4f72")
"""By batch, small to large."""
_PANELS = (
    ("get", "verify_off", "get, verification off", UNVERIFIED_RATIO),
    ("get", "verify_on", "get, verification on", VERIFIED_RATIO),
    ("put", "put", "put, whole call (two requests to the server)", VERIFIED_RATIO),
    ("put", "write", "put, data part (copy, digests, headers)", VERIFIED_RATIO),
)
_INK = "#30343b"
TALLEST = 1.75
"""Ratios beyond are cut off, with their value above. They are of memcpy that does not stream past the cache."""


def draw(results: dict[str, Any], facts: dict[str, Any], directory: Path) -> list[Path]:
    """Write the pictures; returns their paths."""
    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#9aa0a8",
            "text.color": _INK,
            "axes.labelcolor": _INK,
            "xtick.color": _INK,
            "ytick.color": _INK,
        }
    )
    below = f"{facts['cpu']}, {facts['cores']} cores · {facts['date'][:10]} · memfabric {facts['revision']}"
    copies, latency = directory / "bench-copies.png", directory / "bench-latency.png"
    _draw_copies(results, below, copies)
    _draw_latency(results["latency"], below, latency)
    return [copies, latency]


def _draw_copies(results: dict[str, Any], below: str, path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), sharex=True)
    for place, (what, part, title, target) in zip(axes.flat, _PANELS, strict=True):
        _draw_ratios(place, results[what], part, target)
        place.set_title(title, loc="left", fontweight="bold", fontsize=11)
    for place in axes[:, 0]:
        place.set_ylabel("speed, of block-wise memcpy")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.suptitle("memfabric against a memcpy of the same blocks", x=0.012, ha="left", fontsize=14, fontweight="bold")
    figure.legend(handles, labels, loc="upper left", ncols=len(labels), frameon=False, bbox_to_anchor=(0.005, 0.965))
    figure.text(0.012, 0.008, below, fontsize=8, color="#70767f")
    figure.tight_layout(rect=(0, 0.025, 1, 0.945))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_ratios(place: Axes, records: list[dict[str, Any]], part: str, target: float) -> None:
    """Bars by block size, one for each batch; thin lines from quartile to quartile."""
    sizes = sorted({record["block_bytes"] for record in records})
    batches = sorted({record["batch"] for record in records})
    width = 0.8 / len(batches)
    tall: list[tuple[float, float]] = []
    for at, batch in enumerate(batches):
        chosen = [record for record in records if record["batch"] == batch]
        ratios = [record["threads"]["auto"][part]["ratio"] for record in chosen]
        where = [sizes.index(record["block_bytes"]) + (at - (len(batches) - 1) / 2) * width for record in chosen]
        middle = [each["median"] for each in ratios]
        spread = [
            [each["median"] - each["p25"] for each in ratios],
            [each["p75"] - each["median"] for each in ratios],
        ]
        tall += [(x, value) for x, value in zip(where, middle, strict=True) if value > TALLEST]
        colour = COLOURS[at % len(COLOURS)]
        label = f"batches of {batch}" if batch > 1 else "single blocks"
        place.bar(where, middle, width * 0.92, color=colour, label=label)
        place.errorbar(where, middle, yerr=spread, fmt="none", ecolor="#50555e", elinewidth=0.8)
    first = next((at for at, size in enumerate(sizes) if size >= RATIO_FROM_BYTES), None)
    if first is not None:
        place.hlines(target, first - 0.5, len(sizes) - 0.5, color="#c0392b", linewidth=1.3, linestyle="--")
        place.text(
            len(sizes) - 0.48, target, f"target\n{target:.0%}", color="#c0392b", fontsize=8, va="center", ha="left"
        )
    place.axhline(1.0, color="#9aa0a8", linewidth=0.8, zorder=0)
    place.set_xticks(range(len(sizes)), [size_text(size) for size in sizes])
    place.set_ylim(0, TALLEST)
    for x, value in tall:
        place.text(x, TALLEST * 1.005, f"{value:.0%}", ha="center", va="bottom", fontsize=7, color="#70767f")
    place.set_xlim(-0.55, len(sizes) - 0.45)
    place.yaxis.set_major_formatter(PercentFormatter(1.0))
    place.grid(axis="y", color="#e6e8eb", linewidth=0.7)
    place.set_axisbelow(True)
    place.tick_params(labelbottom=True)


def _draw_latency(records: list[dict[str, Any]], below: str, path: Path) -> None:
    figure, place = plt.subplots(figsize=(10, 4.8))
    chosen = [record for record in records if record["from"] == "memory"]
    colours = {
        ("memcpy", "memcpy"): "#9aa0a8",
        ("optimistic", "unverified"): "#7fb3d5",
        ("optimistic", "verified"): "#1b4f72",
        ("leased", "unverified"): "#f0b27a",
        ("leased", "verified"): "#ca6f1e",
    }
    for record in chosen:
        edges, counts = record["histogram"]["edges_us"], record["histogram"]["counts"]
        total = max(1, sum(counts))
        # The bins of different records differ in width: what is drawn is the share per doubling of the time.
        doubling = (edges[-1] / edges[0]) ** (1 / len(counts))
        shares = [count / total / max(1e-9, math.log2(doubling)) for count in counts]
        name = "memcpy" if record["mode"] == "memcpy" else f"{record['mode']}, {record['check']}"
        label = f"{name}: p50 {record['p50_us']:.1f}, p99 {record['p99_us']:.1f} µs"
        place.stairs(shares, edges, color=colours[record["mode"], record["check"]], label=label, fill=True, alpha=0.55)
    place.axvline(GET_P50_US, color="#c0392b", linewidth=1.3, linestyle="--")
    place.text(
        GET_P50_US * 1.05, place.get_ylim()[1] * 0.4, f"target for the median:\n{GET_P50_US:.0f} µs", color="#c0392b",
        fontsize=9, va="top",
    )  # fmt: skip
    place.set_xscale("log")
    slowest = max(record["p999_us"] for record in chosen)
    place.set_xlim(min(record["min_us"] for record in chosen) * 0.8, slowest * 1.3)
    place.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    place.set_xlabel("µs for one get of one 64 KiB block, from Python")
    place.set_ylabel("how often")
    place.set_yticks([])
    place.legend(frameon=False, loc="upper center", fontsize=9, bbox_to_anchor=(0.56, 1.0))
    place.set_title("latency of a single get, blocks from memory", loc="left", fontweight="bold")
    figure.text(0.012, 0.012, below, fontsize=8, color="#70767f")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
