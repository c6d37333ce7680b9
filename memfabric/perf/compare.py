"""Holds two sweeps against each other, point by point, without taking noise for a change.

Repeats of a point are compared on a logarithmic scale, so that a shift is a ratio. A verdict needs both: bounds that
exclude "no change", and a change of at least the effect that matters. What the repeats cannot tell, they are not asked:
a machine that was in another state for the whole of a run looks like a change, whatever the statistics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from memfabric.errors import UsageError
from memfabric.perf.plan import REQUESTS
from memfabric.perf.results import key_of
from memfabric.perf.statistics import least_repeats, shift

FASTER, SLOWER, SAME, NOISY = "faster", "slower", "no difference shown", "too noisy"
METRICS = ("throughput", "ratio", "p50", "p99")
ALPHA = 0.01
"""Of the bounds: five repeats on each side are enough for it if they do not overlap at all."""
EFFECT = 0.05
_FACTS = ("cpu", "cores", "memory_bytes", "hypervisor", "kernel", "digest")
_SETTINGS = ("working_set_bytes", "random_order", "repeats", "verify")


@dataclass(frozen=True)
class Verdict:
    """On one point.

    Attributes:
        record: of the new sweep.
        old, new: medians over the repeats, in the metric's unit.
        change: new over old, less one; 0.1: a tenth more. By the shift between the repeats, not by the medians.
        low, high: bounds of it; None: too few repeats for any.
        verdict: one of the four; of the speed, so that a shorter latency is faster.
    """

    record: dict[str, Any]
    old: float
    new: float
    change: float
    low: float | None
    high: float | None
    verdict: str

    def document(self) -> dict[str, Any]:
        """For JSON."""
        point = {name: value for name, value in self.record.items() if name not in _LONG}
        return {
            "point": point,
            "old": self.old,
            "new": self.new,
            "change": round(self.change, 4),
            "low": None if self.low is None else round(self.low, 4),
            "high": None if self.high is None else round(self.high, 4),
            "verdict": self.verdict,
        }


_LONG = ("repeats", "histogram", "summary")


@dataclass(frozen=True)
class Comparison:
    """All verdicts, what could not be compared, and what makes the comparison doubtful.

    Attributes:
        only_old, only_new: records of points that the other sweep did not measure.
        doubts: differences between the runs themselves, in words.
    """

    metric: str
    alpha: float
    effect: float
    verdicts: list[Verdict]
    only_old: list[dict[str, Any]]
    only_new: list[dict[str, Any]]
    doubts: list[str]

    def count(self, verdict: str) -> int:
        """Points with a verdict."""
        return sum(each.verdict == verdict for each in self.verdicts)

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "schema": "memfabric-perf-compare/1",
            "metric": self.metric,
            "alpha": self.alpha,
            "effect": self.effect,
            "counts": {name: self.count(name) for name in (FASTER, SLOWER, SAME, NOISY)},
            "verdicts": [each.document() for each in self.verdicts],
            "only_old": [_short(record) for record in self.only_old],
            "only_new": [_short(record) for record in self.only_new],
            "doubts": self.doubts,
        }


def compare(
    old: dict[str, Any], new: dict[str, Any], metric: str = "throughput", effect: float = EFFECT, alpha: float = ALPHA
) -> Comparison:
    """Hold two documents against each other.

    Args:
        metric: one of `METRICS`; ``ratio`` is the speed over that of the limit beside it, and so the one to take where
            the machines differ.
        effect: the least change that matters: 0.05 is a twentieth.
        alpha: how often bounds may miss, for each point.

    Raises:
        UsageError: a value makes no sense, or the documents have no point in common.
    """
    if metric not in METRICS:
        raise UsageError(f"no metric {metric!r}; there are: {', '.join(METRICS)}")
    if not 0 < effect < 1:
        raise UsageError(f"the effect must be above 0 and below 1, not {effect:g}")
    if not 0 < alpha < 0.5:
        raise UsageError(f"alpha must be above 0 and below 0.5, not {alpha:g}")
    before = {key_of(record): record for record in old["points"] if record.get("repeats")}
    after = {key_of(record): record for record in new["points"] if record.get("repeats")}
    verdicts: list[Verdict] = []
    only_old = [record for key, record in before.items() if key not in after]
    only_new = [record for key, record in after.items() if key not in before]
    for key, record in after.items():
        if key not in before:
            continue
        pair = values(before[key], metric), values(record, metric)
        if all(pair):
            verdicts.append(judge(record, *pair, metric=metric, effect=effect, alpha=alpha))
        else:
            (only_new if pair[1] else only_old).append(record)
    if not verdicts:
        raise UsageError(f"the two files have no point in common of which both know the {metric}")
    doubts = _doubts(old, new, verdicts, alpha)
    if metric != "ratio":
        pairs = [(before[key_of(verdict.record)], verdict.record) for verdict in verdicts]
        doubts += [said for limit in ("memcpy", "socket") if (said := _drift(pairs, limit, metric, effect))]
    return Comparison(metric, alpha, effect, verdicts, only_old, only_new, doubts)


def _drift(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], limit: str, metric: str, effect: float) -> str:
    """What limits beside the points say of the machine: they do not depend on memfabric, so they should be alike."""
    changes = []
    for records in pairs:
        old, new = (values({**record, "repeats": _beside(record, limit)}, metric) for record in records)
        if old and new:
            changes.append(math.log(median(new) / median(old)))
    if not changes or abs(median(changes)) < math.log1p(effect) / 2:
        return ""
    change = math.expm1(median(changes))
    return (
        f"{limit} beside these points changed too, by {change:+.1%}: the machine was in another state; compare by ratio"
    )


def _beside(record: dict[str, Any], limit: str) -> list[dict[str, Any]]:
    return [repeat[limit] for repeat in record["repeats"] if isinstance(repeat.get(limit), dict)]


def values(record: dict[str, Any], metric: str) -> list[float]:
    """A point's repeats in a metric; those that lack it or are not above 0 are left out."""
    found = []
    for repeat in record["repeats"]:
        if metric == "throughput":
            value = repeat.get("blocks_per_s" if record["op"] in REQUESTS else "bytes_per_s")
        elif metric == "ratio":
            value = repeat.get("ratio")
        else:
            value = repeat.get("latency", {}).get(f"{metric}_us")
        if isinstance(value, (int, float)) and value > 0:
            found.append(float(value))
    return found


def judge(
    record: dict[str, Any], old: Sequence[float], new: Sequence[float], *, metric: str, effect: float, alpha: float
) -> Verdict:
    """On the repeats of one point; both sides have some."""
    found = shift([math.log(value) for value in old], [math.log(value) for value in new], alpha)
    change = math.expm1(found.estimate)
    sign = -1 if metric in ("p50", "p99") else 1  # of the speed
    least = math.log1p(effect)
    if found.low is None or found.high is None:
        return Verdict(record, median(old), median(new), change, None, None, NOISY)
    speed = sign * found.estimate
    if not found.low <= 0 <= found.high and abs(speed) >= least:
        verdict = FASTER if speed > 0 else SLOWER
    elif found.high - found.low <= 2 * least:
        verdict = SAME  # a change of twice the effect would have shown
    else:
        verdict = NOISY
    low, high = math.expm1(found.low), math.expm1(found.high)
    return Verdict(record, median(old), median(new), change, low, high, verdict)


def _doubts(old: dict[str, Any], new: dict[str, Any], verdicts: Sequence[Verdict], alpha: float) -> list[str]:
    found = []
    for part, names in (("machine", _FACTS), ("sweep", _SETTINGS)):
        for name in names:
            before, after = old[part].get(name), new[part].get(name)
            if before != after:
                found.append(f"{name.replace('_', ' ')} differs: {before} and {after}")
    for which, document in (("old", old), ("new", new)):
        if document.get("stopped"):
            found.append(f"the {which} sweep is not complete: {document['stopped']}")
    least = least_repeats(alpha)
    short = sum(each.low is None for each in verdicts)
    if short:
        found.append(
            f"{short} of {len(verdicts)} points have too few repeats for any verdict; alpha {alpha:g} needs {least} on "
            "each side"
        )
    return found


def _short(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in _LONG}
