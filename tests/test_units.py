"""Sizes and durations: what is read, what is refused with which words, and that spelling round-trips."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfabric import units
from memfabric.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("64KiB", 64 << 10),
        ("64 kib", 64 << 10),
        ("64k", 64 << 10),
        ("64KB", 64_000),
        ("1.5GiB", 3 << 29),
        (".5MiB", 1 << 19),
        (" 2T ", 2 << 40),
        ("10gb", 10**10),
        ("1.1KB", 1100),
    ],
)
def test_sizes_are_read(text: str, size_bytes: int) -> None:
    assert units.parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not a size"),
        ("big", "is not a size"),
        ("-1GiB", "is not a size"),
        ("1..5GiB", "is not a size"),
        ("1e9", "is not a size"),
        ("64Kb/s", "is not a size"),
        ("64XiB", "unknown unit 'XiB'"),
        ("1.5B", "not a whole number of bytes"),
        ("0.3KiB", "not a whole number of bytes"),
        ("9000000TiB", "too large"),
        ("٣KiB", "is not a size"),  # other scripts' digits are not what anybody meant
    ],
)
def test_bad_sizes_say_why(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        units.parse_bytes(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "duration_ns"),
    [
        ("0", 0),
        ("5ns", 5),
        ("5us", 5_000),
        ("5µs", 5_000),
        ("500ms", 500_000_000),
        ("2s", 2_000_000_000),
        ("1.5 s", 1_500_000_000),
        ("1m30s", 90 * 10**9),
        ("1min 30s", 90 * 10**9),
        ("2h", 7200 * 10**9),
        ("1d", 86400 * 10**9),
    ],
)
def test_durations_are_read(text: str, duration_ns: int) -> None:
    assert units.parse_duration_ns(text) == duration_ns


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not a duration"),
        ("soon", "is not a duration"),
        ("-1s", "is not a duration"),
        ("5", "write for example 5s"),
        ("5 parsecs", "unknown unit 'parsecs'"),
        ("1s30", "is not a duration"),
        ("0.5ns", "not a whole number of nanoseconds"),
        ("200000d", "too large"),
    ],
)
def test_bad_durations_say_why(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        units.parse_duration_ns(text)
    assert repr(text) in str(caught.value)


@given(st.integers(0, 2**63 - 1))
def test_spelling_reads_back(value: int) -> None:
    assert units.parse_bytes(units.spell_bytes(value)) == value
    assert units.parse_duration_ns(units.spell_duration(value)) == value


@given(st.integers(0, 2**50))
def test_the_format_for_people_is_within_rounding(value: int) -> None:
    shown = units.format_bytes(value)
    number, unit = shown.split()
    assert len(number.replace(".", "")) <= 4, shown
    scale = units.parse_bytes(f"1{unit}")
    assert abs(float(number) * scale - value) <= 0.006 * max(value, 1), shown


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (65536, "64 KiB"),
        (1536 << 20, "1.5 GiB"),
        ((1 << 20) - 1, "1 MiB"),
        (5000 << 40, "5000 TiB"),
        (-(3 << 20), "-3 MiB"),
    ],
)
def test_sizes_for_people(size_bytes: int, text: str) -> None:
    assert units.format_bytes(size_bytes) == text


@pytest.mark.parametrize(
    ("duration_ns", "text"),
    [
        (0, "0 s"),
        (830, "830 ns"),
        (1_500, "1.5 µs"),
        (1_500_000, "1.5 ms"),
        (999_999_999, "1 s"),
        (42 * 10**9, "42 s"),
        (60 * 10**9, "1 min"),
        (185 * 10**9, "3 min 5 s"),
        (7800 * 10**9, "2 h 10 min"),
        (99 * 3600 * 10**9, "4 d 3 h"),
        (-(10**9), "-1 s"),
    ],
)
def test_durations_for_people(duration_ns: int, text: str) -> None:
    assert units.format_duration(duration_ns) == text
