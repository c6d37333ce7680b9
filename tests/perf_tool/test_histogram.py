"""Histograms add up, and what they tell is off by no more than they promise."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from memfabric.perf.histogram import MOST_NS, Histogram, edges_ns

DURATIONS = st.lists(st.integers(1, MOST_NS), min_size=1, max_size=200)


def of(values: list[int]) -> Histogram:
    made = Histogram()
    made.add(values)
    return made


@given(DURATIONS, DURATIONS)
def test_parts_add_up_to_the_whole(first: list[int], second: list[int]) -> None:
    merged = of(first)
    merged.merge(of(second))
    whole = of(first + second)
    assert merged.document() == whole.document()
    assert merged.count == len(first) + len(second)


@given(DURATIONS)
def test_a_value_lies_in_its_bucket_and_buckets_do_not_overlap(values: list[int]) -> None:
    for value in values:
        [bucket] = of([value]).counts
        low, high = edges_ns(bucket)
        assert low <= value < high
        assert edges_ns(bucket + 1)[0] == high
        assert high - low <= max(1, value / 32)


@given(DURATIONS, st.sampled_from([0.5, 0.9, 0.99]))
def test_quantiles_are_near_those_of_the_values(values: list[int], ratio: float) -> None:
    found = of(values).quantile_ns(ratio)
    if len(values) * (1 - ratio) < 1 - 1e-9:
        assert found is None  # it could not be told from the greatest
        return
    exact = float(np.sort(values)[int(np.ceil(ratio * len(values))) - 1])
    assert found is not None
    assert abs(found - exact) <= max(1.0, exact / 60)


def test_nothing_and_out_of_range() -> None:
    assert Histogram().summary()["p50_us"] is None
    assert Histogram().quantile_ns(0.5) is None
    made = of([0, -5, 1 << 60])
    assert (made.least_ns, made.most_ns, made.count) == (1, MOST_NS, 3)


def test_a_document_is_read_back() -> None:
    made = of([1, 5, 1000, 1001, 10**9])
    counts = [(int(bucket), int(count)) for bucket, count in made.document()["counts"]]  # type: ignore[attr-defined]
    assert Histogram.load(counts, made.least_ns, made.most_ns).document() == made.document()
