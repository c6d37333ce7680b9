"""Which libucp is used: an explicit path, the system's, or that of PyPI's wheel. Finding opens nothing."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "MEMFABRIC_UCX_LIBRARY"
SONAME = "libucp.so.0"
WHEEL = "libucx"


@dataclass(frozen=True)
class Choice:
    """A libucp that may be used.

    Attributes:
        path: for the loader.
        source: why it is looked at, in words.
    """

    path: str
    source: str


def candidates(explicit: str | None = None) -> list[Choice]:
    """What to try, in order. An explicit path is the only one: nothing else is taken in its stead."""
    if explicit:
        return [Choice(explicit, "the path that was given")]
    told = os.environ.get(VARIABLE)
    if told:
        return [Choice(told, f"${VARIABLE}")]
    found = []
    if ctypes.util.find_library("ucp"):
        found.append(Choice(SONAME, "the system's library"))
    wheel = importlib.util.find_spec(WHEEL)
    for place in (wheel.submodule_search_locations or []) if wheel else []:
        path = Path(place, "lib", SONAME)
        if path.exists():
            found.append(Choice(str(path), "the package libucx of this Python"))
    return found


HOW_TO_GET = (
    "install the system's UCX (Debian: apt-get install libucx0, which has InfiniBand) or the extra "
    "(pip install 'memfabric[ucx]', TCP and shared memory only)"
)
