"""Sizes and durations as people write them: ``64KiB``, ``1.5GiB``, ``500ms``, ``1m30s``.

Pure. Responsible for text to whole bytes or nanoseconds and back; it knows no option and no setting.
Parsing is exact (no floating point): what is not a whole number of bytes or nanoseconds is refused, never
rounded.
"""

from __future__ import annotations

import re
from fractions import Fraction

from memfabric.errors import UsageError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

_SIZE_BYTES = {
    "": 1,
    "b": 1,
    "k": KIB,
    "kib": KIB,
    "kb": 1000,
    "m": MIB,
    "mib": MIB,
    "mb": 1000**2,
    "g": GIB,
    "gib": GIB,
    "gb": 1000**3,
    "t": TIB,
    "tib": TIB,
    "tb": 1000**4,
}
_DURATION_NS = {
    "ns": 1,
    "us": 1000,
    "µs": 1000,  # U+00B5, the micro sign of keyboards
    "μs": 1000,  # U+03BC, the Greek letter that looks the same
    "ms": 10**6,
    "s": 10**9,
    "min": 60 * 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
    "d": 86400 * 10**9,
}
_MAX = (1 << 63) - 1
"""Both kinds travel as signed 64-bit integers."""

_NUMBER = r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
_SIZE = re.compile(rf"({_NUMBER})\s*([A-Za-z]*)")
_PART = re.compile(rf"({_NUMBER})\s*([A-Za-zµμ]+)\s*")


def parse_bytes(text: str) -> int:
    """Bytes in a size such as ``4096``, ``64KiB``, ``1.5 GiB`` or ``10GB``.

    ``KiB MiB GiB TiB`` and the short ``K M G T`` are powers of 1024, ``KB MB GB TB`` powers of 1000; case
    does not matter. A plain number counts bytes.

    Raises:
        UsageError: not a size, an unknown unit, not a whole number of bytes, or 2**63 and more.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a size; write for example 4096, 64KiB or 1.5GiB")
    number, unit = match.groups()
    if unit.lower() not in _SIZE_BYTES:
        raise UsageError(f"{text!r} has the unknown unit {unit!r}; known: B KiB MiB GiB TiB, KB MB GB TB")
    return _whole(text, Fraction(number) * _SIZE_BYTES[unit.lower()], "bytes")


def parse_duration_ns(text: str) -> int:
    """Nanoseconds in a duration such as ``500ms``, ``2s``, ``1.5h`` or ``1m30s``; ``0`` needs no unit.

    Raises:
        UsageError: not a duration, no or an unknown unit, not a whole number of nanoseconds, or 2**63 and
            more.
    """
    rest = text.strip()
    if rest == "0":
        return 0
    if re.fullmatch(_NUMBER, rest):
        raise UsageError(f"{text!r} has no unit; write for example {rest}s or {rest}ms")
    total = Fraction(0)
    position = 0
    while match := _PART.match(rest, position):
        number, unit = match.groups()
        if unit not in _DURATION_NS:
            raise UsageError(f"{text!r} has the unknown unit {unit!r}; known: ns us ms s min h d")
        total += Fraction(number) * _DURATION_NS[unit]
        position = match.end()
    if position == 0 or position != len(rest):
        raise UsageError(f"{text!r} is not a duration; write for example 500ms, 2s or 1m30s")
    return _whole(text, total, "nanoseconds")


def format_bytes(size_bytes: int) -> str:
    """A size for people, rounded to three digits: ``0 B``, ``64 KiB``, ``1.5 GiB``, ``-3 MiB``."""
    sign, size = ("-", -size_bytes) if size_bytes < 0 else ("", size_bytes)
    if size < KIB:
        return f"{sign}{size} B"
    name, unit = "TiB", TIB
    for smaller_name, smaller in (("KiB", KIB), ("MiB", MIB), ("GiB", GIB)):
        # 1023.6 KiB would be shown as "1024 KiB": it belongs to the next unit
        if size < smaller * 1023.5:
            name, unit = smaller_name, smaller
            break
    return f"{sign}{_short(size / unit)} {name}"


def spell_bytes(size_bytes: int) -> str:
    """A size that `parse_bytes` reads back exactly, as short as it gets: ``64KiB``, ``1536MiB``, ``4097``."""
    for name, unit in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size_bytes and size_bytes % unit == 0:
            return f"{size_bytes // unit}{name}"
    return str(size_bytes)


def format_duration(duration_ns: int) -> str:
    """A duration for people: ``0 s``, ``830 ns``, ``1.5 ms``, ``42 s``, ``3 min 5 s``, ``2 h 10 min``."""
    if duration_ns < 0:
        return "-" + format_duration(-duration_ns)
    if duration_ns == 0:
        return "0 s"
    for name, unit in (("ns", 1), ("µs", 1000), ("ms", 10**6), ("s", 10**9)):
        limit = 59.5 if name == "s" else 999.5
        if duration_ns < unit * limit:
            return f"{_short(duration_ns / unit)} {name}"
    seconds = (duration_ns + 5 * 10**8) // 10**9
    for large, large_s, small, small_s in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if seconds >= large_s:
            first, second = seconds // large_s, seconds % large_s // small_s
            return f"{first} {large}" + (f" {second} {small}" if second else "")
    return f"{seconds} s"


def spell_duration(duration_ns: int) -> str:
    """A duration that `parse_duration_ns` reads back exactly: ``500ms``, ``2s``, ``0``."""
    for name in ("d", "h", "min", "s", "ms", "us"):
        if duration_ns and duration_ns % _DURATION_NS[name] == 0:
            return f"{duration_ns // _DURATION_NS[name]}{name}"
    return f"{duration_ns}ns" if duration_ns else "0"


def _whole(text: str, value: Fraction, what: str) -> int:
    if value.denominator != 1:
        raise UsageError(f"{text!r} is not a whole number of {what}")
    if value > _MAX:
        raise UsageError(f"{text!r} is too large; the limit is 2**63 - 1 {what}")
    return value.numerator


def _short(value: float) -> str:
    """Three significant digits, without a tail of zeros."""
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
