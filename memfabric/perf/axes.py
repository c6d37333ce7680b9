"""The axes of a sweep as people write them: lists and ranges of numbers, transports with options."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from memfabric import units
from memfabric.errors import UsageError

MOST_VALUES = 256
_STEP = re.compile(r"([x+])(.+)")


def numbers(text: str, parse: Callable[[str], int], what: str) -> list[int]:
    """Values of an axis: ``1,16,128`` or ``4KiB:2MiB:x4`` (from, to, times) or ``1:8:+1`` (plus), or both, with commas.

    Args:
        parse: reads one value. what: names the axis in errors.

    Returns:
        The distinct values in the order given. A range ends with the last value that does not exceed its end.

    Raises:
        UsageError: says which part is wrong and how it is written.
    """
    found: list[int] = []
    for part in text.split(","):
        found += _range(part.strip(), parse, what) if ":" in part else [parse(part.strip())]
        if len(found) > MOST_VALUES:
            raise UsageError(f"{what} {text!r} has over {MOST_VALUES} values; take a larger step")
    return list(dict.fromkeys(found))


def _range(text: str, parse: Callable[[str], int], what: str) -> list[int]:
    ends = text.split(":")
    step = _STEP.fullmatch(ends[2].strip()) if len(ends) == 3 else None
    if step is None:
        raise UsageError(f"{what} {text!r} is not a range; write FROM:TO:xFACTOR or FROM:TO:+STEP, as in 4KiB:2MiB:x4")
    first, last = parse(ends[0].strip()), parse(ends[1].strip())
    by = whole(step[2]) if step[1] == "x" else parse(step[2])
    if by < (2 if step[1] == "x" else 1):
        raise UsageError(f"{what} {text!r} never gets to its end; the factor is at least 2, the step at least 1")
    if first > last or (step[1] == "x" and first < 1):
        raise UsageError(f"{what} {text!r} holds nothing: it goes from {ends[0]} up to {ends[1]}")
    found = [first]
    while len(found) <= MOST_VALUES:
        following = found[-1] * by if step[1] == "x" else found[-1] + by
        if following > last:
            break
        found.append(following)
    return found


def sizes(text: str, what: str = "block size") -> list[int]:
    """Bytes; see `numbers`."""
    return numbers(text, units.parse_bytes, what)


def counts(text: str, what: str) -> list[int]:
    """Whole numbers; see `numbers`."""
    return numbers(text, whole, what)


def whole(text: str) -> int:
    """A whole number from 0.

    Raises:
        UsageError: it is none.
    """
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise UsageError(f"{text!r} is not a whole number")
    return int(text)


@dataclass(frozen=True)
class Fabric:
    """A transport with the options that its clients are made with.

    Attributes:
        label: names it in results: as it was written, unless it was given a name.
        name: in the registry, or ``auto``.
        options: keyword arguments.
    """

    label: str
    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def arguments(self) -> dict[str, Any]:
        """The options as a dictionary."""
        return dict(self.options)


def fabric(text: str) -> Fabric:
    """A transport as ``shm`` or ``ucx:tls=tcp;lanes=2`` or, with a name of one's own, ``two=ucx:lanes=2``.

    Values of options are JSON where they can be read so, else text.

    Raises:
        UsageError: it is written otherwise.
    """
    name, _, rest = text.strip().partition(":")
    label, named, name = name.rpartition("=")
    options: list[tuple[str, Any]] = []
    for part in rest.split(";") if rest else []:
        key, equals, value = part.partition("=")
        if not equals or not key.strip().isidentifier():
            raise UsageError(f"transport {text!r}: {part!r} is not an option; write NAME:OPTION=VALUE;OPTION=VALUE")
        try:
            options.append((key.strip(), json.loads(value)))
        except ValueError:
            options.append((key.strip(), value.strip()))
    if not name or (named and not label):
        raise UsageError(f"transport {text!r} has no name; write NAME, NAME:OPTION=VALUE or LABEL=NAME:OPTION=VALUE")
    return Fabric(label or text.strip(), name, tuple(options))
