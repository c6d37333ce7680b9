"""Lists, ranges and transports as people write them."""

from __future__ import annotations

import pytest

from memfabric.errors import UsageError
from memfabric.perf.axes import counts, fabric, sizes
from memfabric.units import KIB, MIB


def test_ranges_and_lists_mix_and_keep_their_order() -> None:
    assert sizes("4KiB:2MiB:x4") == [4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB]
    assert sizes("1MiB, 4KiB:16KiB:+4KiB,8KiB") == [MIB, 4 * KIB, 8 * KIB, 12 * KIB, 16 * KIB]
    assert counts("1:8:x2,3", "batch") == [1, 2, 4, 8, 3]
    assert counts("0", "threads") == [0]
    assert counts("5:5:+1", "depth") == [5]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "''"),
        ("4KiB:2MiB", "FROM:TO:xFACTOR"),
        ("4KiB:2MiB:4", "FROM:TO:xFACTOR"),
        ("4KiB:2MiB:x1", "never gets to its end"),
        ("4KiB:2MiB:+0", "never gets to its end"),
        ("2MiB:4KiB:x2", "holds nothing"),
        ("0:4KiB:x2", "holds nothing"),
        ("1:1MiB:+1", "over 256 values"),
        ("4KB:x", "FROM:TO:xFACTOR"),
        ("-4KiB", "-4KiB"),
    ],
)
def test_what_is_no_axis_is_refused_with_the_part_that_is_wrong(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says.replace("+", r"\+")):
        sizes(text)


def test_counts_are_whole() -> None:
    for text in ("1.5", "-1", "x", "1e3", "٣"):  # the last is a digit, but not one of ours
        with pytest.raises(UsageError, match="not a whole number"):
            counts(text, "batch")


def test_a_transport_has_a_name_and_options() -> None:
    assert fabric("shm").arguments() == {}
    found = fabric("ucx:tls=tcp,self;lanes=2;spin=true")
    assert (found.name, found.arguments()) == ("ucx", {"tls": "tcp,self", "lanes": 2, "spin": True})
    assert found.label == "ucx:tls=tcp,self;lanes=2;spin=true"
    named = fabric('rc=ucx:tls=rc;settings={"RC_RETRY": 3}')
    assert (named.label, named.name, named.arguments()) == ("rc", "ucx", {"tls": "rc", "settings": {"RC_RETRY": 3}})
    for text in ("=ucx", "rc=", "ucx:tls", "ucx:=1", ":tls=tcp", "", "ucx:a b=1"):
        with pytest.raises(UsageError, match="transport"):
            fabric(text)
