"""Transports by name: this package's, and those that others' packages bring.

A third party's package announces its own in the entry point group ``memfabric.transports``: name = ``module:Class``, a
subclass of `transport.base.Transport` that passes `transport.testing.ConformanceSuite`. Nothing is imported before it
is asked for, and a transport that can't be used here is an error with its reason, never a silent absence.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from importlib import metadata
from typing import Any

from transport.base import Transport
from transport.errors import TransportError, UnsupportedError

GROUP = "memfabric.transports"
OWN = {
    "shm": "transport.shm:ShmTransport",
    "verbs": "transport.verbs:VerbsTransport",
    "ucx": "transport.ucx:UcxTransport",
    "loopback": "transport.loopback:LoopbackTransport",
}


@functools.cache
def _others() -> dict[str, metadata.EntryPoint]:
    return {point.name: point for point in metadata.entry_points(group=GROUP) if point.name not in OWN}


def names() -> list[str]:
    """All that are known, this package's first."""
    return [*OWN, *sorted(_others())]


def find(name: str) -> type[Transport]:
    """The class behind a name.

    Raises:
        UnsupportedError: No such transport, or it can't be imported; the message says why.
    """
    try:
        if name in OWN:
            module, _, attribute = OWN[name].partition(":")
            found = getattr(importlib.import_module(module), attribute)
        elif name in _others():
            found = _others()[name].load()
        else:
            raise UnsupportedError(f"there is no transport {name[:64]!r} here; there are: {', '.join(names())}")
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(f"transport {name!r} can't be imported: {error}") from error
    if not (inspect.isclass(found) and issubclass(found, Transport)):
        raise UnsupportedError(f"transport {name!r}: {found!r} is not a transport.Transport")
    return found


def create(name: str, **options: Any) -> Transport:
    """Make a transport.

    Raises:
        UnsupportedError: It is not known, or can't be used here. ValueError, TypeError: An option is wrong.
    """
    return find(name)(**options)


def why_not(name: str, **options: Any) -> str:
    """Why a transport can't be used here; empty when it can."""
    try:
        create(name, **options).close()
    except (TransportError, OSError) as error:
        return str(error) or repr(error)
    return ""
