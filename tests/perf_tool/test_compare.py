"""Verdicts: what changed is told, what only scatters is not, and what can't be told is called so."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from memfabric.errors import UsageError
from memfabric.perf.compare import FASTER, METRICS, NOISY, SAME, SLOWER, compare
from memfabric.perf.statistics import _ways, least_repeats, shift
from tests.perf_tool.conftest import noisy, point, record

Make = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 3), (4, 4), (3, 5)])
def test_orders_are_counted_as_by_hand(m: int, n: int) -> None:
    by_hand: Counter[int] = Counter()
    for places in itertools.combinations(range(m + n), m):
        by_hand[sum(place - at for at, place in enumerate(places))] += 1
    assert _ways(m, n) == [by_hand[u] for u in range(m * n + 1)]


def test_bounds_miss_no_more_often_than_they_may() -> None:
    chance = random.Random(11)
    missed = 0
    for _ in range(1000):
        old = [chance.gauss(0, 1) for _ in range(6)]
        new = [chance.gauss(0.5, 1) for _ in range(6)]
        found = shift(old, new, 0.1)
        assert found.low is not None and found.high is not None and found.low <= found.estimate <= found.high
        missed += not found.low <= 0.5 <= found.high
    assert 20 < missed < 130  # a tenth at most, apart from chance; and the bounds are not as wide as the world


def test_how_many_repeats_are_needed() -> None:
    assert least_repeats(0.01) == 5
    assert shift([1, 2, 3, 4], [5, 6, 7, 8], 0.01).low is None
    assert shift([1.0] * 5, [2.0] * 5, 0.01).low == 1.0
    large = shift([float(x) for x in range(40)], [float(x) + 100 for x in range(40)], 0.01)
    assert large.low is not None and 70 < large.low < 100


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (noisy(10e9, 0.01, 1), noisy(8e9, 0.01, 2), SLOWER),
        (noisy(10e9, 0.01, 3), noisy(12e9, 0.01, 4), FASTER),
        (noisy(10e9, 0.01, 5), noisy(10e9, 0.01, 6), SAME),
        (noisy(10e9, 0.002, 7), noisy(10.2e9, 0.002, 8), SAME),  # certain, but too little to matter
        (noisy(10e9, 0.4, 9), noisy(9e9, 0.4, 10), NOISY),
        (noisy(10e9, 0.01, 11, 3), noisy(5e9, 0.01, 12, 3), NOISY),  # too few repeats, however far apart
    ],
)
def test_verdicts(document: Make, old: list[float], new: list[float], verdict: str) -> None:
    found = compare(document(record(point(), old)), document(record(point(), new)))
    assert [each.verdict for each in found.verdicts] == [verdict]
    assert found.count(verdict) == 1


def test_the_same_noise_is_seldom_called_a_change(document: Make) -> None:
    points = [point(batch=batch) for batch in range(1, 201)]
    sides = [[record(each, noisy(10e9, 0.2, seed + each.batch)) for each in points] for seed in (1000, 5000)]
    found = compare(document(*sides[0]), document(*sides[1]))
    assert found.count(SLOWER) + found.count(FASTER) <= 6  # 2 are expected
    assert found.count(NOISY) > 150


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_calls_less_speed_slower(document: Make, metric: str) -> None:
    for op in ("read", "match"):
        at = point(op=op)
        sides = [document(record(at, noisy(speed, 0.01, seed))) for speed, seed in ((10e6, 1), (7e6, 2))]
        [verdict] = compare(*sides, metric).verdicts
        assert verdict.verdict == SLOWER
        assert (verdict.change > 0) == (metric in ("p50", "p99"))


def test_points_of_one_side_are_listed_and_doubts_are_named(document: Make) -> None:
    both, gone, fresh = point(batch=1), point(batch=2), point(batch=3)
    speeds = noisy(1e9, 0.01, 1)
    old = document(record(both, speeds), record(gone, speeds), stopped="interrupted")
    new = document(record(both, speeds), record(fresh, speeds))
    new["machine"]["cpu"] = "another"
    found = compare(old, new)
    assert [each["batch"] for each in found.only_old] == [2]
    assert [each["batch"] for each in found.only_new] == [3]
    assert any("cpu differs" in doubt for doubt in found.doubts)
    assert any("old sweep is not complete: interrupted" in doubt for doubt in found.doubts)
    assert found.document()["counts"][SAME] == 1


def test_a_machine_in_another_state_is_noticed_by_its_limits(document: Make) -> None:
    points = [point(batch=batch) for batch in (1, 2, 3)]
    old = document(*(record(each, noisy(1e10, 0.01, 1), limit=2e10) for each in points))
    new = document(*(record(each, noisy(8e9, 0.01, 2), limit=1.6e10) for each in points))
    found = compare(old, new)
    assert found.count(SLOWER) == 3
    assert any("memcpy beside these points changed too, by -20.0%" in doubt for doubt in found.doubts)
    by_ratio = compare(old, new, "ratio")
    assert by_ratio.count(SAME) == 3 and by_ratio.doubts == []
    assert compare(old, old).doubts == []


def test_a_digest_or_none_makes_another_point(document: Make) -> None:
    speeds = noisy(1e9, 0.01, 1)
    verified = {**record(point(), speeds), "verify": True}
    with pytest.raises(UsageError, match="no point in common"):
        compare(document(record(point(), speeds)), document(verified))


@pytest.mark.parametrize(
    "wrong", [{"metric": "luck"}, {"effect": 0.0}, {"effect": 1.5}, {"alpha": 0.0}, {"alpha": 0.6}]
)
def test_senseless_settings_are_refused(document: Make, wrong: dict[str, Any]) -> None:
    one = document(record(point(), noisy(1e9, 0.01, 1)))
    with pytest.raises(UsageError):
        compare(one, one, **wrong)
