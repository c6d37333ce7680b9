"""Repeated, interleaved timing and its summaries.

Machines are shared and noisy. So whatever is compared is measured in turns, a few microseconds to milliseconds apart,
and a ratio is taken between neighbours: noise hits both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Action = Callable[[int], None]
"""Does something once; gets the number of its turn."""
Samples = dict[str, list[int]]
"""Nanoseconds per turn, by name."""


def timed(action: Callable[[], object]) -> int:
    """Nanoseconds that a call takes."""
    begin = time.perf_counter_ns()
    action()
    return time.perf_counter_ns() - begin


def take_turns(
    actions: Mapping[str, Callable[[int], int]], budget_s: float, least: int, most: int, warm_turns: int
) -> Samples:
    """Let actions take turns until the time is up; each returns its own nanoseconds.

    Args:
        actions: by name; called with the number of the turn. Who begins changes with every turn.
        budget_s: wall time, after the warm-up.
        least, most: turns that are taken however long, or short, that is.
        warm_turns: turns before that, which are not kept.
    """
    names = list(actions)
    samples: Samples = {name: [] for name in names}
    end_s = 0.0
    for turn in range(warm_turns + most):
        if turn == warm_turns:
            end_s = time.monotonic() + budget_s
        kept = turn - warm_turns
        if kept >= least and time.monotonic() >= end_s:
            break
        for at in range(len(names)):
            name = names[(turn + at) % len(names)]
            taken = actions[name](turn)
            if kept >= 0:
                samples[name].append(taken)
    return samples


def summary(nanoseconds: list[int]) -> dict[str, float]:
    """Percentiles in microseconds."""
    points = np.percentile(np.array(nanoseconds), [0, 10, 25, 50, 75, 90, 99, 99.9]) / 1e3
    names = ("min_us", "p10_us", "p25_us", "p50_us", "p75_us", "p90_us", "p99_us", "p999_us")
    return {"count": len(nanoseconds), **{name: round(float(at), 3) for name, at in zip(names, points, strict=True)}}


def ratio(limit: list[int], measured: list[int]) -> dict[str, float]:
    """How near to the limit: 1 is as fast. The median over neighbouring turns, its quartiles, and that of the best
    tenths of both, which is what is left when the machine is quiet."""
    pairs = np.array(limit) / np.array(measured)
    low, middle, high = np.percentile(pairs, [25, 50, 75])
    best = np.percentile(limit, 10) / np.percentile(measured, 10)
    return {
        "median": round(float(middle), 4),
        "p25": round(float(low), 4),
        "p75": round(float(high), 4),
        "best": round(float(best), 4),
    }


def histogram(nanoseconds: list[int], bins: int = 120) -> dict[str, Any]:
    """Counts over logarithmic bins from the fastest to the slowest, in microseconds."""
    values = np.array(nanoseconds) / 1e3
    edges = np.geomspace(max(values.min(), 0.1), values.max() * 1.001 + 0.1, bins + 1)
    counts, _ = np.histogram(values, edges)
    return {"edges_us": [round(float(edge), 3) for edge in edges], "counts": counts.tolist()}
