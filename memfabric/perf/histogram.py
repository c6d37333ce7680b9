"""Latencies as counts over buckets that grow with the value, so that histograms of processes and repeats add up.

Every power of two is cut into `_PARTS` buckets of equal width, as HdrHistogram does: a value read back is off by at
most half a bucket, 1.6 %. Least and greatest are kept as they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

_BITS = 5
_PARTS = 1 << _BITS
MOST_NS = 1 << 50
"""Thirteen days; whatever takes longer counts as this."""
QUANTILES = {"p50_us": 0.5, "p90_us": 0.9, "p99_us": 0.99, "p999_us": 0.999}


class Histogram:
    """Counts of durations in nanoseconds.

    Attributes:
        counts: by number of the bucket.
        least_ns, most_ns: of all that was added; 0 when nothing was.
    """

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.least_ns = 0
        self.most_ns = 0

    @property
    def count(self) -> int:
        """How many were added."""
        return sum(self.counts.values())

    def add(self, durations_ns: npt.ArrayLike) -> None:
        """Count durations; those below 1 ns count as 1 ns."""
        values = np.clip(np.asarray(durations_ns, np.int64), 1, MOST_NS)
        if not values.size:
            return
        self._widen(int(values.min()), int(values.max()))
        # frexp is exact here: the values are below 2**53. Below 2**_BITS the buckets are 1 ns wide.
        octave = np.maximum(np.frexp(values.astype(np.float64))[1] - 1 - _BITS, 0)
        index = octave * _PARTS + (values >> octave)
        for bucket, count in zip(*(column.tolist() for column in np.unique(index, return_counts=True)), strict=True):
            self.counts[bucket] = self.counts.get(bucket, 0) + count

    def merge(self, other: Histogram) -> None:
        """Add all that another one has."""
        if other.counts:
            self._widen(other.least_ns, other.most_ns)
        for bucket, count in other.counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + count

    def quantile_ns(self, ratio: float) -> float | None:
        """The duration that a share of all does not exceed; None where too few were added to tell it from the greatest.

        Args:
            ratio: above 0, below 1.
        """
        total = self.count
        if not total or total * (1 - ratio) < 1 - 1e-9:
            return None
        rank, seen = math.ceil(ratio * total), 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= rank:
                low, high = edges_ns(bucket)
                return float(min(max((low + high - 1) / 2, self.least_ns), self.most_ns))
        raise AssertionError("the counts add up to the total")

    def summary(self) -> dict[str, float | int | None]:
        """Percentiles in microseconds; None where there are too few values for one."""
        found: dict[str, float | int | None] = {"count": self.count, "min_us": self.least_ns / 1e3}
        for name, ratio in QUANTILES.items():
            at = self.quantile_ns(ratio)
            found[name] = None if at is None else round(at / 1e3, 3)
        found["max_us"] = self.most_ns / 1e3
        return found

    def document(self) -> dict[str, object]:
        """For JSON; `load` reads it back."""
        return {
            "parts_per_octave": _PARTS,
            "least_ns": self.least_ns,
            "most_ns": self.most_ns,
            "counts": [[bucket, self.counts[bucket]] for bucket in sorted(self.counts)],
        }

    @classmethod
    def load(cls, counts: Iterable[tuple[int, int]], least_ns: int, most_ns: int) -> Histogram:
        """From what `document` gave."""
        made = cls()
        made.counts = dict(counts)
        made.least_ns, made.most_ns = least_ns, most_ns
        return made

    def _widen(self, least_ns: int, most_ns: int) -> None:
        self.least_ns = min(self.least_ns or least_ns, least_ns)
        self.most_ns = max(self.most_ns, most_ns)


def edges_ns(bucket: int) -> tuple[int, int]:
    """The least duration in a bucket, and the least beyond it."""
    octave = max(bucket // _PARTS - 1, 0)
    low = (bucket - octave * _PARTS) << octave
    return low, low + (1 << octave)
